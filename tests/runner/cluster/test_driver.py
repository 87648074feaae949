"""A job done by several workers: what must come out is what one machine would have made of it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import orjson
import pytest
from anyio import to_thread

import pipeline
from pipeline.accounting.verify import verify
from pipeline.core import config as configuration
from pipeline.core import environment, object_store
from pipeline.core.config import Config
from pipeline.core.errors import TryLaterError, UsageError
from pipeline.results import staging
from pipeline.results.object_store_writer import parts_at
from pipeline.runner.cluster import driver
from pipeline.runner.run import Progress
from pipeline.simulator import Options as Simulation
from pipeline.simulator import Server, serving
from tests.bucket import Bucket
from tests.runner.cluster.fakes import FakePool, drive, until

MODELS = {"anthropic": "claude-haiku-5-5", "openai": "gpt-6-luna"}
COUNT = 60


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an input of some kilobytes have many parts."""
    monkeypatch.setattr(driver, "_SMALLEST_PART", 512)


@contextmanager
def _world(**simulation: Any) -> Iterator[tuple[Config, Server]]:
    """Run a simulator; yield a configuration that points at it, and the server."""
    with serving(Simulation(**simulation)) as server:
        yield configuration.simulated(Config(), server.url), server


def _line(number: int, **fields: Any) -> dict[str, Any]:
    provider = "openai" if number % 2 else "anthropic"
    message = {"role": "user", "content": f"question {number}"}
    return {"provider": provider, "model": MODELS[provider], "messages": [message], "max_tokens": 40, **fields}


def _lines(count: int = COUNT) -> list[dict[str, Any]]:
    return [_line(number, custom_id=f"q-{number}") for number in range(count)]


