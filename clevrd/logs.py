"""Standard error: log lines and the lines of commands, written without waiting for a reader.

Lines go into a bounded queue that a thread writes. Lines that find the queue full, or that can't be
written, are counted, and a line with their number follows as soon as writing works again.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Final

from clevrd.writer_thread import WriterThread, write_all

log = logging.getLogger(__name__)

STDERR: Final = 2
# About 8,000 lines: enough for a reader that pauses for a moment.
MAX_QUEUED_BYTES: Final = 1 << 20
# Longest line, which may hold a traceback; the rest of the line is cut off.
MAX_LINE_BYTES: Final = 32_768
# A progress line is left out while more than this waits, since no one would see it move.
MAX_QUEUED_DRAWN_BYTES: Final = 4096
# How long the process waits at its end for lines that no one takes: FLUSH_S after an ordinary stop,
# HURRIED_FLUSH_S after a forced one.
FLUSH_S: Final = 1.0
HURRIED_FLUSH_S: Final = 0.2

# Control characters from a server, a file or a client would move a terminal's cursor or forge a
# second log line.
ESCAPES: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(0x7F, 0xA0))} | {
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): " ",
}

# RFC 5424 §6.2.1 severities, which journald reads from a <N> at the start of a line: sd-daemon(3).
SEVERITIES: Final = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


class Lines:
    """Writes lines to a descriptor; `put` never waits, and lines that can't go out are counted.

    A queue that was full takes no line until it is empty. So each such time gives one count, which
    stands where the lines are missing.
    """

    def __init__(
        self,
        descriptor: int,
        note: Callable[[int], str],
        max_queued_bytes: int = MAX_QUEUED_BYTES,
    ) -> None:
        self._descriptor = descriptor
        # Returns the line that says how many lines were dropped; called in the writer's thread.
        # Replaced by LinesHandler.
        self.note = note
        self._max_queued_bytes = max_queued_bytes
        self._writer = WriterThread("clevrd-log", self._deliver)
        # Lines that could not even be made, since the start.
        self.unmade = 0
        # Lines that found the queue full, since the start; `put` alone changes it.
        self._refused = 0
        # Lines of `_refused` that a written line has told of. Only the writer's thread changes this
        # field and those below.
        self._refused_told = 0
        # Lines that could not be written: since the start, and since the last line that told of
        # them.
        self._failed = 0
        self._failed_untold = 0
        # True when the last write ended within a line.
        self._is_mid_line = False

    @property
    def dropped(self) -> int:
        """Lines that were dropped since the start; the number only rises."""
        return self._refused + self._failed + self.unmade + self._writer.lost

    def put(self, line: str) -> None:
        """Have ``line`` written, without waiting; its newline is added."""
        data = _line_bytes(line)
        has_room = self._writer.queued_bytes + len(data) <= self._max_queued_bytes
        if has_room and self._refused == self._refused_told:
            self._writer.put(data)
        else:
            self._refused += 1

    def draw(self, text: str) -> None:
        """Have ``text``, a progress line on a terminal, written as it is, or left out."""
        if self._writer.queued_bytes <= MAX_QUEUED_DRAWN_BYTES:
            self._writer.put(text.encode())

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is written, ``timeout_s`` at most; return whether it is."""
        return self._writer.flush(timeout_s)

    # --- in the writer's thread ------------------------------------------------------------------

    def _deliver(self, data: bytes) -> None:
        if self._failed_untold and self._write_note(self._failed_untold):
            self._failed_untold = 0
        if rest := data if self._failed_untold else self._write(data):
            self._count_failed(rest.count(b"\n"))
        # `put` adds no line while lines are refused, so in the end ``data`` alone is left.
        untold = self._refused - self._refused_told
        if untold and self._writer.queued_bytes == len(data):
            self._refused_told += untold
            if not self._write_note(untold):
                self._failed_untold += untold

    def _count_failed(self, lines: int) -> None:
        self._failed += lines
        self._failed_untold += lines

    def _write_note(self, lines: int) -> bool:
        return not self._write(_line_bytes(self.note(lines)))

    def _write(self, data: bytes) -> bytes:
        """Write ``data`` and return the part of it that could not be written."""
        start = b"\n" if self._is_mid_line else b""
        written, error = write_all(self._descriptor, start + data)
        if error is None or written:
            self._is_mid_line = error is not None and (start + data)[written - 1] != _NEWLINE
        return data[max(written - len(start), 0) :]


_NEWLINE: Final = 10


def _line_bytes(line: str) -> bytes:
    data = line.encode(errors="backslashreplace")
    if len(data) > MAX_LINE_BYTES:
        data = data[:MAX_LINE_BYTES].decode(errors="ignore").encode() + b" ... cut off"
    return data + b"\n"


# --- log lines -----------------------------------------------------------------------------------


