"""Notices: JSON that a subscriber which asked for it is told between its messages.

Shapes: docs/wire.md. They are no messages: no offset, not in the ring, not counted as delivered.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from clevrd.core.server_frames import text_frame

# A client's own name for one of its commands; unset where the command has none.
Ref = str | int | msgspec.UnsetType
# Unset where there are none.
Warnings = tuple[str, ...] | msgspec.UnsetType

# `epoch`: continuity with the position that was asked for can't be proven. `damaged`: the history
# has the message no more, or not as it was. `expired`: its time to live was over.
GapReason = Literal["slow_consumer", "retention", "epoch", "damaged", "expired"]
SLOW_CONSUMER: Final = "slow_consumer"
RETENTION: Final = "retention"
EPOCH: Final = "epoch"
DAMAGED: Final = "damaged"
EXPIRED: Final = "expired"


class Position(msgspec.Struct, frozen=True):
    """A place in a topic: behind the message ``offset`` of the topic's life ``epoch``."""

    epoch: str
    offset: int


class Subscribed(msgspec.Struct, frozen=True, tag_field="type", tag="subscribed"):
    """The first frame: all that lies behind (``epoch``, ``offset``) follows, or is told lost."""

    topic: str
    epoch: str
    offset: int
    # A position was asked for and everything behind it follows.
    recovered: bool
    # Messages it may lag, as of now.
    window: int
    # The pattern by which the topic was found, and the ref of the command that asked.
    pattern: str | msgspec.UnsetType = msgspec.UNSET
    ref: Ref = msgspec.UNSET
    # Parts of the request that are ignored and were perhaps meant otherwise.
    warnings: Warnings = msgspec.UNSET


class Gap(
    msgspec.Struct, frozen=True, tag_field="type", tag="gap", rename={"first": "from", "last": "to"}
):
    """Messages that are not coming; stands right before the message that follows them.

    ``first`` and ``count`` are None where nobody can know them.
    """

    topic: str
    first: int | None
    last: int | None
    count: int | None
    reason: GapReason


def unknown_gap(topic: str) -> Gap:
    """Return the gap behind a position of which nobody knows what followed it."""
    return Gap(topic, None, None, None, EPOCH)


class GoingAway(msgspec.Struct, frozen=True, tag_field="type", tag="going_away"):
    """A planned close follows; ``positions`` are by topic, what was sent up to now."""

    reconnect_after_ms: int
    positions: dict[str, Position]


class Watching(msgspec.Struct, frozen=True, tag_field="type", tag="watching"):
    """All topics that a pattern matched have had their `Subscribed`; others are made later."""

    pattern: str
    ref: Ref = msgspec.UNSET
    warnings: Warnings = msgspec.UNSET


class Forgotten(msgspec.Struct, frozen=True, tag_field="type", tag="forgotten"):
    """A topic that a pattern brought is gone for want of use; all of it was sent, or told lost."""

    topic: str
    epoch: str
    offset: int


class Unsubscribed(msgspec.Struct, frozen=True, tag_field="type", tag="unsubscribed"):
    """No more comes; ``positions`` are by topic, what was sent up to now."""

    positions: dict[str, Position]
    ref: Ref = msgspec.UNSET


class Pong(msgspec.Struct, frozen=True, tag_field="type", tag="pong"):
    """The answer to a ping command: what was sent before it has been read."""

    ref: Ref = msgspec.UNSET


class Authenticated(msgspec.Struct, frozen=True, tag_field="type", tag="authenticated"):
    """The connection goes on by another credential, which ends in so many seconds if it ends."""

    expires_in_s: float | msgspec.UnsetType = msgspec.UNSET
    ref: Ref = msgspec.UNSET


class ErrorNotice(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """Something was refused, and the connection goes on; or why a stream ends."""

    code: str
    error: str
    retryable: bool
    ref: Ref = msgspec.UNSET


Notice = Subscribed | Gap | GoingAway | Watching | Forgotten | Unsubscribed | Pong | ErrorNotice

_encode = msgspec.json.Encoder().encode


def notice_json(notice: Notice) -> bytes:
    """Return ``notice`` as JSON, on one line."""
    return _encode(notice)


def notice_frame(notice: Notice) -> bytes:
    """Return ``notice`` as a finished text frame."""
    return text_frame(_encode(notice))
