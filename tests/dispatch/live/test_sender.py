"""The live lane on a virtual clock: every request one result, at exact times, with bounded tasks."""

from __future__ import annotations

import random
from dataclasses import replace

import anyio
import orjson
import pytest

from pipeline.accounting.budget import Budget
from pipeline.core.config import Limits, Sending
from pipeline.core.errors import BudgetReachedError, ErrorScope, OpenAIAPIError, TransportError, TryLaterError
from pipeline.core.types import HttpResponse, Request, Result
from pipeline.dispatch.live.concurrency import FIRST_WAVE
from tests.scripted import Script, World, refusal, reply, request
from tests.virtual import virtual_time

pytestmark = virtual_time


def _then_reply(*answers: HttpResponse | TransportError) -> Script:
    """Answer with each of these once, then properly."""
    return lambda n: answers[n - 1] if n <= len(answers) else reply()


async def test_every_request_has_exactly_one_result() -> None:
    """As many results as requests, each id once, whatever is in flight."""
    world = World(settings=Sending(concurrency=7))

    await world.run(*(request(f"q-{n}") for n in range(500)))

    assert sorted(result.custom_id for result in world.results) == sorted(f"q-{n}" for n in range(500))
    assert all(result.success and result.attempts == 1 for result in world.results)


async def test_in_flight_never_exceeds_the_concurrency() -> None:
    """The concurrency is a bound and is reached."""
    world = World(settings=Sending(concurrency=7))

    await world.run(*(request(f"q-{n}") for n in range(100)))

    assert world.max_in_flight == 7


async def test_a_lane_begins_with_a_first_wave_and_doubles() -> None:
    """Two requests go first; their answers let ten through, and each round doubles what is in flight."""
    world = World(settings=Sending(concurrency=100))

    await world.run(*(request(f"q-{n}") for n in range(72)))

    starts = [times[0] for times in world.calls.values()]
    assert [starts.count(second) for second in (0.0, 1.0, 2.0, 3.0)] == [2, 10, 20, 40]


async def test_a_retry_waits_as_long_as_the_provider_says() -> None:
    """`retry-after` is obeyed to the millisecond, and the result tells the attempts."""
    world = World(scripts={"a": _then_reply(refusal(429, retry_after="7.5"))})

    (result,) = await world.run(request("a"))

    assert world.calls["a"] == [0.0, 8.5]
    assert (result.success, result.attempts, len(result.failed_attempts)) == (True, 2, 1)


async def test_a_cooldown_is_shared_by_the_model() -> None:
    """One 429 closes the gate for every request of that model, and not for another model."""
    world = World(scripts={"a": _then_reply(refusal(429, retry_after="20"))})

    await world.run(request("a"), *(request(f"b-{n}") for n in range(5)), request("other", model="o"))

    assert world.calls["a"] == [0.0, 21.0]
    assert all(start <= 1.0 or start >= 21.0 for n in range(5) for start in world.calls[f"b-{n}"])
    assert world.calls["other"] == [0.0]


async def test_a_waiting_retry_holds_no_slot() -> None:
    """While requests wait to be tried again, others use every slot."""
    broken = refusal(500, retry_after="100")
    scripts = {f"bad-{n}": _then_reply(broken) for n in range(4)}
    world = World(scripts=scripts, settings=Sending(concurrency=2))

    await world.run(*(request(f"bad-{n}") for n in range(4)), *(request(f"ok-{n}", model="o") for n in range(20)))

    assert max(world.calls[f"ok-{n}"][0] for n in range(20)) <= 13.0
    assert all(world.outcomes().values())


async def test_a_request_that_keeps_failing_ends_as_a_failure_with_its_attempts() -> None:
    """A poisoned request is tried `max_attempts` times; its result lists every one."""
    world = World(scripts={"bad": lambda n: refusal(500)}, settings=Sending(max_attempts=3))

    await world.run(request("bad"), request("ok"))

    bad = next(result for result in world.results if result.custom_id == "bad")
    assert world.outcomes() == {"bad": False, "ok": True}
    assert bad.failure is not None
    assert [attempt.status for attempt in bad.failure.attempts] == [500, 500, 500]
    assert bad.attempts == len(world.calls["bad"]) == 3


async def test_rate_limits_do_not_use_up_attempts() -> None:
    """Twenty 429s in a row lose no row when two attempts are allowed."""
    limited = [refusal(429, retry_after="1")] * 20
    world = World(scripts={"a": _then_reply(*limited)}, settings=Sending(max_attempts=2))

    await world.run(request("a"))

    assert world.outcomes() == {"a": True}


