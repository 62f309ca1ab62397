"""clevrd health: asks the daemon at its configured address whether it is well.

The command runs every few seconds beside a daemon that needs the CPU, so it imports no HTTP
library, no logging, and of the settings only the address and whether TLS is spoken there. So it
also works when a settings file was changed since the start and is wrong. Its options are in
`health_options`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from clevrd.addresses import DEFAULT_ADDRESS, TcpAddress, UnixAddress, parse_address
from clevrd.argv import argv_of_process, with_command
from clevrd.errors import ConfigError
from clevrd.health_options import EXIT_USAGE, Options, add_arguments, options_in, say

TYPE_CHECKING = False  # as in errors
if TYPE_CHECKING:
    from typing import Any, Final

EXIT_WELL: Final = 0
EXIT_NOT_WELL: Final = 1
EXIT_UNAVAILABLE: Final = 69

# Bytes read of an answer at most; its status line comes first.
MAX_HEAD_BYTES: Final = 8192
MAX_FILE_BYTES: Final = 1 << 20

# Spellings of what switches a setting on, as `config` takes them.
_YES: Final = ("true", "1", "yes")
# The header of a proxy that asks for itself.
_OWN_HEADER: Final = b"PROXY UNKNOWN\r\n"

# `cli/command_line` asks this module for the options, too.
__all__ = ["add_arguments", "main", "run"]

# A daemon that listens on all interfaces answers on the loopback address of the same family.
_LOOPBACK: Final = {None: "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return its exit code."""
    return run(options_in(argv))


def run(options: Options) -> int:
    """Ask the daemon, print the result as one line, and return the exit code."""
    given = flags_of_first_process()
    config = options.config or given.get("--config")
    try:
        where = find_address(
            given.get("--address") if options.address is None else options.address,
            config,
            os.environ,
        )
        address = parse_address(where)
        is_secure = speaks_tls(given.get("--tls-cert-file"), config, os.environ)
        proxies = listed_proxies(given.get("--proxy-protocol"), config, os.environ)
    except ConfigError as error:
        return say(2, str(error), ConfigError.exit_code)
    if isinstance(address, TcpAddress) and address.port == 0:
        return say(2, "Port 0 is chosen when the daemon starts; name it: --address", EXIT_USAGE)
    path = "/health/ready" if options.ready else "/health/live"
    try:
        end_s = time.monotonic() + options.timeout
        status = _status_of(_ask(address, path, end_s, is_secure, proxies))
    except CertificateWanted:
        if options.ready:
            return say(2, f"{where} answers nobody without a client certificate.", EXIT_NOT_WELL)
        return say(1, f"{where} is there and asked for a client certificate.", EXIT_WELL)
    except TimeoutError:
        late = f"{where} did not answer {path} within {options.timeout:g} s."
        return say(2, late, EXIT_NOT_WELL)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return say(2, f"Nobody answers at {where}: {reason}.", EXIT_UNAVAILABLE)
    if status != 200:
        # A daemon that speaks TLS answers 400 to a request in the clear.
        hint = "; if it speaks TLS, name its settings: --config FILE" if status == 400 else ""
        answer = f"{where} answered {path} with {status or 'what is not HTTP'}{hint}."
        return say(2, answer, EXIT_NOT_WELL)
    return say(1, f"{where} answered {path} with 200.", EXIT_WELL)


def find_address(flag: str | None, file: str | None, environ: Mapping[str, str]) -> str:
    """Return the address as `config.load` finds it: flag, environment, file, default.

    Raises:
        ConfigError: the file can't be read, or its address is not text.
    """
    if flag is not None:
        return flag
    if found := environ.get("CLEVRD_ADDRESS") or environ.get("ADDRESS"):
        return found
    path = file or environ.get("CLEVRD_CONFIG")
    return _address_in(path) if path else DEFAULT_ADDRESS


def speaks_tls(flag: str | None, file: str | None, environ: Mapping[str, str]) -> bool:
    """Return whether the daemon of these settings speaks TLS: it has a certificate.

    Raises:
        ConfigError: the file can't be read.
    """
    if flag is not None:
        return bool(flag)
    if environ.get("CLEVRD_TLS_CERT_FILE"):
        return True
    path = file or environ.get("CLEVRD_CONFIG")
    if not path:
        return False
    settings = _read_settings(path)
    table = settings.get("tls")
    return bool(
        settings.get("tls_cert_file") or (isinstance(table, dict) and table.get("certificates"))
    )


def listed_proxies(flag: str | None, file: str | None, environ: Mapping[str, str]) -> list[str]:
    """Return the proxies of whom the daemon of these settings expects a PROXY header.

    Raises:
        ConfigError: the file can't be read.
    """
    path = file or environ.get("CLEVRD_CONFIG")
    text = environ.get("CLEVRD_PROXY_PROTOCOL") if flag is None else flag
    if not path or (text and text.lower() not in _YES):
        # Proxies are listed in the file alone.
        return []
    settings = _read_settings(path)
    table = settings.get("auth")
    listed = table.get("trusted_proxies") if isinstance(table, dict) else None
    is_on = bool(text) or settings.get("proxy_protocol") is True
    return [str(each) for each in listed] if is_on and isinstance(listed, list) else []


