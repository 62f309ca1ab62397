"""Redirects: one rule for every call says which are followed. No I/O here.

Statuses: RFC 9110 §15.4. A request is repeated unchanged, with its tenant and its credentials, so
only to the same host and never from TLS to plain text.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

from clevrd.client.address import without_password

# Five: the step from http to https is one, and a path that a proxy adds is another.
MAX_REDIRECTS: Final = 5
# 303 is missing, since it asks for a GET of something else.
_FOLLOWED: Final = frozenset({301, 302, 307, 308})
_FOR_GOOD: Final = frozenset({301, 308})
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class NotFollowed(Exception):
    """A redirect that is not followed; the text says where it leads."""


def target_of(asked: str, status: int, location: str) -> str:
    """Return the URL at which the request to ``asked`` is repeated.

    Raises:
        NotFollowed: the new URL has another host or port, is plain text after TLS, or is no URL.
    """
    try:
        here, there = urlsplit(asked), urlsplit(urljoin(asked, location))
        is_followed = status in _FOLLOWED and _is_same_server(here, there)
    except ValueError:
        raise NotFollowed(f"answered {status} with a Location that is no URL") from None
    if not location:
        raise NotFollowed(f"answered {status} without a Location")
    if not is_followed:
        # People copy this URL, so the query is left out.
        shown = without_password(there._replace(query="", fragment="").geturl())
        raise NotFollowed(f"answered {status} and points to {shown!r}")
    user = here.netloc.rpartition("@")
    netloc = f"{user[0]}{user[1]}{there.netloc.rpartition('@')[2]}"
    return there._replace(netloc=netloc, fragment="").geturl()


def base_after(base: str, path: str, status: int, target: str) -> str:
    """Return the base URL for later requests: a new one after a permanent redirect."""
    moved = urlsplit(target)._replace(query="").geturl()
    if status in _FOR_GOOD and moved.endswith(path):
        return moved.removesuffix(path)
    return base


def _is_same_server(here: SplitResult, there: SplitResult) -> bool:
    if there.hostname != here.hostname or there.scheme not in _DEFAULT_PORTS:
        return False
    if (here.scheme, there.scheme) == ("http", "https"):
        return True
    return there.scheme == here.scheme and _port_of(there) == _port_of(here)


def _port_of(url: SplitResult) -> int:
    return url.port or _DEFAULT_PORTS[url.scheme]
