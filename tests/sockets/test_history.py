"""Subscribing beyond the ring over real sockets: WebSocket, streams, polls and commands.

The history is one in memory (`histories`); that of SQLite is held to the same contract elsewhere.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
from clients import offset_of, offsets, reset_by_peer, subscribe
from daemons import Daemon, running, until
from histories import (
    EPOCH,
    FIRST_US,
    FakeHistory,
    deliver,
    journaled_topic,
    start_of,
    unavailable,
)
from http_wire import get
from streams import EVENTS, LINES, Item, open_stream
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from clevrd.core.message_ids import id_at
from clevrd.core.topic import Topic
from clevrd.hub import history_readers

TENANT = "default-tenant"
NEW = "ba9876543210"


class Fixture:
    """A daemon whose topic t has messages 1 to 100 in its history, and the last ten in its ring."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.hub = daemon.hub
        self.history = FakeHistory()
        self.hub.keep_history(self.history)
        self.topic = self.make("t")

    def make(self, name: str) -> Topic:
        """Make one more topic of this kind."""
        self.history.add(TENANT, name, range(1, 91))
        topic = journaled_topic(self.hub, name, 90)
        deliver(self.hub, topic, self.history, 10)
        return topic

    def publish(self, count: int, topic: Topic | None = None) -> None:
        """Publish more."""
        deliver(self.hub, topic or self.topic, self.history, count)

    def begin_anew(self) -> None:
        """Begin a new epoch of t."""
        self.topic = self.hub.begin_anew(self.topic, start_of(0, NEW, "bb22"))

    async def poll(self, query: str) -> dict[str, Any]:
        """Return the answer to a poll of topic t."""
        return await self.daemon.get_json(f"/subscribe?topic=t&poll=1&{query}")


@pytest.fixture
async def world() -> AsyncIterator[Fixture]:
    """Return a running daemon with a history."""
    async with running() as daemon:
        yield Fixture(daemon)


def commands(daemon: Daemon) -> connect:
    """Return a client of /ws."""
    return connect(f"{daemon.ws_url}/ws", subprotocols=[Subprotocol("clevrd.v1")])


async def received(client: ClientConnection, count: int) -> list[dict[str, Any]]:
    """Return the next ``count`` frames."""
    return [json.loads(await client.recv()) for _ in range(count)]


def offsets_of(items: list[dict[str, Any]]) -> list[int]:
    """Return the offsets of messages."""
    return [item["offset"] for item in items if "type" not in item]


# --- each transport ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"offset": 40, "epoch": EPOCH}, 41),
        ({"last": 60}, 41),
        ({"since": id_at(FIRST_US + 40)}, 41),
        ({"since": "all"}, 1),
    ],
    ids=["position", "last", "since", "all"],
)
async def test_websocket_reaches_into_the_history(
    world: Fixture, options: dict[str, Any], first: int
) -> None:
    """Whatever it says, what lies before the ring comes first, and then the rest, and live ones."""
    async with subscribe(world.daemon.ws_url, **options) as reader:
        past = [offset_of(await reader.recv()) for _ in range(first, 101)]
        world.publish(2)
        live = [offset_of(await reader.recv()) for _ in range(2)]

    assert past == list(range(first, 101))
    assert live == [101, 102]


@pytest.mark.parametrize("accept", [EVENTS, LINES], ids=["events", "lines"])
async def test_streams_reach_into_the_history(world: Fixture, accept: str) -> None:
    """Each message has the form that it would have had live, with its id."""
    query = f"topic=t&offset=40&epoch={EPOCH}&control=1"
    async with await open_stream(world.daemon.port, accept, query) as stream:
        greeting, *messages = await stream.items(61)
        world.publish(1)
        live = await stream.item()

    assert greeting.kind == "subscribed"
    assert (greeting.json["offset"], greeting.json["recovered"]) == (40, True)
    assert [item.json["offset"] for item in (*messages, live)] == list(range(41, 102))
    expected = (
        [f"{EPOCH}:{offset}" for offset in range(40, 102)] if accept == EVENTS else [None] * 62
    )
    assert [item.id for item in (greeting, *messages, live)] == expected


