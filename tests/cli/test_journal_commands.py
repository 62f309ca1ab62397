"""clevrd journal: what is in one, whether it is whole, copies of it, and messages in and out."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
from daemons import running
from journal_log import EPOCH, LogWriter, append
from stored_messages import page_of

from clevrd.cli import main
from clevrd.journal import importing, records
from clevrd.journal.clear_points import ClearPoints
from clevrd.journal.epoch_names import topic_epoch
from clevrd.journal.records import Clear, Header
from clevrd.journal.sqlite import segments
from clevrd.journal.sqlite.engine import SqliteEngine
from clevrd.journal.sqlite.settings import SqliteSettings

Run = Callable[..., tuple[int, str, str]]

MESSAGES: list[dict[str, Any]] = [
    {"topic": "orders.eu", "tenant": "acme", "data": {"n": 1}, "key": "k1"},
    {"topic": "orders.us", "tenant": "acme", "data": [2, "\n"], "idempotency_key": "once"},
    {"topic": "news", "tenant": "other", "data": "three", "headers": {"ce-id": "3"}},
    {"topic": "orders.eu", "tenant": "acme", "data": 4.5},
]


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Return a function that runs `clevrd journal` with arguments; code, output and errors."""

    def run_it(*words: object) -> tuple[int, str, str]:
        code = main(["journal", *map(str, words)])
        printed = capfdbinary.readouterr()
        return code, printed.out.decode(), printed.err.decode()

    return run_it


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Return a file of messages, an hour between two of them."""
    path = tmp_path / "lines"
    path.write_bytes(
        b"".join(
            msgspec.json.encode({**each, "timestamp": f"2026-01-31T1{hour}:00:00.000250Z"}) + b"\n"
            for hour, each in enumerate(MESSAGES)
        )
    )
    return path


@pytest.fixture
def journal(tmp_path: Path, run: Run, lines: Path) -> Path:
    """Return a journal with the messages."""
    assert run("import", tmp_path / "journal", lines)[0] == 0
    return tmp_path / "journal"


def exported(output: str) -> list[dict[str, Any]]:
    """Return exported lines as objects."""
    return [msgspec.json.decode(line) for line in output.splitlines()]


def test_what_was_imported_is_exported(run: Run, journal: Path) -> None:
    """Content and times are those that were given; offsets count in each topic."""
    code, output, errors = run("export", journal)

    found = exported(output)
    assert (code, errors) == (0, "")
    assert [
        {name: each[name] for name in given} for each, given in zip(found, MESSAGES, strict=True)
    ] == MESSAGES
    assert [each["offset"] for each in found] == [1, 1, 1, 2]
    assert [each["timestamp"] for each in found] == [
        f"2026-01-31T1{hour}:00:00.000250Z" for hour in range(4)
    ]
    assert [each["id"] for each in found] == [
        f"msg-20260131-1{hour}0000.000250" for hour in range(4)
    ]
    assert found[0]["epoch"] == found[3]["epoch"] != found[1]["epoch"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--topic", "orders.*"], [0, 1, 3]),
        (["--topic", "news"], [2]),
        (["--tenant", "acme"], [0, 1, 3]),
        (["--tenant", "acme", "--topic", "**"], [0, 1, 3]),
        (["--tenant", "nobody"], []),
    ],
    ids=["pattern", "topic", "tenant", "both", "none"],
)
def test_export_takes_what_is_asked_for(
    run: Run, journal: Path, words: list[str], wanted: list[int]
) -> None:
    """Topics, patterns and tenants choose messages."""
    code, output, _ = run("export", journal, *words)

    assert code == 0
    assert [each["data"] for each in exported(output)] == [MESSAGES[at]["data"] for at in wanted]


def test_export_leaves_out_what_a_later_clevrd_says_of_a_message(
    run: Run, tmp_path: Path, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fields that this one does not know, and headers that it can't carry, cost no message."""
    said = (b',"later":{"a":1}}\n', b',"headers":[1]}\n', b',"headers":{"ce-id":"3","l":"1"}}\n')
    more = iter((*said, b"}\n"))
    monkeypatch.setattr(
        importing,
        "line_of",
        lambda request: (
            records.line_of(msgspec.structs.replace(request, headers=None))[:-2] + next(more)
        ),
    )
    assert run("import", tmp_path / "journal", lines)[0] == 0

    code, output, errors = run("export", tmp_path / "journal")
    assert (code, errors) == (0, "")
    assert [(each["data"], each.get("headers")) for each in exported(output)] == [
        (each["data"], each.get("headers")) for each in MESSAGES
    ]
    assert "later" not in output


