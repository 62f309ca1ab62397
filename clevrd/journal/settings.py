"""The table ``[journal]`` of the configuration file, and the setting ``journal``, checked.

No file is opened here and no engine is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from clevrd.config import Config, Loaded
from clevrd.core.names import check_topic
from clevrd.core.patterns import Words, parse_pattern
from clevrd.errors import ConfigError, InvalidRequest

TABLE: Final = "journal"

# msgspec's way to say where in a value it is: `$.topics[1]`.
_PLACE: Final = re.compile(r" - at `\$\.?(.*)`\Z")

_DAY_S: Final = 86_400.0

Durability = Literal["fsync", "os"]


class JournalSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """``[journal]``: where messages are kept, for how long, and of which topics."""

    # A directory. The setting `journal` is stronger.
    directory: str = ""
    # Patterns of the topics that are journaled; the others are this process's memory.
    topics: tuple[str, ...] = ("**",)
    # "fsync": an answered message outlives a power cut. "os": it outlives the process.
    durability: Durability = "fsync"
    # How long messages are kept, and how much of them in all; 0 for no bound.
    retention_s: Annotated[float, Meta(ge=0, le=10 * 366 * _DAY_S)] = 7 * _DAY_S
    retention_bytes: Annotated[int, Meta(ge=0, le=1 << 50)] = 10 << 30
    # Messages of each topic that can be read back; 0 for all that are kept.
    retention_messages: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    # Topics that may have messages in the journal; each takes 350 bytes of memory.
    max_topics: Annotated[int, Meta(ge=1, le=1 << 30)] = 1_000_000
    # A new file is begun after so long, or so many bytes; files are deleted whole.
    segment_s: Annotated[float, Meta(ge=1, le=31 * _DAY_S)] = 3600.0
    segment_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40)] = 1 << 30

    @property
    def is_on(self) -> bool:
        """Whether there is a journal at all."""
        return bool(self.directory)

    @property
    def patterns(self) -> tuple[Words, ...]:
        """The topics' patterns, parsed; they were checked."""
        return tuple(map(_words, self.topics))


NO_JOURNAL: Final = JournalSettings()


def journal_of(loaded: Loaded) -> JournalSettings:
    """Return what a configuration says of the journal; raises ConfigError."""
    return read_journal(loaded.tables, loaded.config.journal, loaded.path)


def plain_journal_of(config: Config) -> JournalSettings:
    """Return what the plain setting alone says of the journal; raises ConfigError."""
    return read_journal({}, config.journal)


def read_journal(tables: Mapping[str, Any], directory: str, path: str = "") -> JournalSettings:
    """Return what the table ``journal`` and the plain setting say.

    Args:
        tables: the tables of the file, by name, as TOML has them.
        directory: the setting `journal`, relative to the working directory.
        path: the configuration file, for errors.

    Raises:
        ConfigError: something is wrong; each mistake has a line of its own, but of mistakes of
            shape only the first one is known.
    """
    source = f"file {path}"
    try:
        settings = msgspec.convert(tables.get(TABLE, {}), JournalSettings, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(_shape_mistake(str(error), source)) from error
    if directory:
        absolute = str(Path(directory).absolute())
        settings = msgspec.structs.replace(settings, directory=absolute)
    mistakes = [f"{TABLE}.{at} ({source}) is not allowed: {why}" for at, why in _mistakes(settings)]
    if tables.get(TABLE) and not settings.is_on:
        mistakes.append(
            f"{TABLE} ({source}) says how messages are kept, and not where; give the directory"
            ' (directory = "/var/lib/clevrd/journal"), or leave the table out.'
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return settings


def _words(text: str) -> Words:
    """Return the words of a pattern, or of a topic's name."""
    if "*" in text:
        return parse_pattern(text)
    check_topic(text)
    return tuple(text.split("."))


def _shape_mistake(message: str, source: str) -> str:
    place = match[1] if (match := _PLACE.search(message)) else ""
    what = _PLACE.sub("", message)
    what = what.replace("Object contains unknown field", "has no setting called")
    return f"{'.'.join(filter(None, (TABLE, place)))} ({source}) {what}."


def _mistakes(settings: JournalSettings) -> Iterator[tuple[str, str]]:
    """Yield where something is wrong that no shape says, and why."""
    if settings.directory and not settings.directory.startswith("/"):
        yield "directory", "write an absolute path."
    if not settings.topics:
        yield "topics", 'name a pattern; ["**"] stands for all topics.'
    for index, text in enumerate(settings.topics):
        try:
            _words(text)
        except InvalidRequest as error:
            yield f"topics[{index}]", str(error)
    if settings.retention_s and settings.segment_s > settings.retention_s:
        yield "segment_s", "files can't be longer than messages are kept (retention_s)."
    if settings.retention_bytes and settings.segment_bytes * 2 > settings.retention_bytes:
        yield "segment_bytes", "it must be at most half of retention_bytes; files go whole."
