"""SSE and NDJSON: what is spelled is read back by parsers that are not ours, whatever is published.

Sharing too: a message is spelled once for all readers of a form, and what is kept is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import httpx
import msgspec
import pytest
from fakes import FakeSink, TopicDriver, make_topic
from httpx_sse import EventSource, ServerSentEvent
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.budgets import Budget
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.gap_log import GapLog
from clevrd.core.message import KeyedMessage, Message
from clevrd.core.notices import ErrorNotice, Gap, GoingAway, Position, Subscribed
from clevrd.core.publish_request import decode_publish
from clevrd.core.server_frames import FrameEncoder, payloads_in, text_frame
from clevrd.core.shared_texts import (
    SHARED_MESSAGES,
    TEXT_OVERHEAD_BYTES,
    SharedTexts,
)
from clevrd.core.stream_forms import (
    BLANK,
    FRAMES,
    NDJSON,
    NDJSON_BARE,
    SLOTTED_EVENTS,
    SLOTTED_MESSAGES,
    SSE,
    SSE_BARE,
    SlottedWrites,
    StreamForm,
    chunk,
)
from clevrd.core.subscriber import Subscriber

EPOCH = "f7502dc3"
SPACE = st.text(" \t\r\n", max_size=3)


def message_of(data: bytes, offset: int = 7, topic: str = "t", key: str = "") -> bytes:
    """Return the frame of a message with ``data`` as a publisher sent it."""
    request = decode_publish(b'{"topic":"t","data":' + data + b"}")
    fields = ("msg-20260131-120000.000042", topic, "a", request.data, "2026", offset)
    return FrameEncoder().frame(KeyedMessage(*fields, key) if key else Message(*fields))


def events_in(body: bytes) -> list[ServerSentEvent]:
    """Return the events of an SSE body, read by httpx-sse."""
    response = httpx.Response(200, headers={"Content-Type": SSE.content_type}, content=body)
    return list(EventSource(response).iter_sse())


def shared(form: StreamForm, budget_bytes: int = 1 << 20) -> SharedTexts:
    """Return the texts of a topic without readers."""
    return SharedTexts(form, EPOCH, Budget(budget_bytes))


def raw_json(value: object, spaces: Iterable[str]) -> bytes:
    """Return ``value`` as JSON with ``spaces``, line ends too, between its tokens."""
    between = iter(spaces)
    text = json.dumps(value, ensure_ascii=False)
    outside, parts = True, []
    for at, char in enumerate(text):
        if char == '"' and not is_escaped(text, at):
            outside = not outside
        parts.append(char + next(between, "") if outside and char in ",:[{" else char)
    return "".join(parts).encode()


def is_escaped(text: str, at: int) -> bool:
    """Whether an odd number of backslashes stands before ``at``."""
    before = text[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


VALUES = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(),
        # All that ends a line somewhere: NEL, LS, PS, VT, FF, and escaped ones.
        st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("\r\n\x85\u2028\u2029\v"))),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


# --- nothing breaks the framing ------------------------------------------------------------------


@given(value=VALUES, spaces=st.lists(SPACE, max_size=30))
def test_any_json_is_one_event_with_its_position(value: object, spaces: list[str]) -> None:
    """Whatever a publisher sends, an SSE parser finds one event, its id, and the same value."""
    texts = shared(SSE_BARE).texts([message_of(raw_json(value, spaces))], first=7)

    (event,) = events_in(b"".join(texts))

    assert (event.event, event.id) == ("message", f"{EPOCH}:7")
    assert json.loads(event.data)["data"] == value


@given(value=VALUES, spaces=st.lists(SPACE, max_size=30))
def test_any_json_is_one_line(value: object, spaces: list[str]) -> None:
    """Whatever a publisher sends, it is one line in NDJSON, and the same value."""
    texts = shared(NDJSON_BARE).texts([message_of(raw_json(value, spaces))], first=7)

    (line,) = b"".join(texts).splitlines()

    assert json.loads(line)["data"] == value


@pytest.mark.parametrize("name", ["\u2028x", "id: 1", "é"])
def test_topic_names_stay_within_their_event(name: str) -> None:
    """A topic can be called anything that is no control character."""
    (event,) = events_in(SSE_BARE.message(message_of(b"1", topic=name), EPOCH.encode(), 7))

    assert json.loads(event.data)["topic"] == name


@pytest.mark.parametrize("size", [1, 200, 70_000])
def test_chunk_holds_the_texts_whole(size: int) -> None:
    """One payload is one chunk: size in hexadecimal, data, line end (RFC 9112 §7.1)."""
    frames = [message_of(b'"' + b"x" * size + b'"', offset) for offset in (1, 2)]

    payload = shared(NDJSON).joined(shared(NDJSON).texts(frames, first=1))

    length, _, data = payload.partition(b"\r\n")
    assert int(length, 16) == len(data) - 2
    assert data.endswith(b"\r\n")
    assert [json.loads(line)["offset"] for line in data[:-2].splitlines()] == [1, 2]


# --- control frames ------------------------------------------------------------------------------


CONTROLS = [
    Subscribed("t", EPOCH, 41, True, 1000),
    Gap("t", 42, 57, 16, "slow_consumer"),
    GoingAway(740, {"t": Position(EPOCH, 57)}),
    ErrorNotice("circuit_open", "Too slow.", retryable=True),
]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: type(control).__name__)
def test_control_frames_are_named_events_and_lines_with_their_type_first(
    control: Subscribed | Gap | GoingAway | ErrorNotice,
) -> None:
    """The same JSON object on every transport; SSE also names the event after its type."""
    frame = FRAMES.notice(control)
    event_text = shared(SSE_BARE).notice(control)
    line = shared(NDJSON_BARE).notice(control)

    (event,) = events_in(event_text)
    (payload,) = payloads_in(frame)
    assert payload + b"\n" == line
    assert event.data.encode() == payload
    assert next(iter(json.loads(line))) == "type"
    assert event.event == json.loads(line)["type"]


def test_control_event_has_an_id_only_where_a_client_may_resume_behind_it() -> None:
    """An EventSource keeps its last id through events without one."""
    texts = shared(SSE_BARE)
    gap = Gap("t", 42, 57, 16, "slow_consumer")

    with_id, without = events_in(texts.notice(gap, 57) + texts.notice(gap))

    assert with_id.id == f"{EPOCH}:57"
    assert b"id:" not in texts.notice(gap)
    # httpx-sse hands on the last id, as an EventSource does.
    assert without.id == f"{EPOCH}:57"


@given(st.lists(st.binary(min_size=0, max_size=70_000), min_size=0, max_size=4))
def test_payloads_of_joined_frames_are_found(payloads: list[bytes]) -> None:
    """Whatever the length of each."""
    assert payloads_in(b"".join(map(text_frame, payloads))) == payloads


# --- sharing -------------------------------------------------------------------------------------


class Counting:
    """A form that counts the messages it is asked to spell."""

    def __init__(self, form: StreamForm, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spelled: list[int] = []
        spell = type(form).message

        def counted(own: StreamForm, frame: bytes, epoch: bytes, offset: int) -> bytes:
            self.spelled.append(offset)
            return spell(own, frame, epoch, offset)

        monkeypatch.setattr(type(form), "message", counted)


def real_driver(*, ring_messages: int = 1_000, window: int = 100) -> TopicDriver:
    """Return a driver whose messages are real ones."""
    topic = make_topic(ring_messages=ring_messages, window=window)
    topic._texts.budget = Budget(1 << 20)
    driver = TopicDriver(topic)

    def publish(count: int = 1, size_bytes: int = 64) -> None:
        for _ in range(count):
            offset = topic.head + 1
            frame = message_of(b'"%b"' % (b"x" * size_bytes), offset, key=f"k{offset}")
            topic.extend(offset, [frame], driver.now_s)

    driver.publish = publish  # type: ignore[method-assign, assignment]
    return driver


def reader_of(
    form: StreamForm | None,
    room_bytes: int = 1 << 60,
    strategy: DropStrategy = DropStrategy.DROP_OLDEST,
) -> Subscriber:
    """Return a reader of ``form`` with a sink of that much room."""
    return Subscriber(FakeSink(room_bytes), strategy, form=form)


def received(reader: Subscriber) -> bytes:
    """Return all that ``reader`` was given."""
    sink = reader.sink
    assert isinstance(sink, FakeSink)
    return sink.received


def offsets_of(reader: Subscriber) -> list[int]:
    """Return the offsets of the messages ``reader`` was given, whatever its form."""
    data = received(reader)
    if reader.form is None:
        return [json.loads(payload)["offset"] for payload in payloads_in(data)]
    if reader.form is SSE_BARE:
        return [json.loads(event.data)["offset"] for event in events_in(data)]
    return [json.loads(line)["offset"] for line in data.splitlines()]


def test_each_message_is_spelled_once_for_all_readers_of_a_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Live, catching up or joining later: who reads the same form shares the same texts."""
    counting = Counting(SSE_BARE, monkeypatch)
    driver = real_driver()
    readers = [driver.join(reader_of(SSE_BARE)) for _ in range(5)]
    stalled = driver.join(reader_of(SSE_BARE, room_bytes=0))

    driver.send(20)
    readers.append(driver.join(reader_of(SSE_BARE), last=20))
    sink = stalled.sink
    assert isinstance(sink, FakeSink)
    sink.room_bytes = 1 << 60
    sink.drain()

    assert counting.spelled == list(range(1, 21))
    assert all(offsets_of(reader) == list(range(1, 21)) for reader in [*readers, stalled])
    assert sink_writes(readers[0])[3] is sink_writes(readers[1])[3], "the same bytes object"


