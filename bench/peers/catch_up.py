"""A reader that begins at a topic's first message: how fast it has all, and what that costs.

It publishes the messages first, in batches, and then reads them over one WebSocket after the other.
Every message's offset is compared with the one before. Prints one JSON object.
"""

import argparse
import http.client
import json
import re
import socket
import time

OFFSET = re.compile(rb'"offset":(\d+)\}')
BATCH = 1_000
# An offset may be cut off at the end of what was received.
CUT_BYTES = 32
READ_BYTES = 1 << 20
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
TIMEOUT_S = 60.0


def publish(port: int, messages: int, data_bytes: int) -> str:
    """Publish messages of one topic; return its epoch."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    line = json.dumps({"topic": "t", "data": "x" * (data_bytes - 2)}) + "\n"
    epoch = ""
    for _ in range(messages // BATCH):
        connection.request("POST", "/publish/batch", line * BATCH)
        answer = json.loads(connection.getresponse().read())
        if not answer["success"]:
            raise SystemExit(f"refused: {answer}")
        epoch = answer["results"][0]["epoch"]
    connection.close()
    return epoch


def catch_up(port: int, epoch: str, messages: int) -> tuple[float, int]:
    """Read all messages; return the seconds, and how many were not where they should be."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as reader:
        begun = time.perf_counter()
        reader.sendall(
            f"GET /subscribe?topic=t&offset=0&epoch={epoch} HTTP/1.1\r\nHost: bench\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {KEY}\r\n\r\n".encode()
        )
        had = wrong = 0
        rest = b""
        while had < messages:
            received = reader.recv(READ_BYTES)
            if not received:
                raise SystemExit(f"closed after {had} messages")
            chunk = rest + received
            end = 0
            offsets = []
            for found in OFFSET.finditer(chunk):
                offsets.append(int(found[1]))
                end = found.end()
            wrong += sum(
                one != other
                for one, other in zip(offsets, range(had + 1, had + 1 + len(offsets)), strict=True)
            )
            had += len(offsets)
            rest = chunk[max(end, len(chunk) - CUT_BYTES) :]
        return time.perf_counter() - begun, wrong + abs(had - messages)


def cpu_s(pid: int) -> float:
    """Return a process's CPU time by the scheduler's nanoseconds: see clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True, help="whose CPU time to read")
    parser.add_argument("--messages", type=int, default=300_000)
    parser.add_argument("--data-bytes", type=int, default=102)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    epoch = publish(options.port, options.messages, options.data_bytes)
    seconds, cpus, wrong = [], [], 0
    for _ in range(options.times):
        before_s = cpu_s(options.pid)
        took_s, faults = catch_up(options.port, epoch, options.messages)
        cpus.append(cpu_s(options.pid) - before_s)
        seconds.append(took_s)
        wrong += faults
    print(json.dumps({"wrong": wrong, "seconds": seconds, "cpu_s": cpus}))


if __name__ == "__main__":
    main()
