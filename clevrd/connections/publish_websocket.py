"""Publish sockets: each text frame is a publish, in order; frames with a ``ref`` are answered.

The meaning of a publish is decided by handlers/publish/socket.py, which provides the Publisher.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from functools import partial
from itertools import takewhile
from typing import Final, Protocol

from clevrd.connections.registry import Connections
from clevrd.connections.websocket import TRY_AGAIN_LATER, WebSocketConnection
from clevrd.core.client_frames import PING, PONG, TEXT, ClientFrames
from clevrd.core.server_frames import pong_frame, text_frame
from clevrd.http_values import AbortOnError, Request
from clevrd.input_budget import NOBODY
from clevrd.scheduling.due_answers import Due, DueAnswers, Place
from clevrd.tenants import Tenant

# Bytes of a read (up to 256 KiB) that are parsed between two looks at the time: 0.5 ms of the
# shortest publishes, 3 ms of empty frames.
SLICE_BYTES: Final = 16_384

# Publishes that are handed on at a time: what is left of them when the share is used up is gone
# through again.
FRAMES_PER_TAKE: Final = 256

# Control frames, and fragments beyond a message's first, within the budget's window: a MiB in
# fragments of one kilobyte passes, a flood of empty ones does not.
BUDGET_FRAMES: Final = 2_000

UNSUPPORTED_DATA: Final = 1003
INTERNAL_ERROR: Final = 1011


class Publisher(Protocol):
    """The publisher of the frames' payloads, which also makes the answers."""

    def take_tenant(self, tenant: Tenant, /) -> None:
        """Go on as ``tenant``."""

    @property
    def answers(self) -> list[bytes]:
        """JSON to send back, in the order of the frames; taken out by the connection."""

    @property
    def due(self) -> list[tuple[int, Due[list[bytes]]]]:
        """Answers that come later, each with how many of ``answers`` are before it; taken out."""

    def take(self, payloads: Sequence[bytes], /) -> tuple[int, bool]:
        """Publish ``payloads`` until the share of this turn is used up or one has to wait.

        Returns how many were taken, and whether the next one is for `wait_for`; where it waits for
        answers that are due it has sealed them, and is to be taken again when they have left.
        """

    def wait_for(self, payloads: Sequence[bytes], /) -> Awaitable[int]:
        """Publish the first when its time has come, and some more; return how many were taken."""


