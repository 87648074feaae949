"""Ten minutes at a provider's limits on a virtual clock: used to the full, hardly ever refused, whatever is told."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from pipeline.core.config import Limits, Sending
from pipeline.simulator import Options
from tests.pace import MODELS, Run, measure
from tests.scripted import World, refusal, reply, request
from tests.virtual import virtual_time

pytestmark = [*virtual_time, pytest.mark.timeout(120)]

SILENT: dict[str, Any] = {"rate_headers": False, "retry_after": False}
both_providers = pytest.mark.parametrize("provider", list(MODELS))


class Batch(Run):
    """A run with two hundred requests and no more."""

    async def _feed(self) -> None:
        requests = self._requests()
        await self.sender.submit([next(requests) for _ in range(200)])
        self.sender.close()


@pytest.mark.slow
@both_providers
async def test_a_limit_that_is_told_is_used_to_the_full(provider: str) -> None:
    """Learned from headers alone: 98 % of what ten minutes allow, at most one refusal in a thousand."""
    run = Run(provider, Options(rpm=1_000, latency=1.5))
    await run.go(600.0)
    pace = measure(run, allowed=11_000)

    assert pace.used >= 0.98
    assert pace.refused_share <= 0.001


@pytest.mark.slow
@both_providers
async def test_a_cap_of_the_users_is_used_to_the_full_and_never_exceeded(provider: str) -> None:
    """A cap below the provider's limit: 98 % of it after the first minute, never above it, nothing refused."""
    run = Run(provider, Options(rpm=1_000, latency=1.5), caps=Limits(rpm=600))
    await run.go(600.0)
    pace = measure(run, allowed=9 * 600, since=60.0)

    assert 0.98 <= pace.used <= 1.01
    assert pace.refused == 0


@pytest.mark.parametrize(
    ("provider", "limits", "kind", "allowed"),
    [
        pytest.param(
            "anthropic", {"input_tpm": 200_000}, "input_tokens", 2_200_000, id="anthropic input", marks=pytest.mark.slow
        ),
        pytest.param(
            "anthropic", {"output_tpm": 50_000}, "output_tokens", 550_000, id="anthropic output", marks=pytest.mark.slow
        ),
        pytest.param("openai", {"input_tpm": 200_000}, "input_tokens", 2_200_000, id="openai tokens"),
    ],
)
async def test_token_limits_that_are_told_are_used_to_the_full(
    provider: str, limits: dict[str, Any], kind: str, allowed: int
) -> None:
    """Tokens per minute bind like requests: 98 % of what is allowed, at most one refusal in a thousand."""
    run = Run(provider, Options(latency=1.5, **limits), words=lambda n: 400)
    await run.go(600.0)
    answered = run.counts["by_model"][MODELS[provider]]

    assert answered[kind] >= 0.98 * allowed
    assert run.counts["rejected"] <= 0.001 * run.counts["answered"]


async def test_openai_charges_the_answers_bound() -> None:
    """A large `max_tokens` is what OpenAI counts: a tenth of the requests pass, and none is refused."""
    run = Run("openai", Options(input_tpm=200_000, latency=1.5), max_tokens=1_000)
    await run.go(600.0)

    assert 0.98 * 2_200 <= run.counts["answered"] <= 2_200
    assert run.counts["rejected"] == 0


@pytest.mark.slow
@both_providers
@pytest.mark.parametrize(
    ("told", "settles"),
    [pytest.param({}, 2.0, id="told"), pytest.param(SILENT, 60.0, id="not told")],
)
async def test_a_limit_that_changes_is_followed(provider: str, told: dict[str, Any], settles: float) -> None:
    """Halved and doubled on the way: the new limit is used within a minute, at once where it is told."""
    run = Run(provider, Options(rpm=1_000, latency=1.5, **told))
    await run.go(600.0, changes={200.0: 0.5, 400.0: 2.0})
    pace = measure(run, allowed=1)

    def rate(start: float, end: float) -> float:
        return sum(pace.per_second[int(start) : int(end)]) / (end - start) * 60

    assert rate(200 + settles, 400) == pytest.approx(500, rel=0.05)
    assert rate(400 + settles, 600) == pytest.approx(1_000, rel=0.05)
    assert pace.refused_share <= 0.02