async def test_a_bad_request_fails_alone_and_at_once() -> None:
    """A 400 ends its line after one call and touches no other."""
    world = World(scripts={"bad": lambda n: refusal(400, type="invalid_request_error", code="invalid_value")})

    await world.run(request("bad"), *(request(f"ok-{n}") for n in range(10)))

    assert len(world.calls["bad"]) == 1
    assert world.outcomes() == {"bad": False} | {f"ok-{n}": True for n in range(10)}


@pytest.mark.parametrize(
    ("answer", "scope"),
    [
        pytest.param(refusal(401, code="invalid_api_key"), ErrorScope.RUN, id="wrong key"),
        pytest.param(
            refusal(429, type="insufficient_quota", code="insufficient_quota"), ErrorScope.RUN, id="no credit"
        ),
        pytest.param(refusal(404, code="model_not_found"), ErrorScope.MODEL, id="unknown model"),
    ],
)
async def test_what_cannot_succeed_stops_after_the_first_wave(answer: HttpResponse, scope: ErrorScope) -> None:
    """A wrong key, an empty account or an unknown model costs a handful of calls; the rest stays pending."""
    world = World(default=lambda n: answer)

    await world.run(*(request(f"q-{n}") for n in range(1_000)))

    reason = world.sender.stopped or world.sender.ended_queues[0].ended
    assert isinstance(reason, OpenAIAPIError)
    assert reason.scope is scope
    assert sum(map(len, world.calls.values())) == FIRST_WAVE
    assert world.results == []
    assert world.sender.statistics().dropped == 1_000


async def test_an_unknown_model_does_not_stop_the_others() -> None:
    """A model that does not exist is given up alone."""
    missing = refusal(404, code="model_not_found")
    world = World(scripts={f"bad-{n}": lambda n: missing for n in range(50)})

    await world.run(
        *(request(f"bad-{n}", model="missing") for n in range(50)), *(request(f"ok-{n}") for n in range(50))
    )

    assert world.outcomes() == {f"ok-{n}": True for n in range(50)}
    assert sum(len(world.calls[f"bad-{n}"]) for n in range(50)) <= FIRST_WAVE


async def test_a_hint_beyond_the_ceiling_parks_the_model() -> None:
    """Who is told to wait an hour gives the model up for now, and says so."""
    world = World(scripts={"a": lambda n: refusal(429, retry_after="3600")})

    await world.run(request("a"), request("b", model="o"))

    assert world.outcomes() == {"b": True}
    (queue,) = world.sender.ended_queues
    assert isinstance(queue.ended, TryLaterError)
    assert "3,600 s" in queue.ended.message


async def test_a_model_is_not_parked_for_a_pause_of_our_own() -> None:
    """A provider that says 429 and not how long is waited for as we see fit, however low the ceiling is."""
    world = World(
        scripts={"a": _then_reply(refusal(429), refusal(429))}, settings=Sending(max_retry_after=0.1, concurrency=1)
    )

    results = await world.run(request("a"))

    assert [result.success for result in results] == [True]


async def test_a_lost_connection_is_tried_again_and_a_lost_answer_is_counted() -> None:
    """A timeout after sending may be billed: it is tried again, counted as unknown, and listed."""
    lost = TransportError("no complete answer within the timeout", type="timeout", is_sent=True)
    refused = TransportError("cannot connect", type="connection_error", is_sent=False)
    world = World(scripts={"a": _then_reply(lost, refused)})

    (result,) = await world.run(request("a"))

    assert result.success
    assert [attempt.may_be_billed for attempt in result.failed_attempts] == [True, False]
    assert world.sender.statistics().unknown == 1


async def test_stop_finishes_what_is_in_flight_and_nothing_else() -> None:
    """After `stop` no call begins; answers in flight are recorded; the rest is dropped and counted."""
    world = World(latency=10.0, settings=Sending(concurrency=50))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.sender.run)
        await world.sender.submit([request(f"q-{n}") for n in range(100)])
        await anyio.sleep(25.0)
        in_flight = world.sender.statistics().in_flight
        finished = len(world.results)
        world.sender.stop()

    assert in_flight == 20
    assert len(world.results) == finished + in_flight
    assert world.sender.statistics().dropped == 100 - len(world.results)
    assert world.elapsed() == 30.0


