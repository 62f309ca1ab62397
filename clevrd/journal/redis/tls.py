"""The TLS of connections to Redis: whom they trust, and the certificate that they show."""

from __future__ import annotations

import ssl

from clevrd.errors import ConfigError
from clevrd.journal.redis.settings import RedisSettings


def tls_context(settings: RedisSettings) -> ssl.SSLContext | None:
    """Return what connections are encrypted with; None for plain ones.

    Raises:
        ConfigError: a file can't be used.
    """
    if not settings.address.is_tls:
        return None
    file = settings.ca_file
    try:
        context = ssl.create_default_context(cafile=file or None)
        if file := settings.client_cert_file:
            context.load_cert_chain(file, settings.client_key_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"The journal's certificate file {file} can't be used: {error}; it has to be PEM, and"
            " readable for the daemon."
        ) from error
    return context
