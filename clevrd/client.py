"""A client for clevrd: publishes, and subscribes across lost connections. No printing here.

Wire and close codes: docs/wire.md. Backoff: exponential with full jitter, as in AWS Architecture
Blog, "Exponential Backoff And Jitter" (2015).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, closing, suppress
from typing import Any, Final, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec

from clevrd import __version__
from clevrd.config import MIB

log = logging.getLogger(__name__)

BACKOFF_BASE_S: Final = 0.25
BACKOFF_CAP_S: Final = 30.0
# A connection that lived this long was a good one: the next backoff starts small again. One that
# is cut right after its catch-up does not reset it, or a broken server would be asked 8 times/s.
STEADY_S: Final = 10.0
# A Retry-After beyond this is taken for a mistake; a script is not parked for a day.
RETRY_AFTER_CAP_S: Final = 300.0
# How long one message is offered again before publish() gives up; a planned restart takes 30 s.
RETRY_FOR_S: Final = 60.0
CONNECT_TIMEOUT_S: Final = 10.0
# For the whole answer to one publish; the server itself gives a request 10 s to arrive.
ANSWER_TIMEOUT_S: Final = 30.0
# Below the 60 s at which common proxies cut a silent connection.
HEARTBEAT_S: Final = 25.0
CLOSE_TIMEOUT_S: Final = 5.0
# The largest body that a server can be configured to take, and the message's other fields.
MAX_MESSAGE_BYTES: Final = 64 * MIB + 4096
# An answer is some hundred bytes; a proxy's error page is not read to its end.
MAX_ANSWER_BYTES: Final = 65_536
# Asks for positions and gaps between the messages; no message begins as they do.
CONTROL_PROTOCOL: Final = "clevrd.v1"
_CONTROL_BEGINS: Final = b'{"type":'
# A wait beyond this that a server asks for is taken for a mistake.
RECONNECT_AFTER_CAP_S: Final = 60.0
# Asked for after a lost connection where there are no positions: the server's default for what it
# keeps of a topic.
RESUME_LAST: Final = 10_000

# Statuses that time heals and that a proxy may send without a body of ours.
_TRANSIENT_STATUSES: Final = frozenset({429, 502, 503, 504})
# Of these, the gateway's: the server behind it may have taken the message before it fell silent.
_GATEWAY_STATUSES: Final = frozenset({502, 504})
_NO_RETURN_CODES: Final = range(4000, 4100)
_AT_ONCE_CODES: Final = range(4200, 4300)
_TOO_BIG: Final = 1009


class PublishAnswer(msgspec.Struct, frozen=True):
    """What the server says of a message that it took."""

    message_id: str
    offset: int = 0
    epoch: str = ""
    subscribers: int = 0


class ClientError(Exception):
    """Base of what goes wrong here; the message is one sentence, the server's where it said one."""

    # What the server asked to wait; 0 when it did not say.
    retry_after_s: float = 0.0


class BadUrl(ClientError):
    """The URL does not name a server."""


class BadRecord(ClientError):
    """The data is not one JSON value in UTF-8; nothing was sent."""


class BadAnswer(ClientError):
    """What came back is not what a clevrd server sends; probably the URL is another service's."""


class Unreachable(ClientError):
    """No connection, or it broke before the whole answer came."""

    def __init__(self, sentence: str, *, may_have_arrived: bool) -> None:
        super().__init__(sentence)
        self.may_have_arrived = may_have_arrived


