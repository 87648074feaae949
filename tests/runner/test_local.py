"""Whole runs against the simulator over real sockets: files in, files out, and the simulator's own count as judge."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import orjson
import pytest
from anyio import to_thread

import pipeline
from pipeline.accounting.ledger import Ledger, RunRow
from pipeline.accounting.run_ledger import RunLedger
from pipeline.accounting.verify import verify
from pipeline.core import config as configuration
from pipeline.core.config import Config
from pipeline.core.errors import OpenAIAPIError, TryLaterError, UsageError
from pipeline.runner.feed import PREVIEW_LINES
from pipeline.runner.options import Options
from pipeline.simulator import Options as Simulation
from pipeline.simulator import Server, answer_token, serving

MODELS = {"anthropic": "claude-haiku-5-5", "openai": "gpt-6-luna"}
both_providers = pytest.mark.parametrize("provider", list(MODELS))


@contextmanager
def _world(**simulation: Any) -> Iterator[tuple[Config, Server]]:
    """Run a simulator; yield a configuration that points at it, and the server."""
    with serving(Simulation(**simulation)) as server:
        yield configuration.simulated(Config(), server.url), server


def _line(custom_id: str, provider: str = "openai", text: str | None = None, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": text or f"question {custom_id}"}
    return {"custom_id": custom_id, "provider": provider, "model": MODELS[provider], "messages": [message], **fields}


def _write(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return path


def _results(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


@both_providers
async def test_every_line_is_answered_with_its_own_answer(provider: str, tmp_path: Path) -> None:
    """Each id stands once, with the answer to the body that was sent for it, and totals are the provider's own."""
    lines = [_line(f"q-{n}", provider, max_tokens=40) for n in range(200)]
    source = _write(tmp_path / "in.jsonl", lines)

    with _world(latency=0.005) as (config, server):
        config = config.with_("output", echo_request=True)
        summary = await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=config)
        truth = server.statistics()["by_model"][MODELS[provider]]

    results = _results(tmp_path / "out.jsonl")
    assert sorted(result["custom_id"] for result in results) == sorted(line["custom_id"] for line in lines)
    assert all(result["content"].startswith(answer_token(result["request"])) for result in results)
    assert (summary.exit_code, summary.status, summary.run.succeeded) == (0, "completed", 200)
    assert (truth["requests"], truth["input_tokens"], truth["output_tokens"]) == (
        200,
        summary.run.tokens.input,
        summary.run.tokens.output,
    )


@both_providers
async def test_the_totals_file_says_what_the_results_say(provider: str, tmp_path: Path) -> None:
    """`.usage.json` has the documented fields, and its sums are those of the result lines."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}", provider) for n in range(20)])

    with _world() as (config, _):
        await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=config)

    totals = orjson.loads((tmp_path / "out.usage.json").read_bytes())
    results = _results(tmp_path / "out.jsonl")
    assert totals["requests"] == {
        "total": 20,
        "succeeded": 20,
        "failed": 0,
        "invalid": 0,
        "pending": 0,
        "reused": 0,
    }
    assert totals["tokens"]["input"] == sum(result["usage"]["input_tokens"] for result in results)
    assert totals["tokens"]["output"] == sum(result["usage"]["output_tokens"] for result in results)
    assert totals["results"]["tokens"] == totals["tokens"]
    assert [row["requests"] for row in totals["by_model"]] == [20]
    assert totals["cost"]["total"] == pytest.approx(sum(result["cost_usd"] for result in results), abs=1e-12)
    assert totals["cost"]["total"] == totals["results"]["cost"]["total"] > 0
    assert (totals["cost"]["unpriced_requests"], totals["cost"]["wasted"]) == (0, 0)
    assert totals["by_model"][0]["cost"] == totals["cost"]["total"]


async def test_the_same_command_again_sends_nothing(tmp_path: Path) -> None:
    """A finished job costs nothing to repeat, and its file is not touched."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}") for n in range(30)])
    output = tmp_path / "out.jsonl"

    with _world() as (config, server):
        await pipeline.run_batch([source], output=output, config=config)
        before = output.read_bytes()
        again = await pipeline.run_batch([source], output=output, config=config)
        assert server.statistics()["received"] == 30

    assert (again.exit_code, again.reused, again.attempts.total) == (0, 30, 0)
    assert output.read_bytes() == before