async def test_stop_ends_a_wait_at_the_gate_at_once() -> None:
    """Who stands at a closed gate when the run stops leaves, and is counted as dropped."""
    world = World(limits={"m": Limits(rpm=1)})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.sender.run)
        await world.sender.submit([request(f"q-{n}") for n in range(3)])
        await anyio.sleep(10.0)
        world.sender.stop()

    assert world.elapsed() == 10.0
    assert len(world.results) == 1
    assert world.sender.statistics().dropped == 2


async def test_a_limited_model_does_not_slow_the_others() -> None:
    """Nine models beside one of a request a minute finish as if they were alone."""
    world = World(settings=Sending(concurrency=10), limits={"slow": Limits(rpm=1)})
    requests = [request(f"{model}-{n}", model=model) for n in range(20) for model in ("slow", *"abcdefghi")]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.sender.run)
        await world.sender.submit(requests)
        await anyio.sleep(30.0)
        finished = [result.custom_id.split("-")[0] for result in world.results]
        world.sender.stop()

    assert finished.count("slow") == 1
    assert len(finished) == 1 + 9 * 20


async def test_reading_ahead_is_bounded() -> None:
    """`submit` waits while too many bytes wait to be sent, so memory does not follow the input."""
    world = World(read_ahead_bytes=10_000, settings=Sending(concurrency=2))
    submitted = 0

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.sender.run)
        for n in range(200):
            await world.sender.submit([request(f"q-{n}")])
            submitted = n + 1
            waiting = submitted - len(world.results)
            assert waiting <= 15
        world.sender.close()

    assert len(world.results) == 200


async def test_a_lane_cleared_before_its_worker_comes_ends_the_run() -> None:
    """A model given up between asking for a worker and getting one leaves no worker waiting at its gate."""
    missing = refusal(404, code="model_not_found")
    world = World(settings=Sending(concurrency=1), scripts={"a-0": lambda n: missing}, latency=1.0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.sender.run)
        await world.sender.submit([request("a-0", model="missing"), *(request(f"b-{n}") for n in range(3))])
        await anyio.sleep(0.5)
        await world.sender.submit([request("a-1", model="missing")])
        world.sender.close()

    assert world.outcomes() == {f"b-{n}": True for n in range(3)}
    assert world.calls["a-1"] == []


@pytest.mark.parametrize("seed", range(150))
async def test_every_request_is_accounted_for_whatever_happens(seed: int) -> None:
    """Random outcomes, models, limits, concurrency and stops: the run ends, and nothing is lost or counted twice."""
    chance = random.Random(seed)
    outcomes: list[HttpResponse | TransportError] = [
        *[reply()] * 8,
        refusal(429, retry_after="3"),
        refusal(429),
        refusal(529),
        refusal(500),
        refusal(400),
        refusal(404, code="model_not_found"),
        TransportError("lost", type="timeout", is_sent=True),
        TransportError("refused", type="connection_error", is_sent=False),
        *([refusal(401)] if seed % 5 == 0 else []),
    ]
    world = World(
        default=lambda n: chance.choice(outcomes),
        latency=chance.choice([0.0, 0.3, 2.0]),
        settings=Sending(concurrency=chance.randint(1, 12), max_attempts=3),
        limits={"m1": Limits(rpm=chance.randint(30, 300))},
        read_ahead_bytes=chance.choice([3_000, 1_000_000]),
    )
    requests = [request(f"q-{n}", model=f"m{chance.randint(0, 4)}") for n in range(60)]

    with anyio.fail_after(100_000):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(world.sender.run)
            for start in range(0, 60, 7):
                await world.sender.submit(requests[start : start + 7])
                await anyio.sleep(chance.choice([0.0, 0.1, 1.0]))
            if seed % 3 == 0:
                world.sender.stop()
            world.sender.close()

    ids = [result.custom_id for result in world.results]
    assert len(ids) == len(set(ids))
    assert len(ids) + world.sender.statistics().dropped == 60
    assert world.sender.statistics().in_flight == 0
    assert world.max_in_flight <= world.settings.concurrency


async def test_a_bad_request_with_a_long_hint_does_not_park_its_model() -> None:
    """A 400 that carries `retry-after` ends its own line and nothing else."""
    world = World(scripts={"bad": lambda n: refusal(400, retry_after="300")})

    await world.run(request("bad"), *(request(f"ok-{n}") for n in range(5)))

    assert world.outcomes() == {"bad": False} | {f"ok-{n}": True for n in range(5)}


