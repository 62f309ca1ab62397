"""Checks of the client's arguments: each is returned as it will be used, or refused.

A wrong argument raises where the call is made, not later in a task. The server alone judges the
size of a message and the name of a topic that is published to.
"""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from math import inf
from typing import Final, TypeVar
from urllib.parse import quote

from clevrd.client.errors import BadUrl
from clevrd.core.names import check_subscriber_id, check_topic
from clevrd.core.patterns import parse_pattern
from clevrd.core.ttl import MAX_TTL_S, MIN_TTL_S, TTL_ADVICE
from clevrd.errors import InvalidRequest

T = TypeVar("T")

POLICIES: Final = ("drop_oldest", "drop_newest", "circuit_breaker", "latest")

# RFC 9110 §5.1: a field's name is a token.
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# RFC 9110 §5.5: a field's value has no control characters except the tab.
_CONTROLS: Final = re.compile(r"[\0-\x08\x0a-\x1f\x7f]")

# RFC 9110 §11.6.2 has fewer characters for a token than a server takes: visible ASCII, at most so
# many of them.
_SECRET: Final = re.compile(r"[!-~]{1,5600}")

# The largest count and the largest offset: the largest signed number of 64 bits.
MAX_COUNT: Final = (1 << 63) - 1

# 1e300: a time can still be added to it within a float's range.
_MAX_SECONDS: Final = 1e300

# The largest number that a server takes in a duration such as 5m.
_MAX_NUMBER: Final = 999_999_999
_SECOND: Final = timedelta(seconds=1)
_DAY: Final = timedelta(days=1)

# RFC 3986 §5.2.4: steps of a path, which clients and proxies take out, however they are encoded.
_DOT_SEGMENTS: Final = (".", "..")

# Characters of a wrong value that a sentence shows.
_SHORT_CHARACTERS: Final = 60


def type_name(value: object) -> str:
    """Return the name of ``value``'s type with its article, for sentences."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"


def short(text: str) -> str:
    """Return a wrong text quoted, and cut to a length that fits a sentence."""
    cut = text if len(text) <= _SHORT_CHARACTERS else f"{text[:_SHORT_CHARACTERS]}..."
    return repr(cut)


# --- of a client ---------------------------------------------------------------------------------


def check_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return the headers to send; raises TypeError, ValueError."""
    for name, value in _texts_of(headers):
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} can't be the name of a header.")
        if _CONTROLS.search(value) or not is_utf_8(value):
            raise ValueError(f"The value of the header {name} holds what no header can.")
    return dict(headers or {})


def _texts_of(headers: Mapping[str, str] | None) -> Iterator[tuple[str, str]]:
    """Yield the names and values of ``headers``; raises TypeError for what is none."""
    if headers is None:
        return
    if not isinstance(headers, Mapping):
        raise TypeError(f"headers are a dict of names and values, not {type_name(headers)}.")
    for name, value in headers.items():
        if not all(isinstance(each, str) for each in (name, value)):
            raise TypeError(f"Names and values of headers are text; {name!r} is not.")
        yield name, value


def check_tenant(tenant: str | None) -> str | None:
    """Return the tenant; raises TypeError, BadUrl."""
    if tenant is None:
        return None
    if not isinstance(tenant, str):
        raise TypeError(f"The tenant is text, not {type_name(tenant)}.")
    if not tenant:
        raise BadUrl("The tenant is empty; leave it out where the server knows it.")
    if not (tenant.isascii() and tenant.isprintable()):
        raise BadUrl("The tenant must be printable ASCII.")
    return tenant


def check_token(token: T) -> T:
    """Return a secret, or the function that returns one; raises TypeError, ValueError."""
    if not callable(token):
        if not isinstance(token, str):
            raise TypeError(f"token is text or a function that returns it, not {type_name(token)}.")
        check_secret(token)
    return token


def check_secret(secret: object) -> str:
    """Return an API key or a token; raises TypeError, ValueError, without any of its text."""
    if not isinstance(secret, str):
        raise TypeError(f"A token function returns text, not {type_name(secret)}.")
    if not _SECRET.fullmatch(secret):
        raise ValueError("A token is 1 to 5,600 visible ASCII characters, without spaces.")
    return secret


def check_tls(tls: ssl.SSLContext | None) -> ssl.SSLContext | None:
    """Return the context; raises TypeError."""
    if tls is not None and not isinstance(tls, ssl.SSLContext):
        raise TypeError(
            f"tls is an ssl.SSLContext, not {type_name(tls)}; for what the system trusts leave it"
            " out."
        )
    return tls


