"""GET /subscribe?poll=1 with several topics or patterns: what lies behind a position in each.

Polls of one topic are handlers/subscribe/poll.py's. As there, one that waits is a subscriber of
each topic until it is answered, and what is answered at once counts as offered and delivered.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Iterator

import msgspec

from clevrd.connections.subscriptions import (
    FROM_THE_START,
    PatternWish,
    SubscribeOptions,
    check_room,
    ids_of,
    is_resumed,
)
from clevrd.core.beginning import Beginning, check_beginning, resolve
from clevrd.core.event_ids import IdPlace
from clevrd.core.notices import Gap, Position, unknown_gap
from clevrd.core.patterns import Words, parse_pattern
from clevrd.core.server_frames import BLANK, message_id_in, message_id_of, payload_of
from clevrd.core.topic import Topic
from clevrd.errors import InvalidRequest
from clevrd.handlers.subscribe.poll import (
    POLL_MAX_BYTES,
    POLL_MAX_MESSAGES,
    PollReader,
    Polls,
    answer_with,
)
from clevrd.http_values import Response
from clevrd.hub import Hub
from clevrd.tenants import Tenant


class ManyPollView(msgspec.Struct, frozen=True):
    """The answer to a poll of several topics."""

    # In the order in which they were taken, over all topics.
    messages: list[msgspec.Raw]
    # By topic, the position to ask for next; and all of them as one word.
    positions: dict[str, Position]
    last_event_id: str
    # Positions were asked for, and nothing behind them is missing.
    recovered: bool
    # What is missing before the first message of its topic.
    gaps: list[Gap]


class _Place(PollReader):
    """One topic of the poll, and what was wished of it."""

    __slots__ = ("_id_place", "beginning", "is_recovered")

    def __init__(
        self,
        poll: ManyPoll,
        topic: Topic,
        beginning: Beginning,
        id_place: IdPlace,
        *,
        is_watching: bool,
    ) -> None:
        super().__init__(poll.polls, poll.hub, topic, 0, poll.collect, is_watching=is_watching)
        self.beginning = beginning
        self._id_place = id_place
        self.is_recovered = False

    def look(self) -> Gap | None:
        """Find out where it begins; return what is missing there."""
        start = resolve(self.topic, self.beginning)
        self.upto, self.is_recovered = start.after, start.is_recovered
        return start.gap

    def frames(self) -> Iterator[tuple[bytes, _Place, bytes]]:
        """Return what there is, each frame with its message's id."""
        for frame in self.topic.frames_behind(self.upto):
            yield message_id_of(frame), self, frame

    def end(self) -> Position:
        """Return where the next poll goes on, and say it in the id as well."""
        self._id_place.move(f"{self.topic.epoch}:{self.upto}".encode())
        return Position(self.topic.epoch, self.upto)

    def serve(self, count: int) -> None:
        """Count so many of the frames as given."""
        self._hub.serve(self.topic, self.upto, count, self.topic.held_bytes)
        self.upto += count


