"""Topic patterns, and the tree that finds the patterns of a topic. No readers and no topics here.

A name is read as words between dots. In a pattern the word ``*`` stands for exactly one word, and
``**``, which can only come last, for one or more: the rules of AMQP topic exchanges and of NATS
subjects, with stars for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from clevrd.core.names import check_topic
from clevrd.errors import InvalidRequest

ONE: Final = "*"
REST: Final = "**"

Words = tuple[str, ...]
SubscriberT = TypeVar("SubscriberT")


def parse_pattern(text: str) -> Words:
    """Return the words of a pattern.

    Raises:
        InvalidRequest: it is no possible topic, has no star, or a star where none can stand.
    """
    check_topic(text)
    words = tuple(text.split("."))
    if REST in words[:-1]:
        raise InvalidRequest("In a pattern ** stands for the rest of the name, so it comes last.")
    if any("*" in word for word in words if word not in (ONE, REST)):
        raise InvalidRequest(
            "In a pattern a star stands for a whole word between dots: orders.*, not ord*."
        )
    if words[-1] != REST and ONE not in words:
        raise InvalidRequest("A pattern has a star in it, like orders.*; name a topic as topic.")
    return words


def is_narrow(words: Words) -> bool:
    """Whether the pattern names its first word, so that it can't match everything."""
    return words[0] not in (ONE, REST)


def matches(words: Words, name: str) -> bool:
    """Whether the pattern matches the topic ``name``."""
    parts = name.split(".")
    if words[-1] == REST:
        if len(parts) < len(words):
            return False
        words = words[:-1]
    elif len(parts) != len(words):
        return False
    return all(word in (ONE, part) for word, part in zip(words, parts, strict=False))


class _Node(Generic[SubscriberT]):
    """All patterns that begin with the words on the way here."""

    __slots__ = ("children", "here", "rest")

    def __init__(self) -> None:
        self.children: dict[str, _Node[SubscriberT]] = {}
        # Subscribers whose pattern ends here, and whose ** begins here; dicts as ordered sets.
        self.here: dict[SubscriberT, None] = {}
        self.rest: dict[SubscriberT, None] = {}

    @property
    def is_empty(self) -> bool:
        return not (self.children or self.here or self.rest)


class PatternTree(Generic[SubscriberT]):
    """The patterns that are subscribed, by tenant, and the subscriber of each.

    Finding costs a step for each word of the name and each star beside it, however many patterns
    there are.
    """

    __slots__ = ("_roots", "size")

    def __init__(self) -> None:
        self._roots: dict[str, _Node[SubscriberT]] = {}
        # Patterns subscribed; a pattern with two subscribers counts twice.
        self.size = 0

    def add(self, tenant: str, words: Words, subscriber: SubscriberT) -> None:
        """Have ``subscriber`` found for topics that match; it must not have these words yet."""
        node = self._roots.setdefault(tenant, _Node())
        for word in _path(words):
            node = node.children.setdefault(word, _Node())
        _subscribers(node, words)[subscriber] = None
        self.size += 1

    def remove(self, tenant: str, words: Words, subscriber: SubscriberT) -> None:
        """Find ``subscriber`` by these words no more."""
        root = node = self._roots[tenant]
        way = [(root, "")]
        for word in _path(words):
            way.append((node, word))
            node = node.children[word]
        del _subscribers(node, words)[subscriber]
        self.size -= 1
        for parent, word in reversed(way[1:]):
            if parent.children[word].is_empty:
                del parent.children[word]
        if root.is_empty:
            del self._roots[tenant]

    def find(self, tenant: str, name: str) -> list[SubscriberT]:
        """Return the subscribers of patterns that match, once for each such pattern."""
        root = self._roots.get(tenant)
        return list(_found(root, name.split("."), 0)) if root is not None else []


def _path(words: Words) -> Words:
    return words[:-1] if words[-1] == REST else words


def _subscribers(node: _Node[SubscriberT], words: Words) -> dict[SubscriberT, None]:
    return node.rest if words[-1] == REST else node.here


def _found(node: _Node[SubscriberT], parts: list[str], depth: int) -> Iterator[SubscriberT]:
    if depth == len(parts):
        yield from node.here
        return
    yield from node.rest
    # A name may have a star for a word; the set looks there once.
    for word in {parts[depth], ONE}:
        child = node.children.get(word)
        if child is not None:
            yield from _found(child, parts, depth + 1)
