"""What the SQLite engine removes, and that a topic's head outlives its messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from journal_log import BEGAN_US, EPOCH, LogWriter, append, read_all
from stored_messages import page_of

from clevrd.journal.base import Checkpoint, Extent, TopicHead
from clevrd.journal.sqlite.engine import SqliteEngine
from clevrd.journal.sqlite.settings import SqliteSettings

HOUR_US = 3_600_000_000


class Clock:
    """A wall clock that is set by hand, in microseconds since 1970."""

    def __init__(self) -> None:
        self.now_us = BEGAN_US

    def __call__(self) -> int:
        return self.now_us


@asynccontextmanager
async def opened(
    tmp_path: Path, clock: Clock, **settings: float
) -> AsyncIterator[tuple[SqliteEngine, LogWriter]]:
    """Have a journal open for a while, with a writer that goes on where the topics are."""
    given = SqliteSettings(str(tmp_path / "journal"), "os", **settings)  # type: ignore[arg-type]  # numbers
    engine = SqliteEngine(given, wall_us=clock)
    await engine.open()
    writer = LogWriter(await engine.stamp(0))
    for topic in ("a", "b"):
        extent = await engine.extent(EPOCH, "default", topic)
        writer.heads[topic] = extent.head if extent else 0
        for each in await page_of(engine, EPOCH, "default", topic, 0, 1_000, 1 << 30):
            writer.last_id_us = max(writer.last_id_us, each.id_us)
    try:
        yield engine, writer
    finally:
        await engine.close()


async def an_hour(engine: SqliteEngine, writer: LogWriter, clock: Clock, *topics: str) -> None:
    """Append a message to each topic, and let an hour pass; a file is begun for the next one."""
    for topic in topics:
        record, placed = writer.one(topic, "x" * 1_000)
        placed = [msgspec.structs.replace(each, time_us=clock.now_us) for each in placed]
        await engine.append(0, record, writer.stamp, placed)
    clock.now_us += HOUR_US
    # The writer looks at the clock behind everything that it does.
    await written(engine)
    await written(engine)


async def written(engine: SqliteEngine) -> None:
    """Wait until the writer has done what it was given."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell() -> None:
        loop.call_soon_threadsafe(done.set)

    engine._writer.do(tell)
    await done.wait()


async def save(engine: SqliteEngine, writer: LogWriter) -> None:
    """Save a checkpoint behind the last record, and wait until old files were looked through."""
    last = engine._catalog.segments[-1].last_position
    digest = await engine.digest(0, last)
    assert digest is not None
    heads = [TopicHead("default", topic, head) for topic, head in writer.heads.items()]
    await engine.save_checkpoint(0, Checkpoint(last, digest, EPOCH, b"", heads, True))
    await engine._keep(lambda: None)


def files(engine: SqliteEngine) -> list[int]:
    """Return the numbers of the segments' files."""
    return engine._directory.segment_numbers()


async def test_files_are_begun_with_time_and_with_size(tmp_path: Path) -> None:
    """A file ends after an hour, or when it is large; nothing of it is lost."""
    clock = Clock()
    async with opened(tmp_path, clock, segment_bytes=100_000) as (engine, writer):
        await an_hour(engine, writer, clock, "a")
        assert files(engine) == [1, 2]
        # A file without records does not end.
        await an_hour(engine, writer, clock)
        assert files(engine) == [1, 2]
        await append(engine, writer, *["x" * 20_000] * 6)
        await written(engine)
        assert len(files(engine)) > 2

        assert len(await read_all(engine, 7)) == 7
        page = await page_of(engine, EPOCH, "default", "a", 0, 100, 1 << 30)
        assert [each.offset for each in page] == list(range(1, 8))


async def test_what_is_too_old_goes_and_its_topics_heads_stay(tmp_path: Path) -> None:
    """Offsets of a topic whose messages are all gone are not given again, even after a restart."""
    clock = Clock()
    async with opened(tmp_path, clock, retention_s=7_200.0) as (engine, writer):
        for topics in (["a", "b"], ["a"], ["a"], ["a"]):
            await an_hour(engine, writer, clock, *topics)
        assert files(engine) == [1, 2, 3, 4, 5]

        await save(engine, writer)

        assert files(engine) == [3, 4, 5]
        assert await engine.first(0) == 4
        assert engine.figures.removed_segments == 2
        assert engine.figures.segments == 3
        assert await engine.extent(EPOCH, "default", "a") == Extent(3, 4)
        assert await engine.extent(EPOCH, "default", "b") == Extent(2, 1)
        assert await page_of(engine, EPOCH, "default", "b", 0, 10, 1 << 30) == []
        stamp = await engine.stamp(0)
    async with opened(tmp_path, clock, retention_s=7_200.0) as (engine, writer):
        assert await engine.stamp(0) == stamp
        assert await engine.extent(EPOCH, "default", "b") == Extent(2, 1)
        page = await page_of(engine, EPOCH, "default", "a", 0, 10, 1 << 30)
        assert [each.offset for each in page] == [3, 4]


