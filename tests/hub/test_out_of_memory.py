"""Memory that runs out at one step: the step fails, and everything else goes on.

Python raises MemoryError where an allocation fails, which may be anywhere; here it is raised at
each place where a connection, a topic or the log could be left waiting for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from clients import CLOSE, raw_subscriber
from daemons import Daemon, running, until
from http_wire import get, post, read_response

from clevrd.core.topic import Topic
from clevrd.hub import readers
from clevrd.logs import EventFormatter, Lines, LinesHandler
from clevrd.scheduling.fair_turns import FairTurns
from clevrd.writer_thread import WriterThread

BODY = b'{"topic":"t","data":1}'


class Failing:
    """A function that raises MemoryError the first few times and then does as another."""

    def __init__(self, then: Callable[..., Any], times: int = 1) -> None:
        self._then = then
        self.left = times

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Raise, or call the other function."""
        if self.left:
            self.left -= 1
            raise MemoryError
        return self._then(*arguments, **named)


def only_topic(daemon: Daemon) -> Topic:
    """Return the topic that there is."""
    [topic] = daemon.hub.topics
    return topic


@pytest.mark.parametrize("raw_paths", [True, False], ids=["raw", "aiohttp"])
async def test_message_that_can_not_be_encoded_is_refused(raw_paths: bool) -> None:
    """Its publisher gets a 500; the next message takes its place, and readers miss nothing."""
    async with (
        running(raw_paths=raw_paths) as daemon,
        await raw_subscriber(daemon.port) as reader,
    ):
        delivery = daemon.hub.delivery
        delivery._encode = Failing(delivery._encode)
        async with daemon.http.post(f"{daemon.url}/publish", data=BODY) as answer:
            refused = answer.status, (await answer.json())["code"]
        published = await daemon.publish("t", 2)
        received = await reader.message()

    assert refused == (500, "internal_error")
    assert published["offset"] == received["offset"] == 1
    assert received["data"] == 2


