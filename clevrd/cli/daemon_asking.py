"""Asks a daemon for what operators see: at --url, or where the settings say that it listens.

One connection is kept for all requests, and opened anew where it has broken.
"""

from __future__ import annotations

import argparse
import os
import ssl
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final
from urllib.parse import urlsplit

import msgspec

from clevrd.addresses import TcpAddress, UnixAddress, parse_address
from clevrd.cli import credential, trust
from clevrd.cli.credential import credential_of
from clevrd.cli.failures import CommandFailed, NoServer, UsageError
from clevrd.cli.trust import add_trust_and_credential, trust_of
from clevrd.client import BadUrl
from clevrd.client.address import parse_url, without_password
from clevrd.health_check import (
    connected,
    find_address,
    find_admin_address,
    flags_of_first_process,
    listed_proxies,
    speaks_tls,
)

# Ten times what /admin/top answers with 100 rows in each table.
_MAX_ANSWER_BYTES: Final = 4 << 20


class _Refusal(msgspec.Struct, frozen=True):
    error: str = ""


class _Connection(HTTPConnection):
    """A connection to an address as the settings have it, or to a Unix socket."""

    def __init__(
        self, address: TcpAddress | UnixAddress, timeout_s: float, proxies: list[str]
    ) -> None:
        # The host is this machine's own, so that an open daemon shows its figures.
        port = address.port if isinstance(address, TcpAddress) else 80
        super().__init__("localhost", port, timeout=timeout_s)
        self._address = address
        self._timeout_s = timeout_s
        self._proxies = proxies

    def connect(self) -> None:
        """Connect as `clevrd health` does."""
        self.sock = connected(self._address, time.monotonic() + self._timeout_s, self._proxies)
        self.sock.settimeout(self._timeout_s)


class _SecureConnection(_Connection):
    """The same with TLS.

    The certificate is for other names than this machine's, so it is not checked, and no secret is
    sent.
    """

    def connect(self) -> None:
        """Connect, and shake hands."""
        super().connect()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self.sock = context.wrap_socket(self.sock)


class Daemon:
    """A running daemon, which answers operators.

    Args:
        name: how it is called in sentences.
        secret: the key or token to present; None for none.
    """

    def __init__(
        self, connection: HTTPConnection, name: str, path: str, secret: str | None
    ) -> None:
        self.name = name
        self._connection = connection
        self._path = path
        self._headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}

    def get(self, target: str) -> bytes:
        """Return the body of an answer.

        Raises:
            NoServer: there is no answer, or none of a daemon.
            CommandFailed: it refuses.
        """
        try:
            status, body = self._get(target)
        except (OSError, HTTPException, UnicodeError) as error:
            self._connection.close()
            why = getattr(error, "strerror", None) or str(error) or "it closed the connection"
            advice = f" {trust.ADVICE}" if isinstance(error, ssl.SSLCertVerificationError) else ""
            raise NoServer(f"Nobody answers at {self.name}: {why}.{advice}") from error
        if status == 200:
            return body
        advice = f" {credential.ADVICE}" if status == 401 and not self._headers else ""
        raise CommandFailed(
            f"{self.name} refused to answer ({status}): {reason_of(status, body)}{advice}"
        )

    def _get(self, target: str) -> tuple[int, bytes]:
        connection = self._connection
        is_kept = connection.sock is not None
        try:
            return self._ask(target)
        except (ConnectionError, HTTPException):
            if not is_kept:
                raise
            # The daemon closes connections that are silent for a while, and when it ends.
            connection.close()
            return self._ask(target)

    def _ask(self, target: str) -> tuple[int, bytes]:
        connection = self._connection
        connection.request("GET", f"{self._path}{target}", headers=self._headers)
        answer = connection.getresponse()
        body = answer.read(_MAX_ANSWER_BYTES + 1)
        if len(body) > _MAX_ANSWER_BYTES:
            raise HTTPException("the answer is too large for one of clevrd's")
        return answer.status, body


def add_daemon(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which daemon to ask, and with which credential."""
    parser.add_argument(
        "--url",
        help="the daemon: http://host:port, host:port, https://host or unix:/path; without it the"
        " one of these settings is asked, at its admin_address if it has one",
    )
    parser.add_argument("--address", metavar="VALUE", help="where it listens, as for serve")
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings (CLEVRD_CONFIG)")
    add_trust_and_credential(parser)


def daemon_of(options: argparse.Namespace, timeout_s: float) -> Daemon:
    """Return the daemon that the options name; nothing is asked yet.

    Raises:
        UsageError: the options contradict each other, or name no server.
        ConfigError: the settings can't be read, or there is no credential where one should be.
    """
    if options.url is None:
        return _of_settings(options, timeout_s)
    if options.address is not None or options.config is not None:
        raise UsageError("--url says where the daemon is; leave --address and --config out")
    try:
        base, unix_path = parse_url(options.url)
    except BadUrl as error:
        raise UsageError(str(error)) from error
    secret = credential_of(options)
    if unix_path is not None:
        unix = _Connection(UnixAddress(unix_path), timeout_s, [])
        return Daemon(unix, options.url, "", secret)
    parts = urlsplit(base)
    host = parts.hostname or ""
    connection: HTTPConnection
    if parts.scheme == "https":
        context = trust_of(options) or ssl.create_default_context()
        connection = HTTPSConnection(host, parts.port, timeout=timeout_s, context=context)
    else:
        connection = HTTPConnection(host, parts.port, timeout=timeout_s)
    return Daemon(connection, without_password(base), parts.path, secret)


def _of_settings(options: argparse.Namespace, timeout_s: float) -> Daemon:
    given = flags_of_first_process()
    config = options.config or given.get("--config")
    if options.address is None and (
        admin := find_admin_address(given.get("--admin-address"), config, os.environ)
    ):
        # Nobody is asked for a credential there, so none is sent.
        return Daemon(_Connection(_with_port(admin), timeout_s, []), admin, "", None)
    flag = given.get("--address") if options.address is None else options.address
    where = find_address(flag, config, os.environ)
    address = _with_port(where)
    secret = credential_of(options)
    proxies = listed_proxies(given.get("--proxy-protocol"), config, os.environ)
    is_tcp = isinstance(address, TcpAddress)
    if is_tcp and speaks_tls(given.get("--tls-cert-file"), config, os.environ):
        if secret is not None:
            raise UsageError(
                "the daemon speaks TLS; name it by --url https://NAME, so that its certificate is"
                " checked before the key is sent"
            )
        return Daemon(_SecureConnection(address, timeout_s, proxies), where, "", None)
    return Daemon(_Connection(address, timeout_s, proxies), where, "", secret)


def _with_port(where: str) -> TcpAddress | UnixAddress:
    address = parse_address(where)
    if isinstance(address, TcpAddress) and address.port == 0:
        raise UsageError("port 0 is chosen when the daemon starts; name it: --address")
    return address


def reason_of(status: int, body: bytes) -> str:
    """Return the daemon's own sentence, on one line."""
    if status == 404:
        return "it is older than this command, or no clevrd."
    try:
        sentence = msgspec.json.decode(body, type=_Refusal).error
    except msgspec.DecodeError:
        sentence = ""
    return ascii(sentence)[1:-1] or "no reason was given."
