"""The units, under a real systemd: it knows when the daemon serves, why it does not, and is told.

The machine is systemd_machine.py's; the clients are websockets' and Python's own.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from systemd_machine import Machine, booted

SERVICE = "clevrd.service"
SOCKET = "clevrd.socket"
CONFIG = "/etc/clevrd/clevrd.toml"
STATE = 'state_dir = "/var/lib/clevrd"\n'
# How long the machine may take for a change that a test waits for.
WAIT_S = 60.0

# Publishes argv[2:] to argv[1] at port 8080, and prints the answers.
PUBLISH = """
import json, sys, urllib.request
for text in sys.argv[2:]:
    body = json.dumps({"topic": sys.argv[1], "data": text}).encode()
    with urllib.request.urlopen("http://127.0.0.1:8080/publish", body, timeout=40) as answer:
        print(answer.read().decode())
"""
# Subscribes with the query argv[1], prints argv[2] texts, and its close code where it is closed.
SUBSCRIBE = """
import sys
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
url = f"ws://127.0.0.1:8080/subscribe?{sys.argv[1]}"
with connect(url, subprotocols=["clevrd.v1"], proxy=None, open_timeout=40) as reader:
    for _ in range(int(sys.argv[2])):
        try:
            print(reader.recv(timeout=40), flush=True)
        except ConnectionClosed:
            print(reader.close_code, flush=True)
            break
"""
# Connects all the time, asks once each time, and prints how each time went, until its standard
# input ends.
KNOCK = """
import json, select, socket, sys
went = {}
while not select.select([sys.stdin], [], [], 0.005)[0]:
    try:
        with socket.create_connection(("127.0.0.1", 8080), timeout=40) as client:
            client.settimeout(40)
            body = b'{"topic":"knocks","data":1}'
            head = b"POST /publish HTTP/1.1\\r\\nHost: test\\r\\nConnection: close\\r\\n"
            client.sendall(head + b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body)
            how = client.recv(4096)[9:12].decode() or "no answer"
    except OSError as error:
        how = type(error).__name__
    went[how] = went.get(how, 0) + 1
    if went[how] == 1:
        print(how, flush=True)
print(json.dumps(went), flush=True)
"""
# Puts a program into each directory that can be written to, runs it, and prints what became of it.
PLANT = """
import json, os, subprocess
ran = {}
for folder, below, _ in os.walk("/"):
    if folder == "/":
        below[:] = set(below) - {"proc", "sys", "usr"}
    if folder.count("/") > 3:
        below.clear()
    path = f"{folder}/planted-{os.getpid()}"
    try:
        with open(path, "w") as program:
            program.write("#!/bin/sh\\n")
        os.chmod(path, 0o755)
    except OSError:
        continue
    try:
        subprocess.run([path])
        ran[folder] = "ran"
    except OSError as error:
        ran[folder] = type(error).__name__
    os.unlink(path)
print(json.dumps(ran))
"""
# Makes system calls that nothing here needs, with arguments that no kernel takes, and prints what
# became of each: EPERM is the filter's word, and a kernel's own is another one.
CALL = """
import ctypes, errno, json, platform
other = platform.machine() == "aarch64"
numbers = (425, 282, 217) if other else (425, 323, 248)
calls = dict(zip(("io_uring_setup", "userfaultfd", "add_key"), numbers))
libc = ctypes.CDLL(None, use_errno=True)
ended = {}
for name, number in calls.items():
    ctypes.set_errno(0)
    libc.syscall(number, -1, 0, 0, 0, 0)
    ended[name] = errno.errorcode.get(ctypes.get_errno(), "done")
