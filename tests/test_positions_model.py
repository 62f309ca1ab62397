"""What a client has, plus the gaps it was told of, is exactly what was published: in order, once.

Real hub, real frames, no loop and no sockets: clients publish, join in every way there is, stall,
lose what was under way, come back by their last position, while the ring is small and the daemon
restarts, as planned or not. Each client checks every frame against what was published as it reads
it.
"""

from __future__ import annotations

import io
from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable
from typing import Any, cast
from unittest.mock import patch

import msgspec
import pytest
from daemons import FakeStats
from fakes import FakeSink, at_once
from hypothesis import given, settings
from hypothesis import strategies as st

from clevrd.config import Config
from clevrd.core.beginning import After, Beginning, Last, Since, check_beginning
from clevrd.core.gap_log import GapLog
from clevrd.core.message import PublishRequest
from clevrd.core.stream_forms import SSE_BARE, StreamForm
from clevrd.core.subscriber import DropStrategy, Subscriber
from clevrd.hub import Hub, readers
from clevrd.restart.format import (
    MARKER_BYTES,
    StateReader,
    end_record,
    file_head,
    topic_record,
)
from clevrd.tenants import Tenant

CLIENTS = 3
TENANT = Tenant("acme")
MARKER = b"m" * MARKER_BYTES
# A step's name and arguments.
Step = tuple[str, tuple[Any, ...]]


