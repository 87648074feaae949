"""Reserves: whatever becomes of chunks, no more is out than the cap, and nothing stays set aside in the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import anyio
import anyio.lowlevel
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.accounting.budget import Budget
from pipeline.core.errors import BudgetReachedError, UsageError
from pipeline.core.types import Cost, Request, Usage
from pipeline.dispatch.batch.reservations import BatchReservations

CAP = 1_000
NONCES = st.sampled_from(["a", "b", "c"])
WORST = st.integers(0, 400)


class Bounds:
    """Prices: the worst case of a request is its bound on output tokens; without one nobody knows."""

    def cost(self, request: Request, model: str, usage: Usage) -> Cost:
        raise AssertionError("what a request costs is settled by others")

    def worst_case(self, request: Request) -> int:
        if request.max_output_tokens is None:
            raise UsageError("no price is known")
        return request.max_output_tokens


def request(worst: int | None) -> Request:
    return Request(
        custom_id="r",
        digest="d",
        source="in.jsonl",
        line=1,
        provider="openai",
        model="m",
        body=b"{}",
        max_output_tokens=worst,
    )


def left(budget: Budget) -> int:
    """Return how much may still be reserved, found by trying; below 0 nothing fits, not even nothing."""
    low, high = -1, budget.cap + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = budget.try_reserve(middle)
        if fits:
            budget.settle(middle, 0)
        low, high = (middle, high) if fits else (low, middle)
    return low


def filled(reservations: BatchReservations, local_id: str, *worsts: int) -> None:
    for worst in worsts:
        assert reservations.try_reserve(request(worst)) == worst
        reservations.assign(local_id, worst)


class Life(RuleBasedStateMachine):
    """Requests are reserved, assigned, settled; chunks are closed, held, taken over; beside it stands a plain account.

    `most` is the highest level that is right: the cap, or what was taken over above it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(CAP)
        self.reservations = BatchReservations(self.budget, Bounds())
        self.open: dict[str, list[int]] = defaultdict(list)
        self.spent = self.held = 0
        self.most = CAP

    @property
    def reserved(self) -> int:
        return sum(map(sum, self.open.values()))

    @property
    def level(self) -> int:
        return self.spent + self.held + self.reserved

    @rule(local_id=NONCES, worst=WORST)
    def load(self, local_id: str, worst: int) -> None:
        fits = self.level + worst <= CAP

        assert self.reservations.try_reserve(request(worst)) == (worst if fits else None)

        if fits:
            self.reservations.assign(local_id, worst)
            self.open[local_id].append(worst)

    @rule(local_id=NONCES, data=st.data())
    def settle(self, local_id: str, data: st.DataObject) -> None:
        if not self.open[local_id]:
            return
        worst = self.open[local_id].pop(data.draw(st.integers(0, len(self.open[local_id]) - 1)))
        spent = data.draw(st.none() | st.integers(0, worst))

        self.reservations.settle(local_id, request(worst), spent)

        self.spent += worst if spent is None else spent

    @rule(local_id=NONCES)
    def close(self, local_id: str) -> None:
        self.reservations.close(local_id)
        self.open.pop(local_id, None)

    @rule(local_id=NONCES)
    def hold(self, local_id: str) -> None:
        self.reservations.hold(local_id)
        self.held += sum(self.open.pop(local_id, []))

    @rule(local_id=NONCES, worsts=st.lists(st.none() | WORST, max_size=4))
    def take_over(self, local_id: str, worsts: list[int | None]) -> None:
        self.reservations.take_over(local_id, [request(worst) for worst in worsts])
        self.open[local_id] += [worst for worst in worsts if worst is not None]
        self.most = max(self.most, self.level)

    @rule(local_id=NONCES, worst=WORST)
    def settle_what_is_gone(self, local_id: str, worst: int) -> None:
        """A chunk that was closed has nothing to give, and nothing unknown is spent from it."""
        if not self.open[local_id]:
            self.reservations.settle(local_id, request(worst), None)

    @invariant()
    def the_account_is_right(self) -> None:
        """Spent and held are exactly what they should be, and so is what may still be reserved."""
        assert (self.budget.spent, self.budget.held) == (self.spent, self.held)
        assert left(self.budget) == max(-1, CAP - self.level)

    @invariant()
    def the_cap_holds(self) -> None:
        """No more is out than the cap, but for what was bought before this run; and a cap once kept stays kept."""
        assert self.level <= self.most

    def teardown(self) -> None:
        """When every chunk has come to its end nothing is set aside any more."""
        for local_id in tuple(self.open):
            self.close(local_id)
        assert self.reserved == 0
        assert left(self.budget) == max(-1, CAP - self.budget.used)


TestLife = Life.TestCase


@pytest.mark.parametrize(
    ("spent", "expected"),
    [pytest.param(0, 0, id="nothing"), pytest.param(7, 7, id="less"), pytest.param(None, 30, id="nobody knows")],
)
def test_what_a_request_cost_is_spent(spent: int | None, expected: int) -> None:
    """The rest of what was set aside for it is free at once; what is unknown may all be spent."""
    budget = Budget(100)
    reservations = BatchReservations(budget, Bounds())
    filled(reservations, "a", 30, 20)

    reservations.settle("a", request(30), spent)

    assert (budget.spent, budget.held, left(budget)) == (expected, 0, 100 - expected - 20)
    reservations.close("a")
    assert left(budget) == 100 - expected


