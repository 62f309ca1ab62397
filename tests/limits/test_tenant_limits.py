"""Limits of tenants and keys, over real sockets, the same on every way to publish or subscribe."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from daemons import Daemon, running, until
from hypothesis import given
from hypothesis import strategies as st
from keys import WEB, WRITER, bearer, key

from clevrd.errors import ConnectionLimit
from clevrd.tenants.connection_counts import ConnectionCounts
from clevrd.tenants.settings import Access, read_access
from clevrd.tenants.tenant import Limits, Tenant

ACME = {"X-Tenant-ID": "acme"}
_FOLDER = Path()


def access(mode: str = "open", keys: list[dict[str, Any]] | None = None, **limits: Any) -> Access:
    """Return rules with the tenant acme and its limits."""
    tenants = [{"name": "acme", "keys": keys or [], **limits}]
    return read_access({"auth": {"mode": mode}, "tenants": tenants}, "a test")


def two_keys(**limits: Any) -> list[dict[str, Any]]:
    """Return two keys of one tenant, of which the first has these limits."""
    rights = {"publish": ["**"], "subscribe": ["**"]}
    return [key("web", WEB, **rights, **limits), key("ios", WRITER, **rights)]


class Outcome(msgspec.Struct, frozen=True):
    """What became of one message: its code, empty where it was published, and the sentence."""

    code: str
    sentence: str
    headers: dict[str, str] = {}


def outcome(answer: dict[str, Any], headers: Any = None) -> Outcome:
    """Return what an answer says."""
    sentence = answer.get("error") or answer.get("message", "")
    return Outcome(answer.get("code", ""), sentence, dict(headers or {}))


# --- ways to publish -----------------------------------------------------------------------------

Publish = Callable[[Daemon, list[dict[str, Any]], dict[str, str]], Awaitable[list[Outcome]]]


async def by_post(
    daemon: Daemon, messages: list[dict[str, Any]], headers: dict[str, str]
) -> list[Outcome]:
    """Publish each message by a request of its own."""
    outcomes = []
    for each in messages:
        async with daemon.http.post(
            f"{daemon.url}/publish", data=json.dumps(each), headers=headers
        ) as answer:
            outcomes.append(outcome(await answer.json(), answer.headers))
    return outcomes


async def in_chunks(
    daemon: Daemon, messages: list[dict[str, Any]], headers: dict[str, str]
) -> list[Outcome]:
    """Publish each message by a request that declares no size."""
    outcomes = []
    for each in messages:

        async def body(text: bytes = json.dumps(each).encode()) -> AsyncIterator[bytes]:
            yield text

        async with daemon.http.post(
            f"{daemon.url}/publish", data=body(), headers=headers
        ) as answer:
            outcomes.append(outcome(await answer.json(), answer.headers))
    return outcomes


async def in_a_batch(
    daemon: Daemon, messages: list[dict[str, Any]], headers: dict[str, str]
) -> list[Outcome]:
    """Publish all messages at once."""
    lines = "\n".join(map(json.dumps, messages))
    async with daemon.http.post(
        f"{daemon.url}/publish/batch", data=lines, headers=headers
    ) as answer:
        return [outcome(each) for each in (await answer.json())["results"]]


async def _by_socket(
    daemon: Daemon, path: str, messages: list[dict[str, Any]], headers: dict[str, str], **kind: str
) -> list[Outcome]:
    async with daemon.http.ws_connect(
        f"{daemon.url}{path}", headers=headers, protocols=["clevrd.v1"]
    ) as socket:
        for ref, each in enumerate(messages, 1):
            await socket.send_str(json.dumps({**kind, **each, "ref": ref}))
        return [outcome(json.loads(await socket.receive_str(timeout=10))) for _ in messages]


async def by_socket(
    daemon: Daemon, messages: list[dict[str, Any]], headers: dict[str, str]
) -> list[Outcome]:
    """Publish over a publish socket."""
    return await _by_socket(daemon, "/publish", messages, headers)


async def by_commands(
    daemon: Daemon, messages: list[dict[str, Any]], headers: dict[str, str]
) -> list[Outcome]:
    """Publish by commands."""
    return await _by_socket(daemon, "/ws", messages, headers, type="publish")


PUBLISHES = [by_post, in_chunks, in_a_batch, by_socket, by_commands]


def messages(count: int, topic: str = "t") -> list[dict[str, Any]]:
    """Return small messages."""
    return [{"topic": topic, "data": number} for number in range(count)]


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
def is_raw(request: pytest.FixtureRequest) -> bool:
    """Whether plain requests are answered below aiohttp; each test has both."""
    return bool(request.param)


# --- rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("publish", PUBLISHES)
async def test_tenant_publishes_its_burst_and_not_one_more(publish: Publish, is_raw: bool) -> None:
    """The budget is spent to its last message, on every way; another tenant has its own."""
    rules = access(publish_rate_per_s=0.01, publish_burst=5)
    async with running(access=rules, raw_paths=is_raw) as daemon:
        outcomes = await publish(daemon, messages(8), ACME)
        of_another = await publish(daemon, messages(8), {"X-Tenant-ID": "other"})

    assert [each.code for each in outcomes] == [""] * 5 + ["rate_limited"] * 3
    assert {each.code for each in of_another} == {""}
    assert (
        "Tenant acme is over its publish rate of 0.01 messages per second with a burst of 5"
        " (publish_rate_per_s of the tenant), of which 0 are left; slow down and retry in "
    ) in outcomes[-1].sentence
    if outcomes[-1].headers:
        assert outcomes[-1].headers["RateLimit-Policy"] == '"publish";q=5;w=500'
        assert outcomes[-1].headers["RateLimit"].startswith('"publish";r=0;t=')
        assert int(outcomes[-1].headers["Retry-After"]) > 90


@pytest.mark.parametrize("publish", PUBLISHES)
async def test_key_publishes_its_own_burst_within_its_tenants(
    publish: Publish, is_raw: bool
) -> None:
    """A key at its limit leaves the rest of the tenant's budget to the other keys."""
    keys = two_keys(publish_rate_per_s=0.01, publish_burst=3)
    rules = access("required", keys, publish_rate_per_s=0.01, publish_burst=5)
    async with running(access=rules, raw_paths=is_raw) as daemon:
        of_key = await publish(daemon, messages(5), bearer(WEB))
        of_other_key = await publish(daemon, messages(5), bearer(WRITER))

    assert [each.code for each in of_key] == [""] * 3 + ["rate_limited"] * 2
    assert of_key[-1].sentence.startswith("The key web of tenant acme is over its publish rate")
    assert [each.code for each in of_other_key] == [""] * 2 + ["rate_limited"] * 3
    assert of_other_key[-1].sentence.startswith("Tenant acme is over its publish rate")


