"""What goes wrong on a cluster, in ways that cost money or lines if nobody looked."""

from __future__ import annotations

import signal
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import anyio
import pytest

import pipeline
from pipeline.accounting.verify import verify
from pipeline.core import files
from pipeline.core.errors import StorageError, TryLaterError
from pipeline.runner.cluster import driver
from pipeline.runner.run import Progress
from tests.runner.cluster.fakes import FakePool, drive, until
from tests.runner.cluster.test_driver import COUNT, _drive_and_kill, _line, _lines, _results, _world, _write

IDS = sorted(f"q-{n}" for n in range(COUNT))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_SMALLEST_PART", 512)
    monkeypatch.setattr(driver, "_LOOK_SECONDS", 0.05)


async def test_a_part_that_kills_its_workers_is_not_paid_for_without_end(tmp_path: Path) -> None:
    """After three losses in a row the run ends, tells where, and lists what may be billed."""
    source = _write(tmp_path / "in.jsonl", _lines(4))

    with _world(latency=0.5) as (config, server):
        pool = FakePool(2, poison={0})
        pool.received = lambda: server.statistics()["received"]
        summary = await drive([source], tmp_path / "out.jsonl", config, pool)
        assert server.statistics()["received"] <= 3 * 4

    assert (summary.exit_code, summary.pending) == (75, 4)
    assert "in.jsonl:1 on were lost with their worker 3 times" in (summary.stop_reason or "")
    assert len(summary.possibly_billed) >= 3


async def test_workers_that_cannot_start_end_the_run(tmp_path: Path) -> None:
    """A machine without the program is told, and not tried for ten minutes."""
    source = _write(tmp_path / "in.jsonl", _lines(4))

    with _world() as (config, _):
        pool = FakePool(1, is_broken=True)
        summary = await drive([source], tmp_path / "out.jsonl", config, pool)

    assert (summary.exit_code, len(pool.started)) == (2, 3)
    assert "no worker can be started: no such module" in (summary.stop_reason or "")


async def test_a_silent_worker_is_as_good_as_dead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that does not say how it is getting on is killed, and others do its part."""
    monkeypatch.setattr(driver, "_SILENT_SECONDS", 0.2)
    source = _write(tmp_path / "in.jsonl", _lines())

    with _world() as (config, _):
        pool = FakePool(2, is_first_silent=True)
        summary = await drive([source], tmp_path / "out.jsonl", config, pool)

    assert summary.exit_code == 0
    assert sorted(result["custom_id"] for result in _results(tmp_path / "out.jsonl")) == IDS
    assert pool.started[0] in pool.killed


async def test_a_run_without_the_cluster_goes_on_with_what_lies_in_parts(tmp_path: Path) -> None:
    """What a killed driver's workers have answered is not sent again by anybody, and their calls in flight are told."""
    source, output = _write(tmp_path / "in.jsonl", _lines()), tmp_path / "out.jsonl"

    with _world(latency=0.05) as (config, server):
        config = config.with_("sending", concurrency=4)
        written = await _drive_and_kill(source, output, config)
        summary = await pipeline.run_batch([source], output=output, config=config)
        repeated = server.statistics()["answered"] - COUNT

    assert sorted(result["custom_id"] for result in _results(output)) == IDS
    assert summary.reused >= written > 0
    assert repeated <= len(summary.possibly_billed)
    assert not (tmp_path / "out.parts").exists()


