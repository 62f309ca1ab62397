"""A token is taken if its issuer signed it for this daemon, and for every other reason refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from clevrd.errors import Forbidden, Unauthorized
from clevrd.tenants.settings import JwtIssuer
from clevrd.tenants.signing_keys import SecretKey, read_key_set
from clevrd.tenants.tenant import Limits, TokenProof
from clevrd.tenants.tokens import Issuer, Tokens

NOW_S = 1_800_000_000.0
SECRET = "0123456789abcdef0123456789abcdef"  # noqa: S105  # of a test
RSA, OTHER_RSA = (rsa.generate_private_key(65_537, 2_048) for _ in range(2))
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
PEM = RSA.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)


def jwk(algorithm: Any, private: Any, **fields: Any) -> dict[str, Any]:
    return {**json.loads(algorithm.to_jwk(private.public_key())), **fields}


KEYS = read_key_set(
    json.dumps(
        {
            "keys": [
                jwk(RSAAlgorithm, RSA, kid="r1", use="sig"),
                jwk(RSAAlgorithm, OTHER_RSA, kid="enc", use="enc"),
                jwk(ECAlgorithm, EC, kid="e1"),
                jwk(OKPAlgorithm, ED, kid="d1", alg="EdDSA"),
                {"kty": "oct", "kid": "o1", "k": "c2VjcmV0"},
                "no key",
                {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
            ]
        }
    ).encode()
)
OTHER_KEYS = read_key_set(json.dumps({"keys": [jwk(RSAAlgorithm, OTHER_RSA, kid="r1")]}).encode())
ISSUERS = [
    Issuer(
        JwtIssuer(
            issuer="https://id.example",
            audience="clevrd",
            algorithms=("RS256", "ES256", "EdDSA"),
            jwks_file="x",
        ),
        KEYS,
    ),
    Issuer(
        JwtIssuer(
            issuer="https://other.example", audience="clevrd", algorithms=("RS256",), jwks_file="x"
        ),
        OTHER_KEYS,
    ),
    Issuer(
        JwtIssuer(issuer="internal", audience="clevrd", algorithms=("HS256",), secret_file="x"),  # noqa: S106
        SecretKey(SECRET.encode()),
    ),
]
CLAIMS = {
    "iss": "https://id.example",
    "aud": "clevrd",
    "exp": NOW_S + 60,
    "sub": "user-7",
    "tenant": "acme",
    "publish": ["orders.*"],
    "subscribe": ["**"],
}


def make_tokens(now_s: float = NOW_S) -> Tokens:
    return Tokens(ISSUERS, {"acme": Limits(max_topics=5)}, lambda: now_s)


def part(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def signed(
    changes: dict[str, Any] | None = None,
    key: Any = RSA,
    algorithm: str = "RS256",
    **header: Any,
) -> str:
    """Return a token with some claims changed; a claim of None is left out."""
    claims = {k: v for k, v in {**CLAIMS, **(changes or {})}.items() if v is not None}
    return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": "r1", **header})


def raw(header: object, claims: object, key: Any = RSA) -> str:
    """Return a token whose parts are as given, with a right RS256 signature under them."""
    text = f"{part(header)}.{part(claims)}"
    signature = RSAAlgorithm(RSAAlgorithm.SHA256).sign(text.encode(), key)
    return f"{text}.{part(signature)}"


def hmac_with_public_key() -> str:
    """Return the classic: the public key, which everybody has, used as the secret of an HMAC."""
    import hashlib
    import hmac

    text = f"{part({'alg': 'HS256', 'typ': 'JWT', 'kid': 'r1'})}.{part(CLAIMS)}"
    return f"{text}.{part(hmac.new(PEM, text.encode(), hashlib.sha256).digest())}"


@pytest.mark.parametrize(
    "token",
    [
        signed(),
        signed(algorithm="ES256", key=EC, kid="e1"),
        signed(algorithm="EdDSA", key=ED, kid="d1"),
        signed({"iss": "internal"}, key=SECRET, algorithm="HS256"),
        signed({"iss": "https://other.example"}, key=OTHER_RSA),
        signed({"aud": ["someone", "clevrd"]}),
        signed({"nbf": NOW_S + 9, "iat": NOW_S + 9}),
        signed({"exp": NOW_S - 9}),
        signed(typ="at+jwt"),
        signed(jku="https://evil.example/jwks", x5u="https://evil.example/x", jwk={"kty": "RSA"}),
    ],
)
def test_token_that_is_right_is_its_tenant(token: str) -> None:
    """Whatever else stands in it is ignored, URLs and keys above all."""
    tenant = make_tokens().verify(token)

    assert (tenant.name, tenant.credential_id, tenant.is_admin) == ("acme", "user-7", False)
    assert tenant.limits.max_topics == 5
    tenant.check_publish("orders.eu")
    tenant.check_subscribe("any")
    with pytest.raises(Forbidden):
        tenant.check_publish("other")


def test_claims_that_are_missing_allow_nothing() -> None:
    """A token of the issuer for something else opens no topic."""
    tenant = make_tokens().verify(signed({"publish": None, "subscribe": None, "sub": None}))

    with pytest.raises(Forbidden, match="lacks the permission to publish"):
        tenant.check_publish("orders.eu")
    with pytest.raises(Forbidden, match="lacks the permission to subscribe"):
        tenant.check_subscribe("orders.eu")


UNSIGNED = part(CLAIMS)
VECTORS: dict[str, tuple[str, str]] = {
    **{
        f"alg {name}": (f"{part({'alg': name, 'kid': 'r1'})}.{UNSIGNED}.", "algorithm")
        for name in ("none", "None", "NONE", "nOnE", " none", "HS256 ", "RS", "rs256", "HS512")
    },
    "no alg": (f"{part({'kid': 'r1'})}.{UNSIGNED}.", "names no algorithm"),
    "alg is a list": (f"{part({'alg': ['RS256'], 'kid': 'r1'})}.{UNSIGNED}.", "no algorithm"),
    "alg is null": (f"{part({'alg': None})}.{UNSIGNED}.", "no algorithm"),
    "none with a signature": (f"{part({'alg': 'none'})}.{UNSIGNED}.{part(b'x')}", "algorithm"),
    "public key as a secret": (hmac_with_public_key(), "algorithm"),
    "symmetric for a public issuer": (signed(key=SECRET, algorithm="HS256"), "algorithm"),
    "public for a symmetric issuer": (signed({"iss": "internal"}), "algorithm"),
    "empty secret": (
        f"{part({'alg': 'HS256'})}.{part({**CLAIMS, 'iss': 'internal'})}.{part(b'')}",
        "signature",
    ),
    "another secret": (
        signed({"iss": "internal"}, key=SECRET[::-1], algorithm="HS256"),
        "signature",
    ),
    "algorithm not listed": (signed(algorithm="RS512"), "algorithm"),
    "another key": (signed(key=OTHER_RSA), "signature"),
    "the same kid of another issuer": (
        signed({"iss": "https://other.example"}, key=RSA),
        "signature",
    ),
    "unknown kid": (signed(kid="nobody"), "a key that its issuer does not have"),
    "kid of a key for encryption": (signed(key=OTHER_RSA, kid="enc"), "does not have"),
    "kid of a secret in the set": (signed(kid="o1"), "does not have"),
    "kid of a broken key": (signed(kid="broken"), "does not have"),
    "kid of a key of another kind": (signed(kid="e1"), "does not have"),
    "kid as a path": (signed(kid="../../etc/passwd"), "does not have"),
    "kid as a URL": (signed(kid="https://evil.example/k"), "does not have"),
    "kid as a query": (signed(kid="' OR 1=1 --"), "does not have"),
    "kid is long": (signed(kid="k" * 257), "key id"),
    "kid is a number": (raw({"alg": "RS256", "kid": 1}, CLAIMS), "no JSON Web Token"),
    "key in the header": (
        signed(key=OTHER_RSA, kid="x", jwk=jwk(RSAAlgorithm, OTHER_RSA)),
        "does not have",
    ),
    "critical extension": (
        raw({"alg": "RS256", "kid": "r1", "crit": ["x"], "x": 1}, CLAIMS),
        "",
    ),
    "critical is empty": (raw({"alg": "RS256", "kid": "r1", "crit": []}, CLAIMS), ""),
    "payload apart": (raw({"alg": "RS256", "kid": "r1", "b64": False}, CLAIMS), ""),
    "expired": (signed({"exp": NOW_S - 10}), "has expired"),
    "expired long ago": (signed({"exp": 1}), "has expired"),
    "no exp": (signed({"exp": None}), "no claim exp"),
    "exp is a text": (raw({"alg": "RS256", "kid": "r1"}, {**CLAIMS, "exp": "9999999999"}), "exp"),
    "exp is true": (raw({"alg": "RS256", "kid": "r1"}, {**CLAIMS, "exp": True}), "exp"),
    "exp is huge": (raw({"alg": "RS256", "kid": "r1"}, {**CLAIMS, "exp": 10**400}), "exp"),
    "exp is a list": (raw({"alg": "RS256", "kid": "r1"}, {**CLAIMS, "exp": [1]}), "exp"),
    "early": (signed({"nbf": NOW_S + 11}), "not valid yet"),
    "nbf is a text": (raw({"alg": "RS256", "kid": "r1"}, {**CLAIMS, "nbf": "x"}), "nbf"),
    "issued in the future": (signed({"iat": NOW_S + 11}), "issued in the future"),
    "iat is a map": (raw({"alg": "RS256", "kid": "r1"}, {**CLAIMS, "iat": {}}), "iat"),
    "another audience": (signed({"aud": "someone"}), "another audience"),
    "audiences without this": (signed({"aud": ["someone", "clevrd2"]}), "another audience"),
    "no audience": (signed({"aud": None}), "another audience"),
    "audience is a number": (signed({"aud": 5}), "another audience"),
    "another issuer": (signed({"iss": "https://id.example.evil"}), "no issuer"),
    "issuer with a slash": (signed({"iss": "https://id.example/"}), "no issuer"),
    "no issuer": (signed({"iss": None}), "no issuer"),
    "issuer is a list": (raw({"alg": "RS256", "kid": "r1"}, {**CLAIMS, "iss": ["x"]}), "no issuer"),
    "no tenant": (signed({"tenant": None}), "no claim tenant"),
    "tenant is a number": (signed({"tenant": 5}), "no name of a tenant"),
    "tenant is not configured": (signed({"tenant": "nobody"}), "tenant is not configured"),
    "tenant is a path": (signed({"tenant": "../acme"}), "no name of a tenant"),
    "tenant with a zero byte": (signed({"tenant": "acme\0"}), "no name of a tenant"),
    "tenant that looks like another": (signed({"tenant": "\u0430cme"}), "no name of a tenant"),
    "publish is a text": (signed({"publish": "**"}), "claim publish"),
    "publish has a number": (signed({"publish": ["a", 1]}), "claim publish"),
    "publish is no pattern": (signed({"publish": ["a*"]}), "claim publish"),
    "subscribe is very long": (signed({"subscribe": ["a"] * 101}), "claim subscribe"),
    "subject is a number": (signed({"sub": 5}), "signature or form"),
    "two parts": (".".join(signed().split(".")[:2]), "no JSON Web Token"),
    "four parts": (signed() + ".x", "no JSON Web Token"),
    "no parts": ("..", "no JSON Web Token"),
    "header is no JSON": (f"{part(b'{')}.{UNSIGNED}.x", "no JSON Web Token"),
    "header is a list": (f"{part([])}.{UNSIGNED}.x", "no JSON Web Token"),
    "header is nested deeply": (f"{part(b'[' * 3000)}.{UNSIGNED}.x", "no JSON Web Token"),
    "claims are no map": (raw({"alg": "RS256", "kid": "r1"}, [1]), "no JSON Web Token"),
    "claims are no JSON": (raw({"alg": "RS256", "kid": "r1"}, b"\xff"), "no JSON Web Token"),
    "signature cut": (signed()[:-10], ""),
    "signature of other claims": (
        ".".join([signed().split(".")[0], part({**CLAIMS, "tenant": "x"}), signed().split(".")[2]]),
        "signature",
    ),
    "junk": ("a.b.c", "no JSON Web Token"),
}


@pytest.mark.parametrize(("token", "why"), VECTORS.values(), ids=VECTORS.keys())
def test_token_that_is_wrong_is_refused(token: str, why: str) -> None:
    """With a sentence of its own, and no part of the token in it."""
    with pytest.raises(Unauthorized) as caught:
        make_tokens().verify(token)

    assert str(caught.value).startswith("The token is not valid: ")
    assert why in str(caught.value)
    assert not any(piece in str(caught.value) for piece in token.split(".") if len(piece) > 8)
    assert ("WWW-Authenticate", 'Bearer realm="clevrd", error="invalid_token"') in (
        caught.value.headers()
    )


def test_there_are_enough_vectors() -> None:
    """Fifty kinds of attack, at least."""
    assert len(VECTORS) >= 50


def test_token_that_was_verified_is_not_verified_again_and_still_expires() -> None:
    """A signature costs 60 us; what was found out is kept until the token ends."""
    now = [NOW_S]
    tokens = Tokens(ISSUERS, {"acme": Limits()}, lambda: now[0])
    token = signed()

    first = tokens.verify(token)
    assert tokens.verify(token) is first

    now[0] = NOW_S + 70
    with pytest.raises(Unauthorized, match="has expired"):
        tokens.verify(token)


def test_tokens_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token for each user is kept for some users."""
    monkeypatch.setattr("clevrd.tenants.tokens.MAX_REMEMBERED", 5)
    tokens = make_tokens()

    for number in range(20):
        tokens.verify(signed({"iss": "internal", "jti": str(number)}, SECRET, "HS256"))

    assert len(tokens._remembered) == 5


