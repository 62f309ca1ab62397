"""A daemon without sockets, for models: a loop that is run by hand, a topic, and clients.

Each client compares every frame that it reads with the published messages.
"""

from __future__ import annotations

import io
from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import msgspec
from daemons import FakeStats
from fakes import FakeSink

from clevrd.config import Config
from clevrd.core.beginning import Beginning, Last, Since, check_beginning
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.gap_log import GapLog
from clevrd.core.publish_request import PublishRequest
from clevrd.core.stream_forms import StreamForm
from clevrd.core.subscriber import Subscriber
from clevrd.hub import Hub, Published, readers
from clevrd.restart.format import (
    MARKER_BYTES,
    StateReader,
    end_record,
    file_head,
    topic_record,
)
from clevrd.tenants import Tenant

TENANT = Tenant("acme")
MARKER = b"m" * MARKER_BYTES


class ManualLoop:
    """The part of an event loop that rounds need; it runs callbacks when the test says so."""

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
        """Forget ``call``: the test itself says when time has passed."""
        return TimerHandle(when_s, call, (), cast(Any, self))

    def _timer_handle_cancelled(self, handle: TimerHandle) -> None:
        """Do nothing: there is no timer to cancel."""

    def get_debug(self) -> bool:
        """Return False, as an asyncio handle requires."""
        return False

    def run(self) -> None:
        """Run turns until no callback is due."""
        while self._due:
            call, arguments = self._due.popleft()
            call(*arguments)

    def turn(self) -> None:
        """Run the callbacks that are due now, but not those that they add."""
        for _ in range(len(self._due)):
            call, arguments = self._due.popleft()
            call(*arguments)

    @property
    def is_busy(self) -> bool:
        """Whether any callback is due in the next turn."""
        return bool(self._due)


class SetWindow:
    """A window that the test sets; a daemon computes it from the memory."""

    def __init__(self, window: int) -> None:
        self.window = window

    def window_of(self, _portion: str) -> int:
        """Return the window of every reader."""
        return self.window


class World:
    """A daemon, its topic, and all messages published in each of its epochs."""

    def __init__(
        self,
        ring: int,
        window: int,
        threshold: int,
        catch_up_turn_bytes: int = readers.CATCH_UP_TURN_BYTES,
    ) -> None:
        self.loop = ManualLoop()
        self.catch_up_turn_bytes = catch_up_turn_bytes
        self.wall_us = 1_800_000_000_000_000
        self._config = Config(
            ring_messages=ring,
            catch_up_messages=0,
            circuit_breaker_threshold=threshold,
            circuit_breaker_openings=2,
        )
        self.buffers = SetWindow(window)
        # Epoch -> ids of its messages, from offset 1 on.
        self.published: dict[str, list[str]] = {}
        self.restart()

    def restart(self) -> None:
        """Start again with an empty ring and a new epoch."""
        self.wall_us += 1_000_000
        self.new_hub()
        self.topic = self.hub.topic(TENANT, "t")
        self.published[self.topic.epoch] = []

    def new_hub(self) -> None:
        """Start a process without any topic."""
        self.hub = Hub(
            self._config,
            cast(Any, self.loop),
            stats=FakeStats(),
            wall_ns=lambda: self.wall_us * 1000,
        )
        self.hub.delivery.buffers = self.hub.buffers = cast(Any, self.buffers)
        self.hub.delivery.readers.queue.units_per_turn = self.catch_up_turn_bytes

    def restart_as_planned(self) -> None:
        """Restart with the saved state of this process, while the clock is set back."""
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
        """Publish a message for each of ``keys`` in this turn; a blank means no key."""
        for key in keys:
            self.wall_us += tick_us
            request = PublishRequest("t", msgspec.Raw(b"1"), key.strip() or None)
            answer = self.hub.publish(self.topic, request)
            assert isinstance(answer, Published)
            self.published[answer.epoch].append(answer.message_id)


class Peer:
    """A client that reads frames when the test says so, and checks that each loss is announced."""

    def __init__(self, world: World, *, has_control: bool, form: StreamForm | None = None) -> None:
        self.world = world
        self.has_control = has_control
        # The stream form; None for WebSocket. An EventSource comes back with the last id that an
        # event carried.
        self.form = form
        self.last_event_id = ""
        self.sink = FakeSink()
        self.reader: Subscriber | None = None
        # Position of the message read last; None before the first.
        self.epoch: str | None = None
        self.offset = 0
        self.last_id = ""
        # Where this connection was asked to begin; and whether it has yet to read `subscribed`.
        self.beginning: Beginning = Last(0)
        self.is_new = False
        # Highest offset read on this connection.
        self.newest = 0
        # True when the `subscribed` notice has shown a new epoch; a gap must say so before any
        # message.
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
        # If the connection is cut between `subscribed` and `gap`, `recovered` has told the client
        # of the loss.
        self.beginning, self.is_new, self.owes_gap = beginning, True, False
        check_beginning(topic, beginning)
        daemon.subscribe(topic, reader, beginning)

    def read(self, count: int) -> None:
        """Read ``count`` of the frames that have arrived; the rest can still be lost."""
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
        """Go back to the position of the last id, the only one that an EventSource remembers."""
        if self.form is not None and self.last_event_id:
            epoch, _, offset = self.last_event_id.rpartition(":")
            self.epoch, self.offset = epoch, int(offset)

    def cut(self) -> None:
        """Lose the connection and every frame that was not read from it."""
        if self.reader is not None:
            self.world.hub.unsubscribe(self.world.topic, self.reader)
            self.reader = None

    def take(self, frame: dict[str, Any]) -> None:
        """Compare one frame with the published messages."""
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
            # The client resumed by an id, so only the end of the lost messages is known, not their
            # beginning.
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
