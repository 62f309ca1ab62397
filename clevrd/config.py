"""Settings: their names, ranges, defaults and sources. No part of the daemon starts here.

One struct holds every setting's name, type, range, default and help; flags, variables, file keys
and error texts are derived from it. Sources, weakest first: the default, the TOML file, the
environment, the command line. Secrets may not be settings, since `clevrd checkconfig` prints them
all.
"""

from __future__ import annotations

import difflib
import operator
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from clevrd.addresses import DEFAULT_ADDRESS, parse_address
from clevrd.errors import ConfigError
from clevrd.small_files import read_small

KIB: Final = 1024
MIB: Final = 1024 * KIB
# Difference between 1 MiB, which several clients take at most, and the default of
# max_message_bytes. It leaves room for the text around a publisher's data: 183 bytes in a message,
# and at most 6,000 more for the id of an event.
ENVELOPE_BYTES: Final = 8 * KIB
HOUR_S: Final = 3600.0

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
# The meaning of the two: control/adaptive_throttler.
ThrottleScope = Literal["topic", "global"]


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting's effective value.

    `load` checks the ranges, not this struct, so that tests can build small rings and short timers.
    """

    address: Annotated[
        str,
        Meta(
            description="Where to listen; without a host, on all interfaces.",
            examples=[":9000", "127.0.0.1:9000", "[::]:9000", "unix:/run/clevrd.sock"],
        ),
    ] = DEFAULT_ADDRESS
    tls_cert_file: Annotated[
        str,
        Meta(
            description="Certificate with its chain, PEM, for https:// and wss://; empty for http.",
            examples=["/etc/clevrd/cert.pem"],
        ),
    ] = ""
    tls_key_file: Annotated[
        str,
        Meta(
            description="Private key of the certificate, PEM, which others may not read.",
            examples=["/etc/clevrd/key.pem"],
        ),
    ] = ""
    admin_address: Annotated[
        str,
        Meta(
            description="Where to listen for operators: figures of all tenants without a"
            " credential; empty for nowhere.",
            examples=["127.0.0.1:9001", "unix:/run/clevrd-admin.sock"],
        ),
    ] = ""
    max_memory_mb: Annotated[
        int,
        Meta(
            ge=64,
            le=1_048_576,
            description="Memory in MiB that the daemon may use; the rings get three fifths of it.",
        ),
    ] = 2048
    max_message_bytes: Annotated[
        int,
        Meta(ge=1 * KIB, le=64 * MIB, description="Largest publish request body accepted."),
    ] = 1 * MIB - ENVELOPE_BYTES
    max_batch_bytes: Annotated[
        int,
        Meta(ge=1 * KIB, le=1024 * MIB, description="Largest batch body accepted."),
    ] = 8 * MIB
    publish_rate: Annotated[
        float,
        Meta(
            ge=0,
            le=10_000_000,
            description="Messages per second that each tenant may publish; 0 is unlimited.",
        ),
    ] = 0.0
    publish_burst: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000_000,
            description="Messages a tenant may publish at once; 0 is one second's publish_rate.",
        ),
    ] = 0
    idempotency_s: Annotated[
        float,
        Meta(
            ge=0,
            le=24 * HOUR_S,
            description="Seconds for which a publish with the same idempotency key is a repeat;"
            " 0 is never.",
        ),
    ] = 300.0
    max_idempotency_keys: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="Idempotency keys remembered at one time, over all tenants.",
        ),
    ] = 100_000
    ring_messages: Annotated[
        int,
        Meta(ge=100, le=1_000_000, description="Recent messages kept per topic, at most."),
    ] = 10_000
    ring_bytes: Annotated[
        int,
        Meta(
            ge=1 * MIB,
            le=1024 * 1024 * MIB,
            description="Bytes of recent messages kept per topic, at most.",
        ),
    ] = 64 * MIB
    catch_up_messages: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="Recent messages a new subscriber gets first, unless it asks otherwise.",
        ),
    ] = 50
    circuit_breaker_threshold: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000_000,
            description="Drops in one stall that open the circuit of a circuit_breaker subscriber.",
        ),
    ] = 100
    circuit_breaker_openings: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000,
            description=(
                "Times a circuit may open within circuit_breaker_period_s; the next disconnects."
            ),
        ),
    ] = 3
    circuit_breaker_period_s: Annotated[
        float,
        Meta(
            ge=0.1,
            le=24 * HOUR_S,
            description="Seconds after which an opening of a circuit counts no more.",
        ),
    ] = 60.0
    circuit_breaker_open_s: Annotated[
        float,
        Meta(
            ge=0.1,
            le=HOUR_S,
            description="Seconds that a circuit may stay open before it disconnects.",
        ),
    ] = 30.0
    max_topics: Annotated[
        int, Meta(ge=1, le=10_000_000, description="Topics at one time, over all tenants.")
    ] = 100_000
    max_topics_per_tenant: Annotated[
        int, Meta(ge=1, le=10_000_000, description="Topics at one time for each tenant.")
    ] = 10_000
    max_topics_per_connection: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Topics that one connection may subscribe to, patterns included.",
        ),
    ] = 1_000
    match_all_patterns: Annotated[
        bool,
        Meta(description="Allow patterns whose first word is a star, which can match everything."),
    ] = False
    topic_idle_s: Annotated[
        float,
        Meta(
            ge=0.1,
            le=365 * 24 * HOUR_S,
            description="Seconds without readers or publishes after which a topic is forgotten.",
        ),
    ] = HOUR_S
    allowed_origins: Annotated[
        str,
        Meta(
            description="Web pages of other origins that may use the daemon, between commas.",
            examples=["https://app.example", "https://*.example.com", "*"],
        ),
    ] = ""
    max_connections: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000_000,
            description="Connections at one time; 0 is what the descriptor limit allows.",
        ),
    ] = 0
    max_connections_per_address: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000_000,
            description="Connections of one client address, or of one /64 of IPv6, except from this"
            " machine; 0 is any number.",
        ),
    ] = 10_000
    proxy_protocol: Annotated[
        bool,
        Meta(
            description="Expect a PROXY protocol header (v1 or v2) from each proxy that is listed"
            " in trusted_proxies."
        ),
    ] = False
    send_buffer_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=1024 * MIB,
            description="Kernel send buffer of a connection (SO_SNDBUF); 0 is the kernel's own.",
        ),
    ] = 128 * KIB
    write_high_bytes: Annotated[
        int,
        Meta(
            ge=1,
            le=1024 * MIB,
            description="Unsent bytes of a connection at which its subscriber is paused.",
        ),
    ] = 64 * KIB
    write_low_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=1024 * MIB,
            description="Unsent bytes at which a paused subscriber goes on.",
        ),
    ] = 16 * KIB
    ping_interval_s: Annotated[
        float,
        Meta(
            ge=0.1,
            le=HOUR_S,
            description="Seconds between pings to a subscriber; many proxies cut at 60.",
        ),
    ] = 25.0
    pong_timeout_s: Annotated[
        float,
        Meta(
            ge=0.1,
            le=HOUR_S,
            description="Seconds to answer a ping, where nothing that is sent is taken.",
        ),
    ] = 10.0
    request_timeout_s: Annotated[
        float,
        Meta(
            ge=0.1,
            le=HOUR_S,
            description="Seconds that a request has to arrive whole; more for a steady body.",
        ),
    ] = 10.0
    keepalive_timeout_s: Annotated[
        float,
        Meta(
            ge=0.1,
            le=24 * HOUR_S,
            description="Seconds that an idle connection stays open between requests.",
        ),
    ] = 75.0
    shutdown_timeout_s: Annotated[
        float,
        Meta(
            ge=0,
            le=HOUR_S,
            description="Seconds that requests and subscribers get to finish at shutdown.",
        ),
    ] = 30.0
    drain_s: Annotated[
        float,
        Meta(
            ge=0,
            le=HOUR_S,
            description="Seconds over which subscribers are sent away at shutdown, at most.",
        ),
    ] = 10.0
    state_dir: Annotated[
        str,
        Meta(
            description="Directory that carries topics over a planned restart; empty for none.",
            examples=["/var/lib/clevrd"],
        ),
    ] = ""
    journal: Annotated[
        str,
        Meta(
            description="Directory of a journal, in which messages outlive the process, or the URL"
            " of a Redis, NATS or Kafka, for one that several nodes share; empty for none.",
            examples=["/var/lib/clevrd/journal", "redis://redis.example:6379"],
        ),
    ] = ""
    throttle_scope: Annotated[
        ThrottleScope,
        Meta(
            description="Whose publishes wait under overload: those to topics whose subscribers"
            " are slow, or all."
        ),
    ] = "topic"
    log_level: Annotated[LogLevel, Meta(description="Least severe event that is logged.")] = "info"
    log_format: Annotated[
        LogFormat,
        Meta(description="Form of the log's lines: for people, or an object of JSON each."),
    ] = "text"
    otel_endpoint: Annotated[
        str,
        Meta(
            description="Where to send traces: the URL of an OpenTelemetry collector (OTLP over"
            " HTTP), or env for what OTEL_EXPORTER_OTLP_ENDPOINT says; empty for no tracing.",
            examples=["http://localhost:4318", "env"],
        ),
    ] = ""
    otel_sample_ratio: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Share of publishes that are traced, where the publisher's own traceparent"
            " does not say.",
        ),
    ] = 0.01
    raw_paths: Annotated[
        bool,
        Meta(description="Answer plain publishes and subscribes below aiohttp, which is faster."),
    ] = True


class Setting(msgspec.Struct, frozen=True):
    """One setting as its sources spell it and as help and errors show it."""

    field: str
    env: str
    # The variable's name with the prefix; it is stronger than ``env``, which may lack the prefix.
    prefixed_env: str
    flag: str
    help: str
    default: Any
    type: type
    allowed: str
    # The type and range that msgspec checks a value against.
    annotation: Any


class Loaded(msgspec.Struct, frozen=True):
    """The effective configuration, the source of each field's value, and warnings."""

    config: Config
    sources: dict[str, str]
    warnings: list[str]
    # The tables of the file by name, not checked yet: their shapes are the business of the modules
    # that give them a meaning (TABLES).
    tables: dict[str, Any] = {}
    # The file's path; empty where there is none. Paths in the tables are relative to its folder.
    path: str = ""