print("calls ended", json.dumps(ended), flush=True)
"""
# Holds the port until it is killed.
HOLD = """
import socket, sys
with socket.create_server(("", 8080)):
    print("holds it", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def booted_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Boot one machine for all tests of this module."""
    with booted(tmp_path_factory.mktemp("systemd")) as machine:
        yield machine


@pytest.fixture
def machine(booted_machine: Machine) -> Iterator[Machine]:
    """Return the machine with the units as they are installed, stopped, and nothing saved."""
    yield booted_machine
    booted_machine.run("systemctl", "stop", SOCKET, SERVICE, check=False)
    booted_machine.run("systemctl", "reset-failed", SERVICE, SOCKET, check=False)
    booted_machine.run("sh", "-c", "rm -rf /var/lib/private/clevrd /run/systemd/system/clevrd*")
    booted_machine.run("systemctl", "daemon-reload")
    booted_machine.write(CONFIG, "")


def published(machine: Machine, topic: str, *texts: str) -> list[dict[str, Any]]:
    """Publish ``texts`` and return the answers."""
    done = subprocess.run(
        machine.outside_python("-c", PUBLISH, topic, *texts),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def subscribed(machine: Machine, query: str, count: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """Subscribe; yield what returns the next text, or close code, of ``count``."""
    with subprocess.Popen(
        machine.outside_python("-c", SUBSCRIBE, query, str(count)),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = process.stdout
        try:
            yield lambda: json.loads(lines.readline())
        finally:
            process.kill()


def until(claim: Callable[[], bool]) -> None:
    """Wait until ``claim()`` is true; fail when that takes longer than WAIT_S."""
    end_s = time.monotonic() + WAIT_S
    while not claim():
        assert time.monotonic() < end_s, "this never became true"
        time.sleep(0.1)


def drop_in(machine: Machine, text: str) -> None:
    """Change the unit as `systemctl edit --runtime` does."""
    machine.write("/run/systemd/system/clevrd.service.d/test.conf", text)
    machine.run("systemctl", "daemon-reload")


@pytest.mark.timeout(120)
def test_service_starts_serves_and_goes_on_after_a_restart(machine: Machine) -> None:
    """A start returns when the daemon serves; a restart tells readers, and keeps positions."""
    machine.write(CONFIG, STATE)

    machine.run("systemctl", "start", SERVICE)
    with subscribed(machine, "topic=t", 4) as next_text:
        first = next_text()
        published(machine, "t", "a")
        message = next_text()
        machine.run("systemctl", "restart", SERVICE)
        going = next_text()
        code: Any = next_text()
    status = machine.run("systemctl", "status", SERVICE).stdout
    (answer,) = published(machine, "t", "b")
    with subscribed(machine, f"topic=t&offset=0&epoch={first['epoch']}", 3) as next_text:
        texts = [next_text() for _ in range(3)]
    machine.run("systemctl", "stop", SERVICE)

    assert (first["type"], message["data"]) == ("subscribed", "a")
    assert [going["type"], code] == ["going_away", 1012]
    assert going["positions"]["t"]["offset"] == 1
    assert "Serving http://localhost:8080" in status
    assert answer["offset"] == 2
    assert texts[0]["recovered"] is True
    assert [text["data"] for text in texts[1:]] == ["a", "b"]
    assert machine.property("Result") == "success"
    assert "try subscribe" not in machine.journal()
    # The score that counts is the one of the unit as it is loaded here.
    score = machine.run("systemd-analyze", "security", "--threshold=10", SERVICE, check=False)
    assert score.returncode == 0, score.stdout


@pytest.mark.timeout(120)
def test_start_that_fails_says_so_and_why(machine: Machine) -> None:
    """What can't heal is tried once, a taken port until it is free; each has a line of an error."""
    drop_in(machine, "[Service]\nRestartSec=100ms\n")
    machine.write(CONFIG, "ring_messages = -5\n")
    wrong = machine.run("systemctl", "start", SERVICE, check=False)
    wrong_state = machine.property("ActiveState"), machine.property("ExecMainStatus")
    told = machine.journal("-p", "warning")
    machine.run("systemctl", "reset-failed", SERVICE)
    machine.write(CONFIG, 'state_dir = "/usr"\n')
    machine.run("systemctl", "start", SERVICE, check=False)
    unwritable = machine.property("ActiveState"), machine.property("ExecMainStatus")
    machine.run("systemctl", "reset-failed", SERVICE)
    machine.write(CONFIG, "")
    with subprocess.Popen(
        machine.outside_python("-c", HOLD), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        taken = machine.run("systemctl", "start", SERVICE, check=False)
        told_of_port = machine.journal("-p", "warning")
        until(lambda: machine.property("NRestarts") >= "1")
        holder.kill()
    until(lambda: machine.property("ActiveState") == "active")

    assert wrong.returncode != 0
    assert wrong_state == ("failed", "78")
    assert "ring_messages = -5" in told
    assert unwritable == ("failed", "77")
    assert taken.returncode != 0
    assert "Can't listen on :8080" in told_of_port


@pytest.mark.timeout(120)
def test_daemon_that_is_killed_or_hangs_is_started_again(machine: Machine) -> None:
    """A kill is no stop in order, and neither is a loop that stands still."""
    drop_in(machine, "[Service]\nWatchdogSec=3\nTimeoutAbortSec=1\nRestartSec=100ms\n")
    machine.run("systemctl", "start", SERVICE)

    machine.run("systemctl", "kill", "-s", "KILL", SERVICE)
    until(lambda: machine.property("NRestarts") == "1")
    until(lambda: machine.property("ActiveState") == "active")
    published(machine, "t", "after the kill")
    machine.run("systemctl", "kill", "-s", "STOP", SERVICE)
    until(lambda: machine.property("NRestarts") == "2")
    until(lambda: machine.property("ActiveState") == "active")
    published(machine, "t", "after the watchdog")

    assert "Watchdog timeout" in machine.journal()


@pytest.mark.timeout(120)
def test_reload_takes_a_good_file_and_refuses_a_wrong_one(machine: Machine) -> None:
    """A reload of a wrong file fails, with the reason, and changes nothing."""
    machine.run("systemctl", "start", SERVICE)
    before = machine.property("MainPID")

    machine.write(CONFIG, '[auth]\nallowed_origins = ["https://app.example"]\n')
    machine.run("systemctl", "reload", SERVICE)
    until(lambda: "reloaded file=" in machine.journal())
    machine.write(CONFIG, '[auth]\nmode = "closed"\n')
    refused = machine.run("systemctl", "reload", SERVICE, check=False)

    assert refused.returncode != 0
    assert "closed" in machine.journal("-p", "warning")
    assert machine.property("ActiveState") == "active"
    assert machine.property("MainPID") == before
    assert published(machine, "t", "a")[0]["success"]


@pytest.mark.timeout(120)
def test_restart_with_the_socket_refuses_no_connection(machine: Machine) -> None:
    """A client that connects all the time is served before, during and after a restart."""
    machine.write(CONFIG, STATE)
    machine.run("systemctl", "start", SOCKET)
    # The first connection starts the service.
    with subprocess.Popen(
        machine.outside_python("-c", KNOCK),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as client:
        assert client.stdout is not None
        try:
            first = client.stdout.readline().strip()
            machine.run("systemctl", "restart", SERVICE)
            said, _ = client.communicate("", timeout=WAIT_S)
        finally:
            client.kill()
    went = json.loads(said.splitlines()[-1])
    # The socket stays, and starts the daemon for the next one who comes.
    machine.run("systemctl", "stop", SERVICE)
    (answer,) = published(machine, "knocks", "again")

    assert first == "200"
    assert "ConnectionRefusedError" not in went
    assert went["200"] >= 2
    # A machine that is busy may let a client pause between its connect and its request.
    assert sum(went.values()) - went["200"] <= 1, went
    assert answer["offset"] >= went["200"] + 1
    assert "sockets are from systemd" in machine.journal()


@pytest.mark.timeout(120)
def test_what_the_daemon_writes_it_cannot_run(machine: Machine) -> None:
    """No directory that its user can write to, of those that it sees, has files that can run."""
    machine.write(CONFIG, STATE)
    machine.run("systemctl", "start", SERVICE)
    pid = machine.property("MainPID")
    user = machine.run("stat", "-c", "%u", f"/proc/{pid}").stdout.strip()

    seen_by_it = ("nsenter", "-t", pid, "-m", "setpriv", "--reuid", user, "--clear-groups")
    ran = json.loads(machine.run(*seen_by_it, "/opt/clevrd/bin/python3", "-c", PLANT).stdout)

    assert {"/run/clevrd", "/var/lib/private/clevrd"} <= ran.keys()
    assert set(ran.values()) == {"PermissionError"}


@pytest.mark.timeout(120)
def test_calls_that_open_what_the_unit_closes_are_refused(machine: Machine) -> None:
    """A ring of io_uring would open sockets of any family; the daemon serves without one."""
    machine.write("/run/call.py", CALL)
    before = "[Service]\nExecStartPre=/opt/clevrd/bin/python3 /run/call.py\n"
    drop_in(machine, before)
    machine.run("systemctl", "start", SERVICE)
    refused = machine.journal()
    served = published(machine, "t", "a")[0]
    machine.run("systemctl", "stop", SERVICE)
    drop_in(machine, before + "SystemCallFilter=\n")
    machine.run("systemctl", "start", SERVICE)
    allowed = machine.journal().removeprefix(refused)

    said = 'calls ended {"io_uring_setup": "EPERM", "userfaultfd": "EPERM", "add_key": "EPERM"}'
    assert said in refused
    assert served["success"]
    # Without the filter it is the kernel that answers, so that this test can fail.
    assert "calls ended" in allowed
    assert said not in allowed