def test_what_cost_more_than_the_worst_case_is_spent() -> None:
    """A price that was wrong does not make the account wrong: what was paid counts."""
    budget = Budget(100)
    reservations = BatchReservations(budget, Bounds())
    filled(reservations, "a", 30)

    reservations.settle("a", request(30), 95)
    reservations.close("a")

    assert (budget.spent, left(budget)) == (95, 5)


def test_a_chunk_is_settled_from_its_own() -> None:
    """Closing and holding touch no other chunk, and do nothing the second time."""
    budget = Budget(100)
    reservations = BatchReservations(budget, Bounds())
    filled(reservations, "a", 10)
    filled(reservations, "b", 20)
    filled(reservations, "c", 40)

    reservations.close("a")
    reservations.hold("b")
    for _ in range(2):
        reservations.close("a")
        reservations.hold("a")
        reservations.close("b")
        reservations.hold("b")

    assert (budget.held, budget.used, left(budget)) == (20, 20, 40)


@pytest.mark.parametrize(
    ("worsts", "rest"),
    [
        pytest.param([10, 20], 70, id="fits"),
        pytest.param([60, 60], -1, id="more than the cap"),
        pytest.param([10, None], 90, id="a price that nobody knows"),
        pytest.param([], 100, id="none"),
    ],
)
def test_what_an_earlier_run_sent_is_set_aside(worsts: Sequence[int | None], rest: int) -> None:
    """It is bought already, so it counts whether it fits or not; its end gives it back."""
    budget = Budget(100)
    reservations = BatchReservations(budget, Bounds())

    reservations.take_over("a", [request(worst) for worst in worsts])

    assert left(budget) == rest
    for worst in worsts:
        reservations.settle("a", request(worst), 0)
    assert (budget.spent, left(budget)) == (0, 100)


def test_a_price_that_nobody_knows_is_not_reserved() -> None:
    """With a budget nothing is sent whose price is unknown, and nothing is set aside for it."""
    budget = Budget(100)
    with pytest.raises(UsageError, match="no price"):
        BatchReservations(budget, Bounds()).try_reserve(request(None))
    assert left(budget) == 100


def test_without_a_budget_nothing_is_done() -> None:
    """No price is asked for, and everything fits."""
    reservations = BatchReservations(None, Bounds())

    assert reservations.try_reserve(request(None)) == 0
    reservations.assign("a", 0)
    reservations.take_over("a", [request(None)])
    reservations.settle("a", request(None), None)
    reservations.hold("a")
    reservations.close("a")


@pytest.mark.parametrize(
    ("end", "is_reserved"), [("settle", True), ("close", True), ("hold", False)], ids=["settled", "closed", "held"]
)
async def test_who_waits_is_woken_by_the_end_of_a_chunk(end: str, is_reserved: bool) -> None:
    """What is given back goes to the one who waits; what is held comes never, so he is told and not left waiting."""
    budget = Budget(100)
    reservations = BatchReservations(budget, Bounds())
    filled(reservations, "a", 80)
    outcome: list[bool] = []

    async def wait() -> None:
        try:
            with reservations.counted_as_waiting():
                await reservations.reserve(request(50))
        except BudgetReachedError:
            outcome.append(False)
        else:
            outcome.append(True)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            while reservations.waiting == 0:
                await checkpoint()
            assert outcome == []
            if end == "settle":
                reservations.settle("a", request(80), 10)
            elif end == "close":
                reservations.close("a")
            else:
                reservations.hold("a")

    assert (outcome, reservations.waiting) == ([is_reserved], 0)


async def test_all_who_wait_are_heard() -> None:
    """One chunk's end may be enough for several; who still does not fit goes on waiting, and then is told."""
    budget = Budget(100)
    reservations = BatchReservations(budget, Bounds())
    filled(reservations, "a", 90)
    filled(reservations, "b", 10)
    outcomes: dict[int, bool] = {}

    async def wait(worst: int) -> None:
        try:
            with reservations.counted_as_waiting():
                reservations.assign("c", await reservations.reserve(request(worst)))
            outcomes[worst] = True
        except BudgetReachedError:
            outcomes[worst] = False

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for worst in (40, 50, 101):
                tasks.start_soon(wait, worst)
            while reservations.waiting < 3:
                await checkpoint()
            reservations.close("a")
            while reservations.waiting > 1:
                await checkpoint()
            assert outcomes == {40: True, 50: True}
            reservations.close("b")
            reservations.close("c")

    assert (outcomes, reservations.waiting, left(budget)) == ({40: True, 50: True, 101: False}, 0, 100)


async def test_who_is_cancelled_waits_no_more() -> None:
    """A wait that is cut short sets nothing aside and is not counted."""
    budget = Budget(100)
    reservations = BatchReservations(budget, Bounds())
    filled(reservations, "a", 100)

    with anyio.move_on_after(0.01), reservations.counted_as_waiting():
        await reservations.reserve(request(50))

    assert reservations.waiting == 0
    reservations.close("a")
    assert left(budget) == 100
