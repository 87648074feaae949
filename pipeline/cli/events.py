"""What is told while a run goes on and when it has ended: to people as text, to what reads logs as JSON lines.

Everything here goes to stderr by way of one method, `Screen.tell`: every text passes `safe.text` there, and rich's
markup is never parsed. On a terminal a bar shows the progress, elsewhere a line a minute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import anyio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.core import clock, money
from pipeline.core import text as safe

if TYPE_CHECKING:  # so that telling an error does not load the whole program
    from pipeline.core.types import Allowance
    from pipeline.dispatch.batch.store import BatchRecord
    from pipeline.dispatch.live.model_queue import Statistics
    from pipeline.results.attempt_log import LoggedCall
    from pipeline.runner.base import Progress, Watch
    from pipeline.runner.summary import Summary

    Get = Callable[[], Progress]

LOG_SECONDS = 60.0
_REFRESH_SECONDS = 0.25
_WINDOW_SECONDS = 10.0
_SHOWN_LANES = 6
_SHOWN_CHARACTERS = 2_000
_LONGEST_COMMAND = 2_000_000

Event = Literal["message", "progress", "failure", "warning", "summary", "stopped", "resume", "error", "hint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """How an event is told: its level in JSON; what stands before it, and its colour, in text."""

    level: Literal["info", "warning", "error"] = "info"
    mark: str = ""
    style: str = ""


_LOOKS: dict[Event, _Look] = {
    "message": _Look(),
    "progress": _Look(),
    "failure": _Look(level="warning", mark="✗ ", style="red"),
    "warning": _Look(level="warning", mark="! ", style="yellow"),
    "summary": _Look(),
    "stopped": _Look(level="error", mark="stopped: ", style="bold red"),
    "resume": _Look(mark="to go on: "),
    "error": _Look(level="error", mark="error: "),
    "hint": _Look(level="error", mark="hint: "),
}


class Screen:
    """Where events are told: as lines of text, or as JSON objects, one a line; when quiet, errors only."""

    def __init__(self, console: Console, *, is_json: bool = False, is_quiet: bool = False) -> None:
        self._console = console
        self._is_json = is_json
        self._is_quiet = is_quiet

    def tell(self, event: Event, text: str, *, table: Table | None = None, **fields: Any) -> None:
        """Tell what happened. `fields` say it in numbers and are for JSON only, `table` is for text only.

        JSON is pure ASCII: no locale can break it, and nothing in a field can act on the terminal of who reads it.
        """
        look = _LOOKS[event]
        if self._is_quiet and look.level != "error":
            return
        shown = safe.escape(
            text, len(text) * 10 if event == "resume" else _SHOWN_CHARACTERS
        )  # a command is whole or useless
        if self._is_json:
            time = f"{clock.utc_now():%Y-%m-%dT%H:%M:%SZ}"
            head = {"time": time, "level": look.level, "event": event, "message": shown}
            self._print(json.dumps(head | fields, default=str))
            return
        if table:
            self._console.print(table)
        self._print(look.mark + shown, look.style)

    def watcher(self, mode: str) -> Watch | None:
        """Return what tells the progress of a run: `bar`, `log`, `none`, or `auto` (bar on a terminal, else log)."""
        if self._is_quiet or mode == "none":
            return None
        if not self._is_json and (mode == "bar" or (mode == "auto" and self._console.is_terminal)):
            return _Bar(self._console).watch
        return _Log(self).watch

    def _print(self, line: str, style: str = "") -> None:
        self._console.print(Text(line, style=style), soft_wrap=True)


@dataclass(frozen=True, slots=True)
class _Pace:
    """Requests and tokens finished per second, lately."""

    requests: float
    tokens: float


class _Meter:
    """Reckons the pace over the last seconds."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int, int]] = []

    def pace(self, progress: Progress) -> _Pace:
        now = progress.elapsed_s
        self._samples.append((now, progress.run.finished, progress.run.tokens.input + progress.run.tokens.output))
        while len(self._samples) > 2 and self._samples[0][0] < now - _WINDOW_SECONDS:
            self._samples.pop(0)
        (then, requests, tokens), (_, requests_now, tokens_now) = self._samples[0], self._samples[-1]
        seconds = max(now - then, 1e-9)
        if len(self._samples) < 2:
            return _Pace(0.0, 0.0)
        return _Pace((requests_now - requests) / seconds, (tokens_now - tokens) / seconds)


class _Bar:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._meter = _Meter()

    async def watch(self, get: Get) -> None:
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(self._draw(get()), refresh=True)
                await anyio.sleep(_REFRESH_SECONDS)

    def _draw(self, progress: Progress) -> RenderableType:
        pace = self._meter.pace(progress)
        done = progress.run.finished + progress.reused
        total = progress.total
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(ratio=1)
        head.add_column(justify="right")
        head.add_row(
            ProgressBar(total=total or progress.read or 1, completed=done, pulse=total is None and not done),
            Text(f"{done:,} of {progress.read:,}{'' if total is not None else '+'}"),
        )
        return Group(
            head, Text(_facts(progress, pace)), *(Text(f"  {line}", style="yellow") for line in _waits(progress))
        )