@given(st.text(max_size=80) | st.tuples(st.binary(), st.binary(), st.binary()))
def test_whatever_is_presented_is_refused(token: str | tuple[bytes, bytes, bytes]) -> None:
    """Never another exception."""
    text = token if isinstance(token, str) else ".".join(map(part, token))
    with pytest.raises(Unauthorized):
        make_tokens().verify(text)


def test_tenant_need_not_be_configured_where_the_issuer_may_name_any() -> None:
    """A provider of thousands of tenants is not copied into the file."""
    settings = msgspec.structs.replace(ISSUERS[0].settings, any_tenant=True)
    tokens = Tokens([Issuer(settings, KEYS)], {}, lambda: NOW_S)

    assert tokens.verify(signed({"tenant": "anybody"})).name == "anybody"


class ChangingKeys:
    """An issuer's keys, which a test withdraws."""

    def __init__(self) -> None:
        self.now = KEYS

    def find(self, key_id: str | None, algorithm: str) -> Any:
        return self.now.find(key_id, algorithm)


def test_withdrawn_key_ends_tokens_that_were_verified_before() -> None:
    """A token that is remembered is not better than one that comes for the first time."""
    keys = ChangingKeys()
    tokens = Tokens([Issuer(ISSUERS[0].settings, keys)], {"acme": Limits()}, lambda: NOW_S)
    tenant = tokens.verify(signed())
    assert isinstance(tenant.proof, TokenProof)
    assert tokens.vouches_for("acme", tenant.proof)

    keys.now = read_key_set(b'{"keys": [{"kty": "oct", "kid": "z", "k": "c2VjcmV0"}]}')

    assert not tokens.vouches_for("acme", tenant.proof)
    with pytest.raises(Unauthorized, match="a key that its issuer does not have"):
        tokens.verify(signed())


