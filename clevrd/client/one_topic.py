"""One topic over ``GET /subscribe``: what is asked for, and what its frames mean. No I/O here.

Works with servers without control frames too. Shapes: docs/wire.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from clevrd.client.errors import BadAnswer
from clevrd.client.position import Position, Tracker
from clevrd.client.wire import (
    CONTROL_BEGINS,
    CONTROL_PROTOCOL,
    Gap,
    GoingAway,
    Message,
    Subscribed,
    read_control,
    read_message,
)

# A reader without positions asks for this many after a lost connection: the server's default for
# the messages it keeps of a topic.
RESUME_LAST: Final = 10_000


class OneTopic:
    """The feed of one topic.

    Args:
        options: ``policy``, ``buffer``, ``last`` and ``since``, as far as they were given.
        warn: hears what the server warns of.
    """

    path = "/subscribe"
    # Its first frame is its greeting, so nothing comes before it.
    is_full = False

    def __init__(
        self,
        topic: str,
        options: Mapping[str, str | int],
        position: Position | None,
        warn: Callable[[Iterable[str]], None],
    ) -> None:
        self._warn = warn
        self.name = self.only_topic = topic
        self._query = {"topic": topic, **{name: str(value) for name, value in options.items()}}
        self._tracker = Tracker(topic, position)
        # The very first connection asks for a place in the past: a gap may come first.
        self._is_resumed = position is not None or "since" in options
        self.is_greeted = False
        self.away_ms = 0
        # The server of this connection tells positions and gaps.
        self._has_control = False
        # Epoch of the messages of this connection.
        self._epoch = ""
        # The message behind a gap, while the gap alone was handed out.
        self._waiting: Message | None = None

    def positions(self) -> dict[str, Position]:
        """Return up to where everything was handed out, once a server has told it."""
        position = self._tracker.position
        return {} if position is None else {self.only_topic: position}

    def before(self, item: Message | Gap) -> Position | None:
        """Return where the topic stood before ``item``, which was handed out last."""
        return self._tracker.before

    def query(self, *, is_return: bool) -> dict[str, str]:
        """Return the query of the next connection: where this subscription stands."""
        tracker = self._tracker
        query = dict(self._query)
        if tracker.epoch:
            query.pop("last", None)
            query.pop("since", None)
            query |= {"offset": str(tracker.offset), "epoch": tracker.epoch}
            self._is_resumed = True
        elif is_return and "since" not in query:
            # A reader that wanted no past and has seen nothing has no place to resume from.
            wanted = self._query.get("last")
            if wanted != "0" or tracker.last_id:
                query["last"] = str(max(RESUME_LAST, int(wanted or 0)))
        return query

    def begin(self, protocol: str | None) -> list[bytes]:
        """Begin with a new connection; the handshake has said everything."""
        self.away_ms = 0
        self._has_control = protocol == CONTROL_PROTOCOL
        self.is_greeted = not self._has_control
        if not self._has_control:
            self._tracker.start_without_positions()
            self._epoch = ""
        return []

    def greet(self, text: bytes) -> None:
        """Take in the first frame, which says where this connection begins."""
        greeting = read_control(text)
        if not isinstance(greeting, Subscribed):
            raise BadAnswer(
                f"The server did not begin with a position, as {CONTROL_PROTOCOL} does; check the"
                " URL, and that no proxy changes what it passes on."
            )
        self._warn(greeting.warnings)
        self._tracker.greet(greeting, is_resumed=self._is_resumed)
        self._epoch = greeting.epoch
        self.is_greeted = True

    def held(self) -> Message | None:
        """Return the message that a gap was put in front of."""
        message, self._waiting = self._waiting, None
        return message

    def read(self, text: bytes) -> Message | Gap | None:
        """Return what a frame brings, None when that is nothing for the user."""
        if not self.is_greeted:
            self.greet(text)
            return None
        if not self._has_control:
            message = read_message(text, "")
            return self._step(message) if self._tracker.is_new(message) else None
        if text.startswith(CONTROL_BEGINS):
            return self._follow(text)
        message = read_message(text, self._epoch)
        return message if self._tracker.take(message) else None

    def _follow(self, text: bytes) -> Gap | None:
        """Do what a control frame says."""
        match control := read_control(text):
            case Gap():
                self._tracker.miss(control)
                return control
            case GoingAway():
                self.away_ms = control.reconnect_after_ms
        return None

    def _step(self, message: Message) -> Message | Gap:
        gap = self._tracker.step(message)
        if gap is None:
            return message
        self._waiting = message
        return gap
