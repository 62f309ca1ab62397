"""GET /metrics: the daemon's figures, as JSON or as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from typing import Final

from clevrd.admission import Admitted, Gate
from clevrd.errors import InvalidRequest
from clevrd.handlers.operate.accept import Form, wanted_form
from clevrd.handlers.operate.figures import Figures
from clevrd.http_values import JSON, NOT_STORED, Request, Response
from clevrd.metrics.exposition import (
    OPENMETRICS_TYPE,
    TEXT_TYPE,
    render_openmetrics,
    render_text,
)
from clevrd.metrics.json import render_json
from clevrd.scheduling.fair_turns import FairTurns

# /metrics lists this many topics unless asked otherwise: about 50 KB of JSON.
DEFAULT_TOPICS: Final = 100
# The most it lists: about 5 MB, and 10 ms of encoding.
MAX_TOPICS: Final = 10_000

_RENDERERS: Final = {
    Form.JSON: (JSON, render_json),
    Form.OPENMETRICS: (OPENMETRICS_TYPE, render_openmetrics),
    Form.TEXT: (TEXT_TYPE, render_text),
}
_FIELDS: Final = (*NOT_STORED, ("Vary", "Accept"))


class MetricsEndpoint:
    """The figures in the form that Accept asks for; ``?topics=N`` lists the N busiest topics.

    Prometheus's forms list none: a topic would be a label, and clients make as many as they like.
    """

    serves_while_draining = True

    def __init__(self, gate: Gate, figures: Figures, turns: FairTurns) -> None:
        self._gate = gate
        self._figures = figures
        self._turns = turns

    def admit(self, head: Request) -> Admitted:
        """Refuse who may not operate the daemon."""
        return self._gate.admit_operator(head)

    def answer(self, admitted: Admitted, body: bytes) -> Awaitable[Response]:
        """Return what makes the answer, in shares of the loop's turns."""
        request = admitted.head
        form = wanted_form(request.headers.get("accept", ""))
        topics = _topic_count(request)
        return self._turns.carry_out(self._answer(form, topics if form is Form.JSON else 0))

    def _answer(self, form: Form, topics: int) -> Generator[None, None, Response]:
        content_type, render = _RENDERERS[form]
        snapshot = yield from self._figures.snapshot(topics)
        yield
        body = yield from render(snapshot)
        # To let go of 10,000 topics takes 2 ms, so it is a step of its own.
        del snapshot
        yield
        return Response(200, body, content_type, _FIELDS)


def _topic_count(request: Request) -> int:
    values = request.options().get("topics")
    if values is None:
        return DEFAULT_TOPICS
    if len(values) > 1 or not (values[0].isdecimal() and values[0].isascii()):
        raise InvalidRequest("The option topics must be one whole number.")
    return min(int(values[0][:9]), MAX_TOPICS)
