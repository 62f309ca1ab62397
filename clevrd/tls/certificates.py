"""Certificates and keys: read from PEM files, and what is wrong with them as a sentence.

OpenSSL checks and uses them; what a daemon has to know beyond that (until when, for which names) is
read here from the bytes. Form of a certificate: RFC 5280 §4.1; of the bytes: X.690 (DER).
"""

from __future__ import annotations

import ssl
from binascii import Error as NotBase64
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from clevrd.errors import ConfigError
from clevrd.private_files import check_private
from clevrd.small_files import read_small

# A chain of ten certificates has 20 KiB, and the authorities that a system trusts 220 KiB.
MAX_PEM_BYTES: Final = 1 << 20

_SUBJECT_ALT_NAME: Final = b"\x55\x1d\x11"  # 2.5.29.17
_SEQUENCE: Final = 0x30
_OID: Final = 0x06
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18
_VERSION: Final = 0xA0
_EXTENSIONS: Final = 0xA3
_DNS_NAME: Final = 0x82

_BEGIN_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_END_CERTIFICATE: Final = b"-----END CERTIFICATE-----"


class Certificate(msgspec.Struct, frozen=True):
    """A certificate: when it holds, seconds since 1970, and for which hosts."""

    begins_s: float
    ends_s: float
    # In lower case; without addresses, which no client asks for by name.
    names: tuple[str, ...]


# --- files ---------------------------------------------------------------------------------------


def read_certificate_file(path: Path) -> Certificate:
    """Return the first certificate in a file, which is the daemon's own.

    Raises:
        ConfigError: the file can't be read, or has none.
    """
    content = _read(path)
    begin = content.find(_BEGIN_CERTIFICATE)
    end = content.find(_END_CERTIFICATE, begin)
    if begin < 0 or end < 0:
        raise ConfigError(_no_certificate(path, content))
    block = content[begin : end + len(_END_CERTIFICATE)].decode("ascii", "replace")
    try:
        return read_certificate(ssl.PEM_cert_to_DER_cert(block))
    except (ValueError, NotBase64) as error:
        raise ConfigError(f"The certificate in {path} is damaged; write the file anew.") from error


def _no_certificate(path: Path, content: bytes) -> str:
    if not content.strip():
        return f"The certificate file {path} is empty."
    if b"PRIVATE KEY-----" in content:
        return f"{path} holds a key and no certificate; give cert_file and key_file each its own."
    return f"There is no certificate in {path}; it must be PEM (-----BEGIN CERTIFICATE-----)."


def check_key_file(path: Path) -> None:
    """Raise ConfigError unless a file can be a private key's that is ours alone."""
    check_private(path)
    content = _read(path)
    if not content.strip():
        raise ConfigError(f"The key file {path} is empty.")
    if b"PRIVATE KEY-----" not in content:
        raise ConfigError(
            f"There is no private key in {path}; it must be PEM (-----BEGIN PRIVATE KEY-----)."
        )
    if b"BEGIN ENCRYPTED PRIVATE KEY-----" in content or b"Proc-Type: 4,ENCRYPTED" in content:
        raise ConfigError(
            f"The key in {path} has a passphrase, which a daemon can't be asked for; take it off:"
            f" openssl pkey -in {path} -out new.pem"
        )


def load_pair(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    """Have ``context`` show a certificate with its key, both of which were read before.

    Raises:
        ConfigError: they don't belong together, or OpenSSL takes one of them for too weak.
    """
    try:
        context.load_cert_chain(cert_file, key_file, password=_no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            sentence = f"The key in {key_file} is not that of the certificate in {cert_file}."
        else:
            why = (error.reason or "unknown").lower().replace("_", " ")
            sentence = f"OpenSSL does not take {cert_file} with {key_file}: {why}."
        raise ConfigError(sentence) from error
    except OSError as error:
        raise ConfigError(f"Can't read {cert_file} or {key_file}: {error.strerror}.") from error


def _no_passphrase() -> str:
    """Answer OpenSSL, which would otherwise ask at the terminal."""
    return ""


def load_authorities(context: ssl.SSLContext, path: Path) -> None:
    """Have ``context`` trust the authorities in a file.

    Raises:
        ConfigError: the file can't be read, or has no certificate.
    """
    content = _read(path)
    if _BEGIN_CERTIFICATE not in content:
        raise ConfigError(_no_certificate(path, content))
    try:
        context.load_verify_locations(cadata=content.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"A certificate in {path} is damaged; write the file anew.") from error
    if not context.get_ca_certs():
        raise ConfigError(f"No certificate in {path} is one of an authority (CA:TRUE).")


def _read(path: Path) -> bytes:
    try:
        content = read_small(path, MAX_PEM_BYTES)
    except OSError as error:
        raise ConfigError(f"Can't read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"Can't read {str(path)!a}: its name has a zero byte.") from error
    if len(content) > MAX_PEM_BYTES:
        raise ConfigError(f"{path} has more than {MAX_PEM_BYTES} bytes; is it the right file?")
    return content


# --- bytes ---------------------------------------------------------------------------------------


def read_certificate(der: bytes) -> Certificate:
    """Return what stands in a certificate.

    Raises:
        ValueError: these bytes are none.
    """
    fields = list(_children(_first_child(_only(der, _SEQUENCE), _SEQUENCE)))
    if fields and fields[0][0] == _VERSION:
        del fields[0]
    # Serial number, algorithm, issuer, validity, subject, key; extensions are optional.
    if len(fields) < 6 or fields[3][0] != _SEQUENCE:
        raise ValueError("no certificate")
    begins_s, ends_s = (_time_s(tag, value) for tag, value in _children(fields[3][1]))
    names = [name for tag, value in fields[6:] if tag == _EXTENSIONS for name in _names(value)]
    return Certificate(begins_s, ends_s, tuple(names))


def _names(extensions: bytes) -> Iterator[str]:
    """Yield the names of hosts among the alternative names of the subject."""
    for _, extension in _children(_only(extensions, _SEQUENCE)):
        parts = list(_children(extension))
        if not parts or parts[0] != (_OID, _SUBJECT_ALT_NAME):
            continue
        for tag, value in _children(_only(parts[-1][1], _SEQUENCE)):
            if tag == _DNS_NAME:
                yield value.decode("ascii").lower().removesuffix(".")


def _time_s(tag: int, value: bytes) -> float:
    form = {_UTC_TIME: "%y%m%d%H%M%SZ", _GENERALIZED_TIME: "%Y%m%d%H%M%SZ"}.get(tag)
    if form is None:
        raise ValueError("no time")
    moment = datetime.strptime(value.decode("ascii"), form).replace(tzinfo=UTC)
    return moment.timestamp()


def _only(data: bytes, tag: int) -> bytes:
    found = list(_children(data))
    if len(found) != 1 or found[0][0] != tag:
        raise ValueError("no certificate")
    return found[0][1]


def _first_child(data: bytes, tag: int) -> bytes:
    found = next(_children(data), None)
    if found is None or found[0] != tag:
        raise ValueError("no certificate")
    return found[1]


def _children(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the tag and the content of each element of ``data`` (X.690 §8.1)."""
    at = 0
    while at < len(data):
        if at + 2 > len(data):
            raise ValueError("cut short")
        tag, size = data[at], data[at + 1]
        at += 2
        if size & 0x80:
            count = size & 0x7F
            if not 1 <= count <= 4:
                raise ValueError("no length of DER")
            size = int.from_bytes(data[at : at + count], "big")
            at += count
        if at + size > len(data):
            raise ValueError("cut short")
        yield tag, data[at : at + size]
        at += size
