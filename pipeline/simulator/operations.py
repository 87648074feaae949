"""An operation on batches over HTTP: who may do it, what strikes it, and how the answer is delivered."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import orjson
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from pipeline.simulator.connection import deliver
from pipeline.simulator.faults import BatchFault, Operation, strike
from pipeline.simulator.refusals import Refused, authenticate, refusal
from pipeline.simulator.state import State
from pipeline.simulator.types import Ending, HeaderMap, Problem, Provider, Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request of an operation, by a known key."""

    request: Request
    headers: HeaderMap
    key: str

    @property
    def id(self) -> str:
        """The id in the path."""
        found: str = self.request.path_params["id"]
        return found

    @property
    def url(self) -> str:
        """The address before `/v1/`, under which the client reached the simulator."""
        url = self.request.url
        return f"{url.scheme}://{url.netloc}{url.path.partition('/v1/')[0]}"

    async def body(self, limit: int) -> bytes | None:
        """Return the request's body; None when it is larger than `limit`.

        It is read to its end even so: a client that is still sending takes an early answer for a broken connection.
        """
        parts, size = list[bytes](), 0
        async for part in self.request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
        return b"".join(parts) if size <= limit else None


Act = Callable[[Call], Awaitable[Reply]]
"""Carry out an operation, or raise `Refused`."""


def json_reply(body: object) -> Reply:
    """Answer with JSON."""
    return Reply(status=200, body=orjson.dumps(body))


def page_limit(call: Call, most: int, problem: Problem) -> int:
    """Read `limit`, 20 unless given; one out of bounds is refused with `problem`."""
    text = call.request.query_params.get("limit", "20")
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise Refused(problem)
    return int(text)


class Endpoint:
    """Answers one kind of request; one without an `operation` is not counted and meets no faults."""

    def __init__(self, provider: Provider, state: State, act: Act, operation: Operation | None = None) -> None:
        self._provider = provider
        self._state = state
        self._act = act
        self._operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read one request and deliver what becomes of it."""
        reply = await self._reply(Request(scope, receive))
        await deliver(reply, scope, receive, send)

    async def _reply(self, request: Request) -> Reply:
        request_id = self._state.request_id()
        try:
            headers = dict(request.headers.raw)
            key = authenticate(self._provider, headers, self._state.options)
            return await self._struck(Call(request=request, headers=headers, key=key), request_id)
        except Refused as refused:
            return refusal(self._provider, refused, request_id, self._state.options)

    async def _struck(self, call: Call, request_id: str) -> Reply:
        """Carry out the operation unless the fault whose turn it is prevents that, and spoil the answer if it does."""
        fault = self._state.batch_fault(self._operation) if self._operation else BatchFault(kind="ok")
        if not fault.is_done:
            await call.body(0)
            return self._undone(fault)
        reply = await self._done(call, request_id)
        if fault.kind == "500-done":
            raise Refused(self._provider.problem(500))
        return strike(fault, reply)

    def _undone(self, fault: BatchFault) -> Reply:
        if fault.kind == "reset":
            return Reply(status=200, ending=Ending.RESET)
        raise Refused(self._provider.FAULTS[fault.kind])

    async def _done(self, call: Call, request_id: str) -> Reply:
        try:
            reply = await self._act(call)
        except Refused as refused:
            return refusal(self._provider, refused, request_id, self._state.options)
        return replace(reply, headers=((self._provider.REQUEST_ID, request_id.encode()), *reply.headers))
