"""AccessControl: puts changed rules into force, for requests to come and for open connections.

The rules are read from the configuration file elsewhere (`config`, `tenants.settings`), and judged
by the authenticator. This module replaces it, and has every connection judged by the new one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from clevrd.access.reading import FileReading
from clevrd.admission import Gate
from clevrd.config import Loaded
from clevrd.config_view import ConfigInForce
from clevrd.connections.poll import Polls
from clevrd.connections.registry import Connections
from clevrd.scheduling.timers import Tasks
from clevrd.tenants.authenticator import Authenticator
from clevrd.tenants.from_settings import AuthenticatorMaker, read_key_files
from clevrd.tenants.origin_rule import OriginRule
from clevrd.tenants.origins import read_allowed_origins
from clevrd.tenants.settings import Access

log = logging.getLogger(__name__)


class AccessControl:
    """The rules that are in force: who may ask for what."""

    def __init__(
        self,
        maker: AuthenticatorMaker,
        authenticator: Authenticator,
        gate: Gate,
        origins: OriginRule,
        allowed_origins: str,
        connections: Connections,
        polls: Polls,
        tasks: Tasks,
        on_change: Callable[[Access], None],
        in_force: ConfigInForce,
        reading: FileReading,
    ) -> None:
        """Store the parts.

        Args:
            authenticator: the one that ``maker`` made first, which ``gate`` asks.
            allowed_origins: the setting of that name.
            on_change: called with the rules that are put into force, for all else that they say.
        """
        self._maker = maker
        self.tickets = maker.tickets
        self._authenticator = authenticator
        self._gate = gate
        self._origins = origins
        # The setting of that name; changed by apply.
        self._allowed_origins = allowed_origins
        self._connections = connections
        self._polls = polls
        self._tasks = tasks
        self._on_change = on_change
        self._in_force = in_force
        self._reading = reading

    async def apply(self, access: Access, folder: Path, loaded: Loaded | None = None) -> int:
        """Put ``access`` into force, and return how many connections were closed for it.

        Args:
            folder: where the file is that has these rules.
            loaded: the configuration that has them; None leaves all settings as they are.

        Raises:
            ConfigError: a file that it names can't be used; the rules in force stay as they are.
        """
        allowed_origins = self._allowed_origins if loaded is None else loaded.config.allowed_origins
        allowed = read_allowed_origins(allowed_origins, access.auth.allowed_origins)
        keys = await self._reading.run(lambda: read_key_files(access, folder))
        self._authenticator = self._maker.make_with(access, keys)
        self._origins.change(allowed)
        self._allowed_origins = allowed_origins
        self._gate.change(self._authenticator)
        self._in_force.change(access, loaded)
        self._on_change(access)
        return await self._judge_again()

    def keys_changed(self) -> None:
        """Judge again by other keys of an issuer, which the same authenticator has by now."""
        self._gate.change(self._authenticator)
        self._tasks.spawn(self._judge_after_keys())

    async def _judge_after_keys(self) -> None:
        closed = await self._judge_again()
        log.info("keys of an issuer changed connections_closed=%d", closed)

    async def _judge_again(self) -> int:
        # A poll is answered with what there is, and its client is judged when it asks again.
        self._polls.end_all()
        # A round that began before the last change goes on by the newest rules, too.
        return await self._connections.judge_again(
            lambda tenant: self._authenticator.current(tenant)
        )
