"""Backup: a copy of a SQLite journal, which may be open meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import apsw

from clevrd.errors import JournalUnavailable
from clevrd.journal.sqlite.directory import CHECKPOINT, JournalDirectory, Meta, new_stamp
from clevrd.journal.sqlite.inspection import Inspection
from clevrd.journal.sqlite.library import open_to_read, words_of

_PARTIAL: Final = ".partial"
# Pages of the old file that are copied in one step: all, in one transaction. With fewer, a file to
# which records are appended meanwhile would be copied from its beginning again and again.
_ALL_PAGES: Final = -1


def back_up(inspection: Inspection, destination: str, told: Callable[[str], None]) -> int:
    """Copy a journal into the new directory ``destination``; return the copy's bytes.

    Files that can't be read are left out. The copy begins a new epoch when it is opened, since its
    files are others than those that it names.

    Args:
        told: told what is left out.

    Raises:
        JournalUnavailable: it could not be copied; nothing is left of the copy.
    """
    destination = destination.rstrip("/") or destination
    if os.path.lexists(destination):
        raise JournalUnavailable(f"{destination} is there already; name a new directory.")
    partial = JournalDirectory(destination + _PARTIAL)
    try:
        shutil.rmtree(partial.path, ignore_errors=True)
        os.mkdir(partial.path, 0o700)
        try:
            total_bytes = _copy_all(inspection, partial, told)
            os.rename(partial.path, destination)
        except BaseException:
            shutil.rmtree(partial.path, ignore_errors=True)
            raise
    except OSError as error:
        raise JournalUnavailable(f"Can't write {destination}: {words_of(error)}.") from error
    except apsw.Error as error:
        raise JournalUnavailable(f"Can't copy to {destination}: {words_of(error)}.") from error
    return total_bytes


def _copy_all(inspection: Inspection, target: JournalDirectory, told: Callable[[str], None]) -> int:
    total_bytes = 0
    for bad in inspection.bad:
        told(f"left out: {bad.path}: {bad.why}")
    # The checkpoint is copied first, so that it is of no records that the copy does not have.
    with suppress(apsw.CantOpenError):
        path = inspection.directory.inside(CHECKPOINT)
        connection = open_to_read(path, None, is_final=False)
        total_bytes += _copy(connection, target.make_file(CHECKPOINT))
    for segment in inspection.segments:
        name = os.path.basename(segment.path)
        try:
            connection = inspection.connect(segment)
        except apsw.CantOpenError:
            told(f"left out: {segment.path}, which was too old, and is gone")
            continue
        total_bytes += _copy(connection, target.make_file(name))
    if inspection.meta is not None:
        meta = inspection.meta
        # No file of the copy has this stamp, so it begins anew wherever it is put: also where it is
        # copied over the journal's own files, which then keep their inodes.
        target.write_meta(
            Meta(meta.format, new_stamp(), meta.boot_id, False, meta.durability, meta.newest)
        )
    return total_bytes


def _copy(source: apsw.Connection, path: str) -> int:
    """Copy a database and close it; return its bytes, which are on the disk."""
    try:
        target = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            with target.backup("main", source, "main") as copying:
                copying.step(_ALL_PAGES)
        finally:
            target.close(True)
    finally:
        source.close(True)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
