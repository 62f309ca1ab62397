"""The SQLite engine on a disk that is full, or that fails; and journals that can't be opened."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from faulty_disk import FaultyDisk
from journal_log import LogWriter, append, read_all
from stored_messages import page_of

from clevrd.errors import JournalFull, JournalUnavailable
from clevrd.journal.base import Fenced
from clevrd.journal.sqlite.directory import FORMAT, JournalDirectory, Meta
from clevrd.journal.sqlite.engine import SqliteEngine
from clevrd.journal.sqlite.settings import SqliteSettings


@asynccontextmanager
async def opened(
    directory: Path,
    disk: FaultyDisk | None = None,
    durability: str = "fsync",
    segment_bytes: int = 1 << 30,
) -> AsyncIterator[SqliteEngine]:
    """Have a journal open for a while."""
    settings = SqliteSettings(str(directory), durability, segment_bytes=segment_bytes)
    engine = SqliteEngine(settings, vfs=None if disk is None else disk.name)
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


async def refusal_of(directory: Path) -> str:
    """Return the sentence with which a journal is refused."""
    engine = SqliteEngine(SqliteSettings(str(directory)))
    with pytest.raises(JournalUnavailable) as refused:
        await engine.open()
    sentence = str(refused.value)
    assert "\n" not in sentence
    return sentence


# --- files that are removed while they are open ---------------------------------------------------


def remove(directory: Path, what: str) -> None:
    """Remove files of a journal as somebody might by hand."""
    newest = max(directory.glob("segment-*.db"))
    if what in ("segment", "WAL"):
        Path(f"{newest}{'-wal' if what == 'WAL' else ''}").unlink()
    elif what == "all files":
        for path in directory.iterdir():
            path.unlink()
    elif what == "replaced":
        copy = directory / "copy"
        shutil.copy(newest, copy)
        copy.replace(newest)
    else:
        shutil.rmtree(directory)


async def looked_over(engine: SqliteEngine) -> None:
    """Wait until the files were looked over, and the writer has done what follows from it."""
    await engine._keep(engine._upkeep.look_over)
    with suppress(JournalUnavailable):
        await engine.stamp(0)
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell() -> None:
        loop.call_soon_threadsafe(done.set)

    engine._writer.do(tell)
    await done.wait()


@pytest.mark.parametrize("what", ["segment", "WAL", "replaced", "all files"])
async def test_a_file_that_is_gone_while_it_is_open_takes_no_more_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """The log begins anew in another file, that a later start finds; one line of log says why."""
    journal = tmp_path / "journal"
    async with opened(journal) as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1", "2")
        await looked_over(engine)
        assert await engine.stamp(0) == writer.stamp
        remove(journal, what)
        caplog.clear()

        await looked_over(engine)
        assert engine.is_unsure
        assert engine.storage().last_error.startswith(str(journal))
        with pytest.raises(Fenced):
            await append(engine, writer, "of the old stamp")
        stamp = await engine.stamp(0)
        kept = await append(engine, LogWriter(stamp, "ffff"), "3")
        await looked_over(engine)

        assert not engine.is_unsure
        assert await engine.stamp(0) == stamp
        assert [each for each in caplog.messages if "was removed or replaced" in each] == [
            each for each in caplog.messages if "begins anew" in each
        ]
        assert len([each for each in caplog.messages if "begins anew" in each]) == 1
        # What stood in the file is no error that goes on for ever.
        assert await engine.digest(0, 2) is None or what == "WAL"
        assert len(await page_of(engine, "ffff", "default", "a", 0, 10, 99)) == 1
        # Another process can't have the directory, though the locked file may be gone.
        assert "another clevrd's" in await refusal_of(journal)
    async with opened(journal) as engine:
        assert (await read_all(engine, 1))[-1] == (3, kept[-1])


async def test_without_its_directory_a_journal_takes_nothing_until_it_is_back(
    tmp_path: Path,
) -> None:
    """Appends are refused while it is gone; a number of a file is not given a second time."""
    journal = tmp_path / "journal"
    async with opened(journal) as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1")
        remove(journal, "directory")
        await looked_over(engine)

        with pytest.raises(JournalUnavailable):
            await append(engine, writer, "2")
        with pytest.raises(JournalUnavailable):
            await engine.stamp(0)
        assert engine.is_unsure
        assert engine.storage().last_error

        journal.mkdir(mode=0o700)
        await append(engine, LogWriter(await engine.stamp(0), "ffff"), "2")
        assert [each.name for each in journal.glob("segment-*.db")] == ["segment-0000000002.db"]
    async with opened(journal) as engine:
        assert len(await page_of(engine, "ffff", "default", "a", 0, 10, 99)) == 1


async def test_a_history_that_can_not_be_read_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many reads that fail within a minute one is logged; the figures have the reason."""
    journal = tmp_path / "journal"
    async with opened(journal, segment_bytes=1 << 16) as engine:
        monkeypatch.setattr(engine._upkeep, "_forget_gone", lambda: None)
        writer = LogWriter(await engine.stamp(0))
        for _ in range(40):
            await append(engine, writer, "x" * 4_000)
        await looked_over(engine)
        (journal / "segment-0000000001.db").unlink()
        engine._segment_readers.forget(engine._catalog.segments[0])

        for _ in range(3):
            with pytest.raises(JournalUnavailable):
                await page_of(engine, writer.epoch, "default", "a", 0, 10, 1 << 20)

        assert len([each for each in caplog.messages if "can't be read" in each]) == 1
        assert "can't be read" in engine.storage().last_error
        # Appends go on, so none is needed to find out.
        assert not engine.is_unsure
        assert await page_of(engine, writer.epoch, "default", "a", 38, 10, 1 << 20)
        assert engine.storage().last_error == ""

        monkeypatch.undo()
        await engine._keep(engine._upkeep.look_over)
        kept = await page_of(engine, writer.epoch, "default", "a", 0, 10, 1 << 20)
        extent = await engine.extent(writer.epoch, "default", "a")

        # It is found to be gone, and its messages are a gap from then on.
        assert extent is not None
        assert kept[0].offset == extent.first > 1
        assert extent.head == 40
        assert len([each for each in caplog.messages if "is gone" in each]) == 1


