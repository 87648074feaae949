"""What is set aside of the budget for requests in chunks: reserved one by one, settled one by one, chunk by chunk.

Without a budget all of this does nothing. What a chunk still has set aside when nobody waits for its batch any more is
held: it may be spent, and a later run will know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable

from pipeline.accounting.budget import Budget
from pipeline.accounting.pricing import Pricing
from pipeline.core.errors import UsageError
from pipeline.core.types import Request


class BatchReservations:
    """The reserves of a run's chunks, by local id; amounts are the worst case of each request, in nano-dollars."""

    def __init__(self, budget: Budget | None, pricing: Pricing) -> None:
        self._budget = budget
        self._pricing = pricing
        self._open: dict[str, int] = defaultdict(int)
        self.waiting = 0

    def try_reserve(self, request: Request) -> int | None:
        """Set the worst case of a request aside if it fits now; return it. Raises `UsageError` for an unknown price."""
        if self._budget is None:
            return 0
        amount = self._pricing.worst_case(request)
        return amount if self._budget.try_reserve(amount) else None

    async def reserve(self, request: Request, submit: Callable[[], Awaitable[None]]) -> int:
        """Set it aside as soon as it fits; raises `BudgetReachedError` when it never will.

        Only what is on its way gives something back, so `ship` sends all on its way; who loads more meanwhile sees
        `waiting` and does the same.
        """
        assert self._budget is not None
        amount = self._pricing.worst_case(request)
        self.waiting += 1
        try:
            await submit()
            await self._budget.reserve(amount)
        finally:
            self.waiting -= 1
        return amount

    def assign(self, local_id: str, amount: int) -> None:
        """Put an amount that was set aside under a chunk."""
        if self._budget:
            self._open[local_id] += amount

    def take_over(self, local_id: str, requests: Iterable[Request]) -> None:
        """Set aside what an earlier run sent, whether it fits or not; a price that nobody knows counts as nothing."""
        if self._budget is None:
            return
        amount = sum(self._worst(request) for request in requests)
        self._budget.take(amount)
        self._open[local_id] += amount

    def settle(self, local_id: str, request: Request, spent: int | None) -> None:
        """Take what a request cost in the end; None: nobody knows, so all that was set aside."""
        if self._budget is None:
            return
        amount = min(self._open[local_id], self._worst(request))
        self._open[local_id] -= amount
        self._budget.settle(amount, amount if spent is None else spent)

    def close(self, local_id: str) -> None:
        """Give back what is left of a chunk that has come to its end."""
        if self._budget:
            self._budget.settle(self._open.pop(local_id, 0), 0)

    def hold(self, local_id: str) -> None:
        """Keep what is left of a chunk whose batch goes on without us."""
        if self._budget:
            self._budget.hold(self._open.pop(local_id, 0))

    def _worst(self, request: Request) -> int:
        try:
            return self._pricing.worst_case(request)
        except UsageError:
            return 0
