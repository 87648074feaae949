"""Result files -> the runs and entries that the ledger would hold: the way back when it was lost or is wrong.

Reads leniently, as the files may come from other versions: lines without a run go to a run named after their file, and
what a line does not tell is counted as nothing. Tags and how a run ended come from `*.usage.json` where that is about
the run, else from the ledger where it knows the run. A line that stands in two files counts once.
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
    """What was found in result files; `damaged` counts lines that are not results."""

    runs: int
    results: int
    damaged: int

    def __str__(self) -> str:
        damaged = f" ({self.damaged:,} damaged lines left out)" if self.damaged else ""
        return f"{self.runs:,} runs with {self.results:,} results{damaged}"


@dataclass(slots=True)
class _Found:
    """What the lines of one run add up to."""

    results_file: Path
    lines: Counter[str] = field(default_factory=Counter)
    accounts: UsageAggregator = field(default_factory=UsageAggregator)
    first: str = "9999"
    last: str = ""
    is_simulated: bool = False


def rebuild(ledger: Ledger, files: Sequence[Path], only: Mapping[str, RunRow] | None = None) -> Rebuilt:
    """Record the runs of these result files and of what was set aside beside them; other runs stay as they are.

    With `only` just these runs, by id; else a file that holds no result is somebody's mistake: `UsageError`.
    """
    found: dict[str, _Found] = {}
    seen = FingerprintSet()
    damaged = sum(_read(path, found, seen, may_be_empty=only is not None) for path in files)
    summaries = {str(summary.get("run_id")): summary for summary in map(_summary, files)}
    known = only if only is not None else {run.run_id: run for run in ledger.runs(include_simulated=True)}
    for run_id, what in found.items():
        if only is not None and run_id not in only:
            continue
        ledger.record(_run(run_id, what, summaries.get(run_id), known.get(run_id)), what.accounts.entries())
    return Rebuilt(runs=len(found), results=len(seen), damaged=damaged)


def entries_of(path: Path) -> dict[str, list[Entry]]:
    """Return the entries that a results file, with what was set aside from it, tells of each of its runs."""
    found: dict[str, _Found] = {}
    _read(path, found, FingerprintSet())
    return {run_id: what.accounts.entries() for run_id, what in found.items()}


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(main: Path, found: dict[str, _Found], seen: FingerprintSet, *, may_be_empty: bool = False) -> int:
    """Add up the lines of a results file and of those set aside from it; return how many are not results."""
    if not main.is_file():
        raise UsageError(f"{str(main)!r} is not a results file" if main.exists() else f"{str(main)!r} does not exist")
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
            raise UsageError(f"{str(path)!r} holds no results")
    return damaged


def _set_aside(main: Path) -> list[Path]:
    """Return the files that hold answers which were paid for and are not, or no more, in the results file."""
    superseded = beside(main, ".superseded.jsonl")
    old = re.compile(re.escape(beside(main, ".old-").name) + r"\d+\.jsonl")
    aside = [path for path in sorted(superseded.parent.iterdir()) if old.fullmatch(path.name)]
    return [superseded, *aside] if superseded.exists() else aside


def _lines(path: Path) -> Iterator[tuple[bytes, StoredResult | None]]:
    try:
        with path.open("rb") as file:
            yield from ((line, record) for _, line, record in codec.read(file) if line.strip())
    except OSError as exc:
        raise UsageError(f"cannot read {str(path)!r}: {exc.strerror}") from exc


def _add(value: Mapping[str, Any], record: StoredResult, path: Path, main: Path, found: dict[str, _Found]) -> None:
    run_id = _string(value.get("run")) or f"file:{main.resolve()}"
    what = found.setdefault(run_id, _Found(results_file=main))
    at = _time(value.get("completed_at")) or _time_of_run(run_id) or _time_of_file(path)
    what.first = min(what.first, at)
    what.last = max(what.last, at)
    what.is_simulated |= value.get("simulated") is True
    if record.is_invalid:
        what.lines["invalid"] += 1
        return
    what.lines["succeeded" if record.success else "failed"] += 1
    what.accounts.add(record, at[:10])


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _summary(path: Path) -> Mapping[str, Any]:
    """Return `*.usage.json` beside a results file; empty where there is none that can be read."""
    try:
        value = orjson.loads(beside(path, ".usage.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _run(run_id: str, what: _Found, summary: Mapping[str, Any] | None, known: RunRow | None) -> RunRow:
    """Describe a run: the lines count what they hold, the rest is told by its summary, else by the ledger."""
    run = RunRow(
        run_id=run_id,
        started_at=_time_of_run(run_id) or what.first,
        finished_at=what.last,
        status="rebuilt",
        results_file=str(what.results_file),
        total=what.lines.total(),
    )
    if summary is not None:
        run = _described(run, summary)
    elif known is not None:
        run = known
    return replace(
        run,
        simulated=what.is_simulated,
        succeeded=what.lines["succeeded"],
        failed=what.lines["failed"],
        invalid=what.lines["invalid"],
    )


def _described(run: RunRow, summary: Mapping[str, Any]) -> RunRow:
    """Return a run with what its summary tells; values of other types than ours tell nothing."""
    tags, inputs = summary.get("tags"), summary.get("inputs")
    requests, cost = summary.get("requests"), summary.get("cost")
    requests = requests if isinstance(requests, dict) else {}
    wall_seconds = summary.get("wall_seconds")
    return replace(
        run,
        started_at=_time(summary.get("started_at")) or run.started_at,
        finished_at=_time(summary.get("finished_at")) or run.finished_at,
        status=_string(summary.get("status")) or run.status,
        exit_code=_count(summary.get("exit_code")),
        stop_reason=_string(summary.get("stop_reason")),
        inputs=tuple(str(each) for each in inputs) if isinstance(inputs, list) else (),
        tags={str(name): str(tag) for name, tag in tags.items()} if isinstance(tags, dict) else {},
        price_source=_string(cost.get("price_source")) if isinstance(cost, dict) else None,
        total=_count(requests.get("total")) or run.total,
        pending=_count(requests.get("pending")) or 0,
        reused=_count(requests.get("reused")) or 0,
        wall_seconds=float(wall_seconds) if isinstance(wall_seconds, int | float) else 0.0,
    )


# ── values ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _time(value: object) -> str | None:
    """Return a time as we write it; None for anything else."""
    try:
        return value if isinstance(value, str) and _TIME.fullmatch(value) and datetime.fromisoformat(value) else None
    except ValueError:
        return None


def _time_of_run(run_id: str) -> str | None:
    """Return when a run began, as its id tells."""
    match = _RUN_ID.match(run_id)
    return _time("{}-{}-{}T{}:{}:{}Z".format(*match.groups())) if match else None


def _time_of_file(path: Path) -> str:
    return f"{datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _string(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None
