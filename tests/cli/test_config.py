"""Settings come from four sources, the strongest wins, and what is wrong is said once and well."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.addresses import TcpAddress, UnixAddress, parse_address
from clevrd.config import (
    MAX_FILE_BYTES,
    SETTINGS,
    Config,
    Loaded,
    Setting,
    load,
)
from clevrd.errors import ConfigError

NUMBERS = [setting for setting in SETTINGS if setting.type in (int, float)]
BY_FIELD = {setting.field: setting for setting in SETTINGS}


def write_toml(folder: Path, text: str) -> str:
    """Write ``text`` as a configuration file and return its path."""
    path = folder / "clevrd.toml"
    path.write_text(text)
    return str(path)


def problems(
    flags: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    path: str | None = None,
) -> list[str]:
    """Return the lines of the error that loading these ends with, none if it succeeds."""
    try:
        load(flags or {}, environ or {}, path)
    except ConfigError as error:
        return str(error).split("\n")
    return []


def from_flag(field: str, text: str) -> Any:
    """Return the value of one setting given as a flag."""
    return getattr(load({field: text}, {}, None).config, field)


# --- the table ---


def test_defaults_alone_are_a_whole_configuration() -> None:
    """Nothing has to be set: every default is in its range, and says it is a default."""
    loaded = load({}, {}, None)

    assert loaded == Loaded(Config(), {setting.field: "default" for setting in SETTINGS}, [])


def test_every_field_is_a_setting_in_order() -> None:
    """The table that flags and variables are made of leaves no field out."""
    assert tuple(BY_FIELD) == Config.__struct_fields__


def test_published_variables_keep_their_names() -> None:
    """Two settings are known without the prefix; the others are named as their fields."""
    names = {setting.env for setting in SETTINGS}

    assert {"ADDRESS", "MAX_MEMORY_MB", "CLEVRD_RAW_PATHS"} <= names
    assert all(name.startswith("CLEVRD_") for name in names - {"ADDRESS", "MAX_MEMORY_MB"})


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.field)
def test_help_is_one_sentence_that_names_its_unit(setting: Setting) -> None:
    """Help explains each setting, and names that hold a unit are explained in that unit."""
    units = {"_s": "econds", "_bytes": "ytes|buffer|body", "_messages": "essages", "_mb": "MiB"}
    unit = next((u for end, u in units.items() if setting.field.endswith(end)), "")

    assert re.fullmatch(r"[A-Z][^.]*\.", setting.help)
    assert re.search(unit, setting.help)


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.field)
def test_range_ends_are_allowed_and_nothing_beyond(setting: Setting) -> None:
    """Both ends of the range that the error text shows belong to it."""
    meta = get_args(setting.annotation)[1]
    step = 1 if setting.type is int else 0.01

    def is_refused(value: float) -> bool:
        text = f"{value:.15g}" if setting.type is float else str(int(value))
        lines = problems({setting.field: text})
        return any(line.endswith(f"must be {setting.allowed}.") for line in lines)

    assert [is_refused(meta.ge), is_refused(meta.le)] == [False, False]
    assert [is_refused(meta.ge - step), is_refused(meta.le + step)] == [True, True]


# --- sources ---


@pytest.mark.parametrize(
    ("flags", "environ", "toml", "value", "source"),
    [
        ({}, {}, "", 10_000, "default"),
        ({}, {}, "ring_messages = 200", 200, "file {path}"),
        ({}, {"CLEVRD_RING_MESSAGES": "300"}, "", 300, "environment CLEVRD_RING_MESSAGES"),
        (
            {},
            {"CLEVRD_RING_MESSAGES": "300"},
            "ring_messages = 200",
            300,
            "environment CLEVRD_RING_MESSAGES",
        ),
        (
            {"ring_messages": "400"},
            {"CLEVRD_RING_MESSAGES": "300"},
            "ring_messages = 200",
            400,
            "flag --ring-messages",
        ),
    ],
)
def test_stronger_source_wins_and_is_named(
    flags: dict[str, str],
    environ: dict[str, str],
    toml: str,
    value: int,
    source: str,
    tmp_path: Path,
) -> None:
    """Default < file < environment < flag, and checkconfig can say which it was."""
    path = write_toml(tmp_path, toml)

    loaded = load(flags, environ, path)

    assert loaded.config.ring_messages == value
    assert loaded.sources["ring_messages"] == source.format(path=path)


@pytest.mark.parametrize(
    ("field", "plain", "value", "other"),
    [("address", "ADDRESS", ":1", ":2"), ("max_memory_mb", "MAX_MEMORY_MB", 512, 600)],
)
def test_plain_variables_work_with_the_prefix_too(
    field: str, plain: str, value: object, other: object
) -> None:
    """Every setting can be named as the others are; an image may set the plain one for itself."""
    prefixed = f"CLEVRD_{plain}"

    for environ, source in (
        ({plain: str(value)}, plain),
        ({prefixed: str(value)}, prefixed),
        ({prefixed: str(value), plain: str(other)}, prefixed),
        ({prefixed: "", plain: str(value)}, plain),
    ):
        loaded = load({}, environ, None)

        assert getattr(loaded.config, field) == value
        assert loaded.sources[field] == f"environment {source}"
        assert loaded.warnings == []


def test_file_is_found_through_the_environment(tmp_path: Path) -> None:
    """CLEVRD_CONFIG names the file where no --config does."""
    path = write_toml(tmp_path, 'address = "127.0.0.1:9000"')

    loaded = load({}, {"CLEVRD_CONFIG": path}, None)

    assert loaded.config.address == "127.0.0.1:9000"
    assert loaded.warnings == []


def test_file_of_the_flag_wins_over_that_of_the_environment(tmp_path: Path) -> None:
    """The weaker file is not even opened."""
    path = write_toml(tmp_path, "max_topics = 7")

    loaded = load({}, {"CLEVRD_CONFIG": "/does/not/exist"}, path)

    assert loaded.config.max_topics == 7


def test_empty_variable_counts_as_not_set(tmp_path: Path) -> None:
    """Compose files pass on variables that they don't have as empty ones."""
    path = write_toml(tmp_path, "max_topics = 7")

    loaded = load({}, {"CLEVRD_MAX_TOPICS": "", "CLEVRD_CONFIG": "", "ADDRESS": ""}, path)

    assert (loaded.config.max_topics, loaded.config.address) == (7, ":8080")


