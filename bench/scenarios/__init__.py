"""The scenarios, one file for each question. Importing this package registers them all."""

from bench.scenarios import (
    attacks,
    connect,
    fanout,
    floor,
    memory,
    neighbour,
    publish,
    python_client,
    scrape,
    selfcheck,
    slow,
    soak,
    steady,
    tls,
    topics,
    transports,
)

__all__ = [
    "attacks",
    "connect",
    "fanout",
    "floor",
    "memory",
    "neighbour",
    "publish",
    "python_client",
    "scrape",
    "selfcheck",
    "slow",
    "soak",
    "steady",
    "tls",
    "topics",
    "transports",
]