async def published_and_cleared(journal: Path) -> list[dict[str, Any]]:
    """Return the answers to publishes, between which a topic was cleared."""
    answers: list[dict[str, Any]] = []
    async with running(journal_table={"directory": str(journal)}) as daemon:
        for step in ("t", "u", "t", "clear", "t", "clear", "clear", "t", "u"):
            if step == "clear":
                async with daemon.http.delete(f"{daemon.url}/topics/t/messages") as response:
                    assert response.status == 200
            else:
                answers.append(await daemon.publish(step, len(answers)))
    return answers


def test_export_names_the_epoch_of_each_message(run: Run, tmp_path: Path) -> None:
    """Of a topic that was cleared, too: before, between and behind; a checkpoint is not needed."""
    journal = tmp_path / "journal"
    answers = asyncio.run(published_and_cleared(journal))

    code, output, errors = run("export", journal)
    found = exported(output)
    assert (code, errors) == (0, "")
    places = [(each["epoch"], each["offset"]) for each in answers]
    assert [(each["epoch"], each["offset"]) for each in found] == places
    assert len({epoch for epoch, _ in places}) == 4
    (journal / "checkpoint.db").unlink()
    assert run("export", journal)[1] == output


def test_epoch_is_left_out_where_the_record_of_a_clear_is_gone() -> None:
    """What is known of the last clear is from the checkpoint; another partition epoch has none."""
    names, other = ("e1", "acme", "t"), ("e0", "acme", "t")
    points = ClearPoints("e1", [("acme", "t", 20)])

    assert points.epoch_of(other, 7) == topic_epoch("e0", "acme", "t")
    assert points.epoch_of(names, 11) == ""
    points.note(Header("ab", "cd", 1, 0, clears=(Clear("acme", "t"),)))
    assert points.epoch_of(names, 15) == topic_epoch("e1", "acme", "t", 14)
    # The record that cleared it again is damaged.
    assert points.epoch_of(names, 21) == topic_epoch("e1", "acme", "t", 20)
    # A record that was sent again clears nothing.
    points.note(Header("ab", "cd", 1, 0, clears=(Clear("acme", "t"),)))
    assert points.epoch_of(names, 22) == topic_epoch("e1", "acme", "t", 20)
    assert points.epoch_of(("e1", "acme", "u"), 5) == topic_epoch("e1", "acme", "u")
    # What came before does not matter in a new epoch of the partition.
    points.note(Header("ab", "cd", 2, 0, clears=(Clear("acme", "t"),)))
    assert points.epoch_of(("e2", "acme", "t"), 1) == topic_epoch("e2", "acme", "t")


def test_an_export_goes_into_another_journal(run: Run, journal: Path, tmp_path: Path) -> None:
    """Messages move with their times and their order; the topics begin other epochs."""
    (tmp_path / "moved").write_text(run("export", journal)[1])

    assert run("import", tmp_path / "new", tmp_path / "moved")[0] == 0

    before, after = (exported(run("export", each)[1]) for each in (journal, tmp_path / "new"))
    assert {each["epoch"] for each in before}.isdisjoint(each["epoch"] for each in after)
    for each in (*before, *after):
        del each["epoch"]
    assert before == after


