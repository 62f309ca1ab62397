"""Portions: each tenant's guaranteed part of the bounds that all have in common, and its use.

How the rings of all portions stay within their bound: ring_sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from clevrd.core.budgets import Budget, Pool
from clevrd.core.recent_cache import RecentMessageCache

# The name of the portion that all tenants without one of their own have together; no tenant can be
# called so.
OTHERS: Final = ""


class Weights:
    """The division of the bounds that all tenants have in common.

    Each tenant in ``by_tenant`` has a portion of its own. All other tenants together have one,
    with the weight ``others``, so that a client that makes up names gets no more by that.
    """

    __slots__ = ("_total", "by_tenant", "others")

    def __init__(self, by_tenant: Mapping[str, float], others: float) -> None:
        self.by_tenant = by_tenant
        self.others = others
        self._total = sum(by_tenant.values()) + others

    def portion_of(self, tenant: str) -> str:
        """Return the name of the portion that ``tenant`` has or has a part in."""
        return tenant if tenant in self.by_tenant else OTHERS

    def ratio_of(self, portion: str) -> float:
        """Return the part of the whole, 0..1, that a portion is guaranteed."""
        weight = self.by_tenant.get(portion, 0.0) if portion else self.others
        return weight / self._total if self._total else 0.0


# One portion for all tenants together.
ONE_PORTION: Final = Weights({}, 1.0)


class RingOwner(Protocol):
    """A topic, as far as the size of its ring goes."""

    ring: RecentMessageCache
    size_class: int

    def trim(self, max_bytes: int, now_s: float, /) -> int:
        """Cut the ring to ``max_bytes``, as far as possible; return how many came free."""

    def spare(self, max_bytes: int, now_s: float, /) -> int:
        """Cut the ring to ``max_bytes``, but nothing that a reader waits for; return the same."""


class Portion:
    """The guarantees and the use of one tenant, or of all without a portion of their own."""

    __slots__ = (
        "guaranteed_ring_bytes",
        "guaranteed_topics",
        "kept",
        "name",
        "ring_bytes",
        "rings",
        "texts",
        "topics",
    )

    def __init__(
        self, name: str, guaranteed_ring_bytes: int, kept: Budget, texts: Budget | None = None
    ) -> None:
        # The tenant's name, or OTHERS.
        self.name = name
        # Both guarantees are changed by Portions only.
        self.guaranteed_ring_bytes = guaranteed_ring_bytes
        self.guaranteed_topics = 0
        # Frames that lagging readers keep beyond the rings, and messages made into other forms.
        self.kept = kept
        self.texts = texts or Budget(0)
        # Bytes that the rings hold; changed by RingSizes, and by TopicManager.extend in place of a
        # call.
        self.ring_bytes = 0
        # Bit length of a ring's size -> the topics with rings of that order; dicts as ordered sets.
        # No ring that is empty is in here. Changed by RingSizes only.
        self.rings: dict[int, dict[RingOwner, None]] = {}
        # How many topics there are, those without a message included; changed by TopicManager only.
        self.topics = 0

    @property
    def guaranteed_bytes(self) -> int:
        """Bytes that are guaranteed for rings, kept frames and other forms together."""
        kept, texts = self.kept.guaranteed_bytes, self.texts.guaranteed_bytes
        return self.guaranteed_ring_bytes + kept + texts

    @property
    def used_bytes(self) -> int:
        """Bytes that rings, kept frames and other forms take together."""
        return self.ring_bytes + self.kept.taken_bytes + self.texts.taken_bytes

    @property
    def borrowed_bytes(self) -> int:
        """Bytes that any of these take beyond what is guaranteed for it."""
        rings = max(0, self.ring_bytes - self.guaranteed_ring_bytes)
        return rings + max(0, self.kept.borrowed_bytes) + max(0, self.texts.borrowed_bytes)


class Portions:
    """All portions that were ever needed, by name."""

    __slots__ = ("_by_name", "_kept", "_max_ring_bytes", "_max_topics", "_texts", "weights")

    def __init__(
        self,
        weights: Weights,
        *,
        max_ring_bytes: int,
        kept: Pool,
        texts: Pool,
        max_topics: int,
        max_topics_per_tenant: int,
    ) -> None:
        self.weights = weights
        self._max_ring_bytes = max_ring_bytes
        self._kept = kept
        self._texts = texts
        # Topics that there may be: of all tenants together, and of each.
        self._max_topics = max_topics, max_topics_per_tenant
        self._by_name: dict[str, Portion] = {}

    def __iter__(self) -> Iterator[Portion]:
        """Iterate over the portions that there are."""
        return iter(self._by_name.values())

    def of(self, tenant: str) -> Portion:
        """Return the portion that ``tenant`` has, or has a part in."""
        name = self.weights.portion_of(tenant)
        portion = self._by_name.get(name)
        if portion is None:
            portion = Portion(name, 0, self._kept.budget(0), self._texts.budget(0))
            self._by_name[name] = portion
            self._set_guarantees(portion)
        return portion

    def reserved_topics(self) -> int:
        """Return how many topics are reserved for tenants that have fewer than is guaranteed."""
        reserved = 0
        for name in self.weights.by_tenant:
            has = self._by_name[name].topics if name in self._by_name else 0
            reserved += max(0, self._guaranteed_topics(name) - has)
        return reserved

    def share_out(self, weights: Weights) -> set[str]:
        """Divide by other ``weights``; return the tenants whose topics have another portion now."""
        moved = self.weights.by_tenant.keys() ^ weights.by_tenant.keys()
        self.weights = weights
        for portion in self._by_name.values():
            self._set_guarantees(portion)
        return set(moved)

    def forget_unused(self) -> None:
        """Forget the portions of tenants that have none of their own any more."""
        for name, portion in list(self._by_name.items()):
            if name != OTHERS and name not in self.weights.by_tenant and not portion.topics:
                del self._by_name[name]
                self._kept.remove(portion.kept)
                self._texts.remove(portion.texts)

    def _set_guarantees(self, portion: Portion) -> None:
        ratio = self.weights.ratio_of(portion.name)
        portion.guaranteed_ring_bytes = int(self._max_ring_bytes * ratio)
        portion.kept.guaranteed_bytes = int(self._kept.max_bytes * ratio)
        portion.texts.guaranteed_bytes = int(self._texts.max_bytes * ratio)
        portion.guaranteed_topics = self._guaranteed_topics(portion.name)

    def _guaranteed_topics(self, name: str) -> int:
        """Return how many topics a portion is guaranteed.

        A topic can't be given back, so what is guaranteed is not lent. Half of all topics are
        divided like this; anybody may make the others. Tenants without a portion of their own are
        guaranteed none.
        """
        if name == OTHERS:
            return 0
        max_topics, per_tenant = self._max_topics
        return min(per_tenant, int(max_topics * self.weights.ratio_of(name) / 2))
