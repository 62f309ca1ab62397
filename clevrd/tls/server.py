"""TlsServer: what all encrypted connections share: contexts, limits, deadlines, counts."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Final, Protocol

from clevrd.address_limit import AddressLimit
from clevrd.config import Config
from clevrd.input_budget import InputBudget
from clevrd.metrics.counters import Counters
from clevrd.scheduling.deadlines import Deadlines
from clevrd.scheduling.fair_turns import FairTurns
from clevrd.tls.contexts import TlsContexts

log = logging.getLogger(__name__)

# Connections over the limit of connections that may shake hands at once, so that a probe can ask
# for the daemon's health; when there are more, the one that has waited longest goes.
MAX_BEYOND: Final = 16
# Connections at once whose client may still read why its handshake failed; more are closed at once.
MAX_LINGERING: Final = 32


class Handshake(Protocol):
    """A connection as the server sees it: one that shakes hands, or has failed to."""

    deadline_s: float

    def expire(self) -> None:
        """End because the time is up."""

    def give_way(self) -> None:
        """End, since there is no room for so many."""

    def abort(self) -> None:
        """End at once."""


class TlsServer:
    """The parts that all encrypted connections share."""

    def __init__(
        self,
        contexts: TlsContexts,
        make_protocol: Callable[[], asyncio.Protocol],
        is_full: Callable[[], bool],
        answer_plain: Callable[[bytes], bytes],
        addresses: AddressLimit,
        counters: Counters,
        turns: FairTurns,
        budget: InputBudget,
        config: Config,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Serve connections with ``contexts``.

        Args:
            make_protocol: makes what a connection is given to once its hands are shaken.
            is_full: whether one more connection would be one too many.
            answer_plain: makes the answer, unencrypted, to a request that begins with these bytes.
            addresses: the client of each connection.
        """
        self.contexts = contexts
        self.make_protocol = make_protocol
        self.answer_plain = answer_plain
        self.addresses = addresses
        self.turns = turns
        self.budget = budget
        self.now_s = loop.time
        self.handshake_timeout_s = config.request_timeout_s
        # The bytes that OpenSSL wrote for one connection and that are sent at once; empty between
        # two steps of any connection. All connections have this one buffer, since it never
        # shrinks: with one for each, a connection kept as many bytes as the largest write to it had
        # (measured: 66 KB behind one write of 64 KiB).
        self.outgoing = ssl.MemoryBIO()
        self._is_full = is_full
        self._counters = counters
        # Connections that shake hands, within the limit of connections and beyond it.
        self._within: set[Handshake] = set()
        self._beyond: dict[Handshake, None] = {}
        # Connections that have failed and may read why; at most MAX_LINGERING.
        self._lingering: set[Handshake] = set()
        self.deadlines: Deadlines[Handshake] = Deadlines(
            loop, lambda each: each.expire(), counters.count_background_error
        )
        # The counts that `report_failures` has told of.
        self._reported: dict[str, int] = {}

    @property
    def handshakes(self) -> int:
        """Number of connections that shake hands, within the limit of connections."""
        return len(self._within)

    def begin(self, connection: Handshake) -> None:
        """Let a new connection shake hands, in the place of another one if there are too many."""
        if not self._is_full():
            self._within.add(connection)
        else:
            if len(self._beyond) >= MAX_BEYOND:
                next(iter(self._beyond)).give_way()
            self._beyond[connection] = None
        self.deadlines.set(connection, self.now_s() + self.handshake_timeout_s)

    def forget(self, connection: Handshake) -> None:
        """Forget a connection: it has shaken hands, or ends. Idempotent."""
        self._within.discard(connection)
        self._beyond.pop(connection, None)
        self._lingering.discard(connection)
        self.deadlines.remove(connection)

    def count_success(self) -> None:
        """Count a handshake that ended well."""
        self._counters.tls_handshakes += 1

    def count_failure(self, reason: str) -> None:
        """Count a handshake that failed; ``reason`` is one of few words."""
        failed = self._counters.tls_failed
        failed[reason] = failed.get(reason, 0) + 1

    def linger(self, connection: Handshake, seconds: float) -> bool:
        """Let a connection that has failed stay so long, if there is room for it."""
        self.forget(connection)
        if len(self._lingering) >= MAX_LINGERING:
            return False
        self._lingering.add(connection)
        self.deadlines.set(connection, self.now_s() + seconds)
        return True

    def report_failures(self) -> None:
        """Log the handshakes that failed since the last call, in one line, if there were any."""
        now = dict(self._counters.tls_failed)
        new = {
            reason: count - self._reported.get(reason, 0)
            for reason, count in now.items()
            if count > self._reported.get(reason, 0)
        }
        self._reported = now
        if new:
            # A reason is one of a few words, none of which a client has chosen.
            counts = " ".join(f"{reason}=%d" for reason in sorted(new))
            log.warning(f"tls handshakes failed {counts}", *(new[reason] for reason in sorted(new)))

    def stop(self) -> None:
        """End what has not become a connection."""
        self.deadlines.stop()
        for connection in self._within | self._beyond.keys() | self._lingering:
            connection.abort()
