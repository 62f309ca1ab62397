"""Tenants over real sockets: whose topics a request means, and that none sees another's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import quote

import pytest
from clients import offset_of, offsets, raw_subscriber, subscribe
from daemons import Daemon, running
from http_wire import Response, ask, get, post

BODY = '{"topic":"orders","data":"secret of %s"}'


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """A daemon with its defaults; each test has it answer both ways."""
    async with running(raw_paths=request.param) as running_daemon:
        yield running_daemon


async def publish_as(daemon: Daemon, tenant: str, body: str = BODY) -> Response:
    """Publish with the tenant in the header."""
    return await ask(daemon.port, post(body.replace("%s", tenant), f"X-Tenant-ID: {tenant}"))


async def publish_with(daemon: Daemon, query: str) -> Response:
    """Publish with the tenant in the query."""
    return await ask(daemon.port, post(BODY, line=f"POST /publish?{query} HTTP/1.1"))


async def handshake(daemon: Daemon, query: str, *fields: str) -> Response:
    """Try to subscribe and return the refusal."""
    upgrade = (
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
    )
    return await ask(daemon.port, get(f"/subscribe?{query}", *upgrade, *fields))


async def test_tenants_with_the_same_topic_never_share_a_message(daemon: Daemon) -> None:
    """Live and in the catch-up, each gets its own messages, numbered from 1."""
    for tenant in ("a", "b", "a"):
        await publish_as(daemon, tenant)

    async with (
        subscribe(daemon.ws_url, "orders", tenant="a") as reader_a,
        subscribe(daemon.ws_url, "orders", tenant="b") as reader_b,
        subscribe(daemon.ws_url, "orders") as reader_default,
    ):
        for tenant in ("b", "default-tenant", "a"):
            await publish_as(daemon, tenant)
        of_a = [str(await reader_a.recv()) for _ in range(3)]
        of_b = [str(await reader_b.recv()) for _ in range(2)]
        of_default = [str(await reader_default.recv())]

    for tenant, messages in (("a", of_a), ("b", of_b), ("default-tenant", of_default)):
        assert all(f'"tenant_id":"{tenant}"' in message for message in messages)
        assert all(f'"data":"secret of {tenant}"' in message for message in messages)
        assert [offset_of(message) for message in messages] == list(range(1, len(messages) + 1))


async def test_metrics_keep_tenants_apart(daemon: Daemon) -> None:
    """One entry for each tenant's topic, shown as "tenant:topic", with its own figures."""
    async with subscribe(daemon.ws_url, "orders", tenant="a") as reader:
        for tenant in ("a", "a", "b"):
            await publish_as(daemon, tenant)
        await offsets(reader, upto=2)
        metrics = await daemon.get_json("/metrics")

    figures = {
        (topic["name"], topic["tenant_id"]): (
            topic["messages_published"],
            topic["messages_delivered"],
            topic["total_subscribers"],
        )
        for topic in metrics["topics"]
    }
    assert figures == {("a:orders", "a"): (2, 2, 1), ("b:orders", "b"): (1, 0, 0)}


async def test_who_names_no_tenant_is_the_default_one(daemon: Daemon) -> None:
    """And may as well say so."""
    silent = await ask(daemon.port, post(BODY))
    named = await publish_as(daemon, "default-tenant")

    assert [silent.json["offset"], named.json["offset"]] == [1, 2]
    assert [topic.tenant for topic in daemon.hub.topics] == ["default-tenant"]


async def test_colon_in_a_topic_reaches_no_other_tenant(daemon: Daemon) -> None:
    """Both are shown as "a:b:c", and are two topics: keys are tuples, never joined strings."""
    await publish_as(daemon, "a", '{"topic":"b:c","data":1}')

    other = await publish_as(daemon, "b", '{"topic":"c","data":1}')
    joined = await ask(daemon.port, post('{"topic":"a:b:c","data":1}'))

    assert [other.json["offset"], joined.json["offset"]] == [1, 1]
    found = {(topic.tenant, topic.name) for topic in daemon.hub.topics}
    assert found == {("a", "b:c"), ("b", "c"), ("default-tenant", "a:b:c")}


@pytest.mark.parametrize(
    "topic",
    ["../b/orders", "b:orders", "b%2forders", "b/orders", "*", "b.*", ">", "#", "\u043erders"],
)
async def test_topic_is_a_name_and_nothing_more(daemon: Daemon, topic: str) -> None:
    """Paths, separators, wildcards and look-alikes are topics of the tenant's own."""
    await publish_as(daemon, "b")

    subscriber = await raw_subscriber(daemon.port, f"tenant=a&topic={quote(topic, safe='')}")
    async with subscriber:
        await publish_as(daemon, "b")
        await publish_as(daemon, "a", f'{{"topic":"{topic}","data":"mine"}}')
        frame = await asyncio.wait_for(subscriber.frame(), 5)

    assert b'"tenant_id":"a"' in frame.payload
    assert b'"data":"mine"' in frame.payload
    assert f'"topic":"{topic}"'.encode() in frame.payload


