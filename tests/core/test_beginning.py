"""Positions over a real socket: the greeting, every way to resume, gaps at their place, refusals.

What holds over random schedules is in test_positions_model.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from clients import (
    SMALL_BUFFERS,
    client_of,
    publishing,
    raw_subscriber,
    read_to_the_end,
    subscribe,
    upgrade_request,
)
from daemons import Daemon, running, until
from fakes import FakeSink, TopicDriver, frame_of, frames_in, make_topic
from http_wire import get, responses, talk
from streams import EVENTS, LINES, open_stream
from websockets.asyncio.client import ClientConnection

from clevrd.client import Client, Gap
from clevrd.core.beginning import After, Last, ResolvedBeginning, Since, resolve
from clevrd.core.gap_log import GapLog
from clevrd.core.message import PublishRequest, id_at, rfc3339
from clevrd.core.notices import RETENTION, SLOW_CONSUMER, GapReason, notice_frame
from clevrd.core.notices import Gap as GapFrame
from clevrd.core.subscriber import DropStrategy, Subscriber
from clevrd.hub import Published
from clevrd.tenants import Tenant

TENANT = Tenant("default-tenant")


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """Return a daemon with a small ring, on both ways in."""
    async with running(
        raw_paths=request.param, ring_messages=100, catch_up_messages=50, **SMALL_BUFFERS
    ) as started:
        yield started


async def fill(daemon: Daemon, count: int, data: bytes = b"1") -> str:
    """Publish ``count`` messages to topic t and return its epoch."""
    async with publishing(daemon.port) as publisher:
        await publisher.send("t", count, data)
    return daemon.hub.topic(TENANT, "t").epoch


async def take(reader: ClientConnection, count: int) -> list[dict[str, Any]]:
    """Return the next ``count`` frames."""
    return [json.loads(await reader.recv()) for _ in range(count)]


def gap(first: int | None, last: int | None, count: int | None, reason: str) -> dict[str, Any]:
    """Return a gap of topic t as it is sent."""
    return {
        "type": "gap", "topic": "t", "from": first, "to": last, "count": count, "reason": reason
    }  # fmt: skip


# --- who is told ---------------------------------------------------------------------------------


async def test_greeting_comes_before_any_message(daemon: Daemon) -> None:
    """Who asks learns the position it begins at, and its window."""
    epoch = await fill(daemon, 3)

    async with subscribe(daemon.ws_url, control=1, last=2, buffer=7) as reader:
        greeting, second, third = await take(reader, 3)

    assert greeting == {
        "type": "subscribed", "topic": "t", "epoch": epoch, "offset": 1, "recovered": False,
        "window": 7,
    }  # fmt: skip
    assert [second["offset"], third["offset"]] == [2, 3]


async def test_subprotocol_asks_for_control_and_is_echoed(daemon: Daemon) -> None:
    """RFC 6455 §4.2.2: what is chosen is named in the 101."""
    async with client_of(
        f"{daemon.ws_url}/subscribe?topic=t", subprotocols=["other", "clevrd.v1"]
    ) as reader:
        (greeting,) = await take(reader, 1)

    assert reader.subprotocol == "clevrd.v1"
    assert greeting["type"] == "subscribed"


@pytest.mark.parametrize("query", ["topic=t", "topic=t&control=0"])
async def test_who_did_not_ask_gets_messages_only(daemon: Daemon, query: str) -> None:
    """A client of the older API works unchanged, whatever other subprotocols it offers."""
    await fill(daemon, 1)
    head = upgrade_request(query, sec_websocket_protocol="clevrd.v2, x")

    answer = await daemon.send_raw(head + b"\x88\x80\x00\x00\x00\x00")

    assert b"sec-websocket-protocol" not in answer.partition(b"\r\n\r\n")[0].lower()
    first = frames_in(answer.partition(b"\r\n\r\n")[2])[0]
    assert json.loads(bytes(first.data))["offset"] == 1


async def test_control_frames_are_not_counted(daemon: Daemon) -> None:
    """The greeting and gaps are no messages."""
    await fill(daemon, 150)

    async with subscribe(daemon.ws_url, control=1, since="all") as reader:
        await take(reader, 102)
        metrics = await daemon.get_json("/metrics")

    assert metrics["messages"]["delivered"] == 100


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["offset", "last_event_id", "lastEventId", "header"])
async def test_position_resumes_behind_it(daemon: Daemon, form: str) -> None:
    """A resume is whole: the first message is the one after the position."""
    epoch = await fill(daemon, 90)
    options = {
        "offset": {"offset": 7, "epoch": epoch},
        "header": {},
    }.get(form, {form: f"{epoch}:7"})
    headers = {"Last-Event-ID": f"{epoch}:7"} if form == "header" else {}
    query = "&".join(["topic=t&control=1", *(f"{name}={v}" for name, v in options.items())])

    async with client_of(
        f"{daemon.ws_url}/subscribe?{query}", additional_headers=headers
    ) as reader:
        greeting, *messages = await take(reader, 84)

    assert (greeting["recovered"], greeting["offset"]) == (True, 7)
    assert [message["offset"] for message in messages] == list(range(8, 91))


async def test_resume_that_the_ring_cannot_fill_says_what_is_missing(daemon: Daemon) -> None:
    """Never partial and silent: the gap stands before what follows it."""
    epoch = await fill(daemon, 150)

    async with subscribe(daemon.ws_url, control=1, offset=20, epoch=epoch) as reader:
        greeting, missing, first = await take(reader, 3)

    assert (greeting["recovered"], greeting["offset"]) == (False, 20)
    assert missing == gap(21, 50, 30, "retention")
    assert first["offset"] == 51


async def test_position_of_another_epoch_gets_what_there_is(daemon: Daemon) -> None:
    """What lies between two lives of a topic nobody can count."""
    await fill(daemon, 2)

    async with subscribe(daemon.ws_url, control=1, offset=900, epoch="before") as reader:
        greeting, missing, *messages = await take(reader, 4)

    assert greeting["recovered"] is False
    assert missing == gap(None, None, None, "epoch")
    assert [message["offset"] for message in messages] == [1, 2]


async def test_position_at_the_head_waits_for_what_comes(daemon: Daemon) -> None:
    """Who has everything gets nothing twice."""
    epoch = await fill(daemon, 5)

    async with subscribe(daemon.ws_url, control=1, offset=5, epoch=epoch) as reader:
        await take(reader, 1)
        await fill(daemon, 1)
        (message,) = await take(reader, 1)

    assert message["offset"] == 6


async def test_position_of_this_very_turn_is_not_given_twice(daemon: Daemon) -> None:
    """A publish answer's offset can be resumed from before its message was offered."""
    hub = daemon.hub
    topic = hub.topic(TENANT, "t")
    async with subscribe(daemon.ws_url):
        published = hub.publish(topic, PublishRequest("t", msgspec.Raw(b"1")))
        assert isinstance(published, Published)
        sink = FakeSink()
        hub.subscribe(topic, Subscriber(sink), After(published.offset, published.epoch))
        hub.publish(topic, PublishRequest("t", msgspec.Raw(b"2")))
        await until(lambda: sink.writes)

    (frame,) = frames_in(sink.received)
    assert json.loads(bytes(frame.data))["offset"] == 2


