"""POST /publish/batch: every item judged and answered by itself, in order."""

from __future__ import annotations

import asyncio
import json
import math
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from clients import subscribe
from daemons import Daemon, running, until
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.publish_request import PublishRequest, decode_plain, decode_publish
from clevrd.errors import InvalidRequest, MessageTooLarge
from clevrd.handlers.publish import traced
from clevrd.handlers.publish.batch import (
    ITEMS_PER_SHARE,
    MAX_ITEMS,
    BatchEndpoint,
    _run_results,
    split_batch,
)
from clevrd.handlers.publish.run import RunPublisher
from clevrd.hub import Published
from clevrd.tenants import Tenant


async def send(daemon: Daemon, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    """Post a batch; return status and answer."""
    url = f"{daemon.url}/publish/batch"
    async with daemon.http.post(url, data=body, headers=headers) as response:
        return response.status, await response.json()


def lines(count: int) -> bytes:
    """Return ``count`` publishes into one topic, as NDJSON."""
    return b"\n".join(b'{"topic":"t","data":%d}' % number for number in range(count))


async def test_lines_and_array_mean_the_same() -> None:
    """Both forms answer one result per item, in the order of the items."""
    array = b'[{"topic":"a","data":1}, {"topic":"b","data":[2]}]'
    ndjson = b'{"topic":"a","data":1}\r\n\n{"topic":"b","data":[2]}\n'
    async with running() as daemon:
        for round_, body in enumerate((array, ndjson), start=1):
            status, answer = await send(daemon, body)

            assert status == 200
            assert (answer["success"], answer["published"], answer["refused"]) == (True, 2, 0)
            assert [result["offset"] for result in answer["results"]] == [round_, round_]


async def test_bad_item_is_refused_by_itself() -> None:
    """Its neighbours are published, and the result in its place says what is wrong."""
    body = b'{"topic":"t","data":1}\n{"topic":"t"}\nnonsense\n{"topic":"t","data":"\xff"}\n' + (
        b'{"topic":"t","data":2}'
    )
    async with running() as daemon:
        status, answer = await send(daemon, body)

    assert status == 200
    assert (answer["success"], answer["published"], answer["refused"]) == (False, 2, 3)
    assert [result.get("code") for result in answer["results"]] == [
        None,
        "invalid_request",
        "invalid_request",
        "invalid_request",
        None,
    ]


async def test_byte_order_mark_is_named() -> None:
    """Before an array it spoils all of it, before lines the first, and so at a line within."""
    mark = b"\xef\xbb\xbf"
    async with running() as daemon:
        status, whole = await send(daemon, mark + b' [{"topic":"t","data":1},\n{"topic":"t"}]')
        _, first = await send(daemon, mark + lines(3))
        _, second = await send(daemon, lines(1) + b"\n" + mark + lines(1))

    assert status == 400
    assert "byte order mark" in whole["error"]
    for answer, at, published in ((first, 0, 2), (second, 1, 1)):
        assert answer["published"] == published
        assert "byte order mark" in answer["results"][at]["error"]


async def test_batch_is_delivered_byte_for_byte_in_order() -> None:
    """More items than a share of a turn is given, to a reader that was there before."""
    # The reader may come to read only when all are published: it may lose some of more than its
    # window of 1,000.
    count = ITEMS_PER_SHARE + 400
    async with running() as daemon, subscribe(daemon.ws_url, "t") as reader:
        _, answer = await send(daemon, lines(count))
        seen = [json.loads(await reader.recv()) for _ in range(count)]

    assert answer["published"] == count
    assert [message["data"] for message in seen] == list(range(count))
    assert [message["id"] for message in seen] == [r["message_id"] for r in answer["results"]]


async def test_large_batch_gives_others_their_turn() -> None:
    """The loop watch of these tests fails on a long hold; others have turns in the middle."""
    published: list[int] = []
    async with running() as daemon:
        batch = asyncio.create_task(send(daemon, lines(MAX_ITEMS)))
        while not batch.done():
            await asyncio.sleep(0)
            topic = daemon.hub.topics.find("default-tenant", "t")
            published.append(topic.ring.head if topic else 0)
        _, answer = await batch

    assert any(0 < each < MAX_ITEMS for each in published)
    assert answer["published"] == MAX_ITEMS


async def test_rate_limit_applies_to_items() -> None:
    """What the budget allows is published, the rest is refused one by one."""
    async with running(publish_rate=0.001, publish_burst=3) as daemon:
        _, answer = await send(daemon, lines(5))

    assert (answer["published"], answer["refused"]) == (3, 2)
    assert {result["code"] for result in answer["results"][3:]} == {"rate_limited"}


async def test_item_over_the_message_limit_is_refused_by_itself() -> None:
    """A batch is no way around the limit on a message."""
    large = b'{"topic":"t","data":"' + b"x" * 2_000 + b'"}'
    async with running(max_message_bytes=1_024) as daemon:
        _, answer = await send(daemon, large + b"\n" + lines(1))

    assert [result.get("code") for result in answer["results"]] == ["message_too_large", None]


async def test_whole_batch_has_a_limit_of_its_own() -> None:
    """413 names the setting that raises it."""
    async with running(max_batch_bytes=4_096) as daemon:
        status, answer = await send(daemon, b" " * 5_000)

    assert (status, answer["code"]) == (413, "message_too_large")
    assert "CLEVRD_MAX_BATCH_BYTES" in answer["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \n ",
        b"[]",
        b"[1,",
        b"[" * 100_000,
        b"[{}]x",
        lines(MAX_ITEMS + 1),
        b"[" + b"1," * 4_000_000 + b"1]",
        b"\n" * 8_000_000,
    ],
    ids=["empty", "blank", "no items", "cut", "deep", "trailing", "too many", "commas", "lines"],
)
def test_body_that_is_no_batch_is_refused_whole(body: bytes) -> None:
    """There is nothing to answer item by item."""
    with pytest.raises(InvalidRequest):
        split_batch(body)


