"""An estimate as a table on stdout, with what it is based on."""

from __future__ import annotations

import rich.console
from rich.table import Table
from rich.text import Text

from pipeline.accounting.estimate import Costs, Estimate, Figures, Row, Sum
from pipeline.cli.progress import limit_prefix
from pipeline.core import money
from pipeline.core.text import escape

_UNKNOWN = "–"


def show(terminal: rich.console.Console, estimate: Estimate) -> None:
    """Print what a run would send and cost, and what that is based on."""
    if estimate.rows:
        terminal.print(_costs(estimate))
    lines = [Text(_basis(row)) for row in estimate.rows]
    lines += [Text(line) for line in _batch_savings(estimate)]
    lines += [Text(f"! {note}", style="yellow") for note in estimate.notes]
    lines.append(Text(_lines(estimate)))
    for line in lines:
        # A terminal wraps between words; elsewhere a line stays one line, whatever its length.
        terminal.print(line, soft_wrap=not terminal.is_terminal)


def _batch_savings(estimate: Estimate) -> list[str]:
    """Return a line about what batches would save, if that is known."""
    live = estimate.total.live.expected.amount
    batch = estimate.total.batch.expected.amount
    if not live or batch is None or batch >= live:
        return []
    share = 1 - batch / live
    return [f"--lane batch saves {money.text(live - batch)} ({share:.0%}); batches take up to a day"]


def _lines(estimate: Estimate) -> str:
    """Return e.g. `6,000 lines: 5,970 to send, 30 already done in answers.jsonl`."""
    parts = [f"{estimate.total.requests:,} to send"]
    if estimate.done:
        parts.append(f"{estimate.done:,} already done in {escape(estimate.results_file)}")
    if estimate.invalid:
        parts.append(f"{estimate.invalid:,} invalid (see pipeline check)")
    return f"{estimate.lines:,} lines: {', '.join(parts)}"


def _costs(estimate: Estimate) -> Table:
    """Return a table with two rows for each model, what is expected and the maximum, and the total."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for name in ("requests", "input", "output", "live", "batch", "minutes"):
        table.add_column(name, justify="right")
    for row in estimate.rows:
        label = Text(escape(f"{row.provider}/{row.model}", 60))
        _add_rows(table, label, row.figures, row.pace.minutes if row.pace else None)
    # The total of one row would repeat it.
    if len(estimate.rows) > 1:
        _add_rows(table, Text("total", style="bold"), estimate.total, estimate.minutes)
    return table


def _add_rows(table: Table, label: Text, sums: Figures, minutes: float | None) -> None:
    table.add_row(
        label,
        f"{sums.requests:,}",
        f"{sums.input_tokens:,}",
        _known(sums.output_expected, f"{sums.output_expected.known:,}"),
        _dollars(sums.live, sums.live.expected),
        _dollars(sums.batch, sums.batch.expected),
        _UNKNOWN if minutes is None else f"{minutes:,.1f}",
    )
    # A line without max_tokens may have a response of any length.
    at_most = ["no bound"]
    if sums.is_bounded:
        at_most = [
            f"{sums.output_at_most.known:,}",
            _dollars(sums.live, sums.live.at_most),
            _dollars(sums.batch, sums.batch.at_most),
        ]
    table.add_row(Text("  at most", style="dim"), "", "", *at_most)


def _dollars(costs: Costs, amount: Sum) -> str:
    """Return an amount; an unknown price is named, to tell it from an unknown length of responses."""
    if amount.amount is None and costs.unpriced == amount.missing:
        return "no price known"
    return _known(amount, money.text(amount.known))


def _known(amount: Sum, known: str) -> str:
    """Return the known part of a sum, marked if some of it is unknown."""
    if amount.amount is None:
        return _UNKNOWN
    return f"{known} + ?" if amount.missing else known


def _basis(row: Row) -> str:
    """Return what the numbers of a model are based on."""
    parts = [escape(row.basis)]
    if row.input_ratio is not None:
        parts.append(f"input as estimated × {row.input_ratio:.2f}")
    if row.pace:
        limit = row.pace.limit
        rate = f"{limit_prefix(limit)}{limit.per_minute:,.0f} {limit.kind.replace('_', ' ')}/min"
        parts.append(f"{row.pace.minutes:,.1f} minutes at {rate}")
    return f"{escape(f'{row.provider}/{row.model}', 60)}: {'; '.join(parts)}"
