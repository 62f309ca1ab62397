"""clevrd doctor: looks at the machine and the settings, and says what to change.

The settings are those that `serve` would use, with the same options. `doctor_checks` decides which
figures are good enough. Nothing is written, locked or asked over a network.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from clevrd.cli.doctor_checks import Disk, Finding, Machine, examine, worst
from clevrd.cli.failures import EXIT_FAILED
from clevrd.cli.lines import print_line
from clevrd.cli.settings import add_settings, load_settings
from clevrd.config import Loaded
from clevrd.control.system_stats import Cgroups, memory_limit_bytes
from clevrd.errors import CannotStart, ConfigError
from clevrd.journal.engines import check_files, check_place
from clevrd.journal.settings import JournalSettings, journal_of
from clevrd.tenants.from_settings import access_of, check_access, folder_of
from clevrd.tls.contexts import TlsContexts
from clevrd.tls.settings import tls_of
from clevrd.tracing.settings import tracing_of

# adjtimex(2): the return value of a clock that nothing synchronises, and the struct's size with
# room to spare; a call with only zeros in it changes nothing.
_TIME_ERROR: Final = 5
_TIMEX_BYTES: Final = 512

# Module of an extension -> its package, and what is missing without it.
_EXTENSIONS: Final = {
    "msgspec._core": ("msgspec", "msgspec has no C extension, and nothing works without it."),
    "aiohttp._http_parser": ("aiohttp", "aiohttp has no C parser, and the daemon does not start."),
    "uvloop.loop": ("uvloop", "uvloop is missing, and the daemon does not start."),
}
_REDIS_EXTENSION: Final = ("hiredis", "hiredis is missing, which a journal in Redis needs.")


T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting, and the form of the answer."""
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(options: argparse.Namespace) -> int:
    """Print what was found; return 1 where something has to be changed."""
    loaded = load_settings(options)
    secrets: list[str] = []
    journal = _tried(secrets, lambda: journal_of(loaded)) or JournalSettings()
    tls = _tried(secrets, lambda: tls_of(loaded))
    has_tls = tls is not None and tls.is_on
    if tls is not None and has_tls:
        _tried(secrets, lambda: TlsContexts(tls))
    _tried(secrets, lambda: check_access(access_of(loaded), folder_of(loaded)))
    _tried(secrets, lambda: check_files(journal))
    _tried(secrets, lambda: tracing_of(loaded.config, os.environ))
    machine = _machine(loaded, journal, tuple(secrets))
    findings = examine(loaded.config, machine, has_tls=has_tls)
    if options.json:
        view = {"status": worst(findings), "findings": findings}
        print_line(msgspec.json.encode(view).decode())
    else:
        for line in _lines(findings):
            print_line(line)
    return EXIT_FAILED if worst(findings) == "problem" else 0


def _lines(findings: list[Finding]) -> Iterator[str]:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        yield f"{finding.state:<7}  {finding.check:<{width}}  {finding.says}"
        if finding.change:
            yield f"{'':<7}  {'':<{width}}  -> {finding.change}"


def _tried(faults: list[str], step: Callable[[], T]) -> T | None:
    """Return what ``step`` does; None where it fails, and its sentences are noted."""
    try:
        return step()
    except (ConfigError, CannotStart) as error:
        faults += str(error).splitlines()
        return None


# --- the machine ---------------------------------------------------------------------------------


def _machine(loaded: Loaded, journal: JournalSettings, secrets: tuple[str, ...]) -> Machine:
    tcp_pages = _numbers("/proc/sys/net/ipv4/tcp_mem")
    wmem = _number("/proc/sys/net/core/wmem_max")
    return Machine(
        # The daemon raises its soft limit to the hard one.
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        somaxconn=_number("/proc/sys/net/core/somaxconn"),
        syn_backlog=_number("/proc/sys/net/ipv4/tcp_max_syn_backlog"),
        wmem_max=wmem,
        tcp_memory_bytes=tcp_pages[-1] * os.sysconf("SC_PAGE_SIZE") if tcp_pages else None,
        conntrack_max=_number("/proc/sys/net/netfilter/nf_conntrack_max"),
        memory_bytes=memory_limit_bytes(),
        cgroup_bytes=min(Cgroups().memory_limits(), default=None),
        missing_extensions=tuple(_missing_extensions(journal)),
        now_s=time.time(),
        is_synchronised=_is_synchronised(),
        disks=tuple(_disks(loaded, journal)),
        secrets=secrets,
        writable_config=loaded.path if _everybody_writes(loaded.path) else "",
    )


def _numbers(path: str) -> list[int]:
    with suppress(OSError, ValueError):
        return [int(word) for word in Path(path).read_text().split()]
    return []


def _number(path: str) -> int | None:
    return next(iter(_numbers(path)), None)


def _missing_extensions(journal: JournalSettings) -> Iterator[tuple[str, str]]:
    wanted = dict(_EXTENSIONS)
    if journal.url:
        wanted["hiredis.hiredis"] = _REDIS_EXTENSION
    for module, told in wanted.items():
        try:
            is_there = find_spec(module) is not None
        except ModuleNotFoundError:
            is_there = False
        if not is_there:
            yield told


def _is_synchronised() -> bool | None:
    """Return whether the kernel takes its clock for synchronised; None where it does not say."""
    try:
        adjtimex = ctypes.CDLL(None).adjtimex
    except (OSError, AttributeError):
        return None
    state = adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    return None if state < 0 else state != _TIME_ERROR


def _disks(loaded: Loaded, journal: JournalSettings) -> Iterator[Disk]:
    if journal.directory:
        faults: list[str] = []
        _tried(faults, lambda: check_place(journal))
        # A journal makes its directory at the first start.
        where = Path(journal.directory)
        found = where if where.is_dir() else where.parent
        yield _disk(found, " ".join(faults), journal.retention_bytes)
    if state_dir := loaded.config.state_dir:
        found = Path(state_dir)
        fault = ""
        if not found.is_dir():
            fault = f"{state_dir} is no directory."
        elif not os.access(found, os.W_OK | os.X_OK):
            fault = f"{state_dir} can't be written to by this user."
        # The rings have three fifths of the memory at most.
        yield _disk(found, fault, loaded.config.max_memory_mb * (1 << 20) * 3 // 5)


def _disk(path: Path, fault: str, wanted_bytes: int) -> Disk:
    free_bytes, newest_s = 0, 0.0
    with suppress(OSError):
        free = os.statvfs(path)
        free_bytes = free.f_bavail * free.f_frsize
        with os.scandir(path) as entries:
            newest_s = max((entry.stat().st_mtime for entry in entries), default=0.0)
    return Disk(
        path=str(path),
        fault=fault,
        free_bytes=free_bytes,
        file_system=_file_system(path),
        ahead_s=newest_s - time.time(),
        wanted_bytes=wanted_bytes,
    )


def _file_system(path: Path) -> str:
    """Return the type of the file system that a directory is on, as /proc/mounts has it."""
    place = os.path.realpath(path)
    best, found = "", ""
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, where, kind, *_ = line.split()
            is_above = place == where or place.startswith(where.rstrip("/") + "/")
            # A later mount at the same place hides an earlier one.
            if is_above and len(where) >= len(best):
                best, found = where, kind
    return found


def _everybody_writes(path: str) -> bool:
    with suppress(OSError):
        return bool(path) and bool(os.stat(path).st_mode & stat.S_IWOTH)
    return False
