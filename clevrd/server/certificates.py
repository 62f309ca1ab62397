"""Certificates: those that clients are shown, a reload's change of them, and a warning in time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from clevrd.errors import ConfigError
from clevrd.tls import TlsContexts, TlsSettings
from clevrd.tls.settings import NO_TLS

log = logging.getLogger(__name__)


class Certificates:
    """The certificates of a daemon, which may speak no TLS at all."""

    __slots__ = ("contexts",)

    def __init__(self, settings: TlsSettings) -> None:
        """Read the files.

        Raises:
            ConfigError: one of them can't be used.
        """
        # None where the daemon speaks no TLS.
        self.contexts = TlsContexts(settings) if settings.is_on else None

    def view(self) -> dict[str, Any]:
        """Return what operators may see of the settings in force."""
        return NO_TLS.view() if self.contexts is None else self.contexts.view()

    def ends_in_s(self) -> float | None:
        """Return the seconds until the first of them ends; None where there are none."""
        return None if self.contexts is None else self.contexts.ends_in_s()

    def warn(self) -> None:
        """Log each certificate that ends soon."""
        if self.contexts is not None:
            for sentence in self.contexts.ending_soon():
                log.warning("certificate ends soon why=%s", sentence)

    def prepare(self, settings: TlsSettings) -> Callable[[], None]:
        """Read the files; return what has handshakes that begin later answered with them.

        Raises:
            ConfigError: one of them can't be used, or TLS was off, or would be.
        """
        if (self.contexts is not None) != settings.is_on:
            raise ConfigError("TLS is switched on and off by a restart, not by a reload.")
        if self.contexts is None:
            return lambda: None
        swap = self.contexts.prepare(settings)

        def swap_and_warn() -> None:
            swap()
            self.warn()

        return swap_and_warn
