"""Where a subscription begins: what was wished for, and what the topic can give.

Pure: parsing is handlers/subscribe.py's. A resume is whole or says what is missing.
"""

from __future__ import annotations

from typing import Final

import msgspec

from clevrd.core.control_frames import RETENTION, Gap, unknown_gap
from clevrd.core.message import id_of_timestamp
from clevrd.core.topic import Topic
from clevrd.errors import InvalidRequest


class Last(msgspec.Struct, frozen=True):
    """The last ``count`` messages, or as many as there are."""

    count: int


class After(msgspec.Struct, frozen=True):
    """Everything behind a position; an empty epoch is the topic's own, whichever that is."""

    offset: int
    epoch: str = ""
    # Who says it can say nothing else, and must not be refused: in the topic's own epoch and ahead
    # of it, it is a position of which nothing is known.
    may_be_ahead: bool = False


class Since(msgspec.Struct, frozen=True):
    """Everything after message ``message_id``, or from it on where that only spells a time."""

    message_id: str
    is_time: bool


Wish = Last | After | Since


# A position of which nothing is known. No topic has this epoch: theirs are hexadecimal.
UNKNOWN: Final = After(0, "unknown", may_be_ahead=True)


class Start(msgspec.Struct, frozen=True):
    """Where a subscription begins."""

    # The offset that the first message follows.
    after: int
    # A position was wished for and nothing behind it is missing.
    is_recovered: bool = False
    # What is missing before the first message.
    gap: Gap | None = None


def check_wish(topic: Topic, wish: Wish) -> None:
    """Raise InvalidRequest where ``wish`` is a position that the topic has not reached."""
    if not isinstance(wish, After) or wish.may_be_ahead:
        return
    if wish.epoch == topic.epoch and wish.offset > topic.head:
        raise InvalidRequest(
            f"The offset {wish.offset} is ahead of the topic, whose newest message in epoch"
            f" {topic.epoch} is {topic.head}; resume from an offset that you have received."
        )


def start_of(topic: Topic, wish: Wish) -> Start:
    """Return where in ``topic`` a reader with this wish begins."""
    oldest = topic.ring.first
    match wish:
        case Last():
            return Start(max(oldest, topic.head - wish.count + 1) - 1)
        case After():
            return _start_after(topic, wish)
        case Since():
            return _start_since(topic, wish)


def _start_after(topic: Topic, wish: After) -> Start:
    oldest = topic.ring.first
    if wish.epoch not in ("", topic.epoch) or wish.offset > topic.head:
        return Start(oldest - 1, gap=unknown_gap(topic.name))
    missing = oldest - 1 - wish.offset
    if missing > 0:
        gap = Gap(topic.name, wish.offset + 1, oldest - 1, missing, RETENTION)
        return Start(oldest - 1, gap=gap)
    return Start(wish.offset, is_recovered=True)


def _start_since(topic: Topic, wish: Since) -> Start:
    """Return the start by id: ids rise with offsets, and over all topics of the process."""
    oldest = topic.ring.first
    after = topic.ring.last_before(wish.message_id.encode(), or_at=not wish.is_time)
    if wish.message_id < id_of_timestamp(topic.created_at):
        # Whether the topic had a life before this one, and what was in it, nobody knows.
        return Start(after, gap=unknown_gap(topic.name))
    if oldest > 1 and after < oldest:
        # No message that is held lies before, so what was evicted may have been wished for.
        return Start(after, gap=Gap(topic.name, None, oldest - 1, None, RETENTION))
    return Start(after, is_recovered=True)
