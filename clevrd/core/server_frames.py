"""Wire forms of a message, each made once, and the control frames. No sockets here.

Framing: RFC 6455 §5.2 (layout), §5.1 (servers do not mask), §5.5 (control frames).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import repeat
from typing import Final

import msgspec

from clevrd.core.message import Message
from clevrd.core.message_ids import AlikeStamps

MAX_CONTROL_PAYLOAD_BYTES: Final = 125

# The byte stands in JSON for a part that is put in later: JSON text has no NUL.
BLANK_BYTES: Final = b"\0"
BLANK: Final = msgspec.Raw(BLANK_BYTES)
# The character stands for such a part within a string: JSON does not escape it, and no name of a
# topic or a tenant has it.
_MARK: Final = "\x7f"
# Size from which on data is put in its place after encoding: 1.6 us against 1.9 at this size, 31
# against 54 at 500 KB. Besides, msgspec's encoder ends the process (SIGSEGV, 0.21.0) when its
# buffer can't grow because memory has run out, where joining raises MemoryError.
SPLICED_BYTES: Final = 16_384

# Messages that are encoded at once, and the size from which on each is encoded alone: together they
# are 48 KB at most (see above), and with fewer a call for them costs each more.
_TOGETHER: Final = 32
_ALONE_BYTES: Final = 1_024

_BEFORE_ID: Final = b'{"id":"'
_BEFORE_KEY: Final = b',"key":"'
_BEFORE_HEADERS: Final = b',"headers":'
_QUOTE: Final = ord('"')
_BRACE: Final = ord("}")
_ID_BYTES: Final = len("msg-YYYYMMDD-HHMMSS.ffffff")

# The end of a message with a time to live; a quote within a key is escaped. It lies within so many
# bytes: of a key's 255 each may be spelled in two.
_TTL: Final = re.compile(
    rb'","offset":[0-9]+,"ttl_s":([0-9.e+-]+)(?:,"key":"(?:[^"\\]|\\.)*")?}\Z', re.DOTALL
)
_TTL_WITHIN_BYTES: Final = 640

_FIN_TEXT: Final = 0x81
_FIN_CLOSE: Final = 0x88
_FIN_PING: Final = 0x89
_FIN_PONG: Final = 0x8A


def _text_header(size: int) -> bytes:
    """Return the header of an unmasked, unfragmented text frame of ``size`` payload bytes."""
    if size < 126:
        return bytes((_FIN_TEXT, size))
    if size < 65_536:
        return bytes((_FIN_TEXT, 126)) + size.to_bytes(2, "big")
    return bytes((_FIN_TEXT, 127)) + size.to_bytes(8, "big")


# Headers by payload size: 100 KB that save a quarter of the time a small frame takes. Larger
# messages are rarer, and their own bytes cost more than a header does.
_TABLED_BYTES: Final = 2_048
_HEADERS: Final = tuple(_text_header(size) for size in range(_TABLED_BYTES))


def text_frame(payload: bytes) -> bytes:
    """Return one unmasked, unfragmented text frame holding ``payload``, which is UTF-8."""
    size = len(payload)
    return (_HEADERS[size] if size < _TABLED_BYTES else _text_header(size)) + payload


class FrameEncoder:
    """Encodes messages into finished text frames: the one encoding every reader shares."""

    __slots__ = ("_encode", "_encode_lines")

    def __init__(self) -> None:
        # Encoding into a reused buffer with room for the header in front takes three times as
        # long at 250 bytes (560 ns against 190): what it saves is one memcpy, and the memoryview
        # that makes bytes of the buffer costs more than that up to 100 KB.
        encoder = msgspec.json.Encoder()
        self._encode = encoder.encode
        self._encode_lines = encoder.encode_lines

    def frame(self, message: Message) -> bytes:
        """Return ``message`` as one unmasked, unfragmented text frame (header and JSON)."""
        if len(message.data) >= SPLICED_BYTES:
            return self._spliced(message)
        payload = self._encode(message)
        size = len(payload)
        return (_HEADERS[size] if size < _TABLED_BYTES else _text_header(size)) + payload

    def frames(self, messages: Sequence[Message]) -> list[bytes]:
        """Return what `frame` does for each of ``messages``, in half of its time for small ones."""
        if len(messages) == 1 or max(len(each.data) for each in messages) >= _ALONE_BYTES:
            return [self.frame(each) for each in messages]
        frames: list[bytes] = []
        for start in range(0, len(messages), _TOGETHER):
            some = messages[start : start + _TOGETHER]
            payloads = self._encode_lines(some).split(b"\n")
            if len(payloads) != len(some) + 1:
                # A publisher's JSON may be pretty-printed.
                frames += [self.frame(each) for each in some]
                continue
            del payloads[-1]
            frames += [
                (_HEADERS[len(each)] if len(each) < _TABLED_BYTES else _text_header(len(each)))
                + each
                for each in payloads
            ]
        return frames

    def plain_frames(
        self,
        topic: str,
        tenant: str,
        data: Sequence[bytes],
        offset: int,
        stamps: AlikeStamps,
    ) -> list[bytes]:
        """Return the frames of messages that have no key and no time to live, from ``offset`` on.

        They are put together of what all have in common and what each has by itself, in half of the
        time of encoding.

        Args:
            data: each one's, without a line feed.
        """
        id_prefix, time, digits, is_near = stamps
        timestamp = f"{time}{_MARK}Z" if is_near else time
        around = self._encode(
            Message(id_prefix + _MARK, topic, tenant, BLANK, timestamp, 0)
        ).decode()
        before, behind = around.removesuffix("0}").split(BLANK_BYTES.decode())
        heads = _each_between(digits, *before.split(_MARK))
        if is_near:
            tails = _each_between(digits, *behind.split(_MARK))
        else:
            tails = [behind.encode()] * len(digits)
        offsets = self._encode(list(range(offset, offset + len(data))))[1:-1].split(b",")
        bare = len(heads[0]) + len(tails[0]) + 1
        sizes = [bare + len(each) + len(number) for each, number in zip(data, offsets, strict=True)]
        headers = [_HEADERS[size] if size < _TABLED_BYTES else _text_header(size) for size in sizes]
        parts = zip(headers, heads, data, tails, offsets, repeat(b"}"))
        return list(map(b"".join, parts))

    def _spliced(self, message: Message) -> bytes:
        """Return the frame of a message with large data, in one allocation of its size."""
        around = self._encode(msgspec.structs.replace(message, data=BLANK))
        before, after = around.split(BLANK_BYTES)
        header = _text_header(len(before) + len(message.data) + len(after))
        return b"".join((header, before, message.data, after))


def _each_between(texts: Sequence[str], before: str, after: str) -> list[bytes]:
    """Return each of ``texts``, which have no line feed, between ``before`` and ``after``."""
    together = f"{after}\n{before}".join(texts)
    return f"{before}{together}{after}".encode().split(b"\n")


def message_id_of(frame: bytes) -> bytes:
    """Return the id of the message in a frame that ``FrameEncoder.frame`` made.

    It is the first field and always as long, so nothing has to be decoded.
    """
    start = _header_bytes(frame) + len(_BEFORE_ID)
    return frame[start : start + _ID_BYTES]


def message_id_in(payload: bytes) -> bytes:
    """Return the id of the message whose JSON, in such a frame, is ``payload``."""
    return payload[len(_BEFORE_ID) : len(_BEFORE_ID) + _ID_BYTES]


def payload_of(frame: bytes) -> bytes:
    """Return the JSON in a frame that ``FrameEncoder.frame`` made."""
    return frame[_header_bytes(frame) :]


def payloads_in(frames: bytes) -> list[bytes]:
    """Return the payloads of several of our text frames, joined."""
    payloads = []
    start = 0
    while start < len(frames):
        begin = start + _header_bytes(frames[start : start + 2])
        code = frames[start + 1]
        size = code if code < 126 else int.from_bytes(frames[start + 2 : begin], "big")
        start = begin + size
        payloads.append(frames[begin:start])
    return payloads


def frame_with_headers(frame: bytes, headers: bytes) -> bytes:
    """Return the frame of the message in such a ``frame`` with ``headers``, a JSON object.

    They are the last field. Without them it ends with a number or a string, so that the last byte
    but one of a frame tells whether its message has some. Quotes within a string are escaped, so
    that the last place that looks like the field's name is it.
    """
    return text_frame(b"%b%b%b}" % (payload_of(frame)[:-1], _BEFORE_HEADERS, headers))


def headers_of(frame: bytes) -> bytes:
    """Return the headers of the message in ``frame``, a JSON object; empty when it has none."""
    if frame[-2] != _BRACE:
        return b""
    begin = frame.rfind(_BEFORE_HEADERS)
    return b"" if begin < 0 else frame[begin + len(_BEFORE_HEADERS) : -1]


def plain_payload_of(frame: bytes) -> bytes:
    """Return the JSON in ``frame`` as it is without headers."""
    begin = _header_bytes(frame)
    if frame[-2] != _BRACE:
        return frame[begin:]
    end = frame.rfind(_BEFORE_HEADERS)
    return frame[begin:] if end < 0 else frame[begin:end] + b"}"


def plain_frame_of(frame: bytes) -> bytes:
    """Return ``frame`` as it is without headers: the same object when it has none."""
    return frame if frame[-2] != _BRACE else text_frame(plain_payload_of(frame))


def key_of(frame: bytes) -> bytes:
    """Return the key of the message in such a frame, as JSON spells it; empty when it has none.

    It is the last field but the headers, behind a number. Quotes within a string are escaped, so
    that the last place that looks like the field's name is it.
    """
    if frame[-2] != _QUOTE:
        if frame[-2] != _BRACE:
            return b""
        frame = plain_frame_of(frame)
        if frame[-2] != _QUOTE:
            return b""
    return frame[frame.rindex(_BEFORE_KEY) + len(_BEFORE_KEY) : -2]


def ttl_of(frame: bytes) -> float | None:
    """Return the time to live of the message in such a frame, in seconds; None without one.

    It stands behind the offset, and only the key and the headers may follow it.
    """
    if frame[-2] == _BRACE:
        frame = plain_frame_of(frame)
    end = frame[-_TTL_WITHIN_BYTES:]
    if b',"ttl_s":' not in end:
        return None
    found = _TTL.search(end)
    return None if found is None else float(found[1])


def _header_bytes(frame: bytes) -> int:
    length_code = frame[1]
    if length_code < 126:
        return 2
    return 4 if length_code == 126 else 10


def ping_frame(payload: bytes = b"") -> bytes:
    """Return a ping; ``payload`` is at most 125 bytes (RFC 6455 §5.5)."""
    return bytes((_FIN_PING, len(payload))) + payload


def pong_frame(payload: bytes) -> bytes:
    """Return the pong that answers a ping with ``payload`` (RFC 6455 §5.5.3: the same bytes)."""
    return bytes((_FIN_PONG, len(payload))) + payload


def close_frame(code: int, reason: str = "") -> bytes:
    """Return a close frame; ``reason`` is cut to what a control frame holds, on a character."""
    text = reason.encode()[: MAX_CONTROL_PAYLOAD_BYTES - 2].decode(errors="ignore").encode()
    return bytes((_FIN_CLOSE, 2 + len(text))) + code.to_bytes(2, "big") + text
