"""Budget reservations of batches: reserved and settled request by request, closed batch by batch.

Without a budget all of this does nothing. When this run no longer waits for a batch, what it still has reserved is
held: it may be spent, and a later run settles it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pipeline.accounting.budget import Budget
from pipeline.accounting.pricing import Pricing
from pipeline.core.errors import UsageError
from pipeline.core.types import Request


class BatchReservations:
    """The reservations of a run's batches, by local id. Amounts are nano-dollars, the worst case of each request.

    `waiting` counts tasks that wait for money.
    """

    def __init__(self, budget: Budget | None, pricing: Pricing) -> None:
        self._budget = budget
        self._pricing = pricing
        self._open: dict[str, int] = defaultdict(int)
        self.waiting = 0

    def try_reserve(self, request: Request) -> int | None:
        """Reserve the worst case of a request if it fits now; return the amount, None if it does not fit.

        Raises `UsageError` if the price is unknown.
        """
        if self._budget is None:
            return 0
        amount = self._pricing.worst_case(request)
        return amount if self._budget.try_reserve(amount) else None

    async def reserve(self, request: Request) -> int:
        """Reserve the worst case of a request as soon as it fits. Raises `BudgetReachedError` if it never will."""
        assert self._budget is not None
        amount = self._pricing.worst_case(request)
        await self._budget.reserve(amount)
        return amount

    @contextmanager
    def counted_as_waiting(self) -> Iterator[None]:
        """Count the caller among those that wait for money."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def assign(self, local_id: str, amount: int) -> None:
        """Assign a reserved amount to a batch."""
        if self._budget:
            self._open[local_id] += amount

    def take_over(self, local_id: str, requests: Iterable[Request]) -> None:
        """Reserve what an earlier run submitted, even if it does not fit. An unknown price counts as 0."""
        if self._budget is None:
            return
        amount = sum(self._worst(request) for request in requests)
        self._budget.take(amount)
        self._open[local_id] += amount

    def settle(self, local_id: str, request: Request, spent: int | None) -> None:
        """Settle a request that has ended. `spent` None: the cost is unknown, so all of its reservation counts."""
        if self._budget is None:
            return
        amount = min(self._open[local_id], self._worst(request))
        self._open[local_id] -= amount
        self._budget.settle(amount, amount if spent is None else spent)

    def close(self, local_id: str) -> None:
        """Release what is left of a batch that is done."""
        if self._budget:
            self._budget.settle(self._open.pop(local_id, 0), 0)

    def hold(self, local_id: str) -> None:
        """Hold what is left of a batch that goes on after this run."""
        if self._budget:
            self._budget.hold(self._open.pop(local_id, 0))

    def _worst(self, request: Request) -> int:
        try:
            return self._pricing.worst_case(request)
        except UsageError:
            return 0
