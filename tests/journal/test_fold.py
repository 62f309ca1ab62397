"""The fold, rule by rule: positions, epochs, retries, keys, foreign records, checkpoints."""

from __future__ import annotations

import random
import zlib
from collections.abc import Generator, Iterator
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from journal_world import NOON_US, summary

from clevrd.core.publish_request import PublishRequest
from clevrd.journal import foreign_records
from clevrd.journal.base import Checkpoint, Placed, TopicHead
from clevrd.journal.checkpoints import BadCheckpoint, FoldState, spell_state
from clevrd.journal.epoch_names import topic_epoch
from clevrd.journal.fold import Fold
from clevrd.journal.folded import Folded, Refused
from clevrd.journal.logged_keys import LoggedKey, LoggedKeys
from clevrd.journal.read_again import ReadAgain
from clevrd.journal.record_chain import REMEMBERED
from clevrd.journal.records import (
    FOREIGN_TENANT,
    MAX_FOREIGN_BYTES,
    Header,
    Keyed,
    Run,
    Seen,
    content_of,
    decode_header,
    digest_of,
    encode_record,
)
from clevrd.journal.writer_sequences import MAX_WRITERS
from clevrd.tenants import DEFAULT_TENANT

SECOND_US = 1_000_000


def record_of(
    *messages: tuple[str, str | None, str],
    stamp: str = "51",
    writer: str = "aa",
    sequence: int = 1,
    at_s: float = 0,
    tenant: str = "acme",
    keep_s: int = 60,
    max_keys: int = 100,
    **more: Any,
) -> bytes:
    """Return a record of messages, each a topic, an idempotency key, and the key's content."""
    runs: list[Run] = []
    lines = [b'{"topic":"%b","data":1}\n' % topic.encode() for topic, _, _ in messages]
    for (topic, _, _), line in zip(messages, lines, strict=True):
        before = runs.pop() if runs and runs[-1].topic == topic else Run(tenant, topic, 0, 0)
        runs.append(Run(tenant, topic, before.count + 1, before.size_bytes + len(line)))
    keyed = [
        Keyed(line, key, content)
        for line, (_, key, content) in enumerate(messages)
        if key is not None
    ]
    time_us = NOON_US + int(at_s * SECOND_US)
    header = Header(stamp, writer, sequence, time_us, tuple(runs), tuple(keyed))
    more |= {"keep_keys_ms": keep_s * 1_000, "max_keys": max_keys}
    return encode_record(msgspec.structs.replace(header, **more), lines)


def plain(topic: str = "t") -> tuple[str, None, str]:
    """Return a message without a key."""
    return topic, None, ""


class Log:
    """A fold, and a position for each record that it is given."""

    def __init__(self, fold: Fold | None = None) -> None:
        self.fold = fold or Fold(0, 1)
        self._sequence = 0

    def add(self, *messages: tuple[str, str | None, str], **more: Any) -> Folded:
        """Apply the next record of a writer."""
        self._sequence += 1
        return self.add_record(record_of(*messages, **{"sequence": self._sequence, **more}))

    def add_record(self, record: bytes) -> Folded:
        """Apply any record."""
        return self.fold.apply(self.fold.position + 1, record)


def offsets(placed: tuple[Placed, ...]) -> list[tuple[str, int, int]]:
    """Return topic, first offset and count of each part."""
    return [(each.topic, each.offset, each.count) for each in placed]


def checkpoint_of(fold: Fold, *, is_whole: bool = False) -> Checkpoint:
    """Take a checkpoint at once."""
    *_, checkpoint = fold.checkpoint(is_whole=is_whole)
    assert checkpoint is not None
    return checkpoint


def restored(checkpoint: Checkpoint, fold: Fold | None = None) -> Fold:
    """Return a fold that goes on from ``checkpoint``."""
    fold = fold or Fold(0, 1)
    for _ in fold.restore(checkpoint):
        pass
    return fold


# --- positions and epochs -------------------------------------------------------------------------


def test_messages_of_a_topic_are_counted_from_one() -> None:
    """Each topic has its own offsets, in the order of the log."""
    log = Log()

    first = log.add(plain("a"), plain("a"), plain("b"))
    second = log.add(plain("b"), plain("a"))

    assert offsets(first.placed) == [("a", 1, 2), ("b", 1, 1)]
    assert offsets(second.placed) == [("b", 2, 1), ("a", 3, 1)]
    assert (log.fold.head("acme", "a"), log.fold.head("acme", "b")) == (3, 2)
    assert (log.fold.head("acme", "c"), log.fold.head("other", "a")) == (0, 0)
    assert log.fold.topics == 2


def test_place_says_where_its_lines_are() -> None:
    """A part's lines are found in its record by the bytes of their run and the lines before."""
    log = Log()
    log.add(("b", "k", "x"))
    record = record_of(plain("a"), plain("b"), ("b", "k", "x"), plain("b"), sequence=2)

    folded = log.add_record(record)

    found = []
    for each in folded.placed:
        run = record[each.at_bytes : each.at_bytes + each.size_bytes].splitlines()
        found.append((each.topic, each.line, len(run[each.skip : each.skip + each.count])))
    assert found == [("a", 0, 1), ("b", 1, 1), ("b", 3, 1)]
    assert [each.skip for each in folded.placed] == [0, 0, 2]


