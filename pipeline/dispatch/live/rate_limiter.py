"""The rate limiter of one model: how fast it may be called, and when not at all.

There is one per (provider, model). Callers acquire a permit one at a time and in turn: a sender keeps one task at each
rate limiter, and senders that share one take turns. So aiolimiter's queue, which lets small amounts overtake large
ones, never has two to choose from, and a large request does not starve.

Three kinds of limits are kept apart:

- The user's caps are kept as they are, one second's worth at a time.
- Limits that the provider reports in its headers are mirrored: a bucket of the same capacity, with the level that it
  reports. The limit is used to the last request, and hardly a request is refused.
- Where the provider reports nothing, its request rate is inferred from 429 responses (`rate_estimator`).

Where several processes share an account, caps and reported limits are cut to this process's share. A cooldown holds
back every call until a moment on the clock. It is checked last, after everything that may take time, so calls that
queued before it began are held back too.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from pipeline.core.config import Limits
from pipeline.core.types import Allowance, Limit
from pipeline.dispatch.live.rate_estimator import RateEstimator
from pipeline.dispatch.live.token_bucket import REQUESTS, Bucket, Permit, TokenCost

_COOLDOWN = "cooldown"

_ROUNDING = {REQUESTS: 0.0}
_TOKEN_ROUNDING = 500.0  # Anthropic rounds remaining tokens to thousands, so they may be off by half of that
_LOOK_AGAIN_SECONDS = 5.0  # a limit may shrink below the amount that a task waits for, so it looks again


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """A snapshot: the rest of the cooldown in seconds (0 without one), and what the next call waits for."""

    cooldown_s: float
    waiting_for: str | None
    allowances: Sequence[Allowance]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a process needs of a shared limit.

    `used` is the share that it used since the last report, `share` the one that it may use now (0 to 1). `is_waiting`:
    a call waits for the limit. `cooldown_until` is on the event loop's clock, 0 if there is no cooldown.
    """

    used: float
    is_waiting: bool
    cooldown_until: float
    share: float = 1.0


