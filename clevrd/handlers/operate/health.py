"""GET /health, /health/live and /health/ready: is it well, is it alive, may it have traffic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from clevrd import __version__
from clevrd.admission import Admitted, admit_anybody
from clevrd.control.memory_ladder import Rung
from clevrd.control.system_stats import process_memory
from clevrd.core.message_ids import rfc3339
from clevrd.errors import Unavailable
from clevrd.http_values import Request, Response, json_view
from clevrd.hub import Hub
from clevrd.metrics.journal import JournalFigures

_MIB = 1 << 20


class MemoryView(msgspec.Struct, frozen=True):
    """The process's memory in MiB: resident, its peak, virtual; collections run; its state."""

    alloc_mb: float
    total_alloc_mb: float
    sys_mb: float
    num_gc: int
    # The rung of the memory ladder: "well" while nothing is given up.
    state: str


class JournalHealth(msgspec.Struct, frozen=True):
    """The journal in short; `metrics.journal` has all of it, and says what each field is."""

    engine: str
    durability: str
    state: str
    partitions: int
    positions: tuple[str, ...]
    lag_s: float
    checkpoint_age_s: float | None
    nodes: int
    node_versions: dict[str, int]


class HealthView(msgspec.Struct, frozen=True):
    """The view of /health. ``goroutines`` and ``tasks`` are both the number of asyncio tasks."""

    status: str
    timestamp: str
    uptime: str
    topics: int
    subscribers: int
    goroutines: int
    tasks: int
    memory: MemoryView
    version: str
    # Left out without a journal.
    journal: JournalHealth | msgspec.UnsetType = msgspec.UNSET


class HealthEndpoint:
    """The whole view, 200 whatever it says: it is for people and dashboards."""

    serves_while_draining = True

    def __init__(self, hub: Hub, started_s: float) -> None:
        self._hub = hub
        self._started_s = started_s

    def admit(self, head: Request) -> Admitted:
        """Refuse nothing."""
        return admit_anybody(head)

    def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Return the daemon's state."""
        tasks = len(asyncio.all_tasks())
        journal = self._hub.journal
        return json_view(
            HealthView(
                status=self._status(),
                timestamp=rfc3339(time.time_ns() // 1000),
                uptime=format_uptime(time.monotonic() - self._started_s),
                topics=len(self._hub.topics),
                subscribers=self._hub.subscribers,
                goroutines=tasks,
                tasks=tasks,
                memory=_memory(self._hub.memory_guard.decision.rung),
                version=__version__,
                journal=msgspec.UNSET if journal is None else _journal(journal.node.view()),
            )
        )

    def _status(self) -> str:
        if self._hub.is_draining:
            return "draining"
        journal = self._hub.journal
        is_well = journal is None or journal.node.is_well
        refuses = self._hub.memory_guard.decision.rung >= Rung.NO_NEW_SUBSCRIBERS
        return "degraded" if self._hub.is_throttling() or refuses or not is_well else "healthy"


class ProbeEndpoint:
    """A probe for an orchestrator: 200 while ``is_well`` says so, 503 otherwise."""

    serves_while_draining = True

    def __init__(self, is_well: Callable[[], bool], refusal: str) -> None:
        self._is_well = is_well
        self._refusal = refusal

    def admit(self, head: Request) -> Admitted:
        """Refuse nothing."""
        return admit_anybody(head)

    def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Return 200, or raise Unavailable."""
        if not self._is_well():
            raise Unavailable(self._refusal, bound="readiness")
        return json_view({"status": "ok"})


def format_uptime(seconds: float) -> str:
    """Return ``seconds`` in hours, minutes and seconds, as in ``5m30s`` or ``26h0m4s``."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    if hour:
        return f"{hour}h{minute}m{second}s"
    return f"{minute}m{second}s" if minute else f"{second}s"


def _journal(figures: JournalFigures) -> JournalHealth:
    return JournalHealth(
        figures.engine,
        figures.durability,
        figures.state,
        figures.partitions,
        tuple(each.position for each in figures.places),
        figures.lag_s,
        figures.checkpoint_age_s,
        figures.nodes,
        figures.node_versions,
    )


def _memory(rung: Rung) -> MemoryView:
    figures = process_memory()
    return MemoryView(
        alloc_mb=round(figures.rss_bytes / _MIB, 2),
        total_alloc_mb=round(figures.peak_rss_bytes / _MIB, 2),
        sys_mb=round(figures.virtual_bytes / _MIB, 2),
        num_gc=figures.gc_collections,
        state=rung.word,
    )
