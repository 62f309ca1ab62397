"""Follows where each request begins and ends, and refuses what aiohttp's parser lets pass.

Bytes that pass here still have to pass aiohttp's parser, so this module may only refuse, and make
one chunk of many small ones. Bytes that it can't follow any more it passes on unchecked. No sockets
here. Rules: RFC 9112 §3 (the request line), §6 (lengths), §7.1 (chunks).
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

from clevrd.errors import ClevrdError, HeaderTooLarge, InvalidRequest
from clevrd.head_cache import MAX_KNOWN_HEAD_BYTES, HeadCache

# Longest request line, and longest header field, without the line's end.
MAX_LINE_BYTES: Final = 8_190

NOT_HTTP: Final = "That is not HTTP/1.1 as this server takes it (RFC 9112)."
WRONG_VERSION: Final = "Only HTTP/1.1 and HTTP/1.0 are spoken here."
NOT_ENCODED: Final = (
    "The request target has bytes beyond ASCII; percent-encode them, é as %C3%A9 for example."
)
TOO_LONG: Final = f"A line of the head is over {MAX_LINE_BYTES} bytes."
CUT_SHORT: Final = "The head is cut short; send all of it, up to its empty line."

# Longest method; aiohttp knows none that is longer.
_MAX_METHOD_BYTES: Final = 24
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NOT_VISIBLE: Final = re.compile(rb"[^!-~]")
_VERSION: Final = re.compile(rb"HTTP/[0-9]\.[0-9]")
_PART_OF_VERSION: Final = re.compile(rb"[HTP/0-9.]{0,8}")
_SPOKEN: Final = (b"HTTP/1.1", b"HTTP/1.0")

# Fields that say how long a body is, or end the sequence of requests. Only two of these can be
# followed, and one of them at a time; for any other the bytes are passed on unchecked, and aiohttp
# or `front` decides.
_FRAMING_FIELD: Final = re.compile(rb"(?i)(?:content-length|transfer-encoding|upgrade)[ \t]*:")
_LENGTH: Final = re.compile(rb"(?i)content-length:[ \t]*([0-9]{1,18})[ \t]*")
_CHUNKED: Final = re.compile(rb"(?i)transfer-encoding:[ \t]*chunked[ \t]*")

# Many chunks of up to 15 bytes in one match: 0.1 us a chunk instead of 1.
_SMALL_CHUNKS: Final = re.compile(
    rb"(?si:0*+(?:"
    + b"|".join(rb"%x(?:;[^\r\n]*+)?+\r\n.{%d}\r\n" % (size, size) for size in range(1, 16))
    + rb"))*+"
)
# Bytes of a chunk with one byte of body; no chunk has more bytes around each byte of body.
_SMALLEST_CHUNK_BYTES: Final = 6
_CHUNK_LINE: Final = re.compile(rb"0*+([0-9A-Fa-f]{1,16})(?:;[^\r\n]*+)?+\r\n")
_CHUNK_SIZE: Final = re.compile(rb"0*([0-9A-Fa-f]{1,16})(?:[ \t]*;.*)?")
# So many whole chunks behind one another, of so many bytes on average at most, become one: each
# costs 0.2 us here, and in aiohttp's parser and body reader 4.
_MANY_CHUNKS: Final = 8
_SMALL_CHUNK_BYTES: Final = 256


_END_OF_HEAD: Final = b"\r\n\r\n"


class WrongVersion(InvalidRequest):
    """A well-formed request line with a version that is not spoken here."""


class _State(Enum):
    LINE = 0
    FIELDS = 1
    BODY = 2
    CHUNK_SIZE = 3
    CHUNK = 4
    TRAILERS = 5
    # The bytes are not followed any more: a request is being refused, or the connection is no HTTP.
    LOST = 6


class KnownHeads(HeadCache[tuple[_State, int]]):
    """Heads that were seen before -> the state behind each and the size of its body.

    A head that repeats is followed only once for all connections: 1 us instead of 12. The size is 0
    where the head gives none.
    """

    __slots__ = ()

    def find(self, data: bytes, at: int) -> tuple[int, _State, int] | None:
        """Return the end of the head at ``at``, the state behind it and the body's size."""
        end = data.find(_END_OF_HEAD, at, at + MAX_KNOWN_HEAD_BYTES)
        if end < 0:
            return None
        end += len(_END_OF_HEAD)
        known = self.get(data[at:end])
        return None if known is None else (end, *known)