async def test_event_source_of_several_topics_has_whole_ids_from_the_history(
    world: Fixture,
) -> None:
    """Ids say where the reader is in all topics, so it comes back where it was."""
    world.make("u")
    async with await open_stream(world.daemon.port, EVENTS, "topic=t&topic=u&last=60") as stream:
        items = await stream.items(122)
        last_id = items[-1].id
    world.publish(1)

    assert last_id is not None
    assert sorted(last_id.split(",")) == [f"{EPOCH}:100/0", f"{EPOCH}:100/1"]
    async with await open_stream(
        world.daemon.port, EVENTS, "topic=t&topic=u", f"Last-Event-ID: {last_id}"
    ) as stream:
        items = await stream.items(3)
    assert [item.json["recovered"] for item in items if item.kind] == [True, True]
    assert [item.json["offset"] for item in items if not item.kind] == [101]


async def test_commands_reach_into_the_history(world: Fixture) -> None:
    """A topic by its position; unsubscribing in the middle gives where it was."""
    async with commands(world.daemon) as client:
        subscribed = {"type": "subscribe", "ref": 1, "topic": "t", "offset": 40, "epoch": EPOCH}
        await client.send(json.dumps(subscribed))
        greeting, *messages = await received(client, 61)
        await client.send(json.dumps({"type": "unsubscribe", "ref": 2, "topic": "t"}))
        (left,) = await received(client, 1)

    assert (greeting["ref"], greeting["recovered"], greeting["offset"]) == (1, True, 40)
    assert offsets_of(messages) == list(range(41, 101))
    assert left["positions"] == {"t": {"epoch": EPOCH, "offset": 100}}


async def test_unsubscribed_before_anything_came_has_no_position(world: Fixture) -> None:
    """The history does not answer; the command does, and nothing comes after it."""
    world.history.is_open.clear()
    async with commands(world.daemon) as client:
        await client.send(json.dumps({"type": "subscribe", "topic": "t", "last": 50}))
        await client.send(json.dumps({"type": "unsubscribe", "topic": "t"}))
        (left,) = await received(client, 1)
        world.history.is_open.set()
        await client.send(json.dumps({"type": "ping", "ref": 3}))
        (pong,) = await received(client, 1)

    assert left == {"type": "unsubscribed", "positions": {}}
    assert pong == {"type": "pong", "ref": 3}
    assert world.hub.reading_history == 0


async def test_pattern_begins_in_the_history_of_each_topic(world: Fixture) -> None:
    """By a position where there is one, and where the pattern says elsewhere."""
    for name in ("p.a", "p.b"):
        world.make(name)
    async with commands(world.daemon) as client:
        command = {
            "type": "subscribe",
            "pattern": "p.*",
            "positions": {"p.a": {"epoch": EPOCH, "offset": 80}},
            "last": 30,
        }
        await client.send(json.dumps(command))
        items = await received(client, 3 + 20 + 30)

    messages = [item for item in items if "type" not in item]
    by_topic = {
        name: [item["offset"] for item in messages if item["topic"] == name]
        for name in ("p.a", "p.b")
    }
    assert by_topic == {"p.a": list(range(81, 101)), "p.b": list(range(71, 101))}
    greetings = [item for item in items if item.get("type") == "subscribed"]
    recovered = {item["topic"]: item["recovered"] for item in greetings}
    assert recovered == {"p.a": True, "p.b": False}


# --- polls ---------------------------------------------------------------------------------------


async def test_poll_is_answered_from_the_history_and_the_ring(world: Fixture) -> None:
    """One answer has what lies behind its position in both."""
    answer = await world.poll(f"offset=40&epoch={EPOCH}")
    last = await world.poll("last=30")
    since = await world.poll(f"since={id_at(FIRST_US + 50)}")
    all_there_is = await world.poll("since=all")

    assert offsets_of(answer["messages"]) == list(range(41, 101))
    assert (answer["epoch"], answer["offset"], answer["recovered"]) == (EPOCH, 100, True)
    assert answer["gap"] is None
    assert offsets_of(last["messages"]) == list(range(71, 101))
    assert offsets_of(since["messages"]) == list(range(51, 101))
    assert offsets_of(all_there_is["messages"]) == list(range(1, 101))
    figures = await world.daemon.get_json("/metrics")
    assert figures["messages"]["offered"] == figures["messages"]["delivered"] == 60 + 30 + 50 + 100


async def test_polls_read_a_long_history_bit_by_bit(world: Fixture) -> None:
    """Each answer is within the bounds of any, and the next one goes on behind it."""
    world.history.add(TENANT, "long", range(1, 3_001), size_bytes=500)
    journaled_topic(world.hub, "long", 3_000)

    seen: list[int] = []
    sizes = []
    query = f"offset=0&epoch={EPOCH}"
    while len(seen) < 3_000:
        answer = await world.daemon.get_json(f"/subscribe?topic=long&poll=1&timeout=0&{query}")
        assert answer["recovered"]
        sizes.append(len(answer["messages"]))
        seen += offsets_of(answer["messages"])
        query = f"offset={answer['offset']}&epoch={EPOCH}"

    assert seen == list(range(1, 3_001))
    assert max(sizes) <= 1_000
    assert len(sizes) <= 5


