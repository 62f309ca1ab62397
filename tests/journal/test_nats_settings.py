"""Where a journal in NATS is, as settings say it: URLs, mistakes, promises, hidden secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from daemons import ROOT, running
from nats_servers import nats_server

from clevrd.cli.command_line import main
from clevrd.errors import ConfigError
from clevrd.journal.engines import _nats_settings
from clevrd.journal.nats.library import LOST, NatsFault, sentence_of
from clevrd.journal.nats.settings import NatsSettings
from clevrd.journal.nats.streams import (
    Names,
    log_config,
    read_info,
    refusal_of,
    server_refusal_of,
    stamp_of,
    version_of,
    wants_update,
)
from clevrd.journal.nats.url import NatsAddress, parse_nats_url
from clevrd.journal.settings import read_journal
from clevrd.journal.url_parts import BadUrl

SECRET = "a@b"  # noqa: S105  # of no server


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("nats://h", NatsAddress((("h", 4222),))),
        ("nats://h:1,[::1],g:3", NatsAddress((("h", 1), ("::1", 4222), ("g", 3)))),
        (
            "tls://me:a%40b@h:1",
            NatsAddress((("h", 1),), user="me", password=SECRET, is_tls=True),
        ),
        ("nats://a%40b@h", NatsAddress((("h", 4222),), token=SECRET)),
        # As an operator has seen it.
        ("nats://h#0123abcd", NatsAddress((("h", 4222),))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_url_is_understood(url: str, address: NatsAddress) -> None:
    """Each kind of URL, with what may be left out."""
    assert parse_nats_url(url) == address


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis://h", "begins with one of"),
        ("nats://", "host is missing"),
        ("nats://h:port", "write host:4222"),
        ("nats://h:70000", "from 1 to 65535"),
        ("nats://h/x", "its prefix"),
        ("nats://h?x=1", "settings of their own"),
        ("nats://:secret@h", "user:password, or a token"),
        ("nats://me:secret@a,nats://me:secret@b", "several servers"),
    ],
)
def test_wrong_url_is_told_without_its_secret(url: str, sentence: str) -> None:
    """The sentence says what to write, and has nothing of the URL's user and password."""
    with pytest.raises(BadUrl, match=sentence) as caught:
        parse_nats_url(url)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"url": "nats://h", "directory": "/j"}, "not both"),
        ({"url": "nats://h", "min_replicas": 1}, "journal in Redis"),
        ({"url": "nats://h", "segment_s": 5.0}, "journal in a directory"),
        ({"directory": "/j", "replicas": 3}, "journal in NATS"),
        ({"url": "redis://h", "sync_always": True}, "journal in NATS"),
        ({"url": "nats://u:p@h", "password_file": "/f"}, "has a password already"),
        ({"url": "nats://me:@h"}, "a user and no password"),
        ({"url": "nats://u:p@h", "creds_file": "/f"}, "give one of"),
        ({"url": "nats://h", "creds_file": "/f", "nkey_seed_file": "/g"}, "give one of"),
        ({"url": "nats://h", "ca_file": "/ca"}, "begin with tls://"),
        ({"url": "tls://h", "client_key_file": "/k"}, "client_cert_file"),
        ({"url": "nats://h", "retention_s": 60.0}, "900 or more"),
        ({"url": "nats://h", "retention_bytes": 1000}, "at least 1 MiB"),
        ({"url": "nats://h", "prefix": "a.b"}, "letters, digits"),
        ({"url": "nats://h", "replicas": 2}, "write 1, or 3, or 5"),
        ({"url": "nats://h", "replicas": 3}, "sync_interval: always"),
        ({"url": "nats://h", "durability": "fsync"}, "sync_interval: always"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_table_is_told_in_a_line(table: dict[str, Any], sentence: str) -> None:
    """Each mistake has its own sentence, and names the file."""
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_journal({"journal": table}, "", "clevrd.toml")

    assert "clevrd.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("table", "durability"),
    [
        ({}, "os"),
        ({"sync_always": True}, "fsync"),
        ({"sync_always": True, "replicas": 3}, "fsync"),
        ({"durability": "os", "replicas": 3}, "os"),
        ({"durability": "os", "sync_always": True}, "os"),
        ({"durability": "fsync", "sync_always": True}, "fsync"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_promise_is_what_the_operator_says_of_the_servers(
    table: dict[str, Any], durability: str
) -> None:
    """clevrd can't see whether a server syncs, and promises nothing that nobody has said."""
    settings = read_journal({"journal": {"url": "nats://h", **table}}, "")

    assert (settings.engine, settings.durability) == ("nats", durability)
    assert settings.retention_bytes == 1 << 30


def test_password_file_has_a_password_or_a_token(tmp_path: Path) -> None:
    """A user in the URL says which of both it is."""
    file = tmp_path / "secret"
    file.write_text("s3cr3t\n")
    table = {"password_file": str(file)}

    addresses = [
        _nats_settings(read_journal({"journal": {"url": url, **table}}, "")).address
        for url in ("nats://me@h", "nats://h")
    ]

    assert [(each.user, each.password, each.token) for each in addresses] == [
        ("me", "s3cr3t", ""),
        ("", "", "s3cr3t"),
    ]


def test_checkconfig_shows_no_secret(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither from the plain setting nor from the table, whether password or token."""
    plain, table = tmp_path / "plain.toml", tmp_path / "table.toml"
    plain.write_text('journal = "nats://me:secret@h:1"\n')
    table.write_text('[journal]\nurl = "nats://secret@h:1"\n')

    codes = [main(["checkconfig", "--config", str(path)]) for path in (plain, table)]

    told = capfd.readouterr()
    assert codes == [0, 0]
    assert "secret" not in told.out + told.err
    assert told.out.count("nats://h:1#") == 3


@pytest.mark.parametrize("name", ["password_file", "ca_file", "creds_file", "nkey_seed_file"])
def test_checkconfig_finds_files_that_cannot_be_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """A file that is missing is named before the daemon needs it."""
    path = tmp_path / "clevrd.toml"
    path.write_text(f'[journal]\nurl = "tls://h:1"\n{name} = "/not/there"\n')

    code = main(["checkconfig", "--config", str(path)])

    assert code != 0
    assert "/not/there" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["nats", "nkeys"])
def test_missing_library_is_told_in_a_line(name: str) -> None:
    """Without the extra the daemon says how to install it, and does not start."""
    script = (
        f"import sys; sys.modules[{name!r}] = None; from clevrd.entry import main;"
        " sys.argv[1:] = ['serve', '--address', '127.0.0.1:0', '--journal', 'nats://h'];"
        " sys.exit(main())"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert 'pip install "clevrd[nats]"' in line


def _info(**config: Any) -> Any:
    settings = NatsSettings(address=parse_nats_url("nats://h"), shown="nats://h")
    made = {**log_config(settings, Names("clevrd"), 0, "id"), **config}
    answer = {"config": made, "created": "2026-01-31T00:00:00Z", "state": {"last_seq": 7}}
    return settings, read_info(json.dumps(answer).encode())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"metadata": {}}, "is not a journal's"),
        ({"metadata": {"clevrd_partitions": "4"}}, "partitions = 4"),
        ({"num_replicas": 3}, "replicas = 3"),
        ({"storage": "memory"}, "storage memory"),
        ({"retention": "workqueue"}, "retention workqueue"),
        ({"max_msgs": 10}, "max_msgs 10"),
        ({"max_msg_size": 1000}, "max_msg_size 1000"),
        ({"sealed": True}, "sealed True"),
        ({"persist_mode": "async"}, "persist_mode async"),
        ({"subjects": ["a", "b"]}, "2 subjects"),
        ({"sources": [{"name": "other"}]}, "sources"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_stream_that_loses_or_refuses_records_is_refused(
    config: dict[str, Any], sentence: str
) -> None:
    """By a setting that the journal has not made it with."""
    settings, info = _info(**config)

    assert sentence in (refusal_of(info, "clevrd-p0", settings) or "")


def test_stream_of_the_journal_is_taken() -> None:
    """With its bounds, or with others, which are changed."""
    settings, info = _info()
    _, other = _info(max_age=5)

    assert refusal_of(info, "clevrd-p0", settings) is None
    assert not wants_update(info, settings)
    assert wants_update(other, settings)
    assert (info.log_id, info.first, info.last) == ("id", 8, 7)
    assert read_info(b"[]") is None


def test_stamp_has_all_that_may_differ() -> None:
    """The log's id, when its stream was made, and the incarnation of the server."""
    _, info = _info()
    _, renamed = _info(subjects=["clevrd.p0.other"])

    stamps = {stamp_of(info, ""), stamp_of(info, "server"), stamp_of(renamed, "")}

    assert len(stamps) == 3
    assert all(int(stamp, 16) >= 0 for stamp in stamps)


def test_server_is_judged_by_its_first_words() -> None:
    """An old one, one that takes little, one without headers."""
    good = {"version": "2.10.23", "headers": True, "max_payload": 1 << 20}

    assert version_of("2.11.0-RC.1") == (2, 11, 0)
    assert server_refusal_of(good, "u") is None
    assert "2.10.23 or newer" in str(server_refusal_of({**good, "version": "2.10.22"}, "u"))
    assert "max_payload" in str(server_refusal_of({**good, "max_payload": 1000}, "u"))
    assert "headers" in str(server_refusal_of({**good, "headers": False}, "u"))


async def test_config_and_metrics_show_no_password(tmp_path: Path) -> None:
    """An operator sees where the journal is, and a fingerprint; the password is nowhere."""
    config = "authorization { user: me, password: secret }"
    with nats_server(tmp_path / "nats", config) as server:
        url = server.url.replace("nats://", "nats://me:secret@")
        async with running(journal=url) as daemon:
            answer = await daemon.publish("t", 1)
            shown = json.dumps([await daemon.get_json(path) for path in ("/config", "/metrics")])

    assert "secret" not in shown
    assert f"{server.url}#" in shown
    assert "durable" not in answer


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (LOST, "see whether it runs there"),
        ("10074", "write replicas = 1"),
        ("10065", "another prefix"),
        ("10113", "give retention_bytes"),
        ("10047", "max_file_store"),
        ("REFUSED", "creds_file"),
        ("DENIED", "_INBOX"),
        ("NO_TLS", "write nats://"),
        ("NOT_NATS", "look at host and port"),
        ("NOBODY", "store_dir"),
    ],
)
def test_each_fault_has_a_sentence_that_says_what_to_do(code: str, hint: str) -> None:
    """It names where the NATS is."""
    told = sentence_of(NatsFault(code, "words of the server"), "nats://h")

    assert "nats://h" in told
    assert hint in told
    assert told.endswith(".")
