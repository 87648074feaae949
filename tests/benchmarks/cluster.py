"""What a cluster costs: CPU for each request of workers and driver, and how many workers one quota actor serves.

    pip install -e '.[dev,ray]' && python -m tests.benchmarks.cluster build/benchmark

On one machine workers take the processor from each other, so their number does not make it faster here; what each of
them costs, and what all of them ask of driver and quota actor, is the same on many. The server is that of
`throughput`. Writes `cluster.md` to the folder given.
"""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.dispatch.live.rate_limiter import Demand
from pipeline.dispatch.live.shared_limits import RENEWED_EVERY
from tests.benchmarks.throughput import serving, write_input

WORKERS = (1, 2, 4)
REQUESTS = 80_000
CALLS = 10_000
ASKING = 100  # calls on their way to the quota actor at a time
HOLDERS = (10, 200)
_TICK = os.sysconf("SC_CLK_TCK")
_SETTINGS = """
provider: openai
providers: {{openai: {{base_url: "{url}"}}}}
cluster: {{workers: {workers}}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run: workers, requests per second, CPU seconds a request of all workers and of the driver."""

    workers: int
    rate: float
    worker_cpu: float
    driver_cpu: float


def main(folder: Path) -> None:
    """Start a cluster, run jobs on it, ask the quota actor; print and write the table."""
    from ray.cluster_utils import Cluster

    folder.mkdir(parents=True, exist_ok=True)
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": max(WORKERS), "include_dashboard": False})
    with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch)) as (server, url):
        source = Path(scratch) / "in.jsonl"
        write_input(source, REQUESTS)
        rows = [measure(cluster.address, url, source, workers, REQUESTS) for workers in WORKERS]
    capacities = {holders: asyncio.run(_capacity(cluster.address, holders)) for holders in HOLDERS}
    cluster.shutdown()
    table = _table(rows, capacities, server)
    print(table)
    (folder / "cluster.md").write_text(table)


def measure(address: str, url: str, source: Path, workers: int, requests: int) -> Row:
    """Run the input on a number of workers and see what their processes used."""
    folder = source.parent / f"workers-{workers}"
    folder.mkdir()
    (folder / "config.yaml").write_text(_SETTINGS.format(url=url, workers=workers))
    before = _children_cpu()
    command = [sys.executable, "-m", "pipeline", "run", str(source), "-o", str(folder / "out.jsonl")]
    command += ["--ray", address, "--concurrency", "1000", "--progress", "none", "-q"]
    environ = os.environ | {"OPENAI_API_KEY": "any", "PIPELINE_CONFIG": str(folder / "config.yaml")}
    environ |= {"PIPELINE_LEDGER": str(folder / "ledger.sqlite")}
    used: dict[int, float] = {}
    first = last = 0.0
    with subprocess.Popen(command, env=environ) as process:
        while process.poll() is None:
            used |= _cpu_of("ray::RemoteWorker")
            if any(folder.glob("out.parts/part-*.jsonl")):
                last = time.monotonic()
                first = first or last
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}")
    return Row(
        workers=workers,
        rate=requests / (last - first),
        worker_cpu=sum(used.values()) / requests,
        driver_cpu=(_children_cpu() - before) / requests,
    )


def _children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _cpu_of(title: str) -> dict[int, float]:
    """Return the CPU seconds of each process whose title begins so."""
    used: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cmdline").read_bytes().startswith(title.encode()):
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                used[int(path.name)] = (int(fields[11]) + int(fields[12])) / _TICK
        except OSError:
            continue  # it has ended meanwhile
    return used


async def _capacity(address: str, holders: int) -> float:
    """Return how many calls a second one quota actor answers when there are so many workers."""
    import ray

    from pipeline.runner.cluster.ray import QuotaActor

    ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    actor: Any = ray.remote(QuotaActor).options(num_cpus=0).remote()
    need = {f"quota {n}": Demand(used=0.1, is_waiting=True, cooldown_until=0.0) for n in range(2)}
    for number in range(holders):
        await actor.renew.remote(f"worker {number}", need)
    await asyncio.sleep(1.1)
    began = time.perf_counter()
    for start in range(0, CALLS, ASKING):
        await asyncio.gather(*(actor.renew.remote(f"worker {(start + n) % holders}", need) for n in range(ASKING)))
    seconds = time.perf_counter() - began
    ray.kill(actor)
    ray.shutdown()
    return CALLS / seconds


def _table(rows: list[Row], capacities: dict[int, float], server: str) -> str:
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    lines = [
        f"{day}, {platform.machine()}, {os.cpu_count()} cores for all of it, Python {platform.python_version()}, "
        f"server: {server}; {REQUESTS:,} requests",
        "",
        "| workers | requests/s | CPU of workers, µs a request | CPU of the driver, µs a request |",
        "|---|---|---|---|",
        *(
            f"| {row.workers} | {row.rate:,.0f} | {row.worker_cpu * 1e6:,.0f} | {row.driver_cpu * 1e6:,.0f} |"
            for row in rows
        ),
        "",
    ]
    each = 1 / RENEWED_EVERY
    for holders, capacity in capacities.items():
        lines.append(
            f"The quota actor answers {capacity:,.0f} calls a second when there are {holders} workers; a worker makes "
            f"{each:.0f}, so it serves {capacity / each:,.0f} workers."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
