"""Topics and patterns over ``GET /ws``: the commands, and what frames mean. No I/O here.

Each topic has a greeting, offsets and gaps of its own. Shapes: docs/wire.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from clevrd.client.errors import BadAnswer
from clevrd.client.position import Position
from clevrd.client.positions import Trackers
from clevrd.client.wire import (
    CONTROL_BEGINS,
    CONTROL_PROTOCOL,
    Control,
    Failure,
    Forgotten,
    Gap,
    GoingAway,
    Message,
    Subscribed,
    Watching,
    command,
    put_into_epoch,
    read_control,
    read_message,
)

# The bound of the messages that come before the last command is answered, while nobody takes them.
# The server carries a command out when its connection takes more, so that it can depend on all
# messages before it being read; up to its own buffers (SO_SNDBUF 128 KiB and write_high_bytes) it
# goes on without that.
MAX_HELD_BYTES: Final = 1 << 20


class ManyTopics:
    """The feed of several topics, and of those that patterns match.

    Args:
        options: ``policy``, ``buffer``, ``last`` and ``since``, as far as they were given.
        positions: where an earlier subscription ended; None where there was none.
        warn: hears what the server warns of.
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
        self._manner = {name: options[name] for name in ("policy", "buffer") if name in options}
        self._trackers = Trackers(topics, patterns, positions or {})
        # By pattern: whether a server has ever begun with it. A topic that is unknown now began
        # after that.
        self._has_begun = dict.fromkeys(patterns, positions is not None)
        self.is_greeted = False
        self.away_ms = 0
        # Refs of the commands that are not answered yet.
        self._asked: set[int] = set()
        # Patterns that this connection goes on with, by positions.
        self._resumed: set[str] = set()
        # Items that were read while nobody took them, each with its topic's position behind it.
        # They outlive their connection, or one that is cut before all is greeted would have brought
        # nothing.
        self._held: deque[tuple[Message | Gap, Position | None]] = deque()
        self._held_bytes = 0
        # Positions of topics as the user has them, as long as items are held; trackers are ahead.
        self._handed_out: dict[str, Position | None] = {}
        # The last of _held that was handed out, and where its topic stood before it.
        self._last_held: tuple[Message | Gap | None, Position | None] = (None, None)

    @property
    def is_full(self) -> bool:
        """Whether as much is held as may be."""
        return self._held_bytes >= MAX_HELD_BYTES

    def positions(self) -> dict[str, Position]:
        """Return by topic up to where everything was handed out."""
        told: dict[str, Position | None] = {**self._trackers.positions(), **self._handed_out}
        return {topic: position for topic, position in told.items() if position is not None}

    def before(self, item: Message | Gap) -> Position | None:
        """Return where the topic of ``item``, which was handed out last, stood before it."""
        held, position = self._last_held
        return position if item is held else self._trackers.heard_of(item.topic).before

    def query(self, *, is_return: bool) -> dict[str, str]:
        """Return no query: commands say everything."""
        return {}

    # --- commands ---

    def begin(self, protocol: str | None) -> list[bytes]:
        """Begin with a new connection; return the commands that are to be sent, in order.

        Topics come first: one that a pattern brought could not be subscribed by its name.
        """
        if protocol != CONTROL_PROTOCOL:
            raise BadAnswer(
                f"The server does not speak {CONTROL_PROTOCOL}, which several topics and patterns"
                " need; check the URL, and that no proxy drops Sec-WebSocket-Protocol."
            )
        self.away_ms = 0
        self._resumed.clear()
        wishes = [
            *({"topic": topic, **self._topic_wish(topic)} for topic in self._topics),
            *({"pattern": pattern, **self._pattern_wish(pattern)} for pattern in self._has_begun),
        ]
        self._asked = set(range(1, len(wishes) + 1))
        self.is_greeted = False
        return [
            command("subscribe", ref=ref, **wish, **self._manner)
            for ref, wish in enumerate(wishes, start=1)
        ]

    def _topic_wish(self, topic: str) -> Mapping[str, object]:
        position = self._trackers.position_of(topic)
        if position is None:
            return self._beginning
        return {"epoch": position.epoch, "offset": position.offset}

    def _pattern_wish(self, pattern: str) -> Mapping[str, object]:
        known = self._trackers.matching(pattern)
        if self._has_begun[pattern]:
            self._resumed.add(pattern)
            return {"positions": known}
        # Known by another pattern, or cut before all was found: others begin as they were to.
        return {**self._beginning, "positions": known} if known else self._beginning

    # --- frames ---

    def greet(self, text: bytes) -> None:
        """Take in a frame while nobody takes items, and hold what it brings."""
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
        """Return the next item that was read while nobody took any."""
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
        """Return what a frame brings, None when that is nothing for the user."""
        return self._take(_parse(text))

    def _take(self, frame: Message | Control | None) -> Message | Gap | None:
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
                # A topic that is not whole from here on begins with a gap.
                self._resumed.add(frame.pattern)
                self._answered(frame.ref)
            case Forgotten():
                self._trackers.forget(frame.topic)
            case GoingAway():
                self.away_ms = frame.reconnect_after_ms
            case Failure():
                # Without a ref it is a topic that is left out, which is a loss as well.
                raise frame.as_error()
        return None

    def _begin_topic(self, greeting: Subscribed) -> None:
        """Take the position at which a topic begins, or begins a new life."""
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


def _parse(text: bytes) -> Message | Control | None:
    if text.startswith(CONTROL_BEGINS):
        return read_control(text)
    return read_message(text, "")
