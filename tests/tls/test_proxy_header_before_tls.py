"""PROXY headers in the clear, and TLS behind them, over real sockets; a real HAProxy: limits/."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from clients import publish_request, upgrade_request
from daemons import Daemon, running, until
from http_wire import Response, get, post, read_response
from tls import Pair, make_pair

from clevrd.client_addresses import TrustedProxies

V1 = b"PROXY TCP4 %s 192.0.2.1 56324 443\r\n"
V2 = b"\r\n\r\n\0\r\nQUIT\n"
HEALTH = get("/health/live")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tls"))


def v2_header(address: str) -> bytes:
    """Return a header of version 2 with a TLV behind the addresses, as AWS sends one."""
    numbers = bytes(int(part) for part in address.split("."))
    rest = numbers + bytes([192, 0, 2, 1]) + b"\xdc\x04\x01\xbb" + b"\xea\x00\x04vpce"
    return V2 + b"\x21\x11" + len(rest).to_bytes(2, "big") + rest


@asynccontextmanager
async def daemon_behind(pair: Pair, *proxies: str, **settings: Any) -> AsyncIterator[Daemon]:
    """Run a daemon that speaks TLS and believes ``proxies``."""
    own: dict[str, Any] = {**pair.settings, "proxy_protocol": True}
    async with running(**{**own, "max_connections_per_address": 1, **settings}) as daemon:
        # Past the tunnel that all daemons of these tests may be reached through.
        daemon.port = int(daemon.server.addresses[0].rsplit(":", 1)[1])
        daemon.server.parts.clients.addresses.change_proxies(TrustedProxies(proxies))
        yield daemon


class Wire:
    """A connection that is encrypted from some byte on, by asyncio's own TLS."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def shake_hands(self, pair: Pair) -> None:
        """Go on by TLS."""
        async with asyncio.timeout(10):
            await self.writer.start_tls(pair.client(), server_hostname="localhost")

    async def ask(self, request: bytes) -> Response:
        """Send ``request`` and return the answer."""
        self.writer.write(request)
        async with asyncio.timeout(10):
            return await read_response(self.reader)

    async def end(self) -> bytes:
        """Return all that comes until the daemon closes."""
        async with asyncio.timeout(10):
            return await self.reader.read()


@asynccontextmanager
async def connected(daemon: Daemon, first: bytes = b"") -> AsyncIterator[Wire]:
    """Connect, and send these bytes first, in the clear."""
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    writer.write(first)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


def held(daemon: Daemon) -> dict[str, int]:
    """Return how many connections are counted for each address."""
    return dict(daemon.server.parts.clients.addresses._holdings.items())


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize(
    "header", [V1 % b"203.0.113.7", v2_header("203.0.113.7")], ids=["v1", "v2"]
)
async def test_client_is_the_one_in_the_header(pair: Pair, header: bytes, is_raw: bool) -> None:
    """It is served over TLS, counted by its address, and refused over TLS beyond its limit."""
    async with daemon_behind(pair, "127.0.0.1", raw_paths=is_raw) as daemon:
        async with connected(daemon, header) as first, connected(daemon, header) as second:
            await first.shake_hands(pair)
            statuses = [(await first.ask(publish_request("t", b"1"))).status]
            statuses.append((await first.ask(HEALTH)).status)
            counted = held(daemon)
            await second.shake_hands(pair)
            refused = await read_response(second.reader)
            first.writer.transport.abort()
            await until(lambda: not held(daemon))
        async with connected(daemon, V1 % b"203.0.113.7") as again:
            await again.shake_hands(pair)
            again.writer.write(upgrade_request())
            head = await asyncio.wait_for(again.reader.readuntil(b"\r\n\r\n"), 10)
            counted_socket = held(daemon)
        await until(
            lambda: not held(daemon) and not daemon.server.parts.clients.addresses._addresses
        )

    assert statuses == [200, 200]
    assert counted == counted_socket == {"203.0.113.7": 1}
    assert refused.status == 429
    assert b"203.0.113.7 has 1 connections of 1" in refused.body
    assert head.startswith(b"HTTP/1.1 101")


async def test_header_and_hello_may_come_in_pieces(pair: Pair) -> None:
    """The network splits and joins as it likes."""
    async with (
        daemon_behind(pair, "127.0.0.1") as daemon,
        connected(daemon) as wire,
    ):
        for byte in v2_header("203.0.113.7"):
            wire.writer.write(bytes([byte]))
            await asyncio.sleep(0)
        await wire.shake_hands(pair)
        status = (await wire.ask(HEALTH)).status
        counted = held(daemon)

    assert (status, counted) == (200, {"203.0.113.7": 1})


