"""Names of topics and keys: which ones clients may choose. The same for clients: docs/wire.md."""

from __future__ import annotations

from typing import Final

from clevrd.errors import InvalidRequest

# A topic is part of a URL and of every message; 255 bytes is what file systems and brokers take.
MAX_TOPIC_BYTES: Final = 255

# The topic of a tenant in which its lifecycle events are published, where it wants them. It is no
# topic of its publishers then.
EVENTS_TOPIC: Final = "$events"

# A key names what a message is about, an instrument or a vehicle: an identifier like a topic.
MAX_KEY_BYTES: Final = 255

# An id by which a subscriber is known to others: a user's, or a UUID.
MAX_SUBSCRIBER_ID_BYTES: Final = 128


def check_topic(topic: str) -> None:
    """Raise InvalidRequest unless ``topic`` is 1 to 255 bytes of UTF-8 without control characters.

    Control characters are those of Unicode's category Cc: C0, DEL and C1.
    """
    if topic and len(topic) <= MAX_TOPIC_BYTES and topic.isascii() and topic.isprintable():
        return
    if not topic:
        raise InvalidRequest("The topic is empty; name one of 1 to 255 bytes.")
    _check_name("topic", topic, MAX_TOPIC_BYTES)


def check_key(key: str) -> None:
    """Raise InvalidRequest unless ``key`` is 1 to 255 bytes of UTF-8 without control characters."""
    if key and len(key) <= MAX_KEY_BYTES and key.isascii() and key.isprintable():
        return
    if not key:
        raise InvalidRequest("The key is empty; give one of 1 to 255 bytes, or leave it out.")
    _check_name("key", key, MAX_KEY_BYTES)


def check_subscriber_id(subscriber_id: str) -> None:
    """Raise InvalidRequest unless it is 1 to 128 bytes of UTF-8 without control characters."""
    if not subscriber_id:
        raise InvalidRequest(
            f"The subscriber_id is empty; give one of 1 to {MAX_SUBSCRIBER_ID_BYTES} bytes, or"
            " leave it out."
        )
    _check_name("subscriber_id", subscriber_id, MAX_SUBSCRIBER_ID_BYTES)


def _check_name(what: str, name: str, max_bytes: int) -> None:
    try:
        size_bytes = len(name.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"The {what} holds a lone surrogate; use valid Unicode.") from error
    if size_bytes > max_bytes:
        raise InvalidRequest(f"The {what} has {size_bytes} bytes; {max_bytes} are allowed.")
    if any(ord(char) < 0x20 or 0x7F <= ord(char) <= 0x9F for char in name):
        raise InvalidRequest(f"The {what} holds a control character; remove it.")
