"""A client that means ill, or is badly written: it sends what is costly, as fast as it is taken.

One attack over some connections for a bounded time. What is answered is read and thrown away.
"""

import argparse
import json
import selectors
import socket
import time
from collections.abc import Callable, Mapping

UPGRADE = (
    "GET {path} HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Protocol: clevrd.v1\r\n\r\n"
)
MASK = b"\x21\x43\x65\x87"
READ_BYTES = 1 << 20
SEND_BYTES = 1 << 20


def upgrade(path: str) -> bytes:
    """Return a WebSocket handshake."""
    return UPGRADE.format(path=path).encode()


def get(path: str, *fields: str) -> bytes:
    """Return a request without a body."""
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: bench", *fields, "", ""]).encode()


def post(body: bytes, path: str = "/publish") -> bytes:
    """Return a publish, or a batch, as bytes."""
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def frame(payload: bytes) -> bytes:
    """Return a masked text frame."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return b"\x81" + length + MASK + bytes(byte ^ MASK[i % 4] for i, byte in enumerate(payload))


def command(**fields: object) -> bytes:
    """Return a command of /ws."""
    return frame(json.dumps(fields).encode())


def publish_of(data: bytes, topic: bytes = b"hostile") -> bytes:
    """Return the body of a publish."""
    return b'{"topic":"%b","data":%b}' % (topic, data)


def in_chunks(body: bytes) -> bytes:
    """Return a publish whose body comes in chunks of one byte."""
    head = b"POST /publish HTTP/1.1\r\nHost: bench\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


def nested() -> bytes:
    """Return bodies that are nested deeper than is allowed."""
    return post(publish_of(b"[" * 9_900 + b"]" * 9_900)) * 50


def brackets() -> bytes:
    """Return bodies of a MiB that are nothing but brackets, as deep as is allowed."""
    return post(publish_of(b"[%b]" % b",".join([b"[" * 500 + b"]" * 500] * 1_000)))


def flat() -> bytes:
    """Return bodies of 20 KB."""
    return post(publish_of(b"[%b]" % b",".join([b"1234567"] * 2_500))) * 50


def batches() -> bytes:
    """Return batches of 10,000 messages."""
    return post((publish_of(b"1") + b"\n") * 10_000, "/publish/batch")


# Attack -> what is sent once on each connection, and what is sent again and again.
ATTACKS: Mapping[str, Callable[[], tuple[bytes, bytes]]] = {
    "nested": lambda: (b"", nested()),
    "brackets": lambda: (b"", brackets()),
    "flat": lambda: (b"", flat()),
    "batches": lambda: (b"", batches()),
    "chunks": lambda: (b"", in_chunks(publish_of(b'"%b"' % (b"x" * 250_000)))),
    "frames": lambda: (upgrade("/publish"), frame(b"{}") * 30_000),
    "publishes": lambda: (upgrade("/publish"), frame(publish_of(b"1")) * 10_000),
    "patterns": lambda: (
        upgrade("/ws"),
        (command(type="subscribe", pattern="t.*") + command(type="unsubscribe", pattern="t.*"))
        * 500,
    ),
    "metrics": lambda: (b"", get("/metrics?topics=10000") * 4),
    "polls": lambda: (b"", get("/subscribe?topic=hot&poll=1&last=1000") * 16),
    # Each connection asks once and stays.
    "handshakes": lambda: (upgrade("/subscribe?topic=hostile"), b""),
    "streams": lambda: (get("/subscribe?topic=hostile", "Accept: text/event-stream"), b""),
}


class Connection:
    """One connection of the attack."""

    def __init__(self, port: int, first: bytes, again: bytes) -> None:
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.connect_ex(("127.0.0.1", port))
        self._first = first
        self._again = again
        self._rest = memoryview(first or again)

    def send(self) -> bool:
        """Send what the socket takes; return whether there will be more."""
        try:
            sent = self.socket.send(self._rest[:SEND_BYTES])
        except BlockingIOError:
            return True
        self._rest = self._rest[sent:]
        if not self._rest:
            self._rest = memoryview(self._again)
        return bool(self._rest)


def attack(port: int, name: str, connections: int, seconds: float) -> int:
    """Attack for so long; return how often a connection was ended and opened again."""
    first, again = ATTACKS[name]()
    selector = selectors.DefaultSelector()
    both = selectors.EVENT_READ | selectors.EVENT_WRITE

    def connect() -> None:
        one = Connection(port, first, again)
        selector.register(one.socket, both, one)

    for _ in range(connections):
        connect()
    ended = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for key, events in selector.select(0.1):
            one: Connection = key.data
            try:
                if events & selectors.EVENT_READ and not one.socket.recv(READ_BYTES):
                    raise ConnectionResetError
                if events & selectors.EVENT_WRITE and not one.send():
                    selector.modify(one.socket, selectors.EVENT_READ, one)
            except BlockingIOError:
                continue
            except OSError:
                ended += 1
                selector.unregister(one.socket)
                one.socket.close()
                connect()
    return ended


def main() -> None:
    """Attack as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--attack", choices=ATTACKS, required=True)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    ended = attack(options.port, options.attack, options.connections, options.seconds)
    print(json.dumps({"ended": ended}))


if __name__ == "__main__":
    main()
