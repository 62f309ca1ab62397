"""The client against real daemons: cut at any byte, killed, restarted, refused, held up."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSMsgType, web
from aiohttp.test_utils import TestServer
from conftest import FakeClock
from cutting_proxy import cutting_proxy
from daemons import DaemonProcess, daemon_process, running, until

import clevrd.client.publisher
from clevrd.client import (
    BadAnswer,
    Client,
    Closed,
    Gap,
    Message,
    Published,
    Publisher,
    Refused,
    Subscription,
    Unreachable,
)

SEEDS = [1, 2, 3]


def hasty(url: str, **options: Any) -> Client:
    """Return a client that comes back at once."""
    return Client(url, **{"random": lambda: 0.0, "retry_for_s": 20.0, **options})


async def take(items: Subscription, count: int) -> list[int | Gap]:
    """Return the data of messages, and the gaps, up to the ``count``-th message."""
    taken: list[int | Gap] = []
    while count:
        item = await anext(items)
        taken.append(item if isinstance(item, Gap) else item.data)
        count -= isinstance(item, Message)
    return taken


@asynccontextmanager
async def process(**variables: str) -> AsyncIterator[DaemonProcess]:
    """Run a daemon process without holding the loop while it starts and ends."""
    starting = daemon_process(**variables)
    daemon = await asyncio.to_thread(starting.__enter__)
    try:
        yield daemon
    finally:
        await asyncio.to_thread(starting.__exit__, None, None, None)


# --- subscriptions ---


@pytest.mark.parametrize("seed", SEEDS)
async def test_reader_behind_cuts_gets_each_message_once_and_in_order(seed: int) -> None:
    """Wherever a connection breaks, in a head, a frame or a control frame, nothing is missing."""
    async with (
        running() as daemon,
        cutting_proxy(daemon.port, seed=seed) as proxy,
        hasty(daemon.url) as publisher,
        hasty(proxy.url) as reader,
        reader.subscribe("t", since="all") as items,
    ):
        for start in range(0, 3000, 250):
            await publisher.publish_batch([("t", start + n) for n in range(250)])
            assert await take(items, 250) == list(range(start, start + 250))
        cuts = proxy.cuts

    assert cuts > 20


@pytest.mark.parametrize("seed", SEEDS)
async def test_stored_position_carries_over_to_the_next_process(seed: int) -> None:
    """A consumer that stores its position and dies anywhere has each message once all the same."""
    async with (
        running() as daemon,
        cutting_proxy(daemon.port, seed=seed) as proxy,
        hasty(daemon.url) as publisher,
    ):
        await publisher.publish_batch([("t", n) for n in range(500)])
        position, taken = None, []
        for count in (1, 99, 150, 250):
            start: dict[str, Any] = {"since": "all"} if position is None else {"position": position}
            async with hasty(proxy.url) as reader, reader.subscribe("t", **start) as items:
                taken += await take(items, count)
                position = items.position

    assert taken == list(range(500))


async def test_killed_daemon_is_a_gap_at_its_place() -> None:
    """What was lost with the process can't be known; where it was lost is told."""
    async with process() as first, hasty(first.url) as client, client.subscribe("t") as items:
        await client.publish_batch([("t", 1), ("t", 2)])
        before = await take(items, 2)
        first.process.kill()
        await asyncio.to_thread(first.process.wait, 5)

        async with process(ADDRESS=f"127.0.0.1:{first.port}"):
            await client.publish("t", 3)
            after = await take(items, 1)

    assert before == [1, 2]
    assert after == [Gap("t", reason="epoch"), 3]


async def test_planned_restart_is_waited_out() -> None:
    """Readers and publishers come back by themselves; nothing is published twice."""
    async with (
        process() as first,
        stream_into(first.url) as (client, publisher),
        client.subscribe("t") as items,
    ):
        taking = asyncio.create_task(take(items, 99))
        await (await publisher.publish("t", 1))
        code = await asyncio.to_thread(first.stop)

        async with process(ADDRESS=f"127.0.0.1:{first.port}"):
            for n in range(2, 100):
                await publisher.publish("t", n)
            taken = await taking

    messages = [item for item in taken if not isinstance(item, Gap)]
    assert (code, messages) == (0, list(range(1, 100)))