class Framing:
    """Follows the requests of one connection.

    A request line is held back until it is whole, so that a refusal does not depend on how the line
    was split; other bytes are passed on as they come.
    """

    __slots__ = (
        "_fields",
        "_held",
        "_known",
        "_left_bytes",
        "_merged",
        "_state",
        "declared_bytes",
        "requests",
    )

    def __init__(self, known: KnownHeads | None = None) -> None:
        """Args: known: heads seen before, shared by connections; None for an empty one."""
        self._known = known if known is not None else KnownHeads()
        self._state = _State.LINE
        # Bytes of a line that is not whole yet; at most MAX_LINE_BYTES and half of its end.
        self._held = b""
        # Fields of the head under way that say how long its body is; at most 2.
        self._fields: list[bytes] = []
        # Bytes that are still to come of a body, or of a chunk and its line end.
        self._left_bytes = 0
        # Chunks that become one: where they begin and end in the bytes under way, and that one.
        self._merged: list[tuple[int, int, bytes]] = []
        # Least size of the body under way by the sizes of its chunks; 0 without chunks.
        self.declared_bytes = 0
        # Requests that have begun: their line was whole.
        self.requests = 0

    @property
    def is_in_head(self) -> bool:
        """Whether a head has begun to arrive and is not whole yet."""
        if self._state is _State.LINE:
            return bool(self._held.strip(b"\r\n"))
        return self._state is _State.FIELDS

    @property
    def is_lost(self) -> bool:
        """Whether the bytes are not followed any more."""
        return self._state is _State.LOST

    def take(self, data: bytes) -> tuple[bytes, int, ClevrdError | None]:
        """Follow ``data`` up to the end of one request at most.

        Returns the bytes to pass on, how many bytes of ``data`` were followed, and the fault behind
        them, if any. The rest of ``data`` has to be given again.
        """
        at = 0
        # The beginning of a request line whose end is in ``data``, if it is.
        held = self._held if self._state is _State.LINE else b""
        fault: ClevrdError | None = None
        # Start of a head that lies in ``data`` from its first byte on; -1 for another head.
        head_at = -1
        try:
            while at < len(data) and self._state is not _State.LOST:
                match self._state:
                    case _State.LINE:
                        if not self._held and (known := self._known.find(data, at)) is not None:
                            at, self._state, self._left_bytes = known
                            self.declared_bytes = 0
                            self.requests += 1
                        else:
                            head_at = -1 if self._held else at
                            after = self._take_line(data, at)
                            if after is None:
                                # The beginning of a line is held.
                                return self._passed(held, data, at), len(data), None
                            at = after
                            continue
                    case _State.FIELDS:
                        at = self._take_field(data, at)
                        if head_at >= 0 and self._state not in (_State.FIELDS, _State.LOST):
                            self._known.add(data[head_at:at], (self._state, self._left_bytes))
                    case _State.BODY:
                        at = self._take_bytes(data, at, _State.LINE)
                    case _State.CHUNK:
                        at = self._take_bytes(data, at, _State.CHUNK_SIZE)
                    case _State.CHUNK_SIZE:
                        at = self._take_chunk_size(data, at)
                    case _State.TRAILERS:
                        at = self._take_trailer(data, at)
                if self._state is _State.LINE:
                    return self._passed(held, data, at), at, None
            at = len(data)
        except ClevrdError as error:
            self._state = _State.LOST
            fault = error
        return self._passed(held, data, at), len(data), fault

    def _passed(self, held: bytes, data: bytes, end: int) -> bytes:
        """Return ``held`` and ``data`` up to ``end``, with many small chunks as one.

        If no step was made no byte is passed on, not even held ones.
        """
        if not end:
            return b""
        if not self._merged:
            return held + data[:end]
        parts = [held]
        at = 0
        for start, after, merged in self._merged:
            parts += (data[at:start], merged)
            at = after
        self._merged.clear()
        parts.append(data[at:end])
        return b"".join(parts)

    # --- heads -----------------------------------------------------------------------------------

    def _take_line(self, data: bytes, at: int) -> int | None:
        """Return where the request line ends; None if it is not whole, and hold it then."""
        line, after = self._next_line(data, at)
        if line is None:
            if fault := line_fault(self._held.removesuffix(b"\r"), is_whole=False):
                raise fault
            return None
        # RFC 9112 §2.2: empty lines before a request line are ignored.
        if line:
            if fault := line_fault(line, is_whole=True):
                raise fault
            self._state = _State.FIELDS
            self.requests += 1
            self._fields.clear()
            self.declared_bytes = 0
            if line.startswith(b"CONNECT "):
                self._state = _State.LOST
        return after

    def _take_field(self, data: bytes, at: int) -> int:
        line, after = self._next_line(data, at)
        if line is None:
            return len(data)
        if not line:
            self._begin_body()
        elif len(self._fields) < 2 and _FRAMING_FIELD.match(line):
            self._fields.append(line)
        return after

    def _begin_body(self) -> None:
        self._state = _State.LOST
        if not self._fields:
            self._state = _State.LINE
        elif len(self._fields) == 1:
            if length := _LENGTH.fullmatch(self._fields[0]):
                self._left_bytes = int(length[1])
                self._state = _State.BODY if self._left_bytes else _State.LINE
            elif _CHUNKED.fullmatch(self._fields[0]):
                self._state = _State.CHUNK_SIZE

    def _next_line(self, data: bytes, at: int) -> tuple[bytes | None, int]:
        """Return the next line without its end, and where the line after it begins.

        The line is None while it is not whole; its bytes are held.

        Raises:
            HeaderTooLarge: the line is longer than MAX_LINE_BYTES.
        """
        held = self._held
        if held.endswith(b"\r") and data.startswith(b"\n", at):
            line, after = held[:-1], at + 1
        else:
            end = data.find(b"\r\n", at, at + MAX_LINE_BYTES + 2)
            if end < 0:
                self._held += data[at : at + MAX_LINE_BYTES + 2]
                self._check_length(self._held.removesuffix(b"\r"))
                return None, len(data)
            line, after = held + data[at:end], end + 2
        self._held = b""
        self._check_length(line)
        return line, after

    def _check_length(self, line: bytes) -> None:
        if len(line) <= MAX_LINE_BYTES:
            return
        if self._state not in (_State.LINE, _State.FIELDS):
            # The line is between chunks: the body reader bounds the bytes of a whole body.
            self._state = _State.LOST
            self._held = b""
            return
        # An earlier fault in the line is reported first, as it is when the line comes in parts.
        if self._state is _State.LINE and (
            fault := line_fault(line[:MAX_LINE_BYTES], is_whole=False)
        ):
            raise fault
        raise HeaderTooLarge(TOO_LONG)

    # --- bodies ----------------------------------------------------------------------------------

    def _take_bytes(self, data: bytes, at: int, then: _State) -> int:
        size = min(self._left_bytes, len(data) - at)
        self._left_bytes -= size
        if not self._left_bytes:
            self._state = then
        return at + size

    def _take_chunk_size(self, data: bytes, at: int) -> int:
        if not self._held and (after := self._take_chunks(data, at)) > at:
            if merged := merge_chunks(data[at:after]):
                self._merged.append((at, after, merged))
            return after
        line, after = self._next_line(data, at)
        if line is None:
            return len(data)
        size = _CHUNK_SIZE.fullmatch(line)
        if size is None or self._state is _State.LOST:
            self._state = _State.LOST
            return after
        size_bytes = int(size[1], 16)
        self.declared_bytes += size_bytes
        self._left_bytes = size_bytes + len(b"\r\n")
        self._state = _State.CHUNK if size_bytes else _State.TRAILERS
        return after

    def _take_chunks(self, data: bytes, at: int) -> int:
        """Return where the whole chunks end; the last chunk, of size 0, is not read here."""
        declared_bytes = self.declared_bytes
        while True:
            small = _SMALL_CHUNKS.match(data, at)
            if small is not None:
                declared_bytes += (small.end() - at) // _SMALLEST_CHUNK_BYTES
                at = small.end()
            line = _CHUNK_LINE.match(data, at)
            size_bytes = int(line[1], 16) if line is not None else 0
            after = line.end() + size_bytes + 2 if line is not None else 0
            if size_bytes == 0 or after > len(data):
                self.declared_bytes = declared_bytes
                return at
            declared_bytes += size_bytes
            at = after

    def _take_trailer(self, data: bytes, at: int) -> int:
        line, after = self._next_line(data, at)
        if line is None:
            return len(data)
        if not line and self._state is _State.TRAILERS:
            self._state = _State.LINE
        return after