class EventFormatter(logging.Formatter):
    """Renders an event as one line, whatever is in it: time, level, the event, its values."""

    def __init__(self, *, for_journal: bool) -> None:
        stamp = "" if for_journal else "%(asctime)s.%(msecs)03dZ %(levelname)s "
        super().__init__(f"{stamp}%(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; newlines of a traceback in it are escaped."""
        line = super().format(record).translate(ESCAPES)
        if not self._for_journal:
            return line
        return f"<{SEVERITIES.get(record.levelno, 6)}>{line}"

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without a traceback; a library's line names its logger."""
        line = super().formatMessage(record)
        return line if record.name.startswith("clevrd.") else f"{line} logger={record.name}"


class TerminalFormatter(logging.Formatter):
    """Renders an event for a person at a terminal: local time, level in colour, traceback below."""

    def __init__(self, *, has_colour: bool) -> None:
        super().__init__()
        self._has_colour = has_colour

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; what clients said can't move the cursor."""
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = f"{record.levelname:<7}"
        if self._has_colour and record.levelno in _COLOURS:
            level = f"\x1b[{_COLOURS[record.levelno]}m{level}\x1b[0m"
        name = "" if record.name.startswith("clevrd.") else f" logger={record.name}"
        lines = [f"{at} {level} {record.getMessage().translate(ESCAPES)}{name}"]
        if record.exc_info and record.exc_info[0] is not None:
            trace = self.formatException(record.exc_info).split("\n")
            lines += [f"    {line.translate(ESCAPES)}" for line in trace]
        return "\n".join(lines)


# SGR of ECMA-48 §8.3.117: faint, yellow, red.
_COLOURS: Final = {
    logging.DEBUG: 2,
    logging.WARNING: 33,
    logging.ERROR: 31,
    logging.CRITICAL: 31,
}


class CommandFormatter(logging.Formatter):
    """Renders an event as a line of a command, without time and level."""

    def __init__(self) -> None:
        super().__init__("clevrd: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; newlines of a traceback in it are escaped."""
        return super().format(record).translate(ESCAPES)


class LinesHandler(logging.Handler):
    """Hands each event to ``lines``, as its formatter renders it."""

    def __init__(self, lines: Lines, formatter: logging.Formatter) -> None:
        super().__init__()
        self._lines = lines
        self.setFormatter(formatter)
        lines.note = self._note

    def emit(self, record: logging.LogRecord) -> None:
        """Put the event's line; if formatting fails, put a line that says where it came from.

        It raises nothing: an event may be logged amid the mending of what went wrong.
        """
        try:
            try:
                line = self.format(record)
            except Exception as error:
                line = self.format(_unreadable(record, error))
            self._lines.put(line)
        except Exception:  # memory has run out
            self._lines.unmade += 1

    def flush(self) -> None:
        """Wait for queued lines, FLUSH_S at most; `logging.shutdown` calls this at exit."""
        self._lines.flush(FLUSH_S)

    def _note(self, count: int) -> str:
        fields = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
        text = f"log lines dropped count={count}; nobody read them or they could not be written"
        return self.format(logging.makeLogRecord({**fields, "msg": text}))


def _unreadable(record: logging.LogRecord, error: Exception) -> logging.LogRecord:
    """Return an event in place of one whose values don't fit its text."""
    text = f"log line can't be made at={record.filename}:{record.lineno} why={error!r}"
    fields = {"name": __name__, "levelno": logging.ERROR, "levelname": "ERROR", "msg": text}
    return logging.makeLogRecord(fields)


# Takes all lines of this process for standard error; its thread starts with the first line.
stderr: Final = Lines(STDERR, lambda count: f"clevrd: {count} lines dropped, nobody took them")


def set_up_logging(level: str, formatter: logging.Formatter) -> None:
    """Log events of ``level`` and above to standard error."""
    _log_with(formatter, level.upper())


def log_for_people() -> None:
    """Show the client's warnings in the same form as a command's other lines."""
    _log_with(CommandFormatter(), "WARNING")


def _log_with(formatter: logging.Formatter, level: str) -> None:
    handler = LinesHandler(stderr, formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)


def log_what_python_says() -> None:
    """Log warnings and uncaught errors, which Python would write itself, blocking."""
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log.critical("ended by an error", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(failed: threading.ExceptHookArgs) -> None:
    name = failed.thread.name if failed.thread else ""
    log.error("thread ended by an error thread=%s", name, exc_info=failed.exc_value)


def _log_unraisable(failed: Any) -> None:
    log.error(
        "error where nothing can be raised in=%.200r", failed.object, exc_info=failed.exc_value
    )


def is_terminal() -> bool:
    """Say whether standard error is a terminal."""
    with suppress(OSError):
        return os.isatty(STDERR)
    return False


def is_journal(environ: Mapping[str, str]) -> bool:
    """Say whether standard error goes to journald, which has its own timestamps.

    The variable alone proves nothing, since children inherit it: systemd.exec(5) tells to compare
    device and inode.
    """
    with suppress(OSError):
        stat = os.fstat(STDERR)
        return environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"
    return False


# --- what commands say ---------------------------------------------------------------------------


def say(text: str, *, is_failure: bool = False) -> None:
    """Write each line of ``text`` to standard error, with the program's name in front.

    Args:
        is_failure: journald is told that it is an error.
    """
    start = ""
    if is_failure and is_journal(os.environ):
        start = f"<{SEVERITIES[logging.ERROR]}>"
    for line in text.split("\n"):
        stderr.put(f"{start}clevrd: {line.translate(ESCAPES)}")
