"""Counters kept as plain numbers in one place, and histograms beside them.

Nothing is measured here; the hub and the connections count, and a snapshot (`snapshot`) is taken.
"""

from __future__ import annotations

from typing import Final

from clevrd.metrics.histograms import Histogram, RoundHistograms

# Bounds in seconds. The loop's timers count in milliseconds.
_LAG_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
# The throttle's delay is 10 ms; a publish that waits for room may wait as long as its client.
_WAIT_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# From clients that come back at once to those that stay for days.
_CONNECTION_S: Final = (0.1, 1.0, 10.0, 60.0, 300.0, 900.0, 3_600.0, 21_600.0, 86_400.0)


class Counters:
    """Events since the start; each number only rises."""

    __slots__ = (
        "background_errors",
        "circuits_opened",
        "closed",
        "connection_s",
        "connections",
        "delivered_bytes",
        "loop_lag_s",
        "pings_cut",
        "refused",
        "reloads",
        "reloads_failed",
        "rounds",
        "tls_failed",
        "tls_handshakes",
        "wait_s",
    )

    def __init__(self) -> None:
        self.connections = 0
        # Error code -> refusals, over HTTP and on connecting; bounded by the codes there are.
        self.refused: dict[str, int] = {}
        # Close code -> WebSockets the daemon closed with it.
        self.closed: dict[int, int] = {}
        # Circuits of circuit_breaker subscribers that opened, without those that disconnected.
        self.circuits_opened = 0
        # Subscribers cut because they did not answer a ping.
        self.pings_cut = 0
        # Timers and tasks that failed; each is logged as well.
        self.background_errors = 0
        # TLS handshakes that ended well; and why others failed, one of few words -> how many.
        self.tls_handshakes = 0
        self.tls_failed: dict[str, int] = {}
        # Times that the configuration was read again, and times that it was wrong and changed
        # nothing.
        self.reloads = 0
        self.reloads_failed = 0
        # Bytes of messages handed to WebSockets and streams, with their frames or events; nothing
        # else that is written.
        self.delivered_bytes = 0
        # How long rounds took, what they carried, and the way of messages from publish to socket.
        self.rounds = RoundHistograms()
        # How late the loop comes to a timer.
        self.loop_lag_s = Histogram(_LAG_S)
        # Waits of messages whose publish had to wait; the others are known by their number.
        self.wait_s = Histogram(_WAIT_S)
        # How long WebSockets and streams that have ended were open.
        self.connection_s = Histogram(_CONNECTION_S)

    def count_background_error(self) -> None:
        """Count a timer, task or callback that failed; it was logged where it happened."""
        self.background_errors += 1

    def count_refusal(self, code: str) -> None:
        """Count one refused request or connection under its machine code."""
        self.refused[code] = self.refused.get(code, 0) + 1

    def count_close(self, code: int) -> None:
        """Count one WebSocket that the daemon closed with ``code``."""
        self.closed[code] = self.closed.get(code, 0) + 1
