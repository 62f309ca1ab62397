"""PublishRequest: what a publisher asks for; strict decoding. No ids and no offsets here.

Wire shapes: docs/wire.md. Names: core/names. Sentences about JSON that is none: core/json_faults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, cast

import msgspec

from clevrd.core.idempotency import EXPECTED_KEY
from clevrd.core.idempotency import check_key as check_idempotency_key
from clevrd.core.json_faults import json_fault, json_kind
from clevrd.core.message_headers import (
    Headers,
    check_headers,
    has_foreign,
    known_headers,
    sift,
    together,
)
from clevrd.core.names import check_key, check_topic
from clevrd.core.near_names import MAX_WARNINGS, PUBLISH_FIELDS, SOCKET_FIELDS, Vocabulary
from clevrd.core.nesting import SHALLOW_BYTES, TOO_DEEP, is_too_deep
from clevrd.core.ttl import MAX_TTL_S, MIN_TTL_S, TTL_ADVICE
from clevrd.errors import InvalidRequest

EXPECTED_BODY: Final = 'send {"topic": string, "data": any JSON value but null}'

# A ref is sent back with every answer, so it is kept as short as an identifier.
MAX_REF_CHARS: Final = 128


class PublishRequest(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """One publish as its publisher asks for it. Unknown fields are for `LenientPublish`.

    ``data`` is the publisher's JSON, byte for byte, without the whitespace around it. Missing
    data reads as null, which is refused alike. Where a name occurs twice the last one counts.
    """

    topic: str
    data: msgspec.Raw = msgspec.Raw(b"null")
    # A publisher that sends the same key, topic and data again is given the first answer.
    idempotency_key: str | None = None
    # The thing that the message is about: `latest` readers want the newest message of each key.
    key: str | None = None
    # Seconds for which it is worth reading; None for ever.
    ttl_s: int | float | None = None
    # The headers that it is carried with, its own and its request's; None or empty for none.
    headers: dict[str, str] | None = None

    def warnings(self) -> tuple[str, ...]:
        """Return what the publisher is told besides the answer."""
        return ()


class SocketPublish(PublishRequest, frozen=True, gc=False):
    """A publish on a publish socket; with ``ref`` its publisher wants an answer carrying it."""

    ref: str | int | None = None


# A field of the lenient classes: set by `_decode_again`, and never read from a body.
_told: Final = msgspec.field(name="", default=())


class LenientPublish(PublishRequest, frozen=True, gc=False, forbid_unknown_fields=False):
    """A publish with fields that are not known, or with headers that are none of a message's."""

    headers: Any = None
    told: Any = _told

    def warnings(self) -> tuple[str, ...]:
        """Return what of the unknown fields is nearly a known one."""
        return cast(tuple[str, ...], self.told)


class LenientSocketPublish(SocketPublish, frozen=True, gc=False, forbid_unknown_fields=False):
    """A publish on a publish socket with fields that are not known, or with such headers."""

    headers: Any = None
    told: Any = _told

    def warnings(self) -> tuple[str, ...]:
        """Return what of the unknown fields is nearly a known one."""
        return cast(tuple[str, ...], self.told)


_publish_decoder = msgspec.json.Decoder(PublishRequest)
_lenient_publish_decoder = msgspec.json.Decoder(LenientPublish)
_socket_decoder = msgspec.json.Decoder(SocketPublish)
_lenient_socket_decoder = msgspec.json.Decoder(LenientSocketPublish)
_names_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
# The largest body whose fields' names are looked at: 9,000 of the shortest, in 2 ms.
MAX_NAMED_BYTES: Final = 65_536
_NULL: Final = msgspec.Raw(b"null")
# Advice about a field that is not a string; the ref, which only sockets have, comes last.
_ADVICE: Final = {
    "topic": EXPECTED_BODY,
    "idempotency_key": f"send a string of {EXPECTED_KEY}",
    "ref": f"send a string of at most {MAX_REF_CHARS} characters or an integer",
}


class _Fields(msgspec.Struct, frozen=True):
    """The fields as they stand in a body that is refused, empty where they don't."""

    topic: msgspec.Raw = msgspec.Raw(b"")
    idempotency_key: msgspec.Raw = msgspec.Raw(b"")
    ttl_s: msgspec.Raw = msgspec.Raw(b"")
    ref: msgspec.Raw = msgspec.Raw(b"")


class _Logged(msgspec.Struct, frozen=True):
    """A publish object in a log, with whatever another program has taken for headers."""

    topic: str
    data: msgspec.Raw = msgspec.Raw(b"null")
    idempotency_key: str | None = None
    key: str | None = None
    ttl_s: int | float | None = None
    headers: msgspec.Raw = msgspec.Raw(b"null")


_fields_decoder = msgspec.json.Decoder(_Fields)
_logged_decoder = msgspec.json.Decoder(_Logged)
RequestT = TypeVar("RequestT", bound=PublishRequest)


def decode_publish(body: bytes) -> PublishRequest:
    """Return the publish request in ``body``.

    Raises:
        InvalidRequest: not UTF-8, not JSON, not an object, or ``topic`` or ``data`` is wrong.
    """
    return _decode(body, _publish_decoder, _lenient_publish_decoder, PUBLISH_FIELDS)


