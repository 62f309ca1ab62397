"""Several topics and patterns in one subscription, with a server that does what each test says.

Real daemons, killed and cut, are test_client_e2e.py's; one topic is test_client.py's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from daemons import until
from fake_server import (
    FakePause,
    FakeServer,
    Feed,
    failure,
    gap,
    message,
    refusal,
    subscribed,
    watching,
)

from clevrd.client import BadAnswer, Client, Gap, Message, Position, Refused, Subscription
from clevrd.client import many_topics as many_topics_module
from clevrd.client.feeds import feed_of
from clevrd.client.many_topics import ManyTopics
from clevrd.client.one_topic import OneTopic
from clevrd.client.positions import MAX_MATCHED, Trackers
from clevrd.client.session import Session

AT = Position("e", 4)


def feed(*frames: bytes, code: int | None = None, commands: int = 2, **options: Any) -> Feed:
    """Return what a connection to /ws gets once it has sent its commands."""
    return Feed(frames, code, has_control=True, commands=commands, **options)


async def next_items(items: Subscription, count: int) -> list[Message | Gap]:
    """Return the next ``count`` items, which are to come soon."""
    async with asyncio.timeout(5):
        return [await anext(items) for _ in range(count)]


async def take(items: Subscription, count: int) -> list[tuple[str, int] | Gap]:
    """Return the gaps, and topic and offset of messages, up to the ``count``-th message."""
    taken: list[tuple[str, int] | Gap] = []
    while count:
        (item,) = await next_items(items, 1)
        taken.append((item.topic, item.offset) if isinstance(item, Message) else item)
        count -= isinstance(item, Message)
    return taken


def greet(topics: str, offset: int = 0, **options: Any) -> list[bytes]:
    """Return the answers to commands for these topics, of one letter each."""
    return [
        subscribed("e", offset, topic=topic, ref=ref, **options)
        for ref, topic in enumerate(topics, start=1)
    ]


# --- what is asked for ---


async def test_topics_and_patterns_share_one_connection(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A command for each, with all options; topics first, whose names a pattern may match."""
    server.feeds.append(feed(*greet("a"), watching("a.*", 3), *greet(" b")[1:], commands=3))
    options: dict[str, Any] = {
        "policy": "drop_newest",
        "buffer": 7,
        "subscriber_id": "ann",
        "headers": True,
        "last": 0,
    }

    async with (
        new_client() as client,
        client.subscribe("a", "b", patterns=["a.*"], **options) as items,
    ):
        is_connected = items.is_connected

    (request,) = server.requests
    assert (request.path, dict(request.query), is_connected) == ("/ws", {}, True)
    assert server.commands == [
        [
            {"type": "subscribe", "ref": 1, "topic": "a", **options},
            {"type": "subscribe", "ref": 2, "topic": "b", **options},
            {"type": "subscribe", "ref": 3, "pattern": "a.*", **options},
        ]
    ]


