from __future__ import annotations

from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.accounting.ledger import Entry
from pipeline.accounting.report.costs import Period, Row, buckets, costs, key_of, to_period, total
from pipeline.core.errors import UsageError
from tests.accounting.report.examples import TODAY, entry, report, run

ENTRIES = {
    "run-1": [
        entry("2026-10-31", "luna", cost_nano=1, requests=1, succeeded=1),
        entry("2026-11-01", "luna", cost_nano=20, requests=2, succeeded=1, failed=1),
    ],
    "run-2": [
        entry("2026-11-01", "sonnet", "anthropic", cost_nano=300, wasted_nano=5, requests=3, succeeded=3),
        entry("2026-11-02", "luna", lane="batch", cost_nano=4000, requests=4, succeeded=4),
    ],
}
RUNS = {
    "run-1": run("run-1", started_at="2026-11-02T00:00:00Z", tags={"team": "search"}),
    "run-2": run("run-2", started_at="2026-11-01T00:00:00Z", tags={"job": "x"}),
}


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        pytest.param("day", [("2026-10-31", 1), ("2026-11-01", 325), ("2026-11-02", 4000)], id="day"),
        pytest.param("week", [("2026-W44", 326), ("2026-W45", 4000)], id="week: Monday to Sunday"),
        pytest.param("month", [("2026-10", 1), ("2026-11", 4325)], id="month"),
        pytest.param("model", [("openai/luna", 4021), ("anthropic/sonnet", 305)], id="model: the largest first"),
        pytest.param("provider", [("openai", 4021), ("anthropic", 305)], id="provider"),
        pytest.param("run", [("run-2", 4305), ("run-1", 21)], id="run: as they began"),
        pytest.param("tag:team", [("(none)", 4305), ("search", 21)], id="tag"),
    ],
)
def test_rows_are_sums_by_key(by: str, expected: list[tuple[str, int]]) -> None:
    """Each grouping sums all entries, waste included, and has its order."""
    rows = costs(ENTRIES, RUNS, by=by)

    assert [(row.key, row.cost_nano) for row in rows] == expected
    assert [row.previous_cost_nano for row in rows if by not in ("day", "week", "month")] == [None] * (
        len(rows) if by not in ("day", "week", "month") else 0
    )


def test_a_row_counts_its_runs() -> None:
    """A run with several entries in a row counts once there."""
    assert [row.runs for row in costs(ENTRIES, RUNS, by="model")] == [2, 1]
    assert total(ENTRIES, RUNS).runs == 2


@pytest.mark.parametrize("by", ["", "hour", "tag", "tag:", "Model"])
def test_unknown_groupings_are_refused(by: str) -> None:
    """A grouping that does not exist is an error that names those that do."""
    with pytest.raises(UsageError, match="tag:NAME"):
        key_of(by)


counts = st.integers(0, 2**40)
an_entry = st.builds(
    entry,
    st.dates(date(2025, 12, 1), date(2027, 1, 31)).map(str),
    st.sampled_from(["luna", "sol"]),
    requests=counts,
    input_tokens=counts,
    cost_nano=counts,
    wasted_nano=counts,
)


@given(
    st.dictionaries(st.sampled_from(sorted(RUNS)), st.lists(an_entry, max_size=9)),
    st.sampled_from(["day", "week", "month", "model", "provider", "run", "tag:team"]),
)
def test_nothing_is_lost_in_a_grouping(entries: dict[str, list[Entry]], by: str) -> None:
    """However the entries are grouped, the rows sum up to the total, and that to the entries."""
    rows = costs(entries, RUNS, by=by)
    whole = total(entries, RUNS)

    everything = [each for rows in entries.values() for each in rows]
    assert sum(row.cost_nano for row in rows) == whole.cost_nano
    assert whole.cost_nano == sum(each.cost_nano + each.wasted_nano for each in everything)
    assert sum(row.input_tokens for row in rows) == sum(each.input_tokens for each in everything)


# ── what a row tells ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "cost", "per_1000"),
    [
        pytest.param({}, 0, None, id="nothing happened"),
        pytest.param({"succeeded": 4, "cost_nano": 2 * 10**9}, 2, 500, id="priced"),
        pytest.param({"succeeded": 4, "unpriced": 2, "cost_nano": 10**9}, 1, 500, id="half of it priced"),
        pytest.param({"succeeded": 4, "unpriced": 4}, None, None, id="nothing priced"),
        pytest.param({"succeeded": 4, "unpriced": 4, "cost_nano": 10**9}, 1, None, id="only waste priced"),
        pytest.param({"failed": 4}, 0, None, id="only failures"),
    ],
)
def test_unknown_is_not_free(values: dict[str, int], cost: float | None, per_1000: float | None) -> None:
    """A row in which nothing has a price has no cost; the mean counts answers with a price only."""
    row = Row(key="x", **values)

    assert (row.cost_usd, row.cost_per_1000_usd) == (cost, per_1000)
    assert (row.as_dict()["cost_usd"], row.as_dict()["cost_per_1000_usd"]) == (cost, per_1000)


