"""What a client has, plus the gaps it was told of, is exactly what was published: in order, once.

Real hub, real frames, no loop and no sockets: clients publish, join in every way there is, stall,
lose what was under way, come back by their last position, while the ring is small and the daemon
restarts, as planned or not. Each client checks every frame against what was published as it reads
it.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from fakes import at_once
from hypothesis import given, settings
from hypothesis import strategies as st
from world import Peer, World

from clevrd.core.beginning import After, Beginning, Last
from clevrd.core.stream_forms import SSE_BARE
from clevrd.core.subscriber import DropStrategy
from clevrd.hub import readers

CLIENTS = 3
# A step's name and arguments.
Step = tuple[str, tuple[Any, ...]]


class Model:
    """The world and its clients; a step that can't be is no step."""

    def __init__(self, ring: int, window: int, threshold: int) -> None:
        self.world = World(ring, window, threshold, catch_up_turn_bytes=1_000)
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
        with patch.object(readers, "CATCH_UP_BYTES", 350):
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
