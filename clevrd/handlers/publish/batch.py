"""POST /publish/batch: many messages in one request, as NDJSON lines or as one JSON array.

Every item is judged and answered by itself, in order; one bad item does not hold back the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, Final

import msgspec

from clevrd.admission import Admitted, Gate
from clevrd.config import Config
from clevrd.core.json_faults import BEGINS_WITH_BOM, BOM, json_fault
from clevrd.core.message_headers import SPECVERSION, Headers, trace_of_head
from clevrd.core.near_names import TENANT_OPTION
from clevrd.core.publish_request import (
    EXPECTED_BODY,
    PublishRequest,
    decode_plain,
    decode_publish,
    with_head,
)
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError, InvalidRequest, MessageTooLarge
from clevrd.handlers.publish.endpoint import KEY_HEADER, check_body_head
from clevrd.handlers.publish.run import RunPublisher
from clevrd.http_values import Request, Response
from clevrd.hub import Hub, Published, Run, audience_of, with_warnings
from clevrd.refusals import Failure, failure_of
from clevrd.scheduling.due_answers import Due

# Items of a batch; their answers alone are a MiB then.
MAX_ITEMS: Final = 10_000

# Items that a share of a turn is given to choose from: more than it can take, at 3 us for each.
ITEMS_PER_SHARE: Final = 512

# Lines, blank ones included, and commas of an array: a body with more is not even split.
MAX_LINES: Final = 2 * MAX_ITEMS
MAX_ARRAY_COMMAS: Final = 65_536

# White space before the bracket of an array, at most.
_MAX_LEAD_BYTES: Final = 1_024

# So many results of one run are made together, in half of the time of each by itself.
_ALIKE: Final = 8
# The placeholder for the id in a result that is encoded once for many.
_BLANK: Final = "?"

# The place of the results in an answer that was encoded without them.
_NO_RESULTS: Final = b'"results":[]'

_NO_EVENT: Final = (
    "The ce-* headers of a batch are not carried, since they are one event's; put headers into each"
    " item."
)

_encode = msgspec.json.Encoder().encode
_array_decoder = msgspec.json.Decoder(list[msgspec.Raw])


class BatchAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to a batch: counts, and a result for each item, in the order of the items."""

    success: bool
    published: int
    refused: int
    results: list[Published | Failure]
    warnings: tuple[str, ...] = ()


class BatchEndpoint:
    """Answers a batch."""

    # Whether `_decode` does no more than `decode_plain`.
    _may_decode_several = True

    def __init__(self, gate: Gate, hub: Hub, config: Config) -> None:
        self._gate = gate
        self._hub = hub
        self._max_body_bytes = config.max_batch_bytes
        self._max_message_bytes = config.max_message_bytes

    @property
    def serves_while_draining(self) -> bool:
        """Whether what is published during a drain outlives it."""
        return self._hub.serves_publishers

    def admit(self, head: Request) -> Admitted:
        """Refuse by the head alone: a coded body, one declared too large, or no tenant's name."""
        if KEY_HEADER in head.headers:
            # Without a refusal the sender would believe that a repeat is known by this key.
            raise InvalidRequest(
                "A batch has no Idempotency-Key header; put an idempotency_key into each item."
            )
        check_body_head(head, self._max_body_bytes)
        admitted = self._gate.admit_tenant(head, self._max_body_bytes)
        admitted.headers = trace_of_head(head.headers)
        return admitted

    def answer(self, admitted: Admitted, body: bytes) -> Awaitable[Response]:
        """Return the work to await: a batch gives up the loop every few items."""
        warnings = TENANT_OPTION.warnings(admitted.options)
        if SPECVERSION in admitted.head.headers:
            warnings += (_NO_EVENT,)
        return self._publish_all(admitted, split_batch(body), warnings)

    async def _publish_all(
        self, admitted: Admitted, items: list[bytes], warnings: tuple[str, ...]
    ) -> Response:
        results = BatchResults(self._hub)
        await self._publish_into(results, admitted, items)
        return results.answer(warnings)

    async def _publish_into(
        self, results: BatchResults, admitted: Admitted, items: list[bytes]
    ) -> None:
        """Publish ``items``, and wait until ``results`` are of all of them."""
        trace = admitted.headers
        decode = self._decode if trace is None else partial(self._decode_traced, trace)
        several = decode_plain if trace is None and self._may_decode_several else None
        runs = RunPublisher(
            *(self._hub, admitted.tenant, decode, results, several, self._max_message_bytes)
        )
        turns = self._hub.turns
        taken = 0
        while taken < len(items):
            await turns.turn(has_begun=taken > 0)
            try:
                done, has_to_wait = runs.take(items[taken : taken + ITEMS_PER_SHARE])
            finally:
                turns.end()
            taken += done
            if has_to_wait:
                taken += await runs.wait_for(items[taken : taken + ITEMS_PER_SHARE])
        await results.wait_for_due()

    def _decode(self, item: bytes) -> PublishRequest:
        if len(item) > self._max_message_bytes:
            raise MessageTooLarge(self._max_message_bytes, len(item))
        return decode_publish(item)

    def _decode_traced(self, trace: Headers, item: bytes) -> PublishRequest:
        return with_head(self._decode(item), trace)


