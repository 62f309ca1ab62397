"""JournalDirectory: the journal's directory, its lock, and the file that says what it is."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from clevrd.errors import JournalUnavailable
from clevrd.journal.sqlite.library import words_of

LOCK: Final = "lock"
META: Final = "meta"
CHECKPOINT: Final = "checkpoint.db"
# Rises when files get another layout; a later one is refused.
FORMAT: Final = 1
# Files that a directory may have which is to become a journal: also those that a first start which
# was killed has left.
_NO_CONTENT: Final = frozenset(
    {LOCK, META + ".new", "lost+found", *(CHECKPOINT + end for end in ("", "-wal", "-shm"))}
)
_SEGMENT: Final = re.compile(r"segment-(\d{10})\.db")
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_LOCK_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# How long the lock is tried for.
_LOCK_S: Final = 0.5
# Messages are private: no other user may read the files.
_FILE_MODE: Final = 0o600
_DIRECTORY_MODE: Final = 0o700

_ADVICE: Final = {
    errno.ENOENT: "create the directory that it is to stand in",
    errno.ENOTDIR: "name a directory",
    errno.EACCES: "let the daemon's user write there",
    errno.EPERM: "let the daemon's user write there",
    errno.EROFS: "mount it writable",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
}


class Meta(msgspec.Struct, frozen=True):
    """A journal's description of itself, in the file META."""

    format: int
    # The stamp with which records are accepted now: random hexadecimal digits.
    stamp: str
    # The machine's start during which the journal was opened last; empty where the system does not
    # tell.
    boot_id: str
    # The daemon has closed the journal, and nothing was written since.
    is_clean: bool
    # The durability in the settings with which the journal was open last.
    durability: str = "fsync"
    # The newest segment's number, or that of one before it.
    newest: int = 0
    # The last record when it was closed.
    last_position: int = 0


def new_stamp() -> str:
    """Return a stamp that no log has had."""
    return secrets.token_hex(8)


def boot_id() -> str:
    """Return what names this start of the machine; empty where the system does not tell."""
    try:
        return Path(_BOOT_ID).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def segment_name(number: int) -> str:
    """Return the name of a segment's file."""
    return f"segment-{number:010d}.db"


