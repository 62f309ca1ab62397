"""Where traces are sent and how many, from the settings and OpenTelemetry's own variables.

The variables count only where ``otel_endpoint`` switches tracing on. Source: OpenTelemetry
Specification, OTLP Exporter Configuration. OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and the
variables for certificates, compression and timeout are read by OpenTelemetry's libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Final

import msgspec

from clevrd.config import OTEL_FROM_ENVIRONMENT, Config, check_collector
from clevrd.errors import ConfigError

DEFAULT_ENDPOINT: Final = "http://localhost:4318"
# The path below its base URL at which a collector takes spans.
TRACES_PATH: Final = "/v1/traces"
# By convention the port of OTLP over gRPC, which is not spoken here.
GRPC_PORT: Final = 4317

_ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
_TRACES_ENDPOINT: Final = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HEADERS: Final = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
_SPOKEN: Final = "http/protobuf"

_PACKAGES: Final = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


class TracingSettings(msgspec.Struct, frozen=True):
    """Where spans are sent, and the share of publishes that are traced."""

    # The whole URL, without a user, a query or a fragment.
    endpoint: str
    sample_ratio: float


def tracing_of(config: Config, environ: Mapping[str, str]) -> TracingSettings | None:
    """Return how to trace; None where tracing is off.

    Raises:
        ConfigError: the packages are not installed, or a variable that counts is wrong.
    """
    given = config.otel_endpoint
    if not given:
        return None
    _check_packages()
    for name in _PROTOCOLS:
        if (protocol := environ.get(name, _SPOKEN)) not in (_SPOKEN, ""):
            raise ConfigError(
                f"{name} (environment) is {protocol[:40]!a}; clevrd speaks {_SPOKEN}: unset it, and"
                " give otel_endpoint the collector's port for that, 4318 as a rule."
            )
    for name in _HEADERS:
        _check_headers(name, environ.get(name, ""))
    endpoint = _from_environment(environ) if given == OTEL_FROM_ENVIRONMENT else _whole(given)
    return TracingSettings(endpoint, config.otel_sample_ratio)


def _check_packages() -> None:
    if not all(map(_is_installed, _PACKAGES)):
        raise ConfigError(
            "The setting otel_endpoint needs the Python packages opentelemetry-sdk and"
            " opentelemetry-exporter-otlp-proto-http, which are not installed; install them:"
            ' pip install "clevrd[otel]".'
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        # A package above it is missing.
        return False


def _check_headers(name: str, text: str) -> None:
    """Raise ConfigError where ``text`` is not ``name=value`` pairs; no value is shown."""
    for entry in filter(str.strip, text.split(",")):
        if not entry.partition("=")[0].strip() or "=" not in entry:
            raise ConfigError(
                f"{name} (environment) is not allowed: write name=value, with commas between"
                " several, and %2C for a comma within a value."
            )


def _from_environment(environ: Mapping[str, str]) -> str:
    """Return what the standard variables name; the one for traces alone is a whole URL."""
    name = _TRACES_ENDPOINT if environ.get(_TRACES_ENDPOINT) else _ENDPOINT
    url = environ.get(name) or DEFAULT_ENDPOINT
    try:
        check_collector(url)
    except ConfigError as error:
        raise ConfigError(f"{name} (environment) is not allowed: {error}") from error
    return url if name == _TRACES_ENDPOINT else _whole(url)


def _whole(url: str) -> str:
    """Return the URL that spans are posted to, below the base URL of a collector or it itself."""
    plain = url.rstrip("/")
    return plain if plain.endswith(TRACES_PATH) else plain + TRACES_PATH