def test_stronger_source_hides_a_wrong_weaker_one(tmp_path: Path) -> None:
    """What has no effect is no error."""
    path = write_toml(tmp_path, 'max_topics = "many"')

    loaded = load({"max_topics": "7"}, {"CLEVRD_MAX_TOPICS": "lots"}, path)

    assert loaded.config.max_topics == 7


# --- values ---


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("max_memory_mb", "512", 512),
        ("ring_messages", "1_000_000", 1_000_000),
        ("publish_rate", "1000", 1000.0),
        ("publish_rate", "0.5", 0.5),
        ("publish_rate", "1e3", 1000.0),
        ("publish_rate", "10_000.5", 10_000.5),
        ("raw_paths", "true", True),
        ("raw_paths", "1", True),
        ("raw_paths", "YES", True),
        ("raw_paths", "false", False),
        ("raw_paths", "0", False),
        ("raw_paths", "no", False),
        ("log_level", "debug", "debug"),
        ("address", "unix:/run/clevrd.sock", "unix:/run/clevrd.sock"),
    ],
)
def test_text_becomes_a_typed_value(field: str, text: str, value: object) -> None:
    """Flags and variables are read as TOML would write them, booleans also in words."""
    result = from_flag(field, text)

    assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("ring_messages", text)
        for text in (
            *("", " 500", "500 ", "+500", "0500", "5e2", "500.0", "0x1f4", "five", "1__000"),
            *("_500", "500_", "\u0665\u0660\u0660", "500\n", "9" * 5000, "true", "-500"),
        )
    ]
    + [
        ("publish_rate", text)
        for text in (
            *("", "nan", "inf", "-inf", "Infinity", "1e999", "-1", ".5", "5.", "0x1p3", "1 000"),
            *("1,5", "5\n", "\u0665", "1" * 5000, "true"),
        )
    ]
    + [("raw_paths", text) for text in ("", "on", "off", "2", "t", "true ", "\u043d\u0435\u0442")]
    + [("log_level", text) for text in ("", "INFO", "trace", "warn", "info ")]
    + [("address", text) for text in ("", "9000", "::1:9000")],
)
def test_text_that_is_not_exactly_a_value_is_refused(field: str, text: str) -> None:
    """Nothing is guessed, trimmed or rounded; nan and inf are no numbers here."""
    (line,) = problems({field: text})

    assert line.startswith(f"{field} = ")
    assert f"(flag {BY_FIELD[field].flag})" in line
    assert f"must be {BY_FIELD[field].allowed}." in line


