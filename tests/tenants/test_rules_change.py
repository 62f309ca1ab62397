"""Open connections obey too: a credential's end, and rules that change meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import jwt
import msgspec
import pytest
import pytest_asyncio
import websockets
from daemons import Daemon, running, until
from held_turns import HeldTurns
from keys import OTHER, READER, WEB, WRITER, access, bearer, rules, subprotocol
from websockets.typing import Subprotocol

from clevrd.tenants.settings import Access, read_access

SECRET = "0123456789abcdef0123456789abcdef"  # noqa: S105  # of a test


@pytest_asyncio.fixture
async def daemon() -> AsyncIterator[Daemon]:
    async with running(access=access()) as daemon:
        yield daemon


def changed(change: Callable[[dict[str, Any]], object]) -> Access:
    """Return the rules after ``change`` was made to the tables of the file."""
    tables = rules()
    change(tables)
    return read_access(tables, "a test")


def without(*ids: str) -> Access:
    """Return the rules without some keys of the first tenant."""

    def remove(tables: dict[str, Any]) -> None:
        acme = tables["tenants"][0]
        acme["keys"] = [each for each in acme["keys"] if each["id"] not in ids]

    return changed(remove)


def web_may_subscribe_to(*topics: str) -> Access:
    """Return the rules with other permissions of the key ``web``."""

    def change(tables: dict[str, Any]) -> None:
        tables["tenants"][0]["keys"][0]["subscribe"] = list(topics)

    return changed(change)


def connect(daemon: Daemon, path: str, secret: str) -> websockets.connect:
    protocols = [Subprotocol("clevrd.v1"), Subprotocol(subprotocol(secret))]
    return websockets.connect(f"{daemon.ws_url}{path}", subprotocols=protocols)


async def closing(socket: websockets.ClientConnection) -> tuple[int, str]:
    """Read to the end, and return the close code and reason."""
    async with asyncio.timeout(10):
        await socket.wait_closed()
    assert socket.close_code is not None
    return socket.close_code, socket.close_reason or ""


PATHS = ["/subscribe?topic=news", "/subscribe?topic=news&topic=orders.eu", "/ws", "/publish"]


@pytest.mark.parametrize("path", PATHS)
async def test_revoked_key_is_cut(daemon: Daemon, path: str) -> None:
    """Its connections are, and no others."""
    async with (
        connect(daemon, path, WEB.secret) as cut,
        connect(daemon, path, OTHER.secret) as kept,
    ):
        closed = await daemon.server.access.apply(without("web"), Path())

        assert await closing(cut) == (4001, "credential_revoked")
        assert closed == 1
        await (await kept.ping())


@pytest.mark.parametrize("form", ["text/event-stream", "application/x-ndjson"])
async def test_stream_of_a_revoked_key_is_told_and_ends(daemon: Daemon, form: str) -> None:
    """There is no close code, so the last word says it, and the response is whole."""
    url = f"{daemon.url}/subscribe?topic=news&control=1"
    async with daemon.http.get(url, headers={"Accept": form, **bearer(WEB)}) as stream:
        await until(lambda: daemon.hub.subscribers == 1)
        await daemon.server.access.apply(without("web"), Path())
        text = await stream.text()

    assert '"code":"credential_revoked"' in text
    assert '"retryable":false' in text
    assert daemon.hub.subscribers == 0


async def test_poll_is_answered_and_asks_again(daemon: Daemon) -> None:
    """A poll that waits ends at once, and the next one is refused."""
    url = f"{daemon.url}/subscribe?topic=news&poll=1&timeout=30"
    poll = asyncio.ensure_future(daemon.http.get(url, headers=bearer(WEB)))
    await until(lambda: len(daemon.polls) == 1)

    await daemon.server.access.apply(without("web"), Path())

    async with asyncio.timeout(5):
        first, second = await poll, await daemon.http.get(url, headers=bearer(WEB))
    assert (first.status, second.status) == (200, 401)


async def test_remembered_head_of_a_revoked_key_is_refused(daemon: Daemon) -> None:
    """On the same kept connection, byte for byte the same request."""
    body = b'{"topic":"orders.eu","data":1}'
    head = (
        f"POST /publish HTTP/1.1\r\nHost: x\r\nX-API-Key: {WEB.secret}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    writer.write(head + body)
    first = await reader.readuntil(b"\r\n\r\n")

    await daemon.server.access.apply(without("web"), Path())
    writer.write(head + body)
    rest = await reader.read()
    writer.close()

    assert first.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 401" in rest


@pytest.mark.parametrize("form", ["text/event-stream", "application/x-ndjson"])
async def test_request_that_waits_for_its_turn_is_judged_by_the_new_rules(
    daemon: Daemon, form: str
) -> None:
    """It was admitted by the old ones, and would be a connection that nobody judges again."""
    turns = HeldTurns()
    daemon.listener.front._turns = cast(Any, turns)
    headers = {"Accept": form, **bearer(WEB)}
    asking = asyncio.ensure_future(
        daemon.http.get(f"{daemon.url}/subscribe?topic=news", headers=headers)
    )
    await turns.waits.wait()

    await daemon.server.access.apply(without("web"), Path())
    turns.come.set()

    answer = await asking
    assert answer.status == 401
    assert daemon.hub.subscribers == 0


async def test_ticket_is_not_used_up_by_rules_that_change_meanwhile(daemon: Daemon) -> None:
    """It was redeemed before its request waited, and its key is as good as before."""
    ask = daemon.http.post(f"{daemon.url}/ticket", data=b'{"topics":["news"]}', headers=bearer(WEB))
    ticket = (await (await ask).json())["ticket"]
    turns = HeldTurns()
    daemon.listener.front._turns = cast(Any, turns)
    url = f"{daemon.url}/subscribe?topic=news&ticket={ticket}"
    asking = asyncio.ensure_future(daemon.http.get(url, headers={"Accept": "text/event-stream"}))
    await turns.waits.wait()

    await daemon.server.access.apply(access(), Path())
    turns.come.set()

    answer = await asking
    assert answer.status == 200
    answer.close()


async def test_lost_permission_closes_and_the_next_attempt_says_which(daemon: Daemon) -> None:
    """A connection that has all it may have still goes on."""
    path = "/subscribe?topic=news"
    async with connect(daemon, path, WEB.secret) as kept:
        assert await daemon.server.access.apply(web_may_subscribe_to("news"), Path()) == 0
        await (await kept.ping())
        await daemon.server.access.apply(web_may_subscribe_to("orders.*"), Path())

        assert await closing(kept) == (4202, "permissions_changed")
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with connect(daemon, path, WEB.secret):
            pass
    assert b"lacks the permission to subscribe: 'news'" in refused.value.response.body


async def test_pattern_comes_back_for_other_permissions(daemon: Daemon) -> None:
    """Also for more: topics that it did not see are found by the next subscription."""
    async with connect(daemon, "/ws", WEB.secret) as socket:
        await socket.send('{"type":"subscribe","pattern":"orders.*","ref":1}')
        assert json.loads(await socket.recv())["type"] == "watching"
        more = web_may_subscribe_to("orders.**", "news", "more")
        await daemon.server.access.apply(more, Path())

        assert await closing(socket) == (4202, "permissions_changed")


async def test_publisher_loses_its_permission_from_the_next_frame_on(daemon: Daemon) -> None:
    """The socket stays open."""

    def narrow(tables: dict[str, Any]) -> None:
        tables["tenants"][0]["keys"][0]["publish"] = ["orders.us"]

    async with connect(daemon, "/publish", WEB.secret) as socket:
        await socket.send('{"topic":"orders.eu","data":1,"ref":1}')
        before = json.loads(await socket.recv())
        await daemon.server.access.apply(changed(narrow), Path())
        await socket.send('{"topic":"orders.eu","data":1,"ref":2}')
        after = json.loads(await socket.recv())

    assert (before["success"], after["code"]) == (True, "forbidden")


async def test_wrong_rules_change_nothing(daemon: Daemon) -> None:
    """A key that the file before had works on."""
    wrong = msgspec.structs.replace(
        access(),
        auth=jwt_access(issuer="internal", secret_file="/does/not/exist").auth,  # noqa: S106  # a path
    )
    async with connect(daemon, "/ws", WEB.secret) as socket:
        with pytest.raises(Exception, match="/does/not/exist"):
            await daemon.server.access.apply(wrong, Path())

        await (await socket.ping())
    await daemon.publish("orders.eu", 1, **bearer(WRITER))


# --- tokens ---


def jwt_access(issuer: str = "internal", secret_file: str = "secret") -> Access:  # noqa: S107
    return access(
        jwt=[
            {
                "issuer": issuer,
                "audience": "clevrd",
                "algorithms": ["HS256"],
                "secret_file": secret_file,
                "leeway_s": 0,
            }
        ]
    )


def token(lasts_s: float, secret: str = SECRET, **claims: Any) -> str:
    fields = {
        "iss": "internal",
        "aud": "clevrd",
        "exp": time.time() + lasts_s,
        "tenant": "acme",
        "subscribe": ["news"],
        "publish": ["orders.*"],
        **claims,
    }
    return jwt.encode(fields, secret, algorithm="HS256")


@pytest_asyncio.fixture
async def with_tokens(tmp_path: Path) -> AsyncIterator[Daemon]:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret").chmod(0o600)
    async with running(access=jwt_access(), folder=tmp_path) as daemon:
        yield daemon


@pytest.mark.parametrize("path", ["/subscribe?topic=news", "/ws", "/publish"])
async def test_connection_ends_with_its_token(with_tokens: Daemon, path: str) -> None:
    """4102: its client comes back with a fresh one."""
    async with connect(with_tokens, path, token(0.3)) as socket:
        assert await closing(socket) == (4102, "credential_expired")


async def test_stream_ends_with_its_token(with_tokens: Daemon) -> None:
    """The last word says why, and that a later attempt may succeed."""
    headers = {"Accept": "application/x-ndjson", "Authorization": f"Bearer {token(0.3)}"}
    url = f"{with_tokens.url}/subscribe?topic=news&control=1"
    async with with_tokens.http.get(url, headers=headers) as stream:
        text = await stream.text()

    assert '"code":"credential_expired"' in text
    assert '"retryable":true' in text


async def test_poll_ends_with_its_token(with_tokens: Daemon) -> None:
    """It is answered with nothing, and not after the 30 s that it would wait."""
    url = f"{with_tokens.url}/subscribe?topic=news&poll=1&timeout=30"
    headers = {"Authorization": f"Bearer {token(0.5)}"}

    async with asyncio.timeout(10):
        answer = await with_tokens.http.get(url, headers=headers)
        refused = await with_tokens.http.get(url, headers=headers)

    assert (answer.status, refused.status) == (200, 401)


async def test_remembered_head_ends_with_its_token(with_tokens: Daemon) -> None:
    """The head is kept with what was decided of it, and that is over with the token."""
    body = b'{"topic":"orders.eu","data":1}'
    head = (
        f"POST /publish HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token(1.0)}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    statuses: list[bytes] = []
    reader, writer = await asyncio.open_connection("127.0.0.1", with_tokens.port)
    async with asyncio.timeout(10):
        while not statuses or statuses[-1] == b"200":
            writer.write(head + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            statuses.append(answer.split()[1])
            if statuses[-1] == b"200":
                await reader.readuntil(b"}")
    writer.close()

    assert statuses[0] == b"200"
    assert statuses[-1] == b"401"


async def test_issuer_that_is_removed_ends_its_connections(with_tokens: Daemon) -> None:
    """A key's connections go on."""
    async with (
        connect(with_tokens, "/ws", token(60)) as cut,
        connect(with_tokens, "/ws", READER.secret) as kept,
    ):
        await with_tokens.server.access.apply(access(), Path())

        assert await closing(cut) == (4001, "credential_revoked")
        await (await kept.ping())


