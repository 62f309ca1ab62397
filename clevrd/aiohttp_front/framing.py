"""Follows where each request begins and ends, and refuses what aiohttp's parser lets pass.

Bytes that pass here still have to pass aiohttp's parser, so this module may only refuse, make one
chunk of many small ones, and leave trailers out. Faults of chunks have to be found here, since
aiohttp does not tell the reader of a body of them. Bytes that it can't follow any more it passes on
unchecked. No sockets here. Rules: RFC 9112 §3 (the request line), §6 (lengths), §7.1 (chunks).
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
NO_CHUNK_SIZE: Final = (
    "A chunk of the body must begin with its size in hexadecimal digits, perhaps extensions, and"
    " CRLF (RFC 9112 §7.1)."
)
NO_CHUNK_END: Final = (
    "A chunk of the body is not as long as its size says: CRLF must follow its data (RFC 9112"
    " §7.1)."
)
NO_TRAILER: Final = (
    "What follows the last chunk of the body must be an empty line, or trailer fields and an empty"
    " line (RFC 9112 §7.1)."
)
LONG_CHUNK_LINE: Final = f"A line between the chunks of the body is over {MAX_LINE_BYTES} bytes."
# Most bytes of all trailer fields of a body together. Nobody reads them.
MAX_TRAILER_BYTES: Final = 65_536
LONG_TRAILER: Final = f"The trailer fields of the body are over {MAX_TRAILER_BYTES} bytes."

# Longest method; aiohttp knows none that is longer.
_MAX_METHOD_BYTES: Final = 24
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NOT_VISIBLE: Final = re.compile(rb"[^!-~]")
_VERSION: Final = re.compile(rb"HTTP/[0-9]\.[0-9]")
_PART_OF_VERSION: Final = re.compile(rb"[HTP/0-9.]{0,8}")
_SPOKEN: Final = (b"HTTP/1.1", b"HTTP/1.0")

# Fields that say how long a body is, or end the sequence of requests. Two ways to say how long it
# is can be followed, and one of them at a time; for any other the bytes are passed on unchecked,
# and aiohttp or `front` decides.
_FRAMING_FIELD: Final = re.compile(rb"(?i)(?:content-length|transfer-encoding|upgrade)[ \t]*:")
_UPGRADE: Final = re.compile(rb"(?i)upgrade[ \t]*:")
_LENGTH: Final = re.compile(rb"(?i)content-length:[ \t]*([0-9]{1,18})[ \t]*")
_CHUNKED: Final = re.compile(rb"(?i)transfer-encoding:[ \t]*chunked[ \t]*")

# Extensions of a chunk, as aiohttp's parser takes them: narrower than RFC 9112 §7.1.1, which allows
# whitespace around the signs.
_NAME: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_QUOTED: Final = rb"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])"
_EXTENSION: Final = rb'(?:;%b++(?:="%b*+"|=%b*+)?)' % (_NAME, _QUOTED, _NAME)
_EXTENSIONS: Final = _EXTENSION + rb"*+"
_BEGUN_EXTENSION: Final = rb';(?:%b++="%b*+\\?)?' % (_NAME, _QUOTED)
# Many chunks of up to 15 bytes in one match: 0.1 us a chunk instead of 1.
_SMALL_CHUNKS: Final = re.compile(
    rb"(?si:0*+(?:"
    + b"|".join(rb"%x%b\r\n.{%d}\r\n" % (size, _EXTENSIONS, size) for size in range(1, 16))
    + rb"))*+"
)
# Bytes of a chunk with one byte of body; no chunk has more bytes around each byte of body.
_SMALLEST_CHUNK_BYTES: Final = 6
_CHUNK_LINE: Final = re.compile(rb"0*+([0-9A-Fa-f]{1,16})" + _EXTENSIONS + rb"\r\n")
_CHUNK_SIZE: Final = re.compile(rb"0*([0-9A-Fa-f]{1,16})" + _EXTENSIONS)
_PART_OF_CHUNK_SIZE: Final = re.compile(
    rb"(?:0*[0-9A-Fa-f]{1,16}%b*(?:\r?|%b))?" % (_EXTENSION, _BEGUN_EXTENSION)
)
# A field that aiohttp's parser takes behind the last chunk; those that say how long a body is are
# none (RFC 9110 §6.5.1).
_TRAILER: Final = re.compile(
    rb"(?i)(?!(?:content-length|transfer-encoding):)%b+:[\t -~\x80-\xff]*" % _NAME
)
_PART_OF_TRAILER: Final = re.compile(rb"(?:%b+(?::[\t -~\x80-\xff]*)?)?\r?" % _NAME)
# So many whole chunks behind one another, of so many bytes on average at most, become one: each
# costs 0.2 us here, and in aiohttp's parser and body reader 4.
_MANY_CHUNKS: Final = 8
_SMALL_CHUNK_BYTES: Final = 256


_CRLF: Final = b"\r\n"
_END_OF_HEAD: Final = b"\r\n\r\n"


class WrongVersion(InvalidRequest):
    """A well-formed request line with a version that is not spoken here."""


class BrokenChunks(InvalidRequest):
    """The chunks of a body are not well-formed, so nobody knows where its request ends."""


class _State(Enum):
    LINE = 0
    FIELDS = 1
    BODY = 2
    CHUNK_SIZE = 3
    CHUNK = 4
    CHUNK_END = 5
    TRAILERS = 6
    # The bytes are not followed any more: a request is being refused, or the connection is no HTTP.
    LOST = 7


class KnownHeads(HeadCache[tuple[_State, int, _State]]):
    """Heads that were seen before -> the state behind each, the size of its body, the state behind.

    A head that repeats is followed only once for all connections: 1 us instead of 12. The size is 0
    where the head gives none.
    """

    __slots__ = ()

    def find(self, data: bytes, at: int) -> tuple[int, _State, int, _State] | None:
        """Return the end of the head at ``at``, and what `Framing` knows behind it."""
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
        "_behind",
        "_fields",
        "_held",
        "_known",
        "_left_bytes",
        "_replaced",
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
        # The state behind the body under way: LOST where that may be another protocol.
        self._behind = _State.LINE
        # Fields of the head under way that say how long its body is; at most 2.
        self._fields: list[bytes] = []
        # Bytes that are still to come of a body or a chunk, or that its trailers may still have.
        self._left_bytes = 0
        # Chunks that become one, and trailers, which become none: where they begin and end in the
        # bytes under way, and what they become.
        self._replaced: list[tuple[int, int, bytes]] = []
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
                            at, self._state, self._left_bytes, self._behind = known
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
                            known = (self._state, self._left_bytes, self._behind)
                            self._known.add(data[head_at:at], known)
                    case _State.BODY:
                        at = self._take_bytes(data, at, self._behind)
                    case _State.CHUNK:
                        at = self._take_bytes(data, at, _State.CHUNK_END)
                    case _State.CHUNK_END:
                        at = self._take_chunk_end(data, at)
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
        """Return ``held`` and ``data`` up to ``end``, with what is replaced there.

        If no step was made no byte is passed on, not even held ones.
        """
        if not end:
            return b""
        if not self._replaced:
            return held + data[:end]
        parts = [held]
        at = 0
        for start, after, replacement in self._replaced:
            parts += (data[at:start], replacement)
            at = after
        self._replaced.clear()
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
        fields = [each for each in self._fields if not _UPGRADE.match(each)]
        self._behind = _State.LINE if len(fields) == len(self._fields) else _State.LOST
        self._state = _State.LOST
        if not fields:
            self._state = self._behind
        elif len(fields) == 1:
            if length := _LENGTH.fullmatch(fields[0]):
                self._left_bytes = int(length[1])
                self._state = _State.BODY if self._left_bytes else self._behind
            elif _CHUNKED.fullmatch(fields[0]):
                self._state = _State.CHUNK_SIZE

    def _next_line(self, data: bytes, at: int) -> tuple[bytes | None, int]:
        """Return the next line without its end, and where the line after it begins.

        The line is None while it is not whole; its bytes are held.

        Raises:
            HeaderTooLarge: the line is longer than MAX_LINE_BYTES.
            BrokenChunks: so is one between chunks.
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
            raise BrokenChunks(LONG_CHUNK_LINE)
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
                self._replaced.append((at, after, merged))
            return after
        line, after = self._next_line(data, at)
        if line is None:
            if not _PART_OF_CHUNK_SIZE.fullmatch(self._held):
                raise BrokenChunks(NO_CHUNK_SIZE)
            return len(data)
        size = _CHUNK_SIZE.fullmatch(line)
        if size is None:
            raise BrokenChunks(NO_CHUNK_SIZE)
        size_bytes = int(size[1], 16)
        self.declared_bytes += size_bytes
        self._left_bytes = size_bytes or MAX_TRAILER_BYTES
        self._state = _State.CHUNK if size_bytes else _State.TRAILERS
        return after

    def _take_chunk_end(self, data: bytes, at: int) -> int:
        """Take the line end behind a chunk's data; the bytes of it may come one by one."""
        after = min(at + len(_CRLF) - len(self._held), len(data))
        self._held += data[at:after]
        if not _CRLF.startswith(self._held):
            raise BrokenChunks(NO_CHUNK_END)
        if self._held == _CRLF:
            self._held = b""
            self._state = _State.CHUNK_SIZE
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
            if size_bytes == 0 or data[after - 2 : after] != _CRLF:
                self.declared_bytes = declared_bytes
                return at
            declared_bytes += size_bytes
            at = after

    def _take_trailer(self, data: bytes, at: int) -> int:
        """Take a trailer field, which is not passed on, or the empty line behind all of them."""
        line, after = self._next_line(data, at)
        if line == b"":
            self._left_bytes = 0
            self._state = self._behind
            self._replaced.append((at, after, _CRLF))
            return after
        form = _PART_OF_TRAILER if line is None else _TRAILER
        if not form.fullmatch(self._held if line is None else line):
            raise BrokenChunks(NO_TRAILER)
        self._left_bytes -= after - at
        if self._left_bytes < 0:
            raise BrokenChunks(LONG_TRAILER)
        self._replaced.append((at, after, b""))
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
