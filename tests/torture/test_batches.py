"""Batches whose making nobody heard of, runs that are killed and repeated: nothing lost, nothing made or paid twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.tools import needs
from tests.torture.batches import (
    CUTS,
    CUTS_AND_KILLS,
    JOURNAL,
    OPERATIONS,
    RESULTS,
    TROUBLES,
    BatchJob,
    Counts,
    Trial,
    cuts,
    judge,
    kill_often,
    pairs,
    providing,
    steps,
    storm,
    system_calls,
    together,
    troubles,
)
from tests.torture.jobs import COMMAND, HANG_SECONDS, whole_lines

pytestmark = pytest.mark.timeout(300)

BOTH = ["openai", "anthropic"]


def _prove(trials: Mapping[str, Trial], folder: Path, *, kills: int = 0) -> None:
    """Try all; nothing may be wrong, and so many runs at least must have been killed."""
    verdicts = together(trials, folder)

    assert {name: verdict for name, verdict in verdicts.items() if not verdict.is_good} == {}
    assert sum(verdict.kills for verdict in verdicts.values()) >= kills


@pytest.mark.slow
def test_a_kill_at_any_step_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """What calls did for two chunks and nobody heard of is found again: uploads, batches, ends, results, cancelling."""
    trials = steps(["hang", "hang"])
    assert len(trials) == sum(map(len, OPERATIONS.values()))

    _prove(trials, tmp_path, kills=len(trials))


@pytest.mark.slow
@needs("strace", "tracing")
def test_a_kill_at_any_system_call_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Whatever part of a step was recorded when a run was killed, the next run continues from it."""
    _prove(system_calls({("write", JOURNAL): 4, ("fdatasync", RESULTS): 1}, step=3), tmp_path, kills=4)


@pytest.mark.slow
def test_kills_at_random_times_lose_and_double_nothing(tmp_path: Path) -> None:
    """Six times SIGKILL among 600 requests in several chunks, and one run to the end; the same where calls fail in all
    ways, done and not done, and some answers never come.
    """
    trials = {protocol: partial(kill_often, [protocol], "a", 6) for protocol in BOTH}
    trials |= {f"{protocol}, storm": partial(storm, [protocol], "f", 4) for protocol in BOTH}

    _prove(trials, tmp_path, kills=6)


@pytest.mark.slow
def test_lost_answers_need_nobody_to_repeat_the_command(tmp_path: Path) -> None:
    """Uploads and makings that were done or not, and that nobody confirms: the run ends well by itself. So do two jobs
    with one key whose batches have the same size.
    """
    trials = troubles("upload", "create", times=1, seconds=0.5)
    assert len(trials) == 2 * (len(TROUBLES) + 1)
    trials |= pairs(["lost", "ok", "hang", "500-done"])

    _prove(trials, tmp_path)


@pytest.mark.slow
def test_cut_downloads_are_gone_on_with(tmp_path: Path) -> None:
    """Results that are cut at every tenth, again and again, bring every answer once and no half line."""
    _prove(cuts(CUTS, CUTS[::-1], CUTS_AND_KILLS), tmp_path, kills=4)


def _all_are_looked_at(job: BatchJob, counts: Counts) -> bool:
    return bool(counts["calls"]["poll"] >= job.needed)


@pytest.mark.parametrize(
    ("number", "exit_code", "polls", "seconds"),
    [
        pytest.param(signal.SIGINT, 130, ["ok", "ok"], 3.0, id="SIGINT between two looks", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, ["hang", "hang"], 0.5, id="SIGTERM amid a look"),
    ],
)
def test_a_signal_leaves_batches_to_go_on(
    number: int, exit_code: int, polls: Sequence[str], seconds: float, tmp_path: Path
) -> None:
    """Who waits for batches may go, and is told that they go on; the next run collects them."""
    with providing(batch_seconds=seconds, faults={"poll": polls}) as provider:
        job = BatchJob(folder=tmp_path, provider=provider, protocols=BOTH, timeout=HANG_SECONDS)
        process = job.begin()
        assert job.wait(process, partial(_all_are_looked_at, job))
        os.kill(process.pid, number)

        assert job.end(process) == exit_code
        assert "leaving batches to run at their providers" in job.errors()
        assert whole_lines(job.output) == []
        assert judge(job, kills=1, exit_code=job.finish()).is_good


def test_without_waiting_the_same_command_collects_later(tmp_path: Path) -> None:
    """`--no-wait` ends with 75, "try again later", until the batches have ended; then with 0."""
    with providing(batch_seconds=0.5) as provider:
        job = BatchJob(folder=tmp_path, provider=provider, protocols=BOTH, words=["--no-wait"])

        assert job.finish() == 75
        assert "20 requests are in batches that are still running" in job.errors()
        while (exit_code := job.finish()) == 75:
            assert job.counts()["created"] == job.needed
        assert judge(job, kills=0, exit_code=exit_code).is_good


def _with_another_key(job: BatchJob) -> None:
    """Make the batches of a job, and repeat it with a key that the provider does not know them by."""
    job.words = ["--no-wait"]
    assert job.finish() == 75
    job.words, job.key = [], "another"

    assert job.finish() == 3
    assert "HTTP 404" in job.errors()
    assert whole_lines(job.output) == []


def test_batches_of_another_key_wait_for_it(tmp_path: Path) -> None:
    """A wrong key ends the run with 3 and gives nothing up; with the right one all is collected."""
    with providing() as provider:
        job = BatchJob(folder=tmp_path, provider=provider, protocols=BOTH)
        _with_another_key(job)
        job.key = "any"

        assert judge(job, kills=0, exit_code=job.finish()).is_good


@pytest.mark.slow
def test_batches_of_another_key_can_be_given_up(tmp_path: Path) -> None:
    """`pipeline batches cancel --forget` lets the next run send all again."""
    with providing() as provider:
        job = BatchJob(folder=tmp_path, provider=provider, protocols=BOTH)
        _with_another_key(job)
        listed = _ask(job, "list", "--json")
        ids = [json.loads(line)["id"] for line in listed.splitlines()]
        _ask(job, "cancel", "--forget", *ids)
        verdict = judge(job, kills=0, exit_code=job.finish())

    assert len(ids) == job.needed == verdict.double
    assert (verdict.wrong_exits, verdict.unproven, verdict.lost, verdict.duplicates, verdict.swapped) == (0,) * 5


def _ask(job: BatchJob, *words: str) -> str:
    """Call `pipeline batches` and return what it prints."""
    command = [*COMMAND, "batches", *words]
    done = subprocess.run(command, cwd=job.folder, env=job.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