class PublishConnection(WebSocketConnection):
    """One publisher's WebSocket."""

    __slots__ = (
        "_due",
        "_farewell",
        "_fault",
        "_has_eof",
        "_head",
        "_is_blocked",
        "_is_held",
        "_is_write_paused",
        "_max_message_bytes",
        "_publisher",
        "_sender",
        "_unread",
        "_waiting",
    )

    def __init__(
        self,
        connections: Connections,
        transport: asyncio.Transport,
        tenant: Tenant,
        publisher: Publisher,
        max_message_bytes: int,
        head: Request,
    ) -> None:
        """Args: head: of the request that opened it."""
        super().__init__(connections, transport, tenant)
        # By what a bug is found in logs.
        self._head = head.names()
        self._max_message_bytes = max_message_bytes
        self._publisher = publisher
        # Parsed and not yet published: what one slice brought, at most. Reading is paused then.
        self._waiting: list[tuple[int, bytes]] = []
        # Received behind that and not yet parsed: what one read brought, at most.
        self._unread = b""
        # The sender for whom the budget counts these bytes; NOBODY while there are none.
        self._sender = NOBODY
        # Something is being waited for before the next of _waiting: a publish, a turn, or answers
        # that are due, which alone set _is_blocked as well.
        self._is_held = False
        self._is_blocked = False
        # The answers behind, and with, the first one that is due; None while none is due.
        self._due: DueAnswers | None = None
        # The close code and reason of a goodbye that is to follow them.
        self._farewell: tuple[int, str] | None = None
        self._is_write_paused = False
        # Whether the client has shut its side down; it may still wait for answers.
        self._has_eof = False
        # The close code and reason for a rule that it broke behind what is held back.
        self._fault: tuple[int, str] | None = None

    def begin(self, early_data: bytes) -> None:
        """Take over the transport, and read what was received behind the handshake."""
        self._connections.add(self)
        if early_data:
            self.data_received(early_data)

    def take_tenant(self, tenant: Tenant) -> bool:
        """Go on as ``tenant``, which may publish what it may from the next frame on."""
        self._publisher.take_tenant(tenant)
        return super().take_tenant(tenant)

    def ping(self) -> None:
        """Ask whether the publisher is there, unless the daemon itself reads nothing now."""
        if not self._is_held:
            super().ping()

    def pause_writing(self) -> None:
        """The publisher does not read its answers: read no more of its publishes."""
        self._connections.stalled(self)
        self._is_write_paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """The publisher reads its answers again."""
        self._is_write_paused = False
        self._connections.moved(self)
        self._go_on()

    def data_received(self, data: bytes) -> None:
        """Read the publisher's frames, as many as its share of this turn allows."""
        self._connections.budget.received_bytes += len(data)
        if self._has_failed:
            return
        turns = self._connections.turns
        if self._unread or not turns.begin():
            self._hold_unread(data, has_begun=False)
            return
        try:
            self._read(data)
        except Exception as error:
            self._end_for_bug(error)
        finally:
            turns.end()

    def eof_received(self) -> bool | None:
        """Publish what was received before the connection ends."""
        if self._is_held or self._due is not None:
            self._has_eof = True
            return True
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Publish what was received before the connection was lost."""
        super().connection_lost(exc)
        self._go_on()

    def end_unfinished(self) -> None:
        """Close because a message did not arrive in time, unless the daemon itself read nothing."""
        if self._is_held or self._is_write_paused:
            self._connections.settle_unfinished(self, self._held_bytes, has_progress=True)
        else:
            super().end_unfinished()

    def new_frames(self) -> ClientFrames:
        """Return a reader of frames with a publisher's bounds."""
        # As many frames as a slice can hold: shares of turns bound what they cost, not a number.
        return ClientFrames(self._max_message_bytes, max_frames_per_feed=SLICE_BYTES)

    def before_fault(self, messages: list[tuple[int, bytes]]) -> None:
        """Publish them: they were sent in good faith."""
        self._receive(messages)

    def _fail(self, code: int, reason: str) -> None:
        """Close for a broken rule, behind the answers to all that was sent before it."""
        if (self._is_held or self._due is not None) and not self.transport.is_closing():
            self._has_failed = True
            self._fault = code, reason
        else:
            super()._fail(code, reason)

    def close(self, code: int, reason: str) -> None:
        """Say goodbye, behind the answers that are due; what it subscribes to ends at once."""
        if self._due is None or self.is_closing or self.transport.is_closing():
            super().close(code, reason)
        elif self._farewell is None:
            self._farewell = code, reason
            self.stop_delivery()

    # --- publishing ------------------------------------------------------------------------------

    def _receive(self, messages: list[tuple[int, bytes]]) -> None:
        if self._is_held:
            self._waiting.extend(messages)
        else:
            self._serve(messages)

    def _read(self, data: bytes) -> None:
        """Parse ``data`` slice by slice, and publish what is whole; what is left over is held."""
        is_spent = self._connections.turns.is_spent
        for start in range(0, len(data), SLICE_BYTES):
            if start and (self._is_held or is_spent()):
                self._hold_unread(data[start:])
                return
            self._feed(data[start : start + SLICE_BYTES])
            if self._has_failed:
                return

    def _serve(self, messages: Sequence[tuple[int, bytes]]) -> None:
        """Publish ``messages`` in order, until one has to wait or others want their turn."""
        start = 0
        while start < len(messages):
            if start and self._connections.turns.is_spent():
                self._waiting.extend(messages[start:])
                self._await_turn()
                return
            if self._due is not None and self._due.is_full:
                self._block(messages[start:])
                return
            payloads = _texts_of(messages[start : start + FRAMES_PER_TAKE])
            if not payloads:
                if self._due is not None and messages[start][0] not in (PING, PONG):
                    # A goodbye, or a fault: nothing follows what is sent for it.
                    self._due.seal()
                    continue
                self._receive_other(*messages[start])
                if self._has_failed and not (self._fault and messages[start][0] in (PING, PONG)):
                    # Frames behind a fault, or behind a close, are not read; a fault that is kept
                    # lies behind all of these frames.
                    return
                start += 1
                continue
            taken, has_to_wait = self._publisher.take(payloads)
            self._write_answers()
            start += taken
            if has_to_wait and not (self._due is not None and self._due.is_sealed):
                self._waiting.extend(messages[start:])
                self._hold()
                self._connections.tasks.spawn(self._wait_for(payloads[taken:]))
                return

    async def _wait_for(self, payloads: Sequence[bytes]) -> None:
        """Have the first of what is held back published, of which ``payloads`` are the texts."""
        try:
            taken = await self._publisher.wait_for(payloads)
            del self._waiting[:taken]
            self._write_answers()
            self._await_turn()
        except Exception as error:
            self._end_for_bug(error)

    def _end_for_bug(self, error: Exception) -> None:
        """Log ``error`` as one of the request that opened the socket, and close it."""
        with AbortOnError(self.transport):
            self._connections.refusals.count(error, self._head)
            self._write_answers()
            self._waiting.clear()
            self._drop_unread()
            self._is_held = self._is_blocked = False
            self._fail(INTERNAL_ERROR, "internal_error")
            self._read_on()

    def _receive_other(self, opcode: int, payload: bytes) -> None:
        if not self.spend_frames(1, BUDGET_FRAMES):
            self.over_budget()
        elif opcode == PING and self._due is not None and not self.is_closing:
            self._due.add(pong_frame(payload))
        else:
            self._receive_one(opcode, payload)

    def message(self, opcode: int, payload: bytes) -> None:
        """Refuse binary: a publish is JSON text."""
        self._fail(UNSUPPORTED_DATA, "text_frames_only")

    def _hold_unread(self, data: bytes, *, has_begun: bool = True) -> None:
        """Parse ``data`` in a later turn, and read no more until then."""
        before_bytes = len(self._unread)
        self._unread += data
        if self._sender is NOBODY:
            self._sender = self._connections.sender_of(self)
        if not self._connections.budget.change(before_bytes, len(self._unread), self._sender):
            self._drop_unread()
            self._fail(TRY_AGAIN_LATER, "too_much_unfinished")
        elif not self._is_held:
            self._await_turn(has_begun=has_begun)

    def _drop_unread(self) -> bytes:
        """Hold no bytes back any more; return those that were."""
        unread, self._unread = self._unread, b""
        self._connections.budget.change(len(unread), 0, self._sender)
        self._sender = NOBODY
        return unread

    def _await_turn(self, *, has_begun: bool = True) -> None:
        """Go on with what is held back in a turn to come."""
        self._hold()
        self._connections.turns.wait(self._take_turn, len(self._unread), has_begun=has_begun)

    def _hold(self) -> None:
        self._is_held = True
        # A pong could not be read meanwhile, so none is expected.
        self.awaits_pong = False
        self.transport.pause_reading()

    def _take_turn(self) -> None:
        """Publish what was held back, and read on if nothing holds it back again.

        Messages that were received whole are published even if the publisher has gone meanwhile.
        """
        if self._due is not None and self._due.is_full:
            self._is_blocked = True
            return
        self._is_held = False
        if self._is_write_paused and not self.transport.is_closing():
            # `resume_writing` goes on: who does not read answers is not given more of them.
            return
        waiting, self._waiting = self._waiting, []
        try:
            self._serve(waiting)
            if self._unread and not self._is_held:
                unread = self._drop_unread()
                if not self._has_failed:
                    self._read(unread)
            self._read_on()
        except Exception as error:
            self._end_for_bug(error)

    def _go_on(self) -> None:
        """Go on where something was held back, in a turn of its own if that is a message."""
        if self._is_held:
            return
        if self._waiting or self._unread:
            self._await_turn()
        else:
            self._read_on()

    def _read_on(self) -> None:
        if self._is_held:
            return
        if self.transport.is_closing():
            # The rest of an unfinished message will never come.
            self._connections.settle_unfinished(self, 0, has_progress=True)
            return
        if self._is_write_paused:
            return
        if self._fault is not None or self._has_eof:
            self._end_input()
        else:
            self.transport.resume_reading()

    def _end_input(self) -> None:
        """End the connection as its client had it, once no answer is due any more."""
        if self._due is not None:
            return
        if self._fault is not None:
            super()._fail(*self._fault)
            # Bytes that follow are ignored; only the end of the connection is noticed.
            self.transport.resume_reading()
        if self._has_eof:
            super().eof_received()
            self.transport.close()

    # --- answers ---------------------------------------------------------------------------------

    def _write_answers(self) -> None:
        """Write the answers that are known, at once, unless the publisher can't read them any more.

        From the first one on that is due, they take their places behind it.
        """
        answers, due = self._publisher.answers, self._publisher.due
        if due or self._due is not None:
            self._line_up(answers, due)
        elif answers and not self.is_closing and not self.transport.is_closing():
            self.write(b"".join(map(text_frame, answers)))
        answers.clear()

    def _line_up(self, answers: list[bytes], due: list[tuple[int, Due[list[bytes]]]]) -> None:
        """Give ``answers`` their places, with what is ``due`` between them."""
        start = 0
        for before, later in due:
            self._add(answers[start:before])
            start = before
            if self._due is None:
                self._due = DueAnswers()
            place = self._due.expect(later.count)
            later.when_known(partial(self._settle, self._due, place, later))
        self._add(answers[start:])
        due.clear()

    def _add(self, answers: list[bytes]) -> None:
        frames = b"".join(map(text_frame, answers))
        if not frames:
            return
        if self._due is not None:
            self._due.add(frames, len(answers))
        elif not self.is_closing and not self.transport.is_closing():
            self.write(frames)

    def _settle(
        self, queue: DueAnswers, place: Place, due: Due[list[bytes]], _: asyncio.Future[object]
    ) -> None:
        """Note answers that were due; those of one turn of the loop are written together."""
        with AbortOnError(self.transport):
            if queue.settle(place, b"".join(map(text_frame, due.result()))):
                self._connections.loop.call_soon(self._write_due)

    def _write_due(self) -> None:
        """Write the answers whose turn has come, and go on with what waited for that."""
        due = self._due
        if due is None:
            return
        answers = due.take()
        if not due:
            self._due = None
        if answers and not self.is_closing and not self.transport.is_closing():
            self.write(answers)
        if self._due is None and self._farewell is not None:
            self.close(*self._farewell)
        if self._is_blocked and not due.is_full:
            self._is_blocked = False
            self._await_turn()
        elif self._due is None and (self._fault is not None or self._has_eof):
            self._read_on()

    def _block(self, messages: Sequence[tuple[int, bytes]]) -> None:
        """Go on with ``messages`` once fewer answers are due."""
        self._waiting.extend(messages)
        self._is_blocked = True
        self._hold()

    def _affords(self, size: int, frames: int, messages: int) -> bool:
        # Publishes have their own limits; fragments are spent here, control frames one by one.
        fragments = frames - messages
        return not fragments or self.spend_frames(fragments, BUDGET_FRAMES)


def _texts_of(messages: Sequence[tuple[int, bytes]]) -> list[bytes]:
    """Return the payloads of the texts that ``messages`` begin with."""
    payloads = [payload for opcode, payload in messages if opcode == TEXT]
    if len(payloads) == len(messages):
        return payloads
    return [payload for _, payload in takewhile(lambda each: each[0] == TEXT, messages)]
