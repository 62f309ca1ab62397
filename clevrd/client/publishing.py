"""Publishing over HTTP, one message or many, again and again until it is taken or refused."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Final, TypeGuard

from clevrd.client.arguments import check_items, check_names, type_name
from clevrd.client.backoff import Clockwork, delay_s
from clevrd.client.errors import BadRecord, ClientError, Refused, Unreachable
from clevrd.client.session import Session
from clevrd.client.values import UNREADABLE, data_json
from clevrd.client.wire import (
    Outgoing,
    Published,
    Refusal,
    publish_body,
    read_batch,
    read_published,
    split_batch,
)

log = logging.getLogger(__name__)

# How long one message is offered again before publish() gives up; a planned restart takes 30 s.
RETRY_FOR_S: Final = 60.0
# The size that each result in a batch's answer may have: a sentence with a topic of 255 bytes in
# it.
_RESULT_BYTES: Final = 1024
_TOO_LARGE: Final = 413


class IdempotencyKeys:
    """Makes one key for each message, by which a server knows a copy of it.

    Unique by 96 random bits for the process and a number within it: a tenth of the price of
    drawing each one.
    """

    __slots__ = ("_next", "_prefix")

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin with other random bits."""
        self._prefix = secrets.token_urlsafe(12)
        self._next = count(1).__next__

    def __call__(self) -> str:
        """Return a key that was never used."""
        return f"{self._prefix}-{self._next()}"


class Repeats:
    """Counts messages that may be there twice: sent again, and the server may have the first.

    A server that heeds idempotency keys says so in its answers, and then there is one copy.
    """

    __slots__ = ("messages",)

    def __init__(self) -> None:
        self.messages = 0

    def settle(self, copies: int, result: Published | Refusal) -> None:
        """Count a message of which ``copies`` may have arrived before the one that was answered."""
        if isinstance(result, Published) and not result.knows_keys:
            self.messages += copies


