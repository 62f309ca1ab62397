"""EventSource in a real Chromium: it comes back by itself and misses nothing, or is told the gap.

Across a proxy that cuts connections, a planned restart, a daemon that was killed, and refusals.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from clients import publishing
from daemons import Daemon, DaemonProcess, daemon_process, running, until
from playwright.async_api import Page, async_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(
        CHROMIUM is None and "CI" not in os.environ, reason="chromium is not installed"
    ),
]

# Keeps all that an EventSource says; `retry` is shortened by nobody, so tests wait for it.
LISTEN = """
url => {
  const source = window.source = new EventSource(url);
  window.heard = [];
  const hear = event => window.heard.push(
    {kind: event.type, id: event.lastEventId, data: event.data ? JSON.parse(event.data) : null});
  for (const kind of ["message", "subscribed", "gap", "watching", "going_away", "error"])
    source.addEventListener(kind, hear);
}
"""


@asynccontextmanager
async def page_of(url: str) -> AsyncIterator[Page]:
    """Open ``url`` in a browser of its own."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            page = await browser.new_page()
            await page.goto(url)
            yield page
        finally:
            await browser.close()


class Listener:
    """An EventSource in a page, and what it heard."""

    def __init__(self, page: Page) -> None:
        self._page = page

    async def start(self, query: str) -> None:
        """Open it."""
        await self._page.evaluate(LISTEN, f"/subscribe?{query}")

    async def heard(self) -> list[dict[str, Any]]:
        """Return all that it said so far."""
        found: list[dict[str, Any]] = await self._page.evaluate("window.heard")
        return found

    async def is_closed(self) -> bool:
        """Whether it has given up for good."""
        state: int = await self._page.evaluate("window.source.readyState")
        return state == 2

    async def until_message(self, topic: str, offset: int) -> None:
        """Wait for the message of ``topic`` with ``offset`` of the newest life of that topic."""
        await self._page.wait_for_function(
            """([topic, offset]) => window.heard.findLast(
                event => event.data && event.data.topic === topic && event.kind === "message"
            )?.data.offset === offset""",
            arg=[topic, offset],
            timeout=40_000,
        )

    async def until_offset(self, offset: int) -> list[dict[str, Any]]:
        """Wait for the message with ``offset``; return what was heard up to then."""
        found = f"window.heard.some(event => event.data && event.data.offset === {offset}"
        await self._page.wait_for_function(f"{found} && event.kind === 'message')", timeout=40_000)
        return await self.heard()


class CuttingProxy:
    """Hands bytes on to a port, and cuts all connections when it is told to."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.accepted = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.accepted += 1
        try:
            inner, outer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except ConnectionError:
            writer.transport.abort()
            return
        self._writers |= {writer, outer}
        await asyncio.gather(self._copy(reader, outer), self._copy(inner, writer))

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                target.write(data)
                await target.drain()
        except ConnectionError:
            pass
        finally:
            target.close()

    def cut(self) -> None:
        """Reset every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


