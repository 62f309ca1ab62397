"""Retries of requests over HTTP: which failures are worth another attempt, and when."""

from __future__ import annotations

import logging

from clevrd.client.backoff import Clockwork, delay_s
from clevrd.client.errors import ClientError, Refused, Unreachable
from clevrd.client.session import Session

log = logging.getLogger(__name__)


class Retries:
    """Waits between the attempts of a request, each with a backoff of its own, up to a bound.

    Args:
        what: the name of the requests in the log.
    """

    def __init__(
        self, session: Session, retry_for_s: float, clockwork: Clockwork, what: str
    ) -> None:
        self._session = session
        self._retry_for_s = retry_for_s
        self._random, self._sleep, self._clock = clockwork
        self._what = what

    def offers(self) -> Offers:
        """Begin to count the attempts of one request."""
        return Offers(self._clock() + self._retry_for_s)

    async def pause(self, offers: Offers, error: Refused | Unreachable) -> None:
        """Wait before the next attempt; raise ``error`` when there is to be none."""
        if not self._is_worth_repeating(error) or not await self.may_pause(offers, error):
            raise error

    async def may_pause(self, offers: Offers, error: ClientError) -> bool:
        """Wait before the next attempt, unless time is up; return whether it was waited."""
        wait_s = delay_s(offers.attempt, error, self._random())
        if self._clock() + wait_s > offers.deadline_s:
            return False
        offers.attempt += 1
        self._log(error, wait_s)
        await self._sleep(wait_s)
        return not self._session.is_closed

    def _is_worth_repeating(self, error: Refused | Unreachable) -> bool:
        if self._session.is_closed:
            return False
        return error.is_transient if isinstance(error, Refused) else self._session.was_reached

    def _log(self, error: ClientError, wait_s: float) -> None:
        if isinstance(error, Refused):
            log.info("%s refused status=%d delay_s=%.2f", self._what, error.status, wait_s)
            return
        log.warning("%s interrupted delay_s=%.2f why=%s", self._what, wait_s, error)


class Offers:
    """The number of attempts so far, and the time until which another may be made."""

    __slots__ = ("attempt", "deadline_s")

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.attempt = 0