async def test_rate_of_the_daemon_is_spent_to_its_last_message_by_runs() -> None:
    """A batch is appended in runs under a rate as well."""
    async with running(publish_rate=0.01, publish_burst=300) as daemon:
        outcomes = await in_a_batch(daemon, messages(310), {})

    assert [each.code for each in outcomes] == [""] * 300 + ["rate_limited"] * 10


@pytest.mark.parametrize("publish", [in_a_batch, by_socket, by_commands])
async def test_messages_that_wait_for_room_spend_the_budget_as_others_do(publish: Publish) -> None:
    """What waits goes on in runs, and a run is never more than what is left of the budget."""
    async with running(publish_rate=0.01, publish_burst=5) as daemon:
        daemon.hub.must_wait = lambda topic: True

        outcomes = await publish(daemon, messages(8), {})

    assert [each.code for each in outcomes] == [""] * 5 + ["rate_limited"] * 3


async def test_changed_rate_holds_for_sockets_that_are_open() -> None:
    """A reload changes the limit at once, and gives no fresh burst."""
    codes: list[str] = []
    async with (
        running(access=access(publish_rate_per_s=0.01, publish_burst=2)) as daemon,
        daemon.http.ws_connect(f"{daemon.url}/publish", headers=ACME) as socket,
    ):
        for number in range(6):
            if number == 3:
                # A publish that waits a turn for its share of the loop regains a part of a token.
                await daemon.server.access.apply(access(publish_rate_per_s=40), _FOLDER)
            await socket.send_str(json.dumps({"topic": "t", "data": 1, "ref": 1}))
            codes.append(outcome(json.loads(await socket.receive_str())).code)
            # The new rate runs from the first publish under it, to which it leaves what there was.
            await asyncio.sleep(0.03)

    assert codes == ["", "", "rate_limited", "rate_limited", "", ""]


