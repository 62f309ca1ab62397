"""Wire forms: how each transport spells messages and notices. Sharing texts: core/shared_texts.

Texts are made from the ring's finished WebSocket frames, so readers of these pay nothing for the
other forms. No sockets here. SSE: WHATWG HTML §9.2.6; NDJSON: one JSON text a line; chunks:
RFC 9112 §7.1.
"""

from __future__ import annotations

from typing import Final, Protocol

from clevrd.core.notices import Notice, notice_frame, notice_json
from clevrd.core.server_frames import payload_of, plain_frame_of

# A blank: stands in an event's id for the part that is the reader's own; no text has this byte.
BLANK: Final = b"\0"

# Messages in one write of events whose ids are the reader's own: each id may be 4 KB long, and
# bytes made for one reader alone are not to be more than a round shares among all.
SLOTTED_MESSAGES: Final = 32

_ANY_NUMBER: Final = 1 << 60

# Line ends can only stand between the tokens of JSON, where a space means the same.
_SPACES: Final = bytes.maketrans(b"\r\n", b"  ")


def one_line(json: bytes) -> bytes:
    """Return ``json`` without the line ends between its tokens, which would end a line or event."""
    return json.translate(_SPACES) if b"\n" in json or b"\r" in json else json


def chunk(data: bytes) -> bytes:
    """Return ``data`` as one chunk of a chunked body; it must not be empty."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class StreamForm:
    """A response body that does not end: its texts one after the other, each whole in one write.

    ``is_chunked`` in HTTP/1.1, where a body that was cut can be told from one that ended; HTTP/1.0
    has the same texts bare, and ends with the connection.
    """

    __slots__ = ("has_headers", "is_chunked")

    # The response's media type.
    content_type: str
    # Sent over a silent connection so that nobody in between takes it for a dead one.
    keep_alive: bytes
    # Messages that one write may hold.
    max_messages: int = _ANY_NUMBER

    def __init__(self, *, is_chunked: bool, has_headers: bool = False) -> None:
        """Args: has_headers: its readers have asked for messages' headers."""
        self.is_chunked = is_chunked
        self.has_headers = has_headers

    def message(self, frame: bytes, epoch: bytes, offset: int) -> bytes:
        """Return the text of the message in ``frame``, whose position is (epoch, offset).

        The frame has no headers unless the form has; see `plain_message`.
        """
        raise NotImplementedError

    def notice(self, notice: Notice, epoch: bytes, offset: int | None) -> bytes:
        """Return the text of ``notice``, behind which a client is at (epoch, offset) if given."""
        raise NotImplementedError

    def retry(self, delay_ms: int) -> bytes:
        """Return the text that asks the client to come back so long after the end; b"" for none.

        The text stands right before a notice.
        """
        raise NotImplementedError

    def framed(self, text: bytes) -> bytes:
        """Return ``text`` as it goes over the connection; it must not be empty."""
        return chunk(text) if self.is_chunked else text

    @property
    def end(self) -> bytes:
        """The mark that the body is whole; an HTTP/1.0 body ends with the connection only."""
        return b"0\r\n\r\n" if self.is_chunked else b""


def plain_message(form: StreamForm, frame: bytes, epoch: bytes, offset: int) -> bytes:
    """Return what `StreamForm.message` does, for readers that have not asked for headers."""
    return form.message(plain_frame_of(frame), epoch, offset)


class WebSocketFrames(StreamForm):
    """WebSocket, where a message that has headers is not the same for all.

    Readers that ask have the ring's own frames; the others have these without headers.
    """

    __slots__ = ()

    content_type = ""
    keep_alive = b""

    def message(self, frame: bytes, epoch: bytes, offset: int) -> bytes:
        """Return the frame of one message."""
        return frame

    def notice(self, notice: Notice, epoch: bytes, offset: int | None) -> bytes:
        """Return a text frame."""
        return notice_frame(notice)

    def retry(self, delay_ms: int) -> bytes:
        """Return nothing: the delay is in `going_away`."""
        return b""


class ServerSentEvents(StreamForm):
    """text/event-stream: messages as plain events with their position as id, the rest named."""

    __slots__ = ()

    content_type = "text/event-stream; charset=utf-8"
    # A comment, and no empty line behind it: some clients take that for the end of an empty event.
    keep_alive = b":\n"

    def message(self, frame: bytes, epoch: bytes, offset: int) -> bytes:
        """Return the event of one message."""
        return b"id: %b:%d\ndata: %b\n\n" % (epoch, offset, one_line(payload_of(frame)))

    def notice(self, notice: Notice, epoch: bytes, offset: int | None) -> bytes:
        """Return the event of ``notice``, with an id where a reconnect may resume behind it."""
        return notice_event(notice, b"" if offset is None else b"%b:%d" % (epoch, offset))

    def retry(self, delay_ms: int) -> bytes:
        """Return the field that sets the client's reconnection time, of the event that follows."""
        return b"retry: %d\n" % delay_ms