# --- several topics ---


async def take_each(items: Subscription, count: int) -> dict[str, list[int | Gap]]:
    """Return by topic the data of messages, and the gaps, up to the ``count``-th message in all."""
    taken: defaultdict[str, list[int | Gap]] = defaultdict(list)
    while count:
        item = await anext(items)
        taken[item.topic].append(item if isinstance(item, Gap) else item.data)
        count -= isinstance(item, Message)
    return dict(taken)


def extend(all_taken: dict[str, list[int | Gap]], taken: dict[str, list[int | Gap]]) -> None:
    """Add what was taken to what was taken before, by topic."""
    for topic, items in taken.items():
        all_taken.setdefault(topic, []).extend(items)


@pytest.mark.parametrize("seed", SEEDS)
async def test_topics_and_a_pattern_behind_cuts_lose_and_repeat_nothing(seed: int) -> None:
    """In each topic every message once, in order, also in those made while nobody was there."""
    taken: dict[str, list[int | Gap]] = {}
    async with (
        running() as daemon,
        cutting_proxy(daemon.port, seed=seed, least_bytes=2_000) as proxy,
        hasty(daemon.url) as publisher,
        hasty(proxy.url) as reader,
        reader.subscribe("a", "b", patterns=["p.*"], since="all") as items,
    ):
        for start in range(12):
            topics = ["a", "b", *(f"p.{n}" for n in range(start + 1))]
            batch = [(topic, start * 20 + n) for n in range(20) for topic in topics]
            await publisher.publish_batch(batch)
            extend(taken, await take_each(items, len(batch)))
        positions = items.positions
        cuts = proxy.cuts

    numbers = list(range(240))
    expected = {"a": numbers, "b": numbers, **{f"p.{n}": numbers[n * 20 :] for n in range(12)}}
    assert taken == expected
    assert {topic: at.offset for topic, at in positions.items()} == {
        topic: len(data) for topic, data in expected.items()
    }
    assert cuts > 10


@pytest.mark.parametrize("seed", SEEDS)
async def test_stored_positions_carry_over_to_the_next_process(seed: int) -> None:
    """A consumer that stores them and dies anywhere has each message once all the same."""
    topics = ["a", "b", "p.x", "p.y"]
    taken: dict[str, list[int | Gap]] = {}
    async with (
        running() as daemon,
        cutting_proxy(daemon.port, seed=seed, least_bytes=2_000) as proxy,
        hasty(daemon.url) as publisher,
    ):
        await publisher.publish_batch([(topic, n) for n in range(150) for topic in topics])
        start: dict[str, Any] = {"since": "all"}
        for count in (1, 99, 200, 300):
            async with (
                hasty(proxy.url) as reader,
                reader.subscribe("a", "b", patterns=["p.*"], **start) as items,
            ):
                extend(taken, await take_each(items, count))
                start = {"positions": items.positions}

    assert taken == {topic: list(range(150)) for topic in topics}


async def test_killed_daemon_is_a_gap_in_each_topic_and_none_in_new_ones() -> None:
    """What began while nobody was there is read from its first message."""
    async with (
        process() as first,
        hasty(first.url) as client,
        client.subscribe("a", "b", patterns=["p.*"]) as items,
    ):
        await client.publish_batch([("a", 1), ("p.x", 1)])
        before = await take_each(items, 2)
        first.process.kill()
        await asyncio.to_thread(first.process.wait, 5)

        async with process(ADDRESS=f"127.0.0.1:{first.port}"):
            await client.publish_batch([(topic, 2) for topic in ("a", "b", "p.x", "p.y")])
            after = await take_each(items, 4)

    assert before == {"a": [1], "p.x": [1]}
    assert after == {
        **{topic: [Gap(topic, reason="epoch"), 2] for topic in ("a", "b", "p.x")},
        "p.y": [2],
    }


