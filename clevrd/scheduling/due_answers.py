"""Answers that come later than their requests, and the order in which a connection sends them.

A request may have its place in the order of all messages before its answer is known: more can be
carried out behind it at once, and only its answer comes later (`Due`). What a connection answers
meanwhile waits behind that (`DueAnswers`). No sockets here: bytes in, bytes out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Final, Generic, TypeVar

from clevrd.errors import ShuttingDown

# How much one connection may have behind an answer that is due before it is not read on. Beside its
# bytes an answer costs 0.7 KB; 1,024 of them are what a pipeline of 100,000 publishes a second
# brings in 10 ms, in which a disk says that it has them. The bytes are those of 700 answers over
# HTTP, and as many as one read brings.
MAX_DUE_ANSWERS: Final = 1_024
MAX_DUE_BYTES: Final = 262_144

KnownT = TypeVar("KnownT")
AnswerT = TypeVar("AnswerT")


class Due(Generic[AnswerT]):
    """The answer to a request that has its place in the order, but whose outcome is not known yet.

    Nobody cancels what it waits for, since the request stands whether its client waits or not.
    """

    __slots__ = ("_failed", "_finish", "_known", "count")

    def __init__(
        self,
        known: asyncio.Future[KnownT],
        finish: Callable[[KnownT], AnswerT],
        *,
        failed: Callable[[Exception], AnswerT] | None = None,
        count: int = 1,
    ) -> None:
        """Make it.

        Args:
            known: the outcome, or the error with which the request failed.
            finish: makes the answer from the outcome.
            failed: makes the answer from an error; without it `result` raises the error.
            count: how many answers to clients it is at most.
        """
        self._known: asyncio.Future[Any] = known
        self._finish: Callable[[Any], AnswerT] = finish
        self._failed = failed
        self.count = count

    def __await__(self) -> Generator[Any, None, AnswerT]:
        """Wait until it is known, and return what `result` does."""
        return self._wait().__await__()

    async def _wait(self) -> AnswerT:
        await self.known()
        return self.result()

    async def known(self) -> None:
        """Wait until `result` can be asked for."""
        # Unlike an await of the future it leaves that alone when who waits is cancelled.
        await asyncio.wait((self._known,))

    def when_known(self, callback: Callable[[asyncio.Future[Any]], object]) -> None:
        """Call ``callback`` in a turn of the loop, soon after `result` can be asked for."""
        self._known.add_done_callback(callback)

    def result(self) -> AnswerT:
        """Return the answer, once it is known.

        Raises:
            ClevrdError: the request failed, and nothing makes an answer of that here.
        """
        try:
            if self._known.cancelled():
                raise ShuttingDown
            outcome = self._known.result()
        except Exception as error:
            if self._failed is None:
                raise
            return self._failed(error)
        return self._finish(outcome)


class Place:
    """The place of one answer, or of several that are known together, in a connection's order."""

    __slots__ = ("answer", "count")

    def __init__(self, count: int, answer: bytes | None = None) -> None:
        # As the connection sends it; None until it is known, set once by `DueAnswers.settle`.
        self.answer = answer
        # How many answers it is at most.
        self.count = count


class DueAnswers:
    """A connection's answers from the first one that is due on, in the order of their requests.

    A connection has one only while an answer is due: most never make any.
    """

    __slots__ = ("_count", "_held_bytes", "_places", "is_sealed")

    def __init__(self) -> None:
        self._places: deque[Place] = deque()
        # Answers in all places, and the bytes of those that are known.
        self._count = 0
        self._held_bytes = 0
        # Nothing more has a place until all answers have left.
        self.is_sealed = False

    def __len__(self) -> int:
        """Return how many places there are."""
        return len(self._places)

    @property
    def is_full(self) -> bool:
        """Whether no request should be begun before some answers have left, or all if sealed."""
        return self.is_sealed or self._count >= MAX_DUE_ANSWERS or self._held_bytes >= MAX_DUE_BYTES

    def seal(self) -> None:
        """Be full until all answers have left: what comes next can't wait in this order."""
        self.is_sealed = True

    def expect(self, count: int = 1) -> Place:
        """Return the place of what is due: ``count`` answers at most."""
        place = Place(count)
        self._places.append(place)
        self._count += count
        return place

    def add(self, answer: bytes, count: int = 1) -> None:
        """Put ``answer`` behind what is due; as bytes it may be ``count`` of them."""
        self._places.append(Place(count, answer))
        self._count += count
        self._held_bytes += len(answer)

    def settle(self, place: Place, answer: bytes) -> bool:
        """Note what is sent at ``place``; return whether `take` has something from now on."""
        place.answer = answer
        self._held_bytes += len(answer)
        return bool(self._places) and self._places[0] is place

    def take(self) -> bytes:
        """Return what may be sent now, up to the next answer that is due, and let go of it."""
        ready: list[bytes] = []
        places = self._places
        while places and (answer := places[0].answer) is not None:
            ready.append(answer)
            self._held_bytes -= len(answer)
            self._count -= places.popleft().count
        if not places:
            self.is_sealed = False
        return b"".join(ready)
