"""Taker: publishes the records of one source in their order, and tells what became of each.

More records are taken while answers to those before are due, up to a bound. A record that can't
become a message goes to the dead-letter topic. A publish that is refused for now is tried again,
and nothing behind it is read meanwhile. The publish rates of a tenant are for its clients, and
don't hold for a source.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from clevrd.core.publish_request import PublishRequest
from clevrd.errors import ClevrdError
from clevrd.hub import Hub, Published
from clevrd.scheduling.timers import pause
from clevrd.sources.mapping import Mapping
from clevrd.sources.progress import Progress
from clevrd.sources.reading import SourceTrouble
from clevrd.sources.records import CannotTake, Record
from clevrd.tenants.tenant import Tenant

# Time that a source works in one turn of the loop.
SHARE_S: Final = 0.001
# How long a publish that was refused waits at first, and at most.
RETRY_S: Final = 0.1
MAX_RETRY_S: Final = 5.0
# Records that may be under way, and their bytes, when more are read: some reads' worth, so that the
# next one is published while the journal has the last. JetStream sends as many unacknowledged.
MAX_UNDER_WAY: Final = 512
MAX_UNDER_WAY_BYTES: Final = 4 << 20
# How often the reader shows that it is there while records wait.
HOLD_S: Final = 3.0


class _Item:
    """A record on its way: the publish that it became, or its dead letter."""

    __slots__ = ("answer", "is_dead", "is_done", "key", "record", "request")

    def __init__(self, record: Record) -> None:
        self.record = record
        # None for a record that is passed over, and for a dead one that nobody is told of.
        self.request: PublishRequest | None = None
        self.key = ""
        self.is_dead = False
        self.is_done = False
        # The answer that is due; None before the publish, and where it was known at once.
        self.answer: asyncio.Future[Published] | None = None

    @property
    def is_unsent(self) -> bool:
        """Whether it is yet to be published, or to be tried again."""
        return self.request is not None and not self.is_done and self.answer is None


def _has_failed(items: Iterable[_Item]) -> bool:
    """Return whether an answer is an error that nobody has looked at yet; 0.05 us for each item."""
    for item in items:
        answer = item.answer
        if answer is not None and answer.done() and answer.exception() is not None:
            return True
    return False


class Taker:
    """Publishes what one source has."""

    def __init__(
        self,
        hub: Hub,
        mapping: Mapping,
        progress: Progress,
        tenant: Callable[[], Tenant],
        max_message_bytes: int,
        stopping: asyncio.Event,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Make a taker.

        Args:
            tenant: returns whose topics the records go to, with the limits that hold now.
            stopping: set when no publish is to be tried again.
        """
        self._hub = hub
        self._mapping = mapping
        self._progress = progress
        self._tenant = tenant
        self._max_message_bytes = max_message_bytes
        self._stopping = stopping
        self._loop = loop
        # Records that are not done with, in their order, and the bytes of their values.
        self._items: deque[_Item] = deque()
        self._size_bytes = 0
        # Records that are done with, of which the caller was not told yet.
        self._done: list[Record] = []
        # When the reader has shown last that it is there, on the loop's clock.
        self._held_s = 0.0
        # When this source's share of the turn began.
        self._began_s = 0.0

    @property
    def under_way(self) -> int:
        """How many records were taken that are not done with."""
        return len(self._items)

    async def take(
        self, records: Sequence[Record], hold: Callable[[], Awaitable[None]]
    ) -> list[Record]:
        """Publish ``records`` behind those under way; return those that are done with, in order.

        Returns when few enough are under way for others to be read; without ``records`` when one
        more is done with, unless a stop cuts the wait for one that is refused.

        Args:
            hold: called now and then; its error ends the call.
        """
        self._held_s = self._loop.time()
        self._began_s = time.perf_counter()
        most = MAX_UNDER_WAY if records else max(0, len(self._items) - 1)
        for record in records:
            item = _Item(record)
            self._items.append(item)
            self._size_bytes += len(record.value or b"")
            self._map(item)
            await self._give_way()
        wait_s = RETRY_S
        while True:
            refusal = await self._publish(most, hold)
            if refusal is None:
                break
            self._progress.refused += 1
            self._progress.note("waiting", f"publishes are refused: {refusal}")
            if self._stopping.is_set():
                break
            await pause(wait_s, self._stopping)
            wait_s = min(2 * wait_s, MAX_RETRY_S)
            await self._hold(hold)
        done, self._done = self._done, []
        return done

    def forget(self) -> None:
        """Forget what is under way: it is read again, by this process or another one."""
        self._items.clear()
        self._done.clear()
        self._size_bytes = 0

    # --- one record ------------------------------------------------------------------------------

    def _map(self, item: _Item) -> None:
        limit_bytes = self._tenant().limits.max_message_bytes
        max_bytes = min(self._max_message_bytes, limit_bytes or self._max_message_bytes)
        try:
            item.request = self._mapping.request_of(item.record, max_bytes)
        except CannotTake as error:
            self._bury(item, str(error))
            return
        if item.request is None:
            self._progress.filtered += 1
            item.is_done = True
        else:
            item.key = self._mapping.idempotency_key(item.record, item.request)

    def _bury(self, item: _Item, reason: str) -> None:
        """Make a dead letter of a record, or pass over one whose dead letter is refused too."""
        letter = None if item.is_dead else self._mapping.dead_letter(item.record, reason)
        if not item.is_dead:
            self._progress.dead += 1
        item.is_dead, item.request = True, letter
        if letter is None:
            item.is_done = True
        else:
            item.key = self._mapping.idempotency_key(item.record, letter)

    # --- publishing ------------------------------------------------------------------------------

    async def _publish(self, most: int, hold: Callable[[], Awaitable[None]]) -> ClevrdError | None:
        """Publish all, and wait until at most ``most`` are under way, and not too many bytes.

        Return why a record is to be tried again; nothing is under way then.
        """
        while True:
            refusal = await self._submit_all(hold)
            if refusal is not None or _has_failed(self._items):
                most = 0
            refusal = await self._settle(most) or refusal
            # A record whose journaled publish was found wrong is buried in the next pass.
            if refusal is not None or not any(item.is_unsent for item in self._items):
                return refusal

    async def _submit_all(self, hold: Callable[[], Awaitable[None]]) -> ClevrdError | None:
        """Publish one after the other, without waiting for answers that are due.

        Return why one is refused for now. Nothing is published behind an answer that has failed:
        it is to be tried again, and would come later than what was behind it.
        """
        has_waited = True
        for item in [each for each in self._items if each.is_unsent]:
            if has_waited and _has_failed(self._items):
                return None
            while item.is_unsent:
                refusal = await self._submit(item)
                if refusal is not None:
                    return refusal
            has_waited = await self._give_way()
            if self._loop.time() - self._held_s > HOLD_S:
                await self._hold(hold)
                has_waited = True
        return None

    async def _submit(self, item: _Item) -> ClevrdError | None:
        """Publish one record; return why it, or one before it, is refused for now."""
        hub, tenant, request = self._hub, self._tenant(), item.request
        if request is None:
            return None
        try:
            topic = hub.topic(tenant, request.topic)
            if topic.journal is not None:
                # The journal alone remembers keys over a crash, after which the record is read
                # again.
                answer = hub.publish_once(tenant, request, item.key)
                if answer is None:
                    # The hub would publish it by itself later, also where one before it fails
                    # meanwhile.
                    refusal = await self._settle(0)
                    if refusal is not None:
                        return refusal
                    answer = await hub.publish_once_later(tenant, request, item.key)
            else:
                if hub.must_wait(topic):
                    topic = await hub.turn(tenant, topic, 1, len(request.data))
                answer = hub.publish(topic, request)
        except ClevrdError as error:
            return self._refused(item, error)
        if isinstance(answer, Published):
            self._note(item, answer)
        else:
            item.answer = answer
        return None

    async def _settle(self, most: int) -> ClevrdError | None:
        """Wait for answers until at most ``most`` records are under way, and not too many bytes.

        Return why a record is refused for now; then all answers have been waited for. Answers
        that are known already are noted too.
        """
        refusal: ClevrdError | None = None
        for item in list(self._items):
            answer = item.answer
            is_over = len(self._items) > most or self._size_bytes > MAX_UNDER_WAY_BYTES
            if answer is not None and (is_over or refusal is not None or answer.done()):
                item.answer = None
                try:
                    self._note(item, await answer)
                except ClevrdError as error:
                    refusal = self._refused(item, error) or refusal
            elif answer is not None:
                break
            self._let_go()
        return refusal

    def _let_go(self) -> None:
        """Let go of the first records as far as they are done with."""
        items = self._items
        while items and items[0].is_done:
            record = items.popleft().record
            self._size_bytes -= len(record.value or b"")
            self._done.append(record)

    def _refused(self, item: _Item, error: ClevrdError) -> ClevrdError | None:
        """Bury a record that will never be taken; return the error of one that may be."""
        if error.retryable:
            return error
        self._bury(item, str(error))
        return None

    def _note(self, item: _Item, answer: Published) -> None:
        item.is_done = True
        if item.is_dead:
            return
        if answer.repeated:
            self._progress.repeated += 1
        else:
            self._progress.taken += 1

    # --- time ------------------------------------------------------------------------------------

    async def _give_way(self) -> bool:
        """Let others have their turn when this source's share is used up; return whether it was."""
        if time.perf_counter() - self._began_s <= SHARE_S:
            return False
        await asyncio.sleep(0)
        self._began_s = time.perf_counter()
        return True

    async def _hold(self, hold: Callable[[], Awaitable[None]]) -> None:
        self._held_s = self._loop.time()
        try:
            await hold()
        except SourceTrouble as trouble:
            # Records that were read are published, whatever becomes of their server; but not beside
            # another process.
            if trouble.state == "standby":
                raise