# --- the table -----------------------------------------------------------------------------------

ENV_PREFIX: Final = "CLEVRD_"
# Two variables are older than the prefix and keep their names. The same names with the prefix are
# stronger, since only clevrd can be meant: an image may set ADDRESS for many programs.
UNPREFIXED: Final = {"address": "ADDRESS", "max_memory_mb": "MAX_MEMORY_MB"}
# Variables that are no settings but have a meaning: the file's path, read here, and three that
# the client commands read.
OTHER_VARIABLES: Final = frozenset({"CLEVRD_CONFIG", "CLEVRD_URL", "CLEVRD_TENANT", "CLEVRD_KEY"})
# The value of `otel_endpoint` that leaves the URL to OpenTelemetry's own variables.
OTEL_FROM_ENVIRONMENT: Final = "env"
# Tables that the file may have besides settings, which no variable and no flag can give: [auth] and
# [[tenants]] are read by `tenants.settings`.
TABLES: Final = frozenset({"auth", "tenants", "tls", "journal", "sources", "webhooks"})


def _allowed(kind: type, base: Any, meta: Meta) -> str:
    if get_origin(base) is Literal:
        return "one of " + ", ".join(get_args(base))
    if kind is bool:
        return "true or false"
    if kind is str:
        return "like " + " or ".join(meta.examples or [])
    noun = "a whole number" if kind is int else "a number"
    return f"{noun} from {meta.ge:.15g} to {meta.le:.15g}"


