"""The ledger -> costs by time, model, provider, lane, tag or run, as table, JSON, CSV, page or metrics.

`costs` sums, one module for each form writes, and all of them are pure; here the ledger is read and files are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from pipeline.accounting import rebuild as rebuilding
from pipeline.accounting.ledger import Ledger
from pipeline.accounting.rebuild import Rebuilt
from pipeline.accounting.report import csv, html, json, prometheus, table
from pipeline.accounting.report.costs import CostReport, build_cost_report, key_of, to_period
from pipeline.core.errors import UsageError
from pipeline.core.files import write_file

_FORMS = {"json": json.render, "csv": csv.render, "html": html.render, "prometheus": prometheus.render}


def load(
    path: Path,
    *,
    form: str,
    by: str,
    since: str | None,
    until: str | None,
    now: datetime,
    include_simulated: bool = False,
) -> CostReport:
    """Read a ledger and put together what a report of this form holds."""
    by = by.encode("utf-8", "backslashreplace").decode()  # as the ledger holds tags that are not UTF-8
    key_of(by)
    if form == "prometheus" and (since or until):
        raise UsageError(
            "metrics count from the beginning, and --since or --until would make counters fall; leave them out"
        )
    if not path.exists():
        hint = "runs write it; another one is named by --ledger or PIPELINE_LEDGER; --rebuild makes it from results"
        raise UsageError(f"there is no ledger at {str(path)!r}: nothing was recorded yet", hint=hint)
    period = to_period(since, until, now.date())
    with Ledger.open(path) as ledger:
        return build_cost_report(
            ledger.entries(since=period.loaded_since(by), until=period.until, include_simulated=include_simulated),
            ledger.runs(include_simulated=include_simulated),
            by=by,
            period=period,
            generated_at=f"{now:%Y-%m-%dT%H:%M:%SZ}",
            has_simulated=include_simulated,
        )


def render(report: CostReport, form: str, *, width: int, is_colored: bool) -> bytes:
    """Return a report in its form; width and colours are those of the table."""
    if form == "table":
        return table.render(report, width=width, is_colored=is_colored)
    return _FORMS[form](report)


def write(path: Path, content: bytes, *, form: str, ledger: Path) -> None:
    """Write a report so that it is there whole or not at all; others may read metrics, as node_exporter must."""
    if path.exists() and (not path.is_file() or (ledger.exists() and path.samefile(ledger))):
        raise UsageError(f"-o {str(path)!r} is not a file that a report may replace; choose another -o")
    write_file(path, content, mode=0o644 if form == "prometheus" else 0o600)


def rebuild(path: Path, files: Sequence[Path]) -> Rebuilt:
    """Make the ledger agree with these result files; what it holds of other runs stays."""
    with Ledger.open(path) as ledger:
        return rebuilding.rebuild(ledger, files)
