"""JetStreamReader: reads a stream of NATS JetStream behind a durable consumer.

The consumer's acknowledged floor is the position. Its server pins one client (pinned_client), which
alone is sent messages, so that their order stays; it is let go when it asks for nothing for
_PIN_S. Messages that were sent to a client that is gone are read from the stream itself, in order,
before newer ones are taken. Source: docs.nats.io/nats-concepts/jetstream/consumers, ADR-42.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from clevrd.core.message_headers import headers_of_record
from clevrd.journal.nats.connection import TICK_S, Connection, Link
from clevrd.journal.nats.library import DENIED, LOST, Connector, NatsFault, sentence_of
from clevrd.journal.nats.settings import NatsSettings
from clevrd.metrics.sources import SourceState
from clevrd.sources.progress import Progress
from clevrd.sources.reading import READING, STANDBY, SourceTrouble, Status
from clevrd.sources.records import Record
from clevrd.sources.settings import SourceEntry
from clevrd.sources.starts import EARLIEST, LATEST

log = logging.getLogger(__name__)

# The rights that a user has to have, as they stand in a server's configuration.
PERMISSIONS: Final = 'permissions { publish: ["$JS.API.>", "$JS.ACK.>"], subscribe: ["_INBOX.>"] }'

# Seconds after which the server lets go of a client that asks for nothing.
_PIN_S: Final = 10
# Seconds that one request for messages waits, and that `read` does.
_PULL_S: Final = 5
_WAIT_S: Final = 0.5
# The consumer is looked at so often.
_LOOK_S: Final = 3.0
# Seconds after which the server would send a message again that is not acknowledged.
_ACK_WAIT_S: Final = 60
# Messages of one request at first, and at most; and bytes that one is to have.
_FIRST_COUNT: Final = 16
_MAX_COUNT: Final = 256
_READ_BYTES: Final = 1 << 20
_GROUP: Final = "source"
_NS: Final = 1_000_000_000

# Numbers of JetStream's errors (nats-server, server/errors.json).
_NO_STREAM: Final = "10059"
_NO_CONSUMER: Final = "10014"
_NO_MESSAGE: Final = "10037"
# Codes of faults by which a source is "refused"; it is "away" for all others.
_REFUSED: Final = frozenset({DENIED, "REFUSED", "NO_TLS", "NOT_NATS", "BAD_TLS", "BAD_FILE"})


class JetStreamReader:
    """`Reader` of `sources/reading` over a stream of JetStream."""

    def __init__(self, entry: SourceEntry, settings: NatsSettings, progress: Progress) -> None:
        """Make a reader; raises ConfigError where a file of certificates can't be used."""
        place = entry.place
        # The name in the URL, and the stream and the filter that it stands for.
        self._name = place.stream
        self._stream = ""
        self._filter = ""
        self._durable = entry.group_name.replace(".", "_").replace(":", "_")
        self._start = entry.beginning
        self._shown = place.shown
        self._progress = progress
        self._settings = settings
        self._connector = Connector(settings)
        # Set by open, None after close.
        self._link: Link | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._inbox = ""
        # When the stream was made, and the last message that is done with, in the stream's numbers.
        self._created = ""
        self._position = 0
        # The stream was seen missing, or is another one, so all its messages are new.
        self._was_missing = False
        # Messages that the server has sent; how many more it may send, and when it was asked for
        # them; set when something came.
        self._came: deque[Any] = deque()
        self._asked = 0
        self._asked_at_s = 0.0
        self._arrived = asyncio.Event()
        # The server's name for this client while it is the pinned one; empty before that.
        self._pin = ""
        self._has_lost_pin = False
        self.status: Status | None = READING
        # Messages up to this number may have been sent to another client, and are read from the
        # stream itself; 0 for none. Their acknowledgement is sent to this subject.
        self._catch_up_to = 0
        self._catch_up_ack = ""
        # Where what is done with is to be acknowledged; empty for nothing.
        self._ack = ""
        self._acks: dict[int, str] = {}
        # Messages that were returned and are not done with, and the last one of them.
        self._under_way = 0
        self._last = 0
        self._looked_s = 0.0
        self._wanted = _FIRST_COUNT

    # --- Reader ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and find the consumer, or make it."""
        loop = asyncio.get_running_loop()
        link = Link(self._settings.address.hosts, self._connector, loop, lambda _: None, self._wake)
        self._link = link
        self._ticking = loop.create_task(_tick(link))
        self._came.clear()
        self._acks.clear()
        self._asked, self._pin, self._ack, self._has_lost_pin = 0, "", "", False
        self._catch_up_to, self._looked_s, self.status = 0, 0.0, READING
        self._under_way = 0
        try:
            connection = await link.connection()
            await self._find_stream(connection)
            await self._find_consumer(connection)
            self._inbox = connection.new_inbox()
            await connection.subscribe(self._inbox, self._got)
        except NatsFault as fault:
            raise self._trouble(fault) from fault

    async def read(self) -> Sequence[Record]:
        """Return the next records; wait for one, at most about half a second."""
        try:
            connection = self._present()
            await self._acknowledge(connection)
            await self._look(connection)
            if not self._came and not self._catch_up_to:
                self._arrived.clear()
                await self._ask_for_more(connection)
                if self._under_way:
                    return ()
                try:
                    async with asyncio.timeout(_WAIT_S):
                        await self._arrived.wait()
                except TimeoutError:
                    return ()
            if self._has_lost_pin:
                raise SourceTrouble("standby", "another process reads it", soon=True)
            if self._under_way and (self._catch_up_to or self._has_hole()):
                # Where to go on is known when all that was returned is done with.
                return ()
            if self._catch_up_to == -1:
                await self._begin_catching_up(connection)
            if self._catch_up_to:
                return await self._catch_up(connection)
            if not self._has_hole():
                return self._records(0, 0)
            came = _place_of(self._came[-1].reply)[0]
            answer = json.loads(await connection.api(f"STREAM.INFO.{self._stream}"))
            first = answer["state"]["first_seq"]
            self._note_trimmed(first)
            return self._records(first, came)
        except NatsFault as fault:
            raise self._trouble(fault) from fault

    def done(self, records: Sequence[Record]) -> None:
        """Note that these are done with."""
        if not records:
            return
        self._position = int(records[-1].position)
        self._under_way -= len(records)
        self._progress.position = records[-1].position
        for record in records:
            self._ack = self._acks.pop(int(record.position), self._ack)
        if self._catch_up_to and self._position >= self._catch_up_to:
            self._end_catching_up()

    async def hold(self) -> None:
        """Stay the pinned client."""
        try:
            connection = self._present()
            await self._acknowledge(connection)
            await self._ask_for_more(connection)
        except NatsFault as fault:
            raise self._trouble(fault) from fault
        if self._has_lost_pin:
            raise SourceTrouble("standby", "another process reads it", soon=True)

    async def close(self) -> None:
        """Acknowledge what is done with, let go of the pin, and disconnect."""
        link, self._link = self._link, None
        if link is None:
            return
        connection = link.present
        try:
            if connection is not None and connection.fault is None:
                await self._say_goodbye(connection)
        finally:
            if self._ticking is not None:
                self._ticking.cancel()
                await asyncio.gather(self._ticking, return_exceptions=True)
            await link.close()

    # --- the stream and its consumer -------------------------------------------------------------

    async def _find_stream(self, connection: Connection) -> None:
        """Find the stream, by its name or by a subject of it."""
        self._filter = ""
        found = None
        if not any(char in self._name for char in ".*>"):
            found = await self._stream_info(connection, self._name)
        if found is None:
            answer = await connection.api("STREAM.NAMES", {"subject": self._name})
            names = json.loads(answer).get("streams") or []
            if len(names) != 1:
                why = "several streams have" if names else "no stream has"
                self._was_missing = True
                raise SourceTrouble(
                    "missing",
                    f"In NATS at {self._shown} {why} the name or the subject"
                    f" {self._name[:200]!a}; it is read as soon as one has.",
                    soon=not names,
                )
            self._filter = self._name
            found = await self._stream_info(connection, names[0])
        if found is None:
            raise NatsFault(LOST, "the stream is gone")
        if found["config"].get("retention") == "workqueue":
            raise SourceTrouble(
                "refused",
                f"The stream {found['config']['name']} in NATS at {self._shown} is a work queue,"
                " which gives each message to one consumer and deletes it; make a stream that is"
                " none and copies it, and write the name of that.",
            )
        self._stream = found["config"]["name"]
        created = str(found["created"])
        if self._created not in ("", created):
            log.warning("the stream was made anew stream=%s group=%s", self._stream, self._durable)
            self._position, self._was_missing = 0, True
        self._created = created
        self._note_trimmed(found["state"]["first_seq"])

    async def _stream_info(self, connection: Connection, name: str) -> Any:
        try:
            return json.loads(await connection.api(f"STREAM.INFO.{name}"))
        except NatsFault as fault:
            if fault.code == _NO_STREAM:
                return None
            raise

    async def _find_consumer(self, connection: Connection) -> None:
        try:
            info = await self._consumer_info(connection)
        except NatsFault as fault:
            if fault.code != _NO_CONSUMER:
                raise
            info = await self._make_consumer(connection)
        config = info["config"]
        is_ours = (
            config.get("ack_policy") == "all"
            and config.get("priority_policy") == "pinned_client"
            and not config.get("deliver_subject")
        )
        if not is_ours or config.get("filter_subject", "") not in ("", self._filter):
            raise SourceTrouble(
                "refused",
                f"The consumer {self._durable} of the stream {self._stream} in NATS at"
                f" {self._shown} was made for something else; remove it, or write another group.",
            )
        self._position = max(self._position, info["ack_floor"]["stream_seq"])
        self._progress.position = str(self._position or "")
        self._note_info(info)

    async def _consumer_info(self, connection: Connection) -> Any:
        answer = await connection.api(f"CONSUMER.INFO.{self._stream}.{self._durable}")
        return json.loads(answer)

    async def _make_consumer(self, connection: Connection) -> Any:
        config: dict[str, Any] = {
            "durable_name": self._durable,
            "ack_policy": "all",
            "ack_wait": _ACK_WAIT_S * _NS,
            "max_deliver": -1,
            "max_ack_pending": 2 * _MAX_COUNT,
            "priority_groups": [_GROUP],
            "priority_policy": "pinned_client",
            "priority_timeout": _PIN_S * _NS,
            **self._first_position(),
        }
        if self._filter:
            config["filter_subject"] = self._filter
        question = {"stream_name": self._stream, "config": config}
        subject = f"CONSUMER.DURABLE.CREATE.{self._stream}.{self._durable}"
        info = json.loads(await connection.api(subject, question))
        self._was_missing = False
        log.info("source begins group=%s stream=%s", self._durable, self._stream)
        return info

    def _first_position(self) -> dict[str, Any]:
        start = self._start
        if self._position:
            # The consumer alone was removed.
            return {"deliver_policy": "by_start_sequence", "opt_start_seq": self._position + 1}
        if start.end == EARLIEST or self._was_missing:
            return {"deliver_policy": "all"}
        if start.end == LATEST:
            return {"deliver_policy": "new"}
        if start.since_ms is not None:
            moment = datetime.fromtimestamp(start.since_ms / 1000, UTC)
            return {"deliver_policy": "by_start_time", "opt_start_time": moment.isoformat()}
        return {"deliver_policy": "by_start_sequence", "opt_start_seq": int(start.position)}

    async def _look(self, connection: Connection) -> None:
        """Look now and then whether the consumer is there, who reads, and what was trimmed."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        info = await self._consumer_info(connection)
        self._note_info(info)
        if info["num_ack_pending"] and not (self._pin or self._came or _pinned(info)):
            await self._have_sent_again(connection, info["delivered"])

    async def _have_sent_again(self, connection: Connection, delivered: Any) -> None:
        """Have the server send the last message again that it has sent to a client that is gone.

        It is for whoever is pinned with it to read all before it from the stream. By itself the
        server would send one after _ACK_WAIT_S, and where so many are not acknowledged as may be,
        or the stream has no newer ones, nothing before that: nobody would be pinned.
        """
        log.info("source goes on for a client that is gone group=%s", self._durable)
        await connection.publish(self._subject_of(delivered), b"-NAK")

    def _subject_of(self, delivered: Any) -> str:
        """Return where the last message that the consumer has sent is acknowledged."""
        sequences = f"{delivered['stream_seq']}.{delivered['consumer_seq']}"
        return f"$JS.ACK.{self._stream}.{self._durable}.1.{sequences}.0.0"

    def _note_info(self, info: Any) -> None:
        pinned = _pinned(info)
        is_standby = bool(pinned) and pinned != self._pin
        self.status = STANDBY if is_standby else READING
        self._progress.lag = None if is_standby else info["num_pending"] + len(self._came)

    def _has_hole(self) -> bool:
        """Return whether numbers are missing behind what was returned, or between what has come.

        Where the source has a subject, messages of others lie between, and nothing can be said.
        """
        if self._filter:
            return False
        before = self._last if self._under_way else self._position
        for message in self._came:
            sequence = _place_of(message.reply)[0]
            if before and sequence > before + 1:
                return True
            before = max(before, sequence)
        return False

    def _note_trimmed(self, first: int) -> None:
        """Count what the stream gave up between the position and the next message.

        Args:
            first: the oldest message that the stream has.
        """
        if not self._position or self._filter:
            return
        sent = _place_of(self._came[0].reply)[0] if self._came else first
        gone = min(first, sent) - self._position - 1
        if gone > 0:
            self._progress.note_lost(gone, "the stream gave up its oldest messages")
            self._position += gone

    # --- messages --------------------------------------------------------------------------------

    def _present(self) -> Connection:
        connection = None if self._link is None else self._link.present
        if connection is None:
            raise NatsFault(LOST, "the connection was closed")
        return connection

    async def _ask_for_more(self, connection: Connection) -> None:
        """Have the server send more, unless it was asked or enough is here."""
        now_s = asyncio.get_running_loop().time()
        is_asked = self._asked > 0 and now_s - self._asked_at_s < _PULL_S + 1
        if is_asked or len(self._came) >= _MAX_COUNT:
            return
        self._asked, self._asked_at_s = self._wanted, now_s
        question: dict[str, Any] = {
            "batch": self._wanted,
            "expires": _PULL_S * _NS,
            "group": _GROUP,
        }
        if self._pin:
            question["id"] = self._pin
        await connection.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._durable}",
            json.dumps(question).encode(),
            self._inbox,
        )

    async def _got(self, message: Any) -> None:
        """Note a message, or what the server says of a request."""
        link = self._link
        if link is not None and link.present is not None:
            link.present.note_heard()
        headers = message.headers or {}
        status = headers.get("Status")
        if status is not None and not message.reply.startswith("$JS.ACK."):
            if status != "100":
                self._asked = 0
            if status == "423":
                self._has_lost_pin = True
                self._wake()
            elif status == "503":
                self._looked_s = 0.0
                self._wake()
            elif status == "409":
                self._looked_s = 0.0
            return
        self._asked -= 1
        pin = headers.get("Nats-Pin-Id", "")
        if pin and pin != self._pin:
            # Messages before this one may have been sent to a client that is gone.
            self._pin, self._catch_up_to = pin, -1
        self._came.append(message)
        self._wake()

    def _wake(self) -> None:
        self._arrived.set()

    def _records(self, first: int, came: int) -> Sequence[Record]:
        """Return what has come, without what is done with already.

        It goes on behind missing numbers only where the stream had the message before them when all
        had come: then others were taken from its middle, as where it keeps the newest of each
        subject, and none was given up for its age or size.

        Args:
            first: the oldest message of the stream when ``came`` had come; 0 for not asked.
            came: the last one that had come then.
        """
        records: list[Record] = []
        size_bytes = 0
        while self._came:
            message = self._came.popleft()
            sequence, pending, _ = _place_of(message.reply)
            if records and not self._filter:
                before = int(records[-1].position)
                if sequence > before + 1 and not (sequence <= came and 0 < first <= before):
                    # The stream may have given up messages between the two; `read` finds out.
                    self._came.appendleft(message)
                    break
            self._progress.lag = pending + len(self._came)
            if sequence <= self._position or sequence in self._acks:
                continue
            self._acks[sequence] = message.reply
            size_bytes += len(message.data)
            headers = {name: str(value).encode() for name, value in (message.headers or {}).items()}
            records.append(_record(sequence, message.data, message.subject, headers))
        if records:
            fitting = max(1, len(records) * _READ_BYTES // max(size_bytes, 1))
            self._wanted = min(fitting, 4 * self._wanted, _MAX_COUNT)
        return self._returned(records)

    def _returned(self, records: Sequence[Record]) -> Sequence[Record]:
        """Note that ``records`` are under way."""
        if records:
            self._under_way += len(records)
            self._last = int(records[-1].position)
        return records

    async def _acknowledge(self, connection: Connection) -> None:
        ack, self._ack = self._ack, ""
        if ack:
            await connection.publish(ack, b"+ACK")

    async def _say_goodbye(self, connection: Connection) -> None:
        try:
            ack, self._ack = self._ack, ""
            if ack:
                # Answered, so that it has arrived.
                await connection.request(ack, b"+ACK")
            if self._pin:
                subject = f"CONSUMER.UNPIN.{self._stream}.{self._durable}"
                await connection.api(subject, {"group": _GROUP})
        except NatsFault:
            # Messages are sent again, and are known by their keys.
            return

    # --- messages that were sent to another client -----------------------------------------------

    async def _begin_catching_up(self, connection: Connection) -> None:
        info = await self._consumer_info(connection)
        self._position = max(self._position, info["ack_floor"]["stream_seq"])
        delivered = info["delivered"]
        self._catch_up_to = max(0, delivered["stream_seq"])
        # AckAll: this one acknowledges all before it too.
        self._catch_up_ack = self._subject_of(delivered)
        sent_first = _place_of(self._came[0].reply)[2] if self._came else 0
        is_next = sent_first == info["ack_floor"]["consumer_seq"] + 1
        if is_next or self._catch_up_to <= self._position:
            # All that was sent to others was acknowledged.
            self._catch_up_to = 0

    async def _catch_up(self, connection: Connection) -> Sequence[Record]:
        """Return messages of the stream itself, up to what was sent already."""
        records: list[Record] = []
        sequence, size_bytes = self._position, 0
        while len(records) < _FIRST_COUNT and size_bytes < _READ_BYTES:
            question = {"seq": sequence + 1, "next_by_subj": self._filter or ">"}
            try:
                answer = await connection.api(f"STREAM.MSG.GET.{self._stream}", question)
            except NatsFault as fault:
                if fault.code != _NO_MESSAGE:
                    raise
                self._catch_up_to = sequence
                break
            found = json.loads(answer)["message"]
            if found["seq"] > self._catch_up_to:
                self._catch_up_to = sequence
                break
            sequence = found["seq"]
            data = base64.b64decode(found.get("data", ""))
            size_bytes += len(data)
            headers = _headers_of(base64.b64decode(found.get("hdrs", "")))
            records.append(_record(sequence, data, found["subject"], headers))
        if not records:
            self._end_catching_up()
        return self._returned(records)

    def _end_catching_up(self) -> None:
        self._catch_up_to = 0
        self._ack = self._catch_up_ack

    # --- trouble ---------------------------------------------------------------------------------

    def _trouble(self, fault: NatsFault) -> SourceTrouble:
        if fault.code in (_NO_CONSUMER, _NO_STREAM):
            return SourceTrouble(
                "missing",
                f"The stream or its consumer {self._durable} in NATS at {self._shown} is gone;"
                " it is looked for, and made again.",
                soon=True,
            )
        state: SourceState = "refused" if fault.code in _REFUSED else "away"
        if fault.code == DENIED:
            return SourceTrouble(
                state,
                f"NATS at {self._shown} does not allow its user what a source needs"
                f" ({fault.text.rstrip('.')}); it needs: {PERMISSIONS}.",
            )
        sentence = sentence_of(fault, self._shown)
        return SourceTrouble(
            state, sentence.replace("The journal's", "The source's").replace("the journal", "it")
        )


def _pinned(info: Any) -> str:
    """Return the server's name for the client that a consumer's messages go to; empty for none."""
    groups = info.get("priority_groups") or ()
    return str(groups[0].get("pinned_client_id", "")) if groups else ""


def _place_of(reply: str) -> tuple[int, int, int]:
    """Return a message's number in its stream, how many are behind it, and the consumer's number.

    Source: ADR-15.
    """
    words = reply.split(".")
    shift = 2 if len(words) > 9 else 0
    return int(words[5 + shift]), int(words[8 + shift]), int(words[6 + shift])


def _record(sequence: int, data: bytes, subject: str, headers: dict[str, bytes]) -> Record:
    # CloudEvents NATS binding §3.1.3.2: values are percent-encoded.
    carried = headers_of_record(headers, "ce-", is_encoded=True) if headers else None
    return Record(str(sequence), data, subject.encode(), headers=headers, carried=carried)


def _headers_of(block: bytes) -> dict[str, bytes]:
    """Return the headers of a block: a line with the version, and then a line for each."""
    headers = {}
    for line in block.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            headers[name.decode("utf-8", "replace").strip()] = value.strip()
    return headers


async def _tick(link: Link) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        link.tick()
