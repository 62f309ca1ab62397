"""/admin over real sockets: what operators see and do, who they are, and what is refused."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from clients import client_of, subscribe
from daemons import ROOT, Daemon, FakeStats, running, until
from keys import ADMIN, OTHER, READER, WEB, WRITER, access, bearer, rules
from websockets.exceptions import ConnectionClosed

from clevrd.hub.explanations import note_closed
from clevrd.metrics.decisions import Decisions
from clevrd.tenants.keys import NewKey
from clevrd.tenants.settings import read_access

PATHS = [
    ("GET", "/admin/top"),
    ("GET", "/admin/explain"),
    ("GET", "/admin/subscribers"),
    ("DELETE", "/admin/subscribers?id=1"),
    ("DELETE", "/admin/topics?topic=t"),
    ("GET", "/admin/messages?topic=t"),
    ("DELETE", "/admin/messages?topic=t"),
    ("GET", "/metrics/tenants"),
]


async def ask(
    daemon: Daemon,
    path: str,
    method: str = "GET",
    made: NewKey | None = None,
    url: str = "",
    /,
    **fields: str,
) -> tuple[int, dict[str, Any]]:
    """Ask with a key or without one; return the status and the JSON."""
    headers = {name.replace("_", "-"): value for name, value in fields.items()}
    headers |= bearer(made) if made else {}
    async with daemon.http.request(method, f"{url or daemon.url}{path}", headers=headers) as answer:
        return answer.status, await answer.json()


async def seen(
    daemon: Daemon, path: str, method: str = "GET", made: NewKey | None = None
) -> dict[str, Any]:
    """Return an answer that has to be 200."""
    status, found = await ask(daemon, path, method, made)
    assert status == 200, found
    return found


@pytest_asyncio.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """An open daemon, with a listener for operators."""
    async with running(admin_address="127.0.0.1:0", ring_messages=500) as daemon:
        yield daemon


def codes(explained: dict[str, Any]) -> list[str]:
    return [each["code"] for each in explained["decisions"]]


# --- who may ---


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_only_admins_are_let_in(method: str, path: str) -> None:
    """A tenant's key is refused, whatever else it may; the permission is for the whole daemon."""
    async with running(access=access()) as daemon:
        await daemon.publish("t", 1, **bearer(OTHER))
        without, _ = await ask(daemon, path, method)
        refused = [(await ask(daemon, path, method, made))[0] for made in (WEB, READER, OTHER)]
        let_in, _ = await ask(daemon, path, method, ADMIN)

    assert (without, refused) == (401, [403, 403, 403])
    # The topic is another tenant's, and nobody has the id.
    assert let_in in (200, 404)


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_open_mode_lets_this_machine_in_alone(method: str, path: str) -> None:
    """Not what came through a proxy, and not what was asked for by a name of the internet."""
    async with running() as daemon:
        through, refusal = await ask(daemon, path, method, X_Forwarded_For="192.0.2.1")
        here, _ = await ask(daemon, path, method)

    assert (through, refusal["code"]) == (403, "forbidden")
    assert here in (200, 404)


async def test_tenant_that_is_meant_is_not_the_one_that_asks() -> None:
    """An admin's key is one of a tenant, and `tenant=` names any."""
    async with running(access=access()) as daemon:
        await daemon.publish("plans", 7, **bearer(OTHER))

        tail = await seen(daemon, "/admin/messages?tenant=other&topic=plans", "GET", ADMIN)

    assert [message["data"] for message in tail["messages"]] == [7]


async def test_admin_listener_serves_it_all(daemon: Daemon) -> None:
    """Without a credential, and to those alone who reach it."""
    (url,) = daemon.server.admin_addresses
    await daemon.publish("t", 1)

    answers = [
        (await ask(daemon, path, method, None, url, Via="1.1 p"))[0] for method, path in PATHS
    ]

    assert answers == [200, 200, 200, 404, 200, 200, 200, 200]


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example:1", 403), ("[2001:db8::1]:1", 200), ("192.0.2.7:1", 200), ("ops:1", 200)],
)
async def test_page_of_a_public_name_may_change_nothing_at_the_listener(
    host: str, status: int
) -> None:
    """Its name may be made to mean the listener's address, beyond loopback undetected."""
    async with running(admin_address=":0") as daemon:
        url = f"http://127.0.0.1:{daemon.server.admin_addresses[0].rsplit(':', 1)[1]}"
        await daemon.publish("t", 1)
        origin = {"Origin": f"http://{host}", "Host": host}

        answer, _ = await ask(daemon, "/admin/topics?topic=t", "DELETE", None, url, **origin)

    assert answer == status


