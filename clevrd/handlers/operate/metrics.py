"""GET /metrics: the daemon's figures, as JSON or as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from typing import Final

from clevrd.admission import Admitted, Operators
from clevrd.errors import Forbidden, InvalidRequest
from clevrd.handlers.operate.accept import Form, wanted_form
from clevrd.handlers.operate.figures import Figures
from clevrd.http_values import JSON, NOT_STORED, Request, Response, json_view
from clevrd.metrics.json import render_json, render_tenant_json
from clevrd.metrics.prometheus.exposition import (
    OPENMETRICS_TYPE,
    TEXT_TYPE,
    openmetrics_of,
    render_openmetrics,
    render_text,
    text_of,
)
from clevrd.metrics.prometheus.tenants import families_of_tenants
from clevrd.scheduling.fair_turns import FairTurns
from clevrd.tenants import Tenant

# /metrics lists this many topics unless asked otherwise: about 50 KB of JSON.
DEFAULT_TOPICS: Final = 100
# The most it lists: about 5 MB, and 10 ms of encoding.
MAX_TOPICS: Final = 10_000

_RENDERERS: Final = {
    Form.JSON: (JSON, render_json),
    Form.OPENMETRICS: (OPENMETRICS_TYPE, render_openmetrics),
    Form.TEXT: (TEXT_TYPE, render_text),
}
_TENANT_RENDERERS: Final = {
    Form.OPENMETRICS: (OPENMETRICS_TYPE, openmetrics_of),
    Form.TEXT: (TEXT_TYPE, text_of),
}
# The figures depend on the credential, too, but no cache keeps them, so Vary need not say it.
_FIELDS: Final = (*NOT_STORED, ("Vary", "Accept"))


class MetricsEndpoint:
    """The figures in the form that Accept asks for; ``?topics=N`` lists the N busiest topics.

    Prometheus's forms list none: a topic would be a label, and clients make as many as they like.
    They are for operators alone: what is left of them for one tenant could fall, as topics are
    forgotten, and a counter may not.
    """

    serves_while_draining = True

    def __init__(self, gate: Operators, figures: Figures, turns: FairTurns) -> None:
        self._gate = gate
        self._figures = figures
        self._turns = turns

    def admit(self, head: Request) -> Admitted:
        """Refuse requests of nobody, and of tenants for forms that no tenant gets."""
        admitted = self._gate.admit_observer(head)
        if not admitted.tenant.is_admin and _form_of(head) is not Form.JSON:
            raise Forbidden(
                "Prometheus's forms have the figures of all tenants, for which the permission admin"
                " is missing; ask for application/json to get your own."
            )
        return admitted

    def answer(self, admitted: Admitted, body: bytes) -> Awaitable[Response]:
        """Return what makes the answer, in shares of the loop's turns."""
        topics = _topic_count(admitted.options)
        if not admitted.tenant.is_admin:
            return self._turns.carry_out(self._answer_tenant(admitted.tenant, topics))
        form = _form_of(admitted.head)
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

    def _answer_tenant(self, tenant: Tenant, topics: int) -> Generator[None, None, Response]:
        snapshot = yield from self._figures.of_tenant(tenant.name, tenant.may_use, topics)
        yield
        body = yield from render_tenant_json(snapshot)
        del snapshot
        yield
        return Response(200, body, JSON, _FIELDS)


class TenantMetricsEndpoint:
    """The figures of tenants, for operators, in the form that Accept asks for.

    Each tenant is a label of Prometheus's, so they have a path of their own.
    """

    serves_while_draining = True

    def __init__(self, gate: Operators, figures: Figures, turns: FairTurns) -> None:
        self._gate = gate
        self._figures = figures
        self._turns = turns

    def admit(self, head: Request) -> Admitted:
        """Refuse who may not operate the daemon."""
        return self._gate.admit_operator(head)

    def answer(self, admitted: Admitted, body: bytes) -> Awaitable[Response]:
        """Return what makes the answer, in shares of the loop's turns."""
        return self._turns.carry_out(self._answer(_form_of(admitted.head)))

    def _answer(self, form: Form) -> Generator[None, None, Response]:
        view = yield from self._figures.of_tenants()
        yield
        if form is Form.JSON:
            return json_view(view, _FIELDS)
        content_type, render = _TENANT_RENDERERS[form]
        body = yield from render(families_of_tenants(view))
        return Response(200, body, content_type, _FIELDS)


def _form_of(request: Request) -> Form:
    return wanted_form(request.headers.get("accept", ""))


def _topic_count(options: dict[str, list[str]]) -> int:
    values = options.get("topics")
    if values is None:
        return DEFAULT_TOPICS
    if len(values) > 1 or not (values[0].isdecimal() and values[0].isascii()):
        raise InvalidRequest("The option topics must be one whole number.")
    return min(int(values[0][:9]), MAX_TOPICS)
