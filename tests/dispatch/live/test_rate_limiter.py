"""The gate on a virtual clock: exact times."""

from __future__ import annotations

import anyio
import pytest

from pipeline.core.config import Limits
from pipeline.core.types import Limit
from pipeline.dispatch.live.concurrency import ConcurrencyLimit
from pipeline.dispatch.live.rate_limiter import RateLimiter
from pipeline.dispatch.live.token_bucket import TokenCost
from tests.virtual import virtual_time

pytestmark = virtual_time

SMALL: TokenCost = {"requests": 1, "input_tokens": 10, "output_tokens": 5}


async def _times(rate_limiter: RateLimiter, costs: list[TokenCost]) -> list[float]:
    """Pass calls one after the other; return when each was let through, in seconds."""
    start = anyio.current_time()
    times = []
    for cost in costs:
        await rate_limiter.acquire(cost)
        await rate_limiter.wait_cooldown()
        times.append(round(anyio.current_time() - start, 3))
    return times


async def test_without_limits_nothing_waits() -> None:
    """A gate without caps is free, and a hundred calls pass at once."""
    rate_limiter = RateLimiter(Limits())

    times = await _times(rate_limiter, [SMALL] * 100)

    assert rate_limiter.try_acquire(SMALL)
    assert set(times) == {0.0}


async def test_requests_are_spread_over_the_minute() -> None:
    """60 requests per minute are one a second from the first on: no burst of a minute's worth."""
    assert await _times(RateLimiter(Limits(rpm=60)), [SMALL] * 5) == [0.0, 1.0, 2.0, 3.0, 4.0]


async def test_a_second_of_allowance_may_pass_at_once() -> None:
    """300 requests per minute are five at once, then one every 0.2 s."""
    assert await _times(RateLimiter(Limits(rpm=300)), [SMALL] * 8) == [0.0] * 5 + [0.2, 0.4, 0.6]


async def test_a_minute_never_exceeds_its_limit_by_more_than_a_second_of_it() -> None:
    """In the first minute 300 a minute let at most 305 through, where a full bucket would let 600."""
    times = await _times(RateLimiter(Limits(rpm=300)), [SMALL] * 400)

    assert sum(time <= 60.0 for time in times) <= 305


@pytest.mark.parametrize(
    ("caps", "cost"),
    [
        pytest.param(Limits(input_tpm=6_000), {"requests": 1, "input_tokens": 250, "output_tokens": 0}, id="input"),
        pytest.param(Limits(output_tpm=6_000), {"requests": 1, "input_tokens": 0, "output_tokens": 250}, id="output"),
    ],
)
async def test_a_large_request_passes_in_steps(caps: Limits, cost: TokenCost) -> None:
    """A request larger than a second's worth of tokens waits for all of them and then passes."""
    assert await _times(RateLimiter(caps), [cost, cost]) == [1.5, 4.0]


async def test_the_tightest_limit_decides() -> None:
    """Of several limits each is kept, so the tightest sets the pace."""
    rate_limiter = RateLimiter(Limits(rpm=600, input_tpm=600))

    assert await _times(rate_limiter, [SMALL] * 4) == [0.0, 1.0, 2.0, 3.0]


async def test_a_cooldown_closes_for_exactly_its_time() -> None:
    """A cooldown holds everybody for its time and not longer; a shorter one does not shorten it."""
    rate_limiter = RateLimiter(Limits())
    rate_limiter.start_cooldown(7.5)
    rate_limiter.start_cooldown(2.0)

    assert not rate_limiter.is_open()
    assert rate_limiter.statistics().cooldown_s == pytest.approx(7.5)
    assert await _times(rate_limiter, [SMALL, SMALL]) == [7.5, 7.5]
    assert rate_limiter.is_open()


async def test_a_cooldown_that_begins_while_waiting_holds_who_waits() -> None:
    """Who waits for a limit when a cooldown begins waits for the cooldown too: it is looked at last."""
    rate_limiter = RateLimiter(Limits(rpm=60))
    await rate_limiter.acquire(SMALL)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_close_later, rate_limiter, 0.5, 10.0)
        times = await _times(rate_limiter, [SMALL])

    assert times == [10.5]


async def _close_later(rate_limiter: RateLimiter, after: float, seconds: float) -> None:
    await anyio.sleep(after)
    rate_limiter.start_cooldown(seconds)


@pytest.mark.slow
async def test_a_rate_that_was_found_and_does_not_bind_does_not_grow_for_ever() -> None:
    """One stray refusal and then hours at a slower pace leave the found rate near what is really sent."""
    rate_limiter = RateLimiter(Limits())
    for _ in range(9):
        await rate_limiter.acquire(SMALL)
        await anyio.sleep(0.1)
    rate_limiter.on_rate_limited(await rate_limiter.acquire(SMALL), None)

    for _ in range(20_000):
        await rate_limiter.wait_cooldown()
        await rate_limiter.acquire(SMALL)
        await anyio.sleep(1.0)
        rate_limiter.on_success()

    (allowance,) = rate_limiter.statistics().allowances
    assert allowance.per_minute < 10_000


async def test_refusals_without_end_only_lead_to_long_pauses() -> None:
    """The thousandth refusal in a row costs ten seconds, not an overflow."""
    rate_limiter = RateLimiter(Limits())
    concurrency_limit = ConcurrencyLimit(100)

    pauses = []
    for _ in range(3_000):
        permit = await rate_limiter.acquire(SMALL)
        await anyio.sleep(0.01)
        pauses.append(rate_limiter.on_rate_limited(permit, None))
        concurrency_limit.on_overload(permit.sent_at)

    assert max(pause for pause in pauses if pause) == 10.0


async def test_a_limit_that_shrinks_below_what_is_waited_for_does_not_block() -> None:
    """Who waits for more than a shrunken bucket holds gets it in parts."""
    rate_limiter = RateLimiter(Limits())
    large: TokenCost = {"requests": 1, "input_tokens": 20_000, "output_tokens": 0}
    rate_limiter.update_from_headers([Limit(kind="input_tokens", per_minute=30_000, remaining=0)])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_learn_later, rate_limiter, 1.0, Limit(kind="input_tokens", per_minute=10_000, remaining=0))
        with anyio.fail_after(600.0):
            await rate_limiter.acquire(large)


async def _learn_later(rate_limiter: RateLimiter, after: float, limit: Limit) -> None:
    await anyio.sleep(after)
    rate_limiter.update_from_headers([limit])
