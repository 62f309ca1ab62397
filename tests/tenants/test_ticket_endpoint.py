"""POST /ticket: one subscription to some topics, for who can set no header."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from daemons import Daemon, running, until
from keys import READER, WEB, WRITER, access, bearer, rules

from clevrd.tenants.keys import NewKey
from clevrd.tenants.settings import read_access


@pytest_asyncio.fixture
async def daemon() -> AsyncIterator[Daemon]:
    async with running(access=access()) as daemon:
        yield daemon


async def ask(daemon: Daemon, body: object, key: NewKey | None = WEB, query: str = "") -> Any:
    """Ask for a ticket; return the status and the answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = bearer(key) if key is not None else {}
    async with daemon.http.post(
        f"{daemon.url}/ticket{query}", data=data, headers=headers
    ) as answer:
        return answer.status, await answer.json()


async def poll(daemon: Daemon, query: str) -> Any:
    async with daemon.http.get(f"{daemon.url}/subscribe?{query}&poll=1&timeout=0&last=5") as answer:
        return answer.status, await answer.json()


async def test_ticket_subscribes_once(daemon: Daemon) -> None:
    """And a second time it is refused."""
    await daemon.publish("news", 1, **bearer(WRITER))
    status, answer = await ask(daemon, {"topics": ["news"]})

    first = await poll(daemon, f"topic=news&ticket={answer['ticket']}")
    second = await poll(daemon, f"topic=news&ticket={answer['ticket']}")

    assert (status, answer["expires_in_s"]) == (200, 30)
    assert first[0] == 200
    assert [each["data"] for each in first[1]["messages"]] == [1]
    assert (second[0], second[1]["code"]) == (401, "unauthorized")


async def test_ticket_opens_an_event_stream(daemon: Daemon) -> None:
    """As an EventSource asks for it, without a header."""
    _, answer = await ask(daemon, {"topics": ["news"], "patterns": ["orders.*"]})
    query = f"topic=news&pattern=orders.*&ticket={answer['ticket']}"
    headers = {"Accept": "text/event-stream"}
    async with daemon.http.get(f"{daemon.url}/subscribe?{query}", headers=headers) as stream:
        await until(lambda: daemon.hub.subscribers == 1)
        await daemon.publish("orders.eu", "x", **bearer(WRITER))
        text = b""
        async for line in stream.content:
            text += line
            if b'"data":"x"' in text:
                break

    assert stream.status == 200


@pytest.mark.parametrize(
    "query", ["topic=orders.eu", "topic=news&topic=orders.eu", "pattern=orders.*", "topic=secret"]
)
async def test_ticket_is_for_its_topics_alone(daemon: Daemon, query: str) -> None:
    """Whatever else its holder's credential may do."""
    _, answer = await ask(daemon, {"topics": ["news"]})

    status, refused = await poll(daemon, f"{query}&ticket={answer['ticket']}")

    assert (status, refused["code"]) == (403, "forbidden")


async def test_ticket_publishes_nothing_and_gets_no_other(daemon: Daemon) -> None:
    """It is for reading alone, and does not prolong itself."""
    _, one = await ask(daemon, {"topics": ["news"]})
    _, two = await ask(daemon, {"topics": ["news"]})

    async with daemon.http.post(
        f"{daemon.url}/publish?ticket={one['ticket']}", data=b'{"topic":"news","data":1}'
    ) as published:
        assert published.status == 403
    status, refused = await ask(daemon, {"topics": ["news"]}, None, f"?ticket={two['ticket']}")

    assert (status, refused["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"topics": []}, 400),
        ({"topics": ["news"] * 51}, 400),
        ({"topics": "news"}, 400),
        ({"topics": [""]}, 400),
        ({"patterns": ["orders.*x"]}, 400),
        ([], 400),
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 5_000, 400),
        (b" " * 70_000, 413),
        ({"topics": ["secret"]}, 403),
        ({"patterns": ["secret.*"]}, 403),
    ],
)
async def test_wrong_wishes_are_refused(daemon: Daemon, body: object, status: int) -> None:
    """With a sentence, and no ticket."""
    found, answer = await ask(daemon, body)

    assert (found, answer["success"]) == (status, False)
    assert len(daemon.server.access.tickets) == 0


async def test_nobody_gets_a_ticket_without_a_credential(daemon: Daemon) -> None:
    """401, as everywhere."""
    status, answer = await ask(daemon, {"topics": ["news"]}, None)

    assert (status, answer["code"]) == (401, "unauthorized")


async def test_stream_by_a_ticket_ends_with_the_key_behind_it(daemon: Daemon) -> None:
    """It was that key's."""
    _, answer = await ask(daemon, {"topics": ["news"]}, READER)
    url = f"{daemon.url}/subscribe?topic=news&control=1&ticket={answer['ticket']}"
    tables = rules()
    acme = tables["tenants"][0]
    acme["keys"] = [each for each in acme["keys"] if each["id"] != "reader"]
    async with daemon.http.get(url, headers={"Accept": "application/x-ndjson"}) as stream:
        await until(lambda: daemon.hub.subscribers == 1)

        await daemon.server.access.apply(read_access(tables, "a test"), Path())
        text = await stream.text()

    assert '"code":"credential_revoked"' in text
