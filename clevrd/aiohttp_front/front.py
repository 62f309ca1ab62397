"""AiohttpFront: makes Requests of aiohttp's requests, and its responses of our answers.

aiohttp handles every HTTP feature that is not worth a fast path: unusual but legal requests,
chunked bodies, keep-alive, error pages for bytes that are no HTTP. The endpoints decide what a
request means.
"""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import Final, cast

import msgspec
from aiohttp import HttpVersion, HttpVersion10, HttpVersion11, web

from clevrd.address_limit import AddressLimit
from clevrd.admission import Gate, Router
from clevrd.aiohttp_front.body import BodyReader
from clevrd.aiohttp_front.connection import FrontConnection, FrontServer, LastWord
from clevrd.aiohttp_front.upgrade import check_upgrade, take_over
from clevrd.config import Config
from clevrd.errors import ConnectionLimit, InvalidRequest, Unauthorized
from clevrd.http_values import (
    HOST,
    WHOLE_SERVER,
    Reply,
    Request,
    Response,
    Upgrade,
    WebSocketUpgrade,
)
from clevrd.input_budget import InputBudget
from clevrd.page_check import PageCheck
from clevrd.refusals import Refusals
from clevrd.scheduling.fair_turns import LARGE_BYTES, FairTurns

# The absolute form of a target (RFC 9112 §3.2.2): the scheme, the authority and the rest.
_ABSOLUTE: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)", re.ASCII | re.DOTALL)
# An authority without userinfo, since RFC 9110 §4.2.4 asks to refuse userinfo.
_AUTHORITY: Final = re.compile(
    r"(?:[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?", re.ASCII
)
_MAX_PORT: Final = 65_535

# Fields that may stand once only: twice they have no clear meaning, or are an attack (RFC 9110
# §5.3).
_SINGLE: Final = frozenset(
    {
        "authorization",
        "content-encoding",
        "content-length",
        "content-type",
        "host",
        "idempotency-key",
        "last-event-id",
        "origin",
        "sec-websocket-key",
        "sec-websocket-version",
        "transfer-encoding",
        "x-tenant-id",
    }
)