async def test_form_of_a_page_can_do_nothing(daemon: Daemon) -> None:
    """A form sends GET and POST; neither changes anything, wherever it stands."""
    await daemon.publish("t", 1)
    for path in ("/admin/topics?topic=t", "/admin/messages?topic=t", "/admin/subscribers?id=1"):
        status, refusal = await ask(daemon, path, "POST", Origin=daemon.url)
        assert (status, refusal["code"]) == (405, "method_not_allowed")
    crossing, refusal = await ask(
        daemon, "/admin/topics?topic=t", "DELETE", Origin="https://shop.example"
    )

    assert (crossing, refusal["code"]) == (403, "origin_not_allowed")
    assert (await seen(daemon, "/admin/messages?topic=t"))["offset"] == 1


# --- wrong requests ---


@pytest.mark.parametrize(
    ("method", "path", "status", "part"),
    [
        ("GET", "/admin/restart", 404, "under /admin/ are /admin/top, /admin/explain"),
        ("DELETE", "/admin/top", 405, "use GET or HEAD"),
        ("GET", "/admin/top?n=0", 400, "n must be a whole number from 1 to 100"),
        ("GET", "/admin/top?n=1&n=2", 400, "n is given twice"),
        ("GET", "/admin/top?limit=5", 400, "'limit' is not known here; those that are: n."),
        ("GET", "/admin/explain?tenant=a%20b", 400, "The tenant's name must be"),
        ("GET", "/admin/subscribers?topic=", 400, "topic"),
        ("DELETE", "/admin/subscribers", 400, "The option id is missing"),
        ("DELETE", "/admin/subscribers?id=x", 400, "id must be a whole number"),
        ("DELETE", "/admin/subscribers?id=77", 404, "No open connection has this id"),
        ("DELETE", "/admin/topics", 400, "The option topic is missing"),
        ("DELETE", "/admin/topics?topic=t&tenent=acme", 400, "'tenent' is not known here"),
        ("DELETE", "/admin/topics?topic=none", 404, "no topic of this name in use"),
        ("GET", "/admin/messages?topic=t&last=101", 400, "last must be a whole number from 1"),
    ],
)
async def test_wrong_request_is_told_what_is_wrong(
    daemon: Daemon, method: str, path: str, status: int, part: str
) -> None:
    """In a sentence; and nothing is changed by it."""
    await daemon.publish("t", 1)

    answer, refusal = await ask(daemon, path, method)

    assert answer == status
    assert part in refusal["error"]
    assert (await seen(daemon, "/admin/messages?topic=t"))["offset"] == 1


async def test_accept_that_names_nothing_gets_json(daemon: Daemon) -> None:
    """Everything under /admin is JSON; figures are, where nothing else is liked better."""
    for path in ("/admin/top", "/admin/explain", "/metrics", "/metrics/tenants"):
        for accept in ("image/png", "text/plain;q=0", ";;;", "a" * 4_000):
            headers = {"Accept": accept}
            async with daemon.http.get(f"{daemon.url}{path}", headers=headers) as answer:
                assert (answer.status, answer.content_type) == (200, "application/json")


async def test_request_that_is_cut_in_half_harms_nobody(daemon: Daemon) -> None:
    """The client goes in the middle of its request, or before it has read the answer."""
    async with subscribe(daemon.ws_url, "t") as reader:
        for sent in (b"GET /admin/top HTTP/1.1\r\nHost: a\r\n", b"GET /metrics?topics=10000 HTTP"):
            _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
            writer.write(sent)
            await writer.drain()
            writer.close()
        for path in ("/admin/top?n=100", "/metrics?topics=10000", "/admin/explain"):
            _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            await writer.drain()
            writer.transport.abort()

        await daemon.publish("t", 1)
        message = json.loads(await reader.recv())

    assert message["data"] == 1
    assert daemon.hub.counters.background_errors == 0


