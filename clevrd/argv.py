"""Command lines as words: which command they are, before anything is parsed or imported."""

from __future__ import annotations

import os
from collections.abc import Sequence

# Of the process that a container is there for, or of the init that started it and names it.
FIRST_PROCESS = "/proc/1/cmdline"


def with_command(argv: Sequence[str]) -> list[str]:
    """Put in ``serve``, the default command, where none is named; spell out the usual short ways.

    These are ``clevrd --version`` and ``-V``, and ``clevrd help COMMAND``.
    """
    if argv and argv[0] in ("--version", "-V"):
        return ["version", *argv[1:]]
    if argv and argv[0] == "help":
        return [*argv[1:2], "--help"]
    if argv and (not argv[0].startswith("-") or argv[0] in ("-h", "--help")):
        return list(argv)
    return ["serve", *argv]


def argv_of_process(path: str = FIRST_PROCESS) -> list[str]:
    """Return the arguments of the clevrd that a process is, none where it is something else.

    Of a script the kernel shows ``python /opt/clevrd/bin/clevrd serve …``; an init shows the
    command that it was given, ``docker-init -- clevrd serve …``; ``python -m clevrd`` is one too.
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
