"""clevrd key and clevrd token: what they print fits the daemon, and no secret goes astray."""

from __future__ import annotations

import io
import os
import stat
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from clevrd.cli import main
from clevrd.cli.token_show import told
from clevrd.tenants.authenticator import Authenticator
from clevrd.tenants.credentials import Credential
from clevrd.tenants.keys import digest_of
from clevrd.tenants.settings import read_access
from clevrd.tenants.topic_permissions import TopicPermissions

KEY = ["key", "new", "--tenant", "acme", "--id", "web"]
TOKEN = ["token", "new", "--issuer", "me", "--audience", "clevrd", "--tenant", "acme"]
ISSUER = """
[[auth.jwt]]
issuer = "me"
audience = "clevrd"
algorithms = ["HS256"]
secret_file = "secret"
[[tenants]]
name = "acme"
"""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own settings from the commands."""
    for name in [name for name in os.environ if name.startswith("CLEVRD_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("s" * 40 + "\n")
    path.chmod(0o600)
    return path


def give(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let the next command read ``content`` from standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def told_secret(errors: str) -> str:
    """Return the secret in the sentence on standard error."""
    return errors.split(": ")[-1].strip()


# --- clevrd key new ---


def test_new_key_is_taken_by_the_file_that_it_was_appended_to(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What is printed is TOML, behind whatever the file ends with, and the secret opens it."""
    entries = ["--publish", "orders.*", "--publish", 'nürnberg "1"', "--subscribe", "**"]
    code = main([*KEY, *entries, "--clear", "rooms.*", "--clear", "lobby"])

    printed, errors = capfd.readouterr()
    tables = tomllib.loads('[auth]\nmode = "required"' + printed)
    tenant = Authenticator(read_access(tables, "a test"))._of_credential(
        Credential(told_secret(errors))
    )
    assert code == 0
    assert (tenant.name, tenant.credential_id, tenant.is_admin) == ("acme", "web", False)
    assert tenant.publish == TopicPermissions(["orders.*", 'nürnberg "1"'])
    assert tenant.subscribe == TopicPermissions(["**"])
    assert tenant.clear == TopicPermissions(["rooms.*", "lobby"])


def test_new_key_clears_nothing_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    """A key may do nothing else either, and one that only clears is made, too."""
    main([*KEY, "--publish", "**", "--admin"])
    without = tomllib.loads(capfd.readouterr().out)
    main([*KEY, "--clear", "**"])
    alone = tomllib.loads(capfd.readouterr().out)

    assert "clear" not in without["tenants"][0]["keys"][0]
    (key,) = alone["tenants"][0]["keys"]
    assert {name: key[name] for name in key.keys() - {"id", "sha256"}} == {"clear": ["**"]}


def test_secret_is_not_in_what_is_pasted(capfd: pytest.CaptureFixture[str]) -> None:
    """Standard output is appended to a file that holds digests alone."""
    main([*KEY, "--admin"])

    printed, errors = capfd.readouterr()
    secret = told_secret(errors)
    assert secret.startswith("clevrd_")
    assert secret not in printed
    assert digest_of(secret) in printed


