"""The report as one JSON object."""

from __future__ import annotations

import orjson

from pipeline.accounting.report.costs import CostReport


def render(report: CostReport) -> bytes:
    """Return the object, indented, with its line end; an unknown cost is null."""
    previous = report.period.previous()
    value = {
        "by": report.by,
        "since": report.period.since,
        "until": report.period.until,
        "previous": previous and {"since": previous.since, "until": previous.until},
        "generated_at": report.generated_at,
        "simulated_included": report.has_simulated,
        "rows": [row.as_dict() for row in report.rows],
        "total": report.total.as_dict(),
    }
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