class ManualLoop:
    """As much of an event loop as rounds need: it runs what is due when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()

    def time(self) -> float:
        """Return the loop's clock."""
        return self.now_s

    def call_soon(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Remember ``call`` for the next turn."""
        self._due.append((call, arguments))

    def call_at(self, when_s: float, call: Callable[..., Any]) -> TimerHandle:
        """Forget ``call``: the test says when time has passed."""
        return TimerHandle(when_s, call, (), cast(Any, self))

    def _timer_handle_cancelled(self, handle: TimerHandle) -> None:
        """Nothing is scheduled."""

    def get_debug(self) -> bool:
        """Return False, as a handle asks."""
        return False

    def run(self) -> None:
        """Run turns until nothing is due."""
        while self._due:
            call, arguments = self._due.popleft()
            call(*arguments)


class SetWindow:
    """A window that the test sets, where the daemon's follows memory."""

    def __init__(self, window: int) -> None:
        self.window = window


class World:
    """A daemon, its topic, and all that was ever published in each of its epochs."""

    def __init__(self, ring: int, window: int, threshold: int) -> None:
        self.loop = ManualLoop()
        self.wall_us = 1_800_000_000_000_000
        self._config = Config(
            ring_messages=ring,
            catch_up_messages=0,
            circuit_breaker_threshold=threshold,
            circuit_breaker_openings=2,
        )
        self.buffers = SetWindow(window)
        # Epoch -> ids by offset, from offset 1 on.
        self.published: dict[str, list[str]] = {}
        self.restart()

    def restart(self) -> None:
        """Begin anew: empty ring, new epoch."""
        self.wall_us += 1_000_000
        self.new_hub()
        self.topic = self.hub.topic(TENANT, "t")
        self.published[self.topic.epoch] = []

    def new_hub(self) -> None:
        """Begin a process, without any topic."""
        self.hub = Hub(
            self._config,
            cast(Any, self.loop),
            stats=FakeStats(),
            wall_ns=lambda: self.wall_us * 1000,
        )
        self.hub.buffers = cast(Any, self.buffers)

    def restart_as_planned(self) -> None:
        """Go on in another process with what this one writes down, while the clock is set back."""
        self.loop.run()
        self.hub.seal()
        saved = self.hub.saved()
        records = (part for each in saved for part in topic_record(MARKER, *each))
        head, end = file_head(MARKER, self.hub.last_id_us), end_record(MARKER, len(saved))
        content = b"".join([head, *records, end])
        epoch, self.wall_us = self.topic.epoch, self.wall_us - 500
        self.new_hub()
        self.hub.restore(StateReader(io.BytesIO(content), len(content)))
        self.topic = self.hub.topic(TENANT, "t")
        assert self.topic.epoch == epoch

    def publish(self, keys: str, tick_us: int) -> None:
        """Publish a message for each of ``keys``, which the next turn offers; a blank is none."""
        for key in keys:
            self.wall_us += tick_us
            request = PublishRequest("t", msgspec.Raw(b"1"), key.strip() or None)
            answer = self.hub.publish(self.topic, request)
            self.published[answer.epoch].append(answer.message_id)


class Peer:
    """A client: reads frames when it likes, and checks that nothing is missing unannounced."""

    def __init__(self, world: World, *, has_control: bool, form: StreamForm | None = None) -> None:
        self.world = world
        self.has_control = has_control
        # None for WebSocket; an EventSource comes back by the last id that an event carried.
        self.form = form
        self.last_event_id = ""
        self.sink = FakeSink()
        self.reader: Subscriber | None = None
        # What was read last; None before anything.
        self.epoch: str | None = None
        self.offset = 0
        self.last_id = ""
        # The beginning of the connection was to resume, and at which place.
        self.beginning: Beginning = Last(0)
        self.is_new = False
        # Highest offset of this connection.
        self.newest = 0
        # An epoch's end was seen, by the greeting; a gap must say so before any message.
        self.owes_gap = False

    def connect(
        self, beginning: Beginning, strategy: DropStrategy, wanted: int | None, room: int
    ) -> None:
        """Subscribe over a new connection that takes ``room`` bytes unread."""
        world = self.world
        self.sink = FakeSink(room)
        gaps = GapLog("t") if self.has_control else None
        self.reader = reader = Subscriber(self.sink, strategy, wanted, gaps, form=self.form)
        daemon, topic = world.hub, world.topic
        self.sink.on_pause = lambda: daemon.paused(topic, reader)
        self.sink.on_resume = lambda: daemon.resumed(topic, reader)
        self.newest = 0
        # Cut between greeting and gap, it knows by `recovered` that something is missing.
        self.beginning, self.is_new, self.owes_gap = beginning, True, False
        check_beginning(topic, beginning)
        daemon.subscribe(topic, reader, beginning)

    def read(self, count: int) -> None:
        """Read ``count`` frames of those that have arrived; the rest can still be lost."""
        received = self.sink.received
        place = 0
        while count and place < len(received):
            count -= 1
            if self.form is not None:
                place = self.take_event(received, place)
                continue
            start, end = payload_at(received, place)
            self.take(msgspec.json.decode(received[start:end]))
            place = end
        self.sink.writes = [received[place:]]

    def take_event(self, received: bytes, place: int) -> int:
        """Take the event at ``place``; return where the next one begins."""
        end = received.index(b"\n\n", place)
        fields = dict(line.split(": ", 1) for line in received[place:end].decode().split("\n"))
        frame = msgspec.json.decode(fields["data"])
        assert fields.get("event") == frame.get("type")
        self.take(frame)
        if "id" in fields:
            assert not self.owes_gap, "cut here, it would come back behind what it was not told of"
            self.last_event_id = fields["id"]
            assert self.last_event_id == f"{self.epoch}:{self.offset}"
        return end + 2

    def forget_unidentified(self) -> None:
        """Be where the last id says: what an EventSource was told besides, it has no memory of."""
        if self.form is not None and self.last_event_id:
            epoch, _, offset = self.last_event_id.rpartition(":")
            self.epoch, self.offset = epoch, int(offset)

    def cut(self) -> None:
        """Lose the connection and everything that was not read from it."""
        if self.reader is not None:
            self.world.hub.unsubscribe(self.world.topic, self.reader)
            self.reader = None

    def take(self, frame: dict[str, Any]) -> None:
        """Check one frame against what was published."""
        kind = frame.get("type")
        assert self.has_control or kind is None, "a plain client gets messages only"
        if kind == "subscribed":
            self.take_greeting(frame)
        elif kind == "gap":
            self.take_gap(frame)
        else:
            self.take_message(frame)

    def take_greeting(self, frame: dict[str, Any]) -> None:
        assert self.is_new, "once, before everything else"
        self.is_new = False
        epoch, offset = frame["epoch"], frame["offset"]
        assert epoch == self.world.topic.epoch
        if isinstance(self.beginning, Last):
            assert frame["recovered"] is False
        elif frame["recovered"]:
            assert (epoch, offset) == (self.epoch or epoch, self.offset)
        else:
            assert self.epoch != epoch or offset >= self.offset
            self.owes_gap = True
        self.epoch, self.offset = epoch, offset

    def take_gap(self, frame: dict[str, Any]) -> None:
        assert not self.is_new
        self.owes_gap = False
        if frame["to"] is None:
            assert (frame["reason"], frame["from"], frame["count"]) == ("epoch", None, None)
            return
        if frame["from"] is None:
            # Resumed by an id: what was missed ends here, and nobody knows where it began.
            assert (frame["reason"], frame["count"]) == ("retention", None)
            assert frame["to"] == self.offset
            return
        assert frame["from"] == self.offset + 1
        assert frame["count"] == frame["to"] - frame["from"] + 1 > 0
        assert frame["reason"] in ("slow_consumer", "retention")
        self.offset = frame["to"]

    def take_message(self, frame: dict[str, Any]) -> None:
        offset = frame["offset"]
        if self.has_control:
            assert not self.is_new, "the greeting is first"
            assert not self.owes_gap, "who did not recover is told what is missing first"
            assert offset == self.offset + 1
            assert self.epoch is not None
            assert frame["id"] == self.world.published[self.epoch][offset - 1]
        assert offset > self.newest, "once, and in order, also for who is told nothing"
        if isinstance(self.beginning, Since):
            assert frame["id"] > self.beginning.message_id
        self.offset, self.last_id, self.newest = offset, frame["id"], offset

    def resume_by_id(self) -> Beginning:
        return Since(self.last_id, is_time=False)


def payload_at(received: bytes, place: int) -> tuple[int, int]:
    """Return where the payload of the text frame at ``place`` begins and ends."""
    assert received[place] == 0x81, "a whole text frame"
    size = received[place + 1]
    if size < 126:
        return place + 2, place + 2 + size
    assert size == 126
    return place + 4, place + 4 + int.from_bytes(received[place + 2 : place + 4], "big")


class Model:
    """The world and its clients; a step that can't be is no step."""

    def __init__(self, ring: int, window: int, threshold: int) -> None:
        self.world = World(ring, window, threshold)
        # The first one is plain.
        self.peers = [
            Peer(self.world, has_control=number > 0, form=SSE_BARE if number == 2 else None)
            for number in range(CLIENTS)
        ]

    def publish(self, keys: str, tick_us: int) -> None:
        self.world.publish(keys, tick_us)

    def turn(self) -> None:
        self.world.loop.run()
        self.drop_closed()

    def join(
        self, who: int, how: str, strategy: DropStrategy, wanted: int | None, room: int
    ) -> None:
        peer = self.peers[who]
        if peer.reader is not None:
            return
        peer.forget_unidentified()
        beginning: Beginning = {
            "all": After(0),
            "id": peer.resume_by_id(),
            "position": After(peer.offset, peer.epoch or ""),
        }.get(how, Last(3))
        if not peer.last_id or (how == "position" and peer.epoch is None) or how in ("all", "last"):
            # No resume: what it had before counts no more.
            beginning = beginning if how in ("all", "last") else Last(3)
            peer.epoch, peer.offset, peer.last_id, peer.last_event_id = None, 0, "", ""
        elif how == "id" and self.is_behind_id(peer):
            return
        peer.connect(beginning, strategy, wanted, room)

    def is_behind_id(self, peer: Peer) -> bool:
        """Whether it knows of a gap after its last message: resuming by id would repeat it."""
        ids = self.world.published.get(peer.epoch or "", [])
        return not (0 < peer.offset <= len(ids) and ids[peer.offset - 1] == peer.last_id)

    def read(self, who: int, count: int) -> None:
        self.peers[who].read(count)

    def drain(self, who: int, size: int) -> None:
        self.peers[who].sink.drain(size)

    def stall(self, who: int) -> None:
        peer = self.peers[who]
        peer.sink.room_bytes = 0

    def cut(self, who: int, count: int) -> None:
        self.peers[who].read(count)
        self.peers[who].cut()

    def come_back(self, who: int, count: int, how: str, *options: Any) -> None:
        self.cut(who, count)
        self.join(who, how, *options)

    def trickle(self, who: int, keys: str) -> None:
        """A reader that takes some, but not as much as comes: it loses, is given, and loses."""
        for _ in range(4):
            self.publish(keys, 1)
            self.turn()
            self.drain(who, 320)

    def trim(self, max_bytes: int) -> None:
        self.world.topic.trim(max_bytes, 0.0)

    def window(self, cap: int) -> None:
        self.world.buffers.window = cap
        self.world.topic.set_window(cap, 0.0)

    def wait(self, seconds: float) -> None:
        """Time passes: circuits that have been open for 30 s are broken, openings forgotten."""
        self.world.loop.now_s += seconds
        self.world.hub.break_overdue_circuits()
        self.drop_closed()

    def look(self) -> None:
        """At every instant, what was offered is accounted for."""
        sums, _ = at_once(self.world.hub.sum_up())
        accounted = sums.delivered + sum(sums.lost.values()) + sums.discarded + sums.queued
        assert sums.offered == accounted

    def restart(self) -> None:
        for peer in self.peers:
            peer.read(1 << 30)
            peer.cut()
        self.world.restart()

    def restart_as_planned(self) -> None:
        """What was under way to the peers is lost with their connections."""
        for peer in self.peers:
            peer.cut()
        self.world.restart_as_planned()

    def drop_closed(self) -> None:
        """Who was closed, by its circuit, has read what came before."""
        for peer in self.peers:
            if peer.reader is not None and peer.sink.closed:
                peer.read(1 << 30)
                peer.cut()

    def finish(self) -> None:
        """Let everyone read on to the end: then nothing may be left that was not told."""
        self.turn()
        for peer in self.peers:
            peer.sink.room_bytes = 1 << 60
            peer.sink.drain()
        self.publish("a", 1)
        self.turn()
        self.look()
        for peer in self.peers:
            peer.read(1 << 30)
            if peer.reader is not None and peer.reader.is_joined:
                assert peer.offset == self.world.topic.head
                assert not peer.owes_gap

    def run(self, steps: list[Step]) -> None:
        # Two messages at a time, so that a reader can be in the middle of what was kept for it.
        with (
            patch.object(readers, "CATCH_UP_BYTES", 350),
            patch.object(readers, "CATCH_UP_TURN_BYTES", 1_000),
        ):
            for name, arguments in steps:
                getattr(self, name)(*arguments)
            self.finish()


WHO = st.integers(0, CLIENTS - 1)
ROOM = st.sampled_from([0, 300, 300, 600, 2_000, 1 << 60])
KEYS = st.text("abcd ", min_size=1, max_size=9)
COUNTS = st.integers(0, 12)


def schedules() -> st.SearchStrategy[list[Step]]:
    """Return steps; those that move messages come more often."""

    def step(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
        return st.tuples(st.just(name), st.tuples(*arguments))

    options = (
        st.sampled_from([*DropStrategy]),
        st.one_of(st.none(), st.integers(1, 6)),
        ROOM,
    )
    hows = st.sampled_from(["last", "all", "id", "id", "position", "position", "position"])
    join = step("join", WHO, hows, *options)
    come_back = step("come_back", WHO, COUNTS, hows, *options)
    publish = step("publish", KEYS, st.sampled_from([0, 1, 1, 1_000]))
    rare = st.one_of(
        *(step("trim", st.integers(0, 1_500)), step("window", st.integers(1, 9))),
        *(step("restart"), step("look"), step("wait", st.sampled_from([1.0, 31.0, 61.0]))),
        step("restart_as_planned"),
    )
    some = st.one_of(
        *(publish, step("turn"), publish, step("turn"), join, come_back),
        *(step("drain", WHO, st.integers(0, 2_000)), step("read", WHO, COUNTS)),
        *(step("drain", WHO, st.integers(0, 400)), step("stall", WHO)),
        *(step("cut", WHO, COUNTS), step("trickle", WHO, KEYS), rare, rare),
    )
    long_lists = st.lists(st.one_of(st.none(), some), min_size=25, max_size=60)
    joins = st.tuples(*(step("join", st.just(who), hows, *options) for who in range(CLIENTS)))
    return st.builds(lambda first, steps: [*first, *filter(None, steps)], joins, long_lists)


MODELS = st.builds(
    Model,
    ring=st.sampled_from([1, 4, 10, 100]),
    window=st.sampled_from([1, 3, 8, 100]),
    threshold=st.sampled_from([3, 30]),
)


# Some hundreds also in a short run: one schedule meets one or two of the ways to lose something.
@pytest.mark.timeout(0 if settings().max_examples > 1_000 else 120)
@settings(max_examples=max(300, settings().max_examples))
@given(model=MODELS, steps=schedules())
def test_what_a_client_has_and_was_told_lost_is_what_was_published(
    model: Model, steps: list[Step]
) -> None:
    """Whatever happens, nothing is lost silently, repeated, or out of order."""
    model.run(steps)
