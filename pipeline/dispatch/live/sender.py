"""Live sending: one HTTP call per request, each request becomes exactly one result, as fast as the limits allow.

Requests wait in one queue per (provider, model), so a limited model does not hold up the others as long as its waiting
requests fit into `input.read_ahead_bytes`. At most one worker waits at a queue's rate limiter. When that admits it, the
worker goes on to send, and the next free worker takes its place. Nothing is handed from task to task, so a call that
need not wait costs no task switch. A failed request goes back to its queue with a time before which it may not be
retried; a waiting retry holds neither a worker nor a slot.

How fast a model is called is up to its `RateLimiter`, how many calls it has in flight to its `ConcurrencyLimit`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import anyio

from pipeline.accounting.budget import Budget
from pipeline.accounting.pricing import Pricing
from pipeline.core.clock import Clock
from pipeline.core.errors import (
    BudgetReachedError,
    ErrorScope,
    PipelineError,
    ProviderError,
    TransportError,
    TryLaterError,
    UsageError,
)
from pipeline.core.types import Attempt, Completion, Cost, Failure, Request, Result, Usage
from pipeline.dispatch.cancel import StopSignal
from pipeline.dispatch.live import model_queue
from pipeline.dispatch.live.model_queue import ModelQueue, QueuedRequest
from pipeline.dispatch.live.rate_limiter import RateLimiter
from pipeline.dispatch.live.token_bucket import Permit
from pipeline.dispatch.results import ResultSink
from pipeline.dispatch.retry import Policy, is_capacity, is_overload

_REQUEST_OVERHEAD_BYTES = 800  # of the objects around a request's body, measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """A snapshot. `attempts` counts calls; `unknown` counts calls that may be billed although no answer came."""

    in_flight: int
    attempts: int
    billed: int
    rate_limited: int
    failed: int
    unknown: int
    dropped: int
    queues: Sequence[model_queue.Statistics]


class Sender:
    """Sends requests with a bounded number of workers and gives each result to `results`.

    A request keeps its slot until its result is stored, so a crash costs at most `concurrency` repeated calls.
    `open_queue` makes the queue of a model when its first request comes. With a `budget` no call is made whose worst
    case the budget does not cover.
    """

    def __init__(
        self,
        *,
        concurrency: int,
        read_ahead_bytes: int,
        policy: Policy,
        clock: Clock,
        open_queue: Callable[[Request], ModelQueue],
        results: ResultSink,
        pricing: Pricing,
        budget: Budget | None = None,
    ) -> None:
        self._concurrency = concurrency
        self._read_ahead_bytes = read_ahead_bytes
        self._policy = policy
        self._clock = clock
        self._open_queue = open_queue
        self._results = results
        self._pricing = pricing
        self._budget = budget
        self._queues: dict[tuple[str, str, str], ModelQueue] = {}
        self._ready: deque[ModelQueue] = deque()
        self._idle: deque[anyio.Event] = deque()
        self._slots = anyio.Semaphore(concurrency, fast_acquire=True)
        self._workers = 0
        self._tasks: anyio.abc.TaskGroup | None = None
        self._is_closed = False
        self._open_requests = 0
        self._queued_bytes = 0
        self._room = anyio.Event()
        self._finished = anyio.Event()
        self._counts = {"attempts": 0, "billed": 0, "rate_limited": 0, "failed": 0, "unknown": 0, "dropped": 0}
        self.stopped: PipelineError | None = None
        self.is_draining = False
        self._stop = StopSignal()
        self.changed_at = anyio.current_time()

    # ── what goes in ──────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Send until `close` was called and every request has its result, or until `stop`."""
        async with anyio.create_task_group() as self._tasks:
            for _ in self._ready:
                self._start_worker()
            await self._finished.wait()
            for event in self._idle:
                event.set()

    async def submit(
        self, requests: Iterable[Request], before: Iterable[tuple[Sequence[Attempt], int]] = repeat(((), 0))
    ) -> None:
        """Take requests; wait while more than `read_ahead_bytes` are queued.

        `before` gives each request's earlier failed attempts in a batch, and how many of them count against it.
        """
        if not self._open_requests:
            self.changed_at = self._clock.now()  # time without work is no stall
        for request, (attempts, counted) in zip(requests, before, strict=False):
            queue = None if self.is_draining else self._queue(request)
            if queue is None or queue.ended:
                self._counts["dropped"] += 1
                continue
            self._open_requests += 1
            self._queued_bytes += _size(request)
            queue.add(QueuedRequest(request=request, attempts=list(attempts), counted=counted))
            self._offer(queue)
        while self._queued_bytes > self._read_ahead_bytes and not self.is_draining:
            await self._room.wait()

    def close(self) -> None:
        """Declare that no more requests come; `run` then ends with the last result."""
        self._is_closed = True
        self._check_finished()

    def stop(self, reason: PipelineError | None = None) -> None:
        """Make no more calls. Calls in flight finish and are stored; other requests stay pending."""
        self.stopped = self.stopped or reason
        self.is_draining = True
        self._stop.call()
        for queue in self._queues.values():
            self._drop_waiting(queue)
        self._make_room()
        self.close()

    async def stop_when_stalled(self, patience: float, is_idle: Callable[[], bool] = lambda: False) -> None:
        """Stop with `TryLaterError` when nothing has finished for `patience` seconds.

        Time without open requests does not count, nor time in which `is_idle` returns True.
        """
        while True:
            if not self._open_requests or is_idle():
                self.changed_at = anyio.current_time()
            idle = anyio.current_time() - self.changed_at
            if idle >= patience:
                waiting = "; ".join(_describe(queue) for queue in self.statistics().queues)
                self.stop(TryLaterError(f"nothing was finished for {idle:,.0f} s ({waiting})"))
                return
            await anyio.sleep(patience - idle)

    def statistics(self) -> Statistics:
        """Return a snapshot."""
        each = [queue.statistics() for queue in self._queues.values()]
        return Statistics(in_flight=sum(queue.in_flight for queue in each), queues=each, **self._counts)

    def rate_limiters(self) -> dict[str, RateLimiter]:
        """Return the rate limiters whose limits other runs share, by quota name."""
        return {queue.quota: queue.rate_limiter for queue in self._queues.values() if queue.quota}

    @property
    def ended_queues(self) -> list[ModelQueue]:
        """The queues of models that were given up; `ended` holds the reason."""
        return [queue for queue in self._queues.values() if queue.ended]

    # ── workers ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _queue(self, request: Request) -> ModelQueue | None:
        """Return the queue of a request's model. If it cannot be opened (no key), stop the run and return None."""
        name = (request.provider, request.model, request.endpoint)
        queue = self._queues.get(name)
        if queue is None:
            try:
                queue = self._queues[name] = self._open_queue(request)
            except UsageError as exc:
                self.stop(exc)
        return queue

    def _offer(self, queue: ModelQueue, *, wake: bool = True) -> None:
        """List a queue for a worker if it needs one. Without `wake`, the caller is a worker that will look itself."""
        if not queue.needs_worker:
            return
        queue.has_worker = True
        self._ready.append(queue)
        if wake and self._slots.value:
            self._wake_worker()

    def _wake_worker(self) -> None:
        if self._idle:
            self._idle.popleft().set()
        else:
            self._start_worker()

    def _start_worker(self) -> None:
        # One extra worker per queue, so that workers waiting at rate limiters take nothing from those that send.
        if self._tasks and self._workers < self._concurrency + len(self._queues):
            self._workers += 1
            self._tasks.start_soon(self._work)

    async def _work(self) -> None:
        while not self._finished.is_set():
            if self._ready and self._slots.value:
                queue = self._ready.popleft()
                admitted = await self._admit(queue)
                if admitted is not None:
                    await self._send(queue, *admitted)
            else:
                event = anyio.Event()
                self._idle.append(event)
                await event.wait()

    async def _admit(self, queue: ModelQueue) -> tuple[QueuedRequest, Permit] | None:
        """Take the queue's next request through its rate limiter; None if the queue was cleared meanwhile."""
        admitted = queue.try_next()
        if admitted is not None:
            self._slots.acquire_nowait()
        elif queue:  # else it was cleared since it asked for a worker
            if self._ready and self._slots.value:
                self._wake_worker()  # this worker may wait here for a long time
            admitted = await queue.wait_next(self._slots)
        queue.has_worker = False
        if admitted is not None:
            queue.in_flight += 1
            self._unqueue(admitted[0])
        self._offer(queue)
        return admitted

    async def _send(self, queue: ModelQueue, queued: QueuedRequest, permit: Permit) -> None:
        reason = queue.refusal(queued.request)
        if reason:
            await self._refuse(queue, queued, permit, reason)
            return
        reserved = await self._reserve(queued.request) if self._budget else 0
        if reserved is None:
            self._leave_pending(queue, queued, permit)
            return
        reply: Completion | None = None
        error: ProviderError | None = None
        usage: Usage | None = None
        await self._results.log_attempt(queued.request, len(queued.attempts) + 1, self._clock.utc())
        self._counts["attempts"] += 1
        sent_at = self._clock.now()
        try:
            answer = await queue.post(queued.request.body)
            queue.rate_limiter.update_from_headers(queue.codec.limits(answer.headers))
            reply = queue.codec.decode(answer)
            usage = reply.usage
        except TransportError as exc:
            error = queue.codec.lost(exc)
        except ProviderError as exc:
            error = exc
            usage = queue.codec.usage(answer) if exc.may_be_billed else None
        finally:
            queue.in_flight -= 1
            if reply is None and error is None:  # cancelled in flight: it may be billed, and no response will tell
                self._counts["unknown"] += 1
        latency = self._clock.now() - sent_at
        model = queued.request.model
        if reply is not None and reply.model:
            model = reply.model
        cost = self._pricing.cost(queued.request, model, usage) if usage else Cost()
        if self._budget:
            self._budget.settle(reserved, _spent(reserved, error, cost))
        if reply is not None:
            await self._succeeded(queue, queued, permit, reply, cost, latency)
        elif error is not None:
            attempt = Attempt.of_error(
                error, at=self._clock.utc(), latency_s=latency, usage=usage, cost_nano=cost.nanos
            )
            await self._failed(queue, queued, permit, error, attempt)
        self._slots.release()
        self._offer(queue, wake=False)

    # ── outcomes ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _succeeded(
        self, queue: ModelQueue, queued: QueuedRequest, permit: Permit, reply: Completion, cost: Cost, latency: float
    ) -> None:
        self._counts["billed"] += 1
        queue.trouble = None
        queue.concurrency_limit.on_success()
        queue.rate_limiter.on_success()
        if reply.usage is not None:
            queue.token_estimator.update(queued.request, reply.usage)
        queue.rate_limiter.reconcile(permit, queue.codec.used(reply.usage) if reply.usage else {})
        await self._finish(queued, latency, reply=reply, cost=cost)

    async def _failed(
        self, queue: ModelQueue, queued: QueuedRequest, permit: Permit, error: ProviderError, attempt: Attempt
    ) -> None:
        self._count_failure(queue, queued, attempt, error)
        if error.scope is not ErrorScope.REQUEST:
            queue.trouble = error.message
        if error.scope in (ErrorScope.RUN, ErrorScope.MODEL):
            error = error.replace(message=f"{queue.provider}/{queue.model}: {error.message}")
        queue.rate_limiter.reconcile(permit, {} if error.may_be_billed else None)
        asked_to_wait = error.retry_after or 0.0
        error = self._slow_down(queue, permit, error)
        if error.scope is ErrorScope.RUN:
            self._forget(queued)
            self.stop(error)
        elif error.scope is ErrorScope.MODEL:
            self._forget(queued)
            self._end(queue, error)
        elif error.scope is ErrorScope.ATTEMPT and asked_to_wait > self._policy.max_retry_after:
            self._forget(queued)
            self._end(queue, _parked(error, self._policy.max_retry_after))
        else:
            await self._retry_or_give_up(queue, queued, error, attempt.latency_s)

    async def _refuse(self, queue: ModelQueue, queued: QueuedRequest, permit: Permit, reason: str) -> None:
        """Fail a request that is larger than a whole minute's limit."""
        queue.in_flight -= 1
        queue.rate_limiter.reconcile(permit, None)
        await self._finish(
            queued,
            0.0,
            failure=Failure(type="request_too_large", message=f"the request {reason}", attempts=tuple(queued.attempts)),
        )
        self._slots.release()
        self._offer(queue, wake=False)

    def _slow_down(self, queue: ModelQueue, permit: Permit, error: ProviderError) -> ProviderError:
        """Slow the whole model down after a 429 or an overload; return the error with the wait before a retry."""
        if error.scope is not ErrorScope.ATTEMPT:
            return error
        if error.status == 429:
            error = error.replace(retry_after=queue.rate_limiter.on_rate_limited(permit, error.retry_after))
        if is_overload(error):
            pause = max(queue.concurrency_limit.on_overload(permit.sent_at), error.retry_after or 0.0)
            queue.rate_limiter.start_cooldown(pause)
        return error

    async def _retry_or_give_up(
        self, queue: ModelQueue, queued: QueuedRequest, error: ProviderError, latency: float
    ) -> None:
        seconds = self._policy.wait_before_retry(error, len(queued.attempts), queued.counted)
        if seconds is None:
            await self._finish(queued, latency, failure=Failure.of_attempts(queued.attempts))
        elif self.is_draining or queue.ended:
            self._forget(queued)
        else:
            self._queued_bytes += _size(queued.request)
            queue.add_delayed(queued, seconds)

    async def _reserve(self, request: Request) -> int | None:
        """Reserve the worst case of a call. If the budget does not cover it, stop the run and return None."""
        assert self._budget is not None
        try:
            amount = self._pricing.worst_case(request)
            with self._stop.cuts_short():
                await self._budget.reserve(amount)
                if not self.is_draining:
                    return amount
                self._budget.settle(amount, 0)
        except (UsageError, BudgetReachedError) as exc:
            self.stop(exc)
        return None

    def _leave_pending(self, queue: ModelQueue, queued: QueuedRequest, permit: Permit) -> None:
        """Return the slot and the permit of a call that is not made."""
        queue.in_flight -= 1
        self._slots.release()
        queue.rate_limiter.reconcile(permit, None)
        self._forget(queued)

    def _count_failure(self, queue: ModelQueue, queued: QueuedRequest, attempt: Attempt, error: ProviderError) -> None:
        queued.attempts.append(attempt)
        if not error.may_be_billed:
            self._results.log_not_billed(queued.request, len(queued.attempts))
        queued.counted += not is_capacity(error)
        if error.status == 429:
            self._counts["rate_limited"] += 1
            queue.rate_limited += 1
        else:
            self._counts["failed"] += 1
        self._counts["unknown"] += attempt.is_unknown

    async def _finish(
        self,
        queued: QueuedRequest,
        latency: float,
        *,
        reply: Completion | None = None,
        failure: Failure | None = None,
        cost: Cost | None = None,
    ) -> None:
        self.changed_at = self._clock.now()
        await self._results.append(
            Result.of_request(
                queued.request,
                completed_at=self._clock.utc(),
                failed_attempts=queued.attempts,
                reply=reply,
                failure=failure,
                latency_s=latency,
                cost=cost,
            )
        )
        self._close_request()

    def _forget(self, queued: QueuedRequest) -> None:
        """Leave a request pending: without a result, the next run sends it."""
        self._counts["dropped"] += 1
        # The usage of unusable responses is dropped with the request; the attempt log still lists the calls.
        self._counts["unknown"] += sum(attempt.usage is not None for attempt in queued.attempts)
        self._close_request()

    def _end(self, queue: ModelQueue, reason: PipelineError) -> None:
        """Give up a model: its requests stay pending, other models go on."""
        queue.ended = queue.ended or reason
        self.changed_at = anyio.current_time()
        self._drop_waiting(queue)

    def _drop_waiting(self, queue: ModelQueue) -> None:
        dropped = queue.clear()
        self._counts["dropped"] += len(dropped)
        for queued in dropped:
            self._unqueue(queued)
        self._close_request(len(dropped))

    def _unqueue(self, queued: QueuedRequest) -> None:
        """Count a request as no longer queued; wake waiting submitters when half of the room is free."""
        self._queued_bytes -= _size(queued.request)
        if self._queued_bytes <= self._read_ahead_bytes // 2:
            self._make_room()

    def _make_room(self) -> None:
        """Wake all tasks that wait in `submit`."""
        self._room.set()
        self._room = anyio.Event()

    def _close_request(self, count: int = 1) -> None:
        self._open_requests -= count
        self._check_finished()

    def _check_finished(self) -> None:
        if self._is_closed and self._open_requests == 0:
            self._finished.set()


def _describe(queue: model_queue.Statistics) -> str:
    """Return one line about a queue, for the message of a stalled run."""
    waits_for = "nothing"
    if queue.waiting_for:
        waits_for = queue.waiting_for
    elif queue.in_flight:
        waits_for = "answers"
    elif queue.retrying:
        waits_for = "retries"
    text = (
        f"{queue.provider}/{queue.model}: {queue.waiting} waiting, {queue.in_flight} in flight, waits for {waits_for}"
    )
    return f"{text}, last failure: {queue.trouble}" if queue.trouble else text


def _spent(reserved: int, error: ProviderError | None, cost: Cost) -> int:
    """Return what a call counts against the budget: its cost if known, else its whole reservation."""
    if error is not None and not error.may_be_billed:
        return 0
    return reserved if cost.nanos is None else cost.nanos


def _size(request: Request) -> int:
    return len(request.body) + _REQUEST_OVERHEAD_BYTES


def _parked(error: ProviderError, ceiling: float) -> TryLaterError:
    return TryLaterError(
        f"the provider asks to wait {error.retry_after:,.0f} s, more than sending.max_retry_after ({ceiling:,.0f} s): "
        f"{error.message}"
    )