async def test_resumed_backlog_is_not_cut_to_the_window(daemon: Daemon) -> None:
    """What a resume asks for may be more than the window, as catch-up may."""
    epoch = await fill(daemon, 90)

    async with subscribe(daemon.ws_url, offset=0, epoch=epoch, buffer=1) as reader:
        messages = await take(reader, 90)

    assert [message["offset"] for message in messages] == list(range(1, 91))


# --- since ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["id", "rfc3339", "offset time", "unix", "duration", "all"])
async def test_since_takes_every_form(form: str) -> None:
    """A duration, a time in two spellings, a message id, and all."""
    start_us = 1_800_000_000_000_000
    wall_us = start_us
    async with running() as daemon:
        daemon.hub._stamping._wall_ns = lambda: wall_us * 1000
        hub = daemon.hub
        topic = hub.topic(TENANT, "t")
        for _ in range(10):
            wall_us += 1_000_000
            hub.publish(topic, PublishRequest("t", msgspec.Raw(b"1")))
        fourth = rfc3339(start_us + 4_000_000)
        since, expected = {
            "id": (id_at(start_us + 4_000_000), 5),
            "rfc3339": (fourth, 4),
            "offset time": (fourth.replace("Z", "+00:00"), 4),
            "unix": ("1800000003.5", 4),
            "duration": ("6s", 4),
            "all": ("all", 1),
        }[form]

        async with subscribe(daemon.ws_url, control=1, since=since) as reader:
            greeting, first = await take(reader, 2)

    assert (greeting["recovered"], greeting["offset"]) == (True, expected - 1)
    assert first["offset"] == expected