async def test_connection_goes_on_by_a_fresh_token(with_tokens: Daemon) -> None:
    """Its subscriptions stay, and the old token's end means nothing."""
    async with connect(with_tokens, "/ws", token(1.0)) as socket:
        await socket.send('{"type":"subscribe","topic":"news","last":0,"ref":1}')
        await socket.recv()
        fresh = {"type": "authenticate", "token": token(60), "ref": 2}
        await socket.send(json.dumps(fresh))
        told = json.loads(await socket.recv())
        await asyncio.sleep(1.2)
        await with_tokens.publish("news", "late", **bearer(WRITER))
        message = json.loads(await socket.recv())

    assert (told["type"], told["ref"]) == ("authenticated", 2)
    assert 55 < told["expires_in_s"] <= 60
    assert message["data"] == "late"


async def test_fresh_credential_that_is_refused_changes_nothing(with_tokens: Daemon) -> None:
    """One that is none, one of another tenant, and one that is over."""
    async with connect(with_tokens, "/ws", token(60)) as socket:
        codes = []
        for secret in ("nonsense", OTHER.secret, token(-5), "no credential", ""):
            await socket.send(json.dumps({"type": "authenticate", "token": secret, "ref": 1}))
            codes.append(json.loads(await socket.recv())["code"])
        await socket.send('{"type":"authenticate","ref":1}')
        codes.append(json.loads(await socket.recv())["code"])
        await socket.send('{"type":"publish","topic":"orders.eu","data":1,"ref":2}')
        published = json.loads(await socket.recv())

    assert codes == [
        *("unauthorized", "forbidden", "unauthorized", "unauthorized", "unauthorized"),
        "invalid_request",
    ]
    assert published["success"] is True


async def test_fresh_credential_with_less_closes_to_come_back(with_tokens: Daemon) -> None:
    """Behind its answer."""
    async with connect(with_tokens, "/ws", token(60)) as socket:
        await socket.send('{"type":"subscribe","topic":"news","last":0,"ref":1}')
        await socket.recv()
        less = token(60, subscribe=["other"])
        await socket.send(json.dumps({"type": "authenticate", "token": less, "ref": 2}))

        assert json.loads(await socket.recv())["type"] == "authenticated"
        assert await closing(socket) == (4202, "permissions_changed")
