"""Feeds: the protocol of a subscription, to one topic or to several. No I/O here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from clevrd.client.many_topics import ManyTopics
from clevrd.client.one_topic import OneTopic
from clevrd.client.position import Position
from clevrd.client.positions import words_of
from clevrd.client.wire import Gap, Message
from clevrd.core.patterns import matches


class Feed(Protocol):
    """Makes a subscription's queries and commands, reads its frames, and keeps its positions.

    The subscription opens connections and reads from them; a feed outlives all of them.
    """

    # Milliseconds that the server asks clients to stay away after the close that it has announced;
    # 0 if it has not.
    away_ms: int

    @property
    def path(self) -> str:
        """The path of the endpoint."""

    @property
    def name(self) -> str:
        """The topics and patterns, for logs."""

    @property
    def only_topic(self) -> str | None:
        """The topic of a subscription to one topic; None for any other."""

    @property
    def is_greeted(self) -> bool:
        """Whether every topic and pattern of this connection has begun."""

    @property
    def is_full(self) -> bool:
        """Whether the user has to take items before more frames are read."""

    def positions(self) -> dict[str, Position]:
        """Return topic -> position up to which every item was handed out."""

    def before(self, item: Message | Gap) -> Position | None:
        """Return the topic's position before ``item``, the last item that was handed out."""

    def query(self, *, is_return: bool) -> dict[str, str]:
        """Return the query of the next connection; ``is_return`` after a failed one."""

    def begin(self, protocol: str | None) -> Sequence[bytes]:
        """Begin with a new connection; return the text frames to send on it.

        Raises:
            BadAnswer: the server has not taken the subprotocol that is needed.
        """

    def greet(self, text: bytes) -> None:
        """Process a frame while the subscription is being opened. Raises as `read`."""

    def held(self) -> Message | Gap | None:
        """Return the next item that was read already; None without one."""

    def read(self, text: bytes) -> Message | Gap | None:
        """Return the item that a frame brings, None for a frame without one.

        Raises:
            one of UNREADABLE, BadAnswer: no server of clevrd's sends such a frame.
            Refused: the server refused one of the topics or patterns.
        """


def feed_of(
    topics: Sequence[str],
    patterns: Sequence[str],
    options: Mapping[str, str | int],
    position: Position | None,
    positions: Mapping[str, Position] | None,
    warn: Callable[[Iterable[str]], None],
) -> Feed:
    """Return the feed of ``topics`` and ``patterns``.

    Args:
        options: ``policy``, ``buffer``, ``subscriber_id``, ``headers`` (True), ``last`` and
            ``since``, where they were given.
        warn: called with the server's warnings.

    Raises:
        ValueError: there is no topic and no pattern, or one twice; or two arguments say where to
            begin.
    """
    _check_names(topics, patterns)
    given = [options.get("last"), options.get("since"), position, positions]
    if sum(each is not None for each in given) > 1:
        raise ValueError(
            "last, since, position and positions each say where to begin; give one of them."
        )
    _warn_of_others(topics, patterns, positions or {}, warn)
    if len(topics) == 1 and not patterns:
        return OneTopic(topics[0], options, position or (positions or {}).get(topics[0]), warn)
    if position is not None:
        raise ValueError("position is for one topic without patterns; give positions, by topic.")
    return ManyTopics(topics, patterns, options, positions, warn)


def _warn_of_others(
    topics: Sequence[str],
    patterns: Sequence[str],
    positions: Iterable[str],
    warn: Callable[[Iterable[str]], None],
) -> None:
    """Warn of positions whose topic is not subscribed: it may be misspelt."""
    named = set(topics)
    wanted = [words_of(pattern) for pattern in patterns]
    others = [
        topic
        for topic in positions
        if topic not in named and not any(matches(words, topic) for words in wanted)
    ]
    if len(others) == 1:
        warn(
            [
                f"positions holds 1 topic that is not subscribed, {others[0]!r}; it is ignored, so"
                " check its name."
            ]
        )
    elif others:
        warn(
            [
                f"positions holds {len(others)} topics that are not subscribed, such as"
                f" {others[0]!r}; they are ignored, so check their names."
            ]
        )


def _check_names(topics: Sequence[str], patterns: Sequence[str]) -> None:
    """Raise ValueError for no name at all, or a name that stands twice."""
    if not (topics or patterns):
        raise ValueError("Name a topic or a pattern to subscribe to.")
    for kind, names in (("topic", topics), ("pattern", patterns)):
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(f"The {kind} {name!r} is named twice.")