def test_since_before_what_the_ring_has_is_told() -> None:
    """Whether what was evicted was wished for is unknown, so it is said."""
    topic = make_topic(ring_messages=4)
    for offset in range(1, 11):
        topic.extend(offset, [b'\x81\x7f........{"id":"%b"}' % id_at(offset).encode()], 0.0)

    starts = [resolve(topic, Since(id_at(wall_us), is_time=True)) for wall_us in (3, 7, 8, 99)]

    assert [start.after for start in starts] == [6, 6, 7, 10]
    assert [start.is_recovered for start in starts] == [False, False, True, True]
    assert starts[0].gap is not None
    assert (starts[0].gap.first, starts[0].gap.last, starts[0].gap.count) == (None, 6, None)


def test_since_before_the_topic_was_made_is_told() -> None:
    """An earlier life of the topic may have had more."""
    topic = make_topic()
    topic.created_at = rfc3339(1_000_000)

    start = resolve(topic, Since(id_at(999_999), is_time=True))

    assert start.gap is not None
    assert start.gap.reason == "epoch"
    assert resolve(topic, Since(id_at(1_000_000), is_time=True)) == ResolvedBeginning(
        0, is_recovered=True
    )
    assert resolve(topic, Last(5)) == ResolvedBeginning(0)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("offset=1", "give both"),
        ("epoch=e", "give both"),
        ("offset=1&epoch=", "as you received it"),
        ("offset=-1&epoch=e", "as you received it"),
        ("offset=1e3&epoch=e", "as you received it"),
        ("offset=" + "9" * 5_000 + "&epoch=e", "as you received it"),
        ("offset=1&epoch=e%20e", "as you received it"),
        ("offset=1&offset=2&epoch=e", "given 2 times"),
        ("offset=1&epoch=e&since=1h", "give one of them"),
        ("since=1h&last_event_id=e:1", "give one of them"),
        ("last_event_id=e:1&lastEventId=e:1", "give one of them"),
        ("offset=1&epoch=e&last=5", "leave it out to resume"),
        ("since=all&last=5", "leave it out to resume"),
        ("epoch=e&last_event_id=e:1", "give both"),
        ("last_event_id=%20", "must be epoch:offset"),
        ("last_event_id=e", "must be epoch:offset"),
        ("last_event_id=e:", "must be epoch:offset"),
        ("last_event_id=:1", "must be epoch:offset"),
        ("last_event_id=e:x", "must be epoch:offset"),
        ("since=", "since must be a duration"),
        ("since=yesterday", "since must be a duration"),
        ("since=5x", "since must be a duration"),
        ("since=-5m", "since must be a duration"),
        ("since=2026-13-01T00:00:00Z", "since must be a duration"),
        ("since=2026-01-01T00:00:00", "since must be a duration"),
        ("since=msg-1", "since must be a duration"),
        ("since=" + "9" * 5_000, "since must be a duration"),
        ("control=2", "control must be 1"),
    ],
)  # fmt: skip
async def test_bad_position_is_refused_with_what_to_do(
    daemon: Daemon, query: str, words: str
) -> None:
    """A clear 400 before the 101, and no subscriber."""
    answer = await daemon.send_raw(upgrade_request(f"topic=t&{query}", connection="Upgrade, close"))

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert words in json.loads(body)["error"]
    assert daemon.hub.subscribers == 0


