"""Server: one daemon from its building to its end. The parts are built in `server/parts`.

A daemon's life: take the address -> read the state -> remove the state file -> serve (SIGHUP reads
the rules of access again) -> (SIGINT or SIGTERM) -> stop, in the order of `server/stop`. A
second signal ends the process at once. A stop before the state file is removed leaves the file as
it was; a stop after that saves a new one.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from clevrd.errors import CannotStart
from clevrd.server.connection_bound import bound_connections
from clevrd.server.crash import crash
from clevrd.server.journal import read_journal
from clevrd.server.parts import Parts
from clevrd.server.setup import Setup
from clevrd.server.stop import Stop

# How often the listeners are checked.
WATCH_S: Final = 1.0
# How often the handshakes that failed are logged, and certificates that end soon.
TLS_REPORT_S: Final = 60.0
CERTIFICATE_WATCH_S: Final = 86_400.0


class Server:
    """One daemon in one event loop; tests run several side by side."""

    def __init__(self, setup: Setup) -> None:
        """Build the parts.

        Raises:
            ConfigError: a file that the setup names can't be used.
        """
        self.config = setup.config
        self._loop = asyncio.get_running_loop()
        self.parts = Parts(setup, self._loop)
        self.hub = self.parts.messaging.hub
        self.connections = self.parts.clients.connections
        self.access = self.parts.clients.access
        # The stop has left something that did not end; set by `stop`.
        self.is_cut_short = False

    # --- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen and serve, with the topics of the process before if it saved its state.

        Raises:
            CannotStart: the address or the state directory can't be used.
        """
        await self.prepare()
        await self.serve()

    async def prepare(self) -> None:
        """Take the address and read the saved state: the slow part, which changes nothing.

        The call can be cancelled, or undone afterwards by `abandon`.

        Raises:
            CannotStart: the address or the state directory can't be used.
        """
        try:
            await self.parts.ways_in.bind()
            await self.parts.restart.restore()
            await read_journal(self.hub, self._loop)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Undo `prepare`; the saved state stays for the next process."""
        self.parts.ways_in.close()
        self.parts.restart.leave()

    async def serve(self) -> None:
        """Serve, after `prepare`; the saved state is removed here, and `stop` saves it again.

        Raises:
            CannotStart: the saved state can't be removed, or the address not be listened on.
        """
        parts = self.parts
        try:
            await parts.restart.use_up()
        except CannotStart:
            self.abandon()
            raise
        bound_connections(parts.messaging, parts.ways_in)
        try:
            await parts.ways_in.open()
        except CannotStart:
            parts.ways_in.close()
            await parts.restart.save(self._loop.time() + self.config.shutdown_timeout_s)
            raise
        self._watch()
        self.hub.start()
        self.connections.start()
        parts.messaging.sources.start()

    def _watch(self) -> None:
        """Look now and then at the listeners, the certificates and the handshakes."""
        parts = self.parts
        parts.timers.every(WATCH_S, parts.ways_in.reopen_dead)
        if (tls := parts.ways_in.for_clients.tls) is not None:
            parts.certificates.warn()
            parts.timers.every(TLS_REPORT_S, tls.report_failures)
            parts.timers.every(CERTIFICATE_WATCH_S, parts.certificates.warn)

    async def stop(self) -> None:
        """Stop in order, within `shutdown_timeout_s`; acknowledged messages reach their readers."""
        stop = Stop(self.parts, self.config, self._loop)
        await stop.run()
        self.is_cut_short |= stop.is_cut_short

    async def crash(self) -> None:
        """End at once, as a killed process does: no close frames, no flush; for `testing`."""
        await crash(self.parts)

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Count and log an error in a callback, or in a task that no one awaits."""
        self.hub.counters.count_background_error()
        loop.default_exception_handler(context)

    # --- views -----------------------------------------------------------------------------------

    @property
    def addresses(self) -> list[str]:
        """Base URLs of the sockets; none before `start` and after `stop`."""
        return self.parts.ways_in.for_clients.listeners.urls

    @property
    def admin_addresses(self) -> list[str]:
        """Base URLs of the sockets for operators."""
        operators = self.parts.ways_in.for_operators
        return [] if operators is None else operators.listeners.urls

    @property
    def are_sockets_given(self) -> bool:
        """Whether the sockets for clients were handed over."""
        return self.parts.ways_in.for_clients.listeners.are_given

    def is_reached_from_afar(self) -> bool:
        """Whether other machines may reach it: it listens on an address that is no loopback."""
        return self.parts.ways_in.for_clients.listeners.is_beyond_loopback()

    def is_operated_from_afar(self) -> bool:
        """Whether other machines may reach the address for operators."""
        operators = self.parts.ways_in.for_operators
        return operators is not None and operators.listeners.is_beyond_loopback()

    def sentence(self) -> str:
        """Return in one sentence what the daemon does now, for `systemctl status`."""
        trouble = ""
        if (journal := self.hub.journal) is not None and not journal.node.is_well:
            trouble = " The journal takes no messages."
        elif self.hub.is_throttling():
            trouble = " Publishers are throttled."
        return (
            f"Serving {' '.join(self.addresses)}: {self.hub.subscribers} subscribers,"
            f" {len(self.hub.topics)} topics.{trouble}"
        )
