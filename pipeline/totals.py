"""Results -> the totals of a run, as `*.usage.json` and `--json` show them (DESIGN: per-run totals). Pure.

Tokens are summed from what the provider reported and from nothing else. The top level tells what this run did and
spent; `results` tells the same for the whole results file, earlier runs included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.journal import Sent
from pipeline.results import Record
from pipeline.types import Result, Usage

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

    def as_dict(self) -> dict[str, int]:
        return {"input": self.input, "output": self.output, "total": self.input + self.output} | {
            name: getattr(self, name) for name in _TOKENS[2:]
        }


@dataclass(slots=True)
class Totals:
    """Running totals over results; `without_usage` counts answers whose server reported no tokens."""

    succeeded: int = 0
    failed: int = 0
    invalid: int = 0
    without_usage: int = 0
    tokens: Tokens = field(default_factory=Tokens)
    _models: dict[tuple[str, str, str], tuple[list[int], Tokens]] = field(
        default_factory=lambda: defaultdict(lambda: ([0], Tokens()))
    )

    @property
    def finished(self) -> int:
        """How many results there are, of every kind."""
        return self.succeeded + self.failed + self.invalid

    def add(self, record: Record | Result) -> None:
        """Count one result, just written or read back."""
        if not record.success:
            self.invalid += record.is_invalid
            self.failed += not record.is_invalid
            return
        self.succeeded += 1
        requests, tokens = self._models[record.provider or "", record.model or "", record.lane]
        requests[0] += 1
        if record.usage is None:
            self.without_usage += 1
        else:
            self.tokens.add(record.usage)
            tokens.add(record.usage)

    def by_model(self) -> list[dict[str, Any]]:
        """Return requests and tokens of each (provider, model, lane), the largest first."""
        rows = [
            {
                "provider": provider,
                "model": model,
                "lane": lane,
                "requests": requests[0],
                "tokens": tokens.as_dict(),
                "cost": None,
            }
            for (provider, model, lane), (requests, tokens) in self._models.items()
        ]
        return sorted(rows, key=lambda row: -row["tokens"]["total"])


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
    of: in flight at the end, or when an earlier run was killed. `warnings` and `failures` (the first few, with file
    and line) are for people.
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
    possibly_billed: Sequence[Sent] = ()
    superseded: int = 0
    warnings: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the documented JSON object."""
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
            "cost": _cost(self.run),
            "by_model": self.run.by_model(),
            "results": {
                "requests": {
                    "succeeded": self.results.succeeded,
                    "failed": self.results.failed,
                    "invalid": self.results.invalid,
                },
                "tokens": self.results.tokens.as_dict(),
                "cost": _cost(self.results),
                "by_model": self.results.by_model(),
            },
            "possibly_billed": [sent.as_dict() for sent in self.possibly_billed],
            "superseded": self.superseded,
            "warnings": list(self.warnings),
        }


def _cost(totals: Totals) -> dict[str, Any]:
    """Say what is known of the cost: with no price table, every answer is unpriced, and unknown is not zero."""
    return {
        "currency": "USD",
        "total": None if totals.succeeded else 0,
        "unpriced_requests": totals.succeeded,
        "price_source": None,
    }
