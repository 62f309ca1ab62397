"""NatsEngine: the journal that several nodes share, in JetStream, as a node sees it.

A record is taken by the log that it was made for, or not at all (`streams`).
JetStream keeps records as the servers' settings say. An answer of it says that a record is written,
not that it is on a disk, unless the servers have `sync_interval: always`, which no client can see:
so the operator says it (`sync_always`). If so, a log loses nothing but by a fault of the servers or
by somebody's hand, and its stamp stays over restarts and failovers. If not, a server that starts
again may have lost records: the stamp then has the incarnation of the server, or of the leader.
Facts: docs.nats.io, jepsen.io/analyses/nats-2.12.1.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NoReturn

import msgspec

from clevrd.errors import JournalFull, JournalUnavailable, MessageTooLarge
from clevrd.journal.base import Checkpoint, Fenced, Placed, Trimmed
from clevrd.journal.kept_checkpoints import FILL_BYTES, will_do
from clevrd.journal.nats.checkpoints import CheckpointStore
from clevrd.journal.nats.connection import TICK_S, Connection, Link, fault_in
from clevrd.journal.nats.library import (
    BAD_TLS,
    LOST,
    NAME_IN_USE,
    NO_MESSAGE,
    NO_STREAM,
    NOBODY,
    PASSING,
    Connector,
    NatsFault,
    sentence_of,
    unavailable,
)
from clevrd.journal.nats.reading import LogReader
from clevrd.journal.nats.settings import NatsSettings
from clevrd.journal.nats.streams import (
    ApiError,
    Names,
    StreamInfo,
    checkpoints_config,
    log_config,
    read_info,
    refusal_of,
    server_refusal_of,
    stamp_of,
    wants_update,
)

log = logging.getLogger(__name__)

# How long a start waits for servers that are not up yet, or have no leader.
START_S: Final = 10.0
_START_RETRY_S: Final = 0.2
# The streams are looked at so often.
_LOOK_OVER_S: Final = 2.0
# A new leader may still read what was accepted before it, so its word that records are gone is
# asked for again for a while, where there are copies.
_CONFIRM_TIMES: Final = 8
_CONFIRM_S: Final = 0.25


class _Partition:
    """One partition's log."""

    def __init__(self, number: int, stream: str) -> None:
        self.number = number
        self.stream = stream
        # The incarnation that accepts records now; empty while it has to be asked.
        self.stamp = ""
        # The log's id and when its stream was made, as they were seen last.
        self.log_id = ""
        self.created = ""
        # The subject of its records.
        self.subject = ""
        # The newest record that was seen or appended in this log.
        self.newest = 0
        # The log, by id and making, that was read last.
        self.reading = ("", "")
        # One looks at the stream at a time, or an older answer could replace a newer one.
        self.lock = asyncio.Lock()


class _Ack(msgspec.Struct, frozen=True):
    seq: int = 0
    error: ApiError | None = None


class _Message(msgspec.Struct, frozen=True):
    data: str = ""


class _Found(msgspec.Struct, frozen=True):
    message: _Message = _Message()


_ack_decoder: Final = msgspec.json.Decoder(_Ack)
_found_decoder: Final = msgspec.json.Decoder(_Found)


