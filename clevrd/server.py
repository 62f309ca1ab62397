"""Composition root: builds the parts, serves, and stops in order. The only module that knows all.

A daemon's life: take the address -> read the state -> remove the state file -> serve (SIGHUP reads
the rules of access again) -> (SIGINT or SIGTERM) -> take no new readers, and send those away that
have everything -> stop accepting -> finish requests -> let readers catch up -> close WebSockets
with 1012, at a pace -> stop background work -> save the state -> exit. A
second signal ends the process at once. A stop before the state file is removed leaves the file as
it was; a stop after that saves a new one.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import uvloop
from aiohttp import http_parser

from clevrd import __version__, logs
from clevrd.access.control import AccessControl
from clevrd.access.reading import FileReading
from clevrd.access.reloading import Reloading
from clevrd.address_limit import AddressLimit
from clevrd.addresses import parse_address
from clevrd.admin_listener import MAX_DESCRIPTORS as ADMIN_DESCRIPTORS
from clevrd.admin_listener import AdminListener
from clevrd.admission import Endpoint, EverybodyOperates, Gate
from clevrd.aiohttp_front.front import AiohttpFront
from clevrd.client_addresses import AskedFor, TrustedProxies
from clevrd.config import Config, Loaded
from clevrd.config_view import ConfigInForce
from clevrd.connections.departures import pace_s
from clevrd.connections.poll import Polls
from clevrd.connections.registry import RESTARTING, Connections
from clevrd.core.patterns import REST
from clevrd.daemon_signals import EXIT_FORCED, DaemonSignals, exit_at_once
from clevrd.descriptors import connections_allowed, raise_limit
from clevrd.errors import (
    CannotStart,
    ClevrdError,
    ConfigError,
    InvalidRequest,
    JournalFull,
    JournalUnavailable,
)
from clevrd.handlers.operate.admin import admin_routes
from clevrd.handlers.operate.configuration import ConfigurationEndpoint
from clevrd.handlers.operate.figures import Figures
from clevrd.handlers.operate.health import HealthEndpoint, ProbeEndpoint
from clevrd.handlers.operate.metrics import MetricsEndpoint, TenantMetricsEndpoint
from clevrd.handlers.operate.top import TopViews
from clevrd.handlers.publishers import publishers
from clevrd.handlers.router import PathRouter
from clevrd.handlers.site.assets import AssetEndpoint
from clevrd.handlers.site.dashboard import DashboardEndpoint
from clevrd.handlers.site.pages import (
    AdminHomeEndpoint,
    Facts,
    HomeEndpoint,
    Whereabouts,
    kept_sentence,
)
from clevrd.handlers.subscribe.endpoint import SubscribeEndpoint, refusal_as_events
from clevrd.handlers.subscribe.ticket import TicketEndpoint
from clevrd.handlers.topics.clear import ClearEndpoint
from clevrd.handlers.topics.endpoint import TopicEndpoint, TopicsEndpoint
from clevrd.handlers.topics.messages import MessagesEndpoint
from clevrd.hub import Hub, Stats
from clevrd.hub.lifecycle import Told
from clevrd.hub.memory_shares import weights_of, with_bodies_that_fit
from clevrd.hub.traced_delivery import delivery_maker
from clevrd.journal.engines import MAX_DESCRIPTORS as JOURNAL_DESCRIPTORS
from clevrd.journal.engines import engine_of
from clevrd.journal.settings import JournalSettings, journal_of, plain_journal_of
from clevrd.listeners import Listeners
from clevrd.metrics.tracing import TracingFigures
from clevrd.page_check import PageCheck
from clevrd.proxy_protocol import UnexpectedProxyHeader, begins_with_header
from clevrd.raw_http import (
    MAX_LINGERING,
    MAX_PROBES,
    PlainGrammar,
    ProxiedConnection,
    RawConnection,
    RawServer,
)
from clevrd.refusals import Refusals
from clevrd.restart.directory import StateDir
from clevrd.scheduling.beside_loop import in_daemon_thread
from clevrd.scheduling.timers import Timers
from clevrd.service.given_sockets import GivenSockets, given_sockets
from clevrd.service.manager import STATUS_EVERY_S, ServiceManager
from clevrd.sources.settings import SourceEntry, sources_of
from clevrd.sources.sources import DESCRIPTORS as SOURCE_DESCRIPTORS
from clevrd.sources.sources import Sources
from clevrd.tenants import DEFAULT_TENANT
from clevrd.tenants.from_settings import AuthenticatorMaker, Surroundings, access_of, folder_of
from clevrd.tenants.origin_rule import OriginRule
from clevrd.tenants.origins import read_allowed_origins
from clevrd.tenants.settings import OPEN, Access
from clevrd.tenants.topic_permissions import TopicPermissions
from clevrd.tls import TlsConnection, TlsContexts, TlsServer, TlsSettings, plain_tls_of, tls_of
from clevrd.tls.server import MAX_BEYOND
from clevrd.tls.server import MAX_LINGERING as MAX_LINGERING_TLS
from clevrd.tracing.settings import TracingSettings, tracing_of
from clevrd.tracing.tracing import make_tracing
from clevrd.webhooks.settings import Webhook, webhooks_of
from clevrd.webhooks.webhooks import Webhooks

log = logging.getLogger(__name__)

# How often the listeners are checked.
WATCH_S: Final = 1.0
# How often the handshakes that failed are logged, and certificates that end soon.
TLS_REPORT_S: Final = 60.0
CERTIFICATE_WATCH_S: Final = 86_400.0

# How long subscribers get to answer the close frame at shutdown.
CLOSE_ALL_TIMEOUT_S: Final = 5.0

# A full collection takes 20 ms in a daemon without a reader, all of it for imported objects, and 15
# ms more with 10,000 readers (measured with gc.collect()). Freezing the imported objects saves the
# first part. Messages are free of cycles, so full collections are made rare to save the second, one
# for 50 million objects (CPython's own thresholds: 700, 10, 10). A collection of 50,000 young
# objects took 34 ms, so there is one for each 5,000: 2 to 4 ms.
GC_THRESHOLDS: Final = (5_000, 5, 2_000)

# Estimate of the time that saving the state takes: a slow disk's 100 MB/s, 20 us for each topic,
# and a second for the positions of topics whose messages no longer fit and for the last flush.
SAVE_BYTES_PER_S: Final = 100_000_000
SAVE_TOPIC_S: Final = 20e-6
SAVE_FINISH_S: Final = 1.0
# Time that saving may take beyond `shutdown_timeout_s`; the systemd unit allows 10 s beyond it
# (systemd/clevrd.service).
SAVE_GRACE_S: Final = 5.0

NO_SOCKETS: Final = GivenSockets()

_POLL_S: Final = 0.02
# The time that systemd is asked to wait for a stop, beyond the one that the daemon takes at most,
# and for a stop of a daemon that has not served yet.
_STOP_BEYOND_S: Final = 5.0
_STOP_BEFORE_SERVING_S: Final = 5.0
# How long a client that has just connected has to send its request.
_NEWCOMERS_S: Final = 0.05
# How long connections that have nothing left to receive get to close.
_CUT_TIMEOUT_S: Final = 0.1
# How long the journal may take to close at least, whatever the stop has taken before.
JOURNAL_STOP_S: Final = 8.0


class Server:
    """One daemon in one event loop; tests run several side by side."""

    def __init__(
        self,
        config: Config,
        access: Access = OPEN,
        folder: Path = Path(),
        *,
        tls: TlsSettings | None = None,
        journal: JournalSettings | None = None,
        read: Sequence[SourceEntry] = (),
        webhooks: Sequence[Webhook] = (),
        tracing: TracingSettings | None = None,
        sources: Mapping[str, str] | None = None,
        file: str = "",
        stats: Stats | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
        given: GivenSockets = NO_SOCKETS,
    ) -> None:
        """Build the parts.

        Args:
            access: who may ask for what.
            folder: where the files are that ``access`` names.
            tls: the certificates; None for those of the plain settings alone.
            journal: where messages are kept; None for what the plain setting says.
            read: streams whose records are taken into topics.
            webhooks: where lifecycle events are posted.
            tracing: where traces are sent; None for what the plain settings say.
            sources: where each setting's value comes from, for operators.
            file: the configuration file, for operators.
            given: sockets that listen already; without any the addresses of the settings count.

        Raises:
            ConfigError: one of these files can't be used.
        """
        self.config = config
        if tls is None:
            tls = plain_tls_of(config)
        check_certificates_are_asked_for(access, tls)
        self._loop = asyncio.get_running_loop()
        started_s = time.monotonic()
        if journal is None:
            journal = plain_journal_of(config)
        # None where nothing is traced.
        self.tracing = make_tracing(tracing or tracing_of(config, {}), self._loop)
        self.hub = Hub(
            config,
            self._loop,
            weights=weights_of(access),
            stats=stats,
            wall_ns=wall_ns,
            engine=engine_of(journal, lambda: wall_ns() // 1000) if journal.is_on else None,
            journaled=journal.patterns,
            max_journaled_topics=journal.max_topics,
            make_delivery=delivery_maker(self.tracing),
        )
        configured, config = config, with_bodies_that_fit(config, self.hub.input_budget.max_bytes)
        if config is not configured:
            log.warning(
                "bodies may be as large as the memory allows max_message_bytes=%d"
                " max_batch_bytes=%d hint=%r",
                config.max_message_bytes,
                config.max_batch_bytes,
                "raise max_memory_mb for larger ones",
            )
        self.sources = Sources(
            *(read, self.hub, config.max_message_bytes, self._loop),
            self.hub.counters.count_background_error,
        )
        self.webhooks = Webhooks(webhooks, self.hub.lifecycle, self._loop)
        self.client_addresses = AddressLimit(
            config.max_connections_per_address, TrustedProxies(), self._loop.time
        )
        wall_s = _seconds_of(wall_ns)
        maker = AuthenticatorMaker(
            Surroundings(wall_s, self._loop.time, self.hub.tasks.spawn, self._keys_changed)
        )
        authenticator = maker.make(access, folder)
        gate = Gate(authenticator, lambda: self.hub.is_draining, wall_s, self.hub.shutting_down)
        allowed = read_allowed_origins(config.allowed_origins, access.auth.allowed_origins)
        origins = OriginRule(allowed, self._loop.time)
        pages = PageCheck(origins, self.client_addresses.asked_for)
        self.connections = Connections(
            self.hub.counters,
            self.hub.tasks,
            self.hub.turns,
            self.hub.input_budget,
            config,
            self._loop,
            self.client_addresses,
            self.hub.connection_counts,
            pages,
            self.hub.refusals,
            wall_s,
            self.hub.arrivals,
        )
        self._polls = Polls(self.hub, self._loop)
        # Reads the files that a reload needs.
        self.reading = FileReading()
        in_force = ConfigInForce(
            *(configured, sources or {}, file, access, wall_s, journal),
            [each.view() for each in read],
            [each.view() for each in webhooks],
        )
        self.access = AccessControl(
            *(maker, authenticator, gate, origins, config.allowed_origins),
            *(self.connections, self._polls, self.hub.tasks),
            self._put_into_force,
            in_force,
            self.reading,
        )
        self._put_into_force(access)
        publish, batch, topic_publish, publish_socket, commands = publishers(
            gate, self.hub, self.connections, config, self.tracing
        )
        subscribe = SubscribeEndpoint(gate, self.hub, self.connections, self._polls, config)
        health = HealthEndpoint(self.hub, started_s)
        live = ProbeEndpoint(lambda: True, "never")
        ready = ProbeEndpoint(self.is_ready, "The daemon is starting or shutting down.")
        probes: dict[str, Endpoint] = {
            "/health": health,
            "/health/live": live,
            "/health/ready": ready,
        }
        figures = Figures(
            *(self.hub, self.count_connections, started_s),
            *(self._certificate_ends_in_s, self.sources.figures, self.webhooks.counts),
            self.tracing_figures,
        )
        metrics = MetricsEndpoint(gate, figures, self.hub.turns)
        configuration = ConfigurationEndpoint(gate, in_force, self.hub.turns)
        whereabouts = Whereabouts(self._asked_for, lambda: self.addresses, is_secure=tls.is_on)
        kept = kept_sentence(
            journal.engine if journal.is_on else "", journal.topics, config.state_dir
        )
        facts = Facts(config.catch_up_messages, kept)
        dashboard = DashboardEndpoint()
        top_views = TopViews(self.hub, self.connections, figures, self._loop.time)
        router = PathRouter(
            {
                "/": {"GET": HomeEndpoint(gate, figures, self.hub.turns, whereabouts, facts)},
                "/dashboard": {"GET": dashboard},
                "/clevrd.js": {"GET": AssetEndpoint("clevrd.js")},
                "/clevrd.d.ts": {"GET": AssetEndpoint("clevrd.d.ts")},
                "/publish": {"POST": publish, "GET": publish_socket},
                "/publish/batch": {"POST": batch},
                "/subscribe": {"GET": subscribe},
                "/topics": {"GET": TopicsEndpoint(gate, self.hub)},
                "/topics/*": {"GET": TopicEndpoint(gate, self.hub)},
                "/topics/*/messages": {
                    "GET": MessagesEndpoint(gate, self.hub),
                    "POST": topic_publish,
                    "DELETE": ClearEndpoint(gate, self.hub),
                },
                "/ticket": {"POST": TicketEndpoint(gate, maker.tickets)},
                "/ws": {"GET": commands},
                "/health": {"GET": health},
                "/health/live": {"GET": live},
                "/health/ready": {"GET": ready},
                "/metrics": {"GET": metrics},
                "/metrics/tenants": {"GET": TenantMetricsEndpoint(gate, figures, self.hub.turns)},
                "/config": {"GET": configuration},
                **admin_routes(gate, self.hub, self.connections, top_views),
            }
        )
        refusals = self.hub.refusals.with_events(refusal_as_events)
        self._front = AiohttpFront(
            *(gate, pages, router, refusals),
            *(self.hub.turns, self.hub.input_budget, self.client_addresses, config),
        )
        self._http = self._front.server
        grammar = PlainGrammar(
            publish,
            {"/publish": publish_socket, "/subscribe": subscribe, "/ws": commands},
            config.max_message_bytes,
        )
        self.raw_server = RawServer(
            gate=gate,
            pages=pages,
            grammar=grammar if config.raw_paths else None,
            probes=probes,
            refusals=refusals,
            addresses=self.client_addresses,
            make_aiohttp_protocol=self._http,
            count_handed_over=self._count_handed_over,
            counters=self.hub.counters,
            tasks=self.hub.tasks,
            turns=self.hub.turns,
            budget=self.hub.input_budget,
            config=config,
            max_connections=config.max_connections or 1,
            loop=self._loop,
        )
        make_protocol: Callable[[], asyncio.Protocol] = partial(RawConnection, self.raw_server)
        # None where the daemon speaks no TLS.
        self._tls: TlsServer | None = None
        if tls.is_on:
            self._tls = TlsServer(
                TlsContexts(tls),
                make_protocol,
                self.raw_server.is_full,
                partial(self._answer_plain, refusals),
                self.client_addresses,
                self.hub.counters,
                self.hub.turns,
                self.hub.input_budget,
                config,
                self._loop,
            )
            make_protocol = partial(TlsConnection, self._tls)
        if config.proxy_protocol:
            # The header comes first, and in the clear, also where a handshake follows it.
            make_protocol = partial(ProxiedConnection, self.raw_server, make_protocol)
        self._listeners = Listeners(
            parse_address(config.address),
            config.send_buffer_bytes,
            make_protocol,
            self._loop,
            is_secure=tls.is_on,
            given=given.clients,
        )
        # None without an address for operators.
        self._admin: AdminListener | None = None
        if config.admin_address:
            everybody = EverybodyOperates()
            admin_metrics = MetricsEndpoint(everybody, figures, self.hub.turns)
            self._admin = AdminListener(
                parse_address(config.admin_address),
                gate,
                pages,
                PathRouter(
                    {
                        "/": {
                            "GET": AdminHomeEndpoint(
                                Whereabouts(self._asked_for, lambda: self.admin_addresses)
                            )
                        },
                        "/dashboard": {"GET": dashboard},
                        "/health": {"GET": health},
                        "/health/live": {"GET": live},
                        "/health/ready": {"GET": ready},
                        "/metrics": {"GET": admin_metrics},
                        "/metrics/tenants": {
                            "GET": TenantMetricsEndpoint(everybody, figures, self.hub.turns)
                        },
                        "/config": {
                            "GET": ConfigurationEndpoint(everybody, in_force, self.hub.turns)
                        },
                        **admin_routes(everybody, self.hub, self.connections, top_views),
                    }
                ),
                probes,
                self.hub,
                self.client_addresses,
                config,
                self._loop,
                given.operators,
            )
        elif given.operators:
            log.warning("sockets for operators not taken hint=%r", "set admin_address, too")
            for unused in given.operators:
                unused.close()
        # A journal has every topic.
        self._keeps_all_topics = journal.is_on and REST in journal.topics
        self._timers = Timers(self._loop, self.hub.counters.count_background_error)
        # The stop has left something that did not end; set by `stop`.
        self.is_cut_short = False
        self._state = StateDir(config.state_dir, self._loop.time) if config.state_dir else None

    def _asked_for(self, headers: Mapping[str, str], peer: str) -> AskedFor | None:
        """Return what a proxy that is listed now says that its client asked for."""
        return self.client_addresses.proxies.asked_for(headers, peer)

    def _put_into_force(self, access: Access) -> None:
        """Have the rules of access hold that are no credentials and no permissions."""
        proxies = access.auth.trusted_proxies
        if self.config.proxy_protocol and not proxies:
            log.warning("proxy_protocol is on, and no proxy is listed hint=%r", "trusted_proxies")
        self.client_addresses.change_proxies(TrustedProxies(proxies))
        is_required = access.auth.mode == "required"
        known = frozenset({DEFAULT_TENANT, *(tenant.name for tenant in access.tenants)})
        self.hub.connection_counts.know(None if is_required else known)
        self.hub.rate_limiter.reserve(known)
        self.sources.know(access)
        self.hub.share_out(weights_of(access))
        self.hub.tell_lifecycle(
            {
                each.name: Told(TopicPermissions(each.lifecycle), TopicPermissions(each.presence))
                for each in access.tenants
            }
        )

    def _keys_changed(self) -> None:
        self.access.keys_changed()

    @property
    def addresses(self) -> list[str]:
        """Base URLs of the sockets; none before `start` and after `stop`."""
        return self._listeners.urls

    @property
    def are_sockets_given(self) -> bool:
        """Whether the sockets for clients were handed over."""
        return self._listeners.are_given

    @property
    def admin_addresses(self) -> list[str]:
        """Base URLs of the sockets for operators."""
        return [] if self._admin is None else self._admin.listeners.urls

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

    def is_ready(self) -> bool:
        """Whether the daemon serves its clients: started, listening and not draining."""
        return self._listeners.is_listening() and not self.hub.is_draining

    def is_reached_from_afar(self) -> bool:
        """Whether other machines may reach it: it listens on an address that is no loopback."""
        return self._listeners.is_beyond_loopback()

    def is_operated_from_afar(self) -> bool:
        """Whether other machines may reach the address for operators."""
        return self._admin is not None and self._admin.listeners.is_beyond_loopback()

    def count_connections(self) -> dict[str, int]:
        """Return how many connections are open, by what they are at the moment."""
        streams = self.connections.streams
        shaking = {} if self._tls is None else {"tls_handshake": self._tls.handshakes}
        admin = 0 if self._admin is None else self._admin.open_connections
        return {
            **shaking,
            "http": len(self.raw_server.open) + self._http.open_connections + admin,
            "websocket": len(self.connections) - streams,
            "stream": streams,
        }

    def _count_handed_over(self) -> int:
        """Return how many connections there are beside those of the raw server."""
        count = self._http.open_connections + len(self.connections)
        return count if self._tls is None else count + self._tls.handshakes

    def _certificate_ends_in_s(self) -> float | None:
        return None if self._tls is None else self._tls.contexts.ends_in_s()

    def _answer_plain(self, refusals: Refusals, data: bytes) -> bytes:
        """Return the answer to ``data``, with which a connection began in the place of TLS."""
        error: ClevrdError = InvalidRequest(
            "This port speaks TLS; ask for https:// or wss:// instead."
        )
        if begins_with_header(data):
            error = UnexpectedProxyHeader()
        return self.raw_server.render(refusals.response(error, None), must_close=True)

    def prepare_tls(self, settings: TlsSettings) -> Callable[[], None]:
        """Read the certificates; return what has handshakes that begin later answered with them.

        Raises:
            ConfigError: one of them can't be used, or TLS was off, or would be.
        """
        if (self._tls is not None) != settings.is_on:
            raise ConfigError("TLS is switched on and off by a restart, not by a reload.")
        if self._tls is None:
            return lambda: None
        swap = self._tls.contexts.prepare(settings)

        def swap_and_warn() -> None:
            swap()
            self._warn_of_certificates()

        return swap_and_warn

    def _warn_of_certificates(self) -> None:
        if self._tls is not None:
            for sentence in self._tls.contexts.ending_soon():
                log.warning("certificate ends soon why=%s", sentence)

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
        await self._listeners.bind()
        try:
            if self._admin is not None:
                await self._admin.listeners.bind()
            if self._state is not None:
                await self._restore_state(self._state)
            await self._start_journal()
        except BaseException:
            self.abandon()
            raise

    async def _start_journal(self) -> None:
        """Read the journal to its end.

        Raises:
            CannotStart: it can't be used.
        """
        journal = self.hub.journal
        if journal is None:
            return
        began_s = self._loop.time()
        try:
            await journal.node.start()
        except (JournalUnavailable, JournalFull) as error:
            raise CannotStart(str(error)) from error
        log.info(
            "journal read engine=%s topics=%d took_s=%.3f",
            journal.engine.name,
            journal.node.topics,
            self._loop.time() - began_s,
        )

    async def _stop_journal(self, end_s: float) -> None:
        """Close the journal; leave it as a kill does if its disk or its server holds that up."""
        if self.hub.journal is None:
            return
        self.hub.seal()
        closing = self._loop.create_task(self.hub.journal.node.stop())
        timeout_s = max(JOURNAL_STOP_S, end_s - self._loop.time())
        if (await asyncio.wait({closing}, timeout=timeout_s))[0]:
            await closing
            return
        self.is_cut_short = True
        log.error(
            "journal not closed waited_s=%g; the process ends without it, as if it were killed:"
            " see whether its disk or its server hangs",
            timeout_s,
        )

    def abandon(self) -> None:
        """Undo `prepare`; the saved state stays for the next process."""
        self._close_listeners()
        if self._state is not None:
            self._state.close()

    async def serve(self) -> None:
        """Serve, after `prepare`; the saved state is removed here, and `stop` saves it again.

        Raises:
            CannotStart: the saved state can't be removed, or the address not be listened on.
        """
        # The saved state is removed before a message can be accepted: read again after a crash, the
        # state would give out offsets a second time.
        if self._state is not None:
            try:
                await _beside_loop(self._state.use_up, self._loop)
            except CannotStart:
                self.abandon()
                raise
        self._bound_connections()
        try:
            await self._listeners.open()
            if self._admin is not None:
                await self._admin.listeners.open()
        except CannotStart:
            self._close_listeners()
            if self._state is not None:
                end_s = self._loop.time() + self.config.shutdown_timeout_s
                await self._save_state(end_s)
            raise
        self._timers.every(WATCH_S, self.watch_listeners)
        if self._tls is not None:
            self._warn_of_certificates()
            self._timers.every(TLS_REPORT_S, self._tls.report_failures)
            self._timers.every(CERTIFICATE_WATCH_S, self._warn_of_certificates)
        self.hub.start()
        self.connections.start()
        self.sources.start()

    def _bound_connections(self) -> None:
        """Set the bound on connections: the setting, cut to what the descriptors allow."""
        wanted = self.config.max_connections
        listeners, beyond = self._listeners.count, MAX_PROBES + MAX_LINGERING
        if self._tls is not None:
            beyond += MAX_BEYOND + MAX_LINGERING_TLS
        if self._admin is not None:
            listeners += self._admin.listeners.count
            beyond += ADMIN_DESCRIPTORS
        if self.hub.journal is not None:
            beyond += JOURNAL_DESCRIPTORS
        beyond += SOURCE_DESCRIPTORS * len(self.sources.entries)
        allowed = connections_allowed(listeners, beyond)
        if wanted > allowed:
            log.warning(
                "max_connections is more than descriptors allow wanted=%d taken=%d", wanted, allowed
            )
        self.raw_server.max_connections = min(wanted or allowed, allowed)
        self.hub.connection_counts.bound(self.raw_server.max_connections)

    async def stop(self) -> None:
        """Stop in order, within `shutdown_timeout_s`; acknowledged messages reach their readers."""
        now_s = self._loop.time()
        end_s = now_s + self.config.shutdown_timeout_s
        deadline_s = end_s - self._saving_takes_s()
        # The answers to the last goodbyes have their time within the deadline.
        drained_by_s = min(now_s + self.config.drain_s, deadline_s - CLOSE_ALL_TIMEOUT_S)
        over_s = pace_s(len(self.connections), drained_by_s - now_s)
        serves_publishers = self._keeps_what_is_published()
        back_at_s = now_s + over_s if self._is_alone() else now_s
        self.hub.begin_drain(back_at_s, serves_publishers=serves_publishers)
        if count := len(self.connections):
            log.info(
                "draining connections=%d over_s=%.1f publishers_served=%s",
                count,
                over_s,
                serves_publishers,
            )
        if serves_publishers:
            await self._take_step(self._polls.end_all)
            if over_s > 0:
                await self._take_step(lambda: self._send_away(over_s))
        for step in (
            # A client that has connected just now is still served where publishers are.
            self._close_listeners,
            self._hear_newcomers,
            self.hub.refuse_publishers,
            self._timers.stop,
            self.sources.stop,
            self.raw_server.close_idle,
            self._polls.end_all,
            lambda: self._finish_requests(deadline_s),
            lambda: self.hub.drain(deadline_s),
            lambda: self._close_connections(deadline_s, drained_by_s),
            lambda: self._close_http(deadline_s),
            self._stop_tls,
            self._end_admin,
            self.raw_server.stop,
            self.connections.stop,
            self.hub.stop,
            self.webhooks.stop,
            lambda: self._stop_journal(end_s),
            lambda: self._save_state(end_s),
            self._stop_tracing,
        ):
            await self._take_step(step)

    async def _hear_newcomers(self) -> None:
        """Let clients ask that have connected just now, where a restart is to refuse none."""
        if self._listeners.are_given:
            await asyncio.sleep(_NEWCOMERS_S)

    async def _stop_tracing(self) -> None:
        if self.tracing is not None:
            await self.tracing.sender.stop()

    def tracing_figures(self) -> TracingFigures | None:
        """Return how many spans were sent and dropped; None where nothing is traced."""
        if self.tracing is None:
            return None
        sender = self.tracing.sender
        return TracingFigures(sender.counts(), sender.waiting())

    def _stop_tls(self) -> None:
        if self._tls is not None:
            self._tls.report_failures()
            self._tls.stop()

    def _close_listeners(self) -> None:
        for listeners in self._all_listeners():
            listeners.close()

    async def _end_admin(self) -> None:
        if self._admin is not None:
            await self._admin.end(_CUT_TIMEOUT_S)

    async def _take_step(self, step: Callable[[], Awaitable[None] | None]) -> None:
        """Take one step of the stop; log and count its failure, so that the next step follows.

        Without this, a fault in one connection could keep the others from their close frames, and
        the topics from being saved.
        """
        try:
            waited_for = step()
            if waited_for is not None:
                await waited_for
        except Exception:
            self.hub.counters.count_background_error()
            log.exception("a step of the stop failed; the others are taken all the same")

    async def _send_away(self, over_s: float) -> None:
        """Close the readers that have everything, while publishers and the others go on."""
        left = await self.connections.send_away(
            RESTARTING, "restarting", over_s, is_alone=self._is_alone()
        )
        log.info("readers sent away count=%d", left)

    async def _close_connections(self, deadline_s: float, drained_by_s: float) -> None:
        now_s = self._loop.time()
        over_s = pace_s(len(self.connections), drained_by_s - now_s)
        timeout_s = min(CLOSE_ALL_TIMEOUT_S, max(_CUT_TIMEOUT_S, deadline_s - over_s - now_s))
        await self.connections.close_all(
            RESTARTING, "restarting", timeout_s, over_s=over_s, is_alone=self._is_alone()
        )

    def _keeps_what_is_published(self) -> bool:
        """Whether what is accepted now is there for readers that come back after the stop."""
        return self._keeps_all_topics or (self._state is not None and self._state.is_open)

    def _is_alone(self) -> bool:
        """Whether no other daemon has this one's topics, so that nobody can go on elsewhere."""
        journal = self.hub.journal
        return journal is None or not journal.engine.is_shared

    async def crash(self) -> None:
        """End at once, as a killed process does: no close frames, no flush; for `testing`."""
        self.hub.is_draining = True
        self._timers.stop()
        self._close_listeners()
        await self.sources.crash()
        self.connections.stop()
        for transport in self.connections.transports():
            transport.abort()
        self._stop_tls()
        self.raw_server.stop()
        await self._http.shutdown(0)
        if self._admin is not None:
            await self._admin.end(0)
        self.hub.stop()
        if self.tracing is not None:
            self.tracing.sender.abandon()
        if self.hub.journal is not None:
            await self.hub.journal.node.crash()
        if self._state is not None:
            # The kernel releases the lock of a killed process in the same way; no state was saved.
            self._state.close()

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Count and log an error in a callback, or in a task that no one awaits."""
        self.hub.counters.count_background_error()
        loop.default_exception_handler(context)

    def watch_listeners(self) -> None:
        """Open listeners again that no longer listen."""
        for listeners in self._all_listeners():
            if not listeners.is_listening():
                self.hub.tasks.spawn(self._reopen(listeners))

    def _all_listeners(self) -> list[Listeners]:
        admin = [] if self._admin is None else [self._admin.listeners]
        return [self._listeners, *admin]

    async def _reopen(self, listeners: Listeners) -> None:
        try:
            await listeners.reopen_if_dead()
        except CannotStart as error:
            # The next check is a second away; until then /health/ready says no.
            log.error("listener can't be opened again reason=%s", error)

    # --- over a planned restart ------------------------------------------------------------------

    async def _restore_state(self, state: StateDir) -> None:
        """Take over the topics of the process before.

        Raises:
            CannotStart: the directory can't be used.
        """
        began_s = self._loop.time()
        # The file is read beside the loop, so that a stop signal works meanwhile, in a thread that
        # a stop need not wait for.
        await _beside_loop(lambda: _open_and_read(state, self.hub), self._loop)
        log.info(
            "state restored topics=%d ring_bytes=%d took_s=%.3f",
            len(self.hub.topics),
            self.hub.topics.ring_bytes,
            self._loop.time() - began_s,
        )

    def _saving_takes_s(self) -> float:
        """Return the seconds of the shutdown kept for saving: an estimate, at most half of all."""
        if self._state is None or not self._state.is_open:
            return 0.0
        topics = self.hub.topics
        wanted_s = SAVE_FINISH_S + topics.ring_bytes / SAVE_BYTES_PER_S
        return min(self.config.shutdown_timeout_s / 2, wanted_s + len(topics) * SAVE_TOPIC_S)

    async def _save_state(self, end_s: float) -> None:
        """Save every topic's position, and as many messages as there is time for."""
        state = self._state
        if state is None or not state.is_open:
            return
        # A publish that the stop cut off may not add a message after its topic's position was
        # saved.
        self.hub.seal()
        began_s = self._loop.time()
        until_s = end_s - min(SAVE_FINISH_S, self.config.shutdown_timeout_s / 4)
        try:
            report = await asyncio.wait_for(
                _beside_loop(
                    lambda: state.save(self.hub.last_id_us, self.hub.saved(), until_s), self._loop
                ),
                max(end_s - began_s, 0.0) + SAVE_GRACE_S,
            )
        except (OSError, TimeoutError) as error:
            reason = str(error) or "the disk took too long"
            log.error("state not saved reason=%r; every topic begins a new epoch", reason)
            # The thread may still be writing, so the lock is kept until the process ends.
            return
        log.info(
            "state saved topics=%d without_messages=%d bytes=%d took_s=%.3f",
            report.topics,
            report.without_messages,
            report.size_bytes,
            self._loop.time() - began_s,
        )
        state.close()

    async def _close_http(self, deadline_s: float) -> None:
        """Close HTTP connections, once requests that came meanwhile are answered.

        aiohttp's own shutdown would use up its whole timeout for a request that has only just
        begun.
        """
        self.raw_server.close_idle()
        self._http.pre_shutdown()
        if self._admin is not None:
            self._admin.close_idle()
        await self._finish_requests(deadline_s)
        await self._http.shutdown(_CUT_TIMEOUT_S)

    def _requests_under_way(self) -> int:
        admin = 0 if self._admin is None else self._admin.count_under_way()
        served = self._front.in_flight + self.raw_server.count_under_way()
        return served + admin + len(self.hub.tasks)

    async def _finish_requests(self, deadline_s: float) -> None:
        """Wait for requests that are not answered yet, until ``deadline_s`` at most."""
        while count := self._requests_under_way():
            if self._loop.time() >= deadline_s:
                log.warning("requests cut at shutdown count=%d", count)
                return
            await asyncio.sleep(_POLL_S)


