"""Messages of a history one by one, as tests compare them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from clevrd.journal.base import History, StoredRun


class StoredMessage(msgspec.Struct, frozen=True):
    """A message as it is read back from a history."""

    offset: int
    id_us: int
    time_us: int
    # The message as a publish object, without a line feed.
    line: bytes


def messages_in(runs: Iterable[StoredRun]) -> list[StoredMessage]:
    """Return the messages of ``runs``; each run has as many lines as messages."""
    found = []
    for run in runs:
        *lines, end = run.lines.split(b"\n")
        assert (len(lines), end) == (run.count, b"")
        found += [
            StoredMessage(run.offset + at, run.id_us + at * run.id_step, run.time_us, line)
            for at, line in enumerate(lines)
        ]
    return found


async def page_of(
    history: History,
    partition_epoch: str,
    tenant: str,
    topic: str,
    after: int,
    max_messages: int,
    max_bytes: int,
) -> list[StoredMessage]:
    """Return the messages of a page."""
    return messages_in(
        await history.page(partition_epoch, tenant, topic, after, max_messages, max_bytes)
    )