def test_epoch_of_a_topic_is_known_before_its_first_message() -> None:
    """It is 12 hexadecimal digits, of the partition's epoch, the tenant and the topic."""
    names = {
        topic_epoch(*parts)
        for parts in [("e", "t", "a"), ("f", "t", "a"), ("e", "u", "a"), ("e", "t", "b")]
    }

    assert len(names) == 4
    assert all(len(bytes.fromhex(name)) == 6 for name in names)
    assert topic_epoch("e", "t", "\ud800")


def test_other_stamp_begins_a_new_epoch_and_clears_everything() -> None:
    """Counts, keys and sequences are forgotten: records that they came from may be gone."""
    log = Log()
    before = log.add(("t", "k", "x"), plain("u"))
    record = record_of(("t", "k", "x"), stamp="52", at_s=9)

    folded = log.add_record(record)

    assert folded.is_new_epoch
    assert not folded.is_retry
    assert offsets(folded.placed) == [("t", 1, 1)]
    assert folded.partition_epoch == log.fold.epoch != before.partition_epoch
    assert log.fold.epoch_began_us == NOON_US + 9 * SECOND_US
    assert log.fold.head("acme", "u") == 0


def test_stamp_that_comes_back_begins_another_epoch() -> None:
    """An epoch has no second life, so its positions can't be given again."""
    log = Log()

    epochs = [log.add(plain(), stamp=stamp).partition_epoch for stamp in ("51", "52", "51")]

    assert len(set(epochs)) == 3


def test_new_epoch_depends_on_nothing_before_it() -> None:
    """Nodes that have read different things before count the same from its first record on."""
    one = Log()
    one.add(plain(), ("t", "k", "x"), at_s=500)
    other = Log(Fold(0, 1, is_complete=False))
    other.add(plain("u"), at_s=2)
    record = record_of(plain(), stamp="52", writer="bb", at_s=7)

    folded = [each.fold.apply(5, record) for each in (one, other)]

    assert folded[0] == folded[1]
    assert summary(one.fold) == summary(other.fold)


def test_reset_begins_a_new_epoch_even_if_it_is_a_retry() -> None:
    """For a node that begins to read at the retry it is the first, so for all others too."""
    log = Log()
    log.add(plain())
    reset = record_of(plain(), sequence=2, is_reset=True)

    epochs = [log.add_record(reset), log.add_record(reset)]

    assert [offsets(each.placed) for each in epochs] == [[("t", 1, 1)], [("t", 1, 1)]]
    assert len({log.fold.epoch, *(each.partition_epoch for each in epochs)}) == 2


def test_log_without_its_beginning_is_not_counted_before_an_epoch_begins() -> None:
    """Positions that depend on records which are gone are not guessed."""
    log = Log(Fold(0, 1, is_complete=False))

    first = log.add(plain())
    foreign = log.add_record(b'{"topic":"t","data":1}')
    second = log.add(plain())
    reset = log.add(plain(), is_reset=True)

    assert [each.placed for each in (first, second)] == [(), ()]
    assert (first.partition_epoch, second.confirmed) == ("", ())
    assert foreign.foreign
    assert offsets(reset.placed) == [("t", 1, 1)]
    assert log.fold.is_known


def test_record_that_is_not_behind_the_last_is_a_mistake_of_the_caller() -> None:
    """Positions rise; a fold that took one twice would count twice."""
    log = Log()
    log.add(plain())

    with pytest.raises(ValueError, match="the record at 1 does not come after 1"):
        log.fold.apply(1, record_of(plain(), sequence=2))


# --- ids and times --------------------------------------------------------------------------------


def test_ids_rise_and_name_their_partition() -> None:
    """Ids of different partitions can't be equal; within one they rise with each message."""
    log = Log(Fold(3, 8))

    parts = [*log.add(plain("a"), plain("a"), plain("b")).placed, *log.add(plain("a")).placed]

    ids = [each.id_us + n * each.id_step for each in parts for n in range(each.count)]
    assert ids == [ids[0], ids[0] + 8, ids[0] + 16, ids[0] + 24]
    assert ids[0] - NOON_US in range(8)
    assert ids[0] % 8 == 3
    assert log.fold.last_id_us == ids[-1]


def test_time_of_the_log_never_counts_back() -> None:
    """A writer whose clock is behind does not make ids or times go back."""
    log = Log()
    first = log.add(plain(), at_s=10).placed[0]

    second = log.add(plain(), at_s=3, writer="bb").placed[0]

    assert second.time_us == first.time_us == log.fold.time_us
    assert second.id_us == first.id_us + 1


def test_time_for_a_new_epoch_is_behind_all_ids() -> None:
    """The writer that begins one sees to it that ids rise on, as far as it knows them."""
    log = Log()
    log.add(plain(), at_s=10)
    last = log.fold.last_id_us

    assert log.fold.time_after("51", 7) == 7
    assert log.fold.time_after("52", 7) == last + 1
    assert log.fold.time_after("51", 7, is_reset=True) == last + 1
    assert log.fold.time_after("52", last + 9) == last + 9


# --- retries --------------------------------------------------------------------------------------


def test_retry_is_counted_once() -> None:
    """A record that was appended twice has its first place; an older one is a retry as well."""
    log = Log()
    log.add(plain(), sequence=1)
    record = record_of(plain(), sequence=5)
    log.add_record(record)

    retries = [log.add_record(record), log.add(plain(), sequence=4)]

    assert [each.is_retry for each in retries] == [True, True]
    assert not any(each.placed for each in retries)
    assert (log.fold.head("acme", "t"), log.fold.retries) == (2, 2)


def test_writers_have_their_own_sequences() -> None:
    """Two nodes may have the same numbers."""
    log = Log()

    folded = [log.add(plain(), writer=writer, sequence=1) for writer in ("aa", "bb")]

    assert [each.is_retry for each in folded] == [False, False]
    assert [(each.writer, each.sequence) for each in folded] == [("aa", 1), ("bb", 1)]