@pytest.mark.parametrize(
    ("toml", "value"),
    [
        ("publish_rate = 5", 5.0),
        ("publish_rate = 0.25", 0.25),
        ("ring_bytes = 0x800000", 8 << 20),
        ("raw_paths = false", False),
        ('log_level = "error"', "error"),
    ],
)
def test_file_value_keeps_its_type(toml: str, value: object, tmp_path: Path) -> None:
    """A file's values have types of their own; a whole number will do for a fraction."""
    field = toml.split(" ")[0]

    result = getattr(load({}, {}, write_toml(tmp_path, toml)).config, field)

    assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize(
    "toml",
    [
        'ring_messages = "500"',
        "ring_messages = 500.0",
        "ring_messages = true",
        "ring_messages = [500]",
        "ring_messages = 2026-01-31",
        "ring_messages = 99",
        "publish_rate = 1e400",
        'publish_rate = "5"',
        "ring_messages = 0x" + "f" * 20_000,
        "publish_rate = nan",
        "publish_rate = inf",
        "publish_rate = true",
        "publish_rate = 0x" + "f" * 20_000,
        "raw_paths = 1",
        'raw_paths = "true"',
        "address = 8080",
        "log_level = 10",
        "[log_level]\nclevrd = 1",
    ],
)
def test_file_value_of_another_type_is_refused(toml: str, tmp_path: Path) -> None:
    """Text is no number in a file, a number no boolean, and no size of number breaks loading."""
    field = toml.strip("[").split(" ")[0].split("]")[0]
    path = write_toml(tmp_path, toml)

    (line,) = problems(path=path)

    assert line.startswith(f"{field} = ")
    assert f"(file {path}) is not allowed: must be {BY_FIELD[field].allowed}." in line


# --- errors ---


@pytest.mark.parametrize(
    ("flags", "environ", "toml", "source"),
    [
        ({"max_topics": "0"}, {}, "", "flag --max-topics"),
        ({}, {"CLEVRD_MAX_TOPICS": "0"}, "", "environment CLEVRD_MAX_TOPICS"),
        ({}, {}, "max_topics = 0", "file {path}"),
    ],
)
def test_error_names_setting_value_source_and_range(
    flags: dict[str, str], environ: dict[str, str], toml: str, source: str, tmp_path: Path
) -> None:
    """Who reads the line knows what to change, where, and to what."""
    path = write_toml(tmp_path, toml)

    (line,) = problems(flags, environ, path)

    shown = "0" if toml else "'0'"
    assert line == (
        f"max_topics = {shown} ({source.format(path=path)}) is not allowed:"
        " must be a whole number from 1 to 10000000."
    )


def test_all_wrong_settings_are_reported_at_once(tmp_path: Path) -> None:
    """One start shows every mistake, each on a line of its own."""
    path = write_toml(tmp_path, 'log_level = "loud"\ncolour = "red"')

    lines = problems(
        {"max_topics": "none", "publish_burst": "5"}, {"CLEVRD_RAW_PATHS": "maybe"}, path
    )

    starts = ["'colour'", "log_level", "raw_paths", "max_topics", "publish_burst"]
    assert [line.split(" ")[0] for line in lines] == starts


def test_value_cannot_forge_or_flood_the_error() -> None:
    """Control characters are shown escaped, and long values are cut."""
    (line,) = problems({"log_level": "x\n\x1b[2Jclevrd: all is well" + "y" * 10_000})

    assert "\\n\\x1b[2J" in line
    assert len(line) < 300


