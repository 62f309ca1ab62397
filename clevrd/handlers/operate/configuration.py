"""GET /config: the configuration in force, for operators."""

from __future__ import annotations

from collections.abc import Awaitable, Generator

from clevrd.admission import Admitted, Operators
from clevrd.config_view import ConfigInForce
from clevrd.http_values import Request, Response, json_view
from clevrd.scheduling.fair_turns import FairTurns


class ConfigurationEndpoint:
    """Every setting, its source, and the rules of access, without a secret or a digest of one."""

    serves_while_draining = True

    def __init__(self, gate: Operators, in_force: ConfigInForce, turns: FairTurns) -> None:
        self._gate = gate
        self._in_force = in_force
        self._turns = turns

    def admit(self, head: Request) -> Admitted:
        """Refuse who may not operate the daemon."""
        return self._gate.admit_operator(head)

    def answer(self, admitted: Admitted, body: bytes) -> Awaitable[Response]:
        """Return what makes the answer, in shares of the loop's turns."""
        return self._turns.carry_out(self._answer())

    def _answer(self) -> Generator[None, None, Response]:
        view = yield from self._in_force.view()
        yield
        return json_view(view)
