"""Questions about a partition of Kafka whose leader moves; the consumer is the test's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from clevrd.journal.kafka.leaders import extent_of


class MovingConsumer:
    """A consumer that knows the new leader once it has asked the brokers anew."""

    def __init__(self, code: int) -> None:
        self._code = code
        self._is_known = False

    def get_watermark_offsets(self, place: TopicPartition, timeout: float) -> tuple[int, int]:
        """Return where the partition begins and ends, if the leader is known."""
        if not self._is_known:
            raise KafkaException(KafkaError(self._code))
        return 3, 9

    def list_topics(self, topic: str, timeout: float) -> Any:
        """Ask the brokers."""
        self._is_known = True
        return SimpleNamespace(topics={topic: SimpleNamespace(error=None)})


@pytest.mark.parametrize(
    "code",
    [
        KafkaError._UNKNOWN_PARTITION,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
    ],
)
def test_brokers_are_asked_anew_for_a_leader_that_moves(code: int) -> None:
    """By itself the library asks again after 15 minutes."""
    place = TopicPartition("orders", 0)

    assert extent_of(MovingConsumer(code), place, 0.5) == (3, 9)