@pytest.mark.parametrize("transport", ["socket", "lines", "events", "poll"])
@pytest.mark.parametrize(
    "empty",
    [
        "last_event_id=",
        "lastEventId=",
        "last_event_id=&lastEventId=",
        "last=2&lastEventId=",
        "Last-Event-ID:",
        "Last-Event-ID: \t",
    ],
)
async def test_empty_event_id_is_none(daemon: Daemon, transport: str, empty: str) -> None:
    """As an EventSource has it that has read no id: it begins as if nothing were said."""
    await fill(daemon, 2)
    fields = [empty] if ":" in empty else []
    query = "topic=t&control=1" if fields else f"topic=t&control=1&{empty}"

    if transport == "socket":
        headers = {"Last-Event-ID": ""} if fields else {}
        url = f"{daemon.url}/subscribe?{query}"
        async with daemon.http.ws_connect(url, headers=headers) as socket:
            found = [json.loads((await socket.receive()).data) for _ in range(3)][1:]
    elif transport == "poll":
        request = get(f"/subscribe?{query}&poll=1", *fields)
        (answer,) = responses(await talk(daemon.port, [request], shut=True))
        found = answer.json["messages"]
        assert answer.json["recovered"] is False
    else:
        accept = EVENTS if transport == "events" else LINES
        async with await open_stream(daemon.port, accept, query, *fields) as stream:
            found = [item.json for item in (await stream.items(3))[1:]]

    assert [each["offset"] for each in found] == [1, 2]


async def test_empty_header_leaves_it_to_the_url(daemon: Daemon) -> None:
    """None in one place is no answer to what another place says."""
    epoch = await fill(daemon, 3)
    query = f"topic=t&lastEventId={epoch}:2"

    async with await open_stream(daemon.port, EVENTS, query, "Last-Event-ID:") as stream:
        greeting, message = await stream.items(2)

    assert greeting.json["recovered"] is True
    assert message.json["offset"] == 3


async def test_offset_ahead_of_the_head_is_refused(daemon: Daemon) -> None:
    """Nobody can have received what is not there; the sentence says what is."""
    epoch = await fill(daemon, 5)
    request = upgrade_request(f"topic=t&offset=6&epoch={epoch}", connection="Upgrade, close")

    answer = await daemon.send_raw(request)

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert f"ahead of the topic, whose newest message in epoch {epoch} is 5".encode() in answer


@pytest.mark.parametrize("since", ["9999999999", "999999999d", "253402300800", "999999999999"])
async def test_times_beyond_reason_are_no_crash(daemon: Daemon, since: str) -> None:
    """The far past is everything, the far future is nothing yet."""
    await fill(daemon, 1)

    async with subscribe(daemon.ws_url, control=1, since=since) as reader:
        (greeting,) = await take(reader, 1)

    assert greeting["type"] == "subscribed"


