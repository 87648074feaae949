"""Results -> the entries of the ledger: what each adds up to by day, provider, model and lane. Pure.

The same for results that were just written and for lines that are read back, so that a ledger made again from the
result files says what the runs themselves said.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from pipeline.accounting.ledger import Entry
from pipeline.core.types import Result, Usage
from pipeline.results.attempt_log import LoggedCall
from pipeline.results.codec import StoredResult

_TOKENS = tuple(name for name in Entry.__slots__ if name.endswith("_tokens"))


class UsageAggregator:
    """The entries of one run, while it goes on."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str, str], Counter[str]] = defaultdict(Counter)

    def add(self, record: StoredResult | Result, day: str) -> None:
        """Count a result of a day (UTC, `2026-11-26`); an invalid line cost nothing."""
        if record.is_invalid:
            return
        sums = self._sums[day, record.provider or "", record.model or "", record.lane]
        sums["requests"] += 1
        sums["succeeded" if record.success else "failed"] += 1
        sums["attempts"] += record.attempts
        if record.success:
            sums["cost_nano"] += record.cost.nanos or 0
            sums["unpriced"] += record.cost.nanos is None
            sums["saved_nano"] += record.cost.saved
        if usage := record.usage:
            _add_tokens(sums, usage)
        if record.failed_attempts:
            _add_failures(sums, record)

    def entries(self, unknown: Sequence[LoggedCall] = ()) -> list[Entry]:
        """Return the entries; `unknown` are calls that may be billed and that no result tells of."""
        sums = {key: Counter(counts) for key, counts in self._sums.items()}
        for sent in unknown:
            counts = sums.setdefault((sent.at[:10], sent.provider, sent.model, "live"), Counter())
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
    for name in _TOKENS:
        if tokens := getattr(usage, name):  # most are 0 most of the time
            sums[name] += tokens