# --- sizes and topics ----------------------------------------------------------------------------


@pytest.mark.parametrize("publish", PUBLISHES)
async def test_message_over_the_tenants_size_is_refused_alone(
    publish: Publish, is_raw: bool
) -> None:
    """413 names the limit and the size; messages before and behind it are published."""
    small, large = {"topic": "t", "data": "x"}, {"topic": "t", "data": "x" * 2_000}
    async with running(access=access(max_message_bytes=1_000), raw_paths=is_raw) as daemon:
        outcomes = await publish(daemon, [small, large, small], ACME)
        of_another = await publish(daemon, [large], {})

    assert [each.code for each in outcomes] == ["", "message_too_large", ""]
    assert [each.code for each in of_another] == [""]
    assert "bytes is larger than 1000 bytes" in outcomes[1].sentence
    assert "(max_message_bytes of tenant acme)" in outcomes[1].sentence
    assert "The body of 20" in outcomes[1].sentence


async def test_declared_size_is_refused_before_the_body_is_sent(is_raw: bool) -> None:
    """A client that asks whether it may send is told no."""
    async with running(access=access(max_message_bytes=1_000), raw_paths=is_raw) as daemon:
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        fields = b"Host: x\r\nX-Tenant-ID: acme\r\nContent-Length: 1001"
        writer.write(b"POST /publish HTTP/1.1\r\n" + fields + b"\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.close()

    assert head.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("publish", PUBLISHES)
async def test_tenant_has_so_many_topics(publish: Publish, is_raw: bool) -> None:
    """Its own limit counts and not the one for all, be it lower or higher."""
    wanted = [{"topic": f"t{number}", "data": 1} for number in range(4)]
    rules = access(max_topics=3)
    async with running(access=rules, raw_paths=is_raw, max_topics_per_tenant=2) as daemon:
        outcomes = await publish(daemon, wanted, ACME)
        of_another = await publish(daemon, wanted, {"X-Tenant-ID": "other"})

    assert [each.code for each in outcomes] == ["", "", "", "unavailable"]
    assert outcomes[-1].sentence == (
        "Tenant acme has 3 topics (max_topics of the tenant), of 3 that it may have;"
        " use an existing one, or come back in 60 s."
    )
    assert [each.code for each in of_another] == ["", "", "unavailable", "unavailable"]
    if outcomes[-1].headers:
        assert outcomes[-1].headers["RateLimit"] == '"topics";r=0;t=60'


# --- subscriptions of a connection ---------------------------------------------------------------


@pytest.mark.parametrize("accept", ["application/x-ndjson", "text/event-stream", ""])
async def test_url_may_name_so_many_topics(accept: str, is_raw: bool) -> None:
    """Streams and polls; patterns count as topics do."""
    headers = {**ACME, "Accept": accept} if accept else ACME
    poll = "" if accept else "&poll=1&timeout=0"
    rules = access(max_subscriptions_per_connection=2)
    async with running(access=rules, raw_paths=is_raw) as daemon:
        url = f"{daemon.url}/subscribe?topic=a&pattern=b.*{poll}"
        async with daemon.http.get(url, headers=headers) as within:
            pass
        async with daemon.http.get(f"{url}&topic=c", headers=headers) as over:
            refused = outcome(await over.json())
        async with daemon.http.get(f"{url}&topic=c", headers={"Accept": accept}) as other:
            pass

    assert (within.status, over.status, other.status) == (200, 400, 200)
    assert refused.sentence == (
        "A connection may have 2 subscriptions (max_subscriptions_per_connection of tenant acme),"
        " and this one would have 3; open another one, or raise the limit."
    )


async def test_commands_may_subscribe_to_so_many_topics(is_raw: bool) -> None:
    """One more is refused by its ref; after an unsubscribe there is room."""
    rules = access(max_subscriptions_per_connection=2)
    async with (
        running(access=rules, raw_paths=is_raw) as daemon,
        daemon.http.ws_connect(f"{daemon.url}/ws", headers=ACME, protocols=["clevrd.v1"]) as socket,
    ):
        answers: list[dict[str, Any]] = []
        for kind, fields in [
            ("subscribe", {"topic": "a"}),
            ("subscribe", {"pattern": "b.*"}),
            ("subscribe", {"topic": "c"}),
            ("subscribe", {"pattern": "d.*"}),
            ("unsubscribe", {"topic": "a"}),
            ("subscribe", {"topic": "c"}),
        ]:
            await socket.send_str(json.dumps({"type": kind, **fields, "ref": len(answers)}))
            answers.append(json.loads(await socket.receive_str(timeout=5)))

    assert [each["type"] for each in answers] == [
        "subscribed",
        "watching",
        "error",
        "error",
        "unsubscribed",
        "subscribed",
    ]
    assert "max_subscriptions_per_connection of tenant acme" in outcome(answers[2]).sentence


# --- connections ---------------------------------------------------------------------------------


@asynccontextmanager
async def socket_at(daemon: Daemon, path: str, headers: dict[str, str]) -> AsyncIterator[Any]:
    """Open a WebSocket."""
    async with daemon.http.ws_connect(
        f"{daemon.url}{path}", headers=headers, protocols=["clevrd.v1"]
    ) as socket:
        yield socket


@asynccontextmanager
async def stream_at(daemon: Daemon, path: str, headers: dict[str, str]) -> AsyncIterator[Any]:
    """Open a stream."""
    lines = {**headers, "Accept": "application/x-ndjson"}
    async with daemon.http.get(f"{daemon.url}{path}", headers=lines) as answer:
        if answer.status != 200:
            raise Refusal(outcome(await answer.json(), answer.headers), answer.status)
        yield answer


@asynccontextmanager
async def poll_at(daemon: Daemon, path: str, headers: dict[str, str]) -> AsyncIterator[Any]:
    """Begin a poll that waits."""

    async def ask() -> None:
        async with daemon.http.get(f"{daemon.url}{path}", headers=headers) as answer:
            if answer.status != 200:
                raise Refusal(outcome(await answer.json(), answer.headers), answer.status)

    waiting = len(daemon.polls)
    task = asyncio.create_task(ask())
    try:
        await until(lambda: len(daemon.polls) > waiting or task.done())
        if task.done():
            await task
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Refusal):
            await task


