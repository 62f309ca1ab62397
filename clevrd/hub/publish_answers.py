"""Answers to publishes: every answer to an accepted publish is made here.

An answer may be due: the message has its place in the order already, and more may be published
behind it at once, but the answer is known later. The publish may still fail, with a ClevrdError.
"""

from __future__ import annotations

import asyncio

import msgspec

from clevrd.core.topic import Topic, newest_epoch_of


class Published(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The answer to a publish that was taken."""

    success: bool
    message_id: str
    offset: int
    epoch: str
    # Readers of the topic; readers of it that are behind; readers that were slow at the last
    # evaluation, a second ago at most.
    subscribers: int
    lagging: int
    slow: int
    # True when an earlier publish with the same key got this answer, and this one was not
    # published.
    repeated: bool = False
    # True when the message outlives a crash and a power cut.
    durable: bool = False
    # "node" where the journal is shared: the three counts are of this process's subscribers alone.
    subscribers_of: str = ""


class WarnedPublished(Published, frozen=True, gc=False, omit_defaults=True):
    """The answer to an accepted publish whose request has names that are nearly known ones."""

    warnings: tuple[str, ...] = ()


# The answer to a publish, or a Future of it.
PublishAnswer = Published | asyncio.Future[Published]
# The first offset and all ids of a run; and the answer to a run, or a Future of it.
Run = tuple[int, list[str]]
RunAnswer = Run | asyncio.Future[Run]


def with_warnings(answer: Published, warnings: tuple[str, ...]) -> Published:
    """Return ``answer`` with ``warnings``, if there are any."""
    if not warnings:
        return answer
    return WarnedPublished(**msgspec.structs.asdict(answer), warnings=warnings)


# The fields of an answer to an accepted message, behind the offset.
Audience = tuple[str, int, int, int, bool, bool, str]


def audience_of(topic: Topic) -> Audience:
    """Return the topic's part of an answer to a message that was accepted just now."""
    lagging = len(topic.lagging)
    # The sum is `topic.subscribers` without its calls, since it is needed for each publish.
    subscribers = len(topic.live) + lagging + len(topic.suspended)
    if topic.journal is None:
        return topic.epoch, subscribers, lagging, topic.slow, False, False, ""
    return _journaled_audience(newest_epoch_of(topic))


def _journaled_audience(topic: Topic) -> Audience:
    """Return the same of a journaled topic, in the epoch in which its newest messages are."""
    reading = 0 if topic.history is None else len(topic.history.readers)
    lagging = len(topic.lagging) + reading
    subscribers = len(topic.live) + lagging + len(topic.suspended)
    place = topic.journal
    is_durable = place is not None and place.is_durable
    subscribers_of = "node" if place is not None and place.is_shared else ""
    return topic.epoch, subscribers, lagging, topic.slow, False, is_durable, subscribers_of