async def test_gaps_of_the_history_are_told_in_polls(world: Fixture) -> None:
    """What was given up, and damaged: each before the first message of an answer."""
    world.history.forget(TENANT, "t", upto=20)
    world.history.damage(TENANT, "t", 31)

    given_up = await world.poll(f"offset=0&epoch={EPOCH}")
    damaged = await world.poll(f"offset={given_up['offset']}&epoch={EPOCH}")
    another = await world.poll("offset=3&epoch=another")

    assert offsets_of(given_up["messages"]) == list(range(21, 31))
    assert not given_up["recovered"]
    gap = given_up["gap"]
    assert (gap["from"], gap["to"], gap["reason"]) == (1, 20, "retention")
    assert offsets_of(damaged["messages"]) == list(range(32, 101))
    gap = damaged["gap"]
    assert (gap["from"], gap["to"], gap["reason"]) == (31, 31, "damaged")
    assert (another["gap"]["reason"], another["gap"]["to"]) == ("epoch", None)
    assert offsets_of(another["messages"]) == list(range(21, 31))


async def test_poll_of_several_topics_has_all_of_them(world: Fixture) -> None:
    """Messages of histories and rings, in the order in which they were taken."""
    world.make("u")
    query = f"topic=u&offset=95&epoch={EPOCH}&offset=60&epoch={EPOCH}"

    answer = await world.poll(query)

    by_topic = {
        name: [item["offset"] for item in answer["messages"] if item["topic"] == name]
        for name in ("t", "u")
    }
    assert by_topic == {"t": list(range(96, 101)), "u": list(range(61, 101))}
    ids = [item["id"] for item in answer["messages"]]
    assert ids == sorted(ids)
    assert answer["recovered"]
    assert answer["positions"] == {name: {"epoch": EPOCH, "offset": 100} for name in ("t", "u")}


async def test_poll_whose_history_can_not_be_read_is_refused_for_now(world: Fixture) -> None:
    """503, and the same poll is answered when the history is there again."""
    world.history.error = unavailable()

    url = f"{world.daemon.url}/subscribe?topic=t&poll=1&timeout=0&offset=40&epoch={EPOCH}"
    async with world.daemon.http.get(url) as response:
        refused = response.status, await response.json()
    world.history.error = None
    answer = await world.poll(f"offset=40&epoch={EPOCH}")

    assert refused[0] == 503
    assert (refused[1]["code"], refused[1]["retryable"]) == ("journal_unavailable", True)
    assert offsets_of(answer["messages"]) == list(range(41, 101))


# --- slow, failing, leaving ----------------------------------------------------------------------


async def test_reader_that_stalls_in_the_history_goes_on_where_it_was(world: Fixture) -> None:
    """Its connection is full for a while, and it misses nothing."""
    world.history.add(TENANT, "long", range(1, 5_001), size_bytes=2_000)
    topic = journaled_topic(world.hub, "long", 5_000)

    async with subscribe(world.daemon.ws_url, "long", stalls=True, since="all") as reader:
        await until(
            lambda: world.hub.reading_history == 1 and world.daemon.only_reader().is_blocked
        )
        world.publish(5, topic)
        stalled_at = world.daemon.only_reader().position()
        seen = [offset_of(await reader.recv()) for _ in range(5_005)]

    assert 0 < stalled_at < 5_000
    assert seen == list(range(1, 5_006))


