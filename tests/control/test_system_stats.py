"""Load figures: of the machine, of the cgroups we are in, of the loop and of this process."""

from __future__ import annotations

import gc
import math
import os
import resource
from pathlib import Path

import psutil
import pytest
from conftest import FakeClock
from fakes import at_once

from clevrd.control.system_stats import (
    MIN_INTERVAL_S,
    CpuTimes,
    LoadSample,
    MachineMemory,
    MemoryLevel,
    RealMachine,
    SystemStats,
    memory_limit_bytes,
    process_figures,
    process_memory,
)

MIB = 1024 * 1024
GIB = 1024 * MIB
NO_LIMIT_V1 = "9223372036854771712"


class FakeMachine:
    """A machine of two cores and 16 GiB whose counters are moved by hand; it starts idle."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.thread_s = 5.0
        self.busy_s = 100.0
        self.total_s = 1000.0
        self.memory_now = MachineMemory(16 * GIB, 12 * GIB)
        self.rss_now_bytes = 100 * MIB
        self.limits: list[MemoryLevel] = []

    def now_s(self) -> float:
        """Return the clock's time."""
        return self.clock()

    def thread_cpu_s(self) -> float:
        """Return the thread's counter."""
        return self.thread_s

    def cpu_times(self) -> CpuTimes:
        """Return the machine's counters."""
        return CpuTimes(self.busy_s, self.total_s)

    def memory(self) -> MachineMemory:
        """Return what memory was set to."""
        return self.memory_now

    def rss_bytes(self) -> int:
        """Return what the resident set was set to."""
        return self.rss_now_bytes

    def own_limits(self) -> list[MemoryLevel]:
        """Return what the process was limited to."""
        return self.limits

    def run(self, seconds: float, *, cores_busy: float = 0.0, loop_busy: float = 0.0) -> None:
        """Let time pass with so many cores busy, and so much of it in the loop's thread."""
        self.clock.advance(seconds)
        self.busy_s += cores_busy * seconds
        self.total_s += 2 * seconds
        self.thread_s += loop_busy * seconds


class LaterMachine(RealMachine):
    """The machine we run on, some time later."""

    later_s = 0.0

    def now_s(self) -> float:
        """Return the time it is said to be."""
        return super().now_s() + self.later_s


class FakeCgroups:
    """A tree of cgroup files and the process's own entry in it."""

    def __init__(self, root: Path, proc_self_cgroup: str) -> None:
        self.root = root / "cgroup"
        self.root.mkdir()
        self.proc = root / "self_cgroup"
        self.proc.write_text(proc_self_cgroup)

    def write(self, directory: str, **files: str | int) -> None:
        """Write files into a group's directory; a double underscore in a name is a dot."""
        path = self.root / directory
        path.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (path / name.replace("__", ".")).write_text(f"{text}\n")

    def stats(self, machine: FakeMachine, max_memory_bytes: int = 1 * GIB) -> SystemStats:
        """Return statistics of a process inside of this tree."""
        return SystemStats(
            max_memory_bytes, cgroup_root=self.root, proc_self_cgroup=self.proc, machine=machine
        )


@pytest.fixture
def machine() -> FakeMachine:
    """Return an idle machine."""
    return FakeMachine()


@pytest.fixture
def no_cgroups(tmp_path: Path) -> FakeCgroups:
    """Return a tree without a file in it."""
    return FakeCgroups(tmp_path, "")


@pytest.fixture
def v2(tmp_path: Path) -> FakeCgroups:
    """Return a version 2 tree with the process in /app.slice/clevrd.service, without limits."""
    tree = FakeCgroups(tmp_path, "0::/app.slice/clevrd.service\n")
    tree.write("", cpu__stat="usage_usec 0")
    tree.write("app.slice", memory__max="max", cpu__max="max 100000")
    tree.write("app.slice/clevrd.service", memory__max="max", cpu__max="max 100000")
    return tree