async def test_planned_restart_with_a_state_directory_loses_nothing(tmp_path: Path) -> None:
    """Topics, and those that a pattern brought, go on behind the positions they had."""
    state = {"CLEVRD_STATE_DIR": str(tmp_path)}
    topics = ["a", "b", "p.x"]
    async with (
        process(**state) as first,
        hasty(first.url) as client,
        client.subscribe("a", "b", patterns=["p.*"]) as items,
    ):
        await client.publish_batch([(topic, n) for n in range(10) for topic in topics])
        taken = await take_each(items, 15)
        await asyncio.to_thread(first.stop)

        async with process(ADDRESS=f"127.0.0.1:{first.port}", **state):
            later = [(topic, n) for n in range(10, 20) for topic in topics]
            await client.publish_batch([*later, ("p.y", 0)])
            extend(taken, await take_each(items, 15 + 31))

    assert taken == {**{topic: list(range(20)) for topic in topics}, "p.y": [0]}


async def test_who_was_away_for_too_long_is_told_in_each_topic() -> None:
    """Messages and gaps together are everything that was published."""
    topics = ["a", "b", "p.x"]
    async with (
        running(ring_messages=100, catch_up_messages=10) as daemon,
        hasty(daemon.url) as client,
    ):
        await client.publish_batch([(topic, n) for n in range(1, 11) for topic in topics])
        wanted: dict[str, Any] = {"patterns": ["p.*"]}
        async with client.subscribe("a", "b", **wanted, since="all") as items:
            before = await take_each(items, 30)
            positions = items.positions
        await client.publish_batch([(topic, n) for n in range(11, 151) for topic in topics])
        async with client.subscribe("a", "b", **wanted, positions=positions) as items:
            after = await take_each(items, 300)

    assert before == {topic: list(range(1, 11)) for topic in topics}
    assert after == {
        topic: [Gap(topic, 11, 50, 40, "retention"), *range(51, 151)] for topic in topics
    }


async def test_topic_that_was_forgotten_comes_back_with_new_positions() -> None:
    """What a pattern brought twice is one stream of messages, and resumes in its new life."""
    async with running(topic_idle_s=0.1) as daemon, hasty(daemon.url) as client:
        async with client.subscribe(patterns=["p.*"]) as items:
            await client.publish("p.x", 1)
            first = await take_each(items, 1)
            old = items.positions["p.x"]
            await until(lambda: len(daemon.hub.topics) == 0)
            await client.publish("p.x", 2)
            await client.publish("p.x", 3)
            second = await take_each(items, 1)
            new = items.positions
        async with client.subscribe(patterns=["p.*"], positions=new) as items:
            third = await take_each(items, 1)

    assert (first, second, third) == ({"p.x": [1]}, {"p.x": [2]}, {"p.x": [3]})
    assert (old.offset, new["p.x"].offset) == (1, 1)
    assert old.epoch != new["p.x"].epoch


async def test_large_backlogs_of_many_topics_are_read_whole() -> None:
    """Neither side waits for the other: commands are sent while messages are read."""
    topics = [f"t{n}" for n in range(300)]
    text = "x" * 200
    async with running() as daemon, hasty(daemon.url) as client:
        for topic in topics:
            await client.publish_batch([(topic, text) for _ in range(40)])
        async with client.subscribe(*topics, since="all") as items:
            taken = await take_each(items, 40 * len(topics))
            is_connected = items.is_connected

    assert {topic: len(each) for topic, each in taken.items()} == dict.fromkeys(topics, 40)
    assert is_connected


async def test_pattern_over_more_topics_than_may_be_is_refused_in_words() -> None:
    """A topic that is left out would be a loss that nobody is told of."""
    async with running(max_topics_per_connection=3) as daemon, hasty(daemon.url) as client:
        await client.publish_batch([("p.x", 1), ("p.y", 1)])
        async with client.subscribe(patterns=["p.*"]) as items:
            before = await take_each(items, 2)
            await client.publish("p.z", 1)
            with pytest.raises(Refused, match="A connection may have 3") as caught:
                await anext(items)

    assert before == {"p.x": [1], "p.y": [1]}
    assert caught.value.code == "invalid_request"


async def test_pattern_that_is_refused_is_told_when_the_block_is_entered() -> None:
    """In the daemon's words, with the code that a program can ask for."""
    async with running() as daemon, hasty(daemon.url) as client:
        with pytest.raises(Refused, match="can match everything") as caught:
            await client.subscribe("a", patterns=["**"]).open()

    assert caught.value.code == "forbidden"


