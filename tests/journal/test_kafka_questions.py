"""Questions to Kafka's brokers: how they end. Real brokers: test_kafka_engine.py."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from concurrent.futures import Future
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from clevrd.journal.kafka import questions as questions_module
from clevrd.journal.kafka.library import KafkaFault, Troubles
from clevrd.journal.kafka.questions import Questions
from clevrd.journal.kafka.settings import KafkaSettings
from clevrd.journal.kafka.url import parse_kafka_url


class Admin:
    """An admin client whose broker is away; it notes in which thread its last reference goes."""

    def __init__(self, ended_in: list[str], answers: list[Future[Any]]) -> None:
        self._ended_in = ended_in
        self._answers = answers

    def __del__(self) -> None:
        self._ended_in.append(threading.current_thread().name)

    def poll(self, _timeout_s: float) -> None:
        """Have nothing to say."""

    def describe_topics(self, _names: object) -> dict[str, Future[Any]]:
        """Ask, without an answer."""
        answer: Future[Any] = Future()
        self._answers.append(answer)
        return {"t": answer}


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["waits", "cancelled"])
async def test_clients_end_beside_the_loop_while_a_question_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_cancelled: bool
) -> None:
    """Their end waits for threads and brokers; and the late answer is nobody's error."""
    ended_in: list[str] = []
    answers: list[Future[Any]] = []
    monkeypatch.setattr(questions_module, "make_admin", lambda *_: Admin(ended_in, answers))
    settings = KafkaSettings(address=parse_kafka_url("kafka://h/t"), shown="kafka://h/t")
    questions = Questions(settings, Troubles())
    asking = asyncio.create_task(questions.topic_id("t"))
    await asyncio.sleep(0)
    assert answers

    if is_cancelled:
        asking.cancel()
        await asyncio.sleep(0)
    await questions.close()
    # What is raised keeps the frames in which it was.
    with pytest.raises((KafkaFault, asyncio.CancelledError)) as raised:
        await asking
    answers[0].set_exception(KafkaException(KafkaError(KafkaError._DESTROY)))
    await asyncio.sleep(0.01)
    del asking
    answers.clear()
    with caplog.at_level(logging.DEBUG):
        gc.collect()

    assert raised.value.__traceback__ is not None
    assert [name.split("_")[0] for name in ended_in] == ["clevrd-kafka-questions"]
    assert not caplog.records
