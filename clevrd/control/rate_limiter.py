"""The publish rate of each tenant, as token buckets. No clock here; no answer is rendered.

A bucket is refilled when it is used, not by a timer: over any t seconds at most burst + rate * t
are granted. The settings promise that sum, not a count for each calendar second.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from clevrd.errors import InvalidRequest, RateLimited

# Buckets at most. One with its place in the map and a 20-byte name takes 280 bytes (tracemalloc),
# so the map ends at about 18 MB, whatever names a client makes up.
MAX_BUCKETS = 65_536

# Old buckets looked at for each new one, so that idle ones go faster than new ones come.
SWEPT_PER_NEW_BUCKET = 2

# Added to every wait, so that rounding can't turn the promised moment into another refusal: at 10^8
# s of uptime a double still resolves 15 ns.
WAIT_MARGIN_S = 1e-6


class TokenBucket:
    """A budget of `burst` tokens that regains `rate_per_s` tokens a second; it starts full."""

    __slots__ = ("_level", "_level_at_s", "burst", "rate_per_s")

    def __init__(self, rate_per_s: float, burst: int) -> None:
        """Make a full bucket.

        Args:
            rate_per_s: tokens regained per second, above 0 and finite.
            burst: most tokens that the bucket holds, at least 1.
        """
        if not 0.0 < rate_per_s < math.inf:
            raise ValueError(f"rate_per_s must be above 0 and finite, not {rate_per_s!r}")
        if burst < 1:
            raise ValueError(f"burst must be at least 1, not {burst!r}")
        self.rate_per_s = rate_per_s
        self.burst = burst
        # Tokens right after the last grant, and the time of that grant; both changed by take()
        # alone, and the time never goes back.
        self._level = float(burst)
        self._level_at_s = -math.inf

    def take(self, count: int, now_s: float) -> float:
        """Take `count` tokens and return 0.0, or take nothing and return how long to wait.

        The wait is in seconds, above 0 and long enough: the same call succeeds after it unless
        other calls took tokens meanwhile. It is `math.inf` when `count` is above `burst`, since no
        wait is long enough for that. A refusal changes no state, so asking often costs no tokens.

        Args:
            count: tokens wanted, 0 or more.
            now_s: monotonic seconds; a moment before the last grant adds no tokens.
        """
        if count < 0:
            raise ValueError(f"count must not be negative, not {count!r}")
        level = self.level(now_s)
        if count <= level:
            self._level = level - count
            if now_s > self._level_at_s:
                self._level_at_s = now_s
            return 0.0
        if count > self.burst:
            return math.inf
        there_at_s = self._level_at_s + (count - self._level) / self.rate_per_s
        return max(0.0, there_at_s - now_s) + WAIT_MARGIN_S

    def level(self, now_s: float) -> float:
        """Return the tokens in the bucket at `now_s`, within 0 and `burst`."""
        elapsed_s = now_s - self._level_at_s
        # Comparisons replace min() and max(), with which a take needs half as much time again.
        if not elapsed_s > 0.0:
            return self._level
        level = self._level + elapsed_s * self.rate_per_s
        return level if level < self.burst else self.burst

    def copy(self) -> TokenBucket:
        """Return another bucket with as many tokens."""
        twin = TokenBucket(self.rate_per_s, self.burst)
        twin._level = self._level
        twin._level_at_s = self._level_at_s
        return twin


class RateLimiter:
    """One token bucket per tenant, all of the same rate and burst.

    A full bucket equals a new one, so full buckets are forgotten. At the bound, when `max_buckets`
    tenants have buckets that are not full, the tenants without a bucket share one; a tenant with a
    bucket is not affected. A bucket that is not full is never dropped, and a new bucket starts with
    the tokens that the shared one then holds. So over any t seconds each tenant is granted at most
    `burst + rate_per_s * t`, whatever names other clients make up.
    """

    __slots__ = ("_buckets", "_max_buckets", "_newcomers", "burst", "rate_per_s")

    def __init__(
        self, rate_per_s: float, burst: int = 0, *, max_buckets: int = MAX_BUCKETS
    ) -> None:
        """Make a limiter that knows no tenant yet.

        Args:
            rate_per_s: publishes per second and tenant, finite; 0 means unlimited.
            burst: publishes that a tenant may make at once; 0 means a second's worth, at least 1.
            max_buckets: tenants remembered at most.
        """
        if not 0.0 <= rate_per_s < math.inf:
            raise ValueError(f"rate_per_s must be 0 or more and finite, not {rate_per_s!r}")
        if burst < 0:
            raise ValueError(f"burst must not be negative, not {burst!r}")
        self.rate_per_s = rate_per_s
        self.burst = burst or max(1, math.ceil(rate_per_s))
        self._max_buckets = max_buckets
        # Buckets by tenant, in the order in which sweep() looks at them.
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        # The bucket of tenants without one of their own: full, except for tokens that such tenants
        # took at the bound. None when publishing is unlimited.
        self._newcomers = TokenBucket(rate_per_s, self.burst) if rate_per_s > 0.0 else None

    def __len__(self) -> int:
        """Return how many tenants are remembered."""
        return len(self._buckets)

    def take(self, tenant: str, count: int, now_s: float) -> None:
        """Spend `count` publishes of the tenant's budget, all or none.

        Args:
            tenant: the tenant's name, already validated.
            count: publishes, 0 or more.
            now_s: monotonic seconds.

        Raises:
            RateLimited: the budget is short; the error says how long to wait.
            InvalidRequest: `count` is above the burst, so it can never be granted at once.
        """
        if self._newcomers is None:
            return
        bucket = self._buckets.get(tenant)
        if bucket is None:
            bucket = self._admit(tenant, self._newcomers, now_s)
        wait_s = bucket.take(count, now_s)
        if wait_s > 0.0:
            raise self._refusal(tenant, count, wait_s)

    def sweep(self, now_s: float, at_most: int) -> int:
        """Forget full buckets among the next `at_most`, and return how many were forgotten.

        Each new tenant makes it run; a timer calls it too, so that a quiet daemon gives the memory
        back. Looking at a bucket takes about 0.3 us.
        """
        known = len(self._buckets)
        for _ in range(min(at_most, known)):
            tenant, bucket = self._buckets.popitem(last=False)
            if bucket.level(now_s) < bucket.burst:
                self._buckets[tenant] = bucket
        return known - len(self._buckets)

    def _admit(self, tenant: str, newcomers: TokenBucket, now_s: float) -> TokenBucket:
        """Return a new bucket for `tenant`, or at the bound the one that newcomers share."""
        self.sweep(now_s, SWEPT_PER_NEW_BUCKET)
        if len(self._buckets) >= self._max_buckets:
            return newcomers
        # The new bucket is a copy of the shared one, not a full one: otherwise a tenant that spent
        # the shared tokens would get a full burst again.
        bucket = self._buckets[tenant] = newcomers.copy()
        return bucket

    def _refusal(self, tenant: str, count: int, wait_s: float) -> RateLimited | InvalidRequest:
        # A retry can never succeed here, so this is no RateLimited.
        if count > self.burst:
            return InvalidRequest(
                f"{count} messages at once are more than tenant {tenant} may ever publish at once:"
                f" the burst is {self.burst} (CLEVRD_PUBLISH_BURST); send fewer at a time."
            )
        return RateLimited(
            tenant=tenant, rate_per_s=self.rate_per_s, burst=self.burst, retry_after_s=wait_s
        )
