"""Rounds of many topics: what one turn of the loop does of them, and that all have theirs."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from daemons import FakeStats, until
from fakes import FakeSink

from clevrd.config import Config
from clevrd.core.beginning import Last
from clevrd.core.publish_request import PublishRequest
from clevrd.core.subscriber import Subscriber
from clevrd.hub import Hub, rounds
from clevrd.tenants import Tenant

TENANT = Tenant("acme")
TOPICS = 40


class Crowds:
    """A hub with TOPICS topics, each with the same number of readers."""

    def __init__(self, readers: int) -> None:
        self.hub = Hub(Config(), asyncio.get_running_loop(), stats=FakeStats())
        self.topics = [self.hub.topic(TENANT, f"t{number}") for number in range(TOPICS)]
        self.sinks = [[FakeSink() for _ in range(readers)] for _ in self.topics]
        for topic, sinks in zip(self.topics, self.sinks, strict=True):
            for sink in sinks:
                self.hub.subscribe(topic, Subscriber(sink), Last(0))

    def publish(self) -> None:
        """Publish a message to each topic, all in this turn."""
        for topic in self.topics:
            self.hub.publish(topic, PublishRequest(topic.name, msgspec.Raw(b"1")))

    def writes(self) -> int:
        """Return how many writes there were so far."""
        return sum(len(sink.writes) for sinks in self.sinks for sink in sinks)


@pytest.mark.parametrize("readers", [1, 4, 25])
async def test_turn_has_few_rounds_though_many_topics_were_published_to(
    readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn that has passed its bound of writes and rounds leaves the others to the next."""
    monkeypatch.setattr(rounds, "WRITES_PER_SLICE", 10)
    monkeypatch.setattr(rounds, "WRITES_PER_TURN", 20)
    crowds = Crowds(readers)

    crowds.publish()
    turns = []
    while (before := crowds.writes()) < TOPICS * readers:
        await asyncio.sleep(0)
        turns.append(crowds.writes() - before)

    # The round or slice that passes the bound is done.
    assert max(turns) <= 20 + 10
    assert sum(turns) == TOPICS * readers
    assert min(turns[1:-1]) >= 20 // 2


async def test_topic_that_is_published_to_in_each_turn_leaves_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has one round in a turn, behind those of the topics that were due before."""
    monkeypatch.setattr(rounds, "WRITES_PER_TURN", 2)
    crowds = Crowds(1)

    crowds.publish()
    for _ in range(TOPICS):
        await asyncio.sleep(0)
        crowds.hub.publish(crowds.topics[0], PublishRequest("t0", msgspec.Raw(b"2")))
    counts = [len(sinks[0].writes) for sinks in crowds.sinks]
    await until(lambda: not any(topic.pending for topic in crowds.topics))

    assert counts[1:] == [1] * (TOPICS - 1)
