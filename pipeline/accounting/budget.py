"""The budget of a run. Each call reserves its worst-case cost before it is sent and settles its real cost afterwards.

Calls in flight are covered by their reservations, so the cap holds at every moment. A call that does not fit waits
until other calls settle for less than they reserved. If nothing is reserved and the call still does not fit, the budget
is reached. A call with an unknown outcome keeps its reservation, because it may be billed. So does a batch that this
run no longer waits for: its amount is `held`.
"""

from __future__ import annotations

import anyio

from pipeline.core import money
from pipeline.core.config import Config
from pipeline.core.errors import BudgetReachedError


class Budget:
    """A spending cap. All amounts are nano-dollars (1e-9 USD).

    A cap that is not final may be raised by `grant`; `awaited` is then the amount that a waiting call needs.
    """

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
        """The amount spent, plus the amount held for batches that a later run collects."""
        return self.spent + self.held

    async def reserve(self, amount: int) -> None:
        """Reserve an amount as soon as it fits. Raise `BudgetReachedError` if it can never fit."""
        while not self.try_reserve(amount):
            self.awaited = amount
            if not self._reserved and self.is_final:
                raise self.reached(amount)
            await self._settled.wait()
            self.awaited = 0

    def reached(self, amount: int) -> BudgetReachedError:
        """Return the error for a call whose worst case is more than the rest of the budget."""
        return BudgetReachedError(
            f"the budget is reached: {money.text(self.used)} of {money.text(self.cap)} is spent or held for batches, "
            f"and the next call may cost {money.text(amount)}; raise --max-cost, or budget in the configuration",
            amount=amount,
        )

    @property
    def room(self) -> int:
        """The amount that is neither used nor reserved."""
        return self.cap - self.used - self._reserved

    def grant(self, amount: int | None) -> None:
        """Raise the cap by an amount. None makes the cap final."""
        if amount is None:
            self.is_final = True
        else:
            self.is_final = False
            self.cap += amount
        self._announce()

    def try_reserve(self, amount: int) -> bool:
        """Reserve an amount if it fits now. Return True if it did."""
        if amount > self.room:
            return False
        self._reserved += amount
        return True

    def take(self, amount: int) -> None:
        """Reserve an amount that is already committed, even if it does not fit."""
        self._reserved += amount

    def hold(self, reserved: int) -> None:
        """Turn a reservation that this run will not settle into a held amount."""
        self.held += reserved
        self.settle(reserved, 0)

    def settle(self, reserved: int, spent: int) -> None:
        """Release a call's reservation and add what the call cost."""
        self._reserved -= reserved
        self.spent += spent
        self._announce()

    def _announce(self) -> None:
        self._settled.set()
        self._settled = anyio.Event()


def budget_of(settings: Config, *, spent_today: int = 0, spent_this_month: int = 0) -> Budget | None:
    """Return the budget of a run: the tightest cap, less what other runs have spent. None if no cap is set.

    `spent_today` and `spent_this_month` are nano-dollars; the caps in the settings are dollars.
    """
    caps = settings.budget
    capped = ((caps.per_run, 0), (caps.per_day, spent_today), (caps.per_month, spent_this_month))
    rooms = [int(cap * money.NANO) - spent for cap, spent in capped if cap is not None]
    if not rooms:
        return None
    # Other runs may have spent more than a cap that was lowered since.
    return Budget(max(0, min(rooms)))