def check_seconds(name: str, value: float) -> float:
    """Return a duration in seconds, zero or more; raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number of seconds, not {type_name(value)}.")
    if not value >= 0:
        raise ValueError(f"{name} is a number of seconds, 0 or more, not {_shown(value)}.")
    # An integer beyond a float's range could not be added to a time, so it becomes infinity.
    return value if value <= _MAX_SECONDS else inf


def check_timeout(name: str, value: float) -> float:
    """Return a duration in seconds that a thread can wait for; raises as `check_seconds`."""
    return min(check_seconds(name, value), threading.TIMEOUT_MAX)


def check_count(name: str, value: int, minimum: int = 1) -> int:
    """Return a whole number of at least ``minimum``; raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a whole number, not {type_name(value)}.")
    if value < minimum:
        raise ValueError(f"{name} is {minimum} or more, not {_shown(value)}.")
    if value > MAX_COUNT:
        raise ValueError(f"{name} is at most {MAX_COUNT}.")
    return value


# --- of a publish --------------------------------------------------------------------------------


def check_items(items: object) -> None:
    """Raise TypeError unless ``items`` can be iterated over as a batch."""
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable):
        raise TypeError(
            f"items is a list or another iterable of (topic, data) pairs, not {type_name(items)}."
        )


_TRACE: Final = ("traceparent", "tracestate")


def publish_fields(
    topic: str,
    key: str | None,
    ttl_s: float | None,
    headers: Mapping[str, str] | None,
    idempotency_key: str | None,
) -> dict[str, object]:
    """Return the fields of a publish beside its topic and data, without fields that are None.

    Raises:
        TypeError, ValueError: one of them, or the topic, can't be sent.
    """
    if not isinstance(topic, str):
        raise TypeError(f"The topic is text, not {type_name(topic)}.")
    if key is not None and not isinstance(key, str):
        raise TypeError(f"key is text, not {type_name(key)}.")
    if idempotency_key is not None and not isinstance(idempotency_key, str):
        raise TypeError(f"idempotency_key is text, not {type_name(idempotency_key)}.")
    if key == "":
        raise ValueError("key is empty; leave it out for a message without one.")
    if idempotency_key == "":
        raise ValueError("idempotency_key is empty; leave it out to have one drawn.")
    for name, text in (("The topic", topic), ("key", key), ("idempotency_key", idempotency_key)):
        if text is not None:
            _check_utf_8(name, text)
    if ttl_s is not None:
        check_ttl(ttl_s)
    given = {
        "key": key,
        "ttl_s": ttl_s,
        "headers": _message_headers(headers) or None,
        "idempotency_key": idempotency_key,
    }
    return {name: value for name, value in given.items() if value is not None}


def _message_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return the headers that a message is published with; the server says what they can hold."""
    for name, value in _texts_of(headers):
        _check_utf_8("A header's name", name)
        check_header_name(name)
        _check_utf_8(f"The header {short(name)}", value)
    return dict(headers or {})


def check_header_name(name: str) -> None:
    """Raise ValueError for a name that a server ignores, as it does fields that it has none of."""
    if name not in _TRACE and not name.startswith("ce-"):
        raise ValueError(
            f"The header {short(name)} can't be carried; traceparent, tracestate and ce-* can."
        )


def check_ttl(ttl_s: float) -> None:
    """Raise TypeError or ValueError unless a server takes ``ttl_s`` as a time to live."""
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, (int, float)):
        raise TypeError(f"ttl_s is a number of seconds, not {type_name(ttl_s)}.")
    if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
        raise ValueError(TTL_ADVICE)


# --- of a subscription, and of a history ---------------------------------------------------------


def topics_of(named: Iterable[str | Iterable[str]]) -> tuple[str, ...]:
    """Return the topics, each checked; a list among them stands for its topics."""
    topics: list[str] = []
    for each in named:
        topics += _names("topic", [each] if isinstance(each, str) else each)
    for topic in topics:
        check_topic_name(topic)
    return tuple(topics)


def check_topic_name(topic: str) -> None:
    """Raise ValueError unless ``topic`` can be the name of a topic."""
    _check(check_topic, topic)


def path_of(topic: str) -> str:
    """Return the path of a topic, below which its messages are.

    Raises:
        TypeError, ValueError: ``topic`` can be no topic's name, or can't stand in a path.
    """
    if not isinstance(topic, str):
        raise TypeError(f"The topic is text, not {type_name(topic)}.")
    check_topic_name(topic)
    if topic in _DOT_SEGMENTS:
        raise ValueError(f"A topic named {topic!r} can be no part of a URL; subscribe to it.")
    return f"/topics/{quote(topic, safe='')}"


def check_after(after: str | None) -> None:
    """Raise TypeError or ValueError unless ``after`` can be a name behind which a page begins."""
    if after is not None and not isinstance(after, str):
        raise TypeError(f"after is text, not {type_name(after)}.")
    if after is not None:
        _check_utf_8("after", after)


def patterns_of(patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the patterns, each checked."""
    if isinstance(patterns, str):
        raise ValueError(f"patterns is a list of patterns; write patterns=[{patterns!r}].")
    found = _names("pattern", patterns)
    for pattern in found:
        _check(parse_pattern, pattern)
    return tuple(found)