class ManyPoll:
    """A poll of several topics: it finds them, looks what they have, and waits if that is nothing.

    Args:
        limit: topics that it may have.
    """

    def __init__(
        self,
        polls: Polls,
        hub: Hub,
        tenant: Tenant,
        wanted: SubscribeOptions,
        limit: int,
    ) -> None:
        self.polls = polls
        self.hub = hub
        self._tenant = tenant
        self._limit = limit
        self._ids = ids_of(wanted)
        # It said where it is, be it that nothing had begun there.
        self._is_resumed = is_resumed(wanted)
        self._places: dict[str, _Place] = {}
        self._watches = [_Watch(self, *each) for each in wanted.patterns.items()]
        # Patterns that have not found all topics there were.
        self._unfound = len(self._watches)
        # It has looked at what there is.
        self._has_looked = False
        # False answers with nothing at once, as soon as it has looked.
        self._may_wait = True
        self._payloads: list[bytes] = []
        self._size_bytes = 0
        self._gaps: list[Gap] = []
        self._timer: asyncio.TimerHandle | None = None
        # Cancelled when the client goes.
        self.answer: asyncio.Future[Response] = polls.loop.create_future()
        self.answer.add_done_callback(self._end)

    def begin(self, topics: list[tuple[Topic, Beginning]], timeout_s: float) -> None:
        """Answer with what there is, or within ``timeout_s`` with what comes."""
        self._may_wait = timeout_s > 0
        if timeout_s:
            self._timer = self.polls.loop.call_later(timeout_s, self.resolve)
        for topic, beginning in topics:
            self.add(topic, beginning, is_watching=False)
        for watch in self._watches:
            self.hub.patterns.add(self._tenant.name, watch.words, watch)
        if not self._watches and not self.answer.done():
            self._look()

    @property
    def messages(self) -> int:
        """How many messages have come."""
        return len(self._payloads)

    def resolve(self) -> None:
        """Answer with what there is by now, and where to go on; wait only until all is found."""
        self._may_wait = False
        if self._has_looked and not self.answer.done():
            self._resolve()

    # --- what patterns find ----------------------------------------------------------------------

    def add(self, topic: Topic, beginning: Beginning, *, is_watching: bool) -> None:
        """Take in one more topic; the poll is refused where there can't be one more."""
        place = self._places.get(topic.name)
        if self.answer.done() or (place is not None and place.topic is topic):
            return
        if place is not None:
            # The same name in a life before this one.
            self.forget(place.topic)
        try:
            check_room(len(self._places) + len(self._watches), self._limit)
            check_beginning(topic, beginning)
            id_place = self._ids.add(topic.name, topic.epoch)
        except InvalidRequest as error:
            self.answer.set_exception(error)
            return
        for name in self._ids.given_way():
            self._miss(unknown_gap(name))
        place = self._places[topic.name] = _Place(
            self, topic, beginning, id_place, is_watching=is_watching
        )
        if self._has_looked:
            gap = place.look()
            if gap is not None:
                self._miss(gap)
            place.begin()

    def _miss(self, gap: Gap) -> None:
        """Tell of a gap: at once, or when it has looked what else there is."""
        if self._has_looked:
            self.collect([], gap)
        else:
            self._gaps.append(gap)

    def found_all(self) -> None:
        """Note that one pattern has found all topics there were."""
        self._unfound -= 1
        if not self._unfound and not self._has_looked and not self.answer.done():
            self._ids.watch()
            self._look()

    def forget(self, topic: Topic) -> None:
        """Let go of a topic that nobody used."""
        place = self._places.get(topic.name)
        if place is not None and place.topic is topic:
            place.leave()
            del self._places[topic.name]
            self._ids.forget(topic.name)

    # --- what topics have ------------------------------------------------------------------------

    def _look(self) -> None:
        """Answer with what there is, those first that were taken first; wait if it is nothing."""
        for name, place in list(self._places.items()):
            # Nobody has told it of what was forgotten while it looked for others.
            if self.hub.topics.find(self._tenant.name, name) is not place.topic:
                del self._places[name]
                if not place.is_watching:
                    self.add(self.hub.topic(self._tenant, name), place.beginning, is_watching=False)
        self._has_looked = True
        places = self._places.values()
        self._gaps += [gap for place in places if (gap := place.look()) is not None]
        taken: Counter[_Place] = Counter()
        for _, place, frame in heapq.merge(*(place.frames() for place in places), key=_by_id):
            if self._payloads and self._is_full(len(frame)):
                break
            taken[place] += 1
            self._hold(payload_of(frame))
        for place, count in taken.items():
            place.serve(count)
        if self._payloads or self._gaps or not self._may_wait:
            self._resolve()
            return
        for place in places:
            place.begin()

    def collect(self, payloads: list[bytes], gap: Gap | None) -> None:
        """Take what a topic is given; the answer has all that comes this turn, if there is room."""
        if self.answer.done():
            return
        self._gaps += [gap] if gap is not None else []
        for payload in payloads:
            self._hold(payload)
        if self._is_full(0):
            self._leave()
        self.polls.settle(self)

    def _hold(self, payload: bytes) -> None:
        self._payloads.append(payload)
        self._size_bytes += len(payload)

    def _is_full(self, more_bytes: int) -> bool:
        return (
            len(self._payloads) >= POLL_MAX_MESSAGES
            or self._size_bytes + more_bytes > POLL_MAX_BYTES
        )

    def _resolve(self) -> None:
        # Now and not in the callback: nothing more is meant for it.
        self._leave()
        places = self._places.values()
        positions = {place.topic.name: place.end() for place in places}
        view = ManyPollView(
            messages=[BLANK],
            positions=positions,
            last_event_id=self._ids.whole().decode(),
            recovered=self._is_resumed and all(place.is_recovered for place in places),
            gaps=self._gaps,
        )
        self.answer.set_result(answer_with(view, sorted(self._payloads, key=message_id_in)))

    def _leave(self) -> None:
        """Be no subscriber any more. Idempotent."""
        for watch in self._watches:
            self.hub.patterns.remove(self._tenant.name, watch.words, watch)
        self._watches.clear()
        for place in self._places.values():
            place.leave()

    def _end(self, _: asyncio.Future[Response]) -> None:
        self._leave()
        # They know the poll, and it them: see PollReader.
        self._places.clear()
        if self._timer is not None:
            self._timer.cancel()


def _by_id(each: tuple[bytes, _Place, bytes]) -> bytes:
    return each[0]


class _Watch:
    """One pattern of a poll."""

    __slots__ = ("_poll", "_wishes", "words")

    def __init__(self, poll: ManyPoll, text: str, beginnings: PatternWish) -> None:
        self._poll = poll
        self._wishes = beginnings
        self.words: Words = parse_pattern(text)

    def topic_found(self, topic: Topic) -> None:
        """Take in a topic that was there before the poll."""
        self._add(topic, self._wishes.beginning)

    def topic_made(self, topic: Topic) -> None:
        """Take in a topic that has just been made."""
        self._add(topic, FROM_THE_START)

    def topic_forgotten(self, topic: Topic) -> None:
        """Let go of a topic that nobody used."""
        self._poll.forget(topic)

    def found_all(self) -> None:
        """Note that all topics which were there have been found."""
        self._poll.found_all()

    def _add(self, topic: Topic, otherwise: Beginning) -> None:
        beginning = self._wishes.positions.get(topic.name, otherwise)
        self._poll.add(topic, beginning, is_watching=True)
