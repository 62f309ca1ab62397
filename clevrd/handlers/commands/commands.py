"""Commands of one WebSocket, each answered by `ref`.

Shapes: docs/wire.md. The socket itself is connections/command_websocket.py's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Final, cast

import msgspec

from clevrd.admission import Gate
from clevrd.connections.command_websocket import CommandWebSocket
from clevrd.core.beginning import After, Beginning, Last
from clevrd.core.event_ids import read_position
from clevrd.core.json_faults import json_fault
from clevrd.core.message_headers import has_foreign
from clevrd.core.near_names import AUTHENTICATE_COMMAND, PUBLISH_COMMAND, SUBSCRIBE_COMMAND
from clevrd.core.nesting import TOO_DEEP, is_too_deep
from clevrd.core.notices import Authenticated, Pong, Position, Ref, Unsubscribed
from clevrd.core.publish_request import (
    SocketPublish,
    check_publish,
    check_ref,
    check_utf8,
    field_warnings,
    with_warnings,
)
from clevrd.core.subscription import FROM_THE_START, DeliveryOptions, PatternBeginning
from clevrd.errors import ClevrdError, InvalidRequest
from clevrd.handlers.publish.outcomes import PublishedWithRef, SocketOutcomes
from clevrd.handlers.publish.run import HasToWait, RunPublisher
from clevrd.handlers.subscribe.endpoint import check_pattern, read_policy, read_subscriber_id
from clevrd.handlers.subscribe.resume import read_since
from clevrd.handlers.warnings import topic_warnings
from clevrd.hub import Hub
from clevrd.refusals import notice_of
from clevrd.tenants import Tenant

# The bound of numbers on a URL, too: nine digits.
_MAX_MESSAGES: Final = 999_999_999
_MAX_OFFSET: Final = 10**18 - 1

EXPECTED: Final = (
    'send {"type": "subscribe", "unsubscribe", "publish" or "ping", …}, as docs/wire.md has it'
)
# msgspec ends its sentence with the place: at `$.topic`, or `$.positions[...].epoch`.
_LACKS: Final = re.compile(r"missing required field `([a-z_]+)`")
_FIELD: Final = re.compile(r"`\$\.([a-z_]+)")


class Publish(SocketPublish, frozen=True, gc=False, tag_field="type", tag="publish"):
    """Publish one message."""


class Subscribe(
    msgspec.Struct, frozen=True, tag_field="type", tag="subscribe", forbid_unknown_fields=True
):
    """Subscribe to a topic, or to all that a pattern matches."""

    topic: str | None = None
    pattern: str | None = None
    ref: Ref = msgspec.UNSET
    policy: str | None = None
    buffer: int | None = None
    last: int | None = None
    since: str | None = None
    epoch: str | None = None
    offset: int | None = None
    positions: dict[str, Position] | None = None
    subscriber_id: str | None = None
    # Whether its messages have their headers.
    headers: bool = False


class Unsubscribe(
    msgspec.Struct, frozen=True, tag_field="type", tag="unsubscribe", forbid_unknown_fields=True
):
    """End a subscription."""

    topic: str | None = None
    pattern: str | None = None
    ref: Ref = msgspec.UNSET


class Ping(msgspec.Struct, frozen=True, tag_field="type", tag="ping", forbid_unknown_fields=True):
    """Ask for a pong behind everything that was sent before it."""

    ref: Ref = msgspec.UNSET


class Authenticate(
    msgspec.Struct, frozen=True, tag_field="type", tag="authenticate", forbid_unknown_fields=True
):
    """Go on by another credential of the same tenant, as one that expires later."""

    token: str
    ref: Ref = msgspec.UNSET

    def __repr__(self) -> str:
        """Return no part of the secret: this may reach a log by mistake."""
        return "Authenticate(...)"


# The same with fields that are not known; `told` is set by `_read_leniently`, whatever a field of
# that name held.
_told: Final = msgspec.field(name="", default=())


class _LenientPublish(
    Publish, frozen=True, gc=False, tag_field="type", tag="publish", forbid_unknown_fields=False
):
    headers: Any = None
    told: Any = _told

    def warnings(self) -> tuple[str, ...]:
        return cast(tuple[str, ...], self.told)


class _LenientSubscribe(
    Subscribe, frozen=True, tag_field="type", tag="subscribe", forbid_unknown_fields=False
):
    told: Any = _told


class _LenientUnsubscribe(
    Unsubscribe, frozen=True, tag_field="type", tag="unsubscribe", forbid_unknown_fields=False
):
    told: Any = _told


class _LenientPing(Ping, frozen=True, tag_field="type", tag="ping", forbid_unknown_fields=False):
    told: Any = _told


class _LenientAuthenticate(
    Authenticate, frozen=True, tag_field="type", tag="authenticate", forbid_unknown_fields=False
):
    told: Any = _told

    __repr__ = Authenticate.__repr__


class PublishedNotice(PublishedWithRef, frozen=True, gc=False, tag_field="type", tag="published"):
    """The answer to a publish with a ref."""


Aside = Subscribe | Unsubscribe | Ping | Authenticate


class _Aside(ClevrdError):
    """A command that is no publish; it ends a run of these and is carried out after it."""

    def __init__(self, command: Aside) -> None:
        super().__init__("not a publish")
        self.command = command


Command = Publish | Aside

Lenient = (
    _LenientPublish | _LenientSubscribe | _LenientUnsubscribe | _LenientPing | _LenientAuthenticate
)

_VOCABULARIES: Final = {
    _LenientPublish: PUBLISH_COMMAND,
    _LenientAuthenticate: AUTHENTICATE_COMMAND,
}

_decoder: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_lenient_decoder: msgspec.json.Decoder[Lenient] = msgspec.json.Decoder(Lenient)
_encode = msgspec.json.Encoder().encode


def decode_command(payload: bytes) -> Command:
    """Return the command in a text frame's ``payload``.

    Raises:
        InvalidRequest: it is none, or one of its fields is wrong.
    """
    check_utf8(payload)
    if is_too_deep(payload):
        raise InvalidRequest(f"The command is {TOO_DEEP}.")
    try:
        command = _read(payload)
    except RecursionError as error:
        raise InvalidRequest(f"The command is {TOO_DEEP}.") from error
    except msgspec.ValidationError as error:
        field, lacks = _FIELD.search(str(error)), _LACKS.search(str(error))
        what = f"has a wrong {field[1]}" if field else f"has no {lacks[1]}" if lacks else "is none"
        told = _misspelt_publish(payload) if lacks else ()
        raise InvalidRequest(" ".join((f"The command {what}; {EXPECTED}.", *told))) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The frame is not UTF-8; {EXPECTED}.") from error
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"The frame {json_fault(payload, error)}; {EXPECTED}.") from error
    check_ref(command.ref)
    if isinstance(command, Publish):
        check_publish(command)
    return command


def _misspelt_publish(payload: bytes) -> tuple[str, ...]:
    """Return what to say of the fields of a command that lacks one: only a publish needs any."""
    return field_warnings(payload, PUBLISH_COMMAND)


def _read(payload: bytes) -> Command:
    """Decode ``payload``, again without complaint about unknown fields where it has some."""
    try:
        command = _decoder.decode(payload)
        if not isinstance(command, Publish) or not has_foreign(command.headers or {}):
            return command
    except msgspec.ValidationError:
        pass
    command = _lenient_decoder.decode(payload)
    told = field_warnings(payload, _VOCABULARIES.get(type(command), SUBSCRIBE_COMMAND))
    if isinstance(command, Publish):
        return with_warnings(command, told)
    return msgspec.structs.replace(command, told=told)


class Commands(SocketOutcomes):
    """Carries out one socket's commands as one tenant, and collects the answers to them."""

    kind = PublishedNotice

    def __init__(
        self,
        gate: Gate,
        hub: Hub,
        tenant: Tenant,
        connection: CommandWebSocket,
        *,
        default_last: int,
        max_topics: int,
        may_match_all: bool,
    ) -> None:
        super().__init__(hub)
        self._gate = gate
        self._connection = connection
        self._default_last = default_last
        self._max_topics = max_topics
        self._may_match_all = may_match_all
        self._runs: RunPublisher[Publish] = RunPublisher(hub, tenant, self._decode, self)
        self.wait_for = self._runs.wait_for
        self.take = self._runs.take
        self.take_tenant = self._runs.take_tenant

    def _decode(self, payload: bytes) -> Publish:
        command = decode_command(payload)
        if not isinstance(command, Publish):
            raise _Aside(command)
        # A publisher that never pauses must not delay the shutdown.
        self._hub.refuse_if_draining()
        return command

    def refusal(self, error: ClevrdError, ref: Ref) -> msgspec.Struct:
        """Return the answer to a command that was refused."""
        return notice_of(error, ref)

    def refused(self, error: ClevrdError, payload: bytes) -> None:
        """Carry out a command that is no publish; answer one that is refused."""
        if isinstance(error, _Aside):
            try:
                self._carry_out(error.command)
                return
            except ClevrdError as refusal:
                tenant = self._connection.tenant
                refusal.blame(tenant.name, tenant.credential_id)
                error = refusal
        super().refused(error, payload)

    def _answer(self, answer: msgspec.Struct) -> None:
        self.answers.append(_encode(answer))

    def _carry_out(self, command: Aside) -> None:
        match command:
            case Ping():
                self._answer(Pong(command.ref))
            case Subscribe():
                self._hub.refuse_readers_if_draining()
                self._hub.check_memory_for_subscriber()
                # The messages of a subscription are written at once, so the answers that are due
                # have to leave before them.
                if not self._connection.flush_answers():
                    raise HasToWait
                self._subscribe(command)
            case Unsubscribe():
                self._unsubscribe(command)
            case Authenticate():
                # A close frame, where one follows, comes behind all answers.
                if not self._connection.flush_answers():
                    raise HasToWait
                self._authenticate(command)

    def _authenticate(self, command: Authenticate) -> None:
        tenant = self._gate.renew(self._connection.tenant, command.token)
        left_s = self._gate.left_s(tenant)
        expires_in_s = msgspec.UNSET if left_s == math.inf else round(left_s, 3)
        self._answer(Authenticated(expires_in_s, command.ref))
        self._connection.flush_answers()
        self._connection.renew(tenant)

    # --- subscriptions ---------------------------------------------------------------------------

    def _subscribe(self, command: Subscribe) -> None:
        options = DeliveryOptions(
            read_policy(command.policy),
            _number(command.buffer, "buffer", least=1),
            True,
            read_subscriber_id(command.subscriber_id),
            command.headers,
        )
        beginning = self._beginning(command)
        subscriptions = self._connection.subscription
        told = command.told if isinstance(command, _LenientSubscribe) else ()
        warnings = (*told, *topic_warnings([command.topic or ""])) or msgspec.UNSET
        if command.pattern is None:
            name = _one_of(command)
            beginning = beginning or self._default()
            subscriptions.subscribe_topic(name, options, beginning, command.ref, warnings)
            return
        _one_of(command)
        check_pattern(command.pattern, may_match_all=self._may_match_all)
        begins = self._pattern_beginning(command, beginning)
        # Answered when all topics that there are have been found.
        subscriptions.subscribe_pattern(command.pattern, options, begins, command.ref, warnings)

    def _unsubscribe(self, command: Unsubscribe) -> None:
        name = _one_of(command)
        subscriptions = self._connection.subscription
        end: Callable[[str], dict[str, Position]] = (
            subscriptions.unsubscribe_topic
            if command.pattern is None
            else subscriptions.unsubscribe_pattern
        )
        self._answer(Unsubscribed(end(name), command.ref))

    def _default(self) -> Last:
        return Last(self._default_last)

    def _beginning(self, command: Subscribe) -> Beginning | None:
        """Return where the command says to begin; None when it does not.

        Raises:
            InvalidRequest: it says so in two ways, or half.
        """
        ways = {"last": command.last, "since": command.since, "offset": command.offset}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise InvalidRequest(f"{' and '.join(given)} each say where to begin; give one.")
        if (command.offset is None) != (command.epoch is None):
            raise InvalidRequest(
                "A position is offset and epoch together; give both, as you received them."
            )
        last = _number(command.last, "last", least=0)
        if last is not None:
            return Last(last)
        if command.since is not None:
            return read_since(command.since, self._hub.wall_us())
        if command.offset is not None and command.epoch is not None:
            return _after(Position(command.epoch, command.offset))
        return None

    def _pattern_beginning(
        self, command: Subscribe, beginning: Beginning | None
    ) -> PatternBeginning:
        if isinstance(beginning, After) and beginning.epoch:
            raise InvalidRequest("A pattern resumes by positions, one for each topic.")
        if command.positions is None:
            return PatternBeginning(beginning or self._default())
        if len(command.positions) > self._max_topics:
            raise InvalidRequest(f"A pattern may have {self._max_topics} positions.")
        known = {name: _after(at) for name, at in command.positions.items()}
        return PatternBeginning(beginning or FROM_THE_START, known)


def _one_of(command: Subscribe | Unsubscribe) -> str:
    """Return the topic or the pattern, of which there is to be one."""
    given = [name for name in (command.topic, command.pattern) if name is not None]
    if len(given) != 1:
        told = getattr(command, "told", ())
        raise InvalidRequest(" ".join(("Name a topic or a pattern, and only one of them.", *told)))
    if isinstance(command, Subscribe) and command.positions is not None and command.topic:
        raise InvalidRequest("A topic resumes by offset and epoch; positions are for a pattern.")
    return given[0]


def _after(at: Position) -> After:
    return read_position(at.epoch, str(min(at.offset, _MAX_OFFSET + 1)), "offset and epoch")


def _number(value: int | None, name: str, least: int) -> int | None:
    """Return a number of messages; raise InvalidRequest if it can be none."""
    if value is not None and not least <= value <= _MAX_MESSAGES:
        raise InvalidRequest(
            f"The field {name} must be a whole number of messages, {least} or more."
        )
    return value
