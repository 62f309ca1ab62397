"""Where a subscription begins: what was asked for, and what the topic can give.

Pure: parsing is handlers/subscribe/resume.py's. A resume is whole or says what is missing.
"""

from __future__ import annotations

from typing import Final

import msgspec

from clevrd.core.message_ids import id_of_timestamp, us_of_id
from clevrd.core.notices import RETENTION, Gap, unknown_gap
from clevrd.core.topic import Topic
from clevrd.errors import InvalidRequest


class Last(msgspec.Struct, frozen=True):
    """The last ``count`` messages, or as many as there are."""

    count: int


class After(msgspec.Struct, frozen=True):
    """Everything behind a position; an empty epoch is the topic's own, whichever that is."""

    offset: int
    epoch: str = ""
    # Whether the offset may be ahead of the topic, in the topic's own epoch: the client can say
    # nothing else, so it is not refused, and nothing is known of the position.
    may_be_ahead: bool = False


class Since(msgspec.Struct, frozen=True):
    """Everything after message ``message_id``, or from it on where that only spells a time."""

    message_id: str
    is_time: bool


Beginning = Last | After | Since


# A position of which nothing is known. No topic has this epoch: theirs are hexadecimal.
UNKNOWN: Final = After(0, "unknown", may_be_ahead=True)


class ResolvedBeginning(msgspec.Struct, frozen=True):
    """Where a subscription begins."""

    # The offset that the first message follows.
    after: int
    # A position was asked for and nothing behind it is missing.
    is_recovered: bool = False
    # The hole before the first message; None where nothing is missing.
    gap: Gap | None = None


class HistoryBeginning(msgspec.Struct, frozen=True):
    """Where a subscription begins that asks for messages from before the ring."""

    # The offset that the first message follows, as it is asked for. The history may have begun to
    # forget later messages.
    after: int = 0
    # The first message follows the newest one with an id below this, which is to be found; None
    # where `after` says it. Microseconds since 1970.
    below_id_us: int | None = None
    # A position was asked for: what is missing behind it is told.
    is_resumed: bool = False
    # The gap that is told first, whatever the history has; None for none.
    gap: Gap | None = None


def check_beginning(topic: Topic, beginning: Beginning) -> None:
    """Raise InvalidRequest where ``beginning`` is a position that the topic has not reached."""
    if not isinstance(beginning, After) or beginning.may_be_ahead:
        return
    if beginning.epoch == topic.epoch and beginning.offset > topic.head:
        raise InvalidRequest(
            f"The offset {beginning.offset} is ahead of the topic, whose newest message in epoch"
            f" {topic.epoch} is {topic.head}; resume from an offset that you have received."
        )


def resolve(topic: Topic, beginning: Beginning) -> ResolvedBeginning:
    """Return where in ``topic`` a reader with this beginning begins."""
    oldest = topic.first
    match beginning:
        case Last():
            return ResolvedBeginning(max(oldest, topic.head - beginning.count + 1) - 1)
        case After():
            return _start_after(topic, beginning)
        case Since():
            return _start_since(topic, beginning)


def in_history(topic: Topic, beginning: Beginning) -> HistoryBeginning | None:
    """Return where in the topic's history a reader begins; None where the ring has it all."""
    oldest, begins = topic.first, _begins_behind(topic)
    if oldest == begins + 1 or topic.journal is None or not topic.journal.has_history:
        return None
    match beginning:
        case Last():
            after = max(begins, topic.head - beginning.count)
            return None if after >= oldest - 1 else HistoryBeginning(after)
        case After():
            if beginning.epoch not in ("", topic.epoch) or beginning.offset > topic.head:
                return HistoryBeginning(_begins_behind(topic), gap=unknown_gap(topic.name))
            if beginning.offset >= oldest - 1:
                return None
            return HistoryBeginning(max(begins, beginning.offset), is_resumed=True)
        case Since():
            return _in_history_since(topic, beginning)


def _begins_behind(topic: Topic) -> int:
    """Return the offset behind which the topic's epoch begins: 0 but for one that was cleared."""
    return 0 if topic.journal is None else topic.journal.cleared


def _in_history_since(topic: Topic, beginning: Since) -> HistoryBeginning | None:
    message_id = beginning.message_id
    if message_id < id_of_timestamp(topic.created_at):
        return HistoryBeginning(_begins_behind(topic), gap=unknown_gap(topic.name))
    if topic.last_before(message_id.encode(), or_at=not beginning.is_time) >= topic.first:
        return None
    below_id_us = us_of_id(message_id) + (not beginning.is_time)
    return HistoryBeginning(below_id_us=below_id_us, is_resumed=True)


def _start_after(topic: Topic, beginning: After) -> ResolvedBeginning:
    oldest = topic.first
    if beginning.epoch not in ("", topic.epoch) or beginning.offset > topic.head:
        return ResolvedBeginning(oldest - 1, gap=unknown_gap(topic.name))
    after = max(beginning.offset, _begins_behind(topic))
    missing = oldest - 1 - after
    if missing > 0:
        gap = Gap(topic.name, after + 1, oldest - 1, missing, RETENTION)
        return ResolvedBeginning(oldest - 1, gap=gap)
    return ResolvedBeginning(after, is_recovered=True)


def _start_since(topic: Topic, beginning: Since) -> ResolvedBeginning:
    """Return the start by id: ids rise with offsets, and over all topics of the process."""
    oldest = topic.first
    after = topic.last_before(beginning.message_id.encode(), or_at=not beginning.is_time)
    if beginning.message_id < id_of_timestamp(topic.created_at):
        # Nobody knows whether the topic had an epoch before this one, and what was in it.
        return ResolvedBeginning(after, gap=unknown_gap(topic.name))
    if oldest > _begins_behind(topic) + 1 and after < oldest:
        # No message that is held lies before, so messages that were evicted may have been asked
        # for.
        return ResolvedBeginning(after, gap=Gap(topic.name, None, oldest - 1, None, RETENTION))
    return ResolvedBeginning(after, is_recovered=True)
