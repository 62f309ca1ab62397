"""The ways to say where a subscription resumes: a position, an event id, a time or a message id.

The topic's answer to it is core/beginning.py's. Times: RFC 3339 §5.6.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import Final, TypeVar

import msgspec

from clevrd.core.beginning import UNKNOWN, After, Beginning, Last, Since
from clevrd.core.event_ids import names_topics, read_position, read_topic_positions
from clevrd.core.message_ids import id_at
from clevrd.core.patterns import PatternTree, parse_pattern
from clevrd.core.subscription import FROM_THE_START, PatternBeginning
from clevrd.errors import InvalidRequest
from clevrd.handlers.subscribe.options import number_option, single_option
from clevrd.http_values import Request

_DURATION: Final = re.compile(r"([0-9]{1,9})([smhd])", re.ASCII)
_UNIX: Final = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,6})[0-9]{0,9})?", re.ASCII)
_MESSAGE_ID: Final = re.compile(r"msg-[0-9]{8}-[0-9]{6}\.[0-9]{6}", re.ASCII)
_RFC_3339: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?"
    r"(?:[Zz]|[+-][0-9]{2}:[0-9]{2})",
    re.ASCII,
)
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SECOND_US: Final = 1_000_000
_UNIX_EPOCH: Final = datetime.fromisoformat("1970-01-01T00:00:00Z")
# The last microsecond that RFC 3339 can spell.
_MAX_US: Final = 253_402_300_800 * _SECOND_US - 1

EVENT_ID_HEADER: Final = "last-event-id"

# The option of the same meaning, in two spellings.
EVENT_IDS: Final = ("last_event_id", "lastEventId")

# Options that say where to begin.
BEGINNINGS: Final = frozenset({"epoch", "last", "offset", "since", *EVENT_IDS})

_SINCE_FORMS: Final = (
    "a duration (90s, 5m, 1h, 2d), unix seconds, an RFC 3339 time (with + as %2B), a message id"
    " or all"
)


BeginningT = TypeVar("BeginningT", bound=Beginning)


class BeginningByName(msgspec.Struct, frozen=True):
    """Where each topic, and each pattern, of a URL begins."""

    topics: dict[str, Beginning]
    patterns: dict[str, PatternBeginning]


class SubscribeUrl(msgspec.Struct, frozen=True):
    """A URL as far as it matters here: topics and patterns in order, and where they begin."""

    names: list[str]
    patterns: list[str]
    # Recent messages for a subscriber that does not say where to begin.
    default_last: int
    # Wall clock, which durations are reckoned from; microseconds since 1970.
    now_us: int


def read_beginnings(
    request: Request,
    query: dict[str, list[str]],
    url: SubscribeUrl,
    *,
    id_wins: bool,
    takes_any_id: bool,
) -> BeginningByName:
    """Return where each topic and each pattern that is asked for begins.

    Args:
        id_wins: the request is an EventSource's, which can't change its URL when it comes back; the
            id of the last event counts more than what the URL began with.
        takes_any_id: an id that is none of this URL's is a position of which nothing is known, and
            no reason to refuse: an EventSource that is refused once never comes back (WHATWG HTML
            §9.2.3), and it can't send another id.

    Raises:
        InvalidRequest: it is said in two ways, half, in none of the forms there are, for more or
            fewer topics than there are, or for a pattern in a form that names no topics.
    """
    ids = _event_ids(request, query)
    if id_wins:
        # The header, where it says it too.
        ids = dict(islice(ids.items(), 1))
    rest = {name: values for name, values in query.items() if name not in EVENT_IDS}
    name = next((each for each, event_id in ids.items() if names_topics(event_id)), None)
    if name is not None:
        if len(ids) > 1 or (rest.keys() & {"offset", "epoch"} and not id_wins):
            raise InvalidRequest(_two_ways([*ids, *(rest.keys() & {"offset"})]))
        # The URL's beginning holds for topics of which no event has come.
        read = partial(_resumed, ids[name], name, url, _beginnings({}, rest, url))
    else:
        if id_wins and ids:
            rest = {name: values for name, values in rest.items() if name not in BEGINNINGS}
        read = partial(_beginnings, ids, rest, url)
    return _by_any_id(read, url) if takes_any_id and ids else read()


def _by_any_id(read: Callable[[], BeginningByName], url: SubscribeUrl) -> BeginningByName:
    """Return what ``read`` makes of an event's id, whatever it is."""
    try:
        begin = read()
    except InvalidRequest:
        return BeginningByName(
            dict.fromkeys(url.names, UNKNOWN),
            dict.fromkeys(url.patterns, PatternBeginning(UNKNOWN)),
        )
    topics = {name: _may_be_ahead(beginning) for name, beginning in begin.topics.items()}
    patterns = {
        text: PatternBeginning(
            _may_be_ahead(each.beginning),
            {name: _may_be_ahead(at) for name, at in each.positions.items()},
        )
        for text, each in begin.patterns.items()
    }
    return BeginningByName(topics, patterns)


