"""The queue of one model: its waiting requests, its rate limiter, its concurrency limit and its token estimator."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

import anyio

from pipeline.core.errors import PipelineError
from pipeline.core.http import Post
from pipeline.core.types import Allowance, Attempt, Request
from pipeline.dispatch.live.concurrency import ConcurrencyLimit
from pipeline.dispatch.live.rate_limiter import RateLimiter
from pipeline.dispatch.live.token_bucket import Permit, TokenCost
from pipeline.dispatch.live.token_estimator import TokenEstimator
from pipeline.providers.base import Codec

_MARGIN = 1.5  # an estimated token count may be too large by this factor


@dataclass(slots=True, kw_only=True)
class QueuedRequest:
    """A request and its failed attempts so far. `counted` of them count against `max_attempts`."""

    request: Request
    attempts: list[Attempt] = field(default_factory=list)
    counted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """A snapshot of a queue. The names are those of the progress events, which are a contract.

    `waiting_for` is what its rate limiter waits for, `cooldown_s` the rest of the cooldown in seconds, `window` the
    number of calls that may be in flight. `trouble` is the error of the last call, None after a success.
    """

    provider: str
    model: str
    waiting: int
    retrying: int
    in_flight: int
    window: int
    rate_limited: int
    cooldown_s: float
    waiting_for: str | None
    trouble: str | None
    allowances: tuple[Allowance, ...]
    ended: str | None


class ModelQueue:
    """The requests of one model that wait or are in flight.

    `quota` names limits that other runs share, "" if none do. Mutable state: the sender changes `in_flight`,
    `rate_limited`, `trouble`, `has_worker` and `ended`; the rest is changed here.
    """

    def __init__(
        self,
        *,
        provider: str,
        model: str,
        post: Post,
        codec: Codec,
        rate_limiter: RateLimiter,
        concurrency: int,
        quota: str = "",
    ) -> None:
        self.quota = quota
        self.provider = provider
        self.model = model
        self.post = post
        self.codec = codec
        self.rate_limiter = rate_limiter
        self.concurrency_limit = ConcurrencyLimit(concurrency)
        self.token_estimator = TokenEstimator()
        self.in_flight = 0
        self.rate_limited = 0
        self.trouble: str | None = None
        self.has_worker = False
        self.ended: PipelineError | None = None
        self._fresh: deque[QueuedRequest] = deque()
        self._delayed: list[tuple[float, int, QueuedRequest]] = []
        self._sequence = 0
        self._at_limiter: QueuedRequest | None = None
        self._wait_scope: anyio.CancelScope | None = None
        self._arrival = anyio.Event()

    def __len__(self) -> int:
        return len(self._fresh) + len(self._delayed)

    @property
    def needs_worker(self) -> bool:
        return (
            not self.has_worker
            and self.ended is None
            and len(self) > 0
            and self.in_flight < int(self.concurrency_limit.size)
        )

    def add(self, queued: QueuedRequest) -> None:
        self._fresh.append(queued)
        self._announce()

    def add_delayed(self, queued: QueuedRequest, seconds: float) -> None:
        """Queue a retry that may not start for some seconds."""
        self._sequence += 1
        heapq.heappush(self._delayed, (anyio.current_time() + seconds, self._sequence, queued))
        self._announce()

    def token_cost(self, request: Request) -> TokenCost:
        """Return what a call is expected to take from the provider's limits, by kind."""
        return self.codec.charge(
            self.token_estimator.input_tokens(request),
            self.token_estimator.output_tokens(request),
            request.max_output_tokens,
        )

    def refusal(self, request: Request) -> str | None:
        """Return why a request can never be sent, however long it waits; None if it can."""
        if not self.rate_limiter.is_limited:
            return None
        return self.rate_limiter.never_fits(
            self.codec.charge(request.estimated_input_tokens / _MARGIN, 0.0, request.max_output_tokens)
        )

    def try_next(self) -> tuple[QueuedRequest, Permit] | None:
        """Return the next request with its permit, if one may be sent now."""
        queued = self._pop()
        if queued is None:
            return None
        if self.refusal(queued.request):
            return queued, self.rate_limiter.free_permit()
        permit = self.rate_limiter.try_acquire(self.token_cost(queued.request) if self.rate_limiter.is_limited else {})
        if permit is None:
            self._fresh.appendleft(queued)
            return None
        return queued, permit

    async def wait_next(self, slots: anyio.Semaphore) -> tuple[QueuedRequest, Permit] | None:
        """Wait for a request, a permit and a slot; None if the queue was cleared meanwhile."""
        has_slot = False
        permit: Permit | None = None
        with anyio.CancelScope() as self._wait_scope:
            self._at_limiter = await self._wait_request()
            if self.refusal(self._at_limiter.request):
                permit = self.rate_limiter.free_permit()
            else:
                permit = await self.rate_limiter.acquire(self.token_cost(self._at_limiter.request))
            # The cooldown is checked last: one that starts while this waits for a slot must hold back this call too.
            while not has_slot:
                await self.rate_limiter.wait_cooldown()
                await slots.acquire()
                has_slot = self.rate_limiter.is_open()
                if not has_slot:
                    slots.release()
        queued, self._at_limiter, self._wait_scope = self._at_limiter, None, None
        if queued is not None and permit is not None:
            return queued, permit
        if has_slot:
            slots.release()
        return None

    def clear(self) -> list[QueuedRequest]:
        """Drop every waiting request, including the one at the rate limiter, and return them."""
        dropped = [*self._fresh, *(queued for _, _, queued in self._delayed)]
        if self._at_limiter:
            dropped.append(self._at_limiter)
        self._fresh.clear()
        self._delayed.clear()
        self._at_limiter = None
        if self._wait_scope:
            self._wait_scope.cancel()
        return dropped

    def statistics(self) -> Statistics:
        rate_limiter = self.rate_limiter.statistics()
        return Statistics(
            provider=self.provider,
            model=self.model,
            waiting=len(self),
            retrying=len(self._delayed),
            in_flight=self.in_flight,
            window=int(self.concurrency_limit.size),
            rate_limited=self.rate_limited,
            cooldown_s=rate_limiter.cooldown_s,
            waiting_for=rate_limiter.waiting_for,
            trouble=self.trouble,
            allowances=tuple(rate_limiter.allowances),
            ended=self.ended.message if self.ended else None,
        )

    def _pop(self) -> QueuedRequest | None:
        """Take a retry that is due, else a new request."""
        if self._delayed and self._delayed[0][0] <= anyio.current_time():
            return heapq.heappop(self._delayed)[2]
        return self._fresh.popleft() if self._fresh else None

    async def _wait_request(self) -> QueuedRequest:
        queued = self._pop()
        while queued is None:
            self._arrival = anyio.Event()
            seconds = self._delayed[0][0] - anyio.current_time() if self._delayed else None
            with anyio.move_on_after(seconds):
                await self._arrival.wait()
            queued = self._pop()
        return queued

    def _announce(self) -> None:
        if self.has_worker:
            self._arrival.set()
