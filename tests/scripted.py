"""A scripted provider behind the interface of `transport.Post`, and the sender before it, on any clock."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import orjson

from pipeline import providers
from pipeline.accounting.budget import Budget
from pipeline.core.clock import Clock
from pipeline.core.config import Limits, Sending
from pipeline.core.errors import TransportError
from pipeline.core.types import Cost, HttpResponse, Protocol, Request, Result, Usage
from pipeline.dispatch.live.model_queue import ModelQueue
from pipeline.dispatch.live.rate_limiter import RateLimiter
from pipeline.dispatch.live.sender import Sender
from pipeline.dispatch.retry import Policy

Script = Callable[[int], HttpResponse | TransportError]
"""What to answer to the n-th call (from 1) for one request."""


def reply(text: str = "fine") -> HttpResponse:
    """Return a chat completion."""
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }
    return HttpResponse(status=200, headers={"x-request-id": "req_1"}, body=orjson.dumps(body))


def refusal(status: int, *, type: str = "error", code: str | None = None, **headers: str) -> HttpResponse:
    """Return an error in OpenAI's form; header names are given with underscores."""
    body = {"error": {"message": f"scripted {status}", "type": type, "param": None, "code": code}}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return HttpResponse(status=status, headers=names, body=orjson.dumps(body))


def request(custom_id: str, model: str = "m") -> Request:
    body = orjson.dumps({"model": model, "messages": [{"role": "user", "content": custom_id}]})
    return Request(
        custom_id=custom_id,
        digest=custom_id,
        source="in.jsonl",
        line=1,
        provider="openai",
        model=model,
        body=body,
        estimated_input_tokens=10,
    )


@dataclass
class World:
    """A sender before a scripted provider: what was called when, and what came out.

    `scripts` maps a custom_id to its script, `default` is for the others; `limits` are caps by
    model; every call takes `latency` seconds.
    """

    scripts: Mapping[str, Script] = field(default_factory=dict)
    default: Script = lambda n: reply()
    latency: float = 1.0
    settings: Sending = field(default_factory=Sending)
    limits: Mapping[str, Limits] = field(default_factory=dict)
    read_ahead_bytes: int = 1_000_000
    price: int = 10
    worst: int = 500
    budget: Budget | None = None
    results: list[Result] = field(default_factory=list)
    attempts: list[tuple[str, int]] = field(default_factory=list)
    calls: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    in_flight: Counter[str] = field(default_factory=Counter)
    max_in_flight: int = 0

    def __post_init__(self) -> None:
        self.start = anyio.current_time()
        self.sender = Sender(
            concurrency=self.settings.concurrency,
            read_ahead_bytes=self.read_ahead_bytes,
            policy=Policy(self.settings),
            clock=Clock(),
            open_queue=self._open_queue,
            results=self,
            pricing=self,
            budget=self.budget,
        )

    async def run(self, *requests: Request) -> list[Result]:
        """Send some requests to the end and return the results."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.sender.run)
            await self.sender.submit(requests)
            self.sender.close()
        return self.results

    def elapsed(self) -> float:
        return round(anyio.current_time() - self.start, 3)

    def outcomes(self) -> dict[str, bool]:
        return {result.custom_id: result.success for result in self.results}

    def _open_queue(self, request: Request) -> ModelQueue:
        return ModelQueue(
            provider=request.provider,
            model=request.model,
            post=self._post,
            codec=providers.codec(Protocol.OPENAI),
            rate_limiter=RateLimiter(self.limits.get(request.model, Limits())),
            concurrency=self.settings.concurrency,
        )

    async def _post(self, body: bytes) -> HttpResponse:
        custom_id: Any = orjson.loads(body)["messages"][0]["content"]
        self.calls[custom_id].append(self.elapsed())
        self.in_flight[custom_id] += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight.total())
        try:
            await anyio.sleep(self.latency)
        finally:
            self.in_flight[custom_id] -= 1
        answer = self.scripts.get(custom_id, self.default)(len(self.calls[custom_id]))
        if isinstance(answer, TransportError):
            raise answer
        return answer

    def cost(self, request: Request, model: str, usage: Usage) -> Cost:
        return Cost(nanos=usage.total_tokens * self.price)

    def worst_case(self, request: Request) -> int:
        return self.worst

    async def log_attempt(self, request: Request, attempt: int, at: str) -> None:
        self.attempts.append((request.custom_id, attempt))

    def log_not_billed(self, request: Request, attempt: int) -> None:
        self.attempts.remove((request.custom_id, attempt))

    async def append(self, *results: Result) -> None:
        self.results.extend(results)
