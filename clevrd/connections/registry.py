"""The registry of connections: each WebSocket and stream, taken over, pinged, swept and closed.

There is no timer for each of them. A connection's words are its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol, cast

from clevrd.address_limit import AddressLimit
from clevrd.config import Config
from clevrd.connections.departures import Returns, closed_by
from clevrd.connections.expiry import Expiry
from clevrd.connections.farewells import Farewells
from clevrd.connections.one_subscription import OneSubscription
from clevrd.connections.presence import Peer, Presence
from clevrd.control.arrivals import Arrivals
from clevrd.core.stream_forms import SlottedWrites
from clevrd.errors import OriginNotAllowed
from clevrd.http_values import Request
from clevrd.hub.explanations import note_closed, note_pings_unanswered
from clevrd.input_budget import InputBudget, Sender
from clevrd.metrics.counters import Counters
from clevrd.metrics.decisions import Decisions
from clevrd.pace import sent_step_bytes
from clevrd.page_check import PageCheck
from clevrd.progress import reset
from clevrd.refusals import Refusals
from clevrd.scheduling.deadlines import Deadlines
from clevrd.scheduling.fair_turns import FairTurns
from clevrd.scheduling.timers import Tasks, Timers
from clevrd.tenants import Tenant
from clevrd.tenants.connection_counts import ConnectionCounts

log = logging.getLogger(__name__)

_CLOSE_POLL_S: Final = 0.02
# A close is a write, so as many of them as a round writes between two turns of the loop.
CLOSES_PER_BATCH: Final = 256
# Seconds that the loop has for others between two steps of paced closes.
_PACE_STEP_S: Final = 0.01

# The close code of a planned end; a stream has a sentence for it.
RESTARTING: Final = 1012
# Close codes of connections that changed rules end: their credential is valid no more, or they may
# not have all that they had. Clients don't come back as they are after the first, and at once after
# the second, to hear what they may have now.
REVOKED: Final = 4001
REVOKED_REASON: Final = "credential_revoked"
CHANGED: Final = 4202
# The close code of connections that an operator ends; clients come back after a pause.
DISCONNECTED: Final = 4104
DISCONNECTED_REASON: Final = "disconnected"
CHANGED_REASON: Final = "permissions_changed"
# Connections judged in one turn of the loop, at 2 us each, and 10 us where a page has opened it; a
# close costs as much as a write.
JUDGED_PER_TURN: Final = 256


class Connection(Peer, Protocol):
    """A connection as the registry sees it: a WebSocket, or a stream."""

    _held_bytes: int
    # The last word was written, or the client has gone.
    is_closing: bool
    # The tenant of its client. Changed by the registry alone, through `take_tenant`.
    tenant: Tenant

    def take_tenant(self, tenant: Tenant) -> bool:
        """Go on as ``tenant``, the same with other permissions or limits.

        Returns whether it may have all that it has; the caller closes it otherwise.
        """

    def stop_delivery(self) -> None:
        """Be no subscriber any more."""

    def end_unfinished(self) -> None:
        """Close because a message did not arrive whole in time."""

    def may_leave(self) -> bool:
        """Whether it may be closed while publishers are served: a reader that has everything."""

    def announce_end(self, reconnect_after_ms: int) -> None:
        """Tell the peer that a planned close follows."""

    def close(self, code: int, reason: str) -> None:
        """Say goodbye."""

    def cut(self) -> None:
        """End the connection without a word."""

    def unsent_bytes(self) -> int:
        """Return how much of what was written the peer has not taken yet."""

    def readers(self) -> Sequence[OneSubscription]:
        """Return the reader of each topic that it is subscribed to."""

    @property
    def kind(self) -> str:
        """Return what it is, in a word."""


class _Unfinished:
    """A message of which a part has arrived."""

    __slots__ = ("connection", "deadline_s", "sender", "steady_at_bytes")

    def __init__(self, connection: Connection, sender: Sender) -> None:
        self.connection = connection
        # The sender for whom the budget counts it.
        self.sender = sender
        # How much of it has to be there for its time to begin anew.
        self.steady_at_bytes = 0
        # Loop time by which it has to be whole.
        self.deadline_s = 0.0


class Connections:
    """All open connections, closing ones included."""

    def __init__(
        self,
        counters: Counters,
        tasks: Tasks,
        turns: FairTurns,
        budget: InputBudget,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        addresses: AddressLimit,
        counts: ConnectionCounts,
        pages: PageCheck,
        refusals: Refusals,
        decisions: Decisions,
        wall_s: Callable[[], float] = time.time,
        arrivals: Arrivals | None = None,
    ) -> None:
        """Args: wall_s: the wall clock, by which credentials end."""
        self._arrivals = arrivals or Arrivals()
        self.counters = counters
        self._addresses = addresses
        # The number of connections of each tenant; endpoints ask it before a connection is taken
        # over.
        self.counts = counts
        self.refusals = refusals
        self._decisions = decisions
        self._ping_times = {
            "ping_interval_s": config.ping_interval_s,
            "pong_timeout_s": config.pong_timeout_s,
        }
        self.loop = loop
        self.now_s = loop.time
        self._high_bytes = config.write_high_bytes
        self._low_bytes = config.write_low_bytes
        on_error = counters.count_background_error
        self._presence = Presence(
            config.ping_interval_s, config.pong_timeout_s, self._give_up, on_error, loop
        )
        self.stalled = self._presence.stalled
        self.moved = self._presence.moved
        self._message_timeout_s = config.request_timeout_s
        self._messages: Deadlines[_Unfinished] = Deadlines(loop, self._end_unfinished, on_error)
        # Connection -> the message of which a part has arrived.
        self._unfinished: dict[Connection, _Unfinished] = {}
        self.budget = budget
        self._expiry = Expiry(loop, wall_s, on_error)
        self._farewells = Farewells(config.ping_interval_s, on_error, loop)
        # Every connection, and the time at which it was taken over.
        self._open: dict[Connection, float] = {}
        self._page_check = pages
        # Numbers by which operators name connections that they were shown, and the other way round.
        self._numbers: dict[Connection, int] = {}
        self._by_number: dict[int, Connection] = {}
        self._last_number = 0
        # Connection -> the head by which its page is judged; only those that a page has opened.
        self._pages: dict[Connection, Request] = {}
        # How many of the open connections are streams.
        self.streams = 0
        self._timers = Timers(loop, on_error)
        # The tasks of publishes that wait.
        self.tasks = tasks
        # The shares of the loop's turns in which publishes and commands are carried out.
        self.turns = turns
        # Finishes what is written to streams of events with many topics; all of them share it.
        self.event_writes = SlottedWrites()

    def __len__(self) -> int:
        """Return how many there are, closing ones included."""
        return len(self._open)

    def listed(self) -> list[Connection]:
        """Return all of them that go on."""
        return [connection for connection in self._open if not connection.is_closing]

    def number_of(self, connection: Connection) -> int:
        """Return the number by which operators name ``connection``, as long as it is open."""
        number = self._numbers.get(connection)
        if number is None:
            self._last_number += 1
            number = self._last_number
            if connection in self._open:
                self._numbers[connection] = number
                self._by_number[number] = connection
        return number

    def numbered(self, number: int) -> Connection | None:
        """Return the connection that operators name so; None where it has ended."""
        return self._by_number.get(number)

    def opened_s(self, connection: Connection) -> float:
        """Return when ``connection`` was taken over, on the loop's clock; now, if it has ended."""
        return self._open.get(connection, self.now_s())

    def address_of(self, connection: Connection) -> str:
        """Return the address of its client, for people; empty over a Unix socket."""
        return self._addresses.counted_as(connection.transport)

    def transports(self) -> set[asyncio.Transport]:
        """Return the transports of all of them."""
        return {connection.transport for connection in self._open}

    def add(self, connection: Connection) -> None:
        """Take over the transport of ``connection``, to which its head was written."""
        transport = connection.transport
        transport.set_protocol(cast(asyncio.Protocol, connection))
        # uvloop's own low-water mark is 16 bytes, which would wake a reader for every message.
        transport.set_write_buffer_limits(self._high_bytes, self._low_bytes)
        self._open[connection] = self.now_s()
        self.streams += not connection.answers_pings
        self.counts.take(connection.tenant)
        self._presence.add(connection)
        if connection.tenant.expires_at_s is not None:
            self._expiry.watch(connection)

    def check_arrival(self, tenant: Tenant) -> None:
        """Raise unless one more connection of ``tenant`` may be opened now.

        Raises:
            ConnectionLimit: the tenant, or its key, has as many as it may have.
            TooManyArrive: the loop is late, and others have connected just now.
        """
        # The tenant's own limit is asked first: a client that is over it must not use up the
        # arrivals of others.
        self.counts.check(tenant)
        if self._arrivals.is_limited:
            self._arrivals.check(self.now_s(), random.random())  # noqa: S311  # no secret

    def note_page(self, connection: Connection, head: Request) -> None:
        """Note which page has opened ``connection``, if one has, so that it can be judged again.

        Args:
            head: the head of the request that became the connection.
        """
        page = self._page_check.page_of(head, connection.transport)
        if page is not None and connection in self._open:
            self._pages[connection] = page

    def renew(self, connection: Connection, tenant: Tenant) -> None:
        """Have ``connection`` go on as ``tenant``, by another credential of the same."""
        if self._change_tenant(connection, tenant):
            self._expiry.watch(connection)
        else:
            connection.close(CHANGED, CHANGED_REASON)

    async def judge_again(self, judge: Callable[[Tenant], Tenant | None]) -> int:
        """Ask for each connection what its tenant is now, and whether its page may still ask.

        Returns how many were closed.

        Args:
            judge: returns the tenant as it is now; None where its credential is valid no more.
        """
        closed = 0
        for count, connection in enumerate(list(self._open), start=1):
            closed += not self._judge_one(connection, judge)
            if count % JUDGED_PER_TURN == 0:
                await asyncio.sleep(0)
        return closed

    def _judge_one(self, connection: Connection, judge: Callable[[Tenant], Tenant | None]) -> bool:
        """Judge one connection; return whether it goes on. A fault of one keeps no other open."""
        try:
            page = self._pages.get(connection)
            if page is not None:
                self._page_check.check(page, connection.transport)
            tenant = judge(connection.tenant)
            if tenant is None:
                connection.close(REVOKED, REVOKED_REASON)
                return False
            if not self._change_tenant(connection, tenant):
                connection.close(CHANGED, CHANGED_REASON)
                return False
        except OriginNotAllowed as error:
            self.refusals.count(error)
            connection.close(error.close_code, error.code)
            return False
        except Exception:
            self.counters.count_background_error()
            log.exception("a connection could not be judged again: cutting it")
            connection.cut()
            return False
        return True

    def _change_tenant(self, connection: Connection, tenant: Tenant) -> bool:
        """Have ``connection`` go on as ``tenant``, and be counted as its; see `take_tenant`."""
        before = connection.tenant
        try:
            return connection.take_tenant(tenant)
        finally:
            if connection in self._open:
                self.counts.move(before, connection.tenant)

    def await_close(self, connection: Connection) -> None:
        """Give ``connection``, which says goodbye now, the time that takes and no more."""
        self._farewells.begin_farewell(connection, self._presence.silent_s(connection))
        self._expiry.remove(connection)
        self._presence.remove(connection)

    def remove(self, connection: Connection) -> None:
        """Forget ``connection``, whose transport is gone. Idempotent."""
        self._presence.remove(connection)
        self.settle_unfinished(connection, 0, has_progress=True)
        self._farewells.remove(connection)
        self._expiry.remove(connection)
        self._pages.pop(connection, None)
        if self._numbers and (number := self._numbers.pop(connection, None)) is not None:
            del self._by_number[number]
        if (opened_s := self._open.pop(connection, None)) is not None:
            self.counters.connection_s.record(self.now_s() - opened_s)
            self.streams -= not connection.answers_pings
            self.counts.give_back(connection.tenant)
            self._addresses.left(connection.transport)

    def settle_unfinished(
        self, connection: Connection, held_bytes: int, *, has_progress: bool
    ) -> bool:
        """Note what ``connection`` holds of an unfinished message; return whether that may be.

        The message's time runs from its first bytes, or from the last message before it, and begins
        anew as long as it comes steadily (`pace`).
        """
        unfinished = self._unfinished.get(connection)
        if unfinished is None:
            if not held_bytes:
                return True
            unfinished = _Unfinished(connection, self.sender_of(connection))
            self._unfinished[connection] = unfinished
            has_progress = True
        fits = self.budget.change(connection._held_bytes, held_bytes, unfinished.sender)
        connection._held_bytes = held_bytes
        if not held_bytes:
            del self._unfinished[connection]
            self._messages.remove(unfinished)
        elif has_progress or held_bytes >= unfinished.steady_at_bytes:
            unfinished.steady_at_bytes = held_bytes + sent_step_bytes(self._message_timeout_s)
            self._messages.set(unfinished, self.now_s() + self._message_timeout_s)
        return fits

    def sender_of(self, connection: Connection) -> Sender:
        """Return for whom the input of ``connection`` is counted."""
        address = self._addresses.sender_of(connection.transport, {})
        return self.budget.sender(connection.tenant.name, address)

    def _end_unfinished(self, unfinished: _Unfinished) -> None:
        """Close a connection whose message did not arrive whole in time."""
        unfinished.connection.end_unfinished()

    def start(self) -> None:
        """Start to ask whether peers are there."""
        self._timers.every(self._presence.tick_s, self.ping_due)
        self._timers.every(self._presence.look_s, self.look_at_stalls)

    def stop(self) -> None:
        """Stop to ask, and end nothing any more."""
        self._timers.stop()
        self._messages.stop()
        self._farewells.stop()
        self._expiry.stop()

    def ping_due(self) -> None:
        """Ping the peers that are due, and cut those that are not there."""
        self._presence.ping_due()

    def look_at_stalls(self) -> None:
        """Cut the peers that have taken nothing for too long."""
        self._presence.look_at_stalls()

    def _give_up(self, peer: Peer) -> None:
        connection = cast(Connection, peer)
        self.counters.pings_cut += 1
        self._explain_cut(connection)
        connection.stop_delivery()
        reset(connection.transport)

    def note_close(self, connection: Connection, code: int, reason: str) -> None:
        """Count that the daemon closes ``connection``, and explain it to operators."""
        self.counters.count_close(code)
        tenant = connection.tenant
        note_closed(self._decisions, code, reason, tenant.name, tenant.credential_id)

    def _explain_cut(self, connection: Connection) -> None:
        note_pings_unanswered(
            self._decisions,
            connection.tenant.name,
            connection.tenant.credential_id,
            self.address_of(connection),
            {
                "open_s": round(self.now_s() - self.opened_s(connection), 3),
                "unsent_bytes": connection.unsent_bytes(),
            },
            self._ping_times,
        )

    async def send_away(self, code: int, reason: str, over_s: float, *, is_alone: bool) -> int:
        """Say goodbye, over ``over_s``, to the readers that have everything; return how many left.

        The others, and publishers, are left for `close_all`.

        Args:
            is_alone: no other daemon has their topics.
        """
        returns = Returns(len(self._open), over_s, is_alone)
        return await self._close_paced(code, reason, returns, lambda each: each.may_leave())

    async def close_all(
        self,
        code: int,
        reason: str,
        timeout_s: float,
        *,
        over_s: float = 0.0,
        is_alone: bool = True,
    ) -> None:
        """Say goodbye to everyone, wait for their answers, then cut those who gave none.

        Args:
            timeout_s: how long the answers may take.
            over_s: how long the goodbyes take; see `departures.pace_s`.
            is_alone: no other daemon has their topics.
        """
        returns = Returns(len(self._open), over_s, is_alone)
        await self._close_paced(code, reason, returns, lambda _: True)
        deadline_s = self.now_s() + timeout_s
        while self._open and self.now_s() < deadline_s:  # noqa: ASYNC110  # once in a life
            await asyncio.sleep(_CLOSE_POLL_S)
        for connection in list(self._open):
            connection.cut()

    async def _close_paced(
        self,
        code: int,
        reason: str,
        returns: Returns,
        may_close: Callable[[Connection], bool],
    ) -> int:
        """Close all that may be closed when their time comes; return how many these were."""
        begun_s = self.now_s()
        closed = 0
        for looked_at, connection in enumerate(list(self._open), start=1):
            if looked_at % CLOSES_PER_BATCH == 0:
                await asyncio.sleep(0)
            # A connection that leaves by itself is not waited for.
            while connection in self._open and may_close(connection):
                elapsed_s = self.now_s() - begun_s
                if closed < closed_by(elapsed_s, returns.count, returns.over_s):
                    closed += 1
                    share = secrets.randbelow(1 << 20) / (1 << 20)
                    self._close_one(connection, code, reason, returns.delay_ms(elapsed_s, share))
                    break
                await asyncio.sleep(_PACE_STEP_S)
        return closed

    def _close_one(self, connection: Connection, code: int, reason: str, delay_ms: int) -> None:
        """Say goodbye to ``connection``; a fault of one must not keep the others from theirs."""
        try:
            connection.announce_end(delay_ms)
            connection.close(code, reason)
        except Exception:
            self.counters.count_background_error()
            log.exception("a connection could not be closed in order: cutting it")
            self.remove(connection)
            connection.cut()
