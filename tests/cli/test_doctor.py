"""clevrd doctor: what it finds in figures, and that it reads them from this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from daemons import ROOT

from clevrd.cli.doctor_checks import EARLIEST_S, GIB, MIB, Disk, Finding, Machine, examine, worst
from clevrd.config import Config

WELL = Machine(
    descriptors=262_144,
    somaxconn=4_096,
    syn_backlog=4_096,
    wmem_max=4 * MIB,
    tcp_memory_bytes=2 * GIB,
    conntrack_max=262_144,
    memory_bytes=8 * GIB,
    now_s=EARLIEST_S + 1,
    is_synchronised=True,
    disks=(Disk("/var/lib/clevrd", free_bytes=50 * GIB, file_system="ext4"),),
)
# Settings that fit to that machine.
CONFIG = Config(max_connections=100_000)


def findings(machine: Machine = WELL, *, has_tls: bool = False, **settings: Any) -> list[Finding]:
    """Return what is found in a machine with these settings."""
    config = msgspec.structs.replace(CONFIG, **settings)
    return examine(config, machine, has_tls=has_tls)


def faults(machine: Machine = WELL, **settings: Any) -> list[tuple[str, str]]:
    """Return the name and the state of each finding that is not well."""
    found = [finding for finding in findings(machine, **settings) if finding.state != "ok"]
    assert all(finding.change for finding in found)
    return [(finding.check, finding.state) for finding in found]


def but(**figures: Any) -> Machine:
    """Return the machine that is well, with other figures."""
    return msgspec.structs.replace(WELL, **figures)


def test_nothing_is_found_where_all_is_well() -> None:
    """Each check says so, and what it looked at."""
    found = findings()

    assert worst(found) == "ok"
    assert all(finding.says and not finding.change for finding in found)
    assert len({finding.check for finding in found}) == len(found) == 13


@pytest.mark.parametrize(
    ("machine", "fault"),
    [
        (but(descriptors=1_000), ("descriptors", "problem")),
        (but(descriptors=100_100), ("descriptors", "problem")),
        (but(somaxconn=128), ("net.core.somaxconn", "advice")),
        (but(syn_backlog=1_024), ("net.ipv4.tcp_max_syn_backlog", "advice")),
        (but(wmem_max=65_536), ("net.core.wmem_max", "advice")),
        (but(tcp_memory_bytes=100 * MIB), ("net.ipv4.tcp_mem", "advice")),
        (but(conntrack_max=65_536), ("net.netfilter.nf_conntrack_max", "advice")),
        (but(memory_bytes=2_047 * MIB), ("memory", "problem")),
        (but(cgroup_bytes=2_500 * MIB), ("memory", "problem")),
        (but(missing_extensions=(("uvloop", "No."),)), ("extensions", "problem")),
        (but(now_s=0.0), ("clock", "problem")),
        (but(is_synchronised=False), ("clock", "advice")),
        (but(secrets=("No.",)), ("secrets", "problem")),
        (but(writable_config="/etc/clevrd.toml"), ("secrets", "problem")),
        (but(disks=(Disk("/d", fault="No."),)), ("disk", "problem")),
        (but(disks=(Disk("/d", free_bytes=1),)), ("disk", "problem")),
        (but(disks=(Disk("/d", free_bytes=9 * GIB, file_system="nfs4"),)), ("disk", "problem")),
        (but(disks=(Disk("/d", free_bytes=2 * GIB, wanted_bytes=3 * GIB),)), ("disk", "advice")),
        (but(disks=(Disk("/d", free_bytes=2 * GIB, ahead_s=61.0),)), ("clock", "problem")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_each_figure_that_is_not_well_is_found(machine: Machine, fault: tuple[str, str]) -> None:
    """And nothing else is."""
    assert faults(machine) == [fault]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"ping_interval_s": 30.0}, ("ping", "advice")),
        ({"ping_interval_s": 55.0}, ("ping", "problem")),
        ({"max_memory_mb": 255, "max_connections": 100}, ("memory", "advice")),
        ({"max_connections": 140_000}, ("memory of connections", "advice")),
        ({"max_connections": 30_000, "has_tls": True}, ("memory of connections", "advice")),
        ({"send_buffer_bytes": 2 * MIB}, ("net.ipv4.tcp_mem", "advice")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_each_setting_that_does_not_fit_is_found(
    settings: dict[str, Any], fault: tuple[str, str]
) -> None:
    """The machine is well, and the setting asks too much of it, or of proxies."""
    assert faults(**settings) == [fault]


def test_figures_that_a_machine_does_not_tell_are_left_out() -> None:
    """As in a container without a /proc/sys of its own, or beside Linux."""
    machine = Machine(descriptors=262_144, memory_bytes=8 * GIB, now_s=EARLIEST_S + 1)

    assert faults(machine) == []


# --- the command -----------------------------------------------------------------------------


def doctor(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Run the command; return its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "clevrd", "doctor", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_problems_end_with_1_and_json_says_which(tmp_path: Path) -> None:
    """A state directory that is not there, and files of another time in the journal's."""
    journal = tmp_path / "journal"
    journal.mkdir(mode=0o700)
    later_s = time.time() + 3_600
    (journal / "file").touch()
    os.utime(journal / "file", (later_s, later_s))

    code, said, _ = doctor(
        *("--json", "--state-dir", str(tmp_path / "none"), "--journal", str(journal)),
        CLEVRD_PING_INTERVAL_S="60",
        CLEVRD_PONG_TIMEOUT_S="10",
    )

    found = json.loads(said)
    problems = {each["check"] for each in found["findings"] if each["state"] == "problem"}
    assert (code, found["status"]) == (1, "problem")
    assert {"ping", "clock", "disk"} <= problems
    assert not any((tmp_path / "none").glob("*"))


def test_secret_that_others_may_read_is_found(tmp_path: Path) -> None:
    """With the sentence that a start would end with, and without the secret."""
    secret = "s3cret" * 8
    (tmp_path / "jwt.secret").write_text(secret)
    (tmp_path / "jwt.secret").chmod(0o644)
    config = tmp_path / "clevrd.toml"
    config.write_text(
        '[auth]\nmode = "required"\n[[auth.jwt]]\nissuer = "i"\naudience = "a"\n'
        'algorithms = ["HS256"]\nany_tenant = true\nsecret_file = "jwt.secret"\n'
    )

    code, said, errors = doctor("--config", str(config))

    assert code == 1
    assert "jwt.secret" in said
    assert "chmod" in said
    assert secret not in said + errors


def test_settings_that_are_wrong_end_as_a_start_does() -> None:
    """With the sentence for each; there is nothing to compare the machine with."""
    code, said, errors = doctor("--max-memory-mb", "3")

    assert (code, said) == (78, "")
    assert "max_memory_mb" in errors
