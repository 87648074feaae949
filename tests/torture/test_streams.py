"""Standard streams that are closed, full or left by their reader: the run finishes and its exit code is the truth."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture.jobs import HANG_SECONDS, Job, judge, providing

_TALKATIVE = "import sys; from pipeline.cli import main, progress; progress.LOG_SECONDS = 0.02; main.main(sys.argv[1:])"


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with providing(latency=0.03) as provider:
        yield Job(folder=tmp_path, output=tmp_path / "out.jsonl", provider=provider, count=60)


@pytest.mark.parametrize(
    "redirection",
    ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", "2> >(exec 0<&-; sleep 0.01)"],
    ids=["stdin closed", "stdout closed", "stderr closed", "all closed", "stderr full", "stderr left"],
)
def test_nobody_has_to_listen(redirection: str, job: Job) -> None:
    """Whatever becomes of the screen, every line is answered and the exit code is 0."""
    words = [*job.command, "--progress", "log"]
    command = shlex.join([sys.executable, "-c", _TALKATIVE, *words])

    done = subprocess.run(
        ["bash", "-c", f"{command} {redirection}"], env=job.environ, cwd=job.folder, timeout=HANG_SECONDS, check=False
    )

    verdict = judge(job, stops=0, durable=[], exit_code=done.returncode)
    assert verdict.is_good, verdict


def test_nohup_is_heeded(job: Job) -> None:
    """A run that was started to outlive its terminal does: SIGHUP that is ignored stays ignored."""
    command = ["nohup", sys.executable, "-m", "pipeline", *job.command]
    with subprocess.Popen(command, env=job.environ, cwd=job.folder, stderr=subprocess.DEVNULL) as run:
        while job.provider.statistics()["answered"] < 10:
            time.sleep(0.005)
        run.send_signal(signal.SIGHUP)
        assert run.wait(HANG_SECONDS) == 0


def test_ctrl_c_before_the_work_is_an_interruption(job: Job) -> None:
    """While a run still reads what is done, Ctrl-C ends it with 130, not with the code of a finished run."""
    os.mkfifo(job.folder / "slow")  # opening it for reading takes until somebody writes: the run stays in its start
    command = [sys.executable, "-m", "pipeline", "run", str(job.folder / "slow"), "-o", str(job.output)]
    with subprocess.Popen(command, env=job.environ, cwd=job.folder, stderr=subprocess.PIPE) as run:
        while not _heeds_signals(run):
            time.sleep(0.005)
        run.send_signal(signal.SIGINT)
        assert run.wait(HANG_SECONDS) == 130


def _heeds_signals(run: subprocess.Popen[bytes]) -> bool:
    """Tell whether a run catches the last of the signals that it heeds; before, Ctrl-C kills it."""
    caught = re.findall(r"SigCgt:\s+(\w+)", Path(f"/proc/{run.pid}/status").read_text())
    return bool(caught) and bool(int(caught[0], 16) >> (signal.SIGHUP - 1) & 1)
