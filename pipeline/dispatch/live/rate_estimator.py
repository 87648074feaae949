"""The rate limit of a provider that reports none, inferred from its 429 responses."""

from __future__ import annotations

import asyncio
import math

from pipeline.dispatch.live.token_bucket import Bucket, Permit

_PACE_SECONDS = 5.0  # after a pause, this many seconds' worth of calls may be caught up
_LOWEST_RATE = 0.2  # per second: whatever is refused, try again every few seconds
_TRUSTED_CALLS = 20.0  # a rate measured over fewer calls is probed upwards sooner
_FASTEST_GROWTH = 0.05  # per second
_SHORTEST_PAUSE = 0.25
_LONGEST_PAUSE = 10.0
_LONGEST_QUIET = 5.0
_MOST_DOUBLINGS = 10
_CALLS_PER_PROBE = 100.0  # a measured rate is probed upwards about once in so many calls


class RateEstimator:
    """Infers the refill rate of a provider's bucket from its 429 responses.

    A 429 means that the bucket was empty. The number of calls that passed between two 429s, divided by the time, is
    the refill rate. Calls are numbered as they are sent, so those between two 429s can be counted before their answers
    arrive. 429s of calls sent before the last cut belong to the same event.

    `bucket` is None until the first 429. Only the two callbacks below change it.
    """

    def __init__(self) -> None:
        self._now = asyncio.get_running_loop().time
        self.bucket: Bucket | None = None
        self._count = 0
        self._refused = 0
        self._empty_at: float | None = None
        self._empty_number = 0
        self._started_at: float | None = None
        self._cut_at = -math.inf
        self._grown_at = 0.0
        self._fruitless = 0
        self._is_guess = True
        self._trust = 1.0

    def on_sent(self, now: float) -> int:
        """Count a call that is sent; return its number."""
        if self._started_at is None:
            self._started_at = now
        self._count += 1
        return self._count

    def on_rate_limited(self, permit: Permit) -> float:
        """Update the rate after a 429: the provider's bucket was empty when this call arrived.

        Return the seconds to wait if the provider names none: the time for one call to refill, doubled each time that
        no call passed since the last 429, because then the bucket is in debt.
        """
        self._refused += 1
        if permit.sent_at > self._cut_at:
            passed = permit.number - self._empty_number - self._refused
            if passed < 1 and self.bucket:
                self._fruitless += 1
            else:
                self._fruitless = 0
            if not self._fruitless:
                self._set_rate(self._measure_rate(permit, passed))
            assert self.bucket is not None
            self.bucket.level = self.bucket.max_rate
            self._cut_at = self._grown_at = self._now()
            self._empty_number, self._refused = permit.number, 0
            if not self._fruitless:
                self._empty_at = permit.sent_at
        assert self.bucket is not None
        return min(
            _LONGEST_PAUSE, max(_SHORTEST_PAUSE, 2.0 ** min(_MOST_DOUBLINGS, self._fruitless) / self.bucket.rate)
        )

    def on_success(self) -> None:
        """Raise the rate a little: more slowly the rarer 429s should be, faster when there were none for long."""
        if self.bucket is None or self.bucket.level < self.bucket.max_rate / 2:
            return  # no limit is known, or it does not bind: raising it would show nothing
        now = self._now()
        rate = self.bucket.rate
        cycle = _CALLS_PER_PROBE / rate
        quiet = min(_LONGEST_QUIET, (now - self._cut_at) / cycle)
        growth = min(0.005, 2 * rate / _CALLS_PER_PROBE**2) * (1 + quiet**3) / self._trust**2
        self._set_rate(rate * (1 + min(_FASTEST_GROWTH, growth) * min(1.0, now - self._grown_at)))
        self._grown_at = now

    def _measure_rate(self, permit: Permit, passed: int) -> float:
        """Return the rate that a 429 shows: calls that passed since the bucket was last empty, divided by the time."""
        assert self._started_at is not None
        if self.bucket is None or self._empty_at is None:
            return max(_LOWEST_RATE, 0.5 * passed / max(permit.sent_at - self._started_at, 0.1))
        measured = passed / max(permit.sent_at - self._empty_at, 1e-3)
        weight = 1.0 if self._is_guess else min(1.0, passed / 8)
        self._is_guess = False
        self._trust = min(1.0, max(0.05, passed / _TRUSTED_CALLS))
        return max(_LOWEST_RATE, 0.99 * (weight * measured + (1 - weight) * 0.8 * self.bucket.rate))

    def _set_rate(self, rate: float) -> None:
        # Until a second 429 the rate is a guess, so a pause must not save up calls.
        size = 1.0 if self._is_guess else max(1.0, rate * _PACE_SECONDS)
        if self.bucket is None:
            self.bucket = Bucket(size, size / rate)
        else:
            self.bucket.retune(size, size / rate)