class _Log:
    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._meter = _Meter()

    async def watch(self, get: Get) -> None:
        self._meter.pace(get())
        while True:
            await anyio.sleep(LOG_SECONDS)
            progress = get()
            pace = self._meter.pace(progress)
            done = progress.run.finished + progress.reused
            of = f"{progress.read:,}{'' if progress.total is not None else '+'}"
            text = "; ".join([f"{done:,} of {of}", _facts(progress, pace), *_waits(progress)])
            self._screen.tell("progress", text, **_numbers(progress, pace))


def _numbers(progress: Progress, pace: _Pace) -> dict[str, Any]:
    """Return the progress as fields; `total` is null until the whole input was read."""
    sender = progress.sender
    return {
        "elapsed_s": round(progress.elapsed_s, 3),
        "read": progress.read,
        "total": progress.total,
        "reused": progress.reused,
        "succeeded": progress.run.succeeded,
        "failed": progress.run.failed,
        "invalid": progress.run.invalid,
        "retrying": sum(lane.retrying for lane in sender.lanes),
        "in_flight": sender.in_flight,
        "rate_limited": sender.rate_limited,
        "requests_per_s": round(pace.requests, 3),
        "tokens_per_s": round(pace.tokens, 3),
        "tokens": progress.run.tokens.as_dict(),
        "is_draining": progress.is_draining,
        "lanes": [asdict(lane) for lane in sender.lanes],
        "batches": [chunk.as_dict() for chunk in progress.batches if chunk.is_open],
    }


def _facts(progress: Progress, pace: _Pace) -> str:
    """Return one line: outcomes, pace, what is open."""
    sender = progress.sender
    retrying = sum(lane.retrying for lane in sender.lanes)
    facts = [
        f"{progress.run.failed + progress.run.invalid:,} failed",
        f"{retrying:,} retrying",
        f"{pace.requests:,.1f} req/s",
        f"{pace.tokens:,.0f} tok/s",
        f"{sender.in_flight:,} in flight",
    ]
    if sender.rate_limited:
        facts.append(f"{sender.rate_limited:,} × 429")
    if progress.total is not None and pace.requests:
        left = progress.total - progress.reused - progress.run.finished
        facts.append(f"ETA {timedelta(seconds=round(left / pace.requests))}")
    if progress.is_draining:
        facts.append("finishing what is in flight")
    return " · ".join(facts)


def _waits(progress: Progress) -> list[str]:
    """Say of each model what it is waiting for, what its limits are and how far they are used; then of each batch."""
    lines = [_lane(lane) for lane in progress.sender.lanes if lane.ended or lane.waiting or lane.in_flight]
    lines += [_batch(chunk) for chunk in progress.batches if chunk.is_open]
    hidden = len(lines) - _SHOWN_LANES
    return [*lines[:_SHOWN_LANES], f"and {hidden:,} more"] if hidden > 0 else lines


def _batch(chunk: BatchRecord) -> str:
    """Return e.g. `openai/gpt-6-luna: batch batch_67f: in_progress, 1,200 of 50,000 answered, 3 failed`."""
    name = safe.escape(chunk.group, 60)
    if chunk.batch_id is None:
        return f"{name}: {chunk.requests:,} requests on their way to a batch: {chunk.step.value}"
    answered = "" if chunk.succeeded is None else f"{chunk.succeeded:,} of "
    parts = [safe.escape(chunk.status, 40), f"{answered}{chunk.requests:,}{' answered' if answered else ' requests'}"]
    parts += [f"{chunk.failed:,} failed"] if chunk.failed else []
    return f"{name}: batch {safe.escape(chunk.batch_id, 80)}: {', '.join(parts)}"


def _lane(lane: Statistics) -> str:
    name = safe.escape(f"{lane.provider}/{lane.model}", 60)
    if lane.ended:
        return f"{name}: given up: {safe.escape(lane.ended, 160)}"
    parts = [f"{lane.in_flight:,} of {lane.window:,} in flight"]
    parts += [
        _allowance(allowance) for allowance in lane.allowances if allowance.source != "told" or allowance.used > 0.01
    ]
    if lane.rate_limited:
        parts.append(f"{lane.rate_limited:,} × 429")
    if lane.cooldown_s:
        parts.append(f"waits {lane.cooldown_s:,.0f} s: {safe.escape(lane.trouble or 'rate limit', 80)}")
    elif lane.waiting_for:
        parts.append(f"waits for {lane.waiting_for}")
    return f"{name}: {', '.join(parts)}"


