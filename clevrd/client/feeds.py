"""What a subscription reads over its connections: one topic, or several. No I/O here."""

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
    """What is asked of the server, what its frames mean, and where that stands.

    The subscription opens connections and reads from them; a feed outlives all of them.
    """

    # The time that the server asks its readers to stay away, after the close it has announced.
    away_ms: int

    @property
    def path(self) -> str:
        """The endpoint."""

    @property
    def name(self) -> str:
        """What is subscribed to, for logs."""

    @property
    def only_topic(self) -> str | None:
        """The topic, where it is only one."""

    @property
    def is_greeted(self) -> bool:
        """Whether it is known where everything on this connection begins."""

    @property
    def is_full(self) -> bool:
        """Whether items are to be taken before more is read, greeted or not."""

    def positions(self) -> dict[str, Position]:
        """Return by topic up to where everything was handed out."""

    def before(self, item: Message | Gap) -> Position | None:
        """Return where the topic of ``item``, which was handed out last, stood before it."""

    def query(self, *, is_return: bool) -> dict[str, str]:
        """Return the query of the next connection; ``is_return`` after one that failed."""

    def begin(self, protocol: str | None) -> Sequence[bytes]:
        """Begin with a new connection, and return the text frames that are to be sent.

        Raises:
            BadAnswer: the server has not taken the subprotocol that is needed.
        """

    def greet(self, text: bytes) -> None:
        """Take in a frame before all is greeted, while nobody takes items. Raises as `read`."""

    def held(self) -> Message | Gap | None:
        """Return the next item that was read already; None when there is none."""

    def read(self, text: bytes) -> Message | Gap | None:
        """Return what a frame brings, None when that is nothing for the user.

        Raises:
            one of UNREADABLE, BadAnswer: it is none of the server's frames.
            Refused: it says that something can't be subscribed.
        """


def feed_of(
    topics: Sequence[str],
    patterns: Sequence[str],
    options: Mapping[str, str | int],
    position: Position | None,
    positions: Mapping[str, Position] | None,
    warn: Callable[[Iterable[str]], None],
) -> Feed:
    """Return the feed of these topics and patterns.

    Args:
        options: ``policy``, ``buffer``, ``last`` and ``since``, as far as they were given.
        warn: hears what the server warns of.

    Raises:
        ValueError: there is none, or one twice; or it is said in two ways where to begin.
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
    """Warn of positions that nothing asks for: misspelt, or stored when more was wanted."""
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
    """Raise ValueError as `feed_of`."""
    if not (topics or patterns):
        raise ValueError("Name a topic or a pattern to subscribe to.")
    for kind, names in (("topic", topics), ("pattern", patterns)):
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(f"The {kind} {name!r} is named twice.")
