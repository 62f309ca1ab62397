"""Processes that are killed while they append: what was acknowledged is read back, in order, once.

KILLS says how many are killed with each durability; with KILLS=100 that takes some minutes.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from appending_process import PER_RECORD, settings_of
from journal_log import EPOCH, LogWriter, append, read_all
from stored_messages import StoredMessage, page_of

from clevrd.journal.records import decode_header
from clevrd.journal.sqlite.engine import SqliteEngine

KILLS = int(os.environ.get("KILLS", "5"))
PER_JOURNAL = 10
ROOT = Path(__file__).parents[2]
PROCESS = ROOT / "tests" / "support" / "appending_process.py"


async def run_and_kill(directory: Path, durability: str, lines: int, delay_s: float) -> list[int]:
    """Kill a process that appends, some time after so many acknowledgements; return all of them."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PROCESS),
        str(directory),
        durability,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{PROCESS.parent}"},
    )
    assert process.stdout is not None
    acknowledged = []
    for _ in range(lines):
        line = await process.stdout.readline()
        assert line, "the process ended by itself"
        acknowledged.append(int(line))
    await asyncio.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    rest = await process.stdout.read()
    acknowledged += [int(line) for line in rest.split(b"\n")[:-1]]
    await process.wait()
    return acknowledged


def texts_of(records: list[bytes]) -> list[int]:
    """Return the texts of the messages of topic a in some records, which are offsets."""
    found = []
    for record in records:
        header, lines_at = decode_header(record)
        lines = record[lines_at:].splitlines()
        found += [int(msgspec.json.decode(line)["data"]) for line in lines[: header.runs[0].count]]
    return found


async def all_records(engine: SqliteEngine) -> list[bytes]:
    """Return all records of a log that has some."""
    last = engine._catalog.segments[-1].last_position
    found = await engine.read(0, 0)
    while found[-1][0] < last:
        found += await engine.read(0, found[-1][0])
    return [record for _, record in found]


@pytest.mark.timeout(150)
@pytest.mark.holds_loop("it decodes thousands of records")
@pytest.mark.parametrize("journal", range(-(-KILLS // PER_JOURNAL)))
@pytest.mark.parametrize("durability", ["fsync", "os"])
async def test_what_was_acknowledged_before_a_kill_is_read_back(
    tmp_path: Path, durability: str, journal: int
) -> None:
    """Kill after kill, on one journal: each acknowledged message is there, in its place, once."""
    chance = random.Random(journal)  # noqa: S311  # moments to kill at, the same in each run
    directory = tmp_path / "journal"
    acknowledged: list[int] = []
    stamps = set()
    for _ in range(min(KILLS, PER_JOURNAL)):
        acknowledged += await run_and_kill(
            directory, durability, chance.randrange(1, 300), chance.random() / 50
        )

        engine = SqliteEngine(settings_of(str(directory), durability))
        await engine.open()
        stamps.add(await engine.stamp(0))
        found = texts_of(await all_records(engine))
        extent = await engine.extent(EPOCH, "default", "a")
        history: list[StoredMessage] = []
        while page := await page_of(engine, EPOCH, "default", "a", len(history), 1_000, 1 << 30):
            history += page
        assert engine.figures.damaged == 0
        # The next process finds the journal as this one was killed, or as it was closed.
        if chance.random() < 0.5:
            await engine.close()
        else:
            engine._writer.stop()
            await engine.close()

        assert found == list(range(1, len(found) + 1))
        assert {*acknowledged} <= {*found[::PER_RECORD]}
        assert extent is not None
        assert extent.head == len(found)
        assert [each.offset for each in history] == found
        assert [int(msgspec.json.decode(each.line)["data"]) for each in history] == found
    assert len(stamps) == 1


async def killed(directory: Path) -> tuple[Path, list[int]]:
    """Return the newest file of a journal whose process was killed, and what it acknowledged."""
    acknowledged = await run_and_kill(directory, "fsync", 20, 0.0)
    newest = max(name for name in os.listdir(directory) if name.endswith(".db") and "seg" in name)
    return directory / newest, acknowledged


async def test_a_torn_tail_is_cut(tmp_path: Path) -> None:
    """A commit that the disk has by halves was never acknowledged, and is not there."""
    directory = tmp_path / "journal"
    newest, acknowledged = await killed(directory)
    wal = newest.with_name(newest.name + "-wal")
    with wal.open("ab") as file:
        file.write(wal.read_bytes()[-4120:][:3000])

    engine = SqliteEngine(settings_of(str(directory), "fsync"))
    await engine.open()
    found = texts_of(await all_records(engine))
    await append(engine, LogWriter(await engine.stamp(0), "ffff"), "goes on")
    await engine.close()

    assert found == list(range(1, len(found) + 1))
    assert {*acknowledged} <= {*found}


async def test_a_flipped_bit_in_the_wal_is_no_torn_tail(tmp_path: Path) -> None:
    """Behind it are commits that were acknowledged, so the log can't go on as if they were not."""
    directory = tmp_path / "journal"
    newest, acknowledged = await killed(directory)
    wal = newest.with_name(newest.name + "-wal")
    content = bytearray(wal.read_bytes())
    content[len(content) // 2] ^= 1
    wal.write_bytes(content)
    before = SqliteEngine(settings_of(str(directory), "fsync"))._directory.read_meta()
    assert before is not None

    engine = SqliteEngine(settings_of(str(directory), "fsync"))
    await engine.open()
    stamp = await engine.stamp(0)
    await append(engine, LogWriter(stamp, "ffff"), "begins anew")
    page = await page_of(engine, EPOCH, "default", "a", 0, 10_000, 1 << 30)
    await engine.close()

    assert stamp != before.stamp
    # What stands before the flipped bit can be read, in its old epoch.
    assert [each.offset for each in page] == list(range(1, len(page) + 1))
    assert 0 < len(page) < len(acknowledged) * PER_RECORD + PER_RECORD


async def test_files_can_be_read_by_other_programs(tmp_path: Path) -> None:
    """A journal is SQLite's, and its records are lines: nothing but their tools is needed."""
    directory = tmp_path / "journal"
    engine = SqliteEngine(settings_of(str(directory), "fsync"))
    await engine.open()
    await append(engine, LogWriter(await engine.stamp(0)), "1", "2")
    await read_all(engine, 2)
    await engine.close()

    database = sqlite3.connect(directory / "segment-0000000001.db")
    rows = database.execute("SELECT record FROM records ORDER BY position").fetchall()
    database.close()

    lines = [line for (record,) in rows for line in record.splitlines()]
    assert [line for line in lines if not line.startswith(b"clevrd1")] == [
        b'{"topic":"a","data":"1"}',
        b'{"topic":"a","data":"2"}',
    ]