def check_certificates_are_asked_for(access: Access, tls: TlsSettings) -> None:
    """Raise ConfigError where tenants have certificates that no client would be asked for."""
    if tls.client_certificates != "none":
        return
    for tenant in access.tenants:
        if tenant.client_certificates:
            raise ConfigError(
                f"The tenant {tenant.name} has client_certificates, and clients are asked for none;"
                ' set client_certificates = "optional" and client_ca_file in [tls].'
            )


def _prepare_reload(server: Server, loaded: Loaded, access: Access) -> Callable[[], None]:
    tls = tls_of(loaded)
    check_certificates_are_asked_for(access, tls)
    read = sources_of(loaded, access)
    put_into_force = server.prepare_tls(tls)

    def put_and_warn() -> None:
        put_into_force()
        if read != server.sources.entries:
            log.warning("setting changed, which a restart puts into force setting=sources")

    return put_and_warn


def _seconds_of(wall_ns: Callable[[], int]) -> Callable[[], float]:
    return lambda: wall_ns() / 1e9


def _open_and_read(state: StateDir, hub: Hub) -> None:
    state.open()
    state.read(hub.restore)


_beside_loop = partial(in_daemon_thread, name="clevrd-state")


# --- the process ---------------------------------------------------------------------------------


def run(loaded: Loaded, load: Callable[[], Loaded]) -> int:
    """Run the daemon until a signal ends it; return the exit code.

    Args:
        loaded: the configuration.
        load: returns the configuration as it is at a SIGHUP.

    Raises:
        ConfigError: the configuration is wrong.
        CannotStart: the address can't be listened on, or aiohttp lacks its C parser.
    """
    # The descriptors that are handed over are looked at before others are opened.
    given = given_sockets(os.environ, os.getpid())
    access = access_of(loaded)
    logs.log_what_python_says()
    faulthandler.enable()
    _check_parser()
    raise_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve_and_tell(loaded, access, load, given))


