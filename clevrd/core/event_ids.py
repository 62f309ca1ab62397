"""Ids of events of a connection with many topics: where it is in each of them, spelled and read.

An EventSource comes back with the last id it has seen and nothing else, so each id holds all. It is
a list of ``epoch:offset/0`` for the first topic that the URL names, and so on, and of
``epoch:offset@name`` for topics that a pattern found; the event's own is the first. ``*`` says that
the patterns have found all that there was, so what is not in the list began later. No connections
here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, unquote

import msgspec

from clevrd.core.beginning import After, Beginning
from clevrd.core.subscription import FROM_THE_START, SubscribeRequest
from clevrd.errors import InvalidRequest, TooManyTopics

# Half of what servers and proxies take for a header field, which the last id comes back in.
MAX_EVENT_ID_BYTES: Final = 4_000

# No id is longer: these, and 50 topics of the URL.
MAX_READ_BYTES: Final = 6_000

# 50 topics of the URL, as many as fit of those that patterns find, and a star.
_MAX_ENTRIES: Final = 50 + MAX_EVENT_ID_BYTES // len("e:,@n" + "0" * 15) + 1

ALL_FOUND: Final = "*"
# Stands among topics for all patterns; no topic is called that.
_PATTERNS: Final = ""

# An offset of any topic that is published to for a century at 100,000 messages a second.
_OFFSET_DIGITS: Final = 15

# More than any topic will ever count to, and cheap for int().
_OFFSET: Final = re.compile(r"[0-9]{1,18}", re.ASCII)
_EPOCH: Final = re.compile(r"[0-9A-Za-z._-]{1,64}", re.ASCII)
_INDEX: Final = re.compile(r"[0-9]{1,3}", re.ASCII)
# Where a label begins; an epoch has neither.
_LABEL: Final = re.compile(r"[/@]")

_AS_RECEIVED: Final = "give the whole id of one event, as you received it."


class TopicPositions(msgspec.Struct, frozen=True):
    """An id as it is read: a position for each topic, by its number on the URL or by its name."""

    by_index: dict[int, After]
    by_name: dict[str, After]
    # All topics that the patterns matched are in it; others began later.
    has_found_all: bool


class EventIds:
    """Where one subscriber is in each of its topics, as the ids of its events spell it.

    Args:
        beginnings: topics in the order of the URL, and where each begins.
        known: positions of topics that a pattern had found. One that is gone is said on: should it
            come back, its subscriber is told what it missed.
        has_found_all: topics that are matched and not in ``known`` began later.
    """

    __slots__ = ("_costs", "_given_way", "_gone", "_labels", "_texts", "last_moved")

    def __init__(
        self,
        beginnings: Mapping[str, Beginning],
        known: Mapping[str, After],
        *,
        has_found_all: bool,
    ) -> None:
        # Topics of the URL -> what follows their positions.
        self._labels = {name: b"/%d" % index for index, name in enumerate(beginnings)}
        # Topic -> `,epoch:offset` and its label. A topic of the URL that has begun nowhere yet is
        # not in it, and begins as the URL says.
        self._texts: dict[str, bytes] = {}
        # Topic that a pattern found -> bytes that it takes of an id at most.
        self._costs: dict[str, int] = {}
        # The topic that moved last, which is not in the texts as long as no other one moves: most
        # events follow one of the same topic, and their ids end the same.
        self.last_moved: EventIdSlot | None = None
        begun = {name: at for name, at in beginnings.items() if isinstance(at, After) and at.epoch}
        for name, at in (*begun.items(), *known.items()):
            slot = self._slot(name, at.epoch)
            self._texts[name] = b",%b:%d%b" % (at.epoch.encode(), at.offset, slot.label)
        # Known topics that have not come back, in the order in which they were said.
        self._gone = dict.fromkeys(known)
        # Known topics that have given way, and of which the subscriber is yet to be told.
        self._given_way: list[str] = []
        if has_found_all:
            self.note_all_found()

    def add(self, name: str, epoch: str) -> EventIdSlot:
        """Return the slot of one more topic, which has begun nowhere yet.

        Where there is no room, topics that have not come back give way.

        Raises:
            TooManyTopics: the ids would become too long.
        """
        slot = self._slot(name, epoch)
        self._gone.pop(name, None)
        # The URL's own are bounded by the URL.
        while name in self._costs and sum(self._costs.values()) > MAX_EVENT_ID_BYTES:
            if not self._gone:
                self.forget(name)
                raise TooManyTopics(
                    "More topics match than an event's id has room for"
                    f" ({MAX_EVENT_ID_BYTES} bytes); subscribe to so many over /ws.",
                    sum(self._costs.values()),
                    MAX_EVENT_ID_BYTES,
                )
            gone = next(iter(self._gone))
            self.forget(gone)
            self._given_way.append(gone)
        return slot

    def given_way(self) -> list[str]:
        """Return topics that have given way since the last call: what followed there is lost."""
        names, self._given_way = self._given_way, []
        return names

    def forget(self, name: str) -> None:
        """Leave out a topic of which nothing waits, or nothing more is to be told."""
        self._note_last()
        self._texts.pop(name, None)
        self._costs.pop(name, None)
        self._gone.pop(name, None)

    def note_all_found(self) -> None:
        """Say from now on that all topics which the patterns match are there."""
        self._note_last()
        self._texts[_PATTERNS] = b",*"

    def whole(self) -> bytes:
        """Return an id of no topic's event."""
        self._note_last()
        return b"".join(self._texts.values())[1:]

    def rest_of(self, slot: EventIdSlot) -> bytes:
        """Return what follows the position of a topic that moves now, where another moved last."""
        self._note_last()
        self.last_moved = slot
        # The text of the topic that moves is not among the others'; the topic keeps its place in
        # the order.
        self._texts[slot.name] = b""
        return slot.label + b"".join(self._texts.values())

    def _note_last(self) -> None:
        """Have all topics in the texts."""
        last, self.last_moved = self.last_moved, None
        if last is not None:
            self._texts[last.name] = b",%b%b" % (last.position, last.label)

    def _slot(self, name: str, epoch: str) -> EventIdSlot:
        label = self._labels.get(name)
        if label is None:
            label = _name_label(name)
            self._costs[name] = len(epoch) + len(":,") + _OFFSET_DIGITS + len(label)
        return EventIdSlot(self, name, label)


