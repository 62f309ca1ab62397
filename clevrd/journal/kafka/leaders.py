"""Questions to the leader of a partition, which are asked again while there is none or it moves.

The library keeps what a broker says of a topic for 15 minutes, so also that a partition has no
leader, and asks none before that unless it is told to. Called in threads, since all of this waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

from confluent_kafka import KafkaException, TopicPartition

from clevrd.journal.kafka.library import LEADERLESS, MISSING, KafkaFault, fault_of

AnswerT = TypeVar("AnswerT")

_RETRY_S: Final = 0.1
# How long a broker may take to say who leads.
_RELOOK_S: Final = 1.0
_MOVING: Final = frozenset(
    {
        MISSING,
        "NOT_LEADER_FOR_PARTITION",
        LEADERLESS,
        "FENCED_LEADER_EPOCH",
        "_DESTROY_BROKER",
    }
)


def ask_leader(
    consumer: Any, topic: str, question: Callable[[], AnswerT], timeout_s: float
) -> AnswerT:
    """Return the answer to ``question``, which is asked until a leader is known.

    Args:
        consumer: the client that asks it.
        topic: what it is about.
        timeout_s: how long it is asked again, seconds.

    Raises:
        KafkaException: it is refused, or there is no such topic.
        KafkaFault: the topic is there, and a partition of it has no leader.
    """
    until_s = time.monotonic() + timeout_s
    while True:
        try:
            return question()
        except KafkaException as error:
            # A topic that was just made, or a leader that moves, is known a moment later.
            if fault_of(error).code not in _MOVING:
                raise
            is_there = _is_there(consumer, topic)
            if time.monotonic() > until_s:
                if not is_there:
                    raise
                raise KafkaFault(LEADERLESS, "") from error
            time.sleep(_RETRY_S)


def extent_of(consumer: Any, place: TopicPartition, timeout_s: float) -> tuple[int, int]:
    """Return the first record's offset, and that which the next one will have; see `ask_leader`."""

    def extent() -> tuple[int, int]:
        low, high = consumer.get_watermark_offsets(place, timeout=timeout_s)
        return low, high

    return ask_leader(consumer, place.topic, extent, timeout_s)


def _is_there(consumer: Any, topic: str) -> bool:
    """Ask the brokers of a topic anew, and return whether they have it."""
    with suppress(KafkaException):
        found = consumer.list_topics(topic, timeout=_RELOOK_S).topics.get(topic)
        return found is not None and found.error is None
    return False
