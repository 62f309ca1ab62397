"""Connections of one client address, over real sockets: direct, by PROXY header, by a field."""

from __future__ import annotations

import asyncio
import random
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from unittest.mock import Mock

import pytest
from clients import publish_request, reset_by_peer, upgrade_request
from conftest import FakeClock
from daemons import Daemon, running, until
from http_wire import Response, get, read_response

from clevrd.address_limit import AddressLimit
from clevrd.client_addresses import TrustedProxies
from clevrd.errors import ConnectionLimit

PROXY = b"PROXY TCP4 %s 192.0.2.1 56324 443\r\n"
HEALTH = get("/health/live")
EVENTS = get("/subscribe?topic=t", "Accept: application/x-ndjson")


@asynccontextmanager
async def daemon_behind(
    *proxies: str, limit: int = 2, is_raw: bool = True, **settings: Any
) -> AsyncIterator[Daemon]:
    """Run a daemon that believes ``proxies``."""
    async with running(max_connections_per_address=limit, raw_paths=is_raw, **settings) as daemon:
        daemon.server.parts.clients.addresses.change_proxies(TrustedProxies(proxies))
        yield daemon


class Wire:
    """A connection, as bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, request: bytes) -> Response:
        """Send ``request`` and return the answer."""
        self.writer.write(request)
        return await read_response(self.reader)

    async def head(self, request: bytes) -> bytes:
        """Send ``request`` and return the head of what may have no end."""
        self.writer.write(request)
        async with asyncio.timeout(10):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def end(self) -> bytes:
        """Return all that comes until the daemon closes."""
        async with asyncio.timeout(10):
            return await self.reader.read()


@asynccontextmanager
async def connected(daemon: Daemon, first: bytes = b"") -> AsyncIterator[Wire]:
    """Connect, and send these bytes first."""
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    writer.write(first)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


def counted(daemon: Daemon) -> int:
    """Return how many connections are counted for an address."""
    return len(daemon.server.parts.clients.addresses)


def refused(daemon: Daemon, code: str) -> int:
    """Return how many refusals with ``code`` there were."""
    return daemon.hub.counters.refused.get(code, 0)


# --- by a PROXY header ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_raw", [True, False])
async def test_address_has_so_many_connections_and_no_more(is_raw: bool) -> None:
    """One more is answered before it says anything; another address is served; an end frees one."""
    async with daemon_behind("127.0.0.1", is_raw=is_raw, proxy_protocol=True) as daemon:
        client = PROXY % b"203.0.113.7"
        async with connected(daemon, client) as first, connected(daemon, client) as second:
            served = [(await each.ask(HEALTH)).status for each in (first, second)]
            async with connected(daemon, client) as third:
                answer = await read_response(third.reader)
                rest = await third.end()
            async with connected(daemon, PROXY % b"203.0.113.8") as other:
                of_another = (await other.ask(HEALTH)).status
            first.writer.close()
            await until(lambda: counted(daemon) == 1)
            async with connected(daemon, client) as again:
                later = (await again.ask(HEALTH)).status
        await until(lambda: counted(daemon) == 0)

    assert (served, of_another, later, rest) == ([200, 200], 200, 200, b"")
    assert answer.status == 429
    assert answer.json == {
        "success": False,
        "error": "The address 203.0.113.7 has 2 connections of 2 that it may have"
        " (CLEVRD_MAX_CONNECTIONS_PER_ADDRESS); close some, or come back in 10 s.",
        "code": "connection_limit",
        "retryable": True,
    }
    assert answer.headers["retry-after"] == "10"
    assert answer.headers["ratelimit-policy"] == '"connections";q=2;qu="concurrent-requests"'
    assert answer.headers["ratelimit"] == '"connections";r=0;t=10'
    assert refused(daemon, "connection_limit") == 1


async def test_ipv6_clients_count_by_their_64_bits() -> None:
    """A client with a /64 of its own is one client."""
    header = b"PROXY TCP6 2001:db8:0:1::%x 2001:db8::1 56324 443\r\n"
    async with (
        daemon_behind("127.0.0.1", limit=1, proxy_protocol=True) as daemon,
        connected(daemon, header % 1) as first,
        connected(daemon, header % 2) as second,
    ):
        assert (await first.ask(HEALTH)).status == 200
        answer = await read_response(second.reader)

    assert answer.status == 429
    assert b"2001:db8:0:1::/64" in answer.body


async def test_header_may_come_in_pieces_and_with_the_request() -> None:
    """A proxy may send it with the client's first bytes, and the network may split it."""
    async with daemon_behind("127.0.0.1", proxy_protocol=True) as daemon:
        async with connected(daemon) as split:
            for byte in PROXY % b"203.0.113.7":
                split.writer.write(bytes([byte]))
                await asyncio.sleep(0)
            in_pieces = (await split.ask(publish_request("t", b"1"))).status
        async with connected(daemon) as whole:
            joined = PROXY % b"203.0.113.7" + publish_request("t", b"1")
            at_once = (await whole.ask(joined)).status

    assert (in_pieces, at_once) == (200, 200)


