"""CPU, memory and event-loop load as plain figures. Measures only.

This module alone reads the machine: psutil, /proc, and the cgroups of this process, whose limits
are those of a container. Sources: kernel Documentation/admin-guide/cgroup-v2.rst (memory.*,
cpu.max, cpu.stat), cgroup-v1/memory.rst, and cgroups(7) for /proc/self/cgroup.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple, Protocol

import msgspec
import psutil

from clevrd.control.kernel_files import KernelFiles

CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
PROC_SELF_CGROUP: Final = Path("/proc/self/cgroup")
PROC_SELF_STATUS: Final = Path("/proc/self/status")
PROC_SELF_FD: Final = Path("/proc/self/fd")
PROC: Final = Path("/proc")

# Shortest time between two samples. The kernel counts CPU time in ticks of 10 ms, so over less than
# ten of them a share is noise.
MIN_INTERVAL_S: Final = 0.1

# The share of its limit that a daemon with nothing in it takes at most.
_EMPTY_SHARE: Final = 0.75

# Descriptors that are counted in one step.
_DESCRIPTORS_PER_STEP: Final = 512

# From this size on a limit is none. cgroup v1 has no word for "no limit" and shows the largest
# multiple of a page, near 2^63. As a limit it would change no figure; treating it as none saves
# reading the usage.
NO_LIMIT_BYTES: Final = 1 << 62


class LoadSample(msgspec.Struct, frozen=True):
    """The load of the machine and of this process; shares are 0..1.

    `cpu_system` is the share of the whole machine's CPU, or of the cgroup's CPU quota if that is
    larger. `cpu_loop` is the share of time in which the event loop's thread ran. `memory_system` is
    the used share of the machine or of the tightest limit, `memory_process` the resident set as a
    share of `max_memory_mb`. `available_bytes` is the least that the machine and any limit have
    left.
    """

    cpu_system: float
    cpu_loop: float
    memory_system: float
    memory_process: float
    rss_bytes: int
    available_bytes: int

    @property
    def cpu(self) -> float:
        """The larger CPU share: one saturated loop is 6 % of 16 cores, and still the bottleneck."""
        return max(self.cpu_system, self.cpu_loop)

    @property
    def memory(self) -> float:
        """The larger share: of the system's memory, or of this process's own limit."""
        return max(self.memory_system, self.memory_process)


class ProcessMemory(msgspec.Struct, frozen=True):
    """This process's memory, for people; `gc_collections` counts since its start."""

    rss_bytes: int
    peak_rss_bytes: int
    virtual_bytes: int
    gc_collections: int


class ProcessFigures(ProcessMemory, frozen=True):
    """This process's memory, descriptors and threads, for people."""

    open_fds: int
    # The soft limit on descriptors.
    max_fds: int
    threads: int


class CpuTimes(NamedTuple):
    """CPU time of all cores together since boot."""

    busy_s: float
    total_s: float


class MachineMemory(NamedTuple):
    """Memory of the machine; `available_bytes` can be had without swapping."""

    total_bytes: int
    available_bytes: int


class MemoryLevel(NamedTuple):
    """One limit on memory, and the bytes used of it, without idle page cache."""

    limit_bytes: int
    used_bytes: int


class HeldMemory(msgspec.Struct, frozen=True):
    """The use of the tightest limit on this process's memory, without what can be freed."""

    used_bytes: int
    limit_bytes: int
    # The limit's name, for people.
    limit: str

    @property
    def share(self) -> float:
        """The used share of the limit; more than 1 where the limit is passed."""
        return self.used_bytes / self.limit_bytes


# The use of memory where nothing is known.
NOTHING_HELD: Final = HeldMemory(0, 1, "no limit")


class CpuLevel(NamedTuple):
    """One cgroup that limits CPU: its quota in CPUs, and CPU time used since it was made."""

    quota_cpus: float
    used_s: float


class Machine(Protocol):
    """The figures of the machine, the process and the calling thread that a sample needs."""

    def now_s(self) -> float:
        """Return monotonic seconds."""
        ...

    def thread_cpu_s(self) -> float:
        """Return the CPU time of the calling thread."""
        ...

    def cpu_times(self) -> CpuTimes:
        """Return the CPU time of all cores."""
        ...

    def memory(self) -> MachineMemory:
        """Return the machine's memory, cgroups aside."""
        ...

    def rss_bytes(self) -> int:
        """Return this process's resident set."""
        ...

    def own_limits(self) -> list[MemoryLevel]:
        """Return the process's own limits on memory, and its use of each."""
        ...


