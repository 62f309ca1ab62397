"""StateDir: the directory that carries topics over a planned restart.

The file's format is in `restart/format`. One daemon holds the directory at a time. The saved file
is read at the start, and removed by a daemon that is about to serve: were it still there after a
crash, the next start would give out offsets a second time; were it removed sooner, a stop during
the start would lose it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import BinaryIO, Final

import msgspec

from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.saved_topic import SavedTopic
from clevrd.errors import CannotStart, NotAllowedHere
from clevrd.restart.format import (
    CHUNK_BYTES,
    MARKER_BYTES,
    BadState,
    StateReader,
    end_record,
    file_head,
    topic_record,
    without_messages,
)

log = logging.getLogger(__name__)

STATE: Final = "clevrd.state"
# The file is written under this name and then renamed, so that STATE is whole or absent.
NEW: Final = "clevrd.state.new"
# The last file that could not be read whole, kept for a person who looks for the cause.
BAD: Final = "clevrd.state.bad"
LOCK: Final = "clevrd.lock"

# The file is flushed to the disk after so many bytes. So the time measured is the disk's and not
# the page cache's, and the last flush has little to do.
SYNC_BYTES: Final = 32 << 20

# Opening does not follow a symbolic link, and does not wait for the writer of a pipe.
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# Messages are private: no other user may read the files.
_MODE: Final = 0o600

_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE: Final = {
    errno.ENOENT: "create it, owned by the daemon's user",
    errno.ENOTDIR: "name a directory",
    errno.EACCES: "let the daemon's user write there",
    errno.EPERM: "let the daemon's user write there",
    errno.EROFS: "mount it writable",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
}

Saved = tuple[SavedTopic, RecentMessageCache]


class SaveReport(msgspec.Struct, frozen=True):
    """The result of a save: numbers of topics and bytes that were written."""

    topics: int
    # Topics whose position was saved, but not their messages.
    without_messages: int
    size_bytes: int


class StateDir:
    """The directory, locked for this daemon from `open` to `close`."""

    def __init__(self, path: str, now_s: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._now_s = now_s
        # Descriptor of the locked file; -1 while the lock is not held.
        self._lock = -1
        # The fault that `read` found in the file; empty without one.
        self._trouble = ""

    @property
    def is_open(self) -> bool:
        """Whether this daemon holds the directory."""
        return self._lock >= 0

    def open(self) -> None:
        """Lock the directory, and check now that it can be written to, not only at the stop.

        Raises:
            CannotStart: one line saying why not and what to do.
        """
        try:
            self._lock = os.open(self._in(LOCK), _LOCK_FLAGS, _MODE)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._note_pid()
            self._remove(NEW)
            os.close(os.open(self._in(NEW), _WRITE_FLAGS, _MODE))
            self._remove(NEW)
            self._sync_directory()
        except BlockingIOError as error:
            sentence = self._taken()
            self.close()
            raise CannotStart(sentence) from error
        except OSError as error:
            self.close()
            raise _refusal(error)(self._why_not(error)) from error

    def close(self) -> None:
        """Unlock the directory. A second call does nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # --- reading ---------------------------------------------------------------------------------

    def read(self, restore: Callable[[StateReader], object]) -> None:
        """Let ``restore`` read the saved file, if there is one; the file stays until `use_up`."""
        self._trouble = self._read(restore)

    def use_up(self) -> None:
        """Remove the saved file: from here on only this daemon's memory has its content.

        A file that could not be read whole is renamed to BAD, replacing an older one, and logged.

        Raises:
            CannotStart: the file can't be removed, so no message may be served.
        """
        try:
            if self._trouble:
                os.replace(self._in(STATE), self._in(BAD))
            else:
                self._remove(STATE)
            self._sync_directory()
        except OSError as error:
            raise CannotStart(
                f"Can't take {self._in(STATE)} away: {_reason(error)}; remove it, or leave"
                " CLEVRD_STATE_DIR empty. Read again after a crash it would give out old offsets."
            ) from error
        if self._trouble:
            log.error(
                "state not restored whole reason=%r kept_as=%s; what was lost begins a new epoch",
                self._trouble,
                self._in(BAD),
            )

    def _read(self, restore: Callable[[StateReader], object]) -> str:
        """Read the saved file; return its fault, or an empty text."""
        try:
            with os.fdopen(os.open(self._in(STATE), _READ_FLAGS), "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                    return "it is not a file of this daemon's user"
                reader = StateReader(file, found.st_size)
                restore(reader)
        except FileNotFoundError:
            return ""
        except BadState as error:
            return str(error)
        except OSError as error:
            return _reason(error)
        if reader.damaged:
            return f"{reader.damaged} of its records are damaged"
        return "" if reader.written is not None else "its end is missing"

    # --- writing ---------------------------------------------------------------------------------

    def save(self, last_id_us: int, topics: Iterable[Saved], until_s: float) -> SaveReport:
        """Write ``topics``, each with its messages while there is time.

        Every topic's position is written, however late it is; on a full disk, only positions are
        written. Afterwards the new file is on the disk whole, or not there at all.

        Args:
            until_s: when to begin to leave messages out, on the clock of this directory.

        Raises:
            OSError: the file could not be written.
        """
        topics = list(topics)
        try:
            return self._write(last_id_us, topics, until_s)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            return self._write(last_id_us, topics, -1.0)

    def _write(self, last_id_us: int, topics: list[Saved], until_s: float) -> SaveReport:
        self._remove(NEW)
        marker = secrets.token_bytes(MARKER_BYTES)
        left_out = 0
        with os.fdopen(os.open(self._in(NEW), _WRITE_FLAGS, _MODE), "wb", CHUNK_BYTES) as file:
            out = _SyncedFile(file)
            out.write(file_head(marker, last_id_us))
            for topic, ring in topics:
                if not self._write_whole(out, topic_record(marker, topic, ring), until_s):
                    left_out += 1
                    for part in topic_record(marker, without_messages(topic), None):
                        out.write(part)
            out.write(end_record(marker, len(topics)))
            out.sync()
        os.replace(self._in(NEW), self._in(STATE))
        self._sync_directory()
        return SaveReport(len(topics), left_out, out.size_bytes)

    def _write_whole(self, out: _SyncedFile, record: Iterable[bytes], until_s: float) -> bool:
        """Write ``record``, or no part of it when ``until_s`` comes before its end."""
        start_bytes = out.size_bytes
        for part in record:
            if self._now_s() >= until_s:
                out.cut(start_bytes)
                return False
            out.write(part)
        return True

    # --- files -----------------------------------------------------------------------------------

    def _in(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._in(name))

    def _sync_directory(self) -> None:
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _note_pid(self) -> None:
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, b"%d\n" % os.getpid(), 0)

    def _holder(self) -> str:
        """Return the process that holds the directory, as the lock's file names it."""
        text = os.pread(self._lock, 20, 0).strip()
        return f" (process {int(text)})" if text.isdigit() else ""

    def _taken(self) -> str:
        return (
            f"The state directory {self.path} is another clevrd's{self._holder()}; give each"
            " daemon one of its own (CLEVRD_STATE_DIR), or stop the other one."
        )

    def _why_not(self, error: OSError) -> str:
        advice = _ADVICE.get(error.errno or 0, "name another directory")
        return (
            f"Can't keep state in {self.path}: {_reason(error)}; {advice}, or leave"
            " CLEVRD_STATE_DIR empty."
        )


def _refusal(error: OSError) -> type[CannotStart]:
    """Return the error of a start: a full disk may have room again, no other fault heals itself."""
    heals = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return CannotStart if heals else NotAllowedHere


class _SyncedFile:
    """A file that is flushed to the disk every SYNC_BYTES."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._synced_bytes = 0
        self.size_bytes = 0

    def write(self, part: bytes) -> None:
        """Append ``part``."""
        self._file.write(part)
        self.size_bytes += len(part)
        if self.size_bytes - self._synced_bytes >= SYNC_BYTES:
            self.sync()

    def cut(self, size_bytes: int) -> None:
        """Drop everything behind the first ``size_bytes``."""
        if size_bytes < self.size_bytes:
            self._file.seek(size_bytes)
            self._file.truncate()
            self.size_bytes = size_bytes
            self._synced_bytes = min(size_bytes, self._synced_bytes)

    def sync(self) -> None:
        """Flush everything to the disk, and return when it is there."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced_bytes = self.size_bytes


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
