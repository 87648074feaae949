"""`verify`: what is whole is proven, and every kind of harm that files can come to is told."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

import pipeline
from pipeline.accounting.ledger import Ledger
from pipeline.accounting.verify import VerifyReport, verify
from pipeline.core import config
from pipeline.core.config import Config
from pipeline.simulator import Options, serving

QUESTIONS = [
    {"custom_id": f"q-{n}", "model": "gpt-6-luna", "messages": [{"role": "user", "content": f"question {n}"}]}
    for n in range(10)
] + [{"custom_id": "bad", "model": "gpt-6-luna", "messages": []}]
TWICE = [QUESTIONS[0], *QUESTIONS, QUESTIONS[0], QUESTIONS[-1]]  # an id three times, an unusable line twice


async def finish(tmp_path: Path, questions: list[dict[str, Any]]) -> Path:
    """A finished job: in.jsonl, out.jsonl, out.usage.json."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in questions))
    with serving(Options()) as server:
        settings = config.simulated(Config(), server.url)
        await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=settings)
    return tmp_path


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    return await finish(tmp_path, QUESTIONS)


def look(folder: Path) -> VerifyReport:
    return verify(folder / "out.jsonl", [str(folder / "in.jsonl")], Config())


def change_lines(folder: Path, name: str, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = folder / name
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


async def test_a_finished_job_is_proven(folder: Path) -> None:
    """Every line has its result, invalid ones too, nothing is torn, the totals are the sums."""
    report = look(folder)

    assert (report.exit_code, report.results, report.inputs) == (0, 11, 11)
    assert (report.shown, report.notes) == ([], [])


async def test_a_job_whose_input_gives_an_id_twice_is_proven(tmp_path: Path) -> None:
    """The first line of an id is answered, the others have an error each: no line is left out, none is there twice."""
    report = look(await finish(tmp_path, TWICE))

    assert (report.exit_code, report.results, report.inputs) == (0, 14, 14)
    assert (report.shown, report.notes) == ([], [])


@pytest.mark.parametrize("failed", [False, True])
async def test_each_line_of_an_id_given_twice_stands_once(tmp_path: Path, failed: bool) -> None:
    """Neither the answer nor the error of one of its lines may be repeated."""
    folder = await finish(tmp_path, TWICE)

    def repeat(lines: list[bytes]) -> list[bytes]:
        results = [orjson.loads(line) for line in lines]
        chosen = (n for n, it in enumerate(results) if it["custom_id"] == "q-0" and ("error" in it) == failed)
        return [*lines, lines[next(chosen)]]

    change_lines(folder, "out.jsonl", repeat)
    report = look(folder)

    assert set(report.problems) == {"twice", "totals"}
    assert report.problems["twice"] == 1


@pytest.mark.parametrize(
    ("change", "kinds", "code"),
    [
        pytest.param(lambda lines: lines[1:], {"missing", "totals"}, 1, id="a line is gone"),
        pytest.param(lambda lines: [*lines, lines[0]], {"twice", "totals"}, 1, id="a line stands twice"),
        pytest.param(lambda lines: [*lines, lines[0][:40]], {"damaged"}, 6, id="a torn tail"),
        pytest.param(lambda lines: [*lines[:-1], lines[-1][:-1]], {"damaged"}, 6, id="no end of line"),
        pytest.param(
            lambda lines: [lines[0][:50] + b"\0" * 20 + lines[0][70:], *lines[1:]],
            {"damaged", "missing", "totals"},
            6,
            id="a block of NULs",
        ),
        pytest.param(
            lambda lines: [line.replace(b'"output_tokens":', b'"output_tokens":1') for line in lines],
            {"totals"},
            1,
            id="other tokens",
        ),
    ],
)
async def test_harm_to_results_is_found(
    folder: Path, change: Callable[[list[bytes]], list[bytes]], kinds: set[str], code: int
) -> None:
    """Whatever happened to the file, the proof fails, and says where."""
    change_lines(folder, "out.jsonl", change)

    report = look(folder)

    assert set(report.problems) == kinds
    assert report.exit_code == code
    assert all(str(folder) in text for text in report.shown)


async def test_a_line_that_was_never_answered_is_missing(folder: Path) -> None:
    """A line added to the input after the run is told by file, line and id."""
    change_lines(folder, "in.jsonl", lambda lines: [*lines, lines[0].replace(b"q-0", b"new")])

    assert look(folder).shown == [f"{folder}/in.jsonl:12: 'new' has no result"]


async def test_results_beyond_the_input_are_noted(folder: Path) -> None:
    """Answers to lines that are gone were paid for: no problem, but told."""
    change_lines(folder, "in.jsonl", lambda lines: lines[2:])

    report = look(folder)

    assert report.exit_code == 0
    assert report.notes == ["2 result(s) belong to no line of the input; they are kept because they are paid for"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"7", id="a number"),
        pytest.param(b"{}", id="no totals"),
        pytest.param(b'{"results":7,"possibly_billed":[]}', id="results that are a number"),
        pytest.param(b'{"results":{"cost":[]},"possibly_billed":[]}', id="a cost that is a list"),
        pytest.param(b'{"results":{"cost":{"price_source":null}},"possibly_billed":7}', id="a number of calls"),
    ],
)
async def test_totals_that_are_something_else_are_a_problem(content: bytes, folder: Path) -> None:
    """Whatever stands in the totals file, it is told, and the rest is looked at all the same."""
    (folder / "out.usage.json").write_bytes(content)

    report = look(folder)

    assert (dict(report.problems), report.inputs) == ({"totals": 1}, 11)


async def test_a_job_is_proven_under_every_name(folder: Path) -> None:
    """What lies beside the file itself is found from a symbolic link, too."""
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "link.jsonl").symlink_to(folder / "out.jsonl")

    report = verify(folder / "elsewhere" / "link.jsonl", [str(folder / "in.jsonl")], Config())

    assert (report.exit_code, report.shown, report.notes) == (0, [], [])


async def test_totals_that_are_gone_are_a_problem(folder: Path) -> None:
    """Without totals nothing says that a run has ended."""
    (folder / "out.usage.json").unlink()

    assert set(look(folder).problems) == {"totals"}


@pytest.mark.parametrize("change", [{"cost_nano": 1}, {"succeeded": 9}, {"output_tokens": 3}])
async def test_a_ledger_that_says_something_else_is_told(folder: Path, change: dict[str, Any]) -> None:
    """What the ledger holds of a run is what its lines add up to, to the nano-dollar."""
    books = Path(os.environ["PIPELINE_LEDGER"])
    run_id = orjson.loads((folder / "out.usage.json").read_bytes())["run_id"]
    with Ledger.open(books) as ledger:
        run = next(run for run in ledger.runs(include_simulated=True) if run.run_id == run_id)
        (entry,) = ledger.entries(include_simulated=True)[run_id]
        assert verify(folder / "out.jsonl", [], Config(), ledger=books).exit_code == 0
        ledger.record(run, [dataclasses.replace(entry, **change)])

    report = verify(folder / "out.jsonl", [], Config(), ledger=books)

    assert (set(report.problems), report.exit_code) == ({"ledger"}, 1)
    assert run_id in report.shown[0]


async def test_a_run_that_the_ledger_does_not_know_is_noted(folder: Path, tmp_path: Path) -> None:
    """Another ledger is no problem of these results, but told, with the way to mend it."""
    with Ledger.open(tmp_path / "other.sqlite"):
        report = verify(folder / "out.jsonl", [], Config(), ledger=tmp_path / "other.sqlite")

    assert report.exit_code == 0
    assert any("report --rebuild" in note for note in report.notes)
