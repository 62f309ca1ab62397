"""Refusals: each is counted, and rendered as its client reads it, here and nowhere else.

Forms: an HTTP response (JSON, or RFC 9457 problem details), one result among others in an answer to
publishes, and a notice on a connection that goes on or ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus

import msgspec

from clevrd.core.notices import ErrorNotice, Ref
from clevrd.core.trace_context import traceparent_of
from clevrd.errors import ClevrdError, InternalError, RetryLater
from clevrd.http_values import JSON, NOT_STORED, PROBLEM_JSON, Request, Response
from clevrd.request_ids import request_id_of

log = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode

# Makes the response after which an EventSource comes back; None for another client.
AsEvents = Callable[[RetryLater, Request], Response | None]


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A refusal as a publisher reads it, in JSON."""

    success: bool = False
    error: str
    code: str
    retryable: bool


class _Problem(msgspec.Struct, frozen=True):
    type: str
    title: str
    status: int
    detail: str
    code: str
    retryable: bool


class Refusals:
    """Counts refusals and renders them."""

    __slots__ = ("_as_events", "_count", "_note")

    def __init__(
        self,
        count: Callable[[str], None],
        note: Callable[[ClevrdError, int], None],
        as_events: AsEvents | None = None,
    ) -> None:
        """Store the functions.

        Args:
            count: called with the machine code of each refusal.
            note: called with each refusal, and how many items it is for.
            as_events: asked for the response to a request that time heals.
        """
        self._count = count
        self._note = note
        self._as_events = as_events

    def with_events(self, as_events: AsEvents) -> Refusals:
        """Return refusals that are counted together with these, and know of EventSource."""
        return Refusals(self._count, self._note, as_events)

    def count(
        self, error: Exception, request: Request | None = None, *, times: int = 1
    ) -> ClevrdError:
        """Count ``error`` for each of so many items, and return it as a refusal.

        An error that is none is a bug: it is logged once, and refused as an internal error.
        """
        if not isinstance(error, ClevrdError):
            error = InternalError(_logged(error, request))
        if request is not None and request.asker is not None:
            error.blame(*request.asker)
        for _ in range(times):
            self._count(error.code)
        self._note(error, times)
        return error

    def response(self, error: Exception, request: Request | None) -> Response:
        """Return the response to a request that raised ``error``, and count the refusal.

        Args:
            request: None where the request is not whole.
        """
        refused = self.count(error, request)
        if request is not None and self._as_events is not None and isinstance(refused, RetryLater):
            events = self._as_events(refused, request)
            if events is not None:
                return events
        return _response_of(refused, request)

    def notice(self, error: ClevrdError, ref: Ref = msgspec.UNSET) -> ErrorNotice:
        """Return ``error`` as a notice, with the ref of the command if it had one; count it."""
        return notice_of(self.count(error), ref)


def _logged(error: Exception, request: Request | None) -> str:
    """Log a bug with what names its request; return the request's id."""
    headers = request.headers if request is not None else {}
    request_id = request_id_of(headers)
    log.error(
        "request failed request_id=%s traceparent=%s path=%s",
        request_id,
        traceparent_of(headers),
        request.path if request is not None else None,
        exc_info=error,
    )
    return request_id


def failure_of(error: ClevrdError) -> Failure:
    """Return ``error`` as one result in a list of results, or as a whole body; count nothing."""
    return Failure(error=str(error), code=error.code, retryable=error.retryable)


def notice_of(error: ClevrdError, ref: Ref = msgspec.UNSET) -> ErrorNotice:
    """Return ``error`` as a notice; count nothing."""
    return ErrorNotice(error.code, str(error), error.retryable, ref)


def _response_of(error: ClevrdError, request: Request | None) -> Response:
    """Return ``error`` as JSON, or as RFC 9457 problem details if the client asks for them."""
    sentence = str(error)
    headers = (*error.headers(), *NOT_STORED)
    accept = request.headers.get("accept", "") if request is not None else ""
    if PROBLEM_JSON in accept.lower():
        title = HTTPStatus(error.status).phrase
        problem = _Problem(
            "about:blank", title, error.status, sentence, error.code, error.retryable
        )
        return Response(error.status, _encode(problem), PROBLEM_JSON, headers)
    return Response(error.status, _encode(failure_of(error)), JSON, headers)