def _setting(field: str, default: Any, annotation: Any) -> Setting:
    base, meta = get_args(annotation)
    kind = str if get_origin(base) is Literal else base
    return Setting(
        field=field,
        env=UNPREFIXED.get(field, ENV_PREFIX + field.upper()),
        prefixed_env=ENV_PREFIX + field.upper(),
        flag="--" + field.replace("_", "-"),
        help=meta.description,
        default=default,
        type=kind,
        allowed=_allowed(kind, base, meta),
        annotation=annotation,
    )


def _table() -> tuple[Setting, ...]:
    hints = get_type_hints(Config, include_extras=True)
    return tuple(
        _setting(field.name, field.default, hints[field.name])
        for field in msgspec.structs.fields(Config)
    )


SETTINGS: Final[tuple[Setting, ...]] = _table()
BY_FIELD: Final[Mapping[str, Setting]] = {setting.field: setting for setting in SETTINGS}


# --- one value -----------------------------------------------------------------------------------

# Decimal numbers as in TOML, 1_000_000 included, so that a value can be copied from the file to a
# variable. No leading zero, which would mean octal elsewhere; no nan and no inf.
_INT = re.compile(r"-?(?:0|[1-9](?:_?[0-9])*)", re.ASCII)
_FLOAT = re.compile(rf"{_INT.pattern}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?", re.ASCII)
_BOOLS: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _parse_int(text: str) -> int:
    if not _INT.fullmatch(text):
        raise ValueError
    return int(text)


