"""What goes wrong in the client; the message is one sentence, the server's where it said one."""

from __future__ import annotations

import os
import ssl
from typing import Any, Final

import msgspec

# Statuses of a gateway: the server behind it may have taken the message before it fell silent.
_GATEWAY_STATUSES: Final = frozenset({502, 504})


class ClientError(Exception):
    """Base of what goes wrong here."""

    # The wait that the server asked for, in seconds; 0 when it did not say.
    retry_after_s: float = 0.0
    # Results of a batch that had come before it failed, in the order of the items.
    results: list[Any] = []  # noqa: RUF012  # replaced, never changed


class BadUrl(ClientError):
    """The URL does not name a server."""


class BadRecord(ClientError, ValueError):
    """The data is not one JSON value in UTF-8, or has no JSON form; it was not sent."""


class BadData(ClientError, msgspec.ValidationError):
    """A message's data can't be had in the form that was asked for; its JSON can."""


class Misuse(ClientError, RuntimeError):
    """The client is used as it can't be: before it is opened, after it is closed, by two tasks."""


class BadAnswer(ClientError):
    """What came back is not what a clevrd server sends; probably the URL is another service's."""


class Unreachable(ClientError):
    """No connection, or it broke before the whole answer came."""

    def __init__(self, sentence: str, *, may_have_arrived: bool) -> None:
        super().__init__(sentence)
        self.may_have_arrived = may_have_arrived


class Refused(ClientError):
    """The server refused, with an error status or for one message of several."""

    def __init__(
        self,
        sentence: str,
        *,
        status: int = 0,
        code: str = "",
        is_transient: bool,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(sentence)
        # The HTTP status; 0 where one message or command on a socket was refused.
        self.status = status
        # The server's word for programs, such as ``rate_limited``; empty when it gave none.
        self.code = code
        self.is_transient = is_transient
        self.retry_after_s = retry_after_s

    @property
    def may_have_arrived(self) -> bool:
        """Say whether the message could be there all the same."""
        return self.status in _GATEWAY_STATUSES


class Closed(ClientError):
    """A connection ended: the server closed it, or (code 1006) it was lost."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"The connection was closed with {code}{reason and f' ({reason})'}.")
        self.code = code
        self.reason = reason


def reason_of(error: Exception) -> str:
    """Return why in few words; aiohttp's own texts repeat addresses and SSL modes."""
    # aiohttp's errors of TLS are TLS errors too, without what those know; their cause knows it.
    for cause in (error.__cause__, error):
        if isinstance(cause, ssl.SSLError):
            return _tls_reason(cause)
    code = getattr(error, "errno", None)
    if isinstance(code, int) and code > 0:
        return os.strerror(code).lower()
    if isinstance(error, TimeoutError):
        return "timed out"
    cause = getattr(error, "os_error", None)
    return str(getattr(cause, "strerror", None) or error).rstrip(".") or type(error).__name__


def _tls_reason(error: ssl.SSLError) -> str:
    """Return what the TLS handshake failed of; its errno is OpenSSL's and no system error."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = getattr(error, "verify_message", None)
        return f"its certificate is not trusted{(why and f' ({why})') or ''}"
    return "it does not speak TLS there (is it http:// instead of https://?)"
