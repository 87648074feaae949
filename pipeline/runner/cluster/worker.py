"""A worker: runs the ordinary job on parts of an input, into files of their own. Knows nothing of Ray."""

from __future__ import annotations

import os
import shutil
import socket
from array import array
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from pipeline.core.errors import PipelineError
from pipeline.core.types import IdRange
from pipeline.dispatch.live.rate_limiter import RateLimiter
from pipeline.dispatch.live.sender import Statistics
from pipeline.dispatch.live.shared_limits import LeaseBroker, QuotaSync
from pipeline.inputs import reader
from pipeline.inputs.sources import ByteRange, require_unchanged
from pipeline.results import staging, writer
from pipeline.results.staging import Name
from pipeline.runner import options, wiring
from pipeline.runner.cluster.id_registry import Scan
from pipeline.runner.local import LocalRun
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
            part = ShardRun(task, self)
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
        planner = wiring.planner(self._settings, self._options)
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

    def job(self, task: Task) -> tuple[Config, Options, Prices, str]:
        """Return what the job of a part is made with."""
        return self._settings, replace(self._options, limit=task.limit, fresh=False), self._prices, self._run_id

    def rate_limiter_of(self, provider: str, model: str) -> RateLimiter:
        """Return the rate limiter of a model, which stays as long as the worker."""
        name = (provider, model)
        if name not in self._rate_limiters:
            self._rate_limiters[name] = wiring.rate_limiter(self._settings, provider, model)
            self._rate_limiters[name].take_share(self._first_share, 0.0)
        return self._rate_limiters[name]

    async def keep_share(self, clock: Clock) -> None:
        """Keep all parts to the worker's share of the limits; one of them does it at a time."""
        async with self._sharing:
            await QuotaSync(self._broker, clock, rate_limiters=self._shared_rate_limiters, notify=_say_nothing).keep()

    def _shared_rate_limiters(self) -> dict[str, RateLimiter]:
        rate_limiters: dict[str, RateLimiter] = {}
        for part in self._parts.values():
            rate_limiters |= part.sender.rate_limiters() if part.is_begun else {}
        return rate_limiters


class ShardRun(LocalRun):
    """The ordinary job on some lines of the inputs; the driver has opened the books and draws the conclusions."""

    def __init__(self, task: Task, worker: Worker) -> None:
        self.ended = task.ended
        self._task = task
        self._worker = worker
        self.is_begun = False
        self._ends_early = False
        settings, options, prices, run_id = worker.job(task)
        super().__init__(
            task.spans, task.output, settings, options, prices, NullRunLedger(), _say_nothing, run_id=run_id
        )

    async def do(self) -> ShardOutcome:
        """Do the part and tell how it ended; its file is left to the driver."""
        try:
            await self.answer(None)
            trouble = await to_thread.run_sync(self.recorder.publish, b"{}")
        except BaseExceptionGroup as group:
            raise errors.only_one(group) or group from group
        finally:
            self.release()
        if isinstance(self._task.output, str) and trouble is None:  # what is at the store needs no spool any more
            await to_thread.run_sync(shutil.rmtree, self.recorder.path.parent)
        return self.outcome(trouble)

    def outcome(self, trouble: PipelineError | None) -> ShardOutcome:
        """Return how it ended; `trouble` is what kept it from going on, or its results from their store."""
        ended = self.sender.ended_queues if self.is_begun else ()
        return ShardOutcome(
            sender=self.statistics() if self.is_begun else None,
            spent=self.budget.used if self.budget else 0,
            failures=tuple(self.failures),
            ended={(lane.provider, lane.model): lane.ended for lane in ended if lane.ended},
            stopped=trouble or (self.stopped if self.is_begun else None),
        )

    def snapshot(self) -> Snapshot:
        """Return how it is getting on."""
        return Snapshot(
            number=self._task.number,
            output=self._task.output,
            totals=self.run_totals.as_state(),
            sender=self.statistics(),
            wanted=self._wanted(),
            is_waiting=self.budget is not None and self.budget.awaited > 0,
        )

    def end_early(self) -> None:
        """Send nothing new."""
        self._ends_early = True
        if self.is_begun:
            self.stop()

    # ── where it differs from a job of its own ────────────────────────────────────────────────────────────────────

    async def _work(self, scope: anyio.CancelScope) -> None:
        self.is_begun = True
        if self._ends_early:
            self.stop()
        await super()._work(scope)

    def _preview(self) -> tuple[str, ...]:
        return ()

    def _open_lanes(self) -> None:
        pass

    def _hold(self) -> None:
        self.intake.claim(self._task.before)
        self.intake.know(self._task.known)

    def _money(self) -> Budget | None:
        return None if self._task.grant is None else Budget(self._task.grant, is_final=False)

    def _left_over(self) -> AbstractContextManager[Callable[[], None]]:
        return nullcontext(lambda: None)

    def _rate_limiter_of(self, provider: str, model: str) -> RateLimiter:
        return self._worker.rate_limiter_of(provider, model)

    def _sharing(self) -> Callable[[], Coroutine[Any, Any, None]]:
        return partial(self._worker.keep_share, self.clock)

    def _wanted(self) -> int:
        """Return how much more money is waited for, or soon will be."""
        if self.budget is None or self.budget.is_final:
            return 0
        return max(self.budget.awaited, int(self.budget.room < (self._task.grant or 0) // 2))


def own_version() -> str:
    """Return the version of this program that is installed here."""
    return version("pipeline")


def _say_nothing(message: str) -> None:
    """What parts have to say is in their outcome."""
