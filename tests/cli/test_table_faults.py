"""Faults of tables of the configuration file, in words that say what to write instead."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest

from clevrd.table_faults import TableFault, table_fault


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A table within another one."""

    name: str
    kinds: tuple[Literal["a", "b"], ...] = ()
    limit: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Table(msgspec.Struct, forbid_unknown_fields=True):
    """A table with one of each kind of value."""

    entries: tuple[Entry, ...] = ()
    replicas: Literal[1, 3] = 1
    share: float = 1.0
    is_on: bool = False


@pytest.mark.parametrize(
    ("table", "place", "what"),
    [
        ({"colour": 1}, "", "has no setting called `colour`"),
        ({"entries": [{}]}, "entries[0]", "lacks the setting `name`"),
        ({"entries": {}}, "entries", "must be a list of tables: write its name in two brackets"),
        ({"entries": "a"}, "entries", "must be a list, and is text"),
        (
            {"entries": [{"name": "x", "kinds": {}}]},
            "entries[0].kinds",
            "must be a list, and is a table",
        ),
        ({"entries": ["a"]}, "entries[0]", "must be a table, and is text"),
        ({"entries": [{"name": 1}]}, "entries[0].name", "must be text, and is a whole number"),
        (
            {"entries": [{"name": "x"}, {"name": "y", "kinds": ["a", "c"]}]},
            "entries[1].kinds[1]",
            "must be one of a, b, and is 'c'",
        ),
        ({"entries": [{"name": "x", "limit": 0}]}, "entries[0].limit", "must be a whole number >="),
        ({"entries": [{"name": "x", "limit": []}]}, "entries[0].limit", "must be a whole number, "),
        ({"replicas": 2}, "replicas", "must be one of 1, 3, and is 2"),
        ({"share": "1"}, "share", "must be a number, and is text"),
        ({"is_on": 1}, "is_on", "must be true or false, and is a whole number"),
    ],
)
def test_fault_says_where_and_what_to_write(table: dict[str, Any], place: str, what: str) -> None:
    """In the words of the file, whatever msgspec calls them."""
    fault = fault_of(table, Table)

    assert fault.place == place
    assert fault.what.startswith(what)
    assert "`str`" not in fault.what


def test_fault_of_a_list_names_the_entry() -> None:
    """A table that stands several times is read as a list."""
    fault = fault_of([{"name": "x"}, {"name": "y", "kinds": ["c"]}], tuple[Entry, ...])

    assert fault == TableFault("[1].kinds[0]", "must be one of a, b, and is 'c'")


def fault_of(value: object, shape: Any) -> TableFault:
    """Return the fault of ``value``, which can't be read as ``shape``."""
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(value, shape, strict=True)
    return table_fault(caught.value, shape)
