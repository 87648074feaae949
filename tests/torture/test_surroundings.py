"""What surrounds a run: cron's bare environment, clocks that jump, and other runs on the same output."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.tools import faketime_library, needs
from tests.torture.jobs import HANG_SECONDS, Job, judge, kill, providing, whole_lines


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with providing(latency=0.03) as provider:
        (tmp_path / "out").mkdir()
        yield Job(folder=tmp_path, output=tmp_path / "out" / "out.jsonl", provider=provider, count=60)


def _wait_for_answers(job: Job, count: int) -> None:
    while job.provider.statistics()["answered"] < count:
        time.sleep(0.005)


def test_cron_gets_a_finished_job_and_a_readable_log(job: Job) -> None:
    """Without home, terminal and stdin, in an ASCII locale and with umask 0: exit 0, plain text, files for one only."""
    bare = {name: value for name, value in job.environ.items() if name != "PATH"} | {"PATH": "/usr/bin", "LANG": "C"}
    command = [*job.cold, "--progress", "auto"]

    done = subprocess.run(
        command, env=bare, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, timeout=HANG_SECONDS, umask=0
    )

    job.note()
    assert judge(job, stops=0, durable=[], exit_code=done.returncode).is_good
    assert (done.stdout, b"\x1b" in done.stderr) == (b"", False)
    assert b"60 lines: 60 succeeded" in done.stderr
    assert {stat.S_IMODE(path.stat().st_mode) for path in job.output.parent.iterdir()} == {0o600}


@needs("faketime")
@pytest.mark.parametrize(
    "jumps", ["-1h", pytest.param("+1d", marks=pytest.mark.slow), pytest.param("+1y", marks=pytest.mark.slow)]
)
def test_the_wall_clock_may_jump(jumps: str, job: Job) -> None:
    """A clock that is set back an hour or on a day or a year in the middle of a run changes nothing."""
    clock = job.folder / "clock"
    clock.write_text("+0")
    environ = job.environ | {
        "LD_PRELOAD": str(faketime_library()),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }

    with subprocess.Popen(job.cold, env=environ, cwd=job.folder, stderr=subprocess.PIPE) as run:
        _wait_for_answers(job, 10)
        (job.folder / "next").write_text(jumps)
        (job.folder / "next").rename(clock)
        exit_code = run.wait(HANG_SECONDS)

    job.note()
    verdict = judge(job, stops=0, durable=[], exit_code=exit_code)
    assert verdict.is_good, verdict
    assert verdict.repeated == 0


@contextmanager
def _paused(process: BaseProcess) -> Iterator[None]:
    os.kill(process.pid or 0, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid or 0, signal.SIGCONT)


_NAMES: dict[str, Callable[[Path], list[str]]] = {
    "the same name": lambda output: [str(output)],
    "a symbolic link": lambda output: [str(_linked(output, os.symlink))],
    "a hard link": lambda output: [str(_linked(output, os.link))],
    "a relative name": lambda output: [os.path.relpath(output, "/")],
}


def _linked(output: Path, link: Callable[[Path, Path], None]) -> Path:
    name = output.with_name("other.jsonl")
    link(output, name)
    return name


@pytest.mark.parametrize("name", _NAMES.values(), ids=_NAMES.keys())
def test_a_second_run_leaves_and_touches_nothing(name: Callable[[Path], list[str]], job: Job) -> None:
    """By whatever name it is given the output, from wherever: exit 75 at once, nothing sent, nothing written."""
    first = job.start()
    _wait_for_answers(job, 10)
    words = ["-m", "pipeline", "run", str(job.source), "-o", *name(job.output), "--limit", "1"]
    with _paused(first):
        before = {path.name: path.read_bytes() for path in job.output.parent.iterdir()}

        second = subprocess.run(
            [sys.executable, *words], env=job.environ, cwd="/", capture_output=True, timeout=HANG_SECONDS, check=False
        )

        after = {path.name: path.read_bytes() for path in job.output.parent.iterdir()}
    assert (second.returncode, after) == (75, before)
    assert b"another run is writing" in second.stderr
    first.join(HANG_SECONDS)
    assert (first.exitcode, len(whole_lines(job.output))) == (0, 60)
    assert job.provider.statistics()["received"] == 60


def test_a_killed_holder_keeps_nobody_out(job: Job) -> None:
    """After SIGKILL of the one who had the lock the next run starts at once and finishes."""
    holder = job.start()
    _wait_for_answers(job, 10)
    kill(holder)

    assert job.finish() == 0
    assert judge(job, stops=1, durable=[], exit_code=0).is_good
