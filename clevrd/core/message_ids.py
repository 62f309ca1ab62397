"""MessageIds: ids that rise, and the timestamps that go with them. Times: RFC 3339 in UTC."""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, datetime
from typing import Final, NamedTuple

import msgspec

_SECOND_US: Final = 1_000_000

# Wall clock and id may differ by this much before the timestamp is taken from the clock alone:
# ties within a burst stay below it, a clock set back does not.
_MAX_TIE_US: Final = 1_000

_FIRST_YEAR: Final = 1970

_NO_PUNCTUATION: Final = str.maketrans("", "", "-T:.Z")

_encode: Final = msgspec.json.Encoder().encode


class AlikeStamps(NamedTuple):
    """The stamps of messages within one second."""

    # Each id is this and six digits.
    id_prefix: str
    # The timestamp of all; or what stands before the same digits and a Z where ``is_near``.
    time: str
    digits: list[str]
    # The ids are near enough to the clock to be the times as well.
    is_near: bool


class MessageIds:
    """Makes the ids ``msg-YYYYMMDD-HHMMSS.ffffff`` and the timestamps of messages.

    Ids rise strictly within the process, so they are unique in it (and beyond it, where the next
    process is told the last one): on a tie, or when the wall clock is set back, the id moves on by
    a microsecond. The timestamp is the clock's, to within
    the millisecond by which a burst's ids may run ahead of it.
    """

    __slots__ = ("_id_prefix", "_last_us", "_second_us", "_time_prefix")

    def __init__(self) -> None:
        self._last_us = -1
        # Start of the second that both prefixes spell; formatting a date costs more than the rest.
        self._second_us = -_SECOND_US
        self._id_prefix = ""
        self._time_prefix = ""

    @property
    def last_us(self) -> int:
        """The last id, in microseconds since 1970; -1 before the first."""
        return self._last_us

    def go_on_after(self, last_us: int) -> None:
        """Make only ids after ``last_us``: an earlier process made ids up to it."""
        self._last_us = max(self._last_us, last_us)

    def next(self, wall_us: int) -> tuple[str, str]:
        """Return (id, timestamp) for a message made at ``wall_us``, microseconds since 1970."""
        us = wall_us if wall_us > self._last_us else self._last_us + 1
        self._last_us = us
        micro = us - self._second_us
        if not 0 <= micro < _SECOND_US:
            micro = self._spell_second(us)
        # Six digits with leading zeros, in two thirds of the time of a format specification.
        digits = str(_SECOND_US + micro)[1:]
        if us - wall_us > _MAX_TIE_US:
            return self._id_prefix + digits, rfc3339(wall_us)
        return self._id_prefix + digits, f"{self._time_prefix}{digits}Z"

    def spell(self, us: int, wall_us: int) -> tuple[str, str]:
        """Return (id, timestamp) for a message whose id was given elsewhere.

        Args:
            us: its id, in microseconds since 1970; ``wall_us`` or later.
        """
        # The lines of `next`, whose call would take a third of the time.
        micro = us - self._second_us
        if not 0 <= micro < _SECOND_US:
            micro = self._spell_second(us)
        digits = str(_SECOND_US + micro)[1:]
        if us - wall_us > _MAX_TIE_US:
            return self._id_prefix + digits, rfc3339(wall_us)
        return self._id_prefix + digits, f"{self._time_prefix}{digits}Z"

    def next_run(self, count: int, wall_us: int) -> list[tuple[str, str]]:
        """Return what as many calls of `next` would, in a third of their time."""
        us = wall_us if wall_us > self._last_us else self._last_us + 1
        self._last_us = us + count - 1
        return self.spell_run(us, count, 1, wall_us)

    def spell_run(self, us: int, count: int, step: int, wall_us: int) -> list[tuple[str, str]]:
        """Return what `spell` would for ``count`` ids from ``us`` on, ``step`` apart."""
        stamps: list[tuple[str, str]] = []
        while count > 0:
            id_prefix, time, digits, is_near = self.spell_alike(us, count, step, wall_us)
            if is_near:
                stamps += [(id_prefix + each, f"{time}{each}Z") for each in digits]
            else:
                stamps += [(id_prefix + each, time) for each in digits]
            us += len(digits) * step
            count -= len(digits)
        return stamps

    def spell_alike(self, us: int, count: int, step: int, wall_us: int) -> AlikeStamps:
        """Return the parts of what `spell_run` does, for the first ids that are spelled alike.

        Others follow in the next second, or run ahead of the clock.
        """
        micro = us - self._second_us
        if not 0 <= micro < _SECOND_US:
            micro = self._spell_second(us)
        count = min(count, (_SECOND_US - 1 - micro) // step + 1)
        near = (wall_us + _MAX_TIE_US - us) // step + 1
        if near > 0:
            count = min(count, near)
        begin = _SECOND_US + micro
        # A JSON array of all, cut behind each one's first digit: a fifth of a call each.
        together = _encode(list(range(begin, begin + count * step, step)))
        digits = together[2:-1].decode().split(",1")
        time = self._time_prefix if near > 0 else rfc3339(wall_us)
        return AlikeStamps(self._id_prefix, time, digits, near > 0)

    def _spell_second(self, us: int) -> int:
        """Make the prefixes those of ``us``; return the microseconds beyond its second."""
        second, micro = divmod(us, _SECOND_US)
        moment = datetime.fromtimestamp(second, UTC)
        self._second_us = us - micro
        self._id_prefix = moment.strftime("msg-%Y%m%d-%H%M%S.")
        self._time_prefix = moment.strftime("%Y-%m-%dT%H:%M:%S.")
        return micro


def id_at(wall_us: int) -> str:
    """Return the id of a message made at ``wall_us``, microseconds since 1970, without a tie."""
    return id_of_timestamp(rfc3339(wall_us))


def id_of_timestamp(timestamp: str) -> str:
    """Return the id that a message with this ``rfc3339`` timestamp has where there is no tie.

    An empty timestamp gives an id before all others.
    """
    digits = timestamp.translate(_NO_PUNCTUATION)
    return f"msg-{digits[:8]}-{digits[8:14]}.{digits[14:]}" if digits else ""


def us_of_id(message_id: str) -> int:
    """Return the id ``msg-YYYYMMDD-HHMMSS.ffffff`` as microseconds since 1970.

    Digits that are no time, as those of a 13th month, count as the last time before them, since ids
    are compared as text. 0 or less for digits before 1970.
    """
    digits = message_id.translate(_NO_PUNCTUATION)[-20:]
    year, micro = int(digits[:4]), int(digits[14:])
    if year < _FIRST_YEAR:
        return 0
    # The greatest value of each part, and its least.
    spans = [(12, 1), (31, 1), (23, 0), (59, 0), (59, 0)]
    parts = [int(digits[at : at + 2]) for at in range(4, 14, 2)]
    for index, (most, least) in enumerate(spans):
        if index == 1:
            most = monthrange(year, parts[0])[1]
        if parts[index] < least:
            # Nothing is before the first month of a year, or the first day of a month.
            parts[index:] = [first for _, first in spans[index:]]
            return _us_at(year, parts) - 1
        if parts[index] > most:
            parts[index:] = [last for last, _ in spans[index:]]
            parts[1] = min(parts[1], monthrange(year, parts[0])[1])
            return _us_at(year, parts) + _SECOND_US - 1
    return _us_at(year, parts) + micro


def _us_at(year: int, parts: list[int]) -> int:
    month, day, hour, minute, second = parts
    return int(datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()) * 1_000_000


def rfc3339(wall_us: int) -> str:
    """Return ``wall_us``, microseconds since 1970, as ``2026-01-31T12:00:00.000000Z``."""
    second, micro = divmod(wall_us, _SECOND_US)
    return datetime.fromtimestamp(second, UTC).strftime(f"%Y-%m-%dT%H:%M:%S.{micro:06d}Z")
