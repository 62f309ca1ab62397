"""What the client asks of topics, with real daemons: their past page by page, their readers, which
there are, and to clear them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web
from daemons import Daemon, running, until
from fake_server import cut, serving

from clevrd.client import (
    BadAnswer,
    Client,
    Gap,
    History,
    Message,
    Misuse,
    Outgoing,
    Position,
    Refused,
    Unreachable,
)
from clevrd.client import topics as topics_module
from clevrd.client.history import Walk
from clevrd.client.topics import MAX_LIMIT
from clevrd.testing.faults import cut_readers

URL = "http://127.0.0.1:1"
# A little more than two pages.
COUNT = 2 * MAX_LIMIT + 3
ODD_NAMES = ["a/b", "a%2Fb", "ä b", "a+b", "?a=1#b", "a;b&c", "%", "a..", "...", "\U0001f600", "\\"]


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """Return a running daemon."""
    async with running() as started:
        yield started


@pytest.fixture
async def client(daemon: Daemon) -> AsyncIterator[Client]:
    """Return an open client of it."""
    async with Client(daemon.url, random=lambda: 0.0) as opened:
        yield opened


async def fill(client: Client, count: int = COUNT, topic: str = "t") -> Position:
    """Publish the numbers from 1 on, and return the position behind the last one."""
    results: list[Any] = await client.publish_batch([(topic, 1 + at) for at in range(count)])
    return Position(results[-1].epoch, results[-1].offset)


async def all_of(items: History) -> list[Any]:
    """Return the data of messages, and the gaps."""
    return [item if isinstance(item, Gap) else item.data async for item in items]


# --- messages ---


async def test_history_is_whole_in_order_and_has_its_positions(client: Client) -> None:
    """Over several pages, with what each message has; and a subscription goes on behind it."""
    end = await fill(client)
    items = client.history("t")
    before = items.position

    seen = [(item, items.position) async for item in items]
    async with client.subscribe("t", position=items.position) as following:
        await client.publish("t", "next", key="k", ttl_s=60)
        following_item = await anext(following)
    (last,) = [item async for item in client.history("t", last=1)]

    assert before is None
    assert [item.data for item, _ in seen if isinstance(item, Message)] == list(range(1, COUNT + 1))
    assert [position for _, position in seen] == [
        Position(end.epoch, 1 + at) for at in range(COUNT)
    ]
    assert items.position == end
    assert isinstance(following_item, Message)
    assert isinstance(last, Message)
    assert last == following_item
    assert (last.epoch, last.key, last.ttl_s, last.data) == (end.epoch, "k", 60, "next")


async def test_history_begins_and_ends_where_it_is_told(client: Client) -> None:
    """By a count, a time, a position or its text; a limit counts messages over all pages."""
    end = await fill(client)
    numbers = list(range(1, COUNT + 1))

    assert await all_of(client.history("t", last=3)) == numbers[-3:]
    assert await all_of(client.history("t", last=MAX_LIMIT + 1)) == numbers[-MAX_LIMIT - 1 :]
    assert await all_of(client.history("t", since="all")) == numbers
    # The topic is younger than an hour, which is told as a gap.
    assert (await all_of(client.history("t", since=timedelta(hours=1))))[1:] == numbers
    assert await all_of(client.history("t", position=f"{end.epoch}:{COUNT - 2}")) == numbers[-2:]
    assert await all_of(client.history("t", limit=MAX_LIMIT + 1)) == numbers[: MAX_LIMIT + 1]
    assert await all_of(client.history("t", last=5, limit=2)) == numbers[-5:-3]
    for nothing in (client.history("t", last=0), client.history("t", position=end)):
        assert await all_of(nothing) == []
        assert nothing.position == end


async def test_history_ends_at_what_was_the_newest_when_it_began(client: Client) -> None:
    """In its page: a topic that grows faster than it is read would have no end."""
    await fill(client)
    seen = 0

    async for item in client.history("t"):
        assert isinstance(item, Message)
        if seen in (0, MAX_LIMIT):
            await fill(client, 3 * MAX_LIMIT)
        seen += 1

    assert COUNT <= seen < COUNT + MAX_LIMIT


async def test_what_is_missing_is_a_gap_at_its_place() -> None:
    """What memory has given up, and what has expired; the position covers it."""
    async with running(ring_messages=1000) as daemon, Client(daemon.url) as client:
        await fill(client, 1500)
        await client.publish("t", "short", ttl_s=0.001)
        await client.publish("t", "long", ttl_s=100_000_000)
        loop = asyncio.get_running_loop()
        later_s = loop.time() + 0.01
        await until(lambda: loop.time() > later_s)
        items = client.history("t")

        first = await anext(items)
        position = items.position
        rest = await all_of(items)

    assert first == Gap("t", 1, 502, 502, "retention")
    assert position is not None
    assert position.offset == 502
    assert rest == [*range(503, 1501), Gap("t", 1501, 1501, 1, "expired"), "long"]


async def test_clear_in_the_middle_is_told_and_its_new_epoch_read(client: Client) -> None:
    """What was read of the old one stays, and nothing more of it comes."""
    await fill(client)
    items = client.history("t")
    before = [await anext(items) for _ in range(MAX_LIMIT)]

    cleared = await client.clear("t")
    again = [item.data async for item in client.history("t") if isinstance(item, Message)]
    await client.publish_batch([("t", "a"), ("t", "b")])
    gap = await anext(items)
    position = items.position
    rest = await all_of(items)

    assert len(before) == MAX_LIMIT
    assert again == []
    assert (gap, rest) == (Gap("t", reason="epoch"), ["a", "b"])
    assert position == cleared
    assert items.position == Position(cleared.epoch, 2)


async def test_history_of_no_topic_is_refused_in_the_servers_words(client: Client) -> None:
    """So are one topic, and clearing it."""
    for asking in (anext(client.history("t")), client.topic("t"), client.clear("t")):
        with pytest.raises(Refused, match="There is no such topic") as caught:
            await asking
        assert (caught.value.status, caught.value.code) == (404, "not_found")


async def test_two_tasks_do_not_share_a_history(client: Client) -> None:
    """Each would have half of it; one that is cancelled loses nothing."""
    await fill(client, 3)
    items = client.history("t")
    waiting = asyncio.ensure_future(anext(items))
    await asyncio.sleep(0)

    with pytest.raises(Misuse, match="Two tasks read one history"):
        await anext(items)
    waiting.cancel()
    await asyncio.wait((waiting,))

    assert await all_of(items) == [1, 2, 3]


@pytest.mark.parametrize(
    ("topic", "options", "error", "words"),
    [
        (5, {}, TypeError, "The topic is text, not an int"),
        (["t"], {}, TypeError, "The topic is text, not a list"),
        ("", {}, ValueError, "The topic is empty"),
        ("x" * 256, {}, ValueError, "256 bytes; 255 are allowed"),
        ("\ud800", {}, ValueError, "lone surrogate"),
        (".", {}, ValueError, r"A topic named '\.' can be no part of a URL; subscribe to it"),
        ("..", {}, ValueError, "can be no part of a URL"),
        ("t", {"last": -1}, ValueError, "last is 0 or more, not -1"),
        ("t", {"last": "5"}, TypeError, "last is a whole number, not a str"),
        ("t", {"since": 5}, TypeError, "since is text such as"),
        ("t", {"since": ""}, ValueError, "since is empty"),
        ("t", {"position": "e"}, ValueError, "'e' is no position; it is like"),
        ("t", {"position": "e:1", "last": 1}, ValueError, "each say where to begin; give one"),
        ("t", {"since": "all", "last": 1}, ValueError, "each say where to begin; give one"),
        ("t", {"limit": 0}, ValueError, "limit is 1 or more, not 0"),
        ("t", {"limit": True}, TypeError, "limit is a whole number, not a bool"),
        ("t", {"headers": {"a": "b"}}, TypeError, "headers is True or False, not a dict"),
    ],
)
def test_history_that_can_not_be_is_refused_when_it_is_made(
    topic: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """Not in the loop that reads it."""
    with pytest.raises(error, match=words):
        Client(URL).history(topic, **options)


# --- failures ---

HEAD = {"topic": "t", "epoch": "e", "offset": 1}
PAGE = {"messages": [{"id": "m", "data": 7, "offset": 1}], "epoch": "e", "offset": 1}


async def test_question_is_asked_again_while_its_failure_may_pass() -> None:
    """A busy server and a lost answer are waited out; a refusal that stays is told."""
    asked: list[str] = []
    # A GET that is cut is sent once more by aiohttp itself.
    answers: list[Any] = [HEAD, 503, None, None, PAGE, HEAD, 403]

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.path_qs)
        given = answers.pop(0)
        if given is None:
            cut(request)
        if isinstance(given, int):
            return web.json_response({"error": "No.", "code": "x"}, status=given)
        return web.json_response({**(given or {}), "more": [1]})

    async with serving(answer) as url, Client(url, random=lambda: 0.0) as client:
        seen = await all_of(client.history("t"))
        with pytest.raises(Refused, match="No"):
            await all_of(client.history("t", last=1))

    assert (seen, answers) == ([7], [])
    assert asked == [
        "/topics/t?limit=1",
        *["/topics/t/messages?since=all&limit=1000"] * 4,
        "/topics/t?limit=1",
        "/topics/t/messages?last=1&limit=1000",
    ]


async def test_clear_without_an_answer_is_not_sent_again() -> None:
    """The second one would clear what was published after the first."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.method)
        cut(request)
        return web.Response()

    async with serving(answer) as url, Client(url) as client:
        with pytest.raises(Unreachable) as caught:
            await client.clear("t")

    assert caught.value.may_have_arrived
    assert asked == ["DELETE"]


