"""A reload reads its files beside the loop: neither a pipe nor a lost disk stops the daemon."""

from __future__ import annotations

import json
import os
import signal
import ssl
import threading
from collections.abc import Callable
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
from daemons import DaemonProcess, daemon_process, running, until
from tls import make_pair

from clevrd.access.reading import FileReading
from clevrd.access.reloading import Reloading
from clevrd.config import MAX_FILE_BYTES, Loaded, load
from clevrd.errors import ConfigError
from clevrd.service.manager import ServiceManager
from clevrd.small_files import read_small

RULES = """
[auth]
[[auth.jwt]]
issuer = "https://set.example"
audience = "clevrd"
algorithms = ["ES256"]
jwks_file = "jwks.json"
any_tenant = true
[[auth.jwt]]
issuer = "https://secret.example"
audience = "clevrd"
algorithms = ["HS256"]
secret_file = "secret"
any_tenant = true
[tls]
client_certificates = "optional"
client_ca_file = "ca.pem"
[[tls.certificates]]
cert_file = "localhost.pem"
key_file = "localhost.key"
"""
JWK = {"kty": "EC", "crv": "P-256", "kid": "1", "x": "A" * 43, "y": "A" * 43}


def write_all(folder: Path) -> None:
    """Write a configuration and all the kinds of files that it can name."""
    make_pair(folder)
    make_pair(folder, "ca", is_authority=True)
    (folder / "clevrd.toml").write_text(RULES)
    (folder / "jwks.json").write_text(json.dumps({"keys": [JWK]}))
    (folder / "secret").write_text("0123456789abcdef" * 4)
    (folder / "secret").chmod(0o600)


def logged(daemon: DaemonProcess, words: str) -> str:
    """Return the next line with ``words`` in it."""
    assert daemon.process.stderr is not None
    while True:
        line = daemon.process.stderr.readline()
        assert line, f"the daemon ended before it logged {words!r}"
        if words in line:
            return line


def test_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    """Nobody writes to it, so that an open would wait for ever."""
    write_all(tmp_path)
    told: dict[str, str] = {}
    names = ["clevrd.toml", "jwks.json", "secret", "localhost.pem", "localhost.key", "ca.pem"]
    with daemon_process(CLEVRD_CONFIG=str(tmp_path / "clevrd.toml")) as daemon:
        for name in names:
            path, aside = tmp_path / name, tmp_path / "aside"
            path.rename(aside)
            os.mkfifo(path, 0o600)
            daemon.process.send_signal(signal.SIGHUP)
            told[name] = logged(daemon, "reload refused")
            path.unlink()
            aside.rename(path)
        context = ssl.create_default_context(cafile=tmp_path / "localhost.pem")
        client = HTTPSConnection("localhost", daemon.port, context=context, timeout=10)
        client.request("GET", "/health/ready")
        status = client.getresponse().status
        client.close()
        daemon.process.send_signal(signal.SIGHUP)
        logged(daemon, "INFO reloaded")
        assert daemon.stop() == 0

    assert status == 200
    for name in names:
        assert f"{tmp_path / name}: it is a pipe, and not a file." in told[name]


class HungDisk:
    """Reads a configuration, unless its disk hangs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.is_there = threading.Event()
        self.is_there.set()

    def load(self) -> Loaded:
        """Return the configuration, once the disk is there."""
        assert self.is_there.wait(30)
        return load({}, {}, str(self._path))


def nothing_else(*_: Any) -> Callable[[], None]:
    """Read nothing beside the configuration."""
    return lambda: None


async def test_disk_that_hangs_stops_no_client(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reload is refused within its time, and the next one while the thread hangs at once."""
    path = tmp_path / "clevrd.toml"
    path.write_text('[auth]\nallowed_origins = ["https://app.example"]\n')
    disk = HungDisk(path)
    async with running() as daemon:
        counters = daemon.hub.counters
        reloading = Reloading(
            *(daemon.server.access, disk.load(), disk.load, nothing_else),
            *(FileReading(timeout_s=0.2), daemon.hub.tasks, counters),
            ServiceManager(None, daemon.server._loop),
        )
        disk.is_there.clear()
        threads = threading.active_count()
        reloading.begin()
        while not counters.reloads_failed:
            assert (await daemon.publish("t", 1))["success"]
        hung = threading.active_count() - threads
        reloading.begin()
        await until(lambda: counters.reloads_failed == 2)
        hung_later = threading.active_count() - threads
        disk.is_there.set()
        await until(lambda: not reloading._reading._calls._is_busy)
        reloading.begin()
        await until(lambda: counters.reloads == 1)

    assert (hung, hung_later) == (1, 1)
    refused = [text for text in caplog.messages if "reload refused" in text]
    assert "were not read within 0.2 s; is the disk there" in refused[0]
    assert "are being read still" in refused[1]


async def test_mistake_in_a_file_is_raised_as_it_is() -> None:
    """The thread is another one than the loop's."""
    reading = FileReading(timeout_s=5)

    def fail() -> None:
        raise ConfigError("The key is not there.")

    with pytest.raises(ConfigError, match=r"The key is not there\."):
        await reading.run(fail)
    assert await reading.run(lambda: threading.current_thread().name) == "clevrd-reload"


def test_small_files_are_read_within_their_bound(tmp_path: Path) -> None:
    """One more byte tells that there is more; a device without an end is no trouble."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)

    assert [len(read_small(path, most)) for most in (9, 10, 11, 0)] == [10, 10, 10, 1]
    assert len(read_small("/dev/zero", 100)) == 101
    with pytest.raises(ConfigError, match="is over"):
        load({}, {}, "/dev/zero")
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="is over"):
        load({}, {}, str(path))
    with pytest.raises(IsADirectoryError):
        read_small(tmp_path, 10)
