"""SQLite itself: which library is good enough, how files are opened, and what its errors mean."""

from __future__ import annotations

import enum
import errno
import os
from typing import Final
from urllib.parse import quote

import apsw

from clevrd.errors import JournalUnavailable

# Older ones can lose a committed transaction, when a commit that begins the WAL anew meets a
# checkpoint by another connection: sqlite.org/wal.html#the_wal_reset_bug.
MIN_VERSION: Final = (3, 51, 3)
# "clvd": by this a file says whose it is (PRAGMA application_id).
APPLICATION_ID: Final = 0x636C7664
# How long a connection waits for the lock of another one, such as that of a backup.
_BUSY_MS: Final = 5_000

_READ_WRITE: Final = apsw.SQLITE_OPEN_READWRITE
_READ_ONLY: Final = apsw.SQLITE_OPEN_READONLY
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Errors that a flipped bit may cause: SQLite's own, and that of text which is no UTF-8 any more.
DAMAGE: Final = (apsw.CorruptError, apsw.NotADBError, UnicodeDecodeError)
# Failures of these are failures to make data durable, whatever the reason: the kernel may have
# dropped what it could not write, and the next flush would succeed without it.
_FLUSHES: Final = frozenset(
    {apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC, apsw.SQLITE_IOERR_CLOSE}
)


class Fault(enum.Enum):
    """The meaning of an error of SQLite's to the journal."""

    # There is no room; the transaction was undone.
    FULL = enum.auto()
    # The file holds something else than what was written.
    DAMAGED = enum.auto()
    # Anything else; nothing is known about the transaction.
    FAILED = enum.auto()


def check_library() -> None:
    """Raise JournalUnavailable if this SQLite may lose what it has committed."""
    version = apsw.sqlite_lib_version()
    if tuple(map(int, version.split("."))) < MIN_VERSION:
        needed = ".".join(map(str, MIN_VERSION))
        raise JournalUnavailable(
            f"The journal needs SQLite {needed} or later, and the package apsw brings {version}:"
            " pip install -U apsw"
        )


def fault_of(error: apsw.Error, system_errno: int = 0) -> Fault:
    """Return what ``error`` means.

    Args:
        system_errno: the system's own number, as the connection tells it.
    """
    if isinstance(error, apsw.FullError):
        return Fault.FULL
    if isinstance(error, apsw.CorruptError | apsw.NotADBError):
        return Fault.DAMAGED
    extended = getattr(error, "extendedresult", 0)
    if extended == apsw.SQLITE_IOERR_WRITE and system_errno in _NO_ROOM:
        # A disk quota: SQLite knows ENOSPC alone.
        return Fault.FULL
    return Fault.FAILED


def is_flush(error: apsw.Error) -> bool:
    """Return whether it was a flush to the disk that failed."""
    return getattr(error, "extendedresult", 0) in _FLUSHES


def words_of(error: Exception) -> str:
    """Return ``error`` in a few words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def open_to_write(path: str, vfs: str | None, *, is_durable: bool) -> apsw.Connection:
    """Open a file that is there, in WAL mode.

    Args:
        vfs: the name of what SQLite does its input and output by; None for its own.
        is_durable: a commit returns when the disk has it.
    """
    connection = apsw.Connection(path, flags=_READ_WRITE, vfs=vfs)
    try:
        _set_up(connection)
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "full" if is_durable else "normal")
        # Checkpoints of the WAL are made when the writer says so, and their errors are seen.
        connection.wal_autocheckpoint(0)
    except apsw.Error:
        connection.close(True)
        raise
    return connection


def open_to_read(path: str, vfs: str | None, *, is_final: bool) -> apsw.Connection:
    """Open a file for reading.

    Args:
        is_final: no process writes to it any more, and all that it holds is in the file itself.
    """
    if is_final:
        name = f"file:{quote(os.path.abspath(path))}?immutable=1"
        connection = apsw.Connection(name, flags=_READ_ONLY | apsw.SQLITE_OPEN_URI, vfs=vfs)
    else:
        connection = apsw.Connection(path, flags=_READ_WRITE, vfs=vfs)
    try:
        _set_up(connection)
        connection.pragma("query_only", True)
        # The last one to close a file would copy its WAL, and remove it.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    except apsw.Error:
        connection.close(True)
        raise
    return connection


def _set_up(connection: apsw.Connection) -> None:
    connection.set_busy_timeout(_BUSY_MS)
    # A damaged page is found when it is read, not when something is written by it.
    connection.pragma("cell_size_check", True)
    connection.pragma("trusted_schema", False)
    connection.pragma("temp_store", "memory")


def give_up(connection: apsw.Connection) -> None:
    """Close ``connection`` without writing anything more to its file."""
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    connection.close(True)


def number(connection: apsw.Connection, query: str) -> int:
    """Return the number that ``query`` finds; 0 where it finds none."""
    row = connection.execute(query).fetchone()
    return int(row[0] or 0) if row is not None else 0