async def test_nothing_goes_that_the_checkpoint_does_not_cover(tmp_path: Path) -> None:
    """Heads of topics would be lost with their records."""
    clock = Clock()
    async with opened(tmp_path, clock, retention_s=1.0) as (engine, writer):
        await an_hour(engine, writer, clock, "a")
        await save(engine, writer)
        await an_hour(engine, writer, clock, "b")
        await an_hour(engine, writer, clock, "b")
        await engine._keep(engine._upkeep.look_over)

        assert files(engine) == [2, 3, 4]
        await save(engine, writer)
        assert files(engine) == [4]


async def test_a_log_whose_records_are_all_too_old_goes_on(tmp_path: Path) -> None:
    """The checkpoint's record is gone, and its digest is still known."""
    clock = Clock()
    async with opened(tmp_path, clock, retention_s=1.0) as (engine, writer):
        await an_hour(engine, writer, clock, "a", "b")
        clock.now_us += HOUR_US
        await save(engine, writer)
        assert files(engine) == [2]
        stamp = await engine.stamp(0)
    async with opened(tmp_path, clock, retention_s=1.0) as (engine, writer):
        assert await engine.stamp(0) == stamp
        (checkpoint,) = await engine.load_checkpoints(0)
        assert await engine.digest(0, checkpoint.position) == checkpoint.digest
        await append(engine, writer, "goes on")
        assert (await read_all(engine, 1, checkpoint.position))[0][0] == 3
        assert await engine.extent(EPOCH, "default", "a") == Extent(2, 2)


async def test_too_many_bytes_go_the_oldest_first(tmp_path: Path) -> None:
    """All files together have no more than they may, but for the newest one."""
    clock = Clock()
    async with opened(tmp_path, clock, retention_bytes=100_000) as (engine, writer):
        for _ in range(6):
            await append(engine, writer, "x" * 20_000)
            await an_hour(engine, writer, clock, "a")

        await save(engine, writer)

        assert engine.figures.size_bytes <= 100_000
        assert 1 < len(files(engine)) < 7
        assert files(engine)[-1] == 7
        assert engine.figures.oldest_us > BEGAN_US


async def test_histories_reach_no_further_back_than_so_many_messages(tmp_path: Path) -> None:
    """Older messages are in the files, and are not read."""
    clock = Clock()
    async with opened(tmp_path, clock, retention_messages=3) as (engine, writer):
        await append(engine, writer, *map(str, range(10)))
        await append(engine, writer, "one", topic="b")

        assert await engine.extent(EPOCH, "default", "a") == Extent(8, 10)
        page = await page_of(engine, EPOCH, "default", "a", 0, 100, 1 << 30)
        assert [each.offset for each in page] == [8, 9, 10]
        assert await engine.last_before(EPOCH, "default", "a", page[0].id_us) == 0
        assert await engine.last_before(EPOCH, "default", "a", page[1].id_us) == 8
        assert await engine.extent(EPOCH, "default", "b") == Extent(1, 1)


async def test_a_history_goes_over_many_files(tmp_path: Path) -> None:
    """Pages, extents and times are found whatever files have the topic, also after a restart."""
    clock = Clock()
    for restart in range(2):
        async with opened(tmp_path, clock) as (engine, writer):
            for number in range(6):
                await an_hour(engine, writer, clock, *(["a", "b"] if number % 3 == 0 else ["a"]))
            count = 6 * (restart + 1)

            assert await engine.extent(EPOCH, "default", "a") == Extent(1, count)
            assert await engine.extent(EPOCH, "default", "b") == Extent(1, count // 3)
            for topic, there in (("a", count), ("b", count // 3)):
                page = await page_of(engine, EPOCH, "default", topic, 0, 100, 1 << 30)
                assert [each.offset for each in page] == list(range(1, there + 1))
                for after in range(there):
                    (one,) = await page_of(engine, EPOCH, "default", topic, after, 1, 1 << 30)
                    assert one == page[after]
                for each in page:
                    before = await engine.last_before(EPOCH, "default", topic, each.id_us + 1)
                    assert before == each.offset
            assert len(await read_all(engine, count + count // 3)) == count + count // 3


async def test_figures_are_there_when_the_journal_is_open(tmp_path: Path) -> None:
    """They are measured before anybody can ask, and not only when the files are looked over."""
    clock = Clock()
    async with opened(tmp_path, clock) as (engine, writer):
        assert engine.storage().size_bytes
        await an_hour(engine, writer, clock, "a")
    engine = SqliteEngine(SqliteSettings(str(tmp_path / "journal"), "os"), wall_us=clock)
    engine._upkeep.look_over = lambda: None  # type: ignore[method-assign]  # it is too late for this
    await engine.open()

    found = engine.storage()
    await engine.close()

    assert found.size_bytes
    assert found.files == 2
    assert found.oldest_at_s == BEGAN_US / 1e6
