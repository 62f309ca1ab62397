"""The options for the server, and client errors as failures; for publish and subscribe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import aiohttp

from clevrd.cli import credential, trust
from clevrd.cli.credential import credential_of, has_credential, read_file
from clevrd.cli.failures import CommandFailed, NoServer, UsageError
from clevrd.cli.trust import add_trust_and_credential, trust_of
from clevrd.client import RETRY_FOR_S, BadUrl, Client, ClientError, Unauthorized, Unreachable
from clevrd.client.credential import Token

DEFAULT_URL: Final = "http://127.0.0.1:8080"


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the options for the server, the tenant and the credential."""
    parser.add_argument(
        "--url",
        default=os.environ.get("CLEVRD_URL") or DEFAULT_URL,
        # The help shows the fixed default, not the variable's value, which may hold a password.
        help="the server: http://host:port, host:port, https://host or unix:/path (CLEVRD_URL;"
        f" default {DEFAULT_URL})",
    )
    parser.add_argument(
        "--tenant",
        default=os.environ.get("CLEVRD_TENANT") or None,
        metavar="NAME",
        help="sent as X-Tenant-ID (CLEVRD_TENANT)",
    )
    add_trust_and_credential(parser)


def client_of(options: argparse.Namespace, *, retry_for_s: float = RETRY_FOR_S) -> Client:
    """Return a client of the server that the options name, with their credential.

    Raises:
        BadUrl: the URL names no server.
        ConfigError: there is no credential where one should be.
    """
    secret = credential_of(options)
    token: Token | None = secret
    if secret is not None and options.key_file is not None:
        # The file is read again before a token in it ends, and where it is refused.
        token = partial(read_file, options.key_file)
    return Client(
        *(options.url, options.tenant),
        token=token,
        tls=trust_of(options),
        retry_for_s=retry_for_s,
    )


@contextmanager
def client_failures(options: argparse.Namespace) -> Iterator[None]:
    """Turn the client's errors into the command's own, with the option that helps."""
    try:
        yield
    except BadUrl as error:
        raise UsageError(str(error)) from error
    except Unreachable as error:
        raise NoServer(f"{error}{_advice(error)}") from error
    except Unauthorized as error:
        advice = "" if has_credential(options) else f" {credential.ADVICE}"
        raise CommandFailed(f"{error}{advice}") from error
    except ClientError as error:
        raise CommandFailed(str(error)) from error


def _advice(error: Unreachable) -> str:
    """Return what to do about a server to which there was no connection at all."""
    match error.__cause__:
        case aiohttp.ClientConnectorCertificateError():
            return f" {trust.ADVICE}"
        case aiohttp.ClientSSLError():
            return ""
        case aiohttp.ClientConnectorError():
            return " Start the daemon by clevrd serve, or name another by --url."
    return ""
