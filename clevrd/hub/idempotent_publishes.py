"""IdempotentPublishes: the answers to publishes with an idempotency key, and who waits for one.

Publishing is done elsewhere; `core/idempotency` decides what is remembered and for how long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import msgspec

from clevrd.core.idempotency import RememberedAnswers, Slot
from clevrd.core.publish_request import PublishRequest
from clevrd.hub.publish_answers import PublishAnswer, Published
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
        # Publishes with a key that are not decided yet: they wait, or their answer is due. Each has
        # an event, set when its publish has an answer or has failed. Changed by `deciding`,
        # `_remember_later` and `_note_known` alone.
        self.under_way: dict[Slot, asyncio.Event] = {}

    def find(self, slot: Slot, request: PublishRequest) -> Published | None:
        """Return the first answer, marked as repeated; None if there is none yet.

        Raises:
            InvalidRequest: the key was used for another message.
        """
        first = self._answers.find(slot, _content(request), self._loop.time())
        return msgspec.structs.replace(first, repeated=True) if first is not None else None

    def remember(self, slot: Slot, request: PublishRequest, answer: PublishAnswer) -> PublishAnswer:
        """Return ``answer``, and keep it for repeats of ``request`` as soon as it is known."""
        if isinstance(answer, Published):
            self._answers.remember(slot, _content(request), answer, self._loop.time())
        else:
            self._remember_later(slot, _content(request), answer)
        return answer

    def _remember_later(self, slot: Slot, content: bytes, due: asyncio.Future[Published]) -> None:
        """Make repeats wait for the answer; a publish that fails is not remembered."""
        self.under_way[slot] = decided = asyncio.Event()
        due.add_done_callback(partial(self._note_known, slot, content, decided))

    def _note_known(
        self, slot: Slot, content: bytes, decided: asyncio.Event, due: asyncio.Future[Published]
    ) -> None:
        if not due.cancelled() and due.exception() is None:
            self._answers.remember(slot, content, due.result(), self._loop.time())
        del self.under_way[slot]
        decided.set()

    @contextmanager
    def deciding(self, slot: Slot) -> Iterator[None]:
        """Make repeats wait until this block ends, whether it ends with an answer or an error.

        If the block ends with an answer that is due, repeats go on waiting until it is known.
        """
        self.under_way[slot] = decided = asyncio.Event()
        try:
            yield
        finally:
            if self.under_way[slot] is decided:
                del self.under_way[slot]
            decided.set()

    async def decided(self, slot: Slot, size_bytes: int) -> None:
        """Wait until no publish with this key is under way.

        Args:
            size_bytes: of what is to be published then.

        Raises:
            Throttled: too many publishes wait already.
        """
        if slot not in self.under_way:
            return
        portion = self._waiting.begin(slot[0], size_bytes)
        try:
            while decided := self.under_way.get(slot):
                await decided.wait()
        finally:
            self._waiting.end(portion, size_bytes)


def _content(request: PublishRequest) -> bytes:
    """Return bytes that differ for different messages under one key; JSON has no zero byte."""
    data = bytes(request.data)
    return data if request.key is None else b"%b\0%b" % (data, request.key.encode())