class JournalDirectory:
    """The directory, locked for this process from `open` to `close`."""

    def __init__(self, path: str) -> None:
        self.path = path
        # Descriptor of the locked file; -1 while the lock is not held.
        self._lock = -1

    def inside(self, name: str) -> str:
        """Return the path of a file in the directory."""
        return os.path.join(self.path, name)

    def check(self) -> None:
        """Look whether `open` would find a journal, or could make one; change nothing.

        Owners and permissions are not looked at, since the daemon may run as another user.

        Raises:
            JournalUnavailable: one line that says why not, and what to do.
        """
        try:
            if os.path.lexists(self.path):
                self._check_content()
                self.read_meta()
            else:
                os.listdir(os.path.dirname(os.path.abspath(self.path)))
        except PermissionError:
            return
        except OSError as error:
            raise self.refusal(error) from error

    def open(self) -> None:
        """Make the directory if it is missing, and lock it.

        Raises:
            JournalUnavailable: one line that says why not, and what to do.
        """
        try:
            with suppress(FileExistsError):
                os.mkdir(self.path, _DIRECTORY_MODE)
            self._check_owner()
            self._check_content()
            self._lock = os.open(self.inside(LOCK), _LOCK_FLAGS, _FILE_MODE)
            self._take_lock()
            self._note_holder()
        except BlockingIOError as error:
            sentence = (
                f"The journal {self.path} is another clevrd's{self._holder()}; give each daemon one"
                " of its own (--journal), or stop the other one."
            )
            self.close()
            raise JournalUnavailable(sentence) from error
        except OSError as error:
            self.close()
            raise self.refusal(error) from error

    def _take_lock(self) -> None:
        """Lock the file; a command that looks whether it is locked holds it for a moment."""
        until_s = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= until_s:
                    raise
                time.sleep(_LOCK_S / 10)

    def hold(self) -> None:
        """Lock the directory again, if it is not the one that was locked.

        Raises:
            OSError: it is gone, or another process has it.
        """
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.inside(LOCK)), os.fstat(self._lock)):
                return
        before = self._lock
        self._lock = os.open(self.inside(LOCK), _LOCK_FLAGS, _FILE_MODE)
        try:
            self._take_lock()
        except OSError:
            os.close(self._lock)
            self._lock = before
            raise
        os.close(before)
        self._note_holder()

    def _note_holder(self) -> None:
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, b"%d\n" % os.getpid(), 0)

    def refusal(self, error: OSError) -> JournalUnavailable:
        """Return the refusal for what the system has against the directory."""
        advice = _ADVICE.get(error.errno or 0, "name another directory")
        return JournalUnavailable(
            f"Can't keep a journal in {self.path}: {words_of(error)}; {advice} (--journal)."
        )

    def close(self) -> None:
        """Unlock the directory. A second call does nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def names(self) -> list[str]:
        """Return the names of all files in the directory."""
        return os.listdir(self.path)

    def segment_numbers(self) -> list[int]:
        """Return the numbers of the segments that are there, rising."""
        found = map(_SEGMENT.fullmatch, os.listdir(self.path))
        return sorted(int(each[1]) for each in found if each is not None)

    # --- the file that says what the journal is --------------------------------------------------

    def read_meta(self) -> Meta | None:
        """Return what the journal says of itself; None if it says nothing that can be read.

        Raises:
            JournalUnavailable: it was made by a later version.
        """
        try:
            text, _, crc = Path(self.inside(META)).read_bytes().rstrip().rpartition(b" ")
        except FileNotFoundError:
            return None
        if crc != b"%08x" % zlib.crc32(text):
            return None
        try:
            meta = msgspec.json.decode(text, type=Meta)
        except msgspec.MsgspecError:
            meta = None
        found = meta.format if meta is not None else _format_of(text)
        if found > FORMAT:
            raise JournalUnavailable(
                f"The journal {self.path} has format {found}, and this clevrd knows up to"
                f" {FORMAT}; run a later clevrd, or name another directory (--journal)."
            )
        return meta

    def write_meta(self, meta: Meta) -> None:
        """Replace what the journal says of itself, and return when the disk has it."""
        text = msgspec.json.encode(meta)
        new = self.inside(META + ".new")
        with suppress(FileNotFoundError):
            os.unlink(new)
        with os.fdopen(os.open(new, _WRITE_FLAGS, _FILE_MODE), "wb") as file:
            file.write(b"%b %08x\n" % (text, zlib.crc32(text)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.inside(META))
        self.sync()

    def sync(self) -> None:
        """Flush the directory itself: which files there are."""
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def make_file(self, name: str) -> str:
        """Make an empty file that only its owner may read; replace an old one; return its path."""
        path = self.inside(name)
        for end in ("", "-wal", "-shm", "-journal"):
            with suppress(FileNotFoundError):
                os.unlink(path + end)
        os.close(os.open(path, _WRITE_FLAGS, _FILE_MODE))
        return path

    # --- what is refused -------------------------------------------------------------------------

    def _check_owner(self) -> None:
        found = os.stat(self.path)
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if found.st_uid != os.geteuid():
            raise JournalUnavailable(
                f"The journal {self.path} belongs to user {found.st_uid}, and this process is user"
                f" {os.geteuid()}; run clevrd as its owner, or change the owner."
            )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise JournalUnavailable(
                f"Others may write to the journal {self.path}; forbid it: chmod 700 {self.path}"
            )

    def _check_content(self) -> None:
        names = os.listdir(self.path)
        if names and META not in names and not any(map(_SEGMENT.fullmatch, names)):
            others = [each for each in names if each not in _NO_CONTENT]
            if others:
                raise JournalUnavailable(
                    f"{self.path} is no journal: it holds other files, {min(others)!a} for one;"
                    " name an empty directory, or a new one (--journal)."
                )

    def _holder(self) -> str:
        """Return the process that holds the directory, as the lock's file names it."""
        text = os.pread(self._lock, 20, 0).strip()
        return f" (process {int(text)})" if text.isdigit() else ""


def _format_of(text: bytes) -> int:
    class _Format(msgspec.Struct):
        format: int

    try:
        return msgspec.json.decode(text, type=_Format).format
    except msgspec.MsgspecError:
        return 0