class Refusal(Exception):
    """An answer that was no subscription."""

    def __init__(self, outcome: Outcome, status: int) -> None:
        super().__init__(outcome.sentence)
        self.outcome = outcome
        self.status = status


# A poll whose client has shut its side down is answered all the same, and counts until then.
CONNECTIONS: dict[str, tuple[Any, str]] = {
    "websocket": (socket_at, "/subscribe?topic=t"),
    "commands": (socket_at, "/ws"),
    "publish socket": (socket_at, "/publish"),
    "stream": (stream_at, "/subscribe?topic=t"),
    "many topics": (stream_at, "/subscribe?topic=t&pattern=u.*"),
    "poll": (poll_at, "/subscribe?topic=t&poll=1&timeout=3"),
    "poll of many": (poll_at, "/subscribe?topic=t&topic=u&poll=1&timeout=3"),
}


async def refusal_of(daemon: Daemon, kind: str, headers: dict[str, str]) -> tuple[int, str]:
    """Try to connect; return the status and the machine code, or 200."""
    open_, path = CONNECTIONS[kind]
    try:
        async with open_(daemon, path, headers):
            return 200, ""
    except Refusal as refusal:
        return refusal.status, refusal.outcome.code
    except aiohttp.WSServerHandshakeError as error:
        fields: Any = error.headers or {}
        is_limit = (
            fields.get("RateLimit-Policy") == '"connections";q=2;qu="concurrent-requests"'
            or fields.get("RateLimit-Policy") == '"connections";q=6;qu="concurrent-requests"'
        )
        is_told_when = fields.get("Retry-After") == "10"
        return error.status, "connection_limit" if is_limit and is_told_when else "?"


