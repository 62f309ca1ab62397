"""Signals: a stop is one from the first moment on, and what is not one ends nothing."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from daemons import ROOT, DaemonProcess, daemon_process

from clevrd import stacks
from clevrd.daemon_signals import DaemonSignals
from clevrd.signals import STACKS, STOPS, STRAY
from clevrd.stacks import stack_lines
from clevrd.tenants.keys import NewKey, new_key

# In a namespace of its own a process is number 1, as in a container; root alone may make one.
UNSHARE = ["unshare", "--pid", "--fork", "--kill-child"]
can_unshare = subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    """Return a daemon in a process of its own."""
    with daemon_process() as started:
        yield started


async def logged(daemon: DaemonProcess, words: str) -> list[str]:
    """Return the next lines, up to the one with ``words`` in it."""
    assert daemon.process.stderr is not None
    lines: list[str] = []
    while not lines or words not in lines[-1]:
        line = await asyncio.to_thread(daemon.process.stderr.readline)
        assert line, f"the daemon ended before it logged {words!r}"
        lines.append(line)
    return lines


async def ended(daemon: DaemonProcess) -> int:
    """Return the exit code."""
    return await asyncio.to_thread(daemon.process.wait, 15)


async def assert_serves(daemon: DaemonProcess) -> None:
    """Fail unless it answers."""
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{daemon.url}/health/ready") as response,
    ):
        assert response.status == 200


# --- a daemon that runs --------------------------------------------------------------------------


async def test_hangup_is_an_orderly_stop(daemon: DaemonProcess) -> None:
    """A terminal that closes says so twice, and that does not force anything."""
    daemon.process.send_signal(signal.SIGHUP)
    daemon.process.send_signal(signal.SIGHUP)
    lines = await logged(daemon, "INFO stopped")

    assert await ended(daemon) == 0
    assert "stopping signal=SIGHUP" in "".join(lines)


# Its last object sends a stop signal when the interpreter has given up its handlers.
ENDING = """
import asyncio, os, signal, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
from clevrd.daemon_signals import DaemonSignals
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGHUP):
        kill(pid, number)
last = Last()
signals = DaemonSignals(asyncio.new_event_loop())
signals.install()
signals.finish(0)
"""


def test_signal_at_the_very_end_changes_no_exit_code() -> None:
    """A terminal that closes may send the second one when the process is all but gone."""
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, timeout=20)

    assert done.returncode == 0


def write_rules(path: Path, *keys: NewKey) -> None:
    """Write a configuration file in which these keys may do everything."""
    entries = "".join(
        f'[[tenants.keys]]\nid = "k{at}"\nsha256 = "{each.sha256}"\npublish = ["**"]\n'
        for at, each in enumerate(keys)
    )
    path.write_text(f'[auth]\nmode = "required"\n[[tenants]]\nname = "acme"\n{entries}')


@pytest.fixture
def ruled(tmp_path: Path) -> Iterator[tuple[DaemonProcess, Path, NewKey]]:
    """Return a daemon in a process of its own, its configuration file, and the key in it."""
    path, key = tmp_path / "clevrd.toml", new_key()
    write_rules(path, key)
    with daemon_process(CLEVRD_CONFIG=str(path)) as started:
        yield started, path, key


async def test_hangup_reloads_the_file(ruled: tuple[DaemonProcess, Path, NewKey]) -> None:
    """Keys come and go while the daemon runs, and a file that is wrong changes nothing."""
    daemon, path, old = ruled
    new = new_key()

    async def status(key: NewKey) -> int:
        url = f"http://127.0.0.1:{daemon.port}/publish"
        headers = {"X-API-Key": key.secret}
        async with (
            aiohttp.ClientSession() as http,
            http.post(url, data=b'{"topic":"t","data":1}', headers=headers) as answer,
        ):
            return answer.status

    assert [await status(old), await status(new)] == [200, 401]
    write_rules(path, new)
    daemon.process.send_signal(signal.SIGHUP)
    await logged(daemon, "INFO reloaded")
    assert [await status(old), await status(new)] == [401, 200]
    path.write_text('[auth]\nmode = "closed"\nringmessages = 5\n')
    daemon.process.send_signal(signal.SIGHUP)
    refused = await logged(daemon, "reload refused")
    assert [await status(old), await status(new)] == [401, 200]
    write_rules(path, new)
    path.write_text("ring_messages = 500\n" + path.read_text())
    daemon.process.send_signal(signal.SIGHUP)
    differs = await logged(daemon, "INFO reloaded")
    daemon.process.send_signal(signal.SIGTERM)

    assert await ended(daemon) == 0
    assert "nothing has changed" in refused[-1]
    assert "setting=ring_messages" in "".join(differs)
    assert old.secret not in "".join(refused)


async def test_daemon_under_nohup_outlives_its_terminal() -> None:
    """Who starts it so has said what SIGHUP is to mean."""
    command = f"trap '' HUP; exec {sys.executable} -m clevrd serve --address 127.0.0.1:0"
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", command), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    while b"listening" not in await process.stderr.readline():
        pass

    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    rest = await process.stderr.read()

    assert await process.wait() == 0
    assert b"SIGHUP" not in rest
    assert b"stopping signal=SIGTERM" in rest


@pytest.mark.parametrize("name", ["USR1", "USR2", "ALRM", "VTALRM", "PROF", "POLL"])
async def test_stray_signal_is_ignored_with_a_line(daemon: DaemonProcess, name: str) -> None:
    """Somebody's habit with another daemon is not the end of this one."""
    daemon.process.send_signal(signal.Signals[f"SIG{name}"])

    await logged(daemon, "INFO signal ignored signal=SIG")
    await assert_serves(daemon)


