"""A real Ray cluster of a head and two nodes, on this machine: one for all tests here."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools import needs
from tests.torture import cluster as clusters
from tests.torture import jobs
from tests.torture.cluster import Cluster, job_of

pytestmark = [
    needs("ray", "pgrep"),
    pytest.mark.ray,
    pytest.mark.timeout(240),  # a cluster takes ten seconds to start, and a minute on a machine that is busy
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves pipes and files of its processes open
]
KEY = "sk-canary-0123456789abcdef"
LINES = 1_500
RPM = 9_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.stop()


def test_whatever_dies_nothing_is_lost_or_paid_twice(cluster: Cluster, tmp_path: Path) -> None:
    """A worker, the quota actor and a node are killed, one after the other, and the job ends by itself.

    Every id stands once, what was paid for again is no more than what was in flight, and is told.
    """
    harms = [
        ("worker killed", clusters.kill_worker),
        ("budget killed", clusters.kill_budget),
        ("node killed", cluster.kill_node),
    ]
    with job_of(tmp_path, LINES, RPM) as job:
        trial = clusters.torture(cluster, job, harms, rpm=RPM)
    cluster.mend()

    assert trial.verdict.is_good, (trial, job.errors())
    assert trial.verdict.stops == len(harms), "all harm was done"
    assert trial.verdict.repeated <= trial.verdict.listed <= 2 * job.concurrency
    assert trial.refused <= 0.02 * LINES


def test_a_killed_driver_goes_on_where_it_was(cluster: Cluster, tmp_path: Path) -> None:
    """The command is killed and repeated, here without the cluster: nothing that was answered is sent again."""
    with job_of(tmp_path, LINES, RPM) as job:
        process = job.run_on(cluster.address)
        _wait_for(job.provider, LINES // 3)
        process.kill()
        process.wait()
        durable = job.parts()
        again = job.run_on(cluster.address)
        exit_code = again.wait(clusters.HANG_SECONDS)
        job.note()
        verdict = jobs.judge(job, stops=1, durable=durable, exit_code=exit_code)

    assert verdict.is_good, (verdict, job.errors())
    assert durable


def _wait_for(provider: jobs.Provider, answers: int) -> None:
    wait = threading.Event()
    while provider.statistics()["answered"] < answers:
        wait.wait(0.02)


def test_the_dashboard_tells_actors_by_name(cluster: Cluster, tmp_path: Path) -> None:
    """Actors are named after what they are and whose; keys are in nothing that it shows."""
    import ray

    ray.init(address=cluster.address, namespace="pipeline", log_to_driver=False)
    try:
        with job_of(tmp_path, 400, RPM) as job:
            process = job.run_on(cluster.address, key=KEY)
            _wait_for(job.provider, 1)
            names = ray.util.list_named_actors()
            assert process.wait(clusters.HANG_SECONDS) == 0, job.errors()
        assert {name.split(" (run-")[0] for name in names} >= {"pipeline budget", "pipeline worker 1"}
        assert ray.util.list_named_actors() == []
        logs = Path("/tmp/ray/session_latest/logs")
        found = subprocess.run(["grep", "-rlF", KEY, logs, tmp_path], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stdout) == (1, ""), "the key is nowhere"
        named = subprocess.run(["grep", "-rlF", "PIPELINE_SEALED", logs], capture_output=True, text=True, check=False)
        assert named.returncode == 0, "or else nobody looked in the right place"
    finally:
        ray.shutdown()
