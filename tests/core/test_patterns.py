"""Patterns: what they match, what is none, and the tree against the plain rule."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.patterns import PatternTree, is_narrow, matches, parse_pattern
from clevrd.errors import InvalidRequest

WORDS = st.sampled_from(["a", "b", "", "*"])
NAMES = st.lists(WORDS, min_size=1, max_size=4).map(".".join).filter(bool)
PATTERNS = (
    st.lists(st.sampled_from(["a", "b", "", "*"]), min_size=1, max_size=4)
    .flatmap(lambda words: st.sampled_from([words, [*words, "**"]]))
    .filter(lambda words: "*" in words or words[-1] == "**")
    .map(".".join)
)


def matches_by_regex(pattern: str, name: str) -> bool:
    """Say what the documentation says, in another language."""
    words = [
        {"*": "[^.]*", "**": r"[^.]*(\.[^.]*)*"}.get(word, re.escape(word))
        for word in pattern.split(".")
    ]
    return re.fullmatch(r"\.".join(words), name) is not None


@pytest.mark.parametrize(
    ("pattern", "name", "is_match"),
    [
        ("orders.*", "orders.eu", True),
        ("orders.*", "orders", False),
        ("orders.*", "orders.eu.paid", False),
        ("orders.*", "orders.*", True),
        ("orders.*.paid", "orders.eu.paid", True),
        ("orders.*.paid", "orders.eu.open", False),
        ("orders.**", "orders.eu.paid", True),
        ("orders.**", "orders.eu", True),
        ("orders.**", "orders", False),
        ("orders.**", "orderss.eu", False),
        ("*.eu", "orders.eu", True),
        ("**", "anything.at.all", True),
        ("*", "anything", True),
        ("*", "any.thing", False),
    ],
)
def test_pattern_matches_word_by_word(pattern: str, name: str, is_match: bool) -> None:
    """One star is one word, two are the rest of at least one."""
    assert matches(parse_pattern(pattern), name) is is_match


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("orders", "has a star"),
        ("ord*", "whole word"),
        ("orders.*eu", "whole word"),
        ("orders.***", "whole word"),
        ("**.eu", "comes last"),
        ("a.**.b", "comes last"),
        ("a.*\n", "control character"),
        ("a.*" + "x" * 256, "bytes"),
    ],
)
def test_what_is_no_pattern_is_refused_in_words(text: str, words: str) -> None:
    """Each mistake has a sentence that says what would be right."""
    with pytest.raises(InvalidRequest, match=words):
        parse_pattern(text)


def test_pattern_is_narrow_when_its_first_word_is_named() -> None:
    """Only such a pattern can't match everything."""
    narrow = [is_narrow(parse_pattern(text)) for text in ("a.*", "a.**", "*.a", "*", "**")]

    assert narrow == [True, True, False, False, False]


@given(PATTERNS, NAMES)
def test_matching_is_what_a_regular_expression_says(pattern: str, name: str) -> None:
    """For all short patterns and names the words' rule and the regular expression's agree."""
    assert matches(parse_pattern(pattern), name) is matches_by_regex(pattern, name)


@given(st.sets(st.tuples(st.sampled_from("xy"), PATTERNS), max_size=12), st.data())
def test_tree_finds_who_watches(watched: set[tuple[str, str]], data: st.DataObject) -> None:
    """The tree finds exactly the patterns that match, also after some were removed."""
    tree: PatternTree[tuple[str, str]] = PatternTree()
    for tenant, pattern in watched:
        tree.add(tenant, parse_pattern(pattern), (tenant, pattern))
    gone = data.draw(st.sets(st.sampled_from(sorted(watched)))) if watched else set()
    for tenant, pattern in gone:
        tree.remove(tenant, parse_pattern(pattern), (tenant, pattern))
    name = data.draw(NAMES)

    found = sorted(tree.find("x", name))

    left = watched - gone
    assert found == sorted(w for w in left if w[0] == "x" and matches(parse_pattern(w[1]), name))
    assert tree.size == len(left)


def test_tree_keeps_nothing_of_what_is_removed() -> None:
    """Patterns that come and go leave no nodes behind."""
    tree: PatternTree[int] = PatternTree()
    for number in range(100):
        tree.add("t", parse_pattern(f"a.{number}.b.*"), number)

    for number in range(100):
        tree.remove("t", parse_pattern(f"a.{number}.b.*"), number)

    assert tree._roots == {}
