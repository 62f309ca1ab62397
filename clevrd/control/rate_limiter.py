"""The publish rates of tenants and keys, as token buckets. No clock here; no answer is rendered.

A bucket is refilled when it is used, not by a timer: over any t seconds at most burst + rate * t
are granted. The settings promise that sum, not a count for each calendar second.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final, Protocol

from clevrd.errors import InvalidRequest, RateLimited

# Buckets at most. One with its place in the map and a 20-byte name takes 280 bytes (tracemalloc),
# so the map ends at about 18 MB, whatever names a client makes up.
MAX_BUCKETS = 65_536

# Old buckets looked at for each new one, so that idle ones go faster than new ones come.
SWEPT_PER_NEW_BUCKET = 2

# Added to every wait, so that rounding can't turn the promised moment into another refusal: at 10^8
# s of uptime a double still resolves 15 ns.
WAIT_MARGIN_S = 1e-6


# The settings of the rates that are not a tenant's or a key's own.
_SETTINGS: Final = "CLEVRD_PUBLISH_RATE, CLEVRD_PUBLISH_BURST"


class RateLimits(Protocol):
    """The publish rate that a tenant or a key has for itself."""

    @property
    def publish_rate_per_s(self) -> float | None:
        """Messages a second; None where it has no rate of its own."""

    @property
    def publish_burst(self) -> int | None:
        """Messages at once beyond the rate; None for one second's."""


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
        return self._wait_s(count, now_s)

    def wait_s(self, count: int, now_s: float) -> float:
        """Return what `take` would, and take nothing."""
        if count <= self.level(now_s):
            return 0.0
        return math.inf if count > self.burst else self._wait_s(count, now_s)

    def _wait_s(self, count: int, now_s: float) -> float:
        there_at_s = self._level_at_s + (count - self._level) / self.rate_per_s
        return max(0.0, there_at_s - now_s) + WAIT_MARGIN_S

    def change(self, rate_per_s: float, burst: int, now_s: float) -> None:
        """Have another rate and burst from `now_s` on; the tokens stay, up to the new burst."""
        self._level = min(self.level(now_s), burst)
        if now_s > self._level_at_s:
            self._level_at_s = now_s
        self.rate_per_s = rate_per_s
        self.burst = burst

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
    """Token buckets: one per tenant, and one per key that has a rate of its own.

    A tenant without a rate of its own has the limiter's, and no bucket where that is 0. A publish
    is charged to its tenant and to its key, or to none of them.

    A full bucket equals a new one, so full buckets are forgotten. At the bound, when `max_buckets`
    buckets are not full, the tenants without a bucket share one; a tenant with a bucket is not
    affected, and neither is one with a rate of its own or a reserved name, which always gets a
    bucket: the configuration bounds their number. A bucket that is not full is never dropped, and a
    new bucket starts with the tokens that the shared one then holds. So over any t seconds each
    tenant is granted at most `burst + rate_per_s * t`, whatever names other clients make up.
    """

    __slots__ = ("_buckets", "_max_buckets", "_newcomers", "_reserved", "burst", "rate_per_s")

    def __init__(
        self,
        rate_per_s: float,
        burst: int = 0,
        *,
        max_buckets: int = MAX_BUCKETS,
        reserved: frozenset[str] = frozenset(),
    ) -> None:
        """Make a limiter that knows no tenant yet.

        Args:
            rate_per_s: publishes per second and tenant, finite; 0 means unlimited.
            burst: publishes that a tenant may make at once; 0 means a second's worth, at least 1.
            max_buckets: buckets at most, but for those of reserved names and of rates of one's own.
            reserved: tenants that never share a bucket.
        """
        if not 0.0 <= rate_per_s < math.inf:
            raise ValueError(f"rate_per_s must be 0 or more and finite, not {rate_per_s!r}")
        if burst < 0:
            raise ValueError(f"burst must not be negative, not {burst!r}")
        self.rate_per_s = rate_per_s
        self.burst = burst or _second_of(rate_per_s)
        self._max_buckets = max_buckets
        self._reserved = reserved
        # Buckets by tenant, or by tenant and key, in the order in which sweep() looks at them.
        self._buckets: OrderedDict[str | tuple[str, str], TokenBucket] = OrderedDict()
        # The bucket of tenants without one of their own: full, except for tokens that such tenants
        # took at the bound. None when publishing is unlimited.
        self._newcomers = TokenBucket(rate_per_s, self.burst) if rate_per_s > 0.0 else None

    def __len__(self) -> int:
        """Return how many buckets are remembered."""
        return len(self._buckets)

    def take(
        self,
        tenant: str,
        count: int,
        now_s: float,
        limits: RateLimits | None = None,
        key: str = "",
        key_limits: RateLimits | None = None,
    ) -> None:
        """Spend `count` publishes of the tenant's budget and of the key's, all or none.

        Args:
            tenant: the tenant's name, already validated.
            count: publishes, 0 or more.
            now_s: monotonic seconds.
            limits: the tenant's own; None where it has none.
            key: the key's name, which is its own within its tenant.
            key_limits: the key's own; None where it has none.

        Raises:
            RateLimited: a budget is short; the error says which, and how long to wait.
            InvalidRequest: `count` is above a burst, so it can never be granted at once.
        """
        bucket = self._of_tenant(tenant, limits, now_s)
        of_key = self._of_key(tenant, key, key_limits, now_s)
        if of_key is None:
            if bucket is not None and (wait_s := bucket.take(count, now_s)) > 0.0:
                raise self._refusal(bucket, count, now_s, wait_s, tenant, limits, "", key)
            return
        wait_s = 0.0 if bucket is None else bucket.wait_s(count, now_s)
        key_wait_s = of_key.wait_s(count, now_s)
        if bucket is not None and wait_s > 0.0 and wait_s >= key_wait_s:
            raise self._refusal(bucket, count, now_s, wait_s, tenant, limits, "", key)
        if key_wait_s > 0.0:
            raise self._refusal(of_key, count, now_s, key_wait_s, tenant, key_limits, key, key)
        of_key.take(count, now_s)
        if bucket is not None:
            bucket.take(count, now_s)

    def left(
        self,
        tenant: str,
        now_s: float,
        limits: RateLimits | None = None,
        key: str = "",
        key_limits: RateLimits | None = None,
    ) -> float:
        """Return how many publishes `take` would grant now; `math.inf` without a limit."""
        bucket = self._of_tenant(tenant, limits, now_s)
        of_key = self._of_key(tenant, key, key_limits, now_s)
        return min(
            math.inf if bucket is None else math.floor(bucket.level(now_s)),
            math.inf if of_key is None else math.floor(of_key.level(now_s)),
        )

    def sweep(self, now_s: float, at_most: int) -> int:
        """Forget full buckets among the next `at_most`, and return how many were forgotten.

        Each new tenant makes it run; a timer calls it too, so that a quiet daemon gives the memory
        back. Looking at a bucket takes about 0.3 us.
        """
        known = len(self._buckets)
        for _ in range(min(at_most, known)):
            name, bucket = self._buckets.popitem(last=False)
            if bucket.level(now_s) < bucket.burst:
                self._buckets[name] = bucket
        return known - len(self._buckets)

    def _of_tenant(
        self, tenant: str, limits: RateLimits | None, now_s: float
    ) -> TokenBucket | None:
        """Return the tenant's bucket; None where nothing limits it."""
        if limits is not None and limits.publish_rate_per_s is not None:
            return self._own(tenant, limits.publish_rate_per_s, limits.publish_burst, now_s)
        newcomers = self._newcomers
        if newcomers is None:
            return None
        bucket = self._buckets.get(tenant)
        if bucket is None:
            return self._admit(tenant, newcomers, now_s)
        if bucket.rate_per_s != self.rate_per_s or bucket.burst != self.burst:
            # It had a rate of its own before.
            bucket.change(self.rate_per_s, self.burst, now_s)
        return bucket

    def _of_key(
        self, tenant: str, key: str, limits: RateLimits | None, now_s: float
    ) -> TokenBucket | None:
        """Return the key's bucket; None where it has no rate of its own."""
        if limits is None or limits.publish_rate_per_s is None:
            return None
        return self._own((tenant, key), limits.publish_rate_per_s, limits.publish_burst, now_s)

    def _own(
        self, name: str | tuple[str, str], rate_per_s: float, burst: int | None, now_s: float
    ) -> TokenBucket:
        """Return the bucket of a rate of one's own, which may have changed since its last use."""
        if burst is None:
            burst = _second_of(rate_per_s)
        bucket = self._buckets.get(name)
        if bucket is None:
            # No sweep here: it would forget the tenant's bucket, perhaps still full, which `take`
            # has found before its key's.
            bucket = self._buckets[name] = TokenBucket(rate_per_s, burst)
        elif bucket.rate_per_s != rate_per_s or bucket.burst != burst:
            bucket.change(rate_per_s, burst, now_s)
        return bucket

    def reserve(self, names: frozenset[str]) -> None:
        """Let the tenants in ``names`` share a bucket with nobody from now on."""
        self._reserved = names

    def _admit(self, tenant: str, newcomers: TokenBucket, now_s: float) -> TokenBucket:
        """Return a new bucket for `tenant`, or at the bound the one that newcomers share."""
        self.sweep(now_s, SWEPT_PER_NEW_BUCKET)
        if tenant in self._reserved:
            bucket = self._buckets[tenant] = TokenBucket(self.rate_per_s, self.burst)
            return bucket
        if len(self._buckets) >= self._max_buckets:
            return newcomers
        # The new bucket is a copy of the shared one, not a full one: otherwise a tenant that spent
        # the shared tokens would get a full burst again.
        bucket = self._buckets[tenant] = newcomers.copy()
        return bucket

    def _refusal(
        self,
        bucket: TokenBucket,
        count: int,
        now_s: float,
        wait_s: float,
        tenant: str,
        limits: RateLimits | None,
        key: str,
        credential: str,
    ) -> RateLimited | InvalidRequest:
        is_own = limits is not None and limits.publish_rate_per_s is not None
        owner = "the key" if key else "the tenant"
        setting = f"publish_rate_per_s of {owner}" if is_own else _SETTINGS
        # A retry can never succeed here, so this is no RateLimited.
        if count > bucket.burst:
            who = f"the key {key} of tenant {tenant}" if key else f"tenant {tenant}"
            burst_setting = f"publish_burst of {owner}" if is_own else "CLEVRD_PUBLISH_BURST"
            return InvalidRequest(
                f"{count} messages at once are more than {who} may ever publish at once:"
                f" the burst is {bucket.burst} ({burst_setting}); send fewer at a time."
            )
        return RateLimited(
            tenant=tenant,
            rate_per_s=bucket.rate_per_s,
            burst=bucket.burst,
            retry_after_s=wait_s,
            left=math.floor(bucket.level(now_s)),
            key=key,
            setting=setting,
            credential=credential,
        )


def _second_of(rate_per_s: float) -> int:
    """Return the burst that is one second's messages, at least 1."""
    return max(1, math.ceil(rate_per_s))
