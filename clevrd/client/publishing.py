"""Publishing over HTTP, one message or many, with retries until each is taken or refused."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Final, TypeGuard

from clevrd.client.arguments import check_items, publish_fields, type_name
from clevrd.client.errors import BadRecord, ClientError, Refused, Unreachable
from clevrd.client.retries import Retries
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

# Seconds that a message is tried again before publish() gives up; a planned restart takes 30 s.
RETRY_FOR_S: Final = 60.0
# Bytes of each result in a batch's answer at most: a sentence with a topic of 255 bytes.
_RESULT_BYTES: Final = 1024
_TOO_LARGE: Final = 413


class IdempotencyKeys:
    """Makes a key for each message, by which a server recognises a copy of it.

    A key is 96 random bits, drawn once, and a number: a tenth of the price of drawing each key.
    """

    __slots__ = ("_next", "_prefix")

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Draw new random bits, and count from 1 again."""
        self._prefix = secrets.token_urlsafe(12)
        self._next = count(1).__next__

    def __call__(self) -> str:
        """Return a key that was not used before."""
        return f"{self._prefix}-{self._next()}"


class Repeats:
    """Counts messages that were sent again although the server may have the first copy.

    A server that supports idempotency keys shows that in its answers, and keeps only one copy.
    """

    __slots__ = ("messages",)

    def __init__(self) -> None:
        self.messages = 0

    def settle(self, copies: int, result: Published | Refusal) -> None:
        """Count ``copies`` of a message that may have arrived before the answered one."""
        if isinstance(result, Published) and not result.knows_keys:
            self.messages += copies


class HttpPublisher:
    """Publishes by POST, with retries."""

    def __init__(self, session: Session, repeats: Repeats, retries: Retries) -> None:
        self._session = session
        self._repeats = repeats
        self._retries = retries

    async def publish(self, body: bytes) -> Published:
        """Try one publish until it is taken; raises as `Client.publish`."""
        copies = 0
        offers = self._retries.offers()
        while True:
            try:
                answer = read_published(await self._session.post("/publish", body))
            except (Refused, Unreachable) as error:
                await self._retries.pause(offers, error)
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
        """Publish ``items`` and return a result for each; raises as `Client.publish_batch`."""
        results: list[Published | Refusal] = []
        try:
            for batch in split_batch(lines_of(items, new_key), max_items, max_bytes):
                results += await self._publish_lines(batch)
        except ClientError as error:
            error.results = results + error.results
            raise
        return results

    async def _publish_lines(self, lines: Sequence[bytes]) -> list[Published | Refusal]:
        """Try ``lines`` until each is taken or refused for good, or time is up."""
        results: list[Published | Refusal] = []
        waiting = list(range(len(lines)))
        copies = 0
        offers = self._retries.offers()
        while waiting:
            try:
                answers = await self._post_lines([lines[index] for index in waiting])
            except (Refused, Unreachable) as error:
                # From the first answer on each item has a result, if only a refusal.
                error.results = results
                await self._retries.pause(offers, error)
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
                offers = self._retries.offers()
            waiting = list(refused)
            if waiting and not await self._retries.may_pause(
                offers, refused[waiting[0]].as_error()
            ):
                break
        return results

    async def _post_lines(self, lines: Sequence[bytes]) -> list[Published | Refusal]:
        """Post one batch; a batch that is too large for the server is posted in halves."""
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


def lines_of(
    items: Iterable[Outgoing | tuple[str, Any]], new_key: IdempotencyKeys
) -> Iterator[bytes]:
    """Yield one line of JSON for each item of a batch.

    Raises:
        TypeError: ``items`` can't be iterated over.
        BadRecord: an item is malformed, or can't be sent; the sentence says which.
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
    topic, data, key, idempotency_key, ttl_s, headers = (
        item if isinstance(item, Outgoing) else Outgoing(*item)
    )
    fields = publish_fields(topic, key, ttl_s, headers, idempotency_key)
    if idempotency_key is None:
        fields["idempotency_key"] = new_key()
    return publish_body(topic, data_json(data), fields)


def is_transient(result: Published | Refusal) -> TypeGuard[Refusal]:
    """Return whether ``result`` is a refusal that may pass."""
    return isinstance(result, Refusal) and result.retryable
