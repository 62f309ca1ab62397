"""The table [tls] and the files that it names: what is taken, and a sentence for each mistake."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from tls import DAY, Pair, make_pair

from clevrd.errors import ConfigError
from clevrd.tls.certificates import read_certificate
from clevrd.tls.contexts import TlsContexts
from clevrd.tls.settings import CertificateEntry, TlsSettings, read_tls

CERT = {"cert_file": "a.pem", "key_file": "a.key"}


def settings_of(pair: Pair, **more: Any) -> TlsSettings:
    entry = CertificateEntry(cert_file=str(pair.cert), key_file=str(pair.key))
    return TlsSettings(certificates=(entry,), **more)


def refusal(settings: TlsSettings) -> str:
    with pytest.raises(ConfigError) as caught:
        TlsContexts(settings)
    return str(caught.value)


def test_files_are_beside_the_configuration_and_plain_settings_come_first() -> None:
    """A name of a file in the table is relative to the table's file, as in all tables."""
    tables = {"tls": {"certificates": [{**CERT, "names": ["*.a.example"]}]}}

    read = read_tls(tables, "/etc/clevrd/clevrd.toml", cert_file="p.pem", key_file="p.key")

    assert [each.cert_file for each in read.certificates] == ["p.pem", "/etc/clevrd/a.pem"]
    assert read.certificates[1].names == ("*.a.example",)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"certificates": [{"cert_file": "a.pem"}]}, "key_file"),
        ({"certificate": []}, "has no setting called `certificate`"),
        ({"certificates": [{**CERT, "names": ["A.example"]}]}, "no name of a host"),
        ({"certificates": [{**CERT, "names": ["a..b"]}]}, "no name of a host"),
        ({"certificates": [{**CERT, "names": ["a.b", "a.b"]}]}, "stands there twice"),
        ({"certificates": [CERT], "client_certificates": "required"}, "client_ca_file"),
        ({"certificates": [CERT], "client_ca_file": "ca.pem"}, "means nothing"),
        ({"client_ca_file": "c", "client_certificates": "optional"}, "clevrd cert new"),
        ({"certificates": [CERT], "client_certificates": "yes"}, "client_certificates"),
    ],
)
def test_each_mistake_in_the_table_has_its_sentence(table: dict[str, Any], said: str) -> None:
    """The sentence names the place and the file."""
    with pytest.raises(ConfigError) as caught:
        read_tls({"tls": table}, "c.toml")

    assert said in str(caught.value)
    assert "(file c.toml)" in str(caught.value)


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"cert_file": "a"}, "tls_cert_file is not allowed: it means nothing without tls_key_file"),
        ({"key_file": "a"}, "tls_key_file is not allowed: it means nothing without tls_cert_file"),
    ],
)
def test_plain_settings_come_in_pairs(plain: dict[str, str], said: str) -> None:
    """A certificate without a key would otherwise start a daemon without TLS."""
    with pytest.raises(ConfigError) as caught:
        read_tls({}, **plain)

    assert said in str(caught.value)


def test_certificate_says_its_end_and_its_names(tmp_path: Path) -> None:
    """The daemon's reading agrees with that of the library which made the certificate."""
    pair = make_pair(tmp_path, sans=("A.example", "*.b.example", "10.0.0.1"))

    read = read_certificate(pair.certificate.public_bytes(_der()))

    assert read.names == ("a.example", "*.b.example")
    assert read.ends_s == pair.certificate.not_valid_after_utc.timestamp()
    assert read.begins_s == pair.certificate.not_valid_before_utc.timestamp()


def test_damaged_certificate_is_never_more_than_a_value_error(tmp_path: Path) -> None:
    """Each byte may be wrong, and the file cut anywhere."""
    der = make_pair(tmp_path).certificate.public_bytes(_der())

    for place in range(len(der)):
        for damaged in (der[:place], der[:place] + bytes([der[place] ^ 0xFF]) + der[place + 1 :]):
            try:
                read_certificate(damaged)
            except ValueError:
                continue


def _der() -> Any:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.DER