def test_an_import_goes_on_where_the_journal_is(run: Run, journal: Path, lines: Path) -> None:
    """Into a journal with messages more of them can be taken: the same epochs, the next offsets."""
    assert run("import", journal, lines)[0] == 0

    found = exported(run("export", journal)[1])
    assert [each["offset"] for each in found] == [1, 1, 1, 2, 3, 2, 2, 4]
    assert len({each["epoch"] for each in found}) == 3
    ids = [each["id"] for each in found]
    assert ids == sorted(set(ids))


def test_lines_that_are_no_messages_are_told_and_left_out(run: Run, tmp_path: Path) -> None:
    """Each has its number and its mistake; the others are taken."""
    path = tmp_path / "lines"
    path.write_bytes(
        b'{"topic":"a","data":1}\nhello\n\n{"topic":"","data":1}\n{"topic":"a"}\n'
        b'{"topic":"a","data":1,"timestamp":"yesterday"}\n{"topic":"a","data":1,"tenant":".x"}\n'
        b'{"topic":"a","data":"\xff"}\n{"topic":"a","data":1,"headers":{"a":"b"}}\n'
        b'{"topic":"a","data":1,"headers":{"ce-a":1}}\n{"topic":"a","data":2}\n'
    )

    code, output, errors = run("import", tmp_path / "journal", path)

    assert code == 1
    assert output == f"2 messages are in the journal {tmp_path / 'journal'}.\n"
    assert [line.partition(":")[2].partition(":")[0] for line in errors.splitlines()[:-1]] == [
        f" Line {number}" for number in (2, 4, 5, 6, 7, 8, 9, 10)
    ]
    assert [each["data"] for each in exported(run("export", tmp_path / "journal")[1])] == [1, 2]


@pytest.mark.parametrize(
    ("time", "words"),
    [
        ('"timestamp":"9999-12-31T23:59:59Z"', "more than a day ahead"),
        ('"id":"msg-99991231-235959.000000"', "more than a day ahead"),
        ('"timestamp":"1969-12-31T23:59:59Z"', "before 1970"),
    ],
    ids=["timestamp ahead", "id ahead", "before 1970"],
)
def test_a_line_of_a_time_that_no_log_can_have_is_left_out(
    run: Run, tmp_path: Path, time: str, words: str
) -> None:
    """The import goes on behind it, whether it is the first line or not."""
    path = tmp_path / "lines"
    wrong = f'{{"topic":"a","data":0,{time}}}\n'
    path.write_text(f'{wrong}{{"topic":"a","data":1}}\n{wrong}')

    code, output, errors = run("import", tmp_path / "journal", path)

    assert code == 1
    assert output == f"1 message is in the journal {tmp_path / 'journal'}.\n"
    assert [line for line in errors.splitlines() if words in line and "Line " in line] == (
        errors.splitlines()[:2]
    )
    assert [each["data"] for each in exported(run("export", tmp_path / "journal")[1])] == [1]


@pytest.mark.parametrize("words", [[], ["-"]], ids=["left out", "a hyphen"])
def test_import_reads_standard_input(tmp_path: Path, words: list[str]) -> None:
    """It does so where no file is named, and where a hyphen stands for it."""
    command = [sys.executable, "-m", "clevrd", "journal", "import", str(tmp_path / "journal")]

    done = subprocess.run(
        [*command, *words], input=b'{"topic":"a","data":1}\n', capture_output=True, timeout=20
    )

    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"1 message is")


def test_stat_says_how_much_there_is(run: Run, journal: Path) -> None:
    """Figures as text for people, and as JSON for programs."""
    code, output, _ = run("stat", journal, "--json")
    figures = msgspec.json.decode(output)

    assert code == 0
    assert (figures["messages"], figures["topics"], figures["segments"]) == (4, 3, 1)
    assert (figures["oldest"], figures["newest"]) == (
        "2026-01-31T10:00:00.000250Z",
        "2026-01-31T13:00:00.000250Z",
    )
    assert not figures["is_open"]
    text = run("stat", journal)[1]
    assert "messages    4\n" in text
    assert f"stamp       {figures['stamp']}\n" in text


