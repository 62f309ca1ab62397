"""Lines that clevrd subscribe and clevrd history print of messages, and say of gaps."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import msgspec

from clevrd import logs
from clevrd.cli.output import Output
from clevrd.client import Gap, Message

# A newline between a message's JSON tokens would break its line, so it becomes a space. JSON
# strings have no newlines, since JSON escapes them (RFC 8259 §7).
_NEWLINES_TO_SPACES: Final = bytes.maketrans(b"\r\n", b"  ")

# On a terminal, control characters of a text, except tab and newline, become Python's escapes.
# Otherwise a publisher could write over the screen, or into the terminal's own input (ECMA-48).
_SHOWN: Final = {
    number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160)) if number not in (9, 10)
}


class _WithData(msgspec.Struct, frozen=True):
    """The field of a message that `--raw` prints."""

    data: msgspec.Raw


_decode_data = msgspec.json.Decoder(_WithData).decode


def add_printing(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which part of each message is printed."""
    parser.add_argument(
        "--headers",
        action="store_true",
        help="print the headers of messages too, where they have any: traces, attributes of events",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="print each message's data alone: a text as it is, without quotes, anything else as"
        " JSON on one line",
    )


async def until_gone(printing_to: Callable[[Output], Awaitable[int]]) -> int:
    """Return the exit code of ``printing_to``; end it once no program reads the output."""
    output = Output()
    printing = asyncio.ensure_future(printing_to(output))
    output.watch(printing.cancel)
    try:
        return await printing
    except asyncio.CancelledError:
        if output.is_gone:
            return 0
        raise


async def print_items(
    items: AsyncIterator[Message | Gap], output: Output, *, is_raw: bool, at_most: int | None = None
) -> int:
    """Print messages and report gaps, until there are no more; return how many were printed."""
    printed = 0
    line_of = _raw_line(is_shown=sys.stdout.isatty()) if is_raw else _json_line
    async for item in items:
        if isinstance(item, Gap):
            logs.say(_gap_sentence(item))
            continue
        await output.write(line_of(item.json))
        printed += 1
        if printed == at_most:
            break
    await output.finish()
    return printed


def _json_line(message_json: bytes) -> bytes:
    return message_json.translate(_NEWLINES_TO_SPACES) + b"\n"


def _raw_line(*, is_shown: bool) -> Callable[[bytes], bytes]:
    """Return a function that makes a line of a message's data; ``is_shown`` on a terminal."""

    def line_of(message_json: bytes) -> bytes:
        data = bytes(_decode_data(message_json).data)
        if not data.startswith(b'"'):
            return _json_line(data)
        text: str = msgspec.json.decode(data)
        if is_shown:
            text = text.translate(_SHOWN)
        return text.encode() + b"\n"

    return line_of


def _gap_sentence(gap: Gap) -> str:
    """Return a line about the gap, for people and for grep."""
    if gap.reason == "epoch":
        return (
            f"messages may be missing: the topic began anew, or later than asked topic={gap.topic}"
        )
    values = {"from": gap.first, "to": gap.last, "count": gap.count, "reason": gap.reason}
    told = " ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    return f"messages missed topic={gap.topic} {told}"