async def test_clients_of_a_history_that_stays_away_are_told_to_come_back(
    world: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1013 on a WebSocket, and an error on a stream; the daemon goes on."""
    monkeypatch.setattr(history_readers, "RETRY_S", 0.001)
    monkeypatch.setattr(history_readers, "GIVE_UP_S", 0.02)
    world.history.error = unavailable()

    async with subscribe(world.daemon.ws_url, last=50) as reader:
        with pytest.raises(ConnectionClosed) as closed:
            await reader.recv()
    async with await open_stream(world.daemon.port, EVENTS, "topic=t&last=50") as stream:
        items: list[Item] = await stream.to_the_end()

    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1013, "unavailable")
    assert [item.kind for item in items] == ["error"]
    assert items[0].json["code"] == "unavailable"
    assert items[0].json["retryable"]
    assert world.hub.subscribers == 0


async def test_client_that_leaves_while_the_history_is_slow_leaves_nothing(world: Fixture) -> None:
    """Its reading is forgotten; so is that of a poll."""
    world.history.is_open.clear()

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(subscribe(world.daemon.ws_url, last=50))
        await stack.enter_async_context(
            await open_stream(world.daemon.port, LINES, "topic=t&last=50")
        )
        _, poll = await asyncio.open_connection("127.0.0.1", world.daemon.port)
        poll.write(get("/subscribe?topic=t&poll=1&last=50"))
        await until(lambda: world.hub.reading_history == 2 and len(world.daemon.polls) == 1)
        reset_by_peer(poll)
    await until(lambda: world.hub.subscribers == 0 and len(world.daemon.polls) == 0)
    world.history.is_open.set()

    assert world.hub.reading_history == 0


async def test_going_away_has_the_position_that_was_reached_in_the_history() -> None:
    """A daemon that stops says where each is; one that was told nothing yet begins as it did."""
    async with running(shutdown_timeout_s=0.5) as daemon:
        world = Fixture(daemon)
        world.history.add(TENANT, "long", range(1, 5_001), size_bytes=2_000)
        journaled_topic(world.hub, "long", 5_000)
        small = world.hub.subscribers
        async with (
            subscribe(daemon.ws_url, "long", stalls=True, since="all", control="1") as stalled,
            subscribe(daemon.ws_url, "long", since="all", control="1") as reading,
        ):
            greeting = json.loads(await reading.recv())
            await until(lambda: world.hub.reading_history - small >= 1)
            stopping = asyncio.ensure_future(daemon.server.stop())
            ends = []
            for client in (reading, stalled):
                seen = greeting["offset"]
                with suppress(ConnectionClosed):
                    while True:
                        item = json.loads(await client.recv())
                        if "type" not in item:
                            assert item["offset"] == seen + 1
                            seen = item["offset"]
                        elif item["type"] == "going_away":
                            ends.append((seen, item["positions"]["long"]["offset"]))
                assert client.close_code == 1012
            await stopping

    assert len(ends) == 2
    assert all(seen == told for seen, told in ends)


async def test_thousand_clients_that_come_back_share_what_is_read(world: Fixture) -> None:
    """After a restart all resume a few messages back, and few pages are read for them."""
    world.history.add(TENANT, "many", range(1, 1_001))
    topic = journaled_topic(world.hub, "many", 1_000)

    async with AsyncExitStack() as stack:
        readers = await asyncio.gather(
            *(
                stack.enter_async_context(
                    subscribe(world.daemon.ws_url, "many", offset=1_000 - back, epoch=EPOCH)
                )
                for back in (number % 10 for number in range(200))
            )
        )
        world.publish(1, topic)
        seen = [await offsets(reader, 1_001) for reader in readers]

    assert seen == [list(range(1_001 - number % 10, 1_002)) for number in range(200)]
    assert len([page for page in world.history.pages if page[0] == "many"]) <= 3


# --- a new epoch ---------------------------------------------------------------------------------


async def test_topics_of_a_pattern_go_on_in_a_new_epoch(world: Fixture) -> None:
    """Their `subscribed` names the pattern; the topic's first message does not join it again."""
    topic = world.make("p.a")
    async with commands(world.daemon) as client:
        await client.send(json.dumps({"type": "subscribe", "pattern": "p.*", "last": 0}))
        await received(client, 2)
        topic = world.hub.begin_anew(topic, start_of(0, NEW, "bb22"))
        world.publish(2, topic)
        greeting, gap, *messages = await received(client, 4)
        await client.send(json.dumps({"type": "unsubscribe", "pattern": "p.*"}))
        (left,) = await received(client, 1)

    assert (greeting["pattern"], greeting["epoch"], gap["reason"]) == ("p.*", NEW, "epoch")
    assert offsets_of(messages) == [1, 2]
    assert left["positions"] == {"p.a": {"epoch": NEW, "offset": 2}}


async def test_every_transport_goes_on_in_a_new_epoch(world: Fixture) -> None:
    """WebSocket, events, lines, a poll and commands are told, and read it from the beginning."""
    daemon = world.daemon
    async with (
        subscribe(daemon.ws_url, last=0, control="1") as socket,
        await open_stream(daemon.port, EVENTS, "topic=t&last=0") as events,
        await open_stream(daemon.port, LINES, "topic=t&last=0&control=1") as lines,
        commands(daemon) as client,
    ):
        await client.send(json.dumps({"type": "subscribe", "topic": "t", "last": 0}))
        await received(socket, 1)
        await received(client, 1)
        await events.item()
        await lines.item()
        poll = asyncio.ensure_future(world.poll("last=0"))
        await until(lambda: len(daemon.polls) == 1)

        world.begin_anew()
        answer = await poll
        world.publish(2)
        items = {
            "socket": await received(socket, 4),
            "client": await received(client, 4),
            "lines": [item.json for item in await lines.items(4)],
        }
        event_items = await events.items(4)

    for greeting, gap, first, second in (*items.values(), [item.json for item in event_items]):
        assert (greeting["type"], greeting["epoch"], greeting["offset"]) == ("subscribed", NEW, 0)
        assert gap == {
            "type": "gap",
            "topic": "t",
            "from": None,
            "to": None,
            "count": None,
            "reason": "epoch",
        }
        assert offsets_of([first, second]) == [1, 2]
    # Whoever is cut between the two comes back with the earlier position.
    assert [item.id for item in event_items] == [None, *(f"{NEW}:{offset}" for offset in range(3))]
    assert (answer["epoch"], answer["offset"], answer["recovered"]) == (NEW, 0, False)
    assert answer["gap"]["reason"] == "epoch"
    assert answer["messages"] == []


async def test_reader_without_notices_sees_a_lower_offset(world: Fixture) -> None:
    """It asked to be told nothing."""
    async with subscribe(world.daemon.ws_url, last=2) as reader:
        past = [offset_of(await reader.recv()) for _ in range(2)]
        world.begin_anew()
        world.publish(1)
        after = offset_of(await reader.recv())

    assert (past, after) == ([99, 100], 1)


async def test_ids_of_several_topics_are_right_after_a_new_epoch(world: Fixture) -> None:
    """The topic's part changes, the other's stays, and a client that comes back misses nothing."""
    other = world.make("u")
    async with await open_stream(world.daemon.port, EVENTS, "topic=t&topic=u&last=0") as stream:
        await stream.items(2)
        world.begin_anew()
        gap = (await stream.items(2))[1]
        world.publish(1, other)
        message = await stream.item()
    world.publish(1)
    header = f"Last-Event-ID: {message.id}"
    async with await open_stream(world.daemon.port, EVENTS, "topic=t&topic=u", header) as stream:
        items = await stream.items(3)

    assert (gap.kind, gap.id) == ("gap", f"{NEW}:0/0,{EPOCH}:100/1")
    assert message.id == f"{EPOCH}:101/1,{NEW}:0/0"
    assert [item.json["recovered"] for item in items if item.kind] == [True, True]
    (rest,) = [item.json for item in items if not item.kind]
    assert (rest["topic"], rest["offset"]) == ("t", 1)


async def test_going_away_has_the_position_in_the_new_epoch() -> None:
    """A daemon that stops after a new epoch says where each reader is in it."""
    async with running() as daemon:
        world = Fixture(daemon)
        async with subscribe(daemon.ws_url, last=0, control="1") as reader:
            await reader.recv()
            world.begin_anew()
            world.publish(3)
            await received(reader, 5)
            stopping = asyncio.ensure_future(daemon.server.stop())
            (away,) = await received(reader, 1)
        await stopping

    assert away["positions"] == {"t": {"epoch": NEW, "offset": 3}}


async def test_poll_of_several_topics_is_told_of_a_new_epoch(world: Fixture) -> None:
    """Its answer has the gap, and the position in the new epoch."""
    world.make("u")
    poll = asyncio.ensure_future(world.poll("topic=u&last=0"))
    await until(lambda: world.hub.subscribers == 2)

    world.begin_anew()
    answer = await poll

    assert [(gap["topic"], gap["reason"]) for gap in answer["gaps"]] == [("t", "epoch")]
    assert answer["positions"]["t"] == {"epoch": NEW, "offset": 0}
    assert f"{NEW}:0/0" in answer["last_event_id"].split(",")


async def test_handshake_that_began_before_a_new_epoch_joins_it(world: Fixture) -> None:
    """A topic that was looked up before is not joined any more."""
    stale = world.topic
    world.begin_anew()
    world.publish(1)
    async with subscribe(world.daemon.ws_url, last=10, control="1") as reader:
        greeting, message = await received(reader, 2)

    assert (greeting["epoch"], message["offset"]) == (NEW, 1)
    assert stale.subscribers == 0
