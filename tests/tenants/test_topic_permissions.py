"""A credential reaches the topics that its patterns match, and no other by any spelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.patterns import matches, parse_pattern
from clevrd.errors import InvalidRequest
from clevrd.tenants.topic_permissions import ALL_TOPICS, NO_TOPICS, TopicPermissions

WORDS = st.sampled_from(["a", "b", "ab", ""])
NAMES = st.lists(WORDS, min_size=1, max_size=4).map(".".join).filter(bool)
PATTERN_WORDS = st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=4)


@st.composite
def patterns(draw: st.DrawFn) -> str:
    words = draw(PATTERN_WORDS)
    if "*" not in words or draw(st.booleans()):
        words.append("**")
    return ".".join(words)


def test_names_and_patterns_are_allowed_and_nothing_else() -> None:
    """As docs/wire.md says of patterns."""
    permissions = TopicPermissions(["orders.*", "news", "logs.**"])

    assert all(map(permissions.allows, ["orders.eu", "news", "logs.a", "logs.a.b"]))
    assert not any(
        map(
            permissions.allows,
            ["orders", "orders.eu.de", "news.x", "logs", "Orders.eu", "xorders.eu", "x", ".."],
        )
    )


def test_all_and_none() -> None:
    """An open daemon allows everything; a credential without a list allows nothing."""
    assert ALL_TOPICS.allows("any.thing")
    assert ALL_TOPICS.allows_some_of(parse_pattern("a.*"))
    assert not NO_TOPICS.allows("any.thing")
    assert not NO_TOPICS.allows_some_of(parse_pattern("**"))
    assert (bool(ALL_TOPICS), bool(NO_TOPICS)) == (True, False)


@pytest.mark.parametrize("entry", ["", "a*", "a.**.b", "a\nb", "x" * 1_000])
def test_entry_that_is_no_topic_is_told(entry: str) -> None:
    """A permission that could never hold is a mistake."""
    with pytest.raises(InvalidRequest):
        TopicPermissions([entry])


@given(st.lists(patterns() | NAMES, max_size=4), st.lists(NAMES, max_size=8))
def test_answers_that_are_remembered_are_the_same(entries: list[str], topics: list[str]) -> None:
    """Asked twice, and in any order."""
    permissions = TopicPermissions(entries)

    for topic in topics + topics:
        expected = topic in entries or any(
            matches(parse_pattern(entry), topic) for entry in entries if "*" in entry
        )
        assert permissions.allows(topic) == expected


def test_memory_of_answers_is_bounded() -> None:
    """A client that names ever new topics costs nothing that stays."""
    permissions = TopicPermissions(["a.*"])

    for number in range(5_000):
        permissions.allows(f"b.{number}")

    assert len(permissions._remembered) <= 1_024


@given(patterns(), patterns(), NAMES)
def test_pattern_that_shares_a_topic_with_the_set_is_allowed_some(
    wanted: str, entry: str, topic: str
) -> None:
    """If any name matches both, it may be asked for; which topics come is decided for each."""
    permissions = TopicPermissions([entry])

    if matches(parse_pattern(wanted), topic) and permissions.allows(topic):
        assert permissions.allows_some_of(parse_pattern(wanted))


@pytest.mark.parametrize(
    ("wanted", "entry"),
    [("a.*", "b.*"), ("a.b.*", "a.*"), ("a.*", "a.b.c.**"), ("a.**", "a"), ("*", "a.b")],
)
def test_pattern_apart_from_the_set_is_not_allowed(wanted: str, entry: str) -> None:
    """No topic could ever match both."""
    assert not TopicPermissions([entry]).allows_some_of(parse_pattern(wanted))
