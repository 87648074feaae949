"""Gate: how fast one model may be called, and when not at all.

One gate stands before each (provider, model). Whoever wants to call passes it alone and in turn: a sender keeps one
task at each gate, and senders that share a gate take turns, so aiolimiter's queue, which lets small amounts overtake
large ones, never has two to choose from, and a large request is not starved.

What binds is told apart. The user's caps are kept as they are, a second's worth at a time. What the provider says in
its headers is mirrored: a bucket as large as its own, with the level that it reports, so the allowance is used to the
last request and hardly one is refused. Where nothing is said, the rate is found out: a refusal tells that the
provider's bucket is empty, and what passed between two refusals, divided by the time, is its refill rate; a little more
is tried now and then. Where several processes share an account, caps and told limits are cut to this one's share.
A cooldown closes the gate for everybody until a moment on the clock; it is looked at last, after
everything that may take time, so nobody slips through who asked before it began.
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

_ROUNDING = {REQUESTS: 0.0}  # Anthropic rounds remaining tokens to thousands, so they may be off by half of that
_TOKEN_ROUNDING = 500.0
_LOOK_AGAIN_SECONDS = 5.0  # while waiting: a limit may have shrunk below what is waited for


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """A gate at a moment: seconds until its cooldown ends (0: open), and what it is waiting for, if anything."""

    cooldown_s: float
    waiting_for: str | None
    allowances: Sequence[Allowance]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a process has of limits that are shared: the share that it uses, whether it waits, its cooldown's end.

    `share` is what it may use now.
    """

    used: float
    is_waiting: bool
    cooldown_until: float
    share: float = 1.0


class RateLimiter:
    """The caps, the told and found allowances, and the cooldown of one model."""

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
        """Tell whether there are limits that a call is charged to; without any it is charged nothing."""
        return bool(self._reported or self._caps)

    # ── passing ───────────────────────────────────────────────────────────────────────────────────────────────────

    def try_acquire(self, cost: TokenCost) -> Permit | None:
        """Let a call through if it may go now; None if it would have to wait."""
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
        """Take what a call is charged out of every bucket, when all who came before have.

        What is larger than a bucket is taken in parts.
        """
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
        """Tell whether no cooldown is on."""
        return self._cooldown_until == -math.inf or self._now() >= self._cooldown_until

    async def wait_cooldown(self) -> None:
        """Wait until the cooldown is over, also if it is prolonged meanwhile."""
        while (seconds := self._cooldown_until - self._now()) > 0:
            self._waiting_for = _COOLDOWN
            await anyio.sleep(seconds)
        self._waiting_for = None

    def never_fits(self, cost: TokenCost) -> str | None:
        """Say why a call can never pass, as the least it takes is more than a minute's allowance; None if it can."""
        for kind, amount in cost.items():
            if (reported := self._reported.get(kind)) and amount > (most := reported.max_rate / self._share):
                return f"needs about {amount:,.0f} {_words(kind)}, and {most:,.0f} per minute are allowed"
            if (cap := self._caps.get(kind)) and amount > (most := cap.rate * 60 / self._share):
                return f"needs about {amount:,.0f} {_words(kind)}, and your cap is {most:,.0f} per minute"
        return None

    # ── learning ──────────────────────────────────────────────────────────────────────────────────────────────────

    def reconcile(self, permit: Permit, used: TokenCost | None) -> None:
        """Put right what a call was charged: `used` is what the provider reported, None if it did nothing."""
        for kind, amount in permit.cost.items():
            self._in_flight[kind] = max(0.0, self._in_flight[kind] - amount)
        difference = {kind: amount - permit.cost[kind] for kind, amount in (used or {}).items() if kind in permit.cost}
        if used is None:
            difference = {kind: -amount for kind, amount in permit.cost.items() if kind != REQUESTS}
        for buckets in (self._caps, self._reported):
            for kind, amount in difference.items():
                if bucket := buckets.get(kind):
                    bucket.level += amount

    def update_from_headers(self, limits: Sequence[Limit]) -> None:
        """Mirror what a provider says of its buckets.

        The truth lies between what it reports and that with everything in flight on top, as nobody knows which calls
        in flight it has counted already.
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
        """Note that a call was refused for want of allowance, and close the gate for a while.

        `seconds` is how long the provider asks to wait. Returns how long to wait: that, else the time in which one
        call's worth comes back, None where that is not known.
        """
        if not self._is_reported_empty():
            pause = self._inferred.on_rate_limited(permit)
            seconds = pause if seconds is None else seconds
        if seconds is not None and math.isfinite(seconds):
            self.start_cooldown(seconds)
        return seconds

    def on_success(self) -> None:
        """Note that a call was answered: a rate that was found out may be tried from above."""
        self._inferred.on_success()

    def start_cooldown(self, seconds: float) -> None:
        """Close the gate for everybody; a cooldown that ends later stays."""
        self._cooldown_until = max(self._cooldown_until, self._now() + seconds)

    # ── sharing ───────────────────────────────────────────────────────────────────────────────────────────────────

    def demand(self) -> Demand:
        """Return what this process used of the limits since the last time, as a share of all, and whether it waits."""
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
        """Cut caps and told limits to a share of them; how full they are stays. Close as long as others do."""
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
        """Return the buckets that a call takes from, how much, and what the kind is called."""
        taken = [
            (bucket, cost[kind], _words(kind))
            for buckets in (self._caps, self._reported)
            for kind, bucket in buckets.items()
            if kind in cost
        ]
        if self._inferred.bucket:
            taken.append((self._inferred.bucket, 1.0, _words(REQUESTS)))
        return taken

    def free_permit(self) -> Permit:
        """Return a ticket for which nothing was taken."""
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
        """Tell whether a told allowance explains a refusal: then its mirror has only to be put right."""
        short = [bucket for bucket in self._reported.values() if bucket.level >= 0.9 * bucket.max_rate]
        return bool(short)


def _cap(per_minute: int) -> Bucket:
    """Return a bucket of a second's worth, or of one unit where that is less.

    A bucket of a whole minute would let twice the limit through in its first minute.
    """
    per_second = per_minute / 60
    capacity = max(1.0, per_second)
    return Bucket(capacity, capacity / per_second)


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _allowance(kind: str, bucket: Bucket, source: str) -> Allowance:
    used = min(1.0, bucket.level / bucket.max_rate)
    return Allowance(kind=kind, per_minute=bucket.rate * 60, used=used, source=source)
