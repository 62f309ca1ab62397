"""No byte crosses tenants, whatever they call their topics, and whatever way they take."""

from __future__ import annotations

import json
import random
from typing import Any
from urllib.parse import quote

import pytest
import websockets
from daemons import Daemon, running
from keys import subprotocol
from websockets.typing import Subprotocol

from clevrd.tenants.keys import NewKey, new_key
from clevrd.tenants.settings import Access, read_access

# Names of tenants that begin with, end with or contain one another, and what joins them elsewhere.
TENANTS = ("a", "a.b", "a-b", "A", "_a", "ab", "default-tenant")
# Topics that look like another tenant's, like a path, a pattern, an encoding, or another topic.
TOPICS = (
    *("t", "b:t", "a:t", ":t", "t:", "a.b:t", "../t", "..%2ft", "%2e%2e/t", "a/t", "/t", "//t"),
    *("*", "**", "t.*", "a.*", "default-tenant:t", "\u0430:t", "t\u200b", "t\u0301", "\u00e9"),
    *("e\u0301", "T", "t ", " t", "t,t", "t&topic=u", "t#", "t?tenant=a", "null", "0", "\u202et"),
)
STEPS = 400


def make_rules(keys: dict[str, NewKey]) -> Access:
    everything = {"publish": ["**"], "subscribe": ["**"]}
    tenants = [
        {"name": name, "keys": [{"id": "all", "sha256": key.sha256, **everything}]}
        for name, key in keys.items()
    ]
    return read_access({"auth": {"mode": "required"}, "tenants": tenants}, "a test")


class Party:
    """One tenant: what it has published, and what it gets."""

    def __init__(self, name: str, key: NewKey, daemon: Daemon) -> None:
        self.name = name
        self.key = key
        self.daemon = daemon
        self.sent: list[tuple[str, int]] = []

    async def publish(self, topic: str, number: int, way: str) -> None:
        """Publish what nobody else may see, with its name in it."""
        item = json.dumps({"topic": topic, "data": {"of": self.name, "number": number}}).encode()
        path, body = (
            ("/publish/batch", b"[" + item + b"]") if way == "batch" else ("/publish", item)
        )
        headers = {"Authorization": f"Bearer {self.key.secret}"}
        async with self.daemon.http.post(
            self.daemon.url + path, data=body, headers=headers
        ) as answer:
            assert answer.status == 200, await answer.text()
        self.sent.append((topic, number))

    async def poll(self, topic: str) -> list[dict[str, Any]]:
        """Return all that a poll of ``topic`` has."""
        query = f"topic={quote(topic, safe='')}&poll=1&timeout=0&last=1000"
        headers = {"X-API-Key": self.key.secret}
        async with self.daemon.http.get(
            f"{self.daemon.url}/subscribe?{query}", headers=headers
        ) as answer:
            found = await answer.json()
            assert answer.status == 200, found
            messages: list[dict[str, Any]] = found["messages"]
            return messages

    def is_own(self, message: dict[str, Any]) -> bool:
        """Whether ``message`` is its, by all that it says."""
        return (message["tenant_id"], message["data"]["of"]) == (self.name, self.name)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("raw_paths", [True, False])
async def test_no_byte_crosses_tenants(seed: int, raw_paths: bool) -> None:
    """Each tenant gets all that it published, in order, and nothing else."""
    chance = random.Random(seed)  # noqa: S311  # a test's
    keys = {name: new_key() for name in TENANTS}
    async with running(
        access=make_rules(keys), raw_paths=raw_paths, match_all_patterns=True
    ) as daemon:
        parties = [Party(name, key, daemon) for name, key in keys.items()]
        sockets = {}
        for each in parties:
            protocols = [Subprotocol("clevrd.v1"), Subprotocol(subprotocol(each.key.secret))]
            socket = await websockets.connect(f"{daemon.ws_url}/ws", subprotocols=protocols)
            await socket.send('{"type":"subscribe","pattern":"**","last":0}')
            assert json.loads(await socket.recv())["type"] == "watching"
            sockets[each.name] = socket

        for number in range(STEPS):
            party, topic = chance.choice(parties), chance.choice(TOPICS)
            await party.publish(topic, number, chance.choice(("post", "batch")))

        for party in parties:
            await assert_got_its_own(party, sockets[party.name])
            await sockets[party.name].close()
            for topic in TOPICS:
                messages = await party.poll(topic)
                assert all(map(party.is_own, messages))
                assert [each["data"]["number"] for each in messages] == [
                    number for name, number in party.sent if name == topic
                ]


async def assert_got_its_own(party: Party, socket: websockets.ClientConnection) -> None:
    """Read what a tenant's pattern brought up to a pong; fail for anything that is not its."""
    await socket.send('{"type":"ping"}')
    got: list[tuple[str, int]] = []
    while True:
        told = json.loads(await socket.recv())
        if told.get("type") == "pong":
            break
        if "data" in told:
            assert party.is_own(told)
            got.append((told["topic"], told["data"]["number"]))
    assert sorted(got) == sorted(party.sent)