async def _serve_and_tell(
    loaded: Loaded, access: Access, load: Callable[[], Loaded], given: GivenSockets
) -> int:
    """Serve until a signal, and tell systemd about it, also why the daemon can't."""
    service = ServiceManager.from_environ(os.environ, os.getpid(), asyncio.get_running_loop())
    try:
        return await _serve(loaded, access, load, given, service)
    except (CannotStart, ConfigError) as error:
        service.status(str(error))
        raise
    finally:
        service.close()


async def _serve(
    loaded: Loaded,
    access: Access,
    load: Callable[[], Loaded],
    given: GivenSockets,
    service: ServiceManager,
) -> int:
    loop = asyncio.get_running_loop()
    # Without a file there is nothing to read again, and SIGHUP stops the daemon.
    tls = tls_of(loaded)
    signals = DaemonSignals(loop, reloads=bool(loaded.path) or tls.is_on)
    signals.install()
    server = Server(
        *(loaded.config, access, folder_of(loaded)),
        tls=tls,
        journal=journal_of(loaded),
        read=sources_of(loaded, access),
        webhooks=webhooks_of(loaded),
        tracing=tracing_of(loaded.config, os.environ),
        sources=loaded.sources,
        file=loaded.path,
        given=given,
    )
    reloading = Reloading(
        server.access,
        loaded,
        load,
        partial(_prepare_reload, server),
        server.reading,
        server.hub.tasks,
        server.hub.counters,
        service,
    )
    loop.set_exception_handler(server.on_loop_error)
    # The thresholds are set before `prepare`: with CPython's own, 100,000 restored topics would be
    # scanned again and again.
    gc.set_threshold(*GC_THRESHOLDS)
    with service.extending("Starting: what was saved is read."):
        is_prepared = await _unless(signals.stopping, server.prepare())
        if is_prepared:
            await server.serve()
    if not is_prepared:
        service.stopping(_STOP_BEFORE_SERVING_S)
        server.abandon()
        log.info("stopped before it served; what was saved is as it was")
    else:
        _quiet_collector()
        _greet(server, access)
        if loaded.sources.get("drain_s") != "default":
            _warn_of_drain(server.config)
        signals.on_reload = reloading.begin
        with _telling_status(server, service):
            await signals.stopping.wait()
        await _stop(server, service)
    signals.finish(0)
    return 0


