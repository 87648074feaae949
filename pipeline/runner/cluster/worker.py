"""A worker: runs the ordinary job on parts of an input, into files of their own. Knows nothing of Ray."""

from __future__ import annotations

import os
import shutil
import socket
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import anyio
from anyio import to_thread

from pipeline.accounting.budget import Budget
from pipeline.accounting.pricing import Prices
from pipeline.accounting.run_ledger import NullRunLedger
from pipeline.core import errors
from pipeline.core import process as aio
from pipeline.core.clock import Clock
from pipeline.core.config import Config
from pipeline.core.errors import PipelineError, TryLaterError
from pipeline.core.types import IdRange
from pipeline.dispatch.live.rate_limiter import RateLimiter
from pipeline.dispatch.live.sender import Statistics
from pipeline.dispatch.live.shared_limits import LeaseBroker, QuotaSync
from pipeline.inputs import reader
from pipeline.inputs.sources import ByteRange, require_unchanged
from pipeline.results import staging, writer
from pipeline.results.staging import Name
from pipeline.results.totals import Totals
from pipeline.runner import factory, options
from pipeline.runner.cluster.id_registry import Scan
from pipeline.runner.context import RunContext
from pipeline.runner.executor import WorkPhase
from pipeline.runner.local import LocalExecutor, with_possible_concurrency
from pipeline.runner.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A part to be done: some lines of the inputs, into the file `output`.

    `limit` bounds the lines, `known` are the keys of those that have results already, `before` is what must be known
    of the ids of other parts, `grant` the money that may be spent (nano-dollars; None: as much as it takes), `ended`
    the models that are given up.
    """

    number: int
    spans: tuple[ByteRange, ...]
    output: Name
    limit: int | None
    known: Sequence[int]
    before: IdRange
    grant: int | None
    ended: options.Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A part at a moment: its results so far (`Totals.as_state`), what is sent, the money that it wants."""

    number: int
    output: Name
    totals: dict[str, Any]
    sender: Statistics
    wanted: int
    is_waiting: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOutcome:
    """How a part ended. Its results lie in its file; `sender` counts its calls, `spent` is its money.

    `stopped` is why nothing more may be sent by anybody, `ended` which models were given up. `failures` tells the first
    few lines that failed.
    """

    sender: Statistics | None = None
    spent: int = 0
    failures: tuple[str, ...] = ()
    ended: options.Ended = field(default_factory=dict)
    stopped: PipelineError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """Who a worker is."""

    host: str
    process: int
    version: str


class Worker:
    """Does parts, several at a time, behind the same rate limiters: what one learns of a model's limits holds for all.

    A rate limiter begins with `first_share` of the limits, until the broker tells the worker's own.
    """

    def __init__(
        self, settings: Config, options: Options, *, run_id: str, broker: LeaseBroker, first_share: float
    ) -> None:
        self._settings = settings
        self._options = options
        self._run_id = run_id
        self._broker = broker
        self._first_share = first_share
        self._prices = Prices(settings)
        self._rate_limiters: dict[tuple[str, str], RateLimiter] = {}
        self._sharing = anyio.Lock()
        self._parts: dict[int, ShardRun] = {}
        self._is_stopping = False
        aio.tune_gc()

    def __repr__(self) -> str:
        doing = ", ".join(f"part {number}" for number in self._parts) or "idle"
        return f"pipeline worker ({doing})"

    async def greet(self, place: Name, token: str) -> Greeting:
        """Say who this is. Raises `UsageError` where the staging area is not seen from here."""
        await to_thread.run_sync(staging.check_visible, place, token)
        return Greeting(host=socket.gethostname(), process=os.getpid(), version=own_version())

    async def scan(self, spans: Sequence[ByteRange], before: IdRange) -> Scan:
        """Plan the lines of some spans and tell what they are."""
        return await to_thread.run_sync(self._scan, spans, before)

    async def work(self, task: Task) -> ShardOutcome:
        """Do a part; what goes wrong is in the outcome."""
        part: ShardRun | None = None
        try:
            for span in task.spans:
                require_unchanged(span)
            part = self._part(task)
            self._parts[task.number] = part
            return ShardOutcome() if self._is_stopping else await part.do()
        except PipelineError as exc:
            return part.outcome(exc) if part else ShardOutcome(stopped=exc)
        finally:
            self._parts.pop(task.number, None)

    async def progress(self) -> list[Snapshot]:
        """Return how all parts are getting on."""
        return [part.snapshot() for part in self._parts.values() if part.is_begun]

    async def grant(self, number: int, amount: int | None) -> None:
        """Give a part more money; None: there is no more."""
        part = self._parts.get(number)
        if part and part.budget:
            part.budget.grant(amount)

    async def stop(self) -> None:
        """Send nothing new; what is in flight is finished."""
        self._is_stopping = True
        for part in self._parts.values():
            part.end_early()

    def _scan(self, spans: Sequence[ByteRange], before: IdRange) -> Scan:
        planner = factory.planner(self._settings, self._options)
        planner.claim(before)
        keys = array("Q")
        lines = 0
        for span in spans:
            lines = 0
            require_unchanged(span)
            for batch in reader.batches([span], self._settings.input.max_line_bytes):
                items = map(planner.plan, batch.lines())
                keys.extend(writer.key(item.custom_id, item.digest) for item in items)
                lines += batch.count
            require_unchanged(span)
        return Scan(lines=lines, keys=keys, claims=planner.take_claims(), before=before)

    # ── what its parts share ──────────────────────────────────────────────────────────────────────────────────────

    def _part(self, task: Task) -> ShardRun:
        context = RunContext(
            task.spans,
            task.output,
            with_possible_concurrency(self._settings),
            replace(self._options, limit=task.limit, fresh=False),
            self._prices,
            NullRunLedger(),
            _say_nothing,
            run_id=self._run_id,
        )
        executor = LocalExecutor(
            context,
            rate_limiter_of=self.rate_limiter_of,
            keep_share=partial(self.keep_share, context.clock),
            ended=task.ended,
        )
        return ShardRun(task, context, executor)

    def rate_limiter_of(self, provider: str, model: str) -> RateLimiter:
        """Return the rate limiter of a model, which stays as long as the worker."""
        name = (provider, model)
        if name not in self._rate_limiters:
            self._rate_limiters[name] = factory.rate_limiter(self._settings, provider, model)
            self._rate_limiters[name].take_share(self._first_share, 0.0)
        return self._rate_limiters[name]

    async def keep_share(self, clock: Clock) -> None:
        """Keep all parts to the worker's share of the limits; one of them does it at a time."""
        async with self._sharing:
            await QuotaSync(self._broker, clock, rate_limiters=self._shared_rate_limiters, notify=_say_nothing).keep()

    def _shared_rate_limiters(self) -> dict[str, RateLimiter]:
        rate_limiters: dict[str, RateLimiter] = {}
        for part in self._parts.values():
            rate_limiters |= part.rate_limiters() if part.is_begun else {}
        return rate_limiters


