"""IdempotentPublishes: what publishes with an idempotency key were answered, or are about to be.

Nothing is published here. What is remembered, and for how long: core/idempotency.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from clevrd.core.idempotency import RememberedAnswers, Slot
from clevrd.core.message import PublishRequest
from clevrd.hub.publish_answers import Published
from clevrd.hub.waiting_publishes import WaitingPublishes


class IdempotentPublishes:
    """The remembered answers, and the publishes whose answer is not known yet."""

    __slots__ = ("_answers", "_loop", "_waiting", "under_way")

    def __init__(
        self,
        answers: RememberedAnswers[Published],
        waiting: WaitingPublishes,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._answers = answers
        self._waiting = waiting
        self._loop = loop
        # Publishes with a key that wait, each with what is set when it is decided what became of
        # it; changes in deciding alone.
        self.under_way: dict[Slot, asyncio.Event] = {}

    def find(self, slot: Slot, request: PublishRequest) -> Published | None:
        """Return the first answer as a repeat is given it; None when this is the first.

        Raises:
            InvalidRequest: the key was used for another message.
        """
        first = self._answers.find(slot, _content(request), self._loop.time())
        return msgspec.structs.replace(first, repeated=True) if first is not None else None

    def remember(self, slot: Slot, request: PublishRequest, answer: Published) -> Published:
        """Keep ``answer`` for the repeats of ``request``, and return it."""
        self._answers.remember(slot, _content(request), answer, self._loop.time())
        return answer

    @contextmanager
    def deciding(self, slot: Slot) -> Iterator[None]:
        """Have repeats wait until this block ends, whether with an answer or without."""
        self.under_way[slot] = decided = asyncio.Event()
        try:
            yield
        finally:
            del self.under_way[slot]
            decided.set()

    async def decided(self, slot: Slot) -> None:
        """Wait until no publish with this key is under way.

        Raises:
            Throttled: too many publishes wait already.
        """
        if slot not in self.under_way:
            return
        self._waiting.begin()
        try:
            while decided := self.under_way.get(slot):
                await decided.wait()
        finally:
            self._waiting.end()


def _content(request: PublishRequest) -> bytes:
    """Return what tells one message from another under the same key; JSON has no zero byte."""
    data = bytes(request.data)
    return data if request.key is None else b"%b\0%b" % (data, request.key.encode())
