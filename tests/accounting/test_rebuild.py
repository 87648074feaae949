from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.accounting import report
from pipeline.accounting.ledger import Entry, Ledger, RunRow
from pipeline.accounting.rebuild import Rebuilt
from pipeline.core.errors import UsageError
from pipeline.core.types import Completion, OutputFormat, Request, Result, Usage
from pipeline.results import codec

RUN_ID = "run-20261126T010203Z-abc123"
NOON = 1_795_694_400  # 2026-11-26T12:00:00Z
USAGE = {
    "input_tokens": 100,
    "output_tokens": 50,
    "total_tokens": 150,
    "cache_read_tokens": 40,
    "cache_write_tokens": 30,
    "cache_write_1h_tokens": 20,
    "reasoning_tokens": 10,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(custom_id: str = "q-1", **values: Any) -> dict[str, Any]:
    line = {
        "custom_id": custom_id,
        "digest": "0" * 32,
        "success": True,
        "run": RUN_ID,
        "provider": "openai",
        "model": "gpt-6-luna",
        "lane": "live",
        "usage": USAGE,
        "cost_usd": 0.0005625,
        "attempts": 1,
        "completed_at": "2026-11-26T01:03:00Z",
    }
    return line | values


def failure(custom_id: str = "q-2", attempts: Any = (), **values: Any) -> dict[str, Any]:
    line = answer(custom_id, success=False, attempts=len(attempts), error={"type": "x", "attempts": attempts}, **values)
    return {name: value for name, value in line.items() if name not in ("usage", "cost_usd", "lane")}


def write(path: str, *lines: Any) -> None:
    Path(path).write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def rebuilt(*files: str) -> tuple[Rebuilt, list[RunRow], dict[str, list[Entry]]]:
    """Rebuild a ledger from files; return what was said, and what it holds then."""
    said = report.rebuild(Path("ledger.sqlite"), [Path(file) for file in files])
    with Ledger.open(Path("ledger.sqlite")) as book:
        return said, book.runs(include_simulated=True), book.entries(include_simulated=True)


def test_lines_become_runs_and_entries(folder: Path) -> None:
    """Answers, failures, calls, tokens and money of each run, model, lane and day are told by the lines alone."""
    limited = {"type": "rate_limit_error", "status": 429}
    late = {"type": "timeout", "may_be_billed": True}
    broken = {"type": "invalid_response", "status": 200, "may_be_billed": True, "usage": {}, "cost_usd": 0.25}
    write(
        "a.jsonl",
        answer("q-1", attempts=3, failed_attempts=[limited, late]),
        answer("q-2", completed_at="2026-11-27T00:00:00Z", cost_usd=None, lane="batch"),
        failure("q-3", [limited, broken]),
        failure("q-4", provider=None, model=None),
        answer("q-5", run="run-20261127T000000Z-ffffff", model="gpt-6-sol", usage=None),
    )

    said, runs, entries = rebuilt("a.jsonl")

    tokens: dict[str, Any] = {name: count for name, count in USAGE.items() if name != "total_tokens"}
    known: dict[str, Any] = {"provider": "openai", "model": "gpt-6-luna"}
    first = Entry(
        **known,
        **tokens,
        day="2026-11-26",
        requests=2,
        succeeded=1,
        failed=1,
        attempts=5,
        rate_limited=2,
        failed_attempts=2,
        unknown=1,
        cost_nano=562_500,
        wasted_nano=250_000_000,
    )
    second = Entry(**known, **tokens, day="2026-11-27", lane="batch", requests=1, succeeded=1, attempts=1, unpriced=1)
    assert said == Rebuilt(runs=2, results=5, damaged=0)
    assert entries[RUN_ID] == [first, second]
    assert [(run.run_id, run.started_at, run.finished_at, run.status) for run in runs] == [
        (RUN_ID, "2026-11-26T01:02:03Z", "2026-11-27T00:00:00Z", "rebuilt"),
        ("run-20261127T000000Z-ffffff", "2026-11-27T00:00:00Z", "2026-11-26T01:03:00Z", "rebuilt"),
    ]
    assert [(run.total, run.succeeded, run.failed, run.invalid) for run in runs] == [(4, 2, 1, 1), (1, 1, 0, 0)]


amounts = st.integers(0, 10**13)


@given(st.lists(st.tuples(st.sampled_from(["run-a", "run-b"]), amounts, st.sampled_from(["luna", "sol"])), min_size=1))
def test_a_lost_ledger_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, lines: list[Any]) -> None:
    """Deleted, the ledger is made again from the results with the same sums, to the nano-dollar."""
    os.chdir(tmp_path_factory.mktemp("results"))
    write(
        "a.jsonl",
        *(answer(f"q-{n}", run=run, cost_usd=nano / 1e9, model=model) for n, (run, nano, model) in enumerate(lines)),
    )

    _, _, entries = rebuilt("a.jsonl")

    for run_id in ("run-a", "run-b"):
        found = sum(entry.cost_nano for entry in entries.get(run_id, []))
        assert found == sum(nano for run, nano, _ in lines if run == run_id)