def test_verify_finds_nothing_in_a_sound_journal(run: Run, journal: Path) -> None:
    """All is read, and nothing is wrong."""
    code, output, errors = run("verify", journal)

    assert (code, errors) == (0, "")
    assert output == "All is well: 5 records in 1 segment.\n"


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE records SET record = replace(record, 'three', 'THREE')", "record at position"),
        ("UPDATE runs SET id_us = id_us + 1 WHERE first = 2", "from offset 2 on is damaged"),
        ("DELETE FROM runs WHERE first = 2", "from offset 2 on of a topic are in no table"),
        ("UPDATE topics SET topic = 'nevs' WHERE topic = 'news'", "a run of the record"),
        ("DELETE FROM records WHERE position = 3", "position 3 is missing"),
        (
            "INSERT INTO runs SELECT topic_id, 99, 1, position, 1, 1, 0, 1, 1, 1 FROM runs LIMIT 1",
            "1 row of messages that are in no record",
        ),
    ],
    ids=["record", "run", "run gone", "topic", "record gone", "run too many"],
)
def test_verify_has_a_line_for_each_damage(
    run: Run, journal: Path, statement: str, words: str
) -> None:
    """What was changed is named with its file, and the command fails."""
    path = journal / "segment-0000000001.db"
    database = apsw.Connection(str(path))
    database.execute(statement.replace("replace(record", "replace(CAST(record AS TEXT)"))
    database.close()

    code, output, _ = run("verify", journal)

    assert code == 1
    assert words in output
    assert all(line.startswith(str(path)) for line in output.splitlines())


def test_verify_finds_a_damaged_checkpoint_and_file(run: Run, journal: Path) -> None:
    """Whatever file it is."""
    (journal / "checkpoint.db").write_bytes(b"hello" * 1_000)
    (journal / "segment-0000000001.db").write_bytes(b"hello" * 1_000)

    code, output, _ = run("verify", journal)

    assert code == 1
    assert {line.partition(":")[0].rpartition("/")[2] for line in output.splitlines()} == {
        "checkpoint.db",
        "segment-0000000001.db",
    }
    # Nothing was changed by it.
    assert (journal / "segment-0000000001.db").exists()


@pytest.mark.parametrize("how", ["removed", "set aside"])
async def test_a_file_that_is_missing_between_others_is_told(
    run: Run, tmp_path: Path, how: str
) -> None:
    """Verify and export fail with it; a backup says it, and has what there is."""
    directory = tmp_path / "journal"
    settings = SqliteSettings(str(directory), "os", segment_bytes=50_000)
    engine = SqliteEngine(settings)
    await engine.open()
    await append(engine, LogWriter(await engine.stamp(0)), *["x" * 1_000] * 150)
    await engine.close()
    assert (await asyncio.to_thread(run, "verify", directory))[0] == 0
    lost = sorted(directory.glob("segment-*.db"))[1]
    if how == "removed":
        lost.unlink()
        words = "segment-0000000001.db and segment-0000000003.db"
    else:
        lost.write_bytes(b"hello" * 1_000)
        engine = SqliteEngine(settings)
        await engine.open()
        await engine.close()
        words = f"{lost}.damaged: it was set aside"

    code, output, _ = await asyncio.to_thread(run, "verify", directory)
    assert code == 1
    assert [words in line for line in output.splitlines() if "behind its" not in line] == [True]
    code, _, errors = await asyncio.to_thread(run, "export", directory)
    assert (code, errors.count("\n")) == (1, 1)
    assert words in errors
    code, _, errors = await asyncio.to_thread(run, "backup", directory, tmp_path / "copy")
    assert code == 0
    assert words in errors