def sink_writes(reader: Subscriber) -> list[bytes]:
    """Return the writes that ``reader`` was given."""
    sink = reader.sink
    assert isinstance(sink, FakeSink)
    return sink.writes


@pytest.mark.parametrize(
    "forms",
    [
        [None, SSE_BARE, NDJSON_BARE, None, SSE_BARE],
        [None, SSE_BARE, SSE_BARE, SSE_BARE, None],
        [NDJSON_BARE] * 5,
    ],
)
def test_readers_of_all_forms_get_the_same_rounds(forms: list[StreamForm | None]) -> None:
    """One topic, live, whoever reads it: each has every message once, in its own spelling."""
    driver = real_driver()
    readers = [driver.join(reader_of(form)) for form in forms]

    driver.publish(3)
    driver.flush()
    driver.send(2)

    assert [offsets_of(reader) for reader in readers] == [[1, 2, 3, 4, 5]] * 5
    assert all(reader.delivered == 5 for reader in readers)
    assert driver.topic.delivered == driver.topic.offered == 25


@pytest.mark.parametrize("strategy", list(DropStrategy))
def test_lagging_stream_gets_what_its_policy_keeps(strategy: DropStrategy) -> None:
    """What outlives the ring for a reader is spelled under its own offset."""
    forms = (None, SSE_BARE, NDJSON_BARE)
    driver = real_driver(ring_messages=6, window=4)
    readers = [driver.join(reader_of(form, room_bytes=0, strategy=strategy)) for form in forms]

    driver.send(12)
    for reader in readers:
        sink = reader.sink
        assert isinstance(sink, FakeSink)
        sink.room_bytes = 1 << 60
        sink.drain()

    plain, *others = [offsets_of(reader) for reader in readers]
    assert 0 < len(plain) < 12
    assert others == [plain, plain]


