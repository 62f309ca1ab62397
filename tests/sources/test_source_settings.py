"""The tables [[sources]]: each mistake has one sentence, which holds no secret."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from daemons import ROOT

from clevrd.errors import ConfigError
from clevrd.sources.settings import read_sources
from clevrd.tenants.settings import read_access

LEAST = {"name": "orders", "url": "redis://127.0.0.1:6379/orders", "topic": "t"}
REQUIRED = {
    "auth": {"mode": "required"},
    "tenants": [
        {"name": "acme", "keys": [{"id": "k", "sha256": "0" * 64, "subscribe": ["**"]}]},
    ],
}


def mistakes(*tables: dict[str, Any], access: dict[str, Any] | None = None) -> list[str]:
    """Return the lines of what is wrong."""
    try:
        read_sources({"sources": list(tables)}, read_access(access or {}, "file f"), "f")
    except ConfigError as error:
        return str(error).split("\n")
    return []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"url": "redis://user:password@[::1]:6379/3/a%2Fb"},
        {"url": "redis://127.0.0.1/0/123"},
        {"url": "unix:///run/redis/redis.sock/orders"},
        {"url": "redis+sentinel://s1,s2:26380/mymaster/orders"},
        {"url": "redis+sentinel://s1,s2:26380/mymaster/2/orders", "sentinel_user": "s"},
        {"url": "rediss+cluster://n1,n2/orders", "ca_file": "/ca.pem"},
        {"topic": "a.{header:b}.{/c/0/d~1e}{{x}}", "key": "{/k}"},
        {"start": "2026-01-31T08:00:00+01:00"},
        {"start": "1700000000000"},
        {"dead_letter": "", "group": "mine:1"},
        {"filter": [{"at": "/a", "equals": 1.5}, {"at": "header:b", "exists": True}]},
        {"url": "nats://token@h1,h2:4223/ORDERS", "topic": "{key}", "start": "1200"},
        {"url": "tls://h1/orders.*.>", "creds_file": "/c", "ca_file": "/ca.pem"},
        {"url": "nats://me@h1/ORDERS", "password_file": "/f"},
        {"url": "kafka://h1,[::1]:9093/orders", "key": "{key}", "start": "0"},
        {
            "url": "kafka+ssl://me@h1/orders",
            "password_file": "/f",
            "kafka": {"sasl.mechanism": "SCRAM-SHA-256"},
        },
    ],
    ids=lambda fields: " ".join(map(str, fields.values()))[:40] or "least",
)
def test_right_settings_are_taken(fields: dict[str, Any]) -> None:
    """All that the documentation offers."""
    assert mistakes({**LEAST, **fields}) == []


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"name": "a b"}, "[0].name (file f) must be letters, digits"),
        ({"group": "a b"}, "[0].group (file f) must be letters, digits"),
        ({"colour": 1}, "[0] (file f) has no setting called `colour`."),
        ({"url": "amqp://host/queue"}, "write the URL of a stream that can be read:"),
        ({"url": "redis://host:6379"}, "behind the server write the stream"),
        ({"url": "redis://host:6379/"}, "behind the server write the stream"),
        (
            {"url": "redis://host:6379/0"},
            "0 is the number of a database, and the stream",
        ),
        (
            {"url": "redis://host:6379/x/orders"},
            "behind the host may stand the number of a",
        ),
        ({"url": "redis://host:0/orders"}, "a port is a number from 1 to 65535."),
        ({"url": "redis://host/orders?db=1"}, "is written %3F or %23"),
        ({"url": "redis+sentinel://s1/orders"}, "behind the Sentinels write the name"),
        ({"url": "redis://user@host/orders"}, "before the @ write user:password"),
        ({"url": "redis://user:@host/orders"}, "it has a user and no password"),
        (
            {"url": "redis://:pw@host/orders", "password_file": "/f"},
            "the URL has a password already",
        ),
        ({"sentinel_user": "s"}, "it is for URLs that begin with redis+sentinel://."),
        ({"ca_file": "/ca.pem"}, "certificates are for URLs that begin with rediss."),
        (
            {"url": "rediss://host/orders", "client_key_file": "/k"},
            "name its certificate too (client_cert_file).",
        ),
        ({"topic": ""}, "[0].topic (file f) must be text of length >= 1."),
        ({"topic": "a{b"}, "a brace is not closed, or not opened"),
        ({"topic": "{colour}"}, "'colour' is none of key, header:NAME and a JSON pointer"),
        ({"topic": "{header:}"}, "name the header: header:region."),
        ({"topic": "{key}"}, "entries in Redis have no key"),
        ({"topic": "{/a~2}"}, "in a JSON pointer ~ is written ~0"),
        ({"topic": "a\nb"}, "The topic holds a control character"),
        ({"key": "{"}, "[0].key (file f) is not allowed: a brace is not closed"),
        ({"dead_letter": "x" * 256}, "The topic has 256 bytes; 255 are allowed."),
        ({"tenant": "a:b"}, "The tenant's name must be 1 to 64 letters"),
        ({"start": "yesterday"}, 'write "earliest", "latest", a time'),
        ({"start": "2026-13-01T00:00:00Z"}, "'2026-13-01T00:00:00Z' is no time"),
        ({"start": "2026-01-01T00:00:00"}, "a time needs its zone"),
        ({"start": "99999999999999999999999-0"}, 'write "earliest", "latest", a time'),
        ({"url": "nats://host:4222"}, "behind the server write the stream, or a subject"),
        ({"url": "nats://host/a b"}, "a stream's name, or a subject, has no spaces"),
        ({"url": "nats://host/orders..eu"}, "has no spaces and no empty words"),
        ({"url": "nats://host:x/ORDERS"}, "write host:4222"),
        ({"url": "nats://h/O", "start": "1-0"}, "or the number of the first record"),
        ({"url": "nats://h/O", "field": "data"}, "[0].field (file f) is not allowed: it is for"),
        ({"url": "nats://t@h/O", "creds_file": "/c"}, "there are credentials in url already"),
        ({"url": "nats://h/O", "ca_file": "/c"}, "certificates are for URLs that begin with tls."),
        ({"creds_file": "/c"}, "it is for streams of NATS."),
        ({"url": "kafka://host:9092"}, "behind the brokers write the topic"),
        ({"url": "kafka://host/a b"}, "the topic's name has at most 230 letters"),
        ({"url": "kafka://host/t", "password_file": "/f"}, "write whose password it is"),
        ({"url": "kafka://me@host/t"}, "it has a user and no password"),
        ({"url": "kafka://h/t", "ca_file": "/c"}, "URLs that begin with kafka+ssl."),
        ({"url": "kafka://h/t", "kafka": {"group.id": "x"}}, "[0].kafka.group.id (file f)"),
        ({"url": "kafka://h/t", "kafka": {"ssl.key.password": "x"}}, "it is a secret; write"),
        ({"kafka": {"client.rack": "x"}}, "it is for topics of Kafka."),
        ({"filter": [{"at": "/a"}]}, "[0].filter[0] (file f) is not allowed: give one of equals"),
        ({"filter": [{"at": "/a", "equals": 1, "exists": True}]}, "give one of equals and exists."),
        ({"filter": [{"at": "colour", "exists": True}]}, "at: 'colour' is none of key"),
        ({"filter": [{"at": "key", "exists": True}]}, "at: entries in Redis have no key"),
        ({"filter": [{"at": "header:a", "equals": 1}]}, "a header or a key is text; write equals"),
    ],
    ids=str,
)
def test_each_mistake_has_its_sentence(fields: dict[str, Any], sentence: str) -> None:
    """One line that says where it is and what to write."""
    (line,) = mistakes({**LEAST, **fields})

    assert line.startswith("sources[0]")
    assert sentence in line


def test_mistakes_between_tables_are_told() -> None:
    """Two of one name, too many, no list, and a tenant that nobody could be."""
    assert "is called 'orders' as well" in mistakes(LEAST, LEAST)[0]
    many = [{**LEAST, "name": f"s{number}"} for number in range(65)]
    assert "there are 65 of them, and 64 are allowed" in mistakes(*many)[0]
    assert "no tenant 'default-tenant' in [[tenants]]" in mistakes(LEAST, access=REQUIRED)[0]
    assert mistakes({**LEAST, "tenant": "acme"}, access=REQUIRED) == []
    with pytest.raises(ConfigError, match=r"must be written as \[\[sources\]\]"):
        read_sources({"sources": LEAST}, read_access({}, ""))


def test_no_mistake_tells_a_secret() -> None:
    """A password in a URL that can't be used is in none of the lines."""
    for url in ("redis://:hush@host", "amqp://a:hush@host/x", "redis://:hush@host:0/x", 5):
        assert "hush" not in " ".join(mistakes({**LEAST, "url": url}))