# ── periods ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        pytest.param(None, None, (None, "2026-11-26"), id="all"),
        pytest.param("2026-11-01", "2026-11-30", ("2026-11-01", "2026-11-30"), id="days"),
        pytest.param("1d", None, ("2026-11-26", "2026-11-26"), id="today"),
        pytest.param("30d", None, ("2026-10-28", "2026-11-26"), id="the last 30 days"),
        pytest.param("14d", "7d", ("2026-11-13", "2026-11-19"), id="the 7 days before the last 7"),
        pytest.param("2026-11-01T23:30:00-01:00", None, ("2026-11-02", "2026-11-26"), id="a time in another zone"),
        pytest.param("2026-11-01T23:30:00", None, ("2026-11-01", "2026-11-26"), id="a time"),
    ],
)
def test_periods(since: str | None, until: str | None, expected: tuple[str | None, str]) -> None:
    """Days are in UTC, and the first and last one belong to the period."""
    period = to_period(since, until, TODAY)

    assert (period.since and str(period.since), str(period.until)) == expected


@pytest.mark.parametrize(
    ("since", "until", "message"),
    [
        pytest.param("yesterday", None, "--since 'yesterday' is not a day", id="word"),
        pytest.param(None, "2026-02-30", "--until '2026-02-30' is not a day", id="no such day"),
        pytest.param("999999d", None, "--since '999999d' is not a day", id="before all time"),
        pytest.param("2026-11-30", None, "--since 2026-11-30 is after today, 2026-11-26", id="in the future"),
        pytest.param(
            "2026-11-02", "2026-11-01", "--since 2026-11-02 is after --until 2026-11-01", id="wrong way round"
        ),
    ],
)
def test_wrong_periods_are_refused(since: str | None, until: str | None, message: str) -> None:
    """A period that cannot be is an error that names the option and its value."""
    with pytest.raises(UsageError, match=message):
        to_period(since, until, TODAY)


def test_the_previous_period_is_as_long() -> None:
    """The period before ends where this one begins; what has no beginning, or begins with time, has none before."""
    period = Period(since=date(2026, 11, 20), until=date(2026, 11, 26))

    assert period.previous() == Period(since=date(2026, 11, 13), until=date(2026, 11, 19))
    assert Period(since=None, until=TODAY).previous() is None
    assert Period(since=date.min, until=TODAY).previous() is None


def compared(by: str, entries: list[Entry], since: date) -> list[tuple[str, int | None]]:
    made = report({"run-1": entries}, by=by, since=since)
    return [(row.key, row.previous_cost_nano) for row in (*made.rows, made.total)]


def test_models_are_compared_with_the_previous_period() -> None:
    """A model's row also has its cost in the period before: 0 where it was not used, unknown if unpriced."""
    entries = [
        entry("2026-11-12", "luna", cost_nano=1),
        entry("2026-11-13", "luna", cost_nano=20),
        entry("2026-11-19", "local", succeeded=1, unpriced=1),
        entry("2026-11-20", "luna", cost_nano=300),
        entry("2026-11-20", "local", succeeded=1, unpriced=1),
        entry("2026-11-26", "sol", cost_nano=4000),
    ]

    assert compared("model", entries, date(2026, 11, 20)) == [
        ("openai/sol", 0),
        ("openai/luna", 20),
        ("openai/local", None),
        ("total", 20),
    ]


def test_weeks_are_compared_with_the_week_before() -> None:
    """A week is compared with the whole week before it, but not where the period cuts a part of it off."""
    entries = [
        entry("2026-11-02", cost_nano=1),  # Monday of week 45
        entry("2026-11-09", cost_nano=20),
        entry("2026-11-11", cost_nano=300),
        entry("2026-11-16", cost_nano=4000),
    ]

    assert compared("week", entries, date(2026, 11, 9))[:-1] == [("2026-W46", 1), ("2026-W47", 320)]
    assert compared("week", entries, date(2026, 11, 10))[:-1] == [("2026-W46", None), ("2026-W47", 320)]


@pytest.mark.parametrize(
    ("by", "since", "expected"),
    [
        pytest.param("model", "2026-11-25", "2026-11-23", id="the previous period"),
        pytest.param("day", "2026-11-25", "2026-11-23", id="days: the same"),
        pytest.param("week", "2026-11-25", "2026-11-16", id="the whole week before"),
        pytest.param("month", "2026-11-25", "2026-10-01", id="the whole month before"),
    ],
)
def test_enough_is_loaded_to_compare(by: str, since: str, expected: str) -> None:
    """Entries are read from the first day on that a comparison needs."""
    assert str(Period(since=date.fromisoformat(since), until=TODAY).loaded_since(by)) == expected


@given(st.dates(date(1970, 1, 1), date(2100, 1, 1)), st.integers(0, 900), st.sampled_from(["day", "week", "month"]))
def test_buckets_cover_the_time(first: date, length: int, by: str) -> None:
    """The buckets of a time follow each other without gap or repetition, and each day's own is among them."""
    last = date.fromordinal(first.toordinal() + length)

    found = list(buckets(by, first, last))

    key = key_of(by)
    days: list[Any] = [date.fromordinal(n) for n in range(first.toordinal(), last.toordinal() + 1)]
    assert found == list(dict.fromkeys(key(run(), entry(str(day))) for day in days))
    assert found == sorted(found)
