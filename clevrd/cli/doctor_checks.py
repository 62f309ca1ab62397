"""The checks of clevrd doctor, over the figures of a machine. Decides only; `doctor` reads these.

Each check has a name of its own, says what it found, and what to change where that is not well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

import msgspec

from clevrd.config import Config
from clevrd.plurals import noun_for

State = Literal["ok", "advice", "problem"]

MIB: Final = 1 << 20
GIB: Final = 1 << 30

# A start with fewer descriptors works; a daemon for a public site needs more.
FEW_DESCRIPTORS: Final = 1_024
ENOUGH_DESCRIPTORS: Final = 65_536
# Connections that wait to be accepted; the daemon asks for so many.
BACKLOG: Final = 4_096
# Memory of an idle subscriber's connection, and what TLS adds (docs/operations.md, Sizing).
CONNECTION_BYTES: Final = 4_096
TLS_BYTES: Final = 15 * 1_024
# Idle connections beyond this share of the memory leave too little for rings.
CONNECTIONS_SHARE: Final = 0.25
# The share of a cgroup's memory for the daemon; the rest is for the kernel's buffers.
MEMORY_SHARE: Final = 0.8
LEAST_MEMORY_BYTES: Final = 256 * MIB
# Connections that stall at once, for which the kernel should have buffers.
STALLED: Final = 1_000
# Shortest time after which proxies in wide use cut silent connections, and the usual one: AWS's and
# nginx's 60 s, Heroku's 55 s; many are set to 30 s.
SHORT_PROXY_S: Final = 30.0
USUAL_PROXY_S: Final = 55.0
LEAST_DISK_BYTES: Final = 1 * GIB
# Files so far in the future show that the clock was set back.
CLOCK_SLACK_S: Final = 60.0
# 1 January 2026, before this was written: an earlier clock is wrong.
EARLIEST_S: Final = 1_767_225_600.0
# Networks' file systems, on which locks and flushes are not what they are on a disk.
NETWORK_FILE_SYSTEMS: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs"})


class Finding(msgspec.Struct, frozen=True):
    """The result of one check; ``change`` says what to do, and is empty where all is well."""

    check: str
    state: State
    says: str
    change: str = ""


class Disk(msgspec.Struct, frozen=True):
    """A directory that the daemon writes to, as it was found."""

    path: str
    # Why the daemon can't use it; empty where it can.
    fault: str = ""
    free_bytes: int = 0
    file_system: str = ""
    # How far the newest file in it lies in the future.
    ahead_s: float = 0.0
    # Bytes that the daemon may want to keep there; 0 for no bound.
    wanted_bytes: int = 0


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """All figures that the checks need; None where the machine does not say."""

    descriptors: int
    somaxconn: int | None = None
    syn_backlog: int | None = None
    wmem_max: int | None = None
    # Kernel memory that all TCP sockets may have.
    tcp_memory_bytes: int | None = None
    conntrack_max: int | None = None
    # The least of the machine's memory and all limits; and the least limit of a cgroup.
    memory_bytes: int
    cgroup_bytes: int | None = None
    # Name of an extension -> what is missing without it.
    missing_extensions: tuple[tuple[str, str], ...] = ()
    now_s: float
    # Whether the kernel takes its clock for synchronised.
    is_synchronised: bool | None = None
    disks: tuple[Disk, ...] = ()
    # Sentences about secrets that others may read, and files that can't be read.
    secrets: tuple[str, ...] = ()
    # Other users may write the configuration file.
    writable_config: str = ""


def examine(config: Config, machine: Machine, *, has_tls: bool) -> list[Finding]:
    """Return what each check found, in the order in which people read it."""
    return [
        *_descriptors(config, machine),
        *_kernel(config, machine),
        *_memory(config, machine, has_tls=has_tls),
        *_ping(config),
        *_extensions(machine),
        *_clock(machine),
        *(finding for disk in machine.disks for finding in _disk(disk)),
        *_secrets(machine),
    ]


def worst(findings: list[Finding]) -> State:
    """Return the state of all together."""
    states = {finding.state for finding in findings}
    return "problem" if "problem" in states else "advice" if "advice" in states else "ok"


def _descriptors(config: Config, machine: Machine) -> Iterator[Finding]:
    limit, wanted = machine.descriptors, config.max_connections
    says = f"{limit} may be open, one for each connection."
    raise_it = "Raise the hard limit: LimitNOFILE=262144 in the unit, ulimits.nofile in Docker."
    if limit < FEW_DESCRIPTORS or wanted + 200 > limit:
        if wanted:
            says = f"{limit} may be open, and max_connections is {wanted}."
        yield Finding("descriptors", "problem", says, raise_it)
    elif limit < ENOUGH_DESCRIPTORS and not wanted:
        yield Finding("descriptors", "advice", says, raise_it)
    else:
        yield Finding("descriptors", "ok", says)


def _kernel(config: Config, machine: Machine) -> Iterator[Finding]:
    yield from _at_least("net.core.somaxconn", machine.somaxconn, BACKLOG, "wait to be accepted")
    yield from _at_least(
        "net.ipv4.tcp_max_syn_backlog", machine.syn_backlog, BACKLOG, "may be half open"
    )
    buffer_bytes = config.send_buffer_bytes
    if machine.wmem_max is not None:
        yield from _at_least(
            "net.core.wmem_max", machine.wmem_max, buffer_bytes, "bytes of send_buffer_bytes count"
        )
    if machine.tcp_memory_bytes is not None:
        # The kernel doubles what is asked for.
        wanted_bytes = STALLED * 2 * buffer_bytes
        says = f"The kernel has {machine.tcp_memory_bytes // MIB} MiB for all TCP sockets."
        if machine.tcp_memory_bytes < wanted_bytes:
            yield Finding(
                "net.ipv4.tcp_mem",
                "advice",
                says,
                f"{STALLED} stalled connections take {wanted_bytes // MIB} MiB: raise it, or lower"
                " send_buffer_bytes.",
            )
        else:
            yield Finding("net.ipv4.tcp_mem", "ok", says)
    if machine.conntrack_max is not None:
        wanted = config.max_connections or min(machine.descriptors, ENOUGH_DESCRIPTORS)
        yield from _at_least(
            "net.netfilter.nf_conntrack_max", machine.conntrack_max, wanted, "are tracked"
        )


def _at_least(name: str, found: int | None, wanted: int, what: str) -> Iterator[Finding]:
    if found is None:
        return
    says = f"{found} {'connections ' if 'bytes' not in what else ''}{what}."
    if found < wanted:
        yield Finding(name, "advice", says, f"sysctl -w {name}={wanted}, and in /etc/sysctl.d.")
    else:
        yield Finding(name, "ok", says)


def _memory(config: Config, machine: Machine, *, has_tls: bool) -> Iterator[Finding]:
    wanted, there = config.max_memory_mb * MIB, machine.memory_bytes
    cgroup = machine.cgroup_bytes
    says = f"max_memory_mb is {config.max_memory_mb}; {there // MIB} MiB can be had."
    if cgroup is not None and min(wanted, there) > MEMORY_SHARE * cgroup:
        fits_mb = int(cgroup * MEMORY_SHARE) // MIB
        yield Finding(
            "memory",
            "problem",
            f"{says} The cgroup has {cgroup // MIB} MiB, with the kernel's buffers in it.",
            f"Set max_memory_mb to {fits_mb}, or give the cgroup {wanted * 5 // 4 // MIB} MiB.",
        )
    elif wanted > there:
        change = f"Set max_memory_mb to {int(there * MEMORY_SHARE) // MIB} or less."
        yield Finding("memory", "problem", says, change)
    elif wanted < LEAST_MEMORY_BYTES:
        change = "Set max_memory_mb to 256 or more: the interpreter alone takes some 50 MiB."
        yield Finding("memory", "advice", says, change)
    else:
        yield Finding("memory", "ok", says)
    usable_bytes = min(wanted, there)
    each_bytes = CONNECTION_BYTES + TLS_BYTES * has_tls
    fits = int(usable_bytes * CONNECTIONS_SHARE) // each_bytes
    connections = config.max_connections or machine.descriptors
    says = (
        f"{connections} idle {noun_for(connections, 'subscriber')}"
        f" {'takes' if connections == 1 else 'take'} {connections * each_bytes // MIB} MiB"
        f" of {usable_bytes // MIB}."
    )
    if connections > fits:
        change = f"Set max_connections to {fits} or less, or max_memory_mb higher."
        yield Finding("memory of connections", "advice", says, change)
    else:
        yield Finding("memory of connections", "ok", says)


def _ping(config: Config) -> Iterator[Finding]:
    every_s = config.ping_interval_s
    says = f"A silent connection is pinged every {every_s:g} s."
    if every_s < SHORT_PROXY_S:
        yield Finding("ping", "ok", says)
        return
    cut = "cut silent connections after 60 s or less"
    state: State = "problem" if every_s >= USUAL_PROXY_S else "advice"
    change = f"Set ping_interval_s to 25: proxies (nginx, AWS, Heroku, HAProxy) {cut}."
    yield Finding("ping", state, says, change)


def _extensions(machine: Machine) -> Iterator[Finding]:
    for name, missing in machine.missing_extensions:
        yield Finding(
            "extensions", "problem", missing, f"pip install --force-reinstall {name}, from a wheel."
        )
    if not machine.missing_extensions:
        yield Finding("extensions", "ok", "Those in C are there.")


def _clock(machine: Machine) -> Iterator[Finding]:
    ahead_s = max((disk.ahead_s for disk in machine.disks), default=0.0)
    if machine.now_s < EARLIEST_S:
        yield Finding(
            "clock", "problem", "It stands before 2026.", "Set it: tokens and ids are made by it."
        )
    elif ahead_s > CLOCK_SLACK_S:
        yield Finding(
            "clock",
            "problem",
            f"Files of the daemon were written {ahead_s:.0f} s in the future: it was set back.",
            "Synchronise it (chrony, systemd-timesyncd); ids run ahead until it has caught up.",
        )
    elif machine.is_synchronised is False:
        yield Finding(
            "clock",
            "advice",
            "The kernel does not take it for synchronised.",
            "Run chrony or systemd-timesyncd, here or on the host: tokens expire by it.",
        )
    elif machine.is_synchronised is None:
        yield Finding("clock", "ok", "Nothing says whether it is synchronised.")
    else:
        yield Finding("clock", "ok", "It is synchronised.")


def _disk(disk: Disk) -> Iterator[Finding]:
    says = f"{disk.path} has {disk.free_bytes // MIB} MiB free ({disk.file_system or 'unknown'})."
    if disk.fault:
        yield Finding("disk", "problem", disk.fault, f"Mend {disk.path}: a start would end so.")
    elif disk.file_system in NETWORK_FILE_SYSTEMS:
        yield Finding("disk", "problem", says, "Use a disk of this machine: locks need one.")
    elif disk.free_bytes < LEAST_DISK_BYTES:
        yield Finding("disk", "problem", says, "Free some: less than 1 GiB is left.")
    elif disk.free_bytes < disk.wanted_bytes:
        yield Finding(
            "disk",
            "advice",
            says,
            f"Up to {disk.wanted_bytes // MIB} MiB are kept there: free some, or keep less.",
        )
    else:
        yield Finding("disk", "ok", says)


def _secrets(machine: Machine) -> Iterator[Finding]:
    for sentence in machine.secrets:
        yield Finding("secrets", "problem", sentence, "A start would end with that sentence.")
    if machine.writable_config:
        yield Finding(
            "secrets",
            "problem",
            f"Everybody may write {machine.writable_config}.",
            f"chmod o-w {machine.writable_config}",
        )
    if not machine.secrets and not machine.writable_config:
        yield Finding("secrets", "ok", "Files that the configuration names can be used.")