# --- the publish stream ---


@asynccontextmanager
async def stream_into(url: str, **options: Any) -> AsyncIterator[tuple[Client, Publisher]]:
    """Return a hasty client with a publish stream."""
    async with hasty(url) as client, client.publisher(**options) as publisher:
        yield client, publisher


@pytest.mark.parametrize("seed", SEEDS)
async def test_stream_behind_cuts_loses_nothing(seed: int) -> None:
    """Each message is there once, in order: the daemon knows a copy by its key."""
    numbers = list(range(2000))
    async with running() as daemon:
        async with (
            cutting_proxy(daemon.port, seed=seed, least_bytes=1_000) as proxy,
            stream_into(proxy.url, max_in_flight=50) as (client, publisher),
        ):
            receipts = [await publisher.publish("t", n) for n in numbers]
            answers = [await receipt for receipt in receipts]
        async with hasty(daemon.url) as reader, reader.subscribe("t", since="all") as items:
            head = max(answer.offset for answer in answers)
            there = await take(items, head)

    assert proxy.cuts > 20
    assert there == numbers
    assert any(answer.repeated for answer in answers)
    assert client.repeated_messages == 0


async def test_stream_answers_each_message() -> None:
    """A receipt is the server's answer; they come in the order of the messages."""
    async with running() as daemon, stream_into(daemon.url) as (_, publisher):
        receipts = [await publisher.publish("t", n) for n in range(600)]
        answers = [await receipt for receipt in receipts]

    assert [answer.offset for answer in answers] == list(range(1, 601))
    assert isinstance(answers[0], Published)


async def test_refused_message_of_a_stream_holds_back_no_other() -> None:
    """Who awaits its receipt is told; the others are there."""
    async with running() as daemon, stream_into(daemon.url) as (_, publisher):
        receipts = [await publisher.publish("t", data) for data in (1, None, 3)]
        with pytest.raises(Refused, match="missing or null") as caught:
            await receipts[1]
        last = await receipts[2]

    assert (caught.value.code, last.offset) == ("invalid_request", 2)


async def test_refusal_that_nobody_looked_at_is_raised_at_the_end() -> None:
    """A publisher that ignores its receipts does not lose messages silently."""

    async def publish_carelessly(url: str) -> None:
        async with stream_into(url) as (_, publisher):
            for data in (1, None, None):
                await publisher.publish("t", data)

    async with running() as daemon:
        with pytest.raises(Refused, match="2 messages were refused; the first: The data"):
            await publish_carelessly(daemon.url)


async def test_message_over_the_limit_is_refused_alone() -> None:
    """The daemon closes the connection for it; what was sent around it is there once."""
    async with running(max_message_bytes=2000) as daemon:
        async with stream_into(daemon.url) as (_, publisher):
            data = [*range(10), "x" * 3000, *range(10, 20)]
            receipts = [await publisher.publish("t", each) for each in data]
            with pytest.raises(Refused) as caught:
                await receipts[10]
        async with hasty(daemon.url) as reader, reader.subscribe("t", since="all") as items:
            there = await take(items, 20)

    assert caught.value.code == "message_too_large"
    assert there == list(range(20))


async def test_stream_over_the_rate_is_slowed_and_loses_nothing() -> None:
    """What is refused for the moment is sent again."""
    async with running(publish_rate=500, publish_burst=20) as daemon:
        async with stream_into(daemon.url) as (_, publisher):
            for n in range(100):
                await publisher.publish("t", n)
        async with hasty(daemon.url) as reader, reader.subscribe("t", since="all") as items:
            there = await take(items, 100)

    assert sorted(there, key=str) == sorted(range(100), key=str)


