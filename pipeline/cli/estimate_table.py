"""The estimate as a table, and how it was reckoned; to stdout, as it is what was asked for."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.accounting.estimate import Costs, Estimate, Figures, Row, Sum
from pipeline.cli.events import mark
from pipeline.core import money, text

_UNKNOWN = "–"


def show(console: Console, estimate: Estimate) -> None:
    """Print what a run would send and cost, and how that was reckoned."""
    if estimate.rows:
        console.print(_costs(estimate))
    for row in estimate.rows:
        console.print(Text(_reckoning(row)), soft_wrap=True)
    live, batch = estimate.total.live.expected, estimate.total.batch.expected
    if live.amount and batch.amount is not None and batch.amount < live.amount:
        saved = f"{money.text(live.amount - batch.amount)} ({1 - batch.amount / live.amount:.0%})"
        console.print(Text(f"--lane batch saves {saved}; batches take up to a day"), soft_wrap=True)
    for note in estimate.notes:
        console.print(Text(f"! {note}", style="yellow"), soft_wrap=True)
    parts = [f"{estimate.total.requests:,} to send"]
    parts += [f"{estimate.done:,} done already in {text.escape(estimate.results_file)}"] if estimate.done else []
    parts += [f"{estimate.invalid:,} invalid (pipeline check tells which)"] if estimate.invalid else []
    console.print(Text(f"{estimate.lines:,} lines: {', '.join(parts)}"), soft_wrap=True)


def _costs(estimate: Estimate) -> Table:
    """Draw two lines for each model, what is expected and what it can be at most, and the total."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for name in ("requests", "input", "output", "live", "batch", "minutes"):
        table.add_column(name, justify="right")
    for row in estimate.rows:
        label = Text(text.escape(f"{row.provider}/{row.model}", 60))
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
        _UNKNOWN if minutes is None else f"{minutes:,.1f}",
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
    return _known(sum_, money.text(sum_.known))


def _known(sum_: Sum, known: str) -> str:
    """Return what is known of a sum, marked where it is not all."""
    if sum_.amount is None:
        return _UNKNOWN
    return f"{known} + ?" if sum_.missing else known


def _reckoning(row: Row) -> str:
    """Say where the numbers of a model come from."""
    parts = [text.escape(row.basis)]
    if row.input_ratio is not None:
        parts.append(f"input as estimated × {row.input_ratio:.2f}")
    if row.pace:
        limit = row.pace.limit
        pace = f"{mark(limit)}{limit.per_minute:,.0f} {limit.kind.replace('_', ' ')}/min"
        parts.append(f"{row.pace.minutes:,.1f} minutes at {pace}")
    return f"{text.escape(f'{row.provider}/{row.model}', 60)}: {'; '.join(parts)}"
