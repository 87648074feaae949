"""A leaky bucket whose level can be read and corrected, and the permits taken from buckets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aiolimiter import AsyncLimiter

REQUESTS = "requests"
TokenCost = Mapping[str, float]
"""What one call takes out of the allowances, by kind: `requests`, `input_tokens`, `output_tokens`, `tokens`."""


class Bucket(AsyncLimiter):
    """aiolimiter's leaky bucket, with a level that can be looked at and put right.

    `level` is what is used up and has not leaked out yet, `max_rate` what it holds.
    """

    @property
    def level(self) -> float:
        self._leak()
        return self._level

    @level.setter
    def level(self, value: float) -> None:
        self._leak()
        self._level = max(0.0, value)
        self._wake_next()

    @property
    def rate(self) -> float:
        """What leaks out, per second."""
        return self._rate_per_sec

    def take_nowait(self, amount: float) -> None:
        """Take an amount that is known to be there."""
        self._level += amount

    def retune(self, max_rate: float, time_period: float) -> None:
        """Change size and rate, also while somebody waits; what was free stays free, as far as there is room."""
        free = self.max_rate - self.level
        self.max_rate = max_rate
        self.time_period = time_period
        self._rate_per_sec = max_rate / time_period
        self.level = max_rate - min(free, max_rate)


@dataclass(slots=True, kw_only=True)
class Permit:
    """Lets one call through, and is handed back with what became of it; `cost` is what was really taken.

    Not frozen: that would cost 1 µs a call.
    """

    cost: TokenCost
    sent_at: float
    number: int
