"""The body of a request that came through aiohttp: whole, in time and within its limits.

The endpoint says how large a body may be; slow heads are handled in `connection`.
"""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import HttpVersion11, StreamReader, web

from clevrd.admission import Admitted
from clevrd.aiohttp_front.connection import FrontConnection
from clevrd.errors import (
    ChunksTooSmall,
    InvalidRequest,
    MessageTooLarge,
    RequestTimeout,
)
from clevrd.input_budget import InputBudget
from clevrd.pace import sent_step_bytes

# Bytes that a body may take on the wire beyond twice its limit. Chunks of one byte take six times
# their size, and half a second of parsing for each MiB.
CHUNKING_SLACK_BYTES: Final = 65_536


class BodyReader:
    """Reads bodies, each within its time, and all of them within one memory budget."""

    def __init__(self, budget: InputBudget, timeout_s: float) -> None:
        self._budget = budget
        self._timeout_s = timeout_s

    async def read(
        self, http_request: web.BaseRequest, connection: FrontConnection, admitted: Admitted
    ) -> bytes:
        """Return the whole body of an admitted request, of the size that is admitted at most.

        Raises:
            MessageTooLarge: the body is larger than that; raised as soon as that is known, with
                the rest unread.
            ChunksTooSmall: the body's chunks make it too expensive to read, however small it is.
            RequestTimeout: the body did not arrive in time.
            InvalidRequest: the body's framing is broken, or the client has shut its side down
                before the end of the body.
            Unavailable: too much is arriving from all clients together.
        """
        content, max_bytes = http_request.content, admitted.max_body_bytes
        if content.is_eof():
            # The body arrived with the head, as small ones do, so there is no wait.
            body = content.read_nowait()
            _check_size(len(body), max_bytes)
            return body
        if _expects_continue(http_request):
            connection.open_transport().write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                return await self._collect(content, connection, admitted, limit)
        except TimeoutError as error:
            raise RequestTimeout(self._timeout_s) from error
        except web.RequestPayloadError as error:
            raise InvalidRequest("The body is cut short; send all of it.") from error
        except OSError as error:
            raise ConnectionResetError("the client has gone") from error

    async def _collect(
        self,
        content: StreamReader,
        connection: FrontConnection,
        admitted: Admitted,
        limit: asyncio.Timeout,
    ) -> bytes:
        collected = bytearray()
        max_bytes = admitted.max_body_bytes
        sender = connection.sender(admitted.tenant.name, admitted.head.headers)
        connection.limit_body(max_bytes)
        step_bytes = sent_step_bytes(self._timeout_s)
        steady_at_bytes = step_bytes
        most_bytes = connection.received_bytes + 2 * max_bytes + CHUNKING_SLACK_BYTES
        try:
            async for chunk in content.iter_any():
                fits = self._budget.change(len(collected), len(collected) + len(chunk), sender)
                collected += chunk
                _check_size(len(collected), max_bytes)
                if connection.received_bytes > most_bytes:
                    raise ChunksTooSmall(2 * max_bytes + CHUNKING_SLACK_BYTES)
                if not fits:
                    raise self._budget.refusal()
                if len(collected) >= steady_at_bytes:
                    steady_at_bytes = len(collected) + step_bytes
                    limit.reschedule(asyncio.get_running_loop().time() + self._timeout_s)
            return bytes(collected)
        finally:
            self._budget.change(len(collected), 0, sender)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MessageTooLarge(max_bytes)


def _expects_continue(http_request: web.BaseRequest) -> bool:
    # RFC 9110 §10.1.1: the expectation is ignored in an HTTP/1.0 request.
    expects = http_request.headers.get("Expect", "").lower() == "100-continue"
    return expects and http_request.version == HttpVersion11
