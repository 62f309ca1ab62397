"""TopicTotals: the sums over all topics there are and were, taken in steps. They never fall."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Final

from clevrd.core.topic import Counts, Topic

# Subscribers that are summed up between two looks at the time, at up to 1 us each, and how many of
# them a topic by itself costs as much as.
_SUBSCRIBERS_PER_STEP: Final = 512
_TOPIC_COSTS: Final = 8


class Totals:
    """Sums over all topics there are and were; they never fall."""

    __slots__ = ("delivered", "discarded", "lost", "offered", "published", "queued")

    def __init__(self) -> None:
        self.published = 0
        self.offered = 0
        self.delivered = 0
        self.discarded = 0
        # By reason, as Losses names them.
        self.lost = {"slow_consumer": 0, "retention": 0, "memory": 0, "expired": 0}
        # Messages that wait at the moment; this sum does fall.
        self.queued = 0

    def copy(self) -> Totals:
        """Return sums that go on by themselves."""
        other = Totals()
        other.offered, other.delivered = self.offered, self.delivered
        other.discarded, other.lost = self.discarded, dict(self.lost)
        return other

    def add(self, now: Counts, before: Counts) -> None:
        """Add what a topic counted between two looks at it."""
        self.offered += now.offered - before.offered
        self.delivered += now.delivered - before.delivered
        self.discarded += now.discarded - before.discarded
        self.lost["slow_consumer"] += now.slow_consumer - before.slow_consumer
        self.lost["retention"] += now.retention - before.retention
        self.lost["memory"] += now.memory - before.memory
        self.lost["expired"] += now.expired - before.expired


class TopicTotals:
    """The sums, and the topics that they may lack something of."""

    __slots__ = ("_sums", "active", "published")

    def __init__(self) -> None:
        # Topics that had readers since the sums were last taken: of the others only ``published``
        # can have changed, which is counted as it happens. Topics add themselves.
        self.active: dict[Topic, None] = {}
        # All that had been counted when each topic was last summed up, publishes excepted.
        self._sums = Totals()
        # Messages appended to any topic; counted by TopicManager.extend.
        self.published = 0

    def take(
        self, now_s: Callable[[], float], note_quiet: Callable[[Topic], None]
    ) -> Generator[None, None, tuple[Totals, int]]:
        """Return the sums, and how many readers are slow.

        Others may be served at each yield. The figures of a topic are of one moment, so that the
        sums add up, but different topics are summed up at different moments. Topics without readers
        are not looked at again.

        Args:
            note_quiet: told of each topic that has no readers any more.
        """
        sums = self._sums.copy()
        sums.published = self.published
        slow = 0
        active = [(topic, topic.reported) for topic in self.active]
        work = _SUBSCRIBERS_PER_STEP
        for topic, reported in active:
            if work >= _SUBSCRIBERS_PER_STEP:
                yield
                work = 0
            work += _TOPIC_COSTS + topic.subscribers
            # The slow readers need not be of the moment that the counters are of.
            slow += topic.slow_count(now_s())
            if work >= _SUBSCRIBERS_PER_STEP:
                yield
            topic.settle(now_s())
            sums.add(topic.counts, reported)
            if topic.subscribers:
                sums.queued += topic.queued()
            elif topic in self.active:
                self._sum_up(topic)
                del self.active[topic]
                note_quiet(topic)
        return sums, slow

    def forget(self, topic: Topic) -> None:
        """Sum up a topic for the last time."""
        self._sum_up(topic)
        self.active.pop(topic, None)

    def _sum_up(self, topic: Topic) -> None:
        counts = topic.counts
        self._sums.add(counts, topic.reported)
        topic.reported = counts
