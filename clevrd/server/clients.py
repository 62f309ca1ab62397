"""Clients: who they are, what they may do by the rules in force, and the connections they have."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from clevrd.access.control import AccessControl
from clevrd.access.reading import FileReading
from clevrd.address_limit import AddressLimit
from clevrd.admission import Gate
from clevrd.client_addresses import AskedFor, TrustedProxies
from clevrd.config_view import ConfigInForce
from clevrd.connections.poll import Polls
from clevrd.connections.registry import Connections
from clevrd.hub.lifecycle import Told
from clevrd.hub.memory_shares import weights_of
from clevrd.page_check import PageCheck
from clevrd.server.certificates import Certificates
from clevrd.server.messaging import Messaging
from clevrd.server.setup import Setup
from clevrd.tenants import DEFAULT_TENANT
from clevrd.tenants.from_settings import AuthenticatorMaker, Surroundings
from clevrd.tenants.origin_rule import OriginRule
from clevrd.tenants.origins import read_allowed_origins
from clevrd.tenants.settings import Access
from clevrd.tenants.topic_permissions import TopicPermissions

log = logging.getLogger(__name__)


class Clients:
    """The parts that know clients, and what has to change in others when the rules change."""

    def __init__(
        self,
        setup: Setup,
        messaging: Messaging,
        certificates: Certificates,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Put the rules of ``setup`` into force.

        Raises:
            ConfigError: a file that they name can't be used.
        """
        config, access, hub = messaging.config, setup.access, messaging.hub
        self._messaging = messaging
        self.addresses = AddressLimit(
            config.max_connections_per_address, TrustedProxies(), loop.time
        )
        maker = AuthenticatorMaker(
            Surroundings(setup.wall_s, loop.time, hub.tasks.spawn, self._keys_changed)
        )
        authenticator = maker.make(access, setup.folder)
        self.gate = Gate(authenticator, lambda: hub.is_draining, setup.wall_s, hub.shutting_down)
        allowed = read_allowed_origins(config.allowed_origins, access.auth.allowed_origins)
        origins = OriginRule(allowed, loop.time)
        self.pages = PageCheck(origins, self.addresses.asked_for)
        self.connections = self._connections(setup, loop)
        self.polls = Polls(hub, loop)
        # Reads the files that a reload needs.
        self.reading = FileReading()
        self.in_force = _config_in_force(setup, certificates)
        self.access = AccessControl(
            *(maker, authenticator, self.gate, origins, config.allowed_origins),
            *(self.connections, self.polls, hub.tasks),
            *(self._put_into_force, self.in_force, self.reading),
        )
        self._put_into_force(access)

    def asked_for(self, headers: Mapping[str, str], peer: str) -> AskedFor | None:
        """Return what a proxy that is listed now says that its client asked for."""
        return self.addresses.proxies.asked_for(headers, peer)

    def _connections(self, setup: Setup, loop: asyncio.AbstractEventLoop) -> Connections:
        hub = self._messaging.hub
        return Connections(
            hub.counters,
            hub.tasks,
            hub.turns,
            hub.input_budget,
            self._messaging.config,
            loop,
            self.addresses,
            hub.connection_counts,
            self.pages,
            hub.refusals,
            hub.decisions,
            setup.wall_s,
            hub.arrivals,
        )

    def _keys_changed(self) -> None:
        self.access.keys_changed()

    def _put_into_force(self, access: Access) -> None:
        """Have the rules of access hold that are no credentials and no permissions."""
        hub = self._messaging.hub
        proxies = access.auth.trusted_proxies
        if self._messaging.config.proxy_protocol and not proxies:
            log.warning("proxy_protocol is on, and no proxy is listed hint=%r", "trusted_proxies")
        self.addresses.change_proxies(TrustedProxies(proxies))
        is_required = access.auth.mode == "required"
        known = frozenset({DEFAULT_TENANT, *(tenant.name for tenant in access.tenants)})
        hub.connection_counts.know(None if is_required else known)
        hub.rate_limiter.reserve(known)
        self._messaging.sources.know(access)
        hub.share_out(weights_of(access))
        hub.tell_lifecycle(
            {
                each.name: Told(TopicPermissions(each.lifecycle), TopicPermissions(each.presence))
                for each in access.tenants
            }
        )


def _config_in_force(setup: Setup, certificates: Certificates) -> ConfigInForce:
    return ConfigInForce(
        *(setup.config, setup.sources, setup.file, setup.access, setup.wall_s),
        setup.journal_in_force(),
        [each.view() for each in setup.read],
        [each.view() for each in setup.webhooks],
        certificates.view,
    )
