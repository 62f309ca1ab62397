"""The same as a journal, without clevrd: an engine's own client appends messages and reads them.

One thread appends all that is due in one go, waits until the engine has it, reads it back and
compares it with what it wrote. Prints one JSON object: what was lost or out of order, how late, and
the CPU of a message.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, Protocol

PAYLOAD = b"x" * 242


class Log(Protocol):
    """An engine's client; another engine adds a class, and its name to `LOGS`."""

    def append(self, messages: list[bytes]) -> None:
        """Return when all of them are taken."""

    def read(self) -> list[bytes]:
        """Return what was appended since the last call."""


class SqliteLog:
    """A table in WAL mode, flushed to the disk with each transaction."""

    def __init__(self, place: str) -> None:
        import apsw

        self._connection = apsw.Connection(place + ".db")
        self._connection.execute("PRAGMA journal_mode = wal")
        self._connection.execute("PRAGMA synchronous = full")
        self._connection.execute("CREATE TABLE log (position INTEGER PRIMARY KEY, message BLOB)")
        self._position = 0

    def append(self, messages: list[bytes]) -> None:
        """Insert them in one transaction."""
        with self._connection:
            self._connection.executemany(
                "INSERT INTO log (message) VALUES (?)", [(message,) for message in messages]
            )

    def read(self) -> list[bytes]:
        """Select what is behind the last one."""
        query = "SELECT position, message FROM log WHERE position > ? ORDER BY position"
        rows = list(self._connection.execute(query, (self._position,)))
        if rows:
            self._position = rows[-1][0]
        return [message for _, message in rows]


class RedisLog:
    """A stream; the commands of one go are one write."""

    def __init__(self, place: str) -> None:
        from redis import Redis

        self._redis: Any = Redis.from_url(place)
        self._position = b"0"

    def append(self, messages: list[bytes]) -> None:
        """Add them in a pipeline."""
        pipeline = self._redis.pipeline(transaction=False)
        for message in messages:
            pipeline.xadd("log", {"m": message})
        pipeline.execute()

    def read(self) -> list[bytes]:
        """Read what is behind the last one."""
        found = self._redis.xread({"log": self._position})
        if not found:
            return []
        ((_, entries),) = found
        self._position = entries[-1][0]
        return [fields[b"m"] for _, fields in entries]


LOGS: dict[str, Callable[[str], Log]] = {"sqlite": SqliteLog, "redis": RedisLog}


def measure(log: Log, rate: float, seconds: float) -> dict[str, float]:
    """Append by a schedule for so long."""
    latencies_ms: list[float] = []
    sent = wrong = 0
    begun_cpu, begun = time.process_time(), time.monotonic()
    while sent < rate * seconds:
        due = min(int((time.monotonic() - begun) * rate), int(rate * seconds))
        if due <= sent:
            time.sleep(0.0002)
            continue
        messages = [b"%08d" % number + PAYLOAD for number in range(sent, due)]
        log.append(messages)
        found = log.read()
        now = time.monotonic() - begun
        wrong += sum(one != other for one, other in zip(found, messages, strict=False))
        wrong += abs(len(found) - len(messages))
        latencies_ms += [(now - number / rate) * 1e3 for number in range(sent, due)]
        sent = due
    cpu_us = (time.process_time() - begun_cpu) * 1e6 / sent
    latencies_ms.sort()
    p50, p99 = (latencies_ms[int(len(latencies_ms) * share)] for share in (0.5, 0.99))
    return {"wrong": wrong, "p50": p50, "p99": p99, "cpu_us": cpu_us}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=LOGS)
    parser.add_argument("place")
    parser.add_argument("--rate", type=float, default=1_000)
    parser.add_argument("--seconds", type=float, default=3)
    options = parser.parse_args()
    log = LOGS[options.engine](options.place)
    print(json.dumps(measure(log, options.rate, options.seconds)))


if __name__ == "__main__":
    main()
