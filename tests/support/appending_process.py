"""A process that appends to a SQLite journal until it is killed, and says what was acknowledged.

Arguments: the journal's directory, and its durability. Each acknowledged record is a line on
standard output: the offset of the first of its messages in the topic "a".
"""

from __future__ import annotations

import os
import sys

import uvloop
from journal_log import EPOCH, LogWriter, checkpoint_of

from clevrd.journal.sqlite.engine import SqliteEngine
from clevrd.journal.sqlite.settings import SqliteSettings

# Small files, so that several are made and finished between two kills.
SEGMENT_BYTES = 100_000
PER_RECORD = 3


def settings_of(directory: str, durability: str) -> SqliteSettings:
    """Return the settings of the process's journal."""
    return SqliteSettings(directory, durability, segment_bytes=SEGMENT_BYTES)


async def append_for_ever(engine: SqliteEngine, writer: LogWriter) -> None:
    """Append records of two topics, a checkpoint between them now and then."""
    number = 0
    while True:
        number += 1
        offset = writer.heads["a"] + 1
        texts = [str(offset + index) for index in range(PER_RECORD)]
        record, placed = writer.record(("a", texts), (f"t{number % 50}", ["x" * (number % 700)]))
        await engine.append(0, record, writer.stamp, placed)
        os.write(1, b"%d\n" % offset)
        if number % 40 == 0:
            position = (await engine.read(0, 0))[-1]
            await engine.save_checkpoint(0, checkpoint_of([position], writer))


async def main(directory: str, durability: str) -> None:
    """Open the journal, find the topics' heads, and append."""
    engine = SqliteEngine(settings_of(directory, durability))
    await engine.open()
    writer = LogWriter(await engine.stamp(0))
    for topic in ("a", *(f"t{number}" for number in range(50))):
        extent = await engine.extent(EPOCH, "default", topic)
        writer.heads[topic] = 0 if extent is None else extent.head
    await append_for_ever(engine, writer)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
