"""Asks a running daemon for its configuration."""

from __future__ import annotations

import ssl
from typing import Final

import aiohttp
import msgspec

from clevrd.cli import credential, trust
from clevrd.cli.daemon_asking import reason_of
from clevrd.cli.failures import NoServer, UsageError
from clevrd.cli.run_loop import run_until_signal
from clevrd.client import BadUrl
from clevrd.client.address import parse_url, without_password
from clevrd.client.errors import reason_of as reason_of_failure
from clevrd.config_view import ConfigView

_TIMEOUT_S: Final = 10.0
# Four times what the largest configuration file makes.
_MAX_ANSWER_BYTES: Final = 16 << 20


def running_config(url: str, secret: str | None, tls: ssl.SSLContext | None = None) -> ConfigView:
    """Return the configuration that the daemon at ``url`` works with.

    Args:
        secret: the key or token to present.
        tls: what is trusted for https; None for what the system does.

    Raises:
        UsageError: ``url`` names no server.
        NoServer: there is no answer, a refusal, or an answer that is no configuration.
    """
    try:
        base, unix_path = parse_url(url)
    except BadUrl as error:
        raise UsageError(str(error)) from error
    name = url if unix_path else without_password(base)
    try:
        status, body = run_until_signal(_get(f"{base}/config", unix_path, secret, tls))
    except (aiohttp.ClientError, TimeoutError, OSError, UnicodeError) as error:
        why = reason_of_failure(error) if str(error) else "no answer in time"
        advice = (
            f" {trust.ADVICE}" if isinstance(error, aiohttp.ClientConnectorCertificateError) else ""
        )
        raise NoServer(f"Nobody answers at {name}: {why}.{advice}") from error
    if status == 200:
        try:
            return msgspec.json.decode(body, type=ConfigView)
        except msgspec.DecodeError as error:
            raise NoServer(f"{name} answered, but not as clevrd does; check the URL.") from error
    advice = f" {credential.ADVICE}" if status == 401 and secret is None else ""
    raise NoServer(
        f"{name} refused to show its configuration ({status}): {reason_of(status, body)}{advice}"
    )


async def _get(
    url: str, unix_path: str | None, secret: str | None, tls: ssl.SSLContext | None
) -> tuple[int, bytes]:
    connector = (
        aiohttp.UnixConnector(unix_path)
        if unix_path
        else aiohttp.TCPConnector(ssl=True if tls is None else tls)
    )
    headers = {"Authorization": f"Bearer {secret}"} if secret is not None else {}
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
        # A redirect could take the key elsewhere.
        session.get(url, headers=headers, allow_redirects=False) as response,
    ):
        body = bytearray()
        async for piece in response.content.iter_chunked(65_536):
            body += piece
            if len(body) > _MAX_ANSWER_BYTES:
                break
        return response.status, bytes(body)