def test_rebuilding_twice_changes_nothing(folder: Path) -> None:
    """The same files give the same ledger again, also where it held something else of these runs; others stay."""
    write("a.jsonl", answer())
    with Ledger.open(Path("ledger.sqlite")) as book:
        book.record(
            RunRow(run_id=RUN_ID, started_at="", status="x"), [Entry(day="2026-01-01", provider="p", model="m")]
        )
        book.record(
            RunRow(run_id="other", started_at="", status="x"), [Entry(day="2026-01-01", provider="p", model="m")]
        )

    first = rebuilt("a.jsonl")

    assert rebuilt("a.jsonl") == first
    assert sorted(first[2]) == ["other", RUN_ID]
    assert [entry.day for entry in first[2][RUN_ID]] == ["2026-11-26"]


def test_what_was_set_aside_counts(folder: Path) -> None:
    """Superseded lines and old results were paid for; a line that stands in two files, or files, counts once."""
    write("a.jsonl", answer("q-1"), answer("q-2"))
    write("a.superseded.jsonl", answer("q-2"), answer("q-3"))
    write("a.old-1.jsonl", answer("q-4"))
    write("a.old-12.jsonl", answer("q-5"))
    write("b.old-1.jsonl", answer("q-6"))
    write("a.old-x.jsonl", answer("q-7"))

    said, _, entries = rebuilt("a.jsonl", "a.jsonl")

    assert said == Rebuilt(runs=1, results=5, damaged=0)
    assert [entry.requests for entry in entries[RUN_ID]] == [5]


def test_what_was_set_aside_is_found_from_a_link(folder: Path) -> None:
    """Old results lie beside the file itself, under whatever name it is given."""
    write("a.jsonl", answer("q-1"))
    write("a.old-1.jsonl", answer("q-2"))
    Path("elsewhere").mkdir()
    Path("elsewhere/link.jsonl").symlink_to(Path("a.jsonl").absolute())

    assert rebuilt("elsewhere/link.jsonl")[0] == Rebuilt(runs=1, results=2, damaged=0)


def test_the_summary_beside_describes_its_run(folder: Path) -> None:
    """Tags, inputs and how it ended come from `*.usage.json`, for the run that it is about and for no other."""
    write("a.jsonl", answer("q-1"), answer("q-2", run="run-x"))
    summary = {
        "run_id": RUN_ID,
        "status": "stopped",
        "stop_reason": "no credit",
        "exit_code": 3,
        "started_at": "2026-11-26T01:02:04Z",
        "finished_at": "2026-11-26T01:09:00Z",
        "wall_seconds": 416.2,
        "tags": {"team": "search"},
        "inputs": ["in.jsonl"],
        "requests": {"total": 9, "pending": 7, "reused": 1},
        "cost": {"price_source": "genai-prices 0.2.3"},
    }
    Path("a.usage.json").write_bytes(orjson.dumps(summary))

    _, (described, other), _ = rebuilt("a.jsonl")

    assert described == RunRow(
        run_id=RUN_ID,
        started_at="2026-11-26T01:02:04Z",
        finished_at="2026-11-26T01:09:00Z",
        status="stopped",
        exit_code=3,
        stop_reason="no credit",
        results_file="a.jsonl",
        inputs=("in.jsonl",),
        tags={"team": "search"},
        price_source="genai-prices 0.2.3",
        total=9,
        succeeded=1,
        pending=7,
        reused=1,
        wall_seconds=416.2,
    )
    assert (other.run_id, other.tags, other.status) == ("run-x", {}, "rebuilt")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="torn"),
        pytest.param(b"[1]", id="no object"),
        pytest.param(
            b'{"run_id":"%s","tags":[1],"inputs":{},"requests":7,"cost":"x","exit_code":"a","wall_seconds":null}'
            % RUN_ID.encode(),
            id="other types",
        ),
    ],
)
def test_a_broken_summary_tells_nothing(folder: Path, content: bytes) -> None:
    """What cannot be read of a summary is as if it were not there."""
    write("a.jsonl", answer())
    Path("a.usage.json").write_bytes(content)

    _, (run,), _ = rebuilt("a.jsonl")

    assert (run.status, run.tags, run.inputs, run.exit_code, run.total) == ("rebuilt", {}, (), None, 1)


def test_a_known_run_keeps_its_description(folder: Path) -> None:
    """Without a summary of its own a run keeps the tags and the end that the ledger knows; its counts are new."""
    write("a.jsonl", answer())
    known = RunRow(run_id=RUN_ID, started_at="2026-11-26T01:02:03Z", status="completed", exit_code=0, tags={"t": "x"})
    with Ledger.open(Path("ledger.sqlite")) as book:
        book.record(known, [])

    _, runs, _ = rebuilt("a.jsonl")

    assert runs == [dataclasses.replace(known, succeeded=1)]