@pytest.fixture
def v1(tmp_path: Path) -> FakeCgroups:
    """Return a version 1 tree with the process in /docker/abc, without limits."""
    tree = FakeCgroups(
        tmp_path,
        "9:name=systemd:/docker/abc\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n",
    )
    for directory in ("", "/docker", "/docker/abc"):
        tree.write(f"memory{directory}", memory__limit_in_bytes=NO_LIMIT_V1)
        tree.write(f"cpu{directory}", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100_000)
    return tree


def test_cpu_is_the_busy_share_since_the_sample_before(
    machine: FakeMachine, no_cgroups: FakeCgroups
) -> None:
    """One of two cores busy is 0.5, whatever was before."""
    stats = no_cgroups.stats(machine)

    machine.run(1.0, cores_busy=1.0)
    first = stats.sample()
    machine.run(1.0, cores_busy=1.7)
    second = stats.sample()

    assert first.cpu_system == pytest.approx(0.5)
    assert second.cpu_system == pytest.approx(0.85)


def test_cpu_before_the_first_sample_is_unknown_and_memory_is_not(
    machine: FakeMachine, no_cgroups: FakeCgroups
) -> None:
    """What happened since boot is not load: CPU starts at 0, memory is measured at once."""
    stats = no_cgroups.stats(machine)

    latest = stats.latest

    assert (latest.cpu_system, latest.cpu_loop) == (0.0, 0.0)
    assert latest.memory_system == pytest.approx(0.25)
    assert latest.available_bytes == 12 * GIB


def test_saturated_loop_counts_as_cpu_on_an_idle_machine(
    machine: FakeMachine, no_cgroups: FakeCgroups
) -> None:
    """One busy loop is little to a big machine and everything to us."""
    stats = no_cgroups.stats(machine)

    machine.run(1.0, cores_busy=0.1, loop_busy=0.95)
    sample = stats.sample()

    assert sample.cpu_loop == pytest.approx(0.95)
    assert sample.cpu_system == pytest.approx(0.05)
    assert sample.cpu == sample.cpu_loop


def test_busy_machine_counts_as_cpu_with_an_idle_loop(
    machine: FakeMachine, no_cgroups: FakeCgroups
) -> None:
    """The larger of the two decides, whichever it is."""
    stats = no_cgroups.stats(machine)

    machine.run(1.0, cores_busy=1.8, loop_busy=0.1)
    sample = stats.sample()

    assert sample.cpu == sample.cpu_system == pytest.approx(0.9)


def test_sample_too_soon_after_the_last_answers_the_last(
    machine: FakeMachine, no_cgroups: FakeCgroups
) -> None:
    """Two callers in a row don't divide noise by nothing, and don't cut the next sample short."""
    stats = no_cgroups.stats(machine)
    machine.run(1.0, cores_busy=1.0)
    first = stats.sample()

    machine.run(MIN_INTERVAL_S / 2, cores_busy=2.0)
    too_soon = stats.sample()
    machine.run(1.0 - MIN_INTERVAL_S / 2, cores_busy=2.0)
    next_one = stats.sample()

    assert too_soon is first
    assert next_one.cpu_system == pytest.approx(1.0)


def test_counters_that_step_back_give_zero(machine: FakeMachine, no_cgroups: FakeCgroups) -> None:
    """The kernel's counters are not strictly monotonic; a share is never negative."""
    stats = no_cgroups.stats(machine)

    machine.run(1.0, cores_busy=-0.5, loop_busy=-1.0)
    sample = stats.sample()

    assert (sample.cpu_system, sample.cpu_loop) == (0.0, 0.0)


def test_process_memory_is_measured_against_our_own_limit(
    machine: FakeMachine, no_cgroups: FakeCgroups
) -> None:
    """900 MiB of an allowed 1 GiB is pressure, on a machine with plenty left."""
    machine.rss_now_bytes = 900 * MIB
    stats = no_cgroups.stats(machine, max_memory_bytes=1 * GIB)

    latest = stats.latest

    assert latest.rss_bytes == 900 * MIB
    assert latest.memory == latest.memory_process == pytest.approx(900 / 1024)


