"""Session: requests and WebSockets to one server, with failures as the client's errors.

Only this module uses aiohttp's client. No request is repeated here, except after a redirect.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from io import BytesIO
from typing import Any, Final, TypeVar
from urllib.parse import urlencode, urlsplit

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy

from clevrd import __version__
from clevrd.client.address import parse_url, without_password
from clevrd.client.arguments import check_headers, check_tenant, check_tls
from clevrd.client.backoff import retry_after_s
from clevrd.client.credential import AGAIN_S, Credential, Token
from clevrd.client.errors import (
    BadAnswer,
    BadUrl,
    ClientError,
    Closed,
    Misuse,
    NoToken,
    Refused,
    Unauthorized,
    Unreachable,
    reason_of,
)
from clevrd.client.redirects import MAX_REDIRECTS, NotFollowed, base_after, target_of
from clevrd.client.values import UNREADABLE
from clevrd.client.wire import RENEWAL_REF, Refusal, command, read_refusal

CONNECT_TIMEOUT_S: Final = 10.0
# Seconds for the whole answer to one request; the server itself allows a request 10 s to arrive.
ANSWER_TIMEOUT_S: Final = 30.0
# Seconds between pings: common proxies cut a connection that is silent for 60 s.
HEARTBEAT_S: Final = 25.0
CLOSE_TIMEOUT_S: Final = 5.0
# The largest body that a server can be configured to take, and the message's other fields.
MAX_MESSAGE_BYTES: Final = (64 << 20) + 4096
# Bytes read of an answer: an answer has some hundred, and a proxy's error page is not read to its
# end.
MAX_ANSWER_BYTES: Final = 65_536
# The largest body that is given to aiohttp as bytes (aiohttp's TOO_LARGE_BYTES_BODY).
_PIECE_BYTES: Final = 1 << 20

# Statuses of failures that may pass, and that a proxy may send without a body of clevrd's.
_TRANSIENT_STATUSES: Final = frozenset({429, 502, 503, 504})

# Statuses by which a server or a proxy asks for credentials, or refuses them.
_CREDENTIAL_STATUSES: Final = frozenset({401, 403, 407})
_UNAUTHORIZED: Final = 401
# Headers that present a credential, in lower case; a request presents one.
_CREDENTIAL_HEADERS: Final = frozenset({"authorization", "x-api-key"})

# Different warnings that are logged at most.
_MAX_WARNED: Final = 100

# RFC 6455 §7.4.1: the code for a message over MAX_MESSAGE_BYTES.
_TOO_BIG: Final = 1009

# The reason of a connection that ended without a close frame.
_LOST: Final = "connection lost"

_OTHER_LOOP: Final = (
    "Client is open in another event loop; make a client in each loop, or close() it in that one."
)

log = logging.getLogger("clevrd.client")

Socket = aiohttp.ClientWebSocketResponse[Any]
TEXT: Final = aiohttp.WSMsgType.TEXT

T = TypeVar("T")


class _Redirected(Exception):
    """The server answered with a redirect."""

    def __init__(self, status: int, location: str) -> None:
        super().__init__(status, location)
        self.status = status
        self.location = location


class _Cut(Exception):
    """The connection broke before the answer to a request that is not to be repeated."""

    def __init__(self, error: aiohttp.ClientError) -> None:
        super().__init__(error)
        self.error = error


class Session:
    """The connections to one server.

    Raises:
        BadUrl: ``url`` names no server, or the tenant can't stand in a header.
        ValueError: the URL or a header presents a credential beside ``token``.
    """

    def __init__(
        self,
        url: str,
        tenant: str | None,
        headers: Mapping[str, str] | None,
        tls: ssl.SSLContext | None,
        token: Token | None = None,
    ) -> None:
        self._base, self._unix_path = parse_url(url)
        # The URL for error texts, without the password that it may hold.
        self.name = url if self._unix_path else without_password(self._base)
        self._headers = {"User-Agent": f"clevrd/{__version__}", **check_headers(headers)}
        if check_tenant(tenant) is not None:
            self._headers["X-Tenant-ID"] = tenant or ""
        # The credential that each request presents; None without a token.
        self._credential = None if token is None else Credential(token)
        if token is not None:
            _check_alone(self._base, self._headers)
        self._tls = check_tls(tls)
        # open() makes both, since a session needs the running loop.
        self._http: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # True once the server has answered at all. From then on a failed connection is an outage
        # and worth waiting for, not a wrong URL.
        self.was_reached = False
        # Warnings of the server that were logged; at most _MAX_WARNED.
        self._warned: set[str] = set()
        # True from close() to the next open(): no connection is opened, and subscriptions end.
        self.is_closed = False
        # Open WebSockets; each is closed by its opener, or else by close().
        self._sockets: set[Socket] = set()
        self._closing: set[asyncio.Task[None]] = set()
        # The task that sends a WebSocket's first frames; it ends with the socket.
        self._sending: dict[Socket, asyncio.Task[None]] = {}
        # The task that presents fresh tokens on a WebSocket; it ends with the socket.
        self._renewing: dict[Socket, asyncio.Task[None]] = {}
        # The secret that an open WebSocket has presented last; changed by websocket, _renew, drop.
        self._presented: dict[Socket, str] = {}

    def warn(self, warnings: Iterable[str]) -> None:
        """Log the server's warnings, each sentence once."""
        for sentence in warnings:
            if sentence not in self._warned and len(self._warned) < _MAX_WARNED:
                self._warned.add(sentence)
                log.warning("%s", sentence)

    def open(self) -> None:
        """Prepare for requests, without connecting; a second call does nothing.

        Raises:
            Misuse: the session is open in another event loop.
        """
        loop = asyncio.get_running_loop()
        if self._http is not None and not (self.is_closed or self._is_loop_gone()):
            if self._loop is not loop:
                raise Misuse(_OTHER_LOOP)
            return
        self.is_closed = False
        self._loop = loop
        if self._credential is not None:
            self._credential.open()
        self._http = aiohttp.ClientSession(
            connector=self._connector(),
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            middlewares=(self._raise_what_is_no_success,),
        )

    async def close(self) -> None:
        """Close all connections, also those of subscriptions that are still open."""
        self.is_closed = True
        for socket in self._sockets:
            self.abandon(socket)
        if self._closing:
            await asyncio.wait(self._closing)
        if self._http is not None:
            await self._http.close()

    async def post(self, path: str, body: bytes, max_answer_bytes: int = MAX_ANSWER_BYTES) -> bytes:
        """Send one request with a body; returns and raises as `request`."""
        return await self.request("POST", path, {}, max_answer_bytes, body)

    async def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        body: bytes | None = None,
    ) -> bytes:
        """Send one request, and return the body of an answer with status 200.

        Args:
            path: percent-encoded, as it is sent.

        Raises:
            Refused: the server answered with an error status.
            Unreachable: no answer, or only a part of it.
        """

        async def ask(url: str, secret: str | None) -> bytes:
            # aiohttp warns of larger bodies given as bytes; each attempt reads the body from its
            # beginning.
            is_large = body is not None and len(body) > _PIECE_BYTES
            data = BytesIO(body) if body is not None and is_large else body
            headers = {} if body is None else {"Content-Type": "application/json"}
            async with self._opened().request(
                method, url, data=data, headers={**headers, **_bearer(secret)}
            ) as response:
                content = await _read_bounded(response, max_answer_bytes)
            self.was_reached = True
            if response.status != 200:
                raise self.not_clevrd(response.status)
            return content

        return await self._ask(path, _query_text(query), ask)

    async def websocket(
        self, path: str, query: dict[str, str], protocols: tuple[str, ...]
    ) -> Socket:
        """Open a WebSocket.

        Raises:
            Refused: the server answered with an error status.
            Unreachable: there is no connection.
            BadAnswer: the server does not speak WebSocket.
        """

        async def connect(url: str, secret: str | None) -> Socket:
            socket = await self._opened().ws_connect(
                url,
                headers=_bearer(secret),
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S),
                heartbeat=HEARTBEAT_S,
                max_msg_size=MAX_MESSAGE_BYTES,
                protocols=protocols,
                decode_text=False,
            )
            if secret is not None:
                self._presented[socket] = secret
            return socket

        socket = await self._ask(path, _query_text(query), connect)
        self.was_reached = True
        self._sockets.add(socket)
        return socket

    async def receive(self, socket: Socket, timeout_s: float | None = None) -> bytes:
        """Return the next text frame of a WebSocket; without a timeout, wait for ever.

        Raises:
            Closed, BadAnswer: the connection has ended, or is no clevrd server's.
            TimeoutError: no frame came within ``timeout_s``.
        """
        while True:
            try:
                frame = await socket.receive(timeout_s)
            except TimeoutError:
                raise
            except (aiohttp.ClientError, OSError):
                # aiohttp answers a ping within this call, which fails if the server has closed the
                # connection since. Frames behind the ping are still there to be read, the close
                # frame with its code among them.
                continue
            if frame.type is not TEXT:
                raise self._end_of(frame, socket.close_code)
            content: bytes = frame.data
            return content

    async def send(self, socket: Socket, text: bytes) -> None:
        """Send one text frame; raises Closed where the connection is lost."""
        try:
            await socket.send_frame(text, TEXT)
        except (aiohttp.ClientError, OSError) as error:
            raise Closed(1006, _LOST) from error

    def send_aside(self, socket: Socket, texts: Sequence[bytes]) -> None:
        """Send text frames over a new WebSocket in a task, while the caller reads from it.

        A client that only sends could wait for ever: a server whose frames are not read stops
        reading.
        """
        task = asyncio.create_task(_send_all(socket, texts), name="clevrd-commands")
        self._sending[socket] = task
        task.add_done_callback(lambda _: self._sending.pop(socket, None))

    def renew_aside(self, socket: Socket) -> None:
        """Present fresh tokens on a WebSocket that takes commands, each before the last ends."""
        credential = self._credential
        if credential is None or not credential.can_renew:
            return
        task = asyncio.create_task(self._renew(socket, credential), name="clevrd-renewal")
        self._renewing[socket] = task
        task.add_done_callback(lambda _: self._renewing.pop(socket, None))

    def drop_secret(self, socket: Socket) -> None:
        """Present the secret of a WebSocket no more, since its time is over."""
        if self._credential is not None:
            self._credential.refuse(self._presented.get(socket))

    async def drop(self, socket: Socket) -> None:
        """Close a WebSocket."""
        self._presented.pop(socket, None)
        for tasks in (self._sending, self._renewing):
            if socket in tasks:
                tasks[socket].cancel()
        try:
            await socket.close()
        finally:
            self._sockets.discard(socket)

    def abandon(self, socket: Socket) -> None:
        """Close a WebSocket in a task that no one awaits, if the loop still runs."""
        if self._loop is None or self._is_loop_gone():
            return
        if _running_loop() is self._loop:
            self._close_aside(socket)
            return
        # This may be another thread, since Python frees objects in any thread.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._close_aside, socket)

    def not_clevrd(self, what: object) -> BadAnswer:
        """Return the error for an answer that a clevrd server never gives."""
        return BadAnswer(f"{self.name} answered {what}, but not as clevrd does; check the URL.")

    def _end_of(self, frame: Any, close_code: int | None) -> ClientError:
        """Return the error for a frame that is not text: the WebSocket ends."""
        if frame.type is aiohttp.WSMsgType.CLOSE:
            return Closed(frame.data or 1005, frame.extra or "")
        if frame.type is aiohttp.WSMsgType.ERROR:
            return Closed(close_code or 1006, _socket_reason(frame.data, close_code))
        if frame.type is aiohttp.WSMsgType.BINARY:
            return BadAnswer(
                f"{self.name} sent a binary frame, where clevrd sends text; check the URL."
            )
        return Closed(1006, _LOST)

    async def _renew(self, socket: Socket, credential: Credential) -> None:
        """Present fresh tokens on ``socket``, until it is dropped or nothing is to be renewed."""
        least_s = 0.0
        while (secret := self._presented.get(socket)) is not None:
            wait_s = credential.renew_in_s(secret, random.random())  # noqa: S311  # no secret
            if wait_s is None:
                return
            await asyncio.sleep(max(wait_s, least_s))
            least_s = AGAIN_S
            try:
                fresh = await credential.get(other_than=secret)
            except (NoToken, TypeError, ValueError) as error:
                # When the token ends, the next connection asks again, and tells the user.
                log.warning("token not renewed why=%s", error)
                continue
            if fresh == secret:
                continue
            least_s = 0.0
            self._presented[socket] = fresh
            with suppress(Closed):  # the task that reads from the socket learns of a lost one
                await self.send(socket, command("authenticate", token=fresh, ref=RENEWAL_REF))

    async def _ask(
        self, path: str, query: str, ask: Callable[[str, str | None], Awaitable[T]]
    ) -> T:
        """Return ``ask``'s result for the URL of ``path``, once more with a fresh token after 401.

        Raises:
            Refused, Unreachable, BadAnswer: as from `post` and `websocket`.
            NoToken, TypeError, ValueError: as from `Credential.get`.
        """
        # A client that is not open raises before its function is asked.
        self._opened()
        credential = self._credential
        secret = None if credential is None else await credential.get()
        try:
            return await self._ask_as(secret, path, query, ask)
        except Unauthorized:
            if credential is None or not credential.can_renew:
                raise
        credential.refuse(secret)
        return await self._ask_as(await credential.get(other_than=secret), path, query, ask)

    async def _ask_as(
        self,
        secret: str | None,
        path: str,
        query: str,
        ask: Callable[[str, str | None], Awaitable[T]],
    ) -> T:
        """Return ``ask``'s result for the URL of ``path``, or for a redirect's target."""
        url = f"{self._base}{path}{query}"
        for _ in range(MAX_REDIRECTS + 1):
            try:
                return await ask(url, secret)
            except _Redirected as moved:
                url = self._moved(path, url, moved)
            except aiohttp.WSServerHandshakeError as error:
                _drop_headers(error)
                raise BadAnswer(
                    f"{self.name} does not speak WebSocket; check the URL, and that a proxy passes"
                    " WebSockets on."
                ) from error
            except aiohttp.InvalidURL as error:
                raise BadUrl(f"{self.name} is no URL that can be asked.") from error
            except UnicodeError as error:
                # The codec "idna" raises this for a host name with an empty part, or one over 63
                # characters.
                raise BadUrl(f"{self.name} holds what can't be the name of a host.") from error
            except _Cut as cut:
                raise self._unreachable(cut.error) from cut.error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                _drop_headers(error)
                raise self._unreachable(error) from error
        raise BadAnswer(f"{self.name} redirects in circles; check the URL.")

    def _moved(self, path: str, url: str, moved: _Redirected) -> str:
        """Return the URL that ``url`` redirects to; raise BadAnswer for a redirect not followed."""
        try:
            target = target_of(url, moved.status, moved.location)
        except NotFollowed as error:
            raise BadAnswer(
                f"{self.name} {error}; give the daemon's own address as the URL."
            ) from None
        self._base = base_after(self._base, path, moved.status, target)
        return target

    def _close_aside(self, socket: Socket) -> None:
        task = asyncio.ensure_future(self.drop(socket))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _is_loop_gone(self) -> bool:
        return self._loop is None or self._loop.is_closed()

    def _connector(self) -> aiohttp.BaseConnector:
        if self._unix_path:
            return aiohttp.UnixConnector(self._unix_path)
        # There is no limit, since each subscription holds a connection, and the 101st would wait
        # for ever.
        return aiohttp.TCPConnector(limit=0, ssl=self._tls or True)

    def _opened(self) -> aiohttp.ClientSession:
        if self._http is None:
            raise Misuse("Client is not open; use it in 'async with', or await open() first.")
        if self.is_closed:
            raise Misuse("Client is closed; open() it again, or make another one.")
        if self._loop is not asyncio.get_running_loop():
            raise Misuse(_OTHER_LOOP)
        return self._http

    async def _raise_what_is_no_success(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Raise `Refused` for an error answer, and `_Redirected` for a redirect.

        This is a middleware because ws_connect() drops the body of an answer that refuses the
        handshake, and because aiohttp would follow a redirect to any host, and would send a DELETE
        without an answer again, although it may have been carried out.
        """
        try:
            response = await handler(request)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
            if request.method == "DELETE":
                raise _Cut(error) from error
            raise
        if response.status < 300:
            return response
        self.was_reached = True
        if response.status < 400:
            with closing(response):
                raise _Redirected(response.status, response.headers.get("Location", ""))
        content = b""
        # The status alone says that the message was not taken, so a cut body changes nothing.
        with closing(response), suppress(aiohttp.ClientError, TimeoutError):
            content = await _read_bounded(response, MAX_ANSWER_BYTES)
        raise self._refused(response, content)

    def _refused(self, response: aiohttp.ClientResponse, content: bytes) -> Refused:
        try:
            refusal = read_refusal(content)
        except UNREADABLE:
            answer = f"{response.status} {response.reason or ''}".rstrip()
            if response.status in _TRANSIENT_STATUSES:
                refusal = Refusal(f"{self.name} answered {answer}; try again later.")
            elif response.status in _CREDENTIAL_STATUSES:
                refusal = Refusal(f"{self.name} answered {answer}; check the credentials.")
            else:
                refusal = Refusal(str(self.not_clevrd(answer)))
        kind = Unauthorized if response.status == _UNAUTHORIZED else Refused
        return kind(
            refusal.error,
            status=response.status,
            code=refusal.code,
            is_transient=refusal.retryable or response.status in _TRANSIENT_STATUSES,
            retry_after_s=retry_after_s(response.headers.get("Retry-After", "")),
        )

    def _unreachable(self, error: Exception) -> Unreachable:
        if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
            sentence = f"Can't reach {self.name}: {reason_of(error)}."
            return Unreachable(sentence, may_have_arrived=False)
        return Unreachable(
            f"The connection to {self.name} broke before the answer: {_reason(error)}.",
            may_have_arrived=True,
        )


def _query_text(query: Mapping[str, str]) -> str:
    return f"?{urlencode(query)}" if query else ""


def _bearer(secret: str | None) -> dict[str, str]:
    return {} if secret is None else {"Authorization": f"Bearer {secret}"}


def _check_alone(url: str, headers: Iterable[str]) -> None:
    """Raise unless the token is the only credential that requests present."""
    if "@" in urlsplit(url).netloc:
        raise BadUrl("The URL has a user or a password beside token; leave one of them out.")
    for name in headers:
        if name.lower() in _CREDENTIAL_HEADERS:
            raise ValueError(f"The header {name} stands beside token; leave one of them out.")


def _drop_headers(error: Exception) -> None:
    """Drop the request's headers, which hold the credential, from an error of aiohttp's."""
    if isinstance(error, aiohttp.ClientResponseError):
        nothing = CIMultiDictProxy(CIMultiDict[str]())
        error.request_info = error.request_info._replace(headers=nothing)
        error.args = ()


def _socket_reason(error: object, close_code: int | None) -> str:
    """Return why a WebSocket ended; aiohttp's own texts are its parser's."""
    if isinstance(error, aiohttp.WebSocketError):
        return "message too big" if close_code == _TOO_BIG else "what came is not WebSocket"
    return "no answer to a ping" if isinstance(error, aiohttp.ServerTimeoutError) else _LOST


def _reason(error: Exception) -> str:
    """Return why there is no whole answer; aiohttp's own texts are its parser's."""
    if isinstance(error, aiohttp.ClientConnectionError) and _is_only_cut(error):
        return "the server, or a proxy, closed it; if it always does, check the URL"
    if isinstance(error, aiohttp.ClientResponseError):
        return "what came is not HTTP, so check the URL"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "it is not whole"
    return reason_of(error)


def _is_only_cut(error: aiohttp.ClientConnectionError) -> bool:
    """Whether the connection broke without an error of the system, of TLS or of a timer."""
    is_tls = isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError)
    return not (is_tls or isinstance(error, TimeoutError) or getattr(error, "errno", None))


async def _send_all(socket: Socket, texts: Sequence[bytes]) -> None:
    # The task that reads from the socket learns of a lost connection.
    with suppress(aiohttp.ClientError, OSError):
        for text in texts:
            await socket.send_frame(text, TEXT)


async def _read_bounded(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return at most ``max_bytes`` of the body."""
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > max_bytes:
            break
    return bytes(content[:max_bytes])


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
