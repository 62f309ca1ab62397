"""Where a Kafka is, and which topic has the journal, as a URL says it. Pure.

``kafka://`` names some brokers of a cluster, and ``kafka+ssl://`` the same over TLS; behind them
stands the topic.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

import msgspec

from clevrd.journal.url_parts import BadUrl, Host, parse_host, rest_of, scheme_of

_PORT: Final = 9092
# The schemes, each with whether it is encrypted.
SCHEMES: Final = {"kafka": False, "kafka+ssl": True}
# Kafka's own rule for names, less what the topic of checkpoints adds to it.
_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]{1,230}")
CHECKPOINTS_SUFFIX: Final = ".checkpoints"


class KafkaAddress(msgspec.Struct, frozen=True):
    """The parts of a URL."""

    # Some brokers of the cluster, by which the others are found.
    hosts: tuple[Host, ...]
    # The topic whose partitions are the logs.
    topic: str
    user: str = ""
    password: str = ""
    is_tls: bool = False

    @property
    def checkpoints(self) -> str:
        """The topic that has the checkpoints."""
        return self.topic + CHECKPOINTS_SUFFIX


def parse_kafka_url(url: str) -> KafkaAddress:
    """Return what ``url`` says; raises BadUrl."""
    scheme = scheme_of(url)
    if scheme not in SCHEMES:
        raise BadUrl(f"write a URL that begins with one of {', '.join(sorted(SCHEMES))}.")
    place, at, tail = rest_of(url).rpartition("@")
    user, _, password = place.partition(":")
    if at and not user:
        raise BadUrl("before the @ write user:password, or user alone with a password_file.")
    brokers, _, topic = tail.partition("/")
    hosts = tuple(parse_host(each, _PORT) for each in brokers.split(","))
    topic = unquote(topic)
    if not topic:
        raise BadUrl("behind the brokers write the topic: kafka://h1:9092,h2:9092/clevrd.")
    if topic in (".", "..") or not _TOPIC.fullmatch(topic):
        raise BadUrl(
            "the topic's name has at most 230 letters, digits, full stops, hyphens and underscores."
        )
    return KafkaAddress(hosts, topic, unquote(user), unquote(password), SCHEMES[scheme])
