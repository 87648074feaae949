"""Results -> the totals of a run, as `*.usage.json` and `--json` show them (DESIGN: per-run totals). Pure.

Tokens are summed from what the provider reported and from nothing else, money in whole nano-dollars. What failed
attempts reported counts too: it is billed. The top level tells what this run did and spent; `results` tells the same
for the whole results file, earlier runs included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.core import money
from pipeline.core.types import Result, Usage
from pipeline.results.attempt_log import Sent
from pipeline.results.codec import Record

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

    def add(self, record: Record | Result) -> None:
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

    def add(self, record: Record | Result) -> None:
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
        """Return what is told of a whole results file."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """Calls of a run. `billed` brought a valid answer; `unknown` may be billed without one (timeouts after sending)."""

    total: int = 0
    billed: int = 0
    rate_limited: int = 0
    failed: int = 0
    unknown: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run did: the content of `*.usage.json` and of `--json`.

    `status` is `completed` (every line has a result), `partial` (ended early, can be continued) or `stopped` (by the
    provider, the budget, a signal or storage; `stop_reason` says by what). `results_file` is None for a Python stream.
    `possibly_billed` are calls that brought no answer and may be billed all the same, and that no result line tells
    of: in flight at the end, or when an earlier run was killed. `cap` is what the run may spend, in nano-dollars, and
    `cap_used` what it did, what may be billed included. `batches` are the providers' own that this run made or met.
    `extra` counts results that batches brought for lines which the input has no more; they are not in `total`.
    `warnings` were said before the first call; they and `failures` (the first few, with file and line) are for people.
    `ends_all` is true when what stopped this run would stop any other too (a wrong key, no credit).
    """

    run_id: str
    status: str
    stop_reason: str | None
    exit_code: int
    started_at: str
    finished_at: str
    wall_seconds: float
    simulated: bool
    tags: Mapping[str, str]
    inputs: list[str]
    results_file: str | None
    total: int
    reused: int
    pending: int
    attempts: Attempts
    run: Totals
    results: Totals
    extra: int = 0
    price_source: str | None = None
    cap: int | None = None
    cap_used: int = 0
    possibly_billed: Sequence[Sent] = ()
    superseded: int = 0
    batches: Sequence[Mapping[str, Any]] = ()
    warnings: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    ends_all: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the documented JSON object."""
        cost = self.run.spending.as_dict(self.price_source)
        return {
            "run_id": self.run_id,
            "status": self.status,
            "stop_reason": self.stop_reason,
            "exit_code": self.exit_code,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "wall_seconds": round(self.wall_seconds, 3),
            "simulated": self.simulated,
            "tags": dict(self.tags),
            "inputs": self.inputs,
            "results_file": self.results_file,
            "requests": {
                "total": self.total,
                "succeeded": self.run.succeeded,
                "failed": self.run.failed,
                "invalid": self.run.invalid,
                "pending": self.pending,
                "reused": self.reused,
            },
            "attempts": asdict(self.attempts),
            "tokens": self.run.tokens.as_dict(),
            "cost": cost
            | {
                "cap": None if self.cap is None else money.dollars(self.cap),
                "cap_used": None if self.cap is None else money.dollars(self.cap_used),
            },
            "by_model": self.run.by_model(),
            "results": self.results.as_dict(self.price_source),
            "possibly_billed": [sent.as_dict() for sent in self.possibly_billed],
            "batches": list(self.batches),
            "extra": self.extra,
            "superseded": self.superseded,
            "warnings": list(self.warnings),
        }
