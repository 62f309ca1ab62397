"""Every way in asks for the credential, and serves its tenant with its permissions alone."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import websockets
from daemons import Daemon, running
from keys import ADMIN, OTHER, READER, WEB, WRITER, access, bearer, key, rules, subprotocol
from multidict import CIMultiDictProxy
from websockets.typing import Subprotocol

from clevrd.tenants.keys import NewKey, new_key
from clevrd.tenants.settings import Access, read_access

UNKNOWN = new_key()


@pytest_asyncio.fixture
async def daemon() -> AsyncIterator[Daemon]:
    async with running(access=access()) as daemon:
        yield daemon


@pytest_asyncio.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def both(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """A daemon on either way in."""
    async with running(access=access(), raw_paths=request.param) as daemon:
        yield daemon


Answer = tuple[int, dict[str, Any], CIMultiDictProxy[str]]


async def ask(
    daemon: Daemon, method: str, path: str, body: bytes | None = None, **headers: str
) -> Answer:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    async with daemon.http.request(
        method, f"{daemon.url}{path}", data=body, headers=fields
    ) as answer:
        text = await answer.text()
        found = json.loads(text) if text.startswith("{") else {}
        return answer.status, found, answer.headers


def publish(topic: str = "orders.eu") -> bytes:
    return json.dumps({"topic": topic, "data": 1}).encode()


WAYS_IN = [
    ("POST", "/publish", publish()),
    ("POST", "/publish/batch", b"[" + publish() + b"]"),
    ("GET", "/publish", None),
    ("GET", "/subscribe?topic=news", None),
    ("GET", "/subscribe?topic=news&poll=1&timeout=0", None),
    ("GET", "/ws", None),
    ("GET", "/metrics", None),
]


@pytest.mark.parametrize(("method", "path", "body"), WAYS_IN)
async def test_no_way_in_is_open(both: Daemon, method: str, path: str, body: bytes | None) -> None:
    """A request without a credential, and one with a wrong one, is 401 with a challenge."""
    status, answer, fields = await ask(both, method, path, body)
    wrong, told, challenged = await ask(both, method, path, body, **bearer(UNKNOWN))

    assert (status, answer["code"], fields["WWW-Authenticate"]) == (
        *(401, "unauthorized"),
        'Bearer realm="clevrd"',
    )
    assert (wrong, told["code"]) == (401, "unauthorized")
    assert challenged["WWW-Authenticate"] == 'Bearer realm="clevrd", error="invalid_token"'
    assert both.server.hub.counters.refused["unauthorized"] == 2


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/clevrd.js", "/"])
async def test_probes_and_files_are_for_everybody(both: Daemon, path: str) -> None:
    """A load balancer has no key, and a page can't show one for a script."""
    status, _, _ = await ask(both, "GET", path)

    assert status == 200


@pytest.mark.parametrize("stream", ["text/event-stream", "application/x-ndjson"])
async def test_streams_ask_too(both: Daemon, stream: str) -> None:
    """And an EventSource is told in a way that it gives up on."""
    status, answer, _ = await ask(both, "GET", "/subscribe?topic=news", Accept=stream)

    assert (status, answer["code"]) == (401, "unauthorized")


async def test_body_is_not_read_before_the_credential(both: Daemon) -> None:
    """The refusal comes while the body is still to be sent."""
    head = b"POST /publish HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"

    answer = await both.send_raw(head)

    assert answer.startswith(b"HTTP/1.1 401")


async def test_key_publishes_as_its_tenant(both: Daemon) -> None:
    """The topic is the key's tenant's, and the second publish uses the remembered head."""
    for _ in range(2):
        status, _, _ = await ask(both, "POST", "/publish", publish(), **bearer(WEB))
        assert status == 200

    topic = both.hub.topics.find("acme", "orders.eu")
    assert topic is not None
    assert topic.head == 2
    assert both.hub.topics.find("default-tenant", "orders.eu") is None


@pytest.mark.parametrize(
    ("method", "path", "body", "what"),
    [
        ("POST", "/publish", publish("secret"), "publish: 'secret'"),
        ("GET", "/subscribe?topic=secret&poll=1&timeout=0", None, "subscribe: 'secret'"),
        ("GET", "/subscribe?topic=news&topic=secret&poll=1&timeout=0", None, "subscribe: 'secret'"),
        ("GET", "/subscribe?pattern=secret.*&poll=1&timeout=0", None, "subscribe: 'secret.*'"),
    ],
)
async def test_missing_permission_is_named(
    both: Daemon, method: str, path: str, body: bytes | None, what: str
) -> None:
    """403 says which permission of which key is missing, and no topic is made."""
    status, answer, _ = await ask(both, method, path, body, **bearer(WEB))

    assert (status, answer["code"]) == (403, "forbidden")
    assert answer["error"] == (f"The credential web of tenant acme lacks the permission to {what}.")
    assert both.hub.topics.find("acme", "secret") is None


async def test_repeat_of_a_key_is_no_way_around(both: Daemon) -> None:
    """The answer to a publish is not told to who may not publish there."""
    body = json.dumps({"topic": "secret", "data": 1, "idempotency_key": "k"}).encode()
    first, _, _ = await ask(both, "POST", "/publish", body, **bearer(WRITER))

    status, answer, _ = await ask(both, "POST", "/publish", body, **bearer(WEB))

    assert first == 200
    assert (status, answer["code"]) == (403, "forbidden")


async def test_batch_refuses_the_items_that_are_not_allowed(both: Daemon) -> None:
    """The others are published."""
    body = b"[" + publish() + b"," + publish("secret") + b"]"

    status, answer, _ = await ask(both, "POST", "/publish/batch", body, **bearer(WEB))

    assert (status, answer["published"], answer["refused"]) == (207, 1, 1) or answer["refused"] == 1
    assert answer["results"][1]["code"] == "forbidden"


