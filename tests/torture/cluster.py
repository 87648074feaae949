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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.simulator import Options, serving
from tests.torture import jobs
from tests.torture.jobs import Job, Provider, Verdict

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


def kill_budget() -> None:
    """Kill the actor that keeps the leases."""
    _kill_one("Budget")


def _kill_one(kind: str) -> None:
    """Kill the first actor of a class, by the title that Ray gives its process."""
    found = subprocess.run(["pgrep", "-f", f"^ray::.*{kind}"], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)


# ── a trial ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of a job: the judge's verdict, how much of the limit was used until the last answer, refusals."""

    harm: str
    verdict: Verdict
    used: float
    refused: int
    seconds: float
    exit_code: int

    @property
    def is_good(self) -> bool:
        return self.verdict.is_good and self.exit_code == 0


class ClusterJob(Job):
    """A job whose runs are sent to a cluster."""

    def run_on(self, address: str, *words: str) -> subprocess.Popen[bytes]:
        """Start the command, in an interpreter of its own."""
        with (self.folder / "stderr").open("ab") as errors:
            return subprocess.Popen(
                [*self.cold, "--ray", address, *words],
                cwd=self.folder,
                env={**self.environ, **_QUIET, "HOME": str(self.folder)},
                stdout=errors,
                stderr=errors,
            )

    def parts(self) -> list[bytes]:
        """Return the whole result lines of parts that are in work."""
        return [line for path in self.folder.glob("*.parts/part-*[0-9].jsonl") for line in jobs.whole_lines(path)]


def harm(cluster: Cluster, job: ClusterJob, name: str, do: Callable[[], None] | None, *, rpm: int) -> Trial:
    """Run a job; once a fifth of it is answered do it harm; let it come to its end by itself; judge."""
    began = time.monotonic()
    process = job.run_on(cluster.address)
    durable: list[bytes] = []
    answered: list[tuple[float, int]] = []
    harmed = 0.0
    while process.poll() is None:
        assert time.monotonic() < began + HANG_SECONDS, f"the run hangs\n{job.errors()}"
        answered.append((time.monotonic(), job.provider.statistics()["answered"]))
        if do and not durable and answered[-1][1] >= job.count // 5:
            durable = [*job.parts(), *jobs.whole_lines(job.output)]
            do()
            harmed = time.monotonic()
        time.sleep(0.05)
    seconds = time.monotonic() - began
    if os.environ.get("CLUSTER_DEBUG"):
        last = (began, 0)
        for at, number in answered:
            if at >= last[0] + 1:
                print(
                    f"{at - began:5.1f} {at - harmed if harmed else 0:6.1f} {(number - last[1]) / (at - last[0]):8.1f}"
                )
                last = (at, number)
    job.note()
    verdict = jobs.judge(job, stops=int(do is not None), durable=durable, exit_code=process.returncode)
    return Trial(
        harm=name,
        verdict=verdict,
        used=_rate(answered, job.count) / (len(jobs.MODELS) * rpm / 60),
        refused=job.provider.statistics()["rejected"],
        seconds=seconds,
        exit_code=process.returncode,
    )


def _rate(answered: Sequence[tuple[float, int]], count: int) -> float:
    """Return how many were answered a second, between the first tenth and the last."""
    middle = [(at, number) for at, number in answered if count // 10 <= number <= count - count // 10]
    (start, first), (end, last) = middle[0], middle[-1]
    return (last - first) / (end - start)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--rpm", type=int, default=30_000)
    options = parser.parse_args()
    cluster = Cluster()
    harms: Mapping[str, Callable[[], None] | None] = {
        "none": None,
        "worker killed": kill_worker,
        "budget killed": kill_budget,
        "node killed": cluster.kill_node,
    }
    trials = []
    for name, do in harms.items():
        cluster.mend()
        with tempfile.TemporaryDirectory() as folder, providing(_limited(options.rpm)) as provider:
            job = ClusterJob(
                folder=Path(folder),
                output=Path(folder) / "out.jsonl",
                provider=provider,
                count=options.lines,
                concurrency=200,
            )
            trial = harm(cluster, job, name, do, rpm=options.rpm)
            trials.append(trial)
            print(trial, flush=True)
            if not trial.is_good:
                print(job.errors()[-3000:])
    cluster.stop()
    return 0 if all(trial.is_good for trial in trials) else 1


def _limited(rpm: int) -> Options:
    return Options(latency=0.05, rpm=rpm, burst=rpm // 60, journal=True)


if __name__ == "__main__":
    sys.exit(_main())
