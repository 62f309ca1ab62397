"""Credentials: where in a request's head they stand, and that there is one at most.

Whether one is valid is decided elsewhere. Nothing here, and no error, ever shows a part of one.
Sources: RFC 6750 §2 (bearer tokens), RFC 6455 §11.3.4 (subprotocols), RFC 6265 §4.2 (cookies).
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode
from binascii import Error as NotBase64
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from clevrd.errors import InvalidRequest, Unauthorized
from clevrd.http_values import Request

# The subprotocol by which a page, which can set no header on a WebSocket, presents a credential.
SUBPROTOCOL_PREFIX: Final = "clevrd.bearer."
# The cookie that the pages of the daemon's own origin may present, EventSource among them.
COOKIE: Final = "clevrd_token"
TOKEN_OPTION: Final = "token"  # noqa: S105  # the name of a field
TICKET_OPTION: Final = "ticket"

# Two thirds of a header line; the tokens of identity providers have 1 to 2 KiB.
MAX_CREDENTIAL_BYTES: Final = 5_600

# b64token of RFC 6750 §2.1, and what else may stand in a secret that somebody made up.
_VISIBLE: Final = re.compile(r"[\x21-\x7e]+")
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


class Credential(msgspec.Struct, frozen=True, gc=False):
    """A key or a token as a client presents it, or a ticket."""

    secret: str
    is_ticket: bool = False

    def __repr__(self) -> str:
        """Return no part of the secret: this may reach a log by mistake."""
        return "Credential(...)"


def find_credential(
    head: Request, options: Mapping[str, list[str]], *, allow_query_token: bool
) -> Credential | None:
    """Return the credential of a request, or None where it has none.

    Args:
        options: the request's query, decoded.
        allow_query_token: take ``token=`` of the query, which ends up in logs.

    Raises:
        InvalidRequest: credentials stand in two places, or twice in one.
        Unauthorized: a place for a credential has none that could be one.
    """
    headers = head.headers
    if not options and "cookie" not in headers and "sec-websocket-protocol" not in headers:
        # The way of nearly all publishes, without what a page may do: 0.5 us instead of 2.
        key, field = headers.get("x-api-key"), headers.get("authorization")
        if field is None:
            return None if key is None else _credential("X-API-Key", key)
        if key is None:
            return _credential("Authorization", _bearer(field))
    found: dict[str, Credential] = {}
    for place, credential in _places(head, options, allow_query_token):
        if place in found:
            raise InvalidRequest(f"A credential stands twice in {place}; send one.")
        found[place] = credential
    if len(found) > 1:
        raise InvalidRequest(
            f"Credentials stand in {' and '.join(sorted(found))}; send one, in one place."
        )
    return next(iter(found.values()), None)


def _places(
    head: Request, options: Mapping[str, list[str]], allow_query_token: bool
) -> Iterator[tuple[str, Credential]]:
    headers = head.headers
    if (key := headers.get("x-api-key")) is not None:
        yield "X-API-Key", _credential("X-API-Key", key)
    if (field := headers.get("authorization")) is not None:
        yield "Authorization", _credential("Authorization", _bearer(field))
    for offered in headers.get("sec-websocket-protocol", "").split(","):
        name = offered.strip()
        if name.startswith(SUBPROTOCOL_PREFIX):
            yield "Sec-WebSocket-Protocol", _of_subprotocol(name)
    for pair in headers.get("cookie", "").split(";"):
        name, _, value = pair.strip().partition("=")
        if name == COOKIE:
            yield "Cookie", _credential("Cookie", value)
    for ticket in options.get(TICKET_OPTION, ()):
        yield "the option ticket", _credential("the option ticket", ticket, is_ticket=True)
    for token in options.get(TOKEN_OPTION, ()):
        if not allow_query_token:
            raise Unauthorized(
                "A token in the query is not taken, since URLs end up in logs; send it as"
                " Authorization: Bearer, or have the operator set allow_query_token.",
                was_given=True,
            )
        yield "the option token", _credential("the option token", token)


def credential_of(place: str, secret: str) -> Credential:
    """Return the credential that stands in ``place``; raises Unauthorized where it can't be one."""
    return _credential(place, secret)


def _credential(place: str, secret: str, *, is_ticket: bool = False) -> Credential:
    if len(secret) > MAX_CREDENTIAL_BYTES or not _VISIBLE.fullmatch(secret):
        raise Unauthorized(
            f"What stands in {place} is no credential: 1 to {MAX_CREDENTIAL_BYTES} visible ASCII"
            " characters without spaces.",
            was_given=True,
        )
    return Credential(secret, is_ticket)


def _bearer(field: str) -> str:
    scheme, _, token = field.strip().partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized(
            "The scheme of Authorization is not known; send Authorization: Bearer and the key or"
            " token.",
            was_given=True,
        )
    return token.strip(" ")


def _of_subprotocol(name: str) -> Credential:
    text = name.removeprefix(SUBPROTOCOL_PREFIX)
    try:
        if not _BASE64URL.fullmatch(text):
            raise ValueError
        secret = urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("ascii")
    except (NotBase64, ValueError) as error:
        raise Unauthorized(
            f"What stands behind {SUBPROTOCOL_PREFIX} is no base64url (RFC 4648 §5, no padding).",
            was_given=True,
        ) from error
    return _credential("Sec-WebSocket-Protocol", secret)