async def test_old_files_are_not_forgotten_with_the_whole_directory(tmp_path: Path) -> None:
    """A disk that is away for a while, as in a remount, leaves no gap behind."""
    journal = tmp_path / "journal"
    async with opened(journal, segment_bytes=1 << 16) as engine:
        writer = LogWriter(await engine.stamp(0))
        for _ in range(40):
            await append(engine, writer, "x" * 4_000)
        await looked_over(engine)
        journal.rename(tmp_path / "away")

        engine._upkeep._forget_gone()

        (tmp_path / "away").rename(journal)
        page = await page_of(engine, writer.epoch, "default", "a", 0, 10, 1 << 20)
        assert page[0].offset == 1


# --- flushes that fail ---------------------------------------------------------------------------


async def test_after_a_failed_flush_nothing_is_acknowledged_from_that_file(tmp_path: Path) -> None:
    """The log begins anew in another file, under another stamp; what was acknowledged is there."""
    disk = FaultyDisk()
    async with opened(tmp_path / "journal", disk) as engine:
        writer = LogWriter(await engine.stamp(0))
        kept = await append(engine, writer, "1", "2")
        disk.failing_flushes = 1

        with pytest.raises(JournalUnavailable):
            await append(engine, writer, "lost")
        with pytest.raises(Fenced):
            await append(engine, writer, "of the old stamp")

        stamp = await engine.stamp(0)
        assert stamp != writer.stamp
        kept += await append(engine, LogWriter(stamp, "ffff"), "3")
        found = await read_all(engine, 3)
        assert [record for _, record in found] == kept
        assert [position for position, _ in found] == [1, 2, 3]
        assert len(list((tmp_path / "journal").glob("segment-*.db"))) == 2
    async with opened(tmp_path / "journal") as engine:
        assert await engine.stamp(0) == stamp
        # Records before the stamp count for nothing any more.
        assert (await read_all(engine, 1))[-1][1] == kept[-1]


async def test_a_record_of_a_failed_commit_never_comes_back(tmp_path: Path) -> None:
    """It may be in the old file; its place in the log is another record's."""
    disk = FaultyDisk()
    async with opened(tmp_path / "journal", disk) as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1")
        disk.failing_flushes = 1
        with pytest.raises(JournalUnavailable):
            await append(engine, writer, "lost")
        await append(engine, LogWriter(await engine.stamp(0), "ffff"), "2")
    async with opened(tmp_path / "journal") as engine:
        page = await page_of(engine, writer.epoch, "default", "a", 0, 10, 1 << 20)

        assert [each.offset for each in page] == [1]
        assert [
            each.offset for each in await page_of(engine, "ffff", "default", "a", 0, 10, 99)
        ] == [1]


