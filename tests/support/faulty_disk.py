"""FaultyDisk: a VFS of SQLite's whose writes and flushes fail when a test says so."""

from __future__ import annotations

import itertools
from typing import Any

import apsw

_numbers = itertools.count()


class _File(apsw.VFSFile):
    def __init__(self, disk: FaultyDisk, name: Any, flags: Any) -> None:
        self._disk = disk
        path = name.filename() if isinstance(name, apsw.URIFilename) else name or ""
        self._is_wal = path.endswith("-wal")
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        if self._is_wal and self._disk.is_full:
            raise apsw.FullError("a test")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        if self._is_wal and self._disk.failing_flushes:
            self._disk.failing_flushes -= 1
            error: Any = apsw.IOError("a test")
            error.extendedresult = apsw.SQLITE_IOERR_FSYNC
            raise error
        super().xSync(flags)


class FaultyDisk(apsw.VFS):
    """A VFS that is registered as long as it lives; only files with WALs' names are disturbed."""

    def __init__(self) -> None:
        self.name = f"faulty-{next(_numbers)}"
        # How many flushes fail from now on, and whether there is no room for what is written.
        self.failing_flushes = 0
        self.is_full = False
        # How many files of segments can't be opened from now on.
        self.failing_opens = 0
        super().__init__(self.name, "")

    def xOpen(self, name: Any, flags: Any) -> apsw.VFSFile:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name or ""
        if self.failing_opens and "segment-" in path and path.endswith(".db"):
            self.failing_opens -= 1
            raise apsw.CantOpenError("a test")
        return _File(self, name, flags)
