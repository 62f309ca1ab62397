"""The options for the server, and client errors as failures; for publish and subscribe."""

from __future__ import annotations

import argparse
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from clevrd.cli.failures import CommandFailed, NoServer, UsageError
from clevrd.client import BadUrl, ClientError, Unreachable

DEFAULT_URL: Final = "http://127.0.0.1:8080"


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the options for the server and the tenant."""
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
    parser.add_argument(
        "--ca-file",
        metavar="FILE",
        help="trust the certificates in FILE (PEM) for https://, instead of the system's"
        " (SSL_CERT_FILE)",
    )


def tls_of(options: argparse.Namespace) -> ssl.SSLContext | None:
    """Return what the client trusts; None for what the system does.

    Raises:
        UsageError: the file can't be read, or has no certificate.
    """
    if options.ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=options.ca_file)
    except ssl.SSLError as error:
        raise UsageError(f"{options.ca_file} holds no certificate in PEM.") from error
    except OSError as error:
        raise UsageError(f"Can't read {options.ca_file}: {error.strerror}.") from error


@contextmanager
def client_failures() -> Iterator[None]:
    """Turn the client's errors into the command's own failures."""
    try:
        yield
    except BadUrl as error:
        raise UsageError(str(error)) from error
    except Unreachable as error:
        raise NoServer(str(error)) from error
    except ClientError as error:
        raise CommandFailed(str(error)) from error