@pytest.mark.parametrize("kind", CONNECTIONS)
async def test_tenant_has_so_many_connections_of_every_kind(kind: str, is_raw: bool) -> None:
    """All kinds count together; an end frees a place; another tenant has its own."""
    rules = access(max_connections=2)
    async with running(access=rules, raw_paths=is_raw) as daemon:
        open_, path = CONNECTIONS[kind]
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(stream_at(daemon, "/subscribe?topic=a", ACME))
            async with open_(daemon, path, ACME):
                refused = {each: await refusal_of(daemon, each, ACME) for each in CONNECTIONS}
                of_another = await refusal_of(daemon, kind, {})
                published = await by_post(daemon, messages(1), ACME)
            await until(lambda: daemon.hub.connection_counts._of_tenants.of("acme") == 1)
            later = await refusal_of(daemon, kind, ACME)
        await until(lambda: len(daemon.hub.connection_counts) == 0)

    assert refused == dict.fromkeys(CONNECTIONS, (429, "connection_limit"))
    assert (of_another, later, published[0].code) == ((200, ""), (200, ""), "")
    assert daemon.hub.counters.refused["connection_limit"] == len(CONNECTIONS)


async def test_key_has_so_many_connections(is_raw: bool) -> None:
    """Its limit is its own, and names it; the tenant's other key goes on."""
    rules = access("required", two_keys(max_connections=1), max_connections=3)
    async with running(access=rules, raw_paths=is_raw) as daemon:
        async with stream_at(daemon, "/subscribe?topic=a", bearer(WEB)):
            with pytest.raises(Refusal) as of_key:
                async with stream_at(daemon, "/subscribe?topic=a", bearer(WEB)):
                    pass
            others = [await refusal_of(daemon, "stream", bearer(WRITER)) for _ in range(2)]
        await until(lambda: len(daemon.hub.connection_counts) == 0)

    assert others == [(200, "")] * 2
    assert of_key.value.outcome.sentence == (
        "The key web of tenant acme has 1 connections of 1 that it may have"
        " (max_connections of the key); close some, or come back in 10 s."
    )


async def test_event_source_at_the_limit_comes_back() -> None:
    """A 429 would end it for good: it gets an error event, and when to retry."""
    headers = {**ACME, "Accept": "text/event-stream"}
    async with (
        running(access=access(max_connections=1)) as daemon,
        stream_at(daemon, "/subscribe?topic=a", ACME),
        daemon.http.get(f"{daemon.url}/subscribe?topic=a", headers=headers) as answer,
    ):
        text = await answer.text()

    assert answer.status == 200
    assert "retry: 1" in text
    assert '"code":"connection_limit"' in text


async def test_made_up_tenants_leave_room_for_known_ones() -> None:
    """Whatever names they take, a quarter of all connections is not theirs."""
    async with running(access=access(), max_connections=8) as daemon, AsyncExitStack() as stack:
        for number in range(6):
            made_up = {"X-Tenant-ID": f"made-up-{number}"}
            await stack.enter_async_context(socket_at(daemon, "/ws", made_up))
        refused = await refusal_of(daemon, "commands", {"X-Tenant-ID": "made-up-9"})
        # The client would keep its connection for another request.
        daemon.listener.raw.close_idle()
        await until(lambda: not daemon.listener.raw.open)
        known = [await refusal_of(daemon, "commands", each) for each in ({}, ACME)]

    assert refused == (429, "connection_limit")
    assert known == [(200, ""), (200, "")]


