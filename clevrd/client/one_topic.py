"""The feed of one topic over ``GET /subscribe``: its query and its frames. No I/O here.

A server without notices works too. Shapes: docs/wire.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from clevrd.client.errors import BadAnswer
from clevrd.client.position import Position, Tracker
from clevrd.client.wire import (
    NOTICE_BEGINS,
    NOTICE_PROTOCOL,
    Gap,
    GoingAway,
    Message,
    Subscribed,
    read_message,
    read_notice,
)

# Messages that a reader without positions asks for after a lost connection: as many as a server
# keeps of a topic by default.
RESUME_LAST: Final = 10_000


class OneTopic:
    """The feed of one topic.

    Args:
        options: ``policy``, ``buffer``, ``subscriber_id``, ``headers`` (True), ``last`` and
            ``since``, where they were given.
        warn: called with the server's warnings.
    """

    path = "/subscribe"
    # The first frame says where the connection begins, so no item comes before it.
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
        self._query = {"topic": topic, **{name: _text(value) for name, value in options.items()}}
        self._tracker = Tracker(topic, position)
        # True when the next connection asks for a place in the past, so that a gap may come first.
        self._is_resumed = position is not None or "since" in options
        self.is_greeted = False
        self.away_ms = 0
        # True when the server of this connection sends notices: positions and gaps.
        self._has_notices = False
        # Epoch of this connection's messages; empty from a server without notices.
        self._epoch = ""
        # The message behind a gap that was handed out; None once the message is handed out too.
        self._waiting: Message | None = None

    def positions(self) -> dict[str, Position]:
        """Return topic -> position of the items handed out; empty before the first."""
        position = self._tracker.position
        return {} if position is None else {self.only_topic: position}

    def before(self, item: Message | Gap) -> Position | None:
        """Return the topic's position before ``item``, the last item that was handed out."""
        return self._tracker.before

    def query(self, *, is_return: bool) -> dict[str, str]:
        """Return the query of the next connection, with the position reached so far."""
        tracker = self._tracker
        query = dict(self._query)
        if tracker.epoch:
            query.pop("last", None)
            query.pop("since", None)
            query |= {"offset": str(tracker.offset), "epoch": tracker.epoch}
            self._is_resumed = True
        elif is_return and "since" not in query:
            # A reader that asked for no past and has had no message has no place to resume from.
            wanted = self._query.get("last")
            if wanted != "0" or tracker.last_id:
                query["last"] = str(max(RESUME_LAST, int(wanted or 0)))
        return query

    def begin(self, protocol: str | None) -> list[bytes]:
        """Begin with a new connection; there are no commands, since the query says everything."""
        self.away_ms = 0
        self._has_notices = protocol == NOTICE_PROTOCOL
        self.is_greeted = not self._has_notices
        if not self._has_notices:
            self._tracker.start_without_positions()
            self._epoch = ""
        return []

    def greet(self, text: bytes) -> None:
        """Process the first frame, which says where this connection begins."""
        greeting = read_notice(text)
        if not isinstance(greeting, Subscribed):
            raise BadAnswer(
                f"The server did not begin with a position, as {NOTICE_PROTOCOL} does; check the"
                " URL, and that no proxy changes what it passes on."
            )
        self._warn(greeting.warnings)
        self._tracker.greet(greeting, is_resumed=self._is_resumed)
        self._epoch = greeting.epoch
        self.is_greeted = True

    def held(self) -> Message | None:
        """Return the message behind the gap that was handed out last; None without one."""
        message, self._waiting = self._waiting, None
        return message

    def read(self, text: bytes) -> Message | Gap | None:
        """Return the item that a frame brings, None for a frame without one."""
        if not self.is_greeted:
            self.greet(text)
            return None
        if not self._has_notices:
            message = read_message(text, "")
            return self._step(message) if self._tracker.is_new(message) else None
        if text.startswith(NOTICE_BEGINS):
            return self._follow(text)
        message = read_message(text, self._epoch)
        return message if self._tracker.take(message) else None

    def _follow(self, text: bytes) -> Gap | None:
        """Process a notice; return the gap that it tells, if any."""
        match notice := read_notice(text):
            case Gap():
                self._tracker.miss(notice)
                return notice
            case Subscribed():
                # The topic has begun a new epoch; the gap that says so follows.
                self._tracker.greet(notice, is_resumed=True)
                self._epoch = notice.epoch
            case GoingAway():
                self.away_ms = notice.reconnect_after_ms
        return None

    def _step(self, message: Message) -> Message | Gap:
        gap = self._tracker.step(message)
        if gap is None:
            return message
        self._waiting = message
        return gap


def _text(value: str | int) -> str:
    """Return an option's value as a query has it."""
    return "true" if value is True else str(value)
