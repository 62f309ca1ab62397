"""PROXY headers of a real HAProxy, which this project did not write."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from daemons import Daemon, running, until
from ports import accepts, free_port
from tls import make_pair
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidMessage, InvalidStatus

from clevrd.core.publish_request import PublishRequest
from clevrd.tenants import DEFAULT
from clevrd.tenants.settings import read_access

CONFIGURATION = """
defaults
    mode tcp
    # A connection that the daemon has refused is not tried again.
    retries 0
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend clients
    bind {bind}
    # The client, as a real one on another machine would be seen.
    tcp-request connection set-src {source}
    default_backend clevrd
backend clevrd
    server one 127.0.0.1:{daemon_port} {send} check inter 100ms
"""


@asynccontextmanager
async def haproxy(folder: Path, daemon_port: int, *, send: str, source: str) -> AsyncIterator[int]:
    """Run a HAProxy that passes bytes on, and give its port."""
    if shutil.which("haproxy") is None:
        if os.environ.get("CI"):
            pytest.fail("there is no haproxy; make test installs it where it may")
        pytest.skip("there is no haproxy; on Debian: apt-get install haproxy")
    port = free_port()
    file = folder / "haproxy.cfg"
    file.write_text(
        CONFIGURATION.format(
            bind=f"127.0.0.1:{port}", source=source, daemon_port=daemon_port, send=send
        )
    )
    with open(folder / "output", "wb") as output:  # noqa: ASYNC230  # a small file, once
        process = await asyncio.create_subprocess_exec(
            "haproxy", "-db", "-f", str(file), stdout=output, stderr=output
        )
    try:
        await until(lambda: accepts(port) or process.returncode is not None)
        assert process.returncode is None, (folder / "output").read_text()
        yield port
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def behind(*proxies: str) -> dict[str, object]:
    """Return the settings of a daemon that takes PROXY headers from ``proxies``."""
    access = read_access({"auth": {"trusted_proxies": proxies}}, "a test")
    return {"access": access, "proxy_protocol": True, "max_connections_per_address": 2}


@pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2"])
async def test_clients_behind_haproxy_have_their_own_address(send: str, tmp_path: Path) -> None:
    """Both versions: clients are served, and counted by the address in the header."""
    async with (
        running(**behind("127.0.0.1")) as daemon,  # type: ignore[arg-type]  # settings by name
        haproxy(tmp_path, daemon.port, send=send, source="str(203.0.113.7),ipmask(32)") as port,
        AsyncExitStack() as stack,
    ):
        url = f"ws://127.0.0.1:{port}/subscribe?topic=t"
        # The connection by which the proxy was found to listen came before this one, and is gone
        # when this one is.
        async with connect(url, proxy=None):
            pass
        await until(lambda: len(daemon.server.parts.clients.addresses) == 0)
        readers = [await stack.enter_async_context(connect(url, proxy=None)) for _ in range(2)]
        # Not over a connection of this test's own, which would need a header, too.
        daemon.hub.publish(daemon.hub.topic(DEFAULT, "t"), PublishRequest("t", msgspec.Raw(b"1")))
        received = [await asyncio.wait_for(reader.recv(), 5) for reader in readers]
        addresses = daemon.server.parts.clients.addresses
        held = dict(addresses._holdings.items())
        with pytest.raises((InvalidStatus, InvalidMessage, ConnectionError)):
            async with connect(url, proxy=None):
                pass
        async with aiohttp.ClientSession() as http:
            await readers[0].close()
            await until(lambda: addresses._holdings.of("203.0.113.7") == 1)
            async with http.get(f"http://127.0.0.1:{port}/health") as answer:
                status = answer.status

    assert all(b'"data":1' in _bytes(each) for each in received)
    assert held == {"203.0.113.7": 2}
    assert status == 200
    assert daemon.hub.counters.refused == {"connection_limit": 1}


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2", "send-proxy-v2-ssl ssl"])
async def test_tls_that_haproxy_passes_on_ends_in_the_daemon(
    send: str, is_raw: bool, tmp_path: Path
) -> None:
    """The header comes in the clear, then the client's handshake, or one of HAProxy's own."""
    pair = make_pair(tmp_path)
    context = None
    if "ssl" in send:
        # HAProxy speaks TLS to the daemon for clients that speak none.
        send, scheme = f"{send} verify none", ""
    else:
        context, scheme = pair.client(), "s"
    settings: dict[str, Any] = {**behind("127.0.0.1"), **pair.settings, "raw_paths": is_raw}
    async with (
        running(**settings) as daemon,
        haproxy(
            tmp_path,
            int(daemon.server.addresses[0].rsplit(":", 1)[1]),
            send=send,
            source="str(203.0.113.7),ipmask(32)",
        ) as port,
        aiohttp.ClientSession() as http,
        AsyncExitStack() as stack,
    ):
        await until(lambda: len(daemon.server.parts.clients.addresses) == 0)
        url = f"ws{scheme}://localhost:{port}/subscribe?topic=t"
        reader = await stack.enter_async_context(connect(url, proxy=None, ssl=context))
        publish = f"http{scheme}://localhost:{port}/publish"
        body = {"topic": "t", "data": 1}
        async with http.post(publish, json=body, ssl=context or True) as answer:
            status = answer.status
        received = await asyncio.wait_for(reader.recv(), 5)
        held = dict(daemon.server.parts.clients.addresses._holdings.items())
        refused = connect(url, proxy=None, ssl=context)
        with pytest.raises((InvalidStatus, InvalidMessage, ConnectionError, TimeoutError)):
            async with refused:
                pass

    assert (status, held) == (200, {"203.0.113.7": 2})
    assert b'"data":1' in _bytes(received)
    assert daemon.hub.counters.refused == {"connection_limit": 1}


async def test_haproxy_that_sends_no_header_is_closed(tmp_path: Path) -> None:
    """A forgotten send-proxy is noticed, and serves nobody under the proxy's address."""
    async with (
        running(**behind("127.0.0.1")) as daemon,  # type: ignore[arg-type]  # settings by name
        haproxy(tmp_path, daemon.port, send="", source="src") as port,
        aiohttp.ClientSession() as http,
    ):
        with pytest.raises(aiohttp.ClientError):
            await http.get(f"http://127.0.0.1:{port}/health")
        await until(lambda: _refused(daemon) >= 1)


def _refused(daemon: Daemon) -> int:
    return daemon.hub.counters.refused.get("bad_proxy_header", 0)


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
