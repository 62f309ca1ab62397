"""Publish sockets: each text frame is a publish, in order; frames with a ``ref`` are answered.

What a publish means is decided by handlers/publish_socket.py, which gives this its Publisher.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Final, Protocol

from clevrd.connections.websocket import WebSocketConnection, WebSockets
from clevrd.core.client_frames import TEXT, ClientFrames
from clevrd.core.encoding import text_frame

# Publishes of one socket before others get a turn: about 1.5 ms.
FRAMES_PER_TURN: Final = 256

# The shortest publish takes 28 bytes and a read brings 256 KiB: more frames are no publishes.
FRAMES_PER_READ: Final = 10_000

# Control frames, and fragments beyond a message's first, within the budget's window: a MiB in
# fragments of one kilobyte passes, a flood of empty ones does not.
BUDGET_FRAMES: Final = 2_000

UNSUPPORTED_DATA: Final = 1003


class Publisher(Protocol):
    """What publishes the frames' payloads and says what to answer."""

    @property
    def answers(self) -> list[bytes]:
        """JSON to send back, in the order of the frames; taken out by the connection."""

    def take(self, payloads: Sequence[bytes], /) -> int:
        """Publish ``payloads`` until one has to wait; return how many were taken."""

    def wait_for(self, payloads: Sequence[bytes], /) -> Awaitable[int]:
        """Publish the first when its time has come, and some more; return how many were taken."""


class PublishConnection(WebSocketConnection):
    """One publisher's WebSocket."""

    __slots__ = (
        "_has_eof",
        "_is_held",
        "_is_write_paused",
        "_max_message_bytes",
        "_publisher",
        "_waiting",
    )

    def __init__(
        self,
        sockets: WebSockets,
        transport: asyncio.Transport,
        publisher: Publisher,
        max_message_bytes: int,
    ) -> None:
        super().__init__(sockets, transport)
        self._max_message_bytes = max_message_bytes
        self._publisher = publisher
        # Received and not yet published: what one read brought, at most. Reading is paused then.
        self._waiting: list[tuple[int, bytes]] = []
        # Something is being waited for before the next of _waiting: a publish, or a turn.
        self._is_held = False
        self._is_write_paused = False
        # It sends nothing more, and may still wait for answers.
        self._has_eof = False

    def begin(self, early_data: bytes) -> None:
        """Take over the transport, and read what was received behind the handshake."""
        self._sockets.add(self)
        if early_data:
            self.data_received(early_data)

    def ping(self) -> None:
        """Ask whether the publisher is there, unless it is we who don't read."""
        if not self._is_held:
            super().ping()

    def pause_writing(self) -> None:
        """The publisher does not read its answers: read no more of its publishes."""
        self._is_write_paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._is_write_paused = False
        self.awaits_pong = False
        self._go_on()

    def eof_received(self) -> bool | None:
        """Publish what was received before the connection ends."""
        if self._is_held:
            self._has_eof = True
            return True
        return super().eof_received()

    def new_frames(self) -> ClientFrames:
        """Return a reader of frames with a publisher's bounds."""
        return ClientFrames(self._max_message_bytes, max_frames_per_feed=FRAMES_PER_READ)

    def before_fault(self, messages: list[tuple[int, bytes]]) -> None:
        """Publish them: they were sent in good faith."""
        self._receive(messages)

    # --- publishing ------------------------------------------------------------------------------

    def _receive(self, messages: list[tuple[int, bytes]]) -> None:
        if self._is_held:
            self._waiting.extend(messages)
        else:
            self._serve(messages)

    def _serve(self, messages: Sequence[tuple[int, bytes]]) -> None:
        """Publish ``messages`` in order, until one has to wait or others want their turn."""
        turn = messages[:FRAMES_PER_TURN]
        start = 0
        for index, (opcode, payload) in enumerate(turn):
            if opcode != TEXT:
                if not self._publish(messages, start, index):
                    return
                self._receive_other(opcode, payload)
                if self._has_failed:
                    # What lies behind a fault, or a goodbye, is not read.
                    return
                start = index + 1
        if self._publish(messages, start, len(turn)) and len(messages) > len(turn):
            self._hold(messages[len(turn) :])
            self._sockets.loop.call_soon(self._take_turn)

    def _publish(self, messages: Sequence[tuple[int, bytes]], start: int, stop: int) -> bool:
        """Publish the texts from ``start`` to ``stop``; return False if one has to wait.

        The rest of ``messages`` is held back then.
        """
        publisher = self._publisher
        payloads = [payload for _, payload in messages[start:stop]]
        taken = publisher.take(payloads)
        self._write_answers()
        if taken == len(payloads):
            return True
        self._hold(messages[start + taken :])
        self._sockets.tasks.spawn(self._wait_for(payloads[taken:]))
        return False

    async def _wait_for(self, payloads: Sequence[bytes]) -> None:
        """Have the first of what is held back published, of which ``payloads`` are the texts."""
        taken = await self._publisher.wait_for(payloads)
        del self._waiting[:taken]
        self._write_answers()
        self._take_turn()

    def _receive_other(self, opcode: int, payload: bytes) -> None:
        if self.spend_frames(1, BUDGET_FRAMES):
            self._receive_one(opcode, payload)
        else:
            self.over_budget()

    def message(self, opcode: int, payload: bytes) -> None:
        """Refuse binary: a publish is JSON text."""
        self._fail(UNSUPPORTED_DATA, "text_frames_only")

    def _hold(self, rest: Sequence[tuple[int, bytes]]) -> None:
        self._waiting.extend(rest)
        self._is_held = True
        # Its pong can't be read meanwhile, so it owes none.
        self.awaits_pong = False
        self.transport.pause_reading()

    def _take_turn(self) -> None:
        self._is_held = False
        self._go_on()

    def _go_on(self) -> None:
        """Publish what was held back, and read on if nothing holds it back again.

        What was received whole is published even if the publisher has gone meanwhile.
        """
        if self._is_held:
            return
        waiting, self._waiting = self._waiting, []
        self._serve(waiting)
        self._read_on()

    def _read_on(self) -> None:
        if self._is_held or self._is_write_paused or self.transport.is_closing():
            return
        if self._has_eof:
            super().eof_received()
            self.transport.close()
        else:
            self.transport.resume_reading()

    def _write_answers(self) -> None:
        """Write the answers due, at once, unless the publisher can't read them any more."""
        answers = self._publisher.answers
        if not answers:
            return
        if not self.is_closing and not self.transport.is_closing():
            self.write(b"".join(map(text_frame, answers)))
        answers.clear()

    def _affords(self, size: int, frames: int, messages: int) -> bool:
        # Publishes have their own limits; fragments are spent here, control frames one by one.
        fragments = frames - messages
        return not fragments or self.spend_frames(fragments, BUDGET_FRAMES)
