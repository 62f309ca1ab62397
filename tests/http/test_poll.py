"""Long-polls: what lies behind a position, at once or when it comes, and never a silent hole."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
from clients import publishing, reset_by_peer, subscribe
from daemons import Daemon, running, until
from http_wire import get, read_response, responses, talk

from clevrd.connections import poll
from clevrd.core.beginning import After
from clevrd.core.publish_request import PublishRequest
from clevrd.hub import Published, rounds
from clevrd.tenants import Tenant

TENANT = Tenant("default-tenant")


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """Return a running daemon."""
    async with running(ring_messages=100) as started:
        yield started


async def fill(daemon: Daemon, count: int) -> str:
    """Publish ``count`` messages to topic t and return its epoch."""
    async with publishing(daemon.port) as publisher:
        await publisher.send("t", count)
    return daemon.hub.topic(TENANT, "t").epoch


async def polled(daemon: Daemon, query: str = "") -> dict[str, Any]:
    """Return the answer to a poll of topic t."""
    return await daemon.get_json(f"/subscribe?topic=t&poll=1&{query}")


def waiting(daemon: Daemon) -> int:
    """Return how many polls wait."""
    return len(daemon.polls)


def offsets_of(answer: dict[str, Any]) -> list[int]:
    """Return the offsets of an answer's messages."""
    return [message["offset"] for message in answer["messages"]]


def assert_conserved(figures: dict[str, Any]) -> None:
    """Fail unless every message offered is accounted for."""
    sums = figures["messages"]
    lost = sum(sums["dropped"].values())
    assert sums["offered"] == sums["delivered"] + lost + sums["discarded"] + sums["queued"]


# --- at once -------------------------------------------------------------------------------------


async def test_newcomer_gets_the_recent_past_and_its_position(daemon: Daemon) -> None:
    """The first poll needs no position, and gives the one for the next."""
    epoch = await fill(daemon, 60)

    answer = await polled(daemon)

    assert offsets_of(answer) == list(range(11, 61))
    assert (answer["topic"], answer["epoch"], answer["offset"]) == ("t", epoch, 60)
    assert (answer["recovered"], answer["gap"]) == (False, None)
    assert list(answer["messages"][0]) == [
        *("id", "topic", "tenant_id", "data", "timestamp", "offset")
    ]


@pytest.mark.parametrize("form", ["offset=57&epoch={0}", "last_event_id={0}:57"])
async def test_position_is_answered_with_what_follows_it(daemon: Daemon, form: str) -> None:
    """All that there is, at once."""
    epoch = await fill(daemon, 60)

    answer = await polled(daemon, form.format(epoch))

    assert offsets_of(answer) == [58, 59, 60]
    assert (answer["offset"], answer["recovered"]) == (60, True)


async def test_lost_messages_are_told_before_those_that_follow(daemon: Daemon) -> None:
    """What the ring no longer has is a gap in the answer."""
    epoch = await fill(daemon, 150)

    answer = await polled(daemon, f"offset=20&epoch={epoch}")
    foreign = await polled(daemon, "offset=20&epoch=before")

    assert (answer["gap"]["from"], answer["gap"]["to"], answer["gap"]["count"]) == (21, 50, 30)
    assert (answer["recovered"], offsets_of(answer)[0]) == (False, 51)
    assert (foreign["gap"]["reason"], foreign["gap"]["count"]) == ("epoch", None)
    assert (foreign["recovered"], foreign["epoch"], foreign["offset"]) == (False, epoch, 150)


async def test_gap_is_told_at_once_though_nothing_follows_it(daemon: Daemon) -> None:
    """A new epoch without a message yet: the poller learns where it is."""
    answer = await polled(daemon, "offset=20&epoch=before")

    assert (answer["messages"], answer["offset"]) == ([], 0)
    assert answer["gap"]["reason"] == "epoch"
    assert answer["epoch"] != "before"


