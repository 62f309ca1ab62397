"""Tenants share the memory by weight: who may borrow, who gives back, and who loses nothing."""

from __future__ import annotations

from functools import partial
from itertools import count

import pytest
from fakes import FakeSink, TopicDriver, frame_of, sink_of
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.budgets import Budget, Pool
from clevrd.core.drop_strategy import CIRCUIT_BREAKER, DROP_NEWEST, DropStrategy
from clevrd.core.idempotency import RememberedAnswers
from clevrd.core.portions import OTHERS, Weights
from clevrd.core.recent_cache import FRAME_OVERHEAD_BYTES
from clevrd.core.ring_sizes import given_back
from clevrd.core.stream_forms import NDJSON
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicLimits, TopicManager
from clevrd.errors import Unavailable

HELD = 64 + FRAME_OVERHEAD_BYTES
# What rings may take where the whole memory is 1,000 messages.
RINGS = 600


def make_manager(by_tenant: dict[str, float], others: float = 1.0, **limits: int) -> TopicManager:
    """Return a manager with memory for 1,000 messages, shared out by weights."""
    numbers = count(1)
    values = {"max_memory_bytes": 1_000 * HELD, **limits}
    return TopicManager(
        TopicLimits(**values), lambda: f"epoch{next(numbers)}", Weights(by_tenant, others)
    )


def topic_of(manager: TopicManager, tenant: str, name: str = "t") -> Topic:
    """Return the topic, made if it was missing."""
    return manager.get_or_create(tenant, name, "", 0.0)


def publish(manager: TopicManager, topic: Topic, messages: int) -> None:
    """Append ``messages`` of 64 bytes, one by one."""
    for offset in range(topic.head + 1, topic.head + 1 + messages):
        manager.extend(topic, offset, [frame_of(offset, 64)], 0.0)


def ring_messages(manager: TopicManager, tenant: str) -> int:
    """Return how many messages the rings of a tenant's portion hold."""
    return manager.portions.of(tenant).ring_bytes // HELD


