"""Intake: a bounded queue between a subscription's loop and the threads that take items.

The loop reads ahead by MAX_ITEMS and MAX_BYTES at most, so a slow taker is a slow reader to the
server. Positions are those of the items that were taken.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Final

from clevrd.client.errors import Misuse
from clevrd.client.loop_thread import WAIT_SLICE_S, LoopThread
from clevrd.client.position import Position
from clevrd.client.subscription import Subscription
from clevrd.client.wire import Gap, Message

# 64: with fewer, the two threads would wake each other for every message.
MAX_ITEMS: Final = 64
# Bytes of JSON in the waiting messages at most; a single message may be larger.
MAX_BYTES: Final = 1 << 20


class Intake:
    """Reads a subscription in its loop's thread, and hands the items to other threads.

    `take`, `close` and `is_over` are for other threads. `begin`, `leave`, `_read`, `_ended` and
    `_put` run in the loop.
    """

    def __init__(self, thread: LoopThread, items: Subscription) -> None:
        self._thread = thread
        self.items = items
        # The condition guards all fields down to _failure. It is notified when there is an item to
        # take, or an end.
        self._changed = threading.Condition()
        # The items that wait, each with its topic's position before it.
        self._waiting: deque[tuple[Message | Gap, Position | None]] = deque()
        self._bytes = 0
        self._is_full = False
        self._is_over = False
        self._is_closed = False
        # The subscription's error, set by its end. take() raises it once, behind the last item.
        self._failure: BaseException | None = None
        # The loop alone uses the fields from here on.
        self._reading: asyncio.Task[None] | None = None
        self._is_left = False
        self._has_room = asyncio.Event()
        self._has_room.set()

    def take(self, timeout_s: float | None) -> Message | Gap | None:
        """Return the next item; None if none comes in time, or no more will come.

        An interrupt ends the wait at once and takes no item.
        """
        with self._changed:
            if not self._changed.wait_for(self._has_something, self._first_wait_s(timeout_s)):
                if timeout_s is not None:
                    return None
                while not self._changed.wait_for(self._has_something, WAIT_SLICE_S):
                    pass
            if self._is_closed:
                return None
            if not self._waiting:
                failure, self._failure = self._failure, None
                if failure is not None:
                    raise failure
                return None
            item, _ = self._waiting.popleft()
            self._bytes -= _size_of(item)
            if self._is_full and len(self._waiting) <= MAX_ITEMS // 2:
                self._is_full = False
                self._thread.call_soon(self._has_room.set)
            return item

    @property
    def is_over(self) -> bool:
        """Whether every item was taken and no more will come."""
        with self._changed:
            return self._is_closed or (
                self._is_over and not self._waiting and self._failure is None
            )

    def close(self) -> None:
        """Hand out no more items, and wake the threads that wait."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def positions(self) -> dict[str, Position]:
        """Return topic -> position of the items taken; called in the loop, or after it."""
        with self._changed:
            told: dict[str, Position | None] = dict(self.items.positions)
            for item, before in reversed(self._waiting):
                told[item.topic] = before
        return {topic: position for topic, position in told.items() if position is not None}

    def begin(self) -> None:
        """Start to read; called in the loop."""
        before = self._reading
        if before is None or self._is_left:
            self._is_left = False
            self._reading = asyncio.get_running_loop().create_task(self._read(before))
            self._reading.add_done_callback(self._ended)

    def leave(self) -> None:
        """Stop reading; called in the loop. Items that were read stay."""
        if self._reading is not None:
            self._is_left = True
            self._reading.cancel()

    def _has_something(self) -> bool:
        if self._thread.is_forked:
            raise Misuse("The subscription was made before a fork; subscribe again in the child.")
        return bool(self._waiting) or self._is_over or self._is_closed

    @staticmethod
    def _first_wait_s(timeout_s: float | None) -> float | None:
        return WAIT_SLICE_S if timeout_s is None else timeout_s

    async def _read(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait((before,))
        # This `async for` closes the connection at its end, unless the subscription is to keep it.
        async for item in self.items:
            self._put(item)
            await self._has_room.wait()

    def _ended(self, reading: asyncio.Task[None]) -> None:
        """Wake waiting threads at the end of reading; a stopped loop cancels, too."""
        failure = None if reading.cancelled() else reading.exception()
        if reading is not self._reading or self._is_left:
            return
        with self._changed:
            self._failure = failure
            self._is_over = True
            self._changed.notify_all()

    def _put(self, item: Message | Gap) -> None:
        with self._changed:
            self._waiting.append((item, self.items.before(item)))
            self._bytes += _size_of(item)
            if len(self._waiting) >= MAX_ITEMS or self._bytes >= MAX_BYTES:
                self._is_full = True
                self._has_room.clear()
            self._changed.notify()


def _size_of(item: Message | Gap) -> int:
    return len(item.json) if isinstance(item, Message) else 0
