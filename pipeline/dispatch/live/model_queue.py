"""Lane: the requests of one model, its gate, how many calls may be in flight, and what they are likely to use."""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field

import anyio

from pipeline.core.errors import PipelineError
from pipeline.core.http import Post
from pipeline.core.types import Allowance, Attempt, Request, Usage
from pipeline.dispatch.live.rate_limiter import Charge, Gate, Ticket
from pipeline.providers.base import Provider

FIRST_WAVE = 2
_SECOND_WAVE = 8
_CUT = 0.7
_LONGEST_PAUSE = 10.0
_SMOOTHING = 0.1
_GUESSED_OUTPUT_TOKENS = 300.0
_LARGEST_RATIO = 5.0  # a picture or a document may be far larger than its guess; the next text is not
_MARGIN = 1.5  # by which an estimate may be too large


@dataclass(slots=True, kw_only=True)
class Job:
    """A request on its way: what happened to it so far. `counted` are the attempts that failed by its own fault."""

    request: Request
    attempts: list[Attempt] = field(default_factory=list)
    counted: int = 0


class Window:
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

    def widen(self) -> None:
        """Note an answer."""
        if self._failures or not self._has_answers:
            self.size = max(self.size, self._ceiling / 2 if self._has_answers else _SECOND_WAVE)
        self._has_answers = True
        self._failures = 0
        self.size += 1 if self.size < self._ceiling else 1 / self.size
        self.size = min(self.size, self._maximum)

    def narrow(self, sent_at: float) -> float:
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


class Forecast:
    """What a call is likely to use: an estimate by size, put right by what was reported so far."""

    def __init__(self) -> None:
        self._ratio = 1.0
        self._output: float | None = None

    def input_tokens(self, request: Request) -> float:
        return request.estimated_input_tokens * self._ratio

    def output_tokens(self, request: Request) -> float:
        expected = _GUESSED_OUTPUT_TOKENS if self._output is None else self._output
        return min(expected, request.max_output_tokens or math.inf)

    def learn(self, request: Request, usage: Usage) -> None:
        """Move towards what one call really used."""
        if request.estimated_input_tokens:
            ratio = usage.input_tokens / request.estimated_input_tokens
            self._ratio += _SMOOTHING * (min(_LARGEST_RATIO, ratio) - self._ratio)
        before = usage.output_tokens if self._output is None else self._output
        self._output = before + _SMOOTHING * (usage.output_tokens - before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """A lane at a moment; `waiting_for` is what its gate waits for, `cooldown_s` how long that lasts at most.

    `trouble` is what the last call failed with, None since one succeeded.
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


class Lane:
    """The requests of one model that wait or are in flight; `quota` names the limits that other runs share."""

    def __init__(
        self,
        *,
        provider: str,
        model: str,
        post: Post,
        codec: Provider,
        gate: Gate,
        concurrency: int,
        quota: str = "",
    ) -> None:
        self.quota = quota
        self.provider = provider
        self.model = model
        self.post = post
        self.codec = codec
        self.gate = gate
        self.window = Window(concurrency)
        self.forecast = Forecast()
        self.in_flight = 0
        self.rate_limited = 0
        self.trouble: str | None = None
        self.is_attended = False
        self.ended: PipelineError | None = None
        self._fresh: deque[Job] = deque()
        self._delayed: list[tuple[float, int, Job]] = []
        self._sequence = 0
        self._at_gate: Job | None = None
        self._door: anyio.CancelScope | None = None
        self._arrival = anyio.Event()

    def __len__(self) -> int:
        return len(self._fresh) + len(self._delayed)

    @property
    def wants_worker(self) -> bool:
        return not self.is_attended and self.ended is None and len(self) > 0 and self.in_flight < int(self.window.size)

    def add(self, job: Job) -> None:
        self._fresh.append(job)
        self._announce()

    def add_delayed(self, job: Job, seconds: float) -> None:
        """Take a request back that may not be tried again for some seconds."""
        self._sequence += 1
        heapq.heappush(self._delayed, (anyio.current_time() + seconds, self._sequence, job))
        self._announce()

    def charge(self, request: Request) -> Charge:
        """Return what a call for a request is expected to take out of the provider's allowances."""
        return self.codec.charge(
            self.forecast.input_tokens(request), self.forecast.output_tokens(request), request.max_output_tokens
        )

    def refusal(self, request: Request) -> str | None:
        """Say why no waiting would ever let a request through; None where it may pass."""
        if not self.gate.is_limited:
            return None
        return self.gate.never_fits(
            self.codec.charge(request.estimated_input_tokens / _MARGIN, 0.0, request.max_output_tokens)
        )

    def try_next(self) -> tuple[Job, Ticket] | None:
        """Take the next request through the gate, if there is one that may go now."""
        job = self._pop()
        if job is None:
            return None
        if self.refusal(job.request):
            return job, self.gate.pass_free()
        ticket = self.gate.try_pass(self.charge(job.request) if self.gate.is_limited else {})
        if ticket is None:
            self._fresh.appendleft(job)
            return None
        return job, ticket

    async def wait_next(self, slots: anyio.Semaphore) -> tuple[Job, Ticket] | None:
        """Wait for a request, for the gate and for a slot; None when the lane was cleared meanwhile."""
        has_slot = False
        ticket: Ticket | None = None
        with anyio.CancelScope() as self._door:
            self._at_gate = await self._wait_job()
            if self.refusal(self._at_gate.request):
                ticket = self.gate.pass_free()
            else:
                ticket = await self.gate.wait_turn(self.charge(self._at_gate.request))
            while not has_slot:
                await self.gate.wait_open()
                await slots.acquire()
                has_slot = self.gate.is_open()
                if not has_slot:
                    slots.release()
        job, self._at_gate, self._door = self._at_gate, None, None
        if job is not None and ticket is not None:
            return job, ticket
        if has_slot:
            slots.release()
        return None

    def clear(self) -> list[Job]:
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

    def statistics(self) -> Statistics:
        gate = self.gate.statistics()
        return Statistics(
            provider=self.provider,
            model=self.model,
            waiting=len(self),
            retrying=len(self._delayed),
            in_flight=self.in_flight,
            window=int(self.window.size),
            rate_limited=self.rate_limited,
            cooldown_s=gate.cooldown_s,
            waiting_for=gate.waiting_for,
            trouble=self.trouble,
            allowances=tuple(gate.allowances),
            ended=self.ended.message if self.ended else None,
        )

    def _pop(self) -> Job | None:
        """Take a retry whose time has come, else a new request."""
        if self._delayed and self._delayed[0][0] <= anyio.current_time():
            return heapq.heappop(self._delayed)[2]
        return self._fresh.popleft() if self._fresh else None

    async def _wait_job(self) -> Job:
        while (job := self._pop()) is None:
            self._arrival = anyio.Event()
            seconds = self._delayed[0][0] - anyio.current_time() if self._delayed else None
            with anyio.move_on_after(seconds):
                await self._arrival.wait()
        return job

    def _announce(self) -> None:
        if self.is_attended:
            self._arrival.set()
