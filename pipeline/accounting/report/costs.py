"""Entries of the ledger -> rows of a report: summed by time, model, provider, lane, tag or run. Pure.

Two rules hold in every row. Cost is all that was billed: what the answers cost, and the calls whose answer could not be
used (`wasted_nano` is that part of it). And what nobody knows the price of is unknown, not free: a row of which
nothing is priced has no cost.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, TypeVar

from pipeline.accounting.ledger import Entry, RunRow
from pipeline.core import money
from pipeline.core.errors import UsageError

Entries = Mapping[str, Sequence[Entry]]  # by run id
Key = TypeVar("Key", bound=Hashable)

TIMES = ("day", "week", "month")
_NAMES = (*TIMES, "model", "provider", "lane", "run")
UNTAGGED = "(none)"
_COUNTS = tuple(each.name for each in fields(Entry) if each.name not in ("day", "provider", "model", "lane"))
_LAST_DAYS = re.compile(r"(\d{1,6})d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Sums over entries with the same key; see `Entry` for the counts.

    `cost_nano` holds the waste too. `previous_cost_nano` is that of the period before: for a day, week or month the one
    before it, else the same key in the period before the reported one; None where there is none to compare with.
    """

    key: str
    runs: int = 0
    requests: int = 0
    succeeded: int = 0
    failed: int = 0
    attempts: int = 0
    rate_limited: int = 0
    failed_attempts: int = 0
    unknown: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0
    cost_nano: int = 0
    unpriced: int = 0
    wasted_nano: int = 0
    saved_nano: int = 0
    previous_cost_nano: int | None = None

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    @property
    def is_priced(self) -> bool:
        """Whether the cost of anything here is known."""
        return not self.unpriced or self.unpriced < self.succeeded or self.cost_nano > 0

    @property
    def cost_usd(self) -> float | None:
        return money.dollars(self.cost_nano) if self.is_priced else None

    @property
    def cost_per_1000_usd(self) -> float | None:
        """What a thousand answers cost, waste included; None without a priced answer."""
        priced = self.succeeded - self.unpriced
        return money.dollars(self.cost_nano) / priced * 1_000 if priced > 0 else None

    @property
    def cache_share(self) -> float | None:
        """The part of the input tokens that came from the cache."""
        return self.cache_read_tokens / self.input_tokens if self.input_tokens else None

    @property
    def change(self) -> float | None:
        """How the cost differs from the previous one: 0.25 is a quarter more; None where nothing was spent then."""
        return self.cost_nano / self.previous_cost_nano - 1 if self.previous_cost_nano else None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures under the names of the JSON and CSV forms; money in dollars, shares from 0 to 1."""
        previous = self.previous_cost_nano
        return {
            "key": self.key,
            "cost_usd": self.cost_usd,
            "previous_cost_usd": None if previous is None else money.dollars(previous),
            "change": self.change,
            "cost_per_1000_usd": self.cost_per_1000_usd,
            "wasted_usd": money.dollars(self.wasted_nano),
            "cache_saved_usd": money.dollars(self.saved_nano),
            "unpriced_requests": self.unpriced,
            "runs": self.runs,
            "requests": self.requests,
            "succeeded": self.succeeded,
            "failed": self.failed,
            "attempts": self.attempts,
            "rate_limited": self.rate_limited,
            "failed_attempts": self.failed_attempts,
            "unknown_attempts": self.unknown,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "total_tokens": self.total_tokens,
            "cache_read_tokens": self.cache_read_tokens,
            "cache_write_tokens": self.cache_write_tokens,
            "reasoning_tokens": self.reasoning_tokens,
            "cache_share": self.cache_share,
        }


def grouped(entries: Entries, runs: Mapping[str, RunRow], key: Callable[[RunRow, Entry], Key]) -> dict[Key, Row]:
    """Return the sums of all entries for which `key` returns the same."""
    sums: dict[Key, dict[str, int]] = {}
    seen: dict[Key, set[str]] = defaultdict(set)
    for run_id, of_run in entries.items():
        run = runs[run_id]
        for entry in of_run:
            group = key(run, entry)
            row = sums.setdefault(group, dict.fromkeys(_COUNTS, 0))
            for name in _COUNTS:
                row[name] += getattr(entry, name)
            row["cost_nano"] += entry.wasted_nano
            seen[group].add(run_id)
    return {group: Row(key=str(group), runs=len(seen[group]), **row) for group, row in sums.items()}


def costs(entries: Entries, runs: Mapping[str, RunRow], *, by: str, earlier: Entries | None = None) -> tuple[Row, ...]:
    """Return one row for each day, week, month, model, provider, lane, tag or run.

    Times and runs come in their order, everything else with the largest cost first. `earlier` are entries from before
    the reported period, to compare with; None: there is nothing before.
    """
    key = key_of(by)
    rows = grouped(entries, runs, key)
    before = grouped(earlier or {}, runs, key)
    if by in TIMES:
        known = grouped(_joined(earlier or {}, entries), runs, key)
        cut = before.keys() & rows.keys()  # a part of this week or month lies before the period
        with_previous = [
            row if name in cut else _compared(row, known.get(_bucket_before(by, name))) for name, row in rows.items()
        ]
        return tuple(sorted(with_previous, key=lambda row: row.key))
    if by == "run":
        return tuple(sorted(rows.values(), key=lambda row: (runs[row.key].started_at, row.key)))
    if earlier is not None:
        rows = {name: _compared(row, before.get(name, Row(key=name))) for name, row in rows.items()}
    return tuple(sorted(rows.values(), key=lambda row: (-row.cost_nano, -row.total_tokens, row.key)))


def total(entries: Entries, runs: Mapping[str, RunRow], earlier: Entries | None = None) -> Row:
    """Return the sum of everything."""
    empty = Row(key="total")
    row = grouped(entries, runs, lambda run, entry: "total").get("total", empty)
    if earlier is None:
        return row
    return _compared(row, grouped(earlier, runs, lambda run, entry: "total").get("total", empty))


def _joined(earlier: Entries, later: Entries) -> Entries:
    return {run_id: [*earlier.get(run_id, ()), *later.get(run_id, ())] for run_id in earlier.keys() | later.keys()}


def _compared(row: Row, previous: Row | None) -> Row:
    return replace(row, previous_cost_nano=previous.cost_nano) if previous and previous.is_priced else row


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def key_of(by: str) -> Callable[[RunRow, Entry], str]:
    """Return what tells the group of an entry; `UsageError` when there is no such grouping."""
    if by in TIMES:
        return lambda run, entry: bucket(by, date.fromisoformat(entry.day))
    if by.startswith("tag:") and len(by) > 4:
        return lambda run, entry: run.tags.get(by[4:], UNTAGGED)
    if by not in _NAMES:
        raise UsageError(f"--by {by!r} is not one of {', '.join(_NAMES)} or tag:NAME")
    return {
        "model": lambda run, entry: f"{entry.provider}/{entry.model}",
        "provider": lambda run, entry: entry.provider,
        "lane": lambda run, entry: entry.lane,
        "run": lambda run, entry: run.run_id,
    }[by]


def bucket(by: str, day: date) -> str:
    """Return the name of the day, week (ISO: Monday to Sunday) or month of a day, in an order that sorts."""
    if by == "week":
        year, week, _ = day.isocalendar()
        return f"{year:04}-W{week:02}"
    return day.isoformat() if by == "day" else day.isoformat()[:7]


def buckets(by: str, first: date, last: date) -> Iterator[str]:
    """Yield the names of all days, weeks or months from one day to another."""
    start = _start(by, bucket(by, first))
    while start <= last:
        yield bucket(by, start)
        start = _start(by, bucket(by, start + timedelta(days={"day": 1, "week": 7, "month": 31}[by])))


def _start(by: str, name: str) -> date:
    """Return the first day of a bucket."""
    if by == "month":
        return date.fromisoformat(f"{name}-01")
    return date.fromisoformat(name)  # knows 2026-W48 too: its Monday


def _bucket_before(by: str, name: str) -> str:
    return bucket(by, _start(by, name) - timedelta(days=1))


# ── periods ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """Whole days in UTC, the last one included; None: from the beginning."""

    since: date | None
    until: date

    def previous(self) -> Period | None:
        """Return the period of equal length before this one."""
        if self.since is None:
            return None
        day = timedelta(days=1)
        try:
            return Period(since=self.since - (self.until - self.since) - day, until=self.since - day)
        except OverflowError:
            return None

    def loaded_since(self, by: str) -> date | None:
        """Return the first day whose entries a report needs: of the previous period, and of the bucket before."""
        previous = self.previous()
        if self.since is None or previous is None or previous.since is None:
            return None
        if by not in TIMES:
            return previous.since
        return min(previous.since, _start(by, _bucket_before(by, bucket(by, self.since))))

    def select(self, entries: Entries) -> dict[str, list[Entry]]:
        """Return the entries of these days."""
        first, last = self.since.isoformat() if self.since else "", self.until.isoformat()
        found = {run_id: [entry for entry in rows if first <= entry.day <= last] for run_id, rows in entries.items()}
        return {run_id: rows for run_id, rows in found.items() if rows}


def to_period(since: str | None, until: str | None, today: date) -> Period:
    """Read `--since` and `--until`: a day, a time (its day in UTC counts whole), or Nd.

    Since 30d: 30 days up to today. Until 7d: all but the last 7 days.
    """
    first = _to_day("--since", since, today + timedelta(days=1)) if since else None
    last = _to_day("--until", until, today) if until else today
    if first and first > last:
        raise UsageError(f"--since {first} is after {'--until' if until else 'today,'} {last}")
    return Period(since=first, until=last)


def _to_day(option: str, text: str, origin: date) -> date:
    try:
        if match := _LAST_DAYS.fullmatch(text):
            return origin - timedelta(days=int(match[1]))
        moment = datetime.fromisoformat(text)
        return (moment.astimezone(UTC) if moment.tzinfo else moment).date()
    except (ValueError, OverflowError):
        raise UsageError(
            f"{option} {text!r} is neither a day (2026-11-26), nor a time, nor a number of days (30d)"
        ) from None


# ── the report ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport:
    """What every form of the report is made of; `entries` are those of the period, `runs` all that are known."""

    by: str
    period: Period
    generated_at: str
    has_simulated: bool
    rows: tuple[Row, ...]
    total: Row
    entries: Entries
    runs: Mapping[str, RunRow]

    @property
    def first_day(self) -> date:
        """The first day of the period, or of what is recorded in it."""
        days = [date.fromisoformat(rows[0].day) for rows in self.entries.values()]
        return self.period.since or min(days, default=self.period.until)


def read_cost_report(
    entries: Entries, runs: Iterable[RunRow], *, by: str, period: Period, generated_at: str, has_simulated: bool = False
) -> CostReport:
    """Put a report together; `entries` reach back to `period.loaded_since(by)`."""
    known = {run.run_id: run for run in runs}
    current = period.select(entries)
    previous = period.previous()
    before = previous.select(entries) if previous else None
    earlier = Period(since=None, until=previous.until).select(entries) if previous and by in TIMES else before
    return CostReport(
        by=by,
        period=period,
        generated_at=generated_at,
        has_simulated=has_simulated,
        rows=costs(current, known, by=by, earlier=earlier),
        total=total(current, known, before),
        entries=current,
        runs=known,
    )
