"""Budget: what may still be spent. The worst case of each call is reserved before it is made, its real cost settled
after, so whatever is in flight, the cap holds.

A call that does not fit waits until others are settled for less than they had reserved; when nothing is reserved any
more and it still does not fit, the money is spent. A call whose outcome is unknown keeps its reserve: it may be billed.
"""

from __future__ import annotations

import anyio

from pipeline import money
from pipeline.errors import BudgetReachedError


class Budget:
    """A cap in nano-dollars (1e-9 USD)."""

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.spent = 0
        self._reserved = 0
        self._settled = anyio.Event()

    def __repr__(self) -> str:
        return f"<Budget: {self.spent:,} spent and {self._reserved:,} reserved of {self.cap:,} nano-dollars>"

    async def reserve(self, amount: int) -> None:
        """Set an amount aside, as soon as it fits; raises `BudgetReachedError` when it never will."""
        while not self.try_reserve(amount):
            if not self._reserved:
                raise BudgetReachedError(
                    f"the budget is reached: {money.text(self.spent)} of {money.text(self.cap)} are spent, and the "
                    f"next call may cost {money.text(amount)}; raise --max-cost, or budget in the configuration"
                )
            await self._settled.wait()

    def try_reserve(self, amount: int) -> bool:
        """Set an amount aside if it fits now; return whether it does."""
        fits = self.spent + self._reserved + amount <= self.cap
        self._reserved += amount if fits else 0
        return fits

    def take(self, amount: int) -> None:
        """Set aside what is bought already, whether it fits or not."""
        self._reserved += amount

    def settle(self, reserved: int, spent: int) -> None:
        """Give back what was set aside for a call, and take what it cost."""
        self._reserved -= reserved
        self.spent += spent
        self._settled.set()
        self._settled = anyio.Event()