class BatchResults:
    """The results of a batch's items so far: the `Outcomes` of its `RunPublisher`."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        # JSON of some results each, made as they come: 10,000 at once would take 10 ms.
        self._parts: list[bytes] = []
        # Results that come later, each with its place in _parts.
        self._due: list[tuple[int, Due[bytes]]] = []
        self._count = 0
        self._refused = 0

    def run_published(
        self, topic: Topic, run: Sequence[PublishRequest], offset: int, ids: list[str]
    ) -> None:
        """Note a run that was published."""
        self._count += len(run)
        self._parts.append(_run_results(topic, run, (offset, ids)))

    def run_is_due(
        self, topic: Topic, run: Sequence[PublishRequest], known: asyncio.Future[Run]
    ) -> None:
        """Note a run of which the answers come later."""
        self._owe(len(run), known, partial(_run_results, topic, run))

    def published(self, request: PublishRequest, answer: Published) -> None:
        """Note an item that was published by itself, or before."""
        self._count += 1
        self._parts.append(_result(request, answer))

    def is_due(self, request: PublishRequest, known: asyncio.Future[Published]) -> None:
        """Note an item that was published by itself, and of which the answer comes later."""
        self._owe(1, known, partial(_result, request))

    def refused(self, error: ClevrdError, item: bytes) -> None:
        """Note an item that was refused."""
        self._count += 1
        self._parts.append(self._refusals(1, error))

    def _owe(self, count: int, known: asyncio.Future[Any], finish: Any) -> None:
        self._count += count
        due: Due[bytes] = Due(known, finish, failed=partial(self._refusals, count), count=count)
        self._due.append((len(self._parts), due))
        self._parts.append(b"")

    def _refusals(self, count: int, error: Exception) -> bytes:
        self._refused += count
        refused = self._hub.refusals.count(error, times=count)
        return _encode([failure_of(refused)] * count)[1:-1]

    async def wait_for_due(self) -> None:
        """Wait until it is known what became of every item; make their results in shares."""
        turns = self._hub.turns
        for place, due in self._due:
            await due.known()
            await turns.turn(has_begun=True)
            try:
                self._parts[place] = due.result()
            finally:
                turns.end()

    @property
    def refused_items(self) -> int:
        """How many items were refused."""
        return self._refused

    def answer(self, warnings: tuple[str, ...]) -> Response:
        """Return the answer to the whole batch; ``warnings`` are of its query."""
        published = self._count - self._refused
        whole = _encode(BatchAnswer(self._refused == 0, published, self._refused, [], warnings))
        results = b'"results":[%b]' % b",".join(self._parts)
        return Response(200, whole.replace(_NO_RESULTS, results, 1))


def _run_results(topic: Topic, run: Sequence[PublishRequest], published: Run) -> bytes:
    """Return the results of a run that was published, as JSON without brackets."""
    offset, ids = published
    audience = audience_of(topic)
    told = [(place, found) for place, each in enumerate(run) if (found := each.warnings())]
    if told or len(ids) < _ALIKE:
        answers = [
            Published(True, message_id, number, *audience)
            for number, message_id in enumerate(ids, offset)
        ]
        for place, warnings in told:
            answers[place] = with_warnings(answers[place], warnings)
        return _encode(answers)[1:-1]
    # They differ in id and offset alone, so what stands around these is encoded once.
    begin, _, rest = _encode(Published(True, _BLANK, -1, *audience)).decode().partition(_BLANK)
    middle, _, end = rest.partition("-1")
    between = f"{end},{begin}"
    offsets = _encode(list(range(offset, offset + len(ids))))[1:-1].decode().split(",")
    alike = zip(ids, repeat(middle), offsets, repeat(between))
    return (begin + "".join(chain.from_iterable(alike)).removesuffix(between) + end).encode()


def _result(request: PublishRequest, answer: Published) -> bytes:
    return _encode(with_warnings(answer, request.warnings()))


def split_batch(body: bytes) -> list[bytes]:
    """Return the items of ``body``: the elements of a JSON array, or else its non-blank lines.

    Raises:
        InvalidRequest: there is none, there are too many, or the array is no JSON.
    """
    if body.startswith(BOM) and body[len(BOM) : _MAX_LEAD_BYTES].lstrip().startswith(b"["):
        raise InvalidRequest(f"The batch {BEGINS_WITH_BOM}.")
    is_array = body[:_MAX_LEAD_BYTES].lstrip().startswith(b"[")
    items = _array_items(body) if is_array else _lines(body)
    if not items:
        raise InvalidRequest(f"The batch is empty; for each message {EXPECTED_BODY}.")
    if len(items) > MAX_ITEMS:
        raise InvalidRequest(f"The batch has {len(items)} items; {MAX_ITEMS} are allowed.")
    return items


def _array_items(body: bytes) -> list[bytes]:
    # An array is read in one go, at 0.15 us an element, and commas bound its elements.
    if body.count(b",") > MAX_ARRAY_COMMAS:
        raise InvalidRequest(
            f"The array has over {MAX_ARRAY_COMMAS} commas, too many to read at once;"
            " send the messages as lines (NDJSON), which have no such limit."
        )
    try:
        return [bytes(item) for item in _array_decoder.decode(body)]
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(
            f"The batch {json_fault(body, error)}; send an array or lines of JSON."
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("The batch is not valid UTF-8; send UTF-8.") from error


def _lines(body: bytes) -> list[bytes]:
    if body.count(b"\n") > MAX_LINES:
        raise InvalidRequest(f"The batch has over {MAX_LINES} lines; {MAX_ITEMS} are allowed.")
    return [line for line in body.split(b"\n") if line and not line.isspace()]