class Refused(ClientError):
    """The server answered with an error status."""

    def __init__(
        self, sentence: str, *, status: int, is_transient: bool, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.is_transient = is_transient
        self.retry_after_s = retry_after_s

    @property
    def may_have_arrived(self) -> bool:
        """Say whether the message could be there all the same."""
        return self.status in _GATEWAY_STATUSES


class Closed(ClientError):
    """A subscription ended: the server closed it, or (code 1006) the connection was lost."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"The subscription was closed with {code}{reason and f' ({reason})'}.")
        self.code = code


class _Refusal(msgspec.Struct, frozen=True):
    """The body of an error answer."""

    error: str
    retryable: bool = False


class _Head(msgspec.Struct, frozen=True):
    """What of a message is looked at here; an offset of 0 is none."""

    id: str
    offset: int = 0


class _Subscribed(msgspec.Struct, frozen=True, tag_field="type", tag="subscribed"):
    """The position that a subscription begins at."""

    epoch: str
    offset: int


class Gap(
    msgspec.Struct, frozen=True, tag_field="type", tag="gap", rename={"first": "from", "last": "to"}
):
    """Messages that a subscription is missing for good, as the server tells it.

    ``first``, ``last`` and ``count`` are None where nobody can know them: the topic began a new
    life (reason ``epoch``).
    """

    topic: str
    first: int | None = None
    last: int | None = None
    count: int | None = None
    reason: str = ""


class _GoingAway(msgspec.Struct, frozen=True, tag_field="type", tag="going_away"):
    """The server closes next, and says when to come back."""

    reconnect_after_ms: int = 0


_decode_answer = msgspec.json.Decoder(PublishAnswer).decode
_decode_refusal = msgspec.json.Decoder(_Refusal).decode
_decode_head = msgspec.json.Decoder(_Head).decode
_decode_control = msgspec.json.Decoder(_Subscribed | Gap | _GoingAway).decode
_decode_raw = msgspec.json.Decoder(msgspec.Raw).decode
# What a decoder raises: not JSON or not this shape; bad UTF-8 in a key; nested too deeply.
_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


# --- pure decisions ------------------------------------------------------------------------------


def backoff_s(attempt: int, chance: float) -> float:
    """Return how long to wait before attempt number ``attempt`` (from 0) is repeated.

    Args:
        chance: uniform in [0, 1). All of the delay is random, so that readers that were cut
            together don't come back together.
    """
    return chance * min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(attempt, 16))


def publish_body(topic: str, data_json: bytes) -> bytes:
    """Return the request body, ``data_json`` in it byte for byte.

    Raises:
        BadRecord: not one JSON value in UTF-8. Checked here, since half a value put between
            other bytes could become another request.
    """
    try:
        data_json.decode()
        _decode_raw(data_json)
    except UnicodeDecodeError as error:
        raise BadRecord(f"Not UTF-8 at byte {error.start}.") from error
    except RecursionError as error:
        raise BadRecord("Nested too deeply.") from error
    except msgspec.MsgspecError as error:
        raise BadRecord(f"Not JSON: {error}.") from error
    return b'{"topic":' + msgspec.json.encode(topic) + b',"data":' + data_json + b"}"


def comes_back(error: ClientError) -> bool:
    """Say whether a subscriber tries again after ``error``."""
    match error:
        case Unreachable():
            return True
        case Refused():
            return error.status == 429 or error.status >= 500
        case Closed():
            # Too big a message would be as big the next time.
            return error.code not in _NO_RETURN_CODES and error.code != _TOO_BIG
    return False


class Step(msgspec.Struct, frozen=True):
    """What a received message means for a subscriber."""

    is_new: bool
    # Offsets that were never seen and no longer come; empty when there is no hole.
    missed: range = range(0)
    # The topic counts from the start again, so what it lost in between can't be known.
    is_restart: bool = False


class Position:
    """The last message that was seen of a topic; tells what is new and what is missing.

    With an ``epoch`` it is the server's: what is missing is told, and nothing comes twice.
    """

    __slots__ = ("epoch", "last_id", "last_offset")

    def __init__(self) -> None:
        self.last_id = ""
        self.last_offset = 0
        # Empty as long as no server has told it.
        self.epoch = ""

    def begin(self, epoch: str, offset: int) -> None:
        """Take the position at which the server begins."""
        self.epoch, self.last_offset = epoch, offset

    def move(self, message_id: str, offset: int) -> bool:
        """Take in a message of a connection with positions; return whether it is new."""
        if offset <= self.last_offset:
            return False
        self.last_id, self.last_offset = message_id, offset
        return True

    def step(self, message_id: str, offset: int) -> Step:
        """Take in a message and say what it is.

        Ids rise strictly and have a fixed width, so their order is that of their text.
        """
        if message_id <= self.last_id:
            return Step(is_new=False)
        expected = self.last_offset + 1
        self.last_id, self.last_offset = message_id, offset
        if expected == 1 or offset == 0:
            return Step(is_new=True)
        return Step(is_new=True, missed=range(expected, offset), is_restart=offset < expected)


def _parse_url(text: str) -> tuple[str, str | None]:
    """Return the URL that paths are put behind, and the socket's path for ``unix:/path``."""
    path = text.removeprefix("unix:")
    if path != text:
        if not path.startswith("/"):
            raise BadUrl("The path of a Unix socket is absolute: unix:/run/clevrd.sock.")
        return "http://localhost", path
    if not _is_web_url(text):
        raise BadUrl("The URL must be like http://127.0.0.1:8080, https://host or unix:/path.")
    return text.rstrip("/"), None


def _is_web_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        has_port = parts.port != 0  # reading it raises when it is not a number, or too large
    except ValueError:
        return False
    is_plain = text.isprintable() and " " not in text and not (parts.query or parts.fragment)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and has_port and is_plain


def _without_password(url: str) -> str:
    """Return ``url`` as it may be shown."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


# --- the client ----------------------------------------------------------------------------------


class Client:
    """Publishes to one server and subscribes to it; use as ``async with Client(url) as client``.

    Args:
        url: ``http://host:port``, ``https://host`` or ``unix:/path``.
        tenant: who publishes or subscribes; None leaves it to the server.
        retry_for_s: how long `publish` offers a message again.
        random, sleep, clock: replaced by tests.

    Raises:
        BadUrl: ``url`` is none of these, or the tenant can't stand in a header.
    """

    def __init__(
        self,
        url: str,
        tenant: str | None = None,
        *,
        retry_for_s: float = RETRY_FOR_S,
        random: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base, self._unix_path = _parse_url(url)
        # For error texts: without the password that a URL may hold.
        self._name = url if self._unix_path else _without_password(self._base)
        if tenant is not None and not (tenant and tenant.isascii() and tenant.isprintable()):
            raise BadUrl("The tenant must be printable ASCII.")
        self._tenant = tenant
        self._retry_for_s = retry_for_s
        self._random = random
        self._sleep = sleep
        self._clock = clock
        # Set in __aenter__, which needs the running loop.
        self._session: aiohttp.ClientSession | None = None
        # True once the server has answered anything: then a failed connection is an outage, not
        # a wrong URL, and worth waiting for.
        self._was_reached = False
        # How often a message was sent again although an earlier copy may have arrived.
        self.repeated_messages = 0

    async def __aenter__(self) -> Self:
        headers = {"User-Agent": f"clevrd/{__version__}"}
        if self._tenant is not None:
            headers["X-Tenant-ID"] = self._tenant
        self._session = aiohttp.ClientSession(
            connector=(
                aiohttp.UnixConnector(self._unix_path)
                if self._unix_path
                else aiohttp.TCPConnector()
            ),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            middlewares=(self._raise_refusals,),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def publish(self, topic: str, data_json: bytes) -> PublishAnswer:
        """Publish one JSON value, its bytes as they are, and return the server's answer.

        What time heals (429, 503, a gateway's 502 and 504, and a lost connection once the server
        has been reached) is tried again for ``retry_for_s``, waiting at least what the server
        asks. Delivery is at least once: when a connection, or a gateway's, breaks before the
        whole answer came, nobody can know whether the message was taken; it is sent again, so it
        may be there twice, and `repeated_messages` counts it.

        Raises:
            BadRecord: ``data_json`` is not one JSON value in UTF-8.
            Refused: the server does not take it.
            Unreachable: no answer; ``may_have_arrived`` says whether it could be there.
            BadAnswer: the answer is not a clevrd server's.
        """
        body = publish_body(topic, data_json)
        deadline = self._clock() + self._retry_for_s
        attempt = 0
        while True:
            try:
                return await self._post(body)
            except (Refused, Unreachable) as error:
                delay_s = self._delay_s(attempt, error)
                if not self._is_worth_repeating(error) or self._clock() + delay_s > deadline:
                    raise
                self._note_repeat(error, delay_s)
                await self._sleep(delay_s)
            attempt += 1

    async def subscribe(
        self,
        topic: str,
        *,
        policy: str | None = None,
        buffer: int | None = None,
        last: int | None = None,
        reconnect: bool = True,
        on_gap: Callable[[Gap], None] | None = None,
    ) -> AsyncGenerator[bytes]:
        """Yield each message's JSON as received, oldest first, across lost connections.

        After a lost connection it goes on behind the position it had, so each message comes once,
        and what is missing for good is told as a gap, before the message that follows it. From a
        server without positions the topic's recent messages are asked for, those already seen
        are left out, and a hole that remains is logged as a warning. Nothing is
        buffered beyond one connection's read buffer: whoever consumes slowly is a slow reader to
        the server, and one that stops for longer than the server's ping timeout is cut and
        resumes.

        Args:
            policy: ``drop_oldest``, ``drop_newest``, ``circuit_breaker`` or ``latest``; None: the
                server's.
            buffer: messages that this reader may lag behind; None: the server's.
            last: recent messages wanted first; None: the server's.
            reconnect: False raises `Closed` or `Unreachable` at the first lost connection.
            on_gap: called with each `Gap`; None logs it as a warning.

        Raises:
            Refused, Closed: the server said not to come back, in its words.
            Unreachable: the very first connection failed.
            BadAnswer: what came is not a message.
        """
        query = _query(topic, policy=policy, buffer=buffer, last=last)
        position = Position()
        tell = on_gap or _warn_of
        attempt = 0
        while True:
            started = self._clock()
            try:
                async with aclosing(self._receive(query, position, tell)) as frames:
                    async for text in frames:
                        yield text
            except (Refused, Unreachable, Closed) as error:
                if not reconnect or not self._is_outage(error):
                    raise
                # Only what was open can have been steady: a connect may time out for as long.
                if isinstance(error, Closed) and self._clock() - started >= STEADY_S:
                    attempt = 0
                delay_s = self._delay_s(attempt, error)
                log.info("subscription lost topic=%s delay_s=%.2f why=%s", topic, delay_s, error)
                await self._sleep(delay_s)
            attempt += 1
            if position.epoch:
                query.pop("last", None)
                query |= {"offset": str(position.last_offset), "epoch": position.epoch}
            # Who wanted no past and has seen nothing has no place to resume from.
            elif last != 0 or position.last_id:
                query["last"] = str(max(RESUME_LAST, last or 0))

    # --- one attempt ---

    async def _post(self, body: bytes) -> PublishAnswer:
        try:
            async with self._open_session().post(
                f"{self._base}/publish",
                data=body,
                headers={"Content-Type": "application/json"},
                # A redirected POST would become a GET (RFC 9110 §15.4.3).
                allow_redirects=False,
            ) as response:
                content = await _read_bounded(response)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(error) from error
        self._was_reached = True
        try:
            return _decode_answer(content)
        except _UNREADABLE as error:
            raise BadAnswer(
                f"{self._name} answered {response.status}, but not as clevrd does."
            ) from error

    async def _receive(
        self, query: dict[str, str], position: Position, tell: Callable[[Gap], None]
    ) -> AsyncGenerator[bytes]:
        """Yield one connection's new messages; always ends by raising, `Closed` at the least."""
        try:
            socket = await self._open_session().ws_connect(
                f"{self._base}/subscribe",
                params=query,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S),
                heartbeat=HEARTBEAT_S,
                max_msg_size=MAX_MESSAGE_BYTES,
                protocols=(CONTROL_PROTOCOL,),
                decode_text=False,
            )
        except aiohttp.WSServerHandshakeError as error:
            raise BadAnswer(f"{self._name} does not speak WebSocket ({error.message}).") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(error) from error
        self._was_reached = True
        has_control = socket.protocol == CONTROL_PROTOCOL
        if not has_control:
            position.epoch = ""
        reconnect_after_s = 0.0
        async with socket:
            while True:
                frame = await socket.receive()
                if frame.type is not aiohttp.WSMsgType.TEXT:
                    end = _closed(frame.type, frame.data, frame.extra, socket.close_code)
                    end.retry_after_s = reconnect_after_s
                    raise end
                if has_control and frame.data.startswith(_CONTROL_BEGINS):
                    reconnect_after_s = self._follow(frame.data, position, tell)
                elif self._is_new(query["topic"], position, frame.data):
                    yield frame.data

    async def _raise_refusals(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Turn an error answer into `Refused`, with the server's words.

        Middleware, because ws_connect() drops the body of the answer that refuses it.
        """
        response = await handler(request)
        if response.status < 400:
            return response
        self._was_reached = True
        content = b""
        # The status alone says that the message was not taken, so a cut body changes nothing.
        with closing(response), suppress(aiohttp.ClientError, TimeoutError):
            content = await _read_bounded(response)
        raise _refused(response, content)

    # --- after an attempt ---

    def _is_worth_repeating(self, error: Refused | Unreachable) -> bool:
        return error.is_transient if isinstance(error, Refused) else self._was_reached

    def _is_outage(self, error: Refused | Unreachable | Closed) -> bool:
        return self._was_reached and comes_back(error)

    def _delay_s(self, attempt: int, error: ClientError) -> float:
        if isinstance(error, Closed) and error.code in _AT_ONCE_CODES and attempt == 0:
            return 0.0
        return error.retry_after_s + backoff_s(attempt, self._random())

    def _note_repeat(self, error: Refused | Unreachable, delay_s: float) -> None:
        self.repeated_messages += error.may_have_arrived
        if isinstance(error, Refused):
            log.info("publish refused status=%d delay_s=%.2f", error.status, delay_s)
            return
        log.warning("publish interrupted delay_s=%.2f why=%s", delay_s, error)

    def _follow(self, text: bytes, position: Position, tell: Callable[[Gap], None]) -> float:
        """Do what a control frame says; return the seconds to stay away after the close."""
        try:
            control = _decode_control(text)
        except _UNREADABLE as error:
            raise BadAnswer(f"{self._name} sent what is not a message ({error}).") from error
        match control:
            case _Subscribed():
                position.begin(control.epoch, control.offset)
            case Gap():
                if control.last is not None:
                    position.last_offset = control.last
                tell(control)
            case _GoingAway():
                return min(control.reconnect_after_ms / 1000, RECONNECT_AFTER_CAP_S)
        return 0.0

    def _is_new(self, topic: str, position: Position, text: bytes) -> bool:
        try:
            head = _decode_head(text)
        except _UNREADABLE as error:
            raise BadAnswer(f"{self._name} sent what is not a message ({error}).") from error
        if position.epoch:
            return position.move(head.id, head.offset)
        step = position.step(head.id, head.offset)
        if step.missed:
            first, count = step.missed[0], len(step.missed)
            log.warning("messages missed topic=%s from=%d count=%d", topic, first, count)
        if step.is_restart:
            log.warning("topic restarted, some messages may be missing topic=%s", topic)
        return step.is_new

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("Client is used outside its 'async with' block.")
        return self._session

    def _unreachable(self, error: Exception) -> Unreachable:
        if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
            sentence = f"Can't reach {self._name}: {_reason(error)}."
            return Unreachable(sentence, may_have_arrived=False)
        return Unreachable(
            f"The connection to {self._name} broke before the answer: {_reason(error)}.",
            may_have_arrived=True,
        )


def _warn_of(gap: Gap) -> None:
    if gap.reason == "epoch":
        log.warning("topic restarted, some messages may be missing topic=%s", gap.topic)
        return
    log.warning(
        "messages missed topic=%s from=%s to=%s count=%s reason=%s",
        *(gap.topic, gap.first, gap.last, gap.count, gap.reason),
    )


def _query(topic: str, **options: str | int | None) -> dict[str, str]:
    given = {name: str(value) for name, value in options.items() if value is not None}
    return {"topic": topic, **given}


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    """Return at most MAX_ANSWER_BYTES of the body."""
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            break
    return bytes(content[:MAX_ANSWER_BYTES])


def _refused(response: aiohttp.ClientResponse, content: bytes) -> Refused:
    try:
        refusal = _decode_refusal(content)
    except _UNREADABLE:
        refusal = _Refusal(f"The server answered {response.status} {response.reason}.")
    return Refused(
        refusal.error,
        status=response.status,
        is_transient=refusal.retryable or response.status in _TRANSIENT_STATUSES,
        retry_after_s=_retry_after_s(response.headers.get("Retry-After", "")),
    )


def _retry_after_s(header: str) -> float:
    """Return RFC 9110 §10.2.3 delay-seconds; a date is ignored, since clocks may differ."""
    if not (header.isascii() and header.isdigit() and len(header) < 10):
        return 0.0
    return min(float(header), RETRY_AFTER_CAP_S)


def _closed(kind: aiohttp.WSMsgType, data: Any, extra: Any, code: int | None) -> ClientError:
    """Return what a frame that is no message means for the subscription: its end."""
    if kind is aiohttp.WSMsgType.CLOSE:
        return Closed(data or 1005, extra or "")
    if kind is aiohttp.WSMsgType.ERROR:
        return Closed(code or 1006, str(data))
    if kind is aiohttp.WSMsgType.BINARY:
        return BadAnswer("The server sent a binary frame, where clevrd sends text.")
    return Closed(1006, "connection lost")


def _reason(error: Exception) -> str:
    """Return why in few words; aiohttp's own texts repeat addresses and SSL modes."""
    code = getattr(error, "errno", None)
    if isinstance(code, int) and code > 0:
        return os.strerror(code).lower()
    if isinstance(error, TimeoutError):
        return "timed out"
    cause = getattr(error, "os_error", None)
    return str(getattr(cause, "strerror", None) or error).rstrip(".") or type(error).__name__
