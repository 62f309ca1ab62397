"""A daemon with a journal, seen from outside: every way to publish, restarts, kills, refusals."""

from __future__ import annotations

import asyncio
import fcntl
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from clients import publishing
from daemons import ROOT, Daemon, daemon_process, running, until
from websockets import Subprotocol
from websockets.asyncio.client import connect
from websockets.sync.client import connect as sync_connect

from clevrd import __version__
from clevrd.cli.command_line import main
from clevrd.errors import ConfigError
from clevrd.journal.settings import read_journal
from clevrd.journal.sqlite.engine import SqliteEngine


def journal_at(folder: Path) -> str:
    """Return where a test's journal is."""
    return str(folder / "journal")


def is_busy(daemon: Daemon) -> bool:
    """Return whether any message waits for its place."""
    return daemon.hub.journal is not None and daemon.hub.journal.node.is_busy


def published(port: int, data: Any, topic: str = "t", **fields: Any) -> dict[str, Any]:
    """Publish with curl, and return the answer."""
    body = json.dumps({"topic": topic, "data": data, **fields})
    done = subprocess.run(
        ["curl", "-sS", "-d", body, f"http://127.0.0.1:{port}/publish"],
        capture_output=True,
        check=True,
        timeout=20,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


# --- every way to publish ------------------------------------------------------------------------


async def test_every_way_to_publish_is_durable_and_in_order(tmp_path: Path) -> None:
    """Single, pipelined, keyed, batched, by socket and by command: one order, one epoch."""
    async with running(journal=journal_at(tmp_path)) as daemon:
        async with connect(f"{daemon.ws_url}/subscribe?topic=t") as reader:
            answers = [await daemon.publish("t", 1)]
            async with publishing(daemon.port) as publisher:
                await publisher.send("t", 3, b'"pipelined"')
            lines = b'{"topic":"t","data":5}\n{"topic":"t","data":6}\n'
            async with daemon.http.post(f"{daemon.url}/publish/batch", data=lines) as response:
                answers += (await response.json())["results"]
            async with connect(f"{daemon.ws_url}/publish") as socket:
                await socket.send('{"topic":"t","data":7,"ref":1}')
                answers.append(json.loads(await socket.recv()))
            protocol = [Subprotocol("clevrd.v1")]
            async with connect(f"{daemon.ws_url}/ws", subprotocols=protocol) as commands:
                await commands.send('{"type":"publish","topic":"t","data":8,"ref":2}')
                answers.append(json.loads(await commands.recv()))
            answers.append(await daemon.publish("t", 9, **{"Idempotency-Key": "k"}))

            received = [json.loads(await reader.recv()) for _ in range(9)]

        assert [each["data"] for each in received] == [1, *["pipelined"] * 3, 5, 6, 7, 8, 9]
        assert [each["offset"] for each in received] == list(range(1, 10))
        assert publisher.acknowledged == [2, 3, 4]
        assert [each["offset"] for each in answers] == [1, 5, 6, 7, 8, 9]
        assert {each["epoch"] for each in answers} == {answers[0]["epoch"]}
        assert all(each["durable"] for each in answers)
        assert not any("subscribers_of" in each for each in answers)

        found = (await daemon.get_json("/health"))["journal"]

    assert (found["engine"], found["durability"], found["state"]) == ("sqlite", "fsync", "ok")
    assert (found["nodes"], found["node_versions"]) == (1, {__version__: 1})
    assert found["partitions"] == len(found["positions"]) == 1


async def test_durable_is_not_said_where_a_power_cut_may_lose_it(tmp_path: Path) -> None:
    """With durability "os", and for a topic that is not journaled, the field is left out."""
    table = {"durability": "os", "topics": ["orders.*"], "directory": journal_at(tmp_path)}
    async with running(journal_table=table) as daemon:
        journaled = await daemon.publish("orders.1", 1)
        own = await daemon.publish("chat", 1)

        figures = await daemon.get_json("/metrics")

        assert "durable" not in journaled
        assert "durable" not in own
        assert (figures["journal"]["topics"], figures["journal"]["messages"]) == (1, 1)


# --- restarts and kills --------------------------------------------------------------------------


def test_killed_daemon_goes_on_behind_what_it_answered(tmp_path: Path) -> None:
    """Offsets, epoch and ids go on, a repeat finds its first answer, and no state is needed."""
    with daemon_process(CLEVRD_JOURNAL=journal_at(tmp_path)) as daemon:
        first = [published(daemon.port, number) for number in range(5)]
        keyed = published(daemon.port, "once", idempotency_key="k")
        daemon.process.send_signal(signal.SIGKILL)
        daemon.process.wait(5)
    with daemon_process(CLEVRD_JOURNAL=journal_at(tmp_path)) as daemon:
        again = published(daemon.port, "once", idempotency_key="k")
        after = published(daemon.port, "after")

        assert [each["offset"] for each in first] == [1, 2, 3, 4, 5]
        assert (again["offset"], again["repeated"]) == (6, True)
        assert again["message_id"] == keyed["message_id"]
        assert (after["offset"], after["epoch"]) == (7, first[0]["epoch"])
        assert after["message_id"] > keyed["message_id"]
        assert daemon.stop() == 0


def test_second_daemon_on_one_journal_refuses_to_start(tmp_path: Path) -> None:
    """It says in one line whose the journal is, and ends with the code for a start that failed."""
    with daemon_process(CLEVRD_JOURNAL=journal_at(tmp_path)) as daemon:
        second = subprocess.run(
            [
                *(sys.executable, "-m", "clevrd", "serve"),
                *("--address", "127.0.0.1:0", "--journal", journal_at(tmp_path)),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        answer = published(daemon.port, 1)

    assert second.returncode not in (0, -signal.SIGKILL)
    (line,) = [each for each in second.stderr.splitlines() if journal_at(tmp_path) in each]
    assert "another clevrd" in line
    assert answer["offset"] == 1


def test_reader_resumes_by_position_over_a_kill(tmp_path: Path) -> None:
    """What was published while it was away comes from the journal, and it is recovered."""
    with daemon_process(CLEVRD_JOURNAL=journal_at(tmp_path)) as daemon:
        answers = [published(daemon.port, number) for number in range(20)]
        daemon.process.kill()
        daemon.process.wait(5)
    with daemon_process(CLEVRD_JOURNAL=journal_at(tmp_path)) as daemon:
        published(daemon.port, 20)
        query = f"topic=t&control=1&offset=5&epoch={answers[0]['epoch']}"
        with sync_connect(f"{daemon.ws_url}/subscribe?{query}") as reader:
            greeting = json.loads(reader.recv(20))
            received = [json.loads(reader.recv(20)) for _ in range(16)]

    assert (greeting["type"], greeting["offset"], greeting["recovered"]) == ("subscribed", 5, True)
    assert [each["offset"] for each in received] == list(range(6, 22))
    assert [each["data"] for each in received] == list(range(5, 21))


async def test_pattern_finds_topics_of_before_the_restart(tmp_path: Path) -> None:
    """They are told, and read from their start, though nobody has used them since."""
    journal = journal_at(tmp_path)
    async with running(journal=journal) as daemon:
        for name in ("orders.1", "orders.2", "chat"):
            await daemon.publish(name, name)
        await daemon.publish("orders.9", "theirs", **{"X-Tenant-ID": "other"})
    async with running(journal=journal) as daemon:
        protocol = [Subprotocol("clevrd.v1")]
        async with connect(f"{daemon.ws_url}/ws", subprotocols=protocol) as commands:
            await commands.send('{"type":"subscribe","ref":1,"pattern":"orders.*","last":5}')
            received: list[dict[str, Any]] = []
            while not received or received[-1].get("type") != "watching":
                received.append(json.loads(await commands.recv()))
            while sum("data" in each for each in received) < 2:
                received.append(json.loads(await commands.recv()))

    told = [each["topic"] for each in received if each.get("type") == "subscribed"]
    assert sorted(told) == ["orders.1", "orders.2"]
    assert sorted(each["data"] for each in received if "data" in each) == ["orders.1", "orders.2"]


async def test_watching_follows_all_topics_that_the_journal_is_asked_about(tmp_path: Path) -> None:
    """With `since` too: what comes behind it is made later."""
    async with running(journal=journal_at(tmp_path), ring_messages=10) as daemon:
        lines = b"".join(
            b'{"topic":"m.%d","data":%d}\n' % (number % 5, number) for number in range(500)
        )
        async with daemon.http.post(f"{daemon.url}/publish/batch", data=lines) as response:
            assert response.status == 200
        query = "pattern=m.*&since=all&control=1"
        async with connect(f"{daemon.ws_url}/subscribe?{query}") as reader:
            told: list[str] = []
            while not told or told[-1] != "watching":
                each = json.loads(await reader.recv())
                if "type" in each:
                    told.append(each["type"])

    assert told == [*["subscribed"] * 5, "watching"]


async def test_stop_keeps_messages_that_were_on_their_way(tmp_path: Path) -> None:
    """Publishes that a stop meets are answered before the daemon ends, and are there afterwards."""
    journal = journal_at(tmp_path)
    async with running(journal=journal) as daemon, publishing(daemon.port) as publisher:
        sending = asyncio.ensure_future(publisher.send("t", 200))
        await until(lambda: is_busy(daemon) or sending.done())
        await asyncio.gather(sending, daemon.server.stop())
    async with running(journal=journal) as daemon:
        after = await daemon.publish("t", 2)

    assert publisher.acknowledged == list(range(1, 201))
    assert after["offset"] == 201


async def test_stop_does_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so, and the process ends as if it were killed; the next start has all messages."""
    monkeypatch.setattr("clevrd.server.journal.JOURNAL_STOP_S", 0.1)
    goes_on = asyncio.Event()
    close = SqliteEngine.close

    async def hang(engine: SqliteEngine) -> None:
        await goes_on.wait()
        await close(engine)

    monkeypatch.setattr(SqliteEngine, "close", hang)
    settings: dict[str, Any] = {"journal": journal_at(tmp_path), "shutdown_timeout_s": 0.0}
    async with running(**settings) as daemon:
        first = await daemon.publish("t", 1)
    was_cut_short = daemon.server.is_cut_short
    monkeypatch.undo()
    goes_on.set()
    await until(lambda: not is_locked(tmp_path))
    async with running(**settings) as daemon:
        second = await daemon.publish("t", 2)

    assert was_cut_short
    assert not daemon.server.is_cut_short
    assert "journal not closed" in caplog.text
    assert (second["offset"], second["epoch"]) == (2, first["epoch"])


def is_locked(folder: Path) -> bool:
    """Return whether a process, this one as well, has the journal open."""
    with (folder / "journal" / "lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


# --- files that are removed under a daemon -------------------------------------------------------


@pytest.mark.parametrize("what", ["newest file", "directory"])
async def test_removed_journal_is_found_without_a_publish(tmp_path: Path, what: str) -> None:
    """Subscribers get a gap and /health tells, though nobody publishes; then all goes on."""
    journal = tmp_path / "journal"
    async with running(journal=str(journal)) as daemon:
        before = await daemon.publish("t", 1)
        engine = daemon.hub.journal.engine if daemon.hub.journal else None
        assert isinstance(engine, SqliteEngine)
        address = f"ws://127.0.0.1:{daemon.port}/subscribe?topic=t&control=1"
        async with connect(address) as reader:
            assert json.loads(await reader.recv())["type"] == "subscribed"
            assert json.loads(await reader.recv())["data"] == 1
            if what == "directory":
                await asyncio.to_thread(shutil.rmtree, journal)
            else:
                max(journal.glob("segment-*.db")).unlink()
            engine._look_over_soon()
            if what == "directory":
                node = daemon.hub.journal.node if daemon.hub.journal else None
                await until(lambda: node is not None and not node.is_well)
                journal.mkdir(mode=0o700)
                await until(lambda: node is not None and node.is_well)

            frames = [json.loads(await reader.recv()) for _ in range(2)]
            after = await daemon.publish("t", 2)
            while frames[-1].get("data") != 2:
                frames.append(json.loads(await reader.recv()))
            begun, gap, message = frames[-3:]

        assert (gap["type"], gap["reason"]) == ("gap", "epoch")
        assert after["durable"] is True
        assert before["epoch"] != after["epoch"] == begun["epoch"]
        assert (message["data"], message["offset"]) == (2, after["offset"])
    async with running(journal=str(journal)) as daemon:
        again = await daemon.publish("t", 3)
        assert (again["epoch"], again["offset"]) == (after["epoch"], after["offset"] + 1)


# --- wrong settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"directory": "journal"}, "write an absolute path"),
        ({"directory": "/j", "topics": []}, "name a pattern"),
        ({"directory": "/j", "topics": ["ord*"]}, "whole word"),
        ({"directory": "/j", "retention_s": 60, "segment_s": 61}, "longer than messages are kept"),
        (
            {"directory": "/j", "retention_bytes": 1 << 30, "segment_bytes": 1 << 30},
            "at most half of retention_bytes",
        ),
        ({"directory": "/j", "durability": "maybe"}, "durability"),
        ({"directory": "/j", "retention": 1}, "has no setting called"),
        ({"topics": ["a.*"]}, "not where"),
    ],
    ids=["relative", "no topic", "star", "age", "bytes", "durability", "unknown", "nowhere"],
)
def test_wrong_table_is_told_in_a_line(table: dict[str, Any], sentence: str) -> None:
    """Each mistake says what to write instead."""
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_journal({"journal": table}, "", "clevrd.toml")

    assert "clevrd.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("table", "segment_s", "segment_bytes"),
    [
        ({}, 3600.0, 1 << 30),
        ({"retention_s": 60}, 15.0, 1 << 30),
        ({"retention_s": 2.0, "retention_bytes": 1 << 30}, 1.0, 1 << 28),
        ({"retention_bytes": 1_000}, 3600.0, 1 << 20),
        ({"retention_s": 60, "segment_s": 60}, 60.0, 1 << 30),
        ({"retention_s": 0, "retention_bytes": 0}, 3600.0, 1 << 30),
    ],
    ids=["default", "age", "both", "least", "written", "no bounds"],
)
def test_files_fit_what_is_kept_unless_their_length_is_written(
    table: dict[str, Any], segment_s: float, segment_bytes: int
) -> None:
    """They are a quarter of it, so that nobody has to write both."""
    settings = read_journal({"journal": {"directory": "/j", **table}}, "", "clevrd.toml")

    assert (settings.segment_s, settings.segment_bytes) == (segment_s, segment_bytes)


def command(*words: str) -> tuple[int, str]:
    """Run clevrd in a process of its own; return its exit code and its last line of errors."""
    done = subprocess.run(
        [sys.executable, "-m", "clevrd", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, (done.stderr.splitlines() or [""])[-1]


def test_directory_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    """A file in the directory's place is named, and nothing listens."""
    wrong = tmp_path / "journal"
    wrong.write_text("")

    code, line = command("serve", "--address", "127.0.0.1:0", "--journal", str(wrong))

    assert code == 69
    assert str(wrong) in line


@pytest.mark.parametrize("case", ["a file", "no parent", "a file's inside", "no journal"])
def test_checkconfig_refuses_a_place_as_serve_does(tmp_path: Path, case: str) -> None:
    """The exit code and the sentence are the same, and nothing is made."""
    place = tmp_path / "place"
    if case == "no journal":
        place.mkdir(mode=0o700)
        (place / "thesis.txt").write_text("")
    elif case != "no parent":
        place.write_text("")
    if case in ("no parent", "a file's inside"):
        place = place / "journal"
    before = sorted(tmp_path.rglob("*"))

    told = [
        command(*words, "--journal", str(place))
        for words in (["checkconfig"], ["serve", "--address", "127.0.0.1:0"])
    ]

    assert told[0] == told[1]
    assert told[0][0] == 69
    assert str(place) in told[0][1]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", ["new", "empty", "journal"])
def test_checkconfig_takes_what_serve_would_take(tmp_path: Path, case: str) -> None:
    """A directory that is to be made, one that is empty, and a journal; nothing is changed."""
    place = tmp_path / "place"
    if case == "empty":
        place.mkdir(mode=0o700)
    elif case == "journal":
        with daemon_process(CLEVRD_JOURNAL=str(place)):
            pass
    before = sorted(tmp_path.rglob("*"))

    assert main(["checkconfig", "--journal", str(place)]) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_setting_and_table_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """A string is the directory; a table may name it too."""
    plain, table = tmp_path / "plain.toml", tmp_path / "table.toml"
    plain.write_text('journal = "/j"\n')
    table.write_text('[journal]\ndirectory = "/j"\ntopics = ["a.*"]\n')

    codes = [main(["checkconfig", "--config", str(path)]) for path in (plain, table)]

    assert codes == [0, 0]


@pytest.mark.parametrize("how", ["over the files", "in their place"])
async def test_restored_backup_begins_a_new_epoch(tmp_path: Path, how: str) -> None:
    """No position of the journal that it is a copy of is given again, however it is put back."""
    journal, copy = tmp_path / "journal", tmp_path / "copy"
    async with running(journal=str(journal)) as daemon:
        before = await daemon.publish("t", 1)
        assert await asyncio.to_thread(main, ["journal", "backup", str(journal), str(copy)]) == 0
        lost = await daemon.publish("t", 2)
    if how == "in their place":
        shutil.rmtree(journal)
    await asyncio.to_thread(shutil.copytree, copy, journal, dirs_exist_ok=True)
    async with running(journal=str(journal)) as daemon:
        after = await daemon.publish("t", 3)

    assert before["epoch"] == lost["epoch"] != after["epoch"]
