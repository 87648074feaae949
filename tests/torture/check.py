"""An independent judge of a run: it knows input, results and the server's journal, and nothing of the program.

    python -m tests.torture.check INPUT RESULTS --journal FILE [--usage FILE] [--partial]

prints the verdict as JSON on stdout and one line for people on stderr; the exit code is 0 when every rule holds:

- every id of the input stands exactly once in the results, and no other (`--partial`: some may be missing);
- an answer is the one for its record, and the server had really given it: content and tokens are compared;
- a call that the provider did the work for and that brought no answer is told as one that may be billed;
- no call was made that the program does not know of;
- the totals are the sums.

Calls that were paid without a result are no fault of the program alone (a connection may break), so they are counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from tests.torture import truth

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found; lists hold ids, and are empty in a run without fault.

    `repeated_paid_calls` = calls that the provider did the work for, beyond one for each answer. `answer_tokens` are
    those of the results, `journal_tokens` those that the server told in the answers that were taken.
    """

    inputs: int
    results: int
    answered: int
    failed: int
    calls: int
    paid_calls: int
    repeated_paid_calls: int
    answer_tokens: Mapping[str, int]
    journal_tokens: Mapping[str, int]
    torn_lines: Sequence[int]
    missing: Sequence[str]
    extra: Sequence[str]
    twice: Sequence[str]
    swapped: Sequence[str]
    false_successes: Sequence[str]
    wrong_usage: Sequence[str]
    unflagged: Sequence[str]
    unknown_calls: Sequence[str]
    wrong_totals: Sequence[str]

    @property
    def faults(self) -> dict[str, int]:
        """How often each rule was broken, of those that were."""
        broken = {name: len(value) for name, value in asdict(self).items() if isinstance(value, list) and value}
        if self.answer_tokens != self.journal_tokens:
            broken["tokens"] = 1
        return broken

    @property
    def holds(self) -> bool:
        return not self.faults

    def sentence(self) -> str:
        """Return the verdict in one line."""
        broken = ", ".join(f"{count} × {name}" for name, count in self.faults.items())
        tokens = sum(self.answer_tokens.values())
        return (
            f"{'holds' if self.holds else 'BROKEN: ' + broken}: {self.inputs:,} inputs, {self.answered:,} answered, "
            f"{self.failed:,} failed, {tokens:,} tokens; {self.calls:,} calls, {self.paid_calls:,} paid, "
            f"{self.repeated_paid_calls:,} of them repeated"
        )


def check(
    input_ids: Sequence[str],
    lines: Sequence[bytes],
    journal: Iterable[Object],
    *,
    usage: Object | None = None,
    is_partial: bool = False,
) -> Verdict:
    """Compare the lines of a results file with the ids of its input and the server's journal."""
    results, torn = _parsed(lines)
    calls = _calls(journal)
    by_id = _by_id(calls)
    places = Counter(str(result.get("custom_id")) for result in results)
    answered = [result for result in results if result.get("success") is True]
    taken = {id: call for result in answered if (call := _taken(by_id[id := str(result["custom_id"])]))}
    paid = [call for call in calls if call["billed"]]
    return Verdict(
        inputs=len(input_ids),
        results=len(results),
        answered=len(answered),
        failed=len(results) - len(answered),
        calls=len(calls),
        paid_calls=len(paid),
        repeated_paid_calls=len(paid) - len(taken),
        answer_tokens=_sum(_told(result.get("usage")) for result in answered),
        journal_tokens=_sum(call["told"] for call in taken.values()),
        torn_lines=torn,
        missing=[] if is_partial else [id for id in input_ids if id not in places],
        extra=sorted(places.keys() - set(input_ids)),
        twice=sorted(id for id, count in places.items() if count > 1),
        swapped=[_id(result) for result in answered if not _is_own(result, taken.get(_id(result)))],
        false_successes=[_id(result) for result in answered if _id(result) not in taken],
        wrong_usage=[_id(result) for result in answered if not _is_told(result, taken.get(_id(result)))],
        unflagged=[_id(result) for result in results if _unflagged(result, by_id[_id(result)])],
        unknown_calls=[_id(result) for result in results if len(by_id[_id(result)]) > result["attempts"]],
        wrong_totals=_wrong_totals(results, usage) if usage else [],
    )


def _parsed(lines: Sequence[bytes]) -> tuple[list[Object], list[int]]:
    """Return the results, and the numbers of the lines that are none."""
    results: list[Object] = []
    torn: list[int] = []
    for number, line in enumerate(lines, 1):
        try:
            value = orjson.loads(line)  # strict, and nests deeper than the standard library can follow
        except ValueError:
            torn.append(number)
            continue
        results.append(value) if isinstance(value, dict) else torn.append(number)
    return results, torn


