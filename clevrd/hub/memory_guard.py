"""MemoryGuard: keeps the process within its memory, by the decisions of the memory ladder.

It looks, has rings shrink, and refuses; where each rung begins is decided in
control/memory_ladder.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from clevrd.control.memory_ladder import (
    BEGINS_AT,
    GROWTH_PART,
    HYSTERESIS,
    MAX_SHRINK_BYTES,
    PUBLISHER_RETRY_S,
    REFUSE_PUBLISHES_AT,
    REFUSE_SUBSCRIBERS_AT,
    SUBSCRIBER_RETRY_S,
    LadderDecision,
    Rung,
    decide,
    describe,
)
from clevrd.control.system_stats import NOTHING_HELD, HeldMemory
from clevrd.core.topic_manager import TopicManager
from clevrd.errors import MemoryShort, NoMemoryForSubscribers
from clevrd.hub.explanations import held_figures, note_rings_shrunk, note_rung, rung_limits
from clevrd.metrics.decisions import Decision, Decisions

log = logging.getLogger(__name__)

# Where rings have nothing to give, the allocator is asked once in so many looks to give back what
# requests and connections have left: without that a daemon whose rings are empty could refuse
# publishes for ever.
LOOKS_TO_GIVE_BACK: Final = 10


class HoldsMemory(Protocol):
    """The source of how much memory is held: the machine, or a test."""

    def held_memory(self) -> HeldMemory:
        """Return what is used of the tightest limit."""


class Publisher(Protocol):
    """The part of the hub that takes messages."""

    def shed(self, refusal: Callable[[], MemoryShort] | None) -> None:
        """Refuse every publish with what ``refusal`` returns; None: take them again."""


class MemoryGuard:
    """Looks at the memory in short intervals, and acts as the ladder says."""

    __slots__ = (
        *("_decisions", "_give_back_memory", "_loop", "_on_error", "_publisher", "_stats"),
        *("_topics", "_explained", "_looks_in_vain", "decision", "shrunk_bytes"),
    )

    def __init__(
        self,
        stats: HoldsMemory,
        topics: TopicManager,
        publisher: Publisher,
        give_back_memory: Callable[[int], None],
        decisions: Decisions,
        loop: asyncio.AbstractEventLoop,
        on_error: Callable[[], None],
    ) -> None:
        """Have it look whenever rings have grown; a timer of the caller's has it look besides.

        Args:
            give_back_memory: has the allocator give freed memory back to the machine, of which the
                rings have just freed so many bytes.
            decisions: is told of each rung, for operators.
            on_error: counts a look at growth that has failed.
        """
        self._stats = stats
        self._topics = topics
        self._publisher = publisher
        self._give_back_memory = give_back_memory
        self._decisions = decisions
        self._loop = loop
        self._on_error = on_error
        topics.rings.on_grown = self.look_at_growth
        # Each rung that is reached now, and what operators are told of it; changed by look() alone.
        self._explained: dict[Rung, Decision] = {}
        # Looks in a row at which rings should have given up messages, and had none to give.
        self._looks_in_vain = 0
        # The latest decision; replaced by look() alone.
        self.decision = LadderDecision(Rung.WELL, 0, NOTHING_HELD)
        # Bytes that rings have given up on the ladder since the start; changed by look() alone.
        self.shrunk_bytes = 0

    def look(self) -> None:
        """Decide by the memory held now, and act: rings give up messages, publishes are refused."""
        self._act_on(decide(self._stats.held_memory(), self.decision.rung))
        self._watch_rings()

    def look_at_growth(self) -> None:
        """Look as `look` does, because rings have grown; it leaves no rung, as the next look may.

        Rungs that are entered and left with each few messages would fill the log. The message with
        which they have grown is in its ring, so nothing is raised: the timer looks again.
        """
        before = self.decision.rung
        try:
            decision = decide(self._stats.held_memory(), before)
            if decision.rung < before:
                decision = msgspec.structs.replace(decision, rung=before)
            self._act_on(decision)
        except Exception:
            self._on_error()
            log.exception("look at memory failed")
        # Also behind a failure, which would else come again with the next message.
        self._watch_rings()

    def _watch_rings(self) -> None:
        """Have the next growth looked at: as much as rings can give up at one look, at most."""
        growth_bytes = min(self.decision.held.limit_bytes // GROWTH_PART, MAX_SHRINK_BYTES)
        self._topics.rings.watch(growth_bytes)

    def _act_on(self, decision: LadderDecision) -> None:
        before = self.decision.rung
        self.decision = decision
        if decision.shrink_bytes:
            freed = self._shrink(decision.shrink_bytes)
            self.shrunk_bytes += freed
            self._looks_in_vain = 0 if freed else self._looks_in_vain + 1
            if freed or self._looks_in_vain % LOOKS_TO_GIVE_BACK == 0:
                self._give_back_memory(freed)
        for explained in self._explained.values():
            self._decisions.hold(explained)
        if decision.rung is before:
            return
        self._explain()
        if (decision.rung is Rung.NO_PUBLISHES) is not (before is Rung.NO_PUBLISHES):
            is_shedding = decision.rung is Rung.NO_PUBLISHES
            self._publisher.shed(self._publish_refusal if is_shedding else None)
        log.log(
            logging.WARNING if decision.rung > before else logging.INFO,
            "memory ladder changed from=%s to=%s used=%.1f%% memory=%r",
            before.word,
            decision.rung.word,
            decision.held.share * 100,
            describe(decision.held),
        )

    def check_subscriber(self) -> None:
        """Raise NoMemoryForSubscribers where no new subscriber is taken."""
        if self.decision.rung >= Rung.NO_NEW_SUBSCRIBERS:
            raise NoMemoryForSubscribers(
                _sentence(self.decision.held, "subscribers", REFUSE_SUBSCRIBERS_AT)
                + f" come back in {SUBSCRIBER_RETRY_S:g} s.",
                SUBSCRIBER_RETRY_S,
                bound="subscribers",
                inputs=held_figures(self.decision.held),
                thresholds=rung_limits(Rung.NO_NEW_SUBSCRIBERS),
            )

    def _shrink(self, wanted_bytes: int) -> int:
        before = [(portion, portion.ring_bytes) for portion in self._topics.portions]
        freed_bytes = self._topics.shrink(wanted_bytes, self._loop.time())
        for portion, had_bytes in before:
            if freed := had_bytes - portion.ring_bytes:
                note_rings_shrunk(self._decisions, portion.name, freed, self.decision.held)
        return freed_bytes

    def _explain(self) -> None:
        """Tell operators of each rung that is reached or left now, the lowest first."""
        held = self.decision.held
        for rung in reversed(BEGINS_AT):
            if rung <= self.decision.rung:
                if rung not in self._explained:
                    self._explained[rung] = note_rung(self._decisions, rung, held)
            elif (over := self._explained.pop(rung, None)) is not None:
                self._decisions.end(over)

    def _publish_refusal(self) -> MemoryShort:
        return MemoryShort(
            _sentence(self.decision.held, "messages", REFUSE_PUBLISHES_AT)
            + f" retry in {PUBLISHER_RETRY_S:g} s.",
            PUBLISHER_RETRY_S,
            bound="publishes",
            inputs=held_figures(self.decision.held),
            thresholds=rung_limits(Rung.NO_PUBLISHES),
        )


def _sentence(held: HeldMemory, refused: str, begins_at: float) -> str:
    ends_at = begins_at - HYSTERESIS
    return (
        f"The daemon uses {describe(held)} of memory, {held.share * 100:.0f} %, and takes {refused}"
        f" again below {ends_at * 100:.0f} %;"
    )