async def test_only_what_differs_is_sent(tmp_path: Path) -> None:
    """Reordered, inserted, deleted and changed lines: only the new and the changed one are sent."""
    lines = [_line(f"q-{n}") for n in range(10)]
    source = _write(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"

    with _world() as (config, server):
        await pipeline.run_batch([source], output=output, config=config)
        changed = {**lines[3], "temperature": 1.0}
        _write(source, [*reversed(lines[5:]), _line("new"), changed, *lines[:3]])
        summary = await pipeline.run_batch([source], output=output, config=config)
        assert server.statistics()["received"] == 12

    results = _results(output)
    assert (summary.total, summary.reused, summary.run.succeeded, summary.superseded) == (10, 8, 2, 1)
    assert sorted(result["custom_id"] for result in results) == sorted(["new", *(f"q-{n}" for n in range(10))])
    assert len(_results(tmp_path / "out.superseded.jsonl")) == 1


async def test_a_change_is_told_before_it_is_paid_for(tmp_path: Path) -> None:
    """A model that was changed makes every request new; that is said before the first call, and not without need."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}") for n in range(5)])
    said: list[tuple[str, int]] = []

    with _world() as (config, server):

        def hear(message: str) -> None:
            said.append((message, server.statistics()["answered"]))

        for _ in range(2):
            await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=config, say=hear)
        assert said == []
        _write(source, [_line(f"q-{n}", temperature=0.5) for n in range(5)])
        await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=config, say=hear)

    assert len(said) == 1
    assert said[0][0].startswith("0 of the first 5 requests have results")
    assert said[0][1] == 5


async def test_bad_lines_fail_alone_and_can_be_mended(tmp_path: Path) -> None:
    """Invalid lines get a result with file and line; mended, only they are sent, and the failures are gone."""
    source = tmp_path / "in.jsonl"
    output = tmp_path / "out.jsonl"
    source.write_bytes(orjson.dumps(_line("good")) + b'\n{"custom_id": "bad", \n[1]\n')

    with _world() as (config, server):
        first = await pipeline.run_batch([source], output=output, config=config)
        _write(source, [_line("good"), _line("bad")])
        second = await pipeline.run_batch([source], output=output, config=config)
        assert server.statistics()["received"] == 2

    assert (first.exit_code, first.run.succeeded, first.run.invalid) == (1, 1, 2)
    assert f"{source}:2: not valid JSON" in first.failures[0]
    assert (second.exit_code, second.reused, second.run.succeeded) == (0, 1, 1)
    assert [result["success"] for result in _results(output)] == [True, True]


async def test_failures_are_sent_again_only_when_asked(tmp_path: Path) -> None:
    """What a provider refused stays failed on the same command; `retry_failed` sends it again."""
    source = _write(tmp_path / "in.jsonl", [_line("ok"), _line("bad", text="[[status:400]]")])
    output = tmp_path / "out.jsonl"

    with _world() as (config, server):
        await pipeline.run_batch([source], output=output, config=config)
        plain = await pipeline.run_batch([source], output=output, config=config)
        assert server.statistics()["received"] == 2
        retried = await pipeline.run_batch([source], output=output, config=config, options=Options(retry_failed=True))
        assert server.statistics()["received"] == 3

    assert (plain.exit_code, plain.reused, retried.exit_code, retried.reused) == (1, 2, 1, 1)
    assert len(_results(output)) == 2


@both_providers
async def test_a_wrong_key_stops_the_run_and_leaves_lines_pending(provider: str, tmp_path: Path) -> None:
    """401 costs a handful of calls; nothing is failed, exit 3, and the right key finishes the job."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}", provider) for n in range(300)])
    output = tmp_path / "out.jsonl"

    with _world(keys=frozenset({"right"})) as (config, server):
        summary = await pipeline.run_batch([source], output=output, config=config)
        assert server.statistics()["received"] <= 2

    assert (summary.exit_code, summary.status, summary.pending, summary.run.finished) == (3, "stopped", 300, 0)
    assert summary.stop_reason is not None
    assert "HTTP 401" in summary.stop_reason
    with _world() as (config, _):
        assert (await pipeline.run_batch([source], output=output, config=config)).exit_code == 0