def _write(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return path


def _results(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def _told(results: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return of results what does not depend on time or on who made them."""
    names = ("line", "custom_id", "digest", "success", "content", "usage", "cost_usd", "attempts", "metadata")
    return sorted(tuple(str(result.get(name)) for name in names) for result in results)


# ── what comes out ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_many_make_of_it_what_one_would(tmp_path: Path) -> None:
    """Ids given twice, equal lines without an id, blank and broken lines: parts change nothing of the results."""
    equal = [_line(1) for _ in range(9)]
    lines = [*_lines(20), *equal, _line(7, custom_id="q-3"), *_lines(40)[20:], *equal, _line(2, custom_id="line-x")]
    source = _write(tmp_path / "in.jsonl", lines)
    source.write_bytes(source.read_bytes().replace(b'{"provider"', b'\n{"provider"', 3) + b"broken\n\nbroken\n")

    with _world() as (config, _):
        one = await pipeline.run_batch([source], output=tmp_path / "one.jsonl", config=config)
        pool = FakePool(3)
        many = await drive([source], tmp_path / "many.jsonl", config, pool)

    assert len(pool.tasks) > 10
    assert _told(_results(tmp_path / "many.jsonl")) == _told(_results(tmp_path / "one.jsonl"))
    assert (many.exit_code, many.total, many.run.as_dict(None)) == (one.exit_code, one.total, one.run.as_dict(None))
    assert many.attempts == one.attempts
    assert sorted(many.failures) == sorted(one.failures)
    assert verify(tmp_path / "many.jsonl", [str(source)], config).exit_code == 0


async def test_nothing_is_left_beside_the_results(tmp_path: Path) -> None:
    """Parts are gone when the run has ended; the results are an ordinary file, which any other run goes on with."""
    source = _write(tmp_path / "in.jsonl", _lines())

    with _world() as (config, server):
        await drive([source], tmp_path / "out.jsonl", config, FakePool(), limit=25)
        assert not (tmp_path / "out.parts").exists()
        summary = await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=config)
        again = await drive([source], tmp_path / "out.jsonl", config, FakePool())
        assert server.statistics()["answered"] == COUNT

    assert (summary.reused, summary.run.succeeded) == (25, COUNT - 25)
    assert (again.exit_code, again.reused, again.attempts.total) == (0, COUNT, 0)


async def test_a_limit_is_one_of_all_parts(tmp_path: Path) -> None:
    """The first lines of the input are answered, and no others."""
    source = _write(tmp_path / "in.jsonl", _lines())

    with _world() as (config, server):
        summary = await drive([source], tmp_path / "out.jsonl", config, FakePool(3), limit=23)
        assert server.statistics()["answered"] == 23

    assert {result["custom_id"] for result in _results(tmp_path / "out.jsonl")} == {f"q-{n}" for n in range(23)}
    assert (summary.total, summary.exit_code) == (23, 0)


async def test_failed_lines_are_sent_again_when_asked(tmp_path: Path) -> None:
    """--retry-failed and a changed line mean what they mean on one machine; what was replaced goes aside."""
    source = _write(tmp_path / "in.jsonl", _lines())

    with _world(faults={"500": 0.5}, seed=3) as (config, _):
        config = config.with_("sending", max_attempts=1)
        first = await drive([source], tmp_path / "out.jsonl", config, FakePool())
    assert first.exit_code == 1
    with _world() as (config, server):
        _write(source, [*_lines()[:-1], _line(999, custom_id=f"q-{COUNT - 1}")])
        second = await drive([source], tmp_path / "out.jsonl", config, FakePool(), retry_failed=True)
        assert server.statistics()["answered"] in (first.run.failed, first.run.failed + 1)

    assert (second.exit_code, second.run.succeeded + second.reused) == (0, COUNT)
    assert len({result["custom_id"] for result in _results(tmp_path / "out.jsonl")}) == COUNT
    assert second.superseded == len(_results(tmp_path / "out.superseded.jsonl"))


# ── who is lost ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_lost_worker_costs_what_it_had_in_flight(tmp_path: Path) -> None:
    """Its part is gone on with by another: no line is lost or doubled, and what may be paid for nothing is told."""
    source = _write(tmp_path / "in.jsonl", _lines())

    with _world(latency=0.02, journal=True) as (config, server):
        config = config.with_("sending", concurrency=8)
        pool = FakePool(2, lose={0: 1, 3: 2, 6: 1})
        summary = await drive([source], tmp_path / "out.jsonl", config, pool)
        statistics = server.statistics()

    results = _results(tmp_path / "out.jsonl")
    repeated = statistics["answered"] - COUNT
    listed = [call.sent for call in summary.possibly_billed]
    assert sorted(result["custom_id"] for result in results) == sorted(f"q-{n}" for n in range(COUNT))
    assert len(pool.started) == 2 + 3
    assert repeated <= len(listed) <= 3 * 8
    assert summary.exit_code == 0
    assert summary.attempts.total == COUNT + len(listed)
    assert summary.attempts.unknown == len(listed)


async def test_what_a_killed_driver_left_is_taken_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parts of a run that was killed are not sent again, and their calls in flight are told."""
    monkeypatch.setattr(driver, "_SMALLEST_PART", 4096)
    source = _write(tmp_path / "in.jsonl", _lines())
    output = tmp_path / "out.jsonl"

    with _world(latency=0.05) as (config, server):
        config = config.with_("sending", concurrency=4)
        written = await _drive_and_kill(source, output, config)
        summary = await drive([source], output, config, FakePool(2))
        repeated = server.statistics()["answered"] - COUNT

    assert summary.exit_code == 0
    assert sorted(result["custom_id"] for result in _results(output)) == sorted(f"q-{n}" for n in range(COUNT))
    assert summary.reused >= written > 0
    assert repeated <= len(summary.possibly_billed) <= 2 * 4
    assert not (tmp_path / "out.parts").exists()


async def _drive_and_kill(source: Path, output: Path, config: Config) -> int:
    """Have a job done and kill its driver as soon as a part has a result; return how many lie in parts then."""

    async def kill(get: Callable[[], Progress]) -> None:
        await until(lambda: any(path.read_bytes() for path in _parts(output.parent)))
        killed.cancel()

    with anyio.CancelScope() as killed:
        await drive([source], output, config, FakePool(2), watch=kill)
    return sum(path.read_bytes().count(b"\n") for path in _parts(output.parent))


def _parts(folder: Path) -> list[Path]:
    return list((folder / "out.parts").glob("part-*[0-9].jsonl"))


# ── how it ends ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_wrong_key_ends_it_for_all(tmp_path: Path) -> None:
    """One worker's refusal stops the others; the exit code is that of one machine."""
    source = _write(tmp_path / "in.jsonl", _lines())

    with _world(keys=frozenset({"another"})) as (config, server):
        summary = await drive([source], tmp_path / "out.jsonl", config, FakePool(3))
        assert server.statistics()["received"] < COUNT

    assert (summary.exit_code, summary.status, summary.pending) == (3, "stopped", summary.total)
    assert summary.stop_reason
    assert summary.ends_all


@pytest.mark.parametrize("share", [0.05, pytest.param(0.2, marks=pytest.mark.slow), 2.0])
async def test_a_cap_is_one_of_all_workers(tmp_path: Path, share: float) -> None:
    """Money is dealt out in parts: together they never spend more, and little of it is left unused."""
    source = _write(tmp_path / "in.jsonl", _lines())
    with _world() as (config, _):
        free = await drive([source], tmp_path / "free.jsonl", config, FakePool(2))
        cost = free.run.spending.usd or 0.0
        capped = config.with_("budget", per_run=Decimal(str(round(3 * share * cost, 9)))).with_(
            "sending", concurrency=4
        )
        pool = FakePool(2)
        summary = await drive([source], tmp_path / "out.jsonl", capped, pool)

    spent = summary.run.spending.nanos
    assert summary.cap is not None
    assert spent == sum(pool.spent) == summary.cap_used <= summary.cap
    if share > 1:
        assert (summary.exit_code, summary.pending) == (0, 0)
    else:
        assert (summary.exit_code, summary.run.finished + summary.pending) == (4, summary.total)


async def test_a_first_signal_finishes_what_is_in_flight(tmp_path: Path) -> None:
    """Nothing new is sent, every answer that was paid for is there, and the command goes on another time."""
    source = _write(tmp_path / "in.jsonl", _lines())

    async def interrupt(get: Callable[[], Progress]) -> None:
        await until(lambda: get().run.succeeded >= 5)
        signal.raise_signal(signal.SIGTERM)

    with _world(latency=0.05) as (config, server):
        config = config.with_("sending", concurrency=8)
        summary = await drive(
            [source], tmp_path / "out.jsonl", config, FakePool(2), watch=interrupt, handle_signals=True
        )
        assert server.statistics()["answered"] == len(_results(tmp_path / "out.jsonl")) == summary.run.succeeded

    assert (summary.exit_code, summary.status) == (143, "stopped")
    assert summary.run.succeeded < COUNT
    assert summary.possibly_billed == ()


async def test_an_input_that_changes_is_no_mixture(tmp_path: Path) -> None:
    """Parts are cut out of one file: when another is in its place, that is told, and nothing of it is sent."""
    source = _write(tmp_path / "in.jsonl", _lines(400))

    async def change(get: Callable[[], Progress]) -> None:
        await until(lambda: get().run.succeeded >= 5)
        _write(source, [_line(n, custom_id=f"other-{n}") for n in range(400)])

    with _world(latency=0.05) as (config, _):
        config = config.with_("sending", concurrency=8)
        summary = await drive([source], tmp_path / "out.jsonl", config, FakePool(2), watch=change)

    assert summary.exit_code == 75
    assert "was changed while it was being read" in (summary.stop_reason or "")
    assert not any(result["custom_id"].startswith("other") for result in _results(tmp_path / "out.jsonl"))


async def test_a_cluster_without_room_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    """Where no worker can be had for as long as a stall may last, the command may be tried another time."""
    source = _write(tmp_path / "in.jsonl", _lines(3))

    with _world() as (config, _):
        config = config.with_("sending", stall_timeout=1, timeout=0.1, max_retry_after=1)
        summary = await drive([source], tmp_path / "out.jsonl", config, FakePool(has_room=False))

    assert (summary.exit_code, summary.pending) == (75, 0)
    assert "no worker" in (summary.stop_reason or "")


async def test_another_version_is_refused(tmp_path: Path) -> None:
    """A worker with another version of the program would do other things than the driver thinks."""
    source = _write(tmp_path / "in.jsonl", _lines(3))

    with _world() as (config, server):
        summary = await drive([source], tmp_path / "out.jsonl", config, FakePool(version="0.0.1"))
        assert server.statistics()["received"] == 0

    assert summary.exit_code == 2
    assert "has pipeline 0.0.1" in (summary.stop_reason or "")


async def test_a_staging_area_that_is_not_shared_is_told(tmp_path: Path) -> None:
    """A worker that does not see the folder of the parts says so before anything is sent."""
    area = staging.staging_of(tmp_path / "out.jsonl")
    token = area.open()
    staging.check_visible(area.place, token)

    for place, other in ((area.place, "another"), (tmp_path / "elsewhere", token)):
        with pytest.raises(UsageError, match="not seen from all machines"):
            staging.check_visible(place, other)


async def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    """The results are locked as ever."""
    source = _write(tmp_path / "in.jsonl", _lines())

    with _world(latency=0.2) as (config, _):
        async with anyio.create_task_group() as group:
            group.start_soon(drive, [source], tmp_path / "out.jsonl", config, FakePool(1))
            await anyio.sleep(0.2)
            with pytest.raises(TryLaterError, match="another run"):
                await drive([source], tmp_path / "out.jsonl", config, FakePool(1))


async def test_progress_is_that_of_all(tmp_path: Path) -> None:
    """One screen tells of all workers: their answers, and each model once."""
    source = _write(tmp_path / "in.jsonl", _lines())
    seen: list[Progress] = []

    async def look(get: Callable[[], Progress]) -> None:
        while True:
            seen.append(get())
            await anyio.sleep(0.05)

    with _world(latency=0.3) as (config, _):
        config = config.with_("sending", concurrency=8)
        await drive([source], tmp_path / "out.jsonl", config, FakePool(2), watch=look)

    done = [progress.run.finished for progress in seen]
    assert max(done) > 0
    assert any(progress.sender.in_flight > 4 for progress in seen)
    assert all(len({(lane.provider, lane.model) for lane in p.sender.queues}) == len(p.sender.queues) for p in seen)
    assert seen[-1].total == COUNT


# ── at an object store ────────────────────────────────────────────────────────────────────────────────────────────


async def test_input_and_results_at_a_store(bucket: Bucket, tmp_path: Path) -> None:
    """Parts of an object, done by workers into a folder at the store; one is lost, and its machine's spool with it."""
    source, output = f"{bucket.url}in.jsonl", f"{bucket.url}answers/"
    await to_thread.run_sync(object_store.put, source, _write(tmp_path / "in.jsonl", _lines(12)).read_bytes())

    with _world(latency=0.7) as (config, server):
        config = config.with_("sending", concurrency=8)
        pool = FakePool(2, lose_first={0})
        summary = await drive([source], output, config, pool)
        again = await drive([source], output, config, FakePool(2))
        answered = server.statistics()["answered"]

    ids = [
        orjson.loads(line)["custom_id"]
        for part in await to_thread.run_sync(parts_at, output)
        for line in (await to_thread.run_sync(object_store.read, part.url))[0].splitlines()
    ]
    assert sorted(ids) == sorted(f"q-{n}" for n in range(12))
    assert (summary.exit_code, summary.results_file) == (0, output)
    assert (again.exit_code, again.reused) == (0, 12)
    assert len(pool.started) == 3
    assert answered - 12 <= summary.attempts.unknown
    names = [found.url.removeprefix(output) for found in await to_thread.run_sync(object_store.listed_deep, output)]
    assert not [name for name in names if name.startswith("work/")]


async def test_what_a_killed_driver_left_at_a_store_is_taken_in(bucket: Bucket, tmp_path: Path) -> None:
    """What was uploaded of parts is not sent again."""
    source, output = f"{bucket.url}in.jsonl", f"{bucket.url}answers/"
    await to_thread.run_sync(object_store.put, source, _write(tmp_path / "in.jsonl", _lines(10)).read_bytes())

    with _world() as (config, server):
        await drive([source], output, config, FakePool(1), limit=5)
        (part,) = await to_thread.run_sync(parts_at, output)
        await to_thread.run_sync(object_store.move, part.url, f"{output}work/part-00000-00001-x/part-00000.jsonl")
        await to_thread.run_sync(shutil.rmtree, environment.spool_path(config, output))
        summary = await drive([source], output, config, FakePool(1))
        assert server.statistics()["answered"] == 10

    assert (summary.exit_code, summary.reused, summary.run.succeeded) == (0, 5, 5)


@pytest.mark.slow
async def test_two_clusters_do_not_write_one_folder_at_a_store(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is locked at a store: the second run sees that the first is alive, and leaves its parts alone."""
    monkeypatch.setattr(staging, "BEAT_SECONDS", 0.2)
    source, output = f"{bucket.url}in.jsonl", f"{bucket.url}answers/"
    await to_thread.run_sync(object_store.put, source, _write(tmp_path / "in.jsonl", _lines(12)).read_bytes())

    with _world(latency=0.5) as (config, server):
        config = config.with_("sending", concurrency=2)
        async with anyio.create_task_group() as group:
            group.start_soon(drive, [source], output, config, FakePool(1))
            await until(lambda: server.statistics()["received"])
            monkeypatch.setenv("PIPELINE_LEDGER", str(tmp_path / "another machine" / "ledger.sqlite"))
            with pytest.raises(TryLaterError, match="another run on a cluster"):
                await drive([source], output, config, FakePool(1))
        assert server.statistics()["answered"] == 12
