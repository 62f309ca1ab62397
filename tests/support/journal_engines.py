"""The engines of the journal as the contract suite sees them: a log, and what can happen to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from clevrd.journal.base import Engine
from clevrd.journal.sqlite.engine import SqliteEngine
from clevrd.journal.sqlite.settings import SqliteSettings


class Log(Protocol):
    """One log of an engine, which outlives the engines that are opened for it."""

    def engine(self) -> Engine:
        """Return an engine for the log, to be opened. One is open at a time."""

    async def begin_anew(self) -> None:
        """Do to the log what makes its engine give it another stamp; no engine is open."""

    async def trim(self, engine: Engine) -> None:
        """Have the log's oldest records removed; not those behind the checkpoint."""


class SqliteLog:
    """A directory."""

    def __init__(self, folder: Path) -> None:
        self.settings = SqliteSettings(str(folder / "journal"))

    def engine(self) -> SqliteEngine:
        """Return an engine for the directory."""
        return SqliteEngine(self.settings)

    async def begin_anew(self) -> None:
        """Lose the file that says what the journal is."""
        os.unlink(os.path.join(self.settings.directory, "meta"))

    async def trim(self, engine: Engine) -> None:
        """Let each segment have one record, and then keep no more than one."""
        raise NotImplementedError


LOGS: dict[str, Callable[[Path], Log]] = {"sqlite": SqliteLog}
