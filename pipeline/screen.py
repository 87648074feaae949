"""What people see before a run, while it goes on and when it has ended: a bar on a terminal, a line a minute elsewhere.

What is shown of runs goes to stderr; every text from outside passes `safe.text`, and rich's markup is never parsed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import anyio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline import safe
from pipeline.estimating import Costs, Estimate, Figures, Row, Sum
from pipeline.job import Progress, Watch
from pipeline.lane import Statistics
from pipeline.limits import Allowance
from pipeline.report import figures
from pipeline.totals import Summary

LOG_SECONDS = 60.0
_REFRESH_SECONDS = 0.25
_WINDOW_SECONDS = 10.0
_SHOWN_LANES = 6

Get = Callable[[], Progress]


def watcher(console: Console, mode: str) -> Watch | None:
    """Return what shows the progress of a run: `bar`, `log`, `none`, or `auto` (bar on a terminal, else log)."""
    if mode == "auto":
        mode = "bar" if console.is_terminal else "log"
    return {"bar": _Bar(console).watch, "log": _Log(console).watch}.get(mode)


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
    def __init__(self, console: Console) -> None:
        self._console = console
        self._meter = _Meter()

    async def watch(self, get: Get) -> None:
        self._meter.pace(get())
        while True:
            await anyio.sleep(LOG_SECONDS)
            progress = get()
            done = progress.run.finished + progress.reused
            of = f"{progress.read:,}{'' if progress.total is not None else '+'}"
            parts = [f"{done:,} of {of}", _facts(progress, self._meter.pace(progress)), *_waits(progress)]
            self._console.print(Text("; ".join(parts)), soft_wrap=True)


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
    """Say of each model what it is waiting for, what its limits are and how far they are used."""
    lines = [_lane(lane) for lane in progress.sender.lanes if lane.ended or lane.waiting or lane.in_flight]
    return lines[:_SHOWN_LANES]


def _lane(lane: Statistics) -> str:
    name = safe.text(f"{lane.provider}/{lane.model}", 60)
    if lane.ended:
        return f"{name}: given up: {safe.text(lane.ended, 160)}"
    parts = [f"{lane.in_flight:,} of {lane.window:,} in flight"]
    parts += [
        _allowance(allowance) for allowance in lane.allowances if allowance.source != "told" or allowance.used > 0.01
    ]
    if lane.rate_limited:
        parts.append(f"{lane.rate_limited:,} × 429")
    if lane.cooldown_s:
        parts.append(f"waits {lane.cooldown_s:,.0f} s: {safe.text(lane.trouble or 'rate limit', 80)}")
    elif lane.waiting_for:
        parts.append(f"waits for {lane.waiting_for}")
    return f"{name}: {', '.join(parts)}"


def _allowance(allowance: Allowance) -> str:
    """Return e.g. `requests 98 % of 1,000/min`; `~` before a limit that was found out, `your` before a cap."""
    kind = allowance.kind.replace("_", " ")
    return f"{kind} {allowance.used:.0%} of {_mark(allowance)}{allowance.per_minute:,.0f}/min"


def _mark(allowance: Allowance) -> str:
    return {"cap": "your ", "found": "~"}.get(allowance.source, "")


def show_summary(console: Console, summary: Summary, command: str | None) -> None:
    """Print what a run did, on one screen; `command` is how to go on where that is possible."""
    for line in summary.failures:
        console.print(Text(f"✗ {safe.text(line, 300)}", style="red"), soft_wrap=True)
    failed = summary.run.failed + summary.run.invalid
    hidden = failed - len(summary.failures)
    if hidden > 0:
        console.print(Text(f'✗ … and {hidden:,} more; they are in the results with "success":false', style="red"))
    for warning in summary.warnings:
        console.print(Text(f"! {safe.text(warning)}", style="yellow"), soft_wrap=True)
    if summary.run.finished:
        console.print(_models(summary))
    console.print(Text(_outcome(summary)), soft_wrap=True)
    if summary.stop_reason:
        console.print(Text(f"stopped: {safe.text(summary.stop_reason)}", style="bold red"), soft_wrap=True)
    if command:
        console.print(Text(f"to go on: {safe.text(command)}"), soft_wrap=True)


def _models(summary: Summary) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for name in ("requests", "input", "cached", "output", "cost"):
        table.add_column(name, justify="right")
    for row in summary.run.by_model():
        tokens = row["tokens"]
        table.add_row(
            Text(safe.text(f"{row['provider']}/{row['model']}", 60)),
            *(f"{n:,}" for n in (row["requests"], tokens["input"], tokens["cache_read"], tokens["output"])),
            _dollars(row["cost"]),
        )
    return table


def _money(summary: Summary) -> str:
    """Say what the run cost, what is known of waste and savings, and how much of the cap is used."""
    spending = summary.run.spending
    details = [f"of at most {_dollars(summary.cap)}"] if summary.cap is not None else []
    details += [f"{_dollars(spending.wasted / 1e9)} for answers that could not be used"] if spending.wasted else []
    details += [f"{_dollars(spending.saved / 1e9)} saved by the cache"] if spending.saved else []
    details += [f"{spending.unpriced:,} calls have no known price"] if spending.unpriced else []
    return _dollars(spending.usd) + (f" ({', '.join(details)})" if details else "")


def _dollars(amount: float | None) -> str:
    """Return dollars for people: `$0.0042`, `$1,234.57`, `<$0.0001`; `$ ?` for a price that nobody knows."""
    if amount is None:
        return "$ ?"
    if 0 < abs(amount) < 0.0001:
        return "<$0.0001"
    return f"${amount:,.2f}" if abs(amount) >= 100 else f"${amount:,.4f}"


def _outcome(summary: Summary) -> str:
    """Return the sentences at the end: lines, tokens, attempts, files."""
    run, attempts = summary.run, summary.attempts
    if summary.reused == summary.total and not run.finished:
        failed = summary.results.failed + summary.results.invalid
        hint = f", {failed:,} of them failures (--retry-failed sends them again)" if failed else ""
        return f"nothing to do: all {summary.total:,} lines have results in {safe.text(summary.results_file)}{hint}"
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
    return f"{lines}; {tokens}; {calls}; results in {safe.text(summary.results_file)}{kind}"


# ── before a run ──────────────────────────────────────────────────────────────────────────────────────────────────


def show_estimate(console: Console, estimate: Estimate) -> None:
    """Print what a run would send and cost, and how that was reckoned."""
    if estimate.rows:
        console.print(_costs(estimate))
    for row in estimate.rows:
        console.print(Text(_reckoning(row)), soft_wrap=True)
    for note in estimate.notes:
        console.print(Text(f"! {note}", style="yellow"), soft_wrap=True)
    parts = [f"{estimate.total.requests:,} to send"]
    parts += [f"{estimate.done:,} done already in {safe.text(estimate.results_file)}"] if estimate.done else []
    parts += [f"{estimate.invalid:,} invalid (pipeline check tells which)"] if estimate.invalid else []
    console.print(Text(f"{estimate.lines:,} lines: {', '.join(parts)}"), soft_wrap=True)


def _costs(estimate: Estimate) -> Table:
    """Draw two lines for each model, what is expected and what it can be at most, and the total."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for name in ("requests", "input", "output", "live", "batch", "minutes"):
        table.add_column(name, justify="right")
    for row in estimate.rows:
        label = Text(safe.text(f"{row.provider}/{row.model}", 60))
        _add_lines(table, label, row.figures, row.pace.minutes if row.pace else None)
    if len(estimate.rows) > 1:
        _add_lines(table, Text("total", style="bold"), estimate.total, estimate.minutes)
    return table


