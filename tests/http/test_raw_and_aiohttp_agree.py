"""The raw path and aiohttp: the same corpus of requests down each, and the same answers.

Two daemons, one of which hands every connection straight to aiohttp. What differs is what must:
ids, times, epochs. Each case publishes to topics of its own, so that offsets agree as well.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from daemons import Daemon, running
from http_corpus import CORPUS, FAMILIES, SHORT, mutated
from http_wire import responses, settled, split_each, talk


class Outcome(NamedTuple):
    """What one daemon did with a list of cases."""

    # What came back for each case, made comparable.
    transcripts: list[bytes]
    # (tenant, topic) -> messages published.
    published: dict[tuple[str, str], int]


# --- sending it ----------------------------------------------------------------------------------


async def outcome_of(
    cases: Sequence[Sequence[bytes]], *, raw_paths: bool, at_once: int = 1, shut: bool = True
) -> Outcome:
    """Send each case, in its pieces, over a connection of its own to a new daemon.

    Args:
        cases: the pieces of each.
        raw_paths: which way they go.
        at_once: connections at one time; topics of several cases must differ if that is not one.
        shut: send a FIN behind each; without it the daemon has to end the connection.
    """
    gate = asyncio.Semaphore(at_once)
    # Who shuts down its side waits for no timeout, and must not meet one on a busy machine.
    request_s, idle_s = (10.0, 10.0) if shut else (0.5, 1.5)
    # On a busy machine a WebSocket's bytes may take so long that it would be pinged.
    async with running(
        raw_paths=raw_paths,
        request_timeout_s=request_s,
        keepalive_timeout_s=idle_s,
        ping_interval_s=600.0,
    ) as daemon:

        async def transcript(pieces: Sequence[bytes]) -> bytes:
            async with gate:
                return settled(await talk(daemon.port, pieces, shut=shut))

        transcripts = await asyncio.gather(*map(transcript, cases))
        return Outcome(transcripts, published_in(daemon))


def published_in(daemon: Daemon) -> dict[tuple[str, str], int]:
    """Return how many messages each topic has had."""
    # Names that were only read are forgotten in a while.
    return {
        (topic.tenant, topic.name): topic.published
        for topic in daemon.hub.topics
        if topic.published
    }


async def both(
    cases: Sequence[Sequence[bytes]], *, at_once: int = 1, shut: bool = True
) -> tuple[Outcome, Outcome]:
    """Send ``cases`` down the raw path and down aiohttp's."""
    raw = await outcome_of(cases, raw_paths=True, at_once=at_once, shut=shut)
    front = await outcome_of(cases, raw_paths=False, at_once=at_once, shut=shut)
    return raw, front


def is_swallowed(sent: bytes, raw: bytes, front: bytes) -> bool:
    """Say whether all that aiohttp left unanswered are requests right before its last refusal.

    When a read holds broken bytes, its parser gives up the requests that were whole in the same
    read; they are not carried out either. The answer to one of them may have been the last one.
    Behind a field Upgrade requests are not followed, so that they are given to the parser at once.
    """
    if b"\r\nupgrade:" not in sent.lower():
        return False
    ours, theirs = responses(raw), responses(front)
    if not 0 < len(theirs) <= len(ours) or theirs[-1].status not in (400, 431):
        return False
    is_last = theirs[-1] == ours[-1] or ours[-1].headers.get("connection") == "close"
    return is_last and theirs[:-1] == ours[: len(theirs) - 1]


def disagreements(
    names: Sequence[str], cases: Sequence[Sequence[bytes]], raw: Outcome, front: Outcome
) -> dict[str, object]:
    """Return what was not the same on both paths, by case or topic."""
    unequal = [
        (name, b"".join(case), ours, theirs)
        for name, case, ours, theirs in zip(
            names, cases, raw.transcripts, front.transcripts, strict=True
        )
        if ours != theirs
    ]
    found: dict[str, object] = {
        name: (ours, theirs)
        for name, sent, ours, theirs in unequal
        if not is_swallowed(sent, ours, theirs)
    }
    differing = {
        topic
        for topic in raw.published | front.published
        if raw.published.get(topic) != front.published.get(topic)
    }
    # A swallowed request may have been a publish, of the one topic its case has.
    if len(differing) > len(unequal) or any(topic not in raw.published for topic in differing):
        found["published"] = differing
    return found


# --- the claims ----------------------------------------------------------------------------------


def test_corpus_has_what_it_should() -> None:
    """At least 200 cases, and of each family some."""
    sizes = {family.__name__: len(list(family())) for family in FAMILIES}

    assert len(CORPUS) >= 200
    assert min(sizes.values()) >= 10, sizes


@pytest.mark.parametrize("shut", [True, False], ids=["client shuts down", "daemon ends it"])
async def test_same_requests_get_same_answers_on_both_paths(shut: bool) -> None:
    """Byte for byte but for ids, times and epochs; and the same is published."""
    names = [name for name, _ in CORPUS]
    cases = [[sent] for _, sent in CORPUS]

    raw, front = await both(cases, at_once=1 if shut else len(cases), shut=shut)

    assert disagreements(names, cases, raw, front) == {}
    for outcome in (raw, front):
        assert [topic for _, topic in outcome.published if topic.startswith("smuggled")] == []
        silent = [name for name, out in zip(names, outcome.transcripts, strict=True) if not out]
        assert all("nothing" in name or "only empty lines" in name for name in silent)


# Thousands of connections, most of which send byte by byte; 10 s where nothing else runs.
@pytest.mark.timeout(120)
async def test_answers_do_not_depend_on_how_requests_are_split() -> None:
    """Cut in two at every byte, and sent byte by byte: the answers of the whole."""
    names: list[str] = []
    cases: list[list[bytes]] = []
    wholes: list[str] = []
    for name, sent in SHORT.items():
        for at in [[], *([cut] for cut in range(1, len(sent))), range(1, len(sent))]:
            own = sent.replace(b"-0000", b"-%04d" % len(cases))
            cases.append(split_each(own, at))
            names.append(f"{name} at {at}")
            wholes.append(name)

    raw, front = await both(cases, at_once=20)

    assert disagreements(names, cases, raw, front) == {}
    first = {name: wholes.index(name) for name in SHORT}
    uneven = [
        name
        for name, whole, answer in zip(names, wholes, raw.transcripts, strict=True)
        if answer != raw.transcripts[first[whole]]
    ]
    assert uneven == []


async def test_broken_requests_are_refused_alike() -> None:
    """Bytes changed at random, always the same ones: no request is two on one path only."""
    source = random.Random(20_260_101)  # noqa: S311  # not a secret
    cases = [[mutated(source, number)] for number in range(600)]

    raw, front = await both(cases)

    assert disagreements([repr(case) for case in cases], cases, raw, front) == {}
