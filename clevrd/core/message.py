"""Messages, publish requests and message ids; strict decoding. No encoding and no offsets here.

Wire shapes: docs/wire.md. JSON: RFC 8259; UTF-8: RFC 3629; times: RFC 3339 in UTC.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Final, TypeVar, cast

import msgspec

from clevrd.core.idempotency import EXPECTED_KEY
from clevrd.core.idempotency import check_key as check_idempotency_key
from clevrd.core.near_names import PUBLISH_FIELDS, SOCKET_FIELDS, Vocabulary
from clevrd.core.nesting import SHALLOW_BYTES, TOO_DEEP, is_too_deep
from clevrd.errors import InvalidRequest

# A topic is part of a URL and of every message; 255 bytes is what file systems and brokers take.
MAX_TOPIC_BYTES: Final = 255

# A key names what a message is about, an instrument or a vehicle: an identifier like a topic.
MAX_KEY_BYTES: Final = 255

EXPECTED_BODY: Final = 'send {"topic": string, "data": any JSON value but null}'

_SECOND_US: Final = 1_000_000

# Wall clock and id may differ by this much before the timestamp is taken from the clock alone:
# ties within a burst stay below it, a clock set back does not.
_MAX_TIE_US: Final = 1_000

# A ref is sent back with every answer, so it is kept as short as an identifier.
MAX_REF_CHARS: Final = 128


class PublishRequest(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """What a publisher asks for. Fields it does not name are ignored, by `LenientPublish`.

    ``data`` is the publisher's JSON, byte for byte, without the whitespace around it. Missing
    data reads as null, which is refused alike. Of a name that occurs twice the last one counts.
    """

    topic: str
    data: msgspec.Raw = msgspec.Raw(b"null")
    # Who publishes again with the same one, topic and data is given the first answer.
    idempotency_key: str | None = None
    # What the message is about: readers with the policy `latest` want the newest of each key.
    key: str | None = None

    def warnings(self) -> tuple[str, ...]:
        """Return what the publisher is told besides the answer."""
        return ()


class SocketPublish(PublishRequest, frozen=True, gc=False):
    """A publish on a publish socket; with ``ref`` its publisher wants an answer carrying it."""

    ref: str | int | None = None


# Of a class below: set by `read_leniently`, whatever the field of this name in a body was.
_told: Final = msgspec.field(name="", default=())


class LenientPublish(PublishRequest, frozen=True, gc=False, forbid_unknown_fields=False):
    """A publish with fields that are not known."""

    told: Any = _told

    def warnings(self) -> tuple[str, ...]:
        """Return what of the unknown fields is nearly a known one."""
        return cast(tuple[str, ...], self.told)


class LenientSocketPublish(SocketPublish, frozen=True, gc=False, forbid_unknown_fields=False):
    """A publish on a publish socket with fields that are not known."""

    told: Any = _told

    def warnings(self) -> tuple[str, ...]:
        """Return what of the unknown fields is nearly a known one."""
        return cast(tuple[str, ...], self.told)


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message as subscribers see it; the fields stand in the order they are sent."""

    id: str
    topic: str
    tenant_id: str
    data: msgspec.Raw
    timestamp: str
    offset: int


class KeyedMessage(Message, frozen=True, gc=False):
    """A message that was published with a key.

    A class of its own: a field that may be left out costs every message 150 ns to encode.
    """

    key: str


_NO_PUNCTUATION: Final = str.maketrans("", "", "-T:.Z")
_publish_decoder = msgspec.json.Decoder(PublishRequest)
_lenient_publish_decoder = msgspec.json.Decoder(LenientPublish)
_socket_decoder = msgspec.json.Decoder(SocketPublish)
_lenient_socket_decoder = msgspec.json.Decoder(LenientSocketPublish)
_names_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
# Of a body, the names of whose fields are looked at: 9,000 of the shortest, in 2 ms.
MAX_NAMED_BYTES: Final = 65_536
_NULL: Final = msgspec.Raw(b"null")
# A byte order mark, which tools on Windows put before UTF-8; JSON has none (RFC 8259 §8.1).
BOM: Final = b"\xef\xbb\xbf"
BEGINS_WITH_BOM: Final = (
    "begins with a byte order mark (EF BB BF), which JSON has not; leave it out"
)
# All before the first escape of half a surrogate pair that stands without the other half.
_PAIRED: Final = re.compile(
    rb"(?s:[^\\]++|\\[^u]|\\u(?![Dd][89A-Fa-f])|\\u[Dd][89ABab]..\\u[Dd][C-Fc-f]..)*+"
)
_ESCAPE: Final = re.compile(rb"\\u[0-9A-Fa-f]{4}")
_AT_BYTE: Final = re.compile(r"\(byte (\d+)\)")

