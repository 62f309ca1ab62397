"""What publishers are told: the one place where answers to publishes are made."""

from __future__ import annotations

import msgspec

from clevrd.core.topic import Topic


class Published(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The answer to a publish that was taken."""

    success: bool
    message_id: str
    offset: int
    epoch: str
    # Readers of the topic; those of them that are behind; and those that were slow at the last
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
