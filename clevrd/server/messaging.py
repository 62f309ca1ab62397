"""Messaging: the hub, what brings messages into it, and what its events and spans are sent to."""

from __future__ import annotations

import asyncio
import logging

from clevrd.config import Config
from clevrd.hub import Hub
from clevrd.hub.memory_shares import weights_of, with_bodies_that_fit
from clevrd.hub.traced_delivery import delivery_maker
from clevrd.journal.engines import engine_of
from clevrd.metrics.tracing import TracingFigures
from clevrd.server.setup import Setup
from clevrd.sources.sources import Sources
from clevrd.tracing.tracing import Tracing, make_tracing
from clevrd.webhooks.webhooks import Webhooks

log = logging.getLogger(__name__)


class Messaging:
    """The parts that messages go through, without the clients that they come from and go to."""

    __slots__ = ("config", "hub", "sources", "tracing", "webhooks")

    def __init__(self, setup: Setup, loop: asyncio.AbstractEventLoop) -> None:
        # None where nothing is traced.
        self.tracing = make_tracing(setup.tracing_in_force(), loop)
        self.hub = _hub_of(setup, self.tracing, loop)
        # The settings, with bodies no larger than the memory allows.
        self.config = _with_bodies_that_fit(setup.config, self.hub)
        self.sources = Sources(
            *(setup.read, self.hub, self.config.max_message_bytes, loop),
            self.hub.counters.count_background_error,
        )
        self.webhooks = Webhooks(setup.webhooks, self.hub.lifecycle, loop)

    def tracing_figures(self) -> TracingFigures | None:
        """Return how many spans were sent and dropped; None where nothing is traced."""
        if self.tracing is None:
            return None
        sender = self.tracing.sender
        return TracingFigures(sender.counts(), sender.waiting())


def _hub_of(setup: Setup, tracing: Tracing | None, loop: asyncio.AbstractEventLoop) -> Hub:
    journal, wall_ns = setup.journal_in_force(), setup.wall_ns
    return Hub(
        setup.config,
        loop,
        weights=weights_of(setup.access),
        stats=setup.stats,
        wall_ns=wall_ns,
        engine=engine_of(journal, lambda: wall_ns() // 1000) if journal.is_on else None,
        journaled=journal.patterns,
        max_journaled_topics=journal.max_topics,
        make_delivery=delivery_maker(tracing),
    )


def _with_bodies_that_fit(config: Config, hub: Hub) -> Config:
    """Return the settings that the memory allows; log if they are not the configured ones."""
    fitting = with_bodies_that_fit(config, hub.input_budget.max_bytes)
    if fitting is not config:
        log.warning(
            "bodies may be as large as the memory allows max_message_bytes=%d"
            " max_batch_bytes=%d hint=%r",
            fitting.max_message_bytes,
            fitting.max_batch_bytes,
            "raise max_memory_mb for larger ones",
        )
    return fitting