def _calls(journal: Iterable[Object]) -> list[Object]:
    """Return the calls of a journal, each with how it ended; one without an end was cut off with the server."""
    calls: dict[int, dict[str, Any]] = {}
    for entry in journal:
        if entry["event"] == "call":
            calls[entry["call"]] = {"accepted": False, "bytes": 0, "ended_at": None, **entry}
        elif entry["event"] == "end":
            calls[entry["call"]].update(accepted=entry["accepted"], bytes=entry["bytes"], ended_at=entry["at"])
    return list(calls.values())


def _by_id(calls: Iterable[Object]) -> dict[str, list[Object]]:
    grouped: dict[str, list[Object]] = defaultdict(list)
    for call in calls:
        grouped[call["id"]].append(call)
    return grouped


def _taken(calls: Sequence[Object]) -> Object | None:
    """Return the call whose reply became the answer: the last one that was an answer and was wholly accepted."""
    return next((call for call in reversed(calls) if call["is_answer"] and call["accepted"]), None)


def _id(result: Object) -> str:
    return str(result.get("custom_id"))


def _is_own(result: Object, call: Object | None) -> bool:
    """Tell whether an answer's text is the one for its record."""
    return bool(result["content"] == truth.content(_id(result)) + (call["suffix"] if call else ""))


def _told(usage: Object | None) -> dict[str, int] | None:
    return None if usage is None else {"input": usage["input_tokens"], "output": usage["output_tokens"]}


def _is_told(result: Object, call: Object | None) -> bool:
    return call is None or _told(result["usage"]) == call["told"]


def _unflagged(result: Object, calls: Sequence[Object]) -> bool:
    """Tell whether a record cost more calls than its result admits: answered, or flagged as maybe billed."""
    admitted = sum(bool(each.get("may_be_billed")) for each in _failed_attempts(result)) + (result["success"] is True)
    return sum(call["billed"] is not None for call in calls) > admitted


def _failed_attempts(result: Object) -> Sequence[Object]:
    return result.get("failed_attempts") or (result.get("error") or {}).get("attempts") or []


def _sum(usages: Iterable[Object | None]) -> dict[str, int]:
    total = {"input": 0, "output": 0}
    for usage in usages:
        for name in total:
            total[name] += usage[name] if usage else 0
    return total


def _wrong_totals(results: Sequence[Object], usage: Object) -> list[str]:
    """Return which totals of the results file are not the sums of its lines; what failed attempts told counts too."""
    told = usage["results"]
    used = [each.get("usage") for result in results for each in (result, *_failed_attempts(result))]
    succeeded = sum(result["success"] is True for result in results)
    sums = {**_sum(map(_told, used)), "succeeded": succeeded}
    found = {**{name: told["tokens"][name] for name in ("input", "output")}, **told["requests"]}
    return [name for name, value in sums.items() if found[name] != value]


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a server's journal."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def calls(path: Path) -> list[Object]:
    """Return the calls of a server's journal, with how they ended."""
    return _calls(read_journal(path))


def check_files(
    input: Path, results: Path, journals: Sequence[Path], usage: Path | None = None, *, is_partial: bool = False
) -> Verdict:
    """Judge a run by its files."""
    ids = [json.loads(line)["custom_id"] for line in input.read_bytes().split(b"\n") if line.strip()]
    lines = results.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    entries = [entry for journal in _numbered(journals) for entry in journal]
    totals = json.loads(usage.read_bytes()) if usage else None
    return check(ids, lines, entries, usage=totals, is_partial=is_partial)


def _numbered(journals: Sequence[Path]) -> Iterable[list[Object]]:
    """Yield several journals so that no number of a call stands in two of them."""
    for place, path in enumerate(journals):
        yield [
            {**entry, "call": entry["call"] * len(journals) + place} if "call" in entry else entry
            for entry in read_journal(path)
        ]


def main() -> int:
    """Judge the files of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("input", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--journal", type=Path, action="append", required=True, help="repeatable, in order of time")
    parser.add_argument("--usage", type=Path, help="the totals of the results file")
    parser.add_argument("--partial", action="store_true", help="the run ended early: lines may be missing")
    given = parser.parse_args()
    verdict = check_files(given.input, given.results, given.journal, given.usage, is_partial=given.partial)
    print(json.dumps({"holds": verdict.holds, **asdict(verdict)}))
    print(verdict.sentence(), file=sys.stderr)
    return int(not verdict.holds)


if __name__ == "__main__":
    sys.exit(main())
