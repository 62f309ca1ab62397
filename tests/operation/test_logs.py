"""The log: nobody waits for who reads it, and what is lost is counted and said."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from daemons import ROOT, DaemonProcess, daemon_process, until

from clevrd import logs
from clevrd.cli.output import MAX_QUEUED_BYTES, Output
from clevrd.logs import EventFormatter, Lines, LinesHandler
from clevrd.writer_thread import write_all

# Beyond what a pipe and the queue of these tests hold.
MANY = 3_000
LINE = "x" * 99
PIPE_BYTES = 65_536


class Pipe:
    """A pipe whose reader sleeps until it is asked."""

    def __init__(self) -> None:
        self.reading_end, self.writing_end = os.pipe()

    def close(self) -> None:
        """Close both ends, whichever are left."""
        for end in (self.reading_end, self.writing_end):
            try:
                os.close(end)
            except OSError:
                continue

    def read(self) -> bytes:
        """Read what is there, and more, until the writing end is closed."""
        parts = []
        while part := os.read(self.reading_end, 65_536):
            parts.append(part)
        return b"".join(parts)

    def read_lines(self, until: str) -> list[str]:
        """Read up to and with the line that has ``until`` in it."""
        text = ""
        while until not in text or not text.endswith("\n"):
            text += os.read(self.reading_end, 65_536).decode()
        return text.splitlines()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """Return a pipe that nobody reads yet."""
    made = Pipe()
    yield made
    made.close()


def lines_to(descriptor: int, max_queued_bytes: int = 100_000) -> Lines:
    """Return lines that say how many were dropped in the shortest way."""
    return Lines(descriptor, lambda count: f"dropped {count}", max_queued_bytes)


# --- lines ---------------------------------------------------------------------------------------


def test_lines_that_nobody_reads_are_dropped_counted_and_said(pipe: Pipe) -> None:
    """Nobody waits; who reads again finds the oldest, one line with the number, and the next."""
    lines = lines_to(pipe.writing_end)

    for number in range(MANY):
        lines.put(f"{number} {LINE}")
    dropped = lines.dropped
    read = pipe.read_lines("dropped")
    lines.put("next")
    read += pipe.read_lines("next")

    *kept, note, after = read
    assert 0 < dropped < MANY
    assert [int(line.split()[0]) for line in kept] == list(range(MANY - dropped))
    assert (note, after) == (f"dropped {dropped}", "next")


def test_flush_of_a_full_pipe_ends_and_is_not_tried_twice(pipe: Pipe) -> None:
    """An exit that flushes in several places waits once."""
    lines = lines_to(pipe.writing_end)
    for _ in range(MANY):
        lines.put(LINE)

    first, second = lines.flush(0.05), lines.flush(3_600.0)

    assert (first, second) == (False, False)


def test_flush_after_the_pipe_was_read_is_whole(pipe: Pipe) -> None:
    """What was given up once is waited for again where something moved."""
    lines = lines_to(pipe.writing_end)
    for _ in range(MANY):
        lines.put(LINE)
    lines.flush(0.01)
    pipe.read_lines("dropped")
    # The thread counts what it has written a moment after it can be read.
    while lines._writer.queued_bytes:
        time.sleep(0.001)
    lines.put("next")

    assert lines.flush(5.0)


class Disk:
    """A descriptor that fails as it is told, in place of `os.write`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written = b""
        # What each write takes; an error is raised. Beyond the list everything is taken.
        self.plan: list[int | OSError] = []
        monkeypatch.setattr("clevrd.writer_thread.os.write", self._write)

    def _write(self, _: int, data: bytes) -> int:
        step = self.plan.pop(0) if self.plan else len(data)
        if isinstance(step, OSError):
            raise step
        self.written += bytes(data[:step])
        return step


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Return a disk that takes everything until it is told otherwise."""
    return Disk(monkeypatch)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EBADF, errno.EIO])
def test_lines_that_cannot_be_written_are_counted_and_said(disk: Disk, number: int) -> None:
    """A full disk, a reader that left, a descriptor that is closed, a terminal that is gone."""
    lines = lines_to(99)
    disk.plan = [OSError(number, ""), OSError(number, "")]
    for text in ("lost", "lost too", "kept"):
        lines.put(text)
        assert lines.flush(5.0)

    assert lines.dropped == 2
    assert disk.written == b"dropped 2\nkept\n"


def test_line_that_was_cut_by_a_full_disk_is_ended_before_the_next(disk: Disk) -> None:
    """Half a line and a whole one are not one line."""
    lines = lines_to(99)
    disk.plan = [3, OSError(errno.ENOSPC, ""), OSError(errno.ENOSPC, "")]
    for text in ("half of it", "lost", "kept"):
        lines.put(text)
        assert lines.flush(5.0)

    assert lines.dropped == 2
    assert disk.written == b"hal\ndropped 2\nkept\n"


def test_descriptor_that_others_made_non_blocking_is_waited_for(pipe: Pipe) -> None:
    """A terminal or a pipe is shared with programs that set it so."""
    os.set_blocking(pipe.writing_end, False)
    data = b"x" * 1_000_000
    outcome: list[tuple[int, OSError | None]] = []

    def write() -> None:
        outcome.append(write_all(pipe.writing_end, data))
        os.close(pipe.writing_end)

    writing = threading.Thread(target=write)
    writing.start()
    read = pipe.read()
    writing.join(5)

    assert outcome == [(len(data), None)]
    assert read == data


def test_line_is_bounded(disk: Disk) -> None:
    """A traceback of everything is cut, and says so."""
    lines = lines_to(99, max_queued_bytes=logs.MAX_QUEUED_BYTES)

    lines.put("é" * 1_000_000)
    lines.flush(5.0)

    assert len(disk.written) < logs.MAX_LINE_BYTES + 50
    assert disk.written.decode().endswith("é ... cut off\n")


# --- events --------------------------------------------------------------------------------------


@pytest.fixture
def events(disk: Disk) -> LinesHandler:
    """Return what writes events to the disk as a daemon's under journald are."""
    return LinesHandler(lines_to(99, max_queued_bytes=10_000), EventFormatter(for_journal=True))