# --- as operators see them -----------------------------------------------------------------------


def checked(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run `clevrd checkconfig` on a file with ``text``."""
    path = folder / "clevrd.toml"
    path.write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "clevrd", "checkconfig", "--config", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


TEXT = """
[[sources]]
name = "orders"
url = "redis://:hush@127.0.0.1:6379/0/orders"
topic = "orders.{header:region}"
"""


def test_checkconfig_shows_sources_without_a_secret(tmp_path: Path) -> None:
    """A line for each source."""
    done = checked(tmp_path, TEXT)

    assert done.returncode == 0, done.stderr
    assert (
        "source           orders (redis://127.0.0.1:6379/0/orders into orders.{header:region} of"
        " tenant default-tenant, group clevrd-orders)" in done.stdout
    )
    assert "hush" not in done.stdout


def test_checkconfig_looks_into_the_files(tmp_path: Path) -> None:
    """A password file that is missing or empty, and a CA that is none, each in one line."""
    (tmp_path / "empty").write_text("\n")
    plain = TEXT.replace(":hush@", "")
    missing = checked(tmp_path, plain + 'password_file = "/nowhere/password"\n')
    empty = checked(tmp_path, plain + f'password_file = "{tmp_path}/empty"\n')
    authority = checked(
        tmp_path, plain.replace("redis://", "rediss://") + f'ca_file = "{tmp_path}/empty"\n'
    )

    assert (
        "The password file /nowhere/password of the source orders can't be read" in missing.stderr
    )
    assert "of the source orders has no password in its first line" in empty.stderr
    assert f"The source orders: certificate file {tmp_path}/empty can't be used" in authority.stderr
    assert {missing.returncode, empty.returncode, authority.returncode} == {78}


def test_reload_says_that_sources_need_a_restart(tmp_path: Path) -> None:
    """A changed table is told, and one that is wrong leaves all as it was."""
    path = tmp_path / "clevrd.toml"
    plain = TEXT.replace("6379", "9")
    path.write_text(plain)
    environ = {**os.environ, "ADDRESS": "127.0.0.1:0", "CLEVRD_CONFIG": str(path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "clevrd", "serve"],
        cwd=ROOT,
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        lines = iter(process.stderr)
        next(line for line in lines if "listening" in line)
        path.write_text(plain.replace("orders.{header", "sales.{header"))
        process.send_signal(signal.SIGHUP)
        told = next(line for line in lines if "setting changed" in line)
        path.write_text(plain.replace("orders.{header", "sales.{colour"))
        process.send_signal(signal.SIGHUP)
        refused = next(line for line in lines if "reload refused" in line)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate(timeout=5)

    assert "setting=sources" in told
    assert "sources[0].topic" in refused


def test_example_in_the_configuration_file_is_right() -> None:
    """The lines of systemd/clevrd.toml, without their signs."""
    text = (ROOT / "systemd" / "clevrd.toml").read_text()
    _, _, rest = text.partition("# [[sources]]")
    example, _, _ = rest.partition("\n# --- ")
    lines = [line[2:] for line in example.splitlines() if line.startswith("# ") and " = " in line]

    tables = tomllib.loads("\n".join(["[[sources]]", *lines]))

    assert mistakes(*tables["sources"]) == []