async def test_batch_that_is_under_way_outlives_the_beginning_of_a_stop() -> None:
    """It was admitted, so every item of it is published."""
    async with running() as daemon:
        batch = asyncio.create_task(send(daemon, lines(4 * ITEMS_PER_SHARE)))
        await until(lambda: daemon.hub.topics.find("default-tenant", "t") is not None)
        await daemon.server.stop()
        _, answer = await batch

    assert answer["published"] == 4 * ITEMS_PER_SHARE


async def test_throttled_batch_waits_between_items() -> None:
    """A batch is no way around the throttle: each item waits 10 ms (less the clock's grain)."""
    async with running(throttle_scope="global") as daemon:
        loop = asyncio.get_running_loop()
        daemon.hub.throttler._until_s = loop.time() + 60
        started_s = loop.time()

        _, answer = await send(daemon, lines(20))

        assert answer["published"] == 20
        assert loop.time() - started_s >= 19 * 0.010


# --- several items at once ------------------------------------------------------------------------

ITEM_KINDS = [
    b'{"topic":"a","data":1}',
    b'{"topic":"b","data":1}',
    b'{"topic":"a","data":2,"key":"k"}',
    b'{"topic":"a","data":3,"idempotency_key":"%d"}',
    b'{"topic":"a","data":4,"colour":1}',
    b'{"topic":"a","data":"' + b"x" * 1_100 + b'"}',
    b'{"topic":"a","data":null}',
    b'{"topic":"a","data":[1',
    b",2]}",
    b'{"topic":"a","data":1}{"topic":"a","data":2}',
]


class Recorded:
    """A hub and `Outcomes` in one, which note what a RunPublisher does."""

    max_run = 40
    most = math.inf

    def __init__(self) -> None:
        self.turns = SimpleNamespace(is_spent=lambda: False)
        self.done: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def note(*arguments: Any) -> Any:
            if name == "publish_run":
                self.done.append([bytes(each.data) for each in arguments[1]])
                return 1, []
            if name == "refused":
                self.done.append((str(arguments[0]), arguments[1]))
            elif name == "publish_once":
                self.done.append((arguments[1], arguments[2]))
                return Published(True, "id", 1, "e", 0, 0, 0)
            elif name == "most_now":
                return self.most
            return None

        return note


@given(
    st.lists(st.tuples(st.sampled_from(ITEM_KINDS), st.integers(1, 30)), max_size=12),
    st.sampled_from([1_000, 100_000]),
    st.sampled_from([3, math.inf]),
)
def test_several_items_at_once_make_the_runs_that_each_by_itself_does(
    kinds: list[tuple[bytes, int]], max_bytes: int, most: float
) -> None:
    """And the same refusals, at the same places."""
    items = [kind for kind, count in kinds for _ in range(count)]

    def decode(item: bytes) -> PublishRequest:
        if len(item) > max_bytes:
            raise MessageTooLarge(max_bytes, len(item))
        return decode_publish(item)

    done = []
    for several in (None, decode_plain):
        recorded: Any = Recorded()
        recorded.most = most
        runs = RunPublisher(recorded, Tenant("t"), decode, recorded, several, max_bytes)
        assert runs.take(items) == (len(items), False)
        done.append(recorded.done)

    assert done[0] == done[1]


@pytest.mark.parametrize("count", [1, 7, 8, 300])
def test_results_of_a_run_are_those_of_each(count: int) -> None:
    """Byte for byte, however many are made together."""
    topic = SimpleNamespace(
        epoch="0123456789ab", live=[1], lagging=[], suspended=[], slow=0, journal=None
    )
    ids = [f"msg-20260131-120000.{number:06d}" for number in range(count)]
    run = [PublishRequest("t", msgspec.Raw(b"1"))] * count

    found = _run_results(topic, run, (9_998, ids))  # type: ignore[arg-type]

    each = [
        Published(True, message_id, 9_998 + place, "0123456789ab", 1, 0, 0)
        for place, message_id in enumerate(ids)
    ]
    assert b"[%b]" % found == msgspec.json.encode(each)


def test_endpoint_that_adds_something_to_each_item_decodes_them_singly() -> None:
    """A span, as where batches are traced: several at once would be without it."""
    kinds = [each for each in BatchEndpoint.__subclasses__() if "_decode" in vars(each)]

    assert [each.__module__ for each in kinds] == [traced.__name__]
    assert not any(each._may_decode_several for each in kinds)
