"""What the commands print: events on stderr, data on stdout, and errors with their exit code.

Every event goes through one method, `Console.emit`: it escapes control characters, and rich's markup is never parsed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal, NoReturn, cast

from pipeline.core.errors import PipelineError, StorageError

if TYPE_CHECKING:
    import rich.console
    from rich.table import Table

Event = Literal["message", "progress", "failure", "warning", "summary", "stopped", "resume", "error", "hint"]

_MAX_MESSAGE = 2_000  # characters; longer messages are cut
_PIPE_WIDTH = 1_000  # columns of a table on a stdout that is no terminal: wide enough that no line is folded


@dataclass(frozen=True, slots=True, kw_only=True)
class EventStyle:
    """How an event looks: its level in JSON; its prefix and colour in text."""

    level: Literal["info", "warning", "error"] = "info"
    prefix: str = ""
    style: str = ""


_STYLES: dict[Event, EventStyle] = {
    "message": EventStyle(),
    "progress": EventStyle(),
    "failure": EventStyle(level="warning", prefix="✗ ", style="red"),
    "warning": EventStyle(level="warning", prefix="! ", style="yellow"),
    "summary": EventStyle(),
    "stopped": EventStyle(level="error", prefix="stopped: ", style="bold red"),
    "resume": EventStyle(prefix="to continue: "),
    "error": EventStyle(level="error", prefix="error: "),
    "hint": EventStyle(level="error", prefix="hint: "),
}


class Console:
    """Prints events as text, or as JSON objects, one per line; when quiet, only errors."""

    def __init__(self, terminal: rich.console.Console, *, is_json: bool = False, is_quiet: bool = False) -> None:
        self.terminal = terminal
        self.is_json = is_json
        self.is_quiet = is_quiet

    def emit(self, event: Event, text: str, *, table: Table | None = None, **fields: Any) -> None:
        """Print what happened; JSON also gets `fields`, and text also gets `table`.

        JSON is pure ASCII: no locale can break it, and no field can send control characters to a reader's terminal.
        """
        from pipeline.core import clock
        from pipeline.core.text import escape

        style = _STYLES[event]
        if self.is_quiet and style.level != "error":
            return
        # A command that is cut is useless, so it is printed whole. An escape has up to ten characters.
        limit = len(text) * 10 if event == "resume" else _MAX_MESSAGE
        message = escape(text, limit)
        if self.is_json:
            time = f"{clock.utc_now():%Y-%m-%dT%H:%M:%SZ}"
            head = {"time": time, "level": style.level, "event": event, "message": message}
            self._print(json.dumps(head | fields, default=str))
            return
        if table:
            self.terminal.print(table)
        # A command that rich wraps could not be copied in one piece.
        self._print(style.prefix + message, style.style, wraps=event != "resume")

    def _print(self, line: str, style: str = "", *, wraps: bool = False) -> None:
        """Print a line; on a terminal it may wrap between words, elsewhere it stays one line."""
        self.terminal.print(
            line,
            style=style or None,
            soft_wrap=not (wraps and self.terminal.is_terminal),
            markup=False,
            emoji=False,
            highlight=False,
        )


def stderr_console(*, is_json: bool = False, is_quiet: bool = False) -> Console:
    """Return the console for events."""
    import rich.console

    file = cast(IO[str], UnbufferedStderr())
    terminal = rich.console.Console(file=file, highlight=False, markup=False, emoji=False)
    return Console(terminal, is_json=is_json, is_quiet=is_quiet)


def stdout_console() -> rich.console.Console:
    """Return the console for tables that a command was asked for."""
    import rich.console

    width = _PIPE_WIDTH
    if sys.stdout.isatty():
        width = shutil.get_terminal_size((120, 24)).columns
    return rich.console.Console(width=width, highlight=False, markup=False, emoji=False)


# ── data on stdout ────────────────────────────────────────────────────────────────────────────────────────────────


def print_json(objects: list[dict[str, Any]]) -> None:
    """Print JSON objects on stdout, one per line."""
    import orjson

    lines = [orjson.dumps(each, option=orjson.OPT_APPEND_NEWLINE) for each in objects]
    write_stdout(b"".join(lines))


def write_stdout(data: bytes) -> None:
    """Write to stdout without a buffer; `StorageError` when that fails.

    Python would try to write a buffer again when it exits, and change the exit code.
    """
    from pipeline.core import files

    try:
        files.write_all(sys.stdout.fileno(), data)
    except OSError as exc:
        raise StorageError(f"cannot write to standard output: {exc.strerror}") from exc


# ── errors and exit codes ─────────────────────────────────────────────────────────────────────────────────────────


def exit_with_errors(work: Callable[[], int], console: Console | None = None) -> NoReturn:
    """Do the work of a command and exit with the code it returns.

    A `PipelineError` is printed on the console (by default on stderr, as text) and exits with its own code.
    """
    try:
        sys.exit(work())
    except PipelineError as exc:
        # Only now: most commands never load rich for stderr.
        emit_error(console or stderr_console(), exc)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def emit_error(console: Console, error: PipelineError) -> None:
    """Print an error, line by line, and its hint."""
    for line in error.message.splitlines():
        console.emit("error", line, exit_code=error.exit_code)
    if error.hint:
        console.emit("hint", error.hint)


def exit_now(code: int) -> NoReturn:
    """Exit even if a thread still waits for input from a pipe; all results are on disk by now."""
    sys.stdout.flush()
    os._exit(code)


# ── standard streams ────────────────────────────────────────────────────────────────────────────────────────────────


class UnbufferedStderr:
    """stderr for a run that must continue when the log's disk is full, or its reader or the terminal is gone.

    Nothing is buffered: Python would try to write a buffer again when it exits, fail, and exit with 120.
    """

    def write(self, text: str) -> int:
        buffer = sys.stderr.buffer
        unbuffered = getattr(buffer, "raw", buffer)
        with suppress(OSError):
            unbuffered.write(text.encode(sys.stderr.encoding, "backslashreplace"))
        return len(text)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def open_missing_standard_streams() -> None:
    """Open /dev/null in place of a closed stdin, stdout or stderr.

    Otherwise the next file that is opened gets its number. If those are the results, whatever a library prints to
    stderr ends up in them.
    """
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        null = os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(null, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(null, "w", closefd=False)  # noqa: SIM115
