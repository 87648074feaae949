"""Several senders as one."""

from __future__ import annotations

from dataclasses import replace

from pipeline.core.types import Allowance
from pipeline.dispatch.live.model_queue import Statistics as Lane
from pipeline.dispatch.live.sender import Statistics
from pipeline.runner.cluster import statistics

LANE = Lane(
    provider="openai",
    model="m",
    waiting=1,
    retrying=0,
    in_flight=3,
    window=8,
    rate_limited=2,
    cooldown_s=0.0,
    waiting_for=None,
    trouble=None,
    allowances=(Allowance(kind="requests", per_minute=100.0, used=0.5, source="told"),),
    ended=None,
)
SENDER = Statistics(in_flight=3, attempts=5, billed=4, rate_limited=1, failed=0, unknown=0, dropped=0, queues=[LANE])


def test_shares_of_a_limit_are_shown_as_the_whole() -> None:
    """Two halves of 100 and 300 a minute, half and fully used, are one of 400, used by 88 %."""
    other = replace(
        LANE,
        waiting_for="limit of requests per minute",
        cooldown_s=4.0,
        allowances=(Allowance(kind="requests", per_minute=300.0, used=1.0, source="told"),),
    )
    total = statistics.combined({"attempts": 10, "dropped": 1}, [SENDER, replace(SENDER, queues=[other])])

    (lane,) = total.queues
    assert (total.attempts, total.billed, total.dropped, total.in_flight) == (20, 8, 1, 6)
    assert (lane.in_flight, lane.window, lane.rate_limited) == (6, 16, 4)
    assert (lane.waiting_for, lane.cooldown_s) == ("limit of requests per minute", 4.0)
    assert lane.allowances == (Allowance(kind="requests", per_minute=400.0, used=0.875, source="told"),)


def test_models_stay_apart() -> None:
    """What is one provider's model is not another's."""
    other = replace(LANE, provider="vllm")

    assert len(statistics.combined({}, [SENDER, replace(SENDER, queues=[other])]).queues) == 2
