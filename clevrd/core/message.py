"""Message: one message as subscribers see it. Encoding: core/server_frames. Shape: docs/wire.md."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message as subscribers see it; the fields stand in the order they are sent."""

    id: str
    topic: str
    tenant_id: str
    data: msgspec.Raw
    timestamp: str
    offset: int


class KeyedMessage(Message, frozen=True, gc=False):
    """A message that was published with a key.

    A class of its own: a field that may be left out costs every message 150 ns to encode.
    """

    key: str


class ExpiringMessage(Message, frozen=True, gc=False):
    """A message that was published with a time to live, in seconds."""

    ttl_s: int | float


class ExpiringKeyedMessage(ExpiringMessage, frozen=True, gc=False):
    """A message with both; the key is the last field, as `server_frames.key_of` expects."""

    key: str


def message_of(
    stamp: tuple[str, str],
    topic: str,
    tenant: str,
    data: msgspec.Raw,
    offset: int,
    key: str | None,
    ttl_s: float | None,
) -> Message:
    """Return a message of the class that has what was published with it, and nothing else.

    Args:
        stamp: its id and its timestamp.
    """
    message_id, timestamp = stamp
    if ttl_s is None:
        if key is None:
            return Message(message_id, topic, tenant, data, timestamp, offset)
        return KeyedMessage(message_id, topic, tenant, data, timestamp, offset, key)
    if key is None:
        return ExpiringMessage(message_id, topic, tenant, data, timestamp, offset, ttl_s)
    return ExpiringKeyedMessage(message_id, topic, tenant, data, timestamp, offset, ttl_s, key)
