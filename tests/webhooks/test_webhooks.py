"""Webhooks against real aiohttp servers that take events, hang, redirect and fail."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from clients import subscribe
from daemons import FakeStats, until

from clevrd.config import Config
from clevrd.errors import ConfigError
from clevrd.fingerprints import fingerprint
from clevrd.hub import lifecycle
from clevrd.server import Server, Setup
from clevrd.tenants.settings import read_access
from clevrd.tenants.topic_permissions import ALL_TOPICS
from clevrd.webhooks import sender
from clevrd.webhooks.sender import WebhookEvent, WebhookSender
from clevrd.webhooks.settings import Webhook, read_webhooks
from clevrd.webhooks.targets import RefusedTarget, check_target

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let changes settle and attempts follow soon."""
    monkeypatch.setattr(lifecycle, "SETTLE_S", 0.01)
    monkeypatch.setattr(sender, "RETRY_S", 0.01)
    monkeypatch.setattr(sender, "MAX_RETRY_S", 0.02)
    monkeypatch.setattr(sender, "TIMEOUT_S", 5.0)


class Target:
    """A server that is posted to; it answers as ``answer`` says."""

    def __init__(self) -> None:
        self.answer: Any = self.take
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.url = ""
        # Somebody came to where it redirects.
        self.was_followed = False

    async def elsewhere(self, request: web.Request) -> web.StreamResponse:
        """Take what should not come."""
        self.was_followed = True
        return web.Response(text="ok")

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Note a request and answer it."""
        self.requests.append((dict(request.headers), await request.read()))
        answer: web.StreamResponse = await self.answer(request)
        return answer

    async def take(self, request: web.Request) -> web.StreamResponse:
        """Take the events."""
        return web.Response(text="ok")

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events that came, in order."""
        return [event for _, body in self.requests for event in json.loads(body)["events"]]


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    """Return a running target."""
    made = Target()
    app = web.Application()
    app.router.add_post("/hook", made.handle)
    app.router.add_get("/elsewhere", made.elsewhere)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]  # a real server
    made.url = f"http://127.0.0.1:{port}/hook"
    yield made
    await runner.cleanup()


def webhook_to(target_url: str, folder: Path, **more: Any) -> tuple[Webhook, ...]:
    """Return a webhook, as a file has it, to a target on this machine."""
    secret = folder / "secret"
    secret.write_bytes(SECRET + b"\n")
    secret.chmod(0o600)
    entry = {"id": "hook", "url": target_url, "secret_file": "secret", "tenant": "default-tenant"}
    table = {**entry, "allowed_targets": ["127.0.0.1"], **more}
    return read_webhooks({"webhooks": [table]}, str(folder / "clevrd.toml"))


@asynccontextmanager
async def posting(webhooks: tuple[Webhook, ...]) -> AsyncIterator[Server]:
    """Run a daemon that posts events of rooms."""
    entry = {"name": "default-tenant", "lifecycle": ["room.*"], "presence": ["room.*"]}
    access = read_access({"tenants": [entry]}, "a test")
    config = Config(address="127.0.0.1:0", shutdown_timeout_s=2.0)
    server = Server(Setup(config, access, webhooks=webhooks, stats=FakeStats()))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def ws_of(server: Server) -> str:
    """Return the URL for WebSockets."""
    return server.addresses[0].replace("http", "ws", 1)


def sender_to(url: str, counts: dict[str, int], *allowed: Any) -> WebhookSender:
    """Return a sender of all events to ``url``."""
    kinds = frozenset({"occupied"})
    webhook = Webhook("hook", url, SECRET, "acme", ALL_TOPICS, kinds, allowed)
    return WebhookSender(webhook, counts, asyncio.get_running_loop())


def event(number: int) -> WebhookEvent:
    """Return an event of a topic with a number."""
    return WebhookEvent(f"msg-{number}", "acme", "occupied", f"t{number}", "now", "node")


def new_counts() -> dict[str, int]:
    """Return counts of nothing."""
    return {"delivered": 0, "retried": 0, "dropped": 0}


async def test_events_are_posted_signed(target: Target, tmp_path: Path) -> None:
    """Each event of the tenant's topic comes in order, and the signature is of what came."""
    async with posting(webhook_to(target.url, tmp_path)) as server:
        async with subscribe(ws_of(server), "room.1", subscriber_id="ann"):
            await until(lambda: len(target.events) == 2)
        await until(lambda: len(target.events) == 4)
        counts = dict(server.parts.messaging.webhooks.counts)

    assert sorted(each["type"] for each in target.events) == [
        *("joined", "left", "occupied", "vacated")
    ]
    assert {each.get("id") for each in target.events} == {None, "ann"}
    assert counts == {"delivered": 4, "retried": 0, "dropped": 0}
    for headers, body in target.requests:
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        digest = hmac.new(SECRET, signed, hashlib.sha256).digest()
        assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()


