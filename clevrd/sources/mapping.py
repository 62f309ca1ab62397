"""Mapping: a record becomes a publish request, or is passed over, or can't be taken. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from clevrd.core.json_faults import json_fault
from clevrd.core.nesting import SHALLOW_BYTES, TOO_DEEP, is_too_deep
from clevrd.core.publish_request import PublishRequest, check_publish
from clevrd.errors import InvalidRequest
from clevrd.sources.filters import Condition
from clevrd.sources.records import CannotTake, Record
from clevrd.sources.templates import Template

# Bytes of a value in a dead letter at most.
DEAD_VALUE_BYTES: Final = 4_096
# Bytes of a key, and of a reason, in a dead letter at most.
_DEAD_TEXT_BYTES: Final = 512
_SPACE: Final = b" \t\r\n"

_encode: Final = msgspec.json.Encoder().encode
_raw_decoder: Final = msgspec.json.Decoder(msgspec.Raw)
_decoder: Final = msgspec.json.Decoder()


class DeadLetter(msgspec.Struct, frozen=True, omit_defaults=True):
    """A record that could not be taken, as subscribers of the dead-letter topic read it."""

    source: str
    position: str
    reason: str
    # The value as far as it is text, cut to DEAD_VALUE_BYTES; None where it has none.
    value: str | None = None
    value_bytes: int = 0
    # True where the value is longer than what is shown of it.
    is_cut: bool = False
    key: str | None = None


class Mapping:
    """How the records of one source become messages."""

    def __init__(
        self,
        source: str,
        topic: Template,
        key: Template | None = None,
        conditions: Sequence[Condition] = (),
        dead_letter: str = "",
    ) -> None:
        """Args: dead_letter: the topic of records that can't be taken; empty for none."""
        self._source = source
        self._topic = topic
        self._key = key
        self._conditions = conditions
        self._dead_letter = dead_letter

    def request_of(self, record: Record, max_bytes: int) -> PublishRequest | None:
        """Return the publish for ``record``; None where it is passed over.

        Args:
            max_bytes: that a value may have.

        Raises:
            CannotTake: it can't be a message.
        """
        if record.is_deletion:
            return None
        value = _Value(record)
        for condition in self._conditions:
            if not condition.holds(record, value.decoded):
                return None
        topic = self._topic.fill(record, value.decoded)
        key = None if self._key is None else self._key.fill(record, value.decoded)
        data = value.json()
        if len(data) > max_bytes:
            raise CannotTake(
                f"The value has {len(data)} bytes, and {max_bytes} are allowed (max_message_bytes)."
            )
        request = PublishRequest(topic, msgspec.Raw(data), key=key, headers=record.carried)
        if data == b"null":
            raise CannotTake("The value is null, which no message can be.")
        try:
            check_publish(request)
        except InvalidRequest as error:
            raise CannotTake(str(error)) from error
        return request

    def dead_letter(self, record: Record, reason: str) -> PublishRequest | None:
        """Return the publish that tells of a record; None where there is no topic for it."""
        if not self._dead_letter:
            return None
        value = record.value
        letter = DeadLetter(
            source=self._source,
            position=record.position,
            reason=reason[:_DEAD_TEXT_BYTES],
            value=None if value is None else _shown(value, DEAD_VALUE_BYTES),
            value_bytes=len(value or b""),
            is_cut=len(value or b"") > DEAD_VALUE_BYTES,
            key=None if record.key is None else _shown(record.key, _DEAD_TEXT_BYTES),
        )
        return PublishRequest(self._dead_letter, msgspec.Raw(_encode(letter)))

    def idempotency_key(self, record: Record, request: PublishRequest) -> str:
        """Return the key by which ``record`` is one message, however often it is read.

        A stream that was made anew may give an old position to another record; that one has another
        checksum, and is another message.
        """
        checksum = zlib.crc32(bytes(request.data))
        return f"source:{self._source}:{record.position}:{checksum:08x}"


class _Value:
    """The value of one record, decoded once and only if it is asked for."""

    __slots__ = ("_checked", "_decoded", "_record")

    def __init__(self, record: Record) -> None:
        self._record = record
        # The text, once it is known to be JSON.
        self._checked: bytes | None = None
        self._decoded: Any = self

    def json(self) -> bytes:
        """Return the value's text without the space around it; raises CannotTake."""
        if self._checked is None:
            text = self._text()
            self._decode(text, _raw_decoder)
            self._checked = text
        return self._checked

    def decoded(self) -> Any:
        """Return the value; raises CannotTake."""
        if self._decoded is self:
            text = self._text()
            self._decoded = self._decode(text, _decoder)
            self._checked = text
        return self._decoded

    def _text(self) -> bytes:
        value = self._record.value
        if value is None:
            raise CannotTake("The record has no value.")
        return value.strip(_SPACE)

    @staticmethod
    def _decode(text: bytes, decoder: Any) -> Any:
        if not text.isascii():
            try:
                str(text, "utf-8")
            except UnicodeDecodeError as error:
                raise CannotTake(f"The value is not UTF-8 at byte {error.start}.") from error
        if len(text) > SHALLOW_BYTES and is_too_deep(text):
            raise CannotTake(f"The value is {TOO_DEEP}.")
        try:
            return decoder.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise CannotTake(f"The value {json_fault(text, error)}.") from error


def _shown(text: bytes, max_bytes: int) -> str:
    """Return text cut to ``max_bytes``; bytes that are no UTF-8 are shown as U+FFFD."""
    return text[:max_bytes].decode("utf-8", "replace")
