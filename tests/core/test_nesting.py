"""JSON may be nested 512 levels deep, however it gets here; what is deeper is refused."""

from __future__ import annotations

import json

import pytest
from clients import commands_socket, masked, publish_socket, raw_subscriber
from daemons import running
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.nesting import MAX_LEVELS, is_too_deep
from clevrd.core.publish_request import decode_publish
from clevrd.errors import InvalidRequest
from clevrd.handlers.commands.commands import decode_command
from clevrd.handlers.publish.batch import split_batch

# What stands in JSON between brackets and must not count for one.
DECOYS = ['"["', r'"\"["', r'"\\"', '"]]"', r'"\\\"{"', "{}", "[]", "1", '"é["']


def nested(levels: int, filling: str = "", inner: str = "1") -> str:
    """Return JSON of so many levels, arrays and objects in turns, with ``filling`` in each."""
    text, extra = inner, f"{filling}," if filling else ""
    for level in range(levels):
        text = f"[{extra}{text}]" if level % 2 else f'{{"f":[{extra[:-1]}],"k":{text}}}'
    return text


def depth_of(text: str) -> int:
    """Return the levels of ``text`` as a parser that is not ours sees them."""
    deepest, waiting = 0, [(json.loads(text), 1)]
    while waiting:
        value, level = waiting.pop()
        if isinstance(value, list | dict):
            deepest = max(deepest, level)
            parts = value if isinstance(value, list) else value.values()
            waiting += [(part, level + 1) for part in parts]
    return deepest


@pytest.mark.parametrize("filling", ["", *DECOYS])
@pytest.mark.parametrize("levels", [500, 511, 512, 513])
def test_levels_are_counted_outside_strings(levels: int, filling: str) -> None:
    """At the bound and around it, with brackets that are no levels in between."""
    text = nested(levels, filling)

    assert is_too_deep(text.encode()) == (depth_of(text) > MAX_LEVELS)


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 60), st.sampled_from(["", *DECOYS])),
        min_size=1,
        max_size=8,
    ),
    st.integers(470, 500),
)
def test_levels_of_any_shape(parts: list[tuple[int, int, str]], outer: int) -> None:
    """Many short nests beside each other, inside a deep one: peeled and counted alike."""
    inner = ",".join(
        ",".join([nested(levels, filling)] * count) for levels, count, filling in parts
    )
    text = "[" * outer + inner + "]" * outer

    assert is_too_deep(text.encode()) == (depth_of(text) > MAX_LEVELS)


def body_of(levels: int) -> bytes:
    """Return a publish that has so many levels, its own included."""
    return b'{"topic":"t","data":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


def test_publish_may_be_nested_to_the_bound_and_no_deeper() -> None:
    """The sentence names the bound and what to do, also where the decoder would give up itself."""
    assert decode_publish(body_of(MAX_LEVELS)).topic == "t"
    for levels in (MAX_LEVELS + 1, 9_900, 200_000):
        with pytest.raises(InvalidRequest, match=r"too deeply \(512 levels are allowed\), flatten"):
            decode_publish(body_of(levels))
        with pytest.raises(InvalidRequest, match=r"too deeply \(512 levels are allowed\), flatten"):
            decode_command(body_of(levels).replace(b"{", b'{"type":"publish",', 1))


def test_items_of_a_batch_may_be_nested_to_the_bound() -> None:
    """The array around them is no level of theirs."""
    (item,) = split_batch(b"[" + body_of(MAX_LEVELS) + b"]")

    assert decode_publish(item).topic == "t"


@pytest.mark.parametrize("opening", [publish_socket(), commands_socket()], ids=["publish", "ws"])
async def test_sockets_refuse_what_is_too_deep_and_go_on(opening: bytes) -> None:
    """It is answered like any other refusal; readers get what is as deep as may be."""
    fields = b'{"type":"publish","ref":%d,'
    async with running() as daemon, await raw_subscriber(daemon.port) as reader:
        bodies = [body_of(levels) for levels in (MAX_LEVELS + 1, 9_900, MAX_LEVELS)]
        frames = [masked(1, fields % n + body[1:]) for n, body in enumerate(bodies)]
        sent = opening + b"".join(frames) + masked(8, b"\x03\xe8")
        answers = await daemon.send_raw(sent)
        message = await reader.frame()

    assert answers.count(b"nested too deeply (512 levels are allowed)") == 2
    assert answers.count(b'"offset":1') == 1
    assert json.loads(message.payload)["offset"] == 1
