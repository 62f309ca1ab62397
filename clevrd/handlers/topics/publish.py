"""POST /topics/T/messages: the body is the message's data, and everything else is in the head.

CloudEvents HTTP binding 1.0.2: an event in binary mode (§3.1) is published so; one in structured
mode (§3.2) or a batch of these (§3.3) is refused.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from clevrd.admission import Admitted, Later
from clevrd.core.json_faults import json_fault
from clevrd.core.message_headers import SPECVERSION
from clevrd.core.near_names import TOPIC_PUBLISH_OPTIONS
from clevrd.core.nesting import SHALLOW_BYTES, TOO_DEEP, is_too_deep
from clevrd.core.publish_request import PublishRequest, check_publish, check_utf8
from clevrd.errors import InvalidRequest, UnsupportedMediaType
from clevrd.handlers.publish.endpoint import (
    KEY_HEADER,
    PublishEndpoint,
    answer_or_due,
    check_size,
    idempotency_key,
)
from clevrd.handlers.subscribe.options import single_option
from clevrd.handlers.topics.path import topic_in
from clevrd.http_values import Request, Response
from clevrd.tenants.tenant import NO_LIMITS

EXPECTED_DATA: Final = "send the data alone, any JSON value but null"
_JSON: Final = "application/json"
_STRUCTURED: Final = "application/cloudevents"
# As JSON spells it, within the bounds that `check_publish` knows.
_SECONDS: Final = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?", re.ASCII)

_NULL: Final = msgspec.Raw(b"null")
_data_decoder = msgspec.json.Decoder(msgspec.Raw)


class TopicPublishEndpoint(PublishEndpoint):
    """Publishes a body as it is, into the topic that its path names."""

    def admit(self, head: Request) -> Admitted:
        """Refuse by the head alone, an event too whose data is no JSON or not the whole body."""
        _check_media_type(head)
        return super().admit(head)

    def answer(self, admitted: Admitted, body: bytes) -> Response | Later:
        """Publish ``body``; what is returned is as for `PublishEndpoint`."""
        head, options, tenant = admitted.head, admitted.options, admitted.tenant
        topic_name = topic_in(head.path)
        if tenant.limits is not NO_LIMITS:
            check_size(tenant, len(body))
        self._hub.check_rate(tenant)
        publish = PublishRequest(
            topic_name,
            _data_in(body),
            None,
            single_option(options, "key"),
            _ttl_option(options),
            admitted.headers,
        )
        check_publish(publish)
        warnings = TOPIC_PUBLISH_OPTIONS.warnings(options)
        if KEY_HEADER in head.headers:
            return self._once(tenant, publish, idempotency_key(head, publish), warnings)
        topic = self._hub.topic(tenant, topic_name)
        if self._hub.must_wait(topic):
            return self._later(tenant, topic, publish, warnings)
        return answer_or_due(warnings, self._hub.publish(topic, publish))


def _check_media_type(head: Request) -> None:
    """Refuse an event whose Content-Type says that its data is not the JSON in the body.

    Any other body is read as JSON whatever its Content-Type says, as POST /publish reads it: curl
    -d says that it sends a form, and fetch that it sends text. It keeps no page of another origin
    out either: `page_check` does.

    Raises:
        UnsupportedMediaType: the event is in structured mode, or its data is of another type.
    """
    media_type = head.headers.get("content-type", _JSON).partition(";")[0].strip().lower()
    if media_type.startswith(_STRUCTURED):
        raise UnsupportedMediaType(
            "Events are taken in binary mode: send the event's data as the body with Content-Type:"
            " application/json, and its attributes as ce-* headers."
        )
    # CloudEvents HTTP binding 1.0.2, §3.1.1: the field says of which type the event's data is.
    if media_type != _JSON and SPECVERSION in head.headers:
        raise UnsupportedMediaType(
            "The data of an event must be JSON; send Content-Type: application/json, or none."
        )


def _data_in(body: bytes) -> msgspec.Raw:
    """Return the JSON value that ``body`` is, without the whitespace around it.

    Raises:
        InvalidRequest: it is none, or null.
    """
    check_utf8(body)
    if len(body) > SHALLOW_BYTES and is_too_deep(body):
        raise InvalidRequest(f"The body is {TOO_DEEP}; {EXPECTED_DATA}.")
    try:
        data = _data_decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"The body {json_fault(body, error)}; {EXPECTED_DATA}.") from error
    if data == _NULL:
        raise InvalidRequest(f"The data is null; {EXPECTED_DATA}.")
    return data


def _ttl_option(options: dict[str, list[str]]) -> float | None:
    """Return the option ttl_s; None for none.

    Raises:
        InvalidRequest: it is no number, or given twice.
    """
    text = single_option(options, "ttl_s")
    if text is None:
        return None
    if not _SECONDS.fullmatch(text):
        raise InvalidRequest("The option ttl_s must be a number of seconds, such as 60 or 0.5.")
    return float(text) if "." in text else int(text)
