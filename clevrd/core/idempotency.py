"""Which publishes are repeats, and what the first one was answered. No clock and no waiting here.

Header: draft-ietf-httpapi-idempotency-key-header; its strings: RFC 8941 §3.3.3.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final, Generic, TypeVar

from clevrd.core.portions import ONE_PORTION, Weights
from clevrd.errors import InvalidRequest

# A UUID has 36, a hash in hex 128; visible ASCII and spaces, which is what the header can hold.
MAX_KEY_CHARS: Final = 255

EXPECTED_KEY: Final = f"1 to {MAX_KEY_CHARS} printable ASCII characters"

# The memory that a key and its answer take at most: 0.9 KB for a key of 255 characters, 0.7 for a
# UUID (tracemalloc), and the topic's name.
KEY_COST_BYTES: Final = 1_024

# Each new key pays for looking at two old ones, so those whose time is up go faster than new ones
# come.
SWEPT_PER_NEW_KEY: Final = 2

# Keys that one portion loses before it is looked again who has the most: a look takes 0.2 us for
# each portion.
_PUSHED_OUT_PER_LOOK: Final = 16

# Tenant, topic and key: a tuple, because joined strings of different ones can be equal.
Slot = tuple[str, str, str]
AnswerT = TypeVar("AnswerT")

_QUOTED: Final = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_ESCAPED: Final = re.compile(r"\\(.)")


def check_key(key: str) -> None:
    """Raise InvalidRequest unless ``key`` is 1 to 255 printable ASCII characters."""
    if not (0 < len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        raise InvalidRequest(f"The idempotency key must be {EXPECTED_KEY}.")


def key_of_header(value: str) -> str:
    """Return the key in an ``Idempotency-Key`` field: the quoted string, or the bare value.

    Raises:
        InvalidRequest: it is no key, or begins with a quote and is not one quoted string.
    """
    if value.startswith('"'):
        quoted = _QUOTED.fullmatch(value)
        if quoted is None:
            raise InvalidRequest(
                f'The header Idempotency-Key must be one string, "KEY", of {EXPECTED_KEY}.'
            )
        value = _ESCAPED.sub(r"\1", quoted[1])
    check_key(value)
    return value


class _Remembered(Generic[AnswerT]):
    __slots__ = ("answer", "data_hash", "until_s")

    def __init__(self, answer: AnswerT, data_hash: int, until_s: float) -> None:
        self.answer = answer
        # 64 bits, keyed by the process: enough to tell a mistake from a repeat.
        self.data_hash = data_hash
        self.until_s = until_s


class _KeysOfPortion:
    """How many keys the tenants of one portion have."""

    __slots__ = ("by_count", "keys", "most")

    def __init__(self) -> None:
        self.keys = 0
        # Number of keys -> the tenants that have so many, and the highest of these numbers.
        self.by_count: dict[int, OrderedDict[str, None]] = {}
        self.most = 0

    def recount(self, tenant: str, before: int, after: int) -> None:
        """Note that ``tenant`` has ``after`` keys now, and had ``before``."""
        self.keys += after - before
        if before:
            alike = self.by_count[before]
            del alike[tenant]
            if not alike:
                del self.by_count[before]
        if after:
            self.by_count.setdefault(after, OrderedDict())[tenant] = None
        if after > self.most or self.most not in self.by_count:
            self.most = after


class RememberedAnswers(Generic[AnswerT]):
    """The first answers to publishes with a key, each for the same time, within a bound.

    At the bound the portion that is furthest over its part loses a key: of its tenants the one that
    has the most keys loses its oldest (of several such tenants the one that has had as many for the
    longest). So nobody loses a key to a tenant that has fewer, nor one of those that its portion is
    guaranteed.
    """

    __slots__ = (
        "_answers",
        "_gives",
        "_of_tenant",
        "_portions",
        "_weights",
        "keep_s",
        "max_keys",
        "pushed_out",
        "repeats",
    )

    def __init__(self, max_keys: int, keep_s: float, weights: Weights = ONE_PORTION) -> None:
        """Make an empty memory of at most ``max_keys``, ``keep_s`` each; 0 remembers nothing."""
        # Changes in share_out only.
        self._weights = weights
        self.max_keys = max_keys
        self.keep_s = keep_s
        # Oldest first, which is also the order in which their time is up.
        self._answers: OrderedDict[Slot, _Remembered[AnswerT]] = OrderedDict()
        # The slots of each tenant, in the same order.
        self._of_tenant: dict[str, OrderedDict[Slot, None]] = {}
        # The portions that have keys, by name, and the one that was found furthest over its part.
        self._portions: dict[str, _KeysOfPortion] = {}
        self._gives = ""
        # Counters; they only rise. pushed_out: forgotten at the bound, before their time.
        self.repeats = 0
        self.pushed_out = 0

    def __len__(self) -> int:
        """Return how many keys are held, those included whose time is up and that wait for it."""
        return len(self._answers)

    def share_out(self, weights: Weights) -> None:
        """Divide the keys by other ``weights`` from now on; 1 us for each tenant that has any."""
        self._weights = weights
        self._portions.clear()
        for tenant, own in self._of_tenant.items():
            self._recount(tenant, 0, len(own))

    def find(self, slot: Slot, data: bytes, now_s: float) -> AnswerT | None:
        """Return what the first publish with this key was answered; None when this is the first.

        Raises:
            InvalidRequest: it carried other data, so this is another message and would be lost.
        """
        first = self._answers.get(slot)
        if first is None or now_s >= first.until_s:
            return None
        if first.data_hash != hash(data):
            raise InvalidRequest(
                "The idempotency key was used for another message in this topic within the last"
                f" {self.keep_s:g} s; use a new key for each new message."
            )
        self.repeats += 1
        return first.answer

    def remember(self, slot: Slot, data: bytes, answer: AnswerT, now_s: float) -> None:
        """Keep ``answer``, that of a publish which `find` did not know, for its repeats."""
        if self.keep_s <= 0:
            return
        if slot in self._answers:
            self._forget(slot)
        self._answers[slot] = _Remembered(answer, hash(data), now_s + self.keep_s)
        own = self._of_tenant.setdefault(slot[0], OrderedDict())
        own[slot] = None
        self._recount(slot[0], len(own) - 1, len(own))
        self.sweep(now_s, SWEPT_PER_NEW_KEY)
        if len(self._answers) > self.max_keys:
            self._push_out(self._weights.portion_of(slot[0]))

    def sweep(self, now_s: float, at_most: int) -> int:
        """Forget up to ``at_most`` keys whose time is up, oldest first; return how many."""
        for count in range(at_most):
            slot, oldest = next(iter(self._answers.items()), (None, None))
            if slot is None or oldest is None or now_s < oldest.until_s:
                return count
            self._forget(slot)
        return at_most

    def _push_out(self, newest: str) -> None:
        """Forget a key of a portion over its part, to make room for a new one of ``newest``."""
        if self.pushed_out % _PUSHED_OUT_PER_LOOK == 0:
            self._gives = max(self._portions, key=self._over)
        elif self._over(self._gives) <= 1:
            is_over = self._over(newest) > 1
            self._gives = newest if is_over else max(self._portions, key=self._over)
        gives = self._portions[self._gives]
        tenant = next(iter(gives.by_count[gives.most]))
        self._forget(next(iter(self._of_tenant[tenant])))
        self.pushed_out += 1

    def _forget(self, slot: Slot) -> None:
        del self._answers[slot]
        tenant = slot[0]
        own = self._of_tenant[tenant]
        del own[slot]
        self._recount(tenant, len(own) + 1, len(own))
        if not own:
            del self._of_tenant[tenant]

    def _recount(self, tenant: str, before: int, after: int) -> None:
        """Note that the tenant has ``after`` keys now, and had ``before``."""
        name = self._weights.portion_of(tenant)
        portion = self._portions.get(name)
        if portion is None:
            portion = self._portions[name] = _KeysOfPortion()
        portion.recount(tenant, before, after)
        if not portion.keys:
            del self._portions[name]

    def _over(self, portion: str) -> float:
        """Return the keys of a portion as a multiple of what it is guaranteed."""
        own = self._portions.get(portion)
        if own is None:
            return 0.0
        return own.keys / max(self.max_keys * self._weights.ratio_of(portion), 1.0)
