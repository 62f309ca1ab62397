"""What is asked of a head: by every connection, before its body, and again when heads change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from daemons import Daemon, running, until
from http_wire import post, responses

from clevrd.admission import Admitted
from clevrd.handlers.publish.endpoint import PublishEndpoint
from clevrd.http_values import Request
from clevrd.tenants.settings import OPEN

BODY = '{"topic":"t","data":1}'


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    async with running(raw_paths=request.param) as daemon:
        yield daemon


async def test_refusal_by_the_head_does_not_wait_for_the_body(daemon: Daemon) -> None:
    """Who may not ask is told so before a megabyte of theirs is read, and is read no more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    head = post("", "X-Tenant-ID: no:body", length="1000000")
    writer.write(head)

    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"The tenant's name must be" in answer
    assert b"\r\nConnection: close\r\n" in answer


async def test_refusal_comes_behind_the_answers_before_it(daemon: Daemon) -> None:
    """Pipelined, each request is judged by its own head, and nothing behind a refusal is read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    writer.write(post(BODY) * 2 + post(BODY, "X-Tenant-ID: no:body") + post(BODY))

    async with asyncio.timeout(5):
        answers = responses(await reader.read())
    writer.close()

    assert [answer.status for answer in answers] == [200, 200, 400]
    assert daemon.hub.topics.find("default-tenant", "t").head == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(("field", "status"), [("A: b", 200), ("X-Tenant-ID: no:body", 400)])
async def test_request_that_the_drain_finds_half_is_asked_who_it_is(
    field: str, status: int
) -> None:
    """It began before, so it is answered as it was meant; but nothing skips the other questions."""
    async with running() as daemon:
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        sent = post(BODY, field)
        writer.write(sent[:30])
        await until(lambda: daemon.listener.raw.count_under_way() == 1)

        daemon.hub.is_draining = True
        daemon.listener.raw.close_idle()
        writer.write(sent[30:])
        async with asyncio.timeout(5):
            (answer,) = responses(await reader.read())
        writer.close()

    assert answer.status == status


async def test_daemon_that_drains_begins_nothing(daemon: Daemon) -> None:
    """Publishes, subscriptions and commands are refused on both paths; its health is not."""
    daemon.hub.is_draining = True
    statuses = {}
    for method, path in [
        *(("POST", "/publish"), ("POST", "/publish/batch"), ("GET", "/publish"), ("GET", "/ws")),
        *(("GET", "/subscribe?topic=t&poll=1"), ("GET", "/health"), ("GET", "/metrics")),
    ]:
        async with daemon.http.request(
            method, daemon.url + path, data=BODY if method == "POST" else None
        ) as answer:
            statuses[path, method] = answer.status

    assert set(statuses.values()) == {503, 200}
    assert [path for (path, _), status in statuses.items() if status == 200] == [
        "/health",
        "/metrics",
    ]


async def test_remembered_heads_are_asked_for_again_when_heads_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A head that comes again is admitted once; after a change of what heads mean, once more."""
    asked: list[str] = []
    admit = PublishEndpoint.admit

    def counted(self: PublishEndpoint, head: Request) -> Admitted:
        asked.append(head.path)
        return admit(self, head)

    monkeypatch.setattr(PublishEndpoint, "admit", counted)
    async with running() as daemon:
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        counts = []
        async with asyncio.timeout(5):
            for step in range(4):
                if step == 2:
                    await daemon.server.access.apply(OPEN, Path())
                writer.write(post(BODY))
                await reader.readuntil(b"}")
                counts.append(len(asked))
        writer.close()

    assert counts == [1, 1, 2, 2]