@pytest.mark.parametrize("case", ["other key", "tenant removed", "any tenant no more"])
def test_token_is_vouched_for_as_it_would_be_taken(case: str) -> None:
    """Neither for another key of the same id, nor for a tenant that is configured no more."""
    keys, settings = ChangingKeys(), ISSUERS[0].settings
    wide = msgspec.structs.replace(settings, any_tenant=True)
    limits = {} if case == "any tenant no more" else {"acme": Limits()}
    before = wide if case == "any tenant no more" else settings
    tenant = Tokens([Issuer(before, keys)], limits, lambda: NOW_S).verify(signed())
    assert isinstance(tenant.proof, TokenProof)

    if case == "other key":
        keys.now = OTHER_KEYS
    left = {"acme": Limits()} if case == "other key" else {}
    after = Tokens([Issuer(settings, keys)], left, lambda: NOW_S)

    assert not after.vouches_for("acme", tenant.proof)


def test_secret_that_was_replaced_vouches_for_nothing() -> None:
    """Whoever had the old one may have made the token."""
    old, new = (
        Tokens([Issuer(ISSUERS[2].settings, SecretKey(secret))], {"acme": Limits()}, lambda: NOW_S)
        for secret in (SECRET.encode(), SECRET[::-1].encode())
    )
    tenant = old.verify(signed({"iss": "internal"}, SECRET, "HS256"))
    assert isinstance(tenant.proof, TokenProof)

    assert old.vouches_for("acme", tenant.proof)
    assert not new.vouches_for("acme", tenant.proof)
    assert SECRET not in repr(tenant)
