"""Sum ledger entries into the rows of a report, by time, model, provider, lane, tag or run. Pure.

Two rules hold in every row. Cost is everything billed: the answers, and the calls whose answer could not be used
(`wasted_nano` is that part). And an unknown price is not zero: a row without any priced request has no cost.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, TypeVar

from pipeline.accounting.ledger import COUNT_FIELDS, Counts, Entry, RunRow
from pipeline.core import money
from pipeline.core.errors import UsageError

Entries = Mapping[str, Sequence[Entry]]  # by run id
Key = TypeVar("Key", bound=Hashable)

TIMES = ("day", "week", "month")
_NAMES = (*TIMES, "model", "provider", "lane", "run")
UNTAGGED = "(none)"
_LAST_DAYS = re.compile(r"(\d{1,6})d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Counts):
    """Sums over entries with the same key; see `Counts`.

    `cost_nano` includes the waste. `previous_cost_nano` is the cost to compare with: of the day, week or month before,
    else of the same key in the period before the reported one. None if there is no such period.
    """

    key: str
    runs: int = 0
    previous_cost_nano: int | None = None

    @property
    def is_priced(self) -> bool:
        """True if the cost of at least one request is known."""
        return not self.unpriced or self.unpriced < self.succeeded or self.cost_nano > 0

    @property
    def cost_usd(self) -> float | None:
        if not self.is_priced:
            return None
        return money.dollars(self.cost_nano)

    @property
    def cost_per_1000_usd(self) -> float | None:
        """Dollars per thousand answers, waste included. None without a priced answer."""
        priced = self.succeeded - self.unpriced
        if priced <= 0:
            return None
        return money.dollars(self.cost_nano) / priced * 1_000

    @property
    def cache_share(self) -> float | None:
        """The share of input tokens read from the cache, from 0 to 1."""
        if not self.input_tokens:
            return None
        return self.cache_read_tokens / self.input_tokens

    @property
    def change(self) -> float | None:
        """The relative change from the previous cost: 0.25 is a quarter more. None if nothing was spent then."""
        if not self.previous_cost_nano:
            return None
        return self.cost_nano / self.previous_cost_nano - 1

    def as_dict(self) -> dict[str, Any]:
        """Return the figures under their names in JSON and CSV. Money is in dollars, shares run from 0 to 1."""
        previous = None
        if self.previous_cost_nano is not None:
            previous = money.dollars(self.previous_cost_nano)
        return {
            "key": self.key,
            "cost_usd": self.cost_usd,
            "previous_cost_usd": previous,
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
    """Return the sums of the entries, grouped by what `key` returns."""
    sums: dict[Key, dict[str, int]] = {}
    seen: dict[Key, set[str]] = defaultdict(set)
    for run_id, of_run in entries.items():
        run = runs[run_id]
        for entry in of_run:
            group = key(run, entry)
            row = sums.setdefault(group, dict.fromkeys(COUNT_FIELDS, 0))
            for name in COUNT_FIELDS:
                row[name] += getattr(entry, name)
            row["cost_nano"] += entry.wasted_nano
            seen[group].add(run_id)
    return {group: Row(key=str(group), runs=len(seen[group]), **row) for group, row in sums.items()}


def costs(entries: Entries, runs: Mapping[str, RunRow], *, by: str, earlier: Entries | None = None) -> tuple[Row, ...]:
    """Return one row for each day, week, month, model, provider, lane, tag or run.

    Times and runs come in their own order, everything else by cost, largest first. `earlier` are the entries before the
    reported period, to compare with. None: there is no earlier period.
    """
    key = key_of(by)
    rows = grouped(entries, runs, key)
    if by in TIMES:
        return _over_time(rows, entries, runs, by=by, earlier=earlier or {})
    if by == "run":
        return tuple(sorted(rows.values(), key=lambda row: (runs[row.key].started_at, row.key)))
    if earlier is not None:
        before = grouped(earlier, runs, key)
        rows = {name: _compared(row, before.get(name, Row(key=name))) for name, row in rows.items()}
    return tuple(sorted(rows.values(), key=lambda row: (-row.cost_nano, -row.total_tokens, row.key)))


def _over_time(
    rows: Mapping[str, Row], entries: Entries, runs: Mapping[str, RunRow], *, by: str, earlier: Entries
) -> tuple[Row, ...]:
    """Return rows of days, weeks or months in order, each compared with the one before it."""
    key = key_of(by)
    known = grouped(_joined(earlier, entries), runs, key)
    # A week or month that begins before the reported period is only partly in it: comparing it would mislead.
    partial = grouped(earlier, runs, key).keys() & rows.keys()
    compared = []
    for name in sorted(rows):
        row = rows[name]
        if name not in partial:
            row = _compared(row, known.get(_bucket_before(by, name)))
        compared.append(row)
    return tuple(compared)


def total(entries: Entries, runs: Mapping[str, RunRow], earlier: Entries | None = None) -> Row:
    """Return the sum of everything."""
    empty = Row(key="total")
    row = grouped(entries, runs, lambda run, entry: "total").get("total", empty)
    if earlier is None:
        return row
    previous = grouped(earlier, runs, lambda run, entry: "total").get("total", empty)
    return _compared(row, previous)


def _joined(earlier: Entries, later: Entries) -> Entries:
    return {run_id: [*earlier.get(run_id, ()), *later.get(run_id, ())] for run_id in earlier.keys() | later.keys()}


def _compared(row: Row, previous: Row | None) -> Row:
    if previous is None or not previous.is_priced:
        return row
    return replace(row, previous_cost_nano=previous.cost_nano)


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def key_of(by: str) -> Callable[[RunRow, Entry], str]:
    """Return the function that names an entry's group. Raise `UsageError` if there is no such grouping."""
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
    if by == "month":
        return day.isoformat()[:7]
    return day.isoformat()


