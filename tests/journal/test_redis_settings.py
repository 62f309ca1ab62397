"""Where a journal in Redis is, as settings say it: URLs, mistakes, secrets that are not shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from daemons import ROOT, running

from clevrd.cli.command_line import main
from clevrd.errors import ConfigError
from clevrd.journal.redis.library import LOST, RedisFault, sentence_of
from clevrd.journal.redis.server_info import ServerInfo, read_info, refusal_of, warnings_of
from clevrd.journal.redis.settings import RedisSettings
from clevrd.journal.redis.url import RedisAddress, parse_redis_url
from clevrd.journal.settings import read_journal
from clevrd.journal.url_parts import BadUrl, shown_url

SECRET = "a@b"  # noqa: S105  # of no server


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", RedisAddress("single", (("h", 6379),))),
        ("redis://h:1/3", RedisAddress("single", (("h", 1),), database=3)),
        (
            "rediss://me:a%40b@h:1",
            RedisAddress("single", (("h", 1),), user="me", password=SECRET, is_tls=True),
        ),
        ("redis://:a%40b@[::1]:7", RedisAddress("single", (("::1", 7),), password=SECRET)),
        ("unix:///run/redis.sock", RedisAddress("single", path="/run/redis.sock")),
        (
            "unix://me:a%40b@/run/redis.sock",
            RedisAddress("single", path="/run/redis.sock", user="me", password=SECRET),
        ),
        (
            "redis+sentinel://a,b:2/main",
            RedisAddress("sentinel", (("a", 26379), ("b", 2)), service="main"),
        ),
        (
            "rediss+sentinel://a/main/4",
            RedisAddress("sentinel", (("a", 26379),), service="main", database=4, is_tls=True),
        ),
        ("redis+cluster://a:1,b:2", RedisAddress("cluster", (("a", 1), ("b", 2)))),
        # As an operator has seen it.
        ("redis://h#0123abcd", RedisAddress("single", (("h", 6379),))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_url_is_understood(url: str, address: RedisAddress) -> None:
    """Each kind of URL, with what may be left out."""
    assert parse_redis_url(url) == address


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nats://h", "begins with one of"),
        ("redis://", "host is missing"),
        ("redis://h:port", "write host:6379"),
        ("redis://h:70000", "from 1 to 65535"),
        ("redis://a,b", "redis[+]sentinel"),
        ("redis://h/x", "number of a database"),
        ("redis://h?db=1", "settings of their own"),
        ("redis://secret@h", "user:password"),
        ("redis+sentinel://h", "name that they know the primary by"),
        ("redis+cluster://h/1", "no databases but 0"),
        ("unix://run/redis.sock", "absolute path"),
    ],
)
def test_wrong_url_is_told_without_its_secret(url: str, sentence: str) -> None:
    """The sentence says what to write, and has nothing of the URL's user and password."""
    with pytest.raises(BadUrl, match=sentence) as caught:
        parse_redis_url(url)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"url": "redis://h", "directory": "/j"}, "not both"),
        ({"url": "redis://h", "segment_s": 60.0}, "journal in a directory"),
        ({"url": "redis://h", "durability": "memory"}, 'durability .* write "fsync", or "os"'),
        ({"directory": "/j", "min_replicas": 1}, "journal in Redis"),
        ({"url": "redis://:p@h", "password_file": "/f"}, "has a password already"),
        ({"url": "redis://me:@h"}, "a user and no password"),
        ({"url": "redis://h", "ca_file": "/ca"}, "begin with rediss"),
        ({"url": "redis://h", "sentinel_user": "s"}, "redis[+]sentinel"),
        ({"url": "rediss://h", "client_key_file": "/k"}, "client_cert_file"),
        ({"url": "redis://h", "retention_s": 60.0}, "900 or more"),
        ({"url": "redis://h", "retention_bytes": 1000}, "at least 1 MiB"),
        ({"url": "redis://h", "partitions": 0}, "partitions"),
        ({"url": "redis://h", "prefix": "a b"}, "prefix"),
        ({"url": "http://h"}, "begins with one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_table_is_told_in_a_line(table: dict[str, Any], sentence: str) -> None:
    """Each mistake has its own sentence, and names the file."""
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_journal({"journal": table}, "", "clevrd.toml")

    assert "clevrd.toml" in str(caught.value)


def test_plain_setting_is_a_url_or_a_directory() -> None:
    """It is stronger than the table, and Redis keeps less unless the table says how much."""
    table = {"directory": "/j", "topics": ["a.*"]}

    in_redis = read_journal({"journal": table}, "redis://h")
    in_files = read_journal({"journal": {"url": "redis://h"}}, "/j")
    kept = read_journal({"journal": {"retention_bytes": 5 << 30}}, "redis://h")

    assert (in_redis.engine, in_redis.url, in_redis.directory) == ("redis", "redis://h", "")
    assert in_redis.retention_bytes == 1 << 30
    assert (in_files.engine, in_files.url, in_files.directory) == ("sqlite", "", "/j")
    assert kept.retention_bytes == 5 << 30


def test_url_is_shown_without_user_and_password() -> None:
    """The rest says where the Redis is."""
    assert shown_url("rediss://me:secret@h:1/2") == "rediss://h:1/2"
    assert shown_url("redis+sentinel://:x@a:1,b:2/m") == "redis+sentinel://a:1,b:2/m"


def test_checkconfig_shows_no_password(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither from the plain setting nor from the table."""
    plain, table = tmp_path / "plain.toml", tmp_path / "table.toml"
    plain.write_text('journal = "redis://me:secret@h:1"\n')
    table.write_text('[journal]\nurl = "redis://me:secret@h:1"\n')

    codes = [main(["checkconfig", "--config", str(path)]) for path in (plain, table)]

    told = capfd.readouterr()
    assert codes == [0, 0]
    assert "secret" not in told.out + told.err
    assert told.out.count("redis://h:1#") == 3


@pytest.mark.parametrize("name", ["password_file", "ca_file"])
def test_checkconfig_finds_files_that_cannot_be_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """A file that is missing is named before the daemon needs it."""
    path = tmp_path / "clevrd.toml"
    path.write_text(f'[journal]\nurl = "rediss://h:1"\n{name} = "/not/there"\n')

    code = main(["checkconfig", "--config", str(path)])

    assert code != 0
    assert "/not/there" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["redis", "hiredis"])
def test_missing_library_is_told_in_a_line(name: str) -> None:
    """Without the extra the daemon says how to install it, and does not start."""
    script = (
        f"import sys; sys.modules[{name!r}] = None; from clevrd.entry import main;"
        " sys.argv[1:] = ['serve', '--address', '127.0.0.1:0', '--journal', 'redis://h'];"
        " sys.exit(main())"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert 'pip install "clevrd[redis]"' in line


def test_mistake_in_the_plain_setting_names_no_file() -> None:
    """It may have come from a flag or a variable."""
    with pytest.raises(ConfigError, match=r"\Ajournal is not allowed: a [?] or #"):
        read_journal({}, "redis://h?db=1")


def settings_of(url: str, **settings: Any) -> RedisSettings:
    """Return the settings of a journal at ``url``."""
    return RedisSettings(address=parse_redis_url(url), shown="u", **settings)


def info_of(text: bytes, **file: str) -> ServerInfo:
    """Return what a server says, with the settings of its file."""
    words = [each.encode() for name, value in file.items() for each in (name, value)]
    info = read_info(text, [word.replace(b"_", b"-") for word in words])
    assert info is not None
    return info


def test_info_is_judged() -> None:
    """An old server, a cluster and none, eviction, too few replicas: each has its sentence."""
    old = info_of(b"redis_version:6.2.7\r\n")
    new = info_of(
        b"redis_version:7.0.15\r\ncluster_enabled:1\r\nmaxmemory:9\r\n"
        b"maxmemory_policy:allkeys-lru\r\nconnected_slaves:0\r\n"
    )
    alone = info_of(b"redis_version:8.2.0\r\nconnected_slaves:1\r\n")
    single, cluster = settings_of("redis://h", min_replicas=1), settings_of("redis+cluster://h")

    assert read_info(b"HTTP/1.1 400\r\n", ()) is None
    assert "Redis 6.2.7 at u is too old; the journal needs 7.0 or newer" in str(
        refusal_of(old, single)
    )
    assert "redis+cluster://" in str(refusal_of(new, single))
    assert refusal_of(new, cluster) is None
    assert "is no cluster" in str(refusal_of(alone, cluster))
    evicts, replicas = warnings_of(new, single)
    assert "noeviction" in evicts
    assert "min_replicas" in replicas
    assert list(warnings_of(alone, single)) == []


@pytest.mark.parametrize(
    ("file", "is_synced"),
    [
        ({"appendonly": "yes", "appendfsync": "always"}, True),
        ({"appendonly": "yes", "appendfsync": "everysec"}, False),
        ({"appendonly": "no", "appendfsync": "always"}, False),
        (
            {"appendonly": "yes", "appendfsync": "always", "no_appendfsync_on_rewrite": "yes"},
            False,
        ),
        ({}, False),
    ],
    ids=["always", "everysec", "no-file", "not-on-rewrite", "unknown"],
)
def test_server_syncs_before_it_answers(file: dict[str, str], is_synced: bool) -> None:
    """Only if it always does, also while its file is written anew."""
    assert info_of(b"redis_version:7.0.15\r\n", **file).is_synced is is_synced


ALWAYS = {"appendonly": "yes", "appendfsync": "always"}


@pytest.mark.parametrize(
    ("version", "file", "min_replicas", "sentence"),
    [
        ("7.0.15", ALWAYS, 0, ""),
        ("7.0.15", ALWAYS, 1, "Redis 7.0.15 at u can't say .* Redis 7.2 or newer, or Valkey"),
        ("7.2.4", ALWAYS, 1, ""),
        ("7.2.4", {"appendonly": "yes", "appendfsync": "everysec"}, 1, "set .* appendfsync always"),
        ("7.2.4", {"appendonly": "no"}, 0, "set appendonly yes"),
        ("7.2.4", {}, 0, "let the daemon's user see them"),
    ],
    ids=["alone", "old", "replicas", "everysec", "no-file", "unseen"],
)
def test_what_keeps_a_server_from_syncing_is_told(
    version: str, file: dict[str, str], min_replicas: int, sentence: str
) -> None:
    """A server that answers before its disk has a message is refused where that is promised."""
    info = info_of(f"redis_version:{version}".encode(), **file)
    promised = settings_of("redis://h", must_sync=True, min_replicas=min_replicas)
    refusal = refusal_of(info, promised)

    assert refusal_of(info, settings_of("redis://h", min_replicas=min_replicas)) is None
    assert re.search(sentence, refusal or "")
    assert bool(refusal) is bool(sentence)


def test_what_a_synced_message_does_not_outlive_is_told() -> None:
    """A failover to a replica that nobody waits for."""
    text = b"redis_version:7.2.4\r\nvalkey_version:8.0.1\r\nconnected_slaves:1\r\n"
    synced, plain = info_of(text, **ALWAYS), info_of(text)
    alone = info_of(b"redis_version:7.2.4\r\nconnected_slaves:0\r\n", **ALWAYS)

    (told,) = warnings_of(synced, settings_of("redis://h"))
    waiting = warnings_of(synced, settings_of("redis://h", must_sync=True, min_replicas=1))

    assert synced.product == "Valkey 8.0.1"
    assert 'durability = "fsync" and min_replicas = 1' in told
    assert list(waiting) == []
    assert list(warnings_of(plain, settings_of("redis://h"))) == []
    assert list(warnings_of(alone, settings_of("redis://h"))) == []


@pytest.mark.parametrize(
    ("table", "durability"),
    [({}, "os"), ({"durability": "os"}, "os"), ({"durability": "fsync"}, "fsync")],
    ids=["unsaid", "os", "fsync"],
)
def test_durability_is_asked_for(table: dict[str, str], durability: str) -> None:
    """In Redis answers wait for a disk only where the file says so."""
    settings = read_journal({"journal": {"url": "redis://h", **table}}, "")

    assert settings.durability == durability


async def test_config_and_metrics_show_no_password(tmp_path: Path) -> None:
    """An operator sees where the journal is, and a fingerprint; the password is nowhere."""
    from redis_servers import redis_server

    with redis_server(tmp_path / "redis") as server:
        server_url = server.url
        with server.client as client:
            client.acl_setuser(
                "me", enabled=True, passwords=["+secret"], keys="*", commands=["+@all"]
            )
        url = server_url.replace("redis://", "redis://me:secret@")
        async with running(journal=url) as daemon:
            await daemon.publish("t", 1)
            shown = json.dumps([await daemon.get_json(path) for path in ("/config", "/metrics")])

    assert "secret" not in shown
    assert f"{server_url}#" in shown


@pytest.mark.parametrize(
    ("code", "text", "url", "hint"),
    [
        (LOST, "Connection refused.", "redis://h", "see whether it runs there"),
        (LOST, "no answer within 4 s", "rediss://h", "runs there and speaks TLS"),
        (LOST, "Connection reset by peer", "redis://h", "if it speaks TLS, write rediss"),
        (LOST, "it is not trusted; name its CA", "rediss://h", "name its CA"),
        ("ERR", "DB index is out of range", "redis://h/99", "the number of one that it has"),
        (
            "ERR",
            "This instance has cluster support disabled",
            "redis+cluster://h",
            "write redis://",
        ),
        ("ERR", "Sentinel h:1: unknown command 'SENTINEL'", "redis+sentinel://h/m", "port 26379"),
        ("ERR", "The user executing the script can't run this command", "redis://h", "an ACL"),
        ("WRONGPASS", "invalid username-password pair", "redis://h", "password_file"),
        ("OOM", "command not allowed", "redis://h", "retention_bytes"),
    ],
)
def test_each_fault_has_a_sentence_that_says_what_to_do(
    code: str, text: str, url: str, hint: str
) -> None:
    """It names where the Redis is, and ends like a sentence."""
    told = sentence_of(RedisFault(code, text), url)

    assert url in told
    assert hint in told
    assert told.endswith(".")
    assert not told.endswith(("..", " ."))
