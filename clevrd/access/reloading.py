"""Reloading: reads the configuration again while the daemon runs, and says what became of it.

A configuration that is wrong changes nothing. The rules of a right one are put into force by
`control`; settings outside the tables are read at the start alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from clevrd.access.control import AccessControl
from clevrd.access.reading import FileReading
from clevrd.config import Config, Loaded
from clevrd.config_view import RELOADED
from clevrd.errors import ConfigError
from clevrd.metrics.counters import Counters
from clevrd.scheduling.timers import Tasks
from clevrd.service.manager import ServiceManager
from clevrd.tenants.from_settings import access_of, folder_of
from clevrd.tenants.settings import Access

log = logging.getLogger(__name__)


class Reloading:
    """Reads the configuration again, one time after the other.

    Args:
        loaded: the configuration that the daemon was started with.
        load: returns the configuration as it is now, or raises ConfigError.
        prepare: reads what else a configuration names, the certificates; returns what puts it into
            force, or raises ConfigError. Both are called in a thread.
        service: is told when a reload begins and when all is done.
    """

    def __init__(
        self,
        access: AccessControl,
        loaded: Loaded,
        load: Callable[[], Loaded],
        prepare: Callable[[Loaded, Access], Callable[[], None]],
        reading: FileReading,
        tasks: Tasks,
        counters: Counters,
        service: ServiceManager,
    ) -> None:
        self._access = access
        self._config = loaded.config
        self._load = load
        self._prepare = prepare
        self._reading = reading
        self._tasks = tasks
        self._counters = counters
        self._service = service
        # A reload is under way; another one was asked for meanwhile.
        self._is_busy = False
        self._is_wanted_again = False

    def begin(self) -> None:
        """Read the configuration again now, or after the reload that is under way."""
        self._service.reloading()
        if self._is_busy:
            self._is_wanted_again = True
            return
        self._is_busy = True
        self._tasks.spawn(self._reload_all())

    async def _reload_all(self) -> None:
        try:
            await self._reload()
            while self._is_wanted_again:
                self._is_wanted_again = False
                await self._reload()
        finally:
            self._is_busy = False
            self._service.reloaded()

    async def _reload(self) -> None:
        """Put the rules in the file into force, and log each setting that needs a restart."""
        try:
            loaded, access, put_into_force = await self._reading.run(self._read)
            closed = await self._access.apply(access, folder_of(loaded), loaded)
        except ConfigError as error:
            self._counters.reloads_failed += 1
            for line in str(error).split("\n"):
                log.error("reload refused, nothing has changed why=%r", line)
            return
        put_into_force()
        for field in changed_settings(self._config, loaded.config):
            log.warning("setting changed, which a restart puts into force setting=%s", field)
        self._counters.reloads += 1
        log.info("reloaded file=%s connections_closed=%d", loaded.path, closed)

    def _read(self) -> tuple[Loaded, Access, Callable[[], None]]:
        """Read the file, and all that it names but keys; called in a thread."""
        loaded = self._load()
        access = access_of(loaded)
        return loaded, access, self._prepare(loaded, access)


def changed_settings(before: Config, now: Config) -> list[str]:
    """Return the names of the settings that differ and need a restart, in their order."""
    return [
        field
        for field in Config.__struct_fields__
        if field not in RELOADED and getattr(before, field) != getattr(now, field)
    ]
