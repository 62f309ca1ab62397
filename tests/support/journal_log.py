"""A writer of records that counts as the fold does, for tests of engines without a node."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence

from clevrd.journal.base import Placed
from clevrd.journal.records import Header, Run, encode_record

EPOCH = "0123456789ab"
BEGAN_US = 1_700_000_000_000_000


def message(topic: str, text: str) -> bytes:
    """Return a message as a line of a record."""
    return b'{"topic":"%b","data":"%b"}\n' % (topic.encode(), text.encode())


def digest_of(record: bytes) -> str:
    """Return a record's CRC-32 as engines spell it."""
    return f"{zlib.crc32(record):08x}"


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
