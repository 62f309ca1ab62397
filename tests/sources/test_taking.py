"""Taking: the records of a source keep their order where publishes before them fail."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import pytest
from daemons import until
from memory_log import FULL, MemoryEngine, MemoryLog

from clevrd.config import Config
from clevrd.hub import Hub
from clevrd.journal import node as node_module
from clevrd.journal import partition as partition_module
from clevrd.journal.batches import MAX_PUBLISHES
from clevrd.sources import taking
from clevrd.sources.progress import Progress
from clevrd.sources.reading import READING, SourceTrouble, Status
from clevrd.sources.records import Record
from clevrd.sources.settings import read_sources
from clevrd.sources.source import Source
from clevrd.sources.taking import Taker
from clevrd.tenants import Tenant
from clevrd.tenants.settings import read_access

# Records that a reader returns at once.
IN_ONE_READ = 60

TABLE = {"name": "orders", "url": "redis://127.0.0.1:6379/orders", "topic": "t"}


async def hold() -> None:
    """Show nobody that the reader is there."""


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

    async def take_all() -> int:
        done = []
        for start in range(0, count, IN_ONE_READ):
            done += await taker.take(records[start : start + IN_ONE_READ], hold)
        while taker.under_way:
            done += await taker.take((), hold)
        assert done == records
        return len(done)

    try:
        if is_held:
            log.goes_on.clear()
        else:
            fail(hub)
        records = [Record(f"1-{number}", b"%d" % number) for number in range(count)]
        taking_all = loop.create_task(take_all())
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


# --- under way -----------------------------------------------------------------------------------


@asynccontextmanager
async def world() -> AsyncIterator[tuple[MemoryLog, Hub, Taker, Progress]]:
    """Give a log that takes nothing yet, a hub whose topics are in it, and a taker."""
    loop = asyncio.get_running_loop()
    log = MemoryLog()
    hub = Hub(Config(), loop, engine=MemoryEngine(log), journaled=(("**",),))
    assert hub.journal is not None
    await hub.journal.node.start()
    (entry,) = read_sources({"sources": [TABLE]}, read_access({}, "file f"), "f")
    progress = Progress(entry)
    tenant = Tenant("default-tenant")
    log.goes_on.clear()
    try:
        yield (
            log,
            hub,
            Taker(hub, entry.mapping, progress, lambda: tenant, 1 << 20, asyncio.Event(), loop),
            progress,
        )
    finally:
        log.goes_on.set()
        hub.seal()
        await hub.journal.node.stop()


def some(first: int, count: int) -> list[Record]:
    """Return records, each with its number."""
    return [Record(f"1-{number}", b"%d" % number) for number in range(first, first + count)]


async def turns() -> None:
    """Let everything that can go on do so."""
    for _ in range(200):
        await asyncio.sleep(0)


async def test_more_records_are_taken_while_answers_are_due() -> None:
    """They are published behind those before, and are done with in their order."""
    async with world() as (log, _, taker, progress):
        first, second = some(0, 10), some(10, 10)

        assert await taker.take(first, hold) == []
        assert await taker.take(second, hold) == []
        assert (taker.under_way, progress.taken) == (20, 0)
        log.goes_on.set()
        done = []
        while taker.under_way:
            done += await taker.take((), hold)

        assert done == first + second
        assert progress.taken == 20


@pytest.mark.parametrize("name", ["MAX_UNDER_WAY", "MAX_UNDER_WAY_BYTES"])
async def test_records_under_way_are_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number and by bytes: nothing more is read before some are done with."""
    # Ten records have ten bytes.
    monkeypatch.setattr(taking, name, 10)
    async with world() as (log, _, taker, _):
        assert await taker.take(some(0, 10), hold) == []
        more = asyncio.create_task(taker.take(some(10, 2), hold))
        await turns()

        assert not more.done()
        log.goes_on.set()
        done = await more

        assert done[:2] == some(0, 2)


async def test_records_that_are_published_at_once_are_never_under_way() -> None:
    """In topics without a journal, whatever the bounds are."""
    loop = asyncio.get_running_loop()
    hub = Hub(Config(), loop)
    (entry,) = read_sources({"sources": [TABLE]}, read_access({}, "file f"), "f")
    tenant = Tenant("default-tenant")
    taker = Taker(
        hub, entry.mapping, Progress(entry), lambda: tenant, 1 << 20, asyncio.Event(), loop
    )

    assert await taker.take(some(0, 5), hold) == some(0, 5)
    assert taker.under_way == 0


async def test_records_that_are_forgotten_are_not_told_of_again() -> None:
    """Another process reads them: their answers, and even errors, matter to nobody."""
    complaints: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context["message"]))
    async with world() as (log, _, taker, progress):
        log.faults = [(FULL, False)]
        await taker.take(some(0, 5), hold)
        taker.forget()
        log.goes_on.set()
        await turns()
        gc.collect()

        assert taker.under_way == 0
        assert await taker.take((), hold) == []
        assert progress.taken == 0
    assert complaints == []


class ScriptedReader:
    """A reader that returns, or raises, one thing after the other."""

    status: Status | None = READING

    def __init__(self, *steps: list[Record] | SourceTrouble) -> None:
        self._steps = list(steps)
        self.is_done: list[Record] = []
        self.closes = 0
        # Set when the last step is taken.
        self.has_ended = asyncio.Event()

    async def open(self) -> None:
        """Do nothing."""

    async def read(self) -> list[Record]:
        """Take the next step."""
        if not self._steps:
            self.has_ended.set()
            await asyncio.sleep(0)
            return []
        step = self._steps.pop(0)
        if isinstance(step, SourceTrouble):
            raise step
        return step

    def done(self, records: Sequence[Record]) -> None:
        """Note them."""
        self.is_done += records

    async def hold(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Count it."""
        self.closes += 1


@pytest.mark.parametrize(("state", "known"), [("away", 10), ("standby", 0)])
async def test_trouble_waits_for_what_is_under_way_but_not_beside_another_process(
    state: Literal["away", "standby"], known: int
) -> None:
    """The reader is told of all that is done with before it is closed."""
    async with world() as (log, _, taker, progress):
        reader = ScriptedReader(some(0, 10), SourceTrouble(state, "gone", soon=True))
        stopping = asyncio.Event()
        source = Source(reader, taker, progress, stopping, lambda: None)
        running = asyncio.create_task(source.run())
        await turns()
        assert (reader.closes, reader.is_done) == ((0, []) if known else (1, []))
        log.goes_on.set()
        await until(lambda: reader.closes == 1)

        assert reader.is_done == some(0, known)
        stopping.set()
        await running


async def test_stop_waits_for_what_is_under_way() -> None:
    """So that the position that is kept has all that was published, in several records."""
    async with world() as (log, _, taker, progress):
        reader = ScriptedReader(some(0, 10), some(10, 10))
        stopping = asyncio.Event()
        source = Source(reader, taker, progress, stopping, lambda: None)
        running = asyncio.create_task(source.run())
        await turns()
        stopping.set()
        log.goes_on.set()
        await running

        assert (reader.is_done, reader.closes) == (some(0, 20), 1)
        assert progress.taken == 20
