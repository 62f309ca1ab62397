"""The proxy configurations of docs/operations.md, in the real nginx, HAProxy and Caddy."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest
from browsers import chromium, page_at
from daemons import ROOT, Daemon, running, until
from keys import ADMIN, OTHER, READER, WRITER, access, bearer, subprotocol
from playwright.async_api import expect
from ports import accepts, free_port
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def example(language: str) -> str:
    """Return the configuration that the document has in this language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", OPERATIONS, re.MULTILINE | re.DOTALL)
    return str(text)


def nginx(folder: Path, text: str) -> list[str]:
    """Return the command of an nginx that serves ``text`` from ``folder`` alone."""
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    file = folder / "nginx.conf"
    file.write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/log;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{places}{text}}}\n"
    )
    return ["nginx", "-e", f"{folder}/log", "-c", str(file)]


def haproxy(folder: Path, text: str) -> list[str]:
    """Return the command of a HAProxy that serves ``text``."""
    file = folder / "haproxy.cfg"
    file.write_text(text)
    return ["haproxy", "-db", "-f", str(file)]


def caddy(folder: Path, text: str) -> list[str]:
    """Return the command of a Caddy that serves ``text``, and has no port for its owner."""
    file = folder / "Caddyfile"
    file.write_text(f"{{\n    admin off\n    auto_https off\n}}\n{text}")
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(file)]


class Proxy:
    """How to run one, and how its configuration says where it listens."""

    def __init__(
        self, language: str, listen: str, command: Callable[[Path, str], list[str]]
    ) -> None:
        self.language = language
        # With a place for the port.
        self.listen = listen
        self.command = command


PROXIES = {
    "nginx": Proxy("nginx", "listen {};", nginx),
    "haproxy": Proxy("haproxy", "bind :{}", haproxy),
    "caddy": Proxy("caddyfile", ":{} {{", caddy),
}


@asynccontextmanager
async def proxy_of(
    name: str, daemon_port: int, folder: Path, text: str | None = None
) -> AsyncIterator[int]:
    """Run a proxy in front of a daemon, and give its port.

    Args:
        text: its configuration; None for the document's.
    """
    if shutil.which(name) is None:
        if os.environ.get("CI"):
            pytest.fail(f"there is no {name}; make test installs it where it may")
        pytest.skip(f"there is no {name}; on Debian: apt-get install {name}")
    proxy = PROXIES[name]
    port = free_port()
    text = example(proxy.language) if text is None else text
    before, after = proxy.listen.format(80), proxy.listen.format(port)
    assert before in text
    assert "127.0.0.1:8080" in text
    text = text.replace(before, after).replace("127.0.0.1:8080", f"127.0.0.1:{daemon_port}")
    with open(folder / "output", "wb") as output:  # noqa: ASYNC230  # a small file, once
        process = await asyncio.create_subprocess_exec(
            *proxy.command(folder, text),
            env={**os.environ, "HOME": str(folder)},
            stdout=output,
            stderr=output,
        )
    try:
        await until(lambda: accepts(port) or process.returncode is not None)
        assert process.returncode is None, (folder / "output").read_text()
        yield port
    finally:
        with suppress(ProcessLookupError):
            # Not asked to stop: Caddy would wait for the clients.
            process.kill()
        await process.wait()


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    async with running() as daemon:
        yield daemon