async def test_only_what_was_asked_for_is_posted(target: Target, tmp_path: Path) -> None:
    """Kinds of events and topics are chosen for each webhook."""
    chosen = webhook_to(target.url, tmp_path, events=["vacated"], topics=["room.2"])
    async with posting(chosen) as server:
        for name in ("room.1", "room.2"):
            before = server.hub.lifecycle.counts["published"]
            async with subscribe(ws_of(server), name):
                await until(lambda n=before: server.hub.lifecycle.counts["published"] == n + 1)
            await until(lambda n=before: server.hub.lifecycle.counts["published"] == n + 2)
        await until(lambda: bool(target.events))

    assert [(each["type"], each["topic"]) for each in target.events] == [("vacated", "room.2")]


@pytest.mark.parametrize("fault", ["500", "redirect", "hangs", "slow", "endless"])
async def test_failed_post_is_tried_again_and_nobody_waits(
    target: Target,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever the target does, events come in order once it takes them, under one id a batch."""
    monkeypatch.setattr(sender, "TIMEOUT_S", 0.2)

    async def fail(request: web.Request) -> web.StreamResponse:
        if len(target.requests) > 2:
            return await target.take(request)
        if fault == "redirect":
            raise web.HTTPFound("/elsewhere")
        if fault == "500":
            return web.Response(status=500, body=b"x" * 1_000_000)
        if fault == "hangs":
            await asyncio.Event().wait()
        response = web.StreamResponse(status=500)
        await response.prepare(request)
        for _ in range(1_000):
            await response.write(b"x" * 65_536)
            if fault == "slow":
                await asyncio.Event().wait()
        return response

    target.answer = fail
    counts = new_counts()
    post = sender_to(target.url, counts, *_networks("127.0.0.0/8"))
    for number in range(3):
        post.offer(event(number))
    await until(lambda: counts["delivered"] == 3)
    post.offer(event(3))
    await until(lambda: counts["delivered"] == 4)
    await post.stop()

    ids = [headers["webhook-id"] for headers, _ in target.requests]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert [each["topic"] for each in target.events[-4:]] == ["t0", "t1", "t2", "t3"]
    assert (counts["retried"], counts["dropped"]) == (6, 0)
    assert not target.was_followed
    said = [each.message for each in caplog.records if each.name.startswith("clevrd.webhooks")]
    assert len(said) == 2
    assert "webhook fails" in said[0]
    assert "takes events again" in said[1]
    assert SECRET.decode() not in caplog.text


async def test_queue_is_bounded_and_a_batch_is_given_up(
    target: Target, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond the bound events are dropped and counted; a dead target's batch ends some time."""
    monkeypatch.setattr(sender, "MAX_QUEUED", 5)
    monkeypatch.setattr(sender, "MAX_BATCH", 2)
    monkeypatch.setattr(sender, "MAX_ATTEMPTS", 3)

    async def fail(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    target.answer = fail
    counts = new_counts()
    post = sender_to(target.url, counts, *_networks("127.0.0.1"))
    for number in range(8):
        post.offer(event(number))
    assert (len(post), counts["dropped"]) == (5, 3)
    await until(lambda: len(post) == 0)
    await post.stop()

    assert counts == {"delivered": 0, "retried": 10, "dropped": 8}
    assert len(target.requests) == 9
    assert len(target.events) == 3 * 5
    assert sum("events are dropped" in each.message for each in caplog.records) <= 3


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"no HTTP at all\r\n\r\n", "its answer is no HTTP, or its head is too large"),
        (
            b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9_000,
            "its answer is no HTTP, or its head is too large",
        ),
        (b"", "it closed the connection without an answer"),
    ],
    ids=["no HTTP", "large", "closed"],
)
async def test_reason_of_a_failure_is_in_words(
    answer: bytes, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says what the target did, and not the name of an error in a library."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]}")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    post = sender_to(f"http://127.0.0.1:{port}/hidden", new_counts(), *_networks("127.0.0.1"))
    post.offer(event(1))
    await until(lambda: bool(caplog.records))
    await post.stop()
    server.close()

    assert f"id=hook why={says!r}" in caplog.text
    assert "hidden" not in caplog.text


async def test_host_that_is_none_is_said_to_be_none(caplog: pytest.LogCaptureFixture) -> None:
    """A number is an address to some programs, and not to this one."""
    post = sender_to("http://2130706433/", new_counts(), *_networks("0.0.0.0/0"))
    post.offer(event(1))
    await until(lambda: bool(caplog.records))
    await post.stop()

    assert "its URL's host is no name and no address" in caplog.text


