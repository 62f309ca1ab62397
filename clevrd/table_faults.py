"""Faults in the shape of a table of the configuration file, in words for people.

A shape is a msgspec struct; msgspec says what is wrong in a table, and where. Values that have to
fit each other are the business of the module that has the shape.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

import msgspec

# msgspec ends its sentence with the place of the fault, such as: at `$.tenants[0].name`.
_PLACE: Final = re.compile(r" - at `\$\.?(.*)`\Z")
_INDEX: Final = re.compile(r"\[(?:\d+|\.\.\.)\]")
# The kinds of values as msgspec calls them, one or several.
_KIND: Final = re.compile(r"`([a-z]+(?: \| [a-z]+)*)`")
_KINDS: Final = {
    "array": "a list",
    "object": "a table",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}


class TableFault(NamedTuple):
    """A fault in a table."""

    # The place in the table, such as keys[0].id; empty for the table itself.
    place: str
    # The rest of a sentence that begins with the place.
    what: str

    def sentence(self, table: str, source: str) -> str:
        """Return the whole sentence; ``source`` says where the table stands, such as a file."""
        dot = "" if self.place[:1] in ("", "[") else "."
        return f"{table}{dot}{self.place} ({source}) {self.what}."


def table_fault(error: msgspec.ValidationError, shape: Any) -> TableFault:
    """Return the fault that ``error`` tells of.

    Args:
        shape: the type that a table was to be read as.
    """
    message = str(error)
    found = _PLACE.search(message)
    place = found[1] if found else ""
    return TableFault(place, _said(_PLACE.sub("", message), shape, place))


def _said(message: str, shape: Any, place: str) -> str:
    name = message.rpartition("field ")[2]
    if message.startswith("Object contains unknown field"):
        return f"has no setting called {name}"
    if message.startswith("Object missing required field"):
        return f"lacks the setting {name}"
    if message.startswith("Invalid enum value"):
        value = message.removeprefix("Invalid enum value ")
        return f"must be one of {', '.join(_choices(shape, place))}, and is {value}"
    is_table = message == "Expected `array`, got `object`"
    if is_table and isinstance(_kind_at(shape, place), msgspec.inspect.StructType):
        return "must be a list of tables: write its name in two brackets, as in [[tenants]]"
    message = _KIND.sub(lambda found: _in_words(found[1]), message)
    return message.replace("Expected", "must be", 1).replace(", got ", ", and is ")


def _in_words(kinds: str) -> str:
    return " or ".join(_KINDS.get(kind, kind) for kind in kinds.split(" | ") if kind != "null")


def _choices(shape: Any, place: str) -> list[str]:
    """Return the values that are allowed at ``place``, which has a Literal for its type."""
    return [str(value) for value in _kind_at(shape, place).values]


def _kind_at(shape: Any, place: str) -> Any:
    """Return the kind of the value at ``place``, or of the items of the list there."""
    kind = _item(msgspec.inspect.type_info(shape))
    for name in filter(None, _INDEX.sub("", place).split(".")):
        kind = _item(next(each.type for each in kind.fields if each.encode_name == name))
    return kind


def _item(kind: Any) -> Any:
    """Return the kind of a list's items; ``kind`` itself where it is no list's."""
    return kind.item_type if isinstance(kind, msgspec.inspect.VarTupleType) else kind
