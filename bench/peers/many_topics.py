"""Makes a journal in SQLite with many topics, as a daemon would: one message of each."""

import argparse
import asyncio
import time

from msgspec import Raw

from clevrd.core.publish_request import PublishRequest
from clevrd.journal.base import Checkpoint
from clevrd.journal.engines import engine_of
from clevrd.journal.fold import Fold
from clevrd.journal.records import Header, Run, encode_record, lines_of
from clevrd.journal.settings import JournalSettings
from clevrd.tenants import DEFAULT_TENANT

PER_RECORD = 1_000
RECORDS_PER_CHECKPOINT = 100
DATA = Raw(b'"' + b"x" * 100 + b'"')


async def fill(directory: str, topics: int) -> None:
    """Append a message to each of so many topics."""
    engine = engine_of(JournalSettings(directory=directory), lambda: time.time_ns() // 1_000)
    await engine.open()
    fold = Fold(0, 1, keeps_topics=True)
    stamp = await engine.stamp(0)
    for number in range(topics // PER_RECORD):
        names = [f"topic.{number}.{place}" for place in range(PER_RECORD)]
        lines = [lines_of([PublishRequest(name, DATA)], None) for name in names]
        runs = tuple(
            Run(DEFAULT_TENANT, name, 1, len(line)) for name, line in zip(names, lines, strict=True)
        )
        header = Header(stamp, "be", number + 1, time.time_ns() // 1_000, runs)
        record = encode_record(header, lines)
        placed = fold.plan(header, len(record) - sum(map(len, lines)))
        await engine.append(0, record, stamp, placed)
        for position, read in await engine.read(0, fold.position):
            fold.apply(position, read)
        if number % RECORDS_PER_CHECKPOINT == RECORDS_PER_CHECKPOINT - 1:
            *_, checkpoint = fold.checkpoint()
            if isinstance(checkpoint, Checkpoint):
                await engine.save_checkpoint(0, checkpoint)
    await engine.close()


def main() -> None:
    """Make the journal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--topics", type=int, default=1_000_000)
    options = parser.parse_args()
    asyncio.run(fill(options.directory, options.topics))


if __name__ == "__main__":
    main()
