"""The streams of a journal: their names, their settings, and what a server says of them. Pure.

Each partition is a stream of its own, since JetStream puts the messages of a stream in order, and
nothing else. Their subjects end with the id of the log, which is random: a record is published to
the subject of the log that it was made for. If a stream is made again, or has lost records that a
node has read, it gets another id, and so another subject. A record that is late for the old one has
no receiver then, and the server itself says so ("no responders"). So no record is taken by a log
that it was not made for, and no question before the append is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final

import msgspec

from clevrd.journal.nats.settings import NatsSettings

MIN_VERSION: Final = (2, 10, 23)
# Records have up to 512 KiB, and a single message may be larger.
MIN_PAYLOAD: Final = 640 << 10
_NS: Final = 1_000_000_000

# The note in a stream's metadata that says how many partitions its log has.
PARTITIONS: Final = "clevrd_partitions"


class Names:
    """The streams and subjects of one journal."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.checkpoints = f"{prefix}-checkpoints"

    def stream(self, partition: int) -> str:
        """Return the name of a partition's stream."""
        return f"{self._prefix}-p{partition}"

    def records(self, partition: int, log_id: str) -> str:
        """Return the subject of a log's records."""
        return f"{self._prefix}.p{partition}.{log_id}"

    def checkpoint(self, partition: int, *rest: str) -> str:
        """Return a subject of checkpoints; ``rest`` may end with a wildcard."""
        return ".".join((self._prefix, "checkpoint", f"p{partition}", *rest))


class _Config(msgspec.Struct, frozen=True):
    subjects: list[str] = []
    retention: str = "limits"
    storage: str = "file"
    discard: str = "old"
    num_replicas: int = 1
    max_age: int = 0
    max_bytes: int = -1
    max_msgs: int = -1
    max_msgs_per_subject: int = -1
    max_msg_size: int = -1
    max_consumers: int = -1
    no_ack: bool = False
    sealed: bool = False
    deny_purge: bool = False
    persist_mode: str = ""
    mirror: Any = None
    sources: Any = None
    subject_transform: Any = None
    metadata: dict[str, str] = {}


class _State(msgspec.Struct, frozen=True):
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0


class _Cluster(msgspec.Struct, frozen=True):
    leader: str = ""
    # Servers before 2.12 don't say it.
    leader_since: str = ""


class ApiError(msgspec.Struct, frozen=True):
    """JetStream's way to refuse."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class StreamInfo(msgspec.Struct, frozen=True):
    """A stream as its leader describes it."""

    config: _Config = _Config()
    created: str = ""
    state: _State = _State()
    cluster: _Cluster = _Cluster()
    # The server's time.
    ts: str = ""

    @property
    def now_ms(self) -> int:
        """The server's time, in milliseconds since 1970; 0 where it does not say it."""
        try:
            return int(datetime.fromisoformat(self.ts).timestamp() * 1000)
        except ValueError:
            return 0

    @property
    def log_id(self) -> str:
        """The id of the log that takes records now."""
        return self.config.subjects[0].rpartition(".")[2] if self.config.subjects else ""

    @property
    def first(self) -> int:
        """The oldest record's position; one more than the last one's if there is none."""
        return self.state.first_seq if self.state.messages else self.state.last_seq + 1

    @property
    def last(self) -> int:
        """The newest record's position, also if it is gone; 0 before the first."""
        return self.state.last_seq


_decoder: Final = msgspec.json.Decoder(StreamInfo)


def read_info(answer: bytes) -> StreamInfo | None:
    """Return what a server says of a stream; None where that can't be understood."""
    try:
        return _decoder.decode(answer)
    except msgspec.MsgspecError:
        return None


def stamp_of(info: StreamInfo, incarnation: str) -> str:
    """Return the log's stamp: 32 hexadecimal digits.

    Args:
        incarnation: of what accepts records, where records that it accepted may be lost when it
            ends; empty where they may not.
    """
    name = f"{info.log_id} {info.created} {incarnation}".encode()
    return blake2b(name, digest_size=16).hexdigest()