class RateLimiter:
    """The caps, the reported and inferred limits, and the cooldown of one model.

    Mutable state: calls that acquire and hand back permits change the buckets; headers change the reported ones.
    """

    def __init__(self, caps: Limits) -> None:
        self._caps = {
            kind: _cap(limit)
            for kind, limit in (
                (REQUESTS, caps.rpm),
                ("input_tokens", caps.input_tpm),
                ("output_tokens", caps.output_tpm),
            )
            if limit
        }
        self._reported: dict[str, Bucket] = {}
        self._inferred = RateEstimator()
        self._in_flight: dict[str, float] = {}
        self._share = 1.0
        self._taken_since: dict[str, float] = {}
        self._counted_at: float | None = None
        self._cooldown_until = -math.inf
        self._waiting_for: str | None = None
        self._turn = asyncio.Lock()
        self._now = asyncio.get_running_loop().time  # what anyio.current_time() looks up at every call

    @property
    def is_limited(self) -> bool:
        """Return True if a call takes from a cap or a reported limit; otherwise its cost need not be computed."""
        return bool(self._reported or self._caps)

    # ── permits ───────────────────────────────────────────────────────────────────────────────────────────────────

    def try_acquire(self, cost: TokenCost) -> Permit | None:
        """Return a permit if a call may be made now; None if it would have to wait."""
        if not self.is_limited and self._inferred.bucket is None:
            return self._permit(cost) if self.is_open() else None
        taken = self._taken(cost)
        if (
            self._turn.locked()
            or not self.is_open()
            or not all(bucket.has_capacity(amount) for bucket, amount, _ in taken)
        ):
            return None
        for bucket, amount, _ in taken:
            bucket.take_nowait(amount)
        return self._permit(cost)

    async def acquire(self, cost: TokenCost) -> Permit:
        """Wait for a permit, after all callers before this one. A cost larger than a bucket is taken in parts."""
        async with self._turn:
            return await self._take(cost)

    async def _take(self, cost: TokenCost) -> Permit:
        for bucket, amount, name in self._taken(cost):
            left = amount
            while left > 1e-9:
                step = min(left, bucket.max_rate)
                self._waiting_for = None if bucket.has_capacity(step) else f"limit of {name} per minute"
                with anyio.move_on_after(_LOOK_AGAIN_SECONDS) as wait:
                    await bucket.acquire(step)
                if not wait.cancelled_caught:
                    left -= step
        self._waiting_for = None
        return self._permit(cost)

    def is_open(self) -> bool:
        """Return True if there is no cooldown."""
        return self._cooldown_until == -math.inf or self._now() >= self._cooldown_until

    async def wait_cooldown(self) -> None:
        """Wait until the cooldown is over, including any extension meanwhile."""
        while not self.is_open():
            self._waiting_for = _COOLDOWN
            await anyio.sleep(self._cooldown_until - self._now())
        self._waiting_for = None

    def never_fits(self, cost: TokenCost) -> str | None:
        """Return why a call can never be made: its least cost exceeds a minute's limit. None if it can."""
        for kind, amount in cost.items():
            needs = f"needs about {amount:,.0f} {_words(kind)}"
            reported = self._reported.get(kind)
            if reported:
                most = reported.max_rate / self._share
                if amount > most:
                    return f"{needs}, and {most:,.0f} per minute are allowed"
            cap = self._caps.get(kind)
            if cap:
                most = cap.rate * 60 / self._share
                if amount > most:
                    return f"{needs}, and your cap is {most:,.0f} per minute"
        return None

    # ── responses ──────────────────────────────────────────────────────────────────────────────────────────────────

    def reconcile(self, permit: Permit, used: TokenCost | None) -> None:
        """Correct what a call took to what it used.

        `used` is what the provider reported, {} if it reported nothing (the estimate stands), None if it did no work:
        then only the request itself counts.
        """
        for kind, amount in permit.cost.items():
            self._in_flight[kind] = max(0.0, self._in_flight[kind] - amount)
            difference = 0.0
            if used is not None:
                difference = used.get(kind, amount) - amount
            elif kind != REQUESTS:
                difference = -amount
            for buckets in (self._caps, self._reported):
                if difference and kind in buckets:
                    buckets[kind].level += difference

    def update_from_headers(self, limits: Sequence[Limit]) -> None:
        """Mirror the limits that a provider reports.

        The true level lies between the reported one and that plus everything in flight, because it is unknown which
        of the calls in flight the provider has counted already.
        """
        for limit in limits:
            bucket = self._reported.get(limit.kind)
            per_minute = limit.per_minute * self._share
            used = per_minute - limit.remaining * self._share
            if bucket is None:
                bucket = self._reported[limit.kind] = Bucket(per_minute, 60)
                bucket.level = used + self._in_flight.get(limit.kind, 0.0)
            elif bucket.max_rate != per_minute:
                bucket.retune(per_minute, 60)
            slack = _ROUNDING.get(limit.kind, _TOKEN_ROUNDING)
            in_flight = self._in_flight.get(limit.kind, 0.0)
            level = bucket.level
            if not used - slack <= level <= used + in_flight + slack:
                bucket.level = min(max(level, used), used + in_flight)

    def on_rate_limited(self, permit: Permit, seconds: float | None) -> float | None:
        """Start a cooldown after a 429; return its seconds.

        `seconds` is how long the provider asks to wait, None if it does not say. Then the cooldown is the time for one
        call to refill; if that is unknown too, there is no cooldown and the result is None.
        """
        if not self._is_reported_empty():
            pause = self._inferred.on_rate_limited(permit)
            seconds = pause if seconds is None else seconds
        if seconds is not None and math.isfinite(seconds):
            self.start_cooldown(seconds)
        return seconds

    def on_success(self) -> None:
        """Probe an inferred rate upwards after a successful call."""
        self._inferred.on_success()

    def start_cooldown(self, seconds: float) -> None:
        """Hold back all calls for some seconds; a cooldown that ends later stays."""
        self._cooldown_until = max(self._cooldown_until, self._now() + seconds)

    # ── sharing ───────────────────────────────────────────────────────────────────────────────────────────────────

    def demand(self) -> Demand:
        """Return what this process used of the limits since the last report, and whether it needs more."""
        now = self._now()
        seconds = now - self._counted_at if self._counted_at is not None else 0.0
        used = 0.0
        if seconds > 0:
            for kind, bucket in (*self._caps.items(), *self._reported.items()):
                used = max(used, self._taken_since.get(kind, 0.0) / seconds / bucket.rate * self._share)
        self._counted_at = now
        self._taken_since.clear()
        is_waiting = self._waiting_for is not None and self._waiting_for != _COOLDOWN
        return Demand(
            used=min(1.0, used), is_waiting=is_waiting, cooldown_until=max(0.0, self._cooldown_until), share=self._share
        )

    def take_share(self, share: float, cooldown_until: float) -> None:
        """Cut caps and reported limits to a share, keeping how full they are; adopt the cooldown of other processes."""
        self._cooldown_until = max(self._cooldown_until, cooldown_until)
        if share == self._share:
            return
        factor, self._share = share / self._share, share
        for bucket in (*self._caps.values(), *self._reported.values()):
            full = bucket.level / bucket.max_rate
            size = max(1.0, bucket.max_rate * factor) if bucket in self._caps.values() else bucket.max_rate * factor
            bucket.retune(size, size / (bucket.rate * factor))
            bucket.level = full * size

    @property
    def share(self) -> float:
        """The share of the limits that this process may use."""
        return self._share

    def statistics(self) -> Statistics:
        cooldown = max(0.0, self._cooldown_until - self._now())
        allowances = [_allowance(kind, cap, "cap") for kind, cap in self._caps.items()]
        allowances += [_allowance(kind, bucket, "told") for kind, bucket in self._reported.items()]
        if self._inferred.bucket:
            allowances.append(_allowance(REQUESTS, self._inferred.bucket, "found"))
        return Statistics(cooldown_s=cooldown, waiting_for=self._waiting_for, allowances=allowances)

    def _taken(self, cost: TokenCost) -> list[tuple[Bucket, float, str]]:
        """Return the buckets that a call takes from, with the amount and the words for its kind."""
        taken: list[tuple[Bucket, float, str]] = []
        for buckets in (self._caps, self._reported):
            for kind, bucket in buckets.items():
                if kind in cost:
                    taken.append((bucket, cost[kind], _words(kind)))
        if self._inferred.bucket:
            taken.append((self._inferred.bucket, 1.0, _words(REQUESTS)))
        return taken

    def free_permit(self) -> Permit:
        """Return a permit that takes nothing."""
        now = self._now()
        return Permit(cost={}, sent_at=now, number=self._inferred.on_sent(now))

    def _permit(self, cost: TokenCost) -> Permit:
        reserved = {kind: cost[kind] for kind in (*self._reported, *self._caps) if kind in cost}
        for kind, amount in reserved.items():
            self._in_flight[kind] = self._in_flight.get(kind, 0.0) + amount
            self._taken_since[kind] = self._taken_since.get(kind, 0.0) + amount
        now = self._now()
        return Permit(cost=reserved, sent_at=now, number=self._inferred.on_sent(now))

    def _is_reported_empty(self) -> bool:
        """Return True if a reported limit explains a 429; then only its mirror was off, and no rate is inferred."""
        return any(bucket.level >= 0.9 * bucket.max_rate for bucket in self._reported.values())


def _cap(per_minute: int) -> Bucket:
    """Return a bucket that holds one second's worth, or one unit if that is more.

    A bucket of a whole minute would let twice the limit through in the first minute.
    """
    per_second = per_minute / 60
    capacity = max(1.0, per_second)
    return Bucket(capacity, capacity / per_second)


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _allowance(kind: str, bucket: Bucket, source: str) -> Allowance:
    used = min(1.0, bucket.level / bucket.max_rate)
    return Allowance(kind=kind, per_minute=bucket.rate * 60, used=used, source=source)