def test_writer_that_wrote_longest_ago_is_forgotten_first() -> None:
    """So many starts of nodes are remembered; by the order of the log, not by any clock."""
    log = Log()
    log.add(plain(), writer="old", sequence=1)
    log.add(plain(), writer="older", sequence=1)
    log.add(plain(), writer="old", sequence=2)
    for number in range(MAX_WRITERS - 1):
        log.add(plain(), writer=f"w{number}", sequence=1)

    old = log.add(plain(), writer="old", sequence=2)
    older = log.add(plain(), writer="older", sequence=1)

    assert (old.is_retry, older.is_retry) == (True, False)


# --- idempotency keys -----------------------------------------------------------------------------


def test_repeat_gets_the_place_of_the_first() -> None:
    """It is not counted a second time, whatever node it comes through."""
    log = Log()
    first = log.add(plain(), ("t", "k", "x")).placed[0]

    folded = log.add(("t", "k", "x"), plain(), writer="bb", at_s=59)

    (repeat,) = folded.repeats
    assert (repeat.line, repeat.tenant, repeat.topic, repeat.offset) == (0, "acme", "t", 2)
    assert (repeat.id_us, repeat.time_us) == (first.id_us + 1, first.time_us)
    assert offsets(folded.placed) == [("t", 3, 1)]


def test_repeat_in_the_same_record_gets_the_place_of_the_first() -> None:
    """Messages between them keep their order, and the line of each is right."""
    log = Log()

    folded = log.add(plain(), ("t", "k", "x"), ("t", "k", "x"), plain(), ("t", "k", "x"))

    assert [(each.line, each.offset) for each in folded.repeats] == [(2, 2), (4, 2)]
    assert [(each.line, each.offset, each.count) for each in folded.placed] == [
        (0, 1, 2),
        (3, 3, 1),
    ]


def test_messages_with_keys_that_follow_each_other_are_placed_together() -> None:
    """An engine keeps a checksum over the whole run for each place; one for each key is a lot."""
    log = Log()

    folded = log.add(
        *[("t", f"k{number}", "x") for number in range(50)], ("u", "k", "x"), ("u", "l", "x")
    )

    assert offsets(folded.placed) == [("t", 1, 50), ("u", 1, 2)]
    ids = [each.id_us for each in folded.placed]
    assert ids[1] - ids[0] == 50 * folded.placed[0].id_step
    (repeat,) = log.add(("t", "k49", "x")).repeats
    assert (repeat.offset, repeat.id_us) == (50, ids[0] + 49 * folded.placed[0].id_step)


def test_key_of_another_topic_or_tenant_is_another_key() -> None:
    """A key counts within its tenant and topic."""
    log = Log()
    log.add(("t", "k", "x"))

    topic = log.add(("u", "k", "x"))
    tenant = log.add(("t", "k", "x"), tenant="other")

    assert len(topic.placed) == len(tenant.placed) == 1


def test_other_message_under_a_used_key_is_refused() -> None:
    """It is not counted: counting would be wrong, and so would its first one's place."""
    log = Log()
    log.add(("t", "k", "x"))

    folded = log.add(plain(), ("t", "k", "other"))

    assert folded.refused == (Refused(1, "acme", "t"),)
    assert offsets(folded.placed) == [("t", 2, 1)]


def test_key_is_free_again_when_the_log_says_so() -> None:
    """A window ends by the time of the log; an empty record moves it on."""
    log = Log()
    log.add(("t", "k", "x"))
    within = log.add(("t", "k", "x"), at_s=59.9)
    log.add(at_s=60)

    behind = log.add(("t", "k", "y"), at_s=1)
    again = log.add(("t", "k", "y"), at_s=119)

    assert [len(each.placed) for each in (within, behind, again)] == [0, 1, 0]
    assert again.repeats[0].offset == 2


def test_window_is_the_one_of_the_record_that_brought_the_key() -> None:
    """A node with another setting does not count otherwise."""
    log = Log()
    log.add(("t", "long", "x"), keep_s=600)
    log.add(("t", "short", "x"), keep_s=1)
    log.add(("t", "none", "x"), keep_s=0)

    found = log.add(("t", "long", "x"), ("t", "short", "x"), ("t", "none", "x"), at_s=2, keep_s=1)

    assert [each.line for each in found.repeats] == [0]


def test_oldest_keys_are_forgotten_at_the_bound() -> None:
    """The bound is the record's, so it is the same on every node."""
    log = Log()
    for number in range(5):
        log.add(("t", f"k{number}", "x"), max_keys=3)

    folded = log.add(*(("t", f"k{number}", "x") for number in range(5)), max_keys=0)

    assert [each.line for each in folded.repeats] == [2, 3, 4]


def test_key_that_was_used_again_is_not_forgotten_with_the_first_use() -> None:
    """The first entry goes when its time comes, and leaves the second one alone."""
    keys = LoggedKeys()
    first, second = (LoggedKey("a", "t", "k", "x", n, n, n, 10 * n) for n in (1, 2))
    keys.add(LoggedKey("a", "t", "other", "x", 9, 9, 0, 99), 0, 9)
    keys.add(first, 1, 9)
    keys.add(second, 10, 9)
    keys.add(LoggedKey("a", "t", "more", "x", 9, 9, 0, 99), 10, 2)

    assert keys.find(("a", "t", "k"), 11) is second
    assert len(keys) == 2