def connect(daemon: Daemon, path: str, made: NewKey, *protocols: str) -> websockets.connect:
    return websockets.connect(
        f"{daemon.ws_url}{path}",
        subprotocols=[Subprotocol(each) for each in (*protocols, subprotocol(made.secret))],
    )


async def test_subprotocol_presents_the_credential(both: Daemon) -> None:
    """It is what a page can set, and it is never echoed."""
    async with connect(both, "/ws", WEB, "clevrd.v1") as socket:
        await socket.send('{"type":"subscribe","topic":"news","ref":1}')
        told = json.loads(await socket.recv())

    assert socket.subprotocol == "clevrd.v1"
    assert (told["type"], told["topic"]) == ("subscribed", "news")


async def test_publish_socket_and_commands_refuse_frames(both: Daemon) -> None:
    """Each frame is judged, and the socket goes on."""
    async with connect(both, "/publish", WEB, "clevrd.v1") as socket:
        await socket.send('{"topic":"secret","data":1,"ref":1}')
        refused = json.loads(await socket.recv())
        await socket.send('{"topic":"orders.eu","data":1,"ref":2}')
        taken = json.loads(await socket.recv())
    async with connect(both, "/ws", WEB, "clevrd.v1") as socket:
        await socket.send('{"type":"publish","topic":"secret","data":1,"ref":3}')
        command = json.loads(await socket.recv())
        await socket.send('{"type":"subscribe","topic":"secret","ref":4}')
        denied = json.loads(await socket.recv())
        await socket.send('{"type":"subscribe","pattern":"secret.*","ref":5}')
        unseen = json.loads(await socket.recv())

    assert (refused["code"], taken["success"]) == ("forbidden", True)
    assert [each["code"] for each in (command, denied, unseen)] == ["forbidden"] * 3


async def test_pattern_joins_only_what_may_be_read(both: Daemon) -> None:
    """Topics that were there, and topics that are made later."""
    for topic in ("orders.eu", "orders.secret"):
        await ask(both, "POST", "/publish", publish(topic), **bearer(WRITER))
    narrow = new_key()
    await both.server.access.apply(access_with(narrow, ["orders.eu", "orders.late"]), folder=Path())
    async with connect(both, "/ws", narrow, "clevrd.v1") as socket:
        await socket.send('{"type":"subscribe","pattern":"orders.*","last":10,"ref":1}')
        seen = {json.loads(await socket.recv()).get("topic") for _ in range(2)}
        for topic in ("orders.hidden", "orders.late"):
            await ask(both, "POST", "/publish", publish(topic), **bearer(WRITER))
        while "orders.late" not in seen:
            seen.add(json.loads(await socket.recv()).get("topic"))

    assert "orders.eu" in seen
    assert seen.isdisjoint({"orders.secret", "orders.hidden"})


def access_with(made: NewKey, subscribe: list[str]) -> Access:
    tables = rules()
    tables["tenants"][0]["keys"].append(key("narrow", made, subscribe=subscribe))
    return read_access(tables, "a test")


async def test_other_tenant_sees_nothing(both: Daemon) -> None:
    """The same topic's name is another topic, and naming the tenant is refused."""
    await ask(both, "POST", "/publish", publish("news"), **bearer(WRITER))

    _, other, _ = await ask(
        both, "GET", "/subscribe?topic=news&poll=1&timeout=0&last=5", None, **bearer(OTHER)
    )
    _, own, _ = await ask(
        both, "GET", "/subscribe?topic=news&poll=1&timeout=0&last=5", None, **bearer(READER)
    )
    named, told, _ = await ask(
        both, "POST", "/publish", publish("news"), X_Tenant_ID="acme", **bearer(OTHER)
    )

    assert (len(other["messages"]), len(own["messages"])) == (0, 1)
    assert (named, told["code"]) == (403, "forbidden")


async def test_metrics_need_the_admin_permission(daemon: Daemon) -> None:
    """A tenant's key is not enough for what is the whole daemon's."""
    told, own, _ = await ask(daemon, "GET", "/metrics", None, **bearer(WRITER))
    refused, answer, _ = await ask(
        daemon, "GET", "/metrics", None, **bearer(WRITER), Accept="text/plain"
    )
    served, figures, _ = await ask(daemon, "GET", "/metrics", None, **bearer(ADMIN))

    assert (told, own["tenant_id"]) == (200, "acme")
    assert "connections" not in own
    assert (refused, answer["code"]) == (403, "forbidden")
    assert served == 200
    assert "connections" in figures


async def test_preflight_asks_nobody(daemon: Daemon) -> None:
    """OPTIONS carries no credential (Fetch, "CORS-preflight request")."""
    status, _, _ = await ask(daemon, "OPTIONS", "/publish")

    assert status == 204


async def test_draining_daemon_asks_too(both: Daemon) -> None:
    """Who has no credential is not told more than that."""
    both.hub.is_draining = True

    status, _, _ = await ask(both, "POST", "/publish", publish())
    known, _, _ = await ask(both, "POST", "/publish", publish(), **bearer(WEB))

    assert (status, known) == (401, 503)


async def test_raw_handshake_is_refused_before_the_upgrade(both: Daemon) -> None:
    """The answer to a handshake is HTTP."""
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with websockets.connect(f"{both.ws_url}/subscribe?topic=news"):
            pass

    assert refused.value.response.status_code == 401


async def test_two_credentials_are_refused(both: Daemon) -> None:
    """In two places, even the same one."""
    status, answer, _ = await ask(
        both, "POST", "/publish", publish(), X_API_Key=WEB.secret, **bearer(WEB)
    )

    assert (status, answer["code"]) == (400, "invalid_request")