# A JSON value's first byte -> what it is; the others begin numbers.
_KINDS: Final = {
    b"{": "an object",
    b"[": "an array",
    b'"': "a string",
    b"t": "a boolean",
    b"f": "a boolean",
    b"n": "null",
}


# What to do about a field that is not a string; the ref, which only sockets have, comes last.
_ADVICE: Final = {
    "topic": EXPECTED_BODY,
    "idempotency_key": f"send a string of {EXPECTED_KEY}",
    "ref": f"send a string of at most {MAX_REF_CHARS} characters or an integer",
}


class _Fields(msgspec.Struct, frozen=True):
    """The fields as they stand in a body that is refused, empty where they don't."""

    topic: msgspec.Raw = msgspec.Raw(b"")
    idempotency_key: msgspec.Raw = msgspec.Raw(b"")
    ref: msgspec.Raw = msgspec.Raw(b"")


_fields_decoder = msgspec.json.Decoder(_Fields)
RequestT = TypeVar("RequestT", bound=PublishRequest)


def decode_publish(body: bytes) -> PublishRequest:
    """Return the publish request in ``body``.

    Raises:
        InvalidRequest: not UTF-8, not JSON, not an object, or ``topic`` or ``data`` is wrong.
    """
    return _decode(body, _publish_decoder, _lenient_publish_decoder, PUBLISH_FIELDS)


def decode_socket_publish(payload: bytes) -> SocketPublish:
    """Return the publish in a text frame's ``payload``.

    Raises:
        InvalidRequest: as `decode_publish`, or ``ref`` is neither a string nor an integer, or
            longer than MAX_REF_CHARS.
    """
    publish = _decode(payload, _socket_decoder, _lenient_socket_decoder, SOCKET_FIELDS)
    check_ref(publish.ref)
    return publish


def check_ref(ref: object) -> None:
    """Raise InvalidRequest if ``ref`` is longer than MAX_REF_CHARS."""
    if isinstance(ref, str) and len(ref) > MAX_REF_CHARS:
        raise InvalidRequest(f"The ref has over {MAX_REF_CHARS} characters; send a shorter one.")


def _decode(
    body: bytes,
    decoder: msgspec.json.Decoder[RequestT],
    lenient_decoder: msgspec.json.Decoder[Any],
    names: Vocabulary,
) -> RequestT:
    check_utf8(body)
    if len(body) > SHALLOW_BYTES and is_too_deep(body):
        raise InvalidRequest(f"The body is {TOO_DEEP}; {EXPECTED_BODY}.")
    try:
        request = decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        request = _decode_again(body, lenient_decoder, names, error)
    check_publish(request)
    return request


def _decode_again(
    body: bytes, decoder: msgspec.json.Decoder[RequestT], names: Vocabulary, error: Exception
) -> RequestT:
    """Decode ``body``, which raised ``error``, without complaint about unknown fields.

    Raises:
        InvalidRequest: as `decode_publish`.
    """
    try:
        if not isinstance(error, msgspec.ValidationError):
            raise error
        request = decoder.decode(body)
        return msgspec.structs.replace(request, told=field_warnings(body, names))
    except UnicodeDecodeError as fault:
        raise InvalidRequest(
            f"The body is not valid UTF-8 at byte {fault.start}; {EXPECTED_BODY} in UTF-8."
        ) from fault
    except (msgspec.MsgspecError, RecursionError) as fault:
        raise InvalidRequest(_fault(body, fault)) from fault