def _add_lines(table: Table, label: Text, sums: Figures, minutes: float | None) -> None:
    table.add_row(
        label,
        f"{sums.requests:,}",
        f"{sums.input_tokens:,}",
        _known(sums.output_expected, f"{sums.output_expected.known:,}"),
        *(_dollars(costs, costs.expected) for costs in (sums.live, sums.batch)),
        figures.UNKNOWN if minutes is None else f"{minutes:,.1f}",
    )
    at_most = ["no bound"]
    if sums.is_bounded:
        costs = [_dollars(costs, costs.at_most) for costs in (sums.live, sums.batch)]
        at_most = [f"{sums.output_at_most.known:,}", *costs]
    table.add_row(Text("  at most", style="dim"), "", "", *at_most)


def _dollars(costs: Costs, sum_: Sum) -> str:
    """Return an amount; a price that nobody knows is told apart from a length that nobody knows."""
    if sum_.amount is None and costs.unpriced == sum_.missing:
        return "no price known"
    return _known(sum_, figures.money(sum_.known))


def _known(sum_: Sum, known: str) -> str:
    """Return what is known of a sum, marked where it is not all."""
    if sum_.amount is None:
        return figures.UNKNOWN
    return f"{known} + ?" if sum_.missing else known


def _reckoning(row: Row) -> str:
    """Say where the numbers of a model come from."""
    parts = [safe.text(row.basis)]
    if row.input_ratio is not None:
        parts.append(f"input as estimated × {row.input_ratio:.2f}")
    if row.pace:
        limit = row.pace.limit
        pace = f"{_mark(limit)}{limit.per_minute:,.0f} {limit.kind.replace('_', ' ')}/min"
        parts.append(f"{row.pace.minutes:,.1f} minutes at {pace}")
    return f"{safe.text(f'{row.provider}/{row.model}', 60)}: {'; '.join(parts)}"