@pytest.mark.parametrize(
    "page",
    [
        {"messages": [7], "epoch": "e", "offset": 1},
        {"messages": [], "epoch": "e"},
        {"messages": [], "epoch": "e", "offset": 1, "gap": {"type": "gap", "topic": 5}},
        {"messages": {}, "epoch": "e", "offset": 1},
    ],
)
async def test_page_that_is_not_ours_is_named(page: dict[str, Any]) -> None:
    """The likely mistake is the URL."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(page if request.path.endswith("/messages") else HEAD)

    async with serving(answer) as url, Client(url) as client:
        with pytest.raises(BadAnswer, match="answered 200, but not as clevrd does"):
            await all_of(client.history("t"))


# --- topics ---


async def test_topics_are_listed_by_name_over_all_pages(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its newest position."""
    monkeypatch.setattr(topics_module, "MAX_LIMIT", 4)
    await client.publish_batch([(name, 1) for name in ODD_NAMES])
    await client.publish("a/b", 2)

    listed = [each async for each in client.topics()]

    assert [each.topic for each in listed] == sorted(ODD_NAMES)
    offsets = {each.topic: each.offset for each in listed}
    assert offsets == {**dict.fromkeys(ODD_NAMES, 1), "a/b": 2}
    assert {each.subscribers for each in listed} == {0}


