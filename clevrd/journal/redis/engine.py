"""RedisEngine: the journal that several nodes share, in Redis Streams, as a node sees it.

A record is taken by the log that it was made for, or not at all (`scripts`).
Redis itself keeps it as its settings say, so a failover may lose the newest ones; nodes notice by
the stamp. Facts: redis.io/docs/latest/develop/data-types/streams, .../commands/wait.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from clevrd.errors import JournalUnavailable
from clevrd.journal.base import Checkpoint, Fenced, Placed
from clevrd.journal.kept_checkpoints import FILL_BYTES, will_do
from clevrd.journal.redis.checkpoints import CheckpointStore
from clevrd.journal.redis.connections import APPENDS, QUESTIONS, Connections
from clevrd.journal.redis.library import (
    FENCED,
    LOST,
    MOVED_CODES,
    Connector,
    RedisFault,
    sentence_of,
    unavailable,
)
from clevrd.journal.redis.locating import Place, locator_of
from clevrd.journal.redis.pipeline import PATIENCE_TICKS, TICK_S, Pipeline
from clevrd.journal.redis.reading import LogReader
from clevrd.journal.redis.retention import OVERSHOOT, UNBOUNDED, kept_entries
from clevrd.journal.redis.scripts import (
    ALL,
    APPEND,
    STAMP,
    PartitionKeys,
    Script,
    entry_of,
    position_of,
)
from clevrd.journal.redis.server_info import (
    is_synced,
    read_info,
    refusal_of,
    refusal_to_sync,
    warnings_of,
)
from clevrd.journal.redis.settings import RedisSettings

log = logging.getLogger(__name__)

# How long a start waits for a server that is loading, or failing over, or not up yet.
START_S: Final = 10.0
_START_RETRY_S: Final = 0.2
# Each log is cut, and the Sentinels are asked, so often.
_LOOK_OVER_S: Final = 5.0
# How long the replicas have for a record, and how long disks have, which are synced each second.
_WAIT_MS: Final = 1_000
_SYNC_MS: Final = 3_000

# Codes of faults that go by themselves; a start waits for that.
_PASSING: Final = MOVED_CODES - {"MOVED", "ASK", "NOAUTH", "READONLY"} | {LOST}


class _Partition:
    """One partition's log."""

    def __init__(self, number: int, prefix: str, *, waits: bool) -> None:
        """Args: waits: an append waits for disks or replicas, over a connection of its own."""
        self.number = number
        self.keys = PartitionKeys(prefix, number)
        self.role = f"{APPENDS} {number}" if waits else APPENDS
        # The incarnation that accepts records now; empty while it has to be asked.
        self.stamp = ""
        # Entries that the log may have at most, before appends cut it.
        self.max_entries = UNBOUNDED
        # Whether its server syncs before it answers, as was seen last.
        self.is_synced = False