def decode_plain(bodies: Sequence[bytes], topic: str) -> list[PublishRequest]:
    """Return the publish requests in the first of ``bodies``: see `_decode_plain`."""
    return _decode_plain(bodies, topic, _publish_decoder.decode)


def decode_plain_socket(payloads: Sequence[bytes], topic: str) -> list[SocketPublish]:
    """Return the publishes in the first of text frames' ``payloads``: see `_decode_plain`."""
    publishes = _decode_plain(payloads, topic, _socket_decoder.decode)
    if any(isinstance(each.ref, str) and len(each.ref) > MAX_REF_CHARS for each in publishes):
        return []
    return publishes


def decode_logged(line: bytes) -> PublishRequest:
    """Return the publish request in a line of a log, without headers that can't be carried.

    Raises:
        InvalidRequest: as `decode_publish`, but never for its headers: a clevrd that knows nothing
            of these counts the message, so all have to.
    """
    try:
        return decode_publish(line)
    except InvalidRequest as error:
        return _without_wrong_headers(line, error)


def _without_wrong_headers(line: bytes, error: InvalidRequest) -> PublishRequest:
    """Return the request in ``line``, which was refused with ``error``; raise that if it is wrong.

    As `decode_publish` reads it, but for the headers.
    """
    check_utf8(line)
    if len(line) > SHALLOW_BYTES and is_too_deep(line):
        raise error
    try:
        logged = _logged_decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise error from None
    request = PublishRequest(
        *(logged.topic, logged.data, logged.idempotency_key, logged.key, logged.ttl_s),
        known_headers(bytes(logged.headers)),
    )
    check_publish(request)
    return request


def with_head(request: RequestT, of_head: Headers) -> RequestT:
    """Return ``request`` with the headers of its request's head, as far as it has none of its own.

    Raises:
        InvalidRequest: they are too many, or too large, together.
    """
    return msgspec.structs.replace(request, headers=together(of_head, request.headers))


def decode_socket_publish(payload: bytes) -> SocketPublish:
    """Return the publish in a text frame's ``payload``.

    Raises:
        InvalidRequest: as `decode_publish`, or ``ref`` is neither a string nor an integer, or
            longer than MAX_REF_CHARS.
    """
    publish = _decode(payload, _socket_decoder, _lenient_socket_decoder, SOCKET_FIELDS)
    check_ref(publish.ref)
    return publish


def _decode_plain(
    bodies: Sequence[bytes], topic: str, decode: Callable[[bytes], RequestT]
) -> list[RequestT]:
    """Return the requests of the first of ``bodies``, as far as they are plain and to ``topic``.

    It takes half of the time that one by one does. Plain are small ones that nothing has to be said
    of, without an idempotency key; there may be more of them behind those that are returned.
    """
    if max(map(len, bodies)) > SHALLOW_BYTES:
        return []
    try:
        # No character of UTF-8 has a line feed inside it, so all bodies are checked at once.
        check_utf8(b"\n".join(bodies))
        requests = list(map(decode, bodies))
    except (InvalidRequest, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []
    for place, each in enumerate(requests):
        if each.topic != topic or each.idempotency_key is not None or each.data == _NULL:
            return requests[:place]
        if each.key is not None or each.ttl_s is not None or each.headers:
            try:
                check_publish(each)
            except InvalidRequest:
                return requests[:place]
    return requests


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
    else:
        if request.headers and has_foreign(request.headers):
            request = with_warnings(lenient_decoder.decode(body), field_warnings(body, names))
    check_publish(request)
    return request


def with_warnings(request: RequestT, told: tuple[str, ...]) -> RequestT:
    """Return a lenient ``request`` with its message's headers alone, and with what is to be told.

    Raises:
        InvalidRequest: a header that is known can't be carried.
    """
    headers, more = sift(request.headers)
    return msgspec.structs.replace(request, headers=headers, told=(*told, *more)[:MAX_WARNINGS])


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
        return with_warnings(decoder.decode(body), field_warnings(body, names))
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
    if request.ttl_s is not None and not MIN_TTL_S <= request.ttl_s <= MAX_TTL_S:
        raise InvalidRequest(TTL_ADVICE)
    if request.headers:
        check_headers(request.headers)


def _fault(body: bytes, error: Exception) -> str:
    """Return the sentence about ``body``, whose decoding raised ``error``."""
    try:
        if isinstance(error, msgspec.ValidationError):
            return _wrong_shape(body)
    except (msgspec.DecodeError, RecursionError) as worse:
        error = worse
    return f"The body {json_fault(body, error)}; {EXPECTED_BODY}."


def _wrong_shape(body: bytes) -> str:
    """Return the sentence about ``body``, which begins as JSON and is not a publish."""
    kind = json_kind(body.lstrip())
    if kind != "an object":
        return f"The body is {kind}, not an object; {EXPECTED_BODY}."
    fields = _fields_decoder.decode(body)
    if not bytes(fields.topic):
        told = field_warnings(body, PUBLISH_FIELDS)
        return " ".join((f"The topic is missing; {EXPECTED_BODY}.", *told))
    if json_kind(bytes(fields.ttl_s)) not in ("a number", "null", ""):
        return TTL_ADVICE
    for name, advice in _ADVICE.items():
        kind = json_kind(bytes(getattr(fields, name)))
        if kind not in ("a string", ""):
            return f"The {name} is {kind}; {advice}."
    return f"A field of the body can't have the value it has; {EXPECTED_BODY}."
