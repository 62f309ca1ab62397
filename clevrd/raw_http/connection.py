"""RawConnection: one connection until it is a subscriber's or aiohttp's.

The grammar decides whether a request is plain, and its endpoint decides what the request means.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from functools import partial
from typing import Final, cast

from clevrd.admission import Admitted, Later
from clevrd.errors import ClevrdError, ConnectionLimit, RequestTimeout, Unauthorized
from clevrd.http_values import (
    LINGER_S,
    AbortOnError,
    Request,
    Response,
    Upgrade,
    attach_upgrade,
)
from clevrd.input_budget import NOBODY
from clevrd.pace import NEVER, reads_on
from clevrd.progress import progress_of
from clevrd.proxy_protocol import UnexpectedProxyHeader, begins_with_header
from clevrd.raw_http.grammar import MAX_HEAD_BYTES, PlainHead, can_become_plain
from clevrd.raw_http.probes import MAX_PROBES, PROBE_S, can_become_probe, no_room, read_probe
from clevrd.raw_http.server import MAX_LINGERING, RawServer
from clevrd.scheduling.bulk_reads import BULK_BYTES
from clevrd.scheduling.due_answers import Due, DueAnswers, Place
from clevrd.scheduling.fair_turns import LARGE_BYTES

# How long the rest of a request may take that had begun when the daemon began to drain: half a
# request must neither be lost nor hold up the stop.
LAST_REQUEST_S: Final = 1.0

# How much of a request has arrived.
_NOTHING: Final = 0
_HEAD: Final = 1
_BODY: Final = 2


class RawConnection(asyncio.Protocol):
    """One connection until it is a subscriber's or aiohttp's; a publisher's for its whole life."""

    __slots__ = (
        "_awaits_turn",
        "_buffer",
        "_due",
        "_has_eof",
        "_held_bytes",
        "_is_busy",
        "_is_closing",
        "_is_last",
        "_is_new",
        "_is_probe",
        "_is_write_paused",
        "_last_word",
        "_needed_bytes",
        "_sender",
        "_server",
        "_stage",
        "_steady_at_bytes",
        "_taken_bytes",
        "deadline_s",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, server: RawServer) -> None:
        self._server = server
        # Received and not yet served; empty between whole requests.
        self._buffer = bytearray()
        # Bytes that the buffer must hold before it is worth looking at again.
        self._needed_bytes = 0
        # A publish waits for room, or for a throttle; what follows it waits too.
        self._is_busy = False
        # The content of the buffer is served in one of the next turns; nothing is read until then.
        self._awaits_turn = False
        self._is_write_paused = False
        # The answers behind, and with, the first one that is due; None while none is due.
        self._due: DueAnswers | None = None
        # The last response of the connection, which follows the due answers; nothing follows it.
        self._last_word = b""
        # How much of a request has begun to arrive, for which a deadline is set.
        self._stage = _NOTHING
        # Bytes that the buffer must hold for the time of a body to begin anew; NEVER while its head
        # arrives.
        self._steady_at_bytes = NEVER
        # Bytes that the client had taken at the last look, which is for unread answers only.
        self._taken_bytes = 0
        # No request of this connection has been served yet.
        self._is_new = True
        # The daemon is draining: close once nothing is under way.
        self._is_last = False
        # The connection came over the limit, and may ask one thing (see `probes`).
        self._is_probe = False
        # Bytes in the buffer, as the budget of all connections was told last.
        self._held_bytes = 0
        # The sender for whom the budget counts them; NOBODY while there are none.
        self._sender = NOBODY
        # The client has shut its side down.
        self._has_eof = False
        # Close after the answers that are due.
        self._is_closing = False
        # Loop time by which the request under way must be whole, or the next one must begin.
        self.deadline_s = 0.0

    # --- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admit the connection, or refuse it while there are descriptors left to do so."""
        server = self._server
        self.transport = cast(asyncio.Transport, transport)
        server.counters.connections += 1
        try:
            server.addresses.accept(transport)
        except ConnectionLimit as error:
            self._end_with(error)
            return
        if server.is_full():
            self._await_probe()
            return
        server.open.add(self)
        server.deadlines.set(self, server.now_s() + server.request_timeout_s)
        # Heads are remembered for all connections together, and a certificate belongs to one:
        # aiohttp's side serves such a connection.
        if server.grammar is None or transport.get_extra_info("peercert"):
            self._hand_over(b"")

    def data_received(self, data: bytes) -> None:
        """Serve the requests that are whole, and keep the rest."""
        server = self._server
        server.budget.received_bytes += len(data)
        if self._is_closing:
            return
        if self._is_probe:
            self._serve_probe(data)
            return
        buffer = self._buffer
        # For most requests nothing is held, which is found out here without a call.
        if (
            buffer
            or self._is_busy
            or self._awaits_turn
            or self._is_write_paused
            or self._due is not None
        ):
            part = self._add_to_held(data)
            if part is None:
                return
            data = part
        turns = server.turns
        if turns.begin():
            try:
                self._serve(data)
            finally:
                turns.end()
        else:
            self._await_turn(data, has_begun=False)
        if buffer or self._held_bytes:
            self._account()

    def _add_to_held(self, data: bytes) -> bytes | None:
        """Return ``data`` behind what is held, to be served now; None where it is held as well."""
        buffer, must_hold = self._buffer, self._must_hold
        if not buffer and not must_hold:
            return data
        buffer += data
        if self._awaits_turn:
            # The connection was read on until now, since most clients that wait have sent
            # everything.
            self.transport.pause_reading()
        if must_hold or len(buffer) < self._needed_bytes:
            self._account()
            if len(buffer) >= self._steady_at_bytes:
                self._give_more_time()
            if len(data) >= BULK_BYTES and not must_hold and not self._is_closing:
                self.transport.pause_reading()
                self._server.bulk_reads.wait(self._read_on)
            return None
        if len(buffer) > LARGE_BYTES:
            self._await_turn(b"", has_begun=False)
            self._account()
            return None
        whole = bytes(buffer)
        buffer.clear()
        return whole

    def eof_received(self) -> bool:
        """Answer what waits before closing: a client may shut its side down after its request."""
        self._is_closing = self._has_eof = True
        if self._is_probe:
            return False
        if self._is_busy or self._awaits_turn or self._due is not None:
            return True
        if self._buffer:
            # The request will never be whole; aiohttp answers such a one.
            self._hand_over(bytes(self._buffer))
            return True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone; a publish that waits is still published, and answers are let go."""
        self._is_closing = True
        self._due = None
        self._let_go()
        self._server.deadlines.remove(self)
        self._server.open.discard(self)
        self._server.lingering.discard(self)
        self._server.probing.pop(self, None)
        self._server.addresses.left(self.transport)

    def pause_writing(self) -> None:
        """The client does not read its answers: read no more of its requests."""
        self._is_write_paused = True
        self._await_reader(self._server.now_s())
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._is_write_paused = False
        self._go_on()

    # --- serving ---------------------------------------------------------------------------------

    @property
    def _must_hold(self) -> bool:
        return (
            self._is_busy
            or self._awaits_turn
            or self._is_write_paused
            or (self._due is not None and self._due.is_full)
        )

    def _serve(self, data: bytes) -> None:
        """Answer the plain requests that ``data`` holds whole, in order, with one write.

        As many as the share of this turn allows, and one at least; the rest awaits its turn.
        """
        server = self._server
        is_spent = server.turns.is_spent
        answers: list[bytes] = []
        position, size = 0, len(data)
        stage = _HEAD
        while position < size:
            if position and is_spent():
                self._flush(answers)
                self._await_turn(data[position:])
                return
            head_end = data.find(b"\r\n\r\n", position, position + MAX_HEAD_BYTES)
            if head_end >= 0:
                plain = server.read_head(data[position:head_end])
            elif self._may_wait_for_head(data[position:]):
                break
            else:
                plain = None
            if plain is None or plain.is_upgrade:
                # The next owner of the connection expects it to be read, and not to be paused.
                self._flush(answers)
                answers = []
                if self._due is not None:
                    # Bytes of the next owner come behind all answers that are due.
                    self._due.seal()
                    self._hold(data[position:])
                    return
                if self._is_write_paused:
                    self._needed_bytes = 0
                    break
            if plain is None:
                self._hand_over(data[position:])
                return
            body_end = head_end + 4 + plain.content_length
            admitted = self._admit(plain)
            reply: Response | Upgrade | Later
            if isinstance(admitted, Response):
                if plain.content_length:
                    # The body of a refused request is not worth reading.
                    self._flush(answers)
                    self._say_last(admitted)
                    return
                reply = admitted
            elif body_end > size:
                self._needed_bytes = body_end - position
                self._count_for(admitted.tenant.name, plain.request.headers)
                stage = _BODY
                break
            else:
                reply = self._reply(plain, admitted, data[head_end + 4 : body_end])
            position = body_end
            if isinstance(reply, Response):
                answers.append(server.render(reply))
                continue
            self._flush(answers)
            if isinstance(reply, Due):
                answers = []
                if self._expect(reply, plain.request).is_full:
                    self._hold(data[position:])
                    return
                continue
            if isinstance(reply, Upgrade):
                self._upgrade(reply, plain.request, data[position:])
            else:
                self._wait_for(reply, plain.request, data[position:])
            return
        self._flush(answers)
        if position < size:
            self._keep(data[position:], stage, is_progress=position > 0)
        else:
            self._stage = _NOTHING
            if not self._is_write_paused and (self._due is None or not self._due.is_full):
                self._await_request()
        if self._is_last:
            self._close_if_last()

    def _account(self) -> None:
        """Settle what the buffer holds with the budget of all connections."""
        held_bytes = len(self._buffer)
        if held_bytes == self._held_bytes:
            return
        if self._sender is NOBODY:
            self._count_for(None, {})
        fits = self._server.budget.change(self._held_bytes, held_bytes, self._sender)
        self._held_bytes = held_bytes
        if not held_bytes:
            self._sender = NOBODY
        if not fits and not self._is_busy and self in self._server.open:
            self._end_with(self._server.budget.refusal())

    def _count_for(self, tenant: str | None, headers: Mapping[str, str]) -> None:
        """Have the budget count what is held for this tenant, if it is known, and its address."""
        server = self._server
        server.budget.change(self._held_bytes, 0, self._sender)
        self._held_bytes = 0
        address = server.addresses.sender_of(self.transport, headers)
        self._sender = server.budget.sender(tenant, address)

    def _read_on(self) -> None:
        """Read more of a large request, unless something holds it back now."""
        if not self._must_hold and not self.transport.is_closing():
            self.transport.resume_reading()

    def _let_go(self) -> None:
        self._buffer.clear()
        self._account()

    def _may_wait_for_head(self, part: bytes) -> bool:
        self._needed_bytes = len(part) + 1
        return len(part) < MAX_HEAD_BYTES and can_become_plain(part)

    def _admit(self, plain: PlainHead) -> Admitted | Response:
        """Return the request as its endpoint takes it, or the refusal."""
        server = self._server
        try:
            if plain.is_upgrade:
                # A publish with an Origin is not plain.
                server.pages.check(plain.request, self.transport)
            return server.admit(plain, has_begun=self._is_last)
        except Exception as error:
            if isinstance(error, Unauthorized):
                error.address = server.addresses.client_of(self.transport, plain.request.headers)
            return server.refusal(error, plain.request)

    def _reply(
        self, plain: PlainHead, admitted: Admitted, body: bytes
    ) -> Response | Upgrade | Later:
        try:
            return plain.endpoint.answer(admitted, body)
        except Exception as error:
            return self._server.refusal(error, plain.request)

    def _flush(self, answers: list[bytes]) -> None:
        if answers:
            # One answer is not copied: bytes.join returns it.
            joined = b"".join(answers)
            if self._due is None:
                self.transport.write(joined)
            else:
                self._add(joined, len(answers))

    def _keep(self, rest: bytes, stage: int, *, is_progress: bool) -> None:
        """Hold an incomplete request; its head's time runs from its first byte, then its body's."""
        server = self._server
        self._buffer += rest
        if self._is_write_paused or (self._due is not None and self._due.is_full):
            # The connection has the time that pause_writing set, or all that its answers take, and
            # is not read meanwhile.
            self._stage = _NOTHING
        elif is_progress or self._stage < stage:
            self._stage = stage
            self._steady_at_bytes = NEVER
            if stage == _BODY:
                self._steady_at_bytes = len(self._buffer) + server.sent_step_bytes
            server.deadlines.set(self, server.now_s() + server.request_timeout_s)

    def _await_request(self) -> None:
        """Give the client the time that may pass between two requests."""
        self._is_new = False
        server = self._server
        deadline_s = server.now_s() + server.keepalive_timeout_s
        # The deadline is later than before as a rule, and to move it later costs nothing.
        if deadline_s < self.deadline_s:
            server.deadlines.set(self, deadline_s)
        else:
            self.deadline_s = deadline_s

    def _await_reader(self, now_s: float) -> None:
        """Give the client time to read some of its answers."""
        self._taken_bytes = progress_of(self.transport).taken_bytes
        self._server.deadlines.set(self, now_s + self._server.keepalive_timeout_s)

    def _reads_on(self) -> bool:
        taken_bytes = progress_of(self.transport).taken_bytes - self._taken_bytes
        return reads_on(taken_bytes, self._server.keepalive_timeout_s)

    def _give_more_time(self) -> None:
        """Let the time of a body begin anew that arrives slowly but steadily."""
        server = self._server
        if self._stage == _BODY and not self._is_last:
            self._steady_at_bytes = len(self._buffer) + server.sent_step_bytes
            self.deadline_s = server.now_s() + server.request_timeout_s

    # --- over the limit --------------------------------------------------------------------------

    def _await_probe(self) -> None:
        """Wait for a probe's request, and refuse the oldest probe if there are too many."""
        server = self._server
        self._is_probe = True
        if len(server.probing) >= MAX_PROBES:
            next(iter(server.probing)).refuse_entry()
        server.probing[self] = None
        server.deadlines.set(self, server.now_s() + PROBE_S)

    def _serve_probe(self, data: bytes) -> None:
        """Answer what may be asked over the limit, and refuse everything else."""
        self._buffer += data
        part = bytes(self._buffer)
        if not can_become_probe(part):
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
        server = self._server
        try:
            server.pages.check(request, self.transport)
            endpoint = server.probes.get(request.path)
            if endpoint is None:
                raise no_room(server.max_connections)
            answer = cast(Response, endpoint.answer(endpoint.admit(request), b""))
            return server.pages.marked(answer, request)
        except Exception as error:
            return server.refusal(error, request)

    def refuse_entry(self) -> None:
        """Say that there is no room."""
        self._end_with(no_room(self._server.max_connections))

    # --- waiting, upgrading, handing over --------------------------------------------------------

    def _wait_for(
        self, reply: Awaitable[Response | Due[Response]], request: Request, rest: bytes
    ) -> None:
        self._is_busy = True
        self._hold(rest)
        self._server.tasks.spawn(self._answer_later(reply, request))

    async def _answer_later(
        self, reply: Awaitable[Response | Due[Response]], request: Request
    ) -> None:
        with self._ends_on_error:
            try:
                answer = await reply
            except Exception as error:
                answer = self._server.refusal(error, request)
            self._is_busy = False
            if isinstance(answer, Due):
                self._expect(answer, request)
            elif not self.transport.is_closing():
                self._flush([self._server.render(answer)])
            self._go_on()

    def _hold(self, rest: bytes) -> None:
        """Keep ``rest`` until what it waits for has happened, and read nothing meanwhile."""
        self._stage = _NOTHING
        self._buffer += rest
        self.transport.pause_reading()

    def _await_turn(self, rest: bytes, *, has_begun: bool = True) -> None:
        """Let other connections be served before ``rest``, and read little meanwhile."""
        self._awaits_turn = True
        self._stage = _NOTHING
        self._buffer += rest
        if has_begun:
            self.transport.pause_reading()
        self._server.turns.wait(
            self._take_turn, len(self._buffer), has_begun=has_begun, is_first=self._is_new
        )

    def _take_turn(self) -> None:
        self._awaits_turn = False
        if not self._must_hold:
            with self._ends_on_error:
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
            # Reading begins first, because the next owner of the connection expects it to be read.
            self.transport.resume_reading()
        data = bytes(self._buffer)
        self._buffer.clear()
        # If nothing is held back this call only begins the time until the next request.
        self._serve(data)
        self._account()
        if self._is_closing:
            self._end_input()
        self._close_if_last()

    def _end_input(self) -> None:
        """End what the client has shut, unless an answer is due, or the connection is not ours."""
        if self._must_hold or self._due is not None or self not in self._server.open:
            return
        if self._buffer:
            self._hand_over(bytes(self._buffer))
        else:
            self.transport.close()

    def _upgrade(self, upgrade: Upgrade, request: Request, rest: bytes) -> None:
        try:
            self._server.addresses.claim(self.transport, request.headers)
        except ConnectionLimit as error:
            self._say_last(self._server.refusal(error, request))
            return
        self._let_go()
        self._server.open.discard(self)
        self._server.deadlines.remove(self)
        self.transport.write(upgrade.head)
        failed = partial(self._server.refusal, request=None)
        # The next protocol counts these bytes as well.
        self._server.budget.received_bytes -= len(rest)
        attach_upgrade(upgrade, self.transport, rest, failed, has_eof=self._is_closing)

    def _hand_over(self, data: bytes) -> None:
        """Give the connection to aiohttp, with what was read and not served."""
        if self.transport.is_closing():
            return
        if begins_with_header(data):
            self._end_with(UnexpectedProxyHeader())
            return
        self._let_go()
        self._server.open.discard(self)
        self._server.deadlines.remove(self)
        protocol = self._server.make_aiohttp_protocol()
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        if data:
            # aiohttp's connection counts these bytes as well.
            self._server.budget.received_bytes -= len(data)
            protocol.data_received(data)
        if self._is_closing and not protocol.eof_received():
            self.transport.close()

    # --- answers that are due --------------------------------------------------------------------

    def _expect(self, reply: Due[Response], request: Request) -> DueAnswers:
        """Give the answer that is due its place; return what it stands in."""
        due = self._due
        if due is None:
            due = self._due = DueAnswers()
        reply.when_known(partial(self._settle, due, due.expect(), reply, request))
        return due

    def _add(self, answers: bytes, count: int) -> None:
        """Put answers behind what is due, and read nothing while they are too many."""
        due = cast(DueAnswers, self._due)
        due.add(answers, count)
        if due.is_full:
            self.transport.pause_reading()

    def _settle(
        self,
        queue: DueAnswers,
        place: Place,
        reply: Due[Response],
        request: Request,
        _: asyncio.Future[object],
    ) -> None:
        """Note an answer that was due; those of one turn of the loop are written together."""
        server = self._server
        with self._ends_on_error:
            try:
                answer = reply.result()
            except Exception as error:
                answer = server.refusal(error, request)
            if queue.settle(place, server.render(answer)):
                server.loop.call_soon(self._write_due)

    def _write_due(self) -> None:
        """Write the answers whose turn has come, and go on with what waited for that."""
        due = self._due
        if due is None or self.transport.is_closing():
            return
        was_full = due.is_full
        with self._ends_on_error:
            self.transport.write(due.take())
            if not due:
                self._due = None
                if self._last_word:
                    self._end_behind(self._last_word)
                    return
            if was_full and not due.is_full:
                self._go_on()
            elif self._due is None:
                self._note_all_answered()

    def _note_all_answered(self) -> None:
        """Go on between two requests, or end the connection if this was the last one."""
        if self._is_closing:
            self._end_input()
        elif not self._buffer and not self._is_write_paused:
            self._await_request()
        self._close_if_last()

    # --- ending ----------------------------------------------------------------------------------

    def expire(self) -> None:
        """End a connection whose time is up, with a word if a request was under way."""
        with self._ends_on_error:
            self._expire()

    def _expire(self) -> None:
        server = self._server
        if self._is_busy or self._awaits_turn or self._waits_for_answers:
            server.deadlines.set(self, server.now_s() + server.keepalive_timeout_s)
            return
        if self._is_write_paused and not self._is_closing and self._reads_on():
            self._await_reader(server.now_s())
            return
        if self._is_closing or self._is_write_paused or self.transport.is_closing():
            # The client does not even take its answers.
            self.transport.abort()
        elif self._is_probe:
            self.refuse_entry()
        elif self._buffer:
            self._end_with(RequestTimeout(self._server.request_timeout_s))
        else:
            self._is_closing = True
            self.transport.close()
            # The deadline is for a client that does not even take its answers.
            server.deadlines.set(self, server.now_s() + LINGER_S)

    def close_when_idle(self) -> None:
        """Close now, or after the request that is under way, if that comes in LAST_REQUEST_S."""
        self._is_last = True
        server = self._server
        server.deadlines.set(self, min(self.deadline_s, server.now_s() + LAST_REQUEST_S))
        self._close_if_last()

    @property
    def _ends_on_error(self) -> AbortOnError:
        """A block that ends the connection if it raises, since nothing else would go on with it.

        Where the transport has called, it ends the connection itself.
        """
        return AbortOnError(self.transport)

    @property
    def is_under_way(self) -> bool:
        """Whether a request has begun to arrive, or an answer is due."""
        return self._is_busy or self._awaits_turn or self._due is not None or bool(self._buffer)

    @property
    def _waits_for_answers(self) -> bool:
        """Whether the daemon's own answers alone are waited for, and neither side's bytes."""
        if self._due is None or self._is_write_paused:
            return False
        return self._is_closing or self._stage == _NOTHING

    def _close_if_last(self) -> None:
        if self._is_last and not self.is_under_way and self in self._server.open:
            self._is_closing = True
            self.transport.close()

    def _end_with(self, error: ClevrdError) -> None:
        self._say_last(self._server.refusal(error, None))

    def _say_last(self, answer: Response) -> None:
        """Say a last word, behind what is due, and close once the client can have read it."""
        self._is_closing = True
        self._let_go()
        word = self._server.render(answer, must_close=True)
        if self._due is None:
            self._end_behind(word)
        else:
            self._last_word = word

    def _end_behind(self, word: bytes) -> None:
        """Send ``word`` and nothing more, and linger."""
        server = self._server
        server.open.discard(self)
        server.probing.pop(self, None)
        server.deadlines.remove(self)
        self.transport.write(word)
        if self._has_eof or len(server.lingering) >= MAX_LINGERING:
            self.transport.close()
            return
        server.lingering.add(self)
        server.deadlines.set(self, server.now_s() + LINGER_S)
        self.transport.write_eof()
