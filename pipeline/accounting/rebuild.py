"""Rebuild runs and entries of the ledger from result files, after the ledger was lost or damaged.

Files may come from other versions, so reading is lenient: lines without a run id go to a run named after their file,
and missing fields count as zero. Tags and the end of a run come from `*.usage.json` if it is about that run, else from
the ledger if it knows the run. A line that is in two files counts once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from pipeline.accounting.ledger import Entry, Ledger, RunRow
from pipeline.accounting.usage import UsageAggregator
from pipeline.core.errors import UsageError
from pipeline.core.files import beside
from pipeline.core.hashing import FingerprintSet, fingerprint
from pipeline.results import codec
from pipeline.results.codec import StoredResult

_TIME = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_RUN_ID = re.compile(r"run-(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z-", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """The content of result files. `damaged` counts lines that are not results."""

    runs: int
    results: int
    damaged: int

    def __str__(self) -> str:
        found = f"{self.runs:,} runs with {self.results:,} results"
        if not self.damaged:
            return found
        return f"{found} ({self.damaged:,} damaged lines left out)"


@dataclass(slots=True)
class _RunSums:
    """Sums over the lines of one run. `first` and `last` are the times of its first and last result."""

    results_file: Path
    lines: Counter[str] = field(default_factory=Counter)
    accounts: UsageAggregator = field(default_factory=UsageAggregator)
    first: str = "9999"
    last: str = ""
    is_simulated: bool = False


def rebuild(ledger: Ledger, files: Sequence[Path], only: Mapping[str, RunRow] | None = None) -> Rebuilt:
    """Record the runs of these result files, and of the files set aside beside them. Other runs stay as they are.

    `only` limits this to some runs, by id. Without it, a file that has no results is a mistake: raises `UsageError`.
    """
    found: dict[str, _RunSums] = {}
    seen = FingerprintSet()
    damaged = sum(_read(path, found, seen, may_be_empty=only is not None) for path in files)

    summaries = {}
    for path in files:
        summary = _summary(path)
        summaries[str(summary.get("run_id"))] = summary
    known = only
    if known is None:
        known = {run.run_id: run for run in ledger.runs(include_simulated=True)}
    for run_id, sums in found.items():
        if only is not None and run_id not in only:
            continue
        run = _run(run_id, sums, summaries.get(run_id), known.get(run_id))
        ledger.record(run, sums.accounts.entries())
    return Rebuilt(runs=len(found), results=len(seen), damaged=damaged)


def entries_of(path: Path) -> dict[str, list[Entry]]:
    """Return the ledger entries, by run id, that a results file and the files set aside beside it add up to."""
    found: dict[str, _RunSums] = {}
    _read(path, found, FingerprintSet())
    return {run_id: sums.accounts.entries() for run_id, sums in found.items()}


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(main: Path, found: dict[str, _RunSums], seen: FingerprintSet, *, may_be_empty: bool = False) -> int:
    """Add up the lines of a results file and of the files set aside beside it. Return the number of damaged lines."""
    if not main.exists():
        raise UsageError(f"{str(main)!r} does not exist")
    if not main.is_file():
        raise UsageError(f"{str(main)!r} is not a results file")
    damaged = 0
    for path in (main, *_set_aside(main)):
        count = 0
        for line, record in _lines(path):
            if record is None:
                damaged += 1
                continue
            count += 1
            if seen.add(fingerprint(line.decode())):
                _add(orjson.loads(line), record, path, main, found)
        if path is main and not count and not may_be_empty:
            raise UsageError(f"{str(path)!r} has no results; give files that `pipeline run` wrote")
    return damaged


def _set_aside(main: Path) -> list[Path]:
    """Return the files with paid answers that a later run took out of the results file."""
    superseded = beside(main, ".superseded.jsonl")
    old = re.compile(re.escape(beside(main, ".old-").name) + r"\d+\.jsonl")
    aside = [path for path in sorted(superseded.parent.iterdir()) if old.fullmatch(path.name)]
    if superseded.exists():
        aside.insert(0, superseded)
    return aside


def _lines(path: Path) -> Iterator[tuple[bytes, StoredResult | None]]:
    try:
        with path.open("rb") as file:
            for _, line, record in codec.read(file):
                if line.strip():
                    yield line, record
    except OSError as exc:
        raise UsageError(f"cannot read {str(path)!r}: {exc.strerror}") from exc


def _add(value: Mapping[str, Any], record: StoredResult, path: Path, main: Path, found: dict[str, _RunSums]) -> None:
    run_id = _string(value.get("run")) or f"file:{main.resolve()}"
    sums = found.setdefault(run_id, _RunSums(results_file=main))
    at = _time(value.get("completed_at")) or _time_of_run(run_id) or _time_of_file(path)
    sums.first = min(sums.first, at)
    sums.last = max(sums.last, at)
    sums.is_simulated |= value.get("simulated") is True
    if record.is_invalid:
        sums.lines["invalid"] += 1
        return
    sums.lines["succeeded" if record.success else "failed"] += 1
    sums.accounts.add(record, at[:10])


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _summary(path: Path) -> Mapping[str, Any]:
    """Return the totals file beside a results file. Empty if it is missing or damaged."""
    try:
        value = orjson.loads(beside(path, ".usage.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return _object(value)


def _run(run_id: str, sums: _RunSums, summary: Mapping[str, Any] | None, known: RunRow | None) -> RunRow:
    """Describe a run. Counts come from its lines; the rest from its totals file, else from the ledger."""
    run = RunRow(
        run_id=run_id,
        started_at=_time_of_run(run_id) or sums.first,
        finished_at=sums.last,
        status="rebuilt",
        results_file=str(sums.results_file),
        total=sums.lines.total(),
    )
    if summary is not None:
        run = _described(run, summary)
    elif known is not None:
        run = known
    return replace(
        run,
        simulated=sums.is_simulated,
        succeeded=sums.lines["succeeded"],
        failed=sums.lines["failed"],
        invalid=sums.lines["invalid"],
    )


def _described(run: RunRow, summary: Mapping[str, Any]) -> RunRow:
    """Return a run with the fields of its totals file. Fields of an unexpected type are ignored."""
    requests = _object(summary.get("requests"))
    cost = _object(summary.get("cost"))
    tags = _object(summary.get("tags"))
    inputs = summary.get("inputs")
    if not isinstance(inputs, list):
        inputs = []
    wall_seconds = summary.get("wall_seconds")
    return replace(
        run,
        started_at=_time(summary.get("started_at")) or run.started_at,
        finished_at=_time(summary.get("finished_at")) or run.finished_at,
        status=_string(summary.get("status")) or run.status,
        exit_code=_count(summary.get("exit_code")),
        stop_reason=_string(summary.get("stop_reason")),
        inputs=tuple(str(each) for each in inputs),
        tags={str(name): str(tag) for name, tag in tags.items()},
        price_source=_string(cost.get("price_source")),
        total=_count(requests.get("total")) or run.total,
        pending=_count(requests.get("pending")) or 0,
        reused=_count(requests.get("reused")) or 0,
        wall_seconds=float(wall_seconds) if isinstance(wall_seconds, int | float) else 0.0,
    )


# ── values ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _time(value: object) -> str | None:
    """Return a time in the format this program writes. None for anything else."""
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        return None
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return None
    return value


def _time_of_run(run_id: str) -> str | None:
    """Return the start time that is part of a run id."""
    match = _RUN_ID.match(run_id)
    if match is None:
        return None
    return _time("{}-{}-{}T{}:{}:{}Z".format(*match.groups()))


def _time_of_file(path: Path) -> str:
    return f"{datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _object(value: object) -> Mapping[str, Any]:
    """Return a JSON object. Empty for any other value."""
    if isinstance(value, dict):
        return value
    return {}


def _string(value: object) -> str | None:
    """Return a text that is not empty. None for any other value."""
    if isinstance(value, str) and value:
        return value
    return None


def _count(value: object) -> int | None:
    """Return a number that is not negative. None for any other value; True and False are no numbers."""
    if type(value) is int and value >= 0:
        return value
    return None