async def test_a_signal_before_the_work_ends_it_in_good_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is sent, and the command goes on another time."""
    source = _write(tmp_path / "in.jsonl", _lines())
    look = driver._size_of

    def interrupted(sources: Any) -> int:
        signal.raise_signal(signal.SIGTERM)
        return look(sources)

    monkeypatch.setattr(driver, "_size_of", interrupted)
    with _world() as (config, server):
        summary = await drive([source], tmp_path / "out.jsonl", config, FakePool(2), handle_signals=True)
        assert server.statistics()["received"] <= 2

    assert (summary.exit_code, summary.status) == (143, "stopped")


@pytest.mark.parametrize("moment", range(4))
async def test_a_second_signal_undoes_and_doubles_nothing(tmp_path: Path, moment: int) -> None:
    """Answers to lines that were changed stay until the new ones are there; none stands twice."""
    source, output = _write(tmp_path / "in.jsonl", _lines(20)), tmp_path / "out.jsonl"

    async def interrupt(get: Callable[[], Progress]) -> None:
        await until(lambda: get().run.succeeded >= 1 + 2 * moment)
        signal.raise_signal(signal.SIGTERM)
        await anyio.sleep(0.01 * moment)
        signal.raise_signal(signal.SIGTERM)

    with _world(latency=0.05) as (config, _):
        config = config.with_("sending", concurrency=4)
        await drive([source], output, config, FakePool(2))
        changed = [_line(100 + n, custom_id=f"q-{n}") for n in range(20)]
        _write(source, changed)
        stopped = await drive([source], output, config, FakePool(2), watch=interrupt, handle_signals=True)
        lines = output.read_bytes().splitlines()
        assert {result["custom_id"] for result in _results(output)} == {f"q-{n}" for n in range(20)}
        assert len(lines) == len(set(lines)) == 20 + stopped.run.succeeded
        summary = await drive([source], output, config, FakePool(2))

    assert stopped.exit_code == 143
    assert (summary.exit_code, len(_results(output))) == (0, 20)
    assert verify(output, [str(source)], config).exit_code == 0


@pytest.mark.slow
async def test_a_cap_on_requests_holds_over_parts(tmp_path: Path) -> None:
    """Each part has few lines, and no bucket of its own: ten lines at two a second take four seconds at least."""
    sources = [_write(tmp_path / f"{n}.jsonl", [_line(1, custom_id=f"q-{n}", pad="x" * 600)]) for n in range(12)]

    with _world() as (config, _):
        config = config.with_("limits", rpm=120)
        summary = await drive(sources, tmp_path / "out.jsonl", config, FakePool(2))

    assert summary.exit_code in (0, 1)
    assert summary.run.finished == 12
    assert summary.wall_seconds > 4


async def test_a_model_that_is_given_up_is_given_up_by_all(tmp_path: Path) -> None:
    """A wrong name costs some calls, not some for each part; other models go on."""
    lines = [_line(2 * n, custom_id=f"q-{n}", provider="lost" if n % 2 else "anthropic") for n in range(100)]
    source = _write(tmp_path / "in.jsonl", lines)

    with _world() as (config, server):
        lost = {**config.providers["anthropic"].model_dump(), "base_url": f"{server.url}/nowhere"}
        config = config.replace(providers={**config.model_dump()["providers"], "lost": lost})
        pool = FakePool(2)
        summary = await drive([source], tmp_path / "out.jsonl", config, pool)

    assert (summary.exit_code, summary.run.succeeded, summary.pending) == (3, 50, 50)
    assert summary.attempts.total - 50 <= 2 * pool.size * driver.PARTS_AT_ONCE


async def test_a_part_that_cannot_be_stored_ends_with_5(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was answered is kept, counted and paid; the code is that of a full disk."""
    source = _write(tmp_path / "in.jsonl", _lines())
    append = files.Appender.append
    written = 0

    def failing(self: files.Appender, data: bytes) -> None:
        nonlocal written
        if ".parts" in str(self._path) and b'"success"' in data:
            written += 1
            if written > 5:
                raise StorageError("cannot write: No space left on device")
        append(self, data)

    monkeypatch.setattr(files.Appender, "append", failing)
    with _world() as (config, _):
        config = config.with_("sending", concurrency=4).with_("budget", per_run=Decimal("1"))
        summary = await drive([source], tmp_path / "out.jsonl", config, FakePool(2))

    results = _results(tmp_path / "out.jsonl")
    assert (summary.exit_code, summary.status) == (5, "stopped")
    assert summary.run.finished == len(results)
    assert summary.cap_used >= summary.run.spending.nanos
    assert summary.attempts.total >= len(results) + len(summary.possibly_billed)


async def test_results_that_vanish_are_missed(tmp_path: Path) -> None:
    """A part that was reported done and holds less is no success."""
    source = _write(tmp_path / "in.jsonl", _lines())

    with _world() as (config, _):
        summary = await drive([source], tmp_path / "out.jsonl", config, FakePool(2, vanish={1}))

    assert summary.exit_code == 5
    assert "were reported as done" in (summary.stop_reason or "")
    assert summary.pending > 0


async def test_many_workers_use_most_of_a_cap(tmp_path: Path) -> None:
    """What one holds and does not need goes to others before the money is called spent."""
    source = _write(tmp_path / "in.jsonl", _lines())

    with _world() as (config, _):
        free = await drive([source], tmp_path / "free.jsonl", config, FakePool(2))
        cap = Decimal(str(round((free.run.spending.usd or 0) * 0.6, 9)))
        capped = config.with_("budget", per_run=cap).with_("sending", concurrency=2)
        summary = await drive([source], tmp_path / "out.jsonl", capped, FakePool(6))

    assert summary.cap is not None
    assert 0.6 * summary.cap <= summary.run.spending.nanos == summary.cap_used <= summary.cap
    assert summary.exit_code == 4


@pytest.mark.parametrize("last", [20.0, 0.0], ids=["in time", "too late"])
async def test_a_lost_cluster_ends_the_run_in_good_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: float
) -> None:
    """What is in flight is finished while there is time; the code is one to try again on, and nothing is lost."""
    monkeypatch.setattr(driver, "_LAST_SECONDS", last)
    source, output = _write(tmp_path / "in.jsonl", _lines()), tmp_path / "out.jsonl"

    async def lose(get: Callable[[], Progress]) -> None:
        await until(lambda: get().run.succeeded >= 5)
        pool.loss.set()

    with _world(latency=0.05) as (config, server):
        config = config.with_("sending", concurrency=4)
        pool = FakePool(2)
        summary = await drive([source], output, config, pool, watch=lose)
        answered = server.statistics()["answered"]
        again = await drive([source], output, config, FakePool(2))

    assert (summary.exit_code, summary.status, summary.stop_reason) == (75, "stopped", "the cluster is lost")
    assert 0 < summary.run.succeeded < COUNT
    assert answered <= summary.run.succeeded + len(summary.possibly_billed)
    assert bool(summary.possibly_billed) == (last == 0)
    assert again.exit_code == 0
    assert sorted(result["custom_id"] for result in _results(output)) == IDS


async def test_a_part_that_nobody_gives_back_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A lost worker that still holds its part (a machine that hangs) is not waited for without end."""
    source, output = _write(tmp_path / "in.jsonl", _lines()), tmp_path / "out.jsonl"

    async def held(*words: object) -> NoReturn:
        raise TryLaterError("another run is writing the part", hint="wait")

    with _world() as (config, _):
        with monkeypatch.context() as patch, anyio.fail_after(20):
            patch.setattr(driver, "taken_over", held)
            summary = await drive([source], output, config, FakePool(2, lose={0: 1}))
        again = await drive([source], output, config, FakePool(2))

    assert (summary.exit_code, summary.stop_reason) == (75, "another run is writing the part (wait)")
    assert again.exit_code == 0
    assert sorted(result["custom_id"] for result in _results(output)) == IDS