@pytest.mark.parametrize("own", [b"PROXY UNKNOWN\r\n", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"])
async def test_proxys_own_connections_are_not_counted(own: bytes) -> None:
    """Health checks of a proxy are for no client."""
    async with (
        daemon_behind("127.0.0.1", limit=1, proxy_protocol=True) as daemon,
        connected(daemon, own) as first,
        connected(daemon, own) as second,
    ):
        statuses = [(await each.ask(HEALTH)).status for each in (first, second)]
        assert counted(daemon) == 0

    assert statuses == [200, 200]


@pytest.mark.parametrize("first", [HEALTH, b"PROXY TCP4 nobody\r\n", b"\x16\x03\x01\0"])
async def test_listed_proxy_without_a_header_is_closed_and_counted(first: bytes) -> None:
    """Served without it, its client would be the proxy."""
    async with daemon_behind("127.0.0.1", proxy_protocol=True) as daemon:
        async with connected(daemon, first) as wire:
            said = await wire.end()
        await until(lambda: not daemon.listener.raw.open)

    assert said == b""
    assert refused(daemon, "bad_proxy_header") == 1


async def test_header_that_does_not_come_in_time_ends_the_connection() -> None:
    """A connection without a client does not stay."""
    async with (
        daemon_behind("127.0.0.1", proxy_protocol=True, request_timeout_s=0.2) as daemon,
        connected(daemon, b"PROXY TCP4") as wire,
    ):
        assert await wire.end() == b""

    assert refused(daemon, "bad_proxy_header") == 1


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize(
    "header",
    [PROXY % b"203.0.113.7", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12)],
)
async def test_header_from_anybody_else_is_refused_and_counted(header: bytes, is_on: bool) -> None:
    """A client can't choose its address; and who forgot a setting is told which."""
    async with (
        daemon_behind("192.0.2.1", proxy_protocol=is_on) as daemon,
        connected(daemon, header + HEALTH) as wire,
    ):
        answer = await read_response(wire.reader)
        rest = await wire.end()

    assert (answer.status, rest) == (403, b"")
    assert b"trusted_proxies" in answer.body
    assert refused(daemon, "forbidden") == 1


async def test_others_are_served_without_a_header() -> None:
    """A daemon may be reached through a proxy and directly."""
    async with (
        daemon_behind("192.0.2.1", proxy_protocol=True) as daemon,
        connected(daemon) as wire,
    ):
        assert (await wire.ask(HEALTH)).status == 200


# --- by a field of a listed proxy ----------------------------------------------------------------


def subscribe_of(kind: str, address: str) -> bytes:
    """Return the request for a WebSocket or a stream, of the client at ``address``."""
    field = {"X-Forwarded-For": address}
    if kind == "websocket":
        return upgrade_request(X_Forwarded_For=address)
    return get(
        "/subscribe?topic=t",
        "Accept: application/x-ndjson",
        *(f"{name}: {value}" for name, value in field.items()),
    )


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize("kind", ["websocket", "stream"])
async def test_forwarded_client_has_so_many_subscriptions(kind: str, is_raw: bool) -> None:
    """The proxy's connections are its clients' once they are WebSockets or streams."""
    request = subscribe_of(kind, "203.0.113.7")
    async with daemon_behind("127.0.0.1", is_raw=is_raw) as daemon:
        async with connected(daemon) as first, connected(daemon) as second:
            heads = [await each.head(request) for each in (first, second)]
            async with connected(daemon) as third:
                answer = await third.ask(request)
            async with connected(daemon) as other:
                of_another = await other.head(subscribe_of(kind, "203.0.113.7, 203.0.113.8"))
            first.writer.close()
            await until(lambda: counted(daemon) == 1)
            async with connected(daemon) as again:
                later = await again.head(request)
        await until(lambda: counted(daemon) == 0)

    served = b"HTTP/1.1 101" if kind == "websocket" else b"HTTP/1.1 200"
    assert all(head.startswith(served) for head in (*heads, of_another, later))
    assert answer.status == 429
    assert b"203.0.113.7 has 2 connections of 2" in answer.body


def poll_of(address: str, topics: str = "topic=t", timeout_s: float = 30) -> bytes:
    """Return a poll of the client at ``address``."""
    path = f"/subscribe?{topics}&poll=1&timeout={timeout_s}"
    return get(path, f"X-Forwarded-For: {address}")


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize("topics", ["topic=t", "topic=t&topic=u", "pattern=a.*"])
async def test_forwarded_client_has_so_many_polls_that_wait(topics: str, is_raw: bool) -> None:
    """A poll that waits holds a connection as a stream does, and gives it back with its answer."""
    async with daemon_behind("127.0.0.1", is_raw=is_raw, limit=1) as daemon:
        async with connected(daemon) as first, connected(daemon) as second:
            first.writer.write(poll_of("203.0.113.7", topics))
            await until(lambda: counted(daemon) == 1)
            answer = await second.ask(poll_of("203.0.113.7", topics))
            left_over = len(daemon.polls)
            kept_for_others = (await second.ask(poll_of("203.0.113.8", topics, 0.01))).status
            daemon.polls.end_all()
            waited = (await read_response(first.reader)).status
            free_again = counted(daemon)
            # Over the same connection of the proxy for another client, and for the same again.
            first.writer.write(poll_of("203.0.113.9", topics))
            await until(lambda: counted(daemon) == 1)
            later = (await second.ask(poll_of("203.0.113.7", topics, 0.01))).status
            # A client that ends its side alone may still read the answer.
            reset_by_peer(first.writer)
            await until(lambda: counted(daemon) == 0)
        assert len(daemon.server.parts.clients.addresses._holdings) == 0

    assert answer.status == 429
    assert b"203.0.113.7 has 1 connections of 1" in answer.body
    assert (left_over, kept_for_others, waited, free_again, later) == (1, 200, 200, 0, 200)
    assert refused(daemon, "connection_limit") == 1


@pytest.mark.parametrize("topics", ["topic=t", "topic=t&topic=u"])
async def test_poll_that_has_its_answer_at_once_is_not_counted(topics: str) -> None:
    """It holds nothing; neither does one of a client that came without a proxy, twice."""
    async with daemon_behind("127.0.0.1", limit=1) as daemon:
        await daemon.publish("t", 1)
        async with connected(daemon) as waiting, connected(daemon) as wire:
            waiting.writer.write(poll_of("203.0.113.7", "topic=other"))
            await until(lambda: counted(daemon) == 1)
            answer = await wire.ask(poll_of("203.0.113.7", f"{topics}&last=1", 0))

    assert (answer.status, len(answer.json["messages"])) == (200, 1)


async def test_poll_of_a_connection_that_is_counted_already_leaves_it_counted() -> None:
    """The PROXY header said whose it is, for its whole life."""
    header = PROXY % b"203.0.113.7"
    async with (
        daemon_behind("127.0.0.1", limit=1, proxy_protocol=True) as daemon,
        connected(daemon, header) as wire,
    ):
        answer = await wire.ask(poll_of("203.0.113.8", timeout_s=0.01))
        assert (answer.status, counted(daemon)) == (200, 1)


@pytest.mark.parametrize("is_raw", [True, False])
async def test_requests_of_a_proxy_are_not_its_clients_connections(is_raw: bool) -> None:
    """A proxy's connection serves many clients, one request after the other."""
    async with (
        daemon_behind("127.0.0.1", limit=1, is_raw=is_raw) as daemon,
        connected(daemon) as wire,
        connected(daemon) as other,
    ):
        for each in (wire, other, wire):
            answer = await each.ask(get("/health", "X-Forwarded-For: 203.0.113.7"))
            assert answer.status == 200
        assert counted(daemon) == 0


async def test_client_that_names_another_address_is_counted_for_none() -> None:
    """X-Forwarded-For from a client that is no listed proxy means nothing."""
    async with daemon_behind("192.0.2.1", limit=1) as daemon:
        request = subscribe_of("websocket", "203.0.113.7")
        async with connected(daemon) as first, connected(daemon) as second:
            heads = [await each.head(request) for each in (first, second)]

    assert all(head.startswith(b"HTTP/1.1 101") for head in heads)


# --- without a socket ----------------------------------------------------------------------------


class Told(asyncio.Transport):
    """A connection of which its transport tells these things."""

    def __init__(self, **told: object) -> None:
        super().__init__(told)


@pytest.mark.parametrize(
    ("told", "is_gone"),
    [
        ({"peername": ("203.0.113.7", 1), "socket": Mock(family=socket.AF_INET)}, False),
        ({"socket": Mock(family=socket.AF_INET)}, True),
        ({"socket": Mock(family=socket.AF_INET6)}, True),
        # A Unix socket's peer has no name, and the daemon's own connections have no socket.
        ({"socket": Mock(family=socket.AF_UNIX)}, False),
        ({}, False),
    ],
    ids=["there", "gone", "gone by IPv6", "unix", "none"],
)
def test_peer_without_an_address_has_gone(told: dict[str, object], is_gone: bool) -> None:
    """It might pass for another one, as a proxy on a Unix socket."""
    limit = AddressLimit(1, TrustedProxies(), lambda: 0.0)

    assert limit.has_gone(Told(**told)) is is_gone


def test_log_tells_of_refusals_once_a_minute_and_how_many_there_were(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client that comes again and again must not fill the log."""
    clock = FakeClock()
    limit = AddressLimit(1, TrustedProxies(), clock)
    limit.accept(Told(peername=("203.0.113.7", 1)))
    for at_s in (0, 1, 59, 60, 61, 120, 180):
        clock.now_s = 1_000.0 + at_s
        with pytest.raises(ConnectionLimit):
            limit.accept(Told(peername=("203.0.113.7", 2)))

    counts = [re.findall(r"others_since=(\d+)", text) for text in caplog.messages]
    assert counts == [["0"], ["2"], ["1"], ["0"]]
    assert len(limit) == 1


# --- nothing leaks -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize("seed", range(3))
async def test_no_way_to_end_leaves_a_connection_counted(seed: int, is_raw: bool) -> None:
    """However connections begin and end, none is counted when all have ended."""
    source = random.Random(seed)  # noqa: S311  # a seed for each run, no secret
    requests = [
        b"",
        b"nonsense\r\n\r\n",
        HEALTH,
        EVENTS,
        upgrade_request(),
        upgrade_request("topic="),
        get("/subscribe?topic=t"),
        get("/subscribe?topic=t", "Accept: text/event-stream", method="HEAD"),
        get("/subscribe?topic=t&poll=1&timeout=0.05"),
        publish_request("t", b"1"),
        publish_request("t", b"1")[:40],
        upgrade_request() + b"\x88\x80\0\0\0\0",
        EVENTS[:-2],
    ]

    async def visit(daemon: Daemon) -> None:
        address = b"203.0.113.%d" % source.randrange(3)
        header = source.choice(
            [PROXY % address, PROXY % address, b"PROXY UNKNOWN\r\n", b"PRO", b"x"]
        )
        async with connected(daemon, header) as wire:
            for _ in range(source.randrange(3)):
                wire.writer.write(source.choice(requests))
                await asyncio.sleep(source.choice([0, 0.01]))
            match source.randrange(3):
                case 0:
                    with suppress(RuntimeError):
                        # The daemon may have closed it by now.
                        wire.writer.write_eof()
                    await asyncio.sleep(0.02)
                case 1:
                    wire.writer.transport.abort()

    async with daemon_behind(
        "127.0.0.1",
        limit=4,
        is_raw=is_raw,
        proxy_protocol=True,
        request_timeout_s=0.3,
        max_connections=12,
    ) as daemon:
        for _ in range(6):
            async with asyncio.TaskGroup() as visitors:
                for _ in range(15):
                    visitors.create_task(visit(daemon))
        await until(lambda: counted(daemon) == 0)
        addresses = daemon.server.parts.clients.addresses
        assert (len(addresses._holdings), len(addresses._addresses)) == (0, 0)