def test_what_is_kept_goes_when_the_last_reader_of_the_form_leaves() -> None:
    """A topic that nobody streams holds nothing spelled, and the budget has it back."""
    driver = real_driver()
    first, second = (driver.join(reader_of(NDJSON)) for _ in range(2))
    budget = driver.topic._texts.budget
    full = budget.left_bytes

    driver.send(10)
    driver.leave(first)
    held = full - budget.left_bytes
    driver.leave(second)

    assert held >= 10 * TEXT_OVERHEAD_BYTES
    assert budget.left_bytes == full
    assert driver.topic._texts.shared == {}


def test_kept_texts_are_bounded_by_number_and_by_bytes() -> None:
    """Beyond the bound they are spelled for each reader; nobody loses anything."""
    many = shared(NDJSON)
    poor = SharedTexts(NDJSON, EPOCH, Budget(1_000))
    frames = [message_of(b"1", offset) for offset in range(1, SHARED_MESSAGES + 101)]

    assert len(many.texts(frames, 1)) == len(poor.texts(frames, 1)) == len(frames)

    assert len(many._made) == SHARED_MESSAGES
    assert min(many._made) == 101
    assert 0 < poor.size_bytes <= 1_000
    assert poor._budget.left_bytes == 1_000 - poor.size_bytes