async def test_a_disk_that_goes_on_failing_is_asked_again(tmp_path: Path) -> None:
    """While no file can be made appends are refused; when one can, the log begins anew."""
    disk = FaultyDisk()
    async with opened(tmp_path / "journal", disk) as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1")
        disk.failing_flushes = 3

        with pytest.raises(JournalUnavailable):
            await append(engine, writer, "2")
        with pytest.raises(JournalUnavailable):
            await engine.stamp(0)
        assert engine.figures.last_error

        disk.failing_flushes = 0
        stamp = await engine.stamp(0)
        assert stamp != writer.stamp
        await append(engine, LogWriter(stamp), "3")
        assert engine.figures.last_error == ""
        assert engine.figures.new_stamps == 2


async def test_a_new_file_that_can_not_be_opened_is_left(tmp_path: Path) -> None:
    """The log begins anew in the next one, and goes on."""
    disk = FaultyDisk()
    async with opened(tmp_path / "journal", disk, segment_bytes=1) as engine:
        writer = LogWriter(await engine.stamp(0))
        disk.failing_opens = 1

        kept = await append(engine, writer, "1")
        with pytest.raises(Fenced):
            await append(engine, writer, "2")

        stamp = await engine.stamp(0)
        assert stamp != writer.stamp
        kept += await append(engine, LogWriter(stamp, "ffff"), "2", "3")
        assert [record for _, record in await read_all(engine, 3)] == kept
    async with opened(tmp_path / "journal") as engine:
        assert await engine.stamp(0) == stamp


# --- full disks ----------------------------------------------------------------------------------


