"""The publish budget: what it grants, what it refuses, and what it remembers."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from conftest import FakeClock
from hypothesis import given
from hypothesis import strategies as st

from clevrd.control.rate_limiter import RateLimiter, TokenBucket
from clevrd.errors import InvalidRequest, RateLimited

RATES = st.floats(min_value=0.01, max_value=1e6)
BURSTS = st.integers(min_value=1, max_value=50)
PAUSES = st.one_of(st.just(0.0), st.floats(min_value=0.0, max_value=10.0))


class Limits(NamedTuple):
    """The rate that a tenant or a key has for itself."""

    publish_rate_per_s: float
    publish_burst: int | None = None


@dataclass(frozen=True)
class Ask:
    """One attempt in a random schedule."""

    tenant: str
    count: int
    pause_s: float


ASKS = st.lists(
    st.builds(Ask, tenant=st.sampled_from("abcdef"), count=st.integers(0, 8), pause_s=PAUSES),
    max_size=60,
)


def is_granted(
    limiter: RateLimiter,
    tenant: str,
    count: int,
    now_s: float,
    limits: Limits | None = None,
    key: str = "",
    key_limits: Limits | None = None,
) -> bool:
    """Ask for ``count`` publishes and say whether the tenant got them."""
    try:
        limiter.take(tenant, count, now_s, limits, key, key_limits)
    except (RateLimited, InvalidRequest):
        return False
    return True


def granted_of(
    limiter: RateLimiter,
    tenant: str,
    now_s: float,
    at_most: int = 1000,
    limits: Limits | None = None,
    key: str = "",
    key_limits: Limits | None = None,
) -> int:
    """Take one publish after the other until refused, and count them."""
    for granted in range(at_most):
        if not is_granted(limiter, tenant, 1, now_s, limits, key, key_limits):
            return granted
    return at_most


def assert_never_over(grants: list[tuple[float, int]], rate_per_s: float, burst: int) -> None:
    """Check every window that starts and ends with a grant; no other window can be worse."""
    for first, (start_s, _) in enumerate(grants):
        total = 0
        for at_s, count in grants[first:]:
            total += count
            allowed = burst + rate_per_s * (at_s - start_s)
            assert total <= allowed + 1e-6 * max(1.0, allowed)


def test_full_bucket_grants_its_burst_at_once_and_no_more(clock: FakeClock) -> None:
    """What was saved up can be spent in one moment; the next publish has to wait."""
    bucket = TokenBucket(rate_per_s=10.0, burst=3)

    waits = [bucket.take(1, clock()) for _ in range(4)]

    assert waits[:3] == [0.0, 0.0, 0.0]
    assert waits[3] == pytest.approx(0.1, abs=1e-5)


def test_bucket_regains_its_rate_and_stops_at_its_burst(clock: FakeClock) -> None:
    """Half a second at 10/s is five tokens; an hour is still no more than the burst."""
    bucket = TokenBucket(rate_per_s=10.0, burst=20)
    bucket.take(20, clock())

    level_soon = bucket.level(clock.advance(0.5))
    level_late = bucket.level(clock.advance(3600.0))

    assert level_soon == pytest.approx(5.0)
    assert level_late == 20


def test_refusal_takes_nothing(clock: FakeClock) -> None:
    """A batch that does not fit leaves the tokens for a smaller one."""
    bucket = TokenBucket(rate_per_s=1.0, burst=10)
    bucket.take(7, clock())

    refused_wait_s = bucket.take(4, clock())

    assert refused_wait_s == pytest.approx(1.0, abs=1e-5)
    assert bucket.take(3, clock()) == 0.0


def test_asking_for_more_than_the_burst_is_never_granted(clock: FakeClock) -> None:
    """No wait is long enough for more than the bucket can hold, and it says so."""
    bucket = TokenBucket(rate_per_s=1000.0, burst=10)

    wait_s = bucket.take(11, clock())

    assert wait_s == math.inf
    assert bucket.level(clock()) == 10


def test_rounding_does_not_break_the_promise() -> None:
    """0.1 + (3 / 7 - 0.1) is less than 3 / 7 in doubles: the wait makes up for it."""
    bucket = TokenBucket(rate_per_s=7.0, burst=3)
    bucket.take(3, 0.0)

    wait_s = bucket.take(3, 0.1)

    assert bucket.take(3, 0.1 + wait_s) == 0.0


def test_clock_going_backwards_grants_nothing(clock: FakeClock) -> None:
    """A moment before the last grant adds no tokens, then or when time has caught up."""
    bucket = TokenBucket(rate_per_s=10.0, burst=5)
    bucket.take(5, clock())
    spent_at_s = clock()

    wait_s = bucket.take(1, clock.advance(-100.0))
    level_then = bucket.level(spent_at_s)

    assert wait_s == pytest.approx(100.1, abs=1e-5)
    assert level_then == 0.0


def test_grant_under_a_backwards_clock_does_not_move_the_bucket_back(clock: FakeClock) -> None:
    """Tokens that were left may be taken; the time until the clock catches up is not paid twice."""
    bucket = TokenBucket(rate_per_s=10.0, burst=5)
    bucket.take(3, clock())

    wait_s = bucket.take(2, clock.advance(-100.0))

    assert wait_s == 0.0
    assert bucket.level(clock.advance(100.0)) == 0.0


def test_moment_that_is_not_a_number_grants_nothing() -> None:
    """A broken clock neither refills a bucket nor breaks it."""
    bucket = TokenBucket(rate_per_s=10.0, burst=5)
    bucket.take(5, 1.0)

    level = bucket.level(math.nan)

    assert level == 0.0
    assert bucket.level(1.1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rate_per_s", "burst"), [(0.0, 1), (-1.0, 1), (math.nan, 1), (math.inf, 1), (1.0, 0)]
)
def test_bucket_refuses_senseless_settings(rate_per_s: float, burst: int) -> None:
    """A bucket that could never refill, or holds nothing, is a mistake of its maker."""
    with pytest.raises(ValueError, match="must be"):
        TokenBucket(rate_per_s, burst)


def test_negative_count_is_refused_loudly() -> None:
    """Taking less than nothing would put tokens in."""
    bucket = TokenBucket(rate_per_s=1.0, burst=1)

    with pytest.raises(ValueError, match="negative"):
        bucket.take(-1, 0.0)


@given(rate_per_s=RATES, burst=BURSTS, asks=ASKS)
def test_bucket_never_grants_more_than_burst_plus_rate(
    rate_per_s: float, burst: int, asks: list[Ask]
) -> None:
    """Over any t seconds of any schedule at most burst + rate * t are granted."""
    bucket = TokenBucket(rate_per_s, burst)
    grants: list[tuple[float, int]] = []
    now_s = 0.0

    for ask in asks:
        now_s += ask.pause_s
        if bucket.take(ask.count, now_s) == 0.0:
            grants.append((now_s, ask.count))

    assert_never_over(grants, rate_per_s, burst)


@given(rate_per_s=RATES, burst=BURSTS, asks=ASKS, now_s=st.floats(0.0, 1e8))
def test_promised_wait_is_long_enough_and_not_too_long(
    rate_per_s: float, burst: int, asks: list[Ask], now_s: float
) -> None:
    """Who comes back after the wait is served; just before it, there was not enough."""
    bucket = TokenBucket(rate_per_s, burst)

    for ask in asks:
        now_s += ask.pause_s
        wait_s = bucket.take(ask.count, now_s)
        if 0.0 < wait_s < math.inf:
            assert bucket.copy().level(now_s + wait_s * 0.99 - 2e-6) < ask.count
            assert bucket.copy().take(ask.count, now_s + wait_s) == 0.0


def test_unlimited_grants_everything_and_remembers_nobody() -> None:
    """Rate 0 is the default: no budget, no bucket."""
    limiter = RateLimiter(0.0)

    granted = granted_of(limiter, "a", 0.0)

    assert granted == 1000
    assert len(limiter) == 0


@pytest.mark.parametrize(("rate_per_s", "burst"), [(0.2, 1), (1.0, 1), (2.5, 3), (100.0, 100)])
def test_burst_zero_means_one_second_of_the_rate(rate_per_s: float, burst: int) -> None:
    """Without a burst of its own a limit allows a second's worth at once, at least 1."""
    limiter = RateLimiter(rate_per_s, 0)

    granted = granted_of(limiter, "a", 0.0)

    assert (limiter.burst, granted) == (burst, burst)


