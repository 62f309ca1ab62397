"""Errors of the client; each message is one sentence, the server's own where it sent one."""

from __future__ import annotations

import os
import ssl
from typing import Any, Final

import msgspec

# Statuses of a gateway: the server behind it may have taken the message before it stopped
# answering.
_GATEWAY_STATUSES: Final = frozenset({502, 504})


class ClientError(Exception):
    """Base of the client's errors."""

    # Seconds that the server asked to wait; 0 if it did not ask.
    retry_after_s: float = 0.0
    # Results of a batch's items that were answered before the batch failed, in the order of the
    # items.
    results: list[Any] = []  # noqa: RUF012  # replaced, never changed


class BadUrl(ClientError):
    """The URL does not name a server."""


class BadRecord(ClientError, ValueError):
    """The data is not one JSON value in UTF-8, or has no JSON form; it was not sent."""


class BadData(ClientError, msgspec.ValidationError):
    """A message's data can't be decoded as the type that was asked for; its JSON is still there."""


class Misuse(ClientError, RuntimeError):
    """The client was used before it was opened, after it was closed, or by two tasks at once."""


class BadAnswer(ClientError):
    """The answer is not a clevrd server's; the URL is probably another service's."""


class Unreachable(ClientError):
    """There is no connection, or it broke before the whole answer came."""

    def __init__(self, sentence: str, *, may_have_arrived: bool) -> None:
        super().__init__(sentence)
        self.may_have_arrived = may_have_arrived


class NoToken(Unreachable):
    """The function that returns the token failed; its own error is this one's cause."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, may_have_arrived=False)


class Refused(ClientError):
    """The server refused: a request, with an error status, or one message or command."""

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
        # The server's machine code, such as ``rate_limited``; empty if it sent none.
        self.code = code
        self.is_transient = is_transient
        self.retry_after_s = retry_after_s

    @property
    def may_have_arrived(self) -> bool:
        """Whether the server may have taken the message all the same."""
        return self.status in _GATEWAY_STATUSES


class Unauthorized(Refused):
    """The server asks for a credential, or does not take the one it was shown; status 401.

    Where a function returns the token, it was asked for a fresh one before this is raised.
    """


class Closed(ClientError):
    """A connection ended: the server closed it, or (code 1006) it was lost."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"The connection was closed with {code}{reason and f' ({reason})'}.")
        self.code = code
        self.reason = reason


def reason_of(error: Exception) -> str:
    """Return the cause in few words; aiohttp's own texts repeat addresses and SSL modes."""
    # aiohttp's TLS errors are SSLErrors without the details; their causes have the details.
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
    """Return why the TLS handshake failed; its errno is OpenSSL's, not the system's."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = getattr(error, "verify_message", None)
        return f"its certificate is not trusted{(why and f' ({why})') or ''}"
    return "it does not speak TLS there (is it http:// instead of https://?)"
