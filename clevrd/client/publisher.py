"""The publish stream: many messages in flight over one WebSocket, in order, with reconnects.

Each message is kept until it is answered, and is sent again over each new connection until then.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Generator, Mapping
from itertools import count
from types import TracebackType
from typing import Any, Final, Self

from clevrd.client.arguments import publish_fields
from clevrd.client.backoff import Clockwork, comes_back, delay_s, is_expired
from clevrd.client.errors import ClientError, Closed, Misuse, Refused, Unreachable
from clevrd.client.publishing import IdempotencyKeys, Repeats, is_transient
from clevrd.client.session import Session, Socket
from clevrd.client.values import UNREADABLE, check_json, data_json
from clevrd.client.wire import (
    Published,
    Refusal,
    publish_body,
    read_answer,
)

log = logging.getLogger(__name__)

# 256: enough to fill a connection with a round trip of 20 ms at 10,000 messages a second.
MAX_IN_FLIGHT: Final = 256
# Bytes of all messages in flight together, at most; a single message may be larger.
MAX_IN_FLIGHT_BYTES: Final = 8 << 20
# Refusals whose receipts no one has awaited, at most; one more ends the stream.
MAX_UNSEEN: Final = 1_000

_MESSAGE_TOO_BIG: Final = 1009


class Receipt:
    """One message on its way: await it for the server's answer."""

    __slots__ = ("_outcome", "is_seen")

    def __init__(self, outcome: asyncio.Future[Published | ClientError]) -> None:
        self._outcome = outcome
        # True once the receipt was awaited; then the caller handles a refusal. Set by _wait.
        self.is_seen = False

    def __await__(self) -> Generator[Any, None, Published]:
        """Wait for the answer.

        Raises:
            Refused: the server does not take the message.
            Unreachable, Closed, BadAnswer: the stream failed before the answer.
        """
        return self._wait().__await__()

    async def _wait(self) -> Published:
        self.is_seen = True
        # Shielded, since a caller that stops waiting does not withdraw the message.
        outcome = await asyncio.shield(self._outcome)
        if isinstance(outcome, ClientError):
            raise outcome
        return outcome

    def settle(self, outcome: Published | ClientError) -> None:
        """Give the receipt its answer, and wake the task that awaits it."""
        self._outcome.set_result(outcome)


class _Entry:
    """One message that is not answered yet."""

    __slots__ = ("copies", "frame", "is_sent", "offered_s", "receipt")

    def __init__(self, frame: bytes, receipt: Receipt, offered_s: float) -> None:
        self.frame = frame
        self.receipt = receipt
        self.offered_s = offered_s
        # True from the moment the message is sent over the present connection until it is refused
        # for the moment.
        self.is_sent = False
        # Number of lost connections over which the message was sent; each copy may have arrived.
        self.copies = 0


