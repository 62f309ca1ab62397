"""Where a subscription stands: what is new, what is missing, what to resume from. No I/O here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Self

import msgspec

from clevrd.client.arguments import MAX_COUNT, check_topic_name, is_utf_8, short, type_name
from clevrd.client.wire import Gap, Message, Subscribed

# An offset of 64 bits has no more digits; Python reads a text of some thousand slowly or not at
# all.
_MAX_DIGITS: Final = 19


class Position(msgspec.Struct, frozen=True):
    """A place in a topic: everything up to ``offset`` of the topic's life ``epoch`` was had.

    Its text is ``epoch:offset``, for a file or a database.
    """

    epoch: str
    offset: int

    def __str__(self) -> str:
        """Return it as text."""
        return f"{self.epoch}:{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the position that ``text`` spells.

        Raises:
            TypeError: it is not text.
            ValueError: it is not ``epoch:offset``.
        """
        if not isinstance(text, str):
            raise TypeError(f"A position is text like f7502dc3:41, not {type_name(text)}.")
        epoch, _, offset = text.strip().rpartition(":")
        is_one = epoch and is_utf_8(epoch) and offset.isascii() and offset.isdecimal()
        if not is_one or len(offset) > _MAX_DIGITS or int(offset) > MAX_COUNT:
            raise ValueError(f"{short(text)} is no position; it is like f7502dc3:41")
        return cls(epoch, int(offset))


def position_of(given: Position | str) -> Position:
    """Return the position that is given as one or as its text.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(given, Position):
        return Position.parse(given)
    # msgspec checks what it decodes, and not what is passed to a struct.
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
    """What was had of one topic; moves only with what is handed out.

    With an epoch the server tells positions and gaps. Without one, from a server that has none,
    ids decide what is new and offsets what is missing.
    """

    __slots__ = ("_before", "_greeting", "_topic", "epoch", "last_id", "offset")

    def __init__(self, topic: str, position: Position | None = None) -> None:
        self._topic = topic
        self.last_id = ""
        self.epoch = position.epoch if position else ""
        self.offset = position.offset if position else 0
        # The place where this connection begins, while a gap that belongs in front was not handed
        # out.
        self._greeting: Subscribed | None = None
        # Epoch and offset before the item that was taken in last.
        self._before = (self.epoch, self.offset)

    @property
    def before(self) -> Position | None:
        """Where it stood before the item that was taken in last; None as `position`."""
        return Position(*self._before) if self._before[0] else None

    @property
    def position(self) -> Position | None:
        """What was handed out so far; None as long as no server has told it."""
        return Position(self.epoch, self.offset) if self.epoch else None

    def greet(self, greeting: Subscribed, *, is_resumed: bool) -> None:
        """Take the position at which a connection begins.

        A resume that is not whole is followed by a gap. Until that was handed out the old
        position holds, so that who stores it then is told the gap again.
        """
        self._greeting = greeting
        if greeting.recovered or not is_resumed:
            self._begin()

    def start_without_positions(self) -> None:
        """Go on by ids: this connection's server tells no positions."""
        self.epoch = ""
        self._before = "", 0
        self._greeting = None

    def miss(self, gap: Gap) -> None:
        """Take in a gap that the server told."""
        self._before = self.epoch, self.offset
        self._begin()
        if gap.last is not None:
            self.offset = max(self.offset, gap.last)

    def take(self, message: Message) -> bool:
        """Take in a message from a server with positions; return whether it is new."""
        self._before = self.epoch, self.offset
        if self._greeting is not None:
            self._begin()
        if message.offset <= self.offset:
            return False
        self.last_id, self.offset = message.id, message.offset
        return True

    def is_new(self, message: Message) -> bool:
        """Say whether a message from a server without positions was not had yet.

        Ids rise strictly and have a fixed width, so their order is that of their text.
        """
        return message.id > self.last_id

    def step(self, message: Message) -> Gap | None:
        """Take in a new message from a server without positions; return the gap before it."""
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