class RedisEngine:
    """Engine of `journal/base` over Redis Streams."""

    name = "redis"
    keeps_topics = False
    is_shared = True
    # Nodes hear of themselves by empty records anyway.
    is_unsure = False
    # The p50 of 20,000 messages a second over 8 partitions is 5.9, 3.5 and 2.2 ms at 8, 4 and 2 ms,
    # and the CPU of a message 40, 42 and 44 us.
    max_apart_s = 0.003

    def __init__(self, settings: RedisSettings) -> None:
        """Make an engine; `open` connects it."""
        self.partitions = settings.partitions
        self.answers_when_taken = bool(settings.min_replicas)
        self._settings = settings
        # Tells this engine from those of other nodes.
        self._name = secrets.token_hex(8)
        self._partitions = [
            _Partition(number, settings.prefix, waits=self.answers_when_taken)
            for number in range(settings.partitions)
        ]
        # Set by open; None before it and after close.
        self._connections: Connections | None = None
        self._readers: list[LogReader] = []
        self._tasks: list[asyncio.Task[None]] = []

    # --- Engine ----------------------------------------------------------------------------------

    @property
    def durability(self) -> str:
        """The worst that an answered record survives, by the settings of the servers.

        It may change with the stamp: by a failover to a server with other ones.
        """
        if all(each.is_synced for each in self._partitions) and (
            self._settings.must_sync or not self._settings.min_replicas
        ):
            return "fsync"
        return "replicas" if self._settings.min_replicas else "memory"

    async def open(self) -> None:
        """Connect, and check that this is a Redis, and a log, that can be used.

        Raises:
            ConfigError: a file of certificates can't be used.
            JournalUnavailable: with a sentence that says what to do.
        """
        loop = asyncio.get_running_loop()
        settings = self._settings
        connector = Connector(settings)
        tags = [each.keys.tag for each in self._partitions]
        locator = locator_of(settings.address, connector, tags)
        connections = self._connections = Connections(locator, connector, loop, self._lost)
        self._readers = [
            LogReader(each.number, each.keys, connections, loop.time) for each in self._partitions
        ]
        ticking = loop.create_task(self._tick(connections))
        self._tasks.append(ticking)
        try:
            await self._check_until(loop.time() + START_S, loop)
        except BaseException:
            await self.close()
            raise
        self._tasks.append(loop.create_task(self._look_over(connections)))

    async def stamp(self, partition: int) -> str:
        """Return the incarnation of what accepts records now."""
        each = self._partitions[partition]
        return each.stamp or await self._renew_stamp(each)

    async def append(
        self, partition: int, record: bytes, stamp: str, placed: Sequence[Placed]
    ) -> None:
        """Append ``record``: see `Engine.append`."""
        each = self._partitions[partition]
        keys = each.keys
        try:
            pipeline = await self._opened().pipeline(partition, each.role)
            entry = await self._run(
                pipeline, APPEND, (keys.log, keys.meta), stamp, record, each.max_entries
            )
        except RedisFault as fault:
            each.stamp = ""
            if fault.code == FENCED:
                raise Fenced from fault
            raise unavailable(fault, self._settings.shown) from fault
        if self.answers_when_taken:
            await self._wait_until_kept(pipeline)
        self._readers[partition].note_append(position_of(entry))

    async def read(self, partition: int, after: int) -> list[tuple[int, bytes]]:
        """Return the next records behind ``after``; wait for one."""
        self._opened()
        try:
            return await self._readers[partition].read(after)
        except RedisFault as fault:
            raise unavailable(fault, self._settings.shown) from fault

    async def first(self, partition: int) -> int:
        """Return the oldest record's position; 1 where the log has its very first one."""
        last, added, length, entry = await self._extent(partition)
        if added == length:
            return 1
        position = position_of(last) + 1 if entry is None else position_of(entry)
        self._readers[partition].note_first(position)
        return position

    async def is_short(self, partition: int) -> bool:
        """Return whether the log has its first record, and takes FILL_BYTES at most."""
        _, added, length, _ = await self._extent(partition)
        return added == length and await self._size(partition) <= FILL_BYTES

    async def digest(self, partition: int, position: int) -> str | None:
        """Return the CRC-32 of the record at ``position``; None if it is gone."""
        entry = entry_of(position)
        key = self._partitions[partition].keys.log
        found = await self._ask(partition, "XRANGE", key, entry, entry)
        if not found:
            return None
        fields = found[0][1] or ()
        values = dict(zip(fields[::2], fields[1::2], strict=False))
        return f"{zlib.crc32(values.get(b'd', b'')):08x}"

    async def load_checkpoints(self, partition: int) -> list[Checkpoint]:
        """Return the whole checkpoints that are kept, newest first."""
        return await self._store(partition).load()

    async def save_checkpoint(self, partition: int, checkpoint: Checkpoint) -> None:
        """Keep ``checkpoint``, unless another node has just saved one."""
        seconds, _ = await self._ask(partition, "TIME")
        now_ms = int(seconds) * 1000
        store = self._store(partition)
        entries = await store.entries()
        if entries and will_do(entries[0][0], checkpoint, self._name, now_ms):
            return
        _, added, length, _ = await self._extent(partition)
        size_bytes = await self._size(partition)
        reach = kept_entries(FILL_BYTES, length, size_bytes)
        await store.save(checkpoint, added, now_ms, reach)

    def history(self) -> None:
        """Return None: nodes read the log alone."""

    def storage(self) -> None:
        """Return None: it has no files of its own."""

    async def close(self) -> None:
        """End all connections; a second call does nothing."""
        connections, self._connections = self._connections, None
        if connections is None:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await connections.close()

    # --- questions -------------------------------------------------------------------------------

    def _opened(self) -> Connections:
        if self._connections is None:
            raise JournalUnavailable("The journal is closed.")
        return self._connections

    async def _call(
        self, partition: int, role: str, *command: Any, patience_ticks: int = PATIENCE_TICKS
    ) -> Any:
        return await self._opened().call(partition, role, *command, patience_ticks=patience_ticks)

    async def _ask(self, partition: int, *command: Any) -> Any:
        """Ask the partition's primary something, apart from appends and reads."""
        try:
            return await self._call(partition, QUESTIONS, *command)
        except RedisFault as fault:
            raise unavailable(fault, self._settings.shown) from fault

    async def _run(
        self, pipeline: Pipeline, script: Script, keys: Sequence[str], *arguments: Any
    ) -> Any:
        """Have ``script`` run, which the server may have forgotten."""
        call = self._opened().call_over
        try:
            return await call(pipeline, "EVALSHA", script.sha, len(keys), *keys, *arguments)
        except RedisFault as fault:
            if fault.code != "NOSCRIPT":
                raise
        return await call(pipeline, "EVAL", script.text, len(keys), *keys, *arguments)

    async def _renew_stamp(self, each: _Partition) -> str:
        try:
            pipeline = await self._opened().pipeline(each.number, each.role)
            replid, log_id, partitions = await self._run(
                *(pipeline, STAMP, (each.keys.meta,), secrets.token_hex(8), self.partitions)
            )
            each.is_synced = is_synced(await self._file_settings(pipeline))
        except RedisFault as fault:
            raise unavailable(fault, self._settings.shown) from fault
        if self._settings.must_sync and not each.is_synced:
            raise JournalUnavailable(refusal_to_sync(self._settings.shown))
        if int(partitions) != self.partitions:
            raise JournalUnavailable(self._other_number(int(partitions)))
        stamp: str = (replid + log_id).decode()
        if stamp != each.stamp:
            self._readers[each.number].forget_append()
        each.stamp = stamp
        return stamp

    def _other_number(self, partitions: int) -> str:
        return (
            f"The journal at {self._settings.shown} was made with {partitions} partitions, and the"
            f" settings say {self.partitions}; write partitions = {partitions}, or give a new log"
            " another prefix."
        )

    async def _wait_until_kept(self, pipeline: Pipeline) -> None:
        """Raise JournalUnavailable unless the last append is where it is promised to be.

        Args:
            pipeline: the connection that it went over. A server knows of each connection what it
                has written, so over another one the answer would be of nothing.
        """
        settings = self._settings
        wanted, call = settings.min_replicas, self._opened().call_over
        try:
            if settings.must_sync:
                _, found = await call(pipeline, "WAITAOF", 1, wanted, _SYNC_MS)
            else:
                found = await call(pipeline, "WAIT", wanted, _WAIT_MS)
        except RedisFault as fault:
            raise unavailable(fault, settings.shown) from fault
        if found < wanted:
            where = " on their disks" if settings.must_sync else ""
            raise JournalUnavailable(
                f"{found} replicas of Redis at {settings.shown} have the message{where}, and"
                f" min_replicas is {wanted}; see to the replicas."
            )

    async def _extent(self, partition: int) -> tuple[bytes, int, int, bytes | None]:
        """Return the last ID of the log, entries ever added, entries now, and the first one's ID.

        All is nothing where the log has not begun.
        """
        key = self._partitions[partition].keys.log
        try:
            found = await self._call(partition, QUESTIONS, "XINFO", "STREAM", key)
        except RedisFault as fault:
            if fault.code == "ERR" and "no such key" in fault.text:
                return b"0-0", 0, 0, None
            raise unavailable(fault, self._settings.shown) from fault
        fields = dict(zip(found[::2], found[1::2], strict=False))
        entry = fields[b"first-entry"]
        return (
            fields[b"last-generated-id"],
            fields[b"entries-added"],
            fields[b"length"],
            entry[0] if entry else None,
        )

    async def _size(self, partition: int) -> int:
        key = self._partitions[partition].keys.log
        return await self._ask(partition, "MEMORY", "USAGE", key) or 0

    def _store(self, partition: int) -> CheckpointStore:
        return CheckpointStore(
            partial(self._ask, partition), self._partitions[partition].keys, self._name
        )

    # --- at the start ----------------------------------------------------------------------------

    async def _check_until(self, until_s: float, loop: asyncio.AbstractEventLoop) -> None:
        """Check all, again and again as long as what is wrong may pass by itself."""
        is_told = False
        while True:
            try:
                await self._check()
                return
            except RedisFault as fault:
                if fault.code not in _PASSING or _is_final(fault) or loop.time() >= until_s:
                    raise JournalUnavailable(sentence_of(fault, self._settings.shown)) from fault
                if not is_told:
                    log.warning(
                        "waiting for redis reason=%r", sentence_of(fault, self._settings.shown)
                    )
                    is_told = True
            await asyncio.sleep(_START_RETRY_S)

    async def _check(self) -> None:
        connections = self._opened()
        seen: set[Place] = set()
        for each in self._partitions:
            place = await connections.place_of(each.number)
            if place not in seen:
                seen.add(place)
                await self._check_server(each.number)
            try:
                await self._renew_stamp(each)
                await self._extent(each.number)
                await self._store(each.number).entries()
            except JournalUnavailable as error:
                if isinstance(error.__cause__, RedisFault):
                    raise error.__cause__ from error
                raise

    async def _check_server(self, partition: int) -> None:
        """Raise what is wrong with the server."""
        settings = self._settings
        text = await self._call(partition, QUESTIONS, "INFO")
        given = await self._file_settings(await self._opened().pipeline(partition, QUESTIONS))
        info = read_info(text, given)
        if info is None:
            raise RedisFault("PROTOCOL", "its INFO has no version")
        refusal = refusal_of(info, settings)
        if refusal is not None:
            raise JournalUnavailable(refusal)
        for warning in warnings_of(info, settings):
            log.warning("look at the journal's service why=%r", warning)
        for script in ALL:
            await self._call(partition, QUESTIONS, "SCRIPT", "LOAD", script.text)

    async def _file_settings(self, pipeline: Pipeline) -> Sequence[bytes]:
        """Return names and values of what the server says of its file; nothing if it does not."""
        try:
            found: Sequence[bytes] = await self._opened().call_over(
                pipeline, "CONFIG", "GET", "*append*"
            )
        except RedisFault as fault:
            if fault.code in (LOST, *MOVED_CODES):
                raise
            # Not all who may use a Redis may see its settings.
            return ()
        return found

    # --- all the time ----------------------------------------------------------------------------

    def _lost(self, place: Place) -> None:
        """Ask for all stamps again: the next connection may lead to another server."""
        for each in self._partitions:
            each.stamp = ""

    async def _tick(self, connections: Connections) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            connections.tick()
            for reader in self._readers:
                reader.tick()

    async def _look_over(self, connections: Connections) -> None:
        """Cut the logs, and notice a failover that no connection has told of."""
        while True:
            await asyncio.sleep(_LOOK_OVER_S + secrets.randbelow(1000) / 1000)
            try:
                await connections.leave_old_primary()
                for each in self._partitions:
                    await self._cut(each)
            except (JournalUnavailable, RedisFault) as error:
                log.debug("log not cut reason=%s", error)
            except Exception:
                # The next round is to come in any case.
                log.exception("log not cut")

    async def _cut(self, each: _Partition) -> None:
        """Remove what is too old or too much, and nothing that a start needs to count on."""
        settings, key = self._settings, each.keys.log
        _, added, length, _ = await self._extent(each.number)
        size_bytes = await self._size(each.number)
        kept = kept_entries(settings.retention_bytes // self.partitions, length, size_bytes)
        each.max_entries = min(OVERSHOOT * kept, UNBOUNDED)
        entries = await self._store(each.number).entries()
        if not entries:
            return
        newest = entries[0][0]
        kept = max(kept, added - newest.added + 1)
        if length > kept:
            await self._ask(each.number, "XTRIM", key, "MAXLEN", "~", kept)
        if settings.retention_s:
            seconds, _ = await self._ask(each.number, "TIME")
            oldest = int((int(seconds) - settings.retention_s) * 1000) << 64
            cut = entry_of(max(0, min(oldest, newest.position)))
            await self._ask(each.number, "XTRIM", key, "MINID", "~", cut)


def _is_final(fault: RedisFault) -> bool:
    """Return whether waiting is no use: a certificate does not become right by itself."""
    return "certificate" in fault.text or "TLS" in fault.text or "no service" in fault.text