def test_address_error_says_what_is_wrong_with_it() -> None:
    """For an address the range is not enough to see the mistake."""
    (line,) = problems({}, {"ADDRESS": "localhost"})

    assert "address = 'localhost' (environment ADDRESS) is not allowed" in line
    assert "The port is missing" in line


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            {"catch_up_messages": "101", "ring_messages": "100"},
            "catch_up_messages = 101 (flag --catch-up-messages) is not allowed: must be at most"
            " ring_messages, which is 100 (flag --ring-messages).",
        ),
        (
            {"write_low_bytes": "65536"},
            "write_low_bytes = 65536 (flag --write-low-bytes) is not allowed: must be less than"
            " write_high_bytes, which is 65536 (default).",
        ),
        (
            {"max_message_bytes": "262145", "ring_bytes": "1048576"},
            "max_message_bytes = 262145 (flag --max-message-bytes) is not allowed: must be at"
            " most a quarter of ring_bytes, which is 1048576 (flag --ring-bytes).",
        ),
        (
            {"publish_burst": "1"},
            "publish_burst = 1 (flag --publish-burst) is not allowed: must be 0 unless"
            " publish_rate is more than 0, which is 0.0 (default).",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags: dict[str, str], line: str) -> None:
    """The line names both settings and both sources, since either may be the wrong one."""
    assert problems(flags) == [line]


@pytest.mark.parametrize(
    "flags",
    [
        {"catch_up_messages": "100", "ring_messages": "100"},
        {"write_low_bytes": "65535"},
        {"max_message_bytes": "262144", "ring_bytes": "1048576"},
        {"publish_burst": "1", "publish_rate": "0.1"},
    ],
)
def test_settings_that_just_fit_each_other_are_taken(flags: dict[str, str]) -> None:
    """The rules between settings refuse nothing that works."""
    assert problems(flags) == []


def test_wrong_setting_is_not_also_a_contradiction() -> None:
    """One mistake gives one line."""
    lines = problems({"ring_messages": "5", "catch_up_messages": "1000000"})

    assert len(lines) == 1


# --- names ---


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("ring_mesages", "; did you mean ring_messages?"),
        ("ring-messages", "; did you mean ring_messages?"),
        ("CLEVRD_RING_MESSAGES", "; did you mean ring_messages?"),
        ("colour", "."),
    ],
)
def test_unknown_key_in_a_file_is_an_error(key: str, hint: str, tmp_path: Path) -> None:
    """A misspelt key would otherwise silently change nothing."""
    path = write_toml(tmp_path, f"{key} = 1")

    assert problems(path=path) == [f"'{key}' (file {path}) is not a setting{hint}"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("CLEVRD_RING_MESAGES", "; did you mean CLEVRD_RING_MESSAGES?"),
        ("CLEVRD_ADRESS", "; did you mean CLEVRD_ADDRESS?"),
        ("CLEVRD_SERVICE_HOST", "."),
        ("CLEVRD_PORT_8080_TCP", "."),
    ],
)
def test_unknown_variable_is_a_warning(name: str, hint: str) -> None:
    """Kubernetes sets variables of this prefix, so they can't be errors; values stay unseen."""
    loaded = load({}, {name: "s3cret", "HOME": "/root"}, None)

    assert loaded.warnings == [f"'{name}' (environment) is not a setting and is ignored{hint}"]


def test_variables_of_the_client_are_known() -> None:
    """One environment serves the daemon and the client commands."""
    loaded = load({}, {"CLEVRD_URL": "http://x", "CLEVRD_TENANT": "t"}, None)

    assert loaded.warnings == []


# --- files ---


def test_file_that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    """The reason is the system's."""
    missing = str(tmp_path / "none.toml")

    assert problems(path=missing) == [
        f"Can't read the configuration file {missing}: No such file or directory."
    ]
    assert problems(path=str(tmp_path)) == [
        f"Can't read the configuration file {tmp_path}: Is a directory."
    ]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"ring_messages 500", "is not TOML"),
        (b"max_topics = 1\nmax_topics = 2", "is not TOML"),
        (b"[auth]\n[auth]", "is not TOML: the table [auth] is there twice"),
        (b"[auth.a]\n[auth.a]", "is not TOML: the table [auth.a] is there twice"),
        (b'log_level = "\xff"', "is not TOML"),
        (b"max_topics = " + b"9" * 5000, "is not TOML"),
        (b"x = " + b"[" * 100_000, "is nested too deeply"),
        (b"#" * (MAX_FILE_BYTES + 1), f"is over {MAX_FILE_BYTES} bytes"),
    ],
)
def test_file_that_is_no_configuration_is_one_clear_error(
    content: bytes, why: str, tmp_path: Path
) -> None:
    """Whatever the file holds, loading ends with a line and never with a traceback."""
    path = tmp_path / "bad.toml"
    path.write_bytes(content)

    (line,) = problems(path=str(path))

    assert line.startswith(f"The configuration file {path} {why}")


