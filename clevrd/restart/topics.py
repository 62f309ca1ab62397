"""Collects topics for a planned restart, and restores them; `restart/format` has the bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable

from clevrd.core.message_ids import us_of_id
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.saved_topic import SavedTopic
from clevrd.core.server_frames import headers_of, message_id_of, ttl_of
from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicManager
from clevrd.errors import InvalidRequest, Unavailable
from clevrd.restart.format import StateReader

log = logging.getLogger(__name__)


def saved_topics(topics: TopicManager) -> list[tuple[SavedTopic, RecentMessageCache]]:
    """Return each topic's position and its ring, the last used topic first.

    Positions of topics without messages follow, so that a reader of a quiet topic resumes.
    """
    # The rings themselves: a thread reads what they hold, and no message is asked for by offset.
    # Journaled topics are left out: their journal has them.
    own = (topic for topic in topics if topic.journal is None)
    by_use = sorted(own, key=lambda topic: topic.last_used_s, reverse=True)
    saved = [(_saved(topic), topic.ring) for topic in by_use]
    empty = RecentMessageCache(1, 1)
    return saved + [(SavedTopic(*place, 1, 0), empty) for place in topics.remembered()]


def restore_topics(
    topics: TopicManager,
    reader: StateReader,
    now_s: float,
    wall_us: int,
    is_journaled: Callable[[str], bool] = lambda name: False,
) -> None:
    """Restore the topics of a file, as far as the limits allow; log the number left out.

    Args:
        wall_us: the wall clock, microseconds since 1970.
        is_journaled: whether a journal has the topics of a name, which are left out: it was
            configured since they were saved, and would never have their messages otherwise.
    """
    left_out, reason = 0, ""
    for saved, ring in reader.topics(topics.ring_for):
        try:
            if is_journaled(saved.name):
                raise Unavailable(
                    "It is journaled now, and begins anew in the journal.", bound="restored_topics"
                )
            topics.restore(saved, ring, now_s)
            if ring is not None:
                _note_restored(topics.find(saved.tenant, saved.name), now_s, wall_us)
        except (Unavailable, InvalidRequest) as error:
            left_out += 1
            reason = str(error)
    if left_out:
        log.warning("topics not restored count=%d last_reason=%r", left_out, reason)


def _note_restored(topic: Topic | None, now_s: float, wall_us: int) -> None:
    """Note which messages of a restored ring expire or have headers, by their frames."""
    if topic is None:
        return
    for offset in range(topic.first, topic.head + 1):
        (frame,) = topic.frames(offset - 1, offset)
        if not topic.has_headers and headers_of(frame):
            topic.note_headers()
        ttl_s = ttl_of(frame)
        if ttl_s is not None:
            taken_us = us_of_id(message_id_of(frame).decode())
            topic.note_expiry(offset, now_s + ttl_s + (taken_us - wall_us) / 1e6)


def _saved(topic: Topic) -> SavedTopic:
    ring = topic.ring
    return SavedTopic(
        topic.tenant, topic.name, topic.epoch, topic.created_at, ring.first, len(ring)
    )
