"""RedisReader: reads a stream in Redis behind the position of a consumer group.

One process reads at a time, so that the order of records stays; the others stand by and take over.
Streams: redis.io/docs/latest/develop/data-types/streams.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from clevrd.journal.redis.connections import Connections
from clevrd.journal.redis.library import LOST, Connector, RedisFault, is_denied, sentence_of
from clevrd.journal.redis.locating import locator_of
from clevrd.journal.redis.pipeline import TICK_S, Pipeline
from clevrd.journal.redis.scripts import Script
from clevrd.journal.redis.settings import RedisSettings
from clevrd.metrics.sources import SourceState
from clevrd.sources.progress import Progress
from clevrd.sources.reading import READING, SourceTrouble, Status
from clevrd.sources.records import Record
from clevrd.sources.redis_scripts import (
    GIVE_BACK,
    MISSING,
    NO_GROUP,
    READ,
    STANDBY,
    TAKE_OVER,
    WENT_BACK,
)
from clevrd.sources.settings import SourceEntry
from clevrd.sources.starts import EARLIEST, LATEST, id_before

log = logging.getLogger(__name__)

# The rights that a user of the server has to have, as they stand in an ACL.
ACL_RULES: Final = (
    "~clevrd:source:* ~STREAM +@connection +info +eval +evalsha +exists +get +set +del +pttl"
    " +xinfo +xgroup +xrange +xread +cluster|slots"
)

# Milliseconds after which another process takes over where nobody has seen this one end.
_LEASE_MS: Final = 15_000
# Milliseconds of one wait for a record.
_WAIT_MS: Final = 500
# Records of one read at first, and at most; and bytes that one is to have.
_FIRST_COUNT: Final = 16
_MAX_COUNT: Final = 256
_READ_BYTES: Final = 1 << 20
_BEGINNING: Final = "0-0"
_ROLE: Final = "source"
_TRIMMED: Final = "the stream was trimmed, or entries of it were deleted"

# Codes of faults -> the state that a source is in; it is "away" for all others.
_REFUSED: Final = frozenset(
    {"WRONGPASS", "NOAUTH", "NOPERM", "WRONGTYPE", "PROTOCOL", "ERR", "CROSSSLOT", "MOVED"}
)


class _Extent(msgspec.Struct, frozen=True):
    """A stream, as XINFO has it."""

    added: int
    length: int
    last: str


class RedisReader:
    """`Reader` of `sources/reading` over a stream in Redis."""

    def __init__(self, entry: SourceEntry, settings: RedisSettings, progress: Progress) -> None:
        """Make a reader; raises ConfigError where a file of certificates can't be used."""
        place = entry.place
        self._stream = place.stream
        self._group = entry.group_name
        self._field = entry.field.encode()
        self._start = entry.beginning
        self._shown = place.shown
        self._progress = progress
        self._settings = settings
        self._connector = Connector(settings)
        # All keys have to be in one slot of a cluster.
        tag = _hash_tag(place.stream)
        self._tag = f"{{{tag}}}"
        self._lease = f"clevrd:source:{self._tag}:{self._group}"
        self._name = secrets.token_hex(8)
        # The value of the lease while this process has it: its name, and its connection's number.
        self._owner = ""
        # A process without the lease has no open reader.
        self.status: Status | None = READING
        # Set by open, None after close.
        self._connections: Connections | None = None
        self._pipeline: Pipeline | None = None
        self._ticking: asyncio.Task[None] | None = None
        # The last record that is done with, and how many were ever added up to it; None for
        # unknown.
        self._position = _BEGINNING
        self._count: int | None = None
        # The position is not that of the group.
        self._is_ahead = False
        # The position is one that this process has found, or read up to.
        self._has_position = False
        # The stream was seen missing, so all its records are new.
        self._was_missing = False
        # Records that were returned and are not done with, and the last one of them.
        self._under_way = 0
        self._last = ""
        # Records of the next read.
        self._wanted = _FIRST_COUNT
        # The last read had nothing.
        self._is_at_end = False

    # --- Reader ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, take the lease, and find the position."""
        loop = asyncio.get_running_loop()
        locator = locator_of(self._settings.address, self._connector, [self._tag])
        connections = Connections(locator, self._connector, loop, lambda _place: None)
        self._connections = connections
        self._ticking = loop.create_task(_tick(connections))
        try:
            self._pipeline = await connections.pipeline(0, _ROLE)
            number = await self._ask("CLIENT", "ID")
            self._owner = f"{self._name} {number}"
            await self._take_lease()
            await self._find_position()
        except RedisFault as fault:
            raise self._trouble(fault) from fault

    async def read(self) -> Sequence[Record]:
        """Return the next records; wait for one, at most about half a second."""
        try:
            if self._under_way:
                return await self._read_ahead()
            if self._is_at_end:
                # It wakes up with the first record, which is read with those behind it below.
                await self._ask(
                    *("XREAD", "COUNT", 1, "BLOCK", _WAIT_MS),
                    *("STREAMS", self._stream, self._position),
                )
            added, length, first, _, entries = await self._step(self._wanted)
            first_id = (first or b"0-0").decode()
            if not entries:
                self._note_end(added)
                return ()
            self._is_at_end = False
            if _is_before(self._position, first_id):
                self._count_lost(added - length)
            return self._records_of(entries)
        except RedisFault as fault:
            raise self._trouble(fault) from fault

    async def _read_ahead(self) -> Sequence[Record]:
        """Return what follows records that are under way, unless it may be trimmed by now."""
        _, _, first, _, entries = await self._step(self._wanted, self._last)
        if not entries or _is_before(self._last, (first or b"0-0").decode()):
            return ()
        return self._records_of(entries)

    def done(self, records: Sequence[Record]) -> None:
        """Note that these are done with."""
        if records:
            self._position = self._progress.position = records[-1].position
            self._under_way -= len(records)
            self._is_ahead = True
            if self._count is not None:
                self._count += len(records)

    async def hold(self) -> None:
        """Renew the lease."""
        try:
            await self._step(0)
        except RedisFault as fault:
            raise self._trouble(fault) from fault

    async def close(self) -> None:
        """Keep the position, give the lease back, and disconnect."""
        connections, self._connections = self._connections, None
        pipeline, self._pipeline = self._pipeline, None
        if connections is None:
            return
        try:
            if pipeline is not None and pipeline.is_open and self._owner:
                self._pipeline = pipeline
                with suppress(RedisFault):
                    await self._step(0)
                with suppress(RedisFault):
                    await self._run(GIVE_BACK, (self._lease,), self._owner)
        finally:
            self._pipeline = None
            if self._ticking is not None:
                self._ticking.cancel()
                await asyncio.gather(self._ticking, return_exceptions=True)
            await connections.close()

    # --- the lease -------------------------------------------------------------------------------

    async def _take_lease(self) -> None:
        """Take the lease, or raise SourceTrouble while a process that has it is there."""
        options = ("PX", _LEASE_MS, "NX")
        while not await self._ask("SET", self._lease, self._owner, *options):
            held = await self._ask("GET", self._lease)
            if held is None:
                continue
            if await self._is_connected(held.split()[-1]):
                raise self._standby()
            if await self._run(TAKE_OVER, (self._lease,), held, self._owner, _LEASE_MS):
                return

    async def _is_connected(self, number: bytes) -> bool:
        """Return whether the connection with this number is there; True where that is unknown."""
        try:
            return bool(await self._ask("CLIENT", "LIST", "ID", number))
        except RedisFault as fault:
            if fault.code == LOST:
                raise
            return True

    def _standby(self) -> SourceTrouble:
        return SourceTrouble("standby", "another process reads it", soon=True)

    # --- the position ----------------------------------------------------------------------------

    async def _find_position(self) -> None:
        """Begin where the group is; make the group where there is none."""
        extent = await self._extent()
        if extent is None:
            self._was_missing = True
            raise SourceTrouble(
                "missing",
                f"There is no stream {self._stream[:200]!a} in Redis at {self._shown}; it is read"
                " from its beginning as soon as somebody adds to it.",
                soon=True,
            )
        self._is_at_end, self._under_way = False, 0
        if not await self._load_group(extent):
            await self._make_group(extent)
        self._progress.position = self._position

    async def _extent(self) -> _Extent | None:
        """Return what the stream is; None where there is none."""
        try:
            found = await self._ask("XINFO", "STREAM", self._stream)
        except RedisFault as fault:
            if "no such key" in fault.text:
                return None
            raise
        fields = _fields_of(found)
        if b"entries-added" not in fields:
            raise RedisFault("ERR", "it is older than 7.0, which sources need")
        return _Extent(
            fields[b"entries-added"], fields[b"length"], fields[b"last-generated-id"].decode()
        )

    async def _load_group(self, extent: _Extent) -> bool:
        """Take the group's position; return whether there is a group."""
        for group in await self._ask("XINFO", "GROUPS", self._stream):
            fields = _fields_of(group)
            if fields[b"name"] != self._group.encode():
                continue
            kept = fields[b"last-delivered-id"].decode()
            known = self._has_position and not _is_before(self._position, kept)
            if known and not _is_before(extent.last, self._position):
                # Redis may have lost where the group was; another process has not gone on.
                self._is_ahead = self._position != kept
                return True
            self._count = fields.get(b"entries-read")
            self._position = kept
            if _is_before(extent.last, kept):
                self._position, self._count = extent.last, extent.added
            self._is_ahead = self._position != kept
            self._was_missing, self._has_position = False, True
            return True
        return False

    async def _make_group(self, extent: _Extent) -> None:
        """Make the group at the place where the source begins."""
        position, count = self._first_position(extent)
        known = () if count is None else ("ENTRIESREAD", count)
        try:
            await self._ask("XGROUP", "CREATE", self._stream, self._group, position, *known)
        except RedisFault as fault:
            if fault.code != "BUSYGROUP":
                raise
            await self._load_group(extent)
            return
        self._position, self._count, self._is_ahead = position, count, False
        self._was_missing, self._has_position = False, True
        log.info("source begins group=%s stream=%s behind=%s", self._group, self._stream, position)

    def _first_position(self, extent: _Extent) -> tuple[str, int | None]:
        """Return what a source that was never read begins behind, and the records up to that."""
        is_behind = self._has_position and not _is_before(extent.last, self._position)
        if is_behind and (self._count is None or self._count <= extent.added):
            # The group alone was removed: the stream has all records that were read.
            return self._position, self._count
        if self._was_missing or self._has_position:
            return _BEGINNING, 0
        start = self._start
        if start.end == EARLIEST:
            return _BEGINNING, extent.added - extent.length
        if start.end == LATEST:
            return extent.last, extent.added
        if start.since_ms is not None:
            return id_before(f"{start.since_ms}-0"), None
        return id_before(start.position), None

    def _count_lost(self, gone: int) -> None:
        """Count records that were trimmed behind the position.

        Args:
            gone: records ever added that are not there any more.
        """
        if self._count is None:
            self._progress.note_lost(None, _TRIMMED)
        elif gone > self._count:
            self._progress.note_lost(gone - self._count, _TRIMMED)
        else:
            return
        self._count = gone

    def _note_end(self, added: int) -> None:
        """Note that there are no records behind the position; what was deleted there is lost."""
        self._is_at_end = True
        if self._count != added:
            if self._count is not None and added > self._count:
                self._progress.note_lost(added - self._count, _TRIMMED)
            self._count, self._is_ahead = added, True
        self._progress.lag = 0

    # --- records ---------------------------------------------------------------------------------

    def _records_of(self, entries: Sequence[Any]) -> Sequence[Record]:
        size_bytes = 0
        records = []
        for entry, fields in entries:
            size_bytes += sum(map(len, fields))
            records.append(_record_of(entry, fields, self._field))
        fitting = max(1, len(entries) * _READ_BYTES // max(size_bytes, 1))
        self._wanted = min(fitting, 4 * self._wanted, _MAX_COUNT)
        self._under_way += len(records)
        self._last = records[-1].position
        return records

    async def _step(self, count: int, behind: str = "") -> Any:
        """Keep the position, renew the lease, and return the stream's extent and ``count`` records.

        There are fewer records where the stream has no more.

        Args:
            behind: the record that the first one follows; empty for the position.
        """
        answer = await self._run(
            READ,
            (self._stream, self._lease),
            *(self._owner, _LEASE_MS, self._group, self._position),
            "" if self._count is None else self._count,
            int(self._is_ahead),
            count,
            behind or self._position,
        )
        self._is_ahead = False
        if self._count is not None:
            self._progress.lag = max(0, answer[0] - self._count)
        return answer

    # --- questions -------------------------------------------------------------------------------

    async def _ask(self, *command: Any) -> Any:
        pipeline = self._pipeline
        if pipeline is None:
            raise RedisFault(LOST, "the connection is closed")
        try:
            return await pipeline.call(*command)
        except RedisFault as fault:
            # Each caller raises its own: a traceback must not grow with each of them.
            raise RedisFault(fault.code, fault.text) from None

    async def _run(self, script: Script, keys: Sequence[str], *arguments: Any) -> Any:
        try:
            return await self._ask("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except RedisFault as fault:
            if fault.code != "NOSCRIPT":
                raise
        return await self._ask("EVAL", script.text, len(keys), *keys, *arguments)

    def _trouble(self, fault: RedisFault) -> SourceTrouble:
        """Return what a fault means for the source."""
        code = fault.code
        if code == STANDBY:
            return self._standby()
        if code == MISSING:
            self._was_missing, self._has_position, self._is_ahead = True, False, False
            return SourceTrouble(
                "missing",
                f"The stream {self._stream[:200]!a} in Redis at {self._shown} is gone; it is read"
                " from its beginning as soon as there is one again.",
                soon=True,
            )
        if code == WENT_BACK:
            self._was_missing, self._has_position, self._is_ahead = True, False, False
            return SourceTrouble(
                "away",
                f"The stream in Redis at {self._shown} has lost its newest records, which were"
                f" taken before ({fault.text}); reading goes on behind what is left.",
                soon=True,
            )
        if code == NO_GROUP:
            return SourceTrouble(
                "missing",
                f"The consumer group {self._group} is gone from the stream in Redis at"
                f" {self._shown}; it is made again.",
                soon=True,
            )
        state: SourceState = "refused" if code in _REFUSED else "away"
        return SourceTrouble(state, self._sentence(fault))

    def _sentence(self, fault: RedisFault) -> str:
        if is_denied(fault):
            return (
                f"Redis at {self._shown} does not allow its user what a source needs"
                f" ({fault.text}); an ACL for it is: {ACL_RULES}."
            )
        if fault.code == "WRONGTYPE":
            return (
                f"The key {self._stream[:200]!a} in Redis at {self._shown} is no stream; name one."
            )
        return sentence_of(fault, self._shown).replace(
            "what the journal asks", "what a source asks"
        )


def _hash_tag(key: str) -> str:
    """Return the part of a key from which its slot in a cluster is reckoned."""
    begin = key.find("{")
    end = key.find("}", begin + 1)
    return key[begin + 1 : end] if begin >= 0 and end > begin + 1 else key


def _fields_of(flat: Sequence[Any]) -> dict[bytes, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=False))


def _number(entry: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence or 0)


def _is_before(entry: str, other: str) -> bool:
    return _number(entry) < _number(other)


def _record_of(entry: bytes, fields: Sequence[bytes], field: bytes) -> Record:
    """Return an entry as a record: its value is one field, or an object of all."""
    headers = {
        name.decode("utf-8", "replace"): value
        for name, value in zip(fields[::2], fields[1::2], strict=False)
    }
    if field:
        value = headers.get(field.decode())
        return Record(entry.decode(), value, headers=headers)
    try:
        pairs = zip(fields[::2], fields[1::2], strict=False)
        whole = {name.decode(): value.decode() for name, value in pairs}
    except UnicodeDecodeError:
        # It can't be taken, and is shown as it is.
        return Record(entry.decode(), b"\xff".join(fields), headers=headers)
    return Record(entry.decode(), msgspec.json.encode(whole), headers=headers)


async def _tick(connections: Connections) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        connections.tick()
