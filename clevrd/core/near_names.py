"""Names that nearly are known ones: which one was meant, and the sentence that says so.

Fields and options that are not known are ignored, as docs/wire.md promises, so a misspelt one would
do nothing in silence. Pure: who is told, and how, is the handlers' business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

# Warnings that one request is told, at most.
MAX_WARNINGS: Final = 4
# Names of a request that are looked at; a longer name is not taken for a misspelt one.
MAX_NAMES: Final = 64
MAX_NAME_CHARS: Final = 32
# Combinations of names that are remembered, 2 KiB at most each.
_MAX_SEEN: Final = 256
# A known name that is shorter is one letter away from too many other words.
_MIN_LETTERS: Final = 5


def meant(name: str, known: Iterable[str], words: Mapping[str, str]) -> str | None:
    """Return the known name that ``name`` nearly is; None where it is near to none.

    It is near if the two differ in case, hyphens and underscores alone, if it is another word for
    it, or if, of a name of five letters or more, one letter is wrong, missing, too many, or two
    stand the wrong way round.
    """
    if len(name) > MAX_NAME_CHARS:
        return None
    folded = _folded(name)
    by_fold = {_folded(each): each for each in known}
    if folded in by_fold:
        return by_fold[folded]
    for word, each in words.items():
        if each in by_fold.values() and folded == _folded(word):
            return each
    for fold, each in by_fold.items():
        if len(fold) >= _MIN_LETTERS and _is_one_off(folded, fold):
            return each
    return None


def quoted(text: str, most: int = MAX_NAME_CHARS) -> str:
    """Return the beginning of what a client sent, in printable ASCII and quotes."""
    return ascii(text[:most]) + ("..." if len(text) > most else "")


class Vocabulary:
    """The names that a kind of request knows.

    Args:
        what: what the client calls them: field, or option.
        known: the names.
        words: other words for some of them.
    """

    __slots__ = ("_known", "_seen", "_what", "_words")

    def __init__(self, what: str, known: Iterable[str], words: Mapping[str, str]) -> None:
        self._what = what
        self._known = tuple(known)
        self._words = words
        # The names of requests -> what is said of them: a client sends the same ones each time.
        # Cleared when full: it only saves time, 6 us.
        self._seen: dict[tuple[str, ...], tuple[str, ...]] = {}

    def warnings(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return a sentence for each of a request's ``names`` that nearly is a known one.

        A known name that is there as well was not meant.
        """
        given = tuple([name for name in names if len(name) <= MAX_NAME_CHARS][:MAX_NAMES])
        told = self._seen.get(given)
        if told is None:
            if len(self._seen) >= _MAX_SEEN:
                self._seen.clear()
            told = self._seen[given] = self._judge(given)
        return told

    def _judge(self, given: tuple[str, ...]) -> tuple[str, ...]:
        missing = [name for name in self._known if name not in given]
        unknown = [name for name in given if name not in self._known]
        near = [(name, meant(name, missing, self._words)) for name in unknown]
        return tuple(
            f"The {self._what} {quoted(name)} is not known and is ignored; {known} is the name."
            for name, known in near
            if known is not None
        )[:MAX_WARNINGS]


def _folded(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _is_one_off(name: str, known: str) -> bool:
    """Whether one letter is changed, put in or left out, or two are exchanged."""
    if abs(len(name) - len(known)) > 1:
        return False
    at = next((at for at, (a, b) in enumerate(zip(name, known, strict=False)) if a != b), None)
    if at is None:
        return len(name) != len(known)
    if len(name) > len(known):
        return name[at + 1 :] == known[at:]
    if len(name) < len(known):
        return name[at:] == known[at + 1 :]
    is_swapped = name[at : at + 2] == known[at : at + 2][::-1] and name[at + 2 :] == known[at + 2 :]
    return name[at + 1 :] == known[at + 1 :] or is_swapped


_PUBLISH: Final = ("topic", "data", "key", "idempotency_key", "ttl_s", "headers")
_PUBLISH_WORDS: Final = {
    "payload": "data",
    "message": "data",
    "msg": "data",
    "body": "data",
    "value": "data",
    "content": "data",
    "channel": "topic",
    "subject": "topic",
    "ttl": "ttl_s",
    "expires_in": "ttl_s",
}
_SUBSCRIBE: Final = (
    *("topic", "pattern", "policy", "buffer", "last", "since", "epoch", "offset"),
    *("subscriber_id", "headers"),
)
_SUBSCRIBE_WORDS: Final = {
    "limit": "last",
    "count": "last",
    "history": "last",
    "backlog": "last",
    "channel": "topic",
    "subject": "topic",
    "filter": "pattern",
    "strategy": "policy",
    "window": "buffer",
    "from": "since",
    "start": "since",
    "tenant_id": "tenant",
    "client_id": "subscriber_id",
}

# The fields of a publish's body, of a frame on a publish socket, and of commands.
PUBLISH_FIELDS: Final = Vocabulary("field", _PUBLISH, _PUBLISH_WORDS)
SOCKET_FIELDS: Final = Vocabulary("field", (*_PUBLISH, "ref"), _PUBLISH_WORDS)
PUBLISH_COMMAND: Final = Vocabulary("field", (*_PUBLISH, "ref", "type"), _PUBLISH_WORDS)
SUBSCRIBE_COMMAND: Final = Vocabulary(
    "field", (*_SUBSCRIBE, "positions", "ref", "type"), _SUBSCRIBE_WORDS
)
AUTHENTICATE_COMMAND: Final = Vocabulary(
    "field", ("token", "ref", "type"), {"key": "token", "credential": "token", "jwt": "token"}
)
# The options of a subscription's query, of a message whose topic is in the path, and of requests
# that take a tenant alone.
SUBSCRIBE_OPTIONS: Final = Vocabulary(
    "option",
    (*_SUBSCRIBE, "last_event_id", "lastEventId", "control", "poll", "timeout", "tenant"),
    _SUBSCRIBE_WORDS,
)
TOPIC_PUBLISH_OPTIONS: Final = Vocabulary(
    "option", ("tenant", "key", "ttl_s"), {**_PUBLISH_WORDS, "tenant_id": "tenant"}
)
TENANT_OPTION: Final = Vocabulary("option", ("tenant",), _SUBSCRIBE_WORDS)