async def test_long_backlog_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is bounded by number and by bytes; the next poll has the next part."""
    monkeypatch.setattr(poll, "POLL_MAX_MESSAGES", 7)
    async with running() as daemon:
        epoch = await fill(daemon, 20)
        answers = [await polled(daemon, "since=all")]
        monkeypatch.setattr(poll, "POLL_MAX_BYTES", 1)
        for _ in range(2):
            answers.append(await polled(daemon, f"offset={answers[-1]['offset']}&epoch={epoch}"))
        figures = await daemon.get_json("/metrics")

    assert [offsets_of(answer) for answer in answers] == [list(range(1, 8)), [8], [9]]
    assert figures["messages"]["offered"] == figures["messages"]["delivered"] == 9
    assert figures["messages"]["discarded"] == 0


# --- waiting -------------------------------------------------------------------------------------


async def test_poll_waits_for_the_first_message(daemon: Daemon) -> None:
    """It is answered the moment there is something, and is a subscriber until then."""
    epoch = await fill(daemon, 3)
    waiter = asyncio.create_task(polled(daemon, f"offset=3&epoch={epoch}"))
    await until(lambda: waiting(daemon) == 1)

    published = await daemon.publish("t", 1)
    answer = await waiter
    figures = await daemon.get_json("/metrics")

    assert published["subscribers"] == 1
    assert (offsets_of(answer), answer["offset"], answer["recovered"]) == ([4], 4, True)
    assert (figures["total_subscribers"], waiting(daemon)) == (0, 0)
    assert_conserved(figures)


async def test_what_is_published_together_is_answered_together(daemon: Daemon) -> None:
    """One answer with all that came in that turn, not one each."""
    waiter = asyncio.create_task(polled(daemon, "last=0"))
    await until(lambda: waiting(daemon) == 1)

    body = b'{"topic":"t","data":1}\n' * 5
    async with daemon.http.post(f"{daemon.url}/publish/batch", data=body) as response:
        assert response.status == 200
    answer = await waiter

    assert offsets_of(answer) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("seconds", ["0", "0.05"])
async def test_poll_that_ends_without_a_message_says_where_to_go_on(
    daemon: Daemon, seconds: str
) -> None:
    """An empty list and the same position; no error, since nothing is wrong."""
    epoch = await fill(daemon, 3)

    answer = await polled(daemon, f"offset=3&epoch={epoch}&timeout={seconds}")

    assert (answer["messages"], answer["epoch"], answer["offset"]) == ([], epoch, 3)
    assert (answer["recovered"], answer["gap"]) == (True, None)
    assert daemon.hub.subscribers == 0


async def test_polls_one_after_the_other_miss_nothing(daemon: Daemon) -> None:
    """While publishers push on: each message once, in order, whatever falls between two polls."""
    total = 1_500
    seen: list[int] = []

    async def push() -> None:
        async with publishing(daemon.port) as publisher:
            for _ in range(total // 5):
                await publisher.send("t", 5)

    pushing = asyncio.create_task(push())
    answer = await polled(daemon, "last=0")
    start = answer["offset"] - len(answer["messages"])
    seen += offsets_of(answer)
    while answer["offset"] < total:
        answer = await polled(daemon, f"offset={answer['offset']}&epoch={answer['epoch']}")
        if answer["gap"]:
            seen += range(answer["gap"]["from"], answer["gap"]["to"] + 1)
        seen += offsets_of(answer)
    await pushing

    assert seen == list(range(start + 1, total + 1))
    assert_conserved(await daemon.get_json("/metrics"))


async def test_many_polls_are_answered_by_one_message(daemon: Daemon) -> None:
    """Beside readers that stay, who go on undisturbed."""
    async with subscribe(daemon.ws_url, last=0) as reader:
        waiters = [asyncio.create_task(polled(daemon, "last=0")) for _ in range(20)]
        await until(lambda: waiting(daemon) == 20)

        await daemon.publish("t", 1)
        answers = await asyncio.gather(*waiters)
        await daemon.publish("t", 2)
        staying = [json.loads(await reader.recv())["offset"] for _ in range(2)]

    assert [offsets_of(answer) for answer in answers] == [[1]] * 20
    assert staying == [1, 2]


async def test_poll_in_the_middle_of_a_round_is_not_given_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who knows an offset from a publish answer polls behind it, be it offered yet or not."""
    monkeypatch.setattr(rounds, "WRITES_PER_SLICE", 1)
    async with running() as daemon, AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(subscribe(daemon.ws_url))
        topic = daemon.hub.topic(TENANT, "t")
        first = daemon.hub.publish(topic, PublishRequest("t", msgspec.Raw(b"1")))
        await asyncio.sleep(0)
        second = daemon.hub.publish(topic, PublishRequest("t", msgspec.Raw(b"2")))
        assert topic in daemon.hub.delivery.rounds.running
        assert isinstance(first, Published)
        assert isinstance(second, Published)

        behind = After(second.offset, second.epoch)
        answer = daemon.polls.answer_one(TENANT, topic, behind, 5.0)
        assert isinstance(answer, asyncio.Future)
        await until(lambda: not topic.pending)
        assert not answer.done()
        daemon.hub.publish(topic, PublishRequest("t", msgspec.Raw(b"3")))
        found = msgspec.json.decode((await answer).body)

    assert first.offset == 1
    assert (offsets_of(found), found["offset"], found["gap"]) == ([3], 3, None)