class HeldServer:
    """A publish socket that answers only when it is told to."""

    def __init__(self) -> None:
        # Set by the fixture, once it listens.
        self.url = ""
        self.is_closed = False
        self.frames: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sockets: list[web.WebSocketResponse] = []

    async def publish(self, request: web.Request) -> web.WebSocketResponse:
        """Keep what comes."""
        if self.is_closed:
            raise web.HTTPServiceUnavailable
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets.append(socket)
        async for frame in socket:
            assert frame.type is WSMsgType.TEXT
            self.frames.put_nowait(frame.json())
        return socket

    async def answer(self, frame: dict[str, Any], **fields: Any) -> None:
        """Answer a message; as taken, unless told."""
        answer = {"success": True, "message_id": "m", **fields, "ref": frame["ref"]}
        await self.sockets[-1].send_json(answer)


@pytest.fixture
async def held() -> AsyncIterator[HeldServer]:
    """Return a server that holds its answers back."""
    fake = HeldServer()
    app = web.Application()
    app.router.add_get("/publish", fake.publish)
    async with TestServer(app, host="127.0.0.1") as server:
        fake.url = str(server.make_url("")).rstrip("/")
        yield fake


async def test_messages_in_flight_are_bounded(held: HeldServer) -> None:
    """One more waits until one is answered, and is sent then."""
    async with stream_into(held.url, max_in_flight=3) as (_, publisher):
        first = [await publisher.publish("t", n) for n in range(3)]
        fourth = asyncio.create_task(publisher.publish("t", 3))
        sent = [await held.frames.get() for _ in range(3)]
        was_waiting = not fourth.done()
        await held.answer(sent[1])
        sent.append(await held.frames.get())
        for frame in (sent[0], sent[2], sent[3]):
            await held.answer(frame)
        answers = [await receipt for receipt in (*first, await fourth)]

    assert was_waiting
    assert [frame["data"] for frame in sent] == [0, 1, 2, 3]
    assert len(answers) == 4


