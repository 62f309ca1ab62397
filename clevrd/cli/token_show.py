"""clevrd token show: what a JSON Web Token says, and whether a configuration would take it.

The configuration's own authenticator judges, so the answer is the daemon's.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import time
from collections.abc import Coroutine, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from clevrd.cli.failures import EXIT_FAILED, UsageError
from clevrd.cli.lines import print_line
from clevrd.cli.permissions import PERMISSIONS
from clevrd.cli.secret_input import read_secret
from clevrd.config import Loaded, load
from clevrd.errors import ClevrdError
from clevrd.http_values import Request
from clevrd.tenants.authenticator import Authenticator
from clevrd.tenants.from_settings import (
    AuthenticatorMaker,
    Surroundings,
    access_of,
    check_jwt_is_installed,
    folder_of,
)
from clevrd.tenants.tenant import Tenant

# RFC 7519 §4.1: the claims that are times.
_TIMES: Final = frozenset({"exp", "nbf", "iat"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option for the configuration that judges the token."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file of settings: say whether a daemon with it would take the token, and why not"
        " (CLEVRD_CONFIG)",
    )


def run(options: argparse.Namespace) -> int:
    """Print what the token says, and return 1 if the configuration would not take it."""
    check_jwt_is_installed("clevrd token")
    path = options.config or os.environ.get("CLEVRD_CONFIG")
    token = read_secret("token")
    header, claims = _read(token)
    now_s = time.time()
    for line in told(header, claims, now_s):
        print_line(line)
    signature = token.rpartition(".")[2]
    print_line(_line("signature", f"{len(signature)} characters, which are not shown"))
    if not path:
        return 0
    try:
        tenant = _judge(token, path)
    except ClevrdError as refusal:
        print_line(_line("taken", f"no: {refusal}"))
        return EXIT_FAILED
    print_line(_line("taken", f"yes, for {_rights(tenant)}"))
    return 0


def _read(token: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    import jwt

    try:
        header = jwt.get_unverified_header(token)
        claims = jwt.decode(token, options={"verify_signature": False})
    except jwt.PyJWTError:
        # The text of the error may hold a part of the token.
        raise UsageError("standard input has no JSON Web Token") from None
    return header, claims


def told(header: Mapping[str, Any], claims: Mapping[str, Any], now_s: float) -> Iterator[str]:
    """Yield a line for each field of a token's header and each claim.

    Args:
        now_s: the wall clock, seconds since 1970.
    """
    for name, value in header.items():
        yield _line(name, _shown(value))
    for name, value in claims.items():
        yield _line(name, _time(value, now_s) if name in _TIMES else _shown(value))


def _line(name: str, text: str) -> str:
    return f"{ascii(name)[1:-1]:<9}  {text}"


def _shown(value: Any) -> str:
    """Return a value on one line, without control characters: a token may be anybody's."""
    if isinstance(value, str):
        return ascii(value)[1:-1]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ", ".join(map(_shown, value))
    return ascii(msgspec.json.encode(value).decode())[1:-1]


def _time(value: Any, now_s: float) -> str:
    """Return a time in UTC, and how far away it is."""
    try:
        text = datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return f"{_shown(value)}, which is no time"
    left_s = value - now_s
    return f"{text}, {'in ' if left_s >= 0 else ''}{_span(left_s)}{' ago' if left_s < 0 else ''}"


def _span(seconds: float) -> str:
    """Return a length of time in its two largest units."""
    rest = round(abs(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def _rights(tenant: Tenant) -> str:
    rights = (
        f"{field}: {_shown(list(getattr(tenant, field).entries)) or 'nothing'}"
        for field in PERMISSIONS
    )
    return "; ".join((f"tenant {tenant.name}", *rights))


def _judge(token: str, path: str) -> Tenant:
    """Return the tenant that a daemon with this configuration would make of the token's bearer.

    Raises:
        ConfigError: the configuration is wrong.
        ClevrdError: the daemon's refusal.
    """
    loaded = load({}, os.environ, path)
    # A key set that can't be fetched is told by the refusal.
    logging.getLogger("clevrd").addHandler(logging.NullHandler())
    authenticator = asyncio.run(_with_keys(loaded))
    head = Request("GET", "/subscribe", {"authorization": f"Bearer {token}"})
    return authenticator.identify(head, {})


async def _with_keys(loaded: Loaded) -> Authenticator:
    """Return the configuration's authenticator, once its key sets are fetched."""
    fetching: list[Coroutine[Any, Any, None]] = []
    around = Surroundings(time.time, time.monotonic, fetching.append, lambda: None)
    authenticator = AuthenticatorMaker(around).make(access_of(loaded), folder_of(loaded))
    await asyncio.gather(*fetching)
    return authenticator
