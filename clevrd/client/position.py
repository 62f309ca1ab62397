"""Tracker: one topic's position, and which messages are new or missing. No I/O here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Self

import msgspec

from clevrd.client.arguments import MAX_COUNT, check_topic_name, is_utf_8, short, type_name
from clevrd.client.wire import Gap, Message, Subscribed

# Digits of an offset of 64 bits at most; Python converts a text of some thousand digits slowly or
# not at all.
_MAX_DIGITS: Final = 19


class Position(msgspec.Struct, frozen=True):
    """A place in a topic: all messages up to ``offset`` in the epoch ``epoch`` were had.

    `str` makes the text ``epoch:offset``, for a file or a database.
    """

    epoch: str
    offset: int

    def __str__(self) -> str:
        """Return the position as text."""
        return f"{self.epoch}:{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the position that ``text`` means.

        Raises:
            TypeError: ``text`` is not text.
            ValueError: ``text`` is not ``epoch:offset``.
        """
        if not isinstance(text, str):
            raise TypeError(f"A position is text like f7502dc3:41, not {type_name(text)}.")
        epoch, _, offset = text.strip().rpartition(":")
        is_one = epoch and is_utf_8(epoch) and offset.isascii() and offset.isdecimal()
        if not is_one or len(offset) > _MAX_DIGITS or int(offset) > MAX_COUNT:
            raise ValueError(f"{short(text)} is no position; it is like f7502dc3:41")
        return cls(epoch, int(offset))


def position_of(given: Position | str) -> Position:
    """Return a position that is given as a Position or as its text.

    Raises:
        TypeError, ValueError: ``given`` is no position.
    """
    if not isinstance(given, Position):
        return Position.parse(given)
    # msgspec checks decoded values, but not arguments of a struct.
    if (type(given.epoch), type(given.offset)) != (str, int):
        raise TypeError("A position has text for its epoch and a whole number for its offset.")
    if given.offset > MAX_COUNT:
        raise ValueError("A position's offset is beyond what one can be.")
    if not given.epoch or not is_utf_8(given.epoch) or given.offset < 0:
        raise ValueError(f"{short(str(given))} is no position; it is like f7502dc3:41")
    return given


def positions_of(given: Mapping[str, Position | str]) -> dict[str, Position]:
    """Return the positions of several topics; raises as `position_of`."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"positions are by topic, as Subscription.positions has them, not {type_name(given)}."
        )
    for topic in given:
        if not isinstance(topic, str):
            raise TypeError(f"A topic of positions is text, not {type_name(topic)}.")
        check_topic_name(topic)
    return {topic: position_of(position) for topic, position in given.items()}


class Tracker:
    """The position in one topic; moves only when an item is handed out.

    With an epoch, the server tells positions and gaps. A server without epochs tells none: there
    the ids decide which messages are new, and the offsets which are missing.
    """

    __slots__ = ("_before", "_greeting", "_topic", "epoch", "last_id", "offset")

    def __init__(self, topic: str, position: Position | None = None) -> None:
        self._topic = topic
        self.last_id = ""
        self.epoch = position.epoch if position else ""
        self.offset = position.offset if position else 0
        # The position at which this connection begins, while a gap before it was not handed out
        # yet; else None.
        self._greeting: Subscribed | None = None
        # Epoch and offset before the last item.
        self._before = (self.epoch, self.offset)

    @property
    def before(self) -> Position | None:
        """The position before the last item; None as for `position`."""
        return Position(*self._before) if self._before[0] else None

    @property
    def position(self) -> Position | None:
        """The position up to which items were handed out; None until a server has told one."""
        return Position(self.epoch, self.offset) if self.epoch else None

    def greet(self, greeting: Subscribed, *, is_resumed: bool) -> None:
        """Set the position at which a connection begins.

        A gap follows a resume that lost messages. Until the gap was handed out the old position
        holds, so that a user who stores it then is told of the gap again.
        """
        self._greeting = greeting
        if greeting.recovered or not is_resumed:
            self._begin()

    def start_without_positions(self) -> None:
        """Go on by ids, since this connection's server tells no positions."""
        self.epoch = ""
        self._before = "", 0
        self._greeting = None

    def miss(self, gap: Gap) -> None:
        """Move behind a gap that the server told."""
        self._before = self.epoch, self.offset
        self._begin()
        if gap.last is not None:
            self.offset = max(self.offset, gap.last)

    def take(self, message: Message) -> bool:
        """Move to a message of a server with positions; return whether it is new."""
        self._before = self.epoch, self.offset
        if self._greeting is not None:
            self._begin()
        if message.offset <= self.offset:
            return False
        self.last_id, self.offset = message.id, message.offset
        return True

    def is_new(self, message: Message) -> bool:
        """Return whether a message of a server without positions is new.

        Ids rise strictly and have a fixed width, so they are compared as text.
        """
        return message.id > self.last_id

    def step(self, message: Message) -> Gap | None:
        """Move to a new message of a server without positions; return the gap before it."""
        expected = self.offset + 1
        is_first = not self.last_id or expected == 1
        self.last_id, self.offset = message.id, message.offset
        if is_first or message.offset in (0, expected):
            return None
        if message.offset < expected:
            return Gap(self._topic, reason="epoch")
        missed = message.offset - expected
        return Gap(self._topic, expected, message.offset - 1, missed, "unknown")

    def _begin(self) -> None:
        if self._greeting is not None:
            self.epoch, self.offset = self._greeting.epoch, self._greeting.offset
            self._greeting = None