def _may_be_ahead(beginning: BeginningT) -> BeginningT:
    """Return ``beginning``, which is refused nowhere if it is a position in a topic's life."""
    if isinstance(beginning, After) and beginning.epoch:
        return msgspec.structs.replace(beginning, may_be_ahead=True)
    return beginning


def _event_ids(request: Request, query: dict[str, list[str]]) -> dict[str, str]:
    """Return what is said by the id of an event, by the name under which it is said.

    An empty one is none: that is how an EventSource spells that it has read no event with an id
    (WHATWG HTML §9.2).
    """
    options = {name: single_option(query, name) for name in EVENT_IDS}
    given = {"Last-Event-ID": request.headers.get(EVENT_ID_HEADER), **options}
    return {name: event_id for name, event_id in given.items() if event_id}


def _beginnings(
    ids: dict[str, str], query: dict[str, list[str]], url: SubscribeUrl
) -> BeginningByName:
    last = number_option(query, "last", least=0)
    default = Last(url.default_last if last is None else last)
    resumes = _resumes(ids, query, max(1, len(url.names)), url.now_us)
    if last is not None and any(resumes):
        raise InvalidRequest("The option last begins anew; leave it out to resume.")
    if url.patterns and any(
        isinstance(beginning, After) and beginning.epoch for beginning in resumes
    ):
        raise InvalidRequest(
            "A pattern can't resume by a position here; use the id of an event, /ws, or since."
        )
    return BeginningByName(
        {name: resumes[index] or default for index, name in enumerate(url.names)},
        dict.fromkeys(url.patterns, PatternBeginning(resumes[0] or default)),
    )


def _resumed(event_id: str, name: str, url: SubscribeUrl, anew: BeginningByName) -> BeginningByName:
    """Return ``anew`` with what the id of an event, given as ``name``, says of its topics."""
    said = read_topic_positions(event_id, name)
    topics = dict(anew.topics)
    for index, at in said.by_index.items():
        if index >= len(url.names):
            raise InvalidRequest(
                f"The event's id is of {index + 1} topics or more, and the URL names"
                f" {len(url.names)}; come back to the URL that the event came from."
            )
        topics[url.names[index]] = at
    tree: PatternTree[str] = PatternTree()
    for text in url.patterns:
        tree.add("", parse_pattern(text), text)
    found: dict[str, dict[str, After]] = {text: {} for text in url.patterns}
    for topic, at in said.by_name.items():
        patterns = tree.find("", topic)
        for text in patterns:
            found[text][topic] = at
        if topic in topics:
            if url.names.index(topic) in said.by_index:
                raise InvalidRequest(f"The event's id has two positions of {topic[:100]!r}.")
            topics[topic] = at
        elif not patterns:
            raise InvalidRequest(
                f"The event's id is of the topic {topic[:100]!r}, which is not asked for; come back"
                " to the URL that the event came from."
            )
    beginnings = {text: beginning.beginning for text, beginning in anew.patterns.items()}
    if said.has_found_all:
        beginnings = dict.fromkeys(beginnings, FROM_THE_START)
    return BeginningByName(
        topics, {text: PatternBeginning(beginnings[text], known) for text, known in found.items()}
    )


