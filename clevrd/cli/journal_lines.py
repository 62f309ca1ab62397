"""Messages of a journal as lines of JSON, which `clevrd journal` exports and imports."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from clevrd.core.message_headers import known_headers
from clevrd.core.message_ids import MessageIds, us_of_id
from clevrd.core.nesting import SHALLOW_BYTES, TOO_DEEP, is_too_deep
from clevrd.core.publish_request import PublishRequest, check_publish, check_utf8
from clevrd.errors import InvalidRequest
from clevrd.journal.importing import Imported
from clevrd.journal.records import StoredLine
from clevrd.journal.sqlite.segments import RunRow
from clevrd.tenants.tenant import check_tenant_name

DEFAULT_TENANT: Final = "default-tenant"
_ID: Final = re.compile(r"msg-\d{8}-\d{6}\.\d{6}")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
# Times of messages never count back, so one from the future would move all that come after it.
_AHEAD_US: Final = 86_400_000_000


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message with its place. Other programs may leave out all but topic and data."""

    topic: str
    tenant: str = ""
    offset: int = 0
    epoch: str = ""
    id: str = ""
    timestamp: str = ""
    key: str | None = None
    idempotency_key: str | None = None
    ttl_s: int | float | None = None
    headers: dict[str, str] | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")


_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(Line)
_stored_decoder: Final = msgspec.json.Decoder(StoredLine)
_ids: Final = MessageIds()


def lines_of(
    run: RunRow, names: tuple[str, str, str], epoch: str, time_us: int, lines: list[bytes]
) -> list[bytes]:
    """Return the messages of a run as lines, each with a line feed.

    Args:
        names: partition epoch, tenant and topic.
        epoch: the topic's; empty where it is not known, and is left out.
        time_us: the record's.
        lines: the run's, as they stand in the record.
    """
    _, tenant, topic = names
    _, first, count, _, _, _, skip, id_us, id_step, _ = run
    found = []
    for index in range(count):
        message = _stored_decoder.decode(lines[skip + index])
        spelled_id, timestamp = _ids.spell(id_us + index * id_step, time_us)
        line = Line(
            topic,
            tenant,
            first + index,
            epoch,
            spelled_id,
            timestamp,
            message.key,
            message.idempotency_key,
            message.ttl_s,
            known_headers(bytes(message.headers)),
            message.data,
        )
        found.append(_encoder.encode(line) + b"\n")
    return found


def read_line(text: bytes, now_us: int) -> Imported:
    """Return the message on a line.

    Args:
        now_us: its time, if it has none; microseconds since 1970. A time that lies more than a day
            behind it is refused.

    Raises:
        InvalidRequest: it is none.
    """
    check_utf8(text)
    if len(text) > SHALLOW_BYTES and is_too_deep(text):
        raise InvalidRequest(f"it is {TOO_DEEP}")
    try:
        line = _decoder.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"it is no message: {error}") from error
    request = PublishRequest(
        *(line.topic, line.data, line.idempotency_key, line.key, line.ttl_s, line.headers)
    )
    check_publish(request)
    tenant = line.tenant or DEFAULT_TENANT
    check_tenant_name(tenant)
    time_us = _time_us(line, now_us)
    if time_us > now_us + _AHEAD_US:
        raise InvalidRequest("its time lies more than a day ahead of this machine's clock")
    if time_us <= 0:
        raise InvalidRequest("its time lies before 1970")
    return Imported(tenant, request, time_us)


def _time_us(line: Line, now_us: int) -> int:
    try:
        if line.id and _ID.fullmatch(line.id):
            return us_of_id(line.id)
        if line.timestamp:
            moment = datetime.fromisoformat(line.timestamp)
            return (moment - _EPOCH) // _MICROSECOND
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(
            f"its timestamp {line.timestamp!a} is no time such as 2026-01-31T12:00:00Z"
        ) from error
    return now_us
