"""Messages, notices, answers and the bodies of publishes, as values and as JSON.

No connections here. Shapes: docs/wire.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeVar, cast, get_args

import msgspec

from clevrd.client.errors import Refused
from clevrd.client.values import value_of, values_of

T = TypeVar("T")

# The subprotocol with notices between the messages: positions and gaps. Each notice begins with
# these bytes, and no message does.
NOTICE_PROTOCOL: Final = "clevrd.v1"
NOTICE_BEGINS: Final = b'{"type":'

# The ref of the command by which a connection goes on with a fresh token, and of its answer.
RENEWAL_REF: Final = "authenticate"

# The server's default limits of a batch.
MAX_BATCH_ITEMS: Final = 10_000
MAX_BATCH_BYTES: Final = 8 << 20


class Message(msgspec.Struct, frozen=True, dict=True):
    """One message of a subscription, the same for every subscriber of the topic.

    ``offset`` counts the topic's messages from 1 without holes, within one ``epoch``.
    """

    id: str
    topic: str = ""
    tenant_id: str = ""
    _data: msgspec.Raw = msgspec.field(name="data", default=msgspec.Raw(b"null"))
    timestamp: str = ""
    offset: int = 0
    # Seconds for which it is worth reading, as it was published; None for ever.
    ttl_s: int | float | None = None
    key: str | None = None
    # The headers that it was published with, where they were asked for: the publisher's trace
    # (``traceparent``, ``tracestate``) and attributes of a CloudEvent (``ce-*``).
    headers: dict[str, str] = {}
    # The topic's epoch that the offset belongs to; empty if the server did not tell it.
    epoch: str = ""
    # The whole message as JSON, as it was received.
    json: bytes = b""

    @cached_property
    def data(self) -> Any:
        """The data as Python values: dict, list, str, int, float, bool.

        Raises:
            BadData: Python has no value for the data: a number beyond a float's range (``1e999``),
                or an integer of more than 4,300 digits. `raw` has the JSON.
        """
        return values_of(self._data, self._name)

    @property
    def raw(self) -> bytes:
        """The data's JSON, byte for byte as it was published."""
        return bytes(self._data)

    def decode(self, kind: type[T]) -> T:
        """Return the data as a ``kind``: a msgspec struct, dataclass, TypedDict, list[int] ...

        Raises:
            BadData: the data is not of that type; the sentence says where. The error is a
                msgspec.ValidationError as well.
        """
        return cast(T, value_of(self._data, kind, self._name))

    @property
    def _name(self) -> str:
        """The message's name in sentences."""
        return f"The data of message {self.offset} of {self.topic!r}"

    def __hash__(self) -> int:
        """Return a hash of topic, epoch, offset and id."""
        return hash((self.topic, self.epoch, self.offset, self.id))

    def __str__(self) -> str:
        """Return the whole message as JSON."""
        return self.json.decode()

    def __repr__(self) -> str:
        """Return topic, offset, id and data on one line, for people."""
        return (
            f"Message(topic={self.topic!r}, offset={self.offset}, id={self.id!r},"
            f" data={self.raw.decode()})"
        )


class Gap(
    msgspec.Struct, frozen=True, tag_field="type", tag="gap", rename={"first": "from", "last": "to"}
):
    """Messages that a subscription has lost for good, at the place where they are missing.

    ``first``, ``last`` and ``count`` are None where they can't be known: with the reason ``epoch``
    the topic has begun a new epoch. Other reasons: ``slow_consumer``, this reader was too slow;
    ``retention``, the server no longer had the messages; ``damaged``, it can't read them any more;
    ``expired``, their time to live was over; ``unknown``, the server does not say.
    """

    topic: str
    first: int | None = None
    last: int | None = None
    count: int | None = None
    reason: str = ""


class Subscribed(msgspec.Struct, frozen=True, tag_field="type", tag="subscribed"):
    """The position at which a topic's messages begin on this connection."""

    epoch: str
    offset: int
    recovered: bool = False
    topic: str = ""
    # The pattern that brought the topic; None for a topic that was named.
    pattern: str | None = None
    # The ref of the command that this answers; None without one.
    ref: int | str | None = None
    warnings: tuple[str, ...] = ()


class Watching(msgspec.Struct, frozen=True, tag_field="type", tag="watching"):
    """The answer to a command that subscribes to a pattern: all topics there were have begun."""

    pattern: str
    ref: int | str | None = None
    warnings: tuple[str, ...] = ()


class Forgotten(msgspec.Struct, frozen=True, tag_field="type", tag="forgotten"):
    """A topic that a pattern brought was forgotten, after all its messages were sent."""

    topic: str


class GoingAway(msgspec.Struct, frozen=True, tag_field="type", tag="going_away"):
    """The server is about to close the connection, and says when to come back."""

    reconnect_after_ms: int = 0


class Published(msgspec.Struct, frozen=True):
    """The server's answer to a message that it took."""

    message_id: str
    offset: int = 0
    epoch: str = ""
    subscribers: int = 0
    # Subscribers that are behind, and subscribers that lose messages; None from an older server.
    lagging: int | None = None
    slow: int | None = None
    # True if the server had this message already, by its idempotency key; this is its first answer.
    repeated: bool = False
    # Sentences about fields that the server ignored as misspelt; they are logged as well.
    warnings: tuple[str, ...] = ()

    @property
    def knows_keys(self) -> bool:
        """Whether the server supports idempotency keys; older servers ignore them."""
        return self.lagging is not None or self.repeated