async def test_one_topic_needs_no_commands(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """It works with servers that only know /subscribe, by keyword and with its position too."""
    async with new_client() as client:
        async with client.subscribe("t"), client.subscribe(topic="t"):
            pass
        async with client.subscribe("t", positions={"t": AT, "other": AT}):
            pass

    assert {request.path for request in server.requests} == {"/subscribe"}
    assert [dict(request.query) for request in server.requests] == [
        {"topic": "t"},
        {"topic": "t"},
        {"topic": "t", "epoch": "e", "offset": "4"},
    ]


@pytest.mark.parametrize(
    ("topics", "options", "words"),
    [
        ([], {}, "Name a topic or a pattern"),
        (["a", "b", "a"], {}, "topic 'a' is named twice"),
        (["a"], {"patterns": ["b.*", "b.*"]}, "pattern 'b.*' is named twice"),
        (["a"], {"patterns": "b.*"}, "patterns is a list"),
        (["a", "b"], {"position": AT}, "position is for one topic"),
        (["a"], {"patterns": ["b.*"], "position": AT}, "position is for one topic"),
        (["a"], {"position": AT, "last": 0}, "give one of them"),
        (["a"], {"positions": {}, "last": 0}, "give one of them"),
        (["a", "b"], {"positions": {"a": AT}, "since": "5m"}, "give one of them"),
        (["a"], {"positions": {"a": AT}, "position": AT}, "give one of them"),
    ],
)
def test_what_can_not_be_meant_is_refused_in_words(
    topics: list[str], options: dict[str, Any], words: str
) -> None:
    """Before anything is connected, so that it is found at the line where it stands."""
    client = Client("http://127.0.0.1:1")

    with pytest.raises(ValueError, match=words.replace("*", r"\*")):
        client.subscribe(*topics, **options)


def test_pattern_alone_is_several() -> None:
    """It can bring any number of topics, and only commands can resume it."""
    warned: list[str] = []

    assert isinstance(feed_of(["a"], [], {}, None, None, warned.extend), OneTopic)
    assert isinstance(feed_of([], ["a.*"], {}, None, None, warned.extend), ManyTopics)
    assert isinstance(feed_of(["a"], ["a.*"], {}, None, None, warned.extend), ManyTopics)


# --- positions ---


async def test_positions_cover_what_was_handed_out_by_topic(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """As of each item; a gap moves its topic only once it was handed out. Stored, they resume."""
    server.feeds.append(
        feed(
            *greet("a", 4, is_recovered=False),
            gap(1, 6, "retention", "a"),
            *(subscribed("f", 9, topic="b", ref=2), message(7, topic="a"), message(10, topic="b")),
        )
    )
    server.feeds.append(feed(*greet("ab")))
    begun = {"a": Position("e", 0), "b": Position("f", 9)}

    async with new_client() as client:
        async with client.subscribe("a", "b", positions=begun) as items:
            stored = [items.positions]
            for _ in range(3):
                await next_items(items, 1)
                stored.append(items.positions)
            only = items.position
        async with client.subscribe("a", "b", positions=stored[2]):
            pass

    assert [(each["a"].offset, each["b"].offset) for each in stored] == [
        *((0, 9), (6, 9), (7, 9), (7, 10))
    ]
    assert only is None
    assert [(each["epoch"], each["offset"]) for each in server.commands[1]] == [("e", 7), ("f", 9)]


async def test_each_topic_comes_back_to_its_own_place(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Those never greeted begin as they were to; a pattern knows all that came by it."""
    first = [*greet("a"), watching("p.*", 3), subscribed("g", 2, topic="p.x", pattern="p.*")]
    first += [message(1, topic="a"), message(3, topic="p.x")]
    server.feeds.append(feed(*first, code=0, commands=3))
    then = [*greet("ab", 1), watching("p.*", 3), message(2, topic="b")]
    server.feeds.append(feed(*then, commands=3))

    async with new_client() as client:
        items = client.subscribe("a", "b", patterns=["p.*"], last=5)
        taken = await take(items, 3)
        await items.aclose()

    assert taken == [("a", 1), ("p.x", 3), ("b", 2)]
    assert server.commands[1] == [
        {"type": "subscribe", "ref": 1, "topic": "a", "epoch": "e", "offset": 1},
        {"type": "subscribe", "ref": 2, "topic": "b", "last": 5},
        {
            **{"type": "subscribe", "ref": 3, "pattern": "p.*"},
            "positions": {"p.x": {"epoch": "g", "offset": 3}},
        },
    ]


async def test_topic_made_while_away_is_read_from_its_start(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A pattern that had brought nothing yet resumes all the same, with no topic known."""
    server.feeds.extend([feed(watching("p.*", 1), code=0, commands=1)])
    server.feeds.append(
        feed(
            *(watching("p.*", 1), subscribed("e", 0, topic="p.x", pattern="p.*")),
            message(1, topic="p.x"),
            commands=1,
        )
    )

    async with new_client() as client, client.subscribe(patterns=["p.*"], last=0) as items:
        taken = await take(items, 1)

    assert taken == [("p.x", 1)]
    assert [each[0].get("positions") for each in server.commands] == [None, {}]


async def test_cut_before_all_was_found_goes_on_with_what_was(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Topics that had begun resume, the others begin as they were asked to."""
    known = [subscribed("e", 3, topic="p.x", pattern="p.*"), message(4, topic="p.x")]
    server.feeds.append(feed(*known, code=0, commands=1))
    server.feeds.append(feed(watching("p.*", 1), message(5, topic="p.x"), commands=1))

    async with new_client() as client:
        items = client.subscribe(patterns=["p.*"], last=0)
        taken = await take(items, 2)
        await items.aclose()

    begins = {"type": "subscribe", "ref": 1, "pattern": "p.*", "last": 0}
    assert taken == [("p.x", 4), ("p.x", 5)]
    assert [each[0] for each in server.commands] == [
        begins,
        {**begins, "positions": {"p.x": {"epoch": "e", "offset": 4}}},
    ]


async def test_forgotten_topic_is_none_to_come_back_to(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """All of it was had, so who follows short-lived topics for days knows only a few."""
    gone = b'{"type":"forgotten","topic":"p.x","epoch":"e","offset":1}'
    begun = [watching("p.*", 1), subscribed("e", 0, topic="p.x", pattern="p.*")]
    server.feeds.append(feed(*begun, message(1, topic="p.x"), gone, code=0, commands=1))
    server.feeds.append(
        feed(
            *(watching("p.*", 1), subscribed("f", 0, topic="p.x", pattern="p.*")),
            message(1, topic="p.x"),
            commands=1,
        )
    )

    async with new_client() as client, client.subscribe(patterns=["p.*"]) as items:
        taken = await take(items, 2)

    assert taken == [("p.x", 1), ("p.x", 1)]
    assert server.commands[1][0]["positions"] == {}


async def test_new_topic_that_lost_something_is_told_though_it_is_cut_before_the_gap(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """What began after all was found begins with a gap where it is not whole."""
    begins = subscribed("e", 9, is_recovered=False, topic="p.x", pattern="p.*")
    server.feeds.append(feed(watching("p.*", 1), begins, code=0, commands=1))
    server.feeds.append(feed(watching("p.*", 1), begins, gap(1, 9, "retention", "p.x"), commands=1))

    async with new_client() as client, client.subscribe(patterns=["p.*"]) as items:
        (told,) = await next_items(items, 1)

    assert isinstance(told, Gap)
    assert (told.first, told.last) == (1, 9)
    assert server.commands[1][0]["positions"] == {}


async def test_new_life_of_a_topic_moves_its_position(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A pattern brings it back with a new epoch, whose offsets begin again."""
    server.feeds.append(
        feed(
            *(watching("p.*", 1), subscribed("old", 40, topic="p.x", pattern="p.*")),
            message(41, topic="p.x"),
            *(subscribed("new", 0, topic="p.x", pattern="p.*"), message(1, topic="p.x")),
            commands=1,
        )
    )

    async with new_client() as client, client.subscribe(patterns=["p.*"]) as items:
        taken = await next_items(items, 2)
        positions = items.positions

    assert [(each.offset, each.epoch) for each in taken if isinstance(each, Message)] == [
        (41, "old"),
        (1, "new"),
    ]
    assert positions == {"p.x": Position("new", 1)}


async def test_new_life_that_was_read_before_the_last_greeting_keeps_its_place(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Messages of the old life that are held come first, with their own epoch and none missing."""
    server.feeds.append(
        feed(
            *(watching("p.*", 1), subscribed("old", 0, topic="p.x", pattern="p.*")),
            *(message(1, topic="p.x"), message(2, topic="p.x")),
            *(subscribed("new", 0, topic="p.x", pattern="p.*"), message(1, topic="p.x")),
            watching("q.*", 2),
        )
    )

    async with new_client() as client, client.subscribe(patterns=["p.*", "q.*"]) as items:
        taken = await next_items(items, 3)

    assert [(each.offset, each.epoch) for each in taken if isinstance(each, Message)] == [
        *((1, "old"), (2, "old"), (1, "new"))
    ]


async def test_gap_of_one_topic_is_asked_for_again_until_it_was_told(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A cut between greeting and gap has moved nothing, with a new epoch and a new topic too."""
    greetings = [
        watching("p.*", 1),
        *(
            subscribed("new", 9, topic=name, is_recovered=False, pattern="p.*")
            for name in ("p.x", "p.y")
        ),
    ]
    gaps = [gap(None, None, "epoch", "p.x"), gap(1, 9, "retention", "p.y")]
    server.feeds.append(feed(*greetings, code=0, commands=1))
    server.feeds.append(feed(*greetings, *gaps, message(10, topic="p.y"), commands=1))
    begun = {"p.x": Position("old", 5)}

    async with new_client() as client, client.subscribe(patterns=["p.*"], positions=begun) as items:
        taken = await take(items, 1)
        positions = items.positions

    assert taken == [
        Gap("p.x", reason="epoch"),
        Gap("p.y", 1, 9, 9, "retention"),
        ("p.y", 10),
    ]
    assert server.commands[1][0]["positions"] == {"p.x": {"epoch": "old", "offset": 5}}
    assert positions == {"p.x": Position("new", 9), "p.y": Position("new", 10)}


async def test_message_that_comes_again_is_left_out(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """In its own topic: the same offset in another one is another message."""
    frames = [message(n, topic=topic) for n, topic in [(5, "a"), (5, "b"), (5, "a"), (6, "a")]]
    server.feeds.append(feed(*greet("ab", 4), *frames))

    async with new_client() as client, client.subscribe("a", "b") as items:
        taken = await take(items, 3)

    assert taken == [("a", 5), ("b", 5), ("a", 6)]


def test_positions_of_topics_that_came_by_patterns_are_bounded() -> None:
    """Those longest not heard of go; topics that were named stay."""
    trackers = Trackers(["named"], ["p.*"], {"named": AT, "p.0": AT, "p.1": AT})

    trackers.heard_of("p.0")
    for number in range(2, MAX_MATCHED + 1):
        trackers.heard_of(f"p.{number}")

    assert list(trackers.positions()) == ["named", "p.0"]


def test_pattern_resumes_with_what_came_by_another_one() -> None:
    """The server lets either bring a topic that both match."""
    known = {"p.x": AT, "p.x.y": AT, "q.x": AT, "gone": AT}
    trackers = Trackers(["a"], ["p.**", "p.*", "q.*"], known)

    matching = [list(trackers.matching(pattern)) for pattern in ("p.**", "p.*", "q.*")]

    assert matching == [["p.x", "p.x.y"], ["p.x"], ["q.x"]]
    assert "gone" not in trackers.positions()


async def test_pattern_that_was_not_answered_skips_nothing_of_what_another_brought(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """It could bring the topic next time, and would begin it at the last messages."""
    cut_short = [watching("p.*", 1), subscribed("e", 4, topic="p.x", pattern="p.*")]
    server.feeds.append(feed(*cut_short, code=0))
    server.feeds.append(feed(watching("p.*", 1), watching("p.**", 2)))

    async with new_client() as client, client.subscribe(patterns=["p.*", "p.**"], last=1):
        pass

    positions = {"p.x": {"epoch": "e", "offset": 4}}
    assert [each.get("positions") for each in server.commands[1]] == [positions, positions]


# --- the greeting ---


async def test_block_is_entered_when_all_is_subscribed(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """What comes before the last answer is handed out afterwards, in its order."""
    held = asyncio.Event()
    messages = [message(n, topic="a") for n in (1, 2)]
    last = subscribed("e", 7, topic="b", ref=2)
    server.feeds.append(feed(*greet("a"), *messages, then=held, last_frame=last))

    async with new_client() as client:
        items = client.subscribe("a", "b")
        entering = asyncio.ensure_future(items.__aenter__())
        await until(lambda: bool(items.positions))
        was_entered = entering.done()
        held.set()
        await entering
        positions = items.positions
        taken = await take(items, 2)
        await items.aclose()

    assert not was_entered
    assert positions == {"a": Position("e", 0), "b": Position("e", 7)}
    assert taken == [("a", 1), ("a", 2)]


async def test_connection_that_is_cut_before_all_is_subscribed_has_brought_something(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Or a backlog that no connection outlives would be asked for again for ever."""
    lost = gap(2, 4, "slow_consumer", "a")
    server.feeds.append(feed(*greet("a"), message(1, topic="a"), lost, code=0))
    server.feeds.append(feed(*greet("a", 4), message(5, topic="a"), code=0))
    server.feeds.append(feed(*greet("ab", 5), message(6, topic="a")))

    stored = []
    async with new_client() as client, client.subscribe("a", "b", since="all") as items:
        stored.append(items.positions)
        taken: list[Message | Gap] = []
        for _ in range(4):
            taken += await next_items(items, 1)
            stored.append(items.positions)

    assert [each.get("offset") for commands in server.commands for each in commands[:1]] == [
        *(None, 4, 5)
    ]
    assert [each.offset if isinstance(each, Message) else each.count for each in taken] == [
        *(1, 3, 5, 6)
    ]
    assert [each["a"].offset for each in stored] == [0, 1, 4, 5, 6]


async def test_what_is_held_is_bounded(
    server: FakeServer, new_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large backlog of the first topic is taken before the last one is answered."""
    monkeypatch.setattr(many_topics_module, "MAX_HELD_BYTES", 100)
    held = asyncio.Event()
    backlog = [message(n, topic="a") for n in range(1, 100)]
    last = subscribed("e", 7, topic="b", ref=2)
    server.feeds.append(feed(*greet("a"), *backlog, then=held, last_frame=last))

    async with new_client() as client, client.subscribe("a", "b") as items:
        was_connected = items.is_connected
        taken = await take(items, 99)
        held.set()
        waiting = asyncio.ensure_future(anext(items))
        await until(lambda: items.is_connected)
        waiting.cancel()
        positions = items.positions

    assert not was_connected
    assert taken == [("a", n) for n in range(1, 100)]
    assert positions["b"] == Position("e", 7)


async def test_entering_that_is_cancelled_loses_nothing(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """What was held by then is handed out to who asks next; the connection is not kept for it."""
    held = asyncio.Event()
    server.feeds.append(feed(*greet("a"), message(1, topic="a")))
    server.feeds.append(
        feed(*greet("ab", 1), then=held, last_frame=message(2, topic="a")),
    )

    async with new_client() as client:
        items = client.subscribe("a", "b")
        entering = asyncio.ensure_future(items.__aenter__())
        await until(lambda: bool(items.positions))
        entering.cancel()
        await asyncio.wait((entering,))
        await asyncio.wait_for(server.left.wait(), 5)
        first = await take(items, 1)
        waiting = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait((waiting,))
        held.set()
        second = await take(items, 1)
        await items.aclose()

    assert (first, second) == ([("a", 1)], [("a", 2)])
    assert server.commands[1][0] == {
        **{"type": "subscribe", "ref": 1, "topic": "a", "epoch": "e", "offset": 1},
    }


# --- what goes wrong ---


@pytest.mark.parametrize("fields", [{"ref": 2}, {}, {"ref": "not ours"}])
async def test_refused_command_is_final_and_told_in_the_servers_words(
    fields: dict[str, Any],
    server: FakeServer,
    new_client: Callable[..., Client],
    pause: FakePause,
) -> None:
    """Without a ref it is a topic that is left out, which nobody would notice otherwise."""
    server.feeds.append(feed(*greet("a"), failure("Too many topics.", **fields)))

    with pytest.raises(Refused, match="Too many topics") as caught:
        async with asyncio.timeout(5), new_client() as client, client.subscribe("a", "b"):
            pass

    assert (caught.value.code, pause.slept_s) == ("x", [])


async def test_topic_that_is_left_out_later_is_told_behind_what_came_before(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """The items before it are handed out, and then nothing more."""
    server.feeds.append(feed(*greet("ab"), message(1, topic="a"), failure("Too many topics.")))

    async with new_client() as client, client.subscribe("a", "b") as items:
        taken = await take(items, 1)
        with pytest.raises(Refused, match="Too many topics"):
            await anext(items)
        rest = await anext(items, None)

    assert (taken, rest) == ([("a", 1)], None)


async def test_command_that_is_refused_for_the_moment_is_sent_again(
    server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """With a new connection, after the backoff, as a busy server is."""
    server.feeds.append(Feed(refusal=refusal(503, "Not yet.")))
    server.feeds.append(feed(*greet("a"), failure("Draining.", is_retryable=True, ref=2)))
    server.feeds.append(feed(*greet("ab"), message(1, topic="b")))

    async with new_client() as client, client.subscribe("a", "b") as items:
        taken = await take(items, 1)

    assert (taken, pause.slept_s) == ([("b", 1)], [0.125, 0.25])


async def test_server_that_goes_away_says_when_to_return(
    server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """As it does to who reads one topic."""
    away = b'{"type":"going_away","reconnect_after_ms":1500,"positions":{}}'
    server.feeds.append(feed(*greet("ab"), away, code=1012))
    server.feeds.append(feed(*greet("ab"), message(1, topic="a")))

    async with new_client() as client, client.subscribe("a", "b") as items:
        await take(items, 1)

    assert pause.slept_s == [1.625]


async def test_server_without_commands_is_told_apart(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Commands that nobody understands would be waited for in vain."""
    server.feeds.append(Feed())

    with pytest.raises(BadAnswer, match=r"does not speak clevrd\.v1"):
        async with asyncio.timeout(5), new_client() as client, client.subscribe("a", "b"):
            pass


@pytest.mark.parametrize("frame", [b"hello", b'{"type":"subscribed","topic":5}', b'{"id":5}'])
async def test_frame_that_is_no_message_ends_the_subscription(
    frame: bytes, server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """While all is being subscribed, and afterwards."""
    server.feeds.extend([feed(frame), feed(*greet("ab"), frame)])

    async with new_client() as client:
        with pytest.raises(BadAnswer, match="not a message"):
            await client.subscribe("a", "b").__aenter__()
        async with client.subscribe("a", "b") as items:
            with pytest.raises(BadAnswer, match="not a message"):
                await anext(items)


class StuckSocket:
    """A WebSocket whose other side reads nothing."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()
        self.is_closed = False

    async def send_frame(self, *_: object) -> None:
        """Wait for the other side."""
        self.has_begun.set()
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Be closed."""
        self.is_closed = True


async def test_commands_do_not_hold_up_who_reads_and_end_with_their_connection() -> None:
    """A server that waits for its messages to be read does not read commands meanwhile."""
    session = Session("http://127.0.0.1:1", None, None, None)
    socket: Any = StuckSocket()

    session.send_aside(socket, [b"1"])
    await socket.has_begun.wait()
    (task,) = session._sending.values()
    await session.drop(socket)
    await asyncio.wait((task,), timeout=5)

    assert task.cancelled()
    assert socket.is_closed
    assert session._sending == {}