def test_same_content_has_the_same_digest() -> None:
    """The message's key counts, and the data as it is spelled."""
    data, key = msgspec.Raw(b"[1]"), "k"

    digests = {
        content_of(PublishRequest("t", data)),
        content_of(PublishRequest("t", data, key=key)),
        content_of(PublishRequest("t", msgspec.Raw(b"[1 ]"))),
    }

    assert len(digests) == 3
    assert content_of(PublishRequest("t", data)) == content_of(PublishRequest("t", data, "id"))
    traced = PublishRequest("t", data, headers={"ce-id": "1"})
    assert content_of(PublishRequest("t", data)) == content_of(traced)


# --- what other nodes have seen -------------------------------------------------------------------


def test_node_that_has_counted_the_same_does_not_contradict() -> None:
    """A header says what its writer has folded last, and how."""
    log = Log()
    log.add(plain())
    seen = log.fold.seen("51")
    log.add(plain())

    assert seen is not None
    assert not log.add(plain(), writer="bb", sequence=1, seen=seen).contradicts
    assert log.fold.seen("52") is None


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(Seen("2", "00000000"), id="another digest"),
        pytest.param(Seen("3", "00000000"), id="a position without a record"),
        pytest.param(Seen("99999999999999999999", "00000000"), id="a position to come"),
    ],
)
def test_node_that_has_counted_otherwise_is_told_and_changes_nothing(seen: Seen) -> None:
    """If each fold acted by itself, those that agree with the writer would not."""
    log, other = Log(), Log()
    for each in (log, other):
        each.add(plain())
        each.add(plain())
        each.fold.position = 3

    told = log.add(plain(), seen=seen)
    usual = other.add(plain(), seen=seen)

    assert told.contradicts
    assert not told.is_new_epoch
    assert offsets(told.placed) == [("t", 3, 1)]
    assert usual == told


@pytest.mark.parametrize(
    ("seen", "more"),
    [
        pytest.param("1", {}, id="of the epoch before"),
        pytest.param("2", {"stamp": "53"}, id="with another stamp"),
        pytest.param("2", {"is_reset": True}, id="with a reset"),
    ],
)
def test_what_can_not_be_judged_is_no_contradiction(seen: str, more: dict[str, Any]) -> None:
    """A writer that has yet to learn of an epoch is behind, and not wrong."""
    log = Log()
    log.add(plain())
    log.add(plain(), stamp="52")

    folded = log.add(plain(), **{"stamp": "52", "seen": Seen(seen, "00000000"), **more})

    assert not folded.contradicts


def test_writer_far_behind_is_not_judged() -> None:
    """So many records are remembered; a writer that is back up to date is judged again."""
    log = Log()
    log.add(plain())
    for _ in range(REMEMBERED):
        log.add(plain())

    assert not log.add(plain(), seen=Seen("1", "00000000")).contradicts
    assert log.add(plain(), seen=Seen("9", "00000000")).contradicts


def test_same_records_counted_otherwise_are_found() -> None:
    """A record that one node can't read is in the other's chain."""
    one, other = Log(), Log()
    for log, record in ((one, record_of(plain())), (other, b"clevrd1 damaged")):
        log.add_record(record)
    for log in (one, other):
        log.add(plain(), sequence=2)

    folded = other.add(plain(), writer="bb", seen=one.fold.seen("51"))

    assert folded.contradicts


# --- foreign and bad records ----------------------------------------------------------------------


def test_foreign_record_waits_for_the_next_record_of_a_node() -> None:
    """It has no stamp; the next one's says in which epoch it is."""
    log = Log()
    log.add(plain())
    foreign = b' { "data" : [1],\n "topic" : "t" } '

    waits = log.add_record(foreign)
    folded = log.add(plain(), tenant=FOREIGN_TENANT)

    (confirmed,) = folded.confirmed
    assert (waits.foreign, waits.placed, waits.bad, waits.confirmed) == (True, (), None, ())
    assert (confirmed.position, confirmed.record) == (2, foreign)
    assert bytes(confirmed.request.data) == b"[1]"
    assert offsets((confirmed.placed,)) == [("t", 1, 1)]
    assert confirmed.placed.tenant == FOREIGN_TENANT == DEFAULT_TENANT
    assert offsets(folded.placed) == [("t", 2, 1)]
    assert folded.placed[0].id_us == confirmed.placed.id_us + 1


def test_foreign_record_before_a_new_stamp_is_in_the_new_epoch() -> None:
    """In the old one it could be given the place of a message that was lost."""
    log = Log()
    log.add(plain())
    log.add_record(b'{"topic":"t","data":1}')

    folded = log.add(plain("u"), stamp="52")

    assert folded.confirmed[0].placed.partition_epoch == folded.partition_epoch
    assert log.fold.head(FOREIGN_TENANT, "t") == 1


@pytest.mark.parametrize("stamp", ["51", "52"])
def test_foreign_record_before_a_reset_is_not_in_the_epoch_that_it_begins(stamp: str) -> None:
    """A node that can read nothing before the reset must count the same from there on."""
    log = Log()
    first = log.add(plain()).partition_epoch
    log.add_record(b'{"topic":"t","data":1}')

    folded = log.add(plain("u"), stamp=stamp, is_reset=True)

    epoch = folded.confirmed[0].placed.partition_epoch
    assert epoch != folded.partition_epoch
    assert (epoch == first) == (stamp == "51")
    assert log.fold.head(FOREIGN_TENANT, "t") == 0
    assert offsets(folded.placed) == [("u", 1, 1)]