async def test_target_that_is_too_slow_for_long_is_told_once(
    target: Target, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each batch that it takes makes room, which is gone at once; the log is not told each time."""
    monkeypatch.setattr(sender, "MAX_QUEUED", 4)
    monkeypatch.setattr(sender, "MAX_BATCH", 1)
    counts = new_counts()
    post = sender_to(target.url, counts, *_networks("127.0.0.1"))

    async def take_slowly(request: web.Request) -> web.StreamResponse:
        if len(target.requests) <= 5:
            for number in range(5):
                post.offer(event(number))
        return await target.take(request)

    target.answer = take_slowly
    post.offer(event(0))
    await until(lambda: len(target.requests) > 5 and len(post) == 0)
    said = [each for each in caplog.records if "events are dropped" in each.message]
    dropped = counts["dropped"]
    for number in range(6):
        post.offer(event(number))
    again = [each for each in caplog.records if "events are dropped" in each.message]
    await post.stop()

    assert dropped >= 5
    assert (len(said), len(again)) == (1, 2)


def _networks(*texts: str) -> tuple[Any, ...]:
    return tuple(map(ipaddress.ip_network, texts))


async def test_address_is_judged_when_it_is_connected_to(
    target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    """An address, or a name that means one, that is not public gets no connection unless listed."""
    port = target.url.split(":")[2]
    for host in ("127.0.0.1", "localhost"):
        caplog.clear()
        counts = new_counts()
        post = sender_to(f"http://{host}:{port}", counts, *_networks("10.0.0.0/8"))
        post.offer(event(1))
        await until(lambda: bool(caplog.records))
        await post.stop()

        assert "no public address; list it in allowed_targets" in caplog.text
        assert counts["dropped"] == 1
    assert target.requests == []


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.1.1", "172.16.0.1", "169.254.169.254"),
        "0.0.0.0",  # noqa: S104  # nothing is bound to it
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0"),
        *("fc00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"),
        *("2002:7f00:1::", "ff02::1", "fec0::1", "::127.0.0.1", "::ffff:0:127.0.0.1"),
        *("64:ff9b:1::7f00:1", "5f00::1", "192.0.0.8"),
    ],
)
def test_address_that_is_not_public_is_refused(address: str) -> None:
    """Also where IPv6 wraps it; once it is listed it is posted to."""
    with pytest.raises(RefusedTarget):
        check_target(address, ())
    check_target(address, _networks("0.0.0.0/0", "::/0"))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_address_is_posted_to(address: str) -> None:
    """Nothing has to be listed for it."""
    check_target(address, ())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"url": "ftp://x/"}, r"webhooks\[0\]\.url .*https or http"),
        ({"url": "https://user:pw@x/"}, r"webhooks\[0\]\.url .*user"),
        ({"url": "https://x:99999/"}, r"webhooks\[0\]\.url .*no URL"),
        ({"tenant": "-x"}, r"webhooks\[0\]\.tenant"),
        ({"topics": ["a*b"]}, r"webhooks\[0\]\.topics"),
        ({"events": ["gone"]}, r"events\[.*\] .* must be one of .*vacated, and is 'gone'"),
        ({"allowed_targets": ["10.0.0.1/8"]}, r"allowed_targets .*host bits"),
        ({"secret_file": "none"}, r"Can't read .*none"),
        ({"more": 1}, r"webhooks\[0\] .* has no setting called `more`"),
        ({"id": "a b"}, r"id"),
    ],
)
def test_mistake_in_the_table_has_a_sentence(
    more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """Each mistake is named with its place, at the start."""
    with pytest.raises(ConfigError, match=says):
        webhook_to("https://x.example/", tmp_path, **more)


def test_secret_is_kept_secret(tmp_path: Path) -> None:
    """A file that others may read, or a secret that is too short, is refused; none is shown."""
    (made,) = webhook_to("https://x.example/hidden?token=hidden", tmp_path)
    (plain,) = webhook_to("https://x.example:8443/", tmp_path)
    assert made.secret == SECRET
    for shown in (repr(made), str(made.view())):
        assert "hidden" not in shown
        assert SECRET.decode() not in shown
    assert made.view() == {
        "id": "hook",
        "url": f"https://x.example#{fingerprint(made.url)}",
        "secret_file": "secret",
        "tenant": "default-tenant",
        "topics": ["**"],
        "events": ["joined", "left", "occupied", "vacated"],
        "allowed_targets": ["127.0.0.1/32"],
    }
    assert plain.shown_url == "https://x.example:8443"

    entry = {"id": "h", "url": "https://x/", "secret_file": "secret", "tenant": "t"}
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 640"):
        read_webhooks({"webhooks": [entry]}, str(tmp_path / "clevrd.toml"))
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(ConfigError, match="has 5 bytes"):
        read_webhooks({"webhooks": [entry]}, str(tmp_path / "clevrd.toml"))
