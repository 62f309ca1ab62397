"""Command lines as words: finds the command before anything is parsed or imported."""

from __future__ import annotations

import os
from collections.abc import Sequence

# Command line of process 1: in a container the daemon itself, or the init that started it.
FIRST_PROCESS = "/proc/1/cmdline"


def with_command(argv: Sequence[str]) -> list[str]:
    """Return ``argv`` with its command first: ``serve`` is put in where none is named.

    Short forms are spelled out: ``clevrd --version``, ``-V`` and ``clevrd help COMMAND``.
    """
    if argv and argv[0] in ("--version", "-V"):
        return ["version", *argv[1:]]
    if argv and argv[0] == "help":
        return [*argv[1:3], "--help"]
    if argv and (not argv[0].startswith("-") or argv[0] in ("-h", "--help")):
        return list(argv)
    return ["serve", *argv]


def argv_of_process(path: str = FIRST_PROCESS) -> list[str]:
    """Return the arguments of the clevrd that a process runs; none for another program.

    The kernel shows a script as ``python /opt/clevrd/bin/clevrd serve …``, and an init with the
    command that it was given, as ``docker-init -- clevrd serve …``. All forms have a word that
    names clevrd; the arguments follow that word.
    """
    try:
        with open(path, "rb") as file:
            words = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
    except OSError:
        return []
    for index, word in enumerate(words):
        if os.path.basename(word) == "clevrd":
            return words[index + 1 :]
    return []
