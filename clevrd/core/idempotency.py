"""Which publishes are repeats, and what the first one was answered. No clock and no waiting here.

Header: draft-ietf-httpapi-idempotency-key-header; its strings: RFC 8941 §3.3.3.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final, Generic, TypeVar

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


class RememberedAnswers(Generic[AnswerT]):
    """The first answers to publishes with a key, each for the same time, within a bound.

    At the bound the tenant that has the most keys loses its oldest (of several such tenants the one
    that has had as many for the longest), so nobody loses a key to a tenant that has fewer.
    """

    __slots__ = (
        "_answers",
        "_by_count",
        "_most",
        "_of_tenant",
        "keep_s",
        "max_keys",
        "pushed_out",
        "repeats",
    )

    def __init__(self, max_keys: int, keep_s: float) -> None:
        """Make an empty memory of at most ``max_keys``, ``keep_s`` each; 0 remembers nothing."""
        self.max_keys = max_keys
        self.keep_s = keep_s
        # Oldest first, which is also the order in which their time is up.
        self._answers: OrderedDict[Slot, _Remembered[AnswerT]] = OrderedDict()
        # The same slots by tenant.
        self._of_tenant: dict[str, OrderedDict[Slot, None]] = {}
        # Number of keys -> the tenants that have so many, and the highest of these numbers.
        self._by_count: dict[int, OrderedDict[str, None]] = {}
        self._most = 0
        # Counters; they only rise. pushed_out: forgotten at the bound, before their time.
        self.repeats = 0
        self.pushed_out = 0

    def __len__(self) -> int:
        """Return how many keys are held, those included whose time is up and that wait for it."""
        return len(self._answers)

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
            self._push_out()

    def sweep(self, now_s: float, at_most: int) -> int:
        """Forget up to ``at_most`` keys whose time is up, oldest first; return how many."""
        for count in range(at_most):
            slot, oldest = next(iter(self._answers.items()), (None, None))
            if slot is None or oldest is None or now_s < oldest.until_s:
                return count
            self._forget(slot)
        return at_most

    def _push_out(self) -> None:
        tenant = next(iter(self._by_count[self._most]))
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
        """Note that the tenant has one key more, or one fewer, than ``before``."""
        if before:
            alike = self._by_count[before]
            del alike[tenant]
            if not alike:
                del self._by_count[before]
        if after:
            self._by_count.setdefault(after, OrderedDict())[tenant] = None
        if after > self._most or self._most not in self._by_count:
            self._most = after
