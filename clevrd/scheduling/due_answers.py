"""Due answers: answers that come later than their requests, and their order on a connection.

A request may have its place in the order of all messages before its answer is known. Then later
requests can be carried out at once, and only the answer comes later (`Due`). Answers to later
requests of the same connection wait behind it (`DueAnswers`). No sockets here: bytes in, bytes out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Final, Generic, TypeVar

from clevrd.errors import ShuttingDown

# Answers, and bytes of answers, that one connection may hold from the first due answer on; at
# either bound the connection is not read. Beside its bytes an answer costs 0.7 KB. 1,024 answers
# are those of 10 ms of a pipeline of 100,000 publishes a second, in which time a disk confirms a
# write. 256 KiB are 700 answers over HTTP, and as much as one read brings.
MAX_DUE_ANSWERS: Final = 1_024
MAX_DUE_BYTES: Final = 262_144

KnownT = TypeVar("KnownT")
AnswerT = TypeVar("AnswerT")


class Due(Generic[AnswerT]):
    """The answer to a request that has its place in the order, but no known outcome yet.

    The outcome's future is never cancelled from here, since the request stands whether its client
    waits or not.
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
        """Store the future and the functions that make the answer.

        Args:
            known: the outcome, or the error with which the request failed.
            finish: makes the answer from the outcome.
            failed: makes the answer from an error; without this function `result` raises the error.
            count: number of answers to clients that this stands for, at most.
        """
        self._known: asyncio.Future[Any] = known
        self._finish: Callable[[Any], AnswerT] = finish
        self._failed = failed
        self.count = count

    def __await__(self) -> Generator[Any, None, AnswerT]:
        """Wait until the outcome is known, and return `result`."""
        return self._wait().__await__()

    async def _wait(self) -> AnswerT:
        await self.known()
        return self.result()

    async def known(self) -> None:
        """Wait until `result` can be called."""
        # asyncio.wait does not cancel the future when its caller is cancelled, as an await of the
        # future would.
        await asyncio.wait((self._known,))

    def when_known(self, callback: Callable[[asyncio.Future[Any]], object]) -> None:
        """Call ``callback`` in a turn of the loop, soon after `result` can be called."""
        self._known.add_done_callback(callback)

    def result(self) -> AnswerT:
        """Return the answer, once it is known.

        Raises:
            ClevrdError: the request failed, and there is no ``failed`` to make an answer of the
                error.
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
        # The bytes that the connection sends; None until they are known. Set once, by
        # `DueAnswers.settle`.
        self.answer = answer
        # Number of answers in this place, at most.
        self.count = count


class DueAnswers:
    """A connection's answers from the first one that is due on, in the order of their requests.

    A connection has such a queue only while an answer is due; most connections never have one.
    """

    __slots__ = ("_count", "_held_bytes", "_places", "is_sealed")

    def __init__(self) -> None:
        self._places: deque[Place] = deque()
        # Number of answers in all places, at most; and bytes of the known ones. Changed by expect,
        # add, settle and take.
        self._count = 0
        self._held_bytes = 0
        # True from `seal` until all answers have left; no place is given meanwhile.
        self.is_sealed = False

    def __len__(self) -> int:
        """Return how many places there are."""
        return len(self._places)

    @property
    def is_full(self) -> bool:
        """Whether no request should begin before answers have left: some, or all if sealed."""
        return self.is_sealed or self._count >= MAX_DUE_ANSWERS or self._held_bytes >= MAX_DUE_BYTES

    def seal(self) -> None:
        """Be full until all answers have left, since the next answer can't wait in this order."""
        self.is_sealed = True

    def expect(self, count: int = 1) -> Place:
        """Return the place of a due answer, or of ``count`` answers at most."""
        place = Place(count)
        self._places.append(place)
        self._count += count
        return place

    def add(self, answer: bytes, count: int = 1) -> None:
        """Put a known answer, or the bytes of ``count`` answers, behind those that are due."""
        self._places.append(Place(count, answer))
        self._count += count
        self._held_bytes += len(answer)

    def settle(self, place: Place, answer: bytes) -> bool:
        """Set the answer of ``place``; return whether `take` has bytes from now on."""
        place.answer = answer
        self._held_bytes += len(answer)
        return bool(self._places) and self._places[0] is place

    def take(self) -> bytes:
        """Return the bytes that may be sent now, up to the next due answer, and forget them."""
        ready: list[bytes] = []
        places = self._places
        while places and (answer := places[0].answer) is not None:
            ready.append(answer)
            self._held_bytes -= len(answer)
            self._count -= places.popleft().count
        if not places:
            self.is_sealed = False
        return b"".join(ready)