def event(text: str, *values: Any) -> logging.LogRecord:
    """Return a warning of the daemon's."""
    return logging.LogRecord("clevrd.hub", logging.WARNING, "hub.py", 7, text, values, None)


def test_number_of_dropped_lines_is_an_event(events: LinesHandler, disk: Disk) -> None:
    """It has its severity for journald, as every line."""
    disk.plan = [OSError(errno.ENOSPC, "")]
    events.handle(event("lost"))
    events.flush()

    events.handle(event("kept n=%d", 1))
    events.flush()

    note, kept = disk.written.decode().splitlines()
    assert note.startswith("<4>log lines dropped count=1;")
    assert kept == "<4>kept n=1"


def test_event_whose_values_do_not_fit_says_where_it_is(events: LinesHandler, disk: Disk) -> None:
    """Python would write a traceback to standard error by itself, and wait."""
    events.handle(event("n=%d", "text"))
    events.flush()

    (line,) = disk.written.decode().splitlines()
    assert line.startswith("<3>log line can't be made at=hub.py:7 why=")


@pytest.fixture
def pythons_own() -> Iterator[None]:
    """Give back what Python does with errors that nobody catches."""
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    logging.captureWarnings(False)


@pytest.mark.usefixtures("pythons_own")
def test_what_python_says_is_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Warnings and errors that nobody caught, each with its traceback, and nothing beside."""
    logs.log_what_python_says()
    error = ValueError("why")

    def fail() -> None:
        raise error

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    thread = threading.Thread(target=fail, name="worker")
    thread.start()
    thread.join()
    sys.excepthook(ValueError, error, None)
    sys.unraisablehook(cast(Any, Unraisable(error)))

    said = [record.getMessage() for record in caplog.records]
    assert "DeprecationWarning: old" in said[0]
    assert said[1:] == [
        "thread ended by an error thread=worker",
        "ended by an error",
        "error where nothing can be raised in='a finalizer'",
    ]
    assert all(record.exc_info for record in caplog.records[1:])
    assert capfd.readouterr().err == ""


class Unraisable:
    """What `sys.unraisablehook` is given."""

    def __init__(self, error: Exception) -> None:
        self.exc_value = error
        self.object = "a finalizer"


# --- standard output -----------------------------------------------------------------------------


async def test_slow_reader_of_the_output_holds_the_writer_and_not_the_loop(pipe: Pipe) -> None:
    """What is printed waits, everything else goes on, and nothing is dropped."""
    output = Output(pipe.writing_end)
    data = LINE.encode() + b"\n"

    async def write() -> None:
        for _ in range(10_000):
            await output.write(data)
        await output.finish()
        os.close(pipe.writing_end)

    writing = asyncio.create_task(write())
    # It stands when the pipe and the queue are full; the loop turns.
    for _ in range(10):
        await asyncio.sleep(0)
    assert not writing.done()
    read = await asyncio.to_thread(pipe.read)

    await writing
    assert read == data * 10_000


async def test_output_that_nobody_takes_is_bounded(pipe: Pipe) -> None:
    """A subscription waits with what it has; it does not collect."""
    output = Output(pipe.writing_end)
    part = b"x" * 4_096  # whole pages, so that the pipe fills up
    written = 0

    async def write() -> None:
        nonlocal written
        while True:
            await output.write(part)
            written += len(part)

    writing = asyncio.create_task(write())
    await until(lambda: unread_bytes(pipe) == PIPE_BYTES and written >= MAX_QUEUED_BYTES)
    await asyncio.sleep(0)

    assert written <= MAX_QUEUED_BYTES + PIPE_BYTES
    os.close(pipe.reading_end)
    with pytest.raises(BrokenPipeError):
        await writing


def unread_bytes(pipe: Pipe) -> int:
    """Return what the pipe holds: pipe(7), FIONREAD."""
    return int.from_bytes(
        fcntl.ioctl(pipe.reading_end, termios.FIONREAD, bytes(4)), byteorder=sys.byteorder
    )


async def test_output_whose_reader_left_says_so(pipe: Pipe) -> None:
    """The command ends then: nobody wants the rest."""
    os.close(pipe.reading_end)
    output = Output(pipe.writing_end)

    async def write() -> None:
        await output.write(b"1\n")
        await output.finish()

    with pytest.raises(BrokenPipeError):
        await write()


# --- processes -----------------------------------------------------------------------------------


@pytest.fixture
def unread() -> Iterator[DaemonProcess]:
    """Return a daemon whose standard error is a pipe of one page that nobody reads any more."""
    with daemon_process(CLEVRD_SHUTDOWN_TIMEOUT_S="5") as daemon:
        assert daemon.process.stderr is not None
        fcntl.fcntl(daemon.process.stderr.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        yield daemon


async def fill_log(daemon: DaemonProcess) -> None:
    """Have it log several times what a page holds; it answers all the while."""
    async with aiohttp.ClientSession() as http:
        for _ in range(20):
            daemon.process.send_signal(signal.SIGQUIT)
            async with http.get(f"{daemon.url}/health/live") as response:
                assert response.status == 200


async def test_log_that_nobody_reads_stops_nothing(unread: DaemonProcess) -> None:
    """The daemon serves, and stops in order when it is told to."""
    async with asyncio.timeout(15):
        await fill_log(unread)
        unread.process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(unread.process.wait, 10)

    assert code == 0


async def test_second_signal_ends_it_also_where_nobody_reads(unread: DaemonProcess) -> None:
    """What it still has to say is given up."""
    async with asyncio.timeout(15):
        await fill_log(unread)
        # A request that does not end: without it the stop would be over sooner than the second.
        _, writer = await asyncio.open_connection("127.0.0.1", unread.port)
        writer.write(b"POST /publish HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\n{")
        await writer.drain()
        unread.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        unread.process.send_signal(signal.SIGINT)
        code = await asyncio.to_thread(unread.process.wait, 10)
        writer.close()

    assert code == 1


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_daemon_without_standard_streams_keeps_their_numbers_free(tmp_path: Path) -> None:
    """Number 2 is nobody's: a log line can't go to a client or into the state file."""
    port = free_port()
    command = f"exec {sys.executable} -m clevrd serve --address 127.0.0.1:{port} <&- >&- 2>&-"
    with subprocess.Popen(["sh", "-c", command], cwd=ROOT) as process:
        try:
            reach(port)
            targets = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
        finally:
            process.terminate()
        code = process.wait(15)

    assert targets == [os.devnull] * 3
    assert code == 0


def reach(port: int) -> None:
    """Return when somebody listens there."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.02)


def test_bad_lines_that_nobody_hears_of_are_counted(unread: DaemonProcess) -> None:
    """`clevrd publish -` ends with its code, although its words fill a pipe."""
    reading_end, writing_end = os.pipe()
    fcntl.fcntl(writing_end, fcntl.F_SETPIPE_SZ, 4096)

    done = subprocess.run(
        [sys.executable, "-m", "clevrd", "publish", "t", "-", "--url", unread.url],
        cwd=ROOT,
        input=b"{\n" * 500,
        stderr=writing_end,
        timeout=20,
    )

    os.close(reading_end)
    os.close(writing_end)
    assert done.returncode == 1


def test_command_without_standard_output_fails() -> None:
    """What it would print is not lost in silence."""
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m clevrd version >&-"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stderr) == (
        1,
        "clevrd: Standard input or output failed: Bad file descriptor.\n",
    )
