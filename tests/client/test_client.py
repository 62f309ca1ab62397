"""The client's decisions, and what it does with a server that does what each test tells it.

Real daemons, killed and cut, are test_client_e2e.py's.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from conftest import FakeClock
from fake_server import (
    Answer,
    FakePause,
    FakeServer,
    Feed,
    batch_answer,
    gap,
    message,
    refusal,
    subscribed,
)
from hypothesis import given
from hypothesis import strategies as st

from clevrd.client import (
    BadAnswer,
    BadRecord,
    BadUrl,
    Client,
    ClientError,
    Closed,
    Gap,
    Message,
    Misuse,
    Outgoing,
    Position,
    Published,
    Refusal,
    Refused,
    Unreachable,
)
from clevrd.client.address import parse_url
from clevrd.client.backoff import (
    BACKOFF_CAP_S,
    RECONNECT_AFTER_CAP_S,
    STEADY_S,
    Next,
    backoff_s,
    comes_back,
    delay_s,
    going_away_s,
    next_after,
)
from clevrd.client.one_topic import RESUME_LAST
from clevrd.client.position import Tracker
from clevrd.client.publishing import IdempotencyKeys
from clevrd.client.values import check_json
from clevrd.client.wire import (
    publish_body,
    read_message,
    read_notice,
    split_batch,
)


async def take(client: Client, count: int, **options: Any) -> list[Message | Gap]:
    """Return what a subscription to topic t yields, up to its message number ``count``."""
    taken: list[Message | Gap] = []
    async with client, client.subscribe("t", **options) as items:
        async for item in items:
            taken.append(item)
            count -= isinstance(item, Message)
            if not count:
                break
    return taken


def texts(items: list[Message | Gap]) -> list[bytes]:
    """Return the messages' JSON; a gap would not be among them."""
    return [item.json for item in items if isinstance(item, Message)]


# --- subscribe ---


