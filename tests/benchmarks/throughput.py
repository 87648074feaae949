"""How fast the whole program is beside a bare loop and the official SDK, on one server in one run.

    pip install -e '.[dev,bench]' && python -m tests.benchmarks.throughput build/benchmark

`--short` makes few calls: it proves that the benchmark works, its numbers mean nothing.

The server is nginx with a fixed answer of 1.3 kB where it is installed, else the simulator in its own process; the
table says which. Each contender is a process of its own and runs in turn, round by round; medians count, and ratios
within a run, as machines differ and are shared. Writes `throughput.md` and `throughput.svg` to the folder given.

What was learned (2 cores): the thread of reqwest and ours hand Python's lock to each other from core to core, some
three times a request where nothing else keeps the cores busy; on one core they hardly do, and a request costs a third
less (`pipeline/cores.py`). To hold only the thread of reqwest where ours ran last makes both wander for ever; to let
the loop sleep half a millisecond now and then, so that answers come in groups, saves half as much. Neither shorter
switch intervals (0.2 to 1 ms) nor a faster `__init__` of frozen values (4 µs in a loop) were told from noise. Python's
last collection of cycles was a fifth of a run of one line. httpx's Request and Response cost more than the call under
them unless headers and body are given ready; `anyio.current_time()` is worth binding once; a semaphore that hands over
costs more than one that is only counted; a stream hop for each line costs 50 µs, so lines travel in batches.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson

from tests.benchmarks.contenders import CONTENDERS

IN_FLIGHT = (64, 1_000, 8_000)
SHORT = 20  # how many times fewer calls
REQUESTS = {"ours": 40_000, "floor": 40_000, "transport": 40_000, "aiohttp": 40_000, "openai": 2_000}
ROUNDS = 3
STARTS = 5  # how many times more often the start is measured
PORT = 8_719


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The medians of one contender: requests per second, CPU seconds per request, peak memory in bytes."""

    name: str
    in_flight: int
    rate: float
    cpu: float
    memory: float


def main(folder: Path, *, short: bool) -> None:
    """Run the contenders, print the table, write table and plot."""
    divisor = SHORT if short else 1
    rounds = 1 if short else ROUNDS
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch)) as (server, url):
        source = Path(scratch) / "in.jsonl"
        write_input(source, max(REQUESTS.values()))
        counts = {name: requests // divisor for name, requests in REQUESTS.items()}
        rows = [
            row
            for in_flight in IN_FLIGHT[: 1 if short else None]
            for row in _measure(in_flight, url, source, counts, rounds)
        ]
        starts = _starts(url, source, rounds * STARTS)
    table = _table(rows, server, rounds) + "\n" + starts
    print(table)
    (folder / "throughput.md").write_text(table)
    _plot(rows, folder / "throughput.svg")


def _measure(in_flight: int, url: str, source: Path, counts: Mapping[str, int], rounds: int) -> Iterator[Row]:
    """Yield a row for each contender. They take turns, so that a machine that is busy for a while is so for all."""
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, measured in runs.items():
            words = [name, url, str(source), str(counts[name]), str(in_flight)]
            measured.append(_timed([sys.executable, "-m", "tests.benchmarks.contenders", *words]))
    for name, measured in runs.items():
        seconds, cpu, memory = (statistics.median(values) for values in zip(*measured, strict=True))
        count = counts[name]
        yield Row(name=name, in_flight=in_flight, rate=count / seconds, cpu=cpu / count, memory=memory)


def _starts(url: str, source: Path, rounds: int) -> str:
    """Return what the command needs to say its help, and to get one line answered."""
    command = [sys.executable, "-m", "pipeline"]
    os.environ |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "k"}
    with Path(os.devnull).open("wb") as nowhere, tempfile.TemporaryDirectory() as folder:
        one = [*command, "run", str(source), "--limit", "1", "--fresh", "-q", "-o", f"{folder}/out.jsonl"]
        told, done = (
            statistics.median(_timed(words, stdout=nowhere.fileno())[0] for _ in range(rounds))
            for words in ([*command, "--help"], one)
        )
    return f"`--help`: {told:.2f} s; one line, its request included: {done:.2f} s\n"


def _timed(command: list[str], *, stdout: int = 1) -> tuple[float, float, float]:
    """Run a process; return its wall and CPU seconds and its peak memory in bytes."""
    start = time.perf_counter()
    actions = [(os.POSIX_SPAWN_DUP2, stdout, 1)]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def write_input(path: Path, count: int) -> None:
    text = "lorem ipsum " * 70
    with path.open("wb") as file:
        for n in range(count):
            message = {"role": "user", "content": f"question {n} {text}"}
            file.write(orjson.dumps({"model": "gpt-4o", "max_tokens": 50, "messages": [message]}) + b"\n")


@contextmanager
def serving(scratch: Path) -> Iterator[tuple[str, str]]:
    """Start the server in its own process; yield what it is and its address."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if nginx := shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin"):
        name, command = "nginx, a fixed answer", [nginx, "-c", str(_nginx_settings(scratch))]
    else:
        name, command = "the simulator", [sys.executable, "-m", "pipeline", "simulate", "--port", str(PORT)]
        command += ["--latency", "0"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        time.sleep(2)
        try:
            yield name, f"http://127.0.0.1:{PORT}/v1"
        finally:
            process.terminate()


def _nginx_settings(scratch: Path) -> Path:
    message = {"role": "assistant", "content": "x" * 900}
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o-2024-08-06",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 25, "completion_tokens": 50, "total_tokens": 75},
    }
    path = scratch / "nginx.conf"
    path.write_text(
        f"worker_processes 1; daemon off; pid {scratch}/nginx.pid; error_log /dev/null;\n"
        "events { worker_connections 20000; }\n"
        "http { access_log off; keepalive_requests 10000000; client_max_body_size 50m;\n"
        f"  server {{ listen 127.0.0.1:{PORT} backlog=8192;\n"
        f"    location / {{ default_type application/json; return 200 '{orjson.dumps(answer).decode()}'; }} }} }}\n"
    )
    return path


def _table(rows: list[Row], server: str, rounds: int) -> str:
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    lines = [
        f"{day}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, server: {server}; "
        f"whole processes, medians of {rounds}; load of the machine in the last 15 minutes: {os.getloadavg()[2]:.1f}",
        "",
        "| contender | in flight | requests/s | µs CPU a request | × aiohttp | × floor | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    bare = {row.in_flight: row.rate for row in rows if row.name == "aiohttp"}
    floor = {row.in_flight: row.rate for row in rows if row.name == "floor"}
    lines += [
        f"| {row.name} | {row.in_flight:,} | {row.rate:,.0f} | {row.cpu * 1e6:,.0f} | "
        f"{row.rate / bare[row.in_flight]:.2f} | {row.rate / floor[row.in_flight]:.2f} | {row.memory / 1e6:,.0f} MB |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5))
    measured = sorted({row.in_flight for row in rows})
    height = 0.8 / len(measured)
    for number, in_flight in enumerate(measured):
        chosen = [row for row in rows if row.in_flight == in_flight]
        places = [place + number * height for place in range(len(chosen))]
        axes.barh(places, [row.rate for row in chosen], height, label=f"{in_flight:,} in flight")
    axes.set_yticks([place + height / 2 for place in range(len(CONTENDERS))], list(CONTENDERS))
    axes.set_xlabel("requests per second")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    folder = Path(words[0] if words else "build/benchmark")
    main(folder, short="--short" in sys.argv)