@contextmanager
def _telling_status(server: Server, service: ServiceManager) -> Iterator[None]:
    """Say that the daemon is ready, and then now and then what it does."""
    service.ready(server.sentence())
    timers = Timers(asyncio.get_running_loop(), server.hub.counters.count_background_error)
    if service.is_told:
        timers.every(STATUS_EVERY_S, lambda: service.status(server.sentence()))
    try:
        yield
    finally:
        timers.stop()


async def _stop(server: Server, service: ServiceManager) -> None:
    within_s = server.config.shutdown_timeout_s + SAVE_GRACE_S + _STOP_BEYOND_S
    service.stopping(within_s)
    with service.extending("Stopping: readers are sent away, topics are saved.", within_s):
        await server.stop()
    if server.is_cut_short:
        # A thread that hangs would hold the interpreter's own end up as well.
        exit_at_once(EXIT_FORCED)
    log.info("stopped")


async def _unless(stopping: asyncio.Event, preparing: Coroutine[Any, Any, None]) -> bool:
    """Run ``preparing`` until it ends or ``stopping`` is set; return whether to go on."""
    task = asyncio.ensure_future(preparing)
    told = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({task, told}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        told.cancel()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    return not stopping.is_set()


def _greet(server: Server, access: Access) -> None:
    for url in server.addresses:
        log.info("listening version=%s address=%s pid=%d", __version__, url, os.getpid())
    if server.are_sockets_given:
        log.info("sockets are from systemd; the setting address does not count")
    has_terminal = os.isatty(logs.STDERR)
    if has_terminal:
        url = server.addresses[0]
        command = _own_command()
        log.info("try subscribe:  %s subscribe demo --url %s", command, url)
        log.info("try publish:    %s publish demo '{\"hello\":1}' --url %s", command, url)
    for admin_url in server.admin_addresses:
        log.info("for operators address=%s", admin_url)
    if server.is_operated_from_afar():
        log.warning(
            "admin_address is reached from other machines: everyone who reaches it sees all tenants"
            " hint=%r",
            "keep it on a private network",
        )
    reached = [*server.admin_addresses, *server.addresses]
    urls = [each for each in reached if not each.startswith("unix:")]
    if has_terminal and urls:
        log.info("try look:       curl %s/metrics", urls[0])
    if access.auth.mode == "open":
        if server.is_reached_from_afar():
            log.warning(
                "open: everyone who reaches the address may publish and subscribe as any tenant"
                " hint=%r",
                'set mode = "required" in [auth], or listen on 127.0.0.1',
            )
        else:
            log.info("open: every program of this machine may publish and subscribe as any tenant")


def _warn_of_drain(config: Config) -> None:
    """Say that a drain which was asked for does not fit into the time of a stop."""
    fits_s = max(0.0, config.shutdown_timeout_s - CLOSE_ALL_TIMEOUT_S)
    if config.drain_s > fits_s:
        log.warning(
            "drain_s is more than fits into shutdown_timeout_s wanted=%g taken=%g hint=%r",
            config.drain_s,
            fits_s,
            f"raise shutdown_timeout_s to {config.drain_s + CLOSE_ALL_TIMEOUT_S:g} or more",
        )


def _own_command() -> str:
    """Return the command that started this program, for examples that can be copied."""
    name = sys.argv[0]
    return name if os.path.basename(name) == "clevrd" else f"{sys.executable} -m clevrd"


def _check_parser() -> None:
    """Refuse to run on aiohttp's Python parser: slower, and laxer about what is HTTP."""
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise CannotStart(
            "aiohttp's C parser is missing; install aiohttp from a wheel, without"
            " AIOHTTP_NO_EXTENSIONS."
        )


def _quiet_collector() -> None:
    """Keep the collector from scanning objects that live as long as the process."""
    gc.collect()
    gc.freeze()
