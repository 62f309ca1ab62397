"""A load as users write it: aiohttp's own client, subscribing and publishing, in one process.

Prints one JSON object: what was delivered, what was out of order, and how late. Slower than the
server it measures, so it shows what such a script sees, not what the server can do.
"""

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field

import aiohttp
import uvloop


@dataclass
class Tally:
    """What all readers have had."""

    delivered: int = 0
    out_of_order: int = 0
    latencies_ms: list[float] = field(default_factory=list)

    def count(self, sequence: int, expected: int, sent_ns: int) -> None:
        """Take one message into account."""
        self.delivered += 1
        self.out_of_order += sequence != expected
        self.latencies_ms.append((time.monotonic_ns() - sent_ns) / 1e6)


async def read(ws: aiohttp.ClientWebSocketResponse, tally: Tally, messages: int) -> None:
    """Read this many messages, checking that they come in order."""
    for expected in range(1, messages + 1):
        data = json.loads(await ws.receive_str())["data"]
        tally.count(data["s"], expected, data["t"])


async def publish(session: aiohttp.ClientSession, url: str, rate: float, messages: int) -> None:
    """Publish by a schedule; each message carries when it was due."""
    start = time.monotonic_ns()
    for sequence in range(1, messages + 1):
        due = start + int(sequence * 1e9 / rate)
        await asyncio.sleep(max(0.0, (due - time.monotonic_ns()) / 1e9))
        body = {"topic": "bench-0", "data": {"s": sequence, "t": due, "p": "x" * 60}}
        async with session.post(f"{url}/publish", json=body) as answer:
            answer.raise_for_status()
            await answer.read()


async def measure(url: str, subs: int, rate: float, seconds: float) -> Tally:
    """Connect the readers, publish, and wait (for a bounded time) until all have read all."""
    tally = Tally()
    messages = int(rate * seconds)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        sockets = [await session.ws_connect(f"{url}/subscribe?topic=bench-0") for _ in range(subs)]
        async with asyncio.timeout(seconds * 3 + 5), asyncio.TaskGroup() as group:
            for ws in sockets:
                group.create_task(read(ws, tally, messages))
            group.create_task(publish(session, url, rate, messages))
    return tally


def quantile(ordered: list[float], share: float) -> float:
    """Return a quantile of a sorted list."""
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--subs", type=int, default=50)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--seconds", type=float, default=3)
    options = parser.parse_args()
    tally = uvloop.run(measure(options.url, options.subs, options.rate, options.seconds))
    ordered = sorted(tally.latencies_ms)
    expected = options.subs * int(options.rate * options.seconds)
    result = {
        "missing": expected - tally.delivered,
        "out_of_order": tally.out_of_order,
        "p50": quantile(ordered, 0.5),
        "p99": quantile(ordered, 0.99),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
