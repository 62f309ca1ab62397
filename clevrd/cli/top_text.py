"""The screen of clevrd top, as lines of text. Pure: no terminal and no daemon here."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from clevrd.metrics.histograms import HistogramView
from clevrd.metrics.json import MetricsView
from clevrd.metrics.top import LimitedRow, SubscriberRow, TopicRow, TopView

_MIB: Final = 1 << 20
# The longest a name may be where there is room, in columns.
_MAX_NAME: Final = 60
_MIN_NAME: Final = 8


class Column(NamedTuple):
    """One column of a table."""

    head: str
    cell: Callable[[Any], str]
    # Names give way where the lines are too long.
    is_name: bool = False


def screen(now: TopView, before: TopView | None, name: str, rows: int, width: int) -> Iterator[str]:
    """Yield the lines: the daemon's state, then the tables with at most ``rows`` rows each.

    Args:
        now: the newest view.
        before: the one before it, for rates and for the times between the two; None for none, in
            which case they are those since the daemon's start.
        name: where the daemon is.
        width: columns that a line may have.
    """
    for line in (*_summary(now, before, name), *_tables(now, rows, width)):
        yield cut(line, width)


# --- the daemon ----------------------------------------------------------------------------------


def _summary(now: TopView, before: TopView | None, name: str) -> Iterator[str]:
    figures = now.figures
    past = None if before is None or _is_another(figures, before.figures) else before.figures
    seconds = figures.uptime_s if past is None else max(figures.uptime_s - past.uptime_s, 0.001)
    since = "since its start" if past is None else f"within {seconds:.1f} s"
    yield (
        f"clevrd {figures.version} at {shown(name)}  up {_uptime(figures.uptime_s)}"
        f"  {now.taken_at[:19].replace('T', ' ')} UTC  (rates and times {since})"
    )

    def rate(of: Callable[[MetricsView], float]) -> float:
        return (of(figures) - (0.0 if past is None else of(past))) / seconds

    reasons: list[str] = []
    for reason, total in figures.messages.dropped.items():
        dropped = total - (0 if past is None else past.messages.dropped.get(reason, 0))
        reasons.append(f"{reason} {_count(dropped / seconds)}/s")
    yield (
        f"published {_count(rate(lambda each: each.messages.published))}/s"
        f"  delivered {_count(rate(lambda each: each.messages.delivered))}/s"
        f"  queued {_count(figures.messages.queued)}  waiting {_count(figures.publishes_waiting)}"
    )
    yield f"dropped   {', '.join(reasons)}"
    traffic = figures.traffic
    earlier = None if past is None else past.traffic
    to_socket = since_then(traffic.to_socket_s, earlier.to_socket_s if earlier else None)
    loop_lag = since_then(traffic.loop_lag_s, earlier.loop_lag_s if earlier else None)
    yield f"to socket {_quantiles(to_socket)}    loop lag {_quantiles(loop_lag)}"
    connections: Mapping[str, int] = figures.connections.get("open", {})
    yield (
        f"subscribers {_count(figures.total_subscribers)} (slow {_count(figures.slow_subscribers)},"
        f" open circuits {_count(figures.open_circuits)})  topics {_count(figures.total_topics)}"
        f"  connections {_count(sum(connections.values()))}"
    )
    throttle = figures.throttler_metrics
    yield (
        f"cpu {throttle.cpu_usage:.0%}  memory {throttle.memory_usage:.0%}"
        f"  rss {figures.process.rss_bytes / _MIB:,.0f} MiB"
        f"  rings {figures.ring_bytes / _MIB:,.1f} MiB of {figures.memory_limit_bytes / _MIB:,.0f}"
        f"  window {_window(figures)}"
    )
    is_on = "THROTTLING" if throttle.is_throttling else "not throttling"
    yield f"{is_on}: {shown(throttle.reason)}"


def _is_another(now: MetricsView, before: MetricsView) -> bool:
    """Return whether the daemon was started anew in between, so that its counters began anew."""
    return now.uptime_s < before.uptime_s


def _window(figures: MetricsView) -> str:
    window = figures.buffer_metrics
    return "-" if window is None else str(window.window_messages)


def since_then(now: HistogramView, before: HistogramView | None) -> HistogramView:
    """Return what a histogram has counted since ``before``, or since its start."""
    if before is None or before.bounds != now.bounds:
        return now
    counts = tuple(new - old for new, old in zip(now.counts, before.counts, strict=True))
    return HistogramView(now.bounds, counts, now.sum - before.sum)


def quantile(view: HistogramView, share: float) -> float | None:
    """Return the value that ``share`` of all values are below, as Prometheus estimates it.

    None without values. In the last bucket, which has no bound, it is the largest bound.
    """
    total = view.counts[-1]
    if total <= 0:
        return None
    rank = share * total
    lower, below = 0.0, 0
    for bound, count in zip(view.bounds, view.counts, strict=False):
        if count >= rank and count > below:
            return lower + (bound - lower) * (rank - below) / (count - below)
        lower, below = bound, count
    return view.bounds[-1]


def _quantiles(view: HistogramView) -> str:
    found = [(share, quantile(view, share)) for share in (0.5, 0.99)]
    return "  ".join(
        f"p{share * 100:.0f} {'-' if value is None else f'{value * 1000:.3g} ms'}"
        for share, value in found
    )


# --- the tables ----------------------------------------------------------------------------------


_SUBSCRIBERS: Final = (
    Column("ID", lambda row: row.id),
    Column("TENANT", lambda row: row.tenant_id, is_name=True),
    Column("TOPIC", lambda row: row.topic, is_name=True),
    Column("CLIENT", lambda row: row.address, is_name=True),
    Column("POLICY", lambda row: row.policy),
    Column("STATE", lambda row: row.state),
    Column("LAG", lambda row: _count(row.lag_messages)),
    Column("UNSENT", lambda row: _size(row.unsent_bytes)),
    Column("DROPPED", lambda row: _count(row.dropped)),
)
_TOPICS: Final = (
    Column("TENANT", lambda row: row.tenant_id, is_name=True),
    Column("TOPIC", lambda row: row.topic, is_name=True),
    Column("MSG/S", lambda row: "-" if row.messages_per_s is None else _count(row.messages_per_s)),
    Column("PUBLISHED", lambda row: _count(row.messages_published)),
    Column("DELIVERED", lambda row: _count(row.messages_delivered)),
    Column("READERS", lambda row: _count(row.subscribers)),
    Column("SLOW", lambda row: _count(row.slow_subscribers)),
    Column("RING", lambda row: _size(row.buffered_bytes)),
)
_LIMITED: Final = (
    Column("TENANT", lambda row: row.tenant_id or "-", is_name=True),
    Column("KEY", lambda row: row.credential or "-", is_name=True),
    Column("REFUSED", lambda row: _count(row.refusals)),
    Column("AGO", lambda row: f"{row.last_s:.0f} s"),
    Column("WHY", lambda row: row.code),
)


def _tables(now: TopView, rows: int, width: int) -> Iterator[str]:
    subscribers: Sequence[tuple[str, Sequence[SubscriberRow]]] = (
        ("slowest subscribers by lag", now.slowest_by_lag),
        ("slowest subscribers by bytes", now.slowest_by_bytes),
    )
    topics: Sequence[tuple[str, Sequence[TopicRow]]] = (
        ("busiest topics", now.busiest_topics),
        ("largest rings", now.largest_rings),
    )
    limited: Sequence[LimitedRow] = now.most_limited
    for title, subscriber_rows in subscribers:
        yield from _table(title, _SUBSCRIBERS, subscriber_rows[:rows], width)
    for title, topic_rows in topics:
        yield from _table(title, _TOPICS, topic_rows[:rows], width)
    yield from _table("most limited keys", _LIMITED, limited[:rows], width)


def _table(title: str, columns: Sequence[Column], rows: Sequence[Any], width: int) -> Iterator[str]:
    yield ""
    if not rows:
        yield f"{title}: none"
        return
    yield title
    cells = [[column.head for column in columns]]
    cells += [[shown(column.cell(row)) for column in columns] for row in rows]
    widths = [max(width_of(cell) for cell in column) for column in zip(*cells, strict=True)]
    names = [number for number, column in enumerate(columns) if column.is_name]
    for number in names:
        widths[number] = min(widths[number], _MAX_NAME)
    # The widest name gives way, column by column, until the line fits or no name can.
    while sum(widths) + 2 * len(widths) > width:
        widest = max(names, key=lambda number: widths[number])
        if widths[widest] <= _MIN_NAME:
            break
        widths[widest] -= 1
    for line in cells:
        yield "  ".join(
            _fitted(cell, size, is_right=not column.is_name and column.head not in _LEFT)
            for cell, size, column in zip(line, widths, columns, strict=True)
        ).rstrip()


# Columns of words that are no names.
_LEFT: Final = frozenset({"ID", "POLICY", "STATE", "WHY"})


def _fitted(cell: str, size: int, *, is_right: bool) -> str:
    cell = cut(cell, size)
    space = " " * (size - width_of(cell))
    return space + cell if is_right else cell + space


# --- text ----------------------------------------------------------------------------------------


def shown(text: str) -> str:
    """Return ``text`` without what a terminal would act upon, or not show at its place."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def width_of(text: str) -> int:
    """Return the columns that ``text`` takes."""
    if text.isascii():
        return len(text)
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    """Return ``text``, with a mark at its end where that had to be cut."""
    if width_of(text) <= width:
        return text
    kept, left = [], width - 1
    for character in text:
        left -= _width(character)
        if left < 0:
            break
        kept.append(character)
    return "".join(kept) + "…"


def _count(number: float) -> str:
    """Return a count or a rate, with as many digits as matter."""
    if 0 < number < 10 and number != int(number):
        return f"{number:.1f}"
    return f"{number:,.0f}"


def _size(size_bytes: int) -> str:
    for unit, parts in (("GiB", 1 << 30), ("MiB", _MIB), ("KiB", 1 << 10)):
        if size_bytes >= parts:
            return f"{size_bytes / parts:.1f} {unit}"
    return f"{size_bytes} B"


def _uptime(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour}h"
    return f"{hour}h{minute}m" if hour else f"{minute}m{second}s"
