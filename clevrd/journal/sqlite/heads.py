"""CheckpointFile: the newest checkpoint, and each topic's head in it.

Without it a start would have to read the whole log, and the heads of topics whose messages are gone
would be lost. Each row has a checksum of its own: a head that is too low would give offsets twice.
"""

from __future__ import annotations

import threading
import zlib
from contextlib import suppress
from typing import Any, Final

import apsw
import msgspec

from clevrd.journal.base import Checkpoint, TopicHead
from clevrd.journal.sqlite.directory import CHECKPOINT, FORMAT, JournalDirectory
from clevrd.journal.sqlite.library import APPLICATION_ID, DAMAGE, number, open_to_write, words_of
from clevrd.plurals import noun_for

_SCHEMA: Final = """
CREATE TABLE checkpoint (
  position INTEGER NOT NULL,
  digest TEXT NOT NULL,
  partition_epoch TEXT NOT NULL,
  state BLOB NOT NULL,
  -- Rows of heads, so that a missing one is noticed.
  topics INTEGER NOT NULL,
  crc INTEGER NOT NULL
);
CREATE TABLE heads (
  tenant TEXT NOT NULL,
  topic TEXT NOT NULL,
  head INTEGER NOT NULL,
  crc INTEGER NOT NULL,
  PRIMARY KEY (tenant, topic)
) WITHOUT ROWID;
"""
_SAVE_HEAD: Final = "REPLACE INTO heads VALUES (?, ?, ?, ?)"
# A checkpoint of 10,000 topics that are scattered over a million rows changes as many pages.
_WAL_PAGES: Final = 4_000


class BadCheckpoint(Exception):
    """The file can't be read, or is not what was written."""


class CheckpointFile:
    """The file, opened by `open`; its methods wait for the disk and for each other."""

    def __init__(self, directory: JournalDirectory, vfs: str | None, *, is_durable: bool) -> None:
        self._directory = directory
        self._vfs = vfs
        self._is_durable = is_durable
        self._lock = threading.Lock()
        self._connection: apsw.Connection | None = None
        # The checkpoint that the file has: its record, and its epoch.
        self.position = 0
        self.partition_epoch = ""

    def open(self) -> Checkpoint | None:
        """Open the file; return its checkpoint, without topics, or None without one.

        Raises:
            BadCheckpoint: it is damaged; `make` replaces it.
            apsw.Error: the disk refuses.
        """
        with self._lock:
            self._connection = self._opened()
            checkpoint, _ = _read_without_topics(self._connection)
        if checkpoint is not None:
            self.position, self.partition_epoch = checkpoint.position, checkpoint.partition_epoch
        return checkpoint

    def make(self) -> None:
        """Make the file anew, without a checkpoint.

        Raises:
            apsw.Error: it can't be made.
            OSError: the same.
        """
        with self._lock:
            self._close()
            path = self._directory.make_file(CHECKPOINT)
            connection = open_to_write(path, self._vfs, is_durable=self._is_durable)
            with connection:
                connection.pragma("application_id", APPLICATION_ID)
                connection.pragma("user_version", FORMAT)
                connection.execute(_SCHEMA)
            self._directory.sync()
            self._connection = connection
            self.position, self.partition_epoch = 0, ""

    def load(self) -> Checkpoint | None:
        """Return the checkpoint with all its topics; None without one.

        Raises:
            BadCheckpoint: it is damaged.
            apsw.Error: the disk refuses.
        """
        with self._lock:
            checkpoint = read_checkpoint(self._in_use())
        if checkpoint is not None:
            self.position, self.partition_epoch = checkpoint.position, checkpoint.partition_epoch
        return checkpoint

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint, and return when it is as durable as records are.

        Raises:
            apsw.Error: it was not saved; the one before it stands.
        """
        with self._lock:
            connection = self._in_use()
            try:
                connection.execute("BEGIN IMMEDIATE")
                if checkpoint.is_whole or checkpoint.partition_epoch != self.partition_epoch:
                    connection.execute("DELETE FROM heads")
                epoch = checkpoint.partition_epoch
                connection.executemany(
                    _SAVE_HEAD,
                    (
                        (each.tenant, each.topic, each.head, _head_crc(epoch, each))
                        for each in checkpoint.topics
                    ),
                )
                topics = number(connection, "SELECT count(*) FROM heads")
                connection.execute("DELETE FROM checkpoint")
                connection.execute(
                    "INSERT INTO checkpoint VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        checkpoint.position,
                        checkpoint.digest,
                        epoch,
                        checkpoint.state,
                        topics,
                        _checkpoint_crc(checkpoint, topics),
                    ),
                )
                connection.execute("COMMIT")
            except apsw.Error:
                with suppress(apsw.Error):
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                raise
            self.position, self.partition_epoch = checkpoint.position, epoch
            with suppress(apsw.Error):
                connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def head(self, partition_epoch: str, tenant: str, topic: str) -> int:
        """Return a topic's head in the checkpoint; 0 if it has none, or is of another epoch."""
        with self._lock:
            if partition_epoch != self.partition_epoch:
                return 0
            row = (
                self._in_use()
                .execute(
                    "SELECT head, crc FROM heads WHERE tenant = ? AND topic = ?", (tenant, topic)
                )
                .fetchone()
            )
        if row is None or row[1] != _head_crc(partition_epoch, TopicHead(tenant, topic, row[0])):
            return 0
        return int(row[0])

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        with self._lock:
            self._close()

    # --- with the lock ---------------------------------------------------------------------------

    def _opened(self) -> apsw.Connection:
        try:
            connection = open_to_write(
                self._directory.inside(CHECKPOINT), self._vfs, is_durable=self._is_durable
            )
        except (apsw.CorruptError, apsw.NotADBError) as error:
            raise BadCheckpoint(words_of(error)) from error
        except apsw.CantOpenError as error:
            raise BadCheckpoint("it is missing") from error
        return connection

    def _in_use(self) -> apsw.Connection:
        if self._connection is None:
            raise apsw.CantOpenError("the checkpoint's file is closed")
        return self._connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(apsw.Error):
                connection.close()