@given(st.dictionaries(st.sampled_from(list(BY_FIELD)), st.text()))
def test_no_text_breaks_loading(flags: dict[str, str]) -> None:
    """Any text in any setting is a value or a ConfigError."""
    assert all(isinstance(line, str) for line in problems(flags))


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (":9000", TcpAddress(None, 9000)),
        (":0", TcpAddress(None, 0)),
        (":65535", TcpAddress(None, 65535)),
        ("127.0.0.1:9000", TcpAddress("127.0.0.1", 9000)),
        ("0.0.0.0:9000", TcpAddress("0.0.0.0", 9000)),  # noqa: S104 - nothing is bound
        ("localhost:9000", TcpAddress("localhost", 9000)),
        ("node-1.example.com:80", TcpAddress("node-1.example.com", 80)),
        ("[::]:9000", TcpAddress("::", 9000)),
        ("[::1]:9000", TcpAddress("::1", 9000)),
        ("[fe80::1%eth0]:9000", TcpAddress("fe80::1%eth0", 9000)),
        ("unix:/run/clevrd.sock", UnixAddress("/run/clevrd.sock")),
        ("unix:/" + "x" * 106, UnixAddress("/" + "x" * 106)),
    ],
)
def test_address_is_understood(text: str, address: object) -> None:
    """Every documented form, and the ends of what is allowed."""
    assert parse_address(text) == address


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "port is missing"),
        ("9000", "port is missing"),
        ("localhost", "port is missing"),
        ("localhost:", "port is missing"),
        ("[::1]:", "port is missing"),
        ("[::1]", "comes the port"),
        ("[::1]9000", "comes the port"),
        ("[::1:9000", "comes the port"),
        (":65536", "from 0 to 65535"),
        (":99999", "from 0 to 65535"),
        (":-1", "from 0 to 65535"),
        (":+80", "from 0 to 65535"),
        (":http", "from 0 to 65535"),
        (": 80", "from 0 to 65535"),
        (":\u0668\u0660", "from 0 to 65535"),
        (":000080", "from 0 to 65535"),
        ("::1:9000", "in brackets"),
        ("::", "in brackets"),
        ("[127.0.0.1]:80", "not an IPv6 address"),
        ("[]:80", "not an IPv6 address"),
        ("*:80", "for all interfaces leave it out"),
        ("a b:80", "not a host"),
        ("\u212a:80", "not a host"),  # the Kelvin sign, a k to whoever ignores case
        ("-a:80", "not a host"),
        ("a..b:80", "not a host"),
        ("host/x:80", "not a host"),
        ("256.0.0.1:80", "not an IPv4 address"),
        ("1.2.3:80", "not an IPv4 address"),
        ("http://localhost:80", "not a URL"),
        ("unix:clevrd.sock", "is absolute"),
        ("unix:", "is absolute"),
        ("unix:/run/", "names a file"),
        ("unix:/run/a\0b", "names a file"),
        ("unix:/" + "x" * 107, "at most 107 bytes"),
        ("unix:/" + "é" * 54, "at most 107 bytes"),
    ],
)
def test_address_that_is_wrong_says_why(text: str, why: str) -> None:
    """Each mistake has its own sentence."""
    with pytest.raises(ConfigError, match=re.escape(why)):
        parse_address(text)


@given(st.text(alphabet="[]:.%/-0123456789abfunix \0é", max_size=40))
def test_no_text_breaks_address_parsing(text: str) -> None:
    """Any text is an address or a ConfigError."""
    try:
        address = parse_address(text)
    except ConfigError:
        return

    assert isinstance(address, (TcpAddress, UnixAddress))
