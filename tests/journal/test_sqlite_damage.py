"""Bits that flip in a SQLite journal: found, left out, reported, and never served."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import apsw
import pytest
from journal_log import EPOCH, LogWriter, append, checkpoint_of, read_all
from stored_messages import StoredMessage, page_of

from clevrd.journal.base import Fenced
from clevrd.journal.sqlite.directory import segment_name
from clevrd.journal.sqlite.engine import SqliteEngine
from clevrd.journal.sqlite.settings import SqliteSettings

# Files are changed while no journal is open.
pytestmark = pytest.mark.holds_loop("it changes files, which may wait for the disk")

RECORDS = 60
FIRST_FILE = "segment-0000000001.db"


@asynccontextmanager
async def opened(directory: Path, **settings: int) -> AsyncIterator[SqliteEngine]:
    """Have a journal open for a while."""
    engine = SqliteEngine(SqliteSettings(str(directory), "os", **settings))
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture
async def journal(tmp_path: Path) -> Path:
    """Return a closed journal: two topics in several files, and a checkpoint behind the last."""
    directory = tmp_path / "journal"
    async with opened(directory, segment_bytes=1 << 16) as engine:
        writer = LogWriter(await engine.stamp(0))
        for number in range(RECORDS):
            text = f"{number:03d}" + "x" * 4_000
            record, placed = writer.record(("a", [text, text]), ("b", [text]))
            await engine.append(0, record, writer.stamp, placed)
        found = await read_all(engine, RECORDS)
        await engine.save_checkpoint(0, checkpoint_of(found, writer))
    assert len(list(directory.glob("segment-*.db"))) > 2
    return directory


async def history(engine: SqliteEngine, topic: str) -> list[StoredMessage]:
    """Return all messages of a topic that can be read."""
    found: list[StoredMessage] = []
    while page := await page_of(
        engine, EPOCH, "default", topic, found[-1].offset if found else 0, 7, 1 << 30
    ):
        found += page
    return found


def flip(path: Path, at: int, bit: int = 1) -> None:
    """Flip a bit in a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def change(path: Path, statement: str) -> None:
    """Change a file's content as a broken program might."""
    connection = apsw.Connection(str(path))
    connection.execute(statement)
    connection.close()