def read_checkpoint(connection: apsw.Connection) -> Checkpoint | None:
    """Return the checkpoint in an open file, with all its topics; None without one.

    Raises:
        BadCheckpoint: it is damaged.
        apsw.Error: the disk refuses.
    """
    checkpoint, count = _read_without_topics(connection)
    if checkpoint is None:
        return None
    try:
        topics = _heads(connection, checkpoint.partition_epoch)
    except DAMAGE as error:
        raise BadCheckpoint(words_of(error)) from error
    if count != len(topics):
        raise BadCheckpoint(f"it has {len(topics)} of {count} {noun_for(count, 'topic')}")
    return msgspec.structs.replace(checkpoint, topics=topics)


def _read_without_topics(connection: apsw.Connection) -> tuple[Checkpoint | None, int]:
    try:
        if connection.pragma("application_id") != APPLICATION_ID:
            raise BadCheckpoint("it is no file of a journal")
        rows: list[Any] = connection.execute("SELECT * FROM checkpoint").fetchall()
    except (*DAMAGE, apsw.SQLError) as error:
        raise BadCheckpoint(words_of(error)) from error
    if not rows:
        return None, 0
    position, digest, epoch, state, topics, crc = rows[0]
    found = Checkpoint(position, digest, epoch, state, (), True)
    if _checkpoint_crc(found, topics) != crc:
        raise BadCheckpoint("its checksum does not fit")
    return found, topics


def _heads(connection: apsw.Connection, partition_epoch: str) -> list[TopicHead]:
    heads: list[TopicHead] = []
    last = ("", "")
    rows: Any = connection.execute("SELECT * FROM heads ORDER BY tenant, topic")
    for tenant, topic, head, crc in rows:
        found = TopicHead(tenant, topic, head)
        if _head_crc(partition_epoch, found) != crc:
            raise BadCheckpoint("a topic's checksum does not fit")
        if (tenant, topic) <= last:
            # A page stands in the place of another one, whose rows are missing.
            raise BadCheckpoint("its topics are out of order")
        last = (tenant, topic)
        heads.append(found)
    return heads


def _head_crc(partition_epoch: str, head: TopicHead) -> int:
    return zlib.crc32(f"{partition_epoch}\0{head.tenant}\0{head.topic}\0{head.head}".encode())


def _checkpoint_crc(checkpoint: Checkpoint, topics: int) -> int:
    text = f"{checkpoint.position}\0{checkpoint.digest}\0{checkpoint.partition_epoch}\0{topics}\0"
    return zlib.crc32(checkpoint.state, zlib.crc32(text.encode()))
