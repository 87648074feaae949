"""The live lane: every request becomes exactly one result, at the pace the gates allow.

Requests wait in lanes, one per (provider, model), so a model that is limited does not hold up the others. At most one
worker stands at the gate of a lane; when it is let through it goes on to send, and the next free worker takes its
place. Nothing is handed from task to task, and a free gate costs no task switch. A request that failed goes back to
its lane with a time before which it may not be tried again: a waiting retry holds neither a worker nor a slot.

A lane begins with a first wave of two requests and doubles with every round of answers: a wrong key or an unknown
model is found out by two requests, not by a thousand.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import anyio

from pipeline.clock import Clock
from pipeline.errors import PipelineError, ProviderError, Reach, TransportError, TryLaterError, UsageError
from pipeline.limits import Cost, Gate
from pipeline.providers.base import Provider
from pipeline.retry import Policy, is_capacity
from pipeline.transport import Post
from pipeline.types import Attempt, Failure, Reply, Request, Result

FIRST_WAVE = 2
_REQUEST_OVERHEAD_BYTES = 800  # of the objects around a request's body, measured


@dataclass(slots=True, kw_only=True)
class _Job:
    """A request on its way: what happened to it so far."""

    request: Request
    attempts: list[Attempt] = field(default_factory=list)
    counted: int = 0


class Lane:
    """The requests of one model, its gate, and how to reach it."""

    def __init__(self, *, provider: str, model: str, post: Post, codec: Provider, gate: Gate) -> None:
        self.provider = provider
        self.model = model
        self.post = post
        self.codec = codec
        self.gate = gate
        self.window = FIRST_WAVE
        self.in_flight = 0
        self.rate_limited = 0
        self.ended: PipelineError | None = None
        self._fresh: deque[_Job] = deque()
        self._delayed: list[tuple[float, int, _Job]] = []
        self._sequence = 0
        self._at_gate: _Job | None = None
        self._door: anyio.CancelScope | None = None
        self._arrival = anyio.Event()
        self.is_attended = False

    def __len__(self) -> int:
        return len(self._fresh) + len(self._delayed)

    @property
    def retrying(self) -> int:
        """How many requests wait for another attempt."""
        return len(self._delayed)

    @property
    def wants_worker(self) -> bool:
        return not self.is_attended and self.ended is None and len(self) > 0 and self.in_flight < self.window

    def add(self, job: _Job) -> None:
        self._fresh.append(job)
        self._announce()

    def add_delayed(self, job: _Job, seconds: float) -> None:
        self._sequence += 1
        heapq.heappush(self._delayed, (anyio.current_time() + seconds, self._sequence, job))
        self._announce()

    def pop_nowait(self) -> _Job | None:
        """Take the next request: a retry whose time has come, else a new one."""
        if self._delayed and self._delayed[0][0] <= anyio.current_time():
            return heapq.heappop(self._delayed)[2]
        return self._fresh.popleft() if self._fresh else None

    async def wait_next(self) -> _Job:
        """Wait for the next request that may be sent, and take it."""
        while (job := self.pop_nowait()) is None:
            self._arrival = anyio.Event()
            seconds = self._delayed[0][0] - anyio.current_time() if self._delayed else None
            with anyio.move_on_after(seconds):
                await self._arrival.wait()
        return job

    def clear(self) -> list[_Job]:
        """Drop every waiting request, the one at the gate included, and return them."""
        dropped = [*self._fresh, *(job for _, _, job in self._delayed)]
        if self._at_gate:
            dropped.append(self._at_gate)
        self._fresh.clear()
        self._delayed.clear()
        self._at_gate = None
        if self._door:
            self._door.cancel()
        return dropped

    async def wait_at_gate(self, slots: anyio.Semaphore) -> _Job | None:
        """Wait for a request, for the gate and for a slot; None when the lane was cleared meanwhile."""
        has_slot = False
        with anyio.CancelScope() as self._door:
            self._at_gate = await self.wait_next()
            await self.gate.wait_turn(_cost(self._at_gate.request))
            while not has_slot:
                await self.gate.wait_open()
                await slots.acquire()
                has_slot = self.gate.is_open()
                if not has_slot:
                    slots.release()
        job, self._at_gate, self._door = self._at_gate, None, None
        if job is None and has_slot:
            slots.release()
        return job

    def _announce(self) -> None:
        if self.is_attended:
            self._arrival.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStatistics:
    """A lane at a moment; `waiting_for` is what its gate waits for, `cooldown_s` how long that lasts at most."""

    provider: str
    model: str
    waiting: int
    retrying: int
    in_flight: int
    rate_limited: int
    cooldown_s: float
    waiting_for: str | None
    ended: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The sender at a moment. `attempts` = calls made; `unknown` = calls that may be billed without an answer."""

    in_flight: int
    attempts: int
    billed: int
    rate_limited: int
    failed: int
    unknown: int
    dropped: int
    lanes: Sequence[LaneStatistics]


