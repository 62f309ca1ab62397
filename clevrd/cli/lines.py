"""Standard output for commands without a loop, which need not import asyncio for it."""

from __future__ import annotations

import sys


def print_line(line: str) -> None:
    """Write ``line`` to standard output, however long that takes."""
    sys.stdout.buffer.write(line.encode(errors="backslashreplace") + b"\n")
