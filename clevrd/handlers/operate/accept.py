"""Which form of /metrics an Accept header asks for.

Rules: RFC 9110 §12.5.1 (Accept), §12.4.2 (q), §5.6 (tokens, quoted strings, lists).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import Final, NamedTuple

# Ranges of a header that are looked at, at 3 us each; browsers send eight, Prometheus five.
MAX_RANGES: Final = 64

_WORD: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED: Final = r'"(?:[^"\\]|\\.)*"'
# One element of the list; a comma within quotes does not end it.
_ELEMENT: Final = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+', re.DOTALL)
_RANGE: Final = re.compile(rf"[ \t]*({_WORD})/({_WORD})[ \t]*")
_PARAMETER: Final = re.compile(rf";[ \t]*(?:({_WORD})=({_WORD}|{_QUOTED}))?[ \t]*", re.DOTALL)
_QUALITY: Final = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")


class Form(Enum):
    """The forms, the one that is preferred among equals first."""

    JSON = "application/json"
    OPENMETRICS = "application/openmetrics-text"
    TEXT = "text/plain"


# Versions that a client may name and still read what it gets. OpenMetrics 0.0.1 is a draft of 1.0.0
# that Prometheus reads alike; text 1.0.0 differs from 0.0.4 in names that we don't have.
_VERSIONS: Final = {
    Form.JSON: frozenset[str](),
    Form.OPENMETRICS: frozenset({"1.0.0", "0.0.1"}),
    Form.TEXT: frozenset({"0.0.4", "1.0.0"}),
}


class MediaRange(NamedTuple):
    """One element of an Accept header; names are lower case."""

    kind: str
    subtype: str
    parameters: dict[str, str]
    quality: float

    def specificity(self, form: Form) -> int:
        """Return how closely it names ``form``: 0 for not at all, 1 for anything, 4 for most."""
        kind, _, subtype = form.value.partition("/")
        if self.kind == "*" and self.subtype == "*":
            return 1
        if self.kind != kind or self.subtype not in ("*", subtype):
            return 0
        if self.subtype == "*":
            return 2
        version = self.parameters.get("version")
        if version is None:
            return 3
        return 4 if version in _VERSIONS[form] else 0


def wanted_form(accept: str) -> Form:
    """Return the form that ``accept`` likes best; JSON where it names none that there is.

    Between forms that it likes alike the one that it names more closely wins, so that a header with
    nothing but a preferred ``text/plain`` among anything else is answered with text.
    """
    ranges = list(media_ranges(accept))
    best, best_rank = Form.JSON, (0.0, 0)
    for form in Form:
        # The closest range decides, whatever its quality (RFC 9110 §12.5.1); of two that are as
        # close, which RFC 9110 leaves open, the one that is liked better.
        closest = max(((each.specificity(form), each.quality) for each in ranges), default=(0, 0.0))
        specificity, quality = closest
        if specificity and quality and (quality, specificity) > best_rank:
            best, best_rank = form, (quality, specificity)
    return best


def media_ranges(accept: str) -> Iterator[MediaRange]:
    """Yield the first MAX_RANGES of ``accept``, without what is malformed."""
    for count, element in enumerate(_ELEMENT.finditer(accept)):
        if count == MAX_RANGES:
            return
        found = _media_range(element.group())
        if found is not None:
            yield found


def _media_range(element: str) -> MediaRange | None:
    head = _RANGE.match(element)
    if head is None:
        return None
    parameters: dict[str, str] = {}
    position = head.end()
    while position < len(element):
        parameter = _PARAMETER.match(element, position)
        if parameter is None:
            return None
        position = parameter.end()
        name, value = parameter.groups()
        if name is not None:
            parameters[name.lower()] = _unquoted(value)
    quality = parameters.pop("q", "1")
    if not _QUALITY.fullmatch(quality):
        return None
    return MediaRange(head[1].lower(), head[2].lower(), parameters, float(quality))


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    return re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.DOTALL)