def field_warnings(body: bytes, names: Vocabulary) -> tuple[str, ...]:
    """Return what to say of fields in a JSON object that nearly are known ones."""
    if len(body) > MAX_NAMED_BYTES:
        return ()
    return names.warnings(_names_decoder.decode(body))


def check_utf8(body: bytes) -> None:
    """Raise InvalidRequest unless ``body`` is UTF-8.

    msgspec.Raw skips over strings without looking at their bytes, and one bad byte would make
    every browser on the topic close with 1007 (RFC 6455 §8.1).
    """
    # ASCII is a third of the price to recognise, and most bodies are.
    if body.isascii():
        return
    try:
        str(body, "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid UTF-8 at byte {error.start}; {EXPECTED_BODY} in UTF-8."
        ) from error


def check_publish(request: PublishRequest) -> None:
    """Raise InvalidRequest if ``request`` has no data, or its topic or key can't be one."""
    if request.data == _NULL:
        raise InvalidRequest(
            " ".join((f"The data is missing or null; {EXPECTED_BODY}.", *request.warnings()))
        )
    check_topic(request.topic)
    if request.key is not None:
        check_key(request.key)
    if request.idempotency_key is not None:
        check_idempotency_key(request.idempotency_key)


def _fault(body: bytes, error: Exception) -> str:
    """Return the sentence about ``body``, whose decoding raised ``error``."""
    try:
        if isinstance(error, msgspec.ValidationError):
            return _wrong_shape(body)
    except (msgspec.DecodeError, RecursionError) as worse:
        error = worse
    return f"The body {json_fault(body, error)}; {EXPECTED_BODY}."


def json_fault(text: bytes, error: Exception) -> str:
    """Return what is wrong with ``text``, which is no JSON, as the rest of a sentence about it."""
    if isinstance(error, RecursionError):
        return f"is {TOO_DEEP}"
    if text.startswith(BOM):
        return BEGINS_WITH_BOM
    if not text.strip():
        return "is empty"
    at = _AT_BYTE.search(str(error))
    # msgspec says little of half a surrogate pair, and takes one at a string's end for the end of
    # the body.
    half = _half_of_a_pair(text, int(at[1]) if at else len(text))
    if half is not None:
        return half
    return f"is not JSON at byte {at[1]}" if at else "is not complete JSON"


def _half_of_a_pair(text: bytes, before: int) -> str | None:
    """Return what to say of a lone surrogate's escape ``before`` that place; None without one."""
    paired = _PAIRED.match(text)
    lone = _ESCAPE.match(text, paired.end()) if paired else None
    if lone is None or lone.start() > before:
        return None
    return (
        f"has {lone[0].decode()} at byte {lone.start()}, which is half a surrogate pair (one"
        " character in two escapes); send both halves, or the character itself"
    )


def _wrong_shape(body: bytes) -> str:
    """Return the sentence about ``body``, which begins as JSON and is not a publish."""
    kind = _kind_of(body.lstrip())
    if kind != "an object":
        return f"The body is {kind}, not an object; {EXPECTED_BODY}."
    fields = _fields_decoder.decode(body)
    if not bytes(fields.topic):
        told = field_warnings(body, PUBLISH_FIELDS)
        return " ".join((f"The topic is missing; {EXPECTED_BODY}.", *told))
    for name, advice in _ADVICE.items():
        kind = _kind_of(bytes(getattr(fields, name)))
        if kind not in ("a string", ""):
            return f"The {name} is {kind}; {advice}."
    return f"A field of the body can't have the value it has; {EXPECTED_BODY}."


def _kind_of(json: bytes) -> str:
    """Return what ``json``, one value without whitespace before it, is; empty where it is."""
    return _KINDS.get(json[:1], "a number") if json else ""


def check_topic(topic: str) -> None:
    """Raise InvalidRequest unless ``topic`` is 1 to 255 bytes of UTF-8 without control characters.

    Notice characters are those of Unicode's category Cc: C0, DEL and C1.
    """
    if topic.isascii() and topic.isprintable() and 0 < len(topic) <= MAX_TOPIC_BYTES:
        return
    if not topic:
        raise InvalidRequest("The topic is empty; name one of 1 to 255 bytes.")
    _check_name("topic", topic, MAX_TOPIC_BYTES)


