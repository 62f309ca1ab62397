"""TlsContexts: which certificate a handshake is answered with, and the change to new ones.

Handshakes that have begun, and open connections, keep what they began with. Protocol versions and
ALPN: RFC 8446, RFC 7301; names: RFC 6066 §3 (SNI).
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from clevrd.core.message_ids import rfc3339
from clevrd.errors import ConfigError
from clevrd.tls.certificates import (
    check_key_file,
    load_authorities,
    load_pair,
    read_certificate_file,
)
from clevrd.tls.settings import CertificateEntry, TlsSettings

# A certificate that ends sooner is warned of: programs that renew certificates do it 30 days
# before.
WARN_S: Final = 14 * 86_400.0

# RFC 8996 takes the versions before it out of use.
_LEAST_VERSION: Final = ssl.TLSVersion.TLSv1_2
_VERIFY: Final = {
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
}


class Shown(msgspec.Struct, frozen=True):
    """A certificate that clients are shown."""

    cert_file: str
    ends_s: float


class _Loaded(msgspec.Struct, frozen=True):
    """All contexts of one configuration."""

    settings: TlsSettings
    default: ssl.SSLContext
    # Name, or `*.` and what stands behind the first label -> the context for it.
    by_name: dict[str, ssl.SSLContext]
    shown: tuple[Shown, ...]


class TlsContexts:
    """The contexts of the configuration that holds now."""

    def __init__(self, settings: TlsSettings, wall_s: Callable[[], float] = time.time) -> None:
        """Read the files.

        Raises:
            ConfigError: one of them can't be used.
        """
        self._wall_s = wall_s
        self._loaded = _load(settings, wall_s())
        self.asks_for_certificates = settings.client_certificates != "none"

    @property
    def shown(self) -> tuple[Shown, ...]:
        """The certificates, each with its end."""
        return self._loaded.shown

    def view(self) -> dict[str, Any]:
        """Return the settings in force as operators may see them, and what is shown by them."""
        view = self._loaded.settings.view()
        for entry, shown in zip(view["certificates"], self._loaded.shown, strict=True):
            entry["ends_at"] = rfc3339(int(shown.ends_s * 1e6))
        return {**view, "minimum_version": _LEAST_VERSION.name.replace("_", ".")}

    def ends_in_s(self) -> float:
        """Return the seconds until the first of the certificates ends; less than 0 behind it."""
        return min(each.ends_s for each in self._loaded.shown) - self._wall_s()

    def ending_soon(self) -> list[str]:
        """Return a sentence for each certificate that ends within WARN_S."""
        now_s = self._wall_s()
        return [
            f"The certificate in {each.cert_file} ends on {moment_text(each.ends_s)}; renew it."
            for each in self._loaded.shown
            if each.ends_s - now_s < WARN_S
        ]

    def replace(self, settings: TlsSettings) -> None:
        """Read the files, and answer handshakes that begin from now on with them.

        Raises:
            ConfigError: one of them can't be used; then nothing changes.
        """
        self.prepare(settings)()

    def prepare(self, settings: TlsSettings) -> Callable[[], None]:
        """Read the files; return what has handshakes that begin later answered with them.

        Tickets of sessions end with the contexts that gave them, so that nobody resumes a session
        whose certificate would no longer be taken.

        Raises:
            ConfigError: one of them can't be used.
        """
        loaded = _load(settings, self._wall_s())

        def swap() -> None:
            self._loaded = loaded
            self.asks_for_certificates = settings.client_certificates != "none"

        return swap

    def wrap(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> ssl.SSLObject:
        """Return the server's side of a new connection."""
        return self._loaded.default.wrap_bio(incoming, outgoing, server_side=True)


def _load(settings: TlsSettings, now_s: float) -> _Loaded:
    by_name: dict[str, ssl.SSLContext] = {}
    shown: list[Shown] = []
    contexts: list[ssl.SSLContext] = []
    mistakes: list[str] = []
    for entry in settings.certificates:
        try:
            context, names, ends_s = _open(entry, settings, now_s)
        except ConfigError as error:
            mistakes.append(str(error))
            continue
        contexts.append(context)
        shown.append(Shown(entry.cert_file, ends_s))
        for name in names:
            # The first of several certificates with a name is shown for it.
            by_name.setdefault(name, context)
    if mistakes:
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    default = contexts[0]
    if len(contexts) > 1:

        def choose(session: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            found = None if name is None else _find(by_name, name)
            if found is not None and found is not default:
                session.context = found

        default.sni_callback = choose
    return _Loaded(settings, default, by_name, tuple(shown))


def _find(by_name: dict[str, ssl.SSLContext], name: str) -> ssl.SSLContext | None:
    plain = name.lower().removesuffix(".")
    return by_name.get(plain) or by_name.get(f"*.{plain.partition('.')[2]}")


def _open(
    entry: CertificateEntry, settings: TlsSettings, now_s: float
) -> tuple[ssl.SSLContext, tuple[str, ...], float]:
    """Return the context of a certificate, the names it is for, and when it ends."""
    certificate = read_certificate_file(Path(entry.cert_file))
    if certificate.ends_s <= now_s:
        raise ConfigError(
            f"The certificate in {entry.cert_file} ended on"
            f" {moment_text(certificate.ends_s)}; renew it."
        )
    if certificate.begins_s > now_s:
        raise ConfigError(
            f"The certificate in {entry.cert_file} does not hold before"
            f" {moment_text(certificate.begins_s)}; is this machine's clock right?"
        )
    check_key_file(Path(entry.key_file))
    context = new_context()
    load_pair(context, entry.cert_file, entry.key_file)
    if settings.client_certificates != "none":
        load_authorities(context, Path(settings.client_ca_file))
    context.verify_mode = _VERIFY[settings.client_certificates]
    return context, entry.names or certificate.names, certificate.ends_s


def new_context() -> ssl.SSLContext:
    """Return a server's context without a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _LEAST_VERSION
    # A client could ask for new keys again and again, each time for the price of a handshake.
    context.options |= ssl.OP_NO_RENEGOTIATION
    # The server chooses the cipher, which matters to TLS 1.2: forward secrecy and AEAD alone.
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["http/1.1"])
    return context


def moment_text(moment_s: float) -> str:
    """Return a moment, seconds since 1970, as people read it."""
    return datetime.fromtimestamp(moment_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
