"""A budget whose cap is raised while the run goes on."""

from __future__ import annotations

import anyio
import pytest

from pipeline.accounting.budget import Budget
from pipeline.core.errors import BudgetReachedError


async def test_who_waits_goes_on_with_what_is_granted() -> None:
    """A cap that is not final keeps nobody from waiting, and says for how much."""
    budget = Budget(10, is_final=False)
    passed: list[int] = []

    async def reserve() -> None:
        await budget.reserve(25)
        passed.append(25)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reserve)
        await anyio.wait_all_tasks_blocked()
        assert (passed, budget.awaited) == ([], 25)
        budget.grant(5)
        await anyio.wait_all_tasks_blocked()
        assert passed == []
        budget.grant(10)

    assert (passed, budget.awaited, budget.room) == ([25], 0, 0)


async def test_when_no_more_is_granted_the_money_is_spent() -> None:
    """What is in flight is waited for first: it may give something back."""
    budget = Budget(10, is_final=False)
    budget.take(8)
    outcomes: list[str] = []

    async def reserve(amount: int) -> None:
        try:
            await budget.reserve(amount)
            outcomes.append("passed")
        except BudgetReachedError as exc:
            outcomes.append(exc.message)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reserve, 6)
        tasks.start_soon(reserve, 11)
        budget.grant(None)
        await anyio.wait_all_tasks_blocked()
        assert outcomes == []
        budget.settle(8, 2)
        await anyio.wait_all_tasks_blocked()
        assert outcomes == ["passed"]
        budget.settle(6, 6)

    assert outcomes[1].startswith("the budget is reached")


async def test_a_final_cap_ends_it_at_once() -> None:
    """As ever, without anybody to grant more."""
    with pytest.raises(BudgetReachedError):
        await Budget(10).reserve(11)
