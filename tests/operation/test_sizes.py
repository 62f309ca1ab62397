"""How large a message can become, and who takes it: the envelope around the largest publish."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from urllib.parse import quote

import msgspec
import pytest
from daemons import Daemon, running
from streams import EVENTS, LINES, open_stream
from websockets.asyncio.client import connect

from clevrd.config import ENVELOPE_BYTES, MIB, Config
from clevrd.core.event_ids import MAX_READ_BYTES
from clevrd.core.message import KeyedMessage
from clevrd.core.names import MAX_KEY_BYTES, MAX_TOPIC_BYTES
from clevrd.core.publish_request import PublishRequest, decode_publish

# The longest that there may be, with an escape for each letter.
TOPIC = '"' * MAX_TOPIC_BYTES
KEY = "\\" * MAX_KEY_BYTES
TENANT = "t" * 64


def largest_publish(topic: str = TOPIC) -> bytes:
    """Return a publish of as many bytes as the default takes."""
    head = (
        json.dumps({"topic": topic, "key": KEY}, separators=(",", ":"))[:-1].encode() + b',"data":"'
    )
    return head + b"x" * (Config().max_message_bytes - len(head) - 2) + b'"}'


def longest_message(publish: PublishRequest) -> bytes:
    """Return ``publish`` as a message, with the longest of what the daemon adds."""
    return msgspec.json.encode(
        KeyedMessage(
            "msg-20261123-171935.587355",
            publish.topic,
            TENANT,
            publish.data,
            "2026-11-23T17:19:35.587355Z",
            10**18 - 1,
            publish.key or "",
        )
    )


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """Return a daemon with its defaults."""
    async with running() as started:
        yield started


def test_envelope_is_within_what_is_left_for_it() -> None:
    """By how much a message is longer than its publish, and an event than its message."""
    body = largest_publish()
    message = longest_message(decode_publish(body))

    # Fields that the daemon adds; all others stand in the publish as well.
    assert len(message) - len(body) == 183
    longest_event = len(message) + MAX_READ_BYTES + len("id: \ndata: \n\n") + len("100000\r\n\r\n")
    assert longest_event <= Config().max_message_bytes + ENVELOPE_BYTES == MIB


async def test_reader_of_the_readme_takes_the_largest_message(daemon: Daemon) -> None:
    """`websockets` with its defaults, live and catching up."""
    url = f"{daemon.ws_url}/subscribe?topic={quote(TOPIC)}&tenant={TENANT}"
    async with connect(url) as live:
        headers = {"X-Tenant-ID": TENANT}
        async with daemon.http.post(
            f"{daemon.url}/publish", data=largest_publish(), headers=headers
        ) as response:
            assert response.status == 200
        received = await live.recv()
    async with connect(url) as late:
        again = await late.recv()

    assert received == again
    assert Config().max_message_bytes < len(received) <= MIB
    message = json.loads(received)
    assert (message["topic"], message["key"], message["tenant_id"]) == (TOPIC, KEY, TENANT)


@pytest.mark.parametrize("accept", [EVENTS, LINES])
async def test_largest_event_and_line_are_within_a_mebibyte(daemon: Daemon, accept: str) -> None:
    """Also with the id of many topics."""
    names = [f"{number:02}" for number in range(49)]
    for name in names:
        await daemon.publish(name, 1)
    async with daemon.http.post(f"{daemon.url}/publish", data=largest_publish("big")) as response:
        assert response.status == 200
    query = "&".join(f"topic={name}" for name in [*names, "big"])

    async with await open_stream(daemon.port, accept, query) as stream:
        items = await stream.items(50 + 50 * (accept == EVENTS))

    (big,) = [item for item in items if item.json.get("topic") == "big" and not item.kind]
    assert len(json.dumps(big.json, ensure_ascii=False)) > Config().max_message_bytes - 1_000
    assert max(map(len, stream.body.split(b"\n\n" if accept == EVENTS else b"\n"))) <= MIB