@both_providers
async def test_an_unknown_model_is_given_up_alone(provider: str, tmp_path: Path) -> None:
    """Lines of a model that does not exist stay pending; the others are answered; exit 3 says so."""
    lines = [_line(f"bad-{n}", provider) | {"model": "unknown-model"} for n in range(50)]
    source = _write(tmp_path / "in.jsonl", lines + [_line(f"ok-{n}", provider) for n in range(50)])

    with _world() as (config, server):
        summary = await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=config)
        assert server.statistics()["by_status"]["404"] <= 2

    assert (summary.exit_code, summary.run.succeeded, summary.pending) == (3, 50, 50)


@pytest.mark.slow
@both_providers
async def test_faults_are_overcome(provider: str, tmp_path: Path) -> None:
    """Rejections, outages, broken and cut answers lose no line; each failed attempt is told in its result."""
    faults = dict.fromkeys(("429-no-hint", "500", "502-html", "529", "reset", "truncated", "html", "empty"), 0.04)
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}", provider) for n in range(150)])

    with _world(faults=faults, seed=3) as (config, server):
        config = config.with_("sending", backoff_initial=0.01, backoff_max=0.05, max_attempts=20)
        summary = await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=config)
        truth = server.statistics()

    assert (summary.exit_code, summary.run.succeeded) == (0, 150)
    assert len(truth["faults"]) == len(faults)
    assert summary.attempts.total == truth["received"]
    results = _results(tmp_path / "out.jsonl")
    assert sum(len(result.get("failed_attempts", ())) for result in results) == summary.attempts.total - 150


async def test_a_limited_account_is_obeyed_without_configuration(tmp_path: Path) -> None:
    """429s with a hint cost waiting, not lines."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}") for n in range(60)])

    with _world(rpm=3_000, burst=20) as (config, _):
        summary = await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=config)

    assert (summary.exit_code, summary.run.succeeded) == (0, 60)


async def test_a_cap_is_never_passed_and_raised_the_job_goes_on(tmp_path: Path) -> None:
    """With 500 in flight nothing is overspent; exit 4, the rest pending; with a higher cap the same call finishes."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}", max_tokens=100) for n in range(600)])
    output = tmp_path / "out.jsonl"

    with _world(latency=0.02) as (config, server):
        config = config.with_("sending", concurrency=500)
        capped = config.with_("budget", per_run=Decimal("0.004"))
        first = await pipeline.run_batch([source], output=output, config=capped)
        answered = server.statistics()["answered"]
        second = await pipeline.run_batch([source], output=output, config=config)

    spent = first.run.spending.usd
    assert spent is not None
    assert 0.003 < spent <= 0.004
    assert (first.exit_code, first.status, first.cap) == (4, "stopped", 4_000_000)
    assert first.cap_used == first.run.spending.nanos
    assert "budget is reached" in (first.stop_reason or "")
    assert 0 < first.run.succeeded == answered < 600
    assert (second.reused, second.run.succeeded, second.exit_code) == (answered, 600 - answered, 0)


async def test_with_a_cap_nothing_is_sent_whose_price_is_unknown(tmp_path: Path) -> None:
    """An unpriced model is refused before anything is sent, with the way out; without a cap it is answered."""
    source = _write(tmp_path / "in.jsonl", [_line("q-1"), {**_line("q-2"), "model": "gpt-oss-20b"}])

    with _world() as (config, server):
        capped = config.with_("budget", per_run=Decimal(1))
        with pytest.raises(UsageError, match=r"no price is known for openai/gpt-oss-20b.*"):
            await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=capped)
        assert server.statistics()["answered"] == 0
        summary = await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=config)

    costs = {each["custom_id"]: each["cost_usd"] for each in _results(tmp_path / "out.jsonl")}
    assert costs["q-2"] is None
    assert costs["q-1"] == summary.run.spending.usd
    assert summary.as_dict()["cost"]["unpriced_requests"] == 1


