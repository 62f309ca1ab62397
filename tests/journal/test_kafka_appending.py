"""Producers of Kafka's that end by themselves: every append is answered, and the next is taken.

The producers are the test's own; a real one that ends so: tests/journal/test_kafka_cluster.py.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from clevrd.journal.kafka import appending
from clevrd.journal.kafka.library import KafkaFault, Troubles
from clevrd.journal.kafka.settings import KafkaSettings
from clevrd.journal.kafka.url import parse_kafka_url

URL = "kafka://127.0.0.1/topic"
SETTINGS = KafkaSettings(address=parse_kafka_url(URL), shown=URL)


class EndingProducer:
    """A producer that takes a record, and then ends without an answer to it."""

    def __init__(self) -> None:
        self._has_record = threading.Event()
        self.is_purged = False

    def produce(self, *_: Any, **__: Any) -> None:
        """Take a record."""
        self._has_record.set()

    def poll(self, timeout_s: float) -> int:
        """Say once that the producer has ended."""
        if self._has_record.wait(timeout_s):
            self._has_record.clear()
            raise KafkaException(KafkaError(KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, fatal=True))
        return 0

    def purge(self) -> None:
        """Note that it was told to end."""
        self.is_purged = True


class AnsweringProducer:
    """A producer that takes all records."""

    def __init__(self) -> None:
        self._answers: list[Callable[[Any, Any], None]] = []

    def produce(self, *_: Any, on_delivery: Callable[[Any, Any], None], **__: Any) -> None:
        """Take a record."""
        self._answers.append(on_delivery)

    def poll(self, _: float) -> int:
        """Answer what was taken."""
        answers, self._answers = self._answers, []
        for answer in answers:
            answer(None, self)
        return len(answers)

    def purge(self) -> None:
        """Do nothing: all is answered."""

    def offset(self) -> int:
        """Return the offset of each record."""
        return 7


async def test_append_of_a_producer_that_ends_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss of its topic's tail the library ends the producer, and answers nothing."""
    ending = EndingProducer()
    producers = iter((ending, AnsweringProducer()))
    monkeypatch.setattr(appending, "make_producer", lambda *_: next(producers))
    loop = asyncio.get_running_loop()
    appender = appending.Appender(SETTINGS, Troubles(), loop)

    with pytest.raises(KafkaFault, match="LOST"):
        await appender.append("t", 0, b"first")
    offset = await appender.append("t", 0, b"second")
    await appender.close()

    assert ending.is_purged
    assert offset == 7
