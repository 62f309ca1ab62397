"""Listening addresses: HOST:PORT or unix:/path. Nothing is opened here.

`clevrd health` runs every few seconds and imports little besides this module, so modules that are
slow to import, such as re and typing, are not imported, or inside the functions that need them.
"""

from __future__ import annotations

import os

from clevrd.errors import ConfigError

TYPE_CHECKING = False  # as in errors
if TYPE_CHECKING:
    from typing import Final

DEFAULT_ADDRESS: Final = ":8080"

# sockaddr_un.sun_path holds 108 bytes with its final NUL on Linux: unix(7).
MAX_UNIX_PATH_BYTES: Final = 107
MAX_HOST_CHARS: Final = 253


class TcpAddress:
    """A TCP address; host None means every interface, IPv4 and, where the machine has it, IPv6."""

    __slots__ = ("host", "port")

    def __init__(self, host: str | None, port: int) -> None:
        self.host = host
        self.port = port

    def __eq__(self, other: object) -> bool:
        """Return whether both name the same host and port."""
        return isinstance(other, TcpAddress) and (self.host, self.port) == (other.host, other.port)

    def __hash__(self) -> int:
        """Return the hash of host and port."""
        return hash((self.host, self.port))

    def __repr__(self) -> str:
        """Return the call that makes it."""
        return f"TcpAddress({self.host!r}, {self.port})"


class UnixAddress:
    """A Unix socket; the path is absolute."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def __eq__(self, other: object) -> bool:
        """Return whether both have the same path."""
        return isinstance(other, UnixAddress) and self.path == other.path

    def __hash__(self) -> int:
        """Return the path's hash."""
        return hash(self.path)

    def __repr__(self) -> str:
        """Return the call that makes it."""
        return f"UnixAddress({self.path!r})"


def text_of_socket(name: object) -> str:
    """Return the address of a socket as URLs have it: ``unix:`` with a path, or host and port.

    Args:
        name: the address as sockets give it; None, or anything else, makes an empty text.
    """
    if isinstance(name, str) and name:
        return f"unix:{name}"
    if not isinstance(name, tuple) or len(name) < 2:
        return ""
    host, port = str(name[0]).partition("%")[0], name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str) -> TcpAddress | UnixAddress:
    """Return the address that ``text`` names.

    ``:9000`` means every interface, IPv4 and, where the machine has it, IPv6; port 0 lets the
    kernel choose.

    Raises:
        ConfigError: ``text`` is not an address; the sentence says what is missing or wrong.
    """
    if text.startswith("unix:"):
        return UnixAddress(_unix_path(text.removeprefix("unix:")))
    if "://" in text:
        raise ConfigError("Write an address, not a URL: 127.0.0.1:9000.")
    if text.startswith("["):
        return _bracketed(text)
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ConfigError("The port is missing: write :9000 or localhost:9000.")
    if ":" in host:
        raise ConfigError("An IPv6 address stands in brackets: [::1]:9000.")
    return TcpAddress(_host(host) if host else None, _port(port))


def _unix_path(path: str) -> str:
    if not path.startswith("/"):
        raise ConfigError("The path of a Unix socket is absolute: unix:/run/clevrd.sock.")
    if path.endswith("/") or "\0" in path:
        raise ConfigError("The path of a Unix socket names a file: unix:/run/clevrd.sock.")
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise ConfigError(f"The path of a Unix socket is at most {MAX_UNIX_PATH_BYTES} bytes long.")
    return path


def _bracketed(text: str) -> TcpAddress:
    host, closing, port = text[1:].partition("]")
    if not closing or not port.startswith(":"):
        raise ConfigError("After an IPv6 address in brackets comes the port: [::1]:9000.")
    from ipaddress import IPv6Address

    try:
        IPv6Address(host)
    except ValueError as error:
        raise ConfigError("The text in brackets is not an IPv6 address.") from error
    return TcpAddress(host, _port(port[1:]))


def _host(host: str) -> str:
    labels = host.split(".")
    if len(host) > MAX_HOST_CHARS or not all(map(_is_label, labels)):
        raise ConfigError("That is not a host; for all interfaces leave it out: :9000.")
    # A host name never ends in a numeric label (RFC 1123 §2.1), so this was meant as an IPv4
    # address.
    if labels[-1].isdigit() and not (len(labels) == 4 and all(map(_is_byte, labels))):
        raise ConfigError("That is not an IPv4 address.")
    return host


def _is_label(text: str) -> bool:
    """Return whether ``text`` is letters, digits and _ of ASCII, with - between them."""
    letters = text.replace("_", "x")
    return (
        letters.isascii()
        and letters.replace("-", "x").isalnum()
        and not (letters[0] == "-" or letters[-1] == "-")
    )


def _is_byte(text: str) -> bool:
    """Return whether ``text`` is a number from 0 to 255 without leading zeros."""
    return text.isdigit() and len(text) <= 3 and int(text) <= 255 and str(int(text)) == text


def _port(text: str) -> int:
    if not text:
        raise ConfigError("The port is missing: write :9000 or localhost:9000.")
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535):
        raise ConfigError("A port is a whole number from 0 to 65535.")
    return int(text)
