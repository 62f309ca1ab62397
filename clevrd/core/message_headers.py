"""The headers of a message: which ones are carried, where they come from, and their JSON.

A publisher's trace (W3C Trace Context) and the attributes of a CloudEvent are carried to the
subscribers that ask. CloudEvents HTTP binding 1.0.2, §3.1 (binary mode). Which frames have headers:
core/server_frames.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Final
from urllib.parse import unquote_to_bytes

import msgspec

from clevrd.core.json_faults import json_kind
from clevrd.core.near_names import MAX_WARNINGS, quoted
from clevrd.core.trace_context import (
    TRACEPARENT,
    TRACESTATE,
    is_tracestate,
    parse_traceparent,
    traceparent_of,
)
from clevrd.errors import InvalidRequest

Headers = dict[str, str]

# An event with all its attributes and some extensions has a dozen headers, in some 500 bytes.
MAX_HEADERS: Final = 32
# Bytes of the JSON object with all of them, which each message that has them is longer by.
MAX_HEADERS_BYTES: Final = 4_096

# A head that has this field is that of an event in binary mode.
SPECVERSION: Final = "ce-specversion"
_PREFIX: Final = "ce-"
_REQUIRED: Final = ("ce-id", "ce-source", "ce-type")
_ATTRIBUTE: Final = re.compile(r"ce-[a-z0-9]{1,64}", re.ASCII)
_VERSION: Final = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}", re.ASCII)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# A value in double quotes, as producers of older versions sent it (RFC 9110 §5.6.4).
_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)

_NAMES: Final = (
    "traceparent, tracestate and names like ce-type are, of lower-case letters and digits"
    " behind ce-"
)
EXPECTED_HEADERS: Final = "send an object of strings, with names traceparent, tracestate and ce-*"

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(dict[str, object]).decode


def headers_json(headers: Mapping[str, str]) -> bytes:
    """Return headers as the JSON object that a message has, the trace first."""
    return _encode(headers)


def check_headers(headers: Headers) -> None:
    """Raise InvalidRequest unless these can be a message's headers, as a publisher spells them."""
    if len(headers) > MAX_HEADERS:
        raise InvalidRequest(
            f"The headers have {len(headers)} names, and {MAX_HEADERS} are allowed; send fewer."
        )
    for name, value in headers.items():
        _check_header(name, value)
    if TRACESTATE in headers and TRACEPARENT not in headers:
        raise InvalidRequest(
            "The headers have a tracestate without a traceparent; send both, or neither."
        )
    _check_size(headers)


def has_foreign(headers: Mapping[str, str]) -> bool:
    """Whether a name is among ``headers`` that is none of a message's headers."""
    return not all(map(_is_name, headers))


def sift(value: object) -> tuple[Headers | None, tuple[str, ...]]:
    """Return what of a field ``headers`` is a message's headers, and what to say of the rest.

    A publisher may have a field of its own with that name, as with any name that is not known; so
    what is none of a message's headers is ignored and told. A header that is known has to be right.

    Args:
        value: the field's JSON, decoded.

    Raises:
        InvalidRequest: a header that is known can't be carried.
    """
    if value is None:
        return None, ()
    if not isinstance(value, dict):
        kind = json_kind(_encode(value))
        return None, (f"The field headers is {kind} and is ignored; {EXPECTED_HEADERS}.",)
    headers: Headers = {}
    for name in filter(_is_name, value):
        text = value[name]
        if not isinstance(text, str):
            kind = json_kind(_encode(text))
            raise InvalidRequest(f"The header {quoted(name)} is {kind}; {EXPECTED_HEADERS}.")
        headers[name] = text
    check_headers(headers)
    foreign = islice((name for name in value if not _is_name(name)), MAX_WARNINGS)
    told = (
        f"The header {quoted(name)} is not carried and is ignored; {_NAMES}." for name in foreign
    )
    return headers or None, tuple(told)


def known_headers(raw: bytes) -> Headers | None:
    """Return what can be a message's headers of a JSON value in a log; None for none.

    Headers of another program, or of a later clevrd, are left out and not refused: a record counts
    alike on all nodes, also on those that know nothing of headers.
    """
    try:
        return _known_of(_decode(raw))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def headers_of_record(
    fields: Mapping[str, bytes], prefix: str, *, is_encoded: bool
) -> Headers | None:
    """Return what can be a message's headers of a record in another system; None for none.

    Nothing is refused: whoever wrote the record may know nothing of clevrd.

    Args:
        fields: the record's headers.
        prefix: what stands there before the name of an attribute of an event.
        is_encoded: values of attributes are percent-encoded.
    """
    found: dict[str, object] = {}
    for name, value in fields.items():
        name = name.lower()
        if name.startswith(prefix):
            name = f"{_PREFIX}{name.removeprefix(prefix)}"
            value = unquote_to_bytes(value) if is_encoded else value
        elif name not in (TRACEPARENT, TRACESTATE):
            continue
        try:
            found[name] = value.decode()
        except UnicodeDecodeError:
            continue
    if SPECVERSION not in found:
        found = {name: value for name, value in found.items() if not name.startswith(_PREFIX)}
    return _known_of(found)


def _known_of(found: Mapping[str, object]) -> Headers | None:
    """Return what of ``found`` can be a message's headers; None for none."""
    known = {
        name: value
        for name in islice(filter(_is_name, found), MAX_HEADERS)
        if isinstance(value := found[name], str) and _is_known(name, value)
    }
    if TRACEPARENT not in known:
        known.pop(TRACESTATE, None)
    return known if known and len(_encode(known)) <= MAX_HEADERS_BYTES else None


