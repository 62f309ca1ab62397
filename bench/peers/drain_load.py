"""Readers that are sent away by a daemon and come back to the next one.

Made of bytes on asyncio, in one process: they do what docs/wire.md asks of a client, and no more.
Prints a line when all are in, and one when all are back. Then it reads the offset that was
acknowledged last, and prints one JSON object when all have that, or after a time limit: what is
missing, and how many left and came in each 100 ms.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import uvloop

HANDSHAKE = (
    "GET /subscribe?topic=t{query} HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: clevrd.v1\r\n\r\n"
)
# A close frame with the code 1012 and a mask of zeros.
CLOSE = b"\x88\x82\x00\x00\x00\x00\x03\xf4"
PONG = b"\x8a\x80\x00\x00\x00\x00"
# How long a reader waits that is refused without a time: up to this, doubled each time, and drawn.
FIRST_WAIT_S = 0.25
MAX_WAIT_S = 30.0
AT_ONCE = 200
BUCKET_S = 0.1


def bucket_of(at_s: float) -> int:
    """Return the bucket of a moment."""
    return int(at_s / BUCKET_S)


class Tally:
    """What all readers have seen."""

    def __init__(self) -> None:
        self.out_of_order = 0
        self.gaps = 0
        # By 100 ms: connections that ended as planned, handshakes at the time for which each was
        # planned (10,000 readers in one process are late themselves), and those that were taken.
        self.left: Counter[int] = Counter()
        self.asked: Counter[int] = Counter()
        self.came: Counter[int] = Counter()

    @staticmethod
    def now() -> int:
        """Return the bucket of the moment."""
        return bucket_of(time.monotonic())


class Reader:
    """One reader, over all of its connections."""

    def __init__(self, port: int, tally: Tally) -> None:
        self._port = port
        self._tally = tally
        self.epoch = ""
        self.offset = 0
        self.is_in = asyncio.Event()
        self.times_in = 0
        self._wait_s = FIRST_WAIT_S

    async def run(self) -> None:
        """Read for ever."""
        due_s = time.monotonic()
        while True:
            self._tally.asked[bucket_of(due_s)] += 1
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError:
                wait_s = self._backoff_s()
            else:
                try:
                    wait_s = await self._one_connection(reader, writer)
                except (OSError, asyncio.IncompleteReadError):
                    wait_s = self._backoff_s()
                finally:
                    writer.close()
            due_s = time.monotonic() + wait_s
            await asyncio.sleep(wait_s)

    def _backoff_s(self) -> float:
        wait_s, self._wait_s = self._wait_s, min(MAX_WAIT_S, 2 * self._wait_s)
        return wait_s * random.random()  # noqa: S311 - no secret

    async def _one_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> float:
        """Read one connection to its end; return for how long to wait then."""
        query = f"&epoch={self.epoch}&offset={self.offset}" if self.epoch else ""
        writer.write(HANDSHAKE.format(query=query).encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if not head.startswith("HTTP/1.1 101 "):
            asked = [line for line in head.split("\r\n") if line.lower().startswith("retry-after:")]
            return (float(asked[0].split(":")[1]) if asked else 0.0) + self._backoff_s()
        self._tally.came[self._tally.now()] += 1
        self._wait_s = FIRST_WAIT_S
        self.times_in += 1
        away_s = 0.0
        while True:
            opcode, size = await reader.readexactly(2)
            if size == 126:
                size = int.from_bytes(await reader.readexactly(2), "big")
            payload = await reader.readexactly(size)
            if opcode == 0x88:
                writer.write(CLOSE)
                self._tally.left[self._tally.now()] += 1
                return away_s
            if opcode == 0x89:
                writer.write(PONG)
            elif opcode == 0x81:
                told = json.loads(payload)
                if told.get("type") == "going_away":
                    away_s = told["reconnect_after_ms"] / 1000
                else:
                    self._take(told)

    def _take(self, told: dict[str, Any]) -> None:
        kind = told.get("type")
        if kind == "subscribed":
            if not self.epoch:
                self.offset = told["offset"]
            self.epoch = told["epoch"]
            self.is_in.set()
        elif kind == "gap":
            self._tally.gaps += 1
        elif kind is None:
            self._tally.out_of_order += told["offset"] != self.offset + 1
            self.offset = told["offset"]


def busiest(counts: Counter[int]) -> int:
    """Return the most of any 100 ms."""
    return max(counts.values(), default=0)


async def until(claim: Callable[[], bool], end_s: float) -> None:
    """Wait until ``claim()`` is true, or ``end_s`` has come."""
    while not claim() and time.monotonic() < end_s:  # noqa: ASYNC110 - no event for so many
        await asyncio.sleep(BUCKET_S)


async def measure(port: int, count: int, limit_s: float) -> dict[str, Any]:
    """Connect the readers, wait until each has come back, and return what was seen."""
    tally = Tally()
    readers = [Reader(port, tally) for _ in range(count)]
    tasks = []
    for at in range(0, count, AT_ONCE):
        some = readers[at : at + AT_ONCE]
        tasks += [asyncio.create_task(reader.run()) for reader in some]
        await asyncio.gather(*(reader.is_in.wait() for reader in some))
    for counts in (tally.asked, tally.came):
        counts.clear()
    say("all are in")
    end_s = time.monotonic() + limit_s
    await until(lambda: all(reader.times_in >= 2 for reader in readers), end_s)
    say("all are back")
    upto = int(await asyncio.to_thread(sys.stdin.readline))
    await until(lambda: all(reader.offset >= upto for reader in readers), end_s)
    for task in tasks:
        task.cancel()
    return {
        "back": sum(reader.times_in >= 2 for reader in readers),
        "missing": sum(max(0, upto - reader.offset) for reader in readers),
        "out_of_order": tally.out_of_order,
        "gaps": tally.gaps,
        "left_in_100_ms": busiest(tally.left),
        "asked_in_100_ms": busiest(tally.asked),
        "came_in_100_ms": busiest(tally.came),
        "asked": sum(tally.asked.values()),
        "seconds": (max(tally.came) - min(tally.left)) * BUCKET_S if tally.came else limit_s,
    }


def say(line: str) -> None:
    """Print a line, and have it read."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--readers", type=int, default=10_000)
    parser.add_argument("--limit", type=float, default=60.0)
    options = parser.parse_args()
    seen = uvloop.run(measure(options.port, options.readers, options.limit))
    say(json.dumps(seen))


if __name__ == "__main__":
    main()
