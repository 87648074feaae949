"""Gate: how fast one model may be called, and when not at all.

One gate stands before each (provider, model). Whoever wants to call passes it alone, in the order of asking: the
sender keeps one task at each gate, so aiolimiter's queue, which lets small amounts overtake large ones, never has two
to choose from, and a large request is not starved. A bucket holds a second's worth, so a minute's allowance is spread
and not burst. Requests larger than a bucket pass in steps.

A cooldown closes the gate for everybody until a moment on the clock; it is looked at last, after everything that may
take time, so nobody slips through who asked before it began.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import anyio
from aiolimiter import AsyncLimiter

from pipeline.config import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one call is expected to use: tokens in, and tokens out at most where the request says so."""

    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """A gate at a moment: seconds until its cooldown ends (0: open), and what it is waiting for, if anything."""

    cooldown_s: float
    waiting_for: str | None


class Gate:
    """Requests, input tokens and output tokens per minute, and a cooldown, for one model."""

    def __init__(self, caps: Limits) -> None:
        self._buckets = [
            (name, _bucket(limit), part)
            for name, limit, part in (
                ("requests", caps.rpm, lambda cost: 1),
                ("input tokens", caps.input_tpm, lambda cost: cost.input_tokens),
                ("output tokens", caps.output_tpm, lambda cost: cost.output_tokens),
            )
            if limit
        ]
        self._closed_until = -math.inf
        self._waiting_for: str | None = None

    def is_free(self) -> bool:
        """Tell whether a call may pass now, without asking any limit."""
        return not self._buckets and self.is_open()

    def is_open(self) -> bool:
        """Tell whether no cooldown is on."""
        return anyio.current_time() >= self._closed_until

    async def wait_turn(self, cost: Cost) -> None:
        """Take what a call costs out of every bucket; to be called by one task at a time."""
        for name, bucket, part in self._buckets:
            left = float(part(cost))
            while left > 0:
                step = min(left, bucket.max_rate)
                self._waiting_for = None if bucket.has_capacity(step) else f"limit of {name} per minute"
                await bucket.acquire(step)
                left -= step
        self._waiting_for = None

    async def wait_open(self) -> None:
        """Wait until the cooldown is over, also if it is prolonged meanwhile."""
        while (seconds := self._closed_until - anyio.current_time()) > 0:
            self._waiting_for = "cooldown"
            await anyio.sleep(seconds)
        self._waiting_for = None

    def close_for(self, seconds: float) -> None:
        """Close the gate for everybody; a cooldown that ends later stays."""
        self._closed_until = max(self._closed_until, anyio.current_time() + seconds)

    def statistics(self) -> Statistics:
        cooldown = max(0.0, self._closed_until - anyio.current_time())
        waiting = "rate limit" if cooldown and self._waiting_for else self._waiting_for
        return Statistics(cooldown_s=cooldown, waiting_for=waiting)


def _bucket(per_minute: int) -> AsyncLimiter:
    """Return a bucket of a second's worth, or of one unit where that is less.

    A bucket of a whole minute would let twice the limit through in its first minute.
    """
    per_second = per_minute / 60
    capacity = max(1.0, per_second)
    return AsyncLimiter(capacity, capacity / per_second)
