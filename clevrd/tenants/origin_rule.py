"""OriginRule: whether a browser's page may ask at all, and what the browser is told about it.

A page of the daemon's own origin may, and pages on the list may. This is decided by the head alone,
before who asks and before a body is read. CORS: WHATWG Fetch §3.3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final

from clevrd.errors import Forbidden
from clevrd.http_values import Request
from clevrd.tenants.origins import AllowedOrigins, own_origin, parse_origin

log = logging.getLogger(__name__)

# One origin is told of in the log so often, and so many at a time: anybody can make up more.
_TOLD_EVERY_S: Final = 60.0
_MAX_TOLD: Final = 1_000

# Fields of a response that a page may read, beside those that every page may (Fetch,
# "CORS-safelisted").
EXPOSED: Final = (
    "Retry-After, RateLimit, RateLimit-Policy, Idempotency-Replayed, Clevrd-Warning,"
    " WWW-Authenticate, Content-Length"
)
# Fields that a page may send with a request, beside those that every form may.
ALLOWED_FIELDS: Final = (
    "Accept, Authorization, Content-Type, Idempotency-Key, Last-Event-ID, X-API-Key, X-Tenant-ID"
)
# A day, of which Chromium keeps two hours.
_MAX_AGE: Final = "86400"


class OriginRule:
    """Which pages may ask.

    Args:
        allowed: pages of other origins that may.
        is_secure: whether the daemon speaks TLS itself.
        now_s: a clock that is never set back.
    """

    __slots__ = ("_allowed", "_now_s", "_scheme", "_told")

    def __init__(
        self, allowed: AllowedOrigins, now_s: Callable[[], float], *, is_secure: bool = False
    ) -> None:
        self._allowed = allowed
        self._now_s = now_s
        self._scheme = "https" if is_secure else "http"
        # Origin -> when the log told of it last; at most _MAX_TOLD.
        self._told: dict[str, float] = {}

    def check(self, head: Request, seen_as: tuple[str, str] | None = None) -> None:
        """Refuse a request whose page may not ask; a request without an Origin is no page's.

        Args:
            head: the request's head.
            seen_as: the scheme and host that the client used, where a trusted proxy says so.

        Raises:
            Forbidden: its origin is neither the daemon's own nor on the list.
        """
        origin = head.headers.get("origin")
        if origin is None or self._is_own(origin, head, seen_as) or self._allowed.allows(origin):
            return
        self._tell(origin)
        raise Forbidden(
            "The page that asks is of another origin, which is not allowed here; its operator can"
            " add it to allowed_origins in the [auth] table."
        )

    def response_fields(
        self, head: Request, seen_as: tuple[str, str] | None = None
    ) -> tuple[tuple[str, str], ...]:
        """Return the fields by which the browser lets an allowed page read the response."""
        origin = head.headers.get("origin")
        if origin is None:
            # Caches must know that the response would have been another one (Fetch §3.3.6).
            return (("Vary", "Origin"),) if self._allowed else ()
        if self._is_own(origin, head, seen_as) or not self._allowed.allows(origin):
            return (("Vary", "Origin"),)
        fields = (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", EXPOSED),
            ("Vary", "Origin"),
        )
        if not self._allowed.names(origin):
            # Every page is allowed, but none to use a cookie that its visitor has for the daemon.
            return fields
        return (*fields, ("Access-Control-Allow-Credentials", "true"))

    def preflight_fields(self, head: Request, methods: str) -> tuple[tuple[str, str], ...]:
        """Return what the answer to a preflight has besides `response_fields`.

        Args:
            head: an OPTIONS; one that is no preflight gets nothing.
            methods: what its path takes.
        """
        if "access-control-request-method" not in head.headers:
            return ()
        return (
            ("Access-Control-Allow-Methods", methods),
            ("Access-Control-Allow-Headers", ALLOWED_FIELDS),
            ("Access-Control-Max-Age", _MAX_AGE),
        )

    def _is_own(self, origin: str, head: Request, seen_as: tuple[str, str] | None) -> bool:
        scheme, host = seen_as or (self._scheme, head.headers.get("host", ""))
        asked = parse_origin(origin)
        return asked is not None and asked == own_origin(scheme, host)

    def _tell(self, origin: str) -> None:
        """Log a refused origin, each once a minute."""
        now_s = self._now_s()
        last_s = self._told.get(origin)
        if last_s is not None and now_s - last_s < _TOLD_EVERY_S:
            return
        if len(self._told) >= _MAX_TOLD:
            self._told = {
                name: at_s for name, at_s in self._told.items() if now_s - at_s < _TOLD_EVERY_S
            }
            if len(self._told) >= _MAX_TOLD:
                return
        self._told[origin] = now_s
        log.warning(
            "origin refused origin=%s hint=%r", ascii(origin)[:100], "allowed_origins in [auth]"
        )


def forwarded(headers: Mapping[str, str], scheme: str) -> tuple[str, str] | None:
    """Return the scheme and host that a proxy says its client used; None where it says nothing.

    Only for requests of a trusted proxy: any client can send these fields.
    """
    proto = headers.get("x-forwarded-proto", "").rpartition(",")[2].strip().lower()
    host = headers.get("x-forwarded-host", "").rpartition(",")[2].strip()
    if not proto and not host:
        return None
    return (proto if proto in ("http", "https") else scheme), (host or headers.get("host", ""))
