"""The ways to say where a subscription resumes: a position, an event id, a time or a message id.

What the topic makes of it is core/positions.py's. Times: RFC 3339 §5.6.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Final

from clevrd.core.message import id_at
from clevrd.core.positions import After, Since, Wish
from clevrd.errors import InvalidRequest
from clevrd.exchange import Request
from clevrd.handlers.options import single_option

# More than any topic will ever count to, and cheap for int().
_OFFSET: Final = re.compile(r"[0-9]{1,18}", re.ASCII)
_EPOCH: Final = re.compile(r"[0-9A-Za-z._-]{1,64}", re.ASCII)
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

# Options that say where to begin.
BEGINNINGS: Final = frozenset({"epoch", "last", "lastEventId", "last_event_id", "offset", "since"})

_SINCE_FORMS: Final = (
    "a duration (90s, 5m, 1h, 2d), unix seconds, an RFC 3339 time (with + as %2B), a message id"
    " or all"
)


def overrides(request: Request) -> bool:
    """Whether the request says in its header where it is, whatever its URL began with.

    Only for an EventSource, which can't change its URL when it comes back.
    """
    return bool(request.headers.get(EVENT_ID_HEADER))


def read_resumes(
    request: Request, query: dict[str, list[str]], topics: int, now_us: int
) -> list[Wish | None]:
    """Return for each of so many topics where its subscriber resumes.

    Of positions there is one for each topic, in the order of the topics: `offset` and `epoch` are
    repeated, and event ids stand in one list with commas between. The other forms hold for all.

    Raises:
        InvalidRequest: as `read_resume`, or there are more or fewer positions than topics.
    """
    if topics == 1:
        return [read_resume(request.headers.get(EVENT_ID_HEADER), query, now_us)]
    lists: dict[str, list[str]] = {
        name: query[name] for name in ("offset", "epoch") if name in query
    }
    for name in ("last_event_id", "lastEventId"):
        if (value := single_option(query, name)) is not None:
            lists[name] = value.split(",")
    header = request.headers.get(EVENT_ID_HEADER)
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
    offset, epoch = single_option(query, "offset"), single_option(query, "epoch")
    since = single_option(query, "since")
    given = {
        "offset": offset,
        "since": since,
        "last_event_id": single_option(query, "last_event_id"),
        "lastEventId": single_option(query, "lastEventId"),
        "Last-Event-ID": event_id_header,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InvalidRequest(f"{' and '.join(names)} each say where to resume; give one of them.")
    if (offset is None) != (epoch is None):
        raise InvalidRequest(
            "A position is offset and epoch together; give both, as you received them."
        )
    if not names:
        return None
    if since is not None:
        return since_wish(since, now_us)
    if offset is not None and epoch is not None:
        return position_wish(epoch, offset, "offset and epoch")
    event_id = given[names[0]] or ""
    epoch, _, offset = event_id.rpartition(":")
    return position_wish(epoch, offset, names[0])


def position_wish(epoch: str, offset: str, name: str) -> After:
    """Return the wish to resume at a position, which the client calls ``name``.

    Raises:
        InvalidRequest: it is none.
    """
    if not _EPOCH.fullmatch(epoch) or not _OFFSET.fullmatch(offset):
        form = "epoch:offset" if name != "offset and epoch" else "a whole number and a short text"
        raise InvalidRequest(f"{name} must be {form}, as you received it.")
    return After(int(offset), epoch)


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
