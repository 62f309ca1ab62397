"""The Top-N view: the right rows in the right order, in small steps however many there are."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import FakeClock
from fakes import FakeSink
from hypothesis import given
from hypothesis import strategies as st

from clevrd.config import Config
from clevrd.connections.one_subscription import OneSubscription
from clevrd.connections.registry import Connections
from clevrd.core.beginning import Last
from clevrd.core.drop_strategy import DROP_OLDEST
from clevrd.core.publish_request import PublishRequest
from clevrd.core.subscription import DeliveryOptions
from clevrd.errors import Forbidden, RateLimited
from clevrd.handlers.operate.figures import Figures
from clevrd.handlers.operate.top import Top, TopViews
from clevrd.hub import Hub
from clevrd.metrics.decisions import Decisions
from clevrd.metrics.top import TopView, most_limited
from clevrd.tenants import Tenant

TENANT = Tenant("default-tenant")
SUBSCRIBERS = 10_000
TOPICS = 1_000
# Connections that one step may look at, and items that it may compare: 0.4 ms and less.
CONNECTIONS_PER_STEP = 129
OFFERS_PER_STEP = 1_300
ANY = DeliveryOptions(DROP_OLDEST, wanted_window=None, has_notices=False)


class FakeConnection:
    """A connection with one topic, and a client that has taken all but ``unsent``."""

    kind = "websocket"
    is_closing = False
    transport = None
    tenant = TENANT
    looks = 0

    def __init__(self, reader: OneSubscription, unsent: int) -> None:
        self.reader = reader
        self.unsent = unsent

    def readers(self) -> Sequence[OneSubscription]:
        return (self.reader,)

    def unsent_bytes(self) -> int:
        FakeConnection.looks += 1
        return self.unsent


class FakeConnections:
    """As much of the registry as the view needs."""

    def __init__(self, connections: list[FakeConnection], now_s: FakeClock) -> None:
        self.connections = connections
        self.now_s = now_s
        self.numbers = {connection: number for number, connection in enumerate(connections)}

    def listed(self) -> list[FakeConnection]:
        return list(self.connections)

    def number_of(self, connection: FakeConnection) -> int:
        return self.numbers[connection]

    def opened_s(self, connection: FakeConnection) -> float:
        return self.now_s() - 5.0

    def address_of(self, connection: FakeConnection) -> str:
        return "192.0.2.1"


class Crowd(SimpleNamespace):
    """10,000 subscribers of 1,000 topics; every tenth is stalled, the later the longer."""

    hub: Hub
    views: TopViews
    clock: FakeClock


@pytest.fixture(scope="module")
def crowd() -> Crowd:
    loop = asyncio.new_event_loop()
    hub = Hub(Config(), loop)
    clock = FakeClock()
    connections: list[FakeConnection] = []
    for number in range(SUBSCRIBERS):
        topic = hub.topic(TENANT, f"t{number % TOPICS}")
        reader = OneSubscription(hub, topic, FakeSink(), ANY)
        hub.subscribe(topic, reader, Last(0))
        if number % 10 == 0:
            hub.paused(topic, reader)
        connections.append(FakeConnection(reader, unsent=number))
    for number in range(TOPICS):
        topic = hub.topic(TENANT, f"t{number}")
        for _ in range(number // 100 + 1):
            hub.publish(topic, PublishRequest("t", cast(Any, b"1" * (number + 1))))
    loop.close()
    registry = cast(Connections, FakeConnections(connections, clock))
    figures = Figures(hub, lambda: {"http": 0}, 0.0)
    return Crowd(hub=hub, views=TopViews(hub, registry, figures, clock), clock=clock)


def taken(views: TopViews, after_step: Any = None) -> TopView:
    """Take a view at once, and look around after each step."""
    steps: Generator[None, None, TopView] = views._take()
    while True:
        try:
            next(steps)
        except StopIteration as end:
            view: TopView = end.value
            return view
        if after_step is not None:
            after_step()


def test_many_are_looked_at_in_small_steps(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step walks through all subscribers, or all topics."""
    offers = 0
    offer = Top.offer

    def counted(self: Top[Any], value: float, item: Any) -> None:
        nonlocal offers
        offers += 1
        offer(self, value, item)

    monkeypatch.setattr(Top, "offer", counted)
    FakeConnection.looks = 0
    before = [0, 0]
    most = [0, 0]

    def after_step() -> None:
        for number, count in enumerate((FakeConnection.looks, offers)):
            most[number] = max(most[number], count - before[number])
            before[number] = count

    view = taken(crowd.views, after_step)

    assert view.figures.total_subscribers == SUBSCRIBERS
    # Each connection was looked at, and those in the table once more.
    assert SUBSCRIBERS <= FakeConnection.looks <= SUBSCRIBERS + 200
    assert most[0] <= CONNECTIONS_PER_STEP
    assert most[1] <= OFFERS_PER_STEP


