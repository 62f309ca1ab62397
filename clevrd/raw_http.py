"""The door every connection comes through: plain publishes and subscribes are answered here.

A request is plain when a strict grammar, narrower than HTTP's, recognises all of it. At the first
thing it does not recognise the connection and its unread bytes go to aiohttp for good: when in
doubt, hand over, never guess. What a request means is decided by the same endpoints on both ways.

Grammar: RFC 9112 §2 to §6, less everything that has a second reading.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final, cast

from clevrd.admission import Admitted, Endpoint, Gate
from clevrd.config import Config
from clevrd.errors import ClevrdError, RequestTimeout, Unavailable
from clevrd.head_cache import HeadCache
from clevrd.http_values import (
    HOST,
    LINGER_S,
    TOO_MUCH_INPUT,
    Refusals,
    Request,
    Response,
    ResponseRenderer,
    Upgrade,
    attach_upgrade,
)
from clevrd.input_budget import InputBudget
from clevrd.metrics.counters import Counters
from clevrd.pace import NEVER, reads_on, sent_step_bytes
from clevrd.progress import progress_of
from clevrd.scheduling.deadlines import Deadlines
from clevrd.scheduling.fair_turns import FairTurns
from clevrd.scheduling.timers import Tasks

log = logging.getLogger(__name__)

# Request line and header fields together; longer heads are aiohttp's, whose limits are per field.
MAX_HEAD_BYTES: Final = 8_192
# As aiohttp's: a head must not have more on one way than on the other.
MAX_FIELDS: Final = 128

# How long the rest of a request may take that had begun when the daemon began to drain: half a
# request must neither be lost nor hold up the stop.
LAST_REQUEST_S: Final = 1.0

# Connections that linger at once, each for LINGER_S; more are closed right away.
MAX_LINGERING: Final = 32

# Connections over the limit that may ask one thing: the daemon's health, since a full daemon is not
# one to be killed by its liveness probe, or events, since an EventSource gives up for good after a
# 503. When there are more, the one that has waited longest goes.
MAX_PROBES: Final = 16
# A probe sends its request with its connection.
PROBE_S: Final = 2.0
_PROBE_LINE: Final = re.compile(r"GET (/[!-~]*) HTTP/1\.([01])", re.ASCII)
_PROBE_BEGINNINGS: Final = (b"GET /health", b"GET /subscribe")

# How each plain request begins, and what none holds: a line end that is not CR LF, or a NUL.
_BEGINNINGS: Final = (b"POST /publish", b"GET /subscribe", b"GET /publish", b"GET /ws")
_NEVER_PLAIN: Final = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\0")
_PUBLISH_LINE: Final = re.compile(rb"POST (/publish(?:\?[!-~]*)?) HTTP/1\.1")
_UPGRADE_LINE: Final = re.compile(rb"GET ((/[a-z]+)(?:\?[!-~]*)?) HTTP/1\.1")
# One field line: a token, and a value of visible ASCII with inner spaces (RFC 9110 §5.5).
_FIELD: Final = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*((?:[!-~]+(?:[ \t]+[!-~]+)*)?)[ \t]*"
)
_LENGTH: Final = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)

# Fields that change how a message is framed or what may follow it, or that aiohttp refuses: never
# plain.
_FRAMING: Final = frozenset(
    {
        "content-encoding",
        "expect",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "sec-websocket-key1",
        "te",
        "trailer",
        "transfer-encoding",
    }
)


# How much of a request has arrived.
_NOTHING: Final = 0
_HEAD: Final = 1
_BODY: Final = 2


class PlainHead:
    """A request head that the grammar recognised whole."""

    __slots__ = ("admitted", "content_length", "endpoint", "generation", "is_upgrade", "request")

    def __init__(
        self, request: Request, endpoint: Endpoint, content_length: int, is_upgrade: bool
    ) -> None:
        self.request = request
        self.endpoint = endpoint
        self.content_length = content_length
        self.is_upgrade = is_upgrade
        # What the endpoint took it for, and the gate's generation at that time; None before.
        self.admitted: Admitted | None = None
        self.generation = -1


def read_fields(lines: list[bytes]) -> dict[str, str] | None:
    """Return field lines by lower-case name; None unless each is plain and no name comes twice."""
    fields = _read_lines(lines)
    return fields if fields is not None and HOST.fullmatch(fields.get("host", "")) else None


def _read_lines(lines: list[bytes]) -> dict[str, str] | None:
    """Return ``read_fields`` also where there is no host, as HTTP/1.0 has none."""
    fields: dict[str, str] = {}
    if len(lines) > MAX_FIELDS:
        return None
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            return None
        name = match[1].decode("ascii").lower()
        if name in fields or name in _FRAMING:
            return None
        fields[name] = match[2].decode("ascii")
    return fields


def can_become_plain(part: bytes) -> bool:
    """Return whether ``part``, in which no head ends yet, may be the beginning of a plain one."""
    return _begins(part, _BEGINNINGS) and _NEVER_PLAIN.search(part) is None


def _begins(part: bytes, beginnings: tuple[bytes, ...]) -> bool:
    """Return whether ``part`` begins as one of ``beginnings`` does, as far as it goes."""
    return part.startswith(beginnings) or any(each.startswith(part) for each in beginnings)


def read_probe(head: bytes) -> Request | None:
    """Return the GET without a body that ``head`` is; None when it is anything else."""
    line, *lines = head.split(b"\r\n")
    match = _PROBE_LINE.fullmatch(line.decode("latin-1"))
    fields = _read_lines(lines)
    if match is None or fields is None or "content-length" in fields or "upgrade" in fields:
        return None
    return Request("GET", match[1], fields, is_http_1_0=match[2] == "0")


def _no_room() -> Unavailable:
    return Unavailable("The daemon has as many connections as it may have; retry later.")


class PlainGrammar:
    """Recognises the two kinds of plain requests: publishes, and WebSocket upgrades."""

    def __init__(
        self, publish: Endpoint, upgrades: Mapping[str, Endpoint], max_message_bytes: int
    ) -> None:
        self._publish = publish
        # Path -> what answers its upgrades.
        self._upgrades = upgrades
        self._max_message_bytes = max_message_bytes
        # Of publishes on kept connections, parsed once.
        self._cache: HeadCache[PlainHead] = HeadCache()

    def read(self, head: bytes) -> PlainHead | None:
        """Return what ``head`` asks, without its final empty line; None when it is not plain."""
        cached = self._cache.get(head)
        if cached is not None:
            return cached
        line, *lines = head.split(b"\r\n")
        if match := _PUBLISH_LINE.fullmatch(line):
            plain = self._read_publish(match[1].decode("ascii"), read_fields(lines))
            # A head with a key of its own comes once, and would push out those that come again.
            if plain is not None and "idempotency-key" not in plain.request.headers:
                self._cache.add(head, plain)
            return plain
        if match := _UPGRADE_LINE.fullmatch(line):
            endpoint = self._upgrades.get(match[2].decode("ascii"))
            if endpoint is not None:
                return self._read_upgrade(endpoint, match[1].decode("ascii"), read_fields(lines))
        return None

    def _read_publish(self, target: str, fields: dict[str, str] | None) -> PlainHead | None:
        if fields is None or "upgrade" in fields:
            return None
        if fields.get("connection", "keep-alive").lower() != "keep-alive":
            return None
        length = fields.get("content-length", "")
        if not _LENGTH.fullmatch(length) or int(length) > self._max_message_bytes:
            return None
        return PlainHead(Request("POST", target, fields), self._publish, int(length), False)

    def _read_upgrade(
        self, endpoint: Endpoint, target: str, fields: dict[str, str] | None
    ) -> PlainHead | None:
        if fields is None or "content-length" in fields:
            return None
        if fields.get("upgrade", "").lower() != "websocket":
            return None
        # Firefox sends "keep-alive, Upgrade".
        connection = fields.get("connection", "").lower().replace(" ", "")
        if connection not in ("upgrade", "keep-alive,upgrade"):
            return None
        return PlainHead(Request("GET", target, fields), endpoint, 0, True)


class Door:
    """What all raw connections share: grammar, limits, deadlines, the way to aiohttp."""

    def __init__(
        self,
        *,
        gate: Gate,
        grammar: PlainGrammar | None,
        probes: Mapping[str, Endpoint],
        refusals: Refusals,
        make_aiohttp_protocol: Callable[[], asyncio.Protocol],
        count_handed_over: Callable[[], int],
        counters: Counters,
        tasks: Tasks,
        turns: FairTurns,
        budget: InputBudget,
        config: Config,
        max_connections: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._gate = gate
        # None hands every connection straight over.
        self.grammar = grammar
        self.refusal = refusals.answer
        self.make_aiohttp_protocol = make_aiohttp_protocol
        self.counters = counters
        self.renderer = ResponseRenderer()
        self.request_timeout_s = config.request_timeout_s
        self.sent_step_bytes = sent_step_bytes(config.request_timeout_s)
        self.keepalive_timeout_s = config.keepalive_timeout_s
        self.now_s = loop.time
        self.loop = loop
        self.open: set[RawConnection] = set()
        # Connections that have had a last word and are to see it; at most MAX_LINGERING.
        self.lingering: set[RawConnection] = set()
        # Path -> what answers it also over the limit of connections.
        self.probes = probes
        # Connections over the limit that have not said yet what they want; at most MAX_PROBES, and
        # the one that has waited longest first.
        self.probing: dict[RawConnection, None] = {}
        self._count_handed_over = count_handed_over
        # What the server reckons once all that it needs itself is open.
        self.max_connections = max_connections
        # Of all connections above, each by its deadline.
        self.deadlines: Deadlines[RawConnection] = Deadlines(
            loop, RawConnection.expire, counters.count_background_error
        )
        # Publishes that wait.
        self.tasks = tasks
        self.turns = turns
        self.budget = budget

    def __call__(self) -> RawConnection:
        """Return the protocol of a connection that has just been accepted."""
        return RawConnection(self)

    def read_head(self, head: bytes) -> PlainHead | None:
        """Return what ``head`` asks, None when it is not for the raw path."""
        return self.grammar.read(head) if self.grammar is not None else None

    def admit(self, plain: PlainHead, *, has_begun: bool) -> Admitted:
        """Return the request as its endpoint takes it, remembered where the head is.

        Args:
            has_begun: it began before the daemon drained, and is answered as it was meant.

        Raises:
            ClevrdError: as `Gate.admit`.
        """
        gate = self._gate
        if not has_begun:
            gate.refuse_if_draining(plain.endpoint)
        admitted = plain.admitted
        if admitted is None or plain.generation != gate.generation:
            admitted = plain.admitted = plain.endpoint.admit(plain.request)
            plain.generation = gate.generation
        return admitted

    def is_full(self) -> bool:
        """Whether one more connection would be one too many."""
        return len(self.open) + self._count_handed_over() >= self.max_connections

    def stop(self) -> None:
        """End what is still open: clients that don't take their last answer."""
        self.deadlines.stop()
        for connection in self.open | self.lingering | self.probing.keys():
            connection.transport.abort()

    def close_idle(self) -> None:
        """Close connections that are between requests, and the others after theirs."""
        for connection in list(self.open):
            connection.close_when_idle()

    def count_under_way(self) -> int:
        """Return how many connections have a request that is not answered yet."""
        return sum(connection.is_under_way for connection in self.open)


