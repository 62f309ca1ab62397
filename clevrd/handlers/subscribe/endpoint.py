"""GET /subscribe: the options of a subscription.

What happens on the connection afterwards is connections/subscriber.py's, or http_stream.py's.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from clevrd.admission import Admitted, admit_tenant
from clevrd.config import Config
from clevrd.connections.http_stream import TopicStream, stream_head
from clevrd.connections.many_streams import ManyStream
from clevrd.connections.multi import MultiConnection
from clevrd.connections.subscriber import SubscriberConnection
from clevrd.connections.subscriptions import Manner, SubscribeOptions, check_room
from clevrd.connections.websocket import WebSockets
from clevrd.core.beginning import Beginning, check_beginning
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.names import check_topic
from clevrd.core.patterns import is_narrow, parse_pattern
from clevrd.core.stream_forms import PlacedWrites, StreamForm
from clevrd.core.topic import Topic
from clevrd.errors import Forbidden, InvalidRequest, RetryLater, UpgradeRequired
from clevrd.handlers.handshake import (
    CONTROL_PROTOCOL,
    check_handshake,
    handshake_head,
    offers_control,
)
from clevrd.handlers.subscribe.options import number_option, single_option
from clevrd.handlers.subscribe.poll import POLL_HEAD, Polls, is_poll, read_timeout
from clevrd.handlers.subscribe.poll_many import ManyPoll
from clevrd.handlers.subscribe.resume import Asked, read_beginnings
from clevrd.handlers.subscribe.transports import (
    events_refusal,
    is_events,
    is_upgrade,
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


class SubscribeEndpoint:
    """Answers a subscribe with a head and what to do with the connection then, or a poll."""

    serves_while_draining = False

    def __init__(self, hub: Hub, sockets: WebSockets, polls: Polls, config: Config) -> None:
        self._hub = hub
        self._sockets = sockets
        self._polls = polls
        self._catch_up_messages = config.catch_up_messages
        self._max_topics = config.max_topics_per_connection
        self._may_match_all = config.match_all_patterns
        # Shared by all streams of events with several topics.
        self._writes = PlacedWrites()

    def admit(self, head: Request) -> Admitted:
        """Refuse what names no tenant."""
        return admit_tenant(head)

    def answer(
        self, admitted: Admitted, body: bytes
    ) -> Response | Upgrade | asyncio.Future[Response]:
        """Return what begins the subscription, or the answer to a poll."""
        if is_upgrade(admitted.head):
            return self._upgrade(admitted)
        return self._answer(admitted, stream_form(admitted.head))

    def _answer(
        self, admitted: Admitted, form: StreamForm | None
    ) -> Response | Upgrade | asyncio.Future[Response]:
        request, query, tenant = admitted.head, admitted.options, admitted.tenant
        polls = is_poll(query)
        told = warning_fields(subscribe_warnings(query))
        options = self._read_options(
            request, query, is_events=is_events(form), takes_any_id=is_events(form) and not polls
        )
        if not polls and form is None:
            raise UpgradeRequired(NO_TRANSPORT)
        timeout_s = read_timeout(query)
        topics = self._open_topics(tenant, options)
        if form is not None and not polls:
            return self._stream(request, tenant, topics, options, form, told)
        if request.method == "HEAD":
            return POLL_HEAD
        if options.patterns or len(topics) > 1:
            poll = ManyPoll(self._polls, self._hub, tenant, options, self._max_topics)
            self._polls.add(poll)
            poll.begin(topics, timeout_s)
            return with_fields(poll.answer, told)
        ((topic, beginning),) = topics
        return with_fields(self._polls.answer(topic, beginning, timeout_s), told)

    def _stream(
        self,
        request: Request,
        tenant: Tenant,
        topics: list[tuple[Topic, Beginning]],
        options: SubscribeOptions,
        form: StreamForm,
        told: tuple[tuple[str, str], ...],
    ) -> Upgrade:
        """Return the head of the stream and what writes the rest."""
        head = stream_head(form, told)
        if request.method == "HEAD":
            return Upgrade(head, lambda transport, early_data: transport.close())
        sockets, hub, manner = self._sockets, self._hub, options.manner

        def attach(transport: asyncio.Transport, early_data: bytes) -> None:
            if len(topics) == 1 and not options.patterns:
                ((topic, beginning),) = topics
                one = TopicStream(sockets, transport, hub, topic, manner, form)
                one.begin(beginning, early_data, options.warnings)
                return
            many = ManyStream(
                *(sockets, transport, hub, tenant, self._max_topics), form, options, self._writes
            )
            many.begin(early_data)

        retry = form.retry(retry_ms())
        return Upgrade(head + form.framed(retry) if retry else head, attach)

    def _upgrade(self, admitted: Admitted) -> WebSocketUpgrade:
        request, query, tenant = admitted.head, admitted.options, admitted.tenant
        options = self._read_options(request, query, is_events=False, takes_any_id=False)
        key = check_handshake(request)
        topics = self._open_topics(tenant, options)
        protocol = CONTROL_PROTOCOL if offers_control(request) else ""

        def attach(transport: asyncio.Transport, early_data: bytes) -> None:
            if len(topics) == 1 and not options.patterns:
                ((topic, beginning),) = topics
                self._attach_one(transport, topic, beginning, options, early_data)
            else:
                self._attach_many(transport, tenant, options, early_data)

        return WebSocketUpgrade(handshake_head(key, protocol, subscribe_warnings(query)), attach)

    def _read_options(
        self,
        request: Request,
        query: dict[str, list[str]],
        *,
        is_events: bool,
        takes_any_id: bool,
    ) -> SubscribeOptions:
        options = read_options(
            *(request, query, self._catch_up_messages, self._hub.wall_us()),
            is_events=is_events,
            takes_any_id=takes_any_id,
        )
        for text in options.patterns:
            check_pattern(text, may_match_all=self._may_match_all)
        check_room(len(options.topics) + len(options.patterns) - 1, self._max_topics)
        return options

    def _open_topics(
        self, tenant: Tenant, options: SubscribeOptions
    ) -> list[tuple[Topic, Beginning]]:
        """Make the topics that are missing; nothing is refused after the 101."""
        topics = [
            (self._hub.topic(tenant, name), beginning) for name, beginning in options.topics.items()
        ]
        for topic, beginning in topics:
            check_beginning(topic, beginning)
        return topics

    def _attach_one(
        self,
        transport: asyncio.Transport,
        topic: Topic,
        beginning: Beginning,
        options: SubscribeOptions,
        early_data: bytes,
    ) -> None:
        manner = options.manner
        connection = SubscriberConnection(
            self._sockets,
            transport,
            self._hub,
            topic,
            manner.strategy,
            manner.wanted_window,
            has_control=manner.has_control,
        )
        connection.begin(beginning, early_data, options.warnings)

    def _attach_many(
        self,
        transport: asyncio.Transport,
        tenant: Tenant,
        options: SubscribeOptions,
        early_data: bytes,
    ) -> None:
        connection = MultiConnection(
            self._sockets,
            transport,
            self._hub,
            tenant,
            self._max_topics,
            has_control=options.manner.has_control,
        )
        connection.begin(options, early_data)


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


def read_options(
    request: Request,
    query: dict[str, list[str]],
    default_last: int,
    now_us: int,
    *,
    is_events: bool,
    takes_any_id: bool,
) -> SubscribeOptions:
    """Return the subscription that ``request`` with this ``query`` asks for.

    Args:
        default_last: recent messages for who does not say where to begin.
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
    asked = Asked(names, patterns, default_last, now_us)
    begin = read_beginnings(request, query, asked, id_wins=is_events, takes_any_id=takes_any_id)
    manner = Manner(
        read_policy(single_option(query, "policy")),
        number_option(query, "buffer", least=1),
        control == "1" or is_events or offers_control(request),
    )
    warnings = subscribe_warnings(query) or msgspec.UNSET
    return SubscribeOptions(begin.topics, begin.patterns, manner, warnings)


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
