"""Each mistake in the tables of tenants and credentials is told with its place and its reason."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from clevrd.errors import ConfigError
from clevrd.tenants.keys import new_key
from clevrd.tenants.settings import OPEN, Access, read_access

DIGEST = "0123456789abcdef" * 4
WHOLE = f"""
[auth]
mode = "required"
allow_query_token = false
allowed_origins = ["https://app.example", "https://*.example.com"]
[[auth.jwt]]
issuer = "https://id.example"
audience = "clevrd"
algorithms = ["RS256"]
jwks_file = "jwks.json"
[[tenants]]
name = "acme"
publish_rate_per_s = 5000
publish_burst = 10000
max_connections = 10000
max_topics = 1000
max_message_bytes = 65536
memory_weight = 1.0
[[tenants.keys]]
id = "web"
sha256 = "{DIGEST}"
publish = ["orders.*"]
subscribe = ["**"]
"""


def read(text: str) -> Access:
    return read_access(tomllib.loads(text), "file clevrd.toml")


def changed(old: str, new: str) -> str:
    assert old in WHOLE
    return WHOLE.replace(old, new)


def test_whole_file_is_read() -> None:
    """As the documents show it."""
    access = read(WHOLE)

    assert access.auth.mode == "required"
    assert access.auth.jwt[0].issuer == "https://id.example"
    (tenant,) = access.tenants
    assert (tenant.name, tenant.publish_rate_per_s, tenant.max_topics) == ("acme", 5_000, 1_000)
    assert (tenant.keys[0].id, tenant.keys[0].publish) == ("web", ("orders.*",))


def test_nothing_is_open() -> None:
    """Without a table everything is as it was before there were any."""
    assert read("") == OPEN
    assert OPEN.auth.mode == "open"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (changed('"required"', '"closed"'), "auth.mode (file clevrd.toml)"),
        (changed("mode =", "modus ="), "auth (file clevrd.toml) has no setting called `modus`"),
        (changed("max_topics = 1000", "max_topics = 0"), "tenants[0].max_topics"),
        (changed("max_topics = 1000", 'max_topics = "1000"'), "tenants[0].max_topics"),
        (changed('name = "acme"', 'name = ".acme"'), "tenants[0].name (file clevrd.toml)"),
        (changed('name = "acme"', 'title = "acme"'), "tenants[0] (file clevrd.toml) has no"),
        (changed('name = "acme"', ""), "tenants[0] (file clevrd.toml) lacks the setting `name`"),
        (changed('id = "web"', 'id = "we b"'), "tenants[0].keys[0].id"),
        (changed('"orders.*"', '"or*"'), 'keys[0].publish (file clevrd.toml) is not allowed: "'),
        (changed("publish_rate_per_s = 5000", ""), "publish_burst (file clevrd.toml) is not"),
        (changed('"RS256"', '"none"'), "'none' is none of ES256"),
        (changed('"RS256"', '"HS256"'), "which are for jwks_file"),
        (changed('jwks_file = "jwks.json"', 'secret_file = "s"'), "is none of HS256"),
        (changed('jwks_file = "jwks.json"', ""), "needs one of jwks_file, jwks_url and"),
        (changed('jwks_file = "jwks.json"', 'jwks_url = "http://x"'), "over https:// alone"),
        (changed('"https://app.example"', '"app.example"'), "is no origin: write it as browsers"),
        (
            changed('publish = ["orders.*"]\nsubscribe = ["**"]', ""),
            'it allows nothing; give it publish = ["**"]',
        ),
        (WHOLE + '[[tenants]]\nname = "acme"\n', "there are two tenants called 'acme'"),
        (
            WHOLE + f'[[tenants.keys]]\nid = "b"\nsha256 = "{DIGEST}"\nadmin = true\n',
            "it is the digest of tenants[0].keys[0] as well",
        ),
        (
            WHOLE + f'[[tenants.keys]]\nid = "web"\nsha256 = "{"0" * 64}"\nadmin = true\n',
            "has two keys called 'web'",
        ),
        ('[auth]\nmode = "required"\n', "nobody could ask for anything"),
        ("tenants = 5\n", "tenants (file clevrd.toml)"),
        ("auth = []\n", "auth (file clevrd.toml)"),
    ],
)
def test_mistake_is_told_with_its_place(text: str, told: str) -> None:
    """On one line each."""
    with pytest.raises(ConfigError) as caught:
        read(text)

    assert told.replace('"', "'") in str(caught.value).replace('"', "'")


@pytest.mark.parametrize(
    "value",
    [new_key().secret, DIGEST.upper(), DIGEST[:-1], ""],
    ids=["secret", "upper case", "cut short", "nothing"],
)
def test_secret_in_place_of_its_digest_is_not_repeated(value: str) -> None:
    """The mistake would stand in a log otherwise."""
    with pytest.raises(ConfigError, match="not the secret") as caught:
        read(changed(DIGEST, value))

    assert not value or value not in str(caught.value)


def test_mistakes_are_told_all_at_once() -> None:
    """An operator mends a file once."""
    text: Any = changed('"orders.*"', '"or*"').replace('"https://app.example"', '"app.example"')

    with pytest.raises(ConfigError) as caught:
        read(text)

    assert len(str(caught.value).splitlines()) == 2
