"""Reading for a reload: certificates and sources, and whether the rules of access fit them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from clevrd.access.reloading import Reloading
from clevrd.config import Loaded
from clevrd.server.server import Server
from clevrd.server.setup import check_certificates_are_asked_for
from clevrd.service.manager import ServiceManager
from clevrd.sources.settings import sources_of
from clevrd.tenants.settings import Access
from clevrd.tls import tls_of

log = logging.getLogger(__name__)


def reloading_of(
    server: Server, loaded: Loaded, load: Callable[[], Loaded], service: ServiceManager
) -> Reloading:
    """Return what reads the configuration of ``server`` again.

    Args:
        loaded: the configuration that it was started with.
        load: returns the configuration as it is now.
        service: is told of each reload.
    """
    return Reloading(
        server.access,
        loaded,
        load,
        partial(_prepare, server),
        server.parts.clients.reading,
        server.hub.tasks,
        server.hub.counters,
        service,
    )


def _prepare(server: Server, loaded: Loaded, access: Access) -> Callable[[], None]:
    """Read the certificates; return what puts them into force.

    Raises:
        ConfigError: one of them can't be used, or the rules of access don't fit them.
    """
    tls = tls_of(loaded)
    check_certificates_are_asked_for(access, tls)
    read = sources_of(loaded, access)
    put_into_force = server.parts.certificates.prepare(tls)

    def put_and_warn() -> None:
        put_into_force()
        if read != server.parts.messaging.sources.entries:
            log.warning("setting changed, which a restart puts into force setting=sources")

    return put_and_warn