def test_foreign_record_has_its_idempotency_key() -> None:
    """A producer's repeat is not counted, whoever sent the first."""
    log = Log()
    foreign = b'{"topic":"t","data":1,"idempotency_key":"k"}'
    for _ in range(2):
        log.add_record(foreign)

    folded = log.add(tenant=FOREIGN_TENANT)
    request = PublishRequest("t", msgspec.Raw(b"1"), "k")
    repeat = log.add(("t", "k", content_of(request)), tenant=FOREIGN_TENANT)

    assert len(folded.confirmed) == 1
    assert repeat.repeats[0].offset == 1


@pytest.mark.parametrize(
    "headers", ['{"ce-id":"1"}', "5", '{"traceparent":"x"}', '{"baggage":"a","ce-id":"1"}']
)
def test_foreign_record_counts_whatever_its_headers_are(headers: str) -> None:
    """Nodes that know nothing of headers count it, so it is never bad for these."""
    log = Log()
    waits = log.add_record(f'{{"topic":"t","data":1,"headers":{headers}}}'.encode())

    (confirmed,) = log.add(plain(), tenant=FOREIGN_TENANT).confirmed

    assert (waits.bad, confirmed.placed.offset) == (None, 1)
    assert confirmed.request.headers == ({"ce-id": "1"} if "ce-id" in headers else None)