def test_gap_stands_before_its_message_in_every_form() -> None:
    """With the position behind it, so that who is cut there comes back to what follows."""
    driver = real_driver(window=3)
    reader = Subscriber(FakeSink(0), gaps=GapLog("t"), form=SSE_BARE)
    driver.join(reader)

    driver.send(10)
    sink = reader.sink
    assert isinstance(sink, FakeSink)
    sink.room_bytes = 1 << 60
    sink.drain()

    events = events_in(received(reader))
    assert [event.event for event in events] == ["message", "gap", "message", "message", "message"]
    gap = msgspec.json.decode(events[1].data)
    assert (gap["from"], gap["to"], gap["count"]) == (2, 7, 6)
    assert events[1].id.endswith(":7")


@pytest.mark.parametrize("strategy", list(DropStrategy))
def test_write_of_events_with_ids_of_the_readers_own_is_bounded(strategy: DropStrategy) -> None:
    """What is made for one reader alone holds a few messages, live or behind; others get theirs."""
    driver = real_driver(ring_messages=70)
    live = driver.join(reader_of(SLOTTED_EVENTS, 1 << 60, strategy))
    stalled = driver.join(reader_of(SLOTTED_EVENTS, 0, strategy))
    plain = driver.join(reader_of(None))
    whole = [live, plain]

    driver.publish(2 * SLOTTED_MESSAGES + 1)
    driver.flush()
    driver.send(60)
    late = driver.join(reader_of(SLOTTED_EVENTS, strategy=strategy), last=50)
    sink = stalled.sink
    assert isinstance(sink, FakeSink)
    sink.room_bytes = 1 << 60
    sink.drain()

    for reader in (live, stalled, late):
        counts = [data.count(BLANK) for data in sink_writes(reader)]
        assert max(counts) <= SLOTTED_MESSAGES
        assert sum(counts) == reader.delivered > 0
    assert [reader.delivered for reader in whole] == [125, 125]
    assert sink_writes(plain)[0].count(b'"offset"') == 65


def test_events_are_finished_with_what_is_the_readers_own() -> None:
    """In each id, and nowhere else; framed as its response is."""
    writes = SlottedWrites()
    first = SLOTTED_EVENTS.message(message_of(b'"id: e:9"', 1), b"e", 1)
    both = first + SLOTTED_EVENTS.message(message_of(b"2", 2), b"e", 2)
    bare = Gap("t", 3, 4, 2, "retention")

    writes.begin(both)
    assert writes.position == b"e:2"
    one = writes.finish(b"/0,f:7/1", SSE_BARE)
    other = writes.finish(b"/0,f:8/1", SSE_BARE)
    framed = writes.finish(b"/0,f:8/1", SSE)
    writes.begin(first)
    assert writes.position == b"e:1"
    assert writes.finished == b""
    last = writes.finish(b"/0,f:8/1", SSE)
    writes.begin(SLOTTED_EVENTS.notice(bare, b"e", None))
    assert writes.position == b""

    assert [event.id for event in events_in(one)] == ["e:1/0,f:7/1", "e:2/0,f:7/1"]
    assert [event.id for event in events_in(other)] == ["e:1/0,f:8/1", "e:2/0,f:8/1"]
    assert framed == chunk(other)
    assert last == chunk(first.replace(BLANK, b"/0,f:8/1"))
    assert writes.finish(b"", SSE_BARE).startswith(b"event: gap\n")