def _parse_float(text: str) -> float:
    if not _FLOAT.fullmatch(text):
        raise ValueError
    return float(text)


def _parse_bool(text: str) -> bool:
    if text.lower() not in _BOOLS:
        raise ValueError
    return _BOOLS[text.lower()]


_PARSERS: Final[Mapping[type, Callable[[str], object]]] = {
    int: _parse_int,
    float: _parse_float,
    bool: _parse_bool,
    str: str,
}


def _check_state_dir(path: str) -> None:
    if path and (not path.startswith("/") or "\0" in path):
        raise ConfigError("Write an absolute path, or nothing to keep no state.")


def _check_journal(path: str) -> None:
    if "\0" in path:
        raise ConfigError(
            "Write the path of a directory or the URL of servers, or nothing to keep no messages."
        )


def _check_admin_address(text: str) -> None:
    if text:
        parse_address(text)


def _check_otel_endpoint(text: str) -> None:
    if text and text != OTEL_FROM_ENVIRONMENT:
        check_collector(text)


def check_collector(url: str) -> None:
    """Raise ConfigError unless spans can be posted to ``url``, and no secret is in it.

    The URL is in none of the sentences: a password in the wrong place would be shown.
    """
    try:
        parts = urlsplit(url)
        is_port_one = parts.port is None or parts.port > 0
    except ValueError as error:
        raise ConfigError("It is no URL.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_port_one:
        raise ConfigError("Give an http or https URL with a host, or env.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigError(
            "Give it without a user, a query and a fragment; what the collector asks for goes into"
            " the variable OTEL_EXPORTER_OTLP_HEADERS."
        )


# Checks of text settings beyond their type; each raises ConfigError.
_CHECKS: Final[Mapping[str, Callable[[str], object]]] = {
    "address": parse_address,
    "admin_address": _check_admin_address,
    "journal": _check_journal,
    "otel_endpoint": _check_otel_endpoint,
    "state_dir": _check_state_dir,
}


class _Given(msgspec.Struct, frozen=True):
    """A value as its source gives it: text from flags and variables, any TOML type from a file."""

    raw: object
    source: str


class _GivenText(_Given, frozen=True):
    raw: str


def _typed(setting: Setting, given: _Given) -> Any:
    """Return the value in the setting's type and range; raise ValueError for any other."""
    parse = _PARSERS[setting.type]
    value = parse(given.raw) if isinstance(given, _GivenText) else given.raw
    # Strict conversion takes a whole number for a fraction, and no other type for another. A nan or
    # inf in a file lies outside every range.
    return msgspec.convert(value, setting.annotation, strict=True)


# The parts of a URL that may be secret: the user with the password, and the query.
_SECRET_IN_URL: Final = re.compile(r"(?<=://)[^/?#]*(?=@)|(?<=\?).+")


def _shown(raw: object) -> str:
    """Return a value for an error text: escaped, so that it stays on its line, and cut to 80.

    A password in a URL is left out.
    """
    try:
        text = ascii(raw)
    except ValueError:  # an int of over 4,300 digits, which a file can have as 0xfff...
        return "a very long number"
    if "://" in text:
        text = _SECRET_IN_URL.sub("...", text)
    return text if len(text) <= 80 else text[:77] + "..."


def _convert(setting: Setting, given: _Given) -> Any:
    """Return the value, or raise ConfigError with the setting, its source and its range."""
    wrong = (
        f"{setting.field} = {_shown(given.raw)} ({given.source}) is not allowed:"
        f" must be {setting.allowed}."
    )
    try:
        value = _typed(setting, given)
        if check := _CHECKS.get(setting.field):
            check(value)
    except ValueError as error:  # msgspec.ValidationError is a ValueError
        raise ConfigError(wrong) from error
    except ConfigError as error:
        raise ConfigError(f"{wrong} {error}") from error
    return value


# --- all sources ---------------------------------------------------------------------------------

# A file with every setting and its help is under 8 KiB; the bound is for a wrong path, such as
# /dev/zero.
MAX_FILE_BYTES: Final = 1 * MIB
# tomllib's sentence about a table that is there twice, with a tuple of the words of its name.
_TWICE: Final = re.compile(r"Cannot declare \(([^)]*)\) twice(.*)", re.DOTALL)


def load(
    argv_overrides: Mapping[str, str], environ: Mapping[str, str], toml_path: str | None
) -> Loaded:
    """Return the effective settings: defaults < TOML file < environment < command line.

    Args:
        argv_overrides: field name -> text of the flag, only for flags that were given.
        environ: all variables. An empty one counts as not set, since compose and unit files often
            pass on empty ones.
        toml_path: the TOML file; None for the one in CLEVRD_CONFIG, if any.

    Raises:
        ConfigError: a setting is wrong; every wrong setting has a line of its own.
    """
    problems: list[str] = []
    path = toml_path or environ.get("CLEVRD_CONFIG") or None
    document = _read_toml(path) if path is not None else {}
    given = {
        **(_from_file(document, path, problems) if path is not None else {}),
        **_from_environment(environ),
        **_from_flags(argv_overrides),
    }
    values = _convert_all(given, problems)
    sources = {field: given[field].source if field in given else "default" for field in BY_FIELD}
    problems += _conflicts(values, sources)
    if problems:
        raise ConfigError("\n".join(problems))
    tables = {
        key: value for key, value in document.items() if key in TABLES and not _is_plain(key, value)
    }
    return Loaded(Config(**values), sources, list(_unknown_variables(environ)), tables, path or "")


def _convert_all(given: Mapping[str, _Given], problems: list[str]) -> dict[str, Any]:
    """Return every setting's value; a wrong one is left out and adds its line to ``problems``."""
    values = {setting.field: setting.default for setting in SETTINGS if setting.field not in given}
    for field, candidate in given.items():
        try:
            values[field] = _convert(BY_FIELD[field], candidate)
        except ConfigError as error:
            problems.append(str(error))
    return values


def _from_flags(overrides: Mapping[str, str]) -> dict[str, _Given]:
    return {
        field: _GivenText(text, f"flag {BY_FIELD[field].flag}") for field, text in overrides.items()
    }


def _from_environment(environ: Mapping[str, str]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for setting in SETTINGS:
        for name in (setting.prefixed_env, setting.env):
            if text := environ.get(name):
                given[setting.field] = _GivenText(text, f"environment {name}")
                break
    return given


def _from_file(table: Mapping[str, object], path: str, problems: list[str]) -> dict[str, _Given]:
    problems += [
        f"{_shown(key)} (file {path}) is not a setting"
        f"{_suggestion(_nearest(key, (*BY_FIELD, *TABLES)))}"
        for key in table
        if key not in BY_FIELD and key not in TABLES
    ]
    return {
        key: _Given(raw, f"file {path}")
        for key, raw in table.items()
        if key in BY_FIELD and (key not in TABLES or _is_plain(key, raw))
    }


def _is_plain(key: str, raw: object) -> bool:
    """Whether a key of the file that may be a setting or a table is the setting."""
    return key in BY_FIELD and not isinstance(raw, dict | list)


def _read_toml(path: str) -> dict[str, object]:
    try:
        return tomllib.loads(_read_bounded(path).decode())
    except OSError as error:
        raise ConfigError(f"Can't read the configuration file {path}: {error.strerror}.") from error
    except RecursionError as error:
        raise ConfigError(f"The configuration file {path} is nested too deeply.") from error
    except ValueError as error:  # not TOML, not UTF-8, or a path with a NUL
        raise ConfigError(
            f"The configuration file {path} is not TOML: {_toml_mistake(error)}."
        ) from error


def _toml_mistake(error: ValueError) -> str:
    """Return the parser's sentence; about a table that is there twice, one of clevrd's own."""
    if not (found := _TWICE.match(str(error))):
        return str(error)
    table = ".".join(re.findall(r"'([^']*)'", found[1]))
    return f"the table [{table}] is there twice; write it once, with the lines of both{found[2]}"


def _read_bounded(path: str) -> bytes:
    content = read_small(path, MAX_FILE_BYTES)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"The configuration file {path} is over {MAX_FILE_BYTES} bytes.")
    return content


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each variable with the prefix that is no setting.

    Kubernetes sets CLEVRD_SERVICE_HOST and others for a service of this name, so they are no
    errors.

    Values are not shown, since an unknown variable may hold a secret.
    """
    fields = {setting.prefixed_env for setting in SETTINGS}
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in OTHER_VARIABLES and name not in fields:
            nearest = _nearest(name, BY_FIELD)
            hint = _suggestion(nearest and BY_FIELD[nearest].prefixed_env)
            yield f"{_shown(name)} (environment) is not a setting and is ignored{hint}"


def _nearest(name: str, fields: Iterable[str]) -> str | None:
    """Return the field that a misspelt key or variable most likely means."""
    plain = name.lower().replace("-", "_").removeprefix(ENV_PREFIX.lower())
    # 0.75: one or two wrong letters match, SERVICE_HOST matches nothing.
    close = difflib.get_close_matches(plain, fields, n=1, cutoff=0.75)
    return close[0] if close else None


def _suggestion(name: str | None) -> str:
    return f"; did you mean {name}?" if name else "."


# --- settings that must fit each other -----------------------------------------------------------


class _Rule(msgspec.Struct, frozen=True):
    """A condition between two settings; ``must`` names it in an error sentence."""

    field: str
    other: str
    fits: Callable[[Any, Any], bool]
    must: str


_RULES: Final = (
    _Rule("catch_up_messages", "ring_messages", operator.le, "be at most ring_messages"),
    # The ping wheel turns once an interval, and an answer has to come before the next ping.
    _Rule("pong_timeout_s", "ping_interval_s", operator.lt, "be less than ping_interval_s"),
    _Rule("write_low_bytes", "write_high_bytes", operator.lt, "be less than write_high_bytes"),
    # Publishers wait when a quarter of the ring is pending. A larger message could push others out
    # of the ring before they were offered to any reader.
    _Rule(
        "max_message_bytes",
        "ring_bytes",
        lambda message, ring: message * 4 <= ring,
        "be at most a quarter of ring_bytes",
    ),
    _Rule(
        "publish_burst",
        "publish_rate",
        lambda burst, rate: burst == 0 or rate > 0,
        "be 0 unless publish_rate is more than 0",
    ),
)


def _conflicts(values: Mapping[str, Any], sources: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each broken rule between two settings that are right in themselves."""
    for rule in _RULES:
        field, other = rule.field, rule.other
        if not {field, other} <= values.keys() or rule.fits(values[field], values[other]):
            continue
        yield (
            f"{field} = {values[field]} ({sources[field]}) is not allowed: must {rule.must},"
            f" which is {values[other]} ({sources[other]})."
        )
