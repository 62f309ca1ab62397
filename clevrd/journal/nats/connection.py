"""Connection: one connection over which the partitions of a node append, read and ask.

It ends for good when it breaks; `Link` makes the next one.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import msgspec
import nats.errors

from clevrd.journal.nats.library import (
    DENIED,
    LOST,
    NOBODY,
    SILENT,
    Connector,
    Message,
    NatsFault,
    Take,
    close,
)
from clevrd.journal.nats.streams import ApiError
from clevrd.journal.url_parts import Host

TICK_S: Final = 0.5
# Ticks that an answer may take, and ticks in which anything at all is heard of a connection that
# has something to say: each reader's server shows itself once a second.
PATIENCE_TICKS: Final = 8
_NO_RESPONDERS: Final = "503"


class Feed(Protocol):
    """A reader that hears from the server by itself."""

    @property
    def is_asking(self) -> bool:
        """Whether the server has something to say to it."""
        ...

    def end(self, fault: NatsFault) -> None:
        """Note that nothing more comes."""

    def tick(self) -> None:
        """Note that TICK_S have passed."""


class _Due:
    """A request until it is answered."""

    __slots__ = ("answer", "ticks")

    def __init__(self, answer: asyncio.Future[bytes]) -> None:
        self.answer = answer
        self.ticks = PATIENCE_TICKS


class Connection:
    """An open connection, until it breaks."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, ended: Callable[[Connection], None]
    ) -> None:
        """Make a connection; `open` connects it. Args: ended: called once, when it is over."""
        self._loop = loop
        self._ended = ended
        self._client: Any = None
        # Requests by the last word of the subject that they are answered at.
        self._due: dict[bytes, _Due] = {}
        self._number = 0
        self._inbox = ""
        self.feeds: set[Feed] = set()
        # Ticks since something was heard.
        self._silent_ticks = 0
        self.fault: NatsFault | None = None
        # The server's first words.
        self.server: dict[str, Any] = {}

    async def open(self, connector: Connector, host: Host) -> None:
        """Connect to ``host``; raises NatsFault."""
        self._client = await connector.connect(host, self._note_error, self._note_closed)
        self.server = self._client._server_info
        self._inbox = self._client.new_inbox()
        await self.listen(f"{self._inbox}.*", self._answered)

    @property
    def max_payload(self) -> int:
        """Bytes of a message that the server takes."""
        return int(self.server.get("max_payload", 0))

    @property
    def incarnation(self) -> str:
        """The server's id, which is new at each of its starts; empty in a cluster.

        Which of the servers of a cluster has a stream is not known from its connection.
        """
        return "" if self.server.get("cluster") else str(self.server.get("server_id", ""))

    @property
    def other_hosts(self) -> Sequence[str]:
        """Servers of the same cluster, as ``host:port``."""
        return self.server.get("connect_urls") or ()

    def new_inbox(self) -> str:
        """Return a subject of our own."""
        return str(self._client.new_inbox())

    async def subscribe(self, subject: str, got: Callable[[Message], Any]) -> Any:
        """Have ``got``, a coroutine function, called with each message; raises NatsFault."""
        return await self._sent(
            # 0: as many bytes as were asked for; who asks has the bound.
            self._client.subscribe(subject, cb=got, pending_bytes_limit=0)
        )

    async def listen(self, subject: str, take: Take) -> Any:
        """Have ``take`` called with each message, at once; raises NatsFault.

        Return what `leave` needs.
        """
        return await self._sent(self._client.listen(subject, take))

    async def leave(self, listening: Any) -> None:
        """Listen no more; raises NatsFault."""
        await self._sent(self._client.leave(listening))

    async def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Send a message, in the order of the calls; raises NatsFault."""
        try:
            if self._client.send_now(subject, payload, reply):
                return
        except (OSError, RuntimeError, AttributeError) as error:
            raise self._fault_of(error) from error
        await self._sent(self._client.publish(subject, payload, reply))

    async def request(self, subject: str, payload: bytes) -> bytes:
        """Send a message, and return its answer.

        Raises:
            NatsFault: nobody listens at ``subject``, or the server refuses, or can't be reached.
        """
        if self.fault is not None:
            raise NatsFault(self.fault.code, self.fault.text)
        self._number += 1
        token = b"%d" % self._number
        due = _Due(self._loop.create_future())
        if not self._is_asking:
            self._silent_ticks = 0
        self._due[token] = due
        try:
            await self.publish(subject, payload, f"{self._inbox}.{self._number}")
            return await due.answer
        except NatsFault as fault:
            # Each caller raises its own: a traceback must not grow with each of them.
            raise NatsFault(fault.code, fault.text) from None
        finally:
            self._due.pop(token, None)

    async def api(self, subject: str, question: Any = None) -> bytes:
        """Ask JetStream, and return its answer; raises NatsFault."""
        payload = b"" if question is None else json.dumps(question).encode()
        answer = await self.request(f"$JS.API.{subject}", payload)
        raise_error_in(answer)
        return answer

    def tick(self) -> None:
        """Note that TICK_S have passed; give up what has not been answered for too long.

        Ticks are counted and not seconds, so that a process which was stopped for a minute does
        not find all its servers silent.
        """
        if not self._is_asking:
            self._silent_ticks = 0
            return
        self._silent_ticks += 1
        if self._silent_ticks > PATIENCE_TICKS:
            self.end(NatsFault(LOST, "it does not answer"))
            return
        for due in tuple(self._due.values()):
            due.ticks -= 1
            if due.ticks <= 0 and not due.answer.done():
                due.answer.set_exception(NatsFault(SILENT, "it does not answer"))
        for feed in tuple(self.feeds):
            feed.tick()

    @property
    def _is_asking(self) -> bool:
        return bool(self._due) or any(feed.is_asking for feed in self.feeds)

    def note_heard(self) -> None:
        """Note that the server has sent something."""
        self._silent_ticks = 0

    def end(self, fault: NatsFault) -> None:
        """Use it no more; all that is due fails with ``fault``."""
        if self.fault is not None:
            return
        self.fault = fault
        for due in tuple(self._due.values()):
            if not due.answer.done():
                due.answer.set_exception(fault)
        for feed in tuple(self.feeds):
            feed.end(fault)
        self.feeds.clear()
        self._ended(self)

    async def closed(self) -> None:
        """Close it, behind `end`."""
        if self._client is not None:
            await close(self._client)

    async def _sent(self, sending: Any) -> Any:
        try:
            return await sending
        except (nats.errors.Error, OSError, AttributeError) as error:
            # nats-py has only attributes that are None in place of a transport that is gone.
            raise self._fault_of(error) from error

    def _fault_of(self, error: Exception) -> NatsFault:
        fault = self.fault or NatsFault(LOST, str(error) or type(error).__name__)
        return NatsFault(fault.code, fault.text)

    def _answered(
        self, subject: bytes, _reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> None:
        self._silent_ticks = 0
        due = self._due.get(subject.rpartition(b".")[2])
        if due is None or due.answer.done():
            return
        if headers and headers.get("Status") == _NO_RESPONDERS:
            due.answer.set_exception(NatsFault(NOBODY, "nobody listens"))
        else:
            due.answer.set_result(data)

    def _note_error(self, text: str) -> None:
        """Fail what is due where the server says that its user may not ask it."""
        if "permissions violation" not in text.lower():
            return
        fault = NatsFault(DENIED, text.removeprefix("nats: ").strip("'"))
        for due in tuple(self._due.values()):
            if not due.answer.done():
                due.answer.set_exception(fault)

    def _note_closed(self) -> None:
        error = self._client.last_error if self._client is not None else None
        self.end(NatsFault(LOST, str(error or "") or "the connection was closed"))


class Link:
    """The connection of one engine: made when it is needed, and made again."""

    def __init__(
        self,
        hosts: Sequence[Host],
        connector: Connector,
        loop: asyncio.AbstractEventLoop,
        check: Callable[[Connection], None],
        lost: Callable[[], None],
    ) -> None:
        """Make a link.

        Args:
            check: raises what makes a server useless.
            lost: called when the connection has broken.
        """
        self._hosts = list(hosts)
        self._connector = connector
        self._loop = loop
        self._check = check
        self._lost = lost
        # Where the next connection goes.
        self._next = secrets.randbelow(len(hosts))
        self._lock = asyncio.Lock()
        self._connection: Connection | None = None
        # Connections that have ended, and are being closed.
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def present(self) -> Connection | None:
        """The connection that is open; None without one."""
        return self._connection

    async def connection(self) -> Connection:
        """Return an open connection; raises NatsFault."""
        if self._connection is not None:
            return self._connection
        async with self._lock:
            if self._connection is None:
                self._connection = await self._open()
            return self._connection

    def tick(self) -> None:
        """Break a connection that has been silent for too long; called each TICK_S."""
        if self._connection is not None:
            self._connection.tick()

    async def close(self) -> None:
        """End it for good."""
        self._is_closed = True
        if self._connection is not None:
            self._connection.end(NatsFault(LOST, "the journal is closed"))
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _open(self) -> Connection:
        """Connect to the first server that can be used, from the next one on."""
        fault = NatsFault(LOST, "not connected")
        for _ in range(len(self._hosts)):
            if self._is_closed:
                raise NatsFault(LOST, "the journal is closed")
            host = self._hosts[self._next % len(self._hosts)]
            self._next += 1
            connection = Connection(self._loop, self._over)
            try:
                await connection.open(self._connector, host)
                self._check(connection)
            except NatsFault as error:
                connection.end(error)
                fault = error
                continue
            except BaseException:
                connection.end(NatsFault(LOST, "not connected"))
                raise
            if connection.fault is not None:
                fault = connection.fault
                continue
            self._note_others(connection)
            return connection
        raise NatsFault(fault.code, fault.text)

    def _note_others(self, connection: Connection) -> None:
        """Know the other servers of a cluster, where the URL names only some.

        Over TLS they are not used: the addresses that they tell are in no certificate.
        """
        if connection.server.get("tls_required"):
            return
        for text in connection.other_hosts:
            name, _, port = text.rpartition(":")
            host = name.strip("[]"), int(port) if port.isdigit() else 0
            if host[1] and host not in self._hosts and len(self._hosts) < _MAX_HOSTS:
                self._hosts.append(host)

    def _over(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
            self._lost()
        task = self._loop.create_task(connection.closed())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


# Servers that are known.
_MAX_HOSTS: Final = 64


class _Answer(msgspec.Struct, frozen=True):
    error: ApiError | None = None


_answer_decoder: Final = msgspec.json.Decoder(_Answer)


def raise_error_in(answer: bytes) -> None:
    """Raise NatsFault if ``answer`` says that JetStream refuses."""
    try:
        error = _answer_decoder.decode(answer).error
    except msgspec.MsgspecError as failure:
        raise NatsFault("10000", "an answer that can't be read") from failure
    if error is not None:
        raise fault_in(error)


def fault_in(error: ApiError) -> NatsFault:
    """Return JetStream's refusal."""
    return NatsFault(str(error.err_code or error.code), error.description)