def merge_chunks(chunks: bytes) -> bytes:
    """Return one chunk with the content of ``chunks``, which are whole and well-formed.

    Returns b"" where they are few or large, or can't be told apart by their line ends alone.
    """
    ends = chunks.count(b"\r\n")
    if ends < 2 * _MANY_CHUNKS or len(chunks) > ends // 2 * _SMALL_CHUNK_BYTES:
        return b""
    *parts, _ = chunks.split(b"\r\n")
    contents = parts[1::2]
    try:
        sizes = [int(size, 16) for size in parts[::2]]
    except ValueError:
        # An extension of a chunk, or a line end in the content of one.
        return b""
    # The first part is a size, and so is the part behind a content of just that size, and so on.
    if sizes != list(map(len, contents)):
        return b""
    return b"%x\r\n%b\r\n" % (sum(sizes), b"".join(contents))


def line_fault(line: bytes, *, is_whole: bool) -> ClevrdError | None:
    """Return the fault of a request line, or of the beginning of one; None without a fault.

    The first wrong byte decides, so the fault does not depend on how the line was split.
    """
    method, _, rest = line.partition(b" ")
    if len(method) > _MAX_METHOD_BYTES or (line and not _TOKEN.fullmatch(method)):
        return InvalidRequest(NOT_HTTP)
    target, second, version = rest.partition(b" ")
    if odd := _NOT_VISIBLE.search(target):
        return InvalidRequest(NOT_ENCODED if odd[0] >= b"\x80" else NOT_HTTP)
    if second and (not target or not _PART_OF_VERSION.fullmatch(version)):
        return InvalidRequest(NOT_HTTP)
    if not is_whole:
        return None
    if not _VERSION.fullmatch(version):
        return InvalidRequest(NOT_HTTP)
    return None if version in _SPOKEN else WrongVersion(WRONG_VERSION)