@asynccontextmanager
async def cutting_proxy(target_port: int) -> AsyncIterator[tuple[CuttingProxy, str]]:
    """Run a proxy in front of ``target_port``; yield it and its URL."""
    proxy = CuttingProxy(target_port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    try:
        yield proxy, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        proxy.cut()


def whole(heard: list[dict[str, Any]], topic: str = "t") -> list[int]:
    """Return the offsets of messages; fails where one is missing without a gap, or comes twice."""
    offsets: list[int] = []
    for event in heard:
        if (event["data"] or {}).get("topic") != topic:
            continue
        if event["kind"] == "gap":
            offsets += range(event["data"]["from"], event["data"]["to"] + 1)
        elif event["kind"] == "message":
            offsets.append(event["data"]["offset"])
            # Of several topics the id begins with the event's own.
            own = event["id"].replace("/", ",").replace("@", ",").partition(",")[0]
            assert own.endswith(f":{offsets[-1]}")
    assert offsets == list(range(offsets[0], offsets[-1] + 1))
    return offsets


def greetings(heard: list[dict[str, Any]]) -> list[bool]:
    """Return whether each connection recovered."""
    return [event["data"]["recovered"] for event in heard if event["kind"] == "subscribed"]


async def publish(daemon: Daemon | DaemonProcess, count: int, topic: str = "t") -> None:
    """Publish ``count`` messages."""
    async with publishing(daemon.port) as publisher:
        await publisher.send(topic, count)


@pytest.fixture(autouse=True)
def quick_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have EventSources come back sooner than in the field."""
    monkeypatch.setattr("clevrd.handlers.subscribe.transports.RETRY_FIRST_MS", 100)
    monkeypatch.setattr("clevrd.handlers.subscribe.transports.RETRY_SPREAD_MS", 100)


async def test_event_source_misses_nothing_across_cuts() -> None:
    """Connections are reset while publishers push on, and before the first message too."""
    async with (
        running() as daemon,
        cutting_proxy(daemon.port) as (proxy, url),
        page_of(url) as page,
    ):
        listener = Listener(page)
        await publish(daemon, 5)
        await listener.start("topic=t&last=0")
        await until(lambda: daemon.hub.subscribers == 1)
        await page.wait_for_function("window.heard.length === 1")
        for number in range(4):
            proxy.cut()
            await publish(daemon, 10)
            await until(lambda: daemon.hub.subscribers == 1, timeout_s=20)
            await publish(daemon, 5)
            await listener.until_offset(5 + 15 * (number + 1))
        heard = await listener.heard()

    assert whole(heard) == list(range(6, 66))
    assert greetings(heard) == [False, True, True, True, True]


async def test_event_source_of_many_topics_misses_nothing_across_cuts() -> None:
    """Named topics, and what a pattern matches, one of which begins while it is away."""
    async with (
        running() as daemon,
        cutting_proxy(daemon.port) as (proxy, url),
        page_of(url) as page,
    ):
        listener = Listener(page)
        await listener.start("topic=t&topic=u&pattern=p.*&last=0")
        await page.wait_for_function("window.heard.length === 3")
        for number in range(4):
            await publish(daemon, 5)
            await publish(daemon, 5, "u")
            proxy.cut()
            await publish(daemon, 5, f"p.{number}")
            await publish(daemon, 5)
            await listener.until_message("t", 10 * (number + 1))
            await listener.until_message(f"p.{number}", 5)
        heard = await listener.heard()

    counts = {"t": 40, "u": 20, "p.0": 5, "p.1": 5, "p.2": 5, "p.3": 5}
    for topic, count in counts.items():
        assert whole(heard, topic) == list(range(1, count + 1))
    # The first ones of t and u recover nothing.
    assert greetings(heard)[:2] == [False, False]
    assert all(greetings(heard)[2:])


@pytest.mark.holds_loop(reason="it starts daemons")
@pytest.mark.parametrize("planned", [False, True], ids=["killed", "restarted"])
async def test_event_source_of_many_topics_outlives_the_daemon(
    tmp_path: Path, planned: bool
) -> None:
    """Killed, it is told that it may have missed something of each topic; restarted as planned,
    with a state directory, it goes on where it was.
    """
    state = {"CLEVRD_STATE_DIR": str(tmp_path)}
    with daemon_process(**state) as first:
        async with cutting_proxy(first.port) as (proxy, url), page_of(url) as page:
            listener = Listener(page)
            await listener.start("topic=t&topic=u&pattern=p.*")
            await page.wait_for_function("window.heard.length === 3")
            for topic in ("t", "u", "p.1"):
                await publish(first, 3, topic)
                await listener.until_message(topic, 3)
            if planned:
                await asyncio.to_thread(first.stop)
            else:
                first.process.kill()
                await asyncio.to_thread(first.process.wait)
            with daemon_process(**state) as second:
                for topic in ("t", "u", "p.1"):
                    await publish(second, 4, topic)
                proxy.target_port = second.port
                last = 7 if planned else 4
                for topic in ("t", "u", "p.1"):
                    await listener.until_message(topic, last)
                heard = await listener.heard()

    for topic in ("t", "u", "p.1"):
        mine = [event for event in heard if (event["data"] or {}).get("topic") == topic]
        gaps = [event["data"]["reason"] for event in mine if event["kind"] == "gap"]
        offsets = [event["data"]["offset"] for event in mine if event["kind"] == "message"]
        assert gaps == ([] if planned else ["epoch"])
        assert offsets == (list(range(1, 8)) if planned else [1, 2, 3, 1, 2, 3, 4])


async def test_event_source_is_told_what_the_ring_has_lost() -> None:
    """Away for longer than the ring reaches back: the gap is an event of its own."""
    async with (
        running(ring_messages=100) as daemon,
        cutting_proxy(daemon.port) as (proxy, url),
        page_of(url) as page,
    ):
        listener = Listener(page)
        await listener.start("topic=t")
        await until(lambda: daemon.hub.subscribers == 1)
        await publish(daemon, 3)
        await listener.until_offset(3)
        proxy.target_port, port = 1, proxy.target_port
        proxy.cut()
        await publish(daemon, 200)
        proxy.target_port = port
        heard = await listener.until_offset(203)

    assert whole(heard) == list(range(1, 204))
    (gap,) = (event["data"] for event in heard if event["kind"] == "gap")
    assert (gap["from"], gap["to"], gap["reason"]) == (4, 103, "retention")


async def test_event_source_comes_back_to_a_daemon_that_was_restarted() -> None:
    """It is asked to, at its own time; the new life of the topic is told as a gap."""
    async with running() as first:
        proxied = cutting_proxy(first.port)
        async with proxied as (proxy, url), page_of(url) as page:
            listener = Listener(page)
            await listener.start("topic=t")
            await until(lambda: first.hub.subscribers == 1)
            await publish(first, 3)
            await listener.until_offset(3)
            await first.server.stop()
            async with running() as second:
                proxy.target_port = second.port
                await until(lambda: second.hub.subscribers == 1, timeout_s=30)
                await publish(second, 4)
                heard = await listener.until_offset(4)

    kinds = [event["kind"] for event in heard]
    assert [kind for kind in kinds if kind != "error"] == [
        *("subscribed", "message", "message", "message", "going_away"),
        *("subscribed", "gap", "message", "message", "message", "message"),
    ]
    (gap,) = (event["data"] for event in heard if event["kind"] == "gap")
    assert (gap["reason"], gap["count"]) == ("epoch", None)


async def test_event_source_outlives_a_draining_daemon() -> None:
    """A 503 would end it for good; the refusal it gets lets it come back."""
    async with running() as daemon, page_of(daemon.url) as page:
        daemon.hub.is_draining = True
        listener = Listener(page)
        await listener.start("topic=t")
        await until(lambda: daemon.hub.counters.refused.get("unavailable", 0) >= 2, timeout_s=20)
        assert not await listener.is_closed()

        daemon.hub.is_draining = False
        await until(lambda: daemon.hub.subscribers == 1, timeout_s=20)
        await publish(daemon, 1)
        heard = await listener.until_offset(1)

    (refusal, *_) = (event["data"] for event in heard if event["kind"] == "error" and event["data"])
    assert (refusal["type"], refusal["code"]) == ("error", "unavailable")


async def test_event_source_outlives_a_full_daemon() -> None:
    """At `max_connections` it is refused again and again, and served once there is room."""
    async with (
        running() as first,
        running(max_connections=4, request_timeout_s=60.0) as full,
        cutting_proxy(first.port) as (proxy, url),
        page_of(url) as page,
    ):
        holders = [await asyncio.open_connection("127.0.0.1", full.port) for _ in range(4)]
        await until(lambda: full.hub.counters.connections == len(holders))
        # Over connections of its own: those that the page came by are not to the full daemon.
        proxy.target_port = full.port
        proxy.cut()
        listener = Listener(page)
        await listener.start("topic=t")
        refusals = "window.heard.filter(event => event.kind === 'error' && event.data)"
        await page.wait_for_function(f"{refusals}.length >= 2", timeout=40_000)
        assert not await listener.is_closed()
        assert full.hub.subscribers == 0

        for _, holder in holders:
            holder.close()
        await until(lambda: full.hub.subscribers == 1, timeout_s=20)
        await publish(full, 1)
        heard = await listener.until_offset(1)

    told = [event["data"]["code"] for event in heard if event["kind"] == "error" and event["data"]]
    assert len(told) >= 2
    assert set(told) == {"unavailable"}
    assert greetings(heard) == [False]


async def test_event_source_gives_up_on_a_request_that_can_never_be_right() -> None:
    """A bad option is a 400: coming back with the same URL would be of no use."""
    async with running() as daemon, page_of(daemon.url) as page:
        listener = Listener(page)
        await listener.start("topic=t&policy=nonsense")
        await page.wait_for_function("window.heard.length === 1")

        assert await listener.is_closed()