class EventIdSlot:
    """The slot of one topic in the ids of one subscriber."""

    __slots__ = ("_ids", "_rest", "label", "name", "position")

    def __init__(self, ids: EventIds, name: str, label: bytes) -> None:
        self._ids = ids
        self._rest = b""
        self.name = name
        # This follows a position of this topic.
        self.label = label
        # Where the subscriber is; of use while this is the topic that moved last.
        self.position = b""

    def move(self, position: bytes) -> bytes:
        """Note where the subscriber is in the topic; return what follows that in an event's id."""
        self.position = position
        if self._ids.last_moved is not self:
            self._rest = self._ids.rest_of(self)
        return self._rest


def event_ids_for(request: SubscribeRequest) -> EventIds:
    """Return the ids of events for a subscriber that begins with ``request``."""
    patterns = request.patterns.values()
    return EventIds(
        request.topics,
        {name: at for pattern in patterns for name, at in pattern.positions.items()},
        has_found_all=bool(patterns)
        and all(pattern.beginning == FROM_THE_START for pattern in patterns),
    )


def _name_label(name: str) -> bytes:
    return f"@{quote(name, safe='')}".encode()


def read_position(epoch: str, offset: str, name: str) -> After:
    """Return the position that two texts spell, which the client calls ``name``.

    Raises:
        InvalidRequest: it is none.
    """
    if not _EPOCH.fullmatch(epoch) or not _OFFSET.fullmatch(offset):
        form = "epoch:offset" if name != "offset and epoch" else "a whole number and a short text"
        raise InvalidRequest(f"{name} must be {form}, as you received it.")
    return After(int(offset), epoch)


def names_topics(event_id: str) -> bool:
    """Whether ``event_id`` is one of a connection with many topics."""
    return event_id.startswith(ALL_FOUND) or bool(_LABEL.search(event_id))


def read_topic_positions(event_id: str, name: str) -> TopicPositions:
    """Return what the id of an event says, which the client calls ``name``.

    Raises:
        InvalidRequest: it is no such id, or says two things of a topic.
    """
    entries = event_id.split(",")
    if len(event_id) > MAX_READ_BYTES or len(entries) > _MAX_ENTRIES:
        raise InvalidRequest(f"{name} is longer than any event's id; {_AS_RECEIVED}")
    if not event_id.isascii():
        raise InvalidRequest(f"{name} is not ASCII; {_AS_RECEIVED}")
    by_index: dict[int, After] = {}
    by_name: dict[str, After] = {}
    for entry in entries:
        if entry == ALL_FOUND:
            continue
        position, label = _split(entry, name)
        epoch, _, offset = position.rpartition(":")
        at = read_position(epoch, offset, name)
        known = (
            by_index.setdefault(label, at)
            if isinstance(label, int)
            else by_name.setdefault(label, at)
        )
        if known is not at:
            raise InvalidRequest(f"{name} has two positions of one topic; {_AS_RECEIVED}")
    return TopicPositions(by_index, by_name, has_found_all=ALL_FOUND in entries)


def _split(entry: str, name: str) -> tuple[str, int | str]:
    """Return the position in ``entry`` and whose it is."""
    match = _LABEL.search(entry)
    position, label = (entry[: match.start()], entry[match.start() :]) if match else (entry, "")
    if label.startswith("@") and len(label) > 1:
        try:
            return position, unquote(label[1:], errors="strict")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{name} names a topic that is not UTF-8.") from error
    if _INDEX.fullmatch(label[1:]):
        return position, int(label[1:])
    raise InvalidRequest(f"{name} does not say whose position {entry[:100]!r} is; {_AS_RECEIVED}")
