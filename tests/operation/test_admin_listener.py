"""The listener at admin_address over real sockets: everything to see, nothing to publish."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from daemons import Daemon, running, until
from keys import WRITER, access, bearer
from ports import free_port

from clevrd import config
from clevrd.admin_listener import MAX_CONNECTIONS
from clevrd.errors import CannotStart, ConfigError

ON_LOOPBACK: dict[str, Any] = {"admin_address": "127.0.0.1:0"}


async def ask(
    daemon: Daemon, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, Any]]:
    """Ask the admin listener; return the status and the JSON."""
    url = f"{daemon.server.admin_addresses[0]}{path}"
    async with daemon.http.request(method, url, headers=headers) as answer:
        is_json = answer.content_type == "application/json"
        return answer.status, await answer.json() if is_json else {}


async def test_everything_is_shown_without_a_credential() -> None:
    """Where every other request needs one; through proxies and by any name too."""
    async with running(access=access(), **ON_LOOPBACK) as daemon:
        await daemon.publish("orders.eu", 1, **bearer(WRITER))

        status, found = await ask(daemon, "/metrics")
        through, _ = await ask(daemon, "/metrics", Host="a", Via="1.1 p")
        text, _ = await ask(daemon, "/metrics", Accept="text/plain")
        health = [(await ask(daemon, f"/health{end}"))[0] for end in ("", "/live", "/ready")]
        home, _ = await ask(daemon, "/")
        on_the_other, _ = await daemon.http.get(f"{daemon.url}/metrics"), None

    assert (status, through, text, home) == (200, 200, 200, 200)
    assert [topic["name"] for topic in found["topics"]] == ["acme:orders.eu"]
    assert health == [200, 200, 200]
    assert on_the_other.status == 401


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/publish"),
        ("POST", "/publish/batch"),
        ("GET", "/publish"),
        ("GET", "/subscribe?topic=t"),
        ("GET", "/ws"),
        ("POST", "/ticket"),
        ("GET", "/clevrd.js"),
    ],
)
async def test_nothing_of_tenants_is_there(method: str, path: str) -> None:
    """No publish and no subscribe, though the daemon is open."""
    async with running(**ON_LOOPBACK) as daemon:
        status, answer = await ask(daemon, path, method)

        assert (status, answer["code"]) == (404, "not_found")
        assert len(daemon.hub.topics) == 0


async def test_full_daemon_still_shows_its_figures() -> None:
    """The connections of clients don't count here; those here have a limit of their own."""
    async with running(max_connections=1, **ON_LOOPBACK) as daemon:
        _, holder = await asyncio.open_connection("127.0.0.1", daemon.port)
        admin_port = int(daemon.server.admin_addresses[0].rsplit(":", 1)[1])
        await until(lambda: daemon.server.parts.count_connections()["http"] == 1)

        status, _ = await ask(daemon, "/metrics")
        others = [
            (await asyncio.open_connection("127.0.0.1", admin_port))[1]
            for _ in range(MAX_CONNECTIONS - 1)
        ]
        reader, writer = await asyncio.open_connection("127.0.0.1", admin_port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        beyond = await asyncio.wait_for(reader.read(), 10)
        for each in (holder, *others, writer):
            each.close()

    assert status == 200
    assert beyond.startswith(b"HTTP/1.1 503 ")


async def test_dead_admin_listener_is_opened_again() -> None:
    """At the same port."""
    async with running(**ON_LOOPBACK) as daemon:
        (url,) = daemon.server.admin_addresses
        admin = daemon.server.parts.ways_in.for_operators
        assert admin is not None
        for _, served in admin.listeners._servers:
            served.close()

        daemon.server.parts.ways_in.reopen_dead()
        await until(admin.listeners.is_listening)

        assert daemon.server.admin_addresses == [url]
        assert (await ask(daemon, "/metrics"))[0] == 200


async def test_stop_closes_it() -> None:
    """Connections that are idle too, within the time of any other stop."""
    async with running(**ON_LOOPBACK) as daemon:
        port = int(daemon.server.admin_addresses[0].rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"}")

        async with asyncio.timeout(5):
            await daemon.server.stop()
            assert await reader.read() == b""
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)


async def test_address_in_use_names_the_setting() -> None:
    """And leaves nothing open, the other address included."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, other = taken.getsockname()[1], free_port()
        with pytest.raises(CannotStart, match="CLEVRD_ADMIN_ADDRESS"):
            async with running(address=f"127.0.0.1:{other}", admin_address=f"127.0.0.1:{port}"):
                pass
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", other)


async def test_both_listeners_at_one_address_are_refused(tmp_path: Path) -> None:
    """With a sentence, not one of them silently lost."""
    path = f"unix:{tmp_path}/s"
    with pytest.raises(CannotStart, match="CLEVRD_ADMIN_ADDRESS"):
        async with running(address=path, admin_address=path):
            pass


async def test_descriptors_are_kept_for_it() -> None:
    """Clients can't take those that operators need."""
    async with running() as without:
        allowed = without.listener.raw.max_connections
    async with running(**ON_LOOPBACK) as daemon:
        left = daemon.listener.raw.max_connections

    assert left <= allowed - MAX_CONNECTIONS


@pytest.mark.parametrize("value", ["9001", "http://127.0.0.1:9001", "unix:relative", "1.2.3:80"])
def test_wrong_address_is_refused_at_the_start(value: str) -> None:
    """In one sentence that names the setting."""
    with pytest.raises(ConfigError, match="admin_address"):
        config.load({}, {"CLEVRD_ADMIN_ADDRESS": value}, None)


async def test_health_on_unix_socket(tmp_path: Path) -> None:
    """A Unix socket is an address as good as any."""
    async with running(admin_address=f"unix:{tmp_path}/a") as daemon:
        connector = aiohttp.UnixConnector(f"{tmp_path}/a")
        async with (
            aiohttp.ClientSession(connector=connector) as http,
            http.get("http://x/health/ready") as answer,
        ):
            assert answer.status == 200
        assert not daemon.server.is_operated_from_afar()
