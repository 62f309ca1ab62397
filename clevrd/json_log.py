"""The log as JSON lines: each event with its time, level and values, for programs that read logs.

The events are those of the text form: a message is a few words and then values as ``name=%s``, of
which this module makes fields. How lines are written is in `logs`.
"""

from __future__ import annotations

import logging
import re
import time
from functools import lru_cache
from typing import Any, Final

import msgspec

from clevrd.logs import ESCAPES, MAX_LINE_BYTES, SEVERITIES

# A conversion of %-formatting, or a percent sign.
_CONVERSION: Final = r"%[-#0 +]*\d*(?:\.\d+)?[a-zA-Z]"
_FIELD: Final = re.compile(rf"([A-Za-z_][\w.]*)=({_CONVERSION})")
_ANY_CONVERSION: Final = re.compile(_CONVERSION)

# Fields that each line has; a value of an event with such a name gets an underscore behind it.
_OWN_FIELDS: Final = frozenset({"time", "level", "event", "logger", "error"})

# A line is whole JSON within MAX_LINE_BYTES: a traceback that is too long loses its middle, where
# the frames of libraries are.
_MAX_ERROR_CHARACTERS: Final = 8_000
_MAX_VALUE_CHARACTERS: Final = 4_000

_encode = msgspec.json.Encoder().encode


class JsonFormatter(logging.Formatter):
    """Renders an event as one line of JSON."""

    def __init__(self, *, for_journal: bool) -> None:
        """Args: for_journal: put journald's priority in front, which journald takes off again."""
        super().__init__()
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; it holds no control character, since JSON escapes these."""
        line = {
            "time": _rfc3339(record.created),
            "level": record.levelname.lower(),
            **event_of(record),
        }
        if not record.name.startswith("clevrd."):
            line["logger"] = record.name
        if error := self._error_of(record):
            line["error"] = error
        data = _encode(line)
        if len(data) > MAX_LINE_BYTES:
            data = _encode({name: line[name] for name in ("time", "level", "event")})
        text = data.decode().translate(_NOT_IN_JSON)
        return f"<{SEVERITIES.get(record.levelno, 6)}>{text}" if self._for_journal else text

    def _error_of(self, record: logging.LogRecord) -> str:
        if not record.exc_info or record.exc_info[0] is None:
            return ""
        error = self.formatException(record.exc_info)
        if len(error) <= _MAX_ERROR_CHARACTERS:
            return error
        half = _MAX_ERROR_CHARACTERS // 2
        return f"{error[:half]}\n... left out ...\n{error[-half:]}"


# Control characters that JSON need not escape, which would move a terminal's cursor.
_NOT_IN_JSON: Final = {code: f"\\u{code:04x}" for code in ESCAPES if code >= 0x7F}


def event_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the event and its values; all text as the event where it has not that form."""
    found = _form_of(record.msg) if isinstance(record.msg, str) else None
    arguments = record.args if isinstance(record.args, tuple) else ()
    if found is None or found[1] + len(found[2]) != len(arguments):
        return {"event": record.getMessage()[:_MAX_ERROR_CHARACTERS]}
    words, in_words, fields = found
    line: dict[str, Any] = {"event": (words % arguments[:in_words])[:_MAX_ERROR_CHARACTERS]}
    for (name, conversion), value in zip(fields, arguments[in_words:], strict=True):
        line[f"{name}_" if name in _OWN_FIELDS else name] = _value(conversion, value)
    return line


@lru_cache(maxsize=512)
def _form_of(text: str) -> tuple[str, int, tuple[tuple[str, str], ...]] | None:
    """Return an event's words, how many values stand in them, and its fields.

    None where values stand behind the fields, too.
    """
    first = _FIELD.search(text)
    words = (text if first is None else text[: first.start()]).strip()
    in_words = len(_ANY_CONVERSION.findall(words.replace("%%", "")))
    fields = tuple((match[1], match[2]) for match in _FIELD.finditer(text))
    if len(_ANY_CONVERSION.findall(text.replace("%%", ""))) != in_words + len(fields):
        return None
    return words, in_words, fields


def _value(conversion: str, value: Any) -> Any:
    """Return a number, a flag or None as it is, a float as it was to be shown, and else a text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # An enumeration is shown by its name.
        return int(value) if type(value) is int else str(value)
    if isinstance(value, float):
        return float(conversion % value) if conversion[-1] in "feg" else value
    # A text is quoted by %r for people alone.
    text = value if isinstance(value, str) else conversion % (value,)
    return text[:_MAX_VALUE_CHARACTERS].encode(errors="backslashreplace").decode()


def _rfc3339(at_s: float) -> str:
    whole_s, ms = divmod(int(at_s * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole_s))}.{ms:03d}Z"
