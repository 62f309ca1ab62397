"""The options that say which certificates count, and who asks; for commands that ask a daemon."""

from __future__ import annotations

import argparse
import ssl

from clevrd.cli.credential import add_credential
from clevrd.cli.failures import UsageError

# This sentence follows the one about a certificate that the system does not trust.
ADVICE = "Trust it by --ca-file FILE."


def add_trust_and_credential(parser: argparse.ArgumentParser) -> None:
    """Add the options for the certificates and for the file with the credential."""
    parser.add_argument(
        "--ca-file",
        metavar="FILE",
        help="trust the certificates in FILE (PEM) for https://, instead of the system's"
        " (SSL_CERT_FILE)",
    )
    add_credential(parser)


def trust_of(options: argparse.Namespace) -> ssl.SSLContext | None:
    """Return what the command trusts; None for what the system does.

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
