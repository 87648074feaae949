"""A worker: runs the ordinary job on parts of an input, into files of their own. Knows nothing of Ray."""

from __future__ import annotations

import os
import shutil
import socket
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import anyio
from anyio import to_thread

from pipeline import aio, assemble, errors, read, record
from pipeline.assemble import Options
from pipeline.books import NoBooks
from pipeline.budget import Budget
from pipeline.cluster import staging
from pipeline.cluster.claims import Scan
from pipeline.cluster.staging import Name
from pipeline.config import Config
from pipeline.errors import PipelineError, TryLaterError
from pipeline.job import Job
from pipeline.plan import Claims
from pipeline.pricing import Prices
from pipeline.send import Statistics
from pipeline.sharing import Lessor
from pipeline.sources import Span, stamp_of
from pipeline.types import Limit

_SMALLEST_SHARE = 0.01  # of limits, where no part has left one


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A part to be done: some lines of an input, into the file `output`.

    `limit` bounds the lines, `known` are the keys of those that have results already, `before` is what must be known
    of the ids of other parts, `grant` the money that may be spent (nano-dollars; None: as much as it takes).
    """

    number: int
    span: Span
    output: Name
    limit: int | None
    known: Sequence[int]
    before: Claims
    grant: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A part at a moment: its results so far (`Totals.as_state`), what is sent, the money that it waits for."""

    number: int
    output: Name
    totals: dict[str, Any]
    sender: Statistics
    wanted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a part ended. Its results lie in its file; `sender` counts its calls, `spent` is its money.

    `error` is why it could not be done, or its results not be brought to their store; `stopped` why nothing more may be
    sent, `reasons` why some of it was not. `failures` tells the first few lines that failed.
    """

    sender: Statistics | None = None
    spent: int = 0
    failures: tuple[str, ...] = ()
    reasons: tuple[PipelineError, ...] = ()
    stopped: PipelineError | None = None
    error: PipelineError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """Who a worker is."""

    host: str
    process: int
    version: str


class Worker:
    """Does parts, `at_once` at most. Each has `first_share` of the limits until the lessor tells its own.

    A part that begins later takes the place of one that has ended, and so its share.
    """

    def __init__(
        self,
        settings: Config,
        options: Options,
        *,
        run_id: str,
        lessor: Callable[[str], Lessor],
        first_share: float,
        at_once: int,
    ) -> None:
        self._settings = settings
        self._options = options
        self._run_id = run_id
        self._lessor = lessor
        self._largest_share = 1 / at_once
        self._shares = [first_share] * at_once
        self._prices = Prices(settings)
        self._told: dict[tuple[str, str], Sequence[Limit]] = {}
        self._parts: dict[int, _Part] = {}
        self._is_stopping = False
        aio.tune()

    def __repr__(self) -> str:
        doing = ", ".join(f"part {number}" for number in self._parts) or "idle"
        return f"pipeline worker ({doing})"

    async def greet(self, place: Name, token: str) -> Greeting:
        """Say who this is. Raises `UsageError` where the staging area is not seen from here."""
        await to_thread.run_sync(staging.check_visible, place, token)
        return Greeting(host=socket.gethostname(), process=os.getpid(), version=own_version())

    async def scan(self, span: Span, before: Claims) -> Scan:
        """Plan the lines of a span and tell what they are."""
        return await to_thread.run_sync(self._scan, span, before)

    async def work(self, task: Task) -> Outcome:
        """Do a part; what goes wrong is in the outcome."""
        try:
            _require_unchanged(task.span)
            part = _Part(
                task,
                self._settings,
                self._options,
                self._prices,
                run_id=self._run_id,
                lessor=self._lessor(f"{self._run_id}/{task.number}"),
                first_share=self._shares.pop() if self._shares else _SMALLEST_SHARE,
                told=self._told,
            )
            self._parts[task.number] = part
            if self._is_stopping:
                return Outcome()
            outcome = await part.do()
            self._told |= part.sender.told()
            self._shares.append(min(part.sender.share(), self._largest_share))
            return outcome
        except PipelineError as exc:
            return Outcome(error=exc)
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

    def _scan(self, span: Span, before: Claims) -> Scan:
        _require_unchanged(span)
        planner = assemble.planner(self._settings, self._options)
        planner.claim(before)
        keys = array("Q")
        lines = 0
        for batch in read.batches([span], self._settings.input.max_line_bytes):
            items = map(planner.plan, batch.lines())
            keys.extend(record.key(item.custom_id, item.digest) for item in items)
            lines += batch.count
        return Scan(lines=lines, keys=keys, claims=planner.take_claims(), before=before)


class _Part(Job):
    """The ordinary job on some lines of an input; the driver has opened the books and draws the conclusions."""

    def __init__(
        self,
        task: Task,
        settings: Config,
        options: Options,
        prices: Prices,
        *,
        run_id: str,
        lessor: Lessor,
        first_share: float,
        told: assemble.Told,
    ) -> None:
        self.first_share = first_share
        self.told = told
        self._task = task
        self._share_lessor = lessor
        self.is_begun = False
        self._ends_early = False
        options = replace(options, limit=task.limit, fresh=False)
        super().__init__([task.span], task.output, settings, options, prices, NoBooks(), _say_nothing, run_id=run_id)

    async def do(self) -> Outcome:
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
        return Outcome(
            sender=self.statistics(),
            spent=self.budget.used if self.budget else 0,
            failures=tuple(self.failures),
            reasons=tuple(self.reasons(is_unfinished=True)),
            stopped=self.stopped,
            error=trouble,
        )

    def snapshot(self) -> Snapshot:
        """Return how it is getting on."""
        return Snapshot(
            number=self._task.number,
            output=self._task.output,
            totals=self.run_totals.as_state(),
            sender=self.statistics(),
            wanted=self._wanted(),
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

    def _lessor(self) -> Lessor:
        return self._share_lessor

    def _wanted(self) -> int:
        """Return how much more money is waited for, or soon will be."""
        if self.budget is None or self.budget.is_final:
            return 0
        return max(self.budget.awaited, int(self.budget.room < (self._task.grant or 0) // 2))


def own_version() -> str:
    """Return the version of this program that is installed here."""
    return version("pipeline")


def _require_unchanged(span: Span) -> None:
    if stamp_of(span.source) != span.stamp:
        raise TryLaterError(f"the input {span.source!r} was changed while it was being read", hint="repeat the command")


def _say_nothing(message: str) -> None:
    """What parts have to say is in their outcome."""
