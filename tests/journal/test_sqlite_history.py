"""Histories of the SQLite engine: a topic's messages by offset, however many topics there are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from journal_log import EPOCH, LogWriter, message
from stored_messages import StoredMessage, page_of

from clevrd.journal.base import Extent
from clevrd.journal.sqlite.engine import SqliteEngine
from clevrd.journal.sqlite.settings import SqliteSettings

PLENTY = 1 << 30


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[SqliteEngine]:
    """Return an engine with an empty journal."""
    made = SqliteEngine(SqliteSettings(str(tmp_path / "journal"), "os"))
    await made.open()
    yield made
    await made.close()


async def fill(engine: SqliteEngine, records: int = 50) -> LogWriter:
    """Append records with three messages to a and two to b."""
    writer = LogWriter(await engine.stamp(0))
    for number in range(records):
        texts = [f"{number}.{index}" for index in range(3)]
        record, placed = writer.record(("a", texts), ("b", texts[:2]))
        await engine.append(0, record, writer.stamp, placed)
    return writer


async def page(
    engine: SqliteEngine, topic: str, after: int, messages: int = 1_000, size_bytes: int = PLENTY
) -> list[StoredMessage]:
    """Return a page of a topic."""
    return await page_of(engine, EPOCH, "default", topic, after, messages, size_bytes)


def text_of(topic: str, offset: int) -> bytes:
    """Return the message that `fill` gave this offset, as a publish object."""
    per_record = {"a": 3, "b": 2}[topic]
    number, index = divmod(offset - 1, per_record)
    return message(topic, f"{number}.{index}").rstrip()


async def test_pages_give_each_message_once_in_order(engine: SqliteEngine) -> None:
    """Page after page, of any size, a topic's history is what was appended to it."""
    await fill(engine)

    for size in (1, 2, 3, 7, 100, 1_000):
        found: list[StoredMessage] = []
        while more := await page(engine, "a", found[-1].offset if found else 0, size):
            assert len(more) <= size
            found += more

        assert [each.offset for each in found] == list(range(1, 151))
        assert [each.line for each in found] == [text_of("a", each.offset) for each in found]
        assert [each.id_us for each in found] == sorted({each.id_us for each in found})


async def test_runs_that_are_not_in_the_table_yet_are_found_like_others(
    engine: SqliteEngine,
) -> None:
    """Each message by itself, and in pages of one: none from before the offset is returned."""
    writer = LogWriter(await engine.stamp(0))
    for number in range(40):
        record, placed = writer.record(("a", [str(number)]))
        await engine.append(0, record, writer.stamp, placed)
        if number == 19:
            await asyncio.to_thread(index_now, engine)

    for after in range(40):
        assert [each.offset for each in await page(engine, "a", after, 1)] == [after + 1]
        assert [each.offset for each in await page(engine, "a", after, size_bytes=1)] == [after + 1]


def index_now(engine: SqliteEngine) -> None:
    """Have the writer put all runs into their table that wait for it."""
    done = threading.Event()

    def index() -> None:
        engine._writer._index()
        done.set()

    engine._writer.do(index)
    assert done.wait(20)


async def test_a_page_has_no_more_bytes_than_asked_for_but_one_message(
    engine: SqliteEngine,
) -> None:
    """A small page holds at least one message, so that a reader always comes on."""
    await fill(engine)
    one_bytes = len(text_of("a", 1))

    assert [each.offset for each in await page(engine, "a", 4, size_bytes=1)] == [5]
    assert [each.offset for each in await page(engine, "a", 4, size_bytes=2 * one_bytes)] == [5, 6]


async def test_extent_is_what_there_is(engine: SqliteEngine) -> None:
    """The oldest and the newest offset; nothing of topics and epochs that never were."""
    await fill(engine)

    assert await engine.extent(EPOCH, "default", "b") == Extent(1, 100)
    assert await engine.extent(EPOCH, "default", "c") is None
    assert await engine.extent(EPOCH, "other", "b") is None
    assert await engine.extent("ffff", "default", "b") is None
    assert await page(engine, "b", 100) == []


async def test_last_before_finds_the_message_below_an_id(engine: SqliteEngine) -> None:
    """Whatever the id, the newest message below it is found: between runs, and inside of one."""
    await fill(engine, 20)
    messages = await page(engine, "a", 0)

    for each in messages:
        assert await engine.last_before(EPOCH, "default", "a", each.id_us + 1) == each.offset
        assert await engine.last_before(EPOCH, "default", "a", each.id_us) == each.offset - 1
    assert await engine.last_before(EPOCH, "default", "a", 0) == 0
    assert await engine.last_before(EPOCH, "default", "a", 2**62) == 60


@pytest.mark.parametrize("records_between", [0, 1_100], ids=["at once", "later"])
async def test_a_record_that_is_sent_again_has_its_messages_once(
    engine: SqliteEngine, records_between: int
) -> None:
    """The log has it twice, and the history once, whether its runs have moved or not."""
    writer = LogWriter(await engine.stamp(0))
    record, placed = writer.record(("a", ["1", "2"]), ("b", ["1"]))
    await engine.append(0, record, writer.stamp, placed)
    others = [writer.one("c", "x") for _ in range(records_between)]
    await asyncio.gather(*(engine.append(0, other, writer.stamp, its) for other, its in others))

    await engine.append(0, record, writer.stamp, placed)

    last, placed = writer.one("a", "3")
    await engine.append(0, last, writer.stamp, placed)
    assert [each.offset for each in await page(engine, "a", 0)] == [1, 2, 3]
    assert await engine.extent(EPOCH, "default", "a") == Extent(1, 3)
    assert await engine.extent(EPOCH, "default", "b") == Extent(1, 1)
    for each in await page(engine, "a", 0):
        assert await engine.last_before(EPOCH, "default", "a", each.id_us + 1) == each.offset


async def test_lines_that_got_no_offset_are_no_part_of_the_history(engine: SqliteEngine) -> None:
    """A repeat of a keyed message stands in the record, and not among the topic's messages."""
    writer = LogWriter(await engine.stamp(0))
    record, (whole,) = writer.record(("a", ["1", "repeat", "2", "3"]))
    common = (whole.tenant, whole.topic, whole.partition_epoch)
    run = (whole.at_bytes, whole.size_bytes)
    first = type(whole)(*common, 1, 1, whole.id_us, 1, whole.time_us, 0, *run, 0)
    rest = type(whole)(*common, 2, 2, whole.id_us + 1, 1, whole.time_us, 2, *run, 2)

    await engine.append(0, record, writer.stamp, [first, rest])

    assert [(each.offset, each.line) for each in await page(engine, "a", 0)] == [
        (1, message("a", "1").rstrip()),
        (2, message("a", "2").rstrip()),
        (3, message("a", "3").rstrip()),
    ]
