"""What differs between a running daemon's configuration and the file, without a daemon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from keys import WEB, key, rules

from clevrd.config import Config
from clevrd.config_differences import differences
from clevrd.config_view import ConfigInForce, ConfigView
from clevrd.fingerprints import fingerprint
from clevrd.tenants.keys import new_key
from clevrd.tenants.settings import read_access
from clevrd.tls.settings import NO_TLS, TlsSettings, read_tls

ISSUER = {"issuer": "me", "audience": "clevrd", "algorithms": ["HS256"], "secret_file": "s"}


def view(
    tables: dict[str, Any] | None = None,
    sources: dict[str, str] | None = None,
    webhooks: Sequence[dict[str, Any]] = (),
    tls: TlsSettings = NO_TLS,
    **settings: Any,
) -> ConfigView:
    """Return the view of a configuration."""
    access = read_access(rules() if tables is None else tables, "a test")
    in_force = ConfigInForce(
        Config(**settings), sources or {}, "", access, lambda: 0.0, webhooks=webhooks, tls=tls.view
    )
    steps = in_force.view()
    try:
        while True:
            next(steps)
    except StopIteration as end:
        found: ConfigView = end.value
        return found


def as_sent(sent: ConfigView) -> ConfigView:
    """Return a view as a command has it from the daemon."""
    return msgspec.json.decode(msgspec.json.encode(sent), type=ConfigView)


def between(running: ConfigView, file: ConfigView) -> list[str]:
    return list(differences(as_sent(running), file))


def test_same_configuration_has_no_difference() -> None:
    """Though one has come over the network."""
    tables = rules(jwt=[ISSUER], allowed_origins=["https://a.example"])

    assert between(view(tables), view(tables)) == []


def test_setting_takes_a_restart() -> None:
    """Both values are there, as the file spells them."""
    assert between(view(max_topics=5), view(max_topics=6, raw_paths=False, state_dir="/x")) == [
        "max_topics: running 5, file 6 (restart)",
        'state_dir: running "", file "/x" (restart)',
        "raw_paths: running true, file false (restart)",
    ]


def test_setting_that_outranks_the_file_is_no_difference() -> None:
    """The file can't change it, so neither reload nor restart would."""
    for source in ("flag --max-topics", "environment CLEVRD_MAX_TOPICS"):
        assert between(view(max_topics=5, sources={"max_topics": source}), view()) == []


def test_setting_that_an_older_daemon_lacks_is_passed_over() -> None:
    """The versions of command and daemon may differ."""
    running = view()
    del running.settings["max_topics"]

    assert between(running, view(max_topics=7)) == []


def test_changed_key_shows_without_its_digest() -> None:
    """Permissions are shown; of the secret there is nothing but that it is another."""
    before, after = rules(), rules()
    other = new_key()
    after["tenants"][0]["keys"][0] = key("web", other, publish=["orders.*"], admin=True)

    lines = between(view(before), view(after))

    assert lines == [
        "tenants.acme.keys.web: the secret differs (reload)",
        'tenants.acme.keys.web.subscribe: running ["orders.**", "news"], file [] (reload)',
        "tenants.acme.keys.web.admin: running false, file true (reload)",
    ]
    for made in (WEB, other):
        assert made.sha256 not in str(lines)


def test_keys_and_tenants_come_and_go() -> None:
    """Each is one line, and its place in the file means nothing."""
    before, after = rules(), rules()
    del after["tenants"][0]["keys"][1]
    after["tenants"][0]["keys"].append(key("new", new_key(), publish=["**"]))
    after["tenants"][0]["max_topics"] = 5
    del after["tenants"][1]
    after["tenants"].insert(0, {"name": "third"})
    after["auth"]["jwt"] = [ISSUER]
    after["auth"]["mode"] = "open"

    assert between(view(before), view(after)) == [
        'auth.mode: running "required", file "open" (reload)',
        "auth.jwt.me clevrd: only in the file (reload)",
        "tenants.acme.max_topics: running none, file 5 (reload)",
        "tenants.acme.keys.writer: only running (reload)",
        "tenants.acme.keys.new: only in the file (reload)",
        "tenants.other: only running (reload)",
        "tenants.third: only in the file (reload)",
    ]


