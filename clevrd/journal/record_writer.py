"""RecordWriter: sends one partition's messages into the log, one record at a time.

A record is done when it has come back from the log (`record_reader`), or when it was given up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

from clevrd.errors import ClevrdError, JournalFull, JournalUnavailable
from clevrd.journal.base import Engine, Fenced, Placed
from clevrd.journal.batches import Batch, give_answer, take_batch
from clevrd.journal.pace import Pace
from clevrd.journal.partition import (
    FULL,
    MAX_RETRY_S,
    OK,
    RETRY_S,
    Counters,
    Partition,
    unsure,
)

log = logging.getLogger(__name__)

# How long a record that was taken is waited for before it is sent again.
AGAIN_S: Final = 5.0
# So many messages are a few: their record is sent behind another one only as `Pace` says. A record
# costs 150 us here and in the engine: at 20,000 messages a second records that follow each other at
# once, of 6 messages each, would cost three times as much for each message as those of 20.
FEW: Final = 16
# A node begins a new epoch for all at most once in so many seconds.
RESET_EVERY_S: Final = 60.0


class RecordWriter:
    """The writer of one partition."""

    def __init__(
        self,
        partition: Partition,
        engine: Engine,
        writer: str,
        counters: Counters,
        pace: Pace,
        loop: asyncio.AbstractEventLoop,
        wall_us: Callable[[], int],
        look_for_loss: Callable[[], Awaitable[None]],
        count_background_error: Callable[[], None],
        *,
        keep_keys_ms: int,
        max_keys: int,
    ) -> None:
        """Make the writer.

        Args:
            writer: the node's name in its records.
            look_for_loss: called when the log has another stamp than before.
        """
        self._partition = partition
        self._engine = engine
        self._writer = writer
        self._counters = counters
        self._pace = pace
        self._loop = loop
        self._wall_us = wall_us
        self._look_for_loss = look_for_loss
        self._count_background_error = count_background_error
        self._keep_keys_ms = keep_keys_ms
        self._max_keys = max_keys
        # When the last record with messages was sent, by a clock that counts within a turn.
        self._sent_s = 0.0
        # When this writer last began a new epoch, on the loop's clock.
        self._reset_at_s = -RESET_EVERY_S

    async def run(self) -> None:
        """Send one record at a time, each with all that has come while the last was on its way."""
        partition = self._partition
        while True:
            if not (partition.pending or partition.must_send):
                partition.woken = self._loop.create_future()
                await partition.woken
            if partition.must_send:
                partition.must_send = False
                # An empty record confirms foreign ones, or shows where the log ends, or begins a
                # new epoch.
                with suppress(ClevrdError):
                    await self.send(Batch((), is_reset=self._may_reset()))
            # Where a new epoch has to begin, messages before it would be passed over.
            while partition.pending and not (partition.must_send and partition.wants_reset):
                if len(partition.pending) < FEW:
                    # Some milliseconds at most, and only right behind another record.
                    wait_s = self._sent_s + self._pace.apart_s - time.perf_counter()
                    if wait_s > 0.0:
                        await asyncio.sleep(wait_s)
                batch = take_batch(partition.pending)
                self._sent_s = time.perf_counter()
                self._pace.sent(batch.messages, self._sent_s)
                with suppress(ClevrdError):
                    await self.send(batch)

    async def send(self, batch: Batch) -> None:
        """Send ``batch`` until it comes back, however long that takes.

        Its publishers are told after a while that it may have been accepted: `Partition.give_up`.

        Raises:
            JournalFull: there is no room for it; its publishers were told this.
        """
        partition = self._partition
        partition.batch = batch
        partition.sent_at_s = self._loop.time()
        partition.come_back = self._loop.create_future()
        partition.trouble = None
        partition.held = [] if self._engine.answers_when_taken else None
        try:
            await self._send_until_back(batch)
            for held in partition.held or ():
                give_answer(*held)
            partition.took_s = self._loop.time() - partition.sent_at_s
            partition.note_state(OK)
        except JournalFull as error:
            partition.note_state(FULL, error)
            self._counters.failed += batch.fail(error) + partition.fail_pending(error)
            raise
        except asyncio.CancelledError:
            batch.fail(unsure())
            raise
        except Exception as error:
            # A mistake of ours in one record must not keep all later ones from being sent.
            self._count_background_error()
            log.exception("record not sent partition=%d", partition.number)
            self._counters.failed += batch.fail(error)
        finally:
            partition.batch = partition.held = None
            partition.pending_bytes -= batch.cost_bytes
            partition.wake_waiters()

    async def _send_until_back(self, batch: Batch) -> None:
        partition, engine = self._partition, self._engine
        wait_s = RETRY_S
        stamp, record = "", b""
        placed: Sequence[Placed] = ()
        while True:
            try:
                if not stamp:
                    stamp = await self._stamp()
                    record, placed = self._record_of(batch, stamp)
                await engine.append(partition.number, record, stamp, placed)
                if not partition.come_back.done():
                    # `wait_for` is not used: in Python 3.11 it can lose a cancellation.
                    async with asyncio.timeout(AGAIN_S):
                        await asyncio.shield(partition.come_back)
                return
            except Fenced:
                self._counters.fenced += 1
                if partition.held is not None:
                    # A record that had come back may be lost; the one that is sent now counts.
                    partition.held = []
                    partition.come_back = self._loop.create_future()
                stamp = ""
            except (JournalUnavailable, TimeoutError) as error:
                partition.trouble = error if isinstance(error, JournalUnavailable) else None
                if partition.come_back.done() and partition.held is None:
                    return
                self._counters.retries += 1
                log.debug("record sent again partition=%d reason=%r", partition.number, error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, MAX_RETRY_S)

    async def _stamp(self) -> str:
        """Return the log's stamp; if it is new here, look first whether records are gone."""
        stamp = await self._engine.stamp(self._partition.number)
        if self._partition.fold.stamp not in ("", stamp):
            await self._look_for_loss()
        return stamp

    def _record_of(self, batch: Batch, stamp: str) -> tuple[bytes, Sequence[Placed]]:
        partition = self._partition
        partition.sequence += 1
        fold = partition.fold
        header = batch.header(
            stamp,
            self._writer,
            partition.sequence,
            fold.time_after(stamp, self._wall_us(), is_reset=batch.is_reset),
            fold.seen(stamp),
            self._keep_keys_ms,
            self._max_keys,
        )
        record = batch.record(header)
        lines_at = len(record) - batch.size_bytes
        partition.sent, partition.sent_header = record, (header, lines_at)
        return record, fold.plan(header, lines_at)

    def _may_reset(self) -> bool:
        """Return whether the next record is to begin a new epoch, and may do so now."""
        partition = self._partition
        now_s = self._loop.time()
        if not partition.wants_reset or now_s - self._reset_at_s < RESET_EVERY_S:
            return False
        self._reset_at_s = now_s
        self._counters.resets += 1
        log.warning(
            "positions can't be known from the log; a new epoch begins partition=%d",
            partition.number,
        )
        return True
