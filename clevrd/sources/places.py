"""Where a source is, as its URL says it: a server, and the stream on it. Pure."""

from __future__ import annotations

import re
from typing import Final, Literal
from urllib.parse import unquote

import msgspec

from clevrd.fingerprints import fingerprint
from clevrd.journal.kafka.url import parse_kafka_url
from clevrd.journal.nats.url import parse_nats_url
from clevrd.journal.redis.url import parse_redis_url
from clevrd.journal.url_parts import BadUrl

Kind = Literal["redis", "nats", "kafka"]

_MAX_STREAM_BYTES: Final = 1_024
_REDIS: Final = re.compile(r"(?:rediss?(?:\+sentinel|\+cluster)?|unix)://")
_KAFKA: Final = re.compile(r"kafka(?:\+ssl)?://")
_NATS: Final = re.compile(r"(?:nats|tls)://")
# Words between dots.
_SUBJECT: Final = re.compile(r"[^\s./\\]+(?:\.[^\s./\\]+)*")
_SENTINELS: Final = re.compile(r"rediss?\+sentinel://")


class Place(msgspec.Struct, frozen=True):
    """A stream on a server."""

    kind: Kind
    # The server's own URL, with its secret.
    server: str
    stream: str
    # Both as they may be shown.
    shown: str


def parse_place(url: str) -> Place:
    """Return what ``url`` says; raises BadUrl."""
    if _REDIS.match(url):
        return _redis_place(url)
    if _NATS.match(url):
        return _nats_place(url)
    if _KAFKA.match(url):
        topic = parse_kafka_url(url).topic
        return Place("kafka", url, topic, without_secret(url))
    raise BadUrl(
        "write the URL of a stream that can be read: redis://HOST/STREAM (also rediss, unix,"
        " redis+sentinel and redis+cluster), nats://HOST/STREAM (also tls), or"
        " kafka://HOST/TOPIC (also kafka+ssl)."
    )


def _nats_place(url: str) -> Place:
    server, _, stream = url.rpartition("/")
    name = unquote(stream)
    if not name or server.endswith("/"):
        raise BadUrl("behind the server write the stream, or a subject: nats://host:4222/ORDERS.")
    if not _SUBJECT.fullmatch(name) or len(name.encode()) > _MAX_STREAM_BYTES:
        raise BadUrl("a stream's name, or a subject, has no spaces and no empty words.")
    parse_nats_url(server)
    return Place("nats", server, name, without_secret(url))


def _redis_place(url: str) -> Place:
    head, _, stream = url.rpartition("/")
    scheme, _, rest = head.partition("://")
    # The last part of the path is the stream; the database and all else stand before it.
    if not rest.strip("/") or head.endswith("/") or not stream:
        raise BadUrl("behind the server write the stream: redis://host:6379/orders.")
    if stream.isdigit() and "/" not in rest:
        raise BadUrl(
            f"{stream} is the number of a database, and the stream is missing: write"
            f" {scheme}://host:6379/{stream}/orders."
        )
    if "?" in stream or "#" in stream:
        raise BadUrl("a ? or # in the stream's name is written %3F or %23.")
    name = unquote(stream)
    if len(name.encode()) > _MAX_STREAM_BYTES:
        raise BadUrl(f"the stream's name has more than {_MAX_STREAM_BYTES} bytes.")
    if _SENTINELS.match(url) and "/" not in rest:
        raise BadUrl(
            "behind the Sentinels write the name that they know the primary by, and the stream:"
            " redis+sentinel://h1:26379,h2:26379/mymaster/orders."
        )
    parse_redis_url(head)
    return Place("redis", head, name, without_secret(url))


def shown_place(url: str) -> str:
    """Return a URL without user and password, and with a fingerprint of them."""
    shown = without_secret(url)
    return shown if shown == url else f"{shown}#{fingerprint(url)}"


def without_secret(url: str) -> str:
    """Return a URL without user and password."""
    scheme, colon, rest = url.partition("://")
    return f"{scheme}{colon}{rest.rpartition('@')[2]}"
