"""Page: neighbouring messages of a history as finished frames, for all who read them. Pure.

A page is what a ring is for newer messages. Which pages a reader is handed is decided in
`history_readers`.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import partial
from itertools import accumulate

from clevrd.core.notices import DAMAGED, EXPIRED, RETENTION, Gap, GapReason
from clevrd.core.recent_cache import FRAME_OVERHEAD_BYTES
from clevrd.core.stream_forms import PLAIN_FRAMES, StreamForm, plain_message


class Page:
    """The messages that a history has of the offsets ``after + 1`` to ``upto``.

    ``offsets`` are those of ``frames``; the others are missing. Messages below ``kept_from`` are
    missing because they were given up, those above because they are damaged, or have expired.
    """

    __slots__ = (
        "_ends",
        "_has_headers",
        "_texts",
        "_until_us",
        "after",
        "expired",
        "frames",
        "kept_from",
        "offsets",
        "size_bytes",
        "upto",
        "used_s",
        "users",
    )

    def __init__(
        self,
        after: int,
        upto: int,
        kept_from: int,
        offsets: list[int],
        frames: list[bytes],
        until_us: dict[int, int] | None = None,
        *,
        has_headers: bool = False,
    ) -> None:
        """Make a page of ``frames``.

        Args:
            until_us: by offset, when messages expire, on the wall clock.
            has_headers: some of the messages have headers, which not every reader asks for.
        """
        self._has_headers = has_headers
        self.after = after
        self.upto = upto
        self.kept_from = kept_from
        self.offsets = offsets
        self.frames = frames
        # Messages that expire, and have not yet; empty for most pages. Changed by `expire` only, as
        # is ``expired``: offsets that are missing because they have, rising.
        self._until_us = until_us or {}
        self.expired: list[int] = []
        # Bytes up to the end of each frame.
        self._ends = ends = list(accumulate(map(len, frames)))
        # Form -> the messages in it, as far as somebody has asked for them.
        self._texts: dict[StreamForm, list[bytes]] = {}
        self.size_bytes = (ends[-1] if ends else 0) + FRAME_OVERHEAD_BYTES * len(frames)
        # Readers that are in the middle of it; changed by history_readers.
        self.users = 0
        # When somebody last asked for it, on the loop's clock.
        self.used_s = 0.0

    def holes(self, after: int, upto: int, topic: str) -> list[Gap]:
        """Return what tells that none of the offsets ``after + 1`` to ``upto`` comes."""
        given_up = min(max(after, self.kept_from - 1), upto)
        found: list[Gap] = []
        if given_up > after:
            found.append(Gap(topic, after + 1, given_up, given_up - after, RETENTION))
        for offset in self.expired_between(given_up, upto):
            if offset > given_up + 1:
                found.append(_gap(topic, given_up, offset - 1, DAMAGED))
            if found and found[-1].reason == EXPIRED and found[-1].last == offset - 1:
                before = (found.pop().first or offset) - 1
            else:
                before = offset - 1
            found.append(_gap(topic, before, offset, EXPIRED))
            given_up = offset
        if upto > given_up:
            found.append(_gap(topic, given_up, upto, DAMAGED))
        return found

    def expired_between(self, after: int, upto: int) -> list[int]:
        """Return the offsets behind ``after``, up to ``upto``, of messages that have expired."""
        if not self.expired:
            return self.expired
        begin, end = bisect_right(self.expired, after), bisect_right(self.expired, upto)
        return self.expired[begin:end]

    def expire(self, wall_us: int) -> None:
        """Let go of the messages that have expired by now; nobody is in the middle of a step."""
        if not self._until_us or min(self._until_us.values()) > wall_us:
            return
        over = {offset for offset, until_us in self._until_us.items() if until_us <= wall_us}
        for offset in over:
            del self._until_us[offset]
        left = [place for place, offset in enumerate(self.offsets) if offset not in over]
        self.expired = sorted((*self.expired, *over))
        self.offsets = [self.offsets[place] for place in left]
        self.frames = [self.frames[place] for place in left]
        self._ends = list(accumulate(map(len, self.frames)))
        self._texts = {
            form: [texts[place] for place in left] for form, texts in self._texts.items()
        }

    def next_at(self, after: int) -> int:
        """Return the place in ``frames`` of the first message behind offset ``after``."""
        return bisect_right(self.offsets, after)

    def end_at(self, start: int, upto: int, max_messages: int, max_bytes: int) -> int:
        """Return where messages from place ``start`` on end that may be given together.

        None is after offset ``upto``. There is at least one where one may be given.
        """
        end = min(bisect_right(self.offsets, upto), start + max_messages)
        before_bytes = self._ends[start - 1] if start else 0
        fits = bisect_right(self._ends, before_bytes + max_bytes)
        return min(end, max(fits, start + 1))

    def is_whole(self, start: int, end: int) -> bool:
        """Return whether no message is missing between those from place ``start`` to ``end``."""
        return self.offsets[end - 1] - self.offsets[start] == end - 1 - start

    def run_end(self, start: int, end: int) -> int:
        """Return where the messages from place ``start`` on, ``end`` at most, have a hole first."""
        offsets = self.offsets
        if end <= start or self.is_whole(start, end):
            return end
        return next(
            place for place in range(start + 1, end) if offsets[place] != offsets[place - 1] + 1
        )

    def texts(self, form: StreamForm | None, epoch: str, start: int, end: int) -> list[bytes]:
        """Return messages in ``form``, each made once for all who read it here."""
        if form is None:
            if not self._has_headers:
                return self.frames[start:end]
            form = PLAIN_FRAMES
        spell = form.message
        if self._has_headers and not form.has_headers:
            spell = partial(plain_message, form)
        texts = self._texts.get(form)
        if texts is None:
            texts = self._texts[form] = [b""] * len(self.frames)
        spelled = epoch.encode()
        for place in range(start, end):
            if not texts[place]:
                texts[place] = spell(self.frames[place], spelled, self.offsets[place])
                self.size_bytes += len(texts[place])
        return texts[start:end]


def _gap(topic: str, after: int, upto: int, reason: GapReason) -> Gap:
    return Gap(topic, after + 1, upto, upto - after, reason)