class SlottedEvents(ServerSentEvents):
    """Events of a connection with several topics: each id has a BLANK for its place in the others.

    The write fills the blank in, and adds the framing of the response.
    """

    __slots__ = ()

    max_messages = SLOTTED_MESSAGES

    def message(self, frame: bytes, epoch: bytes, offset: int) -> bytes:
        """Return the event of one message, with the blank in its id."""
        payload = one_line(payload_of(frame))
        return b"id: %b:%d%b\ndata: %b\n\n" % (epoch, offset, BLANK, payload)

    def notice(self, notice: Notice, epoch: bytes, offset: int | None) -> bytes:
        """Return the event of ``notice``, with the blank in its id if it has one."""
        place = b"" if offset is None else b"%b:%d%b" % (epoch, offset, BLANK)
        return notice_event(notice, place)


class SlottedWrites:
    """Fills the blanks in events that a round, or a reader that catches up, has.

    Readers that are at the same places in all their topics, as most live ones with the same URL
    are, are given the same object. Only the last write is kept for that, as it came and as it went.
    """

    __slots__ = ("events", "finished", "form", "position", "rest")

    def __init__(self) -> None:
        # The events that are written to readers at the moment, and the position in the last id that
        # has a blank; b"" where none has.
        self.events = b""
        self.position = b""
        # The last result, and what it was made with: the blanks' content and the form of response.
        self.rest = b""
        self.form: StreamForm = SSE
        self.finished = b""

    def begin(self, events: bytes) -> None:
        """Begin to finish ``events``, if these are not the ones under way."""
        self.events = events
        self.finished = b""
        last = events.rfind(BLANK)
        self.position = events[events.rindex(b"id: ", 0, last) + 4 : last] if last >= 0 else b""

    def finish(self, rest: bytes, form: StreamForm) -> bytes:
        """Put ``rest`` into every blank, and frame it as in ``form``."""
        self.rest, self.form = rest, form
        self.finished = form.framed(self.events.replace(BLANK, rest))
        return self.finished


def notice_event(notice: Notice, event_id: bytes) -> bytes:
    """Return the event of ``notice``; b"" for an id is none."""
    kind = str(type(notice).__struct_config__.tag).encode()
    place = b"id: %b\n" % event_id if event_id else b""
    return b"%bevent: %b\ndata: %b\n\n" % (place, kind, notice_json(notice))


class JsonLines(StreamForm):
    """application/x-ndjson: a line for each message, and one for each notice."""

    __slots__ = ()

    content_type = "application/x-ndjson; charset=utf-8"
    # Whitespace before the next line's JSON: an empty line would be a record to many readers.
    keep_alive = b" "

    def message(self, frame: bytes, epoch: bytes, offset: int) -> bytes:
        """Return the line of one message."""
        return one_line(payload_of(frame)) + b"\n"

    def notice(self, notice: Notice, epoch: bytes, offset: int | None) -> bytes:
        """Return the line of ``notice``, which holds its position itself."""
        return notice_json(notice) + b"\n"

    def retry(self, delay_ms: int) -> bytes:
        """Return nothing: the delay is in `going_away`."""
        return b""


SSE: Final = ServerSentEvents(is_chunked=True)
SSE_BARE: Final = ServerSentEvents(is_chunked=False)
SLOTTED_EVENTS: Final = SlottedEvents(is_chunked=False)
NDJSON: Final = JsonLines(is_chunked=True)
NDJSON_BARE: Final = JsonLines(is_chunked=False)
FRAMES_WITH_HEADERS: Final = WebSocketFrames(is_chunked=False, has_headers=True)
# Read in topics of which some messages have headers.
PLAIN_FRAMES: Final = WebSocketFrames(is_chunked=False)

# Each form of a stream -> the same with headers.
_WITH_HEADERS: Final[dict[StreamForm, StreamForm]] = {
    form: type(form)(is_chunked=form.is_chunked, has_headers=True)
    for form in (SSE, SSE_BARE, SLOTTED_EVENTS, NDJSON, NDJSON_BARE)
}


def with_headers(form: StreamForm) -> StreamForm:
    """Return the form for readers of ``form`` that have asked for headers."""
    return _WITH_HEADERS[form]


class Spelling(Protocol):
    """The way in which readers of one form are given one topic's messages."""

    @property
    def max_messages(self) -> int:
        """Messages that one write may hold."""

    def texts(self, frames: list[bytes], first: int) -> list[bytes]:
        """Return the messages in ``frames``, of offsets from ``first`` on, in this form."""

    def joined(self, texts: list[bytes]) -> bytes:
        """Return ``texts``, of which there are some, as they are written at once."""

    def told(self, notice: Notice, offset: int | None = None) -> bytes:
        """Return what tells ``notice``, to be joined; see `StreamForm.notice`."""

    def notice(self, notice: Notice, offset: int | None = None) -> bytes:
        """Return what tells ``notice``, as it is written by itself."""


class FrameSpelling:
    """WebSocket: the ring's own frames, with nothing made of them."""

    __slots__ = ()

    max_messages = _ANY_NUMBER

    def texts(self, frames: list[bytes], first: int) -> list[bytes]:
        """Return ``frames``."""
        return frames

    def joined(self, texts: list[bytes]) -> bytes:
        """Return the frames behind one another."""
        # The text itself where there is one, which bytes.join returns without a copy.
        return b"".join(texts)

    def told(self, notice: Notice, offset: int | None = None) -> bytes:
        """Return a text frame."""
        return notice_frame(notice)

    notice = told


FRAMES: Final = FrameSpelling()