@pytest.mark.parametrize("name", ["PIPE", "XFSZ", "TSTP", "WINCH", "URG"])
async def test_signal_that_means_nothing_changes_nothing(daemon: DaemonProcess, name: str) -> None:
    """After SIGTSTP it goes on as soon as it is let."""
    daemon.process.send_signal(signal.Signals[f"SIG{name}"])
    daemon.process.send_signal(signal.SIGCONT)

    await assert_serves(daemon)
    assert daemon.process.poll() is None


async def test_quit_shows_every_stack_and_it_goes_on(daemon: DaemonProcess) -> None:
    """One line for each thread and for each place at which tasks stand."""
    # Until it serves, its own task stands elsewhere.
    await assert_serves(daemon)
    daemon.process.send_signal(signal.SIGQUIT)
    lines = await logged(daemon, "stacks of tasks all=")

    text = "".join(lines)
    assert re.search(r"stack thread=MainThread at=\S+:\d+ ", text)
    assert re.search(r"stack tasks=1 at=locks\.py:\d+ wait < process\.py:\d+ _serve", text)
    await assert_serves(daemon)


@pytest.mark.holds_loop("a loop that is held is what this is about")
async def test_stops_and_stacks_work_where_the_loop_is_held(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No callback of the loop is needed to see where it is held, or to end it."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    caplog.set_level("INFO")
    signals = DaemonSignals(asyncio.get_running_loop())
    signals.install()
    try:
        for number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.raise_signal(number)
        was_told_within_the_turn = signals.stopping.is_set()
        await asyncio.sleep(0)
        is_told = signals.stopping.is_set()
        signals.finish(0)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number in (*STOPS, *STRAY, STACKS):
            signal.signal(number, before[number])

    assert (was_told_within_the_turn, is_told) == (False, True)
    assert codes[:1] == [1]
    assert 0 in codes
    assert "test_stops_and_stacks_work_where_the_loop_is_held" in caplog.text


async def test_stacks_that_cannot_be_shown_break_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in a handler would be one of the code that was interrupted."""

    def fail(*_: object) -> None:
        raise RuntimeError("changed while it was looked at")

    monkeypatch.setattr("clevrd.daemon_signals.stack_lines", fail)

    DaemonSignals(asyncio.get_running_loop())._show_stacks(signal.SIGQUIT, None)

    assert "stacks can't be shown" in caplog.text


# --- stacks --------------------------------------------------------------------------------------


async def wait_at(event: asyncio.Event, depth: int) -> None:
    """Wait ``depth`` calls further down."""
    if depth:
        await wait_at(event, depth - 1)
    else:
        await event.wait()


def task_lines(tasks: list[asyncio.Task[None]]) -> list[str]:
    """Return the lines that are of tasks."""
    return [line for line in stack_lines(tasks) if line.startswith(("stack tasks", "stacks of"))]


async def test_tasks_at_one_place_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand connections that wait are a number; how many lines there are is bounded."""
    event = asyncio.Event()
    tasks = [asyncio.create_task(wait_at(event, depth % 7)) for depth in range(70)]
    await asyncio.sleep(0)

    lines = task_lines(tasks)
    monkeypatch.setattr(stacks, "MAX_PLACES", 3)
    fewer = task_lines(tasks)
    monkeypatch.setattr(stacks, "MAX_TASKS", 7)
    fewest = task_lines(tasks)

    event.set()
    await asyncio.gather(*tasks)
    assert [line.split(" at=")[0] for line in lines[:-1]] == ["stack tasks=10"] * 7
    assert lines[-1] == "stacks of tasks all=70 left_out=0"
    assert lines[0].count(" wait_at") == 1
    assert lines[6].count(" wait_at") == 7
    assert (len(fewer), fewer[-1]) == (4, "stacks of tasks all=70 left_out=40")
    assert fewest[-1] == "stacks of tasks all=70 left_out=67"


async def deep(event: asyncio.Event, calls: int) -> None:
    """Wait so many calls down."""
    await wait_at(event, calls)


async def test_stack_is_cut_where_it_is_deep() -> None:
    """The innermost calls say where it stands."""
    event = asyncio.Event()
    task = asyncio.create_task(deep(event, 100))
    await asyncio.sleep(0)

    (line, _) = task_lines([task])

    event.set()
    await task
    assert line.startswith("stack tasks=1 at=locks.py:")
    assert line.count(" < ") == stacks.MAX_CALLS - 1


# --- before it runs ------------------------------------------------------------------------------

# Holds an import at the first look for aiohttp, so that the signal comes within it.
SLOW_IMPORT = """
import sys, time
class Slow:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            print("importing", flush=True)
            while True:
                time.sleep(0.01)
sys.meta_path.insert(0, Slow())
sys.argv = ["clevrd", *{argv!r}]
from clevrd.entry import main
sys.exit(main())
"""


def stop_while_importing(
    argv: list[str], number: signal.Signals, module: str, *prefix: str
) -> tuple[int, str]:
    """Send the signal while ``module`` is imported; return the exit code and what was said."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", SLOW_IMPORT.format(argv=argv, module=module)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "importing\n"
            (target,) = children_of(process.pid) if prefix else [process.pid]
            os.kill(target, number)
            _, said = process.communicate(timeout=10)
        finally:
            process.kill()
    return process.returncode, said


def children_of(pid: int) -> list[int]:
    """Return the numbers of its children."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("module", ["clevrd.cli", "msgspec", "aiohttp"])
def test_stop_while_it_imports_is_a_stop(number: signal.Signals, module: str) -> None:
    """Nothing is begun, so nothing is to be ended: exit code 0, and a line."""
    code, said = stop_while_importing(["serve"], number, module)

    assert (code, said) == (0, f"clevrd: stopped before it began signal={number.name}\n")


@pytest.mark.skipif(not can_unshare, reason="process namespaces can't be made here")
def test_stop_of_process_1_while_it_imports_is_a_stop() -> None:
    """The kernel does not end process 1 for a signal that it has no handler for."""
    code, said = stop_while_importing([], signal.SIGTERM, "aiohttp", *UNSHARE)

    assert (code, said) == (0, "clevrd: stopped before it began signal=SIGTERM\n")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGQUIT, signal.SIGALRM])
def test_stray_signal_while_it_imports_is_ignored(number: signal.Signals) -> None:
    """The daemon that comes is not ended by what would not end it later."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_IMPORT.format(argv=["serve"], module="aiohttp")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(number)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=10)
        finally:
            process.kill()

    assert process.returncode == 0
    assert "SIGTERM" in said


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_command_that_is_ended_has_the_signals_code(number: signal.Signals, code: int) -> None:
    """A publish that was ended before it began is no success, and no traceback."""
    assert stop_while_importing(["publish", "t", "1"], number, "aiohttp") == (code, "")


async def test_command_that_is_ended_tells_its_sum(daemon: DaemonProcess) -> None:
    """SIGTERM from a supervisor is to a command what Ctrl-C is."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "clevrd", "publish", "t", "-", "--url", daemon.url),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(b"1\n")
    async with aiohttp.ClientSession() as http:
        while True:
            async with http.get(f"{daemon.url}/metrics") as response:
                if (await response.json())["messages"]["published"]:
                    break

    process.send_signal(signal.SIGTERM)
    _, said = await process.communicate()

    assert process.returncode == 143
    assert said.startswith(b"clevrd: published ")
    assert said.count(b"\n") == 1
