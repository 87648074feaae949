"""The one way from a request to its answer, the same for both protocols."""

from collections.abc import Callable
from dataclasses import dataclass

import anyio
from starlette.types import Receive, Scope, Send

from pipeline.simulator import faults
from pipeline.simulator.answers import Draw, compose, digest_of, forced_status, latency_seconds
from pipeline.simulator.connection import deliver, read_body
from pipeline.simulator.options import Options
from pipeline.simulator.refusals import Refused, authenticate, decode, refusal
from pipeline.simulator.state import State
from pipeline.simulator.types import (
    NOTHING_USED,
    Body,
    Completion,
    HeaderMap,
    Headers,
    Identity,
    Limits,
    Prompt,
    Provider,
    Reply,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Admitted:
    """A valid request that the rate limits let in."""

    request_id: str
    key: str
    body: Body
    prompt: Prompt
    digest: bytes
    limits: Limits


class Completions:
    """The endpoint that answers prompts in one protocol.

    A plain ASGI callable, as one core is to serve thousands of requests a second. Over a socket, as with
    the real providers, a client that closes its connection while it waits is billed nevertheless.
    """

    def __init__(self, provider: Provider, make_limits: Callable[[Options], Limits], state: State) -> None:
        self._provider = provider
        self._make_limits = make_limits
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read one request and deliver what becomes of it."""
        statistics = self._state.statistics
        statistics.enter()
        try:
            raw = await read_body(receive)
            reply = await self._reply(dict(scope["headers"]), raw)
            statistics.count_reply(reply)
            await deliver(reply, scope, receive, send)
        finally:
            statistics.leave()

    async def _reply(self, headers: HeaderMap, raw: bytes | None) -> Reply:
        request_id = self._state.request_id()
        try:
            return await self._answer(self._admit(headers, raw, request_id))
        except Refused as refused:
            return refusal(self._provider, refused, request_id, self._state.options)

    def _admit(self, headers: HeaderMap, raw: bytes | None, request_id: str) -> _Admitted:
        provider, state = self._provider, self._state
        key = authenticate(provider, headers, state.options)
        body = decode(provider, raw, lambda decoded: provider.check(headers, decoded))
        prompt = provider.prompt(body)
        limits = state.limits(key, prompt.model, self._make_limits)
        problem = limits.admit(prompt, anyio.current_time())
        if problem:
            state.statistics.count_rejected()
            raise Refused(problem, self._rate_headers(limits))
        return _Admitted(
            request_id=request_id, key=key, body=body, prompt=prompt, digest=digest_of(body), limits=limits
        )

    async def _answer(self, admitted: _Admitted) -> Reply:
        """Answer after the latency, unless a fault strikes; all faults but `slow` come at once."""
        status = forced_status(admitted.prompt)
        if status:
            self._give_back(admitted)
            raise Refused(self._provider.problem(status))
        fault = self._fault(admitted.digest)
        if fault is not None and fault != "slow":
            return self._spoiled(admitted, fault)
        await self._wait(admitted.digest, faults.SLOWNESS if fault else 1)
        return self._paid(admitted)

    def _fault(self, digest: bytes) -> str | None:
        state = self._state
        if not state.options.faults:
            return None
        fault = faults.choose(state.options.faults, state.options.seed, digest, state.attempt(digest))
        if fault is not None:
            state.statistics.count_fault(fault)
        return fault

    def _spoiled(self, admitted: _Admitted, fault: str) -> Reply:
        self._give_back(admitted)
        problem = self._provider.FAULTS.get(fault)
        if problem:
            raise Refused(problem)
        answer = self._encode(admitted, self._compose(admitted))
        return faults.spoil(fault, answer, self._provider, admitted.request_id)

    def _give_back(self, admitted: _Admitted) -> None:
        admitted.limits.settle(admitted.prompt, NOTHING_USED, anyio.current_time())

    async def _wait(self, digest: bytes, slowness: int) -> None:
        options = self._state.options
        if options.latency:
            await anyio.sleep(slowness * latency_seconds(Draw(options.seed, digest), options.latency))

    def _paid(self, admitted: _Admitted) -> Reply:
        """Charge and count the answer, then encode it."""
        completion = self._compose(admitted)
        admitted.limits.settle(admitted.prompt, completion.usage, anyio.current_time())
        self._state.statistics.count_answer(
            key=admitted.key, prompt=admitted.prompt, digest=admitted.digest, usage=completion.usage
        )
        return self._encode(admitted, completion)

    def _compose(self, admitted: _Admitted) -> Completion:
        options = self._state.options
        return compose(admitted.prompt, options.seed, admitted.digest, options.cache_ratio)

    def _encode(self, admitted: _Admitted, completion: Completion) -> Reply:
        provider, state = self._provider, self._state
        identity = Identity(
            id=f"{admitted.digest[:8].hex()}{state.serial():08x}",
            created=int(state.wall(anyio.current_time())),
        )
        return Reply(
            status=200,
            body=provider.answer_body(admitted.body, admitted.prompt, completion, identity),
            headers=(
                (provider.REQUEST_ID, admitted.request_id.encode()),
                *self._rate_headers(admitted.limits),
            ),
        )

    def _rate_headers(self, limits: Limits) -> Headers:
        if not self._state.options.rate_headers:
            return ()
        now = anyio.current_time()
        return limits.headers(now, self._state.wall(now))
