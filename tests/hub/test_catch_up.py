"""Catching up by turns: however much waits for however many readers, others are served between."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import msgspec
import pytest
from clients import offsets, read_to_the_end, subscribe
from daemons import running, until
from fakes import FakeSink, totals_of

from clevrd.config import Config
from clevrd.core.beginning import Last
from clevrd.core.publish_request import PublishRequest
from clevrd.core.stream_forms import NDJSON_BARE, StreamForm
from clevrd.core.subscriber import Subscriber
from clevrd.hub import Hub
from clevrd.hub.readers import CATCH_UP_BYTES, CATCH_UP_TURN_BYTES
from clevrd.tenants import Tenant

TENANT = Tenant("t")
MESSAGES = 600


def make_hub(topics: int) -> Hub:
    """Return a hub with so many topics of 600 messages of about 2 KB."""
    hub = Hub(Config(), asyncio.get_running_loop())
    data = msgspec.Raw(b'"%b"' % (b"x" * 1900))
    for number in range(topics):
        topic = hub.topic(TENANT, f"t{number}")
        for _ in range(MESSAGES):
            hub.publish(topic, PublishRequest(topic.name, data))
    return hub


@pytest.mark.parametrize(("form", "costs"), [(None, 1), (NDJSON_BARE, 8)])
async def test_readers_that_catch_up_share_the_turns(form: StreamForm | None, costs: int) -> None:
    """All together take no more of a turn than one may, and none waits for another's end."""
    hub = make_hub(topics=8)
    sinks = [FakeSink() for _ in range(8)]

    for number, sink in enumerate(sinks):
        topic = hub.topic(TENANT, f"t{number}")
        hub.subscribe(topic, Subscriber(sink, form=form), Last(MESSAGES))
    handed = [0, sum(len(sink.received) for sink in sinks)]
    began = []
    while any(topic.lagging for topic in hub.topics):
        await asyncio.sleep(0)
        handed.append(sum(len(sink.received) for sink in sinks))
        began.append(sum(bool(sink.writes) for sink in sinks))

    most = max(after - before for before, after in pairwise(handed))
    assert most * costs <= CATCH_UP_TURN_BYTES + CATCH_UP_BYTES * costs
    assert totals_of(hub.topics).delivered == 8 * MESSAGES
    # The last one has begun long before the others have ended.
    assert handed[began.index(8) + 2] < handed[-1] / 2


async def test_reader_that_leaves_or_stalls_while_it_catches_up_is_given_no_more() -> None:
    """It has lost its turn, and gets it back when its transport takes more."""
    hub = make_hub(topics=3)
    topics = [hub.topic(TENANT, f"t{number}") for number in range(3)]
    sinks = [FakeSink() for _ in topics]
    readers = [Subscriber(sink) for sink in sinks]
    for topic, reader in zip(topics, readers, strict=True):
        hub.subscribe(topic, reader, Last(MESSAGES))

    hub.unsubscribe(topics[1], readers[1])
    hub.paused(topics[2], readers[2])
    had = [len(sink.received) for sink in sinks]
    for _ in range(20):
        await asyncio.sleep(0)
    stalled = len(sinks[2].received)
    hub.resumed(topics[2], readers[2])
    for _ in range(20):
        await asyncio.sleep(0)

    assert readers[0].delivered == MESSAGES
    assert (len(sinks[1].received), stalled) == (had[1], had[2])
    assert readers[2].delivered == MESSAGES
    totals = totals_of(hub.topics)
    assert totals.offered == totals.delivered + totals.discarded


async def test_write_that_fails_does_not_stop_the_others() -> None:
    """Its reader is let go, logged and counted; those that wait for their turn have it."""
    hub = make_hub(topics=3)
    topics = [hub.topic(TENANT, f"t{number}") for number in range(3)]
    sinks = [FakeSink() for _ in topics]
    for topic, sink in zip(topics, sinks, strict=True):
        hub.subscribe(topic, Subscriber(sink), Last(MESSAGES))

    sinks[1].error = RuntimeError("a bug")
    await until(lambda: not any(topic.lagging for topic in topics))

    assert sinks[1].closed == (1011, "write_failed")
    assert hub.counters.background_errors == 1
    assert hub.subscribers == 2
    assert len(sinks[0].received) == len(sinks[2].received) > 600 * 1900


async def test_live_reader_whose_write_fails_does_not_stop_the_others() -> None:
    """In a round as well it is let go, closed, logged and counted, once; the others go on."""
    hub = make_hub(topics=1)
    topic = hub.topic(TENANT, "t0")
    sinks = [FakeSink() for _ in range(3)]
    readers = [Subscriber(sink) for sink in sinks]
    for reader in readers:
        hub.subscribe(topic, reader, Last(0))
    assert len(topic.live) == 3

    sinks[1].error = RuntimeError("a bug")
    for _ in range(3):
        hub.publish(topic, PublishRequest(topic.name, msgspec.Raw(b"1")))
        await until(lambda: not topic.needs_round)

    assert [sink.closed for sink in sinks] == [None, (1011, "write_failed"), None]
    assert [reader.is_joined for reader in readers] == [True, False, True]
    assert (hub.subscribers, topic.subscribers, hub.counters.background_errors) == (2, 2, 1)
    assert len(sinks[0].writes) == len(sinks[2].writes) == 3
    totals = totals_of(hub.topics)
    assert totals.offered == totals.delivered + totals.discarded == 7


async def test_connection_whose_write_fails_is_closed_with_1011() -> None:
    """Its client learns that something went wrong, and whoever looks at the figures does too."""
    async with (
        running() as daemon,
        subscribe(daemon.ws_url, last=0) as failing,
        subscribe(daemon.ws_url, last=0) as other,
    ):
        first, _ = daemon.hub.topic(Tenant("default-tenant"), "t").live

        def fail(_: bytes) -> None:
            raise RuntimeError("a bug")

        first.write = fail
        await daemon.publish("t", 1)
        await daemon.publish("t", 2)
        seen, code, reason = await read_to_the_end(failing)
        others = await offsets(other, 2)
        figures = await daemon.get_json("/metrics")

    assert (seen, code, reason) == ([], 1011, "write_failed")
    assert others == [1, 2]
    assert figures["total_subscribers"] == 1
    assert figures["connections"]["closed"] == {"1011": 1}
    assert figures["connections"]["background_errors"] == 1
