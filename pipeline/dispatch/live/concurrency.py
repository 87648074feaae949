"""How many calls of a model may be in flight: additive increase, multiplicative decrease."""

from __future__ import annotations

import math

import anyio

FIRST_WAVE = 2
_SECOND_WAVE = 8
_CUT = 0.7
_LONGEST_PAUSE = 10.0


class ConcurrencyLimit:
    """How many calls of a model may be in flight.

    Slow start: a first wave of two finds out a wrong key or model, then each round of answers doubles. An overload
    (503, 529, a lost connection, a timeout) cuts to 70 % once, remembers that as the ceiling, and above the ceiling
    grows by one a round. Overloads without an answer between them lead to ever longer pauses with one call each, so an
    outage costs next to nothing; the first answer after it opens half of the ceiling at once.
    """

    def __init__(self, maximum: int) -> None:
        self.size = float(min(FIRST_WAVE, maximum))
        self._maximum = maximum
        self._ceiling = float(maximum)
        self._cut_at = -math.inf
        self._failures = 0
        self._has_answers = False

    def on_success(self) -> None:
        """Note an answer."""
        if self._failures or not self._has_answers:
            self.size = max(self.size, self._ceiling / 2 if self._has_answers else _SECOND_WAVE)
        self._has_answers = True
        self._failures = 0
        self.size += 1 if self.size < self._ceiling else 1 / self.size
        self.size = min(self.size, self._maximum)

    def on_overload(self, sent_at: float) -> float:
        """Note an overload that met a call sent at some time; return how many seconds nobody should call at all."""
        if sent_at <= self._cut_at:
            return 0.0
        self._cut_at = anyio.current_time()
        self._failures += 1
        if self._failures == 1:
            self._ceiling = max(1.0, _CUT * self.size)
            self.size = self._ceiling
            return 0.0
        self.size = 1.0
        return min(_LONGEST_PAUSE, 0.25 * 2.0 ** min(10, self._failures))
