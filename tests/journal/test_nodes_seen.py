"""Nodes that were seen: how many, with which versions, and never without a bound."""

from __future__ import annotations

from clevrd.journal.nodes_seen import MAX_NODES, MAX_VERSIONS, OTHERS, UNKNOWN, NodesSeen


def test_nodes_are_counted_by_their_versions() -> None:
    """Each once, by what it has said last; this node too, though it was not heard."""
    nodes = NodesSeen()
    for writer, version in (("a", "1.0.0"), ("b", "1.0.0"), ("c", "1.1.0"), ("c", ""), ("d", "")):
        nodes.note(writer, version, 0.0)
    nodes.note("b", "1.1.0", 1.0)

    assert nodes.versions("me", "1.2.0") == {"1.0.0": 1, "1.1.0": 2, "1.2.0": 1, UNKNOWN: 1}
    assert nodes.versions("a", "1.2.0") == {"1.2.0": 1, "1.1.0": 2, UNKNOWN: 1}


def test_nodes_that_are_silent_are_forgotten() -> None:
    """By when their last record was read, whatever they said in it."""
    nodes = NodesSeen()
    nodes.note("a", "1.0.0", 0.0)
    nodes.note("b", "1.0.0", 1.0)
    nodes.note("a", "", 2.0)

    nodes.forget_before(1.5)

    assert nodes.versions("a", "1.0.0") == {"1.0.0": 1}


def test_versions_of_others_make_no_labels_without_end() -> None:
    """What another process writes is no version at will, nor are there more than a few."""
    nodes = NodesSeen()
    for number in range(2 * MAX_NODES):
        nodes.note(f"{number}", f"1.{number}.0", float(number))
    nodes.note("long", "1" * 33, 1e9)
    nodes.note("odd", '1"\n', 1e9)

    versions = nodes.versions("long", "2.0.0")

    assert len(versions) == MAX_VERSIONS + 1
    assert versions[OTHERS] == MAX_NODES - MAX_VERSIONS
    assert all(len(version) <= 32 and '"' not in version for version in versions)