class AiohttpFront:
    """Answers aiohttp's requests through a Router; `server` makes and ends its connections."""

    def __init__(
        self,
        gate: Gate,
        pages: PageCheck,
        router: Router,
        refusals: Refusals,
        turns: FairTurns,
        budget: InputBudget,
        addresses: AddressLimit,
        config: Config,
    ) -> None:
        self._gate = gate
        self._pages = pages
        self._router = router
        self._refusals = refusals
        self._bodies = BodyReader(budget, config.request_timeout_s)
        self._turns = turns
        self._addresses = addresses
        self.server = FrontServer(self.handle, self.refusal, turns, budget, addresses, config)
        # Requests under way; changed by handle alone.
        self.in_flight = 0

    def refusal(self, error: Exception, request: Request | None) -> Response:
        """Return the answer to a request that raised ``error``; None for one that is not whole."""
        if isinstance(error, Unauthorized) and request is not None:
            error.address = self._addresses.proxies.client_of(request.headers, request.peer)
        answer = self._refusals.response(error, request)
        return answer if request is None else self._pages.marked(answer, request)

    async def handle(self, http_request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; a refusal is counted and returned, not raised."""
        connection = cast(FrontConnection, http_request.protocol)
        self.in_flight += 1
        connection.begin(http_request)
        try:
            return await self._handle(http_request, connection)
        finally:
            connection.end()
            self.in_flight -= 1

    async def _handle(
        self, http_request: web.BaseRequest, connection: FrontConnection
    ) -> web.StreamResponse:
        request: Request | None = None
        try:
            request = to_request(http_request)
            request.is_local_peer = connection.is_local
            request.peer = connection.peer
            request.local_address = connection.local_address
            request.certificate = connection.certificate
            self._pages.check(request, connection.transport)
            reply = await self._reply(request, http_request, connection)
        except ConnectionError:
            raise
        except Exception as error:
            answer = self.refusal(error, request)
            # If the request could not be read, its framing is in doubt; if it has a body, the rest
            # of the body is not worth waiting for. Both answers end the connection.
            if request is None or http_request.can_read_body:
                return LastWord(connection, answer)
            return to_response(answer)
        if isinstance(reply, Upgrade):
            if not isinstance(reply, WebSocketUpgrade):
                head = self._pages.marked_stream(reply.head, request)
                reply = msgspec.structs.replace(reply, head=head)
            return take_over(connection, reply, partial(self.refusal, request=request))
        return to_response(self._pages.marked(reply, request))

    async def _reply(
        self, request: Request, http_request: web.BaseRequest, connection: FrontConnection
    ) -> Reply:
        endpoint = self._router.find(request)
        generation = self._gate.generation
        admitted = self._gate.admit(endpoint, request)
        body = b""
        if admitted.max_body_bytes:
            body = await self._bodies.read(http_request, connection, admitted)
        elif http_request.body_exists:
            raise InvalidRequest(f"{request.method} {request.path} takes no body; send none.")
        # `begin` is asked here, and not only in `turn`, because a coroutine that need not wait
        # costs 1 us.
        if len(body) > LARGE_BYTES or not self._turns.begin():
            await self._turns.turn(len(body), is_first=connection.is_first)
        try:
            if self._gate.is_void(admitted, generation):
                # The rules changed while the request waited, or its credential ended. Connections
                # that were open then have been judged by the new rules, and this one has not.
                self._pages.check(request, connection.transport)
                admitted = self._gate.admit_again(endpoint, admitted)
            reply = endpoint.answer(admitted, body)
        finally:
            self._turns.end()
        if isinstance(reply, WebSocketUpgrade):
            check_upgrade(http_request)
        if isinstance(reply, Upgrade):
            self._addresses.claim(connection.open_transport(), request.headers)
        if isinstance(reply, Response | Upgrade):
            return reply
        if isinstance(reply, asyncio.Future):
            polled = await self._wait_for_poll(reply, request, connection)
            if self._gate.generation != generation:
                # The rules changed while the request waited; a page's poll is no open connection,
                # so nothing has judged it.
                self._pages.check(request, connection.transport)
            return polled
        answer = await reply
        return answer if isinstance(answer, Response) else await answer

    async def _wait_for_poll(
        self, reply: asyncio.Future[Response], request: Request, connection: FrontConnection
    ) -> Response:
        """Return the answer to a poll; while it waits its connection is the client's own."""
        transport = connection.transport
        if transport is None or reply.done():
            return await connection.unless_gone(reply)
        try:
            is_counted = self._addresses.claim(transport, request.headers)
        except ConnectionLimit:
            reply.cancel()
            raise
        try:
            return await connection.unless_gone(reply)
        finally:
            if is_counted:
                self._addresses.release(transport)


def to_request(http_request: web.BaseRequest) -> Request:
    """Return aiohttp's request as a Request.

    Raises:
        InvalidRequest: a field that may stand once stands twice, the target is neither a path nor a
            URL, the host is malformed, or the framing could be read in two ways.
    """
    headers: dict[str, str] = {}
    for name, value in http_request.headers.items():
        key = name.lower()
        if key not in headers:
            headers[key] = value
        elif key in _SINGLE:
            raise InvalidRequest(f"The header {key} is sent twice; send it once.")
        else:
            headers[key] = f"{headers[key]}, {value}"
    host = headers.get("host")
    if host and not HOST.fullmatch(host):
        raise InvalidRequest("The Host header is not a host; send a name or an address.")
    authority, target = read_target(http_request.method, http_request.raw_path)
    if authority is not None:
        # RFC 9112 §3.2.2: the target's authority replaces the Host field.
        headers["host"] = authority
    _check_framing(http_request.version, headers)
    is_http_1_0 = http_request.version == HttpVersion10
    return Request(http_request.method, target, headers, is_http_1_0=is_http_1_0)


def read_target(method: str, target: str) -> tuple[str | None, str]:
    """Return the authority in ``target``, None without one, and the path and query.

    Raises:
        InvalidRequest: ``target`` is neither a path nor an http or https URL with a well-formed
            authority.
    """
    if target.startswith("/") or (method == "OPTIONS" and target == WHOLE_SERVER):
        return None, target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or absolute[1].lower() not in ("http", "https"):
        raise InvalidRequest("The request target must be a path, or an http or https URL.")
    authority = _AUTHORITY.fullmatch(absolute[2])
    if authority is None or int(authority[1] or 0) > _MAX_PORT:
        raise InvalidRequest(
            "The host in the request target is not one; send a name or an address, perhaps with a"
            " port, and no user."
        )
    path = absolute[3]
    if method == "OPTIONS" and not path:
        # RFC 9112 §3.2.4: a proxy sends the asterisk form as a URL with an empty path.
        path = WHOLE_SERVER
    return absolute[2], path if path.startswith(("/", WHOLE_SERVER)) else f"/{path}"


def _check_framing(version: HttpVersion, headers: dict[str, str]) -> None:
    """Refuse framing that two HTTP parsers could read in two ways, and aiohttp lets pass."""
    if version not in (HttpVersion10, HttpVersion11):
        raise InvalidRequest("Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    coding = headers.get("transfer-encoding")
    # RFC 9112 §6.1: Transfer-Encoding in an HTTP/1.0 request is faulty framing.
    if coding is not None and (version == HttpVersion10 or coding.lower() != "chunked"):
        raise InvalidRequest("The only Transfer-Encoding taken is chunked, in HTTP/1.1.")


def to_response(answer: Response) -> web.Response:
    """Return ``answer`` as aiohttp's response."""
    return web.Response(status=answer.status, body=answer.body, headers=answer.fields())