GOOD_NAMES = ["a", "A", "0", "_", "acme", "acme-eu.1", "a..b", "x" * 64, "default-tenant"]
BAD_NAMES = [
    "",
    " ",
    ".",
    "..",
    ".a",
    "-a",
    "a:b",
    "a/b",
    "../a",
    "a\\b",
    "a b",
    "a,b",
    "a%2fb",
    "a*",
    "a\tb",
    "\u0430cme",  # Cyrillic
    "acme\u200b",
    "\uff41cme",  # full width
    "é",
    "x" * 65,
]


@pytest.mark.parametrize("name", GOOD_NAMES)
async def test_good_names_are_taken_as_they_are(daemon: Daemon, name: str) -> None:
    """In the header and in the query they mean the same tenant; case counts."""
    in_header = await publish_as(daemon, name)
    in_query = await publish_with(daemon, f"tenant={name}")

    assert [in_header.json["offset"], in_query.json["offset"]] == [1, 2]
    assert [topic.tenant for topic in daemon.hub.topics] == [name]


@pytest.mark.parametrize("name", BAD_NAMES)
async def test_bad_names_are_refused_everywhere(daemon: Daemon, name: str) -> None:
    """400 for publish and subscribe, in header and query; no tenant and no topic comes of it."""
    encoded = quote(name, safe="")

    answers = [
        await publish_as(daemon, name),
        await publish_with(daemon, f"tenant={encoded}"),
        await handshake(daemon, f"topic=orders&tenant={encoded}"),
        await handshake(daemon, "topic=orders", f"X-Tenant-ID: {name}"),
    ]

    assert [(answer.status, answer.code) for answer in answers] == [(400, "invalid_request")] * 4
    assert all("1 to 64 letters, digits" in answer.json["error"] for answer in answers)
    assert len(daemon.hub.topics) == 0


@pytest.mark.parametrize("encoded", ["%00", "a%00", "a%0d%0ab", "a%2fb", "%2e%2e", "%ff", "a+b"])
async def test_percent_encoding_hides_nothing(daemon: Daemon, encoded: str) -> None:
    """The query is decoded once, then judged."""
    answers = [
        await publish_with(daemon, f"tenant={encoded}"),
        await handshake(daemon, f"topic=orders&tenant={encoded}"),
    ]

    assert [(answer.status, answer.code) for answer in answers] == [(400, "invalid_request")] * 2
    assert len(daemon.hub.topics) == 0


async def test_double_encoding_is_not_decoded_twice(daemon: Daemon) -> None:
    """``%2561`` is ``%61``, which is no name, and not ``a``."""
    answer = await publish_with(daemon, "tenant=%2561")

    assert answer.status == 400


@pytest.mark.parametrize("bad", [b"\0", b"a\0", b"a\x01", b"\xff"])
async def test_bytes_that_are_no_header_are_refused(daemon: Daemon, bad: bytes) -> None:
    """NUL and control characters are no HTTP, other bytes are no name."""
    sent = post(BODY, "X-Tenant-ID: BAD").replace(b"BAD", bad)

    answer = await ask(daemon.port, sent)

    assert (answer.status, answer.code) == (400, "invalid_request")
    assert len(daemon.hub.topics) == 0


async def test_two_different_names_are_refused(daemon: Daemon) -> None:
    """Whoever stands in between may read the other one."""
    both = post(BODY, "X-Tenant-ID: a", line="POST /publish?tenant=b HTTP/1.1")

    answers = [
        await ask(daemon.port, both),
        await ask(daemon.port, post(BODY, "X-Tenant-ID: a", "X-Tenant-ID: b")),
        await publish_with(daemon, "tenant=a&tenant=b"),
        await handshake(daemon, "topic=orders&tenant=a", "X-Tenant-ID: b"),
    ]

    assert [answer.status for answer in answers] == [400] * 4
    assert all("twice" in answer.json["error"] for answer in answers)
    assert len(daemon.hub.topics) == 0


async def test_the_same_name_in_header_and_query_is_fine(daemon: Daemon) -> None:
    """Nothing is in doubt then."""
    answer = await ask(
        daemon.port, post(BODY, "X-Tenant-ID: a", line="POST /publish?tenant=a HTTP/1.1")
    )

    assert answer.status == 200
    assert [topic.tenant for topic in daemon.hub.topics] == ["a"]