def test_export_leaves_out_what_is_damaged(run: Run, journal: Path) -> None:
    """It says so, and fails; the rest is printed."""
    path = journal / "segment-0000000001.db"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"three", b"thrEe"))

    code, output, errors = run("export", journal)

    assert code == 1
    assert [each["data"] for each in exported(output)] == [
        each["data"] for each in MESSAGES if each["data"] != "three"
    ]
    assert "Left out" in errors


def rewrite(journal: Path, part: bytes, old: bytes, new: bytes, *, is_sound: bool = True) -> None:
    """Replace ``old`` in the records of the first file that have ``part``."""
    database = apsw.Connection(str(journal / "segment-0000000001.db"))
    rows: Any = database.execute("SELECT position, time_us, runs, record, crc FROM records")
    for position, time_us, runs, record, crc in rows.fetchall():
        if part in record:
            changed = record.replace(old, new)
            sum_now = segments.record_crc(position, time_us, runs, changed) if is_sound else crc
            database.execute(
                "UPDATE records SET record = ?, crc = ? WHERE position = ?",
                (changed, sum_now, position),
            )
    database.close()


def test_export_leaves_out_records_of_a_later_clevrd(run: Run, journal: Path) -> None:
    """One line says which and what to do, and it fails; the rest is printed."""
    for part in (b"three", b"once"):
        rewrite(journal, part, b"clevrd1 ", b"clevrd2 ")

    code, output, errors = run("export", journal)

    assert code == 1
    assert [each["data"] for each in exported(output)] == [{"n": 1}, 4.5]
    assert errors.count("\n") == 1
    assert (
        "2 records of a later clevrd, from position 3 in segment-0000000001.db to position 4 in"
        in errors
    )
    assert "export the journal with that clevrd, or a later one" in errors


@pytest.mark.parametrize("is_sound", [True, False], ids=["later", "damaged"])
def test_no_epoch_is_wrong_behind_a_record_that_cannot_be_read(
    run: Run, tmp_path: Path, is_sound: bool
) -> None:
    """It may have cleared the topic: then messages have no epoch until another clear is read."""
    journal = tmp_path / "journal"
    answers = asyncio.run(published_and_cleared(journal))
    (journal / "checkpoint.db").unlink()
    first_clear = b'[["default-tenant","t"]]]\n'
    database = apsw.Connection(str(journal / "segment-0000000001.db"))
    clears = "SELECT record FROM records WHERE instr(record, ?) ORDER BY position LIMIT 1"
    rows: Any = database.execute(clears, (first_clear,))
    ((record,),) = rows.fetchall()
    database.close()
    rewrite(journal, record, b"clevrd1 ", b"clevrd2 ", is_sound=is_sound)

    code, output, errors = run("export", journal)

    found = [(each.get("epoch"), each["offset"]) for each in exported(output)]
    places = [(each["epoch"], each["offset"]) for each in answers]
    # The fourth message of six stands behind the clear that can't be read.
    assert (code, errors.count("\n"), len(found)) == (1, 1, len(places))
    assert found[:3] == places[:3]
    assert found[3] == (None, places[3][1])
    assert found[4] == places[4]
    assert found[5] == (None, places[5][1])


@pytest.mark.parametrize("command", ["stat", "verify", "export", "backup"])
def test_what_is_no_journal_is_refused(run: Run, tmp_path: Path, command: str) -> None:
    """One line says why; nothing is made there."""
    rest = [tmp_path / "copy"] if command == "backup" else []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("hello")

    for name, words in (("missing", "No such file"), ("other", "is no journal")):
        code, output, errors = run(command, tmp_path / name, *rest)

        assert (code, output) == (1, "")
        assert words in errors
        assert errors.count("\n") == 1
    assert not (tmp_path / "missing").exists()
    assert [each.name for each in (tmp_path / "other").iterdir()] == ["thesis.txt"]


