"""A Ray cluster of a head and two nodes on this machine, and what is done to it while a job runs.

The judge is that of the other tortures: input, files and the provider's books are compared (`jobs`). The provider is a
process of its own with one bucket for the key; how much of it was used is told by the provider's journal. Run as a
program it does a large job for each kind of harm and prints a table: `python -m tests.torture.cluster`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.simulator import Options, serving
from tests.torture import jobs
from tests.torture.jobs import Job, Provider, Verdict

Harm = tuple[str, Callable[[], None]]
HANG_SECONDS = 300
# A node that is gone is missed after 1.5 s and not after 15: the default is for machines, not for a test.
_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}


# ── the provider ──────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def providing(options: Options) -> Iterator[Provider]:
    """Run a simulator in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_provide, args=(options, theirs), daemon=True)
    process.start()
    try:
        yield Provider(ours.recv())
    finally:
        process.terminate()
        process.join()


def _provide(options: Options, pipe: Connection) -> None:
    with serving(options) as server:
        pipe.send(server.url)
        signal.pause()


# ── the cluster ───────────────────────────────────────────────────────────────────────────────────────────────────


class Cluster:
    """A head without processors and two nodes with one each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        os.environ.update(_HEALTH_CHECKS | _QUIET)
        self._cluster: Any = RayCluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self._nodes = [self._add_node(), self._add_node()]

    @property
    def address(self) -> str:
        """What `--ray` is given."""
        address: str = self._cluster.address
        return address

    def kill_node(self) -> None:
        """Kill one node with all that runs on it, and let another come."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def mend(self) -> None:
        """Bring the number of nodes back to two."""
        while len(self._nodes) < 2:
            self._nodes.append(self._add_node())

    def stop(self) -> None:
        self._cluster.shutdown()

    def _add_node(self) -> Any:
        return self._cluster.add_node(num_cpus=1)


def kill_worker() -> None:
    """Kill a worker that is at work."""
    _kill_one("Worker")


def kill_head() -> None:
    """Kill a worker, and before it the process that knows all others of the cluster, which is lost without it."""
    subprocess.run(["pkill", "-KILL", "-x", "gcs_server"], check=True)
    kill_worker()


def kill_budget() -> None:
    """Kill the actor that keeps the leases."""
    _kill_one("QuotaActor")


def _kill_one(kind: str) -> None:
    """Kill the first actor of a class, by the title that Ray gives its process."""
    found = subprocess.run(["pgrep", "-f", f"^ray::.*{kind}"], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)


# ── a trial ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of a job: the judge's verdict, the share of the limit that was used between the first answers and the
    last, the calls that were refused."""

    harms: tuple[str, ...]
    verdict: Verdict
    used: float
    refused: int
    seconds: float


class ClusterJob(Job):
    """A job whose runs are sent to a cluster."""

    def run_on(self, address: str | None, *, key: str = "any") -> subprocess.Popen[bytes]:
        """Start the command, in an interpreter of its own; without an address it works here."""
        keys = dict.fromkeys(("ANTHROPIC_API_KEY", "OPENAI_API_KEY"), key)
        with (self.folder / "stderr").open("ab") as errors:
            return subprocess.Popen(
                [*self.cold, *(["--ray", address] if address else [])],
                cwd=self.folder,
                env={**self.environ, **_QUIET, **keys, "HOME": str(self.folder)},
                stdout=errors,
                stderr=errors,
            )

    def parts(self) -> list[bytes]:
        """Return the whole result lines of parts that are in work."""
        return [line for path in self.folder.glob("*.parts/part-*[0-9].jsonl") for line in jobs.whole_lines(path)]


def torture(cluster: Cluster, job: ClusterJob, harms: Sequence[Harm], *, rpm: int) -> Trial:
    """Run a job and do it harm, one after the other at even distances; let it come to its end by itself; judge.

    A run that ends with 75, to be tried another time, is gone on with on this machine.
    """
    began = time.monotonic()
    process = job.run_on(cluster.address)
    durable: list[bytes] = []
    answered: list[tuple[float, int]] = []
    done: list[str] = []
    while process.poll() is None:
        assert time.monotonic() < began + HANG_SECONDS, f"the run hangs\n{job.errors()}"
        answered.append((time.monotonic(), job.provider.statistics()["answered"]))
        if len(done) < len(harms) and answered[-1][1] >= job.count * (len(done) + 1) // (len(harms) + 1):
            durable += [*job.parts(), *jobs.whole_lines(job.output)]
            name, do = harms[len(done)]
            do()
            done.append(name)
        time.sleep(0.05)
    job.note()
    if process.returncode == 75:
        durable += jobs.whole_lines(job.output)
        process = job.run_on(None)
        process.wait(HANG_SECONDS)
        job.note()
    return Trial(
        harms=tuple(done),
        verdict=jobs.judge(job, stops=len(done), durable=durable, exit_code=process.returncode),
        used=_rate(answered, job.count) / (len(jobs.MODELS) * rpm / 60),
        refused=job.provider.statistics()["rejected"],
        seconds=time.monotonic() - began,
    )


def _rate(answered: Sequence[tuple[float, int]], count: int) -> float:
    """Return how many were answered a second, between the first tenth and the last."""
    middle = [(at, number) for at, number in answered if count // 10 <= number <= count - count // 10]
    (start, first), (end, last) = middle[0], middle[-1]
    return (last - first) / (end - start)


@contextmanager
def job_of(folder: Path, lines: int, rpm: int) -> Iterator[ClusterJob]:
    """Yield a job whose provider allows so many requests a minute for each model, a second's worth at once."""
    with providing(Options(latency=0.05, rpm=rpm, burst=rpm // 60, journal=True)) as provider:
        yield ClusterJob(folder=folder, output=folder / "out.jsonl", provider=provider, count=lines, concurrency=200)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=20_000, help="of each job")
    parser.add_argument("--rpm", type=int, default=18_000, help="requests per minute of each of two models")
    options = parser.parse_args()
    cluster = Cluster()
    harms: Sequence[Sequence[Harm]] = (
        [],
        [("worker killed", kill_worker)],
        [("budget killed", kill_budget)],
        [("node killed", cluster.kill_node)],
        [("head killed", kill_head)],
    )
    is_good = True
    print(f"{'harm':16}{'used':>7}{'refused':>9}{'repeated':>10}{'listed':>8}{'lost':>6}{'twice':>7}{'seconds':>9}")
    for each in harms:
        cluster.mend()
        with tempfile.TemporaryDirectory() as folder, job_of(Path(folder), options.lines, options.rpm) as job:
            trial = torture(cluster, job, each, rpm=options.rpm)
            verdict = trial.verdict
            print(
                f"{', '.join(trial.harms) or 'none':16}{trial.used:7.1%}{trial.refused:9,}{verdict.repeated:10,}"
                f"{verdict.listed:8,}{verdict.lost:6,}{verdict.duplicates:7,}{trial.seconds:9.1f}",
                flush=True,
            )
            if not verdict.is_good:
                is_good = False
                print(verdict, job.errors()[-3000:], sep="\n")
    cluster.stop()
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(_main())
