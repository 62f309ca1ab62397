"""Records that can't be read have a line in the log each, as long as they are few."""

from __future__ import annotations

import pytest

from clevrd.journal.left_out import LINES, WHILE_S, LeftOut


def test_many_records_have_some_lines_and_then_their_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A program that writes what it likes into the log does not fill the disk with lines."""
    now_s = 100.0
    left_out = LeftOut(3, lambda: now_s)
    for position in range(LINES + 5):
        left_out.note(position, "no JSON")
    few = [each.getMessage() for each in caplog.records]
    caplog.clear()
    now_s += WHILE_S
    left_out.note(99, "no JSON")

    assert few[0] == "record left out partition=3 position=0 reason=no JSON"
    assert len(few) == LINES
    assert [each.getMessage() for each in caplog.records] == [
        "more records left out partition=3 count=5",
        "record left out partition=3 position=99 reason=no JSON",
    ]
