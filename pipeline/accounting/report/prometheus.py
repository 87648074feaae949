"""The ledger as metrics for node_exporter's textfile collector (text exposition format 0.0.4).

All that was ever recorded, so that counters only grow; ask Prometheus for periods. The label `name` tells recurring
jobs apart: a run's tag `job`, else its results file (`job` itself is Prometheus' own label).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime

from pipeline.accounting.ledger import RunRow
from pipeline.accounting.report.costs import CostReport, Row, grouped
from pipeline.core import money

_Value = Callable[[Row], float]

# Name, what it is, and its samples: one without a further label, or one for each value of that label.
_COUNTERS: tuple[tuple[str, str, str, Mapping[str, _Value]], ...] = (
    ("cost_usd", "What was billed, waste included.", "", {"": lambda row: money.dollars(row.cost_nano)}),
    (
        "wasted_usd",
        "Known cost of calls without a usable answer.",
        "",
        {"": lambda row: money.dollars(row.wasted_nano)},
    ),
    ("cache_saved_usd", "What reading from the cache saved.", "", {"": lambda row: money.dollars(row.saved_nano)}),
    ("unpriced_requests", "Answers without a known price.", "", {"": lambda row: row.unpriced}),
    ("unknown_attempts", "Calls without an answer that may be billed.", "", {"": lambda row: row.unknown}),
    (
        "requests",
        "Requests that ended.",
        "outcome",
        {"succeeded": lambda row: row.succeeded, "failed": lambda row: row.failed},
    ),
    (
        "attempts",
        "Calls that were made.",
        "outcome",
        {
            "answered": lambda row: row.attempts - row.rate_limited - row.failed_attempts,
            "rate_limited": lambda row: row.rate_limited,
            "failed": lambda row: row.failed_attempts,
        },
    ),
    (
        "tokens",
        "Tokens as the provider counted them; cache_read and cache_write are part of input, reasoning of output.",
        "kind",
        {
            "input": lambda row: row.input_tokens,
            "output": lambda row: row.output_tokens,
            "cache_read": lambda row: row.cache_read_tokens,
            "cache_write": lambda row: row.cache_write_tokens,
            "reasoning": lambda row: row.reasoning_tokens,
        },
    ),
)


def render(report: CostReport) -> bytes:
    """Return the metrics; a label may hold any text."""
    return "".join(f"{line}\n" for line in (*_counters(report), *_last_runs(report))).encode()


def _counters(report: CostReport) -> Iterator[str]:
    rows = grouped(report.entries, report.runs, lambda run, entry: (entry.provider, entry.model, entry.lane))
    for name, text, label, values in _COUNTERS:
        yield from _head(f"{name}_total", "counter", text)
        for (provider, model, lane), row in sorted(rows.items()):
            for kind, value in values.items():
                labels = {"provider": provider, "model": model, "lane": lane} | ({label: kind} if label else {})
                yield _sample(f"{name}_total", labels, value(row))


def _last_runs(report: CostReport) -> Iterator[str]:
    """Yield when each job ended last, how, and when it last ended well: what an alert on a silent cron job needs."""
    ended = sorted((run for run in report.runs.values() if run.finished_at), key=lambda run: run.finished_at or "")
    last = {_name(run): run for run in ended}
    last_good = {_name(run): run for run in ended if run.exit_code == 0}
    yield from _head("last_success_timestamp_seconds", "gauge", "When a run last ended with every line answered.")
    yield from (_sample("last_success_timestamp_seconds", {"name": n}, _seconds(run)) for n, run in last_good.items())
    yield from _head("last_run_timestamp_seconds", "gauge", "When a run last ended.")
    yield from (_sample("last_run_timestamp_seconds", {"name": n}, _seconds(run)) for n, run in last.items())
    yield from _head("last_run_exit_code", "gauge", "How it ended.")
    codes = {name: run.exit_code for name, run in last.items() if run.exit_code is not None}
    yield from (_sample("last_run_exit_code", {"name": name}, code) for name, code in codes.items())


def _name(run: RunRow) -> str:
    return run.tags.get("job") or run.results_file or ""


def _seconds(run: RunRow) -> float:
    return datetime.fromisoformat(run.finished_at or run.started_at).timestamp()


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP pipeline_{name} {text}", f"# TYPE pipeline_{name} {kind}"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"pipeline_{name}{{{inside}}} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