def test_webhooks_take_a_restart() -> None:
    """Each is recognised by its id; a daemon that does not show any has no difference."""
    billing = {"id": "billing", "url": "https://b.example#0a1b2c3d", "topics": ["**"]}
    other = {**billing, "url": "https://b.example#4e5f6a7b"}
    running, file = view(webhooks=[billing]), view(webhooks=[{**other, "id": "new"}, other])

    assert between(running, file) == [
        'webhooks.billing.url: running "https://b.example#0a1b2c3d", file'
        ' "https://b.example#4e5f6a7b" (restart)',
        "webhooks.new: only in the file (restart)",
    ]
    assert between(msgspec.structs.replace(running, webhooks=None), file) == []


def test_certificate_is_compared_by_its_file_once() -> None:
    """That of the plain settings is told as those; what follows from files is no difference."""

    def tls(plain: str, listed: str, asks: str) -> TlsSettings:
        entry = {"cert_file": listed, "key_file": "/k.pem"}
        table = {"certificates": [entry], "client_certificates": asks, "client_ca_file": "/ca.pem"}
        return read_tls({"tls": table}, "", cert_file=plain, key_file="/k.pem")

    running = as_sent(view(tls=tls("/a.pem", "/b.pem", "optional"), tls_cert_file="/a.pem"))
    assert running.tls is not None
    running.tls["minimum_version"] = "TLSv1.2"
    running.tls["certificates"][1]["ends_at"] = "2026-12-01T00:00:00.000000Z"
    same = view(tls=tls("/a.pem", "/b.pem", "optional"), tls_cert_file="/a.pem")
    other = view(tls=tls("/c.pem", "/d.pem", "required"), tls_cert_file="/c.pem")

    assert between(running, same) == []
    assert between(running, other) == [
        'tls_cert_file: running "/a.pem", file "/c.pem" (reload)',
        "tls.certificates./b.pem: only running (reload)",
        "tls.certificates./d.pem: only in the file (reload)",
        'tls.client_certificates: running "optional", file "required" (reload)',
    ]
    assert between(msgspec.structs.replace(running, tls=None), other) == [
        'tls_cert_file: running "/a.pem", file "/c.pem" (reload)'
    ]


@pytest.mark.parametrize("is_on", [False, True], ids=["on", "off"])
def test_tls_is_switched_by_a_restart(is_on: bool) -> None:
    """On and off; a reload refuses it."""
    on = view(
        tls=read_tls({"tls": {}}, "", cert_file="/a.pem", key_file="/k.pem"),
        tls_cert_file="/a.pem",
        tls_key_file="/k.pem",
    )
    off = view()

    lines = between(on, off) if is_on else between(off, on)

    assert [line.split(":")[0] for line in lines] == ["tls_cert_file", "tls_key_file"]
    assert all(line.endswith("(restart)") for line in lines)


def test_difference_from_a_hostile_server_stays_on_its_line() -> None:
    """The URL may be anybody's, and a terminal obeys control characters."""
    running = as_sent(view({}))
    running.auth["mo\nde"] = "\x1b[2J"
    running.tenants.append({"name": "\x1b[31m\n"})
    running = msgspec.structs.replace(running, tls={"certificates": ["\x1b[1m"]})

    lines = between(running, view({}))

    assert lines == [
        "auth.mo\\nde: only running (reload)",
        "tenants.\\x1b[31m\\n: only running (reload)",
        'tls.certificates: running ["\\u001b[1m"], file [] (restart)',
        "tls.client_ca_file: only in the file (restart)",
        "tls.client_certificates: only in the file (restart)",
    ]


def test_view_has_no_digest_and_no_password() -> None:
    """Neither does a URL show what may be secret in it."""
    url = "https://user:hunter2@id.example/keys?code=hunter3"
    issuer = {**ISSUER, "algorithms": ["RS256"], "jwks_url": url}
    del issuer["secret_file"]

    shown = msgspec.json.encode(view(rules(jwt=[issuer]))).decode()

    assert WEB.sha256 not in shown
    assert fingerprint(WEB.sha256) in shown
    assert not WEB.sha256.startswith(fingerprint(WEB.sha256))
    assert "hunter" not in shown
    assert f"https://id.example/keys#{fingerprint(url)}" in shown


def test_view_of_many_keys_is_made_in_steps() -> None:
    """A file has some ten thousand at most, and the loop serves others meanwhile."""
    tables = {
        "tenants": [
            {"name": f"t{at}", "keys": [key("k", new_key(), admin=True)]} for at in range(1_000)
        ]
    }
    access = read_access(tables, "a test")

    steps = list(ConfigInForce(Config(), {}, "", access, lambda: 0.0).view())

    assert len(steps) >= 15
