"""Key sets and secrets that can't be used are told; none that others can read is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clevrd.errors import ConfigError
from clevrd.tenants.signing_keys import (
    MAX_SET_BYTES,
    BadKeySet,
    read_key_set,
    read_key_set_file,
    read_secret_file,
)

KEY = {"kty": "RSA", "n": "AQAB", "e": "AQAB"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 50_000, "not JSON"),
        (b"[]", 'no list "keys"'),
        (b'{"keys":{}}', 'no list "keys"'),
        (b'{"keys":[]}', "no key in it"),
        (b'{"keys":[1,"a",null]}', "no key in it"),
        (json.dumps({"keys": [KEY] * 101}).encode(), "more than 100 keys"),
        (b" " * (MAX_SET_BYTES + 1), "bytes"),
        (b"<html>", "not JSON"),
    ],
)
def test_bytes_that_are_no_key_set_are_told(content: bytes, why: str) -> None:
    """Whether a file or a server sent them."""
    with pytest.raises(BadKeySet, match=why):
        read_key_set(content)


def test_two_keys_with_one_id_are_none() -> None:
    """Which one is meant would be a guess."""
    keys = read_key_set(json.dumps({"keys": [{**KEY, "kid": "a"}, {**KEY, "kid": "a"}]}).encode())

    assert keys.find("a", "RS256") is None


def test_file_that_is_no_key_set_is_told(tmp_path: Path) -> None:
    """With its path."""
    path = tmp_path / "jwks.json"
    with pytest.raises(ConfigError, match="No such file"):
        read_key_set_file(path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"jwks\.json can't be used: it has no list"):
        read_key_set_file(path)
    with pytest.raises(ConfigError, match="Is a directory"):
        read_key_set_file(tmp_path)


def test_secret_is_read_without_the_end_of_its_line(tmp_path: Path) -> None:
    """As an editor or a shell leaves it."""
    path = tmp_path / "secret"
    path.write_text("s" * 32 + "\n")
    path.chmod(0o640)

    assert read_secret_file(path).find(None, "HS256") == b"s" * 32


@pytest.mark.parametrize(
    ("mode", "size", "why"),
    [(0o644, 32, "chmod 640"), (0o660, 32, "chmod 640"), (0o600, 31, "31 bytes, and 32 at least")],
)
def test_secret_that_is_none_is_refused(tmp_path: Path, mode: int, size: int, why: str) -> None:
    """Readable by others, changeable by others, or short enough to guess; and it is not shown."""
    path = tmp_path / "secret"
    path.write_text("s" * size)
    path.chmod(mode)

    with pytest.raises(ConfigError, match=why) as caught:
        read_secret_file(path)

    assert "sss" not in str(caught.value)