@pytest.mark.parametrize("name", PROXIES)
async def test_clients_reach_the_daemon_through_the_proxy(
    name: str, daemon: Daemon, tmp_path: Path
) -> None:
    """Every transport, at once and unbuffered, as the tenant that the proxy names."""
    async with proxy_of(name, daemon.port, tmp_path) as port:
        url = f"http://127.0.0.1:{port}"
        stream = {"Accept": "text/event-stream", "X-Tenant-ID": "other"}
        lines = {"Accept": "application/x-ndjson"}
        async with (
            asyncio.timeout(20),
            aiohttp.ClientSession() as http,
            connect(f"ws://127.0.0.1:{port}/subscribe?topic=t", proxy=None) as reader,
            http.get(f"{url}/subscribe?topic=t", headers=stream) as events,
            http.get(f"{url}/subscribe?topic=t", headers=lines) as ndjson,
        ):
            async with http.post(f"{url}/publish", json={"topic": "t", "data": 1}) as answer:
                published = await answer.json()
            message = json.loads(await reader.recv())
            event = await events.content.readuntil(b"\n\n")
            while b"data:" not in event or b'"id"' not in event:
                event = await events.content.readuntil(b"\n\n")
            line = await ndjson.content.readline()
            async with http.get(f"{url}/subscribe?topic=t&poll=1&last=1") as polled:
                (held,) = (await polled.json())["messages"]
            async with http.get(f"{url}/subscribe?topic=t&poll=1&tenant=other") as refused:
                status = refused.status

    assert (published["success"], published["offset"]) == (True, 1)
    for seen in (message, json.loads(line), held):
        assert (seen["tenant_id"], seen["data"], seen["offset"]) == ("acme", 1, 1)
    assert b'"tenant_id":"acme"' in event
    assert status == 400


@pytest.mark.parametrize("name", PROXIES)
async def test_pages_of_the_proxy_are_own_and_others_are_not(
    name: str, daemon: Daemon, tmp_path: Path
) -> None:
    """By the Host that it passes on, with its port; also where a proxy before it has ended TLS."""
    async with proxy_of(name, daemon.port, tmp_path) as port:
        url = f"http://127.0.0.1:{port}"
        statuses = {}
        async with asyncio.timeout(20), aiohttp.ClientSession() as http:
            for host, origin in (
                (f"127.0.0.1:{port}", url),
                ("app.example", "https://app.example"),
                ("app.example:8443", "https://app.example:8443"),
                (f"127.0.0.1:{port}", "http://evil.example"),
                ("app.example", "https://evil.example"),
                ("app.example:8443", "https://app.example"),
            ):
                fields = {"Host": host, "Origin": origin, "X-Forwarded-Host": "evil.example"}
                body = {"topic": "t", "data": 1}
                async with http.post(f"{url}/publish", json=body, headers=fields) as answer:
                    published = answer.status
                upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
                upgrade |= {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "A" * 22 + "=="}
                subscribe = f"{url}/subscribe?topic=t"
                async with http.get(subscribe, headers={**fields, **upgrade}) as answer:
                    statuses[host, origin] = (published, answer.status)

    assert list(statuses.values()) == [(200, 101)] * 3 + [(403, 403)] * 3


@pytest.mark.parametrize("name", PROXIES)
async def test_credentials_reach_the_daemon_as_they_came(name: str, tmp_path: Path) -> None:
    """In each place where they may stand; the tenant that the proxy names has to be the key's."""
    async with (
        running(access=access()) as daemon,
        proxy_of(name, daemon.port, tmp_path) as port,
        asyncio.timeout(20),
        aiohttp.ClientSession() as http,
    ):
        url, statuses = f"http://127.0.0.1:{port}", []
        body = {"topic": "t", "data": 1}
        for fields in (
            bearer(WRITER),
            {"X-API-Key": WRITER.secret},
            {"Cookie": f"clevrd_token={WRITER.secret}"},
            {},
            bearer(OTHER),
            {**bearer(OTHER), "X-Tenant-ID": "other"},
        ):
            async with http.post(f"{url}/publish", json=body, headers=fields) as answer:
                statuses.append(answer.status)
        async with connect(
            f"ws://127.0.0.1:{port}/subscribe?topic=t&last=1",
            subprotocols=[Subprotocol("clevrd.v1"), Subprotocol(subprotocol(READER.secret))],
            proxy=None,
        ) as reader:
            chosen = reader.subprotocol
            message = json.loads(await reader.recv())
            while "data" not in message:
                message = json.loads(await reader.recv())

    assert statuses == [200, 200, 200, 401, 403, 403]
    assert (chosen, message["tenant_id"]) == ("clevrd.v1", "acme")


