"""A leaky bucket whose level can be read and corrected, and the permits that calls take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aiolimiter import AsyncLimiter

REQUESTS = "requests"
TokenCost = Mapping[str, float]
"""What one call takes from the limits, by kind: `requests`, `input_tokens`, `output_tokens`, `tokens`."""


class Bucket(AsyncLimiter):
    """aiolimiter's leaky bucket, with a level that can be read and corrected.

    `level` is what is used and has not leaked out yet, `max_rate` the capacity.
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
        """The leak rate, per second."""
        return self._rate_per_sec

    def take_nowait(self, amount: float) -> None:
        """Take an amount that is known to fit."""
        self._level += amount

    def retune(self, max_rate: float, time_period: float) -> None:
        """Change capacity and rate, even while a task waits. What was free stays free, as far as there is room."""
        free = self.max_rate - self.level
        self.max_rate = max_rate
        self.time_period = time_period
        self._rate_per_sec = max_rate / time_period
        self.level = max_rate - min(free, max_rate)


@dataclass(slots=True, kw_only=True)
class Permit:
    """Permission for one call, handed back when its outcome is known; `cost` is what was taken from the buckets.

    `number` counts the model's calls. Not frozen: that would cost 1 µs per call.
    """

    cost: TokenCost
    sent_at: float
    number: int
