"""A concurrency limit for one model: slow start, additive increase, multiplicative decrease (AIMD)."""

from __future__ import annotations

import math

import anyio

FIRST_WAVE = 2
_SECOND_WAVE = 8
_CUT = 0.7
_LONGEST_PAUSE = 10.0


class ConcurrencyLimit:
    """How many calls of a model may be in flight.

    Slow start: a first wave of two calls finds a wrong key or model, then the limit doubles with each round of
    answers. An overload (503, 529, lost connection, timeout) cuts the limit to 70 % once and makes that the ceiling,
    above which the limit grows by one per round. Overloads with no answer between them lead to longer and longer
    pauses with a single call in flight, so an outage costs next to nothing. The first answer after it restores half of
    the ceiling at once.

    Mutable state: `size` is the current limit; only `on_success` and `on_overload` change it.
    """

    def __init__(self, maximum: int) -> None:
        self.size = float(min(FIRST_WAVE, maximum))
        self._maximum = maximum
        self._ceiling = float(maximum)
        self._cut_at = -math.inf
        self._failures = 0
        self._has_answers = False

    def on_success(self) -> None:
        """Grow the limit after a successful call."""
        if not self._has_answers:
            self.size = max(self.size, _SECOND_WAVE)
        elif self._failures:
            self.size = max(self.size, self._ceiling / 2)
        self._has_answers = True
        self._failures = 0
        self.size += 1 if self.size < self._ceiling else 1 / self.size
        self.size = min(self.size, self._maximum)

    def on_overload(self, sent_at: float) -> float:
        """Shrink the limit after an overload met a call sent at `sent_at`; return the model's cooldown in seconds."""
        if sent_at <= self._cut_at:
            return 0.0  # sent before the last cut: part of the same overload
        self._cut_at = anyio.current_time()
        self._failures += 1
        if self._failures == 1:
            self._ceiling = max(1.0, _CUT * self.size)
            self.size = self._ceiling
            return 0.0
        self.size = 1.0
        return min(_LONGEST_PAUSE, 0.25 * 2.0 ** min(10, self._failures))
