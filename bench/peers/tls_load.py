"""A load over TLS or without it: WebSocket readers that check, and publishers over HTTP.

The load generator in C speaks no TLS. This is asyncio with Python's own TLS, on uvloop, slower than
the server. So what is compared is the server's CPU, not rates and hardly latencies. Prints one JSON
object.
"""

import argparse
import asyncio
import base64
import json
import os
import ssl
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import uvloop

TOPIC: Final = "bench-0"
# With the envelope around it a delivered message has some 250 bytes.
PADDING: Final = "x" * 60
# How long everything that was published may take to arrive.
DRAIN_S: Final = 10.0


class Reader(asyncio.Protocol):
    """A subscriber that checks each message: its offset, and its number among its publisher's."""

    def __init__(self) -> None:
        self.ready = asyncio.get_running_loop().create_future()
        self.delivered = 0
        self.faults = 0
        self.latencies_ms: list[float] = []
        self._buffer = b""
        self._is_open = False
        # Publisher -> the number of its last message.
        self._last: dict[int, int] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the topic."""
        key = base64.b64encode(os.urandom(16)).decode()
        head = (
            f"GET /subscribe?topic={TOPIC}&last=0 HTTP/1.1\r\nHost: localhost\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {key}\r\n\r\n"
        )
        cast(asyncio.Transport, transport).write(head.encode())

    def data_received(self, data: bytes) -> None:
        """Take whole frames."""
        self._buffer += data
        if not self._is_open:
            head, end, rest = self._buffer.partition(b"\r\n\r\n")
            if not end:
                return
            if b" 101 " not in head:
                self.ready.set_exception(RuntimeError(head.decode()))
                return
            self._is_open, self._buffer = True, rest
            self.ready.set_result(None)
        start, view = 0, self._buffer
        while len(view) - start >= 4:
            size, begin = view[start + 1], start + 2
            if size == 126:
                size, begin = int.from_bytes(view[start + 2 : start + 4], "big"), start + 4
            if size > 65_535 or len(view) < begin + size:
                break
            if view[start] == 0x81:
                self._take(json.loads(view[begin : begin + size]))
            start = begin + size
        self._buffer = view[start:]

    def _take(self, message: dict[str, Any]) -> None:
        data = message["data"]
        self.delivered += 1
        last = self._last.get(data["p"], 0)
        self.faults += data["s"] != last + 1 or message["offset"] != self.delivered
        self._last[data["p"]] = data["s"]
        self.latencies_ms.append((time.monotonic_ns() - data["t"]) / 1e6)


class Publisher(asyncio.Protocol):
    """A publisher over a kept connection, one message after the other's answer."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._answered: asyncio.Future[bytes] | None = None
        self._buffer = b""
        self.transport: asyncio.Transport
        self.sent = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Take the answer once it is whole."""
        self._buffer += data
        if self._buffer.endswith(b"}") and self._answered is not None:
            answer, self._buffer = self._buffer, b""
            self._answered.set_result(answer)

    async def publish(self, due_ns: int) -> None:
        """Publish one message, and wait for its answer."""
        self.sent += 1
        data = {"p": self._number, "s": self.sent, "t": due_ns, "x": PADDING}
        body = json.dumps({"topic": TOPIC, "data": data}).encode()
        head = f"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        self._answered = asyncio.get_running_loop().create_future()
        self.transport.write(head.encode() + body)
        answer = await self._answered
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.decode())


def cpu_s(pid: int) -> float:
    """Return the CPU time of all threads of a process (proc(5), schedstat)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


async def by_schedule(publishers: Sequence[Publisher], rate: float, seconds: float) -> None:
    """Publish by a schedule, each message when it is due."""
    start = time.monotonic_ns()
    for number in range(int(rate * seconds)):
        due = start + int(number * 1e9 / rate)
        await asyncio.sleep(max(0.0, (due - time.monotonic_ns()) / 1e9))
        await publishers[number % len(publishers)].publish(due)


async def as_fast_as_answers_come(publishers: Sequence[Publisher], seconds: float) -> None:
    """Publish on all connections at once, in a closed loop."""
    end = time.monotonic() + seconds

    async def publish(publisher: Publisher) -> None:
        while time.monotonic() < end:
            await publisher.publish(time.monotonic_ns())

    await asyncio.gather(*map(publish, publishers))


def _least(readers: Sequence[Reader]) -> int:
    return min(reader.delivered for reader in readers)


async def measure(options: argparse.Namespace) -> dict[str, float]:
    """Connect all, publish, and wait until all readers have all."""
    loop = asyncio.get_running_loop()
    context = None
    if options.tls:
        # The certificate is one for this run alone, and checking it would cost the load.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    at: dict[str, Any] = {"host": "127.0.0.1", "port": options.port, "ssl": context}
    readers = [(await loop.create_connection(Reader, **at))[1] for _ in range(options.subs)]
    await asyncio.gather(*(reader.ready for reader in readers))
    publishers = [
        (await loop.create_connection(partial(Publisher, number), **at))[1]
        for number in range(options.pubs)
    ]
    server_s, load_s, began = cpu_s(options.pid), time.process_time(), time.monotonic()
    if options.rate:
        await by_schedule(publishers, options.rate, options.seconds)
    else:
        await as_fast_as_answers_come(publishers, options.seconds)
    published = sum(publisher.sent for publisher in publishers)
    end = time.monotonic() + DRAIN_S
    while _least(readers) < published and time.monotonic() < end:  # noqa: ASYNC110  # no figure
        await asyncio.sleep(0.01)
    server_s, wall_s = cpu_s(options.pid) - server_s, time.monotonic() - began
    latencies = [each for reader in readers for each in reader.latencies_ms]
    return {
        "published": published,
        "delivered": sum(reader.delivered for reader in readers),
        "missing": published * len(readers) - sum(reader.delivered for reader in readers),
        "faults": sum(reader.faults for reader in readers),
        "p50": quantile(latencies, 0.5),
        "p99": quantile(latencies, 0.99),
        "server_s": server_s,
        "load_share": (time.process_time() - load_s) / wall_s,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True, help="the server's, for its CPU time")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--subs", type=int, default=1)
    parser.add_argument("--pubs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0, help="0: as fast as answers come")
    parser.add_argument("--seconds", type=float, default=3)
    sys.stdout.write(json.dumps(uvloop.run(measure(parser.parse_args()))) + "\n")


if __name__ == "__main__":
    main()
