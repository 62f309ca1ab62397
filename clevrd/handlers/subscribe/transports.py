"""Which transport a GET /subscribe asks for, and how a refusal reads to an EventSource.

A WebSocket handshake is one whatever else it says; then ``poll``; then ``Accept``
(RFC 9110 §12.5.1).
"""

from __future__ import annotations

import re
import secrets
from typing import Final

from clevrd.core.stream_forms import (
    NDJSON,
    NDJSON_BARE,
    SSE,
    SSE_BARE,
    ServerSentEvents,
    StreamForm,
)
from clevrd.errors import InvalidRequest, RetryLater
from clevrd.handlers.subscribe.options import single_option
from clevrd.http_values import NOT_STORED, Request, Response
from clevrd.refusals import notice_of

# When an EventSource is to come back after a connection that broke: at 2,000 a second, half of what
# one core takes, 10,000 of them would take 5 s. Browsers' own, 3 to 5 s, is the same for all.
RETRY_FIRST_MS: Final = 1_000
RETRY_SPREAD_MS: Final = 4_000

# Proxies cut silent requests after 60 s, and many clients after 30.
DEFAULT_TIMEOUT_S: Final = 25.0
MAX_TIMEOUT_S: Final = 60.0

_SECONDS: Final = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3})?", re.ASCII)

# Media type -> its form in HTTP/1.1 and in HTTP/1.0, which has no chunks.
_FORMS: Final[dict[str, tuple[StreamForm, StreamForm]]] = {
    "text/event-stream": (SSE, SSE_BARE),
    "application/x-ndjson": (NDJSON, NDJSON_BARE),
}


def is_upgrade(request: Request) -> bool:
    """Whether the request asks for a WebSocket, be it rightly or not."""
    return "websocket" in request.headers.get("upgrade", "").lower()


def is_poll(query: dict[str, list[str]]) -> bool:
    """Return whether ``query`` asks for a poll.

    Raises:
        InvalidRequest: it neither does nor does not.
    """
    poll = single_option(query, "poll")
    if poll not in (None, "0", "1"):
        raise InvalidRequest("The option poll must be 1 for a long-poll, or 0 for none.")
    return poll == "1"


def read_timeout(query: dict[str, list[str]]) -> float:
    """Return how many seconds the poll waits.

    Raises:
        InvalidRequest: it is no number from 0 to MAX_TIMEOUT_S.
    """
    text = single_option(query, "timeout")
    if text is None:
        return DEFAULT_TIMEOUT_S
    if not _SECONDS.fullmatch(text) or float(text) > MAX_TIMEOUT_S:
        raise InvalidRequest(f"The option timeout must be seconds from 0 to {MAX_TIMEOUT_S:g}.")
    return float(text)


def stream_form(request: Request) -> StreamForm | None:
    """Return the form of stream that ``Accept`` names; None when it names none."""
    best, best_quality = "", 0.0
    for each in request.headers.get("accept", "").lower().split(","):
        media, *parameters = (part.strip() for part in each.split(";"))
        if media in _FORMS and (quality := _quality(parameters)) > best_quality:
            best, best_quality = media, quality
    return _FORMS[best][request.is_http_1_0] if best else None


def _quality(parameters: list[str]) -> float:
    """Return the weight of a media range; 1 where it has none, or none that is a number."""
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value[:5])
            except ValueError:
                return 1.0
    return 1.0


def retry_ms() -> int:
    """Return when a client is to come back if the connection breaks, drawn for each."""
    return RETRY_FIRST_MS + secrets.randbelow(RETRY_SPREAD_MS)


def is_events(form: StreamForm | None) -> bool:
    """Whether ``form`` is what an EventSource reads."""
    return isinstance(form, ServerSentEvents)


def wants_events(request: Request) -> bool:
    """Whether the answer to ``request`` is to be read by an EventSource, and is none to a poll."""
    return is_events(stream_form(request)) and "poll=1" not in request.query.split("&")


def events_refusal(error: RetryLater) -> Response:
    """Return a refusal that time heals as an event stream that ends.

    After any status but 200 an EventSource gives up for good (WHATWG HTML §9.2.3); after the end of
    a stream it comes back.
    """
    wait_ms = int(error.retry_after_s * 1000) + secrets.randbelow(RETRY_SPREAD_MS)
    events = SSE.retry(wait_ms) + SSE.notice(notice_of(error), b"", None)
    headers = (*NOT_STORED, *error.headers())
    return Response(200, events, SSE.content_type, headers)