@pytest.mark.parametrize("name", PROXIES)
async def test_client_does_not_say_where_it_is(name: str, tmp_path: Path) -> None:
    """What the daemon hears of a client's address is what the proxy saw."""
    heads: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            # HAProxy asks for the daemon's health, too.
            if b"/subscribe" in head:
                heads.append(head.lower())
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await take(reader, writer)
        writer.close()

    told = {"X-Forwarded-For": "203.0.113.66", "X-Tenant-ID": "other"}
    async with asyncio.timeout(20):
        upstream = await asyncio.start_server(serve, "127.0.0.1", 0)
        upstream_port = upstream.sockets[0].getsockname()[1]
        async with proxy_of(name, upstream_port, tmp_path) as port, aiohttp.ClientSession() as http:
            url = f"http://127.0.0.1:{port}/subscribe"
            async with http.get(url, headers=told) as answer:
                assert answer.status == 200
        upstream.close()

    (head,) = heads
    assert re.findall(rb"\r\nx-forwarded-for: ([^\r]*)", head) == [b"127.0.0.1"]
    assert re.findall(rb"\r\nx-tenant-id: ([^\r]*)", head) == [b"acme"]
    assert b"203.0.113.66" not in head


@pytest.mark.parametrize("name", PROXIES)
async def test_clients_of_a_proxy_are_not_this_machine(name: str, tmp_path: Path) -> None:
    """Also where the proxy lets them ask for figures, and the daemon requires no credential."""
    proxy = PROXIES[name]
    text = example(proxy.language)
    inside = r"\(metrics\|config\|admin\)|/metrics /config|/metrics /metrics/\* /config"
    open_text = re.sub(inside, "/other", text)
    assert open_text != text
    async with (
        running() as daemon,
        proxy_of(name, daemon.port, tmp_path, open_text) as port,
        asyncio.timeout(20),
        aiohttp.ClientSession() as http,
    ):
        for host in ("localhost", f"127.0.0.1:{port}", "app.example"):
            url = f"http://127.0.0.1:{port}/metrics"
            async with http.get(url, headers={"Host": host}) as answer:
                assert answer.status == 403, host
                assert "admin_address" in await answer.text()


BARE = "server {\n listen 80;\n location / {\n  proxy_pass http://127.0.0.1:8080;\n }\n}\n"


@pytest.mark.parametrize(
    ("more", "is_told_apart"),
    [
        # As every nginx before 1.29.7 has it where nothing is said.
        ("proxy_http_version 1.0;", True),
        ("proxy_http_version 1.1; proxy_set_header Via 1.1;", True),
        ("proxy_http_version 1.1; proxy_set_header X-Forwarded-For $remote_addr;", True),
        ("proxy_http_version 1.1; proxy_set_header Host $http_host;", True),
        # The document says so: this one can't be told from a program of this machine.
        ("proxy_http_version 1.1;", False),
    ],
)
async def test_nginx_that_says_nothing_of_its_clients(
    more: str, is_told_apart: bool, tmp_path: Path
) -> None:
    """A proxy_pass and nothing else sends the daemon's own address as the host."""
    text = BARE.replace("proxy_pass", f"{more} proxy_pass")
    async with (
        running() as daemon,
        proxy_of("nginx", daemon.port, tmp_path, text) as port,
        asyncio.timeout(20),
        aiohttp.ClientSession() as http,
    ):
        await daemon.publish("secret-topic", 1)
        statuses = []
        for path in ("/metrics", "/config"):
            url, fields = f"http://127.0.0.1:{port}{path}", {"Host": "app.example"}
            async with http.get(url, headers=fields) as answer:
                statuses.append(answer.status)
        home = f"http://127.0.0.1:{port}/"
        async with http.get(home, headers={"Host": "app.example"}) as answer:
            shows = "secret-topic" in await answer.text()

    assert statuses == ([403, 403] if is_told_apart else [200, 200])
    assert shows is not is_told_apart


