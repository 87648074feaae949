"""What a run did, on one screen when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from pipeline.core import money
from pipeline.core.text import escape

if TYPE_CHECKING:
    from pipeline.cli.console import Console
    from pipeline.results.attempt_log import LoggedCall
    from pipeline.runner.summary import Summary


def show_summary(console: Console, summary: Summary, resume_command: str | None) -> None:
    """Print failures, warnings, a table of models, the outcome, and how to continue where that is possible."""
    for line in summary.failures:
        console.emit("failure", escape(line, 300))
    # The summary keeps only the first few failures.
    hidden = summary.run.failed + summary.run.invalid - len(summary.failures)
    if hidden > 0:
        text = f'… and {hidden:,} more; they are in the results with "success":false'
        console.emit("failure", text, hidden=hidden)
    if summary.possibly_billed:
        console.emit("warning", _possibly_billed(summary.possibly_billed))
    table = _models(summary) if summary.run.finished else None
    console.emit("summary", _outcome(summary), table=table, **summary.as_dict())
    if summary.stop_reason:
        console.emit("stopped", summary.stop_reason)
    if resume_command:
        console.emit("resume", resume_command)


def _possibly_billed(calls: Sequence[LoggedCall]) -> str:
    """Return a warning about calls that may be billed although no response arrived."""
    tokens = sum(call.input_tokens for call in calls)
    return (
        f"{len(calls):,} call(s) were in flight when a run stopped and may be billed without a response, about "
        f"{tokens:,} input tokens; they are sent again and listed in *.usage.json as possibly_billed"
    )


def _models(summary: Summary) -> Table:
    """Return a table with one row per model and, unless all requests went live, per lane."""
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
        cells = [Text(escape(f"{row['provider']}/{row['model']}", 60))]
        if has_lanes:
            cells.append(Text(escape(row["lane"], 20)))
        counts = (row["requests"], tokens["input"], tokens["cache_read"], tokens["output"])
        table.add_row(*cells, *[f"{count:,}" for count in counts], _dollars(row["cost"]))
    return table


def _outcome(summary: Summary) -> str:
    """Return the sentence at the end: lines, tokens, cost, calls, files."""
    results_file = escape(summary.results_file)
    if summary.status == "completed" and summary.reused == summary.total and not summary.run.finished:
        failed = summary.results.failed + summary.results.invalid
        hint = f", {failed:,} of them failures (--retry-failed sends them again)" if failed else ""
        return f"nothing to do: all {summary.total:,} lines have results in {results_file}{hint}"
    parts = [
        _lines(summary),
        f"{summary.run.tokens.input:,} tokens in, {summary.run.tokens.output:,} out",
        _cost(summary),
        _calls(summary),
        f"results in {results_file}",
    ]
    if summary.simulated:
        parts.append("SIMULATED, nothing was sent to a provider")
    return "; ".join(parts)


def _lines(summary: Summary) -> str:
    run = summary.run
    # Lines that succeeded are always named, also when there are none.
    parts = [f"{run.succeeded:,} succeeded"]
    parts += _nonzero(
        (run.failed, "failed"),
        (run.invalid, "invalid"),
        (summary.reused, "already done"),
        (summary.pending, "pending"),
    )
    return f"{summary.total:,} lines: {', '.join(parts)}, in {summary.wall_seconds:,.1f} s"


def _calls(summary: Summary) -> str:
    attempts = summary.attempts
    problems = _nonzero(
        (attempts.rate_limited, "rate-limited"),
        (attempts.failed, "failed"),
        (attempts.unknown, "possibly billed without a response"),
    )
    return f"{attempts.total:,} calls{_in_brackets(problems)}"


def _cost(summary: Summary) -> str:
    """Return what the run cost, with the budget used, waste and savings where they are known."""
    spending = summary.run.spending
    details = []
    if summary.cap is not None:
        details.append(f"{money.text(summary.cap_used)} of {money.text(summary.cap)} of the budget used")
    if spending.wasted:
        details.append(f"{money.text(spending.wasted)} for responses that could not be used")
    if spending.saved:
        details.append(f"{money.text(spending.saved)} saved by the cache")
    if spending.unpriced:
        details.append(f"{spending.unpriced:,} calls have no known price")
    return _dollars(spending.usd) + _in_brackets(details)


def _nonzero(*counts: tuple[int, str]) -> list[str]:
    """Return e.g. `3 failed` for each count that is not zero."""
    return [f"{count:,} {name}" for count, name in counts if count]


def _in_brackets(parts: Sequence[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _dollars(amount: float | None) -> str:
    """Return an amount for people; `$ ?` for an unknown price."""
    return "$ ?" if amount is None else money.text(round(amount * money.NANO))