def buckets(by: str, first: date, last: date) -> Iterator[str]:
    """Yield the names of all days, weeks or months from one day to another."""
    step = timedelta(days={"day": 1, "week": 7, "month": 31}[by])
    start = _start(by, bucket(by, first))
    while start <= last:
        yield bucket(by, start)
        start = _start(by, bucket(by, start + step))


def _start(by: str, name: str) -> date:
    """Return the first day of a bucket."""
    if by == "month":
        return date.fromisoformat(f"{name}-01")
    return date.fromisoformat(name)  # of a week (2026-W48) this is the Monday


def _bucket_before(by: str, name: str) -> str:
    return bucket(by, _start(by, name) - timedelta(days=1))


# ── periods ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """Whole days in UTC, both ends included. `since` is None for a period from the very beginning."""

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
        """Return the first day that a report needs: of the previous period, and of the bucket before this one."""
        previous = self.previous()
        if self.since is None or previous is None or previous.since is None:
            return None
        if by not in TIMES:
            return previous.since
        return min(previous.since, _start(by, _bucket_before(by, bucket(by, self.since))))

    def select(self, entries: Entries) -> dict[str, list[Entry]]:
        """Return the entries of these days."""
        first = self.since.isoformat() if self.since else ""
        last = self.until.isoformat()
        selected = {}
        for run_id, rows in entries.items():
            in_period = [entry for entry in rows if first <= entry.day <= last]
            if in_period:
                selected[run_id] = in_period
        return selected


def to_period(since: str | None, until: str | None, today: date) -> Period:
    """Read `--since` and `--until`. Each is a day, a time (its whole day in UTC counts), or a number of days as `30d`.

    `--since 30d` means the 30 days up to today, `--until 7d` all but the last 7 days.

    Raises `UsageError` for anything else, or if the period ends before it begins.
    """
    first = None
    if since:
        first = _to_day("--since", since, today + timedelta(days=1))
    last = today
    if until:
        last = _to_day("--until", until, today)
    if first and first > last:
        end = f"--until {last}" if until else f"today, {last}"
        raise UsageError(f"--since {first} is after {end}")
    return Period(since=first, until=last)


def _to_day(option: str, text: str, origin: date) -> date:
    last_days = _LAST_DAYS.fullmatch(text)
    try:
        if last_days:
            return origin - timedelta(days=int(last_days[1]))
        moment = datetime.fromisoformat(text)
        if moment.tzinfo:
            moment = moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError(f"{option} {text!r} is not a day (2026-11-26), a time, or a number of days (30d)") from None
    return moment.date()


# ── the report ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport:
    """The data of a report in every format. `entries` are those of the period; `runs` are all known runs."""

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
        """The first day of the period. If it has none, the first day with an entry."""
        if self.period.since:
            return self.period.since
        days = [date.fromisoformat(rows[0].day) for rows in self.entries.values()]
        return min(days, default=self.period.until)


def build_cost_report(
    entries: Entries, runs: Iterable[RunRow], *, by: str, period: Period, generated_at: str, has_simulated: bool = False
) -> CostReport:
    """Build a report. `entries` must reach back to `period.loaded_since(by)`."""
    known = {run.run_id: run for run in runs}
    current = period.select(entries)
    before = earlier = None
    previous = period.previous()
    if previous:
        before = earlier = previous.select(entries)
        if by in TIMES:
            # The bucket before the first one may begin before the previous period.
            earlier = Period(since=None, until=previous.until).select(entries)
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
