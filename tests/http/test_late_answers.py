"""Publishes whose answers come later: they hold nothing up, and what ends a connection waits.

That the order and the bytes are the same is the model's (models/test_due_answers_model.py).
"""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from clients import masked, publish_socket, reset_by_peer, upgrade_request
from daemons import Daemon, running, until
from fakes import frames_in
from http_wire import Steady, get, post, read_response, responses, talk
from late_answers import LateAnswers

from clevrd.core.topic import Topic
from clevrd.scheduling.due_answers import MAX_DUE_ANSWERS
from clevrd.tenants import Tenant

OK = post('{"topic":"t","data":1}')


def frame(ref: int) -> bytes:
    """Return a publish on a socket."""
    return masked(0x1, json.dumps({"topic": "t", "data": 1, "ref": ref}).encode())


def published(daemon: Daemon) -> int:
    """Return how many messages there are."""
    return sum(topic.published for topic in daemon.hub.topics)


async def connected(daemon: Daemon) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection."""
    return await asyncio.open_connection("127.0.0.1", daemon.port)


async def test_pipeline_is_published_before_its_first_answer() -> None:
    """And answered in order, in one write, as soon as the first is known and all others are."""
    async with running() as daemon:
        late = LateAnswers(daemon.hub)
        reader, writer = await connected(daemon)
        writer.write(OK * 150 + post("{"))
        await until(lambda: published(daemon) == 150)
        assert not reader._buffer  # type: ignore[attr-defined]

        for settle in reversed(late.held):
            settle()
        answers = [await read_response(reader) for _ in range(151)]
        writer.close()

    assert [answer.json["offset"] for answer in answers[:150]] == list(range(1, 151))
    assert answers[150].status == 400


@pytest.mark.parametrize("kind", ["requests", "frames"])
async def test_publisher_is_not_read_on_while_too_many_answers_are_due(kind: str) -> None:
    """However much it sends; what it sent is published later, and all of it answered."""
    count = 20_000
    async with running() as daemon:
        late = LateAnswers(daemon.hub)
        reader, writer = await connected(daemon)
        if kind == "requests":
            sent = OK * count
        else:
            writer.write(publish_socket())
            await reader.readuntil(b"\r\n\r\n")
            sent = frame(1) * count
        writer.write(sent)
        await until(Steady(lambda: published(daemon)))
        held = published(daemon)
        assert not writer.transport.is_closing()
        assert daemon.hub.input_budget.used_bytes < 1 << 20

        async def answer_all() -> None:
            while published(daemon) < count or late.held:
                late.answer()
                await asyncio.sleep(0)

        answering = asyncio.ensure_future(answer_all())
        found = bytearray()
        async with asyncio.timeout(20):
            while found.count(b'"subscribers":') < count:
                found += await reader.read(1 << 20)
            await answering
        writer.close()

    # A run of 256, or what one share of a turn takes, may go over.
    assert 0 < held <= MAX_DUE_ANSWERS + 256
    offsets = [int(number) for number in re.findall(rb'"offset":(\d+)', found)]
    assert (published(daemon), offsets) == (count, list(range(1, count + 1)))


async def test_stop_waits_for_answers_that_are_due() -> None:
    """An idle connection is closed behind its last answer, a socket says goodbye behind it."""
    async with running() as daemon:
        late = LateAnswers(daemon.hub)
        http, http_writer = await connected(daemon)
        http_writer.write(OK)
        socket, socket_writer = await connected(daemon)
        socket_writer.write(publish_socket() + frame(7))
        await until(lambda: published(daemon) == 2)
        # Its goodbye is answered at once.
        await socket.readuntil(b"\r\n\r\n")
        stopping = asyncio.ensure_future(daemon.server.stop())
        await until(lambda: daemon.hub.is_draining)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not stopping.done()

        late.answer()
        answers = responses(await http.read())
        first = await socket.readexactly(2)
        answer = await socket.readexactly(int.from_bytes(await socket.readexactly(2), "big"))
        socket_writer.write(masked(0x8, b"\x03\xf4"))
        goodbye = await socket.read()
        await stopping

    assert [each.status for each in answers] == [200]
    assert (first[0], json.loads(answer)["ref"]) == (0x81, 7)
    (close,) = frames_in(goodbye)
    assert int.from_bytes(close.data[:2], "big") == 1012
    http_writer.close()
    socket_writer.close()


@pytest.mark.parametrize("socket", [False, True], ids=["http", "socket"])
async def test_answer_to_who_has_gone_is_let_go(socket: bool) -> None:
    """The publish stands, and nothing fails, be it known as an answer or as an error."""
    async with running() as daemon:
        late = LateAnswers(daemon.hub)
        _, writer = await connected(daemon)
        fails = post('{"topic":"fails","data":1}')
        sent = publish_socket() + frame(1) if socket else OK + fails
        writer.write(sent)
        await until(lambda: late.held)
        reset_by_peer(writer)
        await until(lambda: not daemon.listener.raw.open and not daemon.server.connections)

        late.answer()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

        assert published(daemon) == (1 if socket else 2)
        assert not any(future.cancelled() for future in late.futures)
        assert daemon.hub.counters.background_errors == 0


async def test_time_goes_by_for_half_a_request_and_not_for_an_answer() -> None:
    """Who waits for an answer is not cut; a head that does not come is refused behind it."""
    async with running() as daemon:
        late = LateAnswers(daemon.hub)
        (waits, waits_writer), (slow, slow_writer) = [await connected(daemon) for _ in range(2)]
        waits_writer.write(OK)
        slow_writer.write(OK + b"POST /publish HTTP/1.1\r\n")
        await until(lambda: len(late.held) == 2)
        raw = daemon.listener.raw
        for connection in list(raw.open):
            raw.deadlines.set(connection, 0.0)
        raw.deadlines.run_due()
        assert raw.count_under_way() == 2

        late.answer()
        first = await read_response(waits)
        waits_writer.write(get("/health/live"))
        second = await read_response(waits)
        refused = responses(await slow.read())
        waits_writer.close()
        slow_writer.close()

    assert (first.status, second.status) == (200, 200)
    assert [each.status for each in refused] == [200, 408]


@pytest.mark.parametrize("kind", ["publish", "subscribe"])
async def test_upgrade_follows_the_answers_before_it(kind: str) -> None:
    """The 101 stands behind all that is due, and the socket's answers behind the 101."""
    async with running() as daemon:
        late = LateAnswers(daemon.hub)
        reader, writer = await connected(daemon)
        upgrade = publish_socket() + frame(5) if kind == "publish" else upgrade_request()
        writer.write(OK * 2 + upgrade)
        await until(lambda: published(daemon) == 2)
        assert len(daemon.server.connections) == 0

        late.answer()
        before = [await read_response(reader) for _ in range(2)]
        head = await reader.readuntil(b"\r\n\r\n")
        if kind == "publish":
            await until(lambda: published(daemon) == 3)
            late.answer()
            assert (await reader.readexactly(4))[0] == 0x81
        writer.close()

    assert [each.json["offset"] for each in before] == [1, 2]
    assert head.startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize("fails", [False, True], ids=["known", "failed"])
