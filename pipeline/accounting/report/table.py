"""The report as a table for a terminal, with bars."""

from __future__ import annotations

import io

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.accounting.report import formatting
from pipeline.accounting.report.costs import CostReport, Row
from pipeline.core import money, text

_WIDE = 100  # columns of a terminal from which there is room for all figures
_KEY_WIDTH = 48


def render(report: CostReport, *, width: int, is_colored: bool) -> bytes:
    """Return the lines to print; text from outside is harmless in them."""
    console = Console(
        file=io.StringIO(), width=width, force_terminal=is_colored, highlight=False, markup=False, emoji=False
    )
    console.print(Text(f"Costs by {text.escape(report.by)}, {formatting.period(report)}", style="bold"), soft_wrap=True)
    if report.rows:
        console.print(_table(report, is_wide=width >= _WIDE))
    comparison = formatting.comparison(report.total)
    for line in ([f"{formatting.cost(report.total)} in all, {comparison}"] if comparison else []) + formatting.caveats(
        report
    ):
        console.print(Text(line, style="dim"), soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().encode("utf-8", "backslashreplace")


def _table(report: CostReport, *, is_wide: bool) -> Table:
    bar_width = 12 if is_wide else 8
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_footer=True)
    table.add_column(text.escape(formatting.heading(report.by)), footer="total", overflow="fold", max_width=_KEY_WIDTH)
    table.add_column("cost", footer=formatting.cost(report.total), justify="right", no_wrap=True)
    table.add_column("", width=bar_width)
    has_comparison = any(row.previous_cost_nano is not None for row in (*report.rows, report.total))
    columns = _columns(report.total, is_wide=is_wide, has_comparison=has_comparison)
    for name, value in columns.items():
        table.add_column(name, footer=value, justify="right", no_wrap=True)
    most = max(row.cost_nano for row in report.rows)
    for row in report.rows:
        table.add_row(
            Text(text.escape(row.key, 200)),
            formatting.cost(row),
            Bar(most or 1, 0, row.cost_nano, width=bar_width, color="cyan"),
            *_columns(row, is_wide=is_wide, has_comparison=has_comparison).values(),
        )
    return table


def _columns(row: Row, *, is_wide: bool, has_comparison: bool) -> dict[str, str]:
    """Return the figures right of the bar, as many as there is room for."""
    columns = {"change": formatting.change(row)} if has_comparison else {}
    columns |= {"requests": f"{row.requests:,}", "failed": f"{row.failed:,}"}
    if not is_wide:
        return columns | {"tokens": formatting.short(row.total_tokens)}
    return columns | {
        "input": formatting.short(row.input_tokens),
        "output": formatting.short(row.output_tokens),
        "cached": formatting.share(row.cache_share),
        "per 1,000": formatting.cost_per_1000(row),
        "wasted": money.text(row.wasted_nano),
    }
