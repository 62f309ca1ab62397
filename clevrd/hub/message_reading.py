"""Messages for somebody who reads once and does not stay: from a history, then from the ring."""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from clevrd.core.beginning import (
    After,
    Beginning,
    HistoryBeginning,
    ResolvedBeginning,
    resolve,
)
from clevrd.core.notices import EXPIRED, Gap
from clevrd.core.server_frames import ttl_of
from clevrd.core.topic import Topic, newest_epoch_of
from clevrd.errors import JournalUnavailable
from clevrd.hub.history_readers import OlderMessages

# New epochs may follow each other while a history is read; so often it is begun again.
_TRIES: Final = 3


class ServesMessages(Protocol):
    """The delivery, as far as it is needed here."""

    def now_s(self) -> float:
        """Return the time of the loop's clock."""

    def serve(self, topic: Topic, after: int, max_messages: int, max_bytes: int, /) -> list[bytes]:
        """Return frames of the ring behind offset ``after``."""

    def in_history(self, topic: Topic, beginning: Beginning, /) -> HistoryBeginning | None:
        """Return where in the topic's history it begins; None where the ring has it all."""

    async def older(
        self, topic: Topic, start: HistoryBeginning, max_messages: int, max_bytes: int, /
    ) -> OlderMessages:
        """Return messages of a history."""


class ReadMessages(msgspec.Struct, frozen=True):
    """Messages with consecutive offsets."""

    # In whose epoch they are.
    topic: Topic
    start: ResolvedBeginning
    # The first one follows ``start.after``.
    frames: list[bytes]

    @property
    def upto(self) -> int:
        """The last one's offset."""
        return self.start.after + len(self.frames)

    def is_fixed(self, beginning: Beginning, limit: int) -> bool:
        """Return whether who asks the same again is given the same, as long as it is kept.

        Args:
            beginning: what was asked for.
            limit: how many messages.
        """
        return (
            isinstance(beginning, After)
            and beginning.epoch == self.topic.epoch
            and self.start.gap is None
            and len(self.frames) == limit
            and not any(ttl_of(frame) for frame in self.frames)
        )


def past_expired(topic: Topic, start: ResolvedBeginning, now_s: float) -> ResolvedBeginning:
    """Return ``start`` behind messages that have expired, for a reader that does not stay.

    They are told as a gap, and counted, unless another gap is to be told first. The answer is whole
    all the same: their publishers did not want them to be read any more.
    """
    if start.gap is not None:
        return start
    upto = topic.end_of_expired(start.after, now_s)
    if upto == start.after:
        return start
    topic.note_expired(upto - start.after)
    gap = Gap(topic.name, start.after + 1, upto, upto - start.after, EXPIRED)
    return ResolvedBeginning(upto, start.is_recovered, gap)


async def read_messages(
    delivery: ServesMessages, topic: Topic, beginning: Beginning, max_messages: int, max_bytes: int
) -> ReadMessages:
    """Return messages of ``topic`` from ``beginning`` on, up to the first that is missing.

    There is at least one, if there is any and no gap is told first.

    Raises:
        JournalUnavailable: the history can't be read.
    """
    for _ in range(_TRIES):
        topic = newest_epoch_of(topic)
        start = delivery.in_history(topic, beginning)
        if start is None:
            resolved = past_expired(topic, resolve(topic, beginning), delivery.now_s())
            frames = delivery.serve(topic, resolved.after, max_messages, max_bytes)
            return ReadMessages(topic, resolved, frames)
        older = await delivery.older(topic, start, max_messages, max_bytes)
        if newest_epoch_of(topic) is topic:
            return _with_ring(delivery, topic, older, max_messages, max_bytes)
    raise JournalUnavailable("The topic begins new epochs; come back in a moment.")


def _with_ring(
    delivery: ServesMessages, topic: Topic, older: OlderMessages, max_messages: int, max_bytes: int
) -> ReadMessages:
    """Return messages of a history, and those of the ring where they follow."""
    frames = older.frames
    behind = older.start.after + len(frames)
    topic.note_served(len(frames), topic.last_used_s)
    left = max_messages - len(frames)
    left_bytes = max_bytes - sum(map(len, frames))
    if left > 0 and left_bytes > 0 and behind >= topic.first - 1:
        frames = frames + delivery.serve(topic, behind, left, left_bytes)
    return ReadMessages(topic, older.start, frames)
