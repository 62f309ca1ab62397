"""GET /admin/explain: the latest decisions, by which rule, from which figures, until when."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator
from typing import Final

import msgspec

from clevrd.admission import Admitted, Operators
from clevrd.core.message_ids import rfc3339
from clevrd.handlers.operate.admin_options import AdminOptions
from clevrd.http_values import Request, Response, json_view
from clevrd.hub import Hub
from clevrd.metrics.decisions import KEPT_S, Decision, Decisions
from clevrd.tenants.tenant import check_tenant_name

# Decisions that are shown unless asked otherwise, and at most.
DEFAULT_DECISIONS: Final = 100
MAX_DECISIONS: Final = 1_000
# Decisions viewed in one step, at 25 us each.
_PER_STEP: Final = 16

_OPTIONS: Final = AdminOptions(("tenant",), {"n": (1, MAX_DECISIONS)})


class Scope(msgspec.Struct, frozen=True):
    """The subject of a decision: the daemon, a tenant, a key, an address, a topic or a request."""

    kind: str
    tenant_id: str
    credential: str
    topic: str


class DecisionView(msgspec.Struct, frozen=True):
    """One decision."""

    kind: str
    code: str
    rule: str
    scope: Scope
    inputs: dict[str, float]
    thresholds: dict[str, float]
    began_at: str
    last_at: str
    # None where it has no end of its own, or is over at once.
    ends_at: str | None
    # Whether it holds still.
    is_on: bool
    count: int


class ExplainView(msgspec.Struct, frozen=True):
    """The decisions of the last ``kept_s`` seconds, the newest first."""

    taken_at: str
    kept_s: float
    # The tenant that was asked for; None for all.
    tenant_id: str | None
    # How many there are, of which the first are shown.
    total: int
    decisions: list[DecisionView]


class ExplainEndpoint:
    """The decisions as JSON: all, or those of a ``tenant`` and of the whole daemon."""

    serves_while_draining = True

    def __init__(self, gate: Operators, hub: Hub) -> None:
        self._gate = gate
        self._hub = hub

    def admit(self, head: Request) -> Admitted:
        """Refuse clients that may not operate the daemon, and options that mean nothing here."""
        admitted = self._gate.admit_admin(head)
        _OPTIONS.check(admitted.options)
        return admitted

    def answer(self, admitted: Admitted, body: bytes) -> Awaitable[Response]:
        """Return the work that makes the answer, in shares of the loop's turns."""
        options = admitted.options
        tenant = _OPTIONS.tenant(options) if "tenant" in options else None
        if tenant is not None:
            check_tenant_name(tenant)
        count = _OPTIONS.number(options, "n", DEFAULT_DECISIONS)
        return self._hub.turns.carry_out(self._answer(tenant, count))

    def _answer(self, tenant: str | None, count: int) -> Generator[None, None, Response]:
        view = yield from explain(
            self._hub.decisions, tenant, count, self._hub.now_s, self._hub.wall_us
        )
        yield
        return json_view(view)


def explain(
    decisions: Decisions,
    tenant: str | None,
    count: int,
    now_s: Callable[[], float],
    wall_us: Callable[[], int],
) -> Generator[None, None, ExplainView]:
    """Return the newest ``count`` decisions, step by step.

    Args:
        tenant: whose, and those of the whole daemon; None for all.
        now_s: the clock of the decisions.
        wall_us: microseconds since 1970.
    """
    found = list(decisions.newest(tenant))
    yield
    at_s, at_us = now_s(), wall_us()

    def moment(when_s: float) -> str:
        return rfc3339(at_us + round((when_s - at_s) * 1e6))

    views: list[DecisionView] = []
    for number, decision in enumerate(found[:count], 1):
        views.append(_view_of(decision, at_s, moment))
        if number % _PER_STEP == 0:
            yield
    return ExplainView(rfc3339(time.time_ns() // 1000), KEPT_S, tenant, len(found), views)


def _view_of(decision: Decision, now_s: float, moment: Callable[[float], str]) -> DecisionView:
    ends_s = None if decision.lasts_s is None else decision.last_s + decision.lasts_s
    return DecisionView(
        kind=decision.kind,
        code=decision.code,
        rule=decision.rule,
        scope=_scope_of(decision),
        inputs=dict(decision.inputs),
        thresholds=dict(decision.thresholds),
        began_at=moment(decision.began_s),
        last_at=moment(decision.last_s),
        ends_at=None if ends_s is None else moment(ends_s),
        is_on=decision.is_open or (ends_s is not None and ends_s > now_s),
        count=decision.count,
    )


def _scope_of(decision: Decision) -> Scope:
    tenant, credential, topic = decision.tenant, decision.credential, decision.topic
    if topic:
        kind = "topic"
    elif credential:
        kind = "key" if tenant else "address"
    elif tenant:
        kind = "tenant"
    else:
        # Time heals what concerns the daemon; any other refusal is of the one request alone.
        is_of_request = decision.kind == "refusal" and decision.lasts_s is None
        kind = "request" if is_of_request else "daemon"
    return Scope(kind, tenant, credential, topic)