async def test_ordered_results_stand_in_input_order(tmp_path: Path) -> None:
    """`ordered` puts the lines in input order when the run ends, also after a resume in another order."""
    lines = [_line(f"q-{n}") for n in range(50)]
    source = _write(tmp_path / "in.jsonl", lines[:20])
    output = tmp_path / "out.jsonl"

    with _world(latency=0.01) as (config, _):
        config = config.with_("output", ordered=True)
        await pipeline.run_batch([source], output=output, config=config)
        _write(source, lines[::-1])
        await pipeline.run_batch([source], output=output, config=config)

    assert [result["custom_id"] for result in _results(output)] == [line["custom_id"] for line in lines[::-1]]


async def test_fresh_sets_the_old_results_aside(tmp_path: Path) -> None:
    """`fresh` starts over and keeps the old file."""
    source = _write(tmp_path / "in.jsonl", [_line("a")])
    output = tmp_path / "out.jsonl"

    with _world() as (config, server):
        await pipeline.run_batch([source], output=output, config=config)
        await pipeline.run_batch([source], output=output, config=config, options=Options(fresh=True))
        assert server.statistics()["received"] == 2

    assert len(_results(tmp_path / "out.old-1.jsonl")) == len(_results(output)) == 1


async def test_a_rehearsal_is_not_taken_for_the_real_thing(tmp_path: Path) -> None:
    """Simulated results in a file are not reused by a real run."""
    source = _write(tmp_path / "in.jsonl", [_line("a")])
    output = tmp_path / "out.jsonl"

    rehearsed = await pipeline.run_batch([source], output=output, config=Config(), options=Options(simulate=True))
    with _world() as (config, server):
        real = await pipeline.run_batch([source], output=output, config=config)
        assert server.statistics()["received"] == 1

    assert (rehearsed.simulated, real.simulated, real.reused) == (True, False, 0)
    assert len(_results(output)) == 1


async def test_limit_takes_the_first_lines(tmp_path: Path) -> None:
    """`limit` answers the first lines and calls that complete; without it the rest follows."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}") for n in range(30)])
    output = tmp_path / "out.jsonl"

    with _world() as (config, _):
        first = await pipeline.run_batch([source], output=output, config=config, options=Options(limit=7))
        rest = await pipeline.run_batch([source], output=output, config=config)

    assert (first.total, first.run.succeeded, first.exit_code) == (7, 7, 0)
    assert (rest.reused, rest.run.succeeded) == (7, 23)


async def test_two_runs_cannot_write_one_output(tmp_path: Path) -> None:
    """The second run leaves with `TryLaterError` while the first goes on unharmed."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}") for n in range(5)])
    output = tmp_path / "out.jsonl"

    with _world(latency=0.3) as (config, server):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: pipeline.run_batch([source], output=output, config=config))
            while not server.statistics()["received"]:  # noqa: ASYNC110 another thread's server has no event for us
                await anyio.sleep(0.01)
            with pytest.raises(TryLaterError):
                await pipeline.run_batch([source], output=output, config=config)

    assert len(_results(output)) == 5


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda source, output: output.symlink_to(source), id="symlink"),
        pytest.param(lambda source, output: output.hardlink_to(source), id="hard link"),
        pytest.param(lambda source, output: output.with_name("out.usage.json").symlink_to(source), id="its totals"),
        pytest.param(lambda source, output: output.with_name("out.torn").hardlink_to(source), id="its torn lines"),
        pytest.param(lambda source, output: output.with_name("out.index").hardlink_to(source), id="its index"),
    ],
)
async def test_an_output_that_is_an_input_is_refused(make: Any, tmp_path: Path) -> None:
    """Results never overwrite requests, under whatever name."""
    source = _write(tmp_path / "in.jsonl", [_line("a")])
    make(source, tmp_path / "out.jsonl")
    before = source.read_bytes()

    with pytest.raises(UsageError, match="also an input"):
        await pipeline.run_batch(
            [source], output=tmp_path / "out.jsonl", config=Config(), options=Options(simulate=True)
        )

    assert source.read_bytes() == before


async def test_a_missing_key_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    """Without a key nothing is sent and no output is made; the error names the variable."""
    source = _write(tmp_path / "in.jsonl", [_line("a", "anthropic")])

    with pytest.raises(UsageError, match="ANTHROPIC_API_KEY"):
        await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=Config())

    assert not (tmp_path / "out.jsonl").exists()