class Sender:
    """Fans requests out over lanes with a bounded number of workers; gives each result to `record`.

    `open_lane` makes the lane of a request's model when it is first seen.
    """

    def __init__(
        self,
        *,
        concurrency: int,
        read_ahead_bytes: int,
        policy: Policy,
        clock: Clock,
        open_lane: Callable[[Request], Lane],
        record: Callable[[Result], Awaitable[None]],
    ) -> None:
        self._concurrency = concurrency
        self._read_ahead_bytes = read_ahead_bytes
        self._policy = policy
        self._clock = clock
        self._open_lane = open_lane
        self._record = record
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._ready: deque[Lane] = deque()
        self._idle: deque[anyio.Event] = deque()
        self._slots = anyio.Semaphore(concurrency, fast_acquire=True)
        self._workers = 0
        self._tasks: anyio.abc.TaskGroup | None = None
        self._is_closed = False
        self._open_jobs = 0
        self._queued_bytes = 0
        self._room = anyio.Event()
        self._finished = anyio.Event()
        self._counts = {"attempts": 0, "billed": 0, "rate_limited": 0, "failed": 0, "unknown": 0, "dropped": 0}
        self.stopped: PipelineError | None = None
        self.is_draining = False
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

    async def submit(self, requests: Iterable[Request]) -> None:
        """Take requests; waits while too many bytes are waiting to be sent."""
        for request in requests:
            lane = None if self.is_draining else self._lane(request)
            if lane is None or lane.ended:
                self._counts["dropped"] += 1
                continue
            self._open_jobs += 1
            self._queued_bytes += _size(request)
            lane.add(_Job(request=request))
            self._offer(lane)
        while self._queued_bytes > self._read_ahead_bytes and not self.is_draining:
            self._room = anyio.Event()
            await self._room.wait()

    def close(self) -> None:
        """Say that no more requests come."""
        self._is_closed = True
        self._check_finished()

    def stop(self, reason: PipelineError | None = None) -> None:
        """Send nothing more; what is in flight is finished and recorded, the rest stays pending."""
        self.stopped = self.stopped or reason
        self.is_draining = True
        for lane in self._lanes.values():
            self._drop_waiting(lane)
        self._room.set()
        self.close()

    def statistics(self) -> Statistics:
        """Return a snapshot, for progress, totals and tests alike."""
        lanes = [_lane_statistics(lane) for lane in self._lanes.values()]
        return Statistics(in_flight=sum(lane.in_flight for lane in lanes), lanes=lanes, **self._counts)

    @property
    def open_jobs(self) -> int:
        """How many requests have no result yet."""
        return self._open_jobs

    @property
    def ended_lanes(self) -> list[Lane]:
        """The lanes that were given up, with the reason in `ended`."""
        return [lane for lane in self._lanes.values() if lane.ended]

    # ── workers ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _lane(self, request: Request) -> Lane | None:
        """Return the lane of a request; None, and the run stops, where it cannot be opened (no key)."""
        name = (request.provider, request.model)
        lane = self._lanes.get(name)
        if lane is None:
            try:
                lane = self._lanes[name] = self._open_lane(request)
            except UsageError as exc:
                self.stop(exc)
        return lane

    def _offer(self, lane: Lane, *, wake: bool = True) -> None:
        """Let a worker go to a lane's gate if it wants one; without `wake` the caller is a worker who will look."""
        if not lane.wants_worker:
            return
        lane.is_attended = True
        self._ready.append(lane)
        if wake and self._slots.value:
            self._wake_worker()

    def _wake_worker(self) -> None:
        if self._idle:
            self._idle.popleft().set()
        else:
            self._start_worker()

    def _start_worker(self) -> None:
        # One worker more for each lane, so that those who wait at gates take nothing from those who send.
        if self._tasks and self._workers < self._concurrency + len(self._lanes):
            self._workers += 1
            self._tasks.start_soon(self._work)

    async def _work(self) -> None:
        while not self._finished.is_set():
            if self._ready and self._slots.value:
                lane = self._ready.popleft()
                job = await self._admit(lane)
                if job is not None:
                    await self._send(lane, job)
            else:
                event = anyio.Event()
                self._idle.append(event)
                await event.wait()

    async def _admit(self, lane: Lane) -> _Job | None:
        """Take the lane's next request through its gate; None if the lane was cleared meanwhile."""
        job = lane.pop_nowait() if lane.gate.is_free() and self._slots.value else None
        if job is not None:
            self._slots.acquire_nowait()
        elif lane:  # else it was cleared since it asked for a worker
            job = await lane.wait_at_gate(self._slots)
        lane.is_attended = False
        if job is not None:
            lane.in_flight += 1
            self._unqueue(job)
        self._offer(lane)
        return job

    async def _send(self, lane: Lane, job: _Job) -> None:
        started = self._clock.now()
        self._counts["attempts"] += 1
        reply: Reply | None = None
        error: ProviderError | None = None
        try:
            reply = lane.codec.decode(await lane.post(job.request.body))
        except TransportError as exc:
            error = lane.codec.lost(exc)
        except ProviderError as exc:
            error = exc
        finally:
            lane.in_flight -= 1
            self._slots.release()
            if reply is None and error is None:  # cancelled in flight: it may be billed, and nobody will know
                self._counts["unknown"] += 1
        latency = self._clock.now() - started
        if reply is not None:
            await self._succeeded(lane, job, reply, latency)
        elif error is not None:
            await self._failed(lane, job, error, latency)
        self._offer(lane, wake=False)

    # ── outcomes ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _succeeded(self, lane: Lane, job: _Job, reply: Reply, latency: float) -> None:
        self._counts["billed"] += 1
        lane.window = min(self._concurrency, lane.window + 1)
        await self._finish(job, latency, reply=reply)

    async def _failed(self, lane: Lane, job: _Job, error: ProviderError, latency: float) -> None:
        self._count_failure(lane, job, error, latency)
        if error.reach is Reach.RUN:
            self._forget(job)
            self.stop(error)
        elif error.reach is Reach.MODEL:
            self._forget(job)
            self._end(lane, error)
        elif error.retry_after is not None and error.retry_after > self._policy.max_retry_after:
            self._forget(job)
            self._end(lane, _parked(error, self._policy.max_retry_after))
        else:
            await self._retry_or_give_up(lane, job, error, latency)

    async def _retry_or_give_up(self, lane: Lane, job: _Job, error: ProviderError, latency: float) -> None:
        seconds = self._policy.wait_before_retry(error, len(job.attempts), job.counted)
        if seconds is None:
            error.attempts = len(job.attempts)
            await self._finish(job, latency, failure=_failure(error, job.attempts))
        elif self.is_draining or lane.ended:
            self._forget(job)
        else:
            if error.status == 429 or error.retry_after is not None:
                lane.gate.close_for(seconds)
            self._queued_bytes += _size(job.request)
            lane.add_delayed(job, seconds)

    def _count_failure(self, lane: Lane, job: _Job, error: ProviderError, latency: float) -> None:
        job.attempts.append(_attempt(error, self._clock.utc(), latency))
        job.counted += not is_capacity(error)
        if error.status == 429:
            self._counts["rate_limited"] += 1
            lane.rate_limited += 1
        else:
            self._counts["failed"] += 1
        self._counts["unknown"] += error.may_be_billed

    async def _finish(
        self, job: _Job, latency: float, *, reply: Reply | None = None, failure: Failure | None = None
    ) -> None:
        request = job.request
        self.changed_at = self._clock.now()
        await self._record(
            Result(
                custom_id=request.custom_id,
                line=request.line,
                source=request.source,
                digest=request.digest,
                attempts=len(job.attempts) + (reply is not None),
                completed_at=self._clock.utc(),
                request=request,
                reply=reply,
                failure=failure,
                failed_attempts=tuple(job.attempts),
                latency_s=latency,
                metadata=request.metadata,
            )
        )
        self._close_job()

    def _forget(self, job: _Job) -> None:
        """Leave a request pending: it gets no result, so the next run sends it."""
        self._counts["dropped"] += 1
        self._close_job()

    def _end(self, lane: Lane, reason: PipelineError) -> None:
        """Give a model up: its requests stay pending, other models go on."""
        lane.ended = lane.ended or reason
        self.changed_at = anyio.current_time()
        self._drop_waiting(lane)

    def _drop_waiting(self, lane: Lane) -> None:
        dropped = lane.clear()
        self._counts["dropped"] += len(dropped)
        for job in dropped:
            self._unqueue(job)
        self._close_job(len(dropped))

    def _unqueue(self, job: _Job) -> None:
        """Note that a request waits no more; lets the reader go on when half of the room is free."""
        self._queued_bytes -= _size(job.request)
        if self._queued_bytes < self._read_ahead_bytes // 2:
            self._room.set()

    def _close_job(self, count: int = 1) -> None:
        self._open_jobs -= count
        self._check_finished()

    def _check_finished(self) -> None:
        if self._is_closed and self._open_jobs == 0:
            self._finished.set()


