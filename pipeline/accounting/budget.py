"""Budget: what may still be spent. The worst case of each call is reserved before it is made, its real cost settled
after, so whatever is in flight, the cap holds.

A call that does not fit waits until others are settled for less than they had reserved; when nothing is reserved any
more and it still does not fit, the money is spent. A call whose outcome is unknown keeps its reserve: it may be billed.
So does what is in a batch that nobody waits for any more: it is `held`.
"""

from __future__ import annotations

import anyio

from pipeline.core import money
from pipeline.core.config import Config
from pipeline.core.errors import BudgetReachedError


class Budget:
    """A cap in nano-dollars (1e-9 USD); where it is not final more may be granted, and `awaited` is for what."""

    def __init__(self, cap: int, *, is_final: bool = True) -> None:
        self.cap = cap
        self.is_final = is_final
        self.awaited = 0
        self.spent = 0
        self.held = 0
        self._reserved = 0
        self._settled = anyio.Event()

    def __repr__(self) -> str:
        return f"<Budget: {self.used:,} spent or held and {self._reserved:,} reserved of {self.cap:,} nano-dollars>"

    @property
    def used(self) -> int:
        """What is spent, and what is held for batches that a later run collects."""
        return self.spent + self.held

    async def reserve(self, amount: int) -> None:
        """Set an amount aside, as soon as it fits; raises `BudgetReachedError` when it never will."""
        while not self.try_reserve(amount):
            self.awaited = amount
            if not self._reserved and self.is_final:
                raise self.reached(amount)
            await self._settled.wait()
            self.awaited = 0

    def reached(self, amount: int) -> BudgetReachedError:
        """Return the error that says that this amount is not there any more."""
        return BudgetReachedError(
            f"the budget is reached: {money.text(self.used)} of {money.text(self.cap)} are spent or held for batches, "
            f"and the next call may cost {money.text(amount)}; raise --max-cost, or budget in the configuration",
            amount=amount,
        )

    @property
    def room(self) -> int:
        """What is neither used nor set aside."""
        return self.cap - self.used - self._reserved

    def grant(self, amount: int | None) -> None:
        """Raise the cap; None: no more will be granted."""
        self.cap += amount or 0
        self.is_final = amount is None
        self._announce()

    def try_reserve(self, amount: int) -> bool:
        """Set an amount aside if it fits now; return whether it does."""
        fits = amount <= self.room
        self._reserved += amount if fits else 0
        return fits

    def take(self, amount: int) -> None:
        """Set aside what is bought already, whether it fits or not."""
        self._reserved += amount

    def hold(self, reserved: int) -> None:
        """Keep what was set aside, though nobody will settle it in this run."""
        self.held += reserved
        self.settle(reserved, 0)

    def settle(self, reserved: int, spent: int) -> None:
        """Give back what was set aside for a call, and take what it cost."""
        self._reserved -= reserved
        self.spent += spent
        self._announce()

    def _announce(self) -> None:
        self._settled.set()
        self._settled = anyio.Event()


def budget_of(settings: Config, *, spent_today: int = 0, spent_this_month: int = 0) -> Budget | None:
    """Make the budget of a run, in nano-dollars: the tightest of the caps, less what other runs spent; None if none."""
    caps = settings.budget
    rooms = [
        int(cap * money.NANO) - spent
        for cap, spent in ((caps.per_run, 0), (caps.per_day, spent_today), (caps.per_month, spent_this_month))
        if cap is not None
    ]
    return Budget(max(0, min(rooms))) if rooms else None