class NatsEngine:
    """Engine of `journal/base` over JetStream."""

    name = "nats"
    keeps_topics = False
    is_shared = True
    # Nodes hear of themselves by empty records anyway.
    is_unsure = False
    # A consumer is handed a record when the stream has it as it has all others.
    answers_when_taken = False
    # The p50 of 20,000 messages a second over 8 partitions is 5.8, 3.3 and 2.1 ms at 8, 4 and 2 ms,
    # and the CPU of a message 40, 41 and 45 us.
    max_apart_s = 0.003

    def __init__(self, settings: NatsSettings) -> None:
        """Make an engine; `open` connects it."""
        self.partitions = settings.partitions
        self.durability = settings.durability
        self._settings = settings
        self._names = Names(settings.prefix)
        # Tells this engine from those of other nodes.
        self._name = secrets.token_hex(8)
        self._partitions = [
            _Partition(number, self._names.stream(number)) for number in range(settings.partitions)
        ]
        # Set by open; None before it and after close.
        self._link: Link | None = None
        self._readers: list[LogReader] = []
        self._tasks: list[asyncio.Task[None]] = []

    # --- Engine ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and check that these are servers, and a log, that can be used.

        Raises:
            ConfigError: a file of certificates can't be used.
            JournalUnavailable: with a sentence that says what to do.
        """
        loop = asyncio.get_running_loop()
        connector = Connector(self._settings)
        link = self._link = Link(
            self._settings.address.hosts, connector, loop, self._check_server, self._lost
        )
        self._readers = [
            LogReader(
                each.stream,
                link.connection,
                partial(self._check_place, each),
                partial(self.first, each.number),
                loop,
            )
            for each in self._partitions
        ]
        self._tasks.append(loop.create_task(self._tick(link)))
        try:
            await self._check_until(loop.time() + START_S, loop)
        except BaseException:
            await self.close()
            raise
        self._tasks.append(loop.create_task(self._look_over()))

    async def stamp(self, partition: int) -> str:
        """Return the incarnation of what accepts records now."""
        each = self._partitions[partition]
        return each.stamp or await self._renew_stamp(each)

    async def append(
        self, partition: int, record: bytes, stamp: str, placed: Sequence[Placed]
    ) -> None:
        """Append ``record``: see `Engine.append`.

        Its subject has the log's id, and where the stamp has the server's incarnation it goes over
        the connection by which the stamp was asked for, which ends with the server.

        Raises:
            MessageTooLarge: the servers take no message of this size.
        """
        each = self._partitions[partition]
        if (each.stamp or await self._renew_stamp(each)) != stamp:
            raise Fenced
        connection = self._opened().present
        if connection is None:
            raise self._unavailable(NatsFault(LOST, "the connection has broken"))
        if len(record) > connection.max_payload:
            raise MessageTooLarge(
                connection.max_payload, len(record), "max_payload of the NATS servers"
            )
        log_id, newest = each.log_id, each.newest
        try:
            position = await self._put(each.subject, record, connection)
        except NatsFault as fault:
            each.stamp = ""
            if fault.code == NOBODY and await self._renew_stamp(each) != stamp:
                raise Fenced from fault
            raise self._unavailable(fault) from fault
        if each.log_id == log_id:
            if position <= newest:
                # The place had another record, which was seen here before.
                await self._begin_anew(each)
                raise JournalUnavailable("The log has lost records, and begins anew.")
            each.newest = max(each.newest, position)
            self._readers[partition].note_append(position)

    async def read(self, partition: int, after: int) -> list[tuple[int, bytes]]:
        """Return the next records behind ``after``; wait for one."""
        self._opened()
        try:
            found = await self._readers[partition].read(after)
        except NatsFault as fault:
            raise self._unavailable(fault) from fault
        each = self._partitions[partition]
        each.newest = max(each.newest, found[-1][0])
        return found

    async def first(self, partition: int) -> int:
        """Return the oldest record's position."""
        return (await self._look_at(self._partitions[partition])).first

    async def is_short(self, partition: int) -> bool:
        """Return whether the log has its first record, and takes FILL_BYTES at most."""
        info = await self._look_at(self._partitions[partition])
        return info.first <= 1 and info.state.bytes <= FILL_BYTES

    async def digest(self, partition: int, position: int) -> str | None:
        """Return the CRC-32 of the record at ``position``; None if it is gone."""
        record = await self._record_at(self._partitions[partition], position)
        return None if record is None else f"{zlib.crc32(record):08x}"

    async def load_checkpoints(self, partition: int) -> list[Checkpoint]:
        """Return the whole checkpoints that are kept, newest first."""
        info = await self._look_at(self._partitions[partition])
        return await self._store(partition).load(info)

    async def save_checkpoint(self, partition: int, checkpoint: Checkpoint) -> None:
        """Keep ``checkpoint``, unless another node has just saved one."""
        info = await self._look_at(self._partitions[partition])
        store = self._store(partition)
        entries = await store.entries()
        if entries and will_do(entries[0], checkpoint, self._name, info.now_ms):
            return
        reach = FILL_BYTES * info.state.messages // max(info.state.bytes, 1)
        await store.save(checkpoint, info, info.now_ms, reach)

    def history(self) -> None:
        """Return None: nodes read the log alone."""

    def storage(self) -> None:
        """Return None: it has no files of its own."""

    async def close(self) -> None:
        """End the connection; a second call does nothing."""
        link, self._link = self._link, None
        if link is None:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await link.close()

    # --- questions -------------------------------------------------------------------------------

    def _opened(self) -> Link:
        if self._link is None:
            raise JournalUnavailable("The journal is closed.")
        return self._link

    def _unavailable(self, fault: NatsFault) -> Exception:
        return unavailable(fault, self._settings.shown)

    async def _ask(self, subject: str, question: Any = None) -> bytes:
        """Ask JetStream; raises JournalUnavailable with the fault as its cause."""
        try:
            return await self._api(subject, question)
        except NatsFault as fault:
            raise self._unavailable(fault) from fault

    async def _api(self, subject: str, question: Any = None) -> bytes:
        """Ask JetStream; raises NatsFault."""
        connection = await self._opened().connection()
        return await connection.api(subject, question)

    async def _put(self, subject: str, data: bytes, connection: Connection | None = None) -> int:
        """Have a stream take a message; return its position. Raises NatsFault."""
        connection = connection or await self._opened().connection()
        answer = await connection.request(subject, data)
        try:
            ack = _ack_decoder.decode(answer)
        except msgspec.MsgspecError as failure:
            raise NatsFault("10000", "an answer that can't be read") from failure
        if ack.error is not None:
            raise fault_in(ack.error)
        return ack.seq

    async def _record_at(self, each: _Partition, position: int) -> bytes | None:
        try:
            answer = await self._api(f"STREAM.MSG.GET.{each.stream}", {"seq": position})
        except NatsFault as fault:
            if fault.code in (NO_MESSAGE, NO_STREAM):
                return None
            raise self._unavailable(fault) from fault
        return base64.b64decode(_found_decoder.decode(answer).message.data)

    def _store(self, partition: int) -> CheckpointStore:
        async def put(subject: str, data: bytes) -> None:
            try:
                await self._put(subject, data)
            except NatsFault as fault:
                raise self._unavailable(fault) from fault

        return CheckpointStore(self._ask_store, put, self._names, partition, self._name)

    async def _ask_store(self, subject: str, question: Any) -> bytes:
        try:
            return await self._api(subject, question)
        except NatsFault as fault:
            if fault.code == NO_MESSAGE:
                raise
            if fault.code == NO_STREAM:
                # Somebody has removed it; the next question finds a new one.
                await self._make_checkpoints()
            raise self._unavailable(fault) from fault

    # --- the streams -----------------------------------------------------------------------------

    async def _info(self, each: _Partition) -> StreamInfo:
        """Return what the server says of a partition's stream, which is made if it is missing.

        Raises:
            NatsFault: the server refuses, or can't be reached.
            JournalUnavailable: it is not one of this journal.
        """
        try:
            answer = await self._api(f"STREAM.INFO.{each.stream}")
        except NatsFault as fault:
            if fault.code != NO_STREAM:
                raise
            config = log_config(self._settings, self._names, each.number, secrets.token_hex(8))
            answer = await self._make(each.stream, config)
        return self._understood(answer, each.stream)

    async def _make(self, stream: str, config: dict[str, Any]) -> bytes:
        """Make a stream, unless another node has just made it; return what is said of it."""
        try:
            return await self._api(f"STREAM.CREATE.{stream}", config)
        except NatsFault as fault:
            if fault.code != NAME_IN_USE:
                raise
        return await self._api(f"STREAM.INFO.{stream}")

    async def _make_checkpoints(self) -> StreamInfo:
        stream = self._names.checkpoints
        answer = await self._make(stream, checkpoints_config(self._settings, self._names))
        return self._understood(answer, stream)

    def _understood(self, answer: bytes, stream: str) -> StreamInfo:
        info = read_info(answer)
        if info is None:
            raise NatsFault("10000", "an answer that can't be read")
        refusal = refusal_of(info, stream, self._settings)
        if refusal is not None:
            raise JournalUnavailable(refusal)
        return info

    async def _look_at(self, each: _Partition) -> StreamInfo:
        """Return what the server says of the stream, and go by it.

        Raises:
            JournalUnavailable: the server refuses, or can't be reached.
        """
        async with each.lock:
            try:
                info, connection, is_lost = await self._looked(each)
                if is_lost:
                    info, connection = await self._renamed(each)
                self._note(each, info, connection)
            except NatsFault as fault:
                raise self._unavailable(fault) from fault
            except JournalUnavailable:
                # Somebody has changed the stream, and it would lose records. The next append asks
                # for the stamp, and its publishers are refused for this reason.
                each.stamp = ""
                raise
            return info

    async def _looked(self, each: _Partition) -> tuple[StreamInfo, Connection, bool]:
        """Return what the server says of the stream, and whether records are lost.

        They are if the stream has less than was seen in it before the question.
        """
        times = 0
        while True:
            newest = each.newest
            connection = await self._opened().connection()
            info = await self._info(each)
            is_same = (each.log_id, each.created) == (info.log_id, info.created)
            is_lost = is_same and info.last < newest
            times += 1
            if not is_lost or self._settings.replicas == 1 or times > _CONFIRM_TIMES:
                return info, connection, is_lost
            await asyncio.sleep(_CONFIRM_S)

    def _note(self, each: _Partition, info: StreamInfo, connection: Connection) -> None:
        """Go by what the server has said over ``connection``; raises NatsFault if it has ended."""
        if connection.fault is not None:
            raise NatsFault(connection.fault.code, connection.fault.text)
        if (each.log_id, each.created) != (info.log_id, info.created):
            each.newest = info.last
            if each.log_id:
                log.warning("the log has begun anew partition=%d", each.number)
                self._readers[each.number].restart()
        each.log_id, each.created = info.log_id, info.created
        each.subject = info.config.subjects[0]
        incarnation = ""
        if not self._settings.sync_always:
            cluster = info.cluster
            incarnation = connection.incarnation or f"{cluster.leader} {cluster.leader_since}"
        each.stamp = stamp_of(info, incarnation)

    async def _renew_stamp(self, each: _Partition) -> str:
        await self._look_at(each)
        if not each.stamp:
            raise self._unavailable(NatsFault(LOST, "the connection has broken"))
        return each.stamp

    async def _renamed(self, each: _Partition) -> tuple[StreamInfo, Connection]:
        """Give the log another id, since it has lost records; return what it is then.

        From then on the stream takes nothing that was made for the log that it was.

        Raises:
            JournalUnavailable: it is not one of this journal.
            NatsFault: the server refuses, or can't be reached.
        """
        # Another's stream, which somebody has put in its place, is not changed.
        await self._info(each)
        log.warning("the log has lost records, and begins anew partition=%d", each.number)
        config = log_config(self._settings, self._names, each.number, secrets.token_hex(8))
        await self._api(f"STREAM.UPDATE.{each.stream}", config)
        connection = await self._opened().connection()
        return await self._info(each), connection

    async def _begin_anew(self, each: _Partition) -> None:
        """Let all nodes begin a new epoch: raises JournalUnavailable."""
        async with each.lock:
            each.stamp = ""
            try:
                self._note(each, *await self._renamed(each))
            except NatsFault as fault:
                raise self._unavailable(fault) from fault

    async def _check_place(self, each: _Partition, after: int, record: bytes | None) -> None:
        """Raise Trimmed unless all records behind ``after`` can be read.

        Args:
            record: what was read at ``after``; None if it was not read by this engine.
        """
        info = await self._look_at(each)
        is_lost = info.last < after
        if not is_lost and record is not None:
            found = await self._record_at(each, after)
            is_lost = found is not None and found != record
        is_read_before = each.reading == (each.log_id, each.created)
        each.reading = each.log_id, each.created
        if is_lost:
            if is_read_before:
                # No other code has noticed yet that this is another log by now.
                await self._begin_anew(each)
            raise Trimmed
        if info.first > after + 1:
            raise Trimmed

    # --- at the start ----------------------------------------------------------------------------

    async def _check_until(self, until_s: float, loop: asyncio.AbstractEventLoop) -> None:
        """Check all, again and again as long as what is wrong may pass by itself."""
        is_told = False
        while True:
            try:
                await self._check()
                return
            except (NatsFault, JournalUnavailable, JournalFull) as error:
                fault = error if isinstance(error, NatsFault) else error.__cause__
                if not isinstance(fault, NatsFault):
                    raise
                if fault.code not in PASSING or fault.code == BAD_TLS or loop.time() >= until_s:
                    raise JournalUnavailable(sentence_of(fault, self._settings.shown)) from error
                if not is_told:
                    log.warning(
                        "waiting for nats reason=%r", sentence_of(fault, self._settings.shown)
                    )
                    is_told = True
            await asyncio.sleep(_START_RETRY_S)

    async def _check(self) -> None:
        await self._api("INFO")
        for each in self._partitions:
            info = await self._look_at(each)
            if wants_update(info, self._settings):
                config = log_config(self._settings, self._names, each.number, info.log_id)
                await self._api(f"STREAM.UPDATE.{each.stream}", config)
        await self._make_checkpoints()
        for each in self._partitions:
            await self._look_for_lost_tail(each)

    async def _look_for_lost_tail(self, each: _Partition) -> None:
        """Begin anew where a checkpoint counts more records than the log has had."""
        entries = await self._store(each.number).entries()
        counted = [entry.position for entry in entries if entry.created == each.created]
        if counted:
            each.newest = max(each.newest, *counted)
            await self._look_at(each)

    def _check_server(self, connection: Connection) -> None:
        refusal = server_refusal_of(connection.server, self._settings.shown)
        if refusal is not None:
            raise JournalUnavailable(refusal)

    # --- all the time ----------------------------------------------------------------------------

    def _lost(self) -> None:
        """Ask for all stamps again: the next connection may lead to another start of the server."""
        for each in self._partitions:
            each.stamp = ""

    async def _tick(self, link: Link) -> NoReturn:
        while True:
            await asyncio.sleep(TICK_S)
            link.tick()
            for reader in self._readers:
                reader.tick()

    async def _look_over(self) -> NoReturn:
        """Notice a log that was made again, or has lost records, or has another leader."""
        while True:
            await asyncio.sleep(_LOOK_OVER_S + secrets.randbelow(1000) / 1000)
            await self._look_at_all()

    async def _look_at_all(self) -> None:
        for each in self._partitions:
            try:
                await self._look_at(each)
            except (JournalUnavailable, JournalFull) as error:
                log.debug("log not looked at partition=%d reason=%s", each.number, error)
            except Exception:
                # The next round is to come in any case.
                log.exception("log not looked at")