@pytest.mark.parametrize("code", [0, 1001, 1012, 1013, 4101, 4103])
async def test_lost_subscription_resumes_without_repeats(
    code: int, server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """The reader sees each message once, and waits before it comes back."""
    server.feeds.append(Feed([message(1), message(2)], code))
    server.feeds.append(Feed([message(1), message(2), message(3)], code))
    server.feeds.append(Feed([message(n) for n in range(1, 6)]))

    options = {"headers": True, "subscriber_id": "ann", "policy": "latest", "buffer": 7}
    taken = await take(new_client(), 5, **options)

    assert texts(taken) == [message(n) for n in range(1, 6)]
    for request in server.requests:
        assert {name: request.query.get(name) for name in options} == {
            **{"headers": "true", "subscriber_id": "ann", "policy": "latest", "buffer": "7"}
        }
    assert [request.query.get("last") for request in server.requests] == [
        None,
        str(RESUME_LAST),
        str(RESUME_LAST),
    ]
    assert pause.slept_s == [0.125, 0.25]


@pytest.mark.parametrize(
    ("last", "resumed"), [(None, RESUME_LAST), (5, RESUME_LAST), (50_000, 50_000), (0, 0)]
)
async def test_reader_that_has_seen_nothing_resumes_unless_it_wanted_no_past(
    last: int | None, resumed: int, server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """An empty topic may have got messages meanwhile; who asked for last=0 has no place in it."""
    server.feeds.extend([Feed(code=0), Feed([message(9)])])

    await take(new_client(), 1, last=last)

    assert server.requests[1].query["last"] == str(resumed)


async def test_hole_is_told(server: FakeServer, new_client: Callable[..., Client]) -> None:
    """Messages that a server without positions no longer had are not missing silently."""
    server.feeds.append(Feed([message(1), message(2)], 0))
    server.feeds.append(Feed([message(7), message(8)]))

    taken = await take(new_client(), 4)

    assert taken[2] == Gap("t", 3, 6, 4, "unknown")
    assert texts(taken) == [message(n) for n in (1, 2, 7, 8)]


async def test_restarted_topic_is_told(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Offsets that begin again belong to a new topic; what the old one still had is unknown."""
    server.feeds.append(Feed([message(1), message(2)], 0))
    server.feeds.append(Feed([message(3, offset=1)]))

    taken = await take(new_client(), 3)

    assert taken[2] == Gap("t", reason="epoch")


async def test_whole_stream_has_no_gaps(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Catch-up that begins late, or messages without offsets, are no holes."""
    feed = [message(5), message(6), message(7, offset=0), message(8)]
    server.feeds.append(Feed(feed))

    taken = await take(new_client(), 4)

    assert texts(taken) == feed
    assert len(taken) == 4


async def test_positions_are_resumed_from(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """With control frames nothing is guessed: each return names the place behind what is had."""
    server.feeds.append(Feed([subscribed("e", 4)], 0, has_control=True))
    server.feeds.append(Feed([subscribed("e", 4), message(5)], 0, has_control=True))
    server.feeds.append(
        Feed([subscribed("e", 5), gap(6, 8, "retention")], 0, has_control=True),
    )
    server.feeds.append(Feed([subscribed("e", 8), message(9)], has_control=True))

    taken = await take(new_client(), 2, last=0)

    assert texts(taken) == [message(5), message(9)]
    queries = [dict(request.query) for request in server.requests]
    assert queries[0] == {"topic": "t", "last": "0"}
    assert queries[1:] == [
        {"topic": "t", "offset": offset, "epoch": "e"} for offset in ("4", "5", "8")
    ]


async def test_gaps_are_values_at_their_place(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A match statement tells them from messages; frames of a later version are passed over."""
    server.feeds.append(
        Feed(
            [
                *(subscribed("e", 0), gap(1, 3, "slow_consumer"), message(4)),
                *(b'{"type":"news","topic":5}', gap(None, None, "epoch"), message(5)),
            ],
            has_control=True,
        )
    )

    told: list[object] = []
    for item in await take(new_client(), 2):
        match item:
            case Message(offset=offset, epoch=epoch, data={"n": n}):
                told.append((offset, epoch, n))
            case Gap(first=None):
                told.append("unknown")
            case Gap(count=count, reason=reason):
                told.append((count, reason))

    assert told == [(3, "slow_consumer"), (4, "e", 4), "unknown", (5, "e", 5)]


async def test_new_epoch_in_the_middle_of_a_connection_moves_the_position(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """The topic's offsets begin again; its messages are handed out, and resumed from."""
    server.feeds.append(
        Feed(
            [
                *(subscribed("old", 40), message(41)),
                *(subscribed("new", 0, is_recovered=False), gap(None, None, "epoch"), message(1)),
            ],
            has_control=True,
        )
    )

    told: list[object] = []
    stored: list[Position | None] = []
    async with new_client() as client, client.subscribe("t") as items:
        async for item in items:
            told.append(item.reason if isinstance(item, Gap) else (item.epoch, item.offset))
            stored.append(items.position)
            if len(told) == 3:
                break

    assert told == [("old", 41), "epoch", ("new", 1)]
    assert stored == [Position("old", 41), Position("new", 0), Position("new", 1)]


async def test_position_covers_what_was_handed_out_and_no_more(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Who stores it after each item and comes back with it misses nothing, told gaps included."""
    away = Feed(
        [subscribed("new", 70, is_recovered=False), gap(None, None, "epoch"), message(71)],
        has_control=True,
    )
    server.feeds.extend([away, away])
    begun = Position.parse("old:41")

    stored: list[Position | None] = []
    async with new_client() as client:
        async with client.subscribe("t", position=begun) as items:
            stored.append(items.position)
            async for _ in items:
                stored.append(items.position)
                if len(stored) == 3:
                    break
        async with client.subscribe("t", position=stored[-1]):
            pass

    assert stored == [begun, Position("new", 70), Position("new", 71)]
    queries = [(request.query["epoch"], request.query["offset"]) for request in server.requests]
    assert queries == [("old", "41"), ("new", "71")]


async def test_gap_that_was_not_handed_out_is_asked_for_again(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A connection that is lost between its greeting and the gap has moved nothing."""
    cut_short = Feed([subscribed("new", 70, is_recovered=False)], 0, has_control=True)
    whole = [subscribed("new", 70, is_recovered=False), gap(None, None, "epoch"), message(71)]
    server.feeds.extend([cut_short, Feed(whole, has_control=True)])

    taken = await take(new_client(), 1, position=Position("old", 41))

    assert taken[0] == Gap("t", reason="epoch")
    assert server.requests[1].query["epoch"] == "old"


async def test_gap_of_a_return_is_asked_for_again_too(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Every connection after the first one resumes, and can be lost before its gap."""
    server.feeds.append(Feed([subscribed("old", 0), message(1)], 0, has_control=True))
    server.feeds.append(Feed([subscribed("new", 70, is_recovered=False)], 0, has_control=True))
    whole = [subscribed("new", 70, is_recovered=False), gap(None, None, "epoch"), message(71)]
    server.feeds.append(Feed(whole, has_control=True))

    taken = await take(new_client(), 2)

    assert taken[1] == Gap("t", reason="epoch")
    assert [request.query.get("epoch") for request in server.requests] == [None, "old", "old"]


async def test_message_that_comes_again_is_left_out(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Who resumes from a publish's answer can be sent that message once more."""
    server.feeds.append(
        Feed([subscribed("e", 4), message(4), message(5), message(5)], 0, has_control=True)
    )
    server.feeds.append(Feed([subscribed("e", 5), message(5), message(6)], has_control=True))

    taken = await take(new_client(), 2, position=Position("e", 4))

    assert texts(taken) == [message(5), message(6)]


async def test_position_is_known_once_connected(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A reader of a silent topic can store where it began."""
    server.feeds.append(Feed([subscribed("e", 4, is_recovered=False)], has_control=True))

    async with new_client() as client, client.subscribe("t", last=0) as items:
        position = items.position

    assert str(position) == "e:4"


async def test_wait_that_times_out_loses_nothing(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A consumer that does something else now and then goes on where it was."""
    held = asyncio.Event()
    server.feeds.append(Feed([subscribed("e", 0), message(1)], has_control=True, then=held))

    async with new_client() as client, client.subscribe("t") as items:
        first = await anext(items)
        waiting = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait((waiting,))
        held.set()
        second = await anext(items)

    assert waiting.cancelled()
    assert texts([first, second]) == [message(1), message(99)]
    assert len(server.requests) == 1


async def test_interrupted_backoff_goes_on_where_it_was(
    server: FakeServer, new_client: Callable[..., Client], clock: FakeClock
) -> None:
    """A consumer that waits with short timeouts comes back all the same, and not sooner."""
    slept_s: list[float] = []

    async def nap(seconds: float) -> None:
        slept_s.append(seconds)
        if len(slept_s) == 1:
            clock.advance(0.1)
            raise asyncio.CancelledError

    server.feeds.extend([Feed([message(1)], 0), Feed([message(2)])])

    async with new_client(sleep=nap) as client, client.subscribe("t") as items:
        await anext(items)
        with pytest.raises(asyncio.CancelledError):
            await anext(items)
        await anext(items)

    assert slept_s == pytest.approx([0.125, 0.025])


async def test_subscription_that_is_left_without_a_close_is_closed(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A break out of a plain `async for` leaves no connection behind, and no warning."""
    server.feeds.extend([Feed([message(1)]), Feed([message(1)])])

    async with new_client() as client:
        async for _ in client.subscribe("t"):
            break
        await asyncio.wait_for(server.left.wait(), 5)
        kept = client.subscribe("t")
        await anext(kept)
        waiting = asyncio.ensure_future(anext(kept, None))
        await asyncio.sleep(0)

    gc.collect()
    assert (await waiting, await anext(kept, None)) == (None, None)


async def test_closed_subscription_ends(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Who waits for the next item while another task closes is told that there is none."""
    server.feeds.append(Feed([message(1)]))

    async with new_client() as client:
        items = client.subscribe("t")
        first = await anext(items)
        waiting = asyncio.ensure_future(anext(items, None))
        await asyncio.sleep(0)
        await items.aclose()
        last = await waiting
        with pytest.raises(Misuse, match="has ended; subscribe again"):
            _ = [item async for item in items]

    assert texts([first]) == [message(1)]
    assert (last, await anext(items, None), items.is_connected) == (None, None, False)


async def test_server_that_goes_away_says_when_to_return(
    server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """The wait that was asked for, and the client's own jitter on it."""
    away = b'{"type":"going_away","reconnect_after_ms":1500,"positions":{}}'
    server.feeds.append(Feed([subscribed("e", 0), away], 1012, has_control=True))
    server.feeds.append(Feed([subscribed("e", 0), message(1)], has_control=True))

    await take(new_client(), 1)

    assert pause.slept_s == [1.625]


@pytest.mark.parametrize("code", [4000, 4001, 4004, 4099, 1009])
async def test_close_that_says_stay_away_is_final(
    code: int, server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """Coming back as we are would be refused again."""
    server.feeds.append(Feed([message(1)], code, b"bad_topic"))

    with pytest.raises(Closed, match=rf"closed with {code} \(bad_topic\)"):
        await take(new_client(), 2)

    assert pause.slept_s == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 426, 431])
async def test_refused_subscription_is_final_and_told_in_the_servers_words(
    status: int, server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """The handshake's refusal has a body, and that is what people need to read."""
    server.feeds.append(Feed(refusal=refusal(status, "No such policy.")))

    with pytest.raises(Refused, match="No such policy") as caught:
        await take(new_client(), 1)

    assert caught.value.status == status
    assert pause.slept_s == []


@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_busy_server_is_asked_again(
    status: int, server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """Not sooner than it asks, and also when it was busy the first time."""
    server.feeds.append(Feed(refusal=refusal(status, "Later.", Retry_After="2")))
    server.feeds.append(Feed([message(1)]))

    taken = await take(new_client(), 1)

    assert (texts(taken), pause.slept_s) == ([message(1)], [2.125])


async def test_server_said_to_return_at_once(
    server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """A move costs no wait, but a server that moves its readers in circles does."""
    server.feeds.extend([Feed([message(1)], 4201), Feed(code=4201), Feed([message(2)])])

    await take(new_client(), 2)

    assert pause.slept_s == [0.0, 0.25]


async def test_steady_connection_starts_the_backoff_anew(
    server: FakeServer, new_client: Callable[..., Client], clock: FakeClock, pause: FakePause
) -> None:
    """Three quick cuts raise the wait; one after a good while does not add to them."""
    server.feeds.extend([Feed([message(n)], 0) for n in range(1, 5)])
    server.feeds.append(Feed([message(5)]))
    client = new_client()

    async with client, client.subscribe("t") as items:
        async for item in items:
            if texts([item]) == [message(4)]:
                clock.advance(STEADY_S)
            if texts([item]) == [message(5)]:
                break

    assert pause.slept_s == [0.125, 0.25, 0.5, 0.125]


async def test_waiting_for_a_connection_is_no_steady_connection(
    server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """A server that lets every attempt wait is asked ever more rarely all the same."""
    server.feeds.extend([Feed(refusal=refusal(503, "Not yet."))] * 3)
    server.feeds.append(Feed([message(1)]))
    slow_clock = itertools.count(0, 2 * STEADY_S)

    await take(new_client(clock=lambda: next(slow_clock)), 1)

    assert pause.slept_s == [0.125, 0.25, 0.5]


async def test_server_that_goes_away_and_stays_is_asked_ever_more_rarely(
    server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """Waits double up to the cap, and there is no last attempt."""
    server.feeds.extend([Feed(refusal=refusal(503, "Not yet."))] * 10)
    server.feeds.append(Feed([message(1)]))

    await take(new_client(), 1)

    waits = [0.125, 0.25, 0.5, 1, 2, 4, 8, 15, 15, 15]
    assert pause.slept_s == waits


@pytest.mark.parametrize(
    "frame", [b"hello", b"[]", b'{"type":"x"}', b'{"id":5}', b'{"x":' + b"[" * 100_000]
)
async def test_frame_that_is_no_message_ends_the_subscription(
    frame: bytes, server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Another service's WebSocket is not printed as messages."""
    server.feeds.append(Feed([frame]))

    with pytest.raises(BadAnswer, match="not a message"):
        await take(new_client(), 1)


async def test_server_without_websocket_is_told_apart(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A web server that answers 200 to everything is not clevrd."""
    server.feeds.append(Feed(refusal=Answer(200, b"<html>")))

    with pytest.raises(BadAnswer, match="does not speak WebSocket"):
        await take(new_client(), 1)


# --- publish ---


class Order(msgspec.Struct):
    """What a user's own type looks like."""

    id: int


@dataclass
class Fill:
    """Another."""

    price: float


@pytest.mark.parametrize(
    ("data", "written"),
    [
        ({"n": 1, "é": [True, None]}, '{"n":1,"é":[true,null]}'),
        ("text", '"text"'),
        (Order(7), '{"id":7}'),
        (Fill(1.5), '{"price":1.5}'),
        (0, "0"),
    ],
)
async def test_python_values_are_published_as_json(
    data: Any, written: str, server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """What JSON can say needs no encoding by hand."""
    async with new_client() as client:
        answer = await client.publish("t", data)

    assert server.data == [written.encode()]
    assert answer == Published("msg-1", 1, "e")


async def test_bytes_are_not_taken_for_data(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """They would become base64; the error names the method that takes JSON."""
    async with new_client() as client:
        with pytest.raises(TypeError, match="publish_raw"):
            await client.publish("t", b'{"n":1}')
        await client.publish_raw("t", b'{ "n" : 1.10 }')

    assert server.data == [b'{ "n" : 1.10 }']


async def test_repeats_carry_the_key_of_the_first(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """One key for each message, drawn or given, and the same one however often it is sent."""
    server.answers.extend([Answer(200, b'{"message_id":"msg-0"}'), Answer(502), Answer(504)])

    async with new_client() as client:
        await client.publish("t", 1)
        await client.publish("t", 2)
        await client.publish("t", 3, idempotency_key="order-3", key="EUR")

    sent = [json.loads(body) for body in server.bodies]
    keys = [each["idempotency_key"] for each in sent]
    assert [each["data"] for each in sent] == [1, 2, 2, 2, 3]
    assert keys[1] == keys[2] == keys[3]
    assert len({keys[0], keys[1], "order-3"}) == 3
    assert (keys[4], sent[4]["key"]) == ("order-3", "EUR")


@pytest.mark.parametrize(
    ("fields", "count"),
    [({}, 1), ({"repeated": True}, 0), ({"lagging": 0}, 0)],
)
async def test_messages_that_may_be_there_twice_are_counted(
    fields: dict[str, Any], count: int, server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A server that heeds keys has one copy; one that does not say so may have two."""
    answer = Answer(200, json.dumps({"message_id": "msg-1", **fields}).encode())
    server.answers.extend([Answer(502), answer])

    async with new_client() as client:
        await client.publish("t", 1)
        repeated = client.repeated_messages

    assert repeated == count


def test_keys_are_never_the_same() -> None:
    """Neither within a client nor between two."""
    makers = [IdempotencyKeys(), IdempotencyKeys()]

    keys = [new_key() for new_key in makers for _ in range(100)]

    assert len(set(keys)) == 200


# --- publish: batches ---


async def test_batch_has_a_result_for_each_item_in_order(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A refusal is a value beside the others, in the server's words."""
    server.answers.append(batch_answer(["taken", "bad", "taken"]))

    async with new_client() as client:
        results = await client.publish_batch([("t", 1), ("t", 2), Outgoing("t", 3)])

    assert results == [Published("msg-1", 1), Refusal("bad", "x"), Published("msg-3", 3)]
    assert server.batches == [[b"1", b"2", b"3"]]


async def test_only_what_time_heals_is_offered_again(
    server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """What was taken, or refused for good, is not sent twice; keys stay with their items."""
    server.answers.extend(
        [
            batch_answer(["taken", "later", "bad", "later"]),
            refusal(503, "Restarting.", Retry_After="2"),
            batch_answer(["later", "taken"]),
        ]
    )

    async with new_client() as client:
        results = await client.publish_batch([("t", n) for n in range(4)])

    kinds = [type(result).__name__ for result in results]
    assert server.batches == [[b"0", b"1", b"2", b"3"], [b"1", b"3"], [b"1", b"3"], [b"1"]]
    assert kinds == ["Published", "Published", "Refusal", "Published"]
    assert len(set(server.keys)) == 4
    assert pause.slept_s == [0.125, 2.25, 0.125]


async def test_item_that_is_refused_for_too_long_is_given_up(
    server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """The others are taken, and its last refusal is its result."""
    server.answers.append(batch_answer(["taken", "later"]))
    server.answers.extend([batch_answer(["later"])] * 20)

    async with new_client(retry_for_s=20) as client:
        results = await client.publish_batch([("t", 1), ("t", 2)])

    assert results == [Published("msg-1", 1), Refusal("later", "x", True)]
    assert sum(pause.slept_s) <= 20


async def test_batch_that_fails_says_what_was_answered_before(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Who goes on later knows with which item."""
    server.answers.extend([batch_answer(["taken", "bad"]), refusal(403, "Not your topic.")])

    async with new_client() as client:
        with pytest.raises(Refused, match="Not your topic") as caught:
            await client.publish_batch([("t", n) for n in range(5)], max_items=2)

    assert caught.value.results == [Published("msg-1", 1), Refusal("bad", "x")]


async def test_batch_too_large_for_the_server_is_halved(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A server with a smaller limit gets smaller requests; a single item is refused."""
    too_large = refusal(413, "Too large.")
    server.answers.extend([too_large, too_large, too_large, batch_answer(["taken"])])

    async with new_client() as client:
        results = await client.publish_batch([("t", n) for n in range(4)])

    assert server.batches == [[b"0", b"1", b"2", b"3"], [b"0", b"1"], [b"0"], [b"1"], [b"2", b"3"]]
    assert [type(result) for result in results] == [Refusal, Published, Published, Published]


@pytest.mark.parametrize(
    "body", [b"{}", b'{"results":[]}', b'{"results":[{"success":true}]}', b"<html>"]
)
async def test_answer_that_is_no_batch_is_told_apart(
    body: bytes, server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Results for other items than were sent can't be told to anybody."""
    server.answers.append(Answer(200, body))

    async with new_client() as client:
        with pytest.raises(BadAnswer, match="not as clevrd does"):
            await client.publish_batch([("t", 1)])


async def test_empty_batch_asks_nobody(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """No items, no request, no results."""
    async with new_client() as client:
        results = await client.publish_batch([])

    assert (results, server.requests) == ([], [])


@given(st.lists(st.binary(max_size=9), max_size=30), st.integers(1, 5), st.integers(1, 20))
def test_batches_are_whole_and_within_their_bounds(
    lines: list[bytes], max_items: int, max_bytes: int
) -> None:
    """Nothing is lost, doubled or moved; over the bytes is only what stands alone."""
    batches = list(split_batch(iter(lines), max_items, max_bytes))

    assert [line for batch in batches for line in batch] == lines
    assert all(0 < len(batch) <= max_items for batch in batches)
    sizes = [sum(len(line) + 1 for line in batch) for batch in batches]
    assert all(
        size <= max_bytes or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True)
    )
    # As few as order allows: what begins a batch would not have fitted the one before.
    for size, batch, after in zip(sizes, batches, batches[1:], strict=False):
        assert len(batch) == max_items or size + len(after[0]) + 1 > max_bytes


# --- messages ---


def test_data_is_decoded_as_what_is_asked_for() -> None:
    """As Python values, as one's own type, or as the publisher's bytes."""
    received = b'{"id":"msg-1","topic":"t","tenant_id":"a","data":{"id": 10},"offset":1}'
    read = read_message(received, "e")

    assert read.data == {"id": 10}
    assert read.data is read.data
    assert read.decode(dict[str, int]) == {"id": 10}
    assert read.decode(Order) == Order(10)
    assert read.raw == b'{"id": 10}'
    assert (read.json, read.epoch, read.key) == (received, "e", None)
    with pytest.raises(msgspec.ValidationError):
        read.decode(list[int])


def test_message_is_a_value() -> None:
    """It prints as the JSON it is, and can be put into a set."""
    read, again = read_message(message(1), "e"), read_message(message(1), "e")

    assert str(read) == message(1).decode()
    assert repr(read) == (
        "Message(topic='', offset=1, id='msg-20260131-120000.000001', data={\"n\":1})"
    )
    assert len({read, again}) == 1


# --- the client's decisions ---


@pytest.mark.parametrize(
    ("code", "after"),
    [
        *[(code, Next.BACK_OFF) for code in (1000, 1001, 1006, 1011, 1012, 1013, 3999)],
        *[(code, Next.STAY_AWAY) for code in (1009, 4000, 4001, 4003, 4004, 4099)],
        *[(code, Next.BACK_OFF) for code in (4100, 4101, 4103, 4199)],
        *[(code, Next.AT_ONCE) for code in (4102, 4200, 4201, 4299)],
        *[(code, Next.BACK_OFF) for code in (4300, 4999)],
    ],
)
def test_close_codes_say_what_is_next(code: int, after: Next) -> None:
    """The table of docs/wire.md; what it does not name is come back from with backoff."""
    assert next_after(code) is after


def test_moving_on_at_once_is_obeyed_once() -> None:
    """A server that moves its readers in circles is backed off from."""
    moved = Closed(4201, "moved")

    assert [delay_s(attempt, moved, 0.5) for attempt in range(3)] == [0.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("asked_ms", "waited_s"), [(740, 0.74), (0, 0), (-5, 0), (10**9, RECONNECT_AFTER_CAP_S)]
)
def test_wait_that_is_asked_for_is_kept_within_reason(asked_ms: int, waited_s: float) -> None:
    """A server's mistake does not keep its readers away for days."""
    assert going_away_s(asked_ms) == waited_s


@pytest.mark.parametrize("attempt", [0, 1, 5, 100, 10**9])
def test_backoff_is_random_between_nothing_and_its_cap(attempt: int) -> None:
    """Full jitter: readers cut together spread over the whole delay."""
    longest = min(BACKOFF_CAP_S, 0.25 * 2 ** min(attempt, 20))

    assert [backoff_s(attempt, chance) for chance in (0.0, 0.5, 1.0)] == [
        0.0,
        longest / 2,
        longest,
    ]


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (Unreachable("x", may_have_arrived=False), True),
        (Refused("x", status=429, is_transient=True), True),
        (Refused("x", status=500, is_transient=False), True),
        (Refused("x", status=408, is_transient=True), False),
        (Refused("x", is_transient=True), True),
        (Refused("x", is_transient=False), False),
        (Closed(1006, ""), True),
        (Closed(3999, ""), True),
        (Closed(4000, ""), False),
        (Closed(4099, ""), False),
        (Closed(4100, ""), True),
        (Closed(1009, ""), False),
        (BadAnswer("x"), False),
    ],
)
def test_who_comes_back_is_decided_by_code(error: ClientError, answer: bool) -> None:
    """4000 to 4099 and 4xx but 429 are final; what time heals is not."""
    assert comes_back(error) is answer


def test_ids_tell_new_from_seen() -> None:
    """Without positions a message counts when its id is beyond the last one."""
    tracker = Tracker("t")
    seen = []

    for number in (3, 3, 4, 2, 8):
        received = read_message(message(number), "")
        if tracker.is_new(received):
            seen.append((number, tracker.step(received)))

    assert seen == [(3, None), (4, None), (8, Gap("t", 5, 7, 3, "unknown"))]


@pytest.mark.parametrize("text", ["e:41", " e:41\n", "a:b:41"])
def test_position_survives_being_stored(text: str) -> None:
    """Its text reads back as the same position."""
    position = Position.parse(text)

    assert (position.offset, str(position)) == (41, text.strip())


@pytest.mark.parametrize("text", ["", "41", ":41", "e:", "e:-1", "e:x", "e:²"])
def test_text_that_is_no_position_is_refused(text: str) -> None:
    """A damaged file is told, not resumed from."""
    with pytest.raises(ValueError, match="it is like f7502dc3:41"):
        Position.parse(text)


@pytest.mark.parametrize(
    "kind", ["subscribed", "watching", "forgotten", "gap", "going_away", "error"]
)
def test_known_control_frame_that_is_broken_is_not_passed_over(kind: str) -> None:
    """Only frames of later versions are."""
    rest = '"topic":5,"pattern":5,"reconnect_after_ms":"x","error":5}'

    assert read_notice(f'{{"type":"later",{rest}'.encode()) is None
    with pytest.raises(msgspec.ValidationError):
        read_notice(f'{{"type":"{kind}",{rest}'.encode())


@pytest.mark.parametrize("data", [b"", b"1 2", b'1,"topic":"x"', b'"\xff"', b"nul", b"{'a':1}"])
def test_body_takes_one_whole_value_only(data: bytes) -> None:
    """Half a value could smuggle a second field into the request."""
    with pytest.raises(BadRecord):
        check_json(data)


def test_body_holds_topic_as_json_and_data_as_it_is() -> None:
    """A topic with quotes can't break out, and the data is not touched."""
    body = publish_body('a"b\\', b'{ "n" : 1.10 }', {"ref": 7})

    assert body == b'{"topic":"a\\"b\\\\","data":{ "n" : 1.10 },"ref":7}'


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "localhost",
            ":8080",
            "ftp://x",
            "http://",
            "http://:80",
            "http://a:b",
            "http://a:99999",
        ),
        *("http://a b", "http://a/?x=1", "http://a/#x", "http://[::1", "unix:relative", "unix:"),
        *("a:8080?x=1", "http://a\n", "localhost:port", "ws://"),
    ],
)
def test_url_that_names_no_server_is_refused(url: str) -> None:
    """A mistyped URL is told before anything is sent."""
    with pytest.raises(BadUrl):
        Client(url)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("localhost:8080/", "http://localhost:8080"),
        ("[::1]:8080", "http://[::1]:8080"),
        ("ws://a:1", "http://a:1"),
        ("wss://a/events/", "https://a/events"),
        ("WSS://a", "https://a"),
        ("https://a", "https://a"),
    ],
)
def test_url_may_be_a_websockets_or_a_host_and_port(text: str, url: str) -> None:
    """What people type and copy names the server all the same."""
    assert parse_url(text) == (url, None)


async def test_tls_to_a_plain_port_is_named(server: FakeServer) -> None:
    """The reason is the wrong scheme, not what OpenSSL's error number means to the system."""
    async with Client(server.url.replace("http:", "https:")) as client:
        with pytest.raises(Unreachable, match="does not speak TLS there") as caught:
            await client.publish("t", 1)

    assert not caught.value.may_have_arrived


async def test_unix_socket_is_spoken_to(tmp_path: Path) -> None:
    """A daemon that listens on a Unix socket is reached by its path."""
    fake = FakeServer()
    app = web.Application()
    app.router.add_post("/publish", fake.publish)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "s")).start()

    async with Client(f"unix:{tmp_path}/s") as client:
        answer = await client.publish("t", 1)
    await runner.cleanup()

    assert (answer.message_id, fake.data) == ("msg-1", [b"1"])


async def test_client_outside_its_block_says_so() -> None:
    """The mistake is named, not an attribute of None."""
    with pytest.raises(Misuse, match="not open; use it in 'async with', or await open"):
        await Client("http://127.0.0.1:1").publish("t", 1)