def test_secret_file_is_its_owners_alone(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """And then the secret is shown nowhere."""
    path = tmp_path / "web.key"

    assert main([*KEY, "--admin", "--secret-file", str(path)]) == 0

    printed, errors = capfd.readouterr()
    secret = path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert digest_of(secret) in printed
    assert secret not in printed + errors


def test_secret_file_replaces_no_file(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A secret that is in use would be lost."""
    path = tmp_path / "web.key"
    path.write_text("old")

    assert main([*KEY, "--admin", "--secret-file", str(path)]) == 2

    assert "is there already" in capfd.readouterr().err
    assert path.read_text() == "old"


def test_key_for_a_tenant_that_is_there_is_no_other_tenants(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Appended, it makes a file that is refused, instead of a key of the last tenant."""
    main([*KEY, "--admin"])
    tables = tomllib.loads(
        '[[tenants]]\nname = "acme"\n[[tenants]]\nname = "other"\n' + capfd.readouterr().out
    )

    with pytest.raises(Exception, match="there are two tenants called 'acme'"):
        read_access(tables, "a test")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (KEY, "would allow nothing"),
        ([*KEY, "--publish", "orders.**.x"], "--publish 'orders.**.x' is not allowed"),
        ([*KEY, "--subscribe", ""], "--subscribe '' is not allowed"),
        ([*KEY, "--clear", "*a"], "--clear '*a' is not allowed"),
        ([*KEY[:-1], "we b", "--admin"], "--id must be"),
        (["key", "new", "--tenant", "a:b", "--id", "web", "--admin"], "tenant's name must be"),
        (["key", "new", "--id", "web", "--admin"], "required: --tenant"),
        (["key"], "required: COMMAND"),
        (["key", "old"], "invalid choice: 'old'"),
        ([*KEY, "--secret", "x"], "unrecognized arguments: --secret"),
    ],
)
def test_wrong_key_is_one_clear_line(
    argv: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and nothing to paste."""
    assert main(argv) == 2

    printed, errors = capfd.readouterr()
    assert printed == ""
    assert errors.count("\n") == 1
    assert words in errors


# --- clevrd key digest ---


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_digest_is_of_the_line(
    end: bytes, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clients send it: without the end of its line."""
    give(monkeypatch, b"k" * 40 + end)

    assert main(["key", "digest"]) == 0

    assert capfd.readouterr() == (digest_of("k" * 40) + "\n", "")


def test_digest_of_a_password_comes_with_a_warning(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be guessed from the digest."""
    give(monkeypatch, b"hunter2")

    assert main(["key", "digest"]) == 0

    printed, errors = capfd.readouterr()
    assert printed == digest_of("hunter2") + "\n"
    assert "might be guessed" in errors
    assert "hunter2" not in errors


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"two words", b"two\nlines", b"\xff", b"k" * 2_000]
)
def test_what_no_client_could_send_has_no_digest(
    content: bytes, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon takes one run of visible ASCII characters, of 1,024 bytes at most."""
    give(monkeypatch, content)

    assert main(["key", "digest"]) == 2

    assert capfd.readouterr().out == ""


# --- clevrd token new ---


def claims_of(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


def test_token_has_what_was_asked_for(capfd: pytest.CaptureFixture[str], secret_file: Path) -> None:
    """And is signed with the secret in the file."""
    asked = ["--publish", "a", "--publish", "b.*", "--clear", "b.*"]
    asked += ["--sub", "joe", "--lifetime", "90s"]

    code = main([*TOKEN, "--secret-file", str(secret_file), "--kid", "k1", *asked])

    token = capfd.readouterr().out.strip()
    claims = jwt.decode(token, "s" * 40, algorithms=["HS256"], audience="clevrd", issuer="me")
    assert code == 0
    assert jwt.get_unverified_header(token) == {"alg": "HS256", "kid": "k1", "typ": "JWT"}
    assert claims["exp"] - claims["iat"] == 90
    assert abs(claims["iat"] - time.time()) < 60
    assert {name: claims[name] for name in claims.keys() - {"iat", "exp"}} == {
        "iss": "me",
        "aud": "clevrd",
        "tenant": "acme",
        "sub": "joe",
        "publish": ["a", "b.*"],
        "clear": ["b.*"],
    }


def test_token_lives_an_hour_unless_asked_otherwise(
    capfd: pytest.CaptureFixture[str], secret_file: Path
) -> None:
    """Long enough for a try, and short enough to lose."""
    main([*TOKEN, "--secret-file", str(secret_file), "--subscribe", "**"])

    claims = claims_of(capfd.readouterr().out.strip())
    assert claims["exp"] - claims["iat"] == 3_600


PRIVATE_KEYS: dict[str, Callable[[], Any]] = {
    "RS256": lambda: rsa.generate_private_key(65_537, 2_048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


def write_pem(path: Path, key: Any, password: bytes | None = None) -> Path:
    """Write a private key that its owner alone may read."""
    encryption: Any = (
        serialization.NoEncryption()
        if password is None
        else serialization.BestAvailableEncryption(password)
    )
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("algorithm", PRIVATE_KEYS)
def test_private_key_signs_with_its_own_algorithm(
    algorithm: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The public half verifies the token."""
    key = PRIVATE_KEYS[algorithm]()
    path = write_pem(tmp_path / "key.pem", key)

    assert main([*TOKEN, "--private-key", str(path), "--subscribe", "**"]) == 0

    token = capfd.readouterr().out.strip()
    assert jwt.get_unverified_header(token)["alg"] == algorithm
    jwt.decode(token, key.public_key(), algorithms=[algorithm], audience="clevrd")


def test_keys_that_sign_nothing_are_told_apart(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, secret_file: Path
) -> None:
    """One line for each mistake, with what to do and no part of a file."""
    strong = PRIVATE_KEYS["ES256"]()
    weak = rsa.generate_private_key(65_537, 1_024)  # noqa: S505  # the test's subject
    other = ec.generate_private_key(ec.SECP256K1())
    readable = write_pem(tmp_path / "readable.pem", strong)
    readable.chmod(0o644)
    cases = [
        (write_pem(tmp_path / "encrypted.pem", strong, b"pw"), "is encrypted"),
        (write_pem(tmp_path / "weak.pem", weak), "has 1024 bits"),
        (write_pem(tmp_path / "other.pem", other), "of no kind that is taken"),
        (secret_file, "has no private key as PEM"),
        (readable, "chmod 640"),
        (tmp_path / "missing.pem", "No such file"),
    ]
    for path, words in cases:
        assert main([*TOKEN, "--private-key", str(path), "--subscribe", "**"]) == 78

        printed, errors = capfd.readouterr()
        assert printed == ""
        assert errors.count("\n") == 1
        assert words in errors
        assert "ssss" not in errors


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--secret-file", "x"], "would allow nothing"),
        (["--subscribe", "**"], "--secret-file --private-key is required"),
        (["--secret-file", "x", "--private-key", "y", "--subscribe", "**"], "not allowed with"),
        (["--secret-file", "x", "--subscribe", "a", "--lifetime", "1"], "not a length of time"),
        (["--secret-file", "x", "--subscribe", "a", "--lifetime", "0h"], "not a length of time"),
        (["--secret-file", "x", "--subscribe", "a", "--lifetime", "4000d"], "up to ten years"),
        (["--secret-file", "x", "--subscribe", "*a"], "--subscribe '*a' is not allowed"),
    ],
)
def test_wrong_token_is_one_clear_line(
    argv: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 before any file is read."""
    assert main([*TOKEN, *argv]) == 2

    printed, errors = capfd.readouterr()
    assert printed == ""
    assert words in errors


@pytest.mark.parametrize("command", ["new", "show"])
def test_token_without_the_extra_says_what_to_install(
    command: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    secret_file: Path,
) -> None:
    """PyJWT is an extra, and a traceback would not name it."""
    monkeypatch.setattr("clevrd.tenants.from_settings.find_spec", lambda _: None)
    argv = [*TOKEN, "--secret-file", str(secret_file), "--subscribe", "a"]

    assert main(argv if command == "new" else ["token", "show"]) == 78

    assert "clevrd token needs PyJWT" in (errors := capfd.readouterr().err)
    assert 'pip install "clevrd[jwt]"' in errors


# --- clevrd token show ---


def made_token(capfd: pytest.CaptureFixture[str], secret_file: Path, *more: str) -> str:
    argv = ["--secret-file", str(secret_file), "--publish", "orders.*", *more]
    assert main([*TOKEN, *argv]) == 0
    return capfd.readouterr().out.strip()


def test_show_has_the_claims_and_not_the_signature(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, secret_file: Path
) -> None:
    """What it prints can be put into a ticket."""
    token = made_token(capfd, secret_file)
    give(monkeypatch, token.encode() + b"\n")

    assert main(["token", "show"]) == 0

    lines = dict(line.split(None, 1) for line in capfd.readouterr().out.splitlines())
    assert lines["alg"] == "HS256"
    assert lines["tenant"] == "acme"
    assert lines["publish"] == "orders.*"
    assert lines["exp"].endswith(("in 1 h", "in 59 min 59 s", "in 59 min 58 s"))
    assert lines["signature"] == "43 characters, which are not shown"
    assert "taken" not in lines
    assert token.rpartition(".")[2] not in str(lines)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (("", ""), 0, "yes, for tenant acme; publish: orders.*; subscribe: nothing; clear: lobby"),
        (('"acme"', '"other"'), 1, "no: The token is not valid: its tenant is not configured here"),
        (('"me"', '"you"'), 1, "no: The token is not valid: it is of no issuer that is known here"),
        (('"clevrd"', '"x"'), 1, "no: The token is not valid: it is meant for another audience"),
        (('"HS256"', '"HS512"'), 1, "no: The token is not valid: its algorithm is not one"),
    ],
)
def test_show_says_whether_a_configuration_would_take_it(
    change: tuple[str, str],
    code: int,
    words: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    secret_file: Path,
) -> None:
    """With the daemon's own refusal."""
    config = tmp_path / "clevrd.toml"
    config.write_text(ISSUER.replace(*change) if change[0] else ISSUER)
    give(monkeypatch, made_token(capfd, secret_file, "--clear", "lobby").encode())

    assert main(["token", "show", "--config", str(config)]) == code

    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith(f"taken      {words}")


def test_show_reads_no_token_from_anything_else(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And repeats nothing of it, which may be a key."""
    for content in (b"", b"clevrd_secret", b"a.b.c", b"two words"):
        give(monkeypatch, content)

        assert main(["token", "show"]) == 2

        printed, errors = capfd.readouterr()
        assert printed == ""
        assert "secret" not in errors


def test_show_of_a_hostile_token_stays_on_its_lines() -> None:
    """A token may be anybody's, and a terminal obeys control characters."""
    lines = list(
        told(
            {"alg": "none\x1b[2J", "a\nb": 1},
            {"exp": "soon", "nbf": 10**400, "iat": 1, "publish": ["a\x07", "b"], "x": {"y": "\n"}},
            now_s=100_001.0,
        )
    )

    assert lines == [
        "alg        none\\x1b[2J",
        "a\\nb       1",
        "exp        soon, which is no time",
        f"nbf        {10**400}, which is no time",
        "iat        1970-01-01 00:00:01 UTC, 1 d 3 h ago",
        "publish    a\\x07, b",
        'x          {"y":"\\\\n"}',
    ]