class Refusal(msgspec.Struct, frozen=True):
    """The server's refusal of one message, or of a whole request."""

    error: str
    code: str = ""
    # True if the same message can succeed later.
    retryable: bool = False

    def as_error(self) -> Refused:
        """Return this refusal as an error that can be raised."""
        return Refused(self.error, code=self.code, is_transient=self.retryable)


class Failure(Refusal, frozen=True, tag_field="type", tag="error"):
    """A command that the server refused, or, without a ref, a topic that it left out."""

    ref: int | str | None = None


class Authenticated(msgspec.Struct, frozen=True, tag_field="type", tag="authenticated"):
    """The connection goes on with a fresh credential."""


Notice = Subscribed | Watching | Forgotten | Gap | GoingAway | Authenticated | Failure


class Outgoing(NamedTuple):
    """One item of a batch; a plain tuple (topic, data) will do as well."""

    topic: str
    data: Any
    key: str | None = None
    idempotency_key: str | None = None
    ttl_s: float | None = None
    headers: Mapping[str, str] | None = None


class _Head(msgspec.Struct, frozen=True):
    ref: int | str | None = None
    success: bool | None = None


class _NoticeHead(msgspec.Struct, frozen=True):
    type: str


class _BatchAnswer(msgspec.Struct, frozen=True):
    results: list[msgspec.Raw]


_decode_message = msgspec.json.Decoder(Message).decode
_decode_notice: Callable[[bytes], Notice] = msgspec.json.Decoder(Notice).decode
_decode_notice_head = msgspec.json.Decoder(_NoticeHead).decode
_decode_published = msgspec.json.Decoder(Published).decode
_decode_refusal = msgspec.json.Decoder(Refusal).decode
_decode_head = msgspec.json.Decoder(_Head).decode
_decode_batch = msgspec.json.Decoder(_BatchAnswer).decode
_encode = msgspec.json.Encoder().encode
_set = msgspec.structs.force_setattr
# A malformed notice of one of these is an error; another type is a later version's.
_NOTICE_TYPES: Final = frozenset(each.__struct_config__.tag for each in get_args(Notice))


# --- what is received ----------------------------------------------------------------------------


def read_message(text: bytes, epoch: str) -> Message:
    """Return the message in a text frame.

    Raises:
        one of UNREADABLE: ``text`` is no message.
    """
    message = _decode_message(text)
    # The struct is frozen for users, and no user has this one yet.
    _set(message, "json", text)
    _set(message, "epoch", epoch)
    return message


def put_into_epoch(message: Message, epoch: str) -> None:
    """Set the epoch of a message whose topic was known only now; no user has it yet."""
    _set(message, "epoch", epoch)


def read_notice(text: bytes) -> Notice | None:
    """Return the notice in ``text``; None for a notice of a later version, to be ignored.

    Raises:
        one of UNREADABLE: ``text`` is no notice.
    """
    try:
        return _decode_notice(text)
    except msgspec.ValidationError:
        if _decode_notice_head(text).type in _NOTICE_TYPES:
            raise
        return None


def read_published(content: bytes) -> Published:
    """Return the answer to one publish; raises one of UNREADABLE."""
    return _decode_published(content)


def read_refusal(content: bytes) -> Refusal:
    """Return the body of an error answer; raises one of UNREADABLE."""
    return _decode_refusal(content)


def read_answer(content: bytes | msgspec.Raw) -> tuple[int | str | None, Published | Refusal]:
    """Return an answer on a publish socket: its ref and the result of that message.

    Raises:
        one of UNREADABLE: ``content`` is no answer.
    """
    head = _decode_head(content)
    return head.ref, _decode_published(content) if head.success else _decode_refusal(content)


def read_batch(content: bytes) -> list[Published | Refusal]:
    """Return the results in the answer to a batch; raises one of UNREADABLE."""
    return [read_answer(each)[1] for each in _decode_batch(content).results]


# --- what is sent --------------------------------------------------------------------------------


def command(type_: str, **fields: object) -> bytes:
    """Return one command for ``GET /ws``; a field that is None is left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    return _encode({"type": type_, **given})


def publish_body(topic: str, data: bytes, fields: Mapping[str, object]) -> bytes:
    """Return the body of one publish, with ``data`` byte for byte.

    Args:
        data: one JSON value, on one line for a batch.
        fields: ``key``, ``ttl_s``, ``headers``, ``idempotency_key`` and ``ref``, where they were
            given.
    """
    rest = b"".join(b',"%b":%b' % (name.encode(), _encode(value)) for name, value in fields.items())
    return b'{"topic":%b,"data":%b%b}' % (_encode(topic), data, rest)


def split_batch(
    lines: Iterable[bytes], max_items: int = MAX_BATCH_ITEMS, max_bytes: int = MAX_BATCH_BYTES
) -> Iterator[list[bytes]]:
    """Yield ``lines`` in batches of at most ``max_items`` and ``max_bytes``, newlines included.

    A line over the limit is a batch of its own, so that the server says what is wrong with it.
    """
    batch: list[bytes] = []
    size = 0
    for line in lines:
        if batch and (len(batch) == max_items or size + len(line) + 1 > max_bytes):
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line) + 1
    if batch:
        yield batch
