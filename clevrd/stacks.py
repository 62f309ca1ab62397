"""Where every task and thread stands, as lines of text for a log.

Tasks that stand at the same place share one line with their number. A signal asks for the lines:
daemon_signals.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Final

# Tasks whose stacks are walked, 1,000 in about 10 ms; tasks beyond are only counted.
MAX_TASKS: Final = 1_000
# Places listed, the most frequent first.
MAX_PLACES: Final = 50
MAX_THREADS: Final = 50
# Calls listed for one stack, the innermost first.
MAX_CALLS: Final = 20
# Calls of one task that are walked, from the outermost inwards, to find the innermost.
MAX_WALKED: Final = 200


def stack_lines(
    tasks: Iterable[asyncio.Task[Any]], interrupted: FrameType | None = None
) -> Iterator[str]:
    """Yield a bounded number of lines, each for a thread or a place at which tasks stand.

    Args:
        tasks: the loop's tasks.
        interrupted: frame in which a signal handler interrupted the calling thread, if any.
    """
    yield from _thread_lines(interrupted)
    yield from _task_lines(list(tasks))


def _thread_lines(interrupted: FrameType | None) -> Iterator[str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    if interrupted is not None:
        frames[threading.get_ident()] = interrupted
    for ident, frame in list(frames.items())[:MAX_THREADS]:
        yield f"stack thread={names.get(ident, ident)} at={_calls_of(frame)}"
    if len(frames) > MAX_THREADS:
        yield f"stacks left out threads={len(frames) - MAX_THREADS}"


def _task_lines(tasks: list[asyncio.Task[Any]]) -> Iterator[str]:
    places = Counter(_place_of(task) for task in tasks[:MAX_TASKS])
    for place, count in places.most_common(MAX_PLACES):
        yield f"stack tasks={count} at={place}"
    left_out = len(tasks) - sum(count for _, count in places.most_common(MAX_PLACES))
    yield f"stacks of tasks all={len(tasks)} left_out={left_out}"


def _calls_of(frame: FrameType | None) -> str:
    """Return the calls from ``frame`` outwards, MAX_CALLS at most."""
    calls: list[str] = []
    while frame is not None and len(calls) < MAX_CALLS:
        calls.append(_call(frame))
        frame = frame.f_back
    return " < ".join(calls) or "nowhere"


def _place_of(task: asyncio.Task[Any]) -> str:
    """Return where ``task`` waits: its calls, the innermost first."""
    calls: deque[str] = deque(maxlen=MAX_CALLS)
    awaited: Any = task.get_coro()
    for _ in range(MAX_WALKED):
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is None:
            break
        calls.append(_call(frame))
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return " < ".join(reversed(calls)) or "nowhere"


def _call(frame: FrameType) -> str:
    code = frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_name}"