def _resumes(
    ids: dict[str, str], query: dict[str, list[str]], topics: int, now_us: int
) -> list[Beginning | None]:
    """Return for each of so many topics where its subscriber resumes.

    Each topic has a position of its own, in the order of the topics: `offset` and `epoch` are
    repeated, and event ids stand in one list with commas between. The other forms hold for all.

    Raises:
        InvalidRequest: as `read_resume`, or there are more or fewer positions than topics.
    """
    if topics == 1:
        return [read_resume(ids, query, now_us)]
    pairs = {name: query[name] for name in ("offset", "epoch") if name in query}
    lists = {name: event_id.split(",") for name, event_id in ids.items()}
    for name, values in (*pairs.items(), *lists.items()):
        if len(values) != topics:
            raise InvalidRequest(
                f"{name} has {len(values)} values for {topics} topics; give one for each topic,"
                " in the order of the topics."
            )
    shared = {"since": query["since"]} if "since" in query else {}
    return [
        read_resume(
            {name: values[index] for name, values in lists.items()},
            {**shared, **{name: [values[index]] for name, values in pairs.items()}},
            now_us,
        )
        for index in range(topics)
    ]


def read_resume(ids: dict[str, str], query: dict[str, list[str]], now_us: int) -> Beginning | None:
    """Return where the subscriber of one topic resumes; None when it does not say.

    Args:
        ids: the id of an event, by the name under which it was given.

    Raises:
        InvalidRequest: it says so in two ways, half, or in none of the forms there are.
    """
    offset, epoch = single_option(query, "offset"), single_option(query, "epoch")
    since = single_option(query, "since")
    given = {"offset": offset, "since": since, **ids}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InvalidRequest(_two_ways(names))
    if (offset is None) != (epoch is None):
        raise InvalidRequest(
            "A position is offset and epoch together; give both, as you received them."
        )
    if since is not None:
        return read_since(since, now_us)
    if offset is not None and epoch is not None:
        return read_position(epoch, offset, "offset and epoch")
    for name, event_id in ids.items():
        epoch, _, offset = event_id.rpartition(":")
        return read_position(epoch, offset, name)
    return None


def _two_ways(names: Iterable[str]) -> str:
    return f"{' and '.join(names)} each say where to resume; give one of them."


def read_since(text: str, now_us: int) -> Beginning:
    """Return the beginning to begin at a time, a duration ago or behind a message.

    Raises:
        InvalidRequest: it is none of the forms there are.
    """
    if text == "all":
        return After(0)
    if _MESSAGE_ID.fullmatch(text):
        return Since(text, is_time=False)
    wall_us = _time_us(text, now_us)
    if wall_us is None:
        raise InvalidRequest(f"The option since must be {_SINCE_FORMS}.")
    return Since(id_at(min(max(wall_us, 0), _MAX_US)), is_time=True)


def _time_us(text: str, now_us: int) -> int | None:
    """Return ``text`` as microseconds since 1970; None when it is no time."""
    if match := _DURATION.fullmatch(text):
        return now_us - int(match[1]) * _UNIT_S[match[2]] * _SECOND_US
    if match := _UNIX.fullmatch(text):
        return int(match[1]) * _SECOND_US + int((match[2] or "").ljust(6, "0"))
    if not _RFC_3339.fullmatch(text):
        return None
    try:
        moment = datetime.fromisoformat(text.upper())
        # Not timestamp(), whose float is off by some tenths of a microsecond.
        return (moment - _UNIX_EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        return None