async def test_a_signal_drains_and_the_next_run_finishes(tmp_path: Path) -> None:
    """SIGTERM: what is in flight is recorded, exit 143; repeated, nothing done is sent again."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}") for n in range(100)])
    output = tmp_path / "out.jsonl"

    with _world(latency=0.05) as (config, server):
        config = config.with_("sending", concurrency=5)

        async def interrupt(get: Any) -> None:
            while get().run.finished < 20:  # noqa: ASYNC110 a watcher is made to look again and again
                await anyio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        first = await pipeline.run_batch([source], output=output, config=config, watch=interrupt, handle_signals=True)
        answered = server.statistics()["answered"]
        second = await pipeline.run_batch([source], output=output, config=config)
        truth = server.statistics()

    assert (first.exit_code, first.status) == (143, "stopped")
    assert first.run.succeeded == answered < 100
    assert (second.reused, second.run.succeeded, second.exit_code) == (answered, 100 - answered, 0)
    assert (truth["answered"], truth["duplicates_paid"]) == (100, 0)


async def test_a_stream_yields_a_result_for_each_request() -> None:
    """The Python interface answers mappings of any dialect, invalid ones as failures."""
    requests = [_line(f"q-{n}", provider) for n, provider in enumerate(["openai", "anthropic"] * 10)]

    with _world() as (config, _):
        results = [result async for result in pipeline.stream([*requests, {"nothing": 1}], config=config)]

    assert sorted(result.custom_id for result in results if result.success) == sorted(r["custom_id"] for r in requests)
    assert [result.failure.type for result in results if result.failure] == ["invalid_line"]


async def test_a_stream_raises_what_stopped_it() -> None:
    """A wrong key ends a stream with the provider's typed error."""
    with _world(keys=frozenset({"right"})) as (config, _), pytest.raises(OpenAIAPIError) as caught:
        [result async for result in pipeline.stream([_line("a")], config=config)]

    assert (caught.value.status, caught.value.attempts) == (401, 1)
    assert caught.value.request_id


async def test_a_stream_can_be_left_early() -> None:
    """Who leaves a stream early and closes it leaves no task behind."""
    with _world(latency=0.01) as (config, _):
        async with aclosing(pipeline.stream([_line(f"q-{n}") for n in range(50)], config=config)) as results:
            first = await anext(results)

    assert first.success