class HttpPublisher:
    """Publishes by POST, with retries."""

    def __init__(
        self, session: Session, repeats: Repeats, retry_for_s: float, clockwork: Clockwork
    ) -> None:
        self._session = session
        self._repeats = repeats
        self._retry_for_s = retry_for_s
        self._random, self._sleep, self._clock = clockwork

    async def publish(self, body: bytes) -> Published:
        """Offer one publish until it is taken; raises as `Client.publish`."""
        copies = 0
        offers = self._offers()
        while True:
            try:
                answer = read_published(await self._session.post("/publish", body))
            except (Refused, Unreachable) as error:
                await self._pause(offers, error)
                copies += error.may_have_arrived
            except UNREADABLE as error:
                raise self._session.not_clevrd(200) from error
            else:
                self._repeats.settle(copies, answer)
                self._session.warn(answer.warnings)
                return answer

    async def publish_batch(
        self,
        items: Iterable[Outgoing | tuple[str, Any]],
        max_items: int,
        max_bytes: int,
        new_key: IdempotencyKeys,
    ) -> list[Published | Refusal]:
        """Publish ``items`` and return what became of each; raises as `Client.publish_batch`."""
        results: list[Published | Refusal] = []
        try:
            for batch in split_batch(lines_of(items, new_key), max_items, max_bytes):
                results += await self._publish_lines(batch)
        except ClientError as error:
            error.results = results + error.results
            raise
        return results

    async def _publish_lines(self, lines: Sequence[bytes]) -> list[Published | Refusal]:
        """Offer ``lines`` until each is taken or refused for good, or time is up."""
        results: list[Published | Refusal] = []
        waiting = list(range(len(lines)))
        copies = 0
        offers = self._offers()
        while waiting:
            try:
                answers = await self._post_lines([lines[index] for index in waiting])
            except (Refused, Unreachable) as error:
                # After the first answer each item has a result, a refusal at worst.
                error.results = results
                await self._pause(offers, error)
                copies += error.may_have_arrived
                continue
            results = results or answers
            for index, answer in zip(waiting, answers, strict=True):
                results[index] = answer
                self._repeats.settle(copies, answer)
                if isinstance(answer, Published):
                    self._session.warn(answer.warnings)
            copies = 0
            refused = {index: result for index in waiting if is_transient(result := results[index])}
            if len(refused) < len(waiting):
                offers = self._offers()
            waiting = list(refused)
            if waiting and not await self._may_pause(offers, refused[waiting[0]].as_error()):
                break
        return results

    async def _post_lines(self, lines: Sequence[bytes]) -> list[Published | Refusal]:
        """Post one batch; halves that are too large for the server are posted by themselves."""
        try:
            content = await self._session.post(
                "/publish/batch", b"\n".join(lines), _RESULT_BYTES * (len(lines) + 1)
            )
        except Refused as error:
            if error.status != _TOO_LARGE:
                raise
            if len(lines) == 1:
                return [Refusal(str(error), error.code)]
            half = len(lines) // 2
            return await self._post_lines(lines[:half]) + await self._post_lines(lines[half:])
        try:
            results = read_batch(content)
        except UNREADABLE as error:
            raise self._session.not_clevrd(200) from error
        if len(results) != len(lines):
            raise self._session.not_clevrd(f"{len(lines)} items with {len(results)} results")
        return results

    # --- waiting ---

    def _offers(self) -> Offers:
        return Offers(self._clock() + self._retry_for_s)

    async def _pause(self, offers: Offers, error: Refused | Unreachable) -> None:
        """Wait before the next offer; raises ``error`` when there is to be none."""
        if not self._is_worth_repeating(error) or not await self._may_pause(offers, error):
            raise error

    async def _may_pause(self, offers: Offers, error: ClientError) -> bool:
        """Wait before the next offer, unless time is up; return whether it was waited."""
        wait_s = delay_s(offers.attempt, error, self._random())
        if self._clock() + wait_s > offers.deadline_s:
            return False
        offers.attempt += 1
        _log_repeat(error, wait_s)
        await self._sleep(wait_s)
        return not self._session.is_closed

    def _is_worth_repeating(self, error: Refused | Unreachable) -> bool:
        if self._session.is_closed:
            return False
        return error.is_transient if isinstance(error, Refused) else self._session.was_reached


class Offers:
    """How often something was offered, and how long it may be."""

    __slots__ = ("attempt", "deadline_s")

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.attempt = 0


def lines_of(
    items: Iterable[Outgoing | tuple[str, Any]], new_key: IdempotencyKeys
) -> Iterator[bytes]:
    """Yield the line of each item of a batch.

    Raises:
        TypeError: ``items`` can't be iterated over.
        BadRecord: an item is none, or can't be sent; the sentence says which.
    """
    check_items(items)
    for number, item in enumerate(items):
        try:
            yield _line(item, new_key)
        except (TypeError, ValueError) as error:
            raise BadRecord(f"Item {number} of the batch: {error}") from error


def _line(item: Outgoing | Sequence[Any], new_key: IdempotencyKeys) -> bytes:
    if not isinstance(item, (tuple, list)) or not 2 <= len(item) <= len(Outgoing._fields):
        raise TypeError(f"An item is a pair (topic, data) or an Outgoing, not {type_name(item)}.")
    outgoing = item if isinstance(item, Outgoing) else Outgoing(*item)
    check_names(outgoing.topic, outgoing.key, outgoing.idempotency_key)
    name = new_key() if outgoing.idempotency_key is None else outgoing.idempotency_key
    return publish_body(
        outgoing.topic, data_json(outgoing.data), key=outgoing.key, idempotency_key=name
    )


def is_transient(result: Published | Refusal) -> TypeGuard[Refusal]:
    """Say whether the same message can succeed later."""
    return isinstance(result, Refusal) and result.retryable


def _log_repeat(error: ClientError, wait_s: float) -> None:
    if isinstance(error, Refused):
        log.info("publish refused status=%d delay_s=%.2f", error.status, wait_s)
        return
    log.warning("publish interrupted delay_s=%.2f why=%s", wait_s, error)