class RawConnection(asyncio.Protocol):
    """One connection until it is a subscriber's or aiohttp's; a publisher's for its whole life."""

    __slots__ = (
        "_awaits_turn",
        "_buffer",
        "_door",
        "_held_bytes",
        "_is_busy",
        "_is_closing",
        "_is_last",
        "_is_probe",
        "_is_write_paused",
        "_needed_bytes",
        "_stage",
        "_steady_at_bytes",
        "_taken_bytes",
        "deadline_s",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, door: Door) -> None:
        self._door = door
        # Received and not yet served; empty between whole requests.
        self._buffer = bytearray()
        # Bytes the buffer must hold before looking at it again is worth the while.
        self._needed_bytes = 0
        # A publish waits for room, or for a throttle; what follows it waits too.
        self._is_busy = False
        # What the buffer holds is served in one of the next turns; nothing is read until then.
        self._awaits_turn = False
        self._is_write_paused = False
        # How much of a request has begun to arrive, for which a deadline is set.
        self._stage = _NOTHING
        # Bytes the buffer must hold for the request's time to begin anew; NEVER in its head.
        self._steady_at_bytes = NEVER
        # What the client had taken when it was last looked at because its answers are unread.
        self._taken_bytes = 0
        # The daemon is draining: close once nothing is under way.
        self._is_last = False
        # It came over the limit and may ask one thing.
        self._is_probe = False
        # What the budget of all connections was told that the buffer holds.
        self._held_bytes = 0
        # Close after the answers that are due.
        self._is_closing = False
        # Loop time by which the request under way must be whole, or the next one must begin.
        self.deadline_s = 0.0

    # --- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admit the connection, or refuse it while there are descriptors left to do so."""
        door = self._door
        self.transport = cast(asyncio.Transport, transport)
        door.counters.connections += 1
        if door.is_full():
            self._await_probe()
            return
        door.open.add(self)
        door.deadlines.set(self, door.now_s() + door.request_timeout_s)
        if door.grammar is None:
            self._hand_over(b"")

    def data_received(self, data: bytes) -> None:
        """Serve what is whole, keep the rest."""
        self._door.budget.received_bytes += len(data)
        if self._is_closing:
            return
        if self._is_probe:
            self._serve_probe(data)
            return
        buffer = self._buffer
        if buffer or self._must_hold:
            buffer += data
            if self._awaits_turn:
                # Until now it was read on, since most that wait have sent all they have to say.
                self.transport.pause_reading()
            if self._must_hold or len(buffer) < self._needed_bytes:
                self._account()
                if len(buffer) >= self._steady_at_bytes:
                    self._give_more_time()
                return
            data = bytes(buffer)
            buffer.clear()
        turns = self._door.turns
        if turns.begin():
            try:
                self._serve(data)
            finally:
                turns.end()
        else:
            self._await_turn(data, has_begun=False)
        self._account()

    def eof_received(self) -> bool:
        """Answer what waits before closing: a client may shut its side down after its request."""
        self._is_closing = True
        if self._is_probe:
            return False
        is_due = self._is_busy or self._awaits_turn
        if self._buffer and not is_due:
            # It will never be whole; aiohttp knows what to say to that.
            self._hand_over(bytes(self._buffer))
            return True
        return is_due

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone; a publish that waits is still published."""
        self._is_closing = True
        self._let_go()
        self._door.deadlines.remove(self)
        self._door.open.discard(self)
        self._door.lingering.discard(self)
        self._door.probing.pop(self, None)

    def pause_writing(self) -> None:
        """The client does not read its answers: read no more of its requests."""
        self._is_write_paused = True
        self._await_reader(self._door.now_s())
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._is_write_paused = False
        self._go_on()

    # --- serving ---------------------------------------------------------------------------------

    @property
    def _must_hold(self) -> bool:
        return self._is_busy or self._awaits_turn or self._is_write_paused

    def _serve(self, data: bytes) -> None:
        """Answer the plain requests that ``data`` holds whole, in order, with one write.

        As many as the share of this turn allows, and one at least; the rest awaits its turn.
        """
        door = self._door
        is_spent = door.turns.is_spent
        answers: list[bytes] = []
        position = 0
        stage = _HEAD
        while position < len(data):
            if answers and is_spent():
                self._flush(answers)
                self._await_turn(data[position:])
                return
            head_end = data.find(b"\r\n\r\n", position, position + MAX_HEAD_BYTES)
            if head_end < 0 and self._may_wait_for_head(data[position:]):
                break
            plain = door.read_head(data[position:head_end]) if head_end >= 0 else None
            if plain is None or plain.is_upgrade:
                # Whoever takes the connection over expects it to be read, and not to be paused.
                self._flush(answers)
                answers = []
                if self._is_write_paused:
                    self._needed_bytes = 0
                    break
            if plain is None:
                self._hand_over(data[position:])
                return
            body_end = head_end + 4 + plain.content_length
            admitted = self._admit(plain)
            if isinstance(admitted, Response) and plain.content_length:
                # Its body is not worth reading.
                self._flush(answers)
                self._say_last(admitted)
                return
            if body_end > len(data):
                self._needed_bytes = body_end - position
                stage = _BODY
                break
            reply = self._reply(plain, admitted, data[head_end + 4 : body_end])
            position = body_end
            if isinstance(reply, Response):
                answers.append(door.renderer.render(reply))
                continue
            self._flush(answers)
            if isinstance(reply, Upgrade):
                self._upgrade(reply, data[position:])
            else:
                self._wait_for(reply, plain.request, data[position:])
            return
        is_progress = position > 0
        self._flush(answers)
        self._keep(data[position:], stage, is_progress=is_progress)
        self._close_if_last()

    def _account(self) -> None:
        """Settle what the buffer holds with the budget of all connections."""
        held_bytes = len(self._buffer)
        if held_bytes == self._held_bytes:
            return
        fits = self._door.budget.change(self._held_bytes, held_bytes)
        self._held_bytes = held_bytes
        if not fits and not self._is_busy and self in self._door.open:
            self._end_with(Unavailable(TOO_MUCH_INPUT))

    def _let_go(self) -> None:
        self._buffer.clear()
        self._account()

    def _may_wait_for_head(self, part: bytes) -> bool:
        self._needed_bytes = len(part) + 1
        return len(part) < MAX_HEAD_BYTES and can_become_plain(part)

    def _admit(self, plain: PlainHead) -> Admitted | Response:
        """Return the request as its endpoint takes it, or the refusal."""
        try:
            return self._door.admit(plain, has_begun=self._is_last)
        except Exception as error:
            return self._door.refusal(error, plain.request)

    def _reply(
        self, plain: PlainHead, admitted: Admitted | Response, body: bytes
    ) -> Response | Upgrade | Awaitable[Response]:
        if isinstance(admitted, Response):
            return admitted
        try:
            return plain.endpoint.answer(admitted, body)
        except Exception as error:
            return self._door.refusal(error, plain.request)

    def _flush(self, answers: list[bytes]) -> None:
        if answers:
            self.transport.write(answers[0] if len(answers) == 1 else b"".join(answers))

    def _keep(self, rest: bytes, stage: int, *, is_progress: bool) -> None:
        """Hold an incomplete request; its head's time runs from its first byte, then its body's."""
        door = self._door
        self._buffer += rest
        if self._is_write_paused:
            # It has the time that pause_writing set, and is not read meanwhile.
            self._stage = _NOTHING
        elif not rest:
            self._stage = _NOTHING
            self._await_request(door.now_s() + door.keepalive_timeout_s)
        elif is_progress or self._stage < stage:
            self._stage = stage
            self._steady_at_bytes = NEVER
            if stage == _BODY:
                self._steady_at_bytes = len(self._buffer) + door.sent_step_bytes
            door.deadlines.set(self, door.now_s() + door.request_timeout_s)

    def _await_request(self, deadline_s: float) -> None:
        # Later than before, as a rule, which costs nothing.
        if deadline_s < self.deadline_s:
            self._door.deadlines.set(self, deadline_s)
        else:
            self.deadline_s = deadline_s

    def _await_reader(self, now_s: float) -> None:
        """Give the client time to read some of its answers."""
        self._taken_bytes = progress_of(self.transport).taken_bytes
        self._door.deadlines.set(self, now_s + self._door.keepalive_timeout_s)

    def _reads_on(self) -> bool:
        taken_bytes = progress_of(self.transport).taken_bytes - self._taken_bytes
        return reads_on(taken_bytes, self._door.keepalive_timeout_s)

    def _give_more_time(self) -> None:
        """Let the time of a body begin anew that arrives slowly but steadily."""
        door = self._door
        if self._stage == _BODY and not self._is_last:
            self._steady_at_bytes = len(self._buffer) + door.sent_step_bytes
            self.deadline_s = door.now_s() + door.request_timeout_s

    # --- over the limit --------------------------------------------------------------------------

    def _await_probe(self) -> None:
        """Wait for what it asks, in the place of who has waited longest if there are too many."""
        door = self._door
        self._is_probe = True
        if len(door.probing) >= MAX_PROBES:
            next(iter(door.probing)).refuse_entry()
        door.probing[self] = None
        door.deadlines.set(self, door.now_s() + PROBE_S)

    def _serve_probe(self, data: bytes) -> None:
        """Answer what may be asked over the limit, and refuse everything else."""
        self._buffer += data
        part = bytes(self._buffer)
        if not _begins(part, _PROBE_BEGINNINGS):
            self.refuse_entry()
            return
        head, end, _ = part.partition(b"\r\n\r\n")
        if not end:
            if len(part) > MAX_HEAD_BYTES:
                self.refuse_entry()
            return
        request = read_probe(head)
        if request is None:
            self.refuse_entry()
        else:
            self._say_last(self._probe_answer(request))

    def _probe_answer(self, request: Request) -> Response:
        """Return the answer to what may be asked over the limit, or that there is no room."""
        door = self._door
        try:
            endpoint = door.probes.get(request.path)
            if endpoint is None:
                raise _no_room()
            return cast(Response, endpoint.answer(endpoint.admit(request), b""))
        except Exception as error:
            return door.refusal(error, request)

    def refuse_entry(self) -> None:
        """Say that there is no room."""
        self._end_with(_no_room())

    # --- waiting, upgrading, handing over --------------------------------------------------------

    def _wait_for(self, reply: Awaitable[Response], request: Request, rest: bytes) -> None:
        self._is_busy = True
        self._stage = _NOTHING
        self._buffer += rest
        self.transport.pause_reading()
        self._door.tasks.spawn(self._answer_later(reply, request))

    async def _answer_later(self, reply: Awaitable[Response], request: Request) -> None:
        try:
            answer = await reply
        except Exception as error:
            answer = self._door.refusal(error, request)
        self._is_busy = False
        if self.transport.is_closing():
            return
        self.transport.write(self._door.renderer.render(answer))
        self._go_on()

    def _await_turn(self, rest: bytes, *, has_begun: bool = True) -> None:
        """Let other connections be served before ``rest``, and read little meanwhile."""
        self._awaits_turn = True
        self._stage = _NOTHING
        self._buffer += rest
        if has_begun:
            self.transport.pause_reading()
        self._door.turns.wait(self._take_turn, len(self._buffer), has_begun=has_begun)

    def _take_turn(self) -> None:
        self._awaits_turn = False
        if not self._must_hold:
            self._serve_held()

    def _go_on(self) -> None:
        """Go on where something was held back, in a turn of its own if that is a request."""
        if self._must_hold or self.transport.is_closing():
            return
        if self._buffer:
            self._await_turn(b"")
        else:
            self._serve_held()

    def _serve_held(self) -> None:
        """Serve what was held back, and read on if nothing holds it back again."""
        if self.transport.is_closing():
            return
        if not self._is_closing:
            # First, because whoever takes the connection over expects it to be read.
            self.transport.resume_reading()
        data = bytes(self._buffer)
        self._buffer.clear()
        # With nothing held back it only begins the time until the next request.
        self._serve(data)
        self._account()
        if self._is_closing:
            self._close_when_done()
        self._close_if_last()

    def _close_when_done(self) -> None:
        """Close unless an answer is still due, or the connection is not ours now."""
        if not self._must_hold and self in self._door.open:
            self.transport.close()

    def _upgrade(self, upgrade: Upgrade, rest: bytes) -> None:
        self._let_go()
        self._door.open.discard(self)
        self._door.deadlines.remove(self)
        self.transport.write(upgrade.head)
        failed = partial(self._door.refusal, request=None)
        # Whoever takes it over counts it as well.
        self._door.budget.received_bytes -= len(rest)
        attach_upgrade(upgrade, self.transport, rest, failed, has_eof=self._is_closing)

    def _hand_over(self, data: bytes) -> None:
        """Give the connection to aiohttp, with what was read and not served."""
        if self.transport.is_closing():
            return
        self._let_go()
        self._door.open.discard(self)
        self._door.deadlines.remove(self)
        protocol = self._door.make_aiohttp_protocol()
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        if data:
            # Counted there as well.
            self._door.budget.received_bytes -= len(data)
            protocol.data_received(data)
        if self._is_closing and not protocol.eof_received():
            self.transport.close()

    # --- ending ----------------------------------------------------------------------------------

    def expire(self) -> None:
        """End a connection whose time is up, with a word if a request was under way."""
        door = self._door
        if self._is_busy or self._awaits_turn:
            door.deadlines.set(self, door.now_s() + door.keepalive_timeout_s)
            return
        if self._is_write_paused and not self._is_closing and self._reads_on():
            self._await_reader(door.now_s())
            return
        if self._is_closing or self._is_write_paused or self.transport.is_closing():
            # It does not even take what it was answered.
            self.transport.abort()
        elif self._is_probe:
            self.refuse_entry()
        elif self._buffer:
            self._end_with(RequestTimeout(self._door.request_timeout_s))
        else:
            self._is_closing = True
            self.transport.close()
            # Unless it does not even take what it was answered.
            door.deadlines.set(self, door.now_s() + LINGER_S)

    def close_when_idle(self) -> None:
        """Close now, or after the request that is under way, which had better come soon."""
        self._is_last = True
        door = self._door
        door.deadlines.set(self, min(self.deadline_s, door.now_s() + LAST_REQUEST_S))
        self._close_if_last()

    @property
    def is_under_way(self) -> bool:
        """Whether a request has begun to arrive, or an answer is due."""
        return self._is_busy or self._awaits_turn or bool(self._buffer)

    def _close_if_last(self) -> None:
        if self._is_last and not self.is_under_way and self in self._door.open:
            self._is_closing = True
            self.transport.close()

    def _end_with(self, error: ClevrdError) -> None:
        self._say_last(self._door.refusal(error, None))

    def _say_last(self, answer: Response) -> None:
        """Say a last word, and close once the client can have read it."""
        door = self._door
        self._is_closing = True
        self._let_go()
        door.open.discard(self)
        door.probing.pop(self, None)
        door.deadlines.remove(self)
        self.transport.write(door.renderer.render(answer, must_close=True))
        if len(door.lingering) >= MAX_LINGERING:
            self.transport.close()
            return
        door.lingering.add(self)
        door.deadlines.set(self, door.now_s() + LINGER_S)
        self.transport.write_eof()
