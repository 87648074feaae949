"""Table, JSON, CSV and metrics."""

from __future__ import annotations

import csv
import io
import json as standard_json
import math
from datetime import date, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from pipeline.accounting.report import csv as csv_form
from pipeline.accounting.report import formatting, json, prometheus, table
from pipeline.accounting.report.costs import CostReport, Row
from pipeline.core import money
from tests.accounting.report.examples import HOSTILE, entry, report, run, two_months

UNPRICED = report({"run-1": [entry(requests=2, succeeded=2, unpriced=2, input_tokens=10)]})
MIXED = report(
    {
        "run-1": [
            entry(
                requests=3, succeeded=2, failed=1, attempts=6, rate_limited=2, failed_attempts=2, cost_nano=1_500_000
            ),
            entry(model="local", requests=1, succeeded=1, attempts=1, unpriced=1, unknown=1, wasted_nano=7),
        ]
    },
    since=date(2026, 11, 20),
)


def with_models(names: list[str]) -> CostReport:
    return report({"run-1": [entry(model=name, cost_nano=n) for n, name in enumerate(dict.fromkeys(names))]})


def as_text(value: CostReport, *, width: int = 120, is_colored: bool = False) -> str:
    return table.render(value, width=width, is_colored=is_colored).decode()


# ── figures ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("nano", "text"),
    [
        pytest.param(0, "$0.00", id="nothing"),
        pytest.param(1, "$0.000000001", id="a nano-dollar"),
        pytest.param(562_600, "$0.000563", id="an answer"),
        pytest.param(12_345_678, "$0.0123", id="a cent"),
        pytest.param(1_999_000_000, "$2.00", id="dollars"),
        pytest.param(1_234_567_890_000_000, "$1,234,567.89", id="millions"),
    ],
)
def test_money_shows_what_is_there(nano: int, text: str) -> None:
    """No cost but zero is shown as zero."""
    assert money.text(nano) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1_000, "1.0k"), (9_949, "9.9k"), (9_960, "10k"), (999_600, "1.0M"), (10**17, "100P")],
)
def test_counts_are_short(count: int, text: str) -> None:
    """Large counts are written with a unit, rounded."""
    assert formatting.short(count) == text


@pytest.mark.parametrize(
    ("cost", "before", "text"),
    [
        (150, 100, "+50%"),
        (50, 100, "-50%"),
        (100, 100, "+0%"),
        (5_000, 100, "×50"),
        (100, 0, "–"),
        (100, None, "–"),
    ],
)
def test_changes(cost: int, before: int | None, text: str) -> None:
    """A change is shown in percent, a large one as a factor, and none without an earlier cost."""
    assert formatting.change(Row(key="x", cost_nano=cost, previous_cost_nano=before)) == text


# ── table ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_shows_costs_with_bars() -> None:
    """Each row has its cost, a bar that is full for the largest, and its change; the total stands below."""
    lines = as_text(two_months()).splitlines()

    assert lines[0] == "Costs by model, 2026-09-28 to 2026-11-26 (UTC), compared with 2026-07-30 to 2026-09-27"
    assert lines[1].split() == (
        ["model", "cost", "change", "requests", "failed", "input", "output", "cached", "per", "1,000", "wasted"]
    )
    assert lines[2].split()[:4] == ["anthropic/mini", "$212.52", "████████████", "-2%"]
    assert lines[7].split()[:4] == ["anthropic/haiku", "$35.52", "██", "-2%"]
    assert lines[8].split()[:3] == ["total", "$744.12", "-2%"]


def test_the_table_fits_a_narrow_terminal() -> None:
    """On 80 columns no line is longer and no name is cut."""
    lines = as_text(two_months(), width=80).splitlines()

    assert max(len(line) for line in lines[1:9]) <= 80
    assert all(f"anthropic/{name} " in "\n".join(lines) for name in ("haiku", "sonnet", "opus", "luna", "sol", "mini"))


def test_what_is_not_known_is_said() -> None:
    """Answers without a price and calls that may be billed are reported, and an unknown cost is not $0."""
    text = as_text(UNPRICED)

    assert "$0.00" not in text.splitlines()[2].split("  ")[1]
    assert "2 answers have no known price: costs are higher than shown" in text
    assert "1 calls brought no answer but may be billed" in as_text(MIXED)
    assert "simulated runs are included" in as_text(report({}, has_simulated=True))
    assert "nothing is recorded in this period" in as_text(report({}))


@given(st.lists(st.one_of(st.text(), st.sampled_from(HOSTILE)), min_size=1, max_size=5), st.booleans())
def test_no_name_acts_on_the_terminal(names: list[str], is_colored: bool) -> None:
    """No model's name brings a control character to the terminal; those that colour are rich's own."""
    text = as_text(with_models(names), is_colored=is_colored)

    assert not is_colored or "\x1b[1m" in text
    own = {"\x1b"} if is_colored else set()
    assert {char for char in text if ord(char) < 32 or 127 <= ord(char) < 160 or char == "\u202e"} <= {"\n"} | own
    assert "\x1b]" not in text


# ── JSON ──────────────────────────────────────────────────────────────────────────────────────────────


