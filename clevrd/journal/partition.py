"""Partition: one partition of the log as a node sees it: what was counted, and what is on its way.

The records are sent by `record_writer` and read by `record_reader`; both change what is here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Final

from clevrd.errors import ClevrdError, JournalUnavailable
from clevrd.journal.batches import Batch, Pending, Stamp
from clevrd.journal.fold import Fold
from clevrd.journal.nodes_seen import NodesSeen
from clevrd.journal.records import Header
from clevrd.metrics.journal import PartitionFigures

log = logging.getLogger(__name__)

# Bytes of messages that may wait for their place in one partition; publishes beyond wait for room.
MAX_PENDING_BYTES: Final = 8 << 20

# A publish, its first message's offset, its messages' stamps, and whether it is a repeat.
HeldAnswer = tuple[Pending, int, Sequence[Stamp], bool]

# How long its writer and its reader wait before they ask an engine again that is away; the wait
# doubles up to the second figure.
RETRY_S: Final = 0.05
MAX_RETRY_S: Final = 1.0

# States of a partition, as its publishers find it.
OK: Final = "ok"
FULL: Final = "full"
UNAVAILABLE: Final = "unavailable"


def unsure() -> JournalUnavailable:
    """Return the error for publishers whose record does not come back.

    It is a new one each time: one that many futures raise collects the frames of all.
    """
    return JournalUnavailable(
        "The journal does not answer, so the message may have been accepted, or not; send it again"
        " with an idempotency_key to have it once."
    )


def not_taken() -> JournalUnavailable:
    """Return the error for publishers that wait behind a record that does not come back."""
    return JournalUnavailable(
        "The journal does not answer, so the message was not accepted; send it again in a moment."
    )


class Counters:
    """Counters of a node, over all its partitions; they only rise."""

    __slots__ = (
        "failed",
        "fenced",
        "foreign",
        "messages",
        "records",
        "resets",
        "retries",
        "rewinds",
        "unreadable",
    )

    def __init__(self) -> None:
        # Records of this node that came back, and their messages.
        self.records = 0
        self.messages = 0
        # Records that were sent again, and messages that were given up.
        self.retries = 0
        self.failed = 0
        # Records of this node that met another stamp of the log.
        self.fenced = 0
        # Records of foreign producers, and records that could not be read.
        self.foreign = 0
        self.unreadable = 0
        # Times that the node went back to a checkpoint, since the log had lost what it had read or
        # was counted otherwise by another node; and epochs that it began for all.
        self.rewinds = 0
        self.resets = 0


class Partition:
    """One partition's fold, and this node's messages on their way into it."""

    __slots__ = (
        "arrives_with",
        "batch",
        "changes",
        "changes_at_checkpoint",
        "come_back",
        "contradicted_at",
        "fold",
        "held",
        "lost_epoch",
        "must_send",
        "needs_whole_checkpoint",
        "nodes",
        "number",
        "pending",
        "pending_bytes",
        "read_trouble",
        "records_at_checkpoint",
        "records_folded",
        "sent",
        "sent_at_s",
        "sent_header",
        "sequence",
        "state",
        "took_s",
        "trouble",
        "waiters",
        "wants_reset",
        "woken",
    )

    def __init__(self, number: int, fold: Fold, loop: asyncio.AbstractEventLoop) -> None:
        self.number = number
        self.fold = fold
        self.state = OK
        # Why the record on its way was not taken at the last try; None if nothing was said.
        self.trouble: Exception | None = None
        # Why the log could not be read at the last try; None if it could.
        self.read_trouble: Exception | None = None
        # Publishes that are in no record yet, in the order of arrival.
        self.pending: deque[Pending] = deque()
        # Bytes of these, and of the record that is on its way.
        self.pending_bytes = 0
        # Publishes that wait for pending_bytes to fall, in the order of arrival.
        self.waiters: deque[asyncio.Future[None]] = deque()
        # Done when there is something to send; None while the writer does not wait for it.
        self.woken: asyncio.Future[None] | None = None
        # The record that is on its way: its publishes, its sequence, and whether it came back.
        self.batch: Batch | None = None
        # Since when it is, on the loop's clock.
        self.sent_at_s = 0.0
        # How long the last one that came back was on its way.
        self.took_s = 0.0
        self.sequence = 0
        self.come_back: asyncio.Future[None] = loop.create_future()
        # The record that was made last, and its header with the byte at which its lines begin: an
        # engine may hand these very bytes back.
        self.sent = b""
        self.sent_header: tuple[Header, int] | None = None
        # A record is to be sent even if it has no messages.
        self.must_send = False
        # A record is to begin a new epoch for all nodes; until one has begun.
        self.wants_reset = False
        # The epoch in which records are gone that were read, under the same stamp; empty without.
        # Until readers are in another one nothing is delivered and nobody answered: positions would
        # be given again.
        self.lost_epoch = ""
        # From this sequence on an own record shows that the log's end was reached; see
        # `Fold.is_behind`.
        self.arrives_with = 0
        # The position of the record that another node contradicted last; 0 without one.
        self.contradicted_at = 0
        # Records that were folded, and how many of them the last checkpoint has.
        self.records_folded = 0
        self.records_at_checkpoint = 0
        # The same of records that have changed anything but who has written.
        self.changes = 0
        self.changes_at_checkpoint = 0
        # Answers that wait until the engine has said that it has the record for good; None where
        # what is read is so already. Set by the writer, filled by the reader.
        self.held: list[HeldAnswer] | None = None
        # In the first partition alone, in which all nodes show themselves.
        self.nodes = NodesSeen()
        # The last checkpoint was not taken, so the next one has to be whole.
        self.needs_whole_checkpoint = False

    @property
    def is_busy(self) -> bool:
        """Whether any message waits for its place."""
        return bool(self.pending) or self.batch is not None

    def lag_s(self, now_s: float) -> float:
        """Return how far reading is behind the log's end, in seconds.

        That is how long this node's record that is on its way has been waited for, or how long the
        last one took: when it came back, all that was appended before it had been read.
        """
        return self.took_s if self.batch is None else now_s - self.sent_at_s

    def view(self, now_s: float) -> PartitionFigures:
        """Return the figures as they are now."""
        return PartitionFigures(
            partition=self.number,
            position=str(self.fold.position),
            time_s=self.fold.time_us / 1e6,
            lag_s=round(self.lag_s(now_s), 6),
            state=self.state,
        )

    def note_state(self, state: str, error: Exception | None = None) -> None:
        """Note whether publishes are taken, and log a change."""
        if state == self.state:
            return
        self.state = state
        if error is None:
            log.warning("the journal takes messages again partition=%d", self.number)
        else:
            log.error(
                "the journal takes no messages partition=%d state=%s reason=%s",
                self.number,
                state,
                error,
            )

    def give_up(self) -> int:
        """Answer all publishes that wait, since the record on its way does not come back.

        Return how many messages these have. The record itself may come back yet; it is waited for,
        since the next one can't be reckoned before that.
        """
        failed = 0 if self.batch is None else self.batch.fail(unsure())
        failed += self.fail_pending(not_taken())
        self.note_state(UNAVAILABLE, self.trouble or self.read_trouble or unsure())
        return failed

    def fail_pending(self, error: ClevrdError) -> int:
        """Answer all publishes that are in no record yet with ``error``; return their messages.

        Behind a record that was not taken none is sent before its publisher knows: whoever sends
        several, one behind the other, would find them in another order.
        """
        if not self.pending:
            return 0
        waiting = Batch(tuple(self.pending))
        self.pending.clear()
        self.pending_bytes -= waiting.cost_bytes
        failed = waiting.fail(error)
        self.wake_waiters()
        return failed

    def wake(self) -> None:
        """Wake the task that writes, if it waits for something to send."""
        woken, self.woken = self.woken, None
        if woken is not None and not woken.done():
            woken.set_result(None)

    def send_soon(self) -> None:
        """Have a record sent soon, an empty one if there are no messages."""
        self.must_send = True
        self.wake()

    def wake_waiters(self) -> None:
        """Let as many publishes go on as there is room for, in the order of arrival."""
        # A publish that is woken appends at once, so each is reckoned with a run of messages.
        room_bytes = MAX_PENDING_BYTES - self.pending_bytes
        while self.waiters and room_bytes > 0:
            woken = self.waiters.popleft()
            if not woken.done():
                woken.set_result(None)
                room_bytes -= MAX_PENDING_BYTES // 32
