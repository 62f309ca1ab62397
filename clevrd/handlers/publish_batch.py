"""POST /publish/batch: many messages in one request, as NDJSON lines or as one JSON array.

Every item is judged and answered by itself, in order; one bad item does not hold back the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final

import msgspec

from clevrd.config import Config
from clevrd.core.message import EXPECTED_BODY, decode_publish
from clevrd.errors import ClevrdError, InvalidRequest, MessageTooLarge
from clevrd.exchange import Answer, Failure, Request, failure_of, json_answer
from clevrd.handlers.publish import check_body_head
from clevrd.hub import Hub, Published
from clevrd.tenants import Tenant, identify

# Items of a batch; their answers alone are a MiB then.
MAX_ITEMS: Final = 10_000

# Items appended before others get a turn: about 1.5 ms at 6 us for each.
ITEMS_PER_TURN: Final = 256

_array_decoder = msgspec.json.Decoder(list[msgspec.Raw])


class BatchAnswer(msgspec.Struct, frozen=True):
    """What a batch is answered: counts, and a result for each item, in the order of the items."""

    success: bool
    published: int
    refused: int
    results: list[Published | Failure]


class BatchEndpoint:
    """Answers a batch."""

    def __init__(self, hub: Hub, config: Config) -> None:
        self._hub = hub
        self.max_body_bytes = config.max_batch_bytes
        self._max_message_bytes = config.max_message_bytes

    def admit(self, request: Request) -> None:
        """Refuse by the head alone: draining, a coded body, or one declared too large."""
        self._hub.refuse_if_draining()
        check_body_head(request, self.max_body_bytes, "CLEVRD_MAX_BATCH_BYTES")

    def answer(self, request: Request, body: bytes) -> Awaitable[Answer]:
        """Return the work to await: a batch gives up the loop every few items."""
        tenant = identify(request, request.options())
        return self._publish_all(tenant, split_batch(body))

    async def _publish_all(self, tenant: Tenant, items: list[bytes]) -> Answer:
        results: list[Published | Failure] = []
        for start in range(0, len(items), ITEMS_PER_TURN):
            if start:
                await asyncio.sleep(0)
            for item in items[start : start + ITEMS_PER_TURN]:
                try:
                    results.append(await self._publish(tenant, item))
                except ClevrdError as error:
                    results.append(failure_of(error))
        refused = sum(type(result) is Failure for result in results)
        return json_answer(BatchAnswer(refused == 0, len(results) - refused, refused, results))

    async def _publish(self, tenant: Tenant, item: bytes) -> Published:
        """Publish one item; waits only where a publish of its own would have to wait."""
        if len(item) > self._max_message_bytes:
            raise MessageTooLarge(self._max_message_bytes)
        self._hub.check_rate(tenant)
        request = decode_publish(item)
        topic = self._hub.topic(tenant, request.topic)
        if self._hub.must_wait(topic):
            return await self._hub.publish_later(topic, request)
        return self._hub.publish(topic, request)


def split_batch(body: bytes) -> list[bytes]:
    """Return the items of ``body``: the elements of a JSON array, or else its non-blank lines.

    Raises:
        InvalidRequest: there is none, there are too many, or the array is no JSON.
    """
    text = body.strip()
    items = _array_items(text) if text.startswith(b"[") else _lines(text)
    if not items:
        raise InvalidRequest(f"The batch is empty; for each message {EXPECTED_BODY}.")
    if len(items) > MAX_ITEMS:
        raise InvalidRequest(f"The batch has {len(items)} items; {MAX_ITEMS} are allowed.")
    return items


def _array_items(text: bytes) -> list[bytes]:
    try:
        return [bytes(item) for item in _array_decoder.decode(text)]
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The batch is no JSON array ({error}).") from error
    except RecursionError as error:
        raise InvalidRequest("The batch is nested too deeply; flatten it.") from error


def _lines(text: bytes) -> list[bytes]:
    return [line for line in text.split(b"\n") if not line.isspace() and line]
