"""Signals at any time: what was received is recorded, what may be billed is listed, and nobody waits for long."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.torture.jobs import HANG_SECONDS, Job, judge, kill, providing
from tests.torture.kill import torture

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}
each_signal = pytest.mark.parametrize(("number", "exit_code"), SIGNALS.items(), ids=lambda value: str(value))


def _wait_until(process: BaseProcess, is_so: Callable[[], bool]) -> None:
    """Wait for what a run does and tells nobody."""
    while not is_so():
        assert process.is_alive()
        time.sleep(0.005)


def _is_told(job: Job, *texts: str) -> bool:
    """Tell whether all these stand in one line that a run wrote on stderr."""
    lines = job.errors().splitlines() if (job.folder / "stderr").exists() else []
    return any(all(text in line for text in texts) for line in lines)


def _ended(process: BaseProcess) -> int:
    process.join(HANG_SECONDS)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


@pytest.mark.parametrize("seed", ["a", "b"])
def test_signals_at_random_times_cost_nothing_but_repeated_calls(seed: str, tmp_path: Path) -> None:
    """Once or twice, while a run starts, recovers, waits for retries, drains or tidies: it ends, and what it had in
    flight is recorded or listed.
    """
    rng = random.Random(seed)

    def interrupt(process: BaseProcess) -> bool:
        number = rng.choice(list(SIGNALS))
        for _ in range(rng.choice([1, 2])):
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)
            process.join(rng.uniform(0.0, 0.05))
        return _ended(process) != 0

    with providing(latency=0.01, faults={"500": 0.1}) as provider:
        job = Job(folder=tmp_path, output=tmp_path / "out.jsonl", provider=provider, words=["--ordered"])
        verdict = torture(job, rng, 8, interrupt, changes=True)

    assert verdict.stops >= 3
    assert verdict.is_good, verdict


@each_signal
def test_one_signal_finishes_what_is_in_flight(number: signal.Signals, exit_code: int, tmp_path: Path) -> None:
    """Every answer that was paid for is in the results, and nothing is sent twice."""
    with providing(latency=0.05) as provider:
        job = Job(folder=tmp_path, output=tmp_path / "out.jsonl", provider=provider)
        process = job.start()
        _wait_until(process, lambda: provider.statistics()["answered"] >= 10)
        os.kill(process.pid or 0, number)

        assert _ended(process) == exit_code
        job.note()
        answered = provider.statistics()["answered"]
        verdict = judge(job, stops=1, durable=[], exit_code=0)
        assert job.finish() == 0

        assert (answered, verdict.lost) == (100 - verdict.lost, 100 - answered)
        assert answered < 100
        assert provider.statistics()["duplicates_paid"] == 0


@each_signal
def test_a_second_signal_waits_for_nobody(number: signal.Signals, exit_code: int, tmp_path: Path) -> None:
    """Calls whose answers never come are left at once, and each of them is listed."""
    with providing(faults={"timeout": 1.0}) as provider:
        job = Job(folder=tmp_path, output=tmp_path / "out.jsonl", provider=provider)
        process = job.start()
        _wait_until(process, lambda: provider.statistics()["received"] >= 2)
        os.kill(process.pid or 0, number)
        _wait_until(process, lambda: "finishing" in job.errors())
        os.kill(process.pid or 0, number)

        assert _ended(process) == exit_code
        job.note()
        assert sorted(name for _, name, *_ in job.told) == ["q-0", "q-1", "q-2", "q-3"]
        assert provider.statistics()["received"] == 4


@each_signal
def test_a_signal_ends_the_wait_for_a_retry(number: signal.Signals, exit_code: int, tmp_path: Path) -> None:
    """Nobody waits for the time of the next attempt once the run is to end."""
    with providing(faults={"500": 1.0}) as provider:
        job = Job(folder=tmp_path, output=tmp_path / "out.jsonl", provider=provider, count=2)
        (tmp_path / "config.yaml").write_text("sending: {backoff_initial: 3600, backoff_max: 3600}\n")
        job.words = ["--progress", "log"]
        process = job.start()
        _wait_until(process, lambda: _is_told(job, "2 retrying", "· 0 in flight"))
        os.kill(process.pid or 0, number)

        assert _ended(process) == exit_code
        job.note()
        assert "finishing 0 request(s)" in job.errors()
        assert not job.told


def test_a_run_that_slept_goes_on(tmp_path: Path) -> None:
    """Stopped for longer than its timeout, as on a laptop whose lid was closed, a run finishes with every answer."""
    with providing(latency=0.05) as provider:
        job = Job(folder=tmp_path, output=tmp_path / "out.jsonl", provider=provider, words=["--timeout", "1"])
        process = job.start()
        _wait_until(process, lambda: provider.statistics()["answered"] >= 10)
        os.kill(process.pid or 0, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(process.pid or 0, signal.SIGCONT)

        exit_code = _ended(process)
        job.note()
        verdict = judge(job, stops=1, durable=[], exit_code=exit_code)

    assert verdict.is_good, verdict
    assert verdict.repeated <= job.concurrency


def test_timeouts_before_a_kill_are_listed(tmp_path: Path) -> None:
    """Of a request that was in flight at a kill every call that may be billed is told, not only the last."""
    with providing(faults={"timeout": 1.0}) as provider:
        job = Job(folder=tmp_path, output=tmp_path / "out.jsonl", provider=provider, count=2)
        job.words = ["--timeout", "0.2"]
        process = job.start()
        _wait_until(process, lambda: provider.statistics()["received"] >= 4)
        kill(process)
    with providing() as provider:
        job.provider = provider
        assert job.finish() == 0

    assert {(name, attempt) for _, name, _, attempt in job.told} >= {("q-0", 1), ("q-0", 2), ("q-1", 1), ("q-1", 2)}
