"""SIGKILL at random times, many times over, until every job is finished: what is lost, doubled, torn, or not told?

    python -m tests.torture.kill --kills 1000 --seed 1

Runs are killed at every stage: while they start, recover, send, wait for a retry, tidy, write their totals. Each job
is small and is killed again and again, so that recovering is killed as often as working. Every job comes from the
seed and its own number; the times at which kills strike are random too, but what they strike depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.torture.jobs import Job, Verdict, judge, kill, providing, whole_lines

_AT_ONCE = 2
_KILLS_OF_A_JOB = 8
_LONGEST_SECONDS = 0.25  # until a kill strikes, from a start that takes some 0.05


def torture(
    job: Job, rng: random.Random, stops: int, stop: Callable[[BaseProcess], bool] = kill, *, changes: bool = False
) -> Verdict:
    """Stop the runs of a job so often at random times, let a last one finish, and judge.

    `stop` tells whether a run was still there to be stopped. With `changes` some lines get another text between runs.
    """
    durable: dict[bytes, None] = {}
    done = 0
    for _ in range(stops):
        process = job.start()
        process.join(rng.uniform(0.0, _LONGEST_SECONDS))
        done += stop(process)
        job.note()
        durable.update(dict.fromkeys(line for line in whole_lines(job.output) if line.startswith(b"{")))
        if changes and rng.random() < 0.3:
            job.change_some(rng)
    exit_code = job.finish()
    return judge(job, stops=done, durable=list(durable), exit_code=exit_code)


def torture_one(folder: Path, seed: str) -> Verdict:
    """Make a job of a kind that the seed tells, and torture it."""
    rng = random.Random(seed)
    folder.mkdir()
    faults = {"500": 0.05, "502-html": 0.05} if rng.random() < 0.5 else {}
    with providing(latency=rng.choice([0.001, 0.004, 0.02]), faults=faults) as provider:
        job = Job(
            folder=folder,
            output=folder / "out.jsonl",
            provider=provider,
            count=rng.choice([30, 100, 300]),
            concurrency=rng.choice([1, 4, 16]),
            words=["--ordered"] if rng.random() < 0.5 else [],
        )
        return torture(job, rng, _KILLS_OF_A_JOB, changes=rng.random() < 0.5)


def torture_all(kills: int, seed: int, report: Callable[[int, str, Verdict], None]) -> Verdict:
    """Torture jobs, two at a time, until there were so many kills; `report` hears of each, with its seed."""
    total = Verdict()
    number = 0
    with (
        tempfile.TemporaryDirectory(prefix="torture-") as scratch,
        ThreadPoolExecutor(max_workers=_AT_ONCE) as threads,
    ):
        while total.stops < kills:
            names = [f"{seed}-{number + n}" for n in range(_AT_ONCE)]
            number += _AT_ONCE
            folders = [Path(scratch) / name for name in names]
            for name, folder, verdict in zip(names, folders, threads.map(torture_one, folders, names), strict=True):
                total += verdict
                report(total.stops, name, verdict)
                shutil.rmtree(folder) if verdict.is_good else shutil.move(folder, tempfile.mkdtemp(prefix="bad-"))
    return total


def table(verdict: Verdict) -> str:
    """Return a verdict as lines of name and number."""
    return "\n".join(f"{each.name.replace('_', ' '):>13}  {getattr(verdict, each.name):,}" for each in fields(verdict))


def _main() -> int:
    parser = argparse.ArgumentParser(description="Kill runs at random times and judge what is left.")
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    options = parser.parse_args()

    def report(stops: int, seed: str, verdict: Verdict) -> None:
        if not verdict.is_good:
            print(f"job {seed}: {verdict}", flush=True)
        if sys.stderr.isatty():
            print(f"\r{stops:,} kills", end="", file=sys.stderr)

    print(f"seed {options.seed}", flush=True)
    verdict = torture_all(options.kills, options.seed, report)
    print(table(verdict))
    if options.json:
        numbers = {"name": "kill", "seed": options.seed, "is_good": verdict.is_good, **asdict(verdict)}
        options.json.write_text(json.dumps(numbers) + "\n")
    return 0 if verdict.is_good else 1


if __name__ == "__main__":
    sys.exit(_main())
