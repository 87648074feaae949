"""Ledgers and reports to test with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from pipeline.accounting.ledger import Entry, RunRow
from pipeline.accounting.report.costs import CostReport, Period, build_cost_report

TODAY = date(2026, 11, 26)

# Each would act if it were taken for markup, script, formula, escape sequence, query or metric instead of text.
HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"' onmouseover='document.title=1' x=\"",
    "javascript:document.title='owned'",
    '=HYPERLINK("http://example.com","x")',
    "<!--<script ",
    "</script x='",
    "\x1b]0;owned\x07\u202egpt",
    'a\\"b\nc{x="1"} 7',
)


def run(run_id: str = "run-1", **values: Any) -> RunRow:
    given = {"run_id": run_id, "started_at": "2026-11-26T01:00:00Z", "status": "completed", "exit_code": 0}
    return RunRow(**{**given, **values})


def entry(day: str = "2026-11-26", model: str = "gpt-6-luna", provider: str = "openai", **values: Any) -> Entry:
    return Entry(day=day, provider=provider, model=model, **values)


def report(
    entries: Mapping[str, Sequence[Entry]],
    runs: Sequence[RunRow] | None = None,
    *,
    by: str = "model",
    since: date | None = None,
    until: date = TODAY,
    has_simulated: bool = False,
) -> CostReport:
    return build_cost_report(
        entries,
        [run(run_id) for run_id in entries] if runs is None else runs,
        by=by,
        period=Period(since=since, until=until),
        generated_at="2026-11-26T12:00:00Z",
        has_simulated=has_simulated,
    )


def two_months(*, by: str = "model", models: Sequence[str] = ()) -> CostReport:
    """Return a report of 60 days and six models (or these), with the 60 days before to compare with."""
    names = models or ("haiku", "sonnet", "opus", "luna", "sol", "mini")
    entries = {
        f"run-{ago:03}": [
            entry(
                (TODAY - timedelta(days=ago)).isoformat(),
                name,
                "anthropic",
                requests=101 + place,
                succeeded=100 + place,
                failed=1,
                attempts=110 + place,
                rate_limited=4,
                failed_attempts=5,
                unknown=ago % 3,
                input_tokens=50_000 + 1_000 * ago,
                output_tokens=20_000,
                cache_read_tokens=300 * ago,
                reasoning_tokens=5_000,
                cost_nano=(place + 1) * 10**8 * (3 + ago % 7),
                wasted_nano=10**6 * (ago % 5),
                saved_nano=10**7,
            )
            for place, name in enumerate(names)
        ]
        for ago in range(120)
    }
    runs = [run(run_id, tags={"team": "search"}) for run_id in entries]
    return report(entries, runs, by=by, since=TODAY - timedelta(days=59))