async def test_any_name_is_a_topic_of_its_own(client: Client) -> None:
    """Whatever a URL makes of its characters."""
    await client.publish_batch([(name, name) for name in ODD_NAMES])

    for name in ODD_NAMES:
        info = await client.topic(name)
        (message,) = [item async for item in client.history(name)]
        cleared = await client.clear(name)

        assert isinstance(message, Message)
        assert (info.topic, message.topic, message.data) == (name, name, name)
        assert cleared.epoch != info.epoch == message.epoch


async def test_reader_is_known_by_its_id_and_keeps_it(daemon: Daemon, client: Client) -> None:
    """Of one topic or several, also over the connections that follow a lost one."""
    topic = await fill(client, 1)

    async with (
        client.subscribe("t", subscriber_id="ann") as one,
        client.subscribe("t", "u", patterns=["t.*"], subscriber_id="bob") as many,
        client.subscribe("t"),
    ):
        first = await client.topic("t")
        page = await client.topic("t", limit=1)
        last = await client.topic("t", limit=1, after=page.presence.next)
        await cut_readers(daemon.server, None)
        taking = [asyncio.ensure_future(_until_data(items, 2)) for items in (one, many)]
        await until(lambda: daemon.hub.subscribers == 3)
        await client.publish("t", 2)
        await asyncio.gather(*taking)
        again = await client.topic("t")

    assert (first.epoch, first.offset) == (topic.epoch, 1)
    assert (first.subscribers, first.oldest_offset, first.held_messages) == (3, 1, 1)
    for info in (first, again):
        assert [(each.id, each.connections) for each in info.presence.ids] == [
            ("ann", 1),
            ("bob", 1),
        ]
        assert (info.presence.count, info.presence.next) == (2, None)
    assert [each.id for each in page.presence.ids] == ["ann"]
    assert [each.id for each in last.presence.ids] == ["bob"]


