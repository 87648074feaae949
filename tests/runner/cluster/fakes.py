"""Workers in this process, which can be lost on demand, in the place of a cluster."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio

from pipeline.accounting.pricing import Prices
from pipeline.accounting.run_ledger import RunLedger
from pipeline.core import environment
from pipeline.core.config import Config
from pipeline.core.errors import PipelineError, TryLaterError
from pipeline.core.types import IdRange
from pipeline.dispatch.live.rate_limiter import Demand
from pipeline.dispatch.live.shared_limits import Lease
from pipeline.inputs.sources import ByteRange
from pipeline.results.staging import Name
from pipeline.runner.cluster.driver import Driver, WorkerLostError
from pipeline.runner.cluster.id_registry import Scan
from pipeline.runner.cluster.quota import Quota
from pipeline.runner.cluster.worker import Greeting, ShardOutcome, Snapshot, Task, Worker
from pipeline.runner.context import RunContext
from pipeline.runner.options import Options
from pipeline.runner.run import Run, Watch, check
from pipeline.runner.summary import Summary

T = TypeVar("T")


async def until(condition: Callable[[], object]) -> None:
    """Wait until something is true of what tells nobody."""
    while not condition():  # noqa: ASYNC110
        await anyio.sleep(0.001)


class FakePool:
    """Up to `size` workers. `lose` says after how many result lines of it a part's worker dies, for some parts.

    `lose_first` are parts whose worker dies as soon as something is being sent, `poison` those that kill each of their
    workers so, `vanish` those whose results are gone when they are done. A broken pool has no worker that lives; where
    `is_first_silent` the first worker does its parts, but answers nothing that it is asked.
    """

    def __init__(
        self,
        size: int = 2,
        *,
        lose: Mapping[int, int] | None = None,
        poison: Collection[int] = (),
        vanish: Collection[int] = (),
        version: str | None = None,
        has_room: bool = True,
        is_broken: bool = False,
        is_first_silent: bool = False,
        lose_first: Collection[int] = (),
    ) -> None:
        self.size = size
        self.quota = Quota()
        self.tasks: list[Task] = []
        self.started: list[FakeWorker] = []
        self.killed: list[FakeWorker] = []
        self.loss = anyio.Event()
        self.received: Callable[[], int] | None = None  # requests at the server: then workers die with one in flight
        self.spent: list[int] = []
        self._lose = dict(lose or {})
        self.lose_first = set(lose_first)
        self.poison = poison
        self.vanish = vanish
        self.is_broken = is_broken
        self.is_first_silent = is_first_silent
        self._version = version
        self._has_room = has_room

    async def start_worker(self, settings: Config, options: Options, *, first_share: float) -> FakeWorker:
        if not self._has_room:
            await anyio.sleep_forever()
        broker = _Broker(self.quota, f"worker {len(self.started)}")
        worker = Worker(settings, options, run_id="run-x", broker=broker, first_share=first_share)
        self.started.append(FakeWorker(self, worker))
        return self.started[-1]

    async def until_lost(self) -> PipelineError:
        await self.loss.wait()
        return TryLaterError("the cluster is lost")

    async def kill_all(self) -> None:
        for worker in self.started:
            worker.die()

    def version_of(self, greeting: Greeting) -> Greeting:
        return Greeting(host=greeting.host, process=greeting.process, version=self._version or greeting.version)

    def lines_before_death(self, task: Task) -> int | None:
        """Return after how many lines the worker of a task dies: the first time that the part is done."""
        return self._lose.pop(task.number, None)


class FakeWorker:
    """A worker of the pool; `die` cuts off all that it does."""

    def __init__(self, pool: FakePool, worker: Worker) -> None:
        self._pool = pool
        self._worker = worker
        self._life = anyio.Event()
        self._received_before = 0

    def die(self) -> None:
        self._life.set()

    async def greet(self, place: Name, token: str) -> Greeting:
        if self._pool.is_broken:
            raise WorkerLostError("no such module")
        return self._pool.version_of(await self._living(self._worker.greet(place, token)))

    async def scan(self, spans: Sequence[ByteRange], before: IdRange) -> Scan:
        return await self._living(self._worker.scan(spans, before))

    async def work(self, task: Task) -> ShardOutcome:
        self._pool.tasks.append(task)
        lines = self._pool.lines_before_death(task)
        until = (Path(task.output), lines)
        if task.number in self._pool.poison:
            until = (Path(task.output).with_suffix(".attempts.jsonl"), 2)
            self._received_before = self._pool.received() if self._pool.received else 0
        outcome = await self._living(self._worker.work(task), until=until)
        if self._is_silent:
            await self._living(anyio.sleep_forever())
        if task.number in self._pool.vanish:
            Path(task.output).write_bytes(b"")  # noqa: ASYNC240
        self._pool.spent.append(outcome.spent)
        return outcome

    async def progress(self) -> list[Snapshot]:
        if self._is_silent:
            await self._living(anyio.sleep_forever())
        snapshots = await self._living(self._worker.progress())
        if any(each.number in self._pool.lose_first and each.sender.attempts for each in snapshots):
            self._pool.lose_first.clear()
            self._life.set()
        return snapshots

    async def grant(self, number: int, amount: int | None) -> None:
        await self._living(self._worker.grant(number, amount))

    async def stop(self) -> None:
        await self._living(self._worker.stop())

    async def kill(self) -> None:
        self._pool.killed.append(self)
        self.die()

    @property
    def _is_silent(self) -> bool:
        return self._pool.is_first_silent and self is self._pool.started[0]

    async def _die_after(self, output: Path, lines: int | None) -> None:
        assert lines is not None
        await until(lambda: output.exists() and output.read_bytes().count(b"\n") >= lines)
        received = self._pool.received
        if received:
            await until(lambda: received() > self._received_before)
        self.die()

    async def _living(self, doing: Awaitable[T], until: tuple[Path, int | None] = (Path(), None)) -> T:
        """Return what is done, unless the worker dies before: when a file has so many lines, or by another's worker."""
        answer: list[T] = []
        errors: list[Exception] = []

        async def do() -> None:
            try:
                answer.append(await doing)
            except Exception as exc:
                errors.append(exc)
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(do)
            if until[1] is not None:
                tasks.start_soon(self._die_after, *until)
            await self._life.wait()
            tasks.cancel_scope.cancel()
        if self._life.is_set():
            raise WorkerLostError("killed by the test")
        if errors:
            raise errors[0]
        return answer[0]


class _Broker:
    """The quota of the pool, in this process."""

    def __init__(self, quota: Quota, holder: str) -> None:
        self._quota = quota
        self._holder = holder

    async def renew(self, needs: Mapping[str, Demand], now: float) -> Mapping[str, Lease]:
        return self._quota.renew(self._holder, needs, now)

    async def give_back(self) -> None:
        pass


async def drive(
    sources: Sequence[Name],
    output: Name,
    settings: Config,
    pool: FakePool,
    *,
    watch: Watch | None = None,
    say: Callable[[str], None] = lambda message: None,
    handle_signals: bool = False,
    **options: Any,
) -> Summary:
    """Have a job done by the pool."""
    books = RunLedger(environment.ledger_path(settings))
    names = [str(source) for source in sources]
    context = RunContext(names, output, settings, Options(**options), Prices(settings), books, say)
    run = Run(context, Driver(context, pool), watch=watch, warnings=check(context))
    return await run.execute(handle_signals=handle_signals)
