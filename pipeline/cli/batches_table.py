"""Batches as a table on stdout."""

from __future__ import annotations

from collections.abc import Sequence

import rich.console
from rich.table import Table
from rich.text import Text

from pipeline.core import money
from pipeline.core.text import escape
from pipeline.dispatch.batch.manage import Listed
from pipeline.dispatch.batch.store import BatchRecord

_UNKNOWN = "–"
_MAX_WIDTH = 100_000  # columns; rich measures nothing wider than the options say


def show(terminal: rich.console.Console, batches: Sequence[Listed]) -> None:
    """Print one row per batch; on a terminal too narrow for the table, a few lines per batch."""
    table = _table(batches)
    unlimited = terminal.options.update(width=_MAX_WIDTH)
    if terminal.measure(table, options=unlimited).maximum <= terminal.width:
        terminal.print(table)
        return
    # A folded table would break ids, which users copy into other commands.
    for each in batches:
        for line in _lines(each):
            terminal.print(Text(line), soft_wrap=True)


def _table(batches: Sequence[Listed]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("batch", "model", "status", "created"):
        table.add_column(name, no_wrap=True)
    for name in ("requests", "answered", "failed", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("results", no_wrap=True)
    for each in batches:
        batch = each.record
        table.add_row(
            Text(escape(batch.name)),
            Text(escape(batch.group, 60)),
            Text(_status(batch)),
            Text(escape(batch.created_at or batch.at)),
            f"{batch.requests:,}",
            _count(batch.succeeded),
            _count(batch.failed),
            _cost(batch),
            Text(escape(each.results_file)),
        )
    return table


def _lines(each: Listed) -> list[str]:
    """Return the row of a batch as lines."""
    batch = each.record
    counts = f"{batch.requests:,} requests, {_count(batch.succeeded)} answered, {_count(batch.failed)} failed"
    return [
        f"{escape(batch.name)}: {_status(batch)}",
        f"  {escape(batch.group, 60)}, created {escape(batch.created_at or batch.at)}",
        f"  {counts}, cost {_cost(batch)}",
        f"  {escape(each.results_file)}",
    ]


def _count(count: int | None) -> str:
    return _UNKNOWN if count is None else f"{count:,}"


def _status(batch: BatchRecord) -> str:
    """Return the provider's status and, where it differs, how far we are with the batch."""
    status = escape(batch.status or batch.step.value, 40)
    if batch.is_open:
        # The call that created it got no response: a batch like it was found, and may be another program's.
        return status if batch.is_confirmed else f"{status}, not confirmed as ours"
    if status == batch.step.value:
        return status
    return f"{status}, {batch.step.value}"


def _cost(batch: BatchRecord) -> str:
    if batch.is_open:
        return _UNKNOWN
    cost = money.text(batch.cost_nano)
    return f"{cost} + ?" if batch.unpriced else cost
