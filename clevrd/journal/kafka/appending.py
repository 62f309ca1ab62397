"""Appender: the producer, whose answers one thread takes and hands to the loop, many at once.

A record that was taken is read back at about the same time, by another thread. So an answer is
hurried for only where nobody reads: two threads that wake the loop for each record cost twice.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException

from clevrd.journal.kafka.library import (
    LOST,
    TOO_LARGE,
    KafkaFault,
    Troubles,
    fault_of,
    make_producer,
)
from clevrd.journal.kafka.settings import KafkaSettings

log = logging.getLogger(__name__)

# The thread looks so often whether it is to end.
_POLL_S: Final = 0.1
# How long it leaves answers where they are, unless somebody waits for one.
_LAZY_S: Final = 0.01
# How long a producer that is not needed any more may take to end.
_END_S: Final = 5.0

# Kafka's own bytes around a record.
BATCH_BYTES: Final = 1_024

_Answer = tuple[asyncio.Future[int], KafkaError | None, int]


class _Serving:
    """One producer and its thread."""

    def __init__(
        self,
        producer: Any,
        loop: asyncio.AbstractEventLoop,
        on_fatal: Callable[[_Serving, KafkaException], None],
    ) -> None:
        """Args: on_fatal: called on the loop when the producer has ended by itself."""
        self.producer = producer
        self._loop = loop
        self._on_fatal = on_fatal
        self._is_ending = False
        self._hurry = threading.Event()
        # Records that are not answered yet; the loop's alone.
        self._due: set[asyncio.Future[int]] = set()
        # Answers of one poll; the thread's alone.
        self._answers: list[_Answer] = []
        self.thread = threading.Thread(target=self._serve, name="clevrd-kafka-appends", daemon=True)
        self.thread.start()

    def produce(
        self, topic: str, partition: int, value: bytes, future: asyncio.Future[int]
    ) -> None:
        """Send a record; ``future`` is done with its offset, or with a KafkaFault.

        Raises:
            KafkaException: the producer does not take it.
            BufferError: too many wait.
        """
        self.producer.produce(
            topic, value, partition=partition, on_delivery=partial(self._delivered, future)
        )
        self._due.add(future)
        future.add_done_callback(self._due.discard)

    def _delivered(
        self, future: asyncio.Future[int], error: KafkaError | None, record: Any
    ) -> None:
        """Take an answer; called by the thread, within a poll."""
        if error is not None or not future.done():
            self._answers.append((future, error, record.offset()))

    def hurry(self) -> None:
        """Have the next answer taken at once."""
        self._hurry.set()

    def end(self) -> None:
        """Let the thread end soon; answers that are due fail."""
        self._is_ending = True

    def _serve(self) -> None:
        producer = self.producer
        while not self._is_ending:
            self._poll(_POLL_S)
            self._hand_over()
            if self._hurry.wait(_LAZY_S):
                self._hurry.clear()
        producer.purge()
        self._poll(0)
        self._hand_over()
        self._tell(self._fail_due)
        # The last reference: what is left of it ends here, and not on the loop.
        self.producer = None

    def _poll(self, timeout_s: float) -> None:
        try:
            self.producer.poll(timeout_s)
        except KafkaException as error:
            # An idempotent producer that can't go on says so here, and not by its records alone.
            self._tell(self._on_fatal, self, error)

    def _hand_over(self) -> None:
        answers, self._answers = self._answers, []
        if answers:
            self._tell(_give, answers)

    def _tell(self, callback: Callable[..., None], *arguments: Any) -> None:
        # The loop may be closed by now; then nobody waits for an answer.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _fail_due(self) -> None:
        """Fail what the library has not answered, and never will."""
        for future in list(self._due):
            if not future.done():
                future.set_exception(KafkaFault(LOST, "the producer has ended"))


def _give(answers: list[_Answer]) -> None:
    for future, error, offset in answers:
        if future.done():
            continue
        if error is None:
            future.set_result(offset)
        else:
            future.set_exception(fault_of(error))


class Appender:
    """Appends to partitions of topics, in order."""

    def __init__(
        self, settings: KafkaSettings, troubles: Troubles, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._settings = settings
        self._troubles = troubles
        self._loop = loop
        self._serving: _Serving | None = None
        self._is_closed = False
        # Bytes of a record at most, and of Kafka's batch around it.
        self._max_record_bytes = 1_000_000

    @property
    def max_record_bytes(self) -> int:
        """Bytes of a record at most."""
        return self._max_record_bytes - BATCH_BYTES

    def renew(self, max_record_bytes: int | None = None) -> None:
        """Make a new producer for what comes; records of the old one fail, as may be taken."""
        if max_record_bytes is not None:
            self._max_record_bytes = max_record_bytes
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.end()
        if max_record_bytes is not None:
            # It asks for its id at once, which takes a second.
            self._serving = self._made()

    def append(
        self, topic: str, partition: int, value: bytes, *, is_read: bool = False
    ) -> asyncio.Future[int]:
        """Send a record; return its offset, which is due.

        It is a KafkaFault where it may not have been taken.

        Args:
            is_read: it is read back as it comes, and the caller sets the offset then, if that is
                earlier.
        """
        future: asyncio.Future[int] = self._loop.create_future()
        if self._is_closed:
            future.set_exception(KafkaFault(LOST, "the journal is closed"))
            return future
        if len(value) > self._max_record_bytes - BATCH_BYTES:
            future.set_exception(KafkaFault(TOO_LARGE, ""))
            return future
        serving = self._serving
        if serving is None:
            serving = self._serving = self._made()
        try:
            serving.produce(topic, partition, value, future)
            if not is_read:
                serving.hurry()
        except (KafkaException, BufferError) as error:
            fault = fault_of(error)
            if not future.done():
                future.set_exception(fault)
            self.note_fault(fault, error)
        return future

    def note_fault(self, fault: KafkaFault, error: BaseException | None = None) -> None:
        """Make a new producer where the old one has ended by itself."""
        given = error.args[0] if error is not None and error.args else None
        is_fatal = isinstance(given, KafkaError) and given.fatal()
        if is_fatal or fault.code in _FATAL:
            log.warning("kafka producer made again reason=%s", fault)
            self.renew()

    def _made(self) -> _Serving:
        producer = make_producer(self._settings, self._troubles, self._max_record_bytes)
        return _Serving(producer, self._loop, self._note_fatal)

    def _note_fatal(self, serving: _Serving, error: KafkaException) -> None:
        if serving is self._serving:
            self.note_fault(fault_of(error), error)

    async def close(self) -> None:
        """End the producer, and wait for its thread, but not for long."""
        self._is_closed = True
        serving = self._serving
        self.renew()
        if serving is not None:
            await self._loop.run_in_executor(None, serving.thread.join, _END_S)


# Codes that an idempotent producer does not come back from.
_FATAL: Final = frozenset(
    {
        "_FATAL",
        "_FENCED",
        "OUT_OF_ORDER_SEQUENCE_NUMBER",
        "UNKNOWN_PRODUCER_ID",
        "INVALID_PRODUCER_EPOCH",
        "INVALID_PRODUCER_ID_MAPPING",
        "_GAPLESS_GUARANTEE",
        "_STATE",
    }
)
