"""Where a journal in Kafka is, as settings say it: URLs, properties, stamps, wrong topics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka import KafkaError, KafkaException
from daemons import ROOT

from clevrd.cli.command_line import main
from clevrd.errors import ConfigError
from clevrd.journal.base import Checkpoint, TopicHead
from clevrd.journal.checkpoint_parts import Joined, state_parts, topic_parts
from clevrd.journal.engines import engine_of
from clevrd.journal.kafka import library
from clevrd.journal.kafka import questions as questions_module
from clevrd.journal.kafka.library import (
    LOST,
    KafkaFault,
    Troubles,
    client_properties,
    fault_of,
    make_admin,
    sentence_of,
)
from clevrd.journal.kafka.properties import BadProperty, read_properties
from clevrd.journal.kafka.questions import Questions
from clevrd.journal.kafka.settings import KafkaSettings
from clevrd.journal.kafka.stamps import is_of_topic, is_void, spell_stamp, stamp_in, topic_digits
from clevrd.journal.kafka.topic_state import (
    LEAST_MAX_BYTES,
    TopicState,
    checkpoints_config,
    refusal_of,
    refusal_of_checkpoints,
    topic_config,
    warnings_of,
)
from clevrd.journal.kafka.url import KafkaAddress, parse_kafka_url
from clevrd.journal.records import Header, encode_record
from clevrd.journal.settings import read_journal
from clevrd.journal.url_parts import BadUrl

SECRET = "a@b"  # noqa: S105  # of no server
ID = "0123456789abcdef0123456789abcdef"


def settings(url: str = "kafka://h/t", **fields: Any) -> KafkaSettings:
    """Return settings for a topic."""
    return KafkaSettings(address=parse_kafka_url(url), shown=url, **fields)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("kafka://h/t", KafkaAddress((("h", 9092),), "t")),
        ("kafka://a:1,b:2/my.log", KafkaAddress((("a", 1), ("b", 2)), "my.log")),
        (
            "kafka+ssl://me:a%40b@[::1]:7/t",
            KafkaAddress((("::1", 7),), "t", "me", SECRET, is_tls=True),
        ),
        ("kafka://me@h/t", KafkaAddress((("h", 9092),), "t", "me")),
        # As an operator has seen it.
        ("kafka://h/t#0123abcd", KafkaAddress((("h", 9092),), "t")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_url_is_understood(url: str, address: KafkaAddress) -> None:
    """Brokers, a topic, and who asks."""
    assert parse_kafka_url(url) == address


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis://h", "begins with one of"),
        ("kafka://h", "write the topic"),
        ("kafka://h/", "write the topic"),
        ("kafka:///t", "write host:9092"),
        ("kafka://h:port/t", "write host:9092"),
        ("kafka://h/a b", "letters, digits"),
        ("kafka://h/..", "letters, digits"),
        ("kafka://h/" + "x" * 231, "at most 230"),
        ("kafka://:secret@h/t", "user:password"),
        ("kafka://h/t?acks=1", "settings of their own"),
    ],
    ids=lambda value: value[:30],
)
def test_wrong_url_is_told_without_its_secret(url: str, sentence: str) -> None:
    """The sentence says what to write, and has nothing of the URL's user and password."""
    with pytest.raises(BadUrl, match=sentence) as caught:
        parse_kafka_url(url)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"directory": "/j"}, "not both"),
        ({"prefix": "x"}, "in Redis"),
        ({"segment_s": 60.0}, "in a directory"),
        ({"password_file": "/f"}, "whose password it is"),
        ({"url": "kafka://me@h/t"}, "a user and no password"),
        ({"url": "kafka://me:p@h/t", "password_file": "/f"}, "has a password already"),
        ({"ca_file": "/ca"}, "begin with kafka[+]ssl"),
        ({"replication_factor": 2, "min_replicas": 3}, "more than replication_factor"),
        ({"retention_s": 60.0}, "900 or more"),
        ({"kafka": {"acks": 1}}, "kafka.acks .* sets it itself"),
        ({"kafka": {"group": {"id": "x"}}}, "kafka.group.id .* sets it itself"),
        ({"kafka": {"security.protocol": "SSL"}}, "the URL says it"),
        ({"kafka": {"ssl.key.password": "hidden"}}, '"ssl.key.password.file"'),
        ({"kafka": {"client.rack": []}}, "a text, a number"),
        ({"url": "redis://h", "kafka": {"client.rack": "a"}}, "in Kafka"),
        ({"directory": "/j", "url": "", "replication_factor": 3}, "in Kafka"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_table_is_told_in_a_line(table: dict[str, Any], sentence: str) -> None:
    """Each mistake has its own sentence, names the file, and holds no secret."""
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_journal({"journal": {"url": "kafka://h/t", **table}}, "", "clevrd.toml")

    assert "clevrd.toml" in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_properties_are_flat_texts() -> None:
    """TOML's tables of dotted names, numbers and truth values become what the library takes."""
    found = read_properties(
        {"sasl": {"mechanism": "SCRAM-SHA-512"}, "socket.keepalive.enable": True, "debug.x": 1.5}
    )

    assert found == {
        "sasl.mechanism": "SCRAM-SHA-512",
        "socket.keepalive.enable": "true",
        "debug.x": "1.5",
    }
    with pytest.raises(BadProperty, match="more than 100"):
        read_properties({f"p{number}": 1 for number in range(101)})


def test_secrets_come_from_files_and_are_shown_nowhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A password of the URL's user, and one of a property."""
    (tmp_path / "password").write_text("secret one\n")
    (tmp_path / "key").write_text("secret two\n")
    path = tmp_path / "clevrd.toml"
    path.write_text(
        f'[journal]\nurl = "kafka://me@h/t"\npassword_file = "{tmp_path}/password"\n'
        f'[journal.kafka]\n"sasl.mechanism" = "SCRAM-SHA-512"\n'
        f'"ssl.key.password.file" = "{tmp_path}/key"\n'
    )
    table = {
        "url": "kafka://me@h/t",
        "password_file": f"{tmp_path}/password",
        "kafka": {"ssl": {"key": {"password": {"file": f"{tmp_path}/key"}}}},
    }

    engine = engine_of(read_journal({"journal": table}, ""), lambda: 0)
    code = main(["checkconfig", "--config", str(path)])

    told = capfd.readouterr()
    given = client_properties(engine._settings, Troubles())  # type: ignore[attr-defined]
    assert (given["sasl.password"], given["ssl.key.password"]) == ("secret one", "secret two")
    assert given["security.protocol"] == "SASL_PLAINTEXT"
    assert (code, "secret" in told.out + told.err) == (0, False)


def test_checkconfig_finds_a_secret_that_cannot_be_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file that is missing is named before the daemon needs it."""
    path = tmp_path / "clevrd.toml"
    path.write_text(
        '[journal]\nurl = "kafka+ssl://h/t"\n'
        '[journal.kafka]\n"ssl.key.password.file" = "/not/there"\n'
    )

    code = main(["checkconfig", "--config", str(path)])

    assert code != 0
    assert "/not/there" in capfd.readouterr().err


def test_property_that_the_library_does_not_know_is_told() -> None:
    """librdkafka's own words, and where to look."""
    with pytest.raises(ConfigError, match=r"no.such.*see \[journal.kafka\]"):
        make_admin(settings(properties=(("no.such", "1"),)), Troubles())


def test_missing_library_is_told_in_a_line() -> None:
    """Without the extra the daemon says how to install it, and does not start."""
    script = (
        "import sys; sys.modules['confluent_kafka'] = None; from clevrd.entry import main;"
        " sys.argv[1:] = ['serve', '--address', '127.0.0.1:0', '--journal', 'kafka://h/t'];"
        " sys.exit(main())"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert 'pip install "clevrd[kafka]"' in line


# --- stamps --------------------------------------------------------------------------------------


def record_with(stamp: str) -> bytes:
    """Return a node's record with a stamp."""
    return encode_record(Header(stamp, "w", 1, 1), ())


def test_stamp_is_the_topics_id_and_the_leaders_epoch_where_that_matters() -> None:
    """Topics where nothing can be lost keep their stamp over changes of leaders."""
    assert topic_digits(-1, 1) == "f" * 16 + "0" * 15 + "1"
    assert spell_stamp(ID, 10, is_kept=True) == ID
    assert spell_stamp(ID, 10, is_kept=False) == f"{ID}0000000a"
    assert stamp_in(record_with(ID)) == ID
    assert stamp_in(b'{"topic":"t","data":1}') is None
    assert stamp_in(b"clevrd1 broken") is None


@pytest.mark.parametrize(
    ("stamp", "leader_epoch", "void"),
    [
        (ID, 3, False),
        (ID, None, False),
        (f"{ID}00000003", 3, False),
        (f"{ID}00000003", 4, True),
        (f"{ID}00000004", 3, True),
        (f"{ID}00000003", None, False),
        ("f" * 32, 3, True),
        ("f" * 32, None, True),
        ("f" * 32 + "00000003", 3, True),
        ("abcd", 3, True),
    ],
)
def test_record_of_another_life_of_the_log_is_void(
    stamp: str, leader_epoch: int | None, void: bool
) -> None:
    """All readers go by the same: the record's own stamp, and where and when it was taken."""
    assert is_void(record_with(stamp), ID, leader_epoch) is void


def test_records_without_a_stamp_are_not_void() -> None:
    """Foreign publishes, later versions and what is broken are for the fold to judge."""
    for record in (b'{"topic":"t","data":1}', b"", b"clevrd2 x", b"clevrd1 00000000 {"):
        assert not is_void(record, ID, 1)
        assert is_of_topic(record, ID)
    assert not is_of_topic(record_with("f" * 32), ID)
    assert is_of_topic(record_with(f"{ID}00000009"), ID)


# --- topics --------------------------------------------------------------------------------------


# A topic that loses nothing when one of three brokers dies.
KEPT = {"unclean_leader_election_enable": "false", "min_insync_replicas": "2"}


def topic(**config: str) -> TopicState:
    """Return a topic with 8 partitions and 3 replicas."""
    return TopicState(ID, 8, 3, {name.replace("_", "."): value for name, value in config.items()})


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (TopicState("0" * 32, 8, 3, {}), "3.0 or newer"),
        (TopicState(ID, 4, 3, {}), "write partitions = 4"),
        (topic(cleanup_policy="compact,delete"), "is compacted"),
        (topic(max_message_bytes=str(LEAST_MAX_BYTES - 1)), "raise its max.message.bytes"),
        (topic(min_insync_replicas="1"), "raise the topic's"),
        (TopicState(ID, 8, 1, {}), "give it more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_topic_that_does_not_fit_is_told_in_a_line(state: TopicState, sentence: str) -> None:
    """Each has its own sentence, which says what to do."""
    refusal = refusal_of(state, settings(min_replicas=2))

    assert refusal is not None
    assert sentence in refusal
    assert "kafka://h/t" in refusal


def test_topic_that_fits_is_taken_and_differences_are_told() -> None:
    """Without rights to see its configuration nothing is held against it."""
    made = settings(retention_s=1000.0, retention_bytes=80 << 20, min_replicas=2)
    config = topic_config(made)
    bound_to = TopicState(ID, 8, 3, config | {"unclean.leader.election.enable": "false"})

    assert refusal_of(bound_to, made) is None
    assert list(warnings_of(bound_to, made)) == []
    assert refusal_of(topic(), settings()) is None
    assert config["retention.ms"] == "1000000"
    assert config["retention.bytes"] == str(10 << 20)
    assert config["min.insync.replicas"] == "2"
    endless = topic_config(settings(retention_s=0.0, retention_bytes=0))
    assert (endless["retention.ms"], endless["retention.bytes"]) == ("-1", "-1")
    other = topic(max_message_bytes="700000", retention_ms="5", **KEPT)
    small, age = warnings_of(other, settings())
    assert "700000" in small
    assert "the topic's counts" in age
    beside = TopicState(ID, 16, 3, checkpoints_config(made, bound_to))
    assert refusal_of_checkpoints(beside, "t.checkpoints", 16, made) is None
    assert "needs 8" in str(refusal_of_checkpoints(beside, "t.checkpoints", 8, made))


@pytest.mark.parametrize(
    ("config", "unclean"),
    [({}, None), ({**KEPT, "unclean_leader_election_enable": "true"}, "true"), (KEPT, None)],
    ids=["unseen", "unclean", "kept"],
)
def test_checkpoints_are_there_as_long_as_the_log(
    config: dict[str, str], unclean: str | None
) -> None:
    """Where the log goes on with a leader that was not in sync, the topic beside it does, too."""
    made = checkpoints_config(settings(), topic(**config))

    assert made.get("unclean.leader.election.enable") == unclean


@pytest.mark.parametrize(
    ("config", "durability", "kept"),
    [
        ({}, "memory", False),
        ({"unclean_leader_election_enable": "false"}, "memory", False),
        ({"unclean_leader_election_enable": "false", "min_insync_replicas": "2"}, "replicas", True),
        ({"unclean_leader_election_enable": "true", "min_insync_replicas": "2"}, "memory", False),
        ({"unclean_leader_election_enable": "false", "flush_messages": "1"}, "fsync", True),
        ({"unclean_leader_election_enable": "true", "flush_messages": "1"}, "memory", False),
    ],
)
def test_promise_is_what_the_topic_says(
    config: dict[str, str], durability: str, kept: bool
) -> None:
    """Two in sync, or a flush before the answer, and no leader that was not in sync."""
    state = topic(**config)

    assert (state.durability, state.is_kept) == (durability, kept)


def test_topic_that_asks_for_more_replicas_than_it_has_promises_no_more() -> None:
    """Brokers take min.insync.replicas 2 for 1 where there is one copy."""
    alone = TopicState(ID, 8, 1, topic(**KEPT).config)

    assert (alone.durability, alone.is_kept) == ("memory", False)


@pytest.mark.parametrize(
    ("replicas", "config", "sentence"),
    [
        (3, {}, "can't be seen, so each change of leaders is taken for a loss"),
        (3, {**KEPT, "unclean_leader_election_enable": "true"}, "not in sync, which loses"),
        (1, KEPT, "has one replica, and the newest messages that were answered go with"),
        (3, {**KEPT, "min_insync_replicas": "1"}, "one broker alone has; set it to 2"),
        (3, {**KEPT, "min_insync_replicas": "3"}, "takes nothing while one of its 3 replicas"),
        (2, KEPT, "give it 3 replicas"),
        (3, KEPT, ""),
        (1, {**KEPT, "flush_messages": "1"}, ""),
    ],
    ids=["unseen", "unclean", "one", "one-in-sync", "all", "two-of-two", "kept", "flushed"],
)
def test_topic_that_is_too_weak_is_told(
    replicas: int, config: dict[str, str], sentence: str
) -> None:
    """What loses answered messages, or takes none, sooner than it has to: a sentence for each."""
    state = TopicState(ID, 8, replicas, topic(**config).config)

    told = [each for each in warnings_of(state, settings()) if "messages above" not in each]

    assert len(told) == bool(sentence)
    assert all(sentence in each for each in told)


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("_AUTHENTICATION", "password_file"),
        ("UNSUPPORTED_SASL_MECHANISM", '"sasl.mechanism"'),
        ("_SSL", "client_cert_file"),
        ("TOPIC_AUTHORIZATION_FAILED", "DescribeConfigs"),
        ("UNKNOWN_TOPIC_OR_PART", "make it yourself"),
        ("NOT_ENOUGH_REPLICAS", "min.insync.replicas"),
        ("KAFKA_STORAGE_ERROR", "disk"),
        ("INVALID_REPLICATION_FACTOR", "see replicas|replication_factor"),
        ("_UNSUPPORTED_FEATURE", "too old"),
        ("_RESOLVE", "hosts' names"),
        (LOST, "can't be reached: words of the broker; see whether its brokers run"),
        ("_ALL_BROKERS_DOWN", "speak TLS (kafka+ssl) or ask for a user"),
    ],
)
def test_each_fault_has_a_sentence_that_says_what_to_do(code: str, sentence: str) -> None:
    """It begins with where the Kafka is."""
    told = sentence_of(KafkaFault(code, "words of the broker."), "kafka://h/t")

    assert told.startswith("Kafka at kafka://h/t")
    assert any(part in told for part in sentence.split("|"))
    assert told.endswith(".")


def test_question_without_an_answer_is_told_with_its_reason() -> None:
    """A refused password says more than a broker that is not there, and is forgotten in time."""
    now_s = 100.0
    troubles = Troubles(lambda: now_s)
    unanswered = KafkaFault(LOST, "no answer in time")
    troubles.note(KafkaError(KafkaError._AUTHENTICATION, "wrong password"))
    troubles.note(KafkaError(KafkaError._ALL_BROKERS_DOWN))
    troubles.note(KafkaError(KafkaError._TRANSPORT, "refused"))

    assert troubles.reason_for(unanswered).code == "_AUTHENTICATION"
    assert troubles.reason_for(KafkaFault("OTHER", "")).code == "OTHER"
    now_s += 16.0
    assert troubles.reason_for(unanswered) is unanswered
    troubles.note(KafkaError(KafkaError._TRANSPORT, "refused"))
    assert troubles.reason_for(unanswered).text == "refused"
    troubles.clear()
    assert troubles.reason_for(unanswered) is unanswered
    assert fault_of(KafkaError(KafkaError._UNKNOWN_TOPIC)).code == "UNKNOWN_TOPIC_OR_PART"
    assert fault_of(TimeoutError()).code == LOST


class LeaderlessConsumer:
    """A consumer that knows of no leader until it is told to ask again, as the library does."""

    def __init__(self) -> None:
        self.knows = False

    def get_watermark_offsets(self, _place: object, timeout: float) -> tuple[int, int]:
        """Return the extent, once the leader is known."""
        if self.knows:
            return 3, 9
        raise KafkaException(KafkaError(KafkaError._UNKNOWN_PARTITION))

    def list_topics(self, _topic: str, timeout: float) -> None:
        """Ask who leads."""
        self.knows = True


async def test_leader_that_came_later_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said while there was none is kept by the library for a quarter of an hour."""
    consumer = LeaderlessConsumer()
    monkeypatch.setattr(questions_module, "make_consumer", lambda *_: consumer)
    questions = Questions(settings(), Troubles())

    assert await questions.extent("t", 0) == (3, 9)


def test_questions_do_not_wait_for_records_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each one waits half a second for the one before: a start asks for dozens of records."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(library, "_made", lambda _, properties: made.append(properties))
    Questions(settings(), Troubles())._opened_consumer()

    assert [each["fetch.wait.max.ms"] for each in made] == [10]


def test_parts_of_a_checkpoint_are_joined_again() -> None:
    """State and topics of any size, in parts that fit into one record."""
    heads = [TopicHead("default", f"t{number}", number) for number in range(9_000)]
    checkpoint = Checkpoint(7, "0badcafe", "e", b"s" * 700_000, heads, is_whole=True)
    states, topics = list(state_parts(checkpoint)), list(topic_parts(checkpoint))
    joined = Joined(len(states))

    for part in states + topics:
        joined.add(part)

    assert joined.checkpoint(7, "0badcafe", "e") == checkpoint
    assert (len(states), len(topics)) == (3, 3)
    assert max(map(len, states + topics)) < 512 << 10
    with pytest.raises(msgspec.MsgspecError):
        joined.add(b"no JSON")