async def test_bytes_in_flight_are_bounded(
    held: HeldServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large messages wait for each other long before there are many; a single one always goes."""
    monkeypatch.setattr(clevrd.client.publisher, "MAX_IN_FLIGHT_BYTES", 1_000)
    async with stream_into(held.url) as (_, publisher):
        await publisher.publish("t", "x" * 2_000)
        second = asyncio.create_task(publisher.publish("t", "y"))
        frame = await held.frames.get()
        was_waiting = not second.done()
        await held.answer(frame)
        await second
        await held.answer(await held.frames.get())

    assert was_waiting


async def test_unanswered_messages_are_sent_again_in_order_with_their_keys(
    held: HeldServer,
) -> None:
    """What was answered is not; the count of possible copies is that of a server without keys."""
    async with stream_into(held.url) as (client, publisher):
        for n in range(4):
            await publisher.publish("t", n)
        sent = [await held.frames.get() for _ in range(4)]
        await held.answer(sent[1])
        await held.sockets[-1].close(code=1012)
        again = [await held.frames.get() for _ in range(3)]
        told: list[dict[str, Any]] = [{}, {"repeated": True}, {"lagging": 0}]
        for frame, fields in zip(again, told, strict=True):
            await held.answer(frame, **fields)
        await publisher.flush()

    assert again == [sent[0], sent[2], sent[3]]
    assert client.repeated_messages == 1


async def test_message_refused_for_the_moment_goes_ahead_of_later_ones(held: HeldServer) -> None:
    """Order is kept wherever the server leaves that to the client."""
    refused: dict[str, Any] = {
        "success": False,
        "error": "Slow down.",
        "code": "throttled",
        "retryable": True,
    }
    waits: list[float] = []
    may_go_on = asyncio.Event()

    async def wait(seconds: float) -> None:
        waits.append(seconds)
        await may_go_on.wait()

    async with (
        Client(held.url, random=lambda: 0.5, sleep=wait) as client,
        client.publisher() as publisher,
    ):
        await publisher.publish("t", 0)
        await held.answer(await held.frames.get(), **refused)
        await until(lambda: bool(waits))
        await publisher.publish("t", 1)
        may_go_on.set()
        sent = [await held.frames.get() for _ in range(2)]
        for frame in sent:
            await held.answer(frame)

    assert [frame["data"] for frame in sent] == [0, 1]
    assert waits == [0.125]


@pytest.mark.parametrize("code", [4001, 4003, 4099])
async def test_stream_that_is_told_to_stay_away_fails(held: HeldServer, code: int) -> None:
    """Receipts, later publishes and the end of the block all say why."""
    async with hasty(held.url) as client:
        publisher = await client.publisher().__aenter__()
        receipt = await publisher.publish("t", 0)
        await held.frames.get()
        await held.sockets[-1].close(code=code, message=b"revoked")

        with pytest.raises(Closed, match="revoked"):
            await receipt
        with pytest.raises(Closed, match="revoked"):
            await publisher.publish("t", 1)
        with pytest.raises(Closed, match="revoked"):
            await publisher.__aexit__(None, None, None)


@pytest.mark.parametrize("answer", ["hello", '{"success":true}', '{"success":true,"ref":"x"}'])
async def test_answer_that_names_no_message_fails_the_stream(held: HeldServer, answer: str) -> None:
    """Nobody could be told of it, so nothing after it could be trusted."""
    async with hasty(held.url) as client:
        publisher = await client.publisher().__aenter__()
        receipt = await publisher.publish("t", 0)
        await held.frames.get()
        await held.sockets[-1].send_str(answer)

        with pytest.raises(BadAnswer, match="not as clevrd does"):
            await receipt
        with pytest.raises(BadAnswer, match="not as clevrd does"):
            await publisher.__aexit__(None, None, None)


async def test_stream_gives_up_when_the_server_stays_away(held: HeldServer) -> None:
    """After retry_for_s without progress the messages are told to be unanswered."""
    clock = FakeClock()

    async def wait(seconds: float) -> None:
        clock.advance(max(seconds, 1.0))

    async with Client(
        held.url, retry_for_s=30, random=lambda: 0.5, sleep=wait, clock=clock
    ) as client:
        publisher = await client.publisher().__aenter__()
        receipt = await publisher.publish("t", 0)
        await held.frames.get()
        held.is_closed = True
        await held.sockets[-1].close(code=1012)

        with pytest.raises(Refused) as caught:
            await receipt
        with pytest.raises(Refused):
            await publisher.__aexit__(None, None, None)

    assert caught.value.status == 503
    # Waits of 1, 1, 1, 1, 2, 4, 8 s; the next one of 15 s would end too late.
    assert clock.now_s - FakeClock().now_s == 18


async def test_idle_stream_outlives_any_outage(held: HeldServer) -> None:
    """With nothing to publish nobody is told of an outage; afterwards it goes on."""
    clock, outages = FakeClock(), 0

    async def wait(seconds: float) -> None:
        nonlocal outages
        outages += 1
        clock.advance(100.0)
        held.is_closed = outages < 5

    async with (
        Client(held.url, retry_for_s=30, sleep=wait, clock=clock) as client,
        client.publisher() as publisher,
    ):
        held.is_closed = True
        await until(lambda: bool(held.sockets))
        await held.sockets[-1].close(code=1012)
        await until(lambda: len(held.sockets) == 2)
        receipt = await publisher.publish("t", 0)
        await held.answer(await held.frames.get())
        answer = await receipt

    assert (answer.message_id, outages) == ("m", 5)


async def test_left_in_a_hurry_the_stream_drops_what_is_unanswered(held: HeldServer) -> None:
    """An error in the block is not held up by answers; receipts say that they may have arrived."""
    async with hasty(held.url) as client:
        publisher = await client.publisher().__aenter__()
        receipt = await publisher.publish("t", 0)
        await publisher.__aexit__(KeyError, KeyError(), None)

        with pytest.raises(Unreachable) as caught:
            await receipt

    assert caught.value.may_have_arrived


async def test_who_stops_waiting_for_a_receipt_takes_nothing_back(held: HeldServer) -> None:
    """A timeout around a receipt leaves the message and its answer alone."""
    async with stream_into(held.url) as (_, publisher):
        receipt = await publisher.publish("t", 0)
        frame = await held.frames.get()
        waiting = asyncio.ensure_future(receipt)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait((waiting,))
        await held.answer(frame)
        answer = await receipt

    assert answer.message_id == "m"


async def test_first_connection_of_a_stream_fails_at_once() -> None:
    """A wrong URL is told when the block is entered."""
    with pytest.raises(Unreachable, match="refused"):
        async with stream_into("127.0.0.1:1"):
            pass