async def _until_data(items: Any, data: int) -> None:
    async for item in items:
        if isinstance(item, Message) and item.data == data:
            return


async def test_clear_is_told_to_readers(client: Client) -> None:
    """As a gap, behind which the new epoch begins."""
    await fill(client, 2)
    async with client.subscribe("t", last=1) as items:
        await anext(items)
        cleared = await client.clear("t")
        gap = await anext(items)
        answer = await client.publish("t", 3)

    assert gap == Gap("t", reason="epoch")
    assert items.position == cleared
    assert (answer.epoch, answer.offset) == (cleared.epoch, 1)


async def test_time_to_live_goes_with_each_form_of_a_publish(client: Client) -> None:
    """As it was given; a message without one says none."""
    await client.publish("t", 1, ttl_s=60)
    await client.publish_raw("t", "2", ttl_s=0.5)
    await client.publish_batch([Outgoing("t", 3, ttl_s=61), Outgoing("t", 4, "k"), ("t", 5)])
    async with client.publisher() as publisher:
        await publisher.publish("t", 6, ttl_s=63)
        await publisher.publish_raw("t", "7", ttl_s=100_000_000)

    async with client.subscribe("t", since="all") as items:
        taken = [await anext(items) for _ in range(7)]

    assert [(item.data, item.ttl_s) for item in taken if isinstance(item, Message)] == [
        *((1, 60), (2, 0.5), (3, 61), (4, None), (5, None), (6, 63), (7, 100_000_000))
    ]


async def test_headers_are_carried_to_readers_that_ask(client: Client) -> None:
    """From each form of a publish, to one topic, several, and in a history; others get none."""
    given = [{"ce-type": f"t{number}", "ce-id": '"ä'} for number in range(5)]
    await client.publish("t", 0, headers=given[0])
    await client.publish_raw("t", "1", headers=given[1])
    await client.publish_batch([Outgoing("t", 2, headers=given[2]), ("t", "none")])
    async with client.publisher() as publisher:
        await publisher.publish("t", 3, headers=given[3], key="k", ttl_s=60)
        await publisher.publish_raw("t", "4", headers=given[4])
    expected = [*given[:3], {}, *given[3:]]

    for subscription in (
        client.subscribe("t", since="all", headers=True),
        client.subscribe("t", "u", since="all", headers=True),
    ):
        async with subscription as items:
            taken = [await anext(items) for _ in range(6)]
        assert [item.headers for item in taken if isinstance(item, Message)] == expected
    async with client.subscribe("t", since="all") as items:
        without = await anext(items)
    for headers, wanted in ((True, expected), (False, [{}] * 6)):
        past = [item async for item in client.history("t", headers=headers)]
        assert [item.headers for item in past if isinstance(item, Message)] == wanted
    with pytest.raises(ValueError, match="can't be carried"):
        await client.publish("t", 1, headers={"X-Mine": "1"})

    assert isinstance(without, Message)
    assert without.headers == {}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"limit": 0}, ValueError, "limit is 1 or more, not 0"),
        ({"limit": 1001}, Refused, "limit must be a whole number from 1 to 1000"),
        ({"after": 5}, TypeError, "after is text, not an int"),
        ({"after": "\ud800"}, ValueError, "after holds half a surrogate pair"),
    ],
)
async def test_wrong_page_of_readers_is_told(
    options: dict[str, Any], error: type[Exception], words: str, client: Client
) -> None:
    """In a sentence."""
    with pytest.raises(error, match=words):
        await client.topic("t", **options)


def test_head_of_another_epoch_is_asked_for_again() -> None:
    """Offsets of two epochs can't be compared, so the end would be a guess."""
    walk = Walk({"since": "all"}, {}, None, None)
    walk.head = Position("e1", 5)

    walk.add(topics_module.MessagesPage([], "e2", 9, Gap("t", reason="epoch")))

    assert walk.head is None
    assert not walk.is_over
    assert walk.position is None
    assert walk.take() == Gap("t", reason="epoch")
    assert walk.position == Position("e2", 9)