def test_process_over_its_limit_shows_as_all_of_it(
    machine: FakeMachine, no_cgroups: FakeCgroups
) -> None:
    """Shares end at 1."""
    machine.rss_now_bytes = 3 * GIB
    stats = no_cgroups.stats(machine, max_memory_bytes=1 * GIB)

    assert stats.latest.memory_process == 1.0


def test_memory_is_the_larger_of_system_and_process() -> None:
    """A full machine counts, however small we are."""
    sample = LoadSample(
        cpu_system=0.1,
        cpu_loop=0.2,
        memory_system=0.9,
        memory_process=0.3,
        rss_bytes=1,
        available_bytes=1,
    )

    assert (sample.cpu, sample.memory) == (0.2, 0.9)


@pytest.mark.parametrize("limit", [0, -1])
def test_senseless_memory_limit_is_refused(machine: FakeMachine, limit: int) -> None:
    """There is no share of nothing."""
    with pytest.raises(ValueError, match="above 0"):
        SystemStats(limit, machine=machine)


def test_v2_group_without_limits_leaves_the_machine(machine: FakeMachine, v2: FakeCgroups) -> None:
    """The word "max" is no limit."""
    stats = v2.stats(machine)

    machine.run(1.0, cores_busy=1.0)
    sample = stats.sample()

    assert sample.memory_system == pytest.approx(0.25)
    assert sample.available_bytes == 12 * GIB
    assert sample.cpu_system == pytest.approx(0.5)
    assert memory_limit_bytes(v2.root, v2.proc, machine) == 16 * GIB


def test_v2_memory_limit_counts_without_idle_page_cache(
    machine: FakeMachine, v2: FakeCgroups
) -> None:
    """900 MiB of 1 GiB in use, 700 of them cache nobody touched: 200 MiB are used."""
    v2.write(
        "app.slice/clevrd.service",
        memory__max=1 * GIB,
        memory__current=900 * MIB,
        memory__stat=f"anon 1\nfile 2\ninactive_file {700 * MIB}\nactive_file 3",
    )

    stats = v2.stats(machine)

    assert stats.latest.memory_system == pytest.approx(0.25)  # the machine's, still the larger
    assert stats.latest.available_bytes == (1024 - 200) * MIB
    assert memory_limit_bytes(v2.root, v2.proc, machine) == 1 * GIB


def test_v2_nearly_full_group_counts_on_an_empty_machine(
    machine: FakeMachine, v2: FakeCgroups
) -> None:
    """What the container may use is what there is."""
    v2.write(
        "app.slice/clevrd.service",
        memory__max=1000 * MIB,
        memory__current=900 * MIB,
        memory__stat="inactive_file 0",
    )

    stats = v2.stats(machine)

    assert stats.latest.memory_system == pytest.approx(0.9)
    assert stats.latest.available_bytes == 100 * MIB


def test_v2_limit_of_a_parent_counts(machine: FakeMachine, v2: FakeCgroups) -> None:
    """Siblings eat from the same plate: the parent's use against the parent's limit."""
    v2.write(
        "app.slice/clevrd.service",
        memory__max=1000 * MIB,
        memory__current=100 * MIB,
        memory__stat="inactive_file 0",
    )
    v2.write(
        "app.slice",
        memory__max=800 * MIB,
        memory__current=760 * MIB,
        memory__stat="inactive_file 0",
    )

    stats = v2.stats(machine)

    assert stats.latest.memory_system == pytest.approx(0.95)
    assert stats.latest.available_bytes == 40 * MIB
    assert memory_limit_bytes(v2.root, v2.proc, machine) == 800 * MIB


def test_v2_limit_changed_while_running_is_seen(machine: FakeMachine, v2: FakeCgroups) -> None:
    """An operator's new limit counts from the next sample on."""
    v2.write("app.slice/clevrd.service", memory__max=1000 * MIB, memory__current=500 * MIB)
    stats = v2.stats(machine)

    v2.write("app.slice/clevrd.service", memory__max=625 * MIB)
    machine.run(1.0)
    sample = stats.sample()

    assert sample.memory_system == pytest.approx(0.8)