def _allowance(allowance: Allowance) -> str:
    """Return e.g. `requests 98 % of 1,000/min`."""
    kind = allowance.kind.replace("_", " ")
    return f"{kind} {allowance.used:.0%} of {mark(allowance)}{allowance.per_minute:,.0f}/min"


def mark(allowance: Allowance) -> str:
    """Return what stands before a limit: `~` before one that was found out, `your` before a cap."""
    return {"cap": "your ", "found": "~"}.get(allowance.source, "")


def show_summary(screen: Screen, summary: Summary, command: str | None) -> None:
    """Tell what a run did, on one screen; `command` is how to go on where that is possible."""
    for line in summary.failures:
        screen.tell("failure", safe.escape(line, 300))
    hidden = summary.run.failed + summary.run.invalid - len(summary.failures)
    if hidden > 0:
        screen.tell("failure", f'… and {hidden:,} more; they are in the results with "success":false', hidden=hidden)
    if summary.possibly_billed:
        screen.tell("warning", _possibly_billed(summary.possibly_billed))
    table = _models(summary) if summary.run.finished else None
    screen.tell("summary", _outcome(summary), table=table, **summary.as_dict())
    if summary.stop_reason:
        screen.tell("stopped", summary.stop_reason)
    if command:
        screen.tell("resume", command)


def _possibly_billed(calls: Sequence[LoggedCall]) -> str:
    """Say what calls without an answer may cost."""
    tokens = sum(call.input_tokens for call in calls)
    return (
        f"{len(calls):,} call(s) were in flight when a run was stopped and may be billed without an answer, about "
        f"{tokens:,} tokens in; they are sent again and listed in *.usage.json as possibly_billed"
    )


def _models(summary: Summary) -> Table:
    """Draw one line for each model and, where not all went live, lane."""
    rows = summary.run.by_model()
    has_lanes = any(row["lane"] != "live" for row in rows)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    if has_lanes:
        table.add_column("lane")
    for name in ("requests", "input", "cached", "output", "cost"):
        table.add_column(name, justify="right")
    for row in rows:
        tokens = row["tokens"]
        table.add_row(
            Text(safe.escape(f"{row['provider']}/{row['model']}", 60)),
            *([Text(safe.escape(row["lane"], 20))] if has_lanes else []),
            *(f"{n:,}" for n in (row["requests"], tokens["input"], tokens["cache_read"], tokens["output"])),
            _dollars(row["cost"]),
        )
    return table


def _money(summary: Summary) -> str:
    """Say what the run cost, what is known of waste and savings, and how much of the cap is used."""
    spending = summary.run.spending
    details = []
    if summary.cap is not None:
        details.append(f"{money.text(summary.cap_used)} of {money.text(summary.cap)} of the budget used")
    details += [f"{money.text(spending.wasted)} for answers that could not be used"] if spending.wasted else []
    details += [f"{money.text(spending.saved)} saved by the cache"] if spending.saved else []
    details += [f"{spending.unpriced:,} calls have no known price"] if spending.unpriced else []
    return _dollars(spending.usd) + (f" ({', '.join(details)})" if details else "")


def _dollars(amount: float | None) -> str:
    """Return dollars for people; a price that nobody knows is a question."""
    return "$ ?" if amount is None else money.text(round(amount * money.NANO))


def _outcome(summary: Summary) -> str:
    """Return the sentences at the end: lines, tokens, attempts, files."""
    run, attempts = summary.run, summary.attempts
    if summary.status == "completed" and summary.reused == summary.total and not run.finished:
        failed = summary.results.failed + summary.results.invalid
        hint = f", {failed:,} of them failures (--retry-failed sends them again)" if failed else ""
        return f"nothing to do: all {summary.total:,} lines have results in {safe.escape(summary.results_file)}{hint}"
    parts = [f"{run.succeeded:,} answered"]
    parts += [f"{count:,} {name}" for count, name in ((run.failed, "failed"), (run.invalid, "invalid")) if count]
    parts += [f"{summary.reused:,} already done"] if summary.reused else []
    parts += [f"{summary.pending:,} pending"] if summary.pending else []
    lines = f"{summary.total:,} lines: {', '.join(parts)}, in {summary.wall_seconds:,.1f} s"
    calls = f"{attempts.total:,} calls"
    trouble = [
        f"{count:,} {name}"
        for count, name in (
            (attempts.rate_limited, "rate-limited"),
            (attempts.failed, "failed"),
            (attempts.unknown, "possibly billed without an answer"),
        )
        if count
    ]
    calls += f" ({', '.join(trouble)})" if trouble else ""
    tokens = f"{run.tokens.input:,} tokens in, {run.tokens.output:,} out; {_money(summary)}"
    kind = "; SIMULATED, nothing was sent to a provider" if summary.simulated else ""
    return f"{lines}; {tokens}; {calls}; results in {safe.escape(summary.results_file)}{kind}"
