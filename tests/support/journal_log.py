"""A writer of records that counts as the fold does, for tests of engines without a node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from clevrd.journal.base import Checkpoint, Engine, Placed, TopicHead
from clevrd.journal.records import Header, Run, digest_of, encode_record

EPOCH = "0123456789ab"
BEGAN_US = 1_700_000_000_000_000


def message(topic: str, text: str) -> bytes:
    """Return a message as a line of a record."""
    return b'{"topic":"%b","data":"%b"}\n' % (topic.encode(), text.encode())


class LogWriter:
    """Makes records, and says where their messages stand."""

    def __init__(self, stamp: str, epoch: str = EPOCH) -> None:
        self.stamp = stamp
        self.epoch = epoch
        self.sequence = 0
        # Topic -> its newest message's offset; all messages have ids of their own.
        self.heads: dict[str, int] = defaultdict(int)
        self.last_id_us = BEGAN_US
        # Microseconds between two records.
        self.step_us = 1_000

    def record(self, *runs: tuple[str, Sequence[str]]) -> tuple[bytes, list[Placed]]:
        """Return the next record, with a run of messages for each topic, and where these stand."""
        self.sequence += 1
        time_us = BEGAN_US + self.sequence * self.step_us
        lines = [[message(topic, text) for text in texts] for topic, texts in runs]
        header = Header(
            self.stamp,
            "00ff",
            self.sequence,
            time_us,
            tuple(
                Run("default", topic, len(texts), sum(map(len, own)))
                for (topic, texts), own in zip(runs, lines, strict=True)
            ),
        )
        record = encode_record(header, [line for own in lines for line in own])
        at_bytes, line = record.index(b"\n") + 1, 0
        placed = []
        for run in header.runs:
            first_id_us = max(self.last_id_us + 1, time_us)
            placed.append(
                Placed(
                    run.tenant,
                    run.topic,
                    self.epoch,
                    self.heads[run.topic] + 1,
                    run.count,
                    first_id_us,
                    1,
                    time_us,
                    line,
                    at_bytes,
                    run.size_bytes,
                    0,
                )
            )
            self.last_id_us = first_id_us + run.count - 1
            self.heads[run.topic] += run.count
            line += run.count
            at_bytes += run.size_bytes
        return record, placed

    def one(self, topic: str, text: str) -> tuple[bytes, list[Placed]]:
        """Return the next record, with one message."""
        return self.record((topic, [text]))


async def append(engine: Engine, writer: LogWriter, *texts: str, topic: str = "a") -> list[bytes]:
    """Append a record with one message for each text; return the records."""
    records = []
    for text in texts:
        record, placed = writer.one(topic, text)
        await engine.append(0, record, writer.stamp, placed)
        records.append(record)
    return records


async def read_all(engine: Engine, count: int, after: int = 0) -> list[tuple[int, bytes]]:
    """Read until there are ``count`` records behind ``after``."""
    found: list[tuple[int, bytes]] = []
    while len(found) < count:
        found += await engine.read(0, found[-1][0] if found else after)
    return found


def checkpoint_of(
    found: Sequence[tuple[int, bytes]], writer: LogWriter, *, is_whole: bool = True
) -> Checkpoint:
    """Return a checkpoint behind the last of some records, with the heads that the writer knows."""
    position, record = found[-1]
    heads = [TopicHead("default", topic, head) for topic, head in writer.heads.items()]
    return Checkpoint(position, digest_of(record), writer.epoch, b"state", heads, is_whole)