def find_admin_address(flag: str | None, file: str | None, environ: Mapping[str, str]) -> str:
    """Return the address for operators as `config.load` finds it; empty where there is none.

    Raises:
        ConfigError: the file can't be read, or its address is not text.
    """
    if flag is not None:
        return flag
    if found := environ.get("CLEVRD_ADMIN_ADDRESS"):
        return found
    path = file or environ.get("CLEVRD_CONFIG")
    return _address_in(path, "admin_address", "") if path else ""


def _address_in(path: str, name: str = "address", otherwise: str = DEFAULT_ADDRESS) -> str:
    found = _read_settings(path).get(name, otherwise)
    if not isinstance(found, str):
        raise ConfigError(f"{name} (file {path}) is not allowed: must be text.")
    return found


def _read_settings(path: str) -> dict[str, Any]:
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.loads(file.read(MAX_FILE_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"Can't read the configuration file {path}: {error.strerror}.") from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"The configuration file {path} is not TOML: {error}.") from error


def flags_of_first_process() -> dict[str, str]:
    """Return the flags of the daemon that is process 1, as in a container, with their values.

    A check in the same container inherits the daemon's environment, but not its flags.
    """
    command, *words = with_command(argv_of_process())
    found: dict[str, str] = {}
    if command == "serve":
        for word, following in zip(words, [*words[1:], ""], strict=False):
            name, equals, value = word.partition("=")
            if name.startswith("--") and (value := value if equals else following):
                found[name] = value
    return found


# --- asking --------------------------------------------------------------------------------------


class CertificateWanted(Exception):
    """The daemon speaks to those alone who show a certificate."""


def _ask(
    address: TcpAddress | UnixAddress,
    path: str,
    end_s: float,
    is_secure: bool = False,
    proxies: Sequence[str] = (),
) -> bytes:
    """Return the first line of the answer, and perhaps more of it.

    Args:
        is_secure: the daemon speaks TLS.
        proxies: those of whom it expects a PROXY header.

    Raises:
        CertificateWanted: it is there and wants one.
        OSError: no process listens there, or no answer came in time (TimeoutError).
    """
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    head = b""
    with connected(address, end_s, proxies) as plain, _secured(plain, end_s, is_secure) as peer:
        peer.settimeout(_left_s(end_s))
        peer.sendall(request.encode())
        while b"\n" not in head and len(head) < MAX_HEAD_BYTES:
            peer.settimeout(_left_s(end_s))
            try:
                part = peer.recv(MAX_HEAD_BYTES)
            except OSError as error:
                # The alert about a missing certificate comes behind the handshake (RFC
                # 8446 §4.4.2.4).
                if "CERTIFICATE_REQUIRED" in (getattr(error, "reason", None) or ""):
                    raise CertificateWanted from error
                raise
            if not part:
                break
            head += part
    return head


def _secured(peer: socket.socket, end_s: float, is_secure: bool) -> socket.socket:
    """Return ``peer`` with TLS where the daemon speaks it.

    The certificate is not checked: it is for the names by which others reach the daemon, and
    nothing secret is sent or believed here.
    """
    if not is_secure or peer.family == socket.AF_UNIX:
        return peer
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    peer.settimeout(_left_s(end_s))
    return context.wrap_socket(peer)


def connected(
    address: TcpAddress | UnixAddress, end_s: float, proxies: Sequence[str]
) -> socket.socket:
    """Return a connection to the first address of the name that accepts one.

    A PROXY header was sent over it where this machine is one of ``proxies``.
    """
    failed: OSError = OSError("the name means no address")
    for family, where in _places(address):
        peer = socket.socket(family, socket.SOCK_STREAM)
        try:
            peer.settimeout(_left_s(end_s))
            peer.connect(where)
            if proxies and _is_listed(peer, proxies):
                peer.sendall(_OWN_HEADER)
            return peer
        except OSError as error:
            peer.close()
            failed = error
    raise failed


def _is_listed(peer: socket.socket, proxies: Sequence[str]) -> bool:
    """Return whether the daemon takes this end of a connection for a listed proxy's."""
    # The import takes 4 ms, for settings that few have.
    from clevrd.client_addresses import TrustedProxies, address_of

    with suppress(ValueError):
        return TrustedProxies(proxies).trusts(address_of(peer.getsockname()))
    # The daemon does not start with such a list.
    return False


def _places(address: TcpAddress | UnixAddress) -> list[tuple[int, Any]]:
    if isinstance(address, UnixAddress):
        return [(socket.AF_UNIX, address.path)]
    # The host is bytes because text would need the idna codec, which takes 5 ms to import.
    host = (_LOOPBACK.get(address.host) or address.host or "").encode()
    infos = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)
    return [(family, where) for family, _, _, _, where in infos]


def _left_s(end_s: float) -> float:
    """Return the seconds left, at least 1 ms, since 0 would mean not to wait at all."""
    return max(end_s - time.monotonic(), 0.001)


def _status_of(head: bytes) -> int:
    """Return the status; 0 where ``head`` is no answer in HTTP/1."""
    words = head.partition(b"\n")[0].split()
    is_http = len(words) >= 2 and words[0].startswith(b"HTTP/1.") and words[1].isdigit()
    return int(words[1][:9]) if is_http else 0
