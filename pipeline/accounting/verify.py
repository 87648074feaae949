"""`pipeline verify`: proves from the files alone that nothing is missing, torn, twice or wrongly summed. Reads only."""

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
    """What was found: how much was looked at, what is wrong, what a person should know all the same.

    `problems` counts every kind of problem, `shown` holds the first few of them in words.
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
        """6 when results are damaged, 1 when anything else is wrong, else 0."""
        return 6 if self.problems["damaged"] else int(self.problems.total() > 0)

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
    """Look at a results file, its totals, what a ledger says of its runs, and whether each line of `inputs` has one.

    `name` is what the results are called: the folder at a store where the file is a copy of that.
    """
    name = name or path
    if not path.is_file():
        raise UsageError(f"the results {str(name)!r} are not a file" if name == path else f"{name!r} holds no results")
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
    """Read every result line; return how many lines each id has.

    An id stands once among the requests, but a line that could not be sent may bear any: it may well have been given
    up because its id stands elsewhere. Such a line is told from others by its digest.
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
        mark = fingerprint(record.custom_id)
        ids.put(mark, (ids.get(mark) or 0) + 1)
        if not seen.add(fingerprint(record.custom_id, record.digest) if record.is_invalid else mark):
            report.add("twice", f"{name}:{number}: {record.custom_id!r} has a result before; a finished run keeps one")
    return ids


def _lines(path: Path, name: str | Path, report: VerifyReport) -> Iterator[tuple[int, bytes]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        for number, (line, length) in enumerate(jsonl.lines(file, codec.MAX_LINE_BYTES), start=1):
            if length:
                yield number, line
        file.seek(max(0, size - 1))
        if size and file.read(1) != b"\n":
            report.add("damaged", f"{name}: the last line has no end: the run was killed, repeat it")


def _totals(path: Path, of: str | Path, report: VerifyReport, totals: Totals) -> None:
    """Compare the totals file with the sum over the lines."""
    file = files.beside(path, ".usage.json")
    name = file if of == path else f"{of}usage.json"
    try:
        told = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        report.add("totals", f"{name}: is not there: no run of {of} has ended yet, repeat it")
        return
    except (OSError, orjson.JSONDecodeError) as exc:
        report.add("totals", f"{name}: cannot be read: {exc}")
        return
    match told:
        case {"results": {"cost": {"price_source": price_source}} as stated, "possibly_billed": [*unknown]}:
            pass
        case _:
            report.add("totals", f"{name}: does not hold what a run writes, repeat it")
            return
    if told.get("status") != "completed":
        report.notes.append(f"the last run has not finished: {told.get('stop_reason') or told.get('status')}")
    if unknown:
        report.notes.append(f"{len(unknown):,} call(s) may be billed without an answer; see possibly_billed in {name}")
    for key, found in totals.as_dict(price_source).items():
        if stated.get(key) != found:
            report.add("totals", f"{name}: results.{key} is {stated.get(key)}, and the lines add up to {found}")


def _ledger(path: Path, name: str | Path, ledger: Path, report: VerifyReport) -> None:
    """Compare what the ledger says of each run with what the lines say; calls that no line tells of do not count."""
    with Ledger.open(ledger) as book:
        recorded = book.entries(include_simulated=True)
    for run, entries in rebuild.entries_of(path).items():
        if run not in recorded:
            way_out = f"; pipeline report --rebuild {path} tells it" if name == path else ""
            report.notes.append(f"the ledger knows nothing of {run}{way_out}")
            continue
        for field_name in _LEDGER_SUMS:
            said, found = (sum(getattr(entry, field_name) for entry in each) for each in (recorded[run], entries))
            if said != found:
                report.add("ledger", f"{ledger}: {field_name} of {run} is {said:,}, and the lines add up to {found:,}")


def _inputs(
    name: str | Path, inputs: Sequence[str], settings: Config, report: VerifyReport, ids: FingerprintMap
) -> None:
    """Look for the result of every line; ids do not depend on settings."""
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
    if extra := report.results - found:
        report.notes.append(f"{extra:,} result(s) belong to no line of the input; they are kept, as they were paid for")
