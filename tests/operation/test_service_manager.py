"""What systemd is told and hands over: each state at its time, and lies that change nothing.

The receiver is a socket of the tests' own, and the daemon a process, or its parts in this one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from daemons import ROOT, until

from clevrd.service.given_sockets import FIRST_FD, given_sockets
from clevrd.service.manager import LEAST_WATCHDOG_S, ServiceManager

# Puts the socket argv[1] where systemd would, and becomes the daemon.
HAND_OVER = """
import os, sys
for at, number in enumerate(sys.argv[1:]):
    os.dup2(int(number), 3 + at)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "clevrd", "serve"])
"""


class Receiver:
    """The end of systemd: takes datagrams."""

    def __init__(self, address: str | bytes, *, receive_bytes: int = 0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(20)

    def next(self) -> dict[str, str]:
        """Return the fields of the next datagram."""
        lines = self.socket.recv(4096).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def upto(self, name: str) -> list[dict[str, str]]:
        """Return the datagrams up to the one that has ``name``."""
        seen = [self.next()]
        while name not in seen[-1]:
            seen.append(self.next())
        return seen


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    """Return a receiver with a path."""
    made = Receiver(str(tmp_path / "notify"))
    yield made
    made.socket.close()


@contextmanager
def started(*sockets: socket.socket, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start a daemon that is handed ``sockets``."""
    numbers = [each.fileno() for each in sockets]
    with subprocess.Popen(
        [sys.executable, "-c", HAND_OVER, *map(str, numbers)],
        cwd=ROOT,
        env={**os.environ, "ADDRESS": "127.0.0.1:0", "LISTEN_FDS": "", **variables},
        pass_fds=numbers,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def listening_line(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Return the line with the daemon's address, and the lines before it."""
    assert process.stderr is not None
    before = ""
    for line in process.stderr:
        if " listening " in line:
            return line, before
        before += line
    raise AssertionError(f"the daemon ended before it listened: {before}")


def served(port: int) -> bytes:
    """Return the first bytes of an answer at ``port``."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET /health/ready HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        return client.recv(12)


def test_states_are_told_in_their_order(tmp_path: Path) -> None:
    """Ready when it serves, a reload with its time, and the stop; by an abstract socket."""
    receiver = Receiver(b"\0clevrd-test-%d" % os.getpid())
    config = tmp_path / "clevrd.toml"
    config.write_text("")
    variables = {
        "NOTIFY_SOCKET": f"@clevrd-test-{os.getpid()}",
        "CLEVRD_CONFIG": str(config),
        "CLEVRD_STATE_DIR": str(tmp_path),
        "CLEVRD_SHUTDOWN_TIMEOUT_S": "7",
        "WATCHDOG_USEC": "400000",
    }
    with started(**variables) as process:
        line, _ = listening_line(process)
        until_ready = receiver.upto("READY")
        is_served = served(int(line.rpartition("pid=")[0].rstrip().rpartition(":")[2]))
        receiver.upto("WATCHDOG")
        process.send_signal(signal.SIGHUP)
        reloading = receiver.upto("RELOADING")[-1]
        reloaded = receiver.upto("READY")
        process.send_signal(signal.SIGTERM)
        stopping = receiver.upto("STOPPING")[-1]
        code = process.wait(20)
    receiver.socket.close()

    assert is_served == b"HTTP/1.1 200"
    assert "what was saved is read" in until_ready[0]["STATUS"]
    assert int(until_ready[1]["EXTEND_TIMEOUT_USEC"]) == 30_000_000
    assert "Serving http://127.0.0.1:" in until_ready[-1]["STATUS"]
    assert int(reloading["MONOTONIC_USEC"]) > 0
    assert all("STOPPING" not in each for each in reloaded)
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) > 7_000_000
    assert code == 0


def test_reason_of_a_start_that_fails_is_told(receiver: Receiver) -> None:
    """The sentence stands in the status of the service, and no READY before it."""
    taken = socket.create_server(("127.0.0.1", 0))
    variables = {
        "NOTIFY_SOCKET": str(receiver.socket.getsockname()),
        "ADDRESS": f"127.0.0.1:{taken.getsockname()[1]}",
    }

    with started(**variables) as process:
        seen = [receiver.next()]
        while "Can't listen" not in seen[-1].get("STATUS", ""):
            seen.append(receiver.next())
        code = process.wait(20)
    taken.close()

    assert code == 69
    assert all("READY" not in each for each in seen)


def test_drain_that_does_not_fit_is_told_at_the_start() -> None:
    """A stop would be shorter than somebody believes who has set it."""
    variables = {"CLEVRD_DRAIN_S": "40", "CLEVRD_SHUTDOWN_TIMEOUT_S": "35"}
    with started(**variables) as process:
        listening_line(process)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = process.stderr.read()

    assert "drain_s is more than fits into shutdown_timeout_s wanted=40 taken=30" in log
    assert "raise shutdown_timeout_s to 45 or more" in log


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("/nowhere/notify", "systemd can't be told reason=No such file or directory"),
        ("vsock:2:1234", "NOTIFY_SOCKET is neither a path nor an @name value='vsock:2:1234'"),
        ("/dev/null", "systemd can't be told reason=Connection refused"),
    ],
    ids=["gone", "other kind", "no socket"],
)
def test_notify_socket_that_lies_changes_nothing(address: str, line: str) -> None:
    """One line, and the daemon serves."""
    with started(NOTIFY_SOCKET=address, WATCHDOG_USEC="many") as process:
        address_line, before = listening_line(process)
        is_served = served(int(address_line.rpartition("pid=")[0].rstrip().rpartition(":")[2]))
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = before + process.stderr.read()

    assert is_served == b"HTTP/1.1 200"
    assert log.count(line) == 1, log


@pytest.mark.parametrize("given", ["1", "199999"])
async def test_watchdog_that_is_too_short_takes_no_core(
    given: str, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told at a pace that costs nothing, and the log says so."""
    variables = {"NOTIFY_SOCKET": str(receiver.socket.getsockname()), "WATCHDOG_USEC": given}
    manager = ServiceManager.from_environ(variables, 1, asyncio.get_running_loop())
    manager.ready("serving")
    assert receiver.next()["READY"] == "1"
    manager.close()

    assert manager._watchdog_s == LEAST_WATCHDOG_S
    assert "WATCHDOG_USEC is too short value=" + given in caplog.text


async def test_full_queue_holds_nothing_up_and_loses_no_state(receiver: Receiver) -> None:
    """What a full queue does not take is sent when it takes something; the newest of a name."""
    loop = asyncio.get_running_loop()
    address = str(receiver.socket.getsockname())
    manager = ServiceManager(address, loop)
    receiver.socket.setblocking(False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        sent = 0
        with suppress(BlockingIOError):
            while True:
                other.sendto(b"FILLED=1", address)
                sent += 1
        for number in range(1000):
            manager.status(f"number {number}")
        manager.ready("serving")
        assert len(manager._unsent) == 2
        for _ in range(sent):
            receiver.next()

    await until(lambda: not manager._unsent)
    last = receiver.next()
    manager.close()

    assert last == {"STATUS": "serving", "READY": "1"}


async def test_status_is_one_line_that_ends(receiver: Receiver) -> None:
    """A sentence with line breaks can't say anything else by them."""
    manager = ServiceManager(str(receiver.socket.getsockname()), asyncio.get_running_loop())

    manager.status("first\nMAINPID=1\n" + "x" * 5000)
    fields = receiver.next()
    manager.close()

    assert fields.keys() == {"STATUS"}
    assert fields["STATUS"].startswith("first MAINPID=1 xxx")
    assert len(fields["STATUS"]) == 200


# --- sockets -------------------------------------------------------------------------------------


def test_sockets_that_are_handed_over_are_served_and_stay(tmp_path: Path) -> None:
    """Clients at one, operators at the other; both go on listening when the daemon has ended."""
    clients = socket.create_server(("127.0.0.1", 0))
    operators = socket.create_server(("127.0.0.1", 0))
    variables = {
        "LISTEN_FDS": "2",
        "LISTEN_FDNAMES": "clevrd.socket:admin",
        "CLEVRD_ADMIN_ADDRESS": "127.0.0.1:1",
    }

    with started(clients, operators, **variables) as process:
        line, _ = listening_line(process)
        answers = [served(each.getsockname()[1]) for each in (clients, operators)]
        process.send_signal(signal.SIGTERM)
        code = process.wait(20)
    # This connection waits for the next daemon.
    waiting = socket.create_connection(clients.getsockname(), timeout=10)
    for each in (waiting, clients, operators):
        each.close()

    assert f":{clients.getsockname}" not in line
    assert answers == [b"HTTP/1.1 200", b"HTTP/1.1 200"]
    assert code == 0


def test_unix_socket_that_is_handed_over_keeps_its_file(tmp_path: Path) -> None:
    """The file is systemd's, for the next daemon."""
    path = tmp_path / "clevrd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as given:
        given.bind(str(path))
        given.listen()
        with started(given, LISTEN_FDS="1", ADDRESS=f"unix:{path}") as process:
            line, _ = listening_line(process)
            process.send_signal(signal.SIGTERM)
            code = process.wait(20)

    assert f"address=unix:{path}" in line
    assert code == 0
    assert path.is_socket()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"LISTEN_FDS": "1", "LISTEN_PID": "1"}, "LISTEN_PID names another process"),
        ({"LISTEN_FDS": "1"}, "LISTEN_PID names another process value=''"),
        ({"LISTEN_FDS": "-1", "LISTEN_PID": "me"}, "LISTEN_FDS is no whole number"),
        ({"LISTEN_FDS": "1e9", "LISTEN_PID": "me"}, "LISTEN_FDS is no whole number"),
        ({"LISTEN_FDS": "999", "LISTEN_PID": "me"}, "LISTEN_FDS is no whole number up to 64"),
    ],
    ids=["other process", "no process", "negative", "no number", "too many"],
)
def test_variables_that_lie_hand_over_nothing(
    variables: dict[str, str], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each has a line that says what is wrong."""
    pid = os.getpid()
    environ = {name: str(pid) if text == "me" else text for name, text in variables.items()}

    given = given_sockets(environ, pid)

    assert (given.clients, given.operators) == ((), ())
    assert line in caplog.text


def test_descriptors_that_are_no_listening_sockets_are_left_out() -> None:
    """A file, a socket that does not listen, one of datagrams, a gap: the daemon has its own."""
    with (
        open(os.devnull, "rb") as file,
        socket.socket() as silent,
        socket.socket(type=socket.SOCK_DGRAM) as datagrams,
    ):
        handed = (file, silent, datagrams)
        with started(*handed, LISTEN_FDS="4", LISTEN_FDNAMES="a:b") as process:  # type: ignore[arg-type]
            line, before = listening_line(process)
            is_served = served(int(line.rpartition("pid=")[0].rstrip().rpartition(":")[2]))

    assert is_served == b"HTTP/1.1 200"
    for number in range(FIRST_FD, FIRST_FD + 4):
        assert before.count(f"socket not taken fd={number} reason=") == 1
    assert "LISTEN_FDNAMES does not fit LISTEN_FDS" in before
