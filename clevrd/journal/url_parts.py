"""The parts that the URLs of all servers have in common: hosts, and secrets that are not shown.

Pure; no library is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Protocol

# A scheme, and what follows it.
SHAPE: Final = re.compile(r"([a-z+]+)://(.*)\Z", re.DOTALL)
_FINGERPRINT: Final = re.compile(r"#[0-9a-f]{8}\Z")

Host = tuple[str, int]


class BadUrl(ValueError):
    """A URL that can't be used: its sentence says why, and holds no secret."""


class Account(Protocol):
    """The part of an address that says who asks; empty where the URL does not say it."""

    @property
    def user(self) -> str:
        """The user's name."""

    @property
    def password(self) -> str:
        """The user's password."""


def password_mistakes(address: Account, password_file: str) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with where the password stands: the setting, and a sentence."""
    if address.password and password_file:
        yield "password_file", "the URL has a password already; leave one of them out."
    if address.user and not (address.password or password_file):
        yield "url", "it has a user and no password; give it there or in password_file."


def scheme_of(url: str) -> str:
    """Return the word before ``://``; empty where there is none."""
    match = SHAPE.match(url)
    return match[1] if match else ""


def rest_of(url: str) -> str:
    """Return what follows the scheme, without a fingerprint; raises BadUrl.

    An operator may compare a URL as it was shown with that of a file.
    """
    match = SHAPE.match(url)
    rest = _FINGERPRINT.sub("", match[2] if match else "")
    if "?" in rest or "#" in rest:
        raise BadUrl(
            "a ? or # can't stand in it; in a user or password write %3F or %23, and options have"
            " settings of their own."
        )
    return rest


def parse_host(text: str, default_port: int, example_port: int | None = None) -> Host:
    """Return a host and its port; an IPv6 address stands in brackets. Raises BadUrl."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%a-z]+\]|[^:\[\]/\s]+)(?::(\d{1,5}))?", text)
    if match is None:
        example = example_port or default_port
        raise BadUrl(f"a host is missing, or has no port that is a number: write host:{example}.")
    port = int(match[2]) if match[2] else default_port
    if not 0 < port < 65536:
        raise BadUrl("a port is a number from 1 to 65535.")
    return match[1].strip("[]"), port


def shown_url(url: str) -> str:
    """Return ``url`` without user and password, for logs and operators."""
    match = SHAPE.match(url)
    if match is None:
        return url
    return f"{match[1]}://{match[2].rpartition('@')[2]}"