def log_config(settings: NatsSettings, names: Names, partition: int, log_id: str) -> dict[str, Any]:
    """Return the settings of a partition's stream."""
    return {
        **_common(settings, names.stream(partition)),
        "subjects": [names.records(partition, log_id)],
        "discard": "old",
        "max_age": int(settings.retention_s * _NS),
        "max_bytes": max_bytes(settings),
    }


def checkpoints_config(settings: NatsSettings, names: Names) -> dict[str, Any]:
    """Return the settings of the stream that has the checkpoints of all partitions."""
    prefix = names.checkpoint(0).rpartition(".")[0]
    return {
        **_common(settings, names.checkpoints),
        "subjects": [f"{prefix}.>"],
        "discard": "new",
    }


def _common(settings: NatsSettings, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "retention": "limits",
        "storage": "file",
        "num_replicas": settings.replicas,
        "metadata": {PARTITIONS: str(settings.partitions)},
    }


def max_bytes(settings: NatsSettings) -> int:
    """Return what each partition's stream may have; -1 for no bound."""
    return settings.retention_bytes // settings.partitions or -1


def wants_update(info: StreamInfo, settings: NatsSettings) -> bool:
    """Return whether a partition's stream keeps more, or less, than the settings say."""
    config = info.config
    bounds = int(settings.retention_s * _NS), max_bytes(settings)
    return (config.max_age, config.max_bytes) != bounds


def refusal_of(info: StreamInfo, name: str, settings: NatsSettings) -> str | None:
    """Return why a stream can't be one of this journal, and what to do; None if it can."""
    config = info.config
    at = f"The stream {name} in NATS at {settings.shown}"
    partitions = config.metadata.get(PARTITIONS)
    if partitions is None:
        return f"{at} is not a journal's; remove it, or give the journal another prefix."
    if partitions != str(settings.partitions):
        return (
            f"The journal in NATS at {settings.shown} was made with {partitions} partitions, and"
            f" the settings say {settings.partitions}; write partitions = {partitions}, or give a"
            " new log another prefix."
        )
    if config.num_replicas != settings.replicas:
        return (
            f"{at} has {config.num_replicas} replicas, and the settings say {settings.replicas};"
            f" write replicas = {config.num_replicas}, or change the streams of the journal, such"
            f" as by: nats stream update {name} --replicas {settings.replicas}."
        )
    wrong = ", ".join(_wrong_in(config))
    if wrong:
        return (
            f"{at} has other settings than the journal has made it with ({wrong}); set them back,"
            " or remove the stream, or give the journal another prefix."
        )
    return None


def _wrong_in(config: _Config) -> Iterator[str]:
    """Yield settings with which a stream loses records, or does not take them."""
    wanted: Mapping[str, Any] = {
        "retention": "limits",
        "storage": "file",
        "max_msgs": -1,
        "max_msgs_per_subject": -1,
        "max_consumers": -1,
        "no_ack": False,
        "sealed": False,
    }
    for field, value in wanted.items():
        if getattr(config, field) != value:
            yield f"{field} {getattr(config, field)}"
    if len(config.subjects) != 1:
        yield f"{len(config.subjects)} subjects"
    if 0 <= config.max_msg_size < MIN_PAYLOAD:
        yield f"max_msg_size {config.max_msg_size}"
    if config.persist_mode not in ("", "default"):
        yield f"persist_mode {config.persist_mode}"
    for field in ("mirror", "sources", "subject_transform"):
        if getattr(config, field):
            yield field


def version_of(text: str) -> tuple[int, ...]:
    """Return a server's version as numbers."""
    numbers = text.partition("-")[0].split(".")
    return tuple(int(part) for part in numbers if part.isdigit())


def server_refusal_of(info: Mapping[str, Any], shown: str) -> str | None:
    """Return why the journal can't use a server, by what it says first; None if it can."""
    version = str(info.get("version", ""))
    if version_of(version) < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        return f"NATS at {shown} is {version}, and the journal needs {wanted} or newer; update it."
    if not info.get("headers"):
        return f"NATS at {shown} has headers switched off, and JetStream needs them."
    payload = int(info.get("max_payload", 0))
    if payload < MIN_PAYLOAD:
        return (
            f"NATS at {shown} takes messages of {payload} bytes, and records of the journal have up"
            f" to {MIN_PAYLOAD}; raise max_payload in the server."
        )
    return None
