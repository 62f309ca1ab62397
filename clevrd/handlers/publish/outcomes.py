"""The answers to the publishes of a socket: JSON, in the order of the frames.

A frame with a ``ref`` is answered with that ref; without one only a refusal is answered. How the
answers are sent is the connection's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

import msgspec

from clevrd.core.publish_request import MAX_REF_CHARS, SocketPublish
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError
from clevrd.hub import Hub, Published, Run, audience_of
from clevrd.refusals import Failure, failure_of
from clevrd.scheduling.due_answers import Due

_encode = msgspec.json.Encoder().encode


class PublishedWithRef(Published, frozen=True, gc=False, omit_defaults=True):
    """The answer to the publisher of a frame with a ref."""

    ref: str | int | msgspec.UnsetType = msgspec.UNSET
    warnings: tuple[str, ...] = ()


class FailureWithRef(Failure, frozen=True, kw_only=True):
    """A refusal; with the frame's ref where it had one that could be read."""

    ref: str | int | msgspec.UnsetType = msgspec.UNSET


class _RefOnly(msgspec.Struct, frozen=True):
    ref: str | int | msgspec.UnsetType = msgspec.UNSET


_ref_decoder = msgspec.json.Decoder(_RefOnly)


class Asking(Protocol):
    """The parts of a frame on which its answer depends, beside the fate of its message."""

    @property
    def ref(self) -> str | int | None:
        """The ref that the answer carries; None for no answer."""

    def warnings(self) -> tuple[str, ...]:
        """Return what the publisher is told besides."""


class _Asked(msgspec.Struct, frozen=True, gc=False):
    """A publish less its data, which an answer that is due must not hold."""

    ref: str | int | None
    told: tuple[str, ...]

    def warnings(self) -> tuple[str, ...]:
        return self.told


class SocketOutcomes:
    """Makes the answers to one socket's publishes: the `Outcomes` of its `RunPublisher`."""

    __slots__ = ("_hub", "answers", "due")

    # The type of the answer to a publish.
    kind: ClassVar[type[PublishedWithRef]] = PublishedWithRef

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        # In the order of the frames; the connection takes them out.
        self.answers: list[bytes] = []
        # Answers that come later, each with the number of those in ``answers`` before it; the
        # connection takes them out, too.
        self.due: list[tuple[int, Due[list[bytes]]]] = []

    def refusal(self, error: ClevrdError, ref: str | int | msgspec.UnsetType) -> msgspec.Struct:
        """Return what a frame is answered that was refused."""
        failure = failure_of(error)
        return FailureWithRef(
            error=failure.error, code=failure.code, retryable=failure.retryable, ref=ref
        )

    def run_published(
        self, topic: Topic, run: Sequence[SocketPublish], offset: int, ids: list[str]
    ) -> None:
        """Answer a run that was published."""
        self.answers += map(_encode, run_answers(self.kind, topic, run, offset, ids))

    def run_is_due(
        self, topic: Topic, run: Sequence[SocketPublish], known: asyncio.Future[Run]
    ) -> None:
        """Answer a run once it is known what became of it."""
        asked = [_Asked(request.ref, request.warnings()) for request in run]
        self._owe(known, partial(self._late_run, topic, asked), asked)

    def published(self, request: SocketPublish, answer: Published) -> None:
        """Answer a publish that went by itself, or that was published before."""
        if request.ref is not None:
            self.answers.append(_encode(with_ref(self.kind, answer, request)))

    def is_due(self, request: SocketPublish, known: asyncio.Future[Published]) -> None:
        """Answer a publish that went by itself once it is known what became of it."""
        asked = _Asked(request.ref, request.warnings())
        self._owe(known, partial(self._late_answer, asked), [asked])

    def refused(self, error: ClevrdError, payload: bytes) -> None:
        """Answer a frame that was refused."""
        self._hub.refusals.count(error)
        self.answers.append(_encode(self.refusal(error, ref_of(payload))))

    def _owe(self, known: asyncio.Future[Any], finish: Any, asked: Sequence[Asking]) -> None:
        failed = partial(self._late_refusals, asked)
        due: Due[list[bytes]] = Due(known, finish, failed=failed, count=len(asked))
        self.due.append((len(self.answers), due))

    def _late_run(self, topic: Topic, asked: Sequence[Asking], run: Run) -> list[bytes]:
        return [*map(_encode, run_answers(self.kind, topic, asked, *run))]

    def _late_answer(self, asked: Asking, answer: Published) -> list[bytes]:
        if asked.ref is None:
            return []
        return [_encode(with_ref(self.kind, answer, asked))]

    def _late_refusals(self, asked: Sequence[Asking], error: Exception) -> list[bytes]:
        refs = [msgspec.UNSET if each.ref is None else each.ref for each in asked]
        refused = self._hub.refusals.count(error, times=len(refs))
        return [_encode(self.refusal(refused, ref)) for ref in refs]


def run_answers(
    kind: type[PublishedWithRef],
    topic: Topic,
    run: Sequence[Asking],
    offset: int,
    ids: list[str],
) -> list[PublishedWithRef]:
    """Return what a run's publishers that want an answer are told, as so many ``kind``."""
    audience = audience_of(topic)
    return [
        kind(
            True,
            ids[index],
            offset + index,
            *audience,
            request.ref,
            request.warnings(),
        )
        for index, request in enumerate(run)
        if request.ref is not None
    ]


def with_ref(kind: type[PublishedWithRef], answer: Published, asked: Asking) -> PublishedWithRef:
    """Return ``answer`` as a ``kind`` with the ref and the warnings of the frame."""
    fields = msgspec.structs.asdict(answer)
    ref = msgspec.UNSET if asked.ref is None else asked.ref
    return kind(**fields, ref=ref, warnings=asked.warnings())


def ref_of(payload: bytes) -> str | int | msgspec.UnsetType:
    """Return the ref of a frame that was refused, if that much of it can be read."""
    try:
        ref = _ref_decoder.decode(payload).ref
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return msgspec.UNSET
    return msgspec.UNSET if isinstance(ref, str) and len(ref) > MAX_REF_CHARS else ref