def _size(request: Request) -> int:
    return len(request.body) + _REQUEST_OVERHEAD_BYTES


def _cost(request: Request) -> Cost:
    return Cost(input_tokens=request.estimated_input_tokens, output_tokens=request.max_output_tokens or 0)


def _attempt(error: ProviderError, at: str, latency: float) -> Attempt:
    return Attempt(
        at=at,
        type=error.type,
        message=error.message,
        latency_s=latency,
        status=error.status,
        code=error.code,
        request_id=error.request_id,
        may_be_billed=error.may_be_billed,
    )


def _failure(error: ProviderError, attempts: Sequence[Attempt]) -> Failure:
    return Failure(
        type=error.type,
        message=error.message,
        status=error.status,
        code=error.code,
        request_id=error.request_id,
        attempts=tuple(attempts),
    )


def _parked(error: ProviderError, ceiling: float) -> TryLaterError:
    return TryLaterError(
        f"the provider asks to wait {error.retry_after:,.0f} s, more than sending.max_retry_after ({ceiling:,.0f} s): "
        f"{error.message}"
    )


def _lane_statistics(lane: Lane) -> LaneStatistics:
    gate = lane.gate.statistics()
    return LaneStatistics(
        provider=lane.provider,
        model=lane.model,
        waiting=len(lane),
        retrying=lane.retrying,
        in_flight=lane.in_flight,
        rate_limited=lane.rate_limited,
        cooldown_s=gate.cooldown_s,
        waiting_for=gate.waiting_for,
        ended=lane.ended.message if lane.ended else None,
    )