def test_group_over_its_limit_has_nothing_available(machine: FakeMachine, v2: FakeCgroups) -> None:
    """A limit lowered below the use leaves zero, not less."""
    v2.write("app.slice/clevrd.service", memory__max=100 * MIB, memory__current=150 * MIB)

    stats = v2.stats(machine)

    assert (stats.latest.memory_system, stats.latest.available_bytes) == (1.0, 0)


def test_v2_container_sees_its_own_group_at_the_root(machine: FakeMachine, tmp_path: Path) -> None:
    """In a cgroup namespace the path is "/" and the limits are in the mount itself."""
    tree = FakeCgroups(tmp_path, "0::/\n")
    tree.write("", memory__max=1000 * MIB, memory__current=850 * MIB)

    stats = tree.stats(machine)

    assert stats.latest.memory_system == pytest.approx(0.85)


@pytest.mark.parametrize(
    "path", ["/docker/0123/not/mounted/here", "/../../init.scope", "/" + "x" * 300]
)
def test_path_that_is_not_mounted_falls_back_to_the_root(
    machine: FakeMachine, tmp_path: Path, path: str
) -> None:
    """A host's path means nothing in a container; what is mounted does."""
    tree = FakeCgroups(tmp_path, f"0::{path}\n")
    tree.write("", memory__max=1000 * MIB, memory__current=850 * MIB)
    (tmp_path / "init.scope").mkdir()

    stats = tree.stats(machine)

    assert stats.latest.memory_system == pytest.approx(0.85)


def test_group_outside_of_the_mount_is_not_mistaken_for_one_inside(
    machine: FakeMachine, tmp_path: Path
) -> None:
    """The path "/../a" is a sibling of what we see: the "a" in here is somebody else's."""
    tree = FakeCgroups(tmp_path, "0::/../a\n")
    for directory in ("a", "../a"):
        tree.write(directory, memory__max=1000 * MIB, memory__current=1000 * MIB)

    stats = tree.stats(machine)

    assert stats.latest.memory_system == pytest.approx(0.25)


def test_v2_cpu_is_relative_to_the_quota(machine: FakeMachine, v2: FakeCgroups) -> None:
    """Half a CPU allowed, 0.45 used: 90 % of what we may have, a fifth of the machine."""
    group = "app.slice/clevrd.service"
    v2.write(group, cpu__max="50000 100000", cpu__stat="usage_usec 7000000\nuser_usec 1")
    stats = v2.stats(machine)

    v2.write(group, cpu__stat="usage_usec 7450000\nuser_usec 1")
    machine.run(1.0, cores_busy=0.45)
    sample = stats.sample()

    assert sample.cpu_system == pytest.approx(0.9)


def test_v2_cpu_quota_of_a_parent_counts(machine: FakeMachine, v2: FakeCgroups) -> None:
    """The tightest of all levels decides, with what its whole group used."""
    v2.write("app.slice", cpu__max="100000 100000", cpu__stat="usage_usec 0")
    v2.write("app.slice/clevrd.service", cpu__max="100000 100000", cpu__stat="usage_usec 0")
    stats = v2.stats(machine)

    v2.write("app.slice", cpu__stat="usage_usec 1900000")
    v2.write("app.slice/clevrd.service", cpu__stat="usage_usec 200000")
    machine.run(2.0, cores_busy=1.0)
    sample = stats.sample()

    assert sample.cpu_system == pytest.approx(0.95)


def test_busier_machine_counts_more_than_an_idle_quota(
    machine: FakeMachine, v2: FakeCgroups
) -> None:
    """A quota is worth nothing when the neighbours have the cores."""
    group = "app.slice/clevrd.service"
    v2.write(group, cpu__max="100000 100000", cpu__stat="usage_usec 0")
    stats = v2.stats(machine)

    v2.write(group, cpu__stat="usage_usec 100000")
    machine.run(1.0, cores_busy=1.9)
    sample = stats.sample()

    assert sample.cpu_system == pytest.approx(0.95)