# --- gaps while connected ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "circuit_breaker", "latest"])
async def test_stalled_reader_is_told_what_it_lost(daemon: Daemon, policy: str) -> None:
    """Gaps stand exactly where messages are missing, and account for all of them."""
    topic = daemon.hub.topic(TENANT, "t")
    sink = FakeSink()
    reader = Subscriber(sink, DropStrategy(policy), 5, GapLog("t"))
    daemon.hub.subscribe(topic, reader, Last(0))

    daemon.hub.paused(topic, reader)
    await fill(daemon, 30)
    daemon.hub.resumed(topic, reader)
    before = [json.loads(bytes(frame.data)) for frame in frames_in(sink.received)][1:]
    await fill(daemon, 1)

    after = [json.loads(bytes(frame.data)) for frame in frames_in(sink.received)][1:]
    if policy == "drop_oldest":
        assert before[0] == gap(1, 25, 25, "slow_consumer")
        assert [frame["offset"] for frame in after[1:]] == [26, 27, 28, 29, 30, 31]
    elif policy == "latest":
        assert before[0] == gap(1, 29, 29, "slow_consumer")
        assert [frame["offset"] for frame in after[1:]] == [30, 31]
    else:
        # What was lost last is told with the message that follows it, not before there is one.
        assert [frame["offset"] for frame in before] == [1, 2, 3, 4, 5]
        assert after[5] == gap(6, 30, 25, "slow_consumer")
        assert after[6]["offset"] == 31


async def test_stalled_connection_is_told_what_it_lost(daemon: Daemon) -> None:
    """Over a real socket, from the first message to the last, nothing is missing untold."""
    query = "topic=t&control=1&buffer=5&last=0"
    async with await raw_subscriber(daemon.port, query, receive_bytes=4096) as stalled:
        await fill(daemon, 500, b'"%b"' % (b"x" * 500))
        position = (await stalled.message())["offset"]
        gaps = 0
        while position < 500:
            frame = await stalled.message()
            assert frame.get("from", frame.get("offset")) == position + 1
            position = frame.get("to", frame.get("offset"))
            gaps += "type" in frame

    assert gaps >= 1


async def test_planned_close_gives_the_position_and_when_to_return() -> None:
    """Who asked learns what it has and when to come back; a plain client gets the close alone."""
    async with running() as daemon:
        epoch = await fill(daemon, 3)
        async with (
            subscribe(daemon.ws_url, control=1) as told,
            subscribe(daemon.ws_url) as plain,
        ):
            await until(lambda: daemon.hub.subscribers == 2)
            stopping = asyncio.create_task(daemon.server.stop())
            frames = await take(told, 5)
            ending = await read_to_the_end(plain)
            last = await read_to_the_end(told)
            await stopping

    away = frames[-1]
    assert away["type"] == "going_away"
    assert away["positions"] == {"t": {"epoch": epoch, "offset": 3}}
    assert 200 <= away["reconnect_after_ms"] < 1_200
    assert (last.code, ending.code, ending.offsets) == (1012, 1012, [1, 2, 3])


async def test_client_comes_back_whole_or_says_what_is_missing() -> None:
    """What is published while the client is away reaches it, as far as the ring does."""
    async with running(ring_messages=100, catch_up_messages=50) as daemon:
        while_away = iter([10, 150])

        async def away(_seconds: float) -> None:
            await fill(daemon, next(while_away))

        seen: list[int | Gap] = []
        client = Client(daemon.url, sleep=away)
        async with client, client.subscribe("t", last=0) as items:
            # It has seen nothing but its position.
            daemon.only_subscriber().cut()
            async for item in items:
                seen.append(item if isinstance(item, Gap) else item.offset)
                if seen[-1] == 10:
                    daemon.only_subscriber().cut()
                if seen[-1] == 160:
                    break

    assert seen == [*range(1, 11), Gap("t", 11, 60, 50, "retention"), *range(61, 161)]


