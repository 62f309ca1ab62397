"""The ways to say where a subscription resumes: a position, an event id, a time or a message id.

What the topic makes of it is core/positions.py's. Times: RFC 3339 §5.6.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Final

import msgspec

from clevrd.connections.subscriptions import FROM_THE_START, PatternWish
from clevrd.core.event_ids import Places, names_topics, read_places, read_position
from clevrd.core.message import id_at
from clevrd.core.patterns import matches, parse_pattern
from clevrd.core.positions import After, Last, Since, Wish
from clevrd.errors import InvalidRequest
from clevrd.exchange import Request
from clevrd.handlers.options import number_option, single_option

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

_BEGINS_ANEW: Final = "The option last begins anew; leave it out to resume."

_SINCE_FORMS: Final = (
    "a duration (90s, 5m, 1h, 2d), unix seconds, an RFC 3339 time (with + as %2B), a message id"
    " or all"
)


class Beginnings(msgspec.Struct, frozen=True):
    """Where the subscriptions of a connection begin, by topic and by pattern."""

    topics: dict[str, Wish]
    patterns: dict[str, PatternWish]


class Asked(msgspec.Struct, frozen=True):
    """What a request asks to be given: the topics and patterns in their order on the URL."""

    names: list[str]
    patterns: list[str]
    # Recent messages for who does not say where to begin.
    default_last: int
    # Wall clock, which durations are reckoned from; microseconds since 1970.
    now_us: int


def read_beginnings(
    request: Request, query: dict[str, list[str]], asked: Asked, *, header_wins: bool
) -> Beginnings:
    """Return where each topic and each pattern that is asked for begins.

    Args:
        header_wins: the request is an EventSource's, which can't change its URL when it comes back:
            what its URL began with holds for topics of which it has seen nothing yet.

    Raises:
        InvalidRequest: it is said in two ways, half, in none of the forms there are, for more or
            fewer topics than there are, or for a pattern in a form that names no topics.
    """
    header = request.headers.get(EVENT_ID_HEADER)
    if not (header and header_wins):
        return _beginnings(header, query, asked)
    if not names_topics(header):
        rest = {name: query[name] for name in query.keys() - BEGINNINGS}
        return _beginnings(header, rest, asked)
    # Of the URL's own forms; a wrong one was refused when it came the first time.
    return _resumed(read_places(header, "Last-Event-ID"), asked, _beginnings(None, query, asked))


def _beginnings(header: str | None, query: dict[str, list[str]], asked: Asked) -> Beginnings:
    last = number_option(query, "last", least=0)
    places = _places_of(header, query)
    if last is not None and places is not None:
        raise InvalidRequest(_BEGINS_ANEW)
    default = Last(asked.default_last if last is None else last)
    if places is not None:
        anew = Beginnings(
            dict.fromkeys(asked.names, default), dict.fromkeys(asked.patterns, PatternWish(default))
        )
        return _resumed(places, asked, anew)
    resumes = _resumes(header, query, max(1, len(asked.names)), asked.now_us)
    if last is not None and any(resumes):
        raise InvalidRequest(_BEGINS_ANEW)
    if asked.patterns and any(isinstance(wish, After) and wish.epoch for wish in resumes):
        raise InvalidRequest(
            "A pattern can't resume by a position here; use the id of an event, /ws, or since."
        )
    return Beginnings(
        {name: resumes[index] or default for index, name in enumerate(asked.names)},
        dict.fromkeys(asked.patterns, PatternWish(resumes[0] or default)),
    )


def _places_of(header: str | None, query: dict[str, list[str]]) -> Places | None:
    """Return what the id of an event of several topics says; None where there is no such id."""
    given = {"Last-Event-ID": header, **{name: single_option(query, name) for name in EVENT_IDS}}
    for name, text in given.items():
        if text is not None and names_topics(text):
            # Checks that it is the only form.
            _one_form(header, query)
            return read_places(text, name)
    return None


def _resumed(places: Places, asked: Asked, anew: Beginnings) -> Beginnings:
    """Return ``anew`` with what ``places`` says of its topics."""
    topics, found = dict(anew.topics), dict(places.by_name)
    for index, at in places.by_index.items():
        if index >= len(asked.names):
            raise InvalidRequest(
                f"The event's id is of {index + 1} topics or more, and the URL names"
                f" {len(asked.names)}; come back to the URL that the event came from."
            )
        topics[asked.names[index]] = at
    for name in topics.keys() & found:
        topics[name] = found.pop(name)
    patterns, strangers = {}, set(found)
    for text in asked.patterns:
        words = parse_pattern(text)
        mine = {name: at for name, at in found.items() if matches(words, name)}
        wish = FROM_THE_START if places.is_watching else anew.patterns[text].wish
        patterns[text] = PatternWish(wish, mine)
        strangers -= mine.keys()
    if strangers:
        raise InvalidRequest(
            f"The event's id is of the topic {min(strangers)[:100]!r}, which is not asked for; come"
            " back to the URL that the event came from."
        )
    return Beginnings(topics, patterns)


def _resumes(
    header: str | None, query: dict[str, list[str]], topics: int, now_us: int
) -> list[Wish | None]:
    """Return for each of so many topics where its subscriber resumes.

    Of positions there is one for each topic, in the order of the topics: `offset` and `epoch` are
    repeated, and event ids stand in one list with commas between. The other forms hold for all.

    Raises:
        InvalidRequest: as `read_resume`, or there are more or fewer positions than topics.
    """
    if topics == 1:
        return [read_resume(header, query, now_us)]
    lists: dict[str, list[str]] = {
        name: query[name] for name in ("offset", "epoch") if name in query
    }
    for name in EVENT_IDS:
        if (value := single_option(query, name)) is not None:
            lists[name] = value.split(",")
    if header is not None:
        lists["Last-Event-ID"] = header.split(",")
    for name, values in lists.items():
        if len(values) != topics:
            raise InvalidRequest(
                f"{name} has {len(values)} values for {topics} topics; give one for each topic,"
                " in the order of the topics."
            )
    headers = lists.pop("Last-Event-ID", None)
    shared = {"since": query["since"]} if "since" in query else {}
    return [
        read_resume(
            headers[index] if headers is not None else None,
            {**shared, **{name: [values[index]] for name, values in lists.items()}},
            now_us,
        )
        for index in range(topics)
    ]


def read_resume(
    event_id_header: str | None, query: dict[str, list[str]], now_us: int
) -> Wish | None:
    """Return where the subscriber of one topic resumes; None when it does not say.

    Raises:
        InvalidRequest: it says so in two ways, half, or in none of the forms there are.
    """
    form = _one_form(event_id_header, query)
    if form is None:
        return None
    name, value = form
    if name == "since":
        return since_wish(value, now_us)
    if name == "offset":
        return read_position(query["epoch"][0], value, "offset and epoch")
    epoch, _, offset = value.rpartition(":")
    return read_position(epoch, offset, name)


def _one_form(header: str | None, query: dict[str, list[str]]) -> tuple[str, str] | None:
    """Return the form in which it is said where to resume, and what; None where it is not.

    Raises:
        InvalidRequest: it is said in two ways, or half.
    """
    given = {name: single_option(query, name) for name in ("offset", "since", *EVENT_IDS)}
    given["Last-Event-ID"] = header
    forms = [(name, value) for name, value in given.items() if value is not None]
    if len(forms) > 1:
        names = " and ".join(name for name, _ in forms)
        raise InvalidRequest(f"{names} each say where to resume; give one of them.")
    if (given["offset"] is None) != (single_option(query, "epoch") is None):
        raise InvalidRequest(
            "A position is offset and epoch together; give both, as you received them."
        )
    return forms[0] if forms else None


def since_wish(text: str, now_us: int) -> Wish:
    """Return the wish to begin at a time, a duration ago or behind a message.

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