@pytest.mark.slow
@both_providers
@pytest.mark.parametrize(
    "told", [pytest.param({"rate_headers": False}, id="hint only"), pytest.param(SILENT, id="nothing")]
)
async def test_a_limit_that_is_not_told_is_found(provider: str, told: dict[str, Any]) -> None:
    """Without headers: at least 85 % of the limit with at most 2 % refused; 98 % and 1 % are what we get."""
    run = Run(provider, Options(rpm=1_000, latency=1.5, **told))
    await run.go(600.0)
    pace = measure(run, allowed=11_000)

    assert pace.used >= 0.98
    assert pace.refused_share <= 0.01


@pytest.mark.parametrize("latency", [0.0, 0.05, 1.0])
@pytest.mark.parametrize(
    ("told", "refusals"),
    [
        pytest.param({}, 0, id="told"),
        pytest.param({"rate_headers": False}, 10, id="hint only"),
        pytest.param(SILENT, 10, id="nothing"),
    ],
)
async def test_a_small_account_is_used_to_the_full(told: dict[str, Any], refusals: int, latency: float) -> None:
    """5 requests a second, 20 at once, 200 rows, 50 in flight, nothing configured: ideal 36 s, 38 s at most."""
    run = Batch("openai", Options(rpm=300, burst=20, latency=latency, **told), concurrency=50)
    await run.go(120.0)

    assert len(run.answers) == 200
    assert max(run.answers) <= 38.0
    assert run.counts["rejected"] <= refusals


async def test_large_requests_are_not_starved() -> None:
    """Among hundreds of small requests the large ones go in their turn."""
    run = Run("anthropic", Options(input_tpm=30_000, latency=0.5), words=lambda n: 4_000 if n % 20 == 0 else 20)
    await run.go(600.0)

    large = sum(line % 20 == 0 for line in run.answered_lines)
    assert run.counts["by_model"][MODELS["anthropic"]]["input_tokens"] >= 0.95 * 330_000
    assert large / len(run.answered_lines) == pytest.approx(1 / 20, rel=0.2)


async def test_a_request_that_never_fits_fails_at_once() -> None:
    """What is larger than a minute's allowance is a failed line within a second, not a wait."""
    world = World(limits={"m": Limits(input_tpm=6)})

    (result,) = await world.run(request("large"))

    assert result.failure is not None
    assert result.failure.type == "request_too_large"
    assert world.elapsed() <= 1.0
    assert world.calls == {}


async def test_a_storm_costs_little_and_is_left_behind_quickly() -> None:
    """A minute of 529s: a tenth of normal load at most, no line failed, full speed half a minute later."""
    start = anyio.current_time()

    def weather(n: int) -> Any:
        return refusal(529) if 60.0 <= anyio.current_time() - start < 120.0 else reply()

    world = World(default=weather, latency=1.0, settings=Sending(concurrency=50), read_ahead_bytes=50_000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.sender.run)
        with anyio.move_on_after(240.0):
            for n in range(100_000):
                await world.sender.submit([request(f"q-{n}")])
        world.sender.stop()

    starts = sorted(time for times in world.calls.values() for time in times)
    normal = sum(30.0 <= time < 60.0 for time in starts) / 30
    storm = sum(60.0 <= time < 120.0 for time in starts)
    after = sum(150.0 <= time < 180.0 for time in starts) / 30
    assert all(result.success for result in world.results)
    assert storm <= 0.1 * normal * 60
    assert after >= 0.95 * normal


async def test_sustained_refusals_never_stop_progress() -> None:
    """Nine of ten calls refused for half an hour: lines are still answered, all the time."""
    calls = iter(range(10**9))
    world = World(
        default=lambda n: reply() if next(calls) % 10 == 0 else refusal(429),
        settings=Sending(concurrency=50),
        read_ahead_bytes=50_000,
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.sender.run)
        finished = []
        with anyio.move_on_after(1_800.0):
            for n in range(100_000):
                await world.sender.submit([request(f"q-{n}")])
        finished = [result for result in world.results if result.success]
        world.sender.stop()

    assert len(finished) >= 20
    assert len(finished) == len(world.results)