@pytest.mark.parametrize("bound", ["MAX_WAITING", "MAX_WAITING_BYTES"])
def test_foreign_records_wait_within_a_bound(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that only foreign producers write is counted all the same, on all nodes alike."""
    monkeypatch.setattr(foreign_records, bound, {"MAX_WAITING": 3, "MAX_WAITING_BYTES": 60}[bound])
    log = Log()
    log.add(plain())

    folded = [log.add_record(b'{"topic":"t","data":1}') for _ in range(4)]

    assert [len(each.confirmed) for each in folded] == [0, 0, 3, 0]
    assert log.fold.settled_position == 4
    assert (log.fold.waiting, log.fold.is_settled) == (1, False)
    assert [each.position for each in folded[2].confirmed] == [2, 3, 4]


@pytest.mark.parametrize(
    ("record", "sentence", "is_foreign"),
    [
        pytest.param(b"", "not JSON", True, id="nothing"),
        pytest.param(b'{"topic":"t"}', "data is missing", True, id="no data"),
        pytest.param(b'{"topic":"","data":1}', "topic is empty", True, id="no topic"),
        pytest.param(b"\xff", "not valid UTF-8", True, id="bytes"),
        pytest.param(
            b'{"topic":"t","data":"%b"}' % (b"x" * MAX_FOREIGN_BYTES),
            "send less",
            True,
            id="too large",
        ),
        pytest.param(b"clevrd2 anything", "version 2", False, id="a later version"),
        pytest.param(b"clevrd1 ", "damaged", False, id="a beginning"),
        pytest.param(record_of(plain())[:-1], "damaged", False, id="an end that is missing"),
    ],
)
def test_bad_record_is_counted_and_left_out(record: bytes, sentence: str, is_foreign: bool) -> None:
    """It changes no position, and what follows is read as if it were not there."""
    log, other = Log(), Log()
    log.add(plain())
    other.add(plain())

    folded = log.add_record(record)
    other.fold.position += 1

    assert folded.bad is not None
    assert sentence in folded.bad or (record == b"" and folded.bad)
    assert (folded.foreign, folded.is_later) == (is_foreign, record.startswith(b"clevrd2"))
    assert log.fold.bad_records == 1
    assert log.add(plain()) == other.add(plain())
    assert summary(log.fold) == summary(other.fold)


RUN = Run("a", "t", 1, 24)
BAD_HEADERS: dict[str, dict[str, Any]] = {
    "no stamp": {"stamp": ""},
    "no writer": {"writer": ""},
    "no message": {"runs": (RUN, Run("a", "t", 0, 0))},
    "less than no message": {"runs": (RUN, Run("a", "t", -1, 0))},
    "messages without bytes": {"runs": (Run("a", "t", 25, 24),)},
    "bytes beyond the record": {"runs": (Run("a", "t", 1, 25),)},
    "a key for no line": {"keyed": (Keyed(1, "k", "x"),)},
    "a key before the first line": {"keyed": (Keyed(-1, "k", "x"),)},
    "two keys for a line": {"keyed": (Keyed(0, "k", "x"), Keyed(0, "l", "x"))},
    "a time before 1970": {"time_us": -1},
    "a time that has no year": {"time_us": 10**18},
    "a position that is no number": {"seen": Seen("-1", "00000000")},
    "a position without an end": {"seen": Seen("9" * 41, "00000000")},
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_header_that_can_not_be_true_is_bad(fault: str) -> None:
    """A record with a right checksum may be wrong all the same, and must not end the fold."""
    line = b'{"topic":"t","data":[1]}\n'[:24]
    good = Header("51", "aa", 1, NOON_US, (RUN,))
    log = Log()

    folded = log.add_record(
        encode_record(msgspec.structs.replace(good, **BAD_HEADERS[fault]), [line])
    )

    assert folded.bad is not None
    assert log.add_record(encode_record(good, [line])).placed


def test_header_with_fields_of_a_later_version_is_read() -> None:
    """Fields may be added at the end."""
    rest = b' ["51","aa",1,5,[],[],null,false,0,0,"",[],"more"]\n'
    record = b"clevrd1 %08x%b" % (zlib.crc32(rest), rest)

    assert Log().add_record(record).bad is None


# --- planning -------------------------------------------------------------------------------------

MESSAGES = st.lists(
    st.tuples(st.sampled_from("tu"), st.sampled_from([None, "k", "l"]), st.sampled_from("xy")),
    max_size=6,
)
LOGS = st.lists(
    st.one_of(
        st.builds(lambda messages, more: (messages, more), MESSAGES, st.integers(0, 1 << 30)),
        st.sampled_from([b'{"topic":"t","data":1}', b'{"topic":"u","data":1}', b"clevrd1 bad"]),
    ),
    max_size=25,
)


def records_of(log: list[Any]) -> Iterator[bytes]:
    """Yield the records of a log that hypothesis made."""
    for each in log:
        if isinstance(each, bytes):
            yield each
            continue
        messages, seed = each
        chance = random.Random(seed)  # noqa: S311
        yield record_of(
            *sorted(messages, key=lambda message: str(message[0])),
            stamp=chance.choice(["51"] * 5 + ["52"]),
            writer=chance.choice(["aa", "bb"]),
            sequence=chance.randint(1, 9),
            at_s=chance.choice([0, 30, 61, 200]),
            max_keys=chance.choice([2, 100]),
            tenant=chance.choice([FOREIGN_TENANT, "acme"]),
            is_reset=chance.random() < 0.1,
        )


@given(log=LOGS, is_complete=st.booleans())
def test_plan_is_what_apply_does(log: list[Any], is_complete: bool) -> None:
    """An engine is given the places before it appends, and nothing is changed by asking."""
    fold = Fold(1, 3, is_complete=is_complete)
    twin = Fold(1, 3, is_complete=is_complete)
    for position, record in enumerate(records_of(log), 1):
        planned = None
        if record.startswith(b"clevrd1 ") and b"bad" not in record:
            header = decode_header(record)[0]
            lines_at = len(record) - sum(run.size_bytes for run in header.runs)
            planned = fold.plan(header, lines_at)

        folded = fold.apply(position, record)

        assert planned is None or planned == folded.placed
        assert twin.apply(position, record) == folded


@given(log=LOGS, ahead=st.lists(st.integers(0, 2), min_size=25, max_size=25))
def test_record_that_was_planned_is_counted_as_any_other(log: list[Any], ahead: list[int]) -> None:
    """Whether it is read at once behind its plan, or others come first, or another is planned."""
    fold, twin = Fold(1, 3), Fold(1, 3)
    records = list(records_of(log))
    known = [
        decode_header(record) if record.startswith(b"clevrd1 ") and b"bad" not in record else None
        for record in records
    ]
    for index, record in enumerate(records):
        # This one is planned last, or first, or long before.
        for place in range(index, min(index + 3, len(records)))[:: ahead[index] - 1 or 1]:
            if (header := known[place]) is not None:
                fold.plan(*header)

        folded = fold.apply(index + 1, record, known[index])

        assert folded == twin.apply(index + 1, record)

    assert [*fold.checkpoint(is_whole=True)] == [*twin.checkpoint(is_whole=True)]


# --- checkpoints ----------------------------------------------------------------------------------


@given(log=LOGS, cuts=st.lists(st.integers(0, 25), max_size=3), slow=st.booleans())
def test_fold_goes_on_from_a_checkpoint_as_if_it_had_read_all(
    log: list[Any], cuts: list[int], slow: bool
) -> None:
    """Wherever it is cut, and though records are applied while a checkpoint is taken."""
    records = [*enumerate(records_of(log), 1)]
    whole = Fold(1, 3)
    for position, record in records:
        whole.apply(position, record)

    fold = Fold(1, 3)
    for cut in sorted({*cuts, len(records)}):
        taking = fold.checkpoint()
        checkpoint = next(taking, None) if slow else None
        for position, record in records[:cut]:
            if position > fold.position:
                fold.apply(position, record)
        checkpoint = [checkpoint, *taking][-1]
        if checkpoint is not None:
            fold = restored(checkpoint, Fold(1, 3))
    for position, record in records:
        if position > fold.position:
            fold.apply(position, record)

    assert (fold.epoch, fold.position) == (whole.epoch, whole.position)
    if whole.is_known:
        assert summary(fold) == summary(whole)


def test_checkpoint_is_of_its_first_step_and_taken_in_small_steps() -> None:
    """Topics that change, come, or end with their epoch meanwhile are as they were."""
    log = Log()
    for first in range(0, 3_500, 500):
        log.add(*(plain(f"t{number:04}") for number in range(first, first + 500)))
    before = summary(log.fold)
    taking = log.fold.checkpoint()

    taken = []
    for step, each in enumerate(taking, 1):
        taken.append(each)
        log.add(plain(f"t{3_500 - 400 * step:04}"), plain("t0001"), plain(f"new{step}"))
        if step == 3:
            log.add(plain("t0002"), stamp="52")

    checkpoint = taken[-1]
    assert len(taken) == 4 + 1
    assert checkpoint is not None
    assert checkpoint.topics == before.topics
    assert checkpoint.state == before.state
    assert (checkpoint.position, checkpoint.is_whole) == (7, True)


def test_many_keys_are_spelled_in_small_steps() -> None:
    """Keys that are forgotten meanwhile are in the checkpoint as well."""
    log = Log()
    for first in range(0, 2_500, 100):
        keys = [("t", f"k{number}", "x") for number in range(first, first + 100)]
        log.add(*keys, max_keys=10_000)
    before = summary(log.fold)
    taking = log.fold.checkpoint()

    taken = [next(taking)]
    log.add(*(("t", f"other{number}", "x") for number in range(300)), max_keys=10)
    taken += taking

    checkpoint = taken[-1]
    assert len(taken) == 1 + 3 + 1
    assert checkpoint is not None
    assert checkpoint.state == before.state
    assert summary(restored(checkpoint)).state == before.state


def test_engine_that_keeps_topics_is_given_changed_ones() -> None:
    """The first checkpoint of an epoch has all, and the next one those that changed since."""
    log = Log(Fold(0, 1, keeps_topics=True))
    log.add(plain("a"), plain("b"))

    first = checkpoint_of(log.fold)
    log.add(plain("b"), plain("c"))
    second = checkpoint_of(log.fold)
    third = checkpoint_of(log.fold)
    whole = checkpoint_of(log.fold, is_whole=True)
    log.add(plain("d"), stamp="52")
    fourth = checkpoint_of(log.fold)

    def heads(checkpoint: Checkpoint) -> dict[str, int]:
        return {each.topic: each.head for each in checkpoint.topics}

    assert (first.is_whole, heads(first)) == (True, {"a": 1, "b": 1})
    assert (second.is_whole, heads(second)) == (False, {"b": 2, "c": 1})
    assert (third.is_whole, heads(third)) == (False, {})
    assert (whole.is_whole, heads(whole)) == (True, {"a": 1, "b": 2, "c": 1})
    assert (fourth.is_whole, heads(fourth)) == (True, {"d": 1})


def test_after_a_start_an_engine_that_keeps_topics_is_given_changed_ones() -> None:
    """A million topics are not written again for each start."""
    log = Log(Fold(0, 1, keeps_topics=True))
    log.add(plain("a"), plain("b"))
    after = Log(restored(checkpoint_of(log.fold), Fold(0, 1, keeps_topics=True)))

    after.add(plain("b"), writer="bb")
    checkpoint = checkpoint_of(after.fold)

    assert checkpoint.is_whole is False
    assert checkpoint.topics == [TopicHead("acme", "b", 2)]


def test_checkpoint_behind_one_that_was_given_up_is_whole() -> None:
    """Topics that were in it would be missing, as would others after the fold went back."""
    log = Log(Fold(0, 1, keeps_topics=True))
    log.add(plain("a"), plain("b"))
    first = checkpoint_of(log.fold)
    log.add(plain("b"))
    given_up = log.fold.checkpoint()
    next(given_up)

    with pytest.raises(RuntimeError, match="another checkpoint"):
        next(log.fold.checkpoint())
    assert isinstance(given_up, Generator)
    given_up.close()
    second = checkpoint_of(log.fold)
    went_back = checkpoint_of(restored(first, log.fold))

    assert (second.is_whole, went_back.is_whole) == (True, True)
    assert len(second.topics) == len(went_back.topics) == 2


def test_no_checkpoint_is_taken_of_what_is_not_known() -> None:
    """It would be of no use to anybody."""
    assert [*Fold(0, 1).checkpoint()] == []


def test_records_that_wait_are_behind_a_checkpoint() -> None:
    """They have changed nothing yet, so they are read again."""
    log = Log()
    log.add(plain())
    log.add_record(b'{"topic":"t","data":1}')

    checkpoint = checkpoint_of(log.fold)
    fold = restored(checkpoint)

    assert (checkpoint.position, checkpoint.digest) == (1, digest_of(record_of(plain())))
    assert (fold.position, fold.waiting, fold.is_settled) == (1, 0, True)


def spoilt(checkpoint: Checkpoint, how: str) -> Checkpoint:
    """Return a checkpoint that can't be used."""
    first, *keys = checkpoint.state.split(b"\n")
    replace = msgspec.structs.replace
    if how == "another version":
        state = msgspec.json.decode(first[9:], type=FoldState)
        return replace(
            checkpoint, state=b"\n".join([spell_state(replace(state, version=2)), *keys])
        )
    return {
        "empty": replace(checkpoint, state=b""),
        "a flipped bit": replace(checkpoint, state=first.replace(b"51", b"50") + b"\n" + keys[0]),
        "a flipped bit of a key": replace(
            checkpoint, state=first + b"\n" + keys[0].replace(b"acme", b"acmf")
        ),
        "no JSON": replace(checkpoint, state=b"%08x {" % zlib.crc32(b"{")),
        "keys that are none": replace(
            checkpoint, state=b"%b\n%08x {}" % (first, zlib.crc32(b"{}"))
        ),
        "keys that are missing": replace(checkpoint, state=first),
        "another epoch": replace(checkpoint, partition_epoch="00"),
        "changed topics alone": replace(checkpoint, is_whole=False),
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        *("empty", "another version", "a flipped bit", "a flipped bit of a key", "no JSON"),
        *("keys that are none", "keys that are missing", "another epoch", "changed topics alone"),
    ],
)
def test_checkpoint_that_can_not_be_used_changes_nothing(how: str) -> None:
    """It is passed over; a fold that had begun to use it is as it was."""
    log = Log()
    log.add(("t", "k", "x"))
    checkpoint = spoilt(checkpoint_of(log.fold), how)
    other = Log()
    other.add(plain("u"), stamp="77")
    before = summary(other.fold)

    with pytest.raises(BadCheckpoint, match=r"\w+ \w+"):
        restored(checkpoint, other.fold)

    assert summary(other.fold) == before
    assert other.fold.position == 1