@pytest.mark.parametrize("own", [b"PROXY UNKNOWN\r\n", V2 + b"\x20\0\0\0"])
async def test_proxys_own_connections_shake_hands_and_are_not_counted(
    pair: Pair, own: bytes
) -> None:
    """Its health checks may be more than one."""
    async with (
        daemon_behind(pair, "127.0.0.1") as daemon,
        connected(daemon, own) as first,
        connected(daemon, own) as second,
    ):
        for wire in (first, second):
            await wire.shake_hands(pair)
        statuses = [(await wire.ask(HEALTH)).status for wire in (first, second)]
        counted = held(daemon)

    assert (statuses, counted) == ([200, 200], {})


async def test_others_shake_hands_without_a_header(pair: Pair) -> None:
    """A daemon may be reached through a proxy and directly."""
    async with daemon_behind(pair, "192.0.2.1") as daemon, connected(daemon) as wire:
        await wire.shake_hands(pair)
        status = (await wire.ask(HEALTH)).status

    assert status == 200


async def test_listed_proxy_that_shakes_hands_at_once_is_closed_and_counted(pair: Pair) -> None:
    """Served without a header, its client would be the proxy."""
    async with daemon_behind(pair, "127.0.0.1") as daemon, connected(daemon) as wire:
        with pytest.raises((OSError, ConnectionError)):
            await wire.shake_hands(pair)
        await until(lambda: not daemon.listener.raw.open)

    assert daemon.hub.counters.refused == {"bad_proxy_header": 1}


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("header", [V1 % b"203.0.113.7", v2_header("203.0.113.7")])
async def test_header_from_anybody_else_is_told_what_to_set(
    pair: Pair, header: bytes, is_on: bool
) -> None:
    """In the clear, since no hands were shaken; a client can't choose its address."""
    async with (
        daemon_behind(pair, "192.0.2.1", proxy_protocol=is_on) as daemon,
        connected(daemon, header) as wire,
    ):
        answer = await read_response(wire.reader)
        rest = await wire.end()

    assert (answer.status, rest) == (403, b"")
    assert b"trusted_proxies" in answer.body
    assert daemon.hub.counters.refused == {"forbidden": 1}
    assert daemon.hub.counters.tls_failed == {"plain_http": 1}


async def test_header_within_tls_is_refused(pair: Pair) -> None:
    """It comes first or not at all: behind the hands anybody could send one."""
    async with (
        daemon_behind(pair, "127.0.0.1") as daemon,
        connected(daemon, V1 % b"203.0.113.7") as wire,
    ):
        await wire.shake_hands(pair)
        answer = await wire.ask(V1 % b"203.0.113.8" + HEALTH)

    assert answer.status == 403


async def test_request_without_tls_behind_a_header_is_told_what_to_do(pair: Pair) -> None:
    """The proxy may have ended TLS itself, which the daemon is to do."""
    async with (
        daemon_behind(pair, "127.0.0.1") as daemon,
        connected(daemon, V1 % b"203.0.113.7" + post()) as wire,
    ):
        answer = await read_response(wire.reader)

    assert answer.status == 400
    assert b"This port speaks TLS" in answer.body


@pytest.mark.parametrize("is_raw", [True, False])
async def test_no_way_to_end_leaves_a_connection_counted(pair: Pair, is_raw: bool) -> None:
    """Before the header, within it, within the handshake, or later."""
    source = random.Random(7)  # noqa: S311  # a seed, no secret

    async def visit(daemon: Daemon) -> None:
        header = source.choice([V1 % b"203.0.113.%d" % source.randrange(3), b"PROXY UN", b""])
        async with connected(daemon, header) as wire:
            match source.randrange(5):
                case 0:
                    wire.writer.write(b"\x16\x03\x01\x02\x00\x01")
                    await asyncio.sleep(0.01)
                case 1:
                    wire.writer.write(b"\x16\x03\x01\x00\x05hello")
                    await asyncio.sleep(0.01)
                case 2 | 3:
                    with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                        await wire.shake_hands(pair)
                        await wire.ask(source.choice([HEALTH, upgrade_request()]))

    async with daemon_behind(
        pair,
        "127.0.0.1",
        raw_paths=is_raw,
        request_timeout_s=0.3,
        max_connections=8,
        max_connections_per_address=3,
    ) as daemon:
        for _ in range(4):
            async with asyncio.TaskGroup() as visitors:
                for _ in range(12):
                    visitors.create_task(visit(daemon))
        addresses = daemon.server.parts.clients.addresses
        await until(lambda: not held(daemon) and not addresses._addresses)
        tls = daemon.listener.tls
        assert tls is not None
        await until(lambda: not tls.handshakes and not daemon.listener.raw.open)