def test_refused_tenant_learns_which_limit_and_how_long(clock: FakeClock) -> None:
    """The error names tenant, rate, burst and wait, and renders as Retry-After."""
    limiter = RateLimiter(rate_per_s=0.5, burst=2)
    granted_of(limiter, "acme", clock())

    with pytest.raises(RateLimited) as caught:
        limiter.take("acme", 1, clock())

    error = caught.value
    assert (error.tenant, error.rate_per_s, error.burst) == ("acme", 0.5, 2)
    assert error.retry_after_s == pytest.approx(2.0, abs=1e-5)
    assert dict(error.headers())["RateLimit-Policy"] == '"publish";q=2;w=4'


def test_more_than_the_burst_at_once_is_not_called_retryable(clock: FakeClock) -> None:
    """Telling a client to retry what can never succeed would keep it retrying for ever."""
    limiter = RateLimiter(rate_per_s=10.0, burst=5)

    with pytest.raises(InvalidRequest, match=r"6 messages at once.*burst is 5") as caught:
        limiter.take("acme", 6, clock())

    assert not caught.value.retryable
    assert granted_of(limiter, "acme", clock()) == 5


def test_tenants_do_not_share_a_budget(clock: FakeClock) -> None:
    """One tenant's flood costs another nothing."""
    limiter = RateLimiter(rate_per_s=1.0, burst=3)
    granted_of(limiter, "flood", clock())

    granted = granted_of(limiter, "quiet", clock())

    assert granted == 3