@pytest.mark.parametrize("fold", [Fold(1, 1), Fold(0, 2)])
def test_checkpoint_of_another_partition_is_not_used(fold: Fold) -> None:
    """Nor one of a log with another number of partitions: ids would be others."""
    log = Log()
    log.add(plain())

    with pytest.raises(BadCheckpoint, match="another partition"):
        restored(checkpoint_of(log.fold), fold)


def test_epoch_that_is_over_is_let_go_in_parts() -> None:
    """To free a million topics and keys at once would hold the loop."""
    log = Log()
    log.add(*(plain(f"t{number:04}") for number in range(2_500)))
    log.add(*(("t", f"k{number}", "x") for number in range(2_500)), max_keys=9_999)
    old = log.fold._epoch
    log.add(plain(), stamp="52")

    sizes = []
    while log.fold._over:
        log.add(stamp="52")
        sizes.append(len(old.heads.by_slot) + len(old.heads.order) + len(old.keys._by_slot))

    assert len(sizes) >= 8
    assert sizes[-1] == 0
    assert all(before - after <= 1_001 for before, after in pairwise(sizes))


# --- going back -----------------------------------------------------------------------------------


def test_record_with_another_stamp_is_recognised() -> None:
    """The caller looks then whether the log has lost records; other records never make it look."""
    log = Log()
    other = record_of(plain(), stamp="52")
    assert not log.fold.has_other_stamp(other)
    log.add(plain())

    found = {
        name: log.fold.has_other_stamp(record)
        for name, record in {
            "other": other,
            "same": record_of(plain(), sequence=2),
            "foreign": b'{"topic":"t","data":1}',
            "bad": b"clevrd1 00000000 " + other[17:],
            "later": b"clevrd2 ",
        }.items()
    }

    assert [name for name, is_other in found.items() if is_other] == ["other"]


