"""The providers' batches as a table; to stdout, as it is what was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.core import money, text
from pipeline.dispatch.batch.manage import Listed
from pipeline.dispatch.batch.store import BatchRecord


def show(console: Console, batches: Sequence[Listed]) -> None:
    """Print one line for each batch."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("batch", "model", "status", "created"):
        table.add_column(name, overflow="fold")
    for name in ("requests", "answered", "failed", "cost"):
        table.add_column(name, justify="right")
    table.add_column("results", overflow="fold")
    for each in batches:
        chunk = each.chunk
        table.add_row(
            Text(text.escape(chunk.name)),
            Text(text.escape(chunk.group, 60)),
            Text(_status(chunk)),
            Text(text.escape(chunk.created_at or chunk.at)),
            f"{chunk.requests:,}",
            *("–" if count is None else f"{count:,}" for count in (chunk.succeeded, chunk.failed)),
            _cost(chunk),
            Text(text.escape(each.results_file)),
        )
    console.print(table)


def _status(chunk: BatchRecord) -> str:
    """Return the provider's word and, where there is more to say, what became of the results."""
    word = text.escape(chunk.status or chunk.step.value, 40)
    if chunk.is_open:
        return word if chunk.is_confirmed else f"{word}, perhaps not ours"
    return f"{word}, {chunk.step.value}" if word != chunk.step.value else word


def _cost(chunk: BatchRecord) -> str:
    if chunk.is_open:
        return "–"
    return money.text(chunk.cost_nano) + (" + ?" if chunk.unpriced else "")