def test_quota_set_while_running_counts_from_its_second_reading(
    machine: FakeMachine, v2: FakeCgroups
) -> None:
    """Usage since the group was made is not usage since the last sample."""
    group = "app.slice/clevrd.service"
    stats = v2.stats(machine)
    v2.write(group, cpu__max="50000 100000", cpu__stat="usage_usec 900000000")
    machine.run(1.0)
    first = stats.sample()

    v2.write(group, cpu__stat="usage_usec 900250000")
    machine.run(1.0)
    second = stats.sample()

    assert first.cpu_system == 0.0
    assert second.cpu_system == pytest.approx(0.5)


def test_v1_sentinel_is_no_limit(machine: FakeMachine, v1: FakeCgroups) -> None:
    """The huge number that version 1 shows for "none" limits nothing."""
    v1.write("memory/docker/abc", memory__usage_in_bytes=15 * GIB)

    stats = v1.stats(machine)

    assert stats.latest.memory_system == pytest.approx(0.25)
    assert memory_limit_bytes(v1.root, v1.proc, machine) == 16 * GIB


def test_v1_memory_limit_counts_without_idle_page_cache(
    machine: FakeMachine, v1: FakeCgroups
) -> None:
    """The field of the whole subtree is the one that goes with the usage."""
    v1.write(
        "memory/docker",
        memory__limit_in_bytes=1000 * MIB,
        memory__usage_in_bytes=950 * MIB,
        memory__stat=f"inactive_file 0\ntotal_inactive_file {100 * MIB}",
    )

    stats = v1.stats(machine)

    assert stats.latest.memory_system == pytest.approx(0.85)
    assert stats.latest.available_bytes == 150 * MIB
    assert memory_limit_bytes(v1.root, v1.proc, machine) == 1000 * MIB


def test_v1_cpu_is_relative_to_the_quota(machine: FakeMachine, v1: FakeCgroups) -> None:
    """Version 1 keeps quota and usage in two trees, and usage in nanoseconds."""
    v1.write("cpu/docker/abc", cpu__cfs_quota_us=50_000)
    v1.write("cpuacct/docker/abc", cpuacct__usage=7_000_000_000)
    stats = v1.stats(machine)

    v1.write("cpuacct/docker/abc", cpuacct__usage=7_450_000_000)
    machine.run(1.0, cores_busy=0.45)
    sample = stats.sample()

    assert sample.cpu_system == pytest.approx(0.9)


def test_unreadable_files_leave_the_machine(machine: FakeMachine, v2: FakeCgroups) -> None:
    """Garbage, emptiness and directories in place of files are no figures, and no errors."""
    group = v2.root / "app.slice/clevrd.service"
    v2.write("app.slice/clevrd.service", memory__max="lots", cpu__max="50000")
    v2.write(
        "app.slice", memory__max=0, memory__current=5, cpu__max="0 0", cpu__stat="usage_usec 1"
    )
    v2.write("", cpu__max="50000 100000", cpu__stat="usage_usec")
    (group / "memory.current").mkdir()
    (v2.root / "memory.max").write_bytes(b"\xff\xfe")

    stats = v2.stats(machine)
    machine.run(1.0, cores_busy=1.0)
    sample = stats.sample()

    assert sample.memory_system == pytest.approx(0.25)
    assert sample.cpu_system == pytest.approx(0.5)
    assert memory_limit_bytes(v2.root, v2.proc, machine) == 16 * GIB


def test_group_that_vanishes_leaves_the_machine(machine: FakeMachine, v2: FakeCgroups) -> None:
    """Files that go away while we run are missing figures, not a failure."""
    group = "app.slice/clevrd.service"
    v2.write(group, memory__max=1 * GIB, memory__current=1 * GIB)
    v2.write(group, cpu__max="50000 100000", cpu__stat="usage_usec 0")
    stats = v2.stats(machine)

    for path in (v2.root / group).iterdir():
        path.unlink()
    machine.run(1.0, cores_busy=1.0)
    sample = stats.sample()

    assert sample.memory_system == pytest.approx(0.25)
    assert sample.cpu_system == pytest.approx(0.5)


