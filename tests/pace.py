"""Ten minutes before a provider with true buckets, on a virtual clock: how much of the limit is used, how much refused.

Run as a program it prints the table: `python -m tests.pace`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import anyio
import httpx
import looptime
import orjson

from pipeline import providers
from pipeline.core import http
from pipeline.core.clock import Clock
from pipeline.core.config import Config, Limits, Sending, protocol
from pipeline.core.errors import PipelineError
from pipeline.core.types import Cost, Request, Result, Usage
from pipeline.dispatch.live.model_queue import ModelQueue
from pipeline.dispatch.live.rate_limiter import RateLimiter
from pipeline.dispatch.live.sender import Sender
from pipeline.dispatch.live.shared_limits import LeaseTable, QuotaSync, SqliteBroker
from pipeline.dispatch.retry import Policy
from pipeline.simulator import Options, build_app

MODELS = {"anthropic": "claude-haiku-5-5", "openai": "gpt-4o"}
PATHS = {"anthropic": "/v1/messages", "openai": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What came of a run: answers, refusals, the share of the allowance that was used, second by second answers."""

    answered: int
    refused: int
    used: float
    per_second: list[int]

    @property
    def refused_share(self) -> float:
        return self.refused / max(1, self.answered + self.refused)


class Run:
    """A sender before the simulator, without sockets, with an endless supply of requests."""

    def __init__(
        self,
        provider: str,
        options: Options,
        *,
        concurrency: int = 200,
        caps: Limits | None = None,
        words: Callable[[int], int] = lambda n: 60,
        max_tokens: int = 100,
        app: Any = None,
        leases: LeaseTable | None = None,
    ) -> None:
        self.provider = provider
        self.app: Any = app or build_app(options)
        self.leases = leases
        self.answers: list[float] = []
        self.answered_lines: list[int] = []
        self.words = words
        self.max_tokens = max_tokens
        self._settings = Sending(concurrency=concurrency)
        self._caps = caps or Limits()

    async def go(self, seconds: float, *, changes: Mapping[float, float] | None = None) -> None:
        """Send for some virtual seconds; `changes` maps moments to factors by which the limits change then."""
        self.start = anyio.current_time()
        client = http.Client(self._settings, httpx.ASGITransport(self.app))
        self.sender = Sender(
            concurrency=self._settings.concurrency,
            read_ahead_bytes=1_000_000,
            policy=Policy(self._settings),
            clock=Clock(),
            open_queue=lambda request: self._queue(client, request),
            results=self,
            pricing=self,
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.sender.run)
            tasks.start_soon(self._feed)
            if self.leases:
                sharing = QuotaSync(
                    SqliteBroker(self.leases), Clock(), rate_limiters=self.sender.rate_limiters, notify=print
                )
                tasks.start_soon(sharing.keep)
            for moment, factor in sorted((changes or {}).items()):
                await anyio.sleep(moment - (anyio.current_time() - self.start))
                self.app.state.simulator.change_limits(factor)
            await anyio.sleep(seconds - (anyio.current_time() - self.start))
            self.counts = self.statistics()
            self.last = self.sender.statistics()
            self.sender.stop(PipelineError("time is up"))
            if self.leases:
                tasks.cancel_scope.cancel()

    def statistics(self) -> Any:
        """Return the simulator's own count."""
        return self.app.state.simulator.statistics.snapshot()

    def _queue(self, client: http.Client, request: Request) -> ModelQueue:
        endpoint = Config().providers[self.provider]
        codec = providers.codec(protocol(endpoint))
        url = f"http://simulator{PATHS[self.provider]}"
        return ModelQueue(
            provider=request.provider,
            model=request.model,
            post=client.post_to(url, codec.headers(endpoint, "key")),
            codec=codec,
            rate_limiter=RateLimiter(self._caps),
            concurrency=self._settings.concurrency,
            quota="quota" if self.leases else "",
        )

    async def _feed(self) -> None:
        requests = self._requests()
        while not self.sender.is_draining:
            await self.sender.submit([next(requests) for _ in range(50)])

    def _requests(self) -> Iterator[Request]:
        codec = protocol(Config().providers[self.provider])
        model = MODELS[self.provider]
        for n in count():
            content = f"question {n} " + "lorem " * self.words(n)
            body = {"model": model, "max_tokens": self.max_tokens, "messages": [{"role": "user", "content": content}]}
            yield Request(
                custom_id=f"q-{n}",
                digest=str(n),
                source="",
                line=n,
                provider=self.provider,
                model=model,
                body=orjson.dumps(body),
                max_output_tokens=self.max_tokens,
                estimated_input_tokens=providers.estimate_input_tokens(body, codec, model),
            )

    def cost(self, request: Request, model: str, usage: Usage) -> Cost:
        return Cost()

    def worst_case(self, request: Request) -> int:
        return 0

    async def log_attempt(self, request: Request, attempt: int, at: str) -> None:
        pass

    def log_not_billed(self, request: Request, attempt: int) -> None:
        pass

    async def append(self, *results: Result) -> None:
        for result in results:
            assert result.success, result.failure
            self.answers.append(anyio.current_time() - self.start)
            self.answered_lines.append(result.line)


def measure(run: Run, allowed: float, *, since: float = 0.0) -> Pace:
    """Reckon what a run of requests-per-minute limits made of what was allowed (in answers, over all its time)."""
    counts = run.counts
    seconds = [0] * 601
    for time in run.answers:
        seconds[min(600, int(time))] += 1
    return Pace(
        answered=counts["answered"],
        refused=counts["rejected"],
        used=sum(time >= since for time in run.answers) / allowed,
        per_second=seconds,
    )


class _Loop(looptime.LoopTimeEventLoop, asyncio.SelectorEventLoop):
    """An event loop that jumps, and creeps by a nanosecond at every look."""

    def __init__(self) -> None:
        self._looks = count()
        super().__init__()

    def time(self) -> float:
        return super().time() + next(self._looks) * 1e-9


_ALL = {"rpm": 1_000}
_SILENT = {"rate_headers": False, "retry_after": False}
_CASES: tuple[tuple[str, dict[str, Any], Limits | None, dict[float, float]], ...] = (
    ("capped by the user at 600", _ALL, Limits(rpm=600), {}),
    ("told in headers", _ALL, None, {}),
    ("told, halved at 200 s, doubled at 400 s", _ALL, None, {200.0: 0.5, 400.0: 2.0}),
    ("retry-after only", _ALL | {"rate_headers": False}, None, {}),
    ("nothing told", _ALL | _SILENT, None, {}),
    ("nothing told, halved, doubled", _ALL | _SILENT, None, {200.0: 0.5, 400.0: 2.0}),
)


def main() -> None:
    """Print what becomes of 1,000 requests per minute, for each provider and by what it tells."""
    print(f"{'1,000 requests per minute, ten minutes':54} {'answered':>9} {'refused':>8} {'share refused':>14}")
    for provider in MODELS:
        for name, simulation, caps, changes in _CASES:
            run = Run(provider, Options(latency=1.5, **simulation), caps=caps)
            with asyncio.Runner(loop_factory=_Loop) as runner:
                runner.run(run.go(600.0, changes=changes))
            pace = measure(run, 1)
            print(f"{provider + ': ' + name:54} {pace.answered:9,} {pace.refused:8,} {pace.refused_share:14.2%}")


if __name__ == "__main__":
    main()
