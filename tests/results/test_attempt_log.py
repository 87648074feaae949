"""The attempts journal: after whatever end, the calls of unknown outcome are known, each told once, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.results import attempt_log
from pipeline.results.attempt_log import AttemptLog
from tests.scripted import request

NOW = "2026-11-22T02:40:07Z"
ASKED = {name: request(name) for name in ("a", "b", "c")}


class Run:
    """One run's use of the journal, up to a kill if it does not `end`."""

    def __init__(self, folder: Path, name: str, answered: Sequence[tuple[str, str]] = ()) -> None:
        """Open the journal; `answered` are the runs and ids of the result lines that are there."""
        self.journal = AttemptLog(folder / "x.jsonl", name, sync=False)
        self.journal.read()
        for run, custom_id in answered:
            self.journal.settle(run, custom_id, custom_id)
        self.journal.begin()

    def send(self, name: str, attempt: int = 1) -> None:
        self.journal.log_attempt(ASKED[name], attempt, NOW)
        self.write()

    def unbilled(self, name: str, attempt: int = 1) -> None:
        self.journal.log_not_billed(ASKED[name], attempt)
        self.write()

    def write(self) -> None:
        self.journal.write(self.journal.take())

    def unknown(self) -> list[tuple[str, str, int]]:
        return [(sent.run, sent.sent, sent.attempt) for sent in self.journal.unknown()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.attempts.jsonl"


def test_a_killed_run_leaves_the_calls_that_were_in_flight(tmp_path: Path) -> None:
    """Sent and neither answered nor refused: the next run knows them by name, with what they may have used."""
    first = Run(tmp_path, "run-1")
    for name in "abc":
        first.send(name)
    first.unbilled("b")

    second = Run(tmp_path, "run-2", answered=[("run-1", "c")])

    assert second.unknown() == [("run-1", "a", 1)]
    told = second.journal.unknown()[0].as_dict()
    assert told == {
        "custom_id": "a",
        "digest": "a",
        "attempt": 1,
        "run": "run-1",
        "provider": "openai",
        "model": "m",
        "at": NOW,
        "input_tokens": 10,
        "max_output_tokens": None,
    }


def test_a_result_line_of_an_earlier_run_settles_nothing(tmp_path: Path) -> None:
    """A failure that was sent again (--retry-failed) has an old line; its new call is unknown all the same."""
    Run(tmp_path, "run-2").send("a")

    assert Run(tmp_path, "run-3", answered=[("run-1", "a")]).unknown() == [("run-2", "a", 1)]


def test_the_last_run_is_the_one_that_began_the_journal(tmp_path: Path) -> None:
    """Calls that older runs left stand in the journal too, and make none of these runs the last one."""
    Run(tmp_path, "run-1").send("a")
    Run(tmp_path, "run-2")

    third = Run(tmp_path, "run-3", answered=[("run-1", "a")])

    assert third.unknown() == [("run-1", "a", 1)]


def test_calls_that_were_told_wait_for_no_result(tmp_path: Path) -> None:
    """Only for calls that nobody was told of does a start look for results."""
    told = Run(tmp_path, "run-1")
    told.send("a")
    told.journal.finish()
    journal = AttemptLog(tmp_path / "x.jsonl", "run-2", sync=False)

    journal.read()

    assert journal.unsettled() == ("run-1", [])


def test_earlier_timeouts_of_a_request_in_flight_are_unknown_too(tmp_path: Path) -> None:
    """Every call that may be billed counts, not only the last."""
    first = Run(tmp_path, "run-1")
    first.send("a", 1)
    first.send("a", 2)
    first.unbilled("a", 2)
    first.send("a", 3)

    assert Run(tmp_path, "run-2").unknown() == [("run-1", "a", 1), ("run-1", "a", 3)]


def test_a_call_is_told_once(tmp_path: Path) -> None:
    """What the summary of a run has listed is not listed again, but stays in the journal."""
    Run(tmp_path, "run-1").send("a")
    second = Run(tmp_path, "run-2")
    second.send("b")
    assert second.unknown() == [("run-1", "a", 1), ("run-2", "b", 1)]
    second.journal.finish()

    third = Run(tmp_path, "run-3")

    assert third.unknown() == []
    assert (tmp_path / "x.attempts.jsonl").read_bytes().count(b'"told":true') == 2


def test_a_call_that_was_not_told_because_the_next_run_was_killed_too_is_told_later(tmp_path: Path) -> None:
    """Kills in a row lose nothing: what the second run found and could not tell, the third tells."""
    Run(tmp_path, "run-1").send("a")
    Run(tmp_path, "run-2").send("b")

    assert Run(tmp_path, "run-3").unknown() == [("run-1", "a", 1), ("run-2", "b", 1)]


def test_a_finished_request_leaves_nothing(tmp_path: Path, path: Path) -> None:
    """A run that ended well leaves a journal that holds no call."""
    run = Run(tmp_path, "run-1")
    run.send("a")
    run.journal.finished("a", "a")

    run.journal.finish()

    assert path.read_bytes() == b'{"run":"run-1"}\n'
    assert Run(tmp_path, "run-2").unknown() == []


def test_the_journal_does_not_grow_with_the_input(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grown, it is written anew with what is open: its size follows what is in flight."""
    monkeypatch.setattr(attempt_log, "_MAX_BYTES", 10_000)
    run = Run(tmp_path, "run-1")
    run.send("a")

    largest = 0
    for _ in range(1_000):
        run.send("b")
        run.journal.finished("b", "b")
        largest = max(largest, path.stat().st_size)

    assert 9_000 < largest < 11_000
    assert Run(tmp_path, "run-2", answered=[("run-1", "b")]).unknown() == [("run-1", "a", 1)]


@pytest.mark.parametrize("cut", range(2, 60, 7))
def test_a_torn_line_tells_nothing_and_harms_nothing(tmp_path: Path, path: Path, cut: int) -> None:
    """The intent that a crash cut was not on the disk, so its call was not made."""
    run = Run(tmp_path, "run-1")
    run.send("a")
    run.send("b")
    path.write_bytes(path.read_bytes()[:-cut])

    assert Run(tmp_path, "run-2").unknown() == [("run-1", "a", 1)]


@pytest.mark.parametrize("line", [b"\0" * 100, b"[1]", b'{"sent":"a"}', b'{"unbilled":"x"}', b"\xff", b'"run"'])
def test_damaged_lines_are_passed_over(tmp_path: Path, path: Path, line: bytes) -> None:
    """Whatever stands in the journal, reading it neither fails nor forgets the other lines."""
    Run(tmp_path, "run-1").send("a")
    path.write_bytes(path.read_bytes() + line + b"\n")

    assert Run(tmp_path, "run-2").unknown() == [("run-1", "a", 1)]