class ShardRun:
    """A part of the input, sent from this worker into a file of its own.

    Unlike `Run` it takes money and known results from the driver, and leaves summary and ledger to it.
    """

    def __init__(self, task: Task, context: RunContext, executor: LocalExecutor) -> None:
        self.is_begun = False
        self._ends_early = False
        self._task = task
        self._context = context
        self._executor = executor
        drain_timeout = context.settings.sending.drain_timeout
        self._phase = WorkPhase(executor.stop, _say_nothing, drain_timeout=drain_timeout, beside=[self._begin])
        context.on_storage_error = self._on_storage_error
        if task.grant is not None:
            context.budget = Budget(task.grant, is_final=False)

    @property
    def budget(self) -> Budget | None:
        """The money of this part; None without a cap."""
        return self._context.budget

    async def do(self) -> ShardOutcome:
        """Do the part and tell how it ended; its file is left to the driver."""
        writer = self._context.writer
        try:
            await to_thread.run_sync(self._open)
            async with anyio.create_task_group() as writing:
                writing.start_soon(writer.run)
                try:
                    await self._executor.execute(self._phase)
                finally:
                    writer.stop()
            trouble = await to_thread.run_sync(writer.publish, b"{}")
        except BaseExceptionGroup as group:
            raise errors.only_one(group) or group from group
        finally:
            writer.close()
        if isinstance(self._task.output, str) and trouble is None:  # what is at the store needs no local copy
            await to_thread.run_sync(shutil.rmtree, writer.path.parent)
        return self.outcome(trouble)

    def outcome(self, trouble: PipelineError | None) -> ShardOutcome:
        """Return how it ended; `trouble` is what kept it from going on, or its results from their store."""
        budget = self.budget
        spent = budget.used if budget else 0
        failures = tuple(self._context.failures)
        if not self.is_begun:
            return ShardOutcome(spent=spent, failures=failures, stopped=trouble)
        sent = self._executor.statistics()
        ended = self._executor.sender.ended_queues
        return ShardOutcome(
            sender=sent.live,
            spent=spent,
            failures=failures,
            ended={(queue.provider, queue.model): queue.ended for queue in ended if queue.ended},
            stopped=trouble or sent.stopped,
        )

    def snapshot(self) -> Snapshot:
        """Return how it is getting on."""
        budget = self.budget
        return Snapshot(
            number=self._task.number,
            output=self._task.output,
            totals=self._context.totals.as_state(),
            sender=self._executor.statistics().live,
            wanted=self._wanted(),
            is_waiting=budget is not None and budget.awaited > 0,
        )

    def rate_limiters(self) -> dict[str, RateLimiter]:
        """Return the rate limiters that this part uses."""
        return self._executor.sender.rate_limiters()

    def end_early(self) -> None:
        """Send nothing new."""
        self._ends_early = True
        if self.is_begun:
            self._executor.stop()

    def _open(self) -> None:
        writer, feed = self._context.writer, self._context.feed
        writer.open()
        feed.learn(writer.done(Totals()))
        feed.claim(self._task.before)
        feed.skip_done(self._task.known)
        writer.begin()

    async def _begin(self) -> None:
        """Note that requests are being sent; a stop that came before takes effect now."""
        self.is_begun = True
        if self._ends_early:
            self._executor.stop()

    def _on_storage_error(self, error: PipelineError) -> None:
        if isinstance(error, TryLaterError):
            self._phase.drain()

    def _wanted(self) -> int:
        """Return how much more money is waited for, or soon will be."""
        budget = self.budget
        if budget is None or budget.is_final:
            return 0
        return max(budget.awaited, int(budget.room < (self._task.grant or 0) // 2))


def own_version() -> str:
    """Return the version of this program that is installed here."""
    return version("pipeline")


def _say_nothing(message: str) -> None:
    """What parts have to say is in their outcome."""