async def test_repeat_waits_for_the_first_answer(fails: bool) -> None:
    """It is given the same; of a publish that failed nothing is kept, and it takes its place."""
    topic = "fails" if fails else "t"
    sent = post(json.dumps({"topic": topic, "data": 1}), "Idempotency-Key: k")
    async with running() as daemon:
        late = LateAnswers(daemon.hub)
        talking = [
            asyncio.ensure_future(talk(daemon.port, [sent, sent], shut=True)),
            asyncio.ensure_future(talk(daemon.port, [sent], shut=True)),
        ]
        await until(lambda: daemon.hub.publishing.waiting.count == 2)
        seen = published(daemon)

        while not all(each.done() for each in talking):
            late.answer()
            await asyncio.sleep(0.001)
        found = [responses(await each) for each in talking]
        count = published(daemon)

    assert seen == 1
    if fails:
        assert [[each.status for each in answers] for answers in found] == [[503, 503], [503]]
        assert count == 3
    else:
        assert count == 1
        repeated = [answer.json.get("repeated", False) for answers in found for answer in answers]
        assert sorted(repeated) == [False, True, True]


async def test_fault_behind_publishes_that_wait_drops_none_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held back, then a ping, then one more, then a broken frame: both are published."""
    async with running() as daemon:
        waits = True

        async def turn(
            tenant: Tenant, topic: Topic, messages: int = 1, size_bytes: int = 0
        ) -> Topic:
            await until(lambda: not waits)
            return topic

        monkeypatch.setattr(daemon.hub, "must_wait", lambda topic: waits)
        monkeypatch.setattr(daemon.hub, "turn", turn)
        reader, writer = await connected(daemon)
        writer.write(publish_socket() + frame(1) + masked(0x9) + frame(2) + b"\xff\xff")
        await until(lambda: daemon.hub.tasks)
        await asyncio.sleep(0)
        waits = False
        await reader.readuntil(b"\r\n\r\n")
        writer.write_eof()
        frames = frames_in(await reader.read())
        writer.close()

        assert published(daemon) == 2
    assert [each.opcode for each in frames] == [0x1, 0xA, 0x1, 0x8]
