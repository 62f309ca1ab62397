"""A key is known by the digest of its secret, and by nothing that is near it."""

from __future__ import annotations

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from clevrd.tenants.keys import MAX_KEY_BYTES, KeyRing, digest_of, new_key


def test_new_keys_are_random_and_need_no_quotes() -> None:
    """Neither in a shell, a header, a URL nor a TOML file."""
    keys = [new_key() for _ in range(100)]

    assert len({key.secret for key in keys}) == 100
    for secret, digest in keys:
        assert secret.startswith("clevrd_")
        assert len(secret) == 50
        assert secret.replace("-", "_").replace("_", "a").isalnum()
        assert digest == sha256(secret.encode()).hexdigest()


def test_holder_is_found_by_the_whole_secret() -> None:
    """Not by its digest, a part of it or with something added."""
    keys = {f"holder {number}": new_key() for number in range(20)}
    ring = KeyRing({key.sha256: holder for holder, key in keys.items()})

    assert len(ring) == 20
    for holder, (secret, digest) in keys.items():
        assert ring.find(secret) == holder
        for wrong in (digest, secret[:-1], f"{secret} ", f" {secret}", secret.upper(), ""):
            assert ring.find(wrong) is None


def test_digests_that_begin_alike_are_told_apart() -> None:
    """The index is a part of a digest; the whole of it decides."""
    digest = digest_of("right")
    other = digest[:-1] + ("0" if digest[-1] != "0" else "1")

    assert KeyRing({other: "other"}).find("right") is None
    assert KeyRing({other: "other", digest: "right"}).find("right") == "right"


def test_secret_beyond_reason_is_nobodys() -> None:
    """It is not even hashed."""
    secret = "x" * (MAX_KEY_BYTES + 1)

    assert KeyRing({digest_of(secret): "holder"}).find(secret) is None


@given(st.text(st.characters(exclude_categories=()), max_size=50))
def test_whatever_is_presented_is_no_error(secret: str) -> None:
    """Bytes that are no UTF-8 reach here as surrogates."""
    known = new_key()

    assert KeyRing({known.sha256: "holder"}).find(secret) is None