# --- the view ---


async def test_top_shows_topics_rings_and_the_one_snapshot(daemon: Daemon) -> None:
    """The busiest first, the largest first, and the figures that /metrics has."""
    async with subscribe(daemon.ws_url, "busy") as reader:
        for number in range(5):
            await daemon.publish("busy", number)
            await reader.recv()
        await daemon.publish("large", "x" * 10_000)

        top = await seen(daemon, "/admin/top?n=1")
        metrics = await seen(daemon, "/metrics")

    assert [row["topic"] for row in top["busiest_topics"]] == ["busy"]
    assert [row["topic"] for row in top["largest_rings"]] == ["large"]
    assert top["interval_s"] is None
    assert top["figures"].keys() == metrics.keys()
    assert top["figures"]["messages"] == metrics["messages"]
    for figures in (top["figures"], metrics):
        traffic = figures["traffic"]
        assert traffic["to_socket_s"]["counts"][-1] == 5
        assert len(traffic["loop_lag_s"]["bounds"]) == len(traffic["loop_lag_s"]["counts"]) - 1
        reasons = {"slow_consumer", "retention", "memory", "expired"}
        assert set(figures["messages"]["dropped"]) == reasons


async def test_slow_subscriber_is_on_top_and_can_be_disconnected(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    """Its end has a code by which it comes back later, and a line in the log."""
    async with client_of(f"{daemon.ws_url}/subscribe?topic=t&control=1") as fast:
        await fast.recv()
        stalled = daemon.only_subscriber()
        stalled.pause_writing()
        for number in range(300):
            await daemon.publish("t", number)

        top = await seen(daemon, "/admin/top")
        (row,) = top["slowest_by_lag"]
        listed = await seen(daemon, "/admin/subscribers?topic=t")
        with caplog.at_level(logging.WARNING):
            gone = await seen(daemon, f"/admin/subscribers?id={row['id']}", "DELETE")
        stalled.resume_writing()
        with suppress(ConnectionClosed):
            while True:
                await fast.recv()
        again, _ = await ask(daemon, f"/admin/subscribers?id={row['id']}", "DELETE")
        explained = await seen(daemon, "/admin/explain?tenant=default-tenant")

    assert (row["topic"], row["state"], row["lag_messages"]) == ("t", "stalled", 300)
    assert (row["policy"], row["transport"], row["address"]) == (
        *("drop_oldest", "websocket"),
        "127.0.0.1",
    )
    assert (listed["total"], listed["subscribers"][0]["id"]) == (1, row["id"])
    assert gone == {"id": row["id"], "tenant_id": "default-tenant", "address": "127.0.0.1"}
    assert (fast.close_code, fast.close_reason) == (4104, "disconnected")
    assert again == 404
    assert "by='this machine (127.0.0.1)' tenant=default-tenant" in caplog.text
    assert "disconnected" in codes(explained)


async def test_stream_is_told_why_an_operator_ended_it(daemon: Daemon) -> None:
    """In an error that says to come back."""
    url = f"{daemon.url}/subscribe?topic=t"
    async with daemon.http.get(url, headers={"Accept": "application/x-ndjson"}) as stream:
        found = await seen(daemon, "/admin/subscribers")
        (row,) = found["subscribers"]
        await seen(daemon, f"/admin/subscribers?id={row['id']}", "DELETE")
        last = json.loads((await stream.content.read()).splitlines()[-1])

    assert row["transport"] == "ndjson"
    assert (last["type"], last["code"], last["retryable"]) == ("error", "disconnected", True)


async def test_views_within_a_second_are_one(daemon: Daemon) -> None:
    """Many pages that refresh cost one look at all topics."""
    first, *others = await asyncio.gather(*(seen(daemon, "/admin/top") for _ in range(5)))

    assert {each["taken_at"] for each in others} == {first["taken_at"]}


async def test_limited_keys_are_told(daemon: Daemon) -> None:
    """Those that were refused most often first, with the sentence that they got."""
    async with running(access=access("open"), publish_rate=1, publish_burst=1) as limited:
        for made, times in ((WRITER, 4), (OTHER, 2)):
            for _ in range(times):
                body = b'{"topic":"t","data":1}'
                await limited.http.post(f"{limited.url}/publish", data=body, headers=bearer(made))

        top = await seen(limited, "/admin/top")
        explained = await seen(limited, "/admin/explain?tenant=acme")

    rows = [(row["tenant_id"], row["credential"], row["code"]) for row in top["most_limited"]]
    assert rows == [("acme", "writer", "rate_limited"), ("other", "all", "rate_limited")]
    assert [row["refusals"] for row in top["most_limited"]] == [3, 1]
    (decision,) = explained["decisions"]
    assert decision["scope"] == {
        "kind": "key",
        "tenant_id": "acme",
        "credential": "writer",
        "topic": "",
    }
    assert (decision["count"], decision["thresholds"]) == (3, {"rate_per_s": 1.0, "burst": 1})
    assert decision["ends_at"] > decision["last_at"]


# --- what is explained ---


@pytest.mark.parametrize("raw_paths", [True, False])
async def test_refusal_concerns_the_tenant_whose_request_it_is(raw_paths: bool) -> None:
    """On each way to publish and to subscribe; without a valid credential it is the request's."""
    rules = access()
    async with running(access=rules, raw_paths=raw_paths, max_topics_per_connection=2) as daemon:
        http, url, key = daemon.http, daemon.url, bearer(OTHER)
        await http.post(f"{url}/publish", data=b"{", headers=key)
        await http.post(f"{url}/publish/batch", data=b"[1]", headers=key)
        await http.get(f"{url}/subscribe?topic=t&last=x", headers=key)
        async with http.ws_connect(f"{url}/publish", headers=key) as publisher:
            await publisher.send_str('{"ref":1}')
            await publisher.receive_json()
        async with http.ws_connect(f"{url}/ws", headers=key, protocols=("clevrd.v1",)) as both:
            for topic in ("a", "b", "c"):
                await both.send_json({"type": "subscribe", "topic": topic, "last": 0})
            while (await both.receive_json())["type"] != "error":
                pass
        await http.post(f"{url}/publish", data=b"{")
        explained = await seen(daemon, "/admin/explain", "GET", ADMIN)

    found = {(each["code"], each["scope"]["kind"]): each for each in explained["decisions"]}
    assert set(found) == {("invalid_request", "key"), ("unauthorized", "request")}
    wrong = [each for each in explained["decisions"] if each["code"] == "invalid_request"]
    assert {(each["scope"]["tenant_id"], each["scope"]["credential"]) for each in wrong} == {
        ("other", "all")
    }
    assert sorted(each["count"] for each in wrong) == [1, 4]
    assert [each["thresholds"] for each in wrong if each["count"] == 1] == [{"limit": 2}]


@pytest.mark.parametrize("raw_paths", [True, False])
@pytest.mark.parametrize(("proxies", "client"), [([], "127.0.0.1"), (["127.0.0.1"], "192.0.2.7")])
async def test_client_without_a_valid_credential_is_named_by_its_address(
    raw_paths: bool, proxies: list[str], client: str
) -> None:
    """Nothing else tells whom to block; behind a listed proxy it is the client's own."""
    rules = access(trusted_proxies=proxies)
    async with running(access=rules, raw_paths=raw_paths) as daemon:
        for _ in range(3):
            wrong = {"Authorization": "Bearer wrong", "X-Forwarded-For": "192.0.2.7"}
            await daemon.http.post(f"{daemon.url}/publish", data=b"{}", headers=wrong)
        explained = await seen(daemon, "/admin/explain", "GET", ADMIN)

    (decision,) = explained["decisions"]
    assert (decision["code"], decision["count"]) == ("unauthorized", 3)
    assert decision["rule"].endswith(f" The first was from {client}.")


@pytest.mark.parametrize("raw_paths", [True, False])
async def test_key_that_was_withdrawn_is_nobodys_where_it_was_known(raw_paths: bool) -> None:
    """The same head came before, on the same connection, when the key was still somebody's."""
    left = rules()
    left["tenants"] = [each for each in left["tenants"] if each["name"] != "other"]
    async with running(access=access(), raw_paths=raw_paths) as daemon:
        statuses = [await publish_status(daemon)]
        await daemon.server.access.apply(read_access(left, "a test"), Path())
        statuses.append(await publish_status(daemon))
        explained = await seen(daemon, "/admin/explain", "GET", ADMIN)

    assert statuses == [200, 401]
    (decision,) = explained["decisions"]
    assert (decision["code"], decision["scope"]["kind"]) == ("unauthorized", "request")


async def publish_status(daemon: Daemon) -> int:
    """Return how a publish with the key OTHER is answered."""
    body = b'{"topic":"t","data":1}'
    async with daemon.http.post(f"{daemon.url}/publish", data=body, headers=bearer(OTHER)) as found:
        return found.status


async def test_each_close_is_explained_once() -> None:
    """By its reason, and whose it was; a stop, and what is explained as a refusal, are none."""
    async with running(max_message_bytes=1_000) as daemon:
        http, url = daemon.http, daemon.url
        async with http.ws_connect(f"{url}/publish", headers={"X-Tenant-ID": "acme"}) as socket:
            await socket.send_bytes(b"binary")
            await socket.receive()
        for _ in range(2):
            async with http.ws_connect(f"{url}/publish") as socket:
                await socket.send_str("x" * 2_000)
                await socket.receive()
        async with http.ws_connect(f"{url}/subscribe?topic=t") as socket:
            await socket.send_str("x" * 5_000)
            await socket.receive()
        explained = await seen(daemon, "/admin/explain")

    found = {
        (each["code"], each["scope"]["tenant_id"], each["count"], each["rule"])
        for each in explained["decisions"]
    }
    too_big = "Connections were closed with 1009: the client sent a larger message than it may."
    assert found == {
        (
            *("text_frames_only", "acme", 1),
            "Connections were closed with 1003: the client sent a binary frame.",
        ),
        ("message_too_big", "default-tenant", 3, too_big),
    }
    assert {each["kind"] for each in explained["decisions"]} == {"disconnect"}


def test_each_close_that_is_no_refusal_has_its_words() -> None:
    """One that is added later is explained, too, or is told elsewhere."""
    told_elsewhere = {1012, 4003, 4004, 4101, 4104}
    documented = {
        int(code): re.findall(r"`(\w+)`", reasons)
        for code, reasons in re.findall(
            r"^\| (\d{4}) \| (.*?) \|", (ROOT / "docs" / "wire.md").read_text(), re.MULTILINE
        )
    }
    as_refusals = {(1011, "internal_error"), (1013, "too_many_topics"), (1013, "unavailable")}
    silent = [
        (code, reason)
        for code, reasons in documented.items()
        for reason in reasons
        if code not in told_elsewhere and (code, reason) not in as_refusals
    ]
    decisions = Decisions(lambda: 0.0, lambda _: "")
    for code, reason in silent:
        note_closed(decisions, code, reason, "t", "")

    assert len(silent) > 15
    assert len(decisions) == len(silent)


async def test_each_bound_is_explained_with_its_figures() -> None:
    """Also where several have one error code."""
    bounds: dict[str, Any] = {"max_topics": 2, "max_topics_per_tenant": 1, "max_connections": 1}
    async with running(admin_address="127.0.0.1:0", **bounds) as daemon:
        (operators,) = daemon.server.admin_addresses
        await daemon.publish("t", 1)
        await daemon.publish("t", 1, **{"X-Tenant-ID": "b"})
        for tenant in ("b", "c"):
            body, whose = b'{"topic":"u","data":1}', {"X-Tenant-ID": tenant}
            await daemon.http.post(f"{daemon.url}/publish", data=body, headers=whose)
        async with daemon.http.ws_connect(f"{daemon.url}/subscribe?topic=t"):
            refused = await daemon.send_raw(b"POST /publish HTTP/1.1\r\nHost: localhost\r\n\r\n")
            async with daemon.http.get(f"{operators}/admin/explain") as answer:
                explained = await answer.json()

    assert refused.startswith(b"HTTP/1.1 503 ")
    found = {
        name: (each["scope"]["tenant_id"], limit)
        for each in explained["decisions"]
        if each["code"] == "unavailable"
        for name, limit in each["thresholds"].items()
    }
    assert found == {"max_connections": ("", 1), "max_topics": ("", 2), "limit": ("b", 1)}


async def test_throttle_is_explained_by_topic() -> None:
    """The rule, what it was decided from, its limits, and when it ends."""
    stats = FakeStats(cpu=0.95)
    async with running(stats=stats) as daemon, subscribe(daemon.ws_url, "t"):
        reader = daemon.only_reader()
        reader.last_drop_s = daemon.hub.now_s()
        daemon.hub.paused(reader.topic, reader)
        daemon.hub.evaluate_throttle()
        daemon.hub.evaluate_throttle()

        explained = await seen(daemon, "/admin/explain?tenant=default-tenant")

    (decision,) = [each for each in explained["decisions"] if each["kind"] == "throttle"]
    assert decision["scope"]["kind"] == "topic"
    assert decision["scope"]["topic"] == "t"
    assert decision["inputs"]["slow_ratio"] == 1.0
    assert decision["inputs"]["cpu"] == 0.95
    assert decision["thresholds"]["cpu_over"] == 0.8
    assert (decision["is_on"], decision["count"]) == (True, 2)


async def test_windows_circuits_and_forgotten_topics_are_explained(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each by its own rule, the newest first."""
    stats = FakeStats()
    async with running(
        stats=stats,
        topic_idle_s=60,
        circuit_breaker_threshold=1,
        max_memory_mb=64,
        ring_messages=10_000,
    ) as daemon:
        await daemon.publish("idle", 1)
        idle = daemon.hub.topics.find("default-tenant", "idle")
        assert idle is not None
        idle.last_used_s -= 3_600
        daemon.hub.evict_idle_topics()
        url = f"{daemon.ws_url}/subscribe?topic=t&policy=circuit_breaker&buffer=100"
        async with client_of(url):
            stalled = daemon.only_subscriber()
            stalled.pause_writing()
            line = json.dumps({"topic": "t", "data": "x" * 60_000}).encode()
            for _ in range(2):
                # A batch of all would be larger than so little memory allows.
                lines = io.BytesIO(b"\n".join([line] * 65))
                async with daemon.http.post(f"{daemon.url}/publish/batch", data=lines) as answer:
                    assert answer.status == 200
            await until(lambda: daemon.hub.open_circuits == 1)
            stats.sample = lambda: FakeStats().sample()  # type: ignore[method-assign]
            daemon.hub.evaluate_buffers()

            explained = await seen(daemon, "/admin/explain")

    found = {each["code"]: each for each in explained["decisions"]}
    assert {"idle_topic", "circuit_opened", "window"} <= found.keys()
    windows = [each["scope"] for each in explained["decisions"] if each["kind"] == "window"]
    assert {scope["kind"] for scope in windows} == {"daemon", "tenant"}
    assert found["idle_topic"]["thresholds"] == {"topic_idle_s": 60.0}
    assert found["circuit_opened"]["scope"]["topic"] == "t"
    assert found["circuit_opened"]["thresholds"]["lost_in_stall"] == 1
    assert found["window"]["inputs"]["window_messages"] < 1_000
    assert found["window"]["thresholds"] == {"least_messages": 100, "most_messages": 1000}


# --- clearing ---


async def test_cleared_topic_begins_a_new_epoch(daemon: Daemon) -> None:
    """Readers stay, with a gap; nobody is given the old messages, and no position comes twice."""
    first = await daemon.publish("t", 1)
    async with client_of(f"{daemon.ws_url}/subscribe?topic=t&control=1&last=10") as reader:
        before = [json.loads(await reader.recv()) for _ in range(2)]
        cleared = await seen(daemon, "/admin/messages?topic=t", "DELETE")
        after = [json.loads(await reader.recv()) for _ in range(2)]
        second = await daemon.publish("t", 2)
        message = json.loads(await reader.recv())
        tail = await seen(daemon, "/admin/messages?topic=t")
        resumed = f"{daemon.ws_url}/subscribe?topic=t&control=1&offset=1&epoch={first['epoch']}"
        async with client_of(resumed) as late:
            back = [json.loads(await late.recv()) for _ in range(3)]

    assert (before[0]["type"], before[1]["data"]) == ("subscribed", 1)
    assert (cleared["old_epoch"], cleared["old_offset"]) == (first["epoch"], 1)
    assert (cleared["messages"], cleared["subscribers"]) == (1, 1)
    assert cleared["epoch"] != first["epoch"]
    assert (after[0]["type"], after[0]["epoch"]) == ("subscribed", cleared["epoch"])
    assert (after[1]["type"], after[1]["reason"]) == ("gap", "epoch")
    assert (second["epoch"], second["offset"]) == (cleared["epoch"], 1)
    assert message["data"] == 2
    assert [each["data"] for each in tail["messages"]] == [2]
    assert [each.get("reason", each.get("data")) for each in back[1:]] == ["epoch", 2]


async def test_dropped_topic_lets_go_of_patterns(daemon: Daemon) -> None:
    """They are told a gap and `forgotten`, and have it again with its next message."""
    await daemon.publish("p.a", 1)
    async with client_of(f"{daemon.ws_url}/subscribe?pattern=p.*&control=1&last=10") as reader:
        kinds = [json.loads(await reader.recv()).get("type", "message") for _ in range(3)]
        await seen(daemon, "/admin/topics?topic=p.a", "DELETE")
        after = [json.loads(await reader.recv())["type"] for _ in range(3)]
        await until(lambda: daemon.hub.topics.find("default-tenant", "p.a") is not None)
        await daemon.publish("p.a", 2)
        again = [json.loads(await reader.recv()) for _ in range(2)]

    assert kinds == ["subscribed", "message", "watching"]
    assert after == ["subscribed", "gap", "forgotten"]
    assert (again[0]["type"], again[1]["data"]) == ("subscribed", 2)


async def test_publishers_and_readers_go_on_over_many_clearings(daemon: Daemon) -> None:
    """Each accepted message is delivered once, in its epoch's order, or its epoch was cleared."""
    positions: list[tuple[str, int]] = []
    received: list[tuple[str, int]] = []
    epochs: list[str] = []

    async def publish() -> None:
        for number in range(200):
            answer = await daemon.publish("t", number)
            positions.append((answer["epoch"], answer["offset"]))

    async with client_of(f"{daemon.ws_url}/subscribe?topic=t&control=1&last=0") as reader:
        publishing = asyncio.create_task(publish())
        while not publishing.done():
            await asyncio.sleep(0)
            if len(positions) % 20 == 10:
                await seen(daemon, "/admin/messages?topic=t", "DELETE")
        await publishing
        await daemon.publish("t", "end")
        while True:
            frame = json.loads(await reader.recv())
            if frame.get("type") == "subscribed":
                epochs.append(frame["epoch"])
            elif "data" in frame:
                if frame["data"] == "end":
                    break
                received.append((epochs[-1], frame["offset"]))

    assert len(set(positions)) == len(positions) == 200
    assert len(set(epochs)) == len(epochs) > 3
    assert set(received) <= set(positions)
    assert len(set(received)) == len(received)
    # In each epoch what was received has no hole, since nothing was lost but by clearing.
    for epoch in epochs:
        offsets = [offset for found, offset in received if found == epoch]
        assert offsets == list(range(1, len(offsets) + 1))
    totals = (await seen(daemon, "/metrics"))["messages"]
    waiting = totals["discarded"] + totals["queued"] + sum(totals["dropped"].values())
    assert totals["offered"] == totals["delivered"] + waiting
    assert totals["published"] == 201


async def test_poll_that_waits_is_told_of_a_clearing(daemon: Daemon) -> None:
    """It is answered with the gap and the new position."""
    first = await daemon.publish("t", 1)
    path = f"/subscribe?topic=t&poll=1&timeout=20&offset=1&epoch={first['epoch']}"
    polling = asyncio.create_task(daemon.get_json(path))
    await until(lambda: daemon.hub.subscribers == 1)

    cleared = await seen(daemon, "/admin/messages?topic=t", "DELETE")
    answer = await asyncio.wait_for(polling, 10)

    assert (answer["epoch"], answer["offset"]) == (cleared["epoch"], 0)
    assert answer["messages"] == []


async def test_journaled_topic_is_cleared_for_good_and_not_dropped(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Every node reads the record; a dropped name would forget which offsets were given."""
    pytest.importorskip("apsw")
    table = {"directory": str(tmp_path)}
    async with running(journal_table=table) as daemon:
        first = await daemon.publish("t", 1)
        refused = await ask(daemon, "/admin/topics?topic=t", "DELETE")
        tail = await seen(daemon, "/admin/messages?topic=t")
        with caplog.at_level(logging.INFO, "clevrd"):
            async with client_of(f"{daemon.ws_url}/subscribe?topic=t&control=1&last=1") as reader:
                told = [json.loads(await reader.recv()) for _ in range(2)]
                cleared = await seen(daemon, "/admin/messages?topic=t", "DELETE")
                told += [json.loads(await reader.recv()) for _ in range(2)]
        explained = await seen(daemon, "/admin/explain")
        second = await daemon.publish("t", 2)
    async with running(journal_table=table) as daemon:
        # Nobody has used it since the start.
        page = await daemon.get_json("/topics/t/messages?since=all")
        again = await seen(daemon, "/admin/messages?topic=t", "DELETE")
        unknown = await ask(daemon, "/admin/messages?topic=none", "DELETE")

    assert (refused[0], refused[1]["code"]) == (409, "conflict")
    assert "DELETE /admin/messages clears it on every node" in refused[1]["error"]
    assert [each["data"] for each in tail["messages"]] == [1]
    assert cleared == {
        "topic": "t",
        "tenant_id": "default-tenant",
        "old_epoch": first["epoch"],
        "old_offset": 1,
        "epoch": second["epoch"],
        "offset": 1,
        "messages": 1,
        "subscribers": 1,
    }
    assert second["offset"] == 2
    assert (told[2]["epoch"], told[2]["offset"], told[3]["reason"]) == (second["epoch"], 1, "epoch")
    lines = [each.message for each in caplog.records if each.message.startswith("operator")]
    assert lines == [
        f"operator had a topic of the journal cleared on every node, at offset {offset}"
        " by='this machine (127.0.0.1)' tenant=default-tenant topic='t'"
        for offset in (1, 2)
    ]
    assert "cleared" in codes(explained)
    assert [each["data"] for each in page["messages"]] == [2]
    assert (again["old_epoch"], again["old_offset"], again["offset"]) == (second["epoch"], 2, 2)
    assert (again["messages"], again["subscribers"]) == (0, 0)
    assert unknown[0] == 404


async def test_tail_has_the_newest_and_counts_nothing(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    """A page that looks every second is one line in the log."""
    for number in range(20):
        await daemon.publish("t", number)

    with caplog.at_level(logging.INFO):
        few = await seen(daemon, "/admin/messages?topic=t&last=3")
        many = await seen(daemon, "/admin/messages?topic=t&last=100")
    totals = (await seen(daemon, "/metrics"))["messages"]

    assert [each["data"] for each in few["messages"]] == [17, 18, 19]
    assert (len(many["messages"]), many["offset"]) == (20, 20)
    assert totals["offered"] == 0
    assert caplog.text.count("operator read the newest messages") == 1


# --- tenants' figures ---


async def test_tenants_are_a_label_on_their_own_page_alone() -> None:
    """In each form; what is no configured tenant is one row."""
    async with running(access=access("open")) as daemon:
        await daemon.publish("orders.eu", 1, **bearer(WRITER))
        await daemon.publish("t", 1, **{"X-Tenant-ID": "made-up"})
        url = f"{daemon.ws_url}/subscribe?topic=orders.eu"
        async with client_of(url, additional_headers=bearer(READER)):
            found = await seen(daemon, "/metrics/tenants")
            text, metrics = "", ""
            for path in ("/metrics/tenants", "/metrics"):
                headers = {"Accept": "text/plain"}
                async with daemon.http.get(f"{daemon.url}{path}", headers=headers) as answer:
                    text, metrics = metrics, await answer.text()

    rows = {row["tenant_id"]: row for row in found["tenants"]}
    assert {"acme", None} <= rows.keys() <= {"acme", "other", "default-tenant", None}
    assert (rows["acme"]["connections"], rows["acme"]["subscribers"]) == (1, 1)
    assert rows["acme"]["topics"] == 1
    assert 'clevrd_tenant_subscribers{tenant="acme"} 1.0' in text
    assert 'clevrd_memory_share_used_bytes{tenant="*"}' in text
    assert "tenant=" not in metrics
