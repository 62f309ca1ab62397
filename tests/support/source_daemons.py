"""Daemons with sources, seen from outside: their figures, and all that their journal has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from daemons import ROOT, DaemonProcess


def source_of(daemon: DaemonProcess) -> dict[str, Any]:
    """Return the figures of the daemon's only source."""
    (source,) = _metrics(daemon)["sources"]
    found: dict[str, Any] = source
    return found


def has_messages(daemon: DaemonProcess, count: int) -> bool:
    """Return whether the topics of the daemon have so many messages, whoever published them."""
    offsets: list[int] = [each["offset"] for each in _metrics(daemon)["topics"]]
    return sum(offsets) >= count


def exported(journal: Path) -> list[dict[str, Any]]:
    """Return the messages of a journal that no daemon has open, in their order."""
    done = subprocess.run(
        [sys.executable, "-m", "clevrd", "journal", "export", str(journal)],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=60,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def _metrics(daemon: DaemonProcess) -> Any:
    done = subprocess.run(
        ["curl", "-sS", f"{daemon.url}/metrics"], capture_output=True, check=True, timeout=20
    )
    return json.loads(done.stdout)