def test_no_cgroups_at_all_leaves_the_machine(machine: FakeMachine, tmp_path: Path) -> None:
    """Neither the tree nor the process's entry has to exist."""
    stats = SystemStats(
        1 * GIB,
        cgroup_root=tmp_path / "none",
        proc_self_cgroup=tmp_path / "none either",
        machine=machine,
    )

    assert stats.latest.memory_system == pytest.approx(0.25)
    assert memory_limit_bytes(tmp_path / "none", tmp_path / "none either", machine) == 16 * GIB


def test_limit_of_the_process_itself_counts(machine: FakeMachine, no_cgroups: FakeCgroups) -> None:
    """Of 400 MiB of address space 280 are mapped, of which 100 are used: 220 may be used in all."""
    machine.limits = [MemoryLevel(400 * MIB, 280 * MIB), MemoryLevel(1 * GIB, 100 * MIB)]

    limit_bytes = memory_limit_bytes(no_cgroups.root, no_cgroups.proc, machine)
    sample = no_cgroups.stats(machine).latest

    assert limit_bytes == 220 * MIB
    assert sample.memory_system == pytest.approx(0.7)
    assert sample.available_bytes == 120 * MIB


def test_process_over_its_own_limit_has_nothing_left(
    machine: FakeMachine, no_cgroups: FakeCgroups
) -> None:
    """A limit can be lowered below what is in use."""
    machine.limits = [MemoryLevel(100 * MIB, 300 * MIB)]

    assert memory_limit_bytes(no_cgroups.root, no_cgroups.proc, machine) == 1
    assert no_cgroups.stats(machine).latest.available_bytes == 0


def test_real_limits_are_those_that_are_set() -> None:
    """Both kinds, with what the process has of each; none where there are none."""
    before = RealMachine().own_limits()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)

    resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, hard))
    try:
        (*_, data) = RealMachine().own_limits()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    assert data.limit_bytes == 1 << 40
    assert 1 * MIB < data.used_bytes < 1 << 40
    assert len(before) == sum(
        resource.getrlimit(kind)[0] != resource.RLIM_INFINITY
        for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    )


def test_memory_limit_is_known_before_there_is_a_daemon(v2: FakeCgroups) -> None:
    """A configured limit can be checked against the container's at the start."""
    v2.write("app.slice", memory__max=64 * MIB)

    limit_bytes = memory_limit_bytes(v2.root, v2.proc)

    assert limit_bytes == 64 * MIB


def test_real_machine_gives_figures_that_hang_together() -> None:
    """On the machine that runs this test every figure is within its range."""
    stats = SystemStats(64 * GIB)

    latest = stats.latest

    assert 0.0 < latest.memory_system < 1.0
    assert 0.0 < latest.memory_process < 1.0
    assert latest.rss_bytes > 1 * MIB
    assert 0 < latest.available_bytes < psutil.virtual_memory().total
    assert latest.rss_bytes < memory_limit_bytes() <= psutil.virtual_memory().total


def test_real_counters_rise_by_the_time_that_is_spent() -> None:
    """Work shows in the thread's CPU time, and busy time is a part of all time."""
    machine = RealMachine()
    started_s, thread_s = machine.now_s(), machine.thread_cpu_s()

    sum(range(200_000))

    assert 0.0 < machine.thread_cpu_s() - thread_s <= machine.now_s() - started_s + 0.01
    times = machine.cpu_times()
    assert 0.0 < times.busy_s < times.total_s


def test_waiting_for_a_disk_is_idle_and_guests_count_once(tmp_path: Path) -> None:
    """Of 100 s: 60 idle, 10 waiting, 30 busy; the guests' 5 are in the 30 already."""
    ticks = os.sysconf("SC_CLK_TCK")
    seconds = (20, 0, 10, 60, 10, 0, 0, 0, 5, 0)
    line = "cpu  " + " ".join(str(each * ticks) for each in seconds)
    (tmp_path / "stat").write_text(f"{line}\ncpu0 1 2 3\n")

    times = RealMachine(tmp_path).cpu_times()

    assert times == CpuTimes(busy_s=30.0, total_s=100.0)