def test_idle_tenants_are_forgotten_as_new_ones_come(clock: FakeClock) -> None:
    """A full bucket says nothing a new one would not, so visitors don't add up."""
    limiter = RateLimiter(rate_per_s=1.0, burst=5)

    for visitor in range(1000):
        limiter.take(f"visitor-{visitor}", 1, clock.advance(1.0))

    assert len(limiter) <= 3


def test_sweep_forgets_the_full_and_keeps_the_spent(clock: FakeClock) -> None:
    """A timer gives memory back without giving anybody a fresh budget."""
    limiter = RateLimiter(rate_per_s=1.0, burst=5)
    limiter.take("idle", 1, clock())
    limiter.take("busy", 5, clock.advance(0.5))

    forgotten = limiter.sweep(clock.advance(1.0), at_most=100)

    assert (forgotten, len(limiter)) == (1, 1)
    assert granted_of(limiter, "busy", clock()) == 1
    assert granted_of(limiter, "idle", clock()) == 5


def test_sweep_goes_round_all_buckets(clock: FakeClock) -> None:
    """Small sweeps reach every bucket, also behind ones that stay."""
    limiter = RateLimiter(rate_per_s=1.0, burst=10)
    limiter.take("spent", 10, clock())
    limiter.take("idle", 1, clock())
    clock.advance(2.0)

    forgotten = [limiter.sweep(clock(), at_most=1) for _ in range(3)]

    assert forgotten == [0, 1, 0]


def test_sweep_looks_at_as_many_as_it_is_told_to(clock: FakeClock) -> None:
    """Whoever calls it decides how long it may take."""
    limiter = RateLimiter(rate_per_s=1.0, burst=10)
    for visitor in range(5):
        limiter.take(f"visitor-{visitor}", 1, clock())
    clock.advance(2.0)

    forgotten = [limiter.sweep(clock(), at_most=3) for _ in range(2)]

    assert forgotten == [3, 2]


def test_map_of_tenants_never_grows_over_its_bound(clock: FakeClock) -> None:
    """However many names are made up, only so many are remembered."""
    limiter = RateLimiter(rate_per_s=0.001, burst=5, max_buckets=10)

    for invented in range(1000):
        is_granted(limiter, f"invented-{invented}", 1, clock())

    assert len(limiter) == 10


def test_at_the_bound_known_tenants_notice_nothing(clock: FakeClock) -> None:
    """A flood of new names neither resets a spent budget nor spends a known tenant's."""
    limiter = RateLimiter(rate_per_s=0.001, burst=5, max_buckets=2)
    granted_of(limiter, "spent", clock())
    limiter.take("known", 1, clock())

    for invented in range(100):
        is_granted(limiter, f"invented-{invented}", 1, clock())

    assert granted_of(limiter, "spent", clock()) == 0
    assert granted_of(limiter, "known", clock()) == 4


def test_at_the_bound_new_tenants_share_one_budget(clock: FakeClock) -> None:
    """Names beyond the bound together get what one tenant gets."""
    limiter = RateLimiter(rate_per_s=0.001, burst=5, max_buckets=2)
    limiter.take("a", 1, clock())
    limiter.take("b", 1, clock())

    granted = sum(granted_of(limiter, f"invented-{n}", clock()) for n in range(100))

    assert granted == 5


def test_own_bucket_after_the_bound_does_not_start_afresh(clock: FakeClock) -> None:
    """Who spent from the shared budget can't spend the same burst again from one of his own."""
    limiter = RateLimiter(rate_per_s=1.0, burst=5, max_buckets=1)
    limiter.take("first", 1, clock())
    granted_while_full = granted_of(limiter, "late", clock())
    clock.advance(1.0)

    granted_after = granted_of(limiter, "late", clock())

    assert len(limiter) == 1
    assert (granted_while_full, granted_after) == (5, 1)