async def test_an_outage_without_end_is_given_up_for_now(tmp_path: Path) -> None:
    """Nothing finished for the set time: exit 75, what it waited for is said, and the lines stay pending."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}") for n in range(5)])
    config = configuration.simulated(Config(), "http://127.0.0.1:1")
    config = config.with_("sending", stall_timeout=0.6, timeout=0.2, connect_timeout=0.1, max_retry_after=0.1)

    summary = await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=config)

    assert (summary.exit_code, summary.status, summary.pending, summary.run.finished) == (75, "stopped", 5, 0)
    assert summary.stop_reason is not None
    assert "openai/gpt-6-luna" in summary.stop_reason


async def test_a_missing_key_that_shows_late_stops_the_run_in_good_order(tmp_path: Path) -> None:
    """Where a key is found missing only on the way (stdin, huge files), what is in flight is still recorded."""
    requests = [_line("a"), {**_line("b"), "provider": "anthropic", "model": "claude-haiku-5-5"}]
    config = Config().replace(
        providers={
            "openai": {**configuration.simulated(Config(), "http://127.0.0.1:1").providers["openai"].model_dump()}
        }
    )

    with pytest.raises(UsageError, match="ANTHROPIC_API_KEY"):
        [result async for result in pipeline.stream(requests[1:], config=config)]


async def test_a_stream_before_a_server_that_is_away_gives_up() -> None:
    """A stream ends with `TryLaterError` when nothing was finished for the set time."""
    config = configuration.simulated(Config(), "http://127.0.0.1:1")
    config = config.with_("sending", stall_timeout=0.6, timeout=0.2, connect_timeout=0.1, max_retry_after=0.1)

    with pytest.raises(TryLaterError):
        [result async for result in pipeline.stream([_line("a")], config=config)]


async def test_a_request_that_is_not_json_is_a_failed_result() -> None:
    """What cannot be written as JSON fails alone; the others are answered."""
    with _world() as (config, _):
        results = [result async for result in pipeline.stream([{"messages": {1, 2}}, _line("a")], config=config)]

    assert sorted(result.success for result in results) == [False, True]


async def test_an_endless_stream_ends_when_it_is_stopped() -> None:
    """A wrong key ends a stream although its requests never end."""
    with _world(keys=frozenset({"right"})) as (config, _), pytest.raises(OpenAIAPIError):
        [result async for result in pipeline.stream((_line(f"q-{n}") for n in itertools.count()), config=config)]


def _kill_on_the_way(command: Sequence[str], environ: Mapping[str, str], output: Path) -> None:
    """Start a run and kill it once it has recorded some results."""
    with subprocess.Popen(command, env=environ) as run:
        while not output.exists() or output.read_bytes().count(b"\n") < 20:
            assert run.poll() is None
            time.sleep(0.01)
        run.kill()


@pytest.mark.slow
async def test_a_killed_run_tells_what_it_may_have_paid_for(tmp_path: Path) -> None:
    """After SIGKILL the next run sends what was in flight again, finishes, and lists exactly those calls."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}") for n in range(60)])
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "pipeline", "run", str(source), "-o", str(output), "--concurrency", "5", "-q"]

    with _world(latency=0.2) as (config, server):
        environ = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "any"}
        await to_thread.run_sync(_kill_on_the_way, command, environ, output)
        answered = {each["custom_id"] for each in _results(output)}
        config = config.with_("sending", concurrency=5)
        second = await pipeline.run_batch([source], output=output, config=config)
        third = await pipeline.run_batch([source], output=output, config=config)
        truth = server.statistics()

    unknown = [sent.sent for sent in second.possibly_billed]
    assert 0 < len(unknown) <= 5
    assert answered.isdisjoint(unknown)
    assert truth["duplicates_paid"] <= len(unknown) == second.attempts.unknown
    assert sorted(each["custom_id"] for each in _results(output)) == sorted(f"q-{n}" for n in range(60))
    assert (second.exit_code, third.reused, third.possibly_billed) == (0, 60, ())


