"""Add results up into ledger entries, by day, provider, model and lane. Pure.

A run that writes results and `report --rebuild`, which reads them back, use the same sums. So a rebuilt ledger agrees
with what the runs recorded.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from pipeline.accounting.ledger import Entry
from pipeline.core.types import TOKEN_FIELDS, Result, Usage
from pipeline.results.attempt_log import LoggedCall
from pipeline.results.codec import StoredResult


class UsageAggregator:
    """Sums of one run in progress."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str, str], Counter[str]] = defaultdict(Counter)

    def add(self, record: StoredResult | Result, day: str) -> None:
        """Count a result under a day (UTC, as `2026-11-26`). Invalid lines are left out: they cost nothing."""
        if record.is_invalid:
            return
        sums = self._sums[day, record.provider or "", record.model or "", record.lane]
        sums["requests"] += 1
        sums["attempts"] += record.attempts
        if record.success:
            sums["succeeded"] += 1
            sums["cost_nano"] += record.cost.nanos or 0
            sums["unpriced"] += record.cost.nanos is None
            sums["saved_nano"] += record.cost.saved
        else:
            sums["failed"] += 1
        if record.usage:
            _add_tokens(sums, record.usage)
        if record.failed_attempts:
            _add_failures(sums, record)

    def entries(self, unknown: Sequence[LoggedCall] = ()) -> list[Entry]:
        """Return the entries so far. `unknown` are logged calls without a result: they may be billed."""
        sums = {key: Counter(counts) for key, counts in self._sums.items()}
        for call in unknown:
            day = call.at[:10]
            counts = sums.setdefault((day, call.provider, call.model, "live"), Counter())
            counts.update(attempts=1, unknown=1)
        return [
            Entry(day=day, provider=provider, model=model, lane=lane, **counts)
            for (day, provider, model, lane), counts in sums.items()
        ]


def _add_failures(sums: Counter[str], record: StoredResult | Result) -> None:
    rate_limited = sum(attempt.status == 429 for attempt in record.failed_attempts)
    sums["rate_limited"] += rate_limited
    sums["failed_attempts"] += len(record.failed_attempts) - rate_limited
    sums["unknown"] += sum(attempt.is_unknown for attempt in record.failed_attempts)
    for usage, nanos in record.wasted:
        _add_tokens(sums, usage)
        sums["wasted_nano"] += nanos or 0
        sums["unpriced"] += nanos is None


def _add_tokens(sums: Counter[str], usage: Usage) -> None:
    for name in TOKEN_FIELDS:
        tokens = getattr(usage, name)
        if tokens:  # most kinds are 0 in most answers, and this runs for each result
            sums[name] += tokens