def test_slowest_and_largest_come_first(crowd: Crowd) -> None:
    """Each table has those with the largest figures of all."""
    crowd.clock.advance(2.0)
    view = taken(crowd.views)

    lags = [row.lag_messages for row in view.slowest_by_lag]
    assert len(lags) == 100
    assert lags == sorted(lags, reverse=True)
    assert lags[0] == 10
    assert {row.state for row in view.slowest_by_lag} == {"stalled"}
    assert [row.unsent_bytes for row in view.slowest_by_bytes[:3]] == [9_999, 9_998, 9_997]
    rings = [row.buffered_bytes for row in view.largest_rings]
    assert rings == sorted(rings, reverse=True)
    assert view.largest_rings[0].topic == "t999"


def test_rates_are_of_the_time_between_two_views(crowd: Crowd) -> None:
    """Topics with nothing new are none of the busiest; a view long ago gives no rates."""
    taken(crowd.views)
    quiet = taken(crowd.views)
    crowd.clock.advance(4.0)
    topic = crowd.hub.topic(TENANT, "loud")
    for _ in range(20):
        topic.extend(topic.head + 1, [b"\x81\x02{}"], crowd.clock())
    busy = taken(crowd.views)
    crowd.clock.advance(600.0)
    topic.extend(topic.head + 1, [b"\x81\x02{}"], crowd.clock())
    late = taken(crowd.views)

    assert (quiet.interval_s, quiet.busiest_topics) == (None, [])
    assert busy.interval_s == 4.0
    (row,) = busy.busiest_topics
    assert (row.topic, row.messages_per_s) == ("loud", 5.0)
    assert (late.interval_s, late.busiest_topics[0].messages_per_s) == (None, None)


@given(values=st.lists(st.integers(-3, 50), max_size=60), room=st.integers(1, 12))
def test_top_is_what_sorting_all_would_give(values: list[int], room: int) -> None:
    """But for what is not more than nothing."""
    top: Top[int] = Top(room)
    for number, value in enumerate(values):
        top.offer(value, number)

    found = [(value, number) for value, number in top]

    expected = sorted((value for value in values if value > 0), reverse=True)[:room]
    assert [value for value, _ in found] == expected
    assert all(values[number] == value for value, number in found)
    assert len({number for _, number in found}) == len(found)


def test_limits_count_and_other_refusals_do_not() -> None:
    """The series of one key add up; a refusal without a limit is no limit's."""
    clock = FakeClock()
    decisions = Decisions(clock, lambda tenant: tenant)
    refused = RateLimited("acme", 5.0, 5, 0.5, key="web")
    decisions.note_refusal(refused, times=3)
    clock.advance(60)
    decisions.note_refusal(refused, times=2)
    decisions.note_refusal(RateLimited("other", 5.0, 5, 0.5), times=4)
    decisions.note_refusal(Forbidden("No.", tenant="acme", credential="web"), times=9)
    clock.advance(1.5)

    rows = most_limited(decisions.newest(), clock(), 10)

    assert [(row.tenant_id, row.credential, row.refusals) for row in rows] == [
        ("acme", "web", 5),
        ("other", "", 4),
    ]
    assert rows[0].last_s == 1.5
    assert most_limited(decisions.newest(), clock(), 1) == rows[:1]