async def test_the_ledger_says_what_the_lines_and_the_provider_say(tmp_path: Path) -> None:
    """After a kill, a resume, retries and a repeat, ledger, result lines and totals agree to the nano-dollar."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}") for n in range(60)])
    output, books = tmp_path / "out.jsonl", tmp_path / "ledger.sqlite"
    command = [sys.executable, "-m", "pipeline", "run", str(source), "-o", str(output), "--concurrency", "5", "-q"]

    with _world(latency=0.1, faults={"500": 0.1}) as (config, server):
        config = config.replace(ledger=str(books))
        urls = {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "any", "PIPELINE_LEDGER": str(books)}
        await to_thread.run_sync(_kill_on_the_way, command, {**os.environ, **urls}, output)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PIPELINE_LEDGER", str(books))
            for _ in range(2):
                summary = await pipeline.run_batch([source], output=output, config=config)
        truth = server.statistics()

    lines = _results(output)
    with Ledger.open(books) as ledger:
        runs = ledger.runs()
        entries = [entry for each in ledger.entries().values() for entry in each]
    assert sorted(run.status for run in runs) == ["completed", "completed", "killed"]
    assert sum(entry.cost_nano for entry in entries) == sum(round(line["cost_usd"] * 1e9) for line in lines)
    assert sum(entry.cost_nano for entry in entries) == round((summary.results.spending.usd or 0) * 1e9)
    for name in ("input_tokens", "output_tokens"):
        assert sum(getattr(entry, name) for entry in entries) == sum(line["usage"][name] for line in lines)
    assert sum(entry.succeeded for entry in entries) == 60
    assert truth["answered"] == 60 + truth["duplicates_paid"]


async def test_the_caps_of_day_and_month_count_what_other_runs_spent(tmp_path: Path) -> None:
    """What the ledger holds of today is taken off the cap of the day; at once, before anything is sent."""
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}", max_tokens=100) for n in range(30)])

    with _world() as (config, server), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELINE_LEDGER", str(tmp_path / "ledger.sqlite"))
        first = await pipeline.run_batch([source], output=tmp_path / "a.jsonl", config=config)
        spent = first.run.spending.nanos
        capped = config.with_("budget", per_day=Decimal(spent).scaleb(-9), per_month=Decimal(1))
        second = await pipeline.run_batch([source], output=tmp_path / "b.jsonl", config=capped)
        answered = server.statistics()["answered"]

    assert (second.exit_code, second.run.succeeded, second.pending, answered) == (4, 0, 30, 30)


async def test_equal_requests_can_be_paid_once(tmp_path: Path) -> None:
    """--dedupe: one call for equal requests, a line for each with its own id and metadata; the copies cost nothing."""
    same = [_line(f"a-{n}", text="the same", metadata={"n": n}) for n in range(5)]
    others = [_line("b"), _line("c")]
    source = _write(tmp_path / "in.jsonl", [same[0], others[0], *same[1:], others[1]])
    output = tmp_path / "out.jsonl"

    with _world() as (config, server):
        once = Options(dedupe=True)
        summary = await pipeline.run_batch([source], output=output, config=config, options=once)
        again = await pipeline.run_batch([source], output=output, config=config, options=once)
        _write(source, [_line("new", text="the same"), *same, *others])
        more = await pipeline.run_batch([source], output=output, config=config, options=once)
        truth = server.statistics()

    lines = {each["custom_id"]: each for each in _results(output)}
    assert (truth["answered"], summary.attempts.total, summary.run.succeeded) == (3, 3, 7)
    assert (again.reused, more.reused, more.run.succeeded, more.attempts.total) == (7, 7, 1, 0)
    assert sorted(lines) == ["a-0", "a-1", "a-2", "a-3", "a-4", "b", "c", "new"]
    assert {name for name, line in lines.items() if "copy_of" in line} == {"a-1", "a-2", "a-3", "a-4", "new"}
    assert {lines[f"a-{n}"]["content"] for n in range(5)} == {lines["new"]["content"]} != {lines["b"]["content"]}
    assert [lines[f"a-{n}"]["metadata"] for n in range(5)] == [{"n": n} for n in range(5)]
    assert lines["a-3"]["usage"]["total_tokens"] == lines["a-3"]["cost_usd"] == 0
    assert summary.run.tokens.input == sum(lines[name]["usage"]["input_tokens"] for name in ("a-0", "b", "c"))
    assert verify(output, [str(source)], Config()).exit_code == 0


@pytest.mark.parametrize("form", ["openai-batch", "anthropic-batch"])
async def test_copies_can_be_made_in_every_dialect(form: str, tmp_path: Path) -> None:
    """A copy is a line of the dialect, and read back as one."""
    source = _write(tmp_path / "in.jsonl", [_line(name, text="the same") for name in "ab"])
    output = tmp_path / "out.jsonl"

    with _world() as (config, _):
        config = config.with_("output", format=form)
        await pipeline.run_batch([source], output=output, config=config, options=Options(dedupe=True))

    assert [each["custom_id"] for each in _results(output)] == ["a", "b"]
    assert verify(output, [str(source)], Config()).exit_code == 0


async def test_an_equal_of_what_failed_fails_too(tmp_path: Path) -> None:
    """A copy of a failure is a failure; --retry-failed sends the first again and copies its answer."""
    source = _write(tmp_path / "in.jsonl", [_line(name, text="the same") for name in "ab"])
    output = tmp_path / "out.jsonl"

    with _world(faults={"500": 1.0}) as (config, _):
        config = config.with_("sending", max_attempts=1)
        failed = await pipeline.run_batch([source], output=output, config=config, options=Options(dedupe=True))
    with _world() as (config, server):
        options = Options(dedupe=True, retry_failed=True)
        mended = await pipeline.run_batch([source], output=output, config=config, options=options)
        truth = server.statistics()

    assert (failed.run.failed, failed.attempts.total, failed.exit_code) == (2, 1, 1)
    assert (mended.run.succeeded, truth["answered"], mended.exit_code) == (2, 1, 0)


async def test_a_run_that_ends_without_results_after_a_killed_one_says_why(tmp_path: Path) -> None:
    """A run killed before its first result leaves an empty file; the next, stopped by the provider, ends with 3."""
    source = _write(tmp_path / "in.jsonl", [_line("a")])
    output, books = tmp_path / "out.jsonl", tmp_path / "ledger.sqlite"
    output.touch(0o600)
    with Ledger.open(books) as ledger:
        ledger.record(RunRow(run_id="run-x", started_at="", status="running", results_file=str(output)), ())

    with _world(faults={"quota": 1.0}) as (config, _), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELINE_LEDGER", str(books))
        summary = await pipeline.run_batch([source], output=output, config=config)

    with Ledger.open(books) as ledger:
        statuses = {run.run_id: run.status for run in ledger.runs()}
    assert (summary.exit_code, statuses["run-x"]) == (3, "killed")


async def test_a_ledger_that_fails_on_the_way_ends_no_run(tmp_path: Path) -> None:
    """Bringing the ledger up to date now and then is said when it fails, and tried again."""
    said: list[str] = []
    books = RunLedger(tmp_path / "ledger.sqlite", seconds=0.01)
    (tmp_path / "ledger.sqlite").mkdir()

    def hear(message: str) -> None:
        said.append(message)
        if len(said) == 2:
            scope.cancel()

    with anyio.fail_after(20), anyio.CancelScope() as scope:
        await books.keep(lambda: RunRow(run_id="r", started_at="", status="x"), hear)

    assert len(said) == 2
    assert "ledger" in said[0]


@pytest.mark.parametrize("before", [0, PREVIEW_LINES + 10], ids=["in the first lines", "beyond the preview"])
@pytest.mark.parametrize("lane", ["live", "batch"])
async def test_a_retired_model_is_reported_before_it_is_asked(lane: str, before: int, tmp_path: Path) -> None:
    """The user hears of a retired model and its successor once, before the first request for it is sent."""
    old = {**_line("old", "anthropic"), "model": "claude-3-opus-20240229"}
    source = _write(tmp_path / "in.jsonl", [_line(f"q-{n}") for n in range(before)] + [old, {**old, "custom_id": "b"}])
    heard: list[tuple[str, int]] = []

    with _world(latency=0.0, batch_seconds=0.1) as (config, server):
        config = config.replace(lane=lane).with_("batches", poll_interval=0.05)

        def hear(message: str) -> None:
            heard.append((message, server.statistics()["by_model"].get("claude-3-opus-20240229", 0)))

        await pipeline.run_batch([source], output=tmp_path / "out.jsonl", config=config, say=hear)

    ((message, calls),) = [each for each in heard if "was retired on 2026-01-05" in each[0]]
    assert message.startswith(f"{source}:{before + 1}: ")
    assert "claude-opus-5-5" in message
    assert calls == 0


@pytest.mark.parametrize(
    ("simulation", "failed", "pending"),
    [
        pytest.param({"keys": frozenset({"right"})}, 0, 2, id="stopped before"),
        pytest.param({"faults": {"500": 1.0}}, 2, 0, id="failed again"),
    ],
)
async def test_an_old_failure_is_not_copied_when_it_is_to_be_sent_again(
    simulation: dict[str, Any], failed: int, pending: int, tmp_path: Path
) -> None:
    """--dedupe --retry-failed: what equals a request that was not sent again is left pending, as that one is."""
    source = _write(tmp_path / "in.jsonl", [_line(name, text="the same") for name in "ab"])
    output = tmp_path / "out.jsonl"

    with _world(faults={"500": 1.0}) as (config, _):
        config = config.with_("sending", max_attempts=1)
        await pipeline.run_batch([source], output=output, config=config, options=Options(dedupe=True))
    with _world(**simulation) as (config, _):
        config = config.with_("sending", max_attempts=1)
        options = Options(dedupe=True, retry_failed=True)
        again = await pipeline.run_batch([source], output=output, config=config, options=options)

    assert (again.run.failed, again.pending) == (failed, pending)
    assert [each["custom_id"] for each in _results(output)] == ["a", "b"]
