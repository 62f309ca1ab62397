"""A planned restart loses no position, a crash brings none back: real processes, from outside."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from clients import client_of, publishing, raw_subscriber
from daemons import ROOT, DaemonProcess, daemon_process, until
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from clevrd.client import Client, Gap
from clevrd.errors import CannotStart
from clevrd.restart.directory import BAD, LOCK, STATE


class Restarts:
    """Daemon processes, one after the other on one port and one state directory."""

    def __init__(self, state_dir: Path, **variables: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.state_dir = state_dir
        self.variables = {
            "ADDRESS": f"127.0.0.1:{self.port}",
            "CLEVRD_STATE_DIR": str(state_dir),
            **variables,
        }
        self._life = AsyncExitStack()
        self.daemon: DaemonProcess | None = None

    async def start(self) -> DaemonProcess:
        """Start the next process."""
        context = daemon_process(**self.variables)
        self.daemon = await asyncio.to_thread(context.__enter__)
        self._life.callback(context.__exit__, None, None, None)
        return self.daemon

    async def stop(self) -> int:
        """Stop it as a supervisor does and return its exit code."""
        assert self.daemon is not None
        return await asyncio.to_thread(self.daemon.stop)

    async def kill(self) -> None:
        """End it without a word."""
        assert self.daemon is not None
        self.daemon.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(self.daemon.process.wait, 10)

    async def close(self) -> None:
        """End what still runs."""
        await self._life.aclose()


@pytest.fixture
async def restarts(tmp_path: Path) -> AsyncIterator[Restarts]:
    """Return a place where daemons follow each other."""
    made = Restarts(tmp_path)
    yield made
    await made.close()


def reader_of(daemon: DaemonProcess, query: str = "topic=t&last=0", **settings: Any) -> Any:
    """Return a `websockets` client that asks for control frames by subprotocol."""
    url = f"{daemon.ws_url}/subscribe?{query}"
    return client_of(url, subprotocols=["clevrd.v1"], **settings)


async def frames(reader: ClientConnection, count: int) -> list[dict[str, Any]]:
    """Return the next frames."""
    return [json.loads(await reader.recv()) for _ in range(count)]


async def to_the_end(reader: ClientConnection) -> list[dict[str, Any]]:
    """Return all that comes before the connection is closed."""
    seen: list[dict[str, Any]] = []
    with suppress(ConnectionClosed):
        while True:
            seen.append(json.loads(await reader.recv()))
    return seen


async def publish(daemon: DaemonProcess, count: int, topic: str = "t") -> list[int]:
    """Publish so many and return the offsets that were acknowledged."""
    async with publishing(daemon.port) as publisher:
        await publisher.send(topic, count)
        return publisher.acknowledged


# --- planned -------------------------------------------------------------------------------------


async def test_reader_resumes_across_a_restart_as_if_there_was_none(restarts: Restarts) -> None:
    """Told its position, it comes back with it and gets exactly what follows, recovered."""
    daemon = await restarts.start()
    async with reader_of(daemon) as reader:
        await publish(daemon, 5)
        code = await restarts.stop()
        greeting, *messages, goodbye = await to_the_end(reader)
    position = goodbye["positions"]["t"]
    assert (code, reader.close_code) == (0, 1012)
    assert (greeting["type"], goodbye["type"]) == ("subscribed", "going_away")
    assert [each["offset"] for each in messages] == [1, 2, 3, 4, 5]
    assert position == {"epoch": greeting["epoch"], "offset": 5}

    daemon = await restarts.start()
    await publish(daemon, 2)
    query = f"topic=t&epoch={position['epoch']}&offset={position['offset']}"
    async with reader_of(daemon, query) as reader:
        again, *messages = await frames(reader, 3)

    assert (again["epoch"], again["offset"], again["recovered"]) == (position["epoch"], 5, True)
    assert [each["offset"] for each in messages] == [6, 7]


async def test_what_it_had_not_read_before_the_stop_comes_after_it(restarts: Restarts) -> None:
    """A reader that stalled, and one that was away, get what was acknowledged shortly before."""
    restarts.variables["CLEVRD_SHUTDOWN_TIMEOUT_S"] = "1"
    daemon = await restarts.start()
    async with reader_of(daemon) as reader:
        (greeting,) = await frames(reader, 1)
        await publish(daemon, 3)
        await frames(reader, 3)
    async with await raw_subscriber(daemon.port, receive_bytes=4096):
        acknowledged = await publish(daemon, 400)
        await restarts.stop()

    daemon = await restarts.start()
    async with reader_of(daemon, f"topic=t&epoch={greeting['epoch']}&offset=3") as reader:
        again, *messages = await frames(reader, 401)

    assert again["recovered"] is True
    assert [each["offset"] for each in messages] == acknowledged == list(range(4, 404))


@pytest.mark.parametrize("form", ["last_event_id", "header", "since id", "since time"])
async def test_every_form_of_resuming_works_across_a_restart(restarts: Restarts, form: str) -> None:
    """By event id, in the query or the header, by message id and by time."""
    daemon = await restarts.start()
    async with reader_of(daemon) as reader:
        await publish(daemon, 4)
        greeting, first, second, *_ = await frames(reader, 5)
    await restarts.stop()
    daemon = await restarts.start()
    event_id = f"{greeting['epoch']}:2"
    query, headers = {
        "last_event_id": (f"topic=t&last_event_id={event_id}", {}),
        "header": ("topic=t", {"Last-Event-ID": event_id}),
        "since id": (f"topic=t&since={second['id']}", {}),
        "since time": (f"topic=t&since={first['timestamp']}", {}),
    }[form]

    async with reader_of(daemon, query, additional_headers=headers) as reader:
        again, *messages = await frames(reader, 3)

    assert again["recovered"] is True or form == "since time"
    expected = [1, 2] if form == "since time" else [3, 4]
    assert [each["offset"] for each in messages] == expected


async def test_ids_and_frames_are_the_same_after_the_restart(restarts: Restarts) -> None:
    """Byte for byte what was sent before; ids go on rising."""
    daemon = await restarts.start()
    await publish(daemon, 3)
    async with client_of(f"{daemon.ws_url}/subscribe?topic=t") as reader:
        before = [await reader.recv() for _ in range(3)]
    await restarts.stop()

    daemon = await restarts.start()
    await publish(daemon, 1)
    async with client_of(f"{daemon.ws_url}/subscribe?topic=t") as reader:
        after = [await reader.recv() for _ in range(4)]

    assert after[:3] == before
    ids = [json.loads(each)["id"] for each in after]
    assert ids == sorted(set(ids))


async def test_own_client_reads_on_across_restarts_without_a_gap(restarts: Restarts) -> None:
    """Publishes go on all the time; what one client sees is one sequence without a hole."""
    seen: list[int] = []
    gaps: list[Gap] = []
    daemon = await restarts.start()

    async def read(client: Client) -> None:
        async for item in client.subscribe("t", last=0):
            if isinstance(item, Gap):
                gaps.append(item)
            else:
                seen.append(item.offset)

    async with Client(daemon.url) as client, asyncio.timeout(25):
        reading = asyncio.create_task(read(client))
        while not seen:
            await client.publish("t", 1)
        for _ in range(2):
            for _ in range(20):
                await client.publish("t", 2)
            await restarts.stop()
            await restarts.start()
        last = await client.publish("t", 3)
        await until(lambda: seen[-1] >= last.offset, timeout_s=20)
        reading.cancel()

    assert gaps == []
    assert seen == list(range(seen[0], last.offset + 1))


# --- a stop during the start ---------------------------------------------------------------------

# A daemon that comes no further than ``where`` in its start, until it is told to stop.
HELD_START = """
import sys, time
from clevrd import daemon_signals as signals
from clevrd.server import planned_restart
from clevrd.restart import directory as state_dir
told = []
install = signals.DaemonSignals.install
signals.DaemonSignals.install = lambda self: (told.append(self), install(self))
def held(whole):
    def call(*arguments):
        if {after}:
            whole(*arguments)
        print("held", flush=True)
        while {is_held}:
            time.sleep(0.01)
        if not {after}:
            whole(*arguments)
    return call
{where} = held({where})
sys.argv = ["clevrd", "serve"]
from clevrd.entry import main
sys.exit(main())
"""


async def stop_in_its_start(
    restarts: Restarts, where: str, *, after: bool, is_held: str = "True"
) -> tuple[int, str]:
    """Stop a daemon that is held in its start; return its exit code and its log."""
    script = HELD_START.format(where=where, after=after, is_held=is_held)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script),
        cwd=ROOT,
        env={**os.environ, **restarts.variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"held\n"
    process.send_signal(signal.SIGTERM)
    _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


@pytest.mark.parametrize(
    ("where", "after"),
    [
        ("state_dir.StateDir.open", True),
        ("state_dir.StateDir.read", False),
        ("state_dir.StateDir.read", True),
        ("planned_restart._open_and_read", True),
    ],
)
async def test_stop_before_it_serves_leaves_what_was_saved(
    restarts: Restarts, where: str, after: bool
) -> None:
    """A stop during the start, by an impatient supervisor: the next start has all of it."""
    await publish(await restarts.start(), 3)
    await restarts.stop()
    saved = (restarts.state_dir / STATE).read_bytes()

    code, said = await stop_in_its_start(restarts, where, after=after)

    assert (code, (restarts.state_dir / STATE).read_bytes()) == (0, saved)
    assert "stopped before it served" in said
    assert await publish(await restarts.start(), 1) == [4]


async def test_stop_while_the_state_is_used_up_saves_it_again(restarts: Restarts) -> None:
    """From the moment the file is gone on the daemon has it, and a stop is a whole one."""
    await publish(await restarts.start(), 3)
    await restarts.stop()

    # Until the signal has come, which asks for a look at what was told.
    is_held = "not any(each._is_told for each in told)"
    code, said = await stop_in_its_start(
        restarts, "state_dir.StateDir.use_up", after=True, is_held=is_held
    )

    assert code == 0
    assert "state saved topics=1" in said
    assert await publish(await restarts.start(), 1) == [4]


# --- not planned ---------------------------------------------------------------------------------


async def test_crash_after_a_restart_brings_no_old_offset_back(restarts: Restarts) -> None:
    """The saved state is used up before the first message: after SIGKILL epochs are new."""
    daemon = await restarts.start()
    async with reader_of(daemon) as reader:
        (greeting,) = await frames(reader, 1)
        await publish(daemon, 3)
    await restarts.stop()
    assert (restarts.state_dir / STATE).exists()
    daemon = await restarts.start()
    assert not (restarts.state_dir / STATE).exists()
    assert await publish(daemon, 2) == [4, 5]
    await restarts.kill()

    daemon = await restarts.start()
    assert await publish(daemon, 4) == [1, 2, 3, 4]
    # It saw offset 3 in the life before: offset 4 of this one is not what followed it.
    async with reader_of(daemon, f"topic=t&epoch={greeting['epoch']}&offset=3") as reader:
        again, gap, *messages = await frames(reader, 6)

    assert again["epoch"] != greeting["epoch"]
    assert again["recovered"] is False
    assert (gap["type"], gap["reason"], gap["to"]) == ("gap", "epoch", None)
    assert [each["offset"] for each in messages] == [1, 2, 3, 4]


async def test_kill_while_stopping_leaves_nothing_to_resume(restarts: Restarts) -> None:
    """A second signal, or a supervisor that lost patience: no file, so new epochs."""
    daemon = await restarts.start()
    async with await raw_subscriber(daemon.port, receive_bytes=4096):
        async with publishing(daemon.port) as publisher:
            await publisher.send("t", 40, b'"%b"' % (b"x" * 50_000))
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.send_signal(signal.SIGINT)
        await asyncio.to_thread(daemon.process.wait, 10)

    assert not (restarts.state_dir / STATE).exists()
    assert await publish(await restarts.start(), 1) == [1]


async def test_lock_of_a_killed_daemon_holds_nobody_up(restarts: Restarts) -> None:
    """The kernel lets go of it with the process; its file means nothing."""
    await restarts.start()
    await restarts.kill()
    assert (restarts.state_dir / LOCK).exists()

    daemon = await restarts.start()

    assert daemon.process.poll() is None


async def test_second_process_on_the_directory_says_why_and_ends(
    restarts: Restarts,
) -> None:
    """One line, exit code 69, and the first one serves on."""
    daemon = await restarts.start()

    process = await asyncio.create_subprocess_exec(
        *daemon.process.args,  # type: ignore[misc]  # a list: daemons.py
        env={
            **os.environ,
            "ADDRESS": "127.0.0.1:0",
            "CLEVRD_STATE_DIR": str(restarts.state_dir),
        },
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()

    (line,) = said.decode().splitlines()
    assert process.returncode == CannotStart.exit_code
    assert f"another clevrd's (process {daemon.process.pid})" in line
    async with aiohttp.ClientSession() as http, http.get(f"{daemon.url}/health") as response:
        assert response.status == 200


async def test_damaged_file_does_not_keep_the_daemon_down(restarts: Restarts) -> None:
    """It starts with new epochs and keeps the file aside."""
    daemon = await restarts.start()
    await publish(daemon, 3)
    await restarts.stop()
    path = restarts.state_dir / STATE
    path.write_bytes(path.read_bytes()[:30])

    daemon = await restarts.start()

    assert await publish(daemon, 1) == [1]
    assert (restarts.state_dir / BAD).stat().st_size == 30


async def test_without_the_setting_a_restart_begins_anew(restarts: Restarts) -> None:
    """Off by default: nothing is written, and who resumes is told of the new epoch."""
    restarts.variables["CLEVRD_STATE_DIR"] = ""
    daemon = await restarts.start()
    assert await publish(daemon, 3) == [1, 2, 3]
    await restarts.stop()

    assert await publish(await restarts.start(), 1) == [1]
    assert list(restarts.state_dir.iterdir()) == []