# --- rings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("noisy_topics", [1, 3, 100, 1_000])
def test_noisy_tenant_does_not_shorten_the_ring_of_another(noisy_topics: int) -> None:
    """Neither by a few large rings, nor by very many that are smaller than the quiet one."""
    manager = make_manager({"quiet": 1.0, "noisy": 1.0}, others=0.0)
    quiet = topic_of(manager, "quiet")
    publish(manager, quiet, RINGS // 2)

    for number in range(5_000):
        publish(manager, topic_of(manager, "noisy", f"t{number % noisy_topics}"), 1)

    assert (quiet.first, len(quiet.ring)) == (1, RINGS // 2)
    assert manager.ring_bytes <= manager.max_ring_bytes
    assert ring_messages(manager, "noisy") > RINGS // 3


def test_idle_memory_is_lent_and_given_back_first() -> None:
    """A tenant alone may use all; when another comes, it is the one whose rings are cut."""
    manager = make_manager({"quiet": 1.0, "noisy": 1.0}, others=0.0)
    noisy, quiet = topic_of(manager, "noisy"), topic_of(manager, "quiet")
    publish(manager, noisy, RINGS)
    alone = len(noisy.ring)

    for _ in range(RINGS // 2):
        publish(manager, quiet, 1)
        assert quiet.first == 1

    assert alone == RINGS
    assert RINGS * 0.4 < len(noisy.ring) <= RINGS // 2
    assert manager.portions.of("quiet").borrowed_bytes == 0


def test_weights_say_how_much() -> None:
    """Three tenants that all want everything have 6 : 3 : 1, less what one cut takes at most."""
    weights = {"large": 6.0, "middle": 3.0, "small": 1.0}
    manager = make_manager(weights, others=0.0)

    for _ in range(2_000):
        for tenant in weights:
            publish(manager, topic_of(manager, tenant), 1)

    for tenant, weight in weights.items():
        share = RINGS * weight / 10
        assert share * 0.88 <= ring_messages(manager, tenant) <= share * 1.35
    assert manager.ring_bytes <= manager.max_ring_bytes


def test_made_up_tenants_share_one_portion() -> None:
    """However many names a client makes up, one with a portion of its own keeps its ring."""
    manager = make_manager({"default-tenant": 1.0})
    mine = topic_of(manager, "default-tenant")
    publish(manager, mine, RINGS // 2)

    for number in range(3_000):
        publish(manager, topic_of(manager, f"made-up-{number % 500}"), 1)

    assert mine.first == 1
    assert manager.portions.of("made-up-1") is manager.portions.of("made-up-2")
    assert {portion.name for portion in manager.portions} == {"default-tenant", OTHERS}


def test_tenant_that_is_full_gives_its_own_alone() -> None:
    """At the bound each publish is paid for by who publishes, a tenth of its part at once."""
    manager = make_manager({"a": 1.0, "b": 1.0}, others=0.0)
    first, second = topic_of(manager, "a"), topic_of(manager, "b")
    publish(manager, first, RINGS // 2)
    publish(manager, second, RINGS // 2)

    publish(manager, first, 1)

    assert len(second.ring) == RINGS // 2
    assert RINGS * 0.44 <= len(first.ring) <= RINGS * 0.46


USES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 5_000)), min_size=1, max_size=8)


@given(uses=USES)
def test_giving_back_brings_all_within_the_bound_and_spares_whoever_is(
    uses: list[tuple[int, int]],
) -> None:
    """Only borrowers give, to nine tenths of their guarantee at the least, and it suffices."""
    bound = sum(guaranteed for _, guaranteed in uses)
    total = sum(used for used, _ in uses)
    excess = total - int(bound * 0.9)

    given = given_back(uses, excess)

    for (used, guaranteed), back in zip(uses, given, strict=True):
        assert 0 <= back <= used
        if used <= guaranteed:
            assert back == 0
        else:
            assert used - back >= min(used, int(0.9 * guaranteed))
    if total > bound:
        assert total - sum(given) <= bound
        # No more than is asked for, but for the rounding.
        assert sum(given) <= excess + len(uses)


def test_furthest_over_its_guarantee_gives_first() -> None:
    """One at three times its part gives until it has as many times of it as the next."""
    uses = [(300, 100), (150, 100), (50, 100)]

    assert given_back(uses, 100) == [100, 0, 0]
    assert given_back(uses, 190) == [170, 20, 0]
    assert given_back(uses, 1_000) == [210, 60, 0]


def test_new_weights_move_topics_and_cut_nothing_at_once() -> None:
    """A tenant that is configured while the daemon runs is protected from then on."""
    manager = make_manager({}, others=1.0)
    mine, other = topic_of(manager, "mine"), topic_of(manager, "other")
    publish(manager, mine, 250)
    publish(manager, other, 300)
    reader = Subscriber(FakeSink(), form=NDJSON)
    driver = TopicDriver(mine, partial(manager.extend, mine))
    driver.join(reader, last=10)

    manager.share_out(Weights({"mine": 1.0}, 1.0))
    before = (len(mine.ring), len(other.ring))
    publish(manager, other, 1_000)

    assert before == (250, 300)
    assert len(mine.ring) == 250
    assert mine.portion.name == "mine"
    assert mine.portion.texts.taken_bytes > 0
    manager.share_out(Weights({}, 1.0))
    assert [portion.name for portion in manager.portions] == [OTHERS]
    assert mine.portion.ring_bytes == manager.ring_bytes
    assert mine.portion.topics == 2
    driver.leave(reader)
    assert mine.portion.texts.taken_bytes == 0
    assert not mine.portion.texts.holders


# --- frames kept for lagging readers, and messages in other forms --------------------------------


def stalled(driver: TopicDriver, policy: DropStrategy) -> Subscriber:
    """Return a reader of a topic that takes nothing, and has lost some of what it keeps."""
    reader = driver.join(Subscriber(FakeSink(), policy, wanted_window=80))
    driver.block(reader)
    driver.send(500)
    return reader


@pytest.mark.parametrize("policy", [DROP_NEWEST, CIRCUIT_BREAKER])
def test_readers_of_a_noisy_tenant_give_back_what_they_keep(policy: DropStrategy) -> None:
    """They lose the newest of what was kept; the other's are given all that they are promised."""
    manager = make_manager(
        {"quiet": 1.0, "noisy": 1.0}, 0.0, ring_messages=100, circuit_breaker_threshold=10_000
    )
    drivers = [
        TopicDriver(topic, partial(manager.extend, topic))
        for topic in [topic_of(manager, "noisy", f"t{number}") for number in range(3)]
    ]
    noisy = [stalled(driver, policy) for driver in drivers]
    alone = sum(reader.kept_messages for reader in noisy)
    lost_alone = sum(driver.topic.losses.memory for driver in drivers)

    topic = topic_of(manager, "quiet")
    driver = TopicDriver(topic, partial(manager.extend, topic))
    quiet = stalled(driver, policy)
    both = sum(reader.kept_messages for reader in noisy)
    for each, reader in zip([driver, *drivers], [quiet, *noisy], strict=True):
        each.unblock(reader)

    # 150 messages may be kept beyond the rings, and 75 of them are the quiet tenant's. What is kept
    # is given back by blocks.
    assert alone == 150
    assert both <= 75
    assert sink_of(quiet).offsets[:75] == list(range(1, 76))
    assert sum(each.topic.losses.memory for each in drivers) == lost_alone + alone - both
    for each, reader in zip(drivers, noisy, strict=True):
        assert sink_of(reader).offsets == sorted(set(sink_of(reader).offsets))
        assert each.topic.offered == reader.delivered + reader.dropped
    assert manager.kept.left_bytes == manager.kept.max_bytes


def test_budget_lends_and_recalls() -> None:
    """The one furthest over its guarantee gives back; one within its guarantee never does."""
    pool = Pool(1_000)
    holders = [Giver(pool.budget(guaranteed)) for guaranteed in (500, 300, 200)]
    one, two, three = holders
    assert one.takes(400)
    assert two.takes(400)
    assert three.takes(200)

    refused = three.takes(1)
    granted = one.takes(50)

    assert not refused
    assert granted
    assert (one.budget.taken_bytes, three.budget.taken_bytes) == (450, 200)
    assert 300 <= two.budget.taken_bytes <= 350
    assert pool.left_bytes == 1_000 - sum(each.budget.taken_bytes for each in holders) >= 0


class Giver:
    """A holder of bytes."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        budget.holders[self] = None

    def takes(self, size_bytes: int) -> bool:
        """Take bytes, one by one as far as it goes; return whether all were had."""
        return sum(self.budget.take(1) for _ in range(size_bytes)) == size_bytes

    def give_back(self, wanted_bytes: int, /) -> int:
        """Let go of what is wanted."""
        freed = min(wanted_bytes, self.budget.taken_bytes)
        self.budget.give(freed)
        return freed


@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 400)), max_size=60)
)
def test_what_is_guaranteed_can_always_be_taken(steps: list[tuple[int, bool, int]]) -> None:
    """Whatever others have taken, and the whole pool is never exceeded."""
    pool = Pool(1_000)
    givers = [Giver(pool.budget(guaranteed)) for guaranteed in (500, 300, 200)]

    for who, is_take, size in steps:
        budget = givers[who].budget
        if is_take:
            fits = budget.taken_bytes + size <= budget.guaranteed_bytes
            taken = budget.take(size)
            assert taken or not fits
        else:
            budget.give(min(size, budget.taken_bytes))
        assert pool.left_bytes == 1_000 - sum(each.budget.taken_bytes for each in givers) >= 0


def test_texts_of_a_noisy_tenant_give_way() -> None:
    """A quiet tenant's events are made once, however many events others have made."""
    manager = make_manager({"quiet": 1.0, "noisy": 1.0}, 0.0)
    drivers = {}
    for tenant in ("noisy", "quiet"):
        topic = topic_of(manager, tenant)
        drivers[tenant] = TopicDriver(topic, partial(manager.extend, topic))
        drivers[tenant].join(Subscriber(FakeSink(), form=NDJSON))
        drivers[tenant].send(100)

    noisy, quiet = (drivers[tenant].topic.portion.texts for tenant in ("noisy", "quiet"))
    assert noisy.taken_bytes <= noisy.guaranteed_bytes
    assert quiet.taken_bytes > 0.9 * quiet.guaranteed_bytes - 2 * HELD


# --- numbers -------------------------------------------------------------------------------------


def test_topics_are_reserved_for_tenants_with_a_portion() -> None:
    """Half of all topics are shared out by weight and not lent; the others are for anybody."""
    manager = make_manager({"default-tenant": 1.0}, max_topics=20, max_topics_per_tenant=10)
    for number in range(15):
        topic_of(manager, f"made-up-{number}")

    with pytest.raises(
        Unavailable, match=r"The daemon has 15 topics and keeps 5 for other tenants"
    ):
        topic_of(manager, "made-up-15")
    for number in range(5):
        topic_of(manager, "default-tenant", f"t{number}")
    with pytest.raises(Unavailable, match=r"The daemon has 20 topics \(CLEVRD_MAX_TOPICS\)"):
        topic_of(manager, "default-tenant", "one more")

    manager.evict_idle(1e9)
    assert manager.portions.reserved_topics() == manager._reserved_topics == 5


def test_made_up_tenants_do_not_push_out_the_keys_of_another() -> None:
    """A thousand tenants with a key each are one party; who has a portion keeps its keys."""
    weights = Weights({"default-tenant": 1.0}, 1.0)
    answers: RememberedAnswers[str] = RememberedAnswers(100, 60.0, weights)
    for number in range(50):
        answers.remember(("default-tenant", "t", str(number)), b"", "first", 0.0)
    for number in range(1_000):
        answers.remember((f"made-up-{number}", "t", "k"), b"", "first", 0.0)

    found = [answers.find(("default-tenant", "t", str(n)), b"", 1.0) for n in range(50)]

    assert found == ["first"] * 50
    assert (len(answers), answers.pushed_out) == (100, 950)
    answers.share_out(Weights({}, 1.0))
    for number in range(60):
        answers.remember(("another", "t", str(number)), b"", "first", 0.0)
    # They are one party now, and the tenant with the most loses first.
    assert len(answers) == 100
    assert answers.find(("default-tenant", "t", "0"), b"", 1.0) is None


def test_many_topics_are_moved_a_bounded_number_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """To move 10,000 at once would be a pause; what is counted is right at every moment."""
    monkeypatch.setattr("clevrd.core.topic_manager.MOVED_PER_SWEEP", 3)
    manager = make_manager({}, max_topics=100, max_topics_per_tenant=20, idle_s=1_000)
    topics = [topic_of(manager, "mine", f"t{number}") for number in range(8)]
    for topic in topics:
        publish(manager, topic, 2)

    moved = []
    manager.share_out(Weights({"mine": 1.0}, 1.0))
    for _ in range(4):
        moved.append(manager.portions.of("mine").topics)
        in_both = sum(portion.topics for portion in manager.portions)
        assert in_both == len(topics)
        assert sum(each.ring_bytes for each in manager.portions) == manager.ring_bytes
        assert manager._reserved_topics == manager.portions.reserved_topics()
        manager.evict_idle(0.0)

    assert moved == [3, 6, 8, 8]
    # A topic that goes while it is to be moved is not moved.
    manager.share_out(Weights({}, 1.0))
    manager.evict_idle(1e6)
    manager.evict_idle(1e6)
    assert (len(manager), manager.ring_bytes) == (0, 0)
    assert [portion.name for portion in manager.portions] == [OTHERS]
    assert manager.portions.of("mine").topics == 0
