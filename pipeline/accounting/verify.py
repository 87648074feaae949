"""`pipeline verify`: prove from the files alone that no result is missing, damaged, duplicated or wrongly summed.

It only reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from pipeline.accounting import rebuild
from pipeline.accounting.ledger import Ledger
from pipeline.core import files, jsonl
from pipeline.core.config import Config
from pipeline.core.errors import LineError, UsageError
from pipeline.core.hashing import FingerprintMap, FingerprintSet, fingerprint
from pipeline.inputs import reader
from pipeline.inputs.planner import Planner
from pipeline.results import codec
from pipeline.results.totals import Totals

SHOWN = 20
_LEDGER_SUMS = ("succeeded", "failed", "input_tokens", "output_tokens", "cost_nano", "wasted_nano")


@dataclass(slots=True)
class VerifyReport:
    """The outcome: how many results and input lines were read, the problems, and notes that are not problems.

    `problems` counts problems by kind; `shown` describes the first of them.
    """

    results: int = 0
    inputs: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, text: str) -> None:
        self.problems[kind] += 1
        if len(self.shown) < SHOWN:
            self.shown.append(text)

    @property
    def exit_code(self) -> int:
        """6 if results are damaged, 1 for any other problem, else 0."""
        if self.problems["damaged"]:
            return 6
        return int(self.problems.total() > 0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "proven": self.exit_code == 0,
            "results": self.results,
            "inputs": self.inputs,
            "problems": dict(self.problems),
            "shown": self.shown,
            "notes": self.notes,
        }


def verify(
    path: Path,
    inputs: Sequence[str],
    settings: Config,
    *,
    ledger: Path | None = None,
    name: str | Path | None = None,
) -> VerifyReport:
    """Check a results file against its totals file, against the ledger, and against the lines of `inputs`.

    `name` is what messages call the results: the URL of the object store folder if `path` is a copy of one.

    Raises `UsageError` if there are no results.
    """
    name = name or path
    if not path.is_file():
        if name == path:
            raise UsageError(f"the results {str(name)!r} are not a file")
        raise UsageError(f"{name!r} has no results")
    report = VerifyReport()
    totals = Totals()
    ids = _results(path, name, report, totals)
    _totals(path, name, report, totals)
    if ledger and ledger.exists() and report.results:
        _ledger(path, name, ledger, report)
    if inputs:
        _inputs(name, inputs, settings, report, ids)
    return report


def _results(path: Path, name: str | Path, report: VerifyReport, totals: Totals) -> FingerprintMap:
    """Read every result line. Return the number of lines of each id.

    Each id has one result. Invalid lines are the exception: they may share an id with another line, which may be why
    they are invalid. They are identified by their digest.
    """
    ids = FingerprintMap()
    seen = FingerprintSet()
    for number, line in _lines(path, name, report):
        try:
            record = codec.decode(line)
        except LineError as exc:
            report.add("damaged", f"{name}:{number}: {exc.message}")
            continue
        report.results += 1
        totals.add(record)
        id_hash = fingerprint(record.custom_id)
        ids.put(id_hash, (ids.get(id_hash) or 0) + 1)
        identity = id_hash
        if record.is_invalid:
            identity = fingerprint(record.custom_id, record.digest)
        if not seen.add(identity):
            report.add(
                "twice", f"{name}:{number}: {record.custom_id!r} has an earlier result; repeat the run to keep one"
            )
    return ids


def _lines(path: Path, name: str | Path, report: VerifyReport) -> Iterator[tuple[int, bytes]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        for number, (line, length) in enumerate(jsonl.lines(file, codec.MAX_LINE_BYTES), start=1):
            if length:
                yield number, line
        file.seek(max(0, size - 1))
        if size and file.read(1) != b"\n":
            report.add("damaged", f"{name}: the last line is incomplete: the run was killed; repeat it")


def _totals(path: Path, of: str | Path, report: VerifyReport, totals: Totals) -> None:
    """Compare the totals file with the sum over the lines."""
    file = files.beside(path, ".usage.json")
    name = file if of == path else f"{of}usage.json"
    try:
        recorded = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        report.add("totals", f"{name}: missing: no run of {of} has ended yet; repeat it")
        return
    except (OSError, orjson.JSONDecodeError) as exc:
        report.add("totals", f"{name}: cannot be read: {exc}")
        return
    match recorded:
        case {"results": {"cost": {"price_source": price_source}} as stated, "possibly_billed": [*unknown]}:
            pass
        case _:
            report.add("totals", f"{name}: not a totals file that a run writes; repeat the run")
            return
    if recorded.get("status") != "completed":
        reason = recorded.get("stop_reason") or recorded.get("status")
        report.notes.append(f"the last run has not finished: {reason}")
    if unknown:
        report.notes.append(f"{len(unknown):,} call(s) may be billed but have no answer; see possibly_billed in {name}")
    for key, found in totals.as_dict(price_source).items():
        if stated.get(key) != found:
            report.add("totals", f"{name}: results.{key} is {stated.get(key)}, but the lines add up to {found}")


def _ledger(path: Path, name: str | Path, ledger: Path, report: VerifyReport) -> None:
    """Compare the ledger's sums of each run with the sums over its lines. Calls without a result line do not count."""
    with Ledger.open(ledger) as book:
        recorded = book.entries(include_simulated=True)
    for run, entries in rebuild.entries_of(path).items():
        if run not in recorded:
            note = f"the ledger does not know {run}"
            if name == path:
                note += f"; add it with: pipeline report --rebuild {path}"
            report.notes.append(note)
            continue
        for column in _LEDGER_SUMS:
            in_ledger = sum(getattr(entry, column) for entry in recorded[run])
            in_lines = sum(getattr(entry, column) for entry in entries)
            if in_ledger != in_lines:
                report.add(
                    "ledger", f"{ledger}: {column} of {run} is {in_ledger:,}, but the lines add up to {in_lines:,}"
                )


def _inputs(
    name: str | Path, inputs: Sequence[str], settings: Config, report: VerifyReport, ids: FingerprintMap
) -> None:
    """Look for the result of every input line."""
    # Ids do not depend on settings, so it does not matter if the run used others.
    planner = Planner(settings)
    found = 0
    for source in reader.sources(inputs, but=name):
        for line in reader.lines(source, settings.input.max_line_bytes):
            report.inputs += 1
            custom_id = planner.plan(line).custom_id
            count = ids.get(fingerprint(custom_id))
            if count:
                ids.put(fingerprint(custom_id), count - 1)
                found += 1
            else:
                report.add("missing", f"{line.source}:{line.number}: {custom_id!r} has no result")
    extra = report.results - found
    if extra:
        report.notes.append(
            f"{extra:,} result(s) belong to no line of the input; they are kept because they are paid for"
        )
