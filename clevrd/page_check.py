"""PageCheck: each way into the daemon asks here whether a browser's page may ask.

The rule is `tenants/origin_rule`'s; a connection's part in it is found out here. Both ways ask
before anything else: before the path is looked up, and before a body is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

import msgspec

from clevrd.client_addresses import AskedFor, is_loopback
from clevrd.http_values import Request, Response
from clevrd.tenants.origin_rule import DIRECT, OriginRule, Seen, is_astray

# The fields of a head by which a page is judged, and the longest value of one that says anything.
_JUDGED_BY: Final = ("origin", "host", "upgrade", "x-forwarded-proto", "x-forwarded-host")
_MAX_FIELD_BYTES: Final = 1_024

_SaysProxy = Callable[[Mapping[str, str], asyncio.BaseTransport], AskedFor | None]


class PageCheck:
    """The rule for pages, for every connection.

    Args:
        rule: which pages may ask.
        asked_for: what a listed proxy says, in a request's header fields, that its client asked
            for; None for a connection that is no listed proxy's.
    """

    __slots__ = ("_asked_for", "_rule")

    def __init__(self, rule: OriginRule, asked_for: _SaysProxy) -> None:
        self._rule = rule
        self._asked_for = asked_for

    def check(self, head: Request, transport: asyncio.BaseTransport | None) -> None:
        """Refuse a request whose page may not ask.

        Args:
            head: the request's head.
            transport: the connection it came over; None if its client has gone.

        Raises:
            OriginNotAllowed: the page is neither the daemon's own nor listed.
        """
        rule = self._rule
        if rule.concerns(head):
            rule.check(head, DIRECT if transport is None else self._seen(head, transport))

    def page_of(self, head: Request, transport: asyncio.BaseTransport) -> Request | None:
        """Return the part of ``head`` by which `check` judges its page again after a change.

        Args:
            head: the head of a request that `check` has let in.

        Returns:
            None where no page has sent it, or no change of the rule could refuse it.
        """
        headers = head.headers
        if "origin" not in headers:
            # A listed name of this machine, or one of this machine's programs.
            is_page = self._rule.concerns(head) and is_astray(head, self._seen(head, transport))
            if not is_page:
                return None
        return _page(
            head.method,
            tuple(
                (name, headers[name])
                for name in _JUDGED_BY
                if name in headers and len(headers[name]) <= _MAX_FIELD_BYTES
            ),
        )

    def _seen(self, head: Request, transport: asyncio.BaseTransport) -> Seen:
        scheme = "http" if transport.get_extra_info("sslcontext") is None else "https"
        port = loopback_port_of(transport.get_extra_info("sockname"))
        said = self._asked_for(head.headers, transport)
        if said is None:
            return Seen(scheme, port)
        return Seen(said.scheme or scheme, port, is_from_proxy=True, host=said.host)

    def marked(self, answer: Response, head: Request) -> Response:
        """Return ``answer`` to ``head`` with the fields that browsers look for."""
        fields = self._rule.response_fields(head)
        if not fields:
            return answer
        if head.method == "OPTIONS":
            methods = dict(answer.headers).get("Allow", "")
            fields += self._rule.preflight_fields(head, methods)
        # An answer that depends on another field too gets one list of both.
        varies = [value for name, value in answer.headers if name == "Vary"]
        own = tuple(field for field in answer.headers if field[0] != "Vary")
        fields = tuple(
            (name, ", ".join((*varies, value)) if name == "Vary" else value)
            for name, value in fields
        )
        return msgspec.structs.replace(answer, headers=(*own, *fields))

    def marked_stream(self, start: bytes, head: Request) -> bytes:
        """Return the start of a stream, its head first, with the fields that browsers look for."""
        fields = self._rule.response_fields(head)
        line, end, rest = start.partition(b"\r\n")
        text = "".join(f"{name}: {value}\r\n" for name, value in fields)
        return line + end + text.encode() + rest


# A page has one head for all of its visitors, which a thousand connections then share.
@lru_cache(64)
def _page(method: str, fields: tuple[tuple[str, str], ...]) -> Request:
    return Request(method, "/", dict(fields))


def loopback_port_of(address: object) -> int | None:
    """Return the port of a socket's address on the loopback interface; None for any other one."""
    match address:
        case (str(host), int(port), *_):
            return port if is_loopback(host) else None
    return None