def test_json_is_complete() -> None:
    """The object holds the question, every row and the total; an unknown value is null."""
    value = orjson.loads(json.render(MIXED))

    assert (value["by"], value["since"], value["until"]) == ("model", "2026-11-20", "2026-11-26")
    assert value["previous"] == {"since": "2026-11-13", "until": "2026-11-19"}
    assert [(row["key"], row["cost_usd"]) for row in value["rows"]] == [
        ("openai/gpt-6-luna", 0.0015),
        ("openai/local", 7e-9),
    ]
    assert value["total"]["requests"] == 4
    assert orjson.loads(json.render(UNPRICED))["total"]["cost_usd"] is None


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_json_survives_any_name(names: list[str]) -> None:
    """Names come back as they are, from a parser that is not the one that wrote them."""
    keys = {row["key"] for row in standard_json.loads(json.render(with_models(names)))["rows"]}

    assert keys == {f"openai/{name}" for name in names}


# ── CSV ───────────────────────────────────────────────────────────────────────────────────────────────


def cells(value: CostReport) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_form.render(value).decode(), newline="")))


def test_csv_has_plain_numbers() -> None:
    """Amounts have no exponent and no unit, a change keeps its sign, and an unknown value is empty."""
    first, second = cells(MIXED)

    assert first["cost_usd"] == "0.0015"
    assert second["cost_usd"] == "0.000000007"
    assert (second["cost_per_1000_usd"], cells(UNPRICED)[0]["cost_usd"]) == ("", "")
    assert float(cells(two_months(by="day"))[1]["change"]) < 0


@pytest.mark.parametrize(
    "tag",
    [
        pytest.param("=1+1", id="equals"),
        pytest.param("+1", id="plus"),
        pytest.param("-1", id="minus"),
        pytest.param("@SUM(A1)", id="at"),
        pytest.param("\t=1", id="tab"),
        pytest.param("\r=1", id="return"),
        pytest.param("\n=1", id="newline"),
        pytest.param("\0=1", id="NUL"),
        pytest.param("＝1", id="full width"),
        pytest.param('=HYPERLINK("http://x","a,b")', id="quotes and commas"),
    ],
)
def test_no_cell_becomes_a_formula(tag: str) -> None:
    """A text that a spreadsheet would compute gets an apostrophe before it; nothing else of it changes."""
    value = report({"run-1": [entry()]}, [run(tags={"x": tag})], by="tag:x")

    assert cells(value)[0]["key"] == f"'{tag}"


@given(st.text())
def test_csv_survives_any_name(name: str) -> None:
    """Separators, quotes and line ends in a name stay in its cell, and no cell begins as a formula does."""
    (row,) = cells(report({"run-1": [entry()]}, [run(tags={"x": name})], by="tag:x"))

    assert row["key"] in (name, f"'{name}")
    assert not row["key"].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert row["requests"] == "0"


# ── Prometheus ────────────────────────────────────────────────────────────────────────────────────────


def samples(value: CostReport) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Read metrics as Prometheus' own client does."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(prometheus.render(value).decode())
        for sample in family.samples
    }


def of(found: dict[Any, float], name: str, /, **labels: str) -> float:
    return found[f"pipeline_{name}", frozenset(labels.items())]


def seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def test_metrics_hold_the_sums() -> None:
    """Each model and lane has its counters: cost, requests, calls and tokens."""
    found = samples(MIXED)

    luna = {"provider": "openai", "model": "gpt-6-luna", "lane": "live"}
    local = luna | {"model": "local"}
    assert of(found, "cost_usd_total", **luna) == 0.0015
    assert of(found, "wasted_usd_total", **local) == 7e-9
    assert of(found, "requests_total", **luna, outcome="failed") == 1
    assert [of(found, "attempts_total", **luna, outcome=o) for o in ("answered", "rate_limited", "failed")] == [2, 2, 2]
    assert of(found, "unknown_attempts_total", **local) == 1
    assert of(found, "unpriced_requests_total", **local) == 1


def test_metrics_tell_the_last_success_of_each_job() -> None:
    """A job is a run's tag `job`, else its results file; a failure moves its last run and not its last success."""
    runs = [
        run("1", finished_at="2026-11-25T01:00:00Z", exit_code=0, tags={"job": "nightly"}),
        run("2", finished_at="2026-11-26T01:00:00Z", exit_code=3, tags={"job": "nightly"}),
        run("3", finished_at="2026-11-26T00:00:00Z", exit_code=0, results_file="b.jsonl"),
        run("4", finished_at=None, exit_code=None, results_file="b.jsonl"),
    ]
    found = samples(report({}, runs))

    assert of(found, "last_success_timestamp_seconds", name="nightly") == seconds("2026-11-25T01:00:00+00:00")
    assert of(found, "last_run_timestamp_seconds", name="nightly") == seconds("2026-11-26T01:00:00+00:00")
    assert of(found, "last_run_exit_code", name="nightly") == 3
    assert of(found, "last_success_timestamp_seconds", name="b.jsonl") == seconds("2026-11-26T00:00:00+00:00")


@given(st.lists(st.one_of(st.text(), st.sampled_from(HOSTILE)), min_size=1, max_size=5))
def test_no_label_breaks_the_metrics(names: list[str]) -> None:
    """Any name is a label value that comes back as it is, and makes no further line."""
    found = samples(with_models(names))

    models = {dict(labels)["model"] for name, labels in found if name == "pipeline_cost_usd_total"}
    assert models == set(names)
    assert all(math.isfinite(value) for value in found.values())
