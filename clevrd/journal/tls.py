"""The TLS of connections to a journal's servers: whom they trust, and what they show."""

from __future__ import annotations

import ssl

from clevrd.errors import ConfigError


def tls_context(ca_file: str, client_cert_file: str, client_key_file: str) -> ssl.SSLContext:
    """Return what connections are encrypted with; each file may be empty.

    Raises:
        ConfigError: a file can't be used.
    """
    file = ca_file
    try:
        context = ssl.create_default_context(cafile=file or None)
        if file := client_cert_file:
            context.load_cert_chain(file, client_key_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"The journal's certificate file {file} can't be used: {error}; it has to be PEM, and"
            " readable for the daemon."
        ) from error
    return context