class RealMachine:
    """The machine that this process runs on."""

    def __init__(self, proc: Path = PROC) -> None:
        self._files = KernelFiles()
        self._stat, self._meminfo = proc / "stat", proc / "meminfo"
        self._own_statm = proc / "self/statm"
        self._process = psutil.Process()
        self._ticks_per_s = os.sysconf("SC_CLK_TCK")
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")

    def now_s(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    def thread_cpu_s(self) -> float:
        """Return the CPU time of the calling thread."""
        return time.thread_time()

    def cpu_times(self) -> CpuTimes:
        """Return the CPU time of all cores; waiting for a disk is idle, stolen time is busy.

        proc(5), /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal, and the guests'
        time, which is part of user and nice already.
        """
        words = (self._files.text(self._stat) or "").partition("\n")[0].split()
        if len(words) >= 6 and words[0] == "cpu":
            ticks = [int(word) for word in words[1:9]]
            total_s = sum(ticks) / self._ticks_per_s
            return CpuTimes(total_s - (ticks[3] + ticks[4]) / self._ticks_per_s, total_s)
        times = psutil.cpu_times()._asdict()
        total_s = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
        return CpuTimes(total_s - times["idle"] - times.get("iowait", 0.0), total_s)

    def memory(self) -> MachineMemory:
        """Return the machine's memory, cgroups aside."""
        text = self._files.text(self._meminfo) or ""
        total_kib, available_kib = _field(text, "MemTotal:"), _field(text, "MemAvailable:")
        if total_kib is not None and available_kib is not None:
            return MachineMemory(total_kib * 1024, available_kib * 1024)
        memory = psutil.virtual_memory()
        return MachineMemory(memory.total, memory.available)

    def rss_bytes(self) -> int:
        """Return this process's resident set."""
        words = (self._files.text(self._own_statm) or "").split()
        if len(words) > 1:
            return int(words[1]) * self._page_bytes
        return int(self._process.memory_info().rss)

    def own_limits(self) -> list[MemoryLevel]:
        """Return the limits on address space and data, if any (`ulimit -v`, `-d`).

        setrlimit(2): RLIMIT_AS, and RLIMIT_DATA, which counts private mappings since Linux 4.7.
        proc(5), /proc/pid/statm: the first figure and the sixth, in pages.
        """
        words = (self._files.text(self._own_statm) or "").split()
        if len(words) < 6:
            return []
        used = {resource.RLIMIT_AS: int(words[0]), resource.RLIMIT_DATA: int(words[5])}
        return [
            MemoryLevel(limit_bytes, pages * self._page_bytes)
            for kind, pages in used.items()
            if (limit_bytes := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY
        ]


class _MemoryFiles(NamedTuple):
    """Names of files and fields in a cgroup's directory."""

    limit: str
    used: str
    idle_cache_field: str
    busy_cache_field: str


_MEMORY_V2: Final = _MemoryFiles("memory.max", "memory.current", "inactive_file", "active_file")
_MEMORY_V1: Final = _MemoryFiles(
    "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"
)


class Cgroups:
    """The cgroups this process is in, from its own up to the root: limits in parents bind too.

    A file that is missing or unreadable sets no limit, so without cgroups only the machine does.
    Versions 1, 2 and both side by side are read. The process's place among the cgroups is read
    once, at the start; limits are read each time, since they can change while it runs.
    """

    def __init__(self, root: Path = CGROUP_ROOT, proc_self_cgroup: Path = PROC_SELF_CGROUP) -> None:
        self._files = KernelFiles()
        paths = _paths_by_controller(_read_once(proc_self_cgroup))
        unified = _levels(root, paths.get("", "/"))
        self._root = root
        self._is_cpu_v1 = "cpu" in paths
        self._memory_files = _MEMORY_V1 if "memory" in paths else _MEMORY_V2
        # A controller is bound to version 1 or to version 2, never to both: cgroups(7).
        memory_dirs = _levels(root / "memory", paths["memory"]) if "memory" in paths else unified
        # For each cgroup the files with its limit, its use and its figures. Made once, since the
        # memory ladder asks ten times a second: to make the paths took four fifths of each look.
        self._memory_paths = tuple(
            (each / self._memory_files.limit, each / self._memory_files.used, each / "memory.stat")
            for each in memory_dirs
        )
        self._cpu_dirs = _levels(root / "cpu", paths["cpu"]) if self._is_cpu_v1 else unified

    def memory_levels(self) -> Iterator[MemoryLevel]:
        """Yield each cgroup that limits memory."""
        # Page cache that was not used lately is freed as soon as memory is needed.
        return self._levels_without(self._memory_files.idle_cache_field)

    def held_levels(self) -> Iterator[MemoryLevel]:
        """Yield each cgroup that limits memory, and what it uses without any page cache.

        The kernel frees all of the cache before it ends a process.
        """
        files = self._memory_files
        return self._levels_without(files.idle_cache_field, files.busy_cache_field)

    def _levels_without(self, *cache_fields: str) -> Iterator[MemoryLevel]:
        for limit, used, figures in self._memory_paths:
            limit_bytes = self._limit_bytes(limit)
            if limit_bytes is None or (used_bytes := self._number(used)) is None:
                continue
            stat = self._files.text(figures) or ""
            cache_bytes = sum(_field(stat, name) or 0 for name in cache_fields)
            yield MemoryLevel(limit_bytes, max(0, used_bytes - cache_bytes))

    def memory_limits(self) -> Iterator[int]:
        """Yield each limit on memory, in bytes."""
        for limit, _, _ in self._memory_paths:
            limit_bytes = self._limit_bytes(limit)
            if limit_bytes is not None:
                yield limit_bytes

    def cpu_levels(self) -> dict[Path, CpuLevel]:
        """Return each cgroup that limits CPU, by its directory."""
        read = self._cpu_level_v1 if self._is_cpu_v1 else self._cpu_level_v2
        levels = {directory: read(directory) for directory in self._cpu_dirs}
        return {directory: level for directory, level in levels.items() if level is not None}

    def _cpu_level_v1(self, directory: Path) -> CpuLevel | None:
        quota_us = self._number(directory / "cpu.cfs_quota_us")
        period_us = self._number(directory / "cpu.cfs_period_us")
        # The usage is a file of another controller, in a tree of the same shape.
        path = directory.relative_to(self._root / "cpu")
        used_ns = self._number(self._root / "cpuacct" / path / "cpuacct.usage")
        return _cpu_level(quota_us, period_us, None if used_ns is None else used_ns / 1e9)

    def _cpu_level_v2(self, directory: Path) -> CpuLevel | None:
        """Read cpu.max, "<quota> <period>" in microseconds or "max <period>", and the usage."""
        quota, _, period = (self._files.text(directory / "cpu.max") or "").partition(" ")
        used_us = _field(self._files.text(directory / "cpu.stat") or "", "usage_usec")
        return _cpu_level(_int(quota), _int(period), None if used_us is None else used_us / 1e6)

    def _limit_bytes(self, path: Path) -> int | None:
        """Return the limit in a file; None without one, or for 0, which can't be a limit here."""
        limit_bytes = self._number(path)
        if limit_bytes is None or not 0 < limit_bytes < NO_LIMIT_BYTES:
            return None
        return limit_bytes

    def _number(self, path: Path) -> int | None:
        """Return the number in a file; None for "max", or if the file can't be read."""
        return _int(self._files.text(path) or "")


class _Marks(NamedTuple):
    """Counters at one moment; the differences of two give the shares."""

    at_s: float
    thread_cpu_s: float
    machine: CpuTimes
    cgroups: dict[Path, CpuLevel]


class SystemStats:
    """Samples the load for the control loops, since the sample before.

    Its files are opened at the start, so that a sample needs no descriptor.

    It has to be made and used on the event loop's thread: the loop's share is that thread's CPU
    time. A sample covers the time since the one before, so only the control loops may call
    sample(); others read the hub's `last_load`. A sample reads about ten small files in about 0.2
    ms.
    """

    def __init__(
        self,
        max_memory_bytes: int,
        *,
        cgroup_root: Path = CGROUP_ROOT,
        proc_self_cgroup: Path = PROC_SELF_CGROUP,
        machine: Machine | None = None,
    ) -> None:
        """Read the counters that the first sample is compared with."""
        if max_memory_bytes <= 0:
            raise ValueError(f"max_memory_bytes must be above 0, not {max_memory_bytes!r}")
        self._max_memory_bytes = max_memory_bytes
        self._machine = machine or RealMachine()
        # Limit on the resident set in `held_memory`.
        self._own_limit_bytes = own_limit_bytes(max_memory_bytes, self._machine.rss_bytes())
        self._cgroups = Cgroups(cgroup_root, proc_self_cgroup)
        self._marks = self._read_marks()
        # The newest sample. Before the first one, memory is measured, and CPU is unknown and 0.
        # Replaced by sample() alone.
        self.latest = self._load(cpu_system=0.0, cpu_loop=0.0)

    def sample(self) -> LoadSample:
        """Measure the load since the sample before; keep it as `latest` and return it.

        A second call within MIN_INTERVAL_S returns `latest` and measures no load.
        """
        before, after = self._marks, self._read_marks()
        wall_s = after.at_s - before.at_s
        if wall_s < MIN_INTERVAL_S:
            return self.latest
        self._marks = after
        self.latest = self._load(
            cpu_system=max(
                _ratio(
                    after.machine.busy_s - before.machine.busy_s,
                    after.machine.total_s - before.machine.total_s,
                ),
                _quota_ratio(before.cgroups, after.cgroups, wall_s),
            ),
            cpu_loop=_ratio(after.thread_cpu_s - before.thread_cpu_s, wall_s),
        )
        return self.latest

    def held_memory(self) -> HeldMemory:
        """Return what is used of the tightest limit: this process's own, or that of a cgroup.

        The machine's memory is no limit here, since others use that too. It takes some 40 us,
        and a few more for each cgroup that limits memory.
        """
        rss_bytes = self._machine.rss_bytes()
        tightest = HeldMemory(rss_bytes, self._own_limit_bytes, "CLEVRD_MAX_MEMORY_MB")
        for level in self._cgroups.held_levels():
            of_group = HeldMemory(level.used_bytes, level.limit_bytes, "the cgroup's limit")
            tightest = max(tightest, of_group, key=_share)
        for level in self._machine.own_limits():
            # Address space that is mapped and never used counts in the limit, and is no memory.
            left_bytes = max(0, level.limit_bytes - level.used_bytes)
            own = HeldMemory(rss_bytes, rss_bytes + left_bytes or 1, "the process's limit")
            tightest = max(tightest, own, key=_share)
        return tightest

    def _read_marks(self) -> _Marks:
        machine = self._machine
        return _Marks(
            at_s=machine.now_s(),
            thread_cpu_s=machine.thread_cpu_s(),
            machine=machine.cpu_times(),
            cgroups=self._cgroups.cpu_levels(),
        )

    def _load(self, cpu_system: float, cpu_loop: float) -> LoadSample:
        memory = self._machine.memory()
        machine_used_bytes = memory.total_bytes - memory.available_bytes
        levels = [MemoryLevel(memory.total_bytes, machine_used_bytes)]
        levels += self._cgroups.memory_levels()
        levels += self._machine.own_limits()
        rss_bytes = self._machine.rss_bytes()
        return LoadSample(
            cpu_system=cpu_system,
            cpu_loop=cpu_loop,
            memory_system=max(_ratio(level.used_bytes, level.limit_bytes) for level in levels),
            memory_process=_ratio(rss_bytes, self._max_memory_bytes),
            rss_bytes=rss_bytes,
            available_bytes=max(0, min(level.limit_bytes - level.used_bytes for level in levels)),
        )


def own_limit_bytes(max_memory_bytes: int, empty_bytes: int) -> int:
    """Return the limit on the resident set that counts: the configured one, or a higher one.

    A daemon that is told to take less than its modules need would refuse everything for ever.

    Args:
        empty_bytes: the resident set of a daemon with nothing in it.
    """
    return max(max_memory_bytes, int(empty_bytes / _EMPTY_SHARE))


def resident_bytes() -> int:
    """Return this process's resident set, in some 20 us."""
    return RealMachine().rss_bytes()


def memory_limit_bytes(
    cgroup_root: Path = CGROUP_ROOT,
    proc_self_cgroup: Path = PROC_SELF_CGROUP,
    machine: Machine | None = None,
) -> int:
    """Return the least of the machine's memory, each cgroup's limit and the process's own limits.

    Used to cut the configured limit, before there is a SystemStats. A limit on address space also
    counts memory that is mapped and never used, so the bytes left of it are added to the resident
    set.
    """
    machine = machine or RealMachine()
    rss_bytes = machine.rss_bytes()
    own = (rss_bytes + level.limit_bytes - level.used_bytes for level in machine.own_limits())
    cgroups = Cgroups(cgroup_root, proc_self_cgroup).memory_limits()
    return max(1, min((machine.memory().total_bytes, *cgroups, *own)))


def process_memory(proc_self_status: Path = PROC_SELF_STATUS) -> ProcessMemory:
    """Return the memory this process uses now, in some 60 us."""
    memory = psutil.Process().memory_info()
    return ProcessMemory(
        rss_bytes=memory.rss,
        peak_rss_bytes=max(memory.rss, _peak_rss_bytes(proc_self_status)),
        virtual_bytes=memory.vms,
        gc_collections=sum(generation["collections"] for generation in gc.get_stats()),
    )


def process_figures(
    descriptors: Path = PROC_SELF_FD,
) -> Generator[None, None, ProcessFigures]:
    """Return memory, descriptors and threads of this process, in steps of less than 0.5 ms."""
    open_fds = yield from _open_descriptors(descriptors)
    yield
    return ProcessFigures(
        **msgspec.structs.asdict(process_memory()),
        open_fds=open_fds,
        max_fds=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        threads=psutil.Process().num_threads(),
    )


def _open_descriptors(directory: Path) -> Generator[None, None, int]:
    """Return how many descriptors are open.

    Linux 6.2 and newer say it in the directory's size. Others are asked for each: 0.5 us, so that
    10,000 are several steps, and what is opened or closed between two of them may be missed.
    """
    try:
        if size := os.stat(directory).st_size:
            return size
        count = 0
        with os.scandir(directory) as entries:
            for count, _ in enumerate(entries):
                if count % _DESCRIPTORS_PER_STEP == 0:
                    yield
    except OSError:
        return psutil.Process().num_fds()
    # The last index is the number without the one that reads the directory.
    return count


def _peak_rss_bytes(proc_self_status: Path) -> int:
    high_water_kib = _field(_read_once(proc_self_status), "VmHWM:")
    if high_water_kib is not None:
        return high_water_kib * 1024
    # Without /proc the next best figure also covers the process before exec(). getrusage(2):
    # kilobytes on Linux; bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _quota_ratio(before: dict[Path, CpuLevel], after: dict[Path, CpuLevel], wall_s: float) -> float:
    """Return the largest share of a CPU quota used in `wall_s`; 0 without quotas."""
    return max(
        (
            _ratio(level.used_s - before[directory].used_s, level.quota_cpus * wall_s)
            for directory, level in after.items()
            if directory in before
        ),
        default=0.0,
    )


def _share(held: HeldMemory) -> float:
    return held.share


def _ratio(part: float, whole: float) -> float:
    """Return part / whole within 0 and 1; 0 of nothing. Kernel counters can step back."""
    if whole <= 0.0:
        return 0.0
    return min(1.0, max(0.0, part / whole))


def _paths_by_controller(proc_self_cgroup: str) -> dict[str, str]:
    """Return the process's path for each version 1 controller, and under "" for version 2.

    Lines are `4:cpu,cpuacct:/path` for version 1 and `0::/path` for version 2: cgroups(7).
    """
    paths: dict[str, str] = {}
    for line in proc_self_cgroup.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def _levels(root: Path, path: str) -> tuple[Path, ...]:
    """Return the directories of `path` below `root`, innermost first, and `root` itself.

    In a container the path is often the host's and does not exist below the mount; the directory
    mounted at `root` is then the container's own cgroup. A path with ".." lies outside the mount.
    """
    inner = PurePosixPath(path.lstrip("/"))
    if ".." in inner.parts:
        return (root,)
    # os.path.isdir is used because Path.is_dir raises where a directory may not be entered.
    directories = (root / part for part in (inner, *inner.parents))
    return tuple(directory for directory in directories if os.path.isdir(directory))


def _cpu_level(
    quota_us: int | None, period_us: int | None, used_s: float | None
) -> CpuLevel | None:
    """Return the level, or None where there is no quota (version 1 says -1) or no figure."""
    if quota_us is None or period_us is None or used_s is None:
        return None
    if quota_us <= 0 or period_us <= 0:
        return None
    return CpuLevel(quota_us / period_us, used_s)


def _field(text: str, name: str) -> int | None:
    """Return the number after `name` at the start of a line, e.g. of memory.stat."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name:
            return _int(words[1])
    return None


def _int(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _read_once(path: Path) -> str:
    """Return the text of a kernel file; an empty one if it can't be read."""
    return KernelFiles().text(path) or ""