class TestFiles:
    """A sentence for each way in which a certificate's files can be wrong."""

    def test_ended(self, tmp_path: Path) -> None:
        pair = make_pair(tmp_path, begins=-30 * DAY, ends=-DAY)
        assert f"The certificate in {pair.cert} ended on " in refusal(settings_of(pair))

    def test_not_begun(self, tmp_path: Path) -> None:
        pair = make_pair(tmp_path, begins=DAY)
        assert "is this machine's clock right?" in refusal(settings_of(pair))

    def test_of_another_key(self, tmp_path: Path) -> None:
        pair, other = make_pair(tmp_path), make_pair(tmp_path, "other")
        said = refusal(settings_of(pair._replace(key=other.key)))
        assert said == f"The key in {other.key} is not that of the certificate in {pair.cert}."

    @pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602])
    def test_others_may_read_the_key(self, tmp_path: Path, mode: int) -> None:
        pair = make_pair(tmp_path)
        pair.key.chmod(mode)
        assert f"forbid it: chmod 640 {pair.key}" in refusal(settings_of(pair))

    def test_missing(self, tmp_path: Path) -> None:
        pair = make_pair(tmp_path)
        pair.key.unlink()
        assert refusal(settings_of(pair)) == f"Can't read {pair.key}: No such file or directory."
        pair.cert.unlink()
        assert refusal(settings_of(pair)) == f"Can't read {pair.cert}: No such file or directory."

    def test_empty(self, tmp_path: Path) -> None:
        pair = make_pair(tmp_path)
        pair.key.write_text("\n")
        assert refusal(settings_of(pair)) == f"The key file {pair.key} is empty."
        pair.cert.write_text("")
        assert refusal(settings_of(pair)) == f"The certificate file {pair.cert} is empty."

    def test_exchanged(self, tmp_path: Path) -> None:
        pair = make_pair(tmp_path)
        exchanged = pair._replace(cert=pair.key, key=pair.cert)
        assert "holds a key and no certificate" in refusal(settings_of(exchanged))

    def test_no_pem(self, tmp_path: Path) -> None:
        pair = make_pair(tmp_path)
        pair.key.write_bytes(b"\0\1\2")
        assert "There is no private key in" in refusal(settings_of(pair))
        pair.cert.write_bytes(pair.certificate.public_bytes(_der()))
        assert "it must be PEM" in refusal(settings_of(pair))

    def test_damaged(self, tmp_path: Path) -> None:
        pair = make_pair(tmp_path)
        lines = pair.cert.read_text().splitlines()
        pair.cert.write_text("\n".join([*lines[:3], *lines[-1:]]))
        assert f"The certificate in {pair.cert} is damaged" in refusal(settings_of(pair))

    def test_with_a_passphrase(self, tmp_path: Path) -> None:
        """OpenSSL would ask for it at the terminal, for ever."""
        pair = make_pair(tmp_path)
        locked = tmp_path / "locked.key"
        command = ["openssl", "pkey", "-in", str(pair.key), "-aes256", "-passout", "pass:x"]
        subprocess.run([*command, "-out", str(locked)], check=True)
        locked.chmod(0o600)
        assert "has a passphrase" in refusal(settings_of(pair._replace(key=locked)))

    def test_authorities(self, tmp_path: Path) -> None:
        """A client's own certificate is no authority, which is a common mix-up."""
        pair = make_pair(tmp_path)
        asks: dict[str, Any] = {"client_certificates": "optional"}
        ca = tmp_path / "ca.pem"
        assert "Can't read" in refusal(settings_of(pair, client_ca_file=str(ca), **asks))
        ca.write_text("x")
        assert "There is no certificate in" in refusal(
            settings_of(pair, client_ca_file=str(ca), **asks)
        )
        ca.write_bytes(pair.cert.read_bytes())
        assert "CA:TRUE" in refusal(settings_of(pair, client_ca_file=str(ca), **asks))

    def test_all_at_once(self, tmp_path: Path) -> None:
        """Two certificates that are wrong have a line each."""
        settings = TlsSettings(
            certificates=(
                CertificateEntry(cert_file="/nowhere/a", key_file="k"),
                CertificateEntry(cert_file="/nowhere/b", key_file="k"),
            )
        )
        assert len(refusal(settings).split("\n")) == 2


def test_end_within_two_weeks_is_warned_of(tmp_path: Path) -> None:
    """The log says which file, and the figure is the first end of all."""
    soon, later = make_pair(tmp_path, "soon", ends=13 * DAY), make_pair(tmp_path, "later")
    entries = [
        CertificateEntry(cert_file=str(each.cert), key_file=str(each.key)) for each in (later, soon)
    ]
    contexts = TlsContexts(TlsSettings(certificates=tuple(entries)))

    (sentence,) = contexts.ending_soon()

    assert str(soon.cert) in sentence
    assert 12 * 86_400 < contexts.ends_in_s() < 13 * 86_400 + 60


def test_bad_new_files_change_nothing(tmp_path: Path) -> None:
    """A reload that fails leaves the certificates that were shown."""
    pair = make_pair(tmp_path)
    contexts = TlsContexts(settings_of(pair))
    before = contexts.shown
    pair.cert.write_text("")

    with pytest.raises(ConfigError):
        contexts.replace(settings_of(pair))

    assert contexts.shown is before