async def test_a_full_disk_takes_nothing_and_goes_on_by_itself(tmp_path: Path) -> None:
    """Without room a record is refused whole; with room again the log goes on where it was."""
    disk = FaultyDisk()
    async with opened(tmp_path / "journal", disk) as engine:
        writer = LogWriter(await engine.stamp(0))
        kept = await append(engine, writer, "1")
        disk.is_full = True

        for topic in ("a", "new"):
            record, placed = LogWriter(writer.stamp).one(topic, "refused")
            with pytest.raises(JournalFull):
                await engine.append(0, record, writer.stamp, placed)
        assert engine.figures.is_full
        assert engine.figures.full == 2

        disk.is_full = False
        kept += await append(engine, writer, "2")
        kept += await append(engine, writer, "3", topic="new")
        assert not engine.figures.is_full
        assert await engine.stamp(0) == writer.stamp
        found = await read_all(engine, 3)
        assert found == list(enumerate(kept, 1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "none", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_small_file_system_fills_and_empties(small_disk: Path) -> None:
    """On a real file system without room nothing is lost, and nothing is taken by halves."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2 << 20))
    async with opened(small_disk / "journal") as engine:
        writer = LogWriter(await engine.stamp(0))
        kept: list[bytes] = []
        text = "x" * 5_000
        while not engine.figures.is_full:
            record, placed = writer.one("a", text)
            try:
                await engine.append(0, record, writer.stamp, placed)
                kept.append(record)
            except JournalFull:
                writer.heads["a"] -= 1
                break
        assert kept

        ballast.unlink()
        kept += await append(engine, writer, "more", "and more")
        found = await read_all(engine, len(kept))
        assert [record for _, record in found] == kept
        assert await engine.stamp(0) == writer.stamp
    async with opened(small_disk / "journal") as engine:
        assert await engine.stamp(0) == writer.stamp
        assert [record for _, record in await read_all(engine, len(kept))] == kept
        page = await page_of(engine, writer.epoch, "default", "a", 0, 10_000, 1 << 30)
        assert [each.offset for each in page] == list(range(1, len(kept) + 1))


# --- journals that are not opened, or begin anew -------------------------------------------------


async def test_a_second_daemon_is_refused(tmp_path: Path) -> None:
    """One journal is one daemon's, and the other one is told whose it is."""
    async with opened(tmp_path / "journal") as engine:
        sentence = await refusal_of(tmp_path / "journal")

        assert f"process {os.getpid()}" in sentence
        await append(engine, LogWriter(await engine.stamp(0)), "undisturbed")


async def test_a_closed_journal_has_no_other_files(tmp_path: Path) -> None:
    """After a planned stop each segment is one file, which can be copied by any means."""
    async with opened(tmp_path / "journal") as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1", "2")
        assert len(await page_of(engine, writer.epoch, "default", "a", 0, 10, 1 << 20)) == 2

    assert {path.name for path in (tmp_path / "journal").iterdir()} == {
        "lock",
        "meta",
        "checkpoint.db",
        "segment-0000000001.db",
    }


async def test_files_are_private(tmp_path: Path) -> None:
    """Only the daemon's user can read what is published."""
    async with opened(tmp_path / "journal"):
        assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o700
        for path in (tmp_path / "journal").iterdir():
            assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("case", ["a file", "no parent", "other files", "writable by others"])
async def test_what_is_no_place_for_a_journal_is_refused(tmp_path: Path, case: str) -> None:
    """Each mistake has a sentence that says what to do, and nothing is changed."""
    place = tmp_path / "place"
    if case == "a file":
        place.write_text("hello")
    elif case == "no parent":
        place = place / "below"
    else:
        place.mkdir(mode=0o700)
        if case == "other files":
            (place / "thesis.txt").write_text("hello")
        else:
            place.chmod(0o777)

    sentence = await refusal_of(place)

    assert {
        "a file": "name a directory",
        "no parent": "create the directory",
        "other files": "'thesis.txt'",
        "writable by others": "chmod 700",
    }[case] in sentence
    assert not (tmp_path / "place" / "lock").exists()


async def test_a_journal_of_a_later_version_is_refused(tmp_path: Path) -> None:
    """What a later clevrd wrote is left as it is."""
    async with opened(tmp_path / "journal"):
        pass
    directory = JournalDirectory(str(tmp_path / "journal"))
    directory.write_meta(Meta(FORMAT + 1, "00", "", True))

    assert "a later clevrd" in await refusal_of(tmp_path / "journal")


async def test_a_copied_journal_begins_anew(tmp_path: Path) -> None:
    """A copy has what the journal had, and gives no offset that the journal could give too."""
    async with opened(tmp_path / "journal") as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1", "2")
    shutil.copytree(tmp_path / "journal", tmp_path / "copy")

    async with opened(tmp_path / "copy") as engine:
        assert await engine.stamp(0) != writer.stamp
        page = await page_of(engine, writer.epoch, "default", "a", 0, 10, 1 << 20)
        assert [each.offset for each in page] == [1, 2]
        stamp = await engine.stamp(0)
    async with opened(tmp_path / "copy") as engine:
        assert await engine.stamp(0) == stamp
    async with opened(tmp_path / "journal") as engine:
        assert await engine.stamp(0) == writer.stamp


@pytest.mark.parametrize("lost", ["meta", "segment-0000000001.db", "checkpoint.db"])
async def test_a_journal_that_lost_a_file_goes_on_only_if_nothing_is_missing(
    tmp_path: Path, lost: str
) -> None:
    """Without its checkpoint the log can be read again from the beginning; without others not."""
    async with opened(tmp_path / "journal") as engine:
        writer = LogWriter(await engine.stamp(0))
        records = await append(engine, writer, "1", "2")
    (tmp_path / "journal" / lost).unlink()

    async with opened(tmp_path / "journal") as engine:
        if lost == "checkpoint.db":
            assert await engine.stamp(0) == writer.stamp
            assert [record for _, record in await read_all(engine, 2)] == records
        else:
            assert await engine.stamp(0) != writer.stamp
            new = LogWriter(await engine.stamp(0), "ffff")
            await append(engine, new, "3")
            assert (await read_all(engine, 1))[-1][0] == 3


@pytest.mark.parametrize(
    ("boot_id", "durability", "is_clean", "goes_on"),
    [
        ("another", "os", False, False),
        ("another", "os", True, True),
        ("another", "fsync", False, True),
        (None, "os", False, True),
    ],
    ids=["reboot", "reboot after a stop", "reboot with fsync", "kill"],
)
async def test_what_the_kernel_had_is_lost_with_the_machine(
    tmp_path: Path, boot_id: str | None, durability: str, is_clean: bool, goes_on: bool
) -> None:
    """With "os" records may be gone after a start of the machine, if the daemon had not stopped."""
    async with opened(tmp_path / "journal", durability=durability) as engine:
        stamp = await engine.stamp(0)
        await append(engine, LogWriter(stamp), "1")
    directory = JournalDirectory(str(tmp_path / "journal"))
    meta = directory.read_meta()
    assert meta is not None
    directory.write_meta(
        Meta(
            FORMAT,
            meta.stamp,
            boot_id or meta.boot_id,
            is_clean,
            meta.durability,
            meta.newest,
            meta.last_position if is_clean else 0,
        )
    )

    async with opened(tmp_path / "journal", durability=durability) as engine:
        assert (await engine.stamp(0) == stamp) is goes_on
