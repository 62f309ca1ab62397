"""clevrd token new: makes a JSON Web Token, for tries and for clients without an identity provider.

Sources: RFC 7519 (claims), RFC 7518 §3 (algorithms). PyJWT signs; it is an extra.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, Final

from clevrd.cli.failures import UsageError
from clevrd.cli.lines import print_line
from clevrd.cli.permissions import PERMISSIONS, add_permissions, check_permissions
from clevrd.cli.values import duration_s
from clevrd.errors import ConfigError
from clevrd.private_files import check_private
from clevrd.tenants.from_settings import check_jwt_is_installed
from clevrd.tenants.tenant import check_tenant_name

_LIFETIME_S: Final = 3600.0
# NIST SP 800-131A: a shorter modulus is not taken for signatures.
_MIN_RSA_BITS: Final = 2_048
# RFC 7518 §3.4 and §3.1: the algorithm for each curve.
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: the key that signs, and the claims."""
    keys = parser.add_mutually_exclusive_group(required=True)
    keys.add_argument(
        "--secret-file", metavar="FILE", help="the secret that the issuer's secret_file has: HS256"
    )
    keys.add_argument(
        "--private-key",
        metavar="FILE",
        help="a private key as PEM: RS256 with RSA, ES256 with P-256, EdDSA with Ed25519",
    )
    parser.add_argument("--kid", metavar="ID", help="the key's id in the issuer's key set")
    parser.add_argument("--issuer", required=True, metavar="TEXT", help="as in [[auth.jwt]]")
    parser.add_argument("--audience", required=True, metavar="TEXT", help="as in [[auth.jwt]]")
    parser.add_argument("--tenant", required=True, metavar="NAME", help="whose token it is")
    add_permissions(parser)
    parser.add_argument("--sub", metavar="NAME", help="what logs and refusals call its bearer")
    parser.add_argument(
        "--lifetime",
        type=duration_s,
        default=_LIFETIME_S,
        metavar="TIME",
        help="how long it is valid, such as 90s, 30m, 12h or 7d (default 1h)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the token, and return the exit code."""
    check_tenant_name(options.tenant)
    check_permissions(options)
    if not any(getattr(options, field) for field in PERMISSIONS):
        raise UsageError("the token would allow nothing; add --publish, --subscribe or --clear")
    check_jwt_is_installed("clevrd token")
    import jwt

    if options.secret_file is not None:
        from clevrd.tenants.signing_keys import read_secret_file

        key, algorithm = read_secret_file(Path(options.secret_file)).find(None, "HS256"), "HS256"
    else:
        key, algorithm = _private_key(Path(options.private_key))
    header = {"kid": options.kid} if options.kid else None
    claims = _claims(options, int(time.time()))
    print_line(jwt.encode(claims, key, algorithm=algorithm, headers=header))
    return 0


def _claims(options: argparse.Namespace, now_s: int) -> dict[str, Any]:
    claims: dict[str, Any] = {
        "iss": options.issuer,
        "aud": options.audience,
        "iat": now_s,
        "exp": now_s + max(1, round(options.lifetime)),
        "tenant": options.tenant,
    }
    if options.sub:
        claims["sub"] = options.sub
    claims |= {name: getattr(options, name) for name in PERMISSIONS}
    return {name: value for name, value in claims.items() if value != []}


def _private_key(path: Path) -> tuple[Any, str]:
    """Return the key in a file, and the algorithm that it signs with.

    Raises:
        ConfigError: it can't be read, others may read it, or it is no key for signatures.
    """
    # The module is here wherever PyJWT's extra is.
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    check_private(path)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(f"Can't read {path}: {error.strerror}.") from error
    except TypeError:
        raise ConfigError(
            f"The key in {path} is encrypted; decrypt it: openssl pkey -in {path} -out PLAIN"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        # The text of the error may hold a part of the file.
        raise ConfigError(f"{path} has no private key as PEM.") from None
    if isinstance(key, rsa.RSAPrivateKey):
        if key.key_size < _MIN_RSA_BITS:
            raise ConfigError(
                f"The RSA key in {path} has {key.key_size} bits; {_MIN_RSA_BITS} at least are"
                " needed."
            )
        return key, "RS256"
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return key, _CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key, "EdDSA"
    raise ConfigError(
        f"The key in {path} is of no kind that is taken: RSA, EC on P-256, P-384 or P-521, Ed25519."
    )