@pytest.mark.parametrize("place", ["at once", "in a turn", "after a wait"])
async def test_connection_ends_that_can_not_even_be_refused(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No client waits for an answer that does not come, and the daemon forgets the connection."""
    async with running() as daemon:
        server = daemon.listener.raw
        if place == "in a turn":
            monkeypatch.setattr(FairTurns, "begin", lambda _: False)
        if place == "after a wait":
            monkeypatch.setattr(daemon.hub, "must_wait", lambda _: True)
        failing = Failing(server.render, times=2)
        monkeypatch.setattr(server, "render", failing)
        streams, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(post(BODY))
        ended = await until_end(streams)
        writer.close()
        await until(lambda: not server.open and not server.deadlines)
        failing.left = 0
        after = await daemon.publish("t", 2)

    assert ended == b""
    assert after["offset"] == 2


async def until_end(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the connection ends, in order or by a reset."""
    async with asyncio.timeout(10):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


async def test_time_that_is_up_ends_a_connection_without_a_word() -> None:
    """It has no deadline any more, so nothing else would end it."""
    async with running(request_timeout_s=0.3) as daemon:
        server = daemon.listener.raw
        server.render = Failing(server.render)
        streams, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(post(BODY)[:-1])
        ended = await until_end(streams)
        writer.close()
        await until(lambda: not server.open)

    assert ended == b""


async def test_publish_socket_ends_that_fails_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its publisher learns that, and publishes over a new connection."""
    async with running() as daemon:
        monkeypatch.setattr(FairTurns, "begin", lambda _: False)
        delivery = daemon.hub.delivery
        delivery._encode = Failing(delivery._encode)
        async with daemon.http.ws_connect(f"{daemon.ws_url}/publish") as publisher:
            await publisher.send_str('{"topic":"t","data":1}')
            async with asyncio.timeout(10):
                ended = await publisher.receive()
        async with daemon.http.ws_connect(f"{daemon.ws_url}/publish") as publisher:
            await publisher.send_str('{"topic":"t","data":2}')
            await until(lambda: daemon.hub.topics.published == 1)

    assert (ended.type, ended.data) == (aiohttp.WSMsgType.CLOSE, 1011)


async def test_readers_read_on_that_a_failed_round_has_left_behind() -> None:
    """The edge had moved on without them; they get every message, once and in order."""

    class Newest:
        readers = 1

        def note(self, *_: object) -> None:
            topic.newest = before
            raise MemoryError

    async with running() as daemon, await raw_subscriber(daemon.port) as reader:
        await daemon.publish("t", 1)
        topic = only_topic(daemon)
        before, topic.newest = topic.newest, Newest()  # type: ignore[assignment]
        await daemon.publish("t", 2)
        received = [(await reader.message())["data"] for _ in range(2)]
        await until(lambda: daemon.only_reader().is_live)
        await until(lambda: not topic.flush_is_scheduled)
        await daemon.publish("t", 3)
        received.append((await reader.message())["data"])

    assert received == [1, 2, 3]
    assert topic.offered == topic.delivered == 3


async def test_round_that_can_not_be_scheduled_is_scheduled_by_the_next_message() -> None:
    """A topic that only seemed to have a round to come would never have one."""
    async with running() as daemon, await raw_subscriber(daemon.port) as reader:
        await until(lambda: daemon.hub.subscribers == 1)
        rounds = daemon.hub.delivery.rounds
        loop = rounds._loop

        class Loop:
            call_soon = staticmethod(Failing(loop.call_soon))
            call_later = staticmethod(loop.call_later)
            time = staticmethod(loop.time)

        rounds._loop = Loop()  # type: ignore[assignment]
        async with daemon.http.post(f"{daemon.url}/publish", data=BODY) as answer:
            status = answer.status
        await daemon.publish("t", 2)
        received = [(await reader.message())["data"] for _ in range(2)]

    assert status == 500
    assert received == [1, 2]


async def test_reader_that_can_not_be_greeted_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be joined, and never read."""
    async with running() as daemon:
        monkeypatch.setattr(readers, "_first_notices", Failing(readers._first_notices))
        async with await raw_subscriber(daemon.port, "topic=t&control=1") as reader:
            goodbye = await reader.frame()
        await until(lambda: not daemon.hub.subscribers)
        async with await raw_subscriber(daemon.port, "topic=t&control=1") as reader:
            greeted = await reader.message()

    assert goodbye == (CLOSE, (1011).to_bytes(2, "big") + b"write_failed")
    assert greeted["type"] == "subscribed"


def test_log_line_that_can_not_be_made_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging raises nothing: it may stand amid the mending of a failure."""
    lines = Lines(2, lambda _: "")
    formatter = EventFormatter(for_journal=False)
    monkeypatch.setattr(formatter, "format", Failing(formatter.format, times=2))
    logger = logging.Logger("clevrd.test")
    logger.addHandler(LinesHandler(lines, formatter))

    logger.error("something failed")

    assert lines.dropped == 1


def test_writer_thread_goes_on_after_a_failure() -> None:
    """What was to be written is lost and counted, and what follows is written."""
    written: list[bytes] = []
    writer = WriterThread("test-writer", Failing(written.append))

    writer.put(b"lost")
    assert writer.flush(10)
    writer.put(b"written")
    assert writer.flush(10)

    assert written == [b"written"]
    assert writer.lost == 1


@pytest.mark.parametrize("raw_paths", [True, False], ids=["raw", "aiohttp"])
async def test_kept_connection_is_served_after_a_refusal(raw_paths: bool) -> None:
    """An answer that can't be encoded costs one request, and not those behind it."""
    async with running(raw_paths=raw_paths) as daemon:
        delivery = daemon.hub.delivery
        delivery._encode = Failing(delivery._encode)
        streams, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(post(BODY) + post(BODY) + get("/health/live"))
        answers = [await read_response(streams) for _ in range(3)]
        writer.close()

    assert [answer.status for answer in answers] == [500, 200, 200]