async def test_a_flipped_bit_in_a_message_leaves_its_run_out(
    journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other topic of the record and all other messages are served; there is one line of log."""
    path = journal / FIRST_FILE
    flip(path, path.read_bytes().index(b"002xxxx"))

    async with opened(journal) as engine:
        stamp = await engine.stamp(0)
        for _ in range(2):
            offsets = [each.offset for each in await history(engine, "a")]
            assert offsets == [each for each in range(1, 2 * RECORDS + 1) if each not in (5, 6)]
            assert len(await history(engine, "b")) == RECORDS
        found = [each for each in await history(engine, "a") if b"002x" in each.line]
        assert found == []
        assert engine.figures.damaged >= 2
        assert len([each for each in caplog.records if each.levelno == logging.ERROR]) == 1
        # History that can't be read is no reason to begin anew.
        assert await engine.stamp(0) == stamp


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE runs SET count = count + 1 WHERE first = 5",
        "UPDATE runs SET id_us = id_us + 1 WHERE first = 5",
        "UPDATE runs SET position = position + 1 WHERE first = 5 AND count = 2",
        "UPDATE runs SET at_bytes = at_bytes - 1 WHERE first = 5 AND count = 2",
        "UPDATE runs SET crc = crc + 1 WHERE first = 5 AND count = 2",
        "UPDATE records SET time_us = time_us + 1 WHERE position = 3",
        "DELETE FROM records WHERE position = 3",
    ],
)
async def test_a_row_that_was_changed_is_not_believed(journal: Path, statement: str) -> None:
    """Whatever part of a run's row is wrong, its messages are left out and no other ones."""
    change(journal / FIRST_FILE, statement)

    async with opened(journal) as engine:
        offsets = [each.offset for each in await history(engine, "a")]

        assert offsets == [each for each in range(1, 2 * RECORDS + 1) if each not in (5, 6)]
        assert engine.figures.damaged
        ids = [each.id_us for each in await history(engine, "a")]
        assert ids == sorted(ids)


async def test_a_topic_with_anothers_name_is_not_served_as_the_other(journal: Path) -> None:
    """A run belongs to its topic by its checksum."""
    change(journal / FIRST_FILE, "UPDATE topics SET id = 3 - id")

    async with opened(journal) as engine:
        for topic in "ab":
            for each in await history(engine, topic):
                assert each.line.startswith(b'{"topic":"%b"' % topic.encode())


async def test_a_damaged_page_costs_what_it_held(journal: Path) -> None:
    """Files that SQLite finds damaged stay, and what can be read of them is served."""
    path = journal / FIRST_FILE
    content = bytearray(path.read_bytes())
    page = content.index(b"002xxxx") // 4096
    content[page * 4096 : page * 4096 + 4096] = bytes(4096)
    path.write_bytes(content)

    async with opened(journal) as engine:
        stamp = await engine.stamp(0)
        found = await history(engine, "a")

        whole = set(range(1, 2 * RECORDS + 1))
        assert {each.offset for each in found} < whole
        assert {each.offset for each in found} > set(range(50, 2 * RECORDS + 1))
        assert engine.figures.damaged
        assert await engine.stamp(0) == stamp


async def test_a_file_that_is_none_of_sqlites_is_set_aside(
    journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One old file less is no reason not to start, nor to begin anew."""
    async with opened(journal) as engine:
        stamp = await engine.stamp(0)
    path = journal / FIRST_FILE
    path.write_bytes(b"hello" * 1_000)

    async with opened(journal) as engine:
        assert await engine.stamp(0) == stamp
        assert not path.exists()
        assert path.with_name(FIRST_FILE + ".damaged").exists()
        assert engine.figures.damaged == 1
        found = await history(engine, "a")
        assert found[-1].offset == 2 * RECORDS
        extent = await engine.extent(EPOCH, "default", "a")
        assert extent is not None
        assert extent.first == found[0].offset > 1
    assert any("set aside" in each.message for each in caplog.records)


@pytest.mark.parametrize("how", ["overwritten", "a record changed", "its description changed"])
async def test_a_damaged_newest_file_makes_the_log_begin_anew(journal: Path, how: str) -> None:
    """What was acknowledged may be missing in it."""
    async with opened(journal) as engine:
        stamp = await engine.stamp(0)
        # The newest file may have no record yet.
        writer = LogWriter(stamp)
        writer.heads["a"] = 2 * RECORDS
        await append(engine, writer, "newest")
    newest = journal / segment_name(engine._catalog.segments[-1].number)
    if how == "overwritten":
        newest.write_bytes(b"hello" * 1_000)
    elif how == "a record changed":
        change(
            newest,
            "UPDATE records SET time_us = 1 WHERE position = (SELECT max(position) FROM records)",
        )
    else:
        change(newest, "UPDATE info SET text = replace(text, '\"number\"', '\"numper\"')")

    async with opened(journal) as engine:
        assert await engine.stamp(0) != stamp
        new = LogWriter(await engine.stamp(0), "ffff")
        await append(engine, new, "1")
        assert [
            each.offset for each in await page_of(engine, "ffff", "default", "a", 0, 9, 99)
        ] == [1]
        assert len(await history(engine, "a")) > RECORDS


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE heads SET head = head - 1 WHERE topic = 'a'",
        "DELETE FROM heads WHERE topic = 'a'",
        "UPDATE heads SET topic = 'c' WHERE topic = 'a'",
        "UPDATE checkpoint SET position = position - 1",
        "UPDATE checkpoint SET state = x'00'",
    ],
)
async def test_a_damaged_checkpoint_is_not_believed(journal: Path, statement: str) -> None:
    """With all records there the log is read from its beginning; no head is taken for granted."""
    change(journal / "checkpoint.db", statement)

    async with opened(journal) as engine:
        assert await engine.load_checkpoints(0) == []
        assert len(await read_all(engine, RECORDS)) == RECORDS


async def test_without_checkpoint_and_without_old_records_the_log_begins_anew(
    journal: Path,
) -> None:
    """Heads of topics that are in no file any more can't be known."""
    async with opened(journal) as engine:
        stamp = await engine.stamp(0)
    (journal / FIRST_FILE).unlink()
    (journal / "checkpoint.db").write_bytes(b"hello" * 1_000)

    async with opened(journal) as engine:
        assert await engine.stamp(0) != stamp
        assert await engine.load_checkpoints(0) == []


@pytest.mark.parametrize("is_gone", [False, True], ids=["flipped", "gone"])
async def test_a_record_that_the_fold_misses_makes_the_log_begin_anew(
    journal: Path, is_gone: bool
) -> None:
    """A node that can't read a record behind its checkpoint would count differently."""
    (journal / "checkpoint.db").unlink()
    path = journal / FIRST_FILE
    if is_gone:
        change(path, "DELETE FROM records WHERE position = 3")
    else:
        flip(path, path.read_bytes().index(b"002xxxx"))

    async with opened(journal) as engine:
        stamp = await engine.stamp(0)
        found = await read_all(engine, RECORDS - 1)
        assert [position for position, _ in found] == [1, 2, *range(4, RECORDS + 1)]
        assert not any(b"002x" in record for _, record in found)

        # The writer begins anew between two appends.
        with pytest.raises(Fenced):
            await append(engine, LogWriter("00"), "fenced")
        assert await engine.stamp(0) != stamp
        await append(engine, LogWriter(await engine.stamp(0), "ffff"), "begins anew")
        assert engine.figures.new_stamps == 1


async def test_first_start_that_was_killed_is_begun_again(tmp_path: Path) -> None:
    """The file of checkpoints is made first; alone it is no journal of others."""
    directory = tmp_path / "journal"
    async with opened(directory) as engine:
        await engine.stamp(0)
    for file in directory.iterdir():
        if file.name == "meta" or file.name.startswith("segment-"):
            file.unlink()
    assert (directory / "checkpoint.db").exists()

    async with opened(directory) as engine:
        writer = LogWriter(await engine.stamp(0))
        (record,) = await append(engine, writer, "1")
        ((_, found),) = await read_all(engine, 1)

    assert found == record
