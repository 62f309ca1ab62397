"""Server addresses: a URL, host:port, or the path of a Unix socket. Nothing is opened here."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from clevrd.client.arguments import type_name
from clevrd.client.errors import BadUrl

# The scheme of a WebSocket URL -> the scheme of the requests that open it.
_WEB_SCHEMES: Final = {"ws": "http", "wss": "https"}
# A host needs a port here: a word alone may be a topic.
_HOST_AND_PORT: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^/:@\[\]?#\s]+):[0-9]{1,5}(/.*)?")


def parse_url(text: str) -> tuple[str, str | None]:
    """Return the base URL, and for ``unix:/path`` the path of the socket.

    Raises:
        TypeError: ``text`` is not text.
        BadUrl: ``text`` names no server; the sentence shows forms that do.
    """
    if not isinstance(text, str):
        raise TypeError(f"The URL is text, not {type_name(text)}.")
    path = text.removeprefix("unix:")
    if path != text:
        if not path.startswith("/"):
            raise BadUrl("The path of a Unix socket is absolute: unix:/run/clevrd.sock.")
        return "http://localhost", path
    url = _with_web_scheme(text)
    if not _is_web_url(url):
        raise BadUrl(
            "The URL must be like http://127.0.0.1:8080, 127.0.0.1:8080, https://host or"
            " unix:/path."
        )
    return url.rstrip("/"), None


def without_password(url: str) -> str:
    """Return ``url`` without user and password, for texts that people see."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def _with_web_scheme(text: str) -> str:
    """Return the http URL for a WebSocket URL, or for a host and a port alone."""
    scheme, mark, rest = text.partition("://")
    if mark:
        return f"{_WEB_SCHEMES.get(scheme.lower(), scheme)}://{rest}"
    return f"http://{text}" if _HOST_AND_PORT.fullmatch(text) else text


def _is_web_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        has_port = parts.port != 0  # reading it raises when it is not a number, or too large
    except ValueError:
        return False
    is_plain = text.isprintable() and " " not in text and not (parts.query or parts.fragment)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and has_port and is_plain