@pytest.mark.holds_loop("the commands run in threads of this process, and import modules there")
async def test_messages_of_a_record_that_was_sent_again_are_exported_once(
    run: Run, tmp_path: Path
) -> None:
    """The log has them twice, and the topic once."""
    engine = SqliteEngine(SqliteSettings(str(tmp_path / "journal")))
    await engine.open()
    writer = LogWriter(await engine.stamp(0))
    for text in "12":
        record, placed = writer.one("a", text)
        for _ in range(2):
            await engine.append(0, record, writer.stamp, placed)
    await engine.close()

    _, output, _ = await asyncio.to_thread(run, "export", tmp_path / "journal")
    assert [each["offset"] for each in exported(output)] == [1, 2]
    assert (await asyncio.to_thread(run, "verify", tmp_path / "journal"))[0] == 0


@pytest.mark.holds_loop("the commands run in threads of this process, and import modules there")
async def test_all_but_import_work_while_a_daemon_has_the_journal(run: Run, tmp_path: Path) -> None:
    """They read what is committed, and disturb nobody; a copy is whole."""
    directory = tmp_path / "journal"
    engine = SqliteEngine(SqliteSettings(str(directory), "os", segment_bytes=50_000))
    await engine.open()
    writer = LogWriter(await engine.stamp(0))
    await append(engine, writer, *["x" * 1_000] * 150)
    appending = asyncio.ensure_future(append(engine, writer, *["x" * 1_000] * 250))

    code, output, _ = await asyncio.to_thread(run, "export", directory)
    assert code == 0
    found = [each["offset"] for each in exported(output)]
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= 150
    assert msgspec.json.decode((await asyncio.to_thread(run, "stat", directory, "--json"))[1])[
        "is_open"
    ]
    code, output, _ = await asyncio.to_thread(run, "verify", directory)
    assert (code, output[:11]) == (0, "All is well"), output
    code, _, errors = await asyncio.to_thread(run, "backup", directory, tmp_path / "copy")
    assert (code, errors) == (0, "")
    code, _, errors = await asyncio.to_thread(run, "import", directory, __file__)
    assert code == 1
    assert "another clevrd's" in errors

    await appending
    stamp = await engine.stamp(0)
    assert len(await page_of(engine, EPOCH, "default", "a", 0, 1_000, 1 << 30)) == 400
    await engine.close()
    copy = SqliteEngine(SqliteSettings(str(tmp_path / "copy")))
    await copy.open()
    assert await copy.stamp(0) != stamp
    page = await page_of(copy, EPOCH, "default", "a", 0, 1_000, 1 << 30)
    assert [each.offset for each in page] == list(range(1, len(page) + 1))
    assert len(page) >= len(found)
    await copy.close()


def test_a_backup_is_made_whole_or_not_at_all(run: Run, journal: Path, tmp_path: Path) -> None:
    """A directory that is there is left alone, and a copy can be verified."""
    assert run("backup", journal, tmp_path / "copy")[0] == 0
    assert run("verify", tmp_path / "copy")[0] == 0
    assert run("export", tmp_path / "copy")[1] == run("export", journal)[1]

    code, _, errors = run("backup", journal, tmp_path / "copy")
    assert code == 1
    assert "is there already" in errors

    code, _, errors = run("backup", journal, tmp_path / "missing" / "copy")
    assert code == 1
    assert "No such file" in errors
    assert not (tmp_path / "missing").exists()


def test_a_journal_without_its_lock_file_is_read_all_the_same(
    run: Run, journal: Path, tmp_path: Path
) -> None:
    """A copy by other means is a journal too."""
    shutil.copytree(journal, tmp_path / "copied")
    (tmp_path / "copied" / "lock").unlink()

    assert run("export", tmp_path / "copied")[1] == run("export", journal)[1]
    assert not (tmp_path / "copied" / "lock").exists()