def test_without_the_files_of_proc_psutil_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS; the same of it counts."""
    names = psutil.cpu_times()._fields
    seconds = {"user": 20.0, "system": 10.0, "idle": 60.0, "iowait": 10.0, "guest": 5.0}
    fake = type(psutil.cpu_times())(*(seconds.get(name, 0.0) for name in names))
    monkeypatch.setattr(psutil, "cpu_times", lambda: fake)
    machine = RealMachine(tmp_path)

    assert machine.cpu_times() == CpuTimes(busy_s=30.0, total_s=100.0)
    assert machine.memory().total_bytes == psutil.virtual_memory().total
    assert machine.rss_bytes() > 1 * MIB


def test_figures_are_those_of_psutil() -> None:
    """The files are read as psutil reads them."""
    machine = RealMachine()

    total_s = sum(psutil.cpu_times()[:8])

    assert machine.cpu_times().total_s == pytest.approx(total_s, rel=0.01)
    assert machine.memory().total_bytes == psutil.virtual_memory().total
    assert machine.memory().available_bytes == pytest.approx(
        psutil.virtual_memory().available, rel=0.2
    )
    assert machine.rss_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)


def test_readings_need_no_descriptor(v2: FakeCgroups) -> None:
    """A daemon that has run out of descriptors still knows its load, in its cgroup too."""
    group = "app.slice/clevrd.service"
    v2.write(group, memory__max=1 * GIB, memory__current=MIB, memory__stat="inactive_file 0")
    v2.write(group, cpu__max="50000 100000", cpu__stat="usage_usec 0")
    machine = LaterMachine()
    stats = SystemStats(64 * GIB, cgroup_root=v2.root, proc_self_cgroup=v2.proc, machine=machine)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    v2.write(group, memory__current=1 * GIB)
    machine.later_s = 1.0
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)

    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.open(os.devnull, os.O_RDONLY)
        sample = stats.sample()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert sample.memory_system == 1.0
    assert sample.available_bytes == 0
    assert sample.rss_bytes > 1 * MIB


def test_process_figures_are_those_of_this_process() -> None:
    """What /health shows agrees with what the kernel and the interpreter say."""
    figures = at_once(process_figures())

    assert 1 * MIB < figures.rss_bytes <= figures.peak_rss_bytes
    assert figures.virtual_bytes >= figures.rss_bytes
    assert figures.threads >= 1
    assert figures.gc_collections <= sum(g["collections"] for g in gc.get_stats())


def test_open_descriptor_and_collection_are_counted() -> None:
    """One more of each is one more in the figures."""
    # What earlier tests left for the collector holds descriptors.
    gc.collect()
    before = at_once(process_figures())
    descriptor = os.open(os.devnull, os.O_RDONLY)

    try:
        gc.collect()
        after = at_once(process_figures())
    finally:
        os.close(descriptor)

    assert after.open_fds == before.open_fds + 1
    assert after.gc_collections > before.gc_collections


def test_peak_is_the_high_water_mark_of_the_kernel(tmp_path: Path) -> None:
    """VmHWM is in KiB."""
    status = tmp_path / "status"
    status.write_text("Name:\tclevrd\nVmPeak:\t 999999999 kB\nVmHWM:\t  50000000 kB\nThreads:\t1\n")

    figures = process_memory(status)

    assert figures.peak_rss_bytes == 50_000_000 * 1024


def test_peak_without_proc_is_that_of_getrusage(tmp_path: Path) -> None:
    """Where the kernel shows no high-water mark, what was once used is still known."""
    once_used = b"x" * (64 * MIB)
    del once_used

    figures = process_memory(tmp_path / "missing")

    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert math.isclose(figures.peak_rss_bytes, peak_kib * 1024, rel_tol=0.05)


def test_memory_is_known_without_counting_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 10,000 connections that takes 8 ms, and /health is asked often and shows none."""

    def refuse(process: psutil.Process) -> int:
        raise AssertionError("descriptors were counted")

    monkeypatch.setattr(psutil.Process, "num_fds", refuse)

    memory = process_memory()

    assert 1 * MIB < memory.rss_bytes <= memory.peak_rss_bytes