class Publisher:
    """A stream of publishes; use as ``async with client.publisher() as publisher``.

    Leaving the block waits until each message is answered, and raises if messages were refused and
    their receipts were not awaited. Where no block fits, `open` and `close` do the same.
    """

    def __init__(
        self,
        session: Session,
        repeats: Repeats,
        new_key: IdempotencyKeys,
        max_in_flight: int,
        retry_for_s: float,
        clockwork: Clockwork,
    ) -> None:
        self._session = session
        self._repeats = repeats
        self._new_key = new_key
        self._max_in_flight = max_in_flight
        self._retry_for_s = retry_for_s
        self._random, self._sleep, self._clock = clockwork
        self._next_ref = count(1).__next__
        # Ref -> message without an answer, in the order in which the messages were offered.
        self._entries: dict[int, _Entry] = {}
        self._in_flight_bytes = 0
        # Entries of _entries that have yet to be sent over this connection, in order.
        self._to_send: deque[_Entry] = deque()
        # The refusal of a message that may pass, and before whose retry no message is sent; else
        # None.
        self._held_back_by: Refusal | None = None
        self._attempt = 0
        self._last_taken_s = self._clock()
        self._unseen: list[Receipt] = []
        self._failure: Exception | None = None
        self._has_work = asyncio.Event()
        self._has_room = asyncio.Event()
        self._is_empty = asyncio.Event()
        self._is_open = asyncio.Event()
        # This lock lets publishing tasks wait for room in the order in which they came.
        self._turn = asyncio.Lock()
        self._driver: asyncio.Task[None] | None = None
        self._is_stopped = False

    async def open(self) -> Self:
        """Connect; raise the first connection's error, or Misuse the second time."""
        if self._driver is not None:
            raise Misuse("A publisher is opened once; make another one with client.publisher().")
        self._is_empty.set()
        self._driver = asyncio.create_task(self._drive(), name="clevrd-publisher")
        try:
            await self._is_open.wait()
            if self._failure is not None:
                raise self._failure
        except BaseException:
            # A block that was not entered has no exit that would stop the task.
            await self._stop()
            raise
        return self

    async def close(self) -> None:
        """Wait until each message is answered, and close. A second call does nothing.

        Raises:
            Refused: messages were refused, and their receipts were not awaited.
            Unreachable, Closed, BadAnswer: the stream has failed.
        """
        if self._driver is None or self._is_stopped:
            return
        try:
            await self.flush()
        finally:
            await self._stop()
        self._raise_unseen()

    async def __aenter__(self) -> Self:
        """Open."""
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the answers, and close; after an error close at once."""
        if kind is None:
            await self.close()
        else:
            await self._stop()

    async def publish(
        self,
        topic: str,
        data: Any,
        *,
        key: str | None = None,
        idempotency_key: str | None = None,
        ttl_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Receipt:
        """Send one message, and return once there is room for the next one.

        Arguments and data are those of `Client.publish`. Messages keep their order across lost
        connections; a message that the server refuses for the moment (429, 503) may come behind
        messages that were already sent.

        Raises:
            Refused, Unreachable, Closed, BadAnswer: the stream has failed; no more messages are
                sent.
        """
        fields = publish_fields(topic, key, ttl_s, headers, idempotency_key)
        return await self._publish(topic, data_json(data), fields)

    async def publish_raw(
        self,
        topic: str,
        raw: bytes | bytearray | memoryview | str,
        *,
        key: str | None = None,
        idempotency_key: str | None = None,
        ttl_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Receipt:
        """Send one message whose data is JSON already; otherwise the same as `publish`."""
        fields = publish_fields(topic, key, ttl_s, headers, idempotency_key)
        return await self._publish(topic, check_json(raw), fields)

    async def flush(self) -> None:
        """Wait until each message is answered; raise the stream's error if it has failed."""
        await self._is_empty.wait()
        if self._failure is not None:
            raise self._failure

    # --- taking messages in ---

    async def _publish(self, topic: str, data: bytes, fields: dict[str, object]) -> Receipt:
        ref = self._next_ref()
        if "idempotency_key" not in fields:
            fields["idempotency_key"] = self._new_key()
        frame = publish_body(topic, data, {**fields, "ref": ref})
        async with self._turn:
            while not self._fits(len(frame)):
                self._has_room.clear()
                await self._has_room.wait()
            self._raise_failure()
            return self._add(ref, frame)

    def _fits(self, size: int) -> bool:
        if self._failure is not None or not self._entries:
            return True
        return (
            len(self._entries) < self._max_in_flight
            and self._in_flight_bytes + size <= MAX_IN_FLIGHT_BYTES
        )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._driver is None:
            raise Misuse("Publisher is not open; use it in 'async with', or await open() first.")
        if self._driver.done():
            raise Misuse("Publisher is closed; make another one with client.publisher().")
        if len(self._unseen) > MAX_UNSEEN:
            self._raise_unseen()

    def _raise_unseen(self) -> None:
        unseen = [receipt for receipt in self._unseen if not receipt.is_seen]
        self._unseen = []
        if not unseen:
            return
        first = unseen[0]._outcome.result()
        if isinstance(first, Refused):
            raise Refused(
                f"{len(unseen)} messages were refused; the first: {first}",
                code=first.code,
                is_transient=first.is_transient,
            )

    def _add(self, ref: int, frame: bytes) -> Receipt:
        receipt = Receipt(asyncio.get_running_loop().create_future())
        entry = _Entry(frame, receipt, self._clock())
        self._entries[ref] = entry
        self._in_flight_bytes += len(frame)
        self._is_empty.clear()
        self._to_send.append(entry)
        self._has_work.set()
        return receipt

    # --- connections ---

    async def _drive(self) -> None:
        """Connect, and reconnect until that is hopeless."""
        try:
            while True:
                try:
                    socket = await self._session.websocket("/publish", {}, ())
                    self._is_open.set()
                    self._send_all_again()
                    await self._converse(socket)
                except (Refused, Unreachable, Closed) as error:
                    await self._recover(error)
        except Exception as error:
            self._fail(error)

    async def _converse(self, socket: Socket) -> None:
        """Send messages and read answers over one connection; always ends by raising."""
        writer = asyncio.create_task(self._write(socket))
        try:
            while True:
                self._take_answer(await self._session.receive(socket))
        except Closed as error:
            if is_expired(error):
                self._session.drop_secret(socket)
            raise
        finally:
            writer.cancel()
            await asyncio.wait((writer,))
            if not writer.cancelled():
                log.debug("publish socket broke why=%s", writer.exception())
            await self._session.drop(socket)

    async def _write(self, socket: Socket) -> None:
        while True:
            if self._held_back_by is not None:
                await self._wait_out(self._held_back_by)
            elif self._to_send:
                entry = self._to_send.popleft()
                entry.is_sent = True
                await self._session.send(socket, entry.frame)
            else:
                self._has_work.clear()
                await self._has_work.wait()

    async def _wait_out(self, refusal: Refusal) -> None:
        """Wait after a refusal that may pass; then send the refused messages before later ones."""
        wait_s = delay_s(self._attempt, refusal.as_error(), self._random())
        self._attempt += 1
        await self._sleep(wait_s)
        self._held_back_by = None
        self._to_send = deque(each for each in self._entries.values() if not each.is_sent)

    def _send_all_again(self) -> None:
        """Mark every message without an answer to be sent over the new connection."""
        for entry in self._entries.values():
            entry.copies += entry.is_sent
            entry.is_sent = False
        self._held_back_by = None
        self._to_send = deque(self._entries.values())

    async def _recover(self, error: Refused | Unreachable | Closed) -> None:
        """Wait before the next connection; raise ``error`` when there is to be none."""
        if isinstance(error, Closed) and error.code == _MESSAGE_TOO_BIG:
            self._refuse_too_big()
            return
        wait_s = delay_s(self._attempt, error, self._random())
        is_hopeless = not self._session.was_reached or not comes_back(error)
        if is_hopeless or self._is_overdue(self._oldest(), wait_s):
            raise error
        self._attempt += 1
        log.info("publish socket lost delay_s=%.2f why=%s", wait_s, error)
        await self._sleep(wait_s)

    def _oldest(self) -> _Entry | None:
        return next(iter(self._entries.values()), None)

    def _is_overdue(self, entry: _Entry | None, wait_s: float = 0.0) -> bool:
        """Return whether ``entry`` was tried for too long while the server took no message."""
        if entry is None:
            return False
        since_s = max(entry.offered_s, self._last_taken_s)
        return self._clock() + wait_s > since_s + self._retry_for_s

    # --- answers ---

    def _take_answer(self, content: bytes) -> None:
        try:
            ref, result = read_answer(content)
        except UNREADABLE as error:
            raise self._session.not_clevrd("a publish") from error
        entry = self._entries.get(ref) if isinstance(ref, int) else None
        if ref is None or isinstance(ref, str):
            raise self._session.not_clevrd("without a ref")
        if entry is None:
            return
        if is_transient(result) and not self._is_overdue(entry):
            entry.is_sent = False
            self._held_back_by = result
            self._has_work.set()
            return
        self._repeats.settle(entry.copies, result)
        if isinstance(result, Published):
            self._last_taken_s = self._clock()
            self._attempt = 0
            self._session.warn(result.warnings)
            self._settle(ref, result)
        else:
            self._refuse(ref, result.as_error())

    def _refuse_too_big(self) -> None:
        """Refuse the message that made the server close the connection; keep the others.

        It is taken to be the largest message without an answer: answers to earlier messages may be
        lost with the connection, and if any message is too large, the largest one is.
        """
        sent = [(len(each.frame), ref) for ref, each in self._entries.items() if each.is_sent]
        if not sent:
            raise Closed(_MESSAGE_TOO_BIG, "message_too_big")
        size, ref = max(sent, key=lambda each: each[0])
        sentence = f"The message is larger than the server allows: {size} bytes in all."
        self._refuse(ref, Refused(sentence, code="message_too_large", is_transient=False))

    def _refuse(self, ref: int, error: Refused) -> None:
        self._unseen = [each for each in self._unseen if not each.is_seen]
        self._unseen.append(self._entries[ref].receipt)
        self._settle(ref, error)

    def _settle(self, ref: int, outcome: Published | ClientError) -> None:
        entry = self._entries.pop(ref)
        self._in_flight_bytes -= len(entry.frame)
        entry.receipt.settle(outcome)
        self._has_room.set()
        if not self._entries:
            self._is_empty.set()

    def _fail(self, error: Exception) -> None:
        """End the stream: every message without an answer gets ``error``."""
        self._failure = error
        outcome = error if isinstance(error, ClientError) else Closed(1006, str(error))
        for ref in list(self._entries):
            self._settle(ref, outcome)
        self._has_room.set()
        self._is_open.set()

    async def _stop(self) -> None:
        self._is_stopped = True
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.wait((self._driver,))
        for ref in list(self._entries):
            self._settle(ref, Unreachable("The publisher was closed.", may_have_arrived=True))
