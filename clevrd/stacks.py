"""Where every task and thread stands, as a few lines of text. A signal asks: daemon_signals.

Tasks and threads that stand at the same place are one line with their number.
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

# 1,000 tasks are walked in about 10 ms; those beyond are only counted.
MAX_TASKS: Final = 1_000
# Different places, the most frequent first.
MAX_PLACES: Final = 50
MAX_THREADS: Final = 50
# Calls of one stack, the innermost first.
MAX_CALLS: Final = 20
# Calls that are looked through for them, the outermost first.
MAX_WALKED: Final = 200


def stack_lines(
    tasks: Iterable[asyncio.Task[Any]], interrupted: FrameType | None = None
) -> Iterator[str]:
    """Yield a line for each place at which tasks and threads stand, a bounded number of them.

    Args:
        tasks: those of the loop.
        interrupted: where the calling thread was before a signal's handler was called in it.
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
    """Return the calls from ``frame`` outwards."""
    calls: list[str] = []
    while frame is not None and len(calls) < MAX_CALLS:
        calls.append(_call(frame))
        frame = frame.f_back
    return " < ".join(calls) or "nowhere"


def _place_of(task: asyncio.Task[Any]) -> str:
    """Return where ``task`` waits: the innermost coroutine first."""
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