@given(rate_per_s=RATES, burst=BURSTS, asks=ASKS, max_buckets=st.integers(min_value=1, max_value=4))
def test_no_tenant_gains_by_filling_the_map(
    rate_per_s: float, burst: int, asks: list[Ask], max_buckets: int
) -> None:
    """Per tenant, burst + rate * t holds over any t, with sweeps and the bound in play."""
    limiter = RateLimiter(rate_per_s, burst, max_buckets=max_buckets)
    grants: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    now_s = 0.0

    for ask in asks:
        now_s += ask.pause_s
        if is_granted(limiter, ask.tenant, ask.count, now_s):
            grants[ask.tenant].append((now_s, ask.count))

    assert len(limiter) <= max_buckets
    for of_tenant in grants.values():
        assert_never_over(of_tenant, rate_per_s, burst)


@pytest.mark.parametrize(
    ("rate_per_s", "burst"), [(-1.0, 0), (math.nan, 0), (math.inf, 0), (1.0, -1), (0.0, -1)]
)
def test_limiter_refuses_senseless_settings(rate_per_s: float, burst: int) -> None:
    """A limit that is not a number of messages is a mistake of its maker, found at the start."""
    with pytest.raises(ValueError, match="must"):
        RateLimiter(rate_per_s, burst)


# --- rates of one's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("daemon_rate", [0.0, 1.0])
def test_tenant_with_a_rate_of_its_own_has_that_and_no_other(
    daemon_rate: float, clock: FakeClock
) -> None:
    """Its entry in the file says more than the setting for all, be that a rate or none."""
    limiter = RateLimiter(daemon_rate)

    granted = granted_of(limiter, "acme", clock(), limits=Limits(10.0, 7))
    waited = granted_of(limiter, "acme", clock.advance(0.2), limits=Limits(10.0, 7))

    assert (granted, waited) == (7, 2)


def test_publish_is_charged_to_tenant_and_key_or_to_none(clock: FakeClock) -> None:
    """A key at its limit costs its tenant nothing, and a tenant at its limit costs no key."""
    limiter = RateLimiter(0.0)
    tenant, key = Limits(1.0, 5), Limits(1.0, 3)

    by_key = granted_of(limiter, "acme", clock(), limits=tenant, key="web", key_limits=key)
    refused = granted_of(limiter, "acme", clock(), limits=tenant, key="web", key_limits=key)
    by_other_key = granted_of(limiter, "acme", clock(), limits=tenant, key="ios")
    left = limiter.left("acme", clock.advance(2.0), tenant, "web", key)

    assert (by_key, refused, by_other_key) == (3, 0, 2)
    assert left == 2


def test_key_of_one_name_is_another_key_in_another_tenant(clock: FakeClock) -> None:
    """Two tenants may each call a key web."""
    limiter = RateLimiter(0.0)
    granted_of(limiter, "a", clock(), key="web", key_limits=Limits(1.0, 2))

    granted = granted_of(limiter, "b", clock(), key="web", key_limits=Limits(1.0, 2))

    assert granted == 2


def test_refusal_names_the_key_whose_budget_is_short(clock: FakeClock) -> None:
    """An operator must not raise the tenant's limit where the key's is meant, or the other way."""
    limiter = RateLimiter(0.0)
    limits, key_limits = Limits(10.0, 10), Limits(2.0, 4)
    limiter.take("acme", 3, clock(), limits, "web", key_limits)

    with pytest.raises(RateLimited) as of_key:
        limiter.take("acme", 2, clock(), limits, "web", key_limits)
    with pytest.raises(RateLimited) as of_tenant:
        limiter.take("acme", 8, clock(), limits, "ios")

    assert str(of_key.value) == (
        "The key web of tenant acme is over its publish rate of 2 messages per second with a burst"
        " of 4 (publish_rate_per_s of the key), of which 1 are left; slow down and retry in 0.5 s."
    )
    assert dict(of_key.value.headers()) == {
        "Retry-After": "1",
        "RateLimit-Policy": '"publish-key";q=4;w=2',
        "RateLimit": '"publish-key";r=1;t=1',
    }
    assert str(of_tenant.value).startswith("Tenant acme is over its publish rate of 10 messages")
    assert dict(of_tenant.value.headers())["RateLimit"] == '"publish";r=7;t=1'