async def test_a_request_that_never_fits_gives_nothing_back() -> None:
    """Refusing large requests does not open the bucket for others: the cap is kept."""
    world = World(limits={"m": Limits(input_tpm=60)})
    large = replace(request("large"), estimated_input_tokens=10_000)
    small = [replace(request(f"s-{n}"), estimated_input_tokens=1) for n in range(10)]

    await world.run(small[0], large, *small[1:])

    starts = sorted(world.calls[f"s-{n}"][0] for n in range(10))
    assert world.outcomes()["large"] is False
    assert starts[-1] >= 8.0


async def test_the_smallest_read_ahead_still_reads() -> None:
    """With room for less than one request the input is still read to its end."""
    world = World(read_ahead_bytes=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.sender.run)
        for n in range(5):
            with anyio.fail_after(100.0):
                await world.sender.submit([request(f"q-{n}")])
        world.sender.close()

    assert len(world.results) == 5


async def test_a_free_slot_is_used_while_another_lane_waits() -> None:
    """With one slot, a lane in a long cooldown does not keep the other lane's request waiting."""
    world = World(scripts={"m-1": _then_reply(refusal(429, retry_after="100"))}, settings=Sending(concurrency=1))

    await world.run(*(request(f"m-{n}") for n in range(3)), *(request(f"o-{n}", model="o") for n in range(3)))

    assert max(world.calls[f"o-{n}"][0] for n in range(3)) < 50.0


async def test_time_without_work_is_no_stall() -> None:
    """Input that comes late, after longer than the patience, is sent and not given up at once."""
    world = World()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.sender.run)
        tasks.start_soon(world.sender.stop_when_stalled, 600.0)
        await anyio.sleep(1_199.5)
        await world.sender.submit([request("late")])
        world.sender.close()
        await anyio.sleep(5)
        tasks.cancel_scope.cancel()

    assert world.outcomes() == {"late": True}


# ── money ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_no_cap_is_passed_whatever_is_in_flight() -> None:
    """500 at a time, each reserved at its worst and settled at a third of it: all the money is used, none over."""
    world = World(settings=Sending(concurrency=500), budget=Budget(40_000), worst=450)

    results = await world.run(*(request(f"r-{n}") for n in range(1_000)))

    spent = sum(result.cost.nanos or 0 for result in results)
    assert 40_000 - 450 < spent <= 40_000
    assert isinstance(world.sender.stopped, BudgetReachedError)
    assert world.sender.statistics().dropped == 1_000 - len(results)


async def test_a_call_that_may_be_billed_keeps_its_reserve() -> None:
    """A timeout may have cost the worst case, so that is what it counts."""
    lost = TransportError("late", type="timeout", is_sent=True)
    world = World(scripts={"a": _then_reply(lost)}, budget=Budget(1_000), worst=500)

    await world.run(request("a"))

    assert world.budget is not None
    assert world.budget.spent == 500 + 150


async def test_a_refused_call_costs_nothing() -> None:
    """429s give their reserve back: any number of them leaves the whole budget."""
    world = World(scripts={"a": _then_reply(*[refusal(429)] * 20)}, budget=Budget(500), worst=500)

    results = await world.run(request("a"))

    assert [result.success for result in results] == [True]
    assert world.budget is not None
    assert world.budget.spent == 150


async def test_an_answer_that_cannot_be_used_is_paid_for() -> None:
    """A 200 without an answer in it, but with a usage, is billed: its tokens and cost stand with the attempt."""
    body = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    world = World(scripts={"a": _then_reply(HttpResponse(status=200, headers={}, body=orjson.dumps(body)))})

    (result,) = await world.run(request("a"))

    assert result.success
    assert [(usage.total_tokens, nanos) for usage, nanos in result.wasted] == [(10, 100)]
    assert world.sender.statistics().unknown == 0


class _SlowDisk(World):
    """A world in which recording takes longer than any call; `largest` is how many calls a crash would repeat."""

    largest = 0

    async def log_attempt(self, request: Request, attempt: int, at: str) -> None:
        await super().log_attempt(request, attempt, at)
        self.largest = max(self.largest, len(self.attempts) - len(self.results))

    async def append(self, *results: Result) -> None:
        await anyio.sleep(50.0)
        await super().append(*results)


async def test_a_request_keeps_its_place_until_its_result_is_recorded() -> None:
    """However slow the disk is, a crash repeats no more calls than may be in flight."""
    world = _SlowDisk(settings=Sending(concurrency=3))

    await world.run(*(request(f"q-{n}") for n in range(20)))

    assert (world.largest, len(world.results)) == (3, 20)
