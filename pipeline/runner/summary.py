"""The summary of a run: the content of `*.usage.json` and of `--json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core import money
from pipeline.results.attempt_log import LoggedCall
from pipeline.results.totals import Totals


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
    possibly_billed: Sequence[LoggedCall] = ()
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
