"""The Python way in: requests from a program, results as they come, no files."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import anyio
import anyio.lowlevel
from anyio.streams.memory import MemoryObjectSendStream

from pipeline.accounting.budget import budget_of
from pipeline.accounting.pricing import LIVE, LanePricing, Prices
from pipeline.accounting.run_ledger import RunLedger
from pipeline.core import config as configuration
from pipeline.core import config_file, environment, http, jsonl
from pipeline.core.clock import Clock
from pipeline.core.config import Config
from pipeline.core.errors import UsageError
from pipeline.core.types import Request, Result
from pipeline.dispatch.live.sender import Sender
from pipeline.inputs.planner import Invalid, Planner, invalid_result
from pipeline.inputs.reader import Line
from pipeline.runner import factory, rehearsal
from pipeline.runner.options import Options

_BATCH = 100
_WAITING_RESULTS = 1_000
_SOURCE = "<requests>"


async def stream(
    requests: Iterable[Mapping[str, Any]],
    *,
    config: Config | None = None,
    options: Options | None = None,
) -> AsyncGenerator[Result, None]:
    """Yield a result for each request (a mapping in any dialect of input lines), in the order of completion.

    A request that is not valid yields a failed result. Raises the `PipelineError` that stopped the run (a wrong key,
    a spent budget); results that came before were yielded. Close the generator (`contextlib.aclosing`) when you leave
    early.
    """
    options = options or Options()
    config = config or config_file.load()
    if config.lane != LIVE:
        raise UsageError(f"a stream sends live only, not with lane {config.lane}; for batches use run_batch")
    outgoing, incoming = anyio.create_memory_object_stream[Result](_WAITING_RESULTS)
    with rehearsal.settings_for(config, options) as settings:
        planner = factory.planner(settings, options)
        clock = Clock()
        async with http.Client(settings.sending) as client:
            pricing = LanePricing(Prices(config), clock)
            budget = budget_of(config)
            if budget and not options.simulate:
                today, month = RunLedger(environment.ledger_path(config)).spent(clock.moment())
                budget = budget_of(config, spent_today=today, spent_this_month=month)
            sender = factory.sender(
                settings,
                client,
                clock,
                _Outgoing(outgoing),
                pricing,
                budget,
                rate_limiter_of=partial(factory.rate_limiter, settings),
                ended={},
            )

            async def work() -> None:
                async with outgoing, anyio.create_task_group() as beside:
                    beside.start_soon(sender.stop_when_stalled, configuration.poll_policy(settings), is_consumer_slow)
                    async with anyio.create_task_group() as group:
                        group.start_soon(sender.run)
                        await _feed(requests, planner, sender, clock, outgoing.send)
                    beside.cancel_scope.cancel()

            def is_consumer_slow() -> bool:
                return outgoing.statistics().current_buffer_used >= _WAITING_RESULTS

            async with anyio.create_task_group() as tasks, incoming:
                tasks.start_soon(work)
                try:
                    async for result in incoming:
                        yield result
                except GeneratorExit:
                    tasks.cancel_scope.cancel()
                    return
        for reason in factory.stop_reasons(sender):
            raise reason


class _Outgoing:
    """Gives results to whoever reads the stream; nothing outlives the process, so nothing is noted of calls."""

    def __init__(self, stream: MemoryObjectSendStream[Result]) -> None:
        self._stream = stream

    async def append(self, *results: Result) -> None:
        for result in results:
            await self._stream.send(result)

    async def log_attempt(self, request: Request, attempt: int, at: str) -> None:
        pass

    def log_not_billed(self, request: Request, attempt: int) -> None:
        pass


async def _feed(
    requests: Iterable[Mapping[str, Any]],
    planner: Planner,
    sender: Sender,
    clock: Clock,
    record: Callable[[Result], Awaitable[None]],
) -> None:
    lines = _lines_of(requests)
    while not sender.is_draining:
        batch = list(islice(lines, _BATCH))
        if not batch:
            break
        await anyio.lowlevel.checkpoint()
        wanted = []
        for line in batch:
            item = planner.plan(line)
            if isinstance(item, Invalid):
                await record(invalid_result(item, clock))
            else:
                wanted.append(item)
        await sender.submit(wanted)
    sender.close()


def _lines_of(requests: Iterable[Mapping[str, Any]]) -> Iterator[Line]:
    for number, request in enumerate(requests, start=1):
        try:
            yield Line(source=_SOURCE, number=number, data=jsonl.dumps(request))
        except (TypeError, ValueError, RecursionError) as exc:
            yield Line(source=_SOURCE, number=number, data=b"%d" % number, problem=f"cannot be written as JSON: {exc}")
