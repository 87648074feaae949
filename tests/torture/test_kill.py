"""Killed at any time, by whatever means, and gone on with: nothing is lost, doubled, torn or left untold."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools import needs
from tests.torture import order
from tests.torture.jobs import Job, kill, providing, whole_lines
from tests.torture.kill import torture_one
from tests.torture.powercut import torture_one as cut_the_power_of_one
from tests.torture.syscalls import kill_at, strike, trace

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short name that goes away: a disk is mounted in it."""
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        yield Path(name) / "job"


@pytest.mark.parametrize("seed", ["a", "b", "c"])
def test_kills_at_random_times_cost_nothing_but_repeated_calls(seed: str, tmp_path: Path) -> None:
    """Eight times SIGKILL and one run to the end: every id once with its own answer, what was safe is there to the
    byte, what was paid for again is listed and at most `concurrency` calls for each kill, tokens are the provider's.
    """
    verdict = torture_one(tmp_path / "job", seed)

    assert verdict.stops >= 3
    assert verdict.is_good, verdict


@needs("strace", "tracing")
@pytest.mark.parametrize(
    ("call", "n", "follows"),
    [
        pytest.param("openat", 2, True, id="keeping a torn tail"),
        pytest.param("ftruncate", 1, True, id="cutting a torn tail off"),
        pytest.param("rename", 1, True, id="starting the journal"),
        pytest.param("write", 3, True, id="noting the first calls"),
        pytest.param("fdatasync", 1, True, id="syncing the first intents"),
        pytest.param("write", 4, True, id="writing the first answers"),
        pytest.param("fdatasync", 2, True, id="syncing the first answers"),
        pytest.param("fdatasync", 5, True, id="in the middle"),
        pytest.param("write", 20, True, id="rewriting the results"),
        pytest.param("rename", 2, True, id="putting the results in place"),
        pytest.param("rename", 1, False, id="putting the totals in place"),
        pytest.param("rename", 2, False, id="ending the journal"),
    ],
)
def test_a_kill_at_any_system_call_loses_nothing(call: str, n: int, follows: bool, tmp_path: Path) -> None:
    """Wherever a run is cut off on its way to the disk, the next one finishes the job."""
    verdict = kill_at(tmp_path / "job", call, n, follows=follows)

    assert verdict.stops == 1
    assert verdict.is_good, verdict


@needs("mkfs.ext4", "loop devices")
@pytest.mark.parametrize("seed", ["a", "b"])
def test_a_power_cut_undoes_nothing_that_was_reported_as_done(seed: str, scratch: Path) -> None:
    """Six times all that was not synced is gone: what was reported is there, and what was paid for again is listed."""
    scratch.mkdir()

    verdict = cut_the_power_of_one(scratch / "job", seed, cuts=6)

    assert verdict.stops >= 3
    assert verdict.is_good, verdict


@needs("strace", "tracing")
def test_a_kill_while_old_results_are_set_aside_accuses_no_call_that_was_answered(tmp_path: Path) -> None:
    """A run that starts afresh and is killed between moving journal and results does not list what they tell of."""
    with providing() as provider:
        job = Job(folder=tmp_path, output=tmp_path / "out.jsonl", provider=provider)
        process = job.start()
        while provider.statistics()["answered"] < 40:
            time.sleep(0.005)
        kill(process)
        job.words = ["--fresh"]

        assert strike(job, "rename:signal=KILL:when=2").exit_code != 0
        assert job.finish() == 0

    assert len(job.told) <= job.concurrency
    assert len(whole_lines(job.output)) == 100


@needs("strace", "tracing")
def test_what_must_be_safe_is_synced_before_it_counts(tmp_path: Path) -> None:
    """An intent is on the disk before its call is made, a result before it is reported, names before both, and a new
    file before it takes an old one's place.
    """
    with providing() as provider:
        job = Job(folder=tmp_path, output=tmp_path / "out.jsonl", provider=provider, count=12, concurrency=3)
        job.words = ["--ordered"]
        traced = trace(job, "-f", "-y", "-s", "20000", "-e", f"trace={order.CALLS}")
    seen = order.Observer(job)
    for line in traced.log:
        seen.see(line)

    assert traced.exit_code == 0
    assert [sum(text in line for line in traced.log) for text in ("POST /", "out.jsonl.tmp>, ", 'rename("')] == [
        12,
        12,
        4,
    ]
    assert seen.violations == []
