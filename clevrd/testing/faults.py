"""Faults made inside a daemon, so that they come exactly when they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec

from clevrd.core.publish_request import PublishRequest
from clevrd.core.server_frames import plain_frame_of
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.server import Server
from clevrd.tenants import Tenant

# Messages that one gap may have: more would hold the loop for long, and test nothing else.
MAX_GAP: Final = 10_000
_POLL_S: Final = 0.002
TIMEOUT_S: Final = 5.0


def topics_named(server: Server, name: str | None) -> list[Topic]:
    """Return the topics of this name, of all tenants; all topics for None."""
    return [topic for topic in server.hub.topics if name is None or topic.name == name]


def readers_of(topic: Topic) -> list[Subscriber]:
    """Return all subscribers of ``topic``."""
    return [*topic.live, *topic.lagging, *topic.suspended]


def transport_of(reader: Subscriber) -> asyncio.Transport | None:
    """Return the transport that ``reader`` is written to; None for a long-poll, which has none."""
    return getattr(reader.sink, "transport", None)


async def until(claim: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Wait until ``claim()`` is true; raise TimeoutError after ``timeout_s``."""
    async with asyncio.timeout(timeout_s):
        while not claim():  # noqa: ASYNC110  # a daemon has no event for every claim
            await asyncio.sleep(_POLL_S)


async def cut_readers(server: Server, name: str | None) -> int:
    """Cut the subscribers of topic ``name``, or all connections for None; return how many."""
    transports = _reader_transports(server, name)
    if name is None:
        transports |= server.connections.transports()
    for transport in transports:
        transport.abort()
    # An aborted transport tells its protocol in the next turn of the loop, or the one after.
    await until(lambda: not transports & _all_transports(server))
    return len(transports)


def _reader_transports(server: Server, name: str | None) -> set[asyncio.Transport]:
    topics = topics_named(server, name)
    found = {transport_of(reader) for topic in topics for reader in readers_of(topic)}
    return {transport for transport in found if transport is not None}


def _all_transports(server: Server) -> set[asyncio.Transport]:
    return server.connections.transports() | _reader_transports(server, None)


async def lose(server: Server, tenant: str, name: str, count: int) -> None:
    """Let all readers of a topic lose its next ``count`` messages, as to a ring too small.

    The messages are published and gone before they are offered; the topic's older messages go with
    them. Readers are told of the gap with the next message.
    """
    if not 0 < count <= MAX_GAP:
        raise ValueError(f"A gap has 1 to {MAX_GAP} messages.")
    hub = server.hub
    topic = hub.topic(Tenant(tenant), name)
    await settle(topic)
    lost = PublishRequest(name, msgspec.Raw(b'"lost"'))
    # The ring itself is cut, since no topic would let go of messages that it is yet to offer.
    room, topic.ring.max_messages = topic.ring.max_messages, 0
    try:
        hub.publish_run(topic, [lost] * count)
    finally:
        topic.ring.max_messages = room
    await settle(topic)


async def settle(topic: Topic) -> None:
    """Wait until every message was offered, and every reader that is not blocked has them all."""
    await until(lambda: not topic.pending and all(reader.is_blocked for reader in topic.lagging))


def messages_of(topic: Topic) -> list[bytes]:
    """Return the JSON of each message that the topic keeps, oldest first."""
    return [_payload(plain_frame_of(frame)) for frame in topic.frames(topic.first - 1, topic.head)]


def _payload(frame: bytes) -> bytes:
    """Return the payload of an unmasked frame (RFC 6455 §5.2)."""
    extra_bytes = {126: 2, 127: 8}.get(frame[1], 0)
    return frame[2 + extra_bytes :]