@pytest.mark.parametrize("name", PROXIES)
async def test_metrics_stay_inside(name: str, tmp_path: Path) -> None:
    """However the path is spelled, and though the daemon would show them to this client."""
    async with (
        running(access=access()) as daemon,
        proxy_of(name, daemon.port, tmp_path) as port,
    ):
        async with daemon.http.get(f"{daemon.url}/metrics", headers=bearer(ADMIN)) as shown:
            assert shown.status == 200
        for target in (
            b"/config",
            b"/%63onfig?x=1",
            b"/metrics",
            b"/metrics?topics=5",
            b"//metrics",
            b"/./metrics",
            b"/x/../metrics",
            b"/%6Detrics",
            b"/metrics/",
            b"/METRICS",
            b"http://127.0.0.1/metrics",
            b"/metrics/tenants",
            b"/admin/top",
            b"/admin/explain?tenant=acme",
            b"/%61dmin/top",
            b"//admin/top",
            b"/x/../admin/top",
            b"http://127.0.0.1/admin/messages?topic=t",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = (
                b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: %b\r\nConnection: close\r\n\r\n"
            )
            writer.write(head % (target, ADMIN.secret.encode()))
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()

            assert answer.startswith(b"HTTP/1.1 "), target
            assert b"HTTP/1.1 200" not in answer, target
            assert b'"messages"' not in answer, target


@pytest.mark.parametrize("name", PROXIES)
async def test_event_source_is_kept_while_the_daemon_is_away(name: str, tmp_path: Path) -> None:
    """It gets 200 and a time to come back; every other client is told that nobody is there."""
    async with proxy_of(name, free_port(), tmp_path) as port:
        url = f"http://127.0.0.1:{port}"
        async with asyncio.timeout(20), aiohttp.ClientSession() as http:
            stream = {"Accept": "text/event-stream"}
            while True:
                async with http.get(f"{url}/subscribe?topic=t", headers=stream) as events:
                    told = events.status, events.content_type, await events.text()
                # HAProxy finds out within a second that its server is not there.
                if told[0] == 200:
                    break
            async with http.post(f"{url}/publish", json={"topic": "t", "data": 1}) as refused:
                status = refused.status

    assert told == (200, "text/event-stream", "retry: 2000\n\n")
    assert status in (502, 503)


# A proxy that has the daemon below a path, and says so.
BELOW_A_PATH = """server {
    listen 80;
    location /events/ {
        proxy_pass http://127.0.0.1:8080/;
        proxy_http_version 1.1;
        proxy_set_header Host $http_host;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $http_connection;
        proxy_set_header X-Forwarded-For $remote_addr;
        proxy_set_header X-Forwarded-Prefix /events;
    }
}
"""


async def test_pages_are_true_below_a_path_of_the_proxy(tmp_path: Path) -> None:
    """The home page names URLs that answer, and the live page finds its figures and topics."""
    rules = access(trusted_proxies=["127.0.0.1"])
    async with (
        running(access=rules) as daemon,
        proxy_of("nginx", daemon.port, tmp_path, BELOW_A_PATH) as port,
        chromium() as browser,
        page_at(browser, f"http://127.0.0.1:{port}/events/dashboard") as page,
    ):
        url = f"http://127.0.0.1:{port}/events"
        async with daemon.http.get(f"{url}/") as answer:
            home = await answer.text()
        assert f"{url}/publish -d" in home
        assert f"ws://127.0.0.1:{port}/events/ws" in home
        assert 'new EventSource("/events/subscribe?topic=orders")' in home

        await page.fill("#key", ADMIN.secret)
        await page.press("#key", "Enter")
        await expect(page.locator("#state")).to_contain_text("healthy")
        await page.fill("#tail-topic", "orders.*")
        await page.press("#tail-topic", "Enter")
        await expect(page.locator("#tail-state")).to_contain_text("reading orders.*")
        await page.fill("#publish-topic", "orders.new")
        await page.press("#publish-topic", "Enter")
        await expect(page.locator("#messages")).to_contain_text("orders.new #1")
