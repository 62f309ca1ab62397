"""Decisions: why the daemon lately refused, slowed down, forgot or closed something, for operators.

A decision is noted when it begins; the same one within MERGE_S only raises its count. So nothing is
noted where nothing is refused, and a million refusals of one kind are one decision. The rules
themselves are where they are applied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Literal

from clevrd.errors import ClevrdError, RetryLater

Kind = Literal[
    "throttle", "window", "refusal", "eviction", "circuit", "memory", "disconnect", "operator"
]
Figures = Mapping[str, float]
NO_FIGURES: Final[Figures] = {}

# Decisions that are kept, at about 1 KB each; and for how long after they last held.
MAX_DECISIONS: Final = 2_000
KEPT_S: Final = 900.0
# A decision that is made again within this time goes on.
MERGE_S: Final = 10.0
# Windows are decided every 5 s: one that moves to and fro for a while is one decision.
WINDOW_MERGE_S: Final = 30.0
# Characters of a rule that are kept: a sentence may quote a client.
_MAX_RULE: Final = 400

# Kind, code, tenant, topic, credential, bound: what makes two decisions the same.
_Key = tuple[str, str, str, str, str, str]
# A portion and a kind; no portion for what concerns the whole daemon.
_Group = tuple[str | None, str]


class Decision:
    """One decision, which may still hold."""

    __slots__ = (
        *("began_s", "code", "count", "credential", "inputs", "is_open", "key", "kind"),
        *("last_s", "lasts_s", "rule", "tenant", "thresholds", "topic"),
    )

    def __init__(
        self, key: _Key, rule: str, inputs: Figures, thresholds: Figures, now_s: float
    ) -> None:
        self.key = key
        self.kind, self.code, self.tenant, self.topic, self.credential, _ = key
        self.rule = rule[:_MAX_RULE]
        # The figures that it was decided from when it began, or last changed; and their limits.
        self.inputs = inputs
        self.thresholds = thresholds
        # When it began and when it last held, on the loop's clock; and how often it did.
        self.began_s = self.last_s = now_s
        self.count = 1
        # Seconds behind the last time until it ends; None where it has no end of its own.
        self.lasts_s: float | None = None
        # Whether it holds until it is ended: nobody knows beforehand when that is. Changed by
        # `Decisions` only.
        self.is_open = False


class Decisions:
    """The decisions of the last minutes, a bounded number of them.

    Each portion of the memory has decisions of each kind by itself. Where there are too many, the
    largest of these groups loses its oldest, so that a tenant whose clients are refused in a
    thousand ways takes nothing from what others are to be told.
    """

    __slots__ = ("_by_key", "_count", "_groups", "_now_s", "_portion_of")

    def __init__(self, now_s: Callable[[], float], portion_of: Callable[[str], str]) -> None:
        """Make them.

        Args:
            now_s: the loop's clock.
            portion_of: returns the name of the portion that a tenant has a part in.
        """
        self._now_s = now_s
        self._portion_of = portion_of
        # Key -> the decision that goes on when the same happens again.
        self._by_key: dict[_Key, Decision] = {}
        # Each group's decisions, the oldest first; no group is empty.
        self._groups: dict[_Group, deque[Decision]] = {}
        self._count = 0

    def __len__(self) -> int:
        """Return how many are kept, perhaps some that are over by now."""
        return self._count

    def repeated(
        self,
        kind: Kind,
        code: str,
        tenant: str = "",
        topic: str = "",
        credential: str = "",
        *,
        bound: str = "",
        times: int = 1,
        within_s: float = MERGE_S,
    ) -> Decision | None:
        """Count what goes on with a decision, and return that; None where it is a new one.

        The caller then makes the figures of the new one, for `begin`.
        """
        found = self._by_key.get((kind, code, tenant, topic, credential, bound))
        if found is None:
            return None
        now_s = self._now_s()
        if now_s - found.last_s > within_s:
            return None
        found.count += times
        found.last_s = now_s
        return found

    def begin(
        self,
        kind: Kind,
        code: str,
        rule: str,
        tenant: str = "",
        topic: str = "",
        credential: str = "",
        *,
        bound: str = "",
        inputs: Figures = NO_FIGURES,
        thresholds: Figures = NO_FIGURES,
        lasts_s: float | None = None,
    ) -> Decision:
        """Note a new decision.

        Args:
            kind: the kind of rule.
            code: the rule's short name, for programs.
            rule: what was decided and by which rule, in a sentence.
            tenant: whom it concerns; empty for the whole daemon.
            topic: the topic that it concerns alone; empty for none.
            credential: the key, or the address, that it concerns alone; empty for none.
            bound: which of the bounds with this code it is; empty where there is one.
            inputs: the figures that it was decided from.
            thresholds: what they were compared with.
            lasts_s: seconds until it ends, if nothing repeats it.
        """
        now_s = self._now_s()
        key = (kind, code, tenant, topic, credential, bound)
        decision = Decision(key, rule, inputs, thresholds, now_s)
        decision.lasts_s = lasts_s
        name = (self._portion_of(tenant) if tenant else None, kind)
        while (group := self._groups.get(name)) and now_s - group[0].last_s > KEPT_S:
            self._drop_oldest(name)
        if self._count >= MAX_DECISIONS:
            self._drop_oldest(self._too_large(name))
        self._groups.setdefault(name, deque()).append(decision)
        self._by_key[key] = decision
        self._count += 1
        return decision

    def hold(self, decision: Decision) -> None:
        """Note that ``decision`` holds now, and until it is ended; it is kept so long."""
        decision.last_s = self._now_s()
        decision.lasts_s = None
        decision.is_open = True

    def end(self, decision: Decision) -> None:
        """Note that ``decision``, which was held, does not hold from now on."""
        decision.last_s = self._now_s()
        decision.lasts_s = 0.0
        decision.is_open = False

    def note_refusal(self, error: ClevrdError, times: int = 1) -> None:
        """Note a refusal, so many times."""
        code, tenant, credential, bound = error.code, error.tenant, error.credential, error.bound
        found = self.repeated("refusal", code, tenant, "", credential, bound=bound, times=times)
        if found is None:
            decision = self.begin(
                *("refusal", code, error.for_operators(), tenant, "", credential),
                bound=bound,
                inputs=error.inputs(),
                thresholds=error.thresholds(),
                lasts_s=error.retry_after_s if isinstance(error, RetryLater) else None,
            )
            decision.count = times

    def newest(self, tenant: str | None = None) -> Iterator[Decision]:
        """Return the decisions that are not too old, those first that held last.

        Args:
            tenant: whose, and those of the whole daemon; None for all.
        """
        too_old_s = self._now_s() - KEPT_S
        found = [
            decision
            for group in list(self._groups.values())
            for decision in group
            if decision.last_s >= too_old_s and (tenant is None or decision.tenant in ("", tenant))
        ]
        found.sort(key=_last_s, reverse=True)
        return iter(found)

    def _too_large(self, name: _Group) -> _Group:
        """Return the group called ``name`` if that has more than its part, else the largest."""
        # A flood is of one group, which is then found without a look at the others.
        if len(self._groups.get(name, ())) * len(self._groups) > MAX_DECISIONS:
            return name
        return max(self._groups, key=lambda each: len(self._groups[each]))

    def _drop_oldest(self, name: _Group) -> None:
        group = self._groups[name]
        gone = group.popleft()
        if not group:
            del self._groups[name]
        self._count -= 1
        if self._by_key.get(gone.key) is gone:
            del self._by_key[gone.key]


def _last_s(decision: Decision) -> float:
    return decision.last_s
