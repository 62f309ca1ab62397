"""Questions about a partition that may have no leader, and the fault where it has none.

The library keeps what a broker says of a topic for 15 minutes, so also that a partition has no
leader, and asks none before that unless it is told to. All of this waits, so it is called in
threads; and never in a callback of the library's, where its `list_topics` has it abort the process
at the next callback (confluent-kafka 2.16: the inner call ends the state of the outer one).
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Final

from confluent_kafka import KafkaException, TopicPartition

from clevrd.journal.kafka.library import LEADERLESS, MISSING, KafkaFault, fault_of

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


def extent_of(consumer: Any, place: TopicPartition, timeout_s: float) -> tuple[int, int]:
    """Return the first record's offset, and that which the next one will have.

    Args:
        consumer: the client that asks.
        place: the partition.
        timeout_s: how long it is asked until a leader is known, seconds.

    Raises:
        KafkaException: it is refused.
        KafkaFault: there is no such topic, or the partition has no leader.
    """
    until_s = time.monotonic() + timeout_s
    while True:
        try:
            low, high = consumer.get_watermark_offsets(place, timeout=timeout_s)
            return low, high
        except KafkaException as error:
            # A topic that was just made, or a leader that moves, is known a moment later.
            if fault_of(error).code not in _MOVING:
                raise
            fault = fault_about(consumer, place.topic, error)
            if time.monotonic() > until_s:
                raise fault from error
            time.sleep(_RETRY_S)


def fault_about(consumer: Any, topic: str, error: KafkaException | KafkaFault) -> KafkaFault:
    """Return the fault of a question about ``topic``; of a topic that is there, no missing one.

    If it may pass with the next leader, the brokers are asked anew, so that the library knows it.
    """
    fault = fault_of(error)
    is_there = fault.code in _MOVING and _is_there(consumer, topic)
    return KafkaFault(LEADERLESS, "") if is_there and fault.code == MISSING else fault


def _is_there(consumer: Any, topic: str) -> bool:
    """Ask the brokers of a topic anew, and return whether they have it."""
    with suppress(KafkaException):
        found = consumer.list_topics(topic, timeout=_RELOOK_S).topics.get(topic)
        return found is not None and found.error is None
    return False
