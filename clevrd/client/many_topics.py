"""The feed of topics and patterns over ``GET /ws``: its commands and frames. No I/O here.

Each topic has its own `subscribed` notice, offsets and gaps. Shapes: docs/wire.md.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from clevrd.client.errors import BadAnswer
from clevrd.client.position import Position
from clevrd.client.positions import Trackers
from clevrd.client.wire import (
    NOTICE_BEGINS,
    NOTICE_PROTOCOL,
    RENEWAL_REF,
    Failure,
    Forgotten,
    Gap,
    GoingAway,
    Message,
    Notice,
    Subscribed,
    Watching,
    command,
    put_into_epoch,
    read_message,
    read_notice,
)

log = logging.getLogger(__name__)

# Most bytes of messages held while a subscription is being opened, before the last command is
# answered. The server may carry a command out only when its connection takes more, after all
# messages before it are read; up to its own buffers (SO_SNDBUF 128 KiB and write_high_bytes) it
# goes on without that.
MAX_HELD_BYTES: Final = 1 << 20


class ManyTopics:
    """The feed of several topics, and of the topics that patterns match.

    Args:
        options: ``policy``, ``buffer``, ``subscriber_id``, ``headers`` (True), ``last`` and
            ``since``, where they were given.
        positions: where an earlier subscription ended; None without one.
        warn: called with the server's warnings.
    """

    path = "/ws"
    only_topic = None

    def __init__(
        self,
        topics: Sequence[str],
        patterns: Sequence[str],
        options: Mapping[str, str | int],
        positions: Mapping[str, Position] | None,
        warn: Callable[[Iterable[str]], None],
    ) -> None:
        self._warn = warn
        self.name = ",".join((*topics, *patterns))
        self._topics = topics
        self._beginning = {name: options[name] for name in ("last", "since") if name in options}
        self._delivery_options = {
            name: options[name]
            for name in ("policy", "buffer", "subscriber_id", "headers")
            if name in options
        }
        self._trackers = Trackers(topics, patterns, positions or {})
        # Pattern -> whether a server has ever begun with it. If so, a topic without a position
        # began after that.
        self._has_begun = dict.fromkeys(patterns, positions is not None)
        self.is_greeted = False
        self.away_ms = 0
        # Refs of this connection's commands that are not answered yet.
        self._asked: set[int] = set()
        # Patterns that this connection resumes by positions.
        self._resumed: set[str] = set()
        # Items read while the subscription was being opened, each with its topic's position behind
        # it. They outlive their connection: otherwise a connection that is cut before it is open
        # would have brought no item.
        self._held: deque[tuple[Message | Gap, Position | None]] = deque()
        self._held_bytes = 0
        # Topic -> position as the user has it, for topics with items in _held; their trackers are
        # ahead.
        self._handed_out: dict[str, Position | None] = {}
        # The last item of _held that was handed out, and its topic's position before it.
        self._last_held: tuple[Message | Gap | None, Position | None] = (None, None)

    @property
    def is_full(self) -> bool:
        """Whether the held items have reached MAX_HELD_BYTES."""
        return self._held_bytes >= MAX_HELD_BYTES

    def positions(self) -> dict[str, Position]:
        """Return topic -> position up to which every item was handed out."""
        told: dict[str, Position | None] = {**self._trackers.positions(), **self._handed_out}
        return {topic: position for topic, position in told.items() if position is not None}

    def before(self, item: Message | Gap) -> Position | None:
        """Return the topic's position before ``item``, the last item that was handed out."""
        held, position = self._last_held
        return position if item is held else self._trackers.heard_of(item.topic).before

    def query(self, *, is_return: bool) -> dict[str, str]:
        """Return an empty query: the commands say everything."""
        return {}

    # --- commands ---

    def begin(self, protocol: str | None) -> list[bytes]:
        """Begin with a new connection; return the commands to send on it, in order.

        Topics come before patterns: a topic that a pattern brought could not be subscribed by its
        name.
        """
        if protocol != NOTICE_PROTOCOL:
            raise BadAnswer(
                f"The server does not speak {NOTICE_PROTOCOL}, which several topics and patterns"
                " need; check the URL, and that no proxy drops Sec-WebSocket-Protocol."
            )
        self.away_ms = 0
        self._resumed.clear()
        beginnings = [
            *({"topic": topic, **self._topic_beginning(topic)} for topic in self._topics),
            *(
                {"pattern": pattern, **self._pattern_beginning(pattern)}
                for pattern in self._has_begun
            ),
        ]
        self._asked = set(range(1, len(beginnings) + 1))
        self.is_greeted = False
        return [
            command("subscribe", ref=ref, **beginning, **self._delivery_options)
            for ref, beginning in enumerate(beginnings, start=1)
        ]

    def _topic_beginning(self, topic: str) -> Mapping[str, object]:
        position = self._trackers.position_of(topic)
        if position is None:
            return self._beginning
        return {"epoch": position.epoch, "offset": position.offset}

    def _pattern_beginning(self, pattern: str) -> Mapping[str, object]:
        known = self._trackers.matching(pattern)
        if self._has_begun[pattern]:
            self._resumed.add(pattern)
            return {"positions": known}
        # These topics came by another pattern, or the connection was cut before all were found;
        # topics without a position begin as for a first subscription.
        return {**self._beginning, "positions": known} if known else self._beginning

    # --- frames ---

    def greet(self, text: bytes) -> None:
        """Process a frame while the subscription is being opened, and hold its item."""
        frame = _parse(text)
        before = None
        if isinstance(frame, Message | Gap):
            before = self._trackers.heard_of(frame.topic).position
        item = self._take(frame)
        if item is not None:
            self._handed_out.setdefault(item.topic, before)
            self._held.append((item, self._trackers.heard_of(item.topic).position))
            self._held_bytes += len(text)

    def held(self) -> Message | Gap | None:
        """Return the next item that was held; None without one."""
        if not self._held:
            return None
        item, position = self._held.popleft()
        self._last_held = item, self._handed_out.get(item.topic)
        self._handed_out[item.topic] = position
        if not self._held:
            self._handed_out.clear()
            self._held_bytes = 0
        return item

    def read(self, text: bytes) -> Message | Gap | None:
        """Return the item that a frame brings, None for a frame without one."""
        return self._take(_parse(text))

    def _take(self, frame: Message | Notice | None) -> Message | Gap | None:
        match frame:
            case Message():
                tracker = self._trackers.heard_of(frame.topic)
                if not tracker.take(frame):
                    return None
                put_into_epoch(frame, tracker.epoch)
                return frame
            case Gap():
                self._trackers.heard_of(frame.topic).miss(frame)
                return frame
            case Subscribed():
                self._begin_topic(frame)
            case Watching() if frame.pattern in self._has_begun:
                self._has_begun[frame.pattern] = True
                self._warn(frame.warnings)
                # From here on a topic that has lost messages begins with a gap.
                self._resumed.add(frame.pattern)
                self._answered(frame.ref)
            case Forgotten():
                self._trackers.forget(frame.topic)
            case GoingAway():
                self.away_ms = frame.reconnect_after_ms
            case Failure() if frame.ref == RENEWAL_REF:
                # The connection goes on as it was until its credential ends.
                log.warning("token not renewed why=%s", frame.error)
            case Failure():
                # A failure without a ref is of a topic that the server leaves out, which is a loss
                # as well.
                raise frame.as_error()
        return None

    def _begin_topic(self, greeting: Subscribed) -> None:
        """Set the position at which a topic begins on this connection, or after a new start."""
        tracker = self._trackers.heard_of(greeting.topic)
        is_resumed = (
            tracker.position is not None
            or greeting.pattern in self._resumed
            or "since" in self._beginning
        )
        self._warn(greeting.warnings)
        tracker.greet(greeting, is_resumed=is_resumed)
        self._answered(greeting.ref)

    def _answered(self, ref: int | str | None) -> None:
        self._asked -= {ref}
        self.is_greeted = not self._asked


def _parse(text: bytes) -> Message | Notice | None:
    if text.startswith(NOTICE_BEGINS):
        return read_notice(text)
    return read_message(text, "")