def test_records_behind_the_settled_one_are_read_again() -> None:
    """Foreign ones that wait may be other ones by now; then the record itself is applied."""
    log = Log()
    log.add(plain())
    log.add_record(b'{"topic":"lost","data":1}')
    log.fold.apply(3, b"clevrd1 bad")
    record = record_of(plain(), stamp="52")
    assert log.fold.has_other_stamp(record)
    assert not log.fold.is_settled

    log.fold.go_to_settled(record)
    log.fold.apply(3, b'{"topic":"kept","data":1}')

    assert not log.fold.has_other_stamp(record)
    assert [each.request.topic for each in log.fold.apply(4, record).confirmed] == ["kept"]


def test_foreign_records_before_the_first_stamp_are_read_again_too() -> None:
    """They may have been lost, though no stamp tells."""
    log = Log()
    log.add_record(b'{"topic":"lost","data":1}')

    assert log.fold.has_other_stamp(record_of(plain()))


def test_what_is_read_again_is_not_for_readers_of_a_later_epoch() -> None:
    """A fold that went back says so, until it comes to where readers are or to a new epoch."""
    log = Log()
    log.add(plain())
    checkpoint = checkpoint_of(log.fold)
    in_first = record_of(plain(), sequence=2)
    log.add_record(in_first)
    second = log.add(plain(), stamp="52")

    restored(checkpoint, log.fold)
    again = log.add_record(in_first)
    third = log.add(plain(), stamp="53")

    assert (second.is_again, again.is_again, third.is_again) == (False, True, False)
    assert offsets(again.placed) == [("t", 2, 1)]
    assert log.fold.readers_epoch == third.partition_epoch


def test_fold_that_went_back_to_before_its_start_waits_for_the_end() -> None:
    """It can't tell whether an epoch that it never saw is older than its readers' or newer."""
    other = Log()
    other.add(plain())
    old = checkpoint_of(other.fold)
    other.add(plain(), stamp="52")
    other.add(plain(), stamp="53")
    log = Log(restored(checkpoint_of(other.fold)))
    readers = log.fold.readers_epoch

    restored(old, log.fold)
    unknown = log.add(plain(), stamp="52")
    was_behind = log.fold.is_behind
    known = log.add(plain(), stamp="54")
    log.fold.arrive()

    assert (unknown.is_again, was_behind, known.is_again) == (True, True, True)
    assert readers != log.fold.readers_epoch == log.fold.epoch
    assert not log.fold.is_behind


def test_arriving_without_an_epoch_is_no_arrival() -> None:
    """Readers stay where they are until positions are known."""
    again = ReadAgain(is_complete=False)
    fold = Fold(0, 1, is_complete=False)
    again.go_to("e1", 10)
    again.go_to("", 3)

    fold.arrive()
    again.begin_epoch("e0", 4)

    assert (again.is_behind, again.readers_epoch) == (True, "e1")
    again.arrive("e2", 11)
    assert (again.is_behind, again.readers_epoch) == (False, "e2")


def test_jump_over_what_was_removed_brings_readers_to_a_newer_epoch() -> None:
    """A checkpoint behind all that was read, in an epoch that was never seen, is newer."""
    again = ReadAgain(is_complete=True)
    again.begin_epoch("e1", 1)

    again.go_to("e3", 30)
    again.go_to("e1", 5)
    is_behind = again.is_behind
    again.go_to("e3", 31)

    assert is_behind
    assert (again.is_behind, again.readers_epoch) == (False, "e3")


def test_fold_that_begins_again_counts_the_same() -> None:
    """A log that is still complete gives the same positions a second time."""
    log = Log()
    first = log.add(plain())
    end = summary(log.fold)

    log.fold.begin_again(0, is_complete=True)
    again = log.add_record(record_of(plain()))

    assert again == first
    assert summary(log.fold) == end
    log.fold.begin_again(7, is_complete=False)
    assert (log.fold.position, log.fold.is_known, log.fold.settled_digest) == (7, False, "")
