"""Taker: publishes the records of one source in their order, and tells what became of each.

A record that can't become a message goes to the dead-letter topic. A publish that is refused for
now is tried again, and nothing behind it is read meanwhile. The publish rates of a tenant are for
its clients, and don't hold for a source.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
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


def _has_failed(item: _Item) -> bool:
    answer = item.answer
    return answer is not None and answer.done() and answer.exception() is not None


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
        # When the reader has shown last that it is there, on the loop's clock.
        self._held_s = 0.0
        # When this source's share of the turn began.
        self._began_s = 0.0

    async def take(self, records: Sequence[Record], hold: Callable[[], Awaitable[None]]) -> int:
        """Take ``records``; return how many of the first ones are done with.

        These are all of them, unless a stop cuts the wait for one that is refused.

        Args:
            hold: called now and then; its error ends the call.
        """
        self._held_s = self._loop.time()
        self._began_s = time.perf_counter()
        items = [_Item(record) for record in records]
        for item in items:
            self._map(item)
            await self._give_way()
        wait_s = RETRY_S
        while True:
            refusal = await self._publish(items, hold)
            if refusal is None:
                return len(items)
            self._progress.refused += 1
            self._progress.note("waiting", f"publishes are refused: {refusal}")
            if self._stopping.is_set():
                return next(index for index, item in enumerate(items) if not item.is_done)
            await pause(wait_s, self._stopping)
            wait_s = min(2 * wait_s, MAX_RETRY_S)
            await self._hold(hold)

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

    async def _publish(
        self, items: Sequence[_Item], hold: Callable[[], Awaitable[None]]
    ) -> ClevrdError | None:
        """Publish what is not done with; return why it is to be tried again, None for all done."""
        while True:
            refusal = await self._submit_all(items, hold)
            refusal = await self._settle_all(items) or refusal
            # A record whose journaled publish was found wrong is buried in the next pass.
            if refusal is not None or all(item.is_done for item in items):
                return refusal

    async def _submit_all(
        self, items: Sequence[_Item], hold: Callable[[], Awaitable[None]]
    ) -> ClevrdError | None:
        """Publish one after the other, without waiting for answers that are due.

        Return why one is refused for now. Nothing is published behind an answer that has failed:
        it is to be tried again, and would come later than what was behind it.
        """
        for item in items:
            while item.request is not None and not item.is_done and item.answer is None:
                refusal = await self._submit(items, item, item.request)
                if refusal is not None:
                    return refusal
            has_waited = await self._give_way()
            if self._loop.time() - self._held_s > HOLD_S:
                await self._hold(hold)
                has_waited = True
            if has_waited and any(map(_has_failed, items)):
                return None
        return None

    async def _submit(
        self, items: Sequence[_Item], item: _Item, request: PublishRequest
    ) -> ClevrdError | None:
        """Publish one record; return why it, or one before it, is refused for now."""
        hub, tenant = self._hub, self._tenant()
        try:
            topic = hub.topic(tenant, request.topic)
            if topic.journal is not None:
                # Only there a repeat after a crash could find the message, and be one.
                answer = hub.publish_once(tenant, request, item.key)
                if answer is None:
                    # It is not to go on by itself where one before it fails meanwhile.
                    refusal = await self._settle_all(items)
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

    async def _settle_all(self, items: Sequence[_Item]) -> ClevrdError | None:
        """Wait for all answers that are due; return why a record is refused for now."""
        refusal: ClevrdError | None = None
        for item in items:
            answer, item.answer = item.answer, None
            if answer is not None:
                refusal = await self._settle(item, answer) or refusal
        return refusal

    async def _settle(self, item: _Item, answer: asyncio.Future[Published]) -> ClevrdError | None:
        """Wait for the answer that is due; return why the record is refused for now."""
        try:
            self._note(item, await answer)
        except ClevrdError as error:
            return self._refused(item, error)
        return None

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
