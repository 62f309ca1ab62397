"""Origins: which web pages may use the daemon through their visitors' browsers.

A browser says in ``Origin`` which page asks, and no page can change that; a request without it is
no page's. Nothing is refused here. Origins: RFC 6454 §6.2, §7; WHATWG Fetch, "serializing an
origin"; default ports: RFC 9110 §4.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from clevrd.errors import ConfigError

# A page of no origin that can be named: a file, a sandboxed frame, a redirect between origins.
NULL: Final = "null"
ANY: Final = "*"

DEFAULT_PORTS: Final = {"http": 80, "https": 443}
# Letters of a host as browsers send it: lower case, names beyond ASCII as punycode. Nothing else is
# an origin: no user, no path, no upper case, no empty label.
_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME: Final = rf"{_LABEL}(?:\.{_LABEL})*"
_HOST: Final = rf"{_NAME}|\[[0-9a-f:.]{{2,45}}\]"
_PORT: Final = r"(?::(?P<port>[1-9][0-9]{0,4}))?"
_ORIGIN: Final = re.compile(rf"(?P<scheme>https?)://(?P<host>{_HOST}){_PORT}")
_WILD: Final = re.compile(rf"(?P<scheme>https?)://\*\.(?P<host>{_NAME}){_PORT}")
# The origin of an app's or an extension's page, whose scheme no server speaks.
_APP: Final = re.compile(r"(?!(?:https?|wss?|ftp)://)[a-z][a-z0-9+.-]{1,31}://[a-zA-Z0-9._-]{1,64}")
_HOST_FIELD: Final = re.compile(rf"(?P<host>{_HOST}){_PORT}", re.IGNORECASE)
# RFC 1035 §2.3.4; a longer host is none, and a longer Origin is not looked at.
MAX_ORIGIN_BYTES: Final = len("https://:65535") + 255


class Origin(NamedTuple):
    """A scheme, a host in lower case, and a port that is always said."""

    scheme: str
    host: str
    port: int


def parse_origin(text: str) -> Origin | None:
    """Return the origin that a browser would spell ``text``; None for anything else."""
    if len(text) > MAX_ORIGIN_BYTES or not (match := _ORIGIN.fullmatch(text)):
        return None
    return _origin(match["scheme"], match["host"], match["port"])


def own_origin(scheme: str, host_field: str) -> Origin | None:
    """Return the daemon's own origin as the client of a request sees it.

    Args:
        scheme: http or https, as the client speaks it.
        host_field: the request's ``Host`` (RFC 9110 §7.2); None is returned where it is no host.
    """
    if len(host_field) > MAX_ORIGIN_BYTES or not (match := _HOST_FIELD.fullmatch(host_field)):
        return None
    return _origin(scheme, match["host"].lower(), match["port"])


def read_allowed_origins(setting: str, listed: Iterable[str] = ()) -> AllowedOrigins:
    """Return the pages of other origins that may ask.

    Args:
        setting: the setting ``allowed_origins``: origins between commas.
        listed: those of the table ``[auth]``.

    Raises:
        ConfigError: both are given, or an entry is no origin.
    """
    try:
        return AllowedOrigins(entries_in_force(setting, listed))
    except ValueError as error:
        raise ConfigError(f"allowed_origins: {error}") from error


def entries_in_force(setting: str, listed: Iterable[str]) -> tuple[str, ...]:
    """Return the entries of the list, wherever it stands; for the arguments see above.

    Raises:
        ConfigError: it stands in both places.
    """
    entries = tuple(entry.strip() for entry in setting.split(",") if entry.strip())
    listed = tuple(listed)
    if entries and listed:
        raise ConfigError(
            "allowed_origins stands in the table [auth] and as a setting (CLEVRD_ALLOWED_ORIGINS);"
            " keep one of them."
        )
    return entries or listed


def is_led_astray(host_field: str, port: int, default_port: int) -> bool:
    """Return whether a client came to ``port`` of its own machine by a name that others control.

    A page at ``http://evil.example:8080`` is of the daemon's own origin for its visitor's browser
    as soon as the name's owner has it mean 127.0.0.1 (DNS rebinding). Nobody elsewhere controls
    ``localhost`` and names below it (RFC 6761 §6.3), names without a dot, and addresses, whose last
    label begins with a digit (WHATWG URL §3.5). Behind a proxy on this machine ``Host`` has the
    proxy's port, which is another one.

    Args:
        host_field: the request's ``Host``.
        port: the port that was connected to.
        default_port: the port that a ``Host`` without one means.
    """
    name, colon, number = host_field.rpartition(":")
    if host_field.startswith("["):
        return False
    if not colon:
        name, number = host_field, str(default_port)
    if not (number.isascii() and number.isdigit() and len(number) <= 5 and int(number) == port):
        return False
    labels = name.lower().rstrip(".").split(".")
    return len(labels) > 1 and labels[-1] != "localhost" and not labels[-1][:1].isdigit()


def _origin(scheme: str, host: str, port: str | None) -> Origin | None:
    number = int(port) if port else DEFAULT_PORTS[scheme]
    return Origin(scheme, host, number) if 0 < number < 65_536 else None


class AllowedOrigins:
    """The list of a configuration: exact origins, all below a domain, ``null``, or any web page.

    Raises:
        ValueError: an entry is none of these; the text says which and what to write.
    """

    __slots__ = ("_apps", "_below", "_exact", "allows_any", "allows_null")

    def __init__(self, entries: Iterable[str]) -> None:
        self.allows_any = False
        self.allows_null = False
        self._exact: set[Origin] = set()
        # Origins of apps and extensions, as they stand.
        self._apps: set[str] = set()
        # (scheme, port) -> suffixes of hosts, each with its leading dot.
        self._below: dict[tuple[str, int], tuple[str, ...]] = {}
        for entry in entries:
            self._add(entry)

    def __bool__(self) -> bool:
        """Whether any page of another origin is allowed."""
        return self.allows_any or self.allows_null or bool(self._exact or self._below or self._apps)

    def _add(self, entry: str) -> None:
        if entry == ANY:
            self.allows_any = True
        elif entry == NULL:
            self.allows_null = True
        elif (origin := parse_origin(entry)) is not None:
            self._exact.add(origin)
        elif (match := _WILD.fullmatch(entry)) and (
            base := _origin(match["scheme"], match["host"], match["port"])
        ):
            at = (base.scheme, base.port)
            self._below[at] = (*self._below.get(at, ()), f".{base.host}")
        elif _APP.fullmatch(entry):
            self._apps.add(entry)
        else:
            raise ValueError(
                f"{entry[:80]!a} is no origin: write it as browsers do, like https://app.example,"
                " https://*.example.com, http://localhost:3000, null, or * for every page."
            )

    def allows(self, text: str) -> bool:
        """Return whether a page whose browser says ``Origin: text`` is on the list."""
        if self.names(text):
            return True
        return self.allows_any and parse_origin(text) is not None

    def names(self, text: str) -> bool:
        """Return whether the list allows a page by more than the star for every page."""
        if text == NULL:
            return self.allows_null
        origin = parse_origin(text)
        if origin is None:
            return text in self._apps
        if origin in self._exact:
            return True
        suffixes = self._below.get((origin.scheme, origin.port))
        return suffixes is not None and origin.host.endswith(suffixes)
