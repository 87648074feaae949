"""What `pipeline run --ray` says where there is no cluster to be had. Nothing here needs Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.runner.cluster import ray

LINE = '{"custom_id": "q-1", "model": "gpt-6-luna", "messages": [{"role": "user", "content": "hi"}]}\n'


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-any")
    Path("in.jsonl").write_text(LINE)


def _run(*words: str) -> Result:
    return CliRunner().invoke(main.main, ["run", "in.jsonl", "-o", "out.jsonl", *words])


def _ray(**parts: Any) -> Any:
    """Return what stands for the package."""
    return SimpleNamespace(__version__="2.60.0", **parts)


def _failing(error: Exception) -> Any:
    def init(**words: Any) -> None:
        raise error

    return init


def test_without_ray_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named, and nothing was sent."""
    monkeypatch.setitem(sys.modules, "ray", None)

    done = _run("--ray", "local")

    assert done.exit_code == 2
    assert "pip install 'pipeline[ray]'" in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_out_of_reach_is_another_times_matter(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Ray itself would try for two minutes, and then end the process without a word."""
    monkeypatch.setitem(sys.modules, "ray", _ray(init=_failing(AssertionError("nobody asks Ray"))))

    done = _run("--ray", address)

    assert done.exit_code == 75
    assert f"the Ray cluster at '{address}' cannot be reached" in done.stderr


def test_a_name_that_no_machine_has_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """No later time makes it right."""
    monkeypatch.setitem(sys.modules, "ray", _ray(init=_failing(AssertionError("nobody asks Ray"))))

    done = _run("--ray", "Local")

    assert done.exit_code in (2, 75)  # 75 where some resolver knows every name
    assert "'Local'" in done.stderr


def test_no_cluster_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` finds none."""
    monkeypatch.setitem(sys.modules, "ray", _ray(init=_failing(ConnectionError("Could not find any running Ray"))))

    done = _run("--ray", "auto")

    assert done.exit_code == 75
    assert "Could not find any running Ray" in done.stderr


def test_other_versions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Driver and cluster want the same Ray and Python; what is here is told, as Ray tells what is there."""
    mismatch = RuntimeError("Version mismatch: The cluster was started with: Ray: 2.9.0 Python: 3.9.1")
    monkeypatch.setitem(sys.modules, "ray", _ray(init=_failing(mismatch)))

    done = _run("--ray", "auto")

    assert done.exit_code == 2
    assert "started with: Ray: 2.9.0" in done.stderr
    assert f"Ray 2.60.0, Python {sys.version.split()[0]}" in done.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--lane", "batch"], "--lane batch needs no cluster"),
        (["--dedupe"], "--dedupe requires one machine"),
        (["--simulate"], "requires --ray local"),
    ],
)
def test_what_needs_one_machine_is_refused(words: list[str], reason: str) -> None:
    """Before anybody is asked for a cluster."""
    done = _run("--ray", "127.0.0.1:1", *words)

    assert done.exit_code == 2
    assert reason in done.stderr


def test_a_pipe_is_refused() -> None:
    """What can be read only once, and here, cannot be read by others."""
    command = [sys.executable, "-m", "pipeline", "run", "-", "-o", "out.jsonl", "--ray", "127.0.0.1:1"]

    done = subprocess.run(command, input=LINE, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "inputs that all machines can read" in done.stderr


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("10.0.0.1:6380", ("10.0.0.1", 6380)),
        ("head", ("head", 6379)),
        ("ray://head", ("head", 10001)),
        ("ray://[::1]:10002", ("::1", 10002)),
        ("auto", None),
    ],
)
def test_the_door_of_a_cluster(address: str, place: tuple[str, int] | None) -> None:
    """Where a cluster listens, as Ray reads addresses."""
    assert ray.place_of(address) == place
