"""What each engine of the journal promises to the node, against the real thing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from journal_engines import LOGS, Log
from journal_log import EPOCH, LogWriter, append, read_all

from clevrd.errors import JournalUnavailable
from clevrd.journal.base import Checkpoint, Engine, Fenced, TopicHead
from clevrd.journal.records import digest_of

# The first test with Kafka starts it, which takes a busy machine half a minute.
pytestmark = pytest.mark.timeout(90)


@pytest.fixture(params=sorted(LOGS))
def the_log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    """Give an empty log of each engine."""
    log = LOGS[request.param](tmp_path)
    try:
        yield log
    finally:
        log.close()


@asynccontextmanager
async def opened(log: Log) -> AsyncIterator[Engine]:
    """Have an engine open for a while."""
    engine = log.engine()
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


async def read_until(engine: Engine, last: bytes) -> list[tuple[int, bytes]]:
    """Read from the beginning of the log to the record ``last``."""
    found = await engine.read(0, 0)
    while found[-1][1] != last:
        found += await engine.read(0, found[-1][0])
    return found


async def test_records_are_read_in_the_order_in_which_they_were_accepted(the_log: Log) -> None:
    """Records come back whole, in order, once, with rising positions."""
    async with opened(the_log) as engine:
        writer = LogWriter(await engine.stamp(0))
        records = await append(engine, writer, *map(str, range(50)))

        found = await read_all(engine, 50)

        assert [record for _, record in found] == records
        positions = [position for position, _ in found]
        assert positions == sorted(set(positions))


async def test_appends_at_once_are_all_taken_in_their_order(the_log: Log) -> None:
    """Appends that are begun one after the other, without waiting, keep their order."""
    async with opened(the_log) as engine:
        writer = LogWriter(await engine.stamp(0))
        made = [writer.one("orders", str(number)) for number in range(100)]

        await asyncio.gather(
            *(engine.append(0, record, writer.stamp, placed) for record, placed in made)
        )

        found = await read_all(engine, 100)
        assert [record for _, record in found] == [record for record, _ in made]


async def test_read_waits_for_the_next_record(the_log: Log) -> None:
    """A read behind the last record is answered by the record that comes next."""
    async with opened(the_log) as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "first")
        ((last, _),) = await read_all(engine, 1)
        reading = asyncio.ensure_future(engine.read(0, last))
        await asyncio.sleep(0)
        assert not reading.done()

        records = await append(engine, writer, "second")

        assert [record for _, record in await reading] == records


async def test_reads_from_each_place_see_all_that_is_behind_it(the_log: Log) -> None:
    """The same place can be read again, and any place in the log can be read from."""
    async with opened(the_log) as engine:
        writer = LogWriter(await engine.stamp(0))
        records = await append(engine, writer, *map(str, range(20)))
        found = await read_all(engine, 20)

        for index in (0, 19, 7, 0, 18):
            behind = await read_all(engine, 19 - index, found[index][0]) if index < 19 else []

            assert [record for _, record in behind] == records[index + 1 :]


async def test_a_restart_keeps_records_stamp_and_positions(the_log: Log) -> None:
    """After a planned restart the log is as it was, and goes on."""
    async with opened(the_log) as engine:
        stamp = await engine.stamp(0)
        writer = LogWriter(stamp)
        records = await append(engine, writer, "1", "2", "3")
        before = await read_all(engine, 3)
    async with opened(the_log) as engine:
        assert await engine.stamp(0) == stamp
        assert await read_all(engine, 3) == before

        records += await append(engine, writer, "4")

        found = await read_all(engine, 4)
        assert [record for _, record in found] == records
        assert found[3][0] > found[2][0]


async def test_a_record_with_an_old_stamp_is_fenced(the_log: Log) -> None:
    """Once the log has begun anew nothing that was made for the old one is taken."""
    async with opened(the_log) as engine:
        old = LogWriter(await engine.stamp(0))
        await append(engine, old, "old")
    await the_log.begin_anew()
    async with opened(the_log) as engine:
        stamp = await engine.stamp(0)
        assert stamp != old.stamp

        with pytest.raises(Fenced):
            await append(engine, old, "late")

        new = LogWriter(stamp)
        records = await append(engine, new, "new")
        found = [record for _, record in await read_until(engine, records[0])]
        assert not any(b"late" in record for record in found)


async def test_digest_is_the_records_checksum_or_nothing(the_log: Log) -> None:
    """A node finds out by it whether the record that it counted last is still there."""
    async with opened(the_log) as engine:
        writer = LogWriter(await engine.stamp(0))
        records = await append(engine, writer, "1", "2")
        found = await read_all(engine, 2)

        for (position, _), record in zip(found, records, strict=True):
            assert await engine.digest(0, position) == digest_of(record)
        assert await engine.digest(0, found[-1][0] + 1) is None


async def test_checkpoints_are_kept_over_a_restart(the_log: Log) -> None:
    """The newest checkpoint comes first, with all topics that were ever saved in its epoch."""
    async with opened(the_log) as engine:
        assert await engine.load_checkpoints(0) == []
        await append(engine, LogWriter(await engine.stamp(0)), "1", "2")
        (one, first), (two, second) = await read_all(engine, 2)
        a, b = TopicHead("default", "a", 1), TopicHead("default", "b", 2)
        await engine.save_checkpoint(
            0, Checkpoint(one, digest_of(first), EPOCH, b"one", [a, b], True)
        )
        changed = [TopicHead("default", "b", 3), TopicHead("other", "b", 9)]
        whole = not engine.keeps_topics
        topics = [a, *changed] if whole else changed
        await engine.save_checkpoint(
            0, Checkpoint(two, digest_of(second), EPOCH, b"two", topics, whole)
        )
    async with opened(the_log) as engine:
        newest = (await engine.load_checkpoints(0))[0]

        assert (newest.position, newest.state) == (two, b"two")
        assert newest.digest == await engine.digest(0, two)
        assert newest.partition_epoch == EPOCH
        assert set(newest.topics) == {a, *changed}


async def test_a_whole_checkpoint_replaces_the_topics(the_log: Log) -> None:
    """Topics of an epoch that is over are gone from the next checkpoint."""
    async with opened(the_log) as engine:
        old = [TopicHead("default", "a", 1)]
        await engine.save_checkpoint(0, Checkpoint(1, "00000001", "e1", b"one", old, True))
        new = [TopicHead("default", "b", 1)]
        await engine.save_checkpoint(0, Checkpoint(2, "00000002", "e2", b"two", new, True))

        newest = (await engine.load_checkpoints(0))[0]

        assert newest.topics == new
        assert newest.partition_epoch == "e2"


async def test_first_is_the_oldest_record(the_log: Log) -> None:
    """The oldest position is not above the first record's, and not above the next one's."""
    async with opened(the_log) as engine:
        assert await engine.first(0) >= 0
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1")

        ((position, _),) = await read_all(engine, 1)

        assert await engine.first(0) == position


async def test_a_log_that_was_trimmed_is_read_from_its_oldest_record(the_log: Log) -> None:
    """Old records go; what is left is whole, and the log says where it begins."""
    engine = the_log.engine(keeps_little=True)
    await engine.open()
    writer = LogWriter(await engine.stamp(0))
    records = await append(engine, writer, *[f"{number} ".ljust(1_000) for number in range(100)])
    found = await read_all(engine, 100)
    last, record = found[-1]
    heads = [TopicHead("default", "a", 100)]
    await engine.save_checkpoint(
        0, Checkpoint(last, digest_of(record), EPOCH, b"state", heads, True)
    )
    await the_log.settle(engine)

    first = await engine.first(0)
    assert found[0][0] < first <= last
    left = [(position, record) for position, record in found if position >= first]
    assert await read_all(engine, len(left), first - 1) == left
    assert await engine.digest(0, found[0][0]) is None
    assert await engine.digest(0, last) == digest_of(records[-1])
    await engine.close()


async def test_close_ends_reads_that_wait_and_can_be_called_twice(the_log: Log) -> None:
    """A closed engine answers nothing more, and leaves nobody waiting."""
    engine = the_log.engine()
    await engine.open()
    reading = asyncio.ensure_future(engine.read(0, 0))
    await asyncio.sleep(0)

    await engine.close()
    await engine.close()

    with pytest.raises(JournalUnavailable):
        await reading
    with pytest.raises(JournalUnavailable):
        await engine.append(0, b"", "", ())


async def test_an_append_that_nobody_waits_for_any_more_is_taken_all_the_same(
    the_log: Log,
) -> None:
    """A cancelled append may have been accepted, and disturbs no other."""
    async with opened(the_log) as engine:
        writer = LogWriter(await engine.stamp(0))
        record, placed = writer.one("orders", "cancelled")
        task = asyncio.ensure_future(engine.append(0, record, writer.stamp, placed))
        await asyncio.sleep(0)

        task.cancel()
        records = await append(engine, writer, "next")

        await read_until(engine, records[0])