def check_key(key: str) -> None:
    """Raise InvalidRequest unless ``key`` is 1 to 255 bytes of UTF-8 without control characters."""
    if key.isascii() and key.isprintable() and 0 < len(key) <= MAX_KEY_BYTES:
        return
    if not key:
        raise InvalidRequest("The key is empty; give one of 1 to 255 bytes, or leave it out.")
    _check_name("key", key, MAX_KEY_BYTES)


def _check_name(what: str, name: str, max_bytes: int) -> None:
    try:
        size_bytes = len(name.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"The {what} holds a lone surrogate; use valid Unicode.") from error
    if size_bytes > max_bytes:
        raise InvalidRequest(f"The {what} has {size_bytes} bytes; {max_bytes} are allowed.")
    if any(ord(char) < 0x20 or 0x7F <= ord(char) <= 0x9F for char in name):
        raise InvalidRequest(f"The {what} holds a control character; remove it.")


class MessageIds:
    """Makes the ids ``msg-YYYYMMDD-HHMMSS.ffffff`` and the timestamps of messages.

    Ids rise strictly within the process, so they are unique in it (and beyond it, where the next
    process is told the last one): on a tie, or when the wall clock is set back, the id moves on by
    a microsecond. The timestamp is the clock's, to within
    the millisecond by which a burst's ids may run ahead of it.
    """

    __slots__ = ("_id_prefix", "_last_us", "_second_us", "_time_prefix")

    def __init__(self) -> None:
        self._last_us = -1
        # Start of the second that both prefixes spell; formatting a date costs more than the rest.
        self._second_us = -_SECOND_US
        self._id_prefix = ""
        self._time_prefix = ""

    @property
    def last_us(self) -> int:
        """The last id, in microseconds since 1970; -1 before the first."""
        return self._last_us

    def go_on_after(self, last_us: int) -> None:
        """Make only ids after ``last_us``: an earlier process made ids up to it."""
        self._last_us = max(self._last_us, last_us)

    def next(self, wall_us: int) -> tuple[str, str]:
        """Return (id, timestamp) for a message made at ``wall_us``, microseconds since 1970."""
        us = wall_us if wall_us > self._last_us else self._last_us + 1
        self._last_us = us
        micro = us - self._second_us
        if not 0 <= micro < _SECOND_US:
            micro = self._spell_second(us)
        # Six digits with leading zeros, in two thirds of the time of a format specification.
        digits = str(_SECOND_US + micro)[1:]
        if us - wall_us > _MAX_TIE_US:
            return self._id_prefix + digits, rfc3339(wall_us)
        return self._id_prefix + digits, f"{self._time_prefix}{digits}Z"

    def _spell_second(self, us: int) -> int:
        """Make the prefixes those of ``us``; return the microseconds beyond its second."""
        second, micro = divmod(us, _SECOND_US)
        moment = datetime.fromtimestamp(second, UTC)
        self._second_us = us - micro
        self._id_prefix = moment.strftime("msg-%Y%m%d-%H%M%S.")
        self._time_prefix = moment.strftime("%Y-%m-%dT%H:%M:%S.")
        return micro


def id_at(wall_us: int) -> str:
    """Return the id of a message made at ``wall_us``, microseconds since 1970, without a tie."""
    return id_of_timestamp(rfc3339(wall_us))


def id_of_timestamp(timestamp: str) -> str:
    """Return the id that a message with this ``rfc3339`` timestamp has where there is no tie.

    An empty timestamp gives an id before all others.
    """
    digits = timestamp.translate(_NO_PUNCTUATION)
    return f"msg-{digits[:8]}-{digits[8:14]}.{digits[14:]}" if digits else ""


def rfc3339(wall_us: int) -> str:
    """Return ``wall_us``, microseconds since 1970, as ``2026-01-31T12:00:00.000000Z``."""
    second, micro = divmod(wall_us, _SECOND_US)
    return datetime.fromtimestamp(second, UTC).strftime(f"%Y-%m-%dT%H:%M:%S.{micro:06d}Z")