def test_rehearsals_stay_rehearsals(folder: Path) -> None:
    """A run whose lines are marked as simulated is kept out of reports as before."""
    write("a.jsonl", answer(simulated=True))

    _, (run,), _ = rebuilt("a.jsonl")

    assert run.simulated


@pytest.mark.parametrize(
    ("values", "day"),
    [
        pytest.param({"run": None}, "2026-11-26", id="no run"),
        pytest.param({"run": 7}, "2026-11-26", id="run of another type"),
        pytest.param({"run": None, "completed_at": None}, "2026-11-26", id="no time: that of the file"),
        pytest.param({"run": None, "completed_at": "2026-02-30T00:00:00Z"}, "2026-11-26", id="no such day"),
    ],
)
def test_lines_without_a_run_go_to_their_file(folder: Path, values: dict[str, Any], day: str) -> None:
    """Lines of an older version are one run, named after their results file also where they were set aside."""
    write("a.jsonl", answer("q-1", **values))
    write("a.superseded.jsonl", answer("q-2", **values))
    for path in ("a.jsonl", "a.superseded.jsonl"):
        os.utime(path, (NOON, NOON))

    _, (run,), entries = rebuilt("a.jsonl")

    assert run.run_id == f"file:{(folder / 'a.jsonl').resolve()}"
    assert [(entry.day, entry.requests) for entry in entries[run.run_id]] == [(day, 2)]


def test_a_line_without_a_time_has_that_of_its_run(folder: Path) -> None:
    """Where a line tells no time, the id of its run does."""
    write("a.jsonl", answer(completed_at=None))

    _, _, entries = rebuilt("a.jsonl")

    assert [entry.day for entry in entries[RUN_ID]] == ["2026-11-26"]


@pytest.mark.parametrize("cost", [None, "0.5", True, -1, [1], {}])
def test_what_is_no_amount_is_no_price(folder: Path, cost: Any) -> None:
    """A cost that is no amount of dollars leaves the answer unpriced, and is never taken for zero."""
    write("a.jsonl", answer(cost_usd=cost))

    _, _, entries = rebuilt("a.jsonl")

    assert [(entry.cost_nano, entry.unpriced) for entry in entries[RUN_ID]] == [(0, 1)]


@pytest.mark.parametrize("form", list(OutputFormat))
def test_every_dialect_can_be_read(folder: Path, form: OutputFormat) -> None:
    """Results in a batch API's dialect are accounted for as well."""
    reply = Completion(
        model="claude-haiku-5-5",
        content="hi",
        finish_reason="end_turn",
        truncated=False,
        usage=Usage(input_tokens=7, output_tokens=3),
        raw=b'{"id":"msg_1","stop_reason":"end_turn","model":"claude-haiku-5-5"}',
    )
    request = Request(
        custom_id="q", digest="0" * 32, source="q", line=1, provider="anthropic", model="claude-haiku-5-5", body=b"{}"
    )
    result = Result(
        custom_id="q",
        line=1,
        source="q",
        digest="0" * 32,
        attempts=1,
        completed_at="2026-11-26T01:02:03Z",
        request=request,
        reply=reply,
    )
    Path("a.jsonl").write_bytes(codec.encode(result, form))

    _, _, entries = rebuilt("a.jsonl")

    ((entry,),) = entries.values()
    assert (entry.provider, entry.model, entry.succeeded) == ("anthropic", "claude-haiku-5-5", 1)
    assert (entry.input_tokens, entry.output_tokens) == (7, 3)


def test_damage_is_left_out_and_counted(folder: Path) -> None:
    """Lines that are no results, a torn last one among them, are told and change nothing else."""
    write("a.jsonl", answer(), {"custom_id": "x"})
    with Path("a.jsonl").open("ab") as file:
        file.write(b'\n{"custom_id":"q-9","succ')

    said, _, entries = rebuilt("a.jsonl")

    assert said == Rebuilt(runs=1, results=1, damaged=2)
    assert [entry.requests for entry in entries[RUN_ID]] == [1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("absent.jsonl", "does not exist", id="absent"),
        pytest.param("no/such/directory/a.jsonl", "does not exist", id="no directory"),
        pytest.param(".", "is not a results file", id="directory"),
        pytest.param("questions.jsonl", "has no results", id="an input"),
        pytest.param("empty.jsonl", "has no results", id="empty"),
    ],
)
def test_other_files_are_refused(folder: Path, name: str, message: str) -> None:
    """A file that holds no result is somebody's mistake, and is named."""
    write("questions.jsonl", {"messages": []})
    write("empty.jsonl")

    with pytest.raises(UsageError, match=message):
        rebuilt(name)


@pytest.fixture(autouse=True)
def _back() -> Iterator[None]:
    """Return to where the test began."""
    before = Path.cwd()
    yield
    os.chdir(before)
