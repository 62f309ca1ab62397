"""PatternIndex: everybody is told, a few in each turn, whatever one of them does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from daemons import until

from clevrd.core.patterns import parse_pattern
from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicLimits, TopicManager
from clevrd.hub.pattern_index import PatternIndex

PATTERN = parse_pattern("a.*")


class FakeWatcher:
    """Remembers what it is told."""

    def __init__(self, fail: bool = False) -> None:
        self.told: list[tuple[str, str]] = []
        self.has_found_all = False
        self._fail = fail

    def _note(self, what: str, topic: Topic) -> None:
        if self._fail:
            raise RuntimeError("a bug")
        self.told.append((what, topic.name))

    def topic_made(self, topic: Topic) -> None:
        """Note it."""
        self._note("made", topic)

    def topic_found(self, topic: Topic) -> None:
        """Note it."""
        self._note("found", topic)

    def topic_forgotten(self, topic: Topic) -> None:
        """Note it."""
        self._note("forgotten", topic)

    def found_all(self) -> None:
        """Note it."""
        self.has_found_all = True


def make_watches(on_error: Callable[[], None] = lambda: None) -> tuple[TopicManager, PatternIndex]:
    """Return an empty manager and who watches it."""
    topics = TopicManager(TopicLimits(max_memory_bytes=1 << 30), new_epoch=lambda: "e")
    return topics, PatternIndex(topics, asyncio.get_running_loop(), on_error)


def make_topic(topics: TopicManager, name: str, tenant: str = "t") -> Topic:
    """Return a new topic, which its first message has made."""
    topic = topics.get_or_create(tenant, name, "", 0.0)
    topics.extend(topic, 1, [b"{}"], 0.0)
    return topic


async def test_many_watchers_of_one_topic_are_told_in_turns() -> None:
    """One new topic with a thousand watchers does not hold the loop, and all hear of it."""
    topics, watches = make_watches()
    watchers = [FakeWatcher() for _ in range(1000)]
    for watcher in watchers:
        watches.add("t", PATTERN, watcher)

    watches.topic_made(make_topic(topics, "a.1"))
    at_once = sum(bool(watcher.told) for watcher in watchers)
    await until(lambda: all(watcher.told for watcher in watchers))

    assert 0 < at_once < 100
    assert all(watcher.told == [("made", "a.1")] for watcher in watchers)


async def test_a_pattern_over_many_topics_finds_them_in_turns() -> None:
    """Thousands of topics are looked through in turns; what was made meanwhile is not missed."""
    topics, watches = make_watches()
    for number in range(3000):
        make_topic(topics, f"a.{number}" if number % 2 else f"b.{number}")
        if number % 500 == 0:
            # What is made here is no work of the daemon's, and does not hold the loop.
            await asyncio.sleep(0)
    watcher = FakeWatcher()

    watches.add("t", PATTERN, watcher)
    at_once, found_all_at_once = len(watcher.told), watcher.has_found_all
    watches.topic_made(make_topic(topics, "a.new"))
    await until(lambda: watcher.has_found_all)

    assert at_once < 100
    assert not found_all_at_once
    # New topics wait for no search.
    assert watcher.told.index(("made", "a.new")) < 200
    assert [name for what, name in watcher.told if what == "found"] == [
        f"a.{number}" for number in range(3000) if number % 2
    ]


async def test_watch_that_ended_costs_nothing_more() -> None:
    """Watching and ending it again and again leaves no work behind."""
    topics, watches = make_watches()
    for number in range(3000):
        make_topic(topics, f"a.{number}")
        if number % 500 == 0:
            await asyncio.sleep(0)
    watcher = FakeWatcher()
    for _ in range(100):
        watches.add("t", PATTERN, watcher)
        watches.remove("t", PATTERN, watcher)
    heard = len(watcher.told)
    last = FakeWatcher()

    watches.add("t", PATTERN, last)
    await until(lambda: len(last.told) == 3000)

    assert len(watcher.told) == heard < 100
    assert len(watches) == 1


async def test_watcher_that_fails_does_not_keep_others_from_hearing() -> None:
    """A bug in one is counted; the publisher and the other watchers don't notice."""
    errors: list[None] = []
    topics, watches = make_watches(lambda: errors.append(None))
    watcher = FakeWatcher()
    watches.add("t", PATTERN, FakeWatcher(fail=True))
    watches.add("t", PATTERN, watcher)

    watches.topic_made(make_topic(topics, "a.1"))

    assert watcher.told == [("made", "a.1")]
    assert len(errors) == 1


async def test_many_patterns_at_once_share_the_turns() -> None:
    """Each of them alone would be done right away; all together they take turns."""
    topics, watches = make_watches()
    for group in range(50):
        for number in range(19):
            make_topic(topics, f"a{group}.{number}")
    watchers = [FakeWatcher() for _ in range(50)]

    for group, watcher in enumerate(watchers):
        watches.add("t", parse_pattern(f"a{group}.*"), watcher)
    at_once = sum(len(watcher.told) for watcher in watchers)
    await until(lambda: all(watcher.has_found_all for watcher in watchers))

    assert 0 < at_once < 100
    assert all(len(watcher.told) == 19 for watcher in watchers)


async def test_topics_of_other_tenants_cost_a_search_nothing() -> None:
    """One tenant's search is as long as its own topics are many."""
    topics, watches = make_watches()
    for number in range(3000):
        make_topic(topics, f"a.{number}", tenant="other")
    make_topic(topics, "a.1")
    watcher = FakeWatcher()

    watches.add("t", PATTERN, watcher)

    assert watcher.has_found_all
    assert watcher.told == [("found", "a.1")]