def test_holes_stand_between_what_was_kept() -> None:
    """Each run of kept messages is a write of its own, behind the hole before it."""
    driver = TopicDriver(make_topic(ring_messages=6, window=4))
    topic, sink = driver.topic, FakeSink(room_bytes=0)
    reader = driver.join(Subscriber(sink, DropStrategy.DROP_NEWEST, gaps=GapLog("t")))

    # 1 is given; 2 to 5 are kept, of which 2 and 3 are read; 6 to 8 are lost.
    driver.send(8)
    driver.read_once(reader, 2 * 64)
    # 9 and 10 are kept and 11 is lost; then 10 is, with the window that held it.
    driver.send(3)
    topic.settle(0.0)
    runs = reader.kept
    topic.set_window(3, 0.0)
    position = reader.position()
    while driver.read_once(reader):
        pass
    driver.send(1)

    assert (runs, position) == (((3, 5), (8, 10)), 3)
    assert sink.writes == [
        frame_of(1),
        frame_of(2) + frame_of(3),
        frame_of(4) + frame_of(5),
        notice_frame(GapFrame("t", 6, 8, 3, SLOW_CONSUMER)) + frame_of(9),
        notice_frame(GapFrame("t", 10, 11, 2, SLOW_CONSUMER)) + frame_of(12),
    ]


def test_refused_kept_messages_join_the_hole_behind_them() -> None:
    """When the window shrinks, what was kept is part of the loss that followed it."""
    log = GapLog("t")
    # Kept: 1 to 3, after none delivered; lost: 4 to 9; kept: 10 and 11.
    log.note(3, 4, 9, SLOW_CONSUMER)

    log.refuse_newest(4, count=1, upto=11)
    apart = [(hole.place, hole.first, hole.last) for hole in log._holes]
    log.refuse_newest(3, count=1, upto=11)
    joined = [(hole.place, hole.first, hole.last) for hole in log._holes]
    log.refuse_newest(2, count=1, upto=11)

    assert apart == [(3, 4, 9), (4, 11, 11)]
    assert joined == [(3, 4, 11)]
    assert log.offset_before(delivered=0, decided=11, kept=2) == 0
    told = log.take()
    assert (told.first, told.last, told.count) == (3, 11, 9)


def test_hole_that_met_slowness_is_named_for_it() -> None:
    """What two causes took at one place is one hole, and the reader's own part in it counts."""
    driver = TopicDriver(make_topic(ring_bytes=5 * (64 + 56), window=10))
    topic, sink = driver.topic, FakeSink()
    reader = driver.join(Subscriber(sink, gaps=GapLog("t")))
    reasons = []

    # The ring gives up 1 to 3, then the window 4 to 11, then the ring 12 to 14.
    driver.block(reader)
    for count in (8, 8, 3):
        driver.send(count)
        topic.settle(0.0)
        assert reader.gaps is not None
        reasons.append([hole.reason for hole in reader.gaps._holes])
    driver.unblock(reader)

    assert reasons == [[RETENTION], [SLOW_CONSUMER], [SLOW_CONSUMER]]
    assert (topic.losses.retention, topic.losses.slow_consumer) == (11, 3)
    assert sink.received == notice_frame(GapFrame("t", 1, 14, 14, SLOW_CONSUMER)) + b"".join(
        frame_of(offset) for offset in range(15, 20)
    )


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        ((RETENTION, RETENTION), RETENTION),
        ((RETENTION, SLOW_CONSUMER), SLOW_CONSUMER),
        ((SLOW_CONSUMER, RETENTION), SLOW_CONSUMER),
        ((SLOW_CONSUMER, SLOW_CONSUMER), SLOW_CONSUMER),
    ],
)
def test_one_place_has_one_reason(reasons: tuple[GapReason, GapReason], told: GapReason) -> None:
    """Slowness counts before retention, whichever came first; another place is another hole."""
    log = GapLog("t")

    log.note(3, 4, 6, reasons[0])
    log.note(3, 7, 9, reasons[1])
    log.note(5, 12, 12, RETENTION)

    assert log.take() == GapFrame("t", 4, 9, 6, told)
    assert log.take() == GapFrame("t", 12, 12, 1, RETENTION)
