"""GET /subscribe: parse what is asked for, open its topics, attach the transport.

The connection afterwards is the business of connections/.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from clevrd.admission import Admitted, Gate
from clevrd.config import Config
from clevrd.connections.many_subscriptions import ManySubscriptions, check_room
from clevrd.connections.one_subscription import OneSubscription, Subscription, frames_form
from clevrd.connections.poll import POLL_HEAD, Polls
from clevrd.connections.registry import Connections
from clevrd.connections.stream import SubscriberStream, stream_head
from clevrd.connections.websocket import SubscriberWebSocket
from clevrd.core.beginning import check_beginning
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.event_ids import event_ids_for
from clevrd.core.names import check_subscriber_id, check_topic
from clevrd.core.patterns import is_narrow, parse_pattern
from clevrd.core.stream_forms import StreamForm, with_headers
from clevrd.core.subscription import DeliveryOptions, SubscribeRequest
from clevrd.core.topic import Topic
from clevrd.errors import Forbidden, InvalidRequest, RetryLater, UpgradeRequired
from clevrd.handlers.handshake import (
    NOTICES_PROTOCOL,
    check_handshake,
    handshake_head,
    offers_notices,
)
from clevrd.handlers.subscribe.options import flag_option, number_option, single_option
from clevrd.handlers.subscribe.resume import SubscribeUrl, read_beginnings
from clevrd.handlers.subscribe.transports import (
    events_refusal,
    is_events,
    is_poll,
    is_upgrade,
    read_timeout,
    retry_ms,
    stream_form,
    wants_events,
)
from clevrd.handlers.warnings import subscribe_warnings, warning_fields
from clevrd.http_values import Request, Response, Upgrade, WebSocketUpgrade
from clevrd.hub import Hub
from clevrd.tenants import Tenant

PATH: Final = "/subscribe"

NO_TRANSPORT: Final = (
    "GET /subscribe is a WebSocket; connect with a WebSocket client, or ask for another transport:"
    " Accept: text/event-stream (SSE), Accept: application/x-ndjson (a line per message), or poll=1"
    " (long-poll)."
)

POLICIES: Final = tuple(strategy.value for strategy in DropStrategy)

# Topics and patterns on one URL, which has 8 KiB; commands on /ws take more.
MAX_URL_TOPICS: Final = 50


class OpenedRequest(msgspec.Struct, frozen=True):
    """A request whose topics are there: nothing of it is refused any more."""

    tenant: Tenant
    request: SubscribeRequest
    # In the order of the request.
    topics: list[Topic]


class SubscribeEndpoint:
    """Answers a subscribe with a head and what to do with the connection then, or a poll."""

    serves_while_draining = False

    def __init__(
        self, gate: Gate, hub: Hub, connections: Connections, polls: Polls, config: Config
    ) -> None:
        self._gate = gate
        self._hub = hub
        self._connections = connections
        self._polls = polls
        self._catch_up_messages = config.catch_up_messages
        self._max_topics = config.max_topics_per_connection
        self._may_match_all = config.match_all_patterns

    def admit(self, head: Request) -> Admitted:
        """Refuse what names no tenant."""
        return self._gate.admit_tenant(head)

    def answer(
        self, admitted: Admitted, body: bytes
    ) -> Response | Upgrade | asyncio.Future[Response]:
        """Return what begins the subscription, or the answer to a poll."""
        if is_upgrade(admitted.head):
            return self._websocket(admitted)
        form = stream_form(admitted.head)
        if is_poll(admitted.options):
            return self._poll(admitted, form)
        return self._stream(admitted, form)

    # --- the transports --------------------------------------------------------------------------

    def _websocket(self, admitted: Admitted) -> WebSocketUpgrade:
        head, query = admitted.head, admitted.options
        request = self._parse(admitted, is_events=False, takes_any_id=False)
        key = check_handshake(head)
        self._hub.check_memory_for_subscriber()
        self._connections.check_arrival(admitted.tenant)
        opened = self._open(admitted.tenant, request)

        def attach(transport: asyncio.Transport, early_data: bytes) -> None:
            connection = SubscriberWebSocket(self._connections, transport, opened.tenant)
            form = frames_form(opened.request.options)
            self._attach(connection, opened, early_data, form=form)
            self._connections.note_page(connection, head)

        protocol = NOTICES_PROTOCOL if offers_notices(head) else ""
        return WebSocketUpgrade(handshake_head(key, protocol, subscribe_warnings(query)), attach)

    def _stream(self, admitted: Admitted, form: StreamForm | None) -> Upgrade:
        """Return the head of the stream and what writes the rest."""
        told = warning_fields(subscribe_warnings(admitted.options))
        request = self._parse(admitted, is_events=is_events(form), takes_any_id=is_events(form))
        if form is None:
            raise UpgradeRequired(NO_TRANSPORT)
        # Checked on a stream as well, where it means nothing.
        read_timeout(admitted.options)
        wanted = with_headers(form) if request.options.has_headers else form
        self._hub.check_memory_for_subscriber()
        self._connections.check_arrival(admitted.tenant)
        opened = self._open(admitted.tenant, request)
        head = stream_head(form, told)
        if admitted.head.method == "HEAD":
            return Upgrade(head, lambda transport, early_data: transport.close())

        def attach(transport: asyncio.Transport, early_data: bytes) -> None:
            connection = SubscriberStream(self._connections, transport, opened.tenant, wanted)
            self._attach(connection, opened, early_data, form=wanted)
            self._connections.note_page(connection, admitted.head)

        retry = form.retry(retry_ms())
        return Upgrade(head + form.framed(retry) if retry else head, attach)

    def _poll(
        self, admitted: Admitted, form: StreamForm | None
    ) -> Response | asyncio.Future[Response]:
        told = warning_fields(subscribe_warnings(admitted.options))
        request = self._parse(admitted, is_events=is_events(form), takes_any_id=False)
        # A poll is answered when its credential ends, and its client is refused the next one.
        timeout_s = min(read_timeout(admitted.options), self._gate.left_s(admitted.tenant))
        opened = self._open(admitted.tenant, request)
        if admitted.head.method == "HEAD":
            return POLL_HEAD
        reply: Response | asyncio.Future[Response]
        if request.is_for_one_topic:
            (topic,) = opened.topics
            reply = self._polls.answer_one(
                *(admitted.tenant, topic, request.topics[topic.name], timeout_s),
                has_headers=request.options.has_headers,
            )
        else:
            reply = self._polls.answer_many(admitted.tenant, request, self._max_topics, timeout_s)
        return with_fields(reply, told)

    # --- parse, open, attach ---------------------------------------------------------------------

    def _parse(
        self, admitted: Admitted, *, is_events: bool, takes_any_id: bool
    ) -> SubscribeRequest:
        request = read_request(
            *(admitted.head, admitted.options, self._catch_up_messages, self._hub.wall_us()),
            is_events=is_events,
            takes_any_id=takes_any_id,
        )
        for text in request.patterns:
            check_pattern(text, may_match_all=self._may_match_all)
            admitted.tenant.check_pattern(text, parse_pattern(text))
        wanted = len(request.topics) + len(request.patterns)
        check_room(wanted - 1, self._max_topics, admitted.tenant)
        return request

    def _open(self, tenant: Tenant, request: SubscribeRequest) -> OpenedRequest:
        """Make the topics that are missing; nothing is refused after the head."""
        topics = [self._hub.topic_to_read(tenant, name) for name in request.topics]
        for topic in topics:
            check_beginning(topic, request.topics[topic.name])
        return OpenedRequest(tenant, request, topics)

    def _attach(
        self,
        connection: SubscriberWebSocket | SubscriberStream,
        opened: OpenedRequest,
        early_data: bytes,
        *,
        form: StreamForm | None,
    ) -> None:
        """Have ``connection`` take its transport over and subscribe."""
        request, options = opened.request, opened.request.options
        subscription: Subscription
        if request.is_for_one_topic:
            (topic,) = opened.topics
            subscription = OneSubscription(self._hub, topic, connection, options, form)
        else:
            subscription = ManySubscriptions(
                *(self._hub, opened.tenant, connection, self._max_topics),
                has_notices=options.has_notices,
                ids=event_ids_for(request) if is_events(form) else None,
            )
        connection.subscribe(subscription, request, early_data)


def refusal_as_events(error: RetryLater, request: Request) -> Response | None:
    """Return ``error`` as an EventSource reads it; None if ``request`` is not from one."""
    is_stream = request.path == PATH and not is_upgrade(request) and wants_events(request)
    return events_refusal(error) if is_stream else None


def with_fields(
    reply: Response | asyncio.Future[Response], fields: tuple[tuple[str, str], ...]
) -> Response | asyncio.Future[Response]:
    """Return ``reply`` with more header fields, be it there or to come."""
    if not fields:
        return reply
    if isinstance(reply, Response):
        return msgspec.structs.replace(reply, headers=(*reply.headers, *fields))
    awaited = reply
    outer: asyncio.Future[Response] = awaited.get_loop().create_future()

    def pass_on(_: object) -> None:
        if outer.cancelled() or awaited.cancelled():
            outer.cancel()
        elif (error := awaited.exception()) is not None:
            outer.set_exception(error)
        else:
            answer = awaited.result()
            outer.set_result(msgspec.structs.replace(answer, headers=(*answer.headers, *fields)))

    awaited.add_done_callback(pass_on)
    # The client has gone.
    outer.add_done_callback(lambda _: awaited.cancel())
    return outer


def read_request(
    request: Request,
    query: dict[str, list[str]],
    default_last: int,
    now_us: int,
    *,
    is_events: bool,
    takes_any_id: bool,
) -> SubscribeRequest:
    """Return the subscription that ``request`` with this ``query`` asks for.

    Args:
        default_last: recent messages for a client that does not say where to begin.
        now_us: wall clock, which durations are reckoned from.
        is_events: it is for server-sent events, so perhaps an EventSource's.
        takes_any_id: an event's id is no reason to refuse it (`read_beginnings`).

    Raises:
        InvalidRequest: an option is missing, malformed, given twice or against another; the
            sentence says which.
    """
    names, patterns = query.get("topic", []), query.get("pattern", [])
    _check_names(names, patterns, query)
    control = single_option(query, "control")
    if control not in (None, "0", "1"):
        raise InvalidRequest("The option control must be 1 for control frames, or 0 for none.")
    url = SubscribeUrl(names, patterns, default_last, now_us)
    begin = read_beginnings(request, query, url, id_wins=is_events, takes_any_id=takes_any_id)
    options = DeliveryOptions(
        read_policy(single_option(query, "policy")),
        number_option(query, "buffer", least=1),
        control == "1" or is_events or offers_notices(request),
        read_subscriber_id(single_option(query, "subscriber_id")),
        flag_option(query, "headers"),
    )
    warnings = subscribe_warnings(query) or msgspec.UNSET
    return SubscribeRequest(begin.topics, begin.patterns, options, warnings)


def _check_names(names: list[str], patterns: list[str], query: dict[str, list[str]]) -> None:
    if not names and not patterns:
        raise InvalidRequest(
            " ".join(
                (
                    "The topic is missing; connect to /subscribe?topic=NAME.",
                    *subscribe_warnings(query),
                )
            )
        )
    if len(names) + len(patterns) > MAX_URL_TOPICS:
        raise InvalidRequest(
            f"A URL may name {MAX_URL_TOPICS} topics and patterns; subscribe to more over /ws."
        )
    for given in (names, patterns):
        if len(set(given)) < len(given):
            raise InvalidRequest("A topic or pattern is given twice; give each once.")
    for name in names:
        check_topic(name)


def read_policy(policy: str | None) -> DropStrategy:
    """Return the policy of this name, the default for None.

    Raises:
        InvalidRequest: there is none.
    """
    if policy is not None and policy not in POLICIES:
        raise InvalidRequest(f"Unknown policy; use one of {', '.join(POLICIES)}.")
    return DropStrategy(policy) if policy else DropStrategy.DROP_OLDEST


def read_subscriber_id(subscriber_id: str | None) -> str | None:
    """Return the id; None for none.

    Raises:
        InvalidRequest: it is empty, too long, or has a control character.
    """
    if subscriber_id is not None:
        check_subscriber_id(subscriber_id)
    return subscriber_id


def check_pattern(text: str, *, may_match_all: bool) -> None:
    """Raise unless ``text`` is a pattern that may be watched.

    Raises:
        InvalidRequest: it is no pattern.
        Forbidden: it could match everything, and nothing here may.
    """
    if not is_narrow(parse_pattern(text)) and not may_match_all:
        raise Forbidden(
            "A pattern must name its first word, like orders.*; one that can match everything is"
            " allowed by CLEVRD_MATCH_ALL_PATTERNS."
        )
