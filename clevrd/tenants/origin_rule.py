"""OriginRule: whether a browser's page may ask at all, and what the browser is told about it.

A page of the daemon's own origin may, and pages on the list may. This is decided by the head alone,
before who asks and before a body is read. CORS: WHATWG Fetch §3.3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, NamedTuple

from clevrd.errors import OriginNotAllowed
from clevrd.http_values import Request
from clevrd.tenants.origins import (
    DEFAULT_PORTS,
    AllowedOrigins,
    is_led_astray,
    own_origin,
    parse_origin,
)

log = logging.getLogger(__name__)

# One origin is told of in the log so often, and so many at a time: anybody can make up more.
_TOLD_EVERY_S: Final = 60.0
_MAX_TOLD: Final = 1_000
_MAX_TOLD_CHARS: Final = 100

# Fields of a response that a page may read, beside those that every page may (Fetch,
# "CORS-safelisted").
EXPOSED: Final = (
    "Retry-After, RateLimit, RateLimit-Policy, Idempotency-Replayed, Clevrd-Warning,"
    " WWW-Authenticate, Content-Length"
)
# Fields that a page may send with a request, beside those that every form may. Cache-Control is
# sent by EventSources that are made of fetch.
ALLOWED_FIELDS: Final = (
    "Accept, Authorization, Cache-Control, Content-Type, Idempotency-Key, Last-Event-ID, X-API-Key,"
    " X-Tenant-ID, traceparent, tracestate, ce-id, ce-source, ce-specversion, ce-type, ce-subject,"
    " ce-time, ce-dataschema"
)
# A day, of which Chromium keeps two hours.
_MAX_AGE: Final = "86400"

_VARY: Final = (("Vary", "Origin"),)
_READS: Final = ("GET", "HEAD")


class Seen(NamedTuple):
    """How a request reached the daemon, as its connection tells, or a listed proxy."""

    # As the client speaks it: http or https.
    scheme: str = "http"
    # The port that was connected to where that is on the loopback interface; else None.
    loopback_port: int | None = None
    # The connection is a listed proxy's; and the host that the proxy was asked for, None where it
    # is the request's own Host.
    is_from_proxy: bool = False
    host: str | None = None


DIRECT: Final = Seen()


class OriginRule:
    """Which pages may ask.

    Args:
        allowed: pages of other origins that may; `change` replaces them.
        now_s: a clock that is never set back.
    """

    __slots__ = ("_allowed", "_now_s", "_told")

    def __init__(self, allowed: AllowedOrigins, now_s: Callable[[], float]) -> None:
        self._allowed = allowed
        self._now_s = now_s
        # Start of an origin's text -> when the log told of it last; at most _MAX_TOLD.
        self._told: dict[str, float] = {}

    def change(self, allowed: AllowedOrigins) -> None:
        """Let in other pages from now on; no head that has an Origin is remembered anywhere."""
        self._allowed = allowed

    def concerns(self, head: Request) -> bool:
        """Return whether `check` has to be asked: a browser's page may have sent ``head``.

        Browsers leave ``Origin`` out where a page reads from its own origin, and nowhere else that
        matters: a GET for another origin's image or script has none either, but no page can read
        the answer, and a GET changes nothing (Fetch, "append a request Origin header").
        """
        headers = head.headers
        if "origin" in headers:
            return True
        return head.method in _READS and "upgrade" not in headers and "." in headers.get("host", "")

    def check(self, head: Request, seen: Seen = DIRECT) -> None:
        """Refuse a request whose page may not ask; a request without an Origin is no page's.

        One page can ask without an Origin: one whose name was made to mean this machine after it
        was loaded. Its requests are known by their ``Host``.

        Raises:
            OriginNotAllowed: the page's origin is neither the daemon's own nor on the list.
        """
        origin = head.headers.get("origin")
        if origin is None:
            self._check_host(head, seen)
        elif not self._allowed.allows(origin) and not self._is_own(origin, head, seen):
            self._tell("origin", origin, head)
            raise OriginNotAllowed(
                "Web pages of another origin may not ask here; the operator can list the page's"
                " origin in allowed_origins (CLEVRD_ALLOWED_ORIGINS)."
            )

    def _check_host(self, head: Request, seen: Seen) -> None:
        if head.method not in _READS or "upgrade" in head.headers or not is_astray(head, seen):
            return
        host = head.headers["host"].lower()
        if not any(self._allowed.allows(f"{scheme}://{host}") for scheme in DEFAULT_PORTS):
            self._tell("host", host, head)
            raise OriginNotAllowed(
                "This daemon answers on its own machine's loopback interface to localhost and to"
                " addresses, since any name can be made to mean 127.0.0.1; the operator can list"
                " http://NAME:PORT in allowed_origins (CLEVRD_ALLOWED_ORIGINS)."
            )

    def response_fields(self, head: Request) -> tuple[tuple[str, str], ...]:
        """Return the fields by which the browser lets a listed page read the response."""
        origin = head.headers.get("origin")
        if origin is None:
            # Caches must know that the response would have been another one (Fetch §3.3.6).
            return _VARY if self._allowed and head.method in _READS else ()
        if not self._allowed.allows(origin):
            return _VARY
        fields = (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", EXPOSED),
            *_VARY,
        )
        if not self._allowed.names(origin):
            # Every page is allowed, but none to use a cookie that its visitor has for the daemon.
            return fields
        return (*fields, ("Access-Control-Allow-Credentials", "true"))

    def preflight_fields(self, head: Request, methods: str) -> tuple[tuple[str, str], ...]:
        """Return what the answer to a preflight has besides `response_fields`.

        Args:
            head: an OPTIONS; one that is no listed page's preflight gets nothing.
            methods: what its path takes.
        """
        origin = head.headers.get("origin")
        if (
            origin is None
            or "access-control-request-method" not in head.headers
            or not self._allowed.allows(origin)
        ):
            return ()
        fields = (
            ("Access-Control-Allow-Methods", methods),
            ("Access-Control-Allow-Headers", ALLOWED_FIELDS),
            ("Access-Control-Max-Age", _MAX_AGE),
        )
        asks = head.headers.get("access-control-request-private-network") == "true"
        if not asks or not self._allowed.names(origin):
            return fields
        # A page on the internet asks for a daemon in its visitor's network: not by the star, with
        # which an operator can't have meant this (WICG Private Network Access §3.2).
        return (*fields, ("Access-Control-Allow-Private-Network", "true"))

    def _is_own(self, origin: str, head: Request, seen: Seen) -> bool:
        """Return whether the page is one that the daemon's own address serves."""
        asked = parse_origin(origin)
        if asked is None:
            return False
        host = seen.host or head.headers.get("host", "")
        # Many proxies end TLS and pass Host on, but are not listed: the daemon sees http where the
        # browser sees https. So the page's scheme may be https, when it has the host and port of
        # the request. That is safe: the browser has checked the host's certificate, so the page is
        # the host's own, and no page of another host can bring about this Host. A page over http is
        # not own where https is spoken: anybody on its way can have written it.
        is_own = asked == own_origin(seen.scheme, host) or asked == own_origin("https", host)
        return is_own and not is_astray(head, seen)

    def _tell(self, what: str, text: str, head: Request) -> None:
        """Log a refused origin, or a host, each once a minute."""
        now_s = self._now_s()
        shown = text[:_MAX_TOLD_CHARS]
        last_s = self._told.get(shown)
        if last_s is not None and now_s - last_s < _TOLD_EVERY_S:
            return
        if len(self._told) >= _MAX_TOLD:
            self._told = {
                name: at_s for name, at_s in self._told.items() if now_s - at_s < _TOLD_EVERY_S
            }
            if len(self._told) >= _MAX_TOLD:
                return
        self._told[shown] = now_s
        asked = head.headers.get("host", "")[:_MAX_TOLD_CHARS]
        values = shown, asked, "allowed_origins lists the pages that may ask"
        if what == "origin":
            log.warning("page refused origin=%a asked_host=%a hint=%r", *values)
        else:
            log.warning("page refused host=%a asked_host=%a hint=%r", *values)


def is_astray(head: Request, seen: Seen) -> bool:
    """Return whether a page's name may have been made to mean this machine: see `is_led_astray`."""
    if seen.loopback_port is None or seen.is_from_proxy:
        return False
    default_port = DEFAULT_PORTS[seen.scheme]
    return is_led_astray(head.headers.get("host", ""), seen.loopback_port, default_port)