def test_more_than_a_keys_burst_at_once_names_the_key(clock: FakeClock) -> None:
    """What can never be granted is no reason to wait."""
    limiter = RateLimiter(0.0)

    with pytest.raises(InvalidRequest, match=r"key web of tenant acme.*publish_burst of the key"):
        limiter.take("acme", 5, clock(), None, "web", Limits(2.0, 4))


@pytest.mark.parametrize("after", [Limits(5.0, 100), Limits(5.0, 3), Limits(0.5, 10)])
def test_changed_limit_gives_no_fresh_burst(after: Limits, clock: FakeClock) -> None:
    """What was spent under the old limit stays spent: a reload is no way to publish more."""
    limiter = RateLimiter(0.0)
    granted_of(limiter, "acme", clock(), limits=Limits(1.0, 10))

    at_once = granted_of(limiter, "acme", clock(), limits=after)
    soon = granted_of(limiter, "acme", clock.advance(0.5), limits=after)

    assert (at_once, soon) == (0, int(0.5 * after.publish_rate_per_s))


def test_tenant_that_loses_its_own_rate_has_the_daemons(clock: FakeClock) -> None:
    """A bucket goes on under the setting for all when the entry in the file goes."""
    limiter = RateLimiter(2.0, 4)
    granted_of(limiter, "acme", clock(), limits=Limits(100.0, 100))

    at_once = granted_of(limiter, "acme", clock())
    later = granted_of(limiter, "acme", clock.advance(60.0))

    assert (at_once, later) == (0, 4)


def test_made_up_names_take_no_budget_of_known_tenants(clock: FakeClock) -> None:
    """At the bound a reserved name and a rate of one's own still have buckets of their own."""
    limiter = RateLimiter(0.001, 5, max_buckets=2, reserved=frozenset({"default-tenant"}))
    for invented in range(100):
        is_granted(limiter, f"invented-{invented}", 1, clock())

    reserved = granted_of(limiter, "default-tenant", clock())
    configured = granted_of(limiter, "acme", clock(), limits=Limits(1.0, 6))

    assert (reserved, configured) == (5, 6)


@dataclass(frozen=True)
class KeyedAsk:
    """One attempt of a tenant by a key, under the limits that hold at that time."""

    tenant: str
    key: str
    count: int
    pause_s: float


@given(
    asks=st.lists(
        st.builds(
            KeyedAsk,
            tenant=st.sampled_from("ab"),
            key=st.sampled_from(["", "k", "l"]),
            count=st.integers(0, 6),
            pause_s=PAUSES,
        ),
        max_size=60,
    ),
    tenant_rate=st.tuples(RATES, BURSTS),
    key_rate=st.tuples(RATES, BURSTS),
    max_buckets=st.integers(min_value=1, max_value=4),
)
def test_neither_tenant_nor_key_is_ever_over_its_rate(
    asks: list[KeyedAsk],
    tenant_rate: tuple[float, int],
    key_rate: tuple[float, int],
    max_buckets: int,
) -> None:
    """Over any t seconds a tenant and each of its keys have burst + rate * t at most."""
    limiter = RateLimiter(0.0, max_buckets=max_buckets)
    limits, key_limits = Limits(*tenant_rate), Limits(*key_rate)
    grants: defaultdict[tuple[str, str | None], list[tuple[float, int]]] = defaultdict(list)
    now_s = 0.0

    for ask in asks:
        now_s += ask.pause_s
        keyed = (ask.key, key_limits) if ask.key else ("", None)
        left = limiter.left(ask.tenant, now_s, limits, *keyed)
        was_granted = is_granted(limiter, ask.tenant, ask.count, now_s, limits, *keyed)
        assert was_granted == (ask.count <= left)
        if was_granted:
            grants[ask.tenant, None].append((now_s, ask.count))
            if ask.key:
                grants[ask.tenant, ask.key].append((now_s, ask.count))

    for (_, key), granted in grants.items():
        assert_never_over(granted, *(tenant_rate if key is None else key_rate))


def test_reserved_names_share_no_bucket_with_names_that_are_made_up(clock: FakeClock) -> None:
    """Also those that are reserved later, as tenants that a reload brings."""
    limiter = RateLimiter(rate_per_s=0.001, burst=2, max_buckets=2)
    for name in ("x", "y", "z"):
        limiter.take(name, 2, clock())
    limiter.reserve(frozenset({"acme"}))

    limiter.take("acme", 2, clock())

    with pytest.raises(RateLimited):
        limiter.take("w", 1, clock())