def check_policy(policy: str | None) -> str | None:
    """Return the policy; raises TypeError, ValueError."""
    if policy is not None and not isinstance(policy, str):
        raise TypeError(f"policy is text, not {type_name(policy)}.")
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"policy is one of {', '.join(POLICIES)}, not {policy!r}.")
    return policy


def subscriber_id_of(subscriber_id: str | None) -> str | None:
    """Return the id that a subscriber gives itself; raises TypeError, ValueError."""
    if subscriber_id is None:
        return None
    if not isinstance(subscriber_id, str):
        raise TypeError(f"subscriber_id is text, not {type_name(subscriber_id)}.")
    _check(check_subscriber_id, subscriber_id)
    return subscriber_id


def since_text(since: str | datetime | timedelta | None) -> str | None:
    """Return ``since`` in the form that the server takes.

    A duration is rounded up to a whole second, since a server takes no fractions; a duration of
    more than 31 years is rounded up to a whole day, since a server takes no number of more than
    nine digits.

    Raises:
        TypeError: ``since`` has another type.
        ValueError: ``since`` is a time without a time zone, a duration into the future, or a text
            that can't be sent.
    """
    match since:
        case None:
            return None
        case str():
            _check_utf_8("since", since)
            if not since:
                raise ValueError('since is empty; it is like "5m", or leave it out.')
            return since
        case datetime():
            if since.utcoffset() is None:
                raise ValueError(
                    "since is a time without a time zone; give it one: datetime.now(UTC), or"
                    " since.astimezone() for local time."
                )
            try:
                utc = since.astimezone(UTC)
            except OverflowError as error:
                raise ValueError(f"since is beyond what a time can be: {since}.") from error
            return f"{utc.replace(tzinfo=None).isoformat()}Z"
        case timedelta():
            if since < timedelta(0):
                raise ValueError("since is how long ago, so it can't be below zero.")
            seconds = since // _SECOND + bool(since % _SECOND)
            if seconds <= _MAX_NUMBER:
                return f"{seconds}s"
            return f"{min(since // _DAY + bool(since % _DAY), _MAX_NUMBER)}d"
        case date():
            raise TypeError("since is a datetime with a time zone, not a date.")
    raise TypeError(
        f'since is text such as "5m", a timedelta or a datetime, not {type_name(since)}.'
    )


def check_flag(name: str, value: bool) -> bool:
    """Return a flag; raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {type_name(value)}.")
    return value


def _names(kind: str, given: Iterable[str]) -> list[str]:
    """Return a list of names; raises TypeError."""
    if isinstance(given, (bytes, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f"A {kind} is text, not {type_name(given)}.")
    found = list(given)
    for each in found:
        if not isinstance(each, str):
            raise TypeError(f"A {kind} is text, not {type_name(each)}.")
    return found


def _check(check: Callable[[str], object], name: str) -> None:
    """Call ``check``; raise its InvalidRequest as a ValueError."""
    try:
        check(name)
    except InvalidRequest as error:
        raise ValueError(str(error)) from error


def _shown(value: float) -> str:
    """Return a wrong number for a sentence; Python does not print very long integers."""
    return "less" if value < -MAX_COUNT else repr(value)


def _check_utf_8(name: str, text: str) -> None:
    """Raise ValueError unless ``text`` can be encoded as UTF-8."""
    if not (text.isascii() or is_utf_8(text)):
        raise ValueError(f"{name} holds half a surrogate pair, which UTF-8 has no form for.")


def is_utf_8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