# --- its ends ------------------------------------------------------------------------------------


async def test_client_that_goes_leaves_no_poll_behind(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is waited for who won't read the answer, and nothing is logged about it."""
    _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    writer.write(get("/subscribe?topic=t&poll=1"))
    await until(lambda: waiting(daemon) == 1)

    reset_by_peer(writer)

    await until(lambda: waiting(daemon) == 0)
    assert daemon.hub.subscribers == 0
    await until(lambda: daemon.listener.front.in_flight == 0)
    assert caplog.text == ""


async def test_client_that_shuts_its_side_is_answered(daemon: Daemon) -> None:
    """As every request is."""
    talking = asyncio.create_task(talk(daemon.port, [get("/subscribe?topic=t&poll=1")], shut=True))
    await until(lambda: waiting(daemon) == 1)

    await daemon.publish("t", 1)

    assert offsets_of(responses(await talking)[0].json) == [1]


async def test_kept_connection_polls_again_and_again(daemon: Daemon) -> None:
    """One connection serves a poller for as long as it likes, other requests between."""
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    await fill(daemon, 2)
    answers = []
    for path in ("/subscribe?topic=t&poll=1", "/health/live", "/subscribe?topic=t&poll=1&last=1"):
        writer.write(get(path))
        answers.append(await read_response(reader))
    writer.close()

    assert [answer.status for answer in answers] == [200, 200, 200]
    assert answers[0].headers["cache-control"] == "no-store"
    assert offsets_of(answers[2].json) == [2]


async def test_stop_answers_polls_that_wait() -> None:
    """They hold up nothing: each is told where to go on, with what was published before."""
    async with running(shutdown_timeout_s=20.0) as daemon, AsyncExitStack() as stack:
        waiters = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
            stack.callback(writer.close)
            writer.write(get("/subscribe?topic=t&poll=1&timeout=60"))
            waiters.append(asyncio.create_task(read_response(reader)))
        await until(lambda: waiting(daemon) == 3)

        async with asyncio.timeout(3):
            await daemon.server.stop()
            answers = await asyncio.gather(*waiters)

    assert [(answer.status, answer.json["messages"]) for answer in answers] == [(200, [])] * 3


async def test_head_neither_reads_nor_waits(daemon: Daemon) -> None:
    """It has no body to give messages in, so none count as delivered."""
    await fill(daemon, 2)

    answers = await talk(
        daemon.port, [get("/subscribe?topic=t&poll=1", "Connection: close", method="HEAD")]
    )
    figures = await daemon.get_json("/metrics")

    assert responses(answers, to_head=True)[0].status == 200
    assert figures["messages"]["offered"] == 0


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("timeout=61", "option timeout"),
        ("timeout=-1", "option timeout"),
        ("timeout=x", "option timeout"),
        ("timeout=1&timeout=2", "given 2 times"),
        ("poll=1", "given 2 times"),
        ("offset=9&epoch={0}", "ahead of the topic"),
        ("last=1&since=all", "option last"),
    ],
)
async def test_bad_option_is_a_400(daemon: Daemon, query: str, words: str) -> None:
    """What can't be meant is refused, in words."""
    epoch = await fill(daemon, 1)

    answer = await polled(daemon, query.format(epoch))

    assert answer["code"] == "invalid_request"
    assert words in answer["error"]


async def test_draining_daemon_takes_no_poll(daemon: Daemon) -> None:
    """A poller sees the status, and comes back."""
    daemon.hub.is_draining = True

    answer = await polled(daemon)

    assert (answer["code"], answer["retryable"]) == ("unavailable", True)


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="options of Linux's")
async def test_client_of_a_waiting_poll_that_vanishes_is_found_by_the_kernel() -> None:
    """Nothing is sent while it waits, so the kernels ask each other: within 25 and 10 seconds."""
    async with running() as daemon:
        _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(get("/subscribe?topic=t&poll=1&timeout=60"))
        await until(lambda: daemon.hub.subscribers == 1)
        (transport,) = daemon.listener.aiohttp._transports.values()
        sock = transport.get_extra_info("socket")

        asked = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle_s = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        pause_s = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        times = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        writer.close()

    assert asked
    assert (idle_s, idle_s + pause_s * times) == (25, 35)
