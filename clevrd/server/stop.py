"""Stop: how a daemon ends, step by step and within its time.

Take no new readers, and send those away that have everything -> stop accepting -> finish requests
-> let readers catch up -> close WebSockets with 1012, at a pace -> stop background work -> close
the journal -> save the state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Final

import msgspec

from clevrd.config import Config
from clevrd.connections.departures import pace_s
from clevrd.connections.registry import RESTARTING
from clevrd.server.journal import close_journal
from clevrd.server.parts import Parts

log = logging.getLogger(__name__)

# How long subscribers get to answer the close frame.
CLOSE_ALL_TIMEOUT_S: Final = 5.0
# How often is checked whether requests are finished.
_POLL_S: Final = 0.02
# How long a client that has just connected has to send its request.
_NEWCOMERS_S: Final = 0.05
# How long connections that have nothing left to receive get to close.
_CUT_TIMEOUT_S: Final = 0.1

Step = Callable[[], Awaitable[None] | None]


class StopTimes(msgspec.Struct, frozen=True):
    """When the parts of a stop are to be over, on the loop's clock."""

    begins_s: float
    # Connections are closed, at a pace.
    drained_by_s: float
    # Clients have ended.
    deadline_s: float
    # All has ended, and the state is saved.
    end_s: float


def times_of_stop(now_s: float, config: Config, saving_takes_s: float) -> StopTimes:
    """Return the times of a stop that begins now; the state has the last part of it."""
    end_s = now_s + config.shutdown_timeout_s
    deadline_s = end_s - saving_takes_s
    # The answers to the last goodbyes have their time within the deadline.
    drained_by_s = min(now_s + config.drain_s, deadline_s - CLOSE_ALL_TIMEOUT_S)
    return StopTimes(now_s, drained_by_s, deadline_s, end_s)


class Stop:
    """One stop of a daemon; acknowledged messages reach their readers."""

    def __init__(self, parts: Parts, config: Config, loop: asyncio.AbstractEventLoop) -> None:
        self._parts = parts
        self._hub = parts.messaging.hub
        self._connections = parts.clients.connections
        self._polls = parts.clients.polls
        self._ways_in = parts.ways_in
        self._loop = loop
        self._times = times_of_stop(loop.time(), config, parts.restart.saving_takes_s())
        # Something has not ended; set by run.
        self.is_cut_short = False

    async def run(self) -> None:
        """Take all steps, one after the other, also those behind one that fails."""
        for step in self._steps():
            await self._take(step)

    def _steps(self) -> Iterator[Step]:
        """Yield each step when the one before it is taken."""
        over_s = self._pace_s(self._times.begins_s)
        if self._begin(over_s):
            # Publishers are served while readers that have everything leave.
            yield self._polls.end_all
            if over_s > 0:
                yield partial(self._send_away, over_s)
        listener = self._ways_in.for_clients
        # A client that has connected just now is still served where publishers are.
        yield self._ways_in.close
        yield self._hear_newcomers
        yield self._hub.refuse_publishers
        yield self._parts.timers.stop
        yield self._parts.messaging.sources.stop
        yield listener.raw.close_idle
        yield self._polls.end_all
        yield self._finish_requests
        yield partial(self._hub.drain, self._times.deadline_s)
        yield self._close_connections
        yield self._close_http
        yield listener.end_handshakes
        yield partial(self._ways_in.end_operators, _CUT_TIMEOUT_S)
        yield listener.raw.stop
        yield self._connections.stop
        yield self._hub.stop
        yield self._parts.messaging.webhooks.stop
        yield self._close_journal
        yield partial(self._parts.restart.save, self._times.end_s)
        yield self._stop_tracing

    async def _take(self, step: Step) -> None:
        """Take one step; log and count its failure, so that the next step follows.

        Without this, a fault in one connection could keep the others from their close frames, and
        the topics from being saved.
        """
        try:
            waited_for = step()
            if waited_for is not None:
                await waited_for
        except Exception:
            self._hub.counters.count_background_error()
            log.exception("a step of the stop failed; the others are taken all the same")

    # --- readers are sent away -------------------------------------------------------------------

    def _begin(self, over_s: float) -> bool:
        """Begin the drain; return whether publishers are served while readers are sent away."""
        serves_publishers = self._keeps_what_is_published()
        back_at_s = self._times.begins_s + (over_s if self._is_alone() else 0.0)
        self._hub.begin_drain(back_at_s, serves_publishers=serves_publishers)
        if count := len(self._connections):
            log.info(
                "draining connections=%d over_s=%.1f publishers_served=%s",
                count,
                over_s,
                serves_publishers,
            )
        return serves_publishers

    def _keeps_what_is_published(self) -> bool:
        """Whether what is accepted now is there for readers that come back after the stop."""
        return self._parts.keeps_all_topics or self._parts.restart.keeps_topics

    def _is_alone(self) -> bool:
        """Whether no other daemon has this one's topics, so that nobody can go on elsewhere."""
        journal = self._hub.journal
        return journal is None or not journal.engine.is_shared

    def _pace_s(self, now_s: float) -> float:
        """Return over how many seconds the connections that are open are closed."""
        return pace_s(len(self._connections), self._times.drained_by_s - now_s)

    async def _send_away(self, over_s: float) -> None:
        """Close the readers that have everything, while publishers and the others go on."""
        left = await self._connections.send_away(
            RESTARTING, "restarting", over_s, is_alone=self._is_alone()
        )
        log.info("readers sent away count=%d", left)

    # --- clients end -----------------------------------------------------------------------------

    async def _hear_newcomers(self) -> None:
        """Let clients ask that have connected just now, where a restart is to refuse none."""
        if self._ways_in.for_clients.listeners.are_given:
            await asyncio.sleep(_NEWCOMERS_S)

    async def _finish_requests(self) -> None:
        """Wait for requests that are not answered yet, until the deadline at most."""
        while count := self._ways_in.count_under_way() + len(self._hub.tasks):
            if self._loop.time() >= self._times.deadline_s:
                log.warning("requests cut at shutdown count=%d", count)
                return
            await asyncio.sleep(_POLL_S)

    async def _close_connections(self) -> None:
        now_s = self._loop.time()
        over_s = self._pace_s(now_s)
        left_s = self._times.deadline_s - over_s - now_s
        timeout_s = min(CLOSE_ALL_TIMEOUT_S, max(_CUT_TIMEOUT_S, left_s))
        await self._connections.close_all(
            RESTARTING, "restarting", timeout_s, over_s=over_s, is_alone=self._is_alone()
        )

    async def _close_http(self) -> None:
        """Close HTTP connections, once requests that came meanwhile are answered.

        aiohttp's own shutdown would use up its whole timeout for a request that has only just
        begun.
        """
        self._ways_in.close_idle()
        await self._finish_requests()
        await self._ways_in.for_clients.aiohttp.shutdown(_CUT_TIMEOUT_S)

    # --- what is kept, and what is sent ----------------------------------------------------------

    async def _close_journal(self) -> None:
        if not await close_journal(self._hub, self._times.end_s, self._loop):
            self.is_cut_short = True

    async def _stop_tracing(self) -> None:
        if (tracing := self._parts.messaging.tracing) is not None:
            await tracing.sender.stop()
