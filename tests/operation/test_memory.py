"""Memory that was freed goes back to the machine, and little of it is not overdrawn."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import time
import weakref
from contextlib import closing
from pathlib import Path

import pytest
from conftest import FakeClock
from daemons import shell_daemon

from clevrd.memory import LITTLE_LOOKS, PATIENT_LOOKS, WORTH_BYTES, Memory, find_trim

MIB = 1 << 20
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


class Cycle:
    """Something that holds itself."""

    itself: Cycle


class Trim:
    """Counts how often memory was given back."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        """Give it back."""
        self.count += 1


def test_what_is_freed_is_given_back_once(clock: FakeClock) -> None:
    """Not at once, since it may be used again, and not again and again."""
    trim = Trim()
    memory = Memory(trim, clock)
    memory.look(100 * MIB, is_quiet=False)

    given_back = [memory.look(0, is_quiet=False) for _ in range(3 * PATIENT_LOOKS)]

    assert given_back == [False] * (PATIENT_LOOKS - 1) + [True] + [False] * (2 * PATIENT_LOOKS)
    assert trim.count == 1


def test_little_is_not_worth_the_pause(clock: FakeClock) -> None:
    """What comes and goes is used again."""
    trim = Trim()
    memory = Memory(trim, clock)

    for _ in range(50):
        memory.look(100 * MIB, is_quiet=False)
        memory.look(100 * MIB - WORTH_BYTES + 1, is_quiet=False)

    assert trim.count == 0


def test_what_is_left_over_is_given_back_later(clock: FakeClock) -> None:
    """A few MiB count too when nothing happens any more."""
    trim = Trim()
    memory = Memory(trim, clock)
    memory.look(WORTH_BYTES - 1, is_quiet=False)

    given_back = [memory.look(0, is_quiet=False) for _ in range(2 * LITTLE_LOOKS)]

    assert given_back.index(True) == LITTLE_LOOKS - 1
    assert trim.count == 1


def test_rings_that_fill_again_are_left_alone(clock: FakeClock) -> None:
    """At their bound they are cut by a tenth, which is full again within a second or two."""
    trim = Trim()
    memory = Memory(trim, clock)

    for _ in range(50):
        memory.look(600 * MIB, is_quiet=False)
        for _ in range(PATIENT_LOOKS - 1):
            memory.look(540 * MIB, is_quiet=False)

    assert trim.count == 0


def test_much_that_goes_bit_by_bit_is_given_back_in_portions(clock: FakeClock) -> None:
    """Topics are forgotten some each second; to give back all at the end would be a pause."""
    trim = Trim()
    memory = Memory(trim, clock)

    for held_bytes in range(600 * MIB, -1, -16 * MIB):
        memory.look(held_bytes, is_quiet=False)
    for _ in range(PATIENT_LOOKS):
        memory.look(0, is_quiet=False)

    assert trim.count >= 600 // 16 // PATIENT_LOOKS


def test_cycles_are_collected_where_that_takes_no_time(clock: FakeClock) -> None:
    """What connections leave in cycles pins the memory around it."""
    collected = []
    for is_quiet in (False, True):
        memory = Memory(Trim(), clock)
        memory.look(100 * MIB, is_quiet=is_quiet)
        cycle = Cycle()
        cycle.itself = cycle
        known = weakref.ref(cycle)
        del cycle
        for _ in range(PATIENT_LOOKS):
            memory.look(0, is_quiet=is_quiet)
        collected.append(known() is None)

    assert collected == [False, True]


def test_other_allocators_are_left_alone(clock: FakeClock) -> None:
    """musl and macOS have no such call, and nothing is called."""
    memory = Memory(None, clock)
    memory.look(100 * MIB, is_quiet=False)

    assert not any(memory.look(0, is_quiet=False) for _ in range(10))


def test_call_is_glibcs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere nothing is looked for; here it does no harm."""
    trim = find_trim()
    if trim is not None:
        trim()

    monkeypatch.setattr(sys, "platform", "darwin")

    assert find_trim() is None


# --- real processes ------------------------------------------------------------------------------


def rss_bytes(process: subprocess.Popen[str]) -> int:
    """Return the resident set of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (kib,) = re.findall(r"VmRSS:\s+(\d+) kB", status)
    return int(kib) * 1024


def publish(connection: http.client.HTTPConnection, path: str, body: bytes) -> int:
    """Publish and return the status."""
    connection.request("POST", path, body)
    response = connection.getresponse()
    response.read()
    return response.status


@pytest.mark.long
@needs_proc
@pytest.mark.skipif(find_trim() is None, reason="the C library gives memory back by itself")
@pytest.mark.timeout(60)
def test_memory_comes_back_when_topics_are_forgotten() -> None:
    """60 MB of messages of a kilobyte: within a fifth of what it was before them."""
    lines = b"".join(b'{"topic":"t%d","data":"%b"}\n' % (n % 10, b"x" * 1000) for n in range(500))
    with (
        shell_daemon("true", CLEVRD_TOPIC_IDLE_S="1") as (process, port),
        closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection,
    ):
        before_bytes = rss_bytes(process)
        for _ in range(120):
            assert publish(connection, "/publish/batch", lines) == 200
        loaded_bytes = rss_bytes(process)

        deadline_s = time.monotonic() + 30
        while rss_bytes(process) > 1.2 * before_bytes and time.monotonic() < deadline_s:
            connection.request("GET", "/health/live")
            connection.getresponse().read()
            time.sleep(0.2)  # another process's timers

        assert loaded_bytes > before_bytes + 50 * MIB
        assert rss_bytes(process) <= 1.2 * before_bytes


@pytest.mark.long
@needs_proc
@pytest.mark.timeout(60)
def test_little_address_space_is_not_overdrawn() -> None:
    """Rings give up their oldest in time: no publish fails for want of memory."""
    body = json.dumps({"topic": "t", "data": "x" * 500_000}).encode()
    # What it takes before anything is in it, and 150 MB.
    setup = f'"{sys.executable}" -c "import clevrd.server.process" && ulimit -v 262144'
    with (
        shell_daemon(setup, CLEVRD_MAX_MEMORY_MB="1024") as (process, port),
        closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection,
    ):
        statuses = {publish(connection, "/publish", body) for _ in range(700)}

        is_running = process.poll() is None

    assert statuses == {200}
    assert is_running


def test_fault_of_the_process_leaves_a_trace() -> None:
    """A crash in an extension says where in Python it was."""
    with shell_daemon("ulimit -c 0") as (process, _):
        process.send_signal(signal.SIGSEGV)
        assert process.stderr is not None
        said = process.stderr.read()

    assert "Segmentation fault" in said
    assert "server/process.py" in said
