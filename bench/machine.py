"""The machine of a measurement, and the core of each side. Speed is not measured here."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

PACKAGES = ("aiohttp", "uvloop", "msgspec", "websockets")


class Cores(msgspec.Struct, frozen=True):
    """The core of the server and the core of the load; the same one on a single core."""

    server: int
    load: int


def cores() -> Cores:
    """Return the first two cores this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(server=allowed[0], load=allowed[1 % len(allowed)])


@contextmanager
def pinned_to(cpu: int) -> Iterator[None]:
    """Pin this thread, and the processes that it starts meanwhile, to a core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_model() -> str:
    """Return the processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def package_version(name: str) -> str:
    """Return the installed version of a distribution, or "absent"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def first_line_of(command: Sequence[str]) -> str:
    """Return the first line that a program prints (on either stream), or "absent"."""
    try:
        done = subprocess.run(  # noqa: S603 - fixed commands of this package
            command, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "absent"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines else "absent"


def memory_gb() -> float:
    """Return physical memory in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def describe() -> dict[str, str]:
    """Return the machine and the versions, for the results file."""
    return {
        "cpu": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_gb():.0f} GiB",
        "kernel": ".".join(platform.release().split(".")[:2]),
        "python": sys.version.split()[0],
        "cc": first_line_of(["cc", "--version"]),
        **{name: package_version(name) for name in PACKAGES},
    }


def rss_bytes(pid: int) -> int:
    """Return the resident set of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0