def headers_of_head(fields: Mapping[str, str]) -> Headers | None:
    """Return what is carried of a request's head: its trace and its event; None for neither.

    Args:
        fields: by lower-case name.

    Raises:
        InvalidRequest: it says that it has an event, and that can't be one.
    """
    trace = trace_of_head(fields)
    if SPECVERSION not in fields:
        return trace
    event = _event_of(fields)
    headers = {**(trace or {}), **event}
    if _have_room(headers):
        return headers
    # A trace for which there is no room is none, and the event goes without it.
    if len(event) > MAX_HEADERS:
        raise InvalidRequest(
            f"The request has {len(event)} headers of an event, and {MAX_HEADERS} are allowed; send"
            " fewer ce-* headers."
        )
    _check_size(event)
    return event


def trace_of_head(fields: Mapping[str, str]) -> Headers | None:
    """Return the trace in a request's head; None without a valid one, which counts as none."""
    traceparent = traceparent_of(fields)
    if not traceparent:
        return None
    tracestate = fields.get(TRACESTATE, "")
    if is_tracestate(tracestate):
        return {TRACEPARENT: traceparent, TRACESTATE: tracestate}
    return {TRACEPARENT: traceparent}


def together(of_head: Headers, own: Headers | None) -> Headers:
    """Return the headers of a message: those of its request's head, and its own before these.

    Both parts of a trace come from one place. A trace of the head that does not fit is left out.

    Raises:
        InvalidRequest: they are too many, or too large, together.
    """
    if not own:
        return of_head
    if TRACEPARENT in own:
        of_head = without_trace(of_head)
    headers = {**of_head, **own}
    if _have_room(headers):
        return headers
    headers = {**without_trace(of_head), **own}
    if len(headers) > MAX_HEADERS:
        raise InvalidRequest(
            f"The request's head and its field headers have {len(headers)} names together, and"
            f" {MAX_HEADERS} are allowed; send fewer."
        )
    _check_size(headers)
    return headers


def _have_room(headers: Headers) -> bool:
    return len(headers) <= MAX_HEADERS and len(_encode(headers)) <= MAX_HEADERS_BYTES


def without_trace(headers: Headers) -> Headers:
    """Return the headers of a message but for those of its trace."""
    return {name: value for name, value in headers.items() if name not in (TRACEPARENT, TRACESTATE)}


def _check_header(name: str, value: str) -> None:
    if name == TRACEPARENT:
        if parse_traceparent(value) is None:
            raise InvalidRequest(
                "The traceparent in headers is not valid; send one as W3C Trace Context has it,"
                " 00-TRACE-PARENT-FLAGS, or none."
            )
    elif name == TRACESTATE:
        if not is_tracestate(value):
            raise InvalidRequest(
                "The tracestate in headers is not valid; send a list of key=value as W3C Trace"
                " Context has it, of 512 characters at most, or none."
            )
    elif _ATTRIBUTE.fullmatch(name):
        _check_value(name, value)
    else:
        raise InvalidRequest(f"The header {quoted(name)} can't be carried; {_NAMES}.")


def _is_name(name: str) -> bool:
    return name in (TRACEPARENT, TRACESTATE) or _ATTRIBUTE.fullmatch(name) is not None


def _is_known(name: str, value: str) -> bool:
    try:
        _check_header(name, value)
    except InvalidRequest:
        return False
    return True


def _check_value(name: str, value: str) -> None:
    if _CONTROL.search(value):
        raise InvalidRequest(f"The header {name} holds a control character; remove it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"The header {name} holds a lone surrogate; use valid Unicode."
        ) from error


def _check_size(headers: Headers) -> None:
    size_bytes = len(_encode(headers))
    if size_bytes > MAX_HEADERS_BYTES:
        raise InvalidRequest(
            f"The headers have {size_bytes} bytes as JSON, and {MAX_HEADERS_BYTES} are allowed;"
            " send shorter ones."
        )


def _event_of(fields: Mapping[str, str]) -> Headers:
    """Return the attributes of an event in binary mode.

    Raises:
        InvalidRequest: one that each event has is missing or wrong, or a name or value can't be.
    """
    event: Headers = {}
    for name in _event_names(fields):
        if not _ATTRIBUTE.fullmatch(name):
            raise InvalidRequest(
                f"The header {quoted(name)} is no attribute of an event; its name is ce- and"
                " lower-case letters and digits."
            )
        event[name] = _decoded(name, fields[name])
    for name in _REQUIRED:
        if not event.get(name):
            raise InvalidRequest(
                f"The request has {SPECVERSION} and no {name}; an event has ce-id, ce-source and"
                " ce-type."
            )
    if not _VERSION.fullmatch(event[SPECVERSION]):
        raise InvalidRequest(f"The header {SPECVERSION} must be a version such as 1.0.")
    return event


def _event_names(fields: Mapping[str, str]) -> Iterable[str]:
    return (name for name in fields if name.startswith(_PREFIX))


def _decoded(name: str, value: str) -> str:
    """Return the value of a ce-* field: unquoted, then percent-decoded once (§3.1.3.2)."""
    if quoted_value := _QUOTED.fullmatch(value):
        value = _ESCAPED.sub(r"\1", quoted_value[1])
    try:
        # Bytes that are not ASCII came as they are, as surrogates where they are no UTF-8.
        text = unquote_to_bytes(value.encode("utf-8", "surrogateescape")).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The header {name} is not UTF-8 once percent-decoded; send UTF-8."
        ) from error
    _check_value(name, text)
    return text
