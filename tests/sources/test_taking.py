"""Taking: the records of a source keep their order where publishes before them fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from memory_log import FULL, MemoryEngine, MemoryLog

from clevrd.config import Config
from clevrd.hub import Hub
from clevrd.journal import node as node_module
from clevrd.journal import partition as partition_module
from clevrd.journal.batches import MAX_PUBLISHES
from clevrd.sources import taking
from clevrd.sources.progress import Progress
from clevrd.sources.records import Record
from clevrd.sources.settings import read_sources
from clevrd.sources.taking import Taker
from clevrd.tenants import Tenant
from clevrd.tenants.settings import read_access

TABLE = {"name": "orders", "url": "redis://127.0.0.1:6379/orders", "topic": "t"}


async def taken_in_order(
    log: MemoryLog, count: int, fail: Callable[[Hub], None], *, is_held: bool = True
) -> list[int]:
    """Take ``count`` records; return what the topic has at the end.

    Args:
        fail: called with the hub before that, or when as many publishes as possible are on their
            way.
        is_held: the log takes nothing until then.
    """
    loop = asyncio.get_running_loop()
    hub = Hub(Config(), loop, engine=MemoryEngine(log), journaled=(("**",),))
    assert hub.journal is not None
    await hub.journal.node.start()
    (entry,) = read_sources({"sources": [TABLE]}, read_access({}, "file f"), "f")
    progress = Progress(entry)
    tenant = Tenant("default-tenant")
    taker = Taker(hub, entry.mapping, progress, lambda: tenant, 1 << 20, asyncio.Event(), loop)

    async def hold() -> None:
        pass

    try:
        if is_held:
            log.goes_on.clear()
        else:
            fail(hub)
        records = [Record(f"1-{number}", b"%d" % number) for number in range(count)]
        taking_all = loop.create_task(taker.take(records, hold))
        pending = hub.journal.node._partitions[0].pending
        before = -1
        while is_held and before != len(pending):
            before = len(pending)
            for _ in range(20):
                await asyncio.sleep(0)
        if is_held:
            fail(hub)
        log.goes_on.set()
        assert await taking_all == count
        ring = hub.topic(tenant, "t").ring
        frames = ring.frames(0, ring.head)
        return [int(frame.split(b'"data":')[1].split(b",")[0].rstrip(b"}")) for frame in frames]
    finally:
        hub.seal()
        await hub.journal.node.stop()


async def test_records_behind_one_that_finds_no_room_wait_for_it() -> None:
    """The journal is full when it is sent the first ones, and no more when the next ones come."""
    log = MemoryLog()
    count = 2 * MAX_PUBLISHES

    def fail(_: Hub) -> None:
        log.faults = [(FULL, False)]

    assert await taken_in_order(log, count, fail) == list(range(count))


async def test_records_that_are_not_sent_yet_wait_for_one_that_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The journal is full for the first one alone, while the source is at the others."""
    # Each record is a turn of the loop.
    monkeypatch.setattr(taking, "SHARE_S", -1.0)
    log = MemoryLog()

    def fail(_: Hub) -> None:
        log.faults = [(FULL, False)]

    assert await taken_in_order(log, 100, fail, is_held=False) == list(range(100))


async def test_record_that_waits_for_room_does_not_overtake_those_that_were_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The journal does not answer, its room is used up, and it comes back."""
    for module in (node_module, partition_module):
        monkeypatch.setattr(module, "MAX_PENDING_BYTES", 20_000)
    log = MemoryLog()

    def give_up(hub: Hub) -> None:
        assert hub.journal is not None
        hub.journal.node._partitions[0].give_up()

    assert await taken_in_order(log, 100, give_up) == list(range(100))
