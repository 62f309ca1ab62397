"""An issuer's keys are fetched from a real server, whatever that server does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from clevrd.errors import Unavailable
from clevrd.tenants import fetched_keys
from clevrd.tenants.fetched_keys import AGAIN_S, REFRESH_S, FetchedKeys

PRIVATE = rsa.generate_private_key(65_537, 2_048)


def key_set(*key_ids: str) -> bytes:
    key = json.loads(RSAAlgorithm.to_jwk(PRIVATE.public_key()))
    return json.dumps({"keys": [{**key, "kid": key_id} for key_id in key_ids]}).encode()


class Provider:
    """A server of keys, and what it was asked."""

    def __init__(self) -> None:
        self.body, self.status = key_set("a"), 200
        self.headers: dict[str, str] = {}
        self.asked: list[str] = []
        self.hangs = False

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        if self.hangs:
            await asyncio.sleep(60)
        return web.Response(body=self.body, status=self.status, headers=self.headers)


class World:
    def __init__(self, url: str) -> None:
        self.now_s = 1_000.0
        self.tasks: list[asyncio.Task[None]] = []
        # Times that the keys were said to be others than before.
        self.changes = 0
        self.keys = FetchedKeys(url, lambda: self.now_s, self.spawn, self.note_change)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.ensure_future(coroutine))

    def note_change(self) -> None:
        self.changes += 1

    async def settle(self) -> None:
        await asyncio.gather(*self.tasks)

    def find(self, key_id: str) -> str:
        try:
            return "there" if self.keys.find(key_id, "RS256") is not None else "none"
        except Unavailable as error:
            return "fetching" if "being fetched" in str(error) else "failed"


@asynccontextmanager
async def provided() -> AsyncIterator[tuple[Provider, World]]:
    provider = Provider()
    app = web.Application()
    app.router.add_get("/{path:.*}", provider.answer)
    async with TestServer(app) as server:
        yield provider, World(str(server.make_url("/jwks")))


async def test_keys_are_fetched_when_they_are_first_asked_for() -> None:
    """Until then nobody is refused for good."""
    async with provided() as (provider, world):
        assert world.find("a") == "fetching"
        await world.settle()

        assert (world.find("a"), world.find("b")) == ("there", "none")
        assert provider.asked == ["/jwks"]


async def test_key_that_is_missing_is_looked_for_again_but_seldom() -> None:
    """Issuers change their keys; and anybody can name a key that nobody has."""
    async with provided() as (provider, world):
        world.find("a")
        await world.settle()
        provider.body = key_set("a", "b")

        world.now_s += AGAIN_S - 1
        assert world.find("b") == "none"
        world.now_s += 1
        assert world.find("b") == "fetching"
        assert world.find("a") == "there"
        await world.settle()

        assert (world.find("b"), world.find("c")) == ("there", "none")
        assert len(provider.asked) == 2


async def test_key_that_was_withdrawn_is_gone_after_a_while() -> None:
    """Without anybody asking for another one."""
    async with provided() as (provider, world):
        world.find("a")
        await world.settle()
        provider.body = key_set("b")

        world.now_s += REFRESH_S
        assert world.find("a") == "there"
        await world.settle()

        assert world.find("a") == "none"


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 500},
        {"status": 302, "headers": {"Location": "/elsewhere"}},
        {"status": 404},
        {"body": b"<html>"},
        {"body": b"{}"},
        {"body": b" " * 10_000_000},
    ],
)
async def test_server_in_trouble_changes_nothing(
    trouble: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """No redirect is followed, nothing large is read, and the keys that were known hold."""
    async with provided() as (provider, world):
        world.find("a")
        await world.settle()
        for name, value in trouble.items():
            setattr(provider, name, value)

        world.now_s += REFRESH_S
        world.find("a")
        await world.settle()

        assert (world.find("a"), world.keys.failures) == ("there", 1)
        assert "/elsewhere" not in provider.asked
    assert "key set not fetched" in caplog.text


async def test_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bearers are told to come back."""
    monkeypatch.setattr(fetched_keys, "TIMEOUT_S", 0.05)
    async with provided() as (provider, world):
        provider.hangs = True
        assert world.find("a") == "fetching"
        await world.settle()

        assert (world.find("a"), world.keys.failures) == ("failed", 1)
        provider.hangs = False
        world.now_s += AGAIN_S
        assert world.find("a") == "fetching"
        await world.settle()
        assert world.find("a") == "there"


async def test_server_that_is_not_there_is_no_exception() -> None:
    """Nor is a name that nobody has."""
    world = World("http://127.0.0.1:1/jwks")
    assert world.find("a") == "fetching"
    await world.settle()

    assert (world.find("a"), world.keys.failures) == ("failed", 1)


async def test_change_is_told_from_the_first_keys_on_and_equal_keys_are_none() -> None:
    """Connections may be open by keys of another URL; and an equal set has the same key objects."""
    async with provided() as (provider, world):
        world.find("a")
        await world.settle()
        first = world.keys.find("a", "RS256")
        assert world.changes == 1

        world.now_s += REFRESH_S
        world.find("a")
        await world.settle()

        assert world.keys.find("a", "RS256") is first
        assert (world.changes, len(provider.asked)) == (1, 2)
        provider.body = key_set("b")
        world.now_s += REFRESH_S
        world.find("a")
        await world.settle()
        assert world.changes == 2