async def test_counts_follow_a_tenant_that_is_changed_and_end_at_zero() -> None:
    """Opened, closed, cut, refused and reloaded at random, nothing stays counted."""
    source = random.Random(5)  # noqa: S311  # the same run each time, no secret
    rules = [
        access("required", two_keys(max_connections=3), max_connections=5),
        access("required", two_keys(), max_connections=4),
        access("required", two_keys()[1:]),
    ]

    async def visit(daemon: Daemon) -> None:
        open_, path = CONNECTIONS[source.choice([*CONNECTIONS])]
        headers = bearer(source.choice([WEB, WRITER]))
        with suppress(Refusal, aiohttp.ClientError):
            async with open_(daemon, path, headers) as opened:
                await asyncio.sleep(source.random() / 50)
                if source.random() < 0.3 and isinstance(opened, aiohttp.ClientWebSocketResponse):
                    assert opened._response.connection is not None
                    transport = opened._response.connection.transport
                    assert transport is not None
                    transport.abort()

    async with running(access=rules[0]) as daemon:
        for _ in range(8):
            async with asyncio.TaskGroup() as visitors:
                for _ in range(12):
                    visitors.create_task(visit(daemon))
                await asyncio.sleep(0.01)
                await daemon.server.access.apply(source.choice(rules), _FOLDER)
        await until(lambda: len(daemon.hub.connection_counts) == 0)

        assert daemon.hub.counters.background_errors == 0
        assert daemon.hub.connection_counts._made_up == 0


TENANTS = [
    Tenant("a", limits=Limits(max_connections=3)),
    Tenant("a", limits=Limits(max_connections=3), credential_id="k"),
    Tenant(
        "a",
        limits=Limits(max_connections=3),
        key_limits=Limits(max_connections=1),
        credential_id="l",
    ),
    Tenant("default-tenant"),
    Tenant("made-up"),
]
STEPS = st.lists(
    st.tuples(st.sampled_from(["open", "close", "move", "know"]), st.integers(0, 20)), max_size=60
)


@given(steps=STEPS)
def test_counts_are_those_of_the_open_connections(steps: list[tuple[str, int]]) -> None:
    """Opened only within the limits, moved and closed in any order, all counts are exact."""
    counts = ConnectionCounts()
    counts.bound(4)
    known: frozenset[str] | None = frozenset({"default-tenant"})
    counts.know(known)
    open_now: list[Tenant] = []

    for step, number in steps:
        tenant = TENANTS[number % len(TENANTS)]
        made_up = [t for t in open_now if known is not None and t.name not in known]
        if step == "open":
            is_made_up = known is not None and tenant.name not in known
            is_over = (
                (tenant.name == "a" and sum(t.name == "a" for t in open_now) >= 3)
                or (tenant.credential_id == "l" and tenant in open_now)
                or (is_made_up and len(made_up) >= 3)
            )
            try:
                counts.check(tenant)
            except ConnectionLimit:
                assert is_over
                continue
            assert not is_over
            counts.take(tenant)
            open_now.append(tenant)
        elif step == "know":
            known = [None, frozenset({"a"}), frozenset({"default-tenant"})][number % 3]
            counts.know(known)
        elif open_now:
            index = number % len(open_now)
            if step == "move":
                counts.move(open_now[index], tenant)
                open_now[index] = tenant
            else:
                counts.give_back(open_now.pop(index))

    for tenant in open_now:
        counts.give_back(tenant)
    assert (len(counts), counts._made_up) == (0, 0)


def test_only_keys_with_a_limit_are_counted() -> None:
    """A token's subject may read like a key's name, and has nothing to do with it."""
    counts = ConnectionCounts()
    of_key = Tenant("acme", key_limits=Limits(max_connections=1), credential_id="web")
    of_token = Tenant("acme", credential_id="web")

    counts.take(of_token)
    counts.check(of_key)
    counts.take(of_key)

    counts.check(of_token)
    with pytest.raises(ConnectionLimit):
        counts.check(of_key)
    counts.give_back(of_key)
    counts.give_back(of_token)
    assert len(counts) == 0
