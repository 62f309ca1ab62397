"""Publish sockets: each text frame is a publish, in order; frames with a ``ref`` are answered.

What a publish means is decided by handlers/publish_socket.py, which gives this its function.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

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

# What to send back for a publish: JSON, None for nothing, or something to await for either.
PublishFrame = Callable[[bytes], bytes | Awaitable[bytes | None] | None]


class PublishConnection(WebSocketConnection):
    """One publisher's WebSocket."""

    __slots__ = (
        "_answers",
        "_has_eof",
        "_is_held",
        "_is_write_paused",
        "_max_message_bytes",
        "_publish",
        "_waiting",
    )

    def __init__(
        self,
        sockets: WebSockets,
        transport: asyncio.Transport,
        publish: PublishFrame,
        max_message_bytes: int,
    ) -> None:
        super().__init__(sockets, transport)
        self._max_message_bytes = max_message_bytes
        self._publish = publish
        # Received and not yet published: what one read brought, at most. Reading is paused then.
        self._waiting: list[tuple[int, bytes]] = []
        # Something is being waited for before the next of _waiting: a publish, or a turn.
        self._is_held = False
        self._is_write_paused = False
        # It sends nothing more, and may still wait for answers.
        self._has_eof = False
        # Answers of this turn, written at its end.
        self._answers: list[bytes] = []

    def begin(self, early_data: bytes) -> None:
        """Take over the transport, and read what was received behind the handshake."""
        self._sockets.add(self)
        if early_data:
            self.data_received(early_data)

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
        publish = self._publish
        for index, (opcode, payload) in enumerate(messages):
            if opcode != TEXT:
                self._receive_other(opcode, payload)
                continue
            if index >= FRAMES_PER_TURN:
                self._hold(messages[index:])
                self._sockets.loop.call_soon(self._take_turn)
                break
            answer = publish(payload)
            if answer is None:
                continue
            if isinstance(answer, bytes):
                self._answers.append(text_frame(answer))
                continue
            self._hold(messages[index + 1 :])
            self._sockets.tasks.spawn(self._answer_later(answer))
            break
        self._flush_answers()

    def _receive_other(self, opcode: int, payload: bytes) -> None:
        if self.spend_frames(1, BUDGET_FRAMES):
            self._receive_one(opcode, payload)
        else:
            self.over_budget()

    def message(self, opcode: int, payload: bytes) -> None:
        """Refuse binary: a publish is JSON text."""
        self._fail(UNSUPPORTED_DATA, "text_frames_only")

    async def _answer_later(self, answer: Awaitable[bytes | None]) -> None:
        frame = await answer
        if frame is not None:
            self._answers.append(text_frame(frame))
        self._take_turn()

    def _hold(self, rest: Sequence[tuple[int, bytes]]) -> None:
        self._waiting.extend(rest)
        self._is_held = True
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

    def _flush_answers(self) -> None:
        """Write this turn's answers at once, unless the publisher can't read them any more."""
        answers = self._answers
        if not answers:
            return
        if not self.is_closing:
            self.write(answers[0] if len(answers) == 1 else b"".join(answers))
        answers.clear()

    def _affords(self, size: int, frames: int, messages: int) -> bool:
        # Publishes have their own limits; fragments are spent here, control frames one by one.
        fragments = frames - messages
        return not fragments or self.spend_frames(fragments, BUDGET_FRAMES)
