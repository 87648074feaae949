"""Many lines through a simulator in its own process: nothing lost, swapped or counted wrong; memory stays flat."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from pipeline.simulator import answer_token

pytestmark = pytest.mark.timeout(300)
COMMAND = [sys.executable, "-m", "pipeline"]
MODELS = ("claude-haiku-5-5", "gpt-6-luna")


@pytest.fixture
def url() -> Iterator[str]:
    """Run `pipeline simulate` and yield its address."""
    words = [*COMMAND, "simulate", "--port", "0", "--latency", "0.02"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        match = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())
        assert match is not None
        yield match.group()
        process.terminate()


def _write_lines(path: Path, count: int) -> None:
    text = "lorem ipsum " * 30
    with path.open("wb") as file:
        for n in range(count):
            message = {"role": "user", "content": f"question {n} {text}"}
            line = {"custom_id": f"q-{n}", "model": MODELS[n % 2], "max_tokens": 30, "messages": [message]}
            file.write(orjson.dumps(line) + b"\n")


def _run(source: Path, output: Path, url: str, *words: str) -> int:
    """Run the command; return its peak resident memory in bytes."""
    environ = os.environ | {
        "ANTHROPIC_BASE_URL": url,
        "OPENAI_BASE_URL": f"{url}/v1",
        "ANTHROPIC_API_KEY": "k",
        "OPENAI_API_KEY": "k",
    }
    command = [*COMMAND, "run", str(source), "-o", str(output), "--concurrency", "500", "-q", *words]
    # ru_maxrss of a child begins with what its parent had at the fork, so a small process in between asks.
    program = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    program += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run(
        [sys.executable, "-c", program, *command], env=environ, capture_output=True, check=True, timeout=250
    )
    return int(done.stdout) * 1024


@pytest.mark.slow
def test_ten_thousand_lines_at_five_hundred_in_flight(url: str, tmp_path: Path) -> None:
    """Every id once, every answer to its own request, and totals equal to the provider's count."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    _write_lines(source, 10_000)

    _run(source, output, url, "--echo-request")

    results = [orjson.loads(line) for line in output.read_bytes().splitlines()]
    totals = orjson.loads((tmp_path / "out.usage.json").read_bytes())
    with urllib.request.urlopen(f"{url}/simulator/statistics") as answer:
        truth = orjson.loads(answer.read())
    assert sorted(result["custom_id"] for result in results) == sorted(f"q-{n}" for n in range(10_000))
    assert all(result["content"].startswith(answer_token(result["request"])) for result in results)
    assert 250 < truth["max_in_flight"] <= 500
    assert {row["model"]: row["requests"] for row in totals["by_model"]} == dict.fromkeys(MODELS, 5_000)
    for field in ("input", "output"):
        assert totals["tokens"][field] == sum(model[f"{field}_tokens"] for model in truth["by_model"].values())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(url: str, tmp_path: Path) -> None:
    """Ten times the lines (45 MB more of input) cost less than 25 MB more of memory."""
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    _write_lines(small, 10_000)
    _write_lines(large, 100_000)

    peak_small = _run(small, tmp_path / "a.jsonl", url)
    peak_large = _run(large, tmp_path / "b.jsonl", url)

    assert peak_large - peak_small < 25e6
    assert peak_large < 150e6
