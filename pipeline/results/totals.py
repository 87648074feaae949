"""Results -> the totals of a run, as `*.usage.json` and `--json` show them (DESIGN: per-run totals). Pure.

Tokens are summed from what the provider reported and from nothing else, money in whole nano-dollars. What failed
attempts reported counts too: it is billed. The top level tells what this run did and spent; `results` tells the same
for the whole results file, earlier runs included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.core import money
from pipeline.core.types import Result, Usage
from pipeline.results.codec import StoredResult

_SUMS = ("requests", "nanos", "wasted", "saved", "priced", "unpriced")
_TOKENS = ("input", "output", "cache_read", "cache_write", "reasoning")


@dataclass(slots=True)
class Tokens:
    """A sum of usages."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    reasoning: int = 0

    def add(self, usage: Usage) -> None:
        self.input += usage.input_tokens
        self.output += usage.output_tokens
        self.cache_read += usage.cache_read_tokens
        self.cache_write += usage.cache_write_tokens
        self.reasoning += usage.reasoning_tokens

    def merge(self, sums: Mapping[str, int]) -> None:
        """Add another sum, as `asdict` gives it."""
        for name in _TOKENS:
            setattr(self, name, getattr(self, name) + sums[name])

    def as_dict(self) -> dict[str, int]:
        return {"input": self.input, "output": self.output, "total": self.input + self.output} | {
            name: getattr(self, name) for name in _TOKENS[2:]
        }


@dataclass(slots=True)
class Spending:
    """Requests answered, tokens, and money in nano-dollars.

    `nanos` is all that has a price; `wasted` is the part of it that failed attempts cost; `saved` is what the cache
    saved. `priced` and `unpriced` count the billed calls with and without a known price.
    """

    requests: int = 0
    tokens: Tokens = field(default_factory=Tokens)
    nanos: int = 0
    wasted: int = 0
    saved: int = 0
    priced: int = 0
    unpriced: int = 0

    def add(self, record: StoredResult | Result) -> None:
        if record.success:
            self.requests += 1
            self.saved += record.cost.saved
            self._add_call(record.usage, record.cost.nanos)
        for usage, nanos in record.wasted:
            self.wasted += nanos or 0
            self._add_call(usage, nanos)

    def _add_call(self, usage: Usage | None, nanos: int | None) -> None:
        if usage is not None:
            self.tokens.add(usage)
        if nanos is None:
            self.unpriced += 1
        else:
            self.priced += 1
            self.nanos += nanos

    def merge(self, sums: Mapping[str, Any]) -> None:
        """Add another sum, as `asdict` gives it."""
        self.tokens.merge(sums["tokens"])
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + sums[name])

    @property
    def usd(self) -> float | None:
        """Dollars; None where not one of the calls has a known price, as unknown is not zero."""
        return None if self.unpriced and not self.priced else money.dollars(self.nanos)

    def as_dict(self, price_source: str | None) -> dict[str, Any]:
        return {
            "currency": "USD",
            "total": self.usd,
            "wasted": money.dollars(self.wasted),
            "saved_by_cache": money.dollars(self.saved),
            "unpriced_requests": self.unpriced,
            "price_source": price_source,
        }


@dataclass(slots=True)
class Totals:
    """Running totals over results; `without_usage` counts answers whose server reported no tokens."""

    succeeded: int = 0
    failed: int = 0
    invalid: int = 0
    without_usage: int = 0
    _models: dict[tuple[str, str, str], Spending] = field(default_factory=lambda: defaultdict(Spending))

    @property
    def finished(self) -> int:
        """How many results there are, of every kind."""
        return self.succeeded + self.failed + self.invalid

    @property
    def spending(self) -> Spending:
        """The sum over all models."""
        total = Spending()
        for each in self._models.values():
            total.merge(asdict(each))
        return total

    @property
    def tokens(self) -> Tokens:
        return self.spending.tokens

    def add(self, record: StoredResult | Result) -> None:
        """Count one result, just written or read back."""
        if record.success:
            self.succeeded += 1
            self.without_usage += record.usage is None
        else:
            self.invalid += record.is_invalid
            self.failed += not record.is_invalid
            if not record.wasted:
                return
        self._models[record.provider or "", record.model or "", record.lane].add(record)

    def as_dict(self, price_source: str | None) -> dict[str, Any]:
        """Return the totals of a whole results file."""
        return {
            "requests": {"succeeded": self.succeeded, "failed": self.failed, "invalid": self.invalid},
            "tokens": self.tokens.as_dict(),
            "cost": self.spending.as_dict(price_source),
            "by_model": self.by_model(),
        }

    def as_state(self) -> dict[str, Any]:
        """Return all of it as JSON values, from which `add_state` counts it again."""
        return {
            "succeeded": self.succeeded,
            "failed": self.failed,
            "invalid": self.invalid,
            "without_usage": self.without_usage,
            "models": [[key, asdict(spending)] for key, spending in self._models.items()],
        }

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Count results that were counted before."""
        self.succeeded += state["succeeded"]
        self.failed += state["failed"]
        self.invalid += state["invalid"]
        self.without_usage += state["without_usage"]
        for (provider, model, lane), sums in state["models"]:
            self._models[provider, model, lane].merge(sums)

    def by_model(self) -> list[dict[str, Any]]:
        """Return requests, tokens and dollars of each (provider, model, lane), the largest first."""
        rows = [
            {
                "provider": provider,
                "model": model,
                "lane": lane,
                "requests": spending.requests,
                "tokens": spending.tokens.as_dict(),
                "cost": spending.usd,
            }
            for (provider, model, lane), spending in self._models.items()
        ]
        return sorted(rows, key=lambda row: (-(row["cost"] or 0.0), -row["tokens"]["total"], row["model"]))
