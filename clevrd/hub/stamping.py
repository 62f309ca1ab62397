"""Stamping: requests become messages, each with an id and a time and encoded once.

What becomes of them is the caller's, who knows the topic's next offset and delivers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from clevrd.core.message import KeyedMessage, Message, MessageIds, PublishRequest
from clevrd.core.server_frames import FrameEncoder
from clevrd.core.topic import Topic
from clevrd.errors import ShuttingDown


class Published(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What the publisher is told."""

    success: bool
    message_id: str
    offset: int
    epoch: str
    # How many the topic has; those of them that are behind; and those that were slow at the last
    # evaluation, a second ago at most.
    subscribers: int
    lagging: int
    slow: int
    # This is the answer to an earlier publish with the same key; it was not published again.
    repeated: bool = False


class WarnedPublished(Published, frozen=True, gc=False, omit_defaults=True):
    """The same, to a publisher whose request has names that nearly are known ones."""

    warnings: tuple[str, ...] = ()


def with_warnings(answer: Published, warnings: tuple[str, ...]) -> Published:
    """Return ``answer`` with ``warnings``, if there are any."""
    if not warnings:
        return answer
    return WarnedPublished(**msgspec.structs.asdict(answer), warnings=warnings)


def audience_of(topic: Topic) -> tuple[str, int, int, int]:
    """Return what each answer says of the topic: epoch, subscribers, lagging and slow."""
    lagging = len(topic.lagging)
    # `topic.subscribers` without its calls, since each publish asks.
    subscribers = len(topic.live) + lagging + len(topic.suspended)
    return topic.epoch, subscribers, lagging, topic.slow


class Stamping:
    """The ids of all messages, the clock they are made from, and whether any are made still."""

    __slots__ = ("_encoder", "_ids", "_is_sealed", "_wall_ns")

    def __init__(self, wall_ns: Callable[[], int]) -> None:
        self._wall_ns = wall_ns
        self._ids = MessageIds()
        self._encoder = FrameEncoder()
        # Nothing is accepted any more; set by seal, for good.
        self._is_sealed = False

    def wall_us(self) -> int:
        """Return the wall clock, microseconds since 1970."""
        return self._wall_ns() // 1000

    @property
    def last_id_us(self) -> int:
        """The last message's id, in microseconds since 1970; 0 before the first."""
        return max(0, self._ids.last_us)

    def go_on_after(self, last_id_us: int) -> None:
        """Make only ids after ``last_id_us``: an earlier process made ids up to it."""
        self._ids.go_on_after(last_id_us)

    def seal(self) -> None:
        """Accept nothing more."""
        self._is_sealed = True

    def accept(
        self, topic: Topic, offset: int, requests: Sequence[PublishRequest]
    ) -> tuple[list[str], list[bytes]]:
        """Return the ids and the frames of ``topic``'s messages from ``offset`` on.

        Raises:
            Unavailable: after `seal`.
        """
        if self._is_sealed:
            raise ShuttingDown
        next_id, encode, wall_us = self._ids.next, self._encoder.frame, self._wall_ns() // 1000
        name, tenant = topic.name, topic.tenant
        ids: list[str] = []
        frames: list[bytes] = []
        for number, request in enumerate(requests, offset):
            message_id, timestamp = next_id(wall_us)
            ids.append(message_id)
            data, key = request.data, request.key
            frames.append(
                encode(
                    Message(message_id, name, tenant, data, timestamp, number)
                    if key is None
                    else KeyedMessage(message_id, name, tenant, data, timestamp, number, key)
                )
            )
        return ids, frames
