"""Real Kafka brokers, started by tests on free ports, alone or as a cluster. No daemon here.

`make kafka` installs Kafka into build/kafka; KAFKA_LIBS names a folder with the jars of another
version. Without any, or without Java, the tests are skipped, and fail where CI=true.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]
from daemons import ROOT
from ports import free_port
from server_process import ServerProcess
from tls import make_pair

LIBS: Final = Path(os.environ.get("KAFKA_LIBS") or ROOT / "build" / "kafka")
START_S: Final = 60.0
# A folder as brokers begin with, formatted for a cluster with any id.
FORMATTED: Final = LIBS / "formatted"
CLUSTER: Final = "4L6g3nShT-eMCtK--X86sw"

# The configuration of a topic that answers before its records are on the disk, as is usual.
UNKEPT: Final = {"flush.messages": str((1 << 63) - 1)}

_LOGIN: Final = "org.apache.kafka.common.security.plain.PlainLoginModule"
_JAVA: Final = (
    "java",
    *("-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
    *("-XX:-UsePerfData", "-Xshare:auto"),
)
_LOG4J: Final = """
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{HH:mm:ss,SSS} %p %c{1}: %m%n
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
"""


def need() -> None:
    """Skip the test without Java or Kafka, or fail it where CI=true."""
    reason = ""
    if shutil.which("java") is None:
        reason = "there is no java; on Debian: apt-get install default-jre-headless"
    elif not any(LIBS.glob("kafka_*.jar")):
        reason = f"there is no Kafka in {LIBS}: make kafka"
    if not reason:
        return
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class KafkaServer(ServerProcess):
    """One process with a folder; it can be killed, paused and started again.

    By itself it is a broker and its own controller.
    """

    def __init__(
        self,
        folder: Path,
        *,
        node: int = 1,
        roles: str = "broker,controller",
        controller: str = "",
        **changes: str,
    ) -> None:
        """Make a process of Kafka's; `start` starts it.

        Args:
            node: its number in its cluster.
            controller: another process that is the controller, as `voter` of that says it.
            changes: settings beside those of all, with _ in place of full stops; empty: not set.
        """
        need()
        self.node = node
        self._is_broker = "broker" in roles
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port, self.secured_port = free_port(), free_port()
        self.ca_file = str(folder / "localhost.pem")
        self._config = folder / "server.properties"
        control = free_port()
        self.voter = controller or f"{node}@127.0.0.1:{control}"
        own = (
            f"PLAINTEXT://127.0.0.1:{self.port},SECURED://127.0.0.1:{self.secured_port}",
            f"CONTROLLER://127.0.0.1:{control}",
        )
        settings = {
            "process.roles": roles,
            "node.id": str(node),
            "controller.quorum.voters": self.voter,
            "listeners": ",".join(own[not self._is_broker : 1 + ("controller" in roles)]),
            "advertised.listeners": (
                f"PLAINTEXT://127.0.0.1:{self.port},SECURED://localhost:{self.secured_port}"
            ),
            "listener.security.protocol.map": (
                "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SECURED:SASL_SSL"
            ),
            # The secured listener asks for a user; "me" may do all, as who is not asked, and
            # "other" nothing.
            "listener.name.secured.sasl.enabled.mechanisms": "PLAIN",
            "listener.name.secured.plain.sasl.jaas.config": (
                f'{_LOGIN} required user_me="secret" user_other="secret";'
            ),
            "listener.name.secured.ssl.keystore.type": "PEM",
            "listener.name.secured.ssl.keystore.location": self.ca_file,
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS;User:me",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(folder / "data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            # A leader that was killed is missed soon, so that the clients come back within seconds;
            # a busy machine may keep the broker from its own controller for as long.
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
            # A busy machine may take the broker from its own leadership, which means a new epoch in
            # topics that may have lost something by that: see UNKEPT.
            "log.flush.interval.messages": "1",
            "log.segment.delete.delay.ms": "100",
            "log.retention.check.interval.ms": "500",
            "log.cleaner.enable": "false",
        }
        settings |= {name.replace("_", "."): value for name, value in changes.items()}
        lines = "".join(f"{name}={value}\n" for name, value in settings.items() if value)
        self._config.write_text(lines)
        pair = make_pair(folder)
        Path(self.ca_file).write_text(pair.key.read_text() + pair.cert.read_text())
        (folder / "log4j2.properties").write_text(_LOG4J)

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    def url(self, topic: str) -> str:
        """Return the URL for a journal."""
        return f"kafka://{self.address}/{topic}"

    @property
    def admin(self) -> AdminClient:
        """A client that this project did not write."""
        return AdminClient(
            {
                "bootstrap.servers": self.address,
                "log_level": 0,
                "reconnect.backoff.ms": 50,
                "reconnect.backoff.max.ms": 200,
            }
        )

    def start(self) -> KafkaServer:
        """Start it, and wait until it answers; it has the data of its folder."""
        self.spawn()
        self.wait()
        return self

    def spawn(self) -> None:
        """Start it, and wait for nothing."""
        data = self.folder / "data"
        if not data.exists():
            if not FORMATTED.exists():
                self._format(data)
            shutil.copytree(FORMATTED, data)
            self._make_its_own(data)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command("kafka.Kafka", str(self._config)),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self, brokers: int = 1) -> None:
        """Wait until it answers, and knows so many brokers."""
        until_s = time.monotonic() + START_S
        admin = self.admin
        while True:
            try:
                if len(admin.list_topics(timeout=0.5).brokers) >= brokers:
                    return
                time.sleep(0.02)
            except KafkaException:
                if time.monotonic() > until_s or self.process.poll() is not None:
                    said = (self.folder / "log").read_text()
                    raise AssertionError(f"Kafka does not answer\n{said[-3000:]}") from None

    def make_topic(
        self, name: str, partitions: int, config: Mapping[str, str], replicas: int = 1
    ) -> None:
        """Make a topic, as an operator does."""
        topic = NewTopic(name, partitions, replicas, config=dict(config))
        admin = self.admin
        for done in admin.create_topics([topic]).values():
            done.result(10)
        while name not in admin.list_topics(timeout=5).topics:
            time.sleep(0.02)

    def delete_topics(self, *names: str, wait: bool = True) -> None:
        """Delete topics; with ``wait`` they are gone then, unless somebody makes them again."""
        admin = self.admin
        for done in admin.delete_topics(list(names)).values():
            done.result(10)
        while wait and set(names) & set(admin.list_topics(timeout=5).topics):
            time.sleep(0.02)

    def log_file(self, topic: str, partition: int = 0) -> Path:
        """Return the file that has a partition's records."""
        return self.folder / "data" / f"{topic}-{partition}" / f"{0:020}.log"

    def revive(self) -> None:
        """Let it go on, or start it again, if it was paused or killed."""
        if self.process.poll() is None:
            self.go_on()
        else:
            self.start()

    def _command(self, main: str, *arguments: str) -> list[str]:
        log4j = f"-Dlog4j2.configurationFile={self.folder / 'log4j2.properties'}"
        return [*_JAVA, log4j, "-cp", f"{LIBS}/*", main, *arguments]

    def _make_its_own(self, data: Path) -> None:
        """Give a formatted folder, which is the first process's, another number and id."""
        if self.node == 1:
            return
        file = data / "meta.properties"
        lines = [
            line
            for line in file.read_text().splitlines()
            if not line.startswith(("node.id=", "directory.id="))
        ]
        lines += [f"node.id={self.node}", f"directory.id={secrets.token_urlsafe(16)}"]
        file.write_text("\n".join(lines) + "\n")
        # What a controller begins with.
        shutil.rmtree(data / "__cluster_metadata-0", ignore_errors=True)

    def _format(self, data: Path) -> None:
        """Format a folder once for all brokers: it takes as long as half a start."""
        command = self._command("kafka.tools.StorageTool", "format", "-t", CLUSTER)
        done = subprocess.run(
            [*command, "-c", str(self._config)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        with suppress(OSError):
            # Another process of tests may have been faster.
            data.rename(FORMATTED)
        shutil.rmtree(data, ignore_errors=True)


class KafkaCluster:
    """A controller and three brokers, whose disks are flushed when the system likes."""

    def __init__(self, folder: Path) -> None:
        """Make a cluster; `start` starts it."""
        own = {
            "log_flush_interval_messages": "",
            "offsets_topic_replication_factor": "3",
            # A follower that was killed is out of sync as soon as its session is over.
            "replica_lag_time_max_ms": "3000",
        }
        self.controller = KafkaServer(
            folder / "controller",
            roles="controller",
            advertised_listeners="",
            authorizer_class_name="",
            log_flush_interval_messages="",
        )
        self.brokers = [
            KafkaServer(
                folder / f"broker{node}",
                node=node,
                roles="broker",
                controller=self.controller.voter,
                authorizer_class_name="",
                **own,
            )
            for node in (2, 3, 4)
        ]

    def start(self) -> None:
        """Start all, and wait until they know each other."""
        self.controller.spawn()
        for each in self.brokers:
            each.spawn()
        for each in self.brokers:
            each.wait(len(self.brokers))

    def url(self, topic: str) -> str:
        """Return the URL for a journal."""
        return f"kafka://{','.join(each.address for each in self.brokers)}/{topic}"

    @property
    def admin(self) -> AdminClient:
        """A client that this project did not write, for all brokers."""
        return AdminClient(
            {
                "bootstrap.servers": ",".join(each.address for each in self.brokers),
                "log_level": 0,
                "reconnect.backoff.ms": 50,
                "reconnect.backoff.max.ms": 200,
            }
        )

    def leader_of(self, topic: str) -> KafkaServer:
        """Return the leader of a topic's first partition; wait for one."""
        until_s = time.monotonic() + START_S
        admin = self.admin
        while time.monotonic() < until_s:
            with suppress(KafkaException, KeyError):
                leader = admin.list_topics(topic, timeout=2).topics[topic].partitions[0].leader
                if leader in (each.node for each in self.brokers):
                    return self.brokers[leader - 2]
            time.sleep(0.05)
        raise AssertionError(f"{topic} has no leader")

    def wait_in_sync(self, topic: str, brokers: int) -> None:
        """Wait until so many brokers have all records of a topic's first partition."""
        until_s = time.monotonic() + START_S
        admin = self.admin
        while time.monotonic() < until_s:
            with suppress(KafkaException, KeyError):
                found = admin.list_topics(topic, timeout=2).topics[topic].partitions[0]
                if len(found.isrs) == brokers:
                    return
            time.sleep(0.05)
        raise AssertionError(f"{topic} has not {brokers} replicas in sync")

    def revive(self) -> None:
        """Start again what was killed."""
        for each in self.brokers:
            each.revive()

    def kill(self) -> None:
        """Kill all."""
        for each in (*self.brokers, self.controller):
            each.kill()


@cache
def shared_server() -> KafkaServer:
    """Return a broker that runs until this process of tests ends; tests use topics of their own."""
    server = KafkaServer(Path(tempfile.mkdtemp(prefix="clevrd-kafka-")))
    atexit.register(shutil.rmtree, server.folder, ignore_errors=True)
    atexit.register(server.kill)
    return server.start()
