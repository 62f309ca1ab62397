"""Converts data between Python values and JSON, both ways, without loss. No messages here.

JSON: RFC 8259, which has no form for infinity and NaN (§6). A JSON number without a Python value
raises an error and is not rounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from math import isfinite
from typing import Any, Final

import msgspec

from clevrd.client.arguments import type_name
from clevrd.client.errors import BadData, BadRecord

# Errors of a decoder: the text is not JSON or has another shape; bad UTF-8 in a key; too deep
# nesting.
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

# msgspec's JSON for data with infinity or NaN holds one of these; JSON of other data may hold one,
# too.
_NO_NUMBERS: Final = (b"null", b"NaN", b"Infinity", b'inf"', b'nan"')

# The decoder's phrases -> phrases for people.
_REASONS: Final = {
    "JSON is malformed: ": "",
    "Input data was truncated": "it ends before the value does",
    "Number out of range": "a number beyond a float's range",
    "Integer value out of range": "an integer of more than 4,300 digits",
}

# Matches one escape in a JSON string, or the two escapes of a surrogate pair (RFC 8259 §7).
_ESCAPE: Final = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)", re.DOTALL
)
_HALF: Final = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
_decode_raw = msgspec.json.Decoder(msgspec.Raw).decode


# --- to JSON -------------------------------------------------------------------------------------


def data_json(data: Any) -> bytes:
    """Return ``data`` as JSON.

    Raises:
        TypeError: ``data`` has no JSON form; bytes have none here either, since they would become
            base64.
        BadRecord: the type of a value has a JSON form, but the value has none: infinity, NaN, half
            a surrogate pair, an integer of more digits than Python prints, a list that holds
            itself.
    """
    if isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError("data is bytes, which JSON has no form for; use publish_raw() for JSON.")
    try:
        text = _encode(data)
    except TypeError as error:
        sentence = str(error).rstrip(".")
        raise TypeError(f"data has no JSON form: {sentence}.") from error
    except RecursionError as error:
        raise BadRecord("data is nested too deeply, or holds itself.") from error
    except UnicodeEncodeError as error:
        raise BadRecord("data holds half a surrogate pair, which UTF-8 has no form for.") from error
    except ValueError as error:
        raise BadRecord(f"data has no JSON form: {str(error).rstrip('.')}.") from error
    # msgspec writes null for a float without a JSON form, and text for a Decimal or a key. Only
    # data whose JSON has one of these words is searched, which costs some ten times as much as
    # encoding it.
    if any(each in text for each in _NO_NUMBERS):
        _check_numbers(data)
    return text


def _check_numbers(data: Any) -> None:
    """Raise BadRecord if ``data`` holds infinity or NaN."""
    plain = msgspec.to_builtins(
        data,
        builtin_types=(Decimal, bytes, bytearray, memoryview),
        enc_hook=lambda _: "",  # JSON in msgspec.Raw; everything else was refused by the encoder
    )
    with suppress(TypeError, ValueError, RecursionError):
        _check_plain(plain)
        return
    # The search keeps its own stack: data may be as deep as the encoder allows.
    waiting: list[tuple[str, Any]] = [("", plain)]
    while waiting:
        place, value = waiting.pop()
        where = f" at {place.removeprefix('.')}" if place else ""
        for key in value if isinstance(value, dict) else ():
            if not _is_finite(key):
                raise BadRecord(f"data holds the key {key!r}{where}; use text for it.")
        if not _is_finite(value):
            raise BadRecord(
                f"data holds {value!r}{where}, which JSON has no form for; publish None or text"
                " there."
            )
        waiting += [(f"{place}{step}", each) for step, each in _inside(value)]


def _no_number(value: Any) -> None:
    """Accept a value that json can't encode; raise ValueError for a Decimal that is not finite."""
    if not _is_finite(value):
        raise ValueError


# This check is written in C. It refuses the same numbers as the search in `_check_numbers`, but
# does not say where they are.
_check_plain = json.JSONEncoder(allow_nan=False, check_circular=False, default=_no_number).encode


def _is_finite(value: Any) -> bool:
    if isinstance(value, Decimal):
        return value.is_finite()
    return not isinstance(value, float) or isfinite(value)


def _inside(value: Any) -> Iterable[tuple[str, Any]]:
    """Return the values in ``value``, each with the step that leads to it."""
    if isinstance(value, dict):
        return [(f".{key}", each) for key, each in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{index}]", each) for index, each in enumerate(value)]
    return ()


def check_json(raw: bytes | bytearray | memoryview | str) -> bytes:
    """Return the bytes of ``raw``, which is one JSON value in UTF-8.

    Raises:
        TypeError: ``raw`` is neither bytes nor text.
        BadRecord: ``raw`` is not JSON. The check stands here because half a value, put between
            other bytes, could become another request.
    """
    if isinstance(raw, str):
        try:
            raw = raw.encode()
        except UnicodeEncodeError as error:
            raise BadRecord(f"Not Unicode at character {error.start}.") from error
    elif isinstance(raw, (bytearray, memoryview)):
        raw = bytes(raw)
    elif not isinstance(raw, bytes):
        raise TypeError(
            f"raw is JSON as bytes or text, not {type_name(raw)}; publish() takes Python values."
        )
    try:
        raw.decode()
        _decode_raw(raw)
    except UnicodeDecodeError as error:
        raise BadRecord(f"Not UTF-8 at byte {error.start}.") from error
    except RecursionError as error:
        raise BadRecord("Nested too deeply.") from error
    except msgspec.MsgspecError as error:
        if half := _half_pair(raw):
            raise BadRecord(
                f"Not Unicode: {half[0].decode()} at byte {half.start()} is half a surrogate pair;"
                " send both halves, or the character itself."
            ) from error
        raise BadRecord(f"Not JSON: {_reason(error)}.") from error
    return raw


def _half_pair(raw: bytes) -> re.Match[bytes] | None:
    """Return the first escape in ``raw`` that is half a surrogate pair."""
    escapes = _ESCAPE.finditer(raw)
    return next((escape for escape in escapes if _HALF.fullmatch(escape[0])), None)


# --- from JSON -----------------------------------------------------------------------------------


def values_of(raw: bytes | msgspec.Raw, name: str) -> Any:
    """Return the JSON ``raw`` as Python values.

    Args:
        name: the name of the data in the error's sentence.

    Raises:
        BadData: Python has no value for ``raw``.
    """
    try:
        return _decode(raw)
    except UNREADABLE as error:
        raise BadData(
            f"{name} holds what Python has no value for ({_reason(error)}); raw has its JSON."
        ) from error


def value_of(raw: bytes | msgspec.Raw, kind: Any, name: str) -> Any:
    """Return the JSON ``raw`` decoded as the type ``kind``.

    Raises:
        BadData: ``raw`` is not of that type.
    """
    try:
        return _decoder_of(kind).decode(raw)
    except UNREADABLE as error:
        raise BadData(f"{name} is not of that kind: {_reason(error)}.") from error


@lru_cache(maxsize=256)
def _decoder_of(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def _reason(error: Exception) -> str:
    """Return the cause in few words."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = str(error).rstrip(".")
    for theirs, ours in _REASONS.items():
        text = text.replace(theirs, ours)
    return text
