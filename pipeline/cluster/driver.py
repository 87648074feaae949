"""The driver of a run on a cluster: has parts of the input done by workers and collects their results.

The driver is the one writer of the results file, of the journal beside it and of the ledger. So a run on a cluster is
resumed like any other, with --ray or without, and a line that has a result is sent by nobody. A worker that dies costs
what it had in flight: its part is taken over as it lies there, and another does what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import anyio
import anyio.abc
from anyio import to_thread

from pipeline import assemble, record
from pipeline.assemble import Options
from pipeline.books import Books
from pipeline.chunks import Chunks
from pipeline.cluster import merging
from pipeline.cluster.claims import Scan
from pipeline.cluster.scheduling import Scheduler, Shard
from pipeline.cluster.staging import Name, Part, staging_of, taken_over
from pipeline.cluster.worker import Greeting, Outcome, Snapshot, Task, own_version
from pipeline.config import Config
from pipeline.errors import PipelineError, TryLaterError, UsageError
from pipeline.plan import Claims
from pipeline.pricing import Prices
from pipeline.run import SHOWN_FAILURES, Progress, Run, Watch
from pipeline.send import Statistics
from pipeline.sources import Span, cut, size_of
from pipeline.totals import Summary, Totals

PARTS_AT_ONCE = 2  # of one worker: while one waits for its last answers the other goes on
_PARTS_PER_WORKER = 8  # so that all workers end at about the same time
_SMALLEST_PART = 64 * 1024
_LARGEST_PART = 64 * 1024 * 1024
_LOOK_SECONDS = 0.5
_PARTS_OF_MONEY = 4  # so much smaller is what a part may hold than its share of what is left


class WorkerLostError(Exception):
    """A worker died, or its machine cannot be reached any more."""


class WorkerHandle(Protocol):
    """A worker as the driver sees it. Every call raises `WorkerLostError` where it is not there any more."""

    async def greet(self, place: Name, token: str) -> Greeting: ...

    async def scan(self, span: Span, before: Claims) -> Scan: ...

    async def work(self, task: Task) -> Outcome: ...

    async def progress(self) -> list[Snapshot]: ...

    async def grant(self, number: int, amount: int | None) -> None: ...

    async def stop(self) -> None: ...


class WorkerPool(Protocol):
    """Where workers come from, `size` at a time."""

    size: int

    async def start_worker(
        self, settings: Config, options: Options, *, first_share: float, at_once: int
    ) -> WorkerHandle:
        """Return a new worker, once there is room for it.

        It does `at_once` parts at a time; each has `first_share` of the limits in the beginning.
        """
        ...

    async def kill_all(self) -> None:
        """Let all workers go at once, whatever they do."""
        ...


class Driver(Run):
    """A run whose requests are sent by workers."""

    def __init__(
        self,
        sources: Sequence[str],
        output: str | Path,
        settings: Config,
        options: Options,
        prices: Prices,
        books: Books,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(sources, output, settings, options, prices, books, say)
        self._staging = staging_of(output)
        self._token = ""
        self._left_over: list[Part] = []
        self._pool: WorkerPool
        self._places = 0  # of workers: no more than there is work for
        self._workers: list[WorkerHandle] = []
        self._scheduler: Scheduler
        self._tasks: anyio.abc.TaskGroup
        self._parts: dict[Name, Snapshot] = {}
        self._granted: dict[int, int] = {}
        self._counts: Counter[str] = Counter()
        self._reasons: dict[str, PipelineError] = {}
        self._stopped: PipelineError | None = None

    async def lead(self, pool: WorkerPool, watch: Watch | None, *, handle_signals: bool) -> Summary:
        """Do all of it with these workers."""
        self._pool = pool
        return await self.execute(watch, handle_signals=handle_signals)

    async def answer(self, watch: Watch | None) -> None:
        await to_thread.run_sync(self._open)
        async with anyio.create_task_group() as writing:
            writing.start_soon(self.recorder.run)
            try:
                await self._attend(watch)
                with anyio.CancelScope(shield=True):
                    await self._collect_rest()
            finally:
                self.recorder.close()

    def release(self) -> None:
        for part in self._left_over:
            part.release()
        super().release()

    # ── before ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open_lanes(self) -> None:
        """Take in what workers of a run that was killed have done, before the results are read."""
        self._refuse_open_batches()
        self._token = self._staging.open()
        self._left_over = [self._staging.taken_over(name) for name in self._staging.parts()]
        done = self.recorder.done(Totals()) if self._left_over else record.Done()
        for part in self._left_over:
            for lines, records in part.groups():
                keys = [record.key(each.custom_id, each.digest) for each in records]
                self.recorder.take_in([line for line, key in zip(lines, keys, strict=True) if not done.outcome(key)])
            self.recorder.take_in([], part.unknown())

    def _refuse_open_batches(self) -> None:
        chunks = Chunks(self.recorder.path)
        try:
            chunks.open()
            if chunks.still_open:
                raise UsageError(
                    f"{len(chunks.still_open):,} batch(es) of {str(self.recorder.path)!r} are not collected",
                    hint="collect them first: run the command once without --ray",
                )
        finally:
            chunks.release()

    def _hold(self) -> None:
        """Nothing is elsewhere any more."""

    # ── workers ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _work(self, scope: anyio.CancelScope) -> None:
        while self._left_over:  # all of it is in the results and in the journal by now
            await to_thread.run_sync(self._left_over.pop().remove)
        size = await to_thread.run_sync(_size_of, self.sources)
        self._places = min(self._pool.size, -(-size // _SMALLEST_PART) or 1)
        part_bytes = min(max(size // (self._places * _PARTS_PER_WORKER), _SMALLEST_PART), _LARGEST_PART)
        self._scheduler = Scheduler(
            (span for source in self.sources for span in cut(source, part_bytes)),
            self.intake,
            ahead=PARTS_AT_ONCE * self._places,
            limit=self.options.limit,
        )
        async with anyio.create_task_group() as self._tasks:
            if self.is_draining:
                self._scheduler.stop()
            self._tasks.start_soon(self._expect_workers, assemble.patience(self.settings))
            for _ in range(self._places):
                self._tasks.start_soon(self._keep_worker)
            while not self._scheduler.is_over:
                await self._scheduler.change()
            self._tasks.cancel_scope.cancel()

    async def _keep_worker(self) -> None:
        """Keep one place manned while there is work."""
        concurrency = max(1, self.settings.sending.concurrency // PARTS_AT_ONCE)
        settings = self.settings.with_("sending", concurrency=concurrency)
        while not self._scheduler.is_over:
            first_share = 1 / (self._places * PARTS_AT_ONCE)
            worker = await self._pool.start_worker(
                settings, self.options, first_share=first_share, at_once=PARTS_AT_ONCE
            )
            try:
                _require_same_version(await worker.greet(self._staging.place, self._token))
            except PipelineError as exc:
                self._end(exc)
                return
            except WorkerLostError:
                continue
            self._workers.append(worker)
            async with anyio.create_task_group() as beside:
                beside.start_soon(self._monitor, worker)
                async with anyio.create_task_group() as group:
                    for _ in range(PARTS_AT_ONCE):
                        group.start_soon(self._feed, worker)
                beside.cancel_scope.cancel()
            self._workers.remove(worker)

    async def _feed(self, worker: WorkerHandle) -> None:
        """Give a worker part after part until nothing is left, or it is lost."""
        try:
            while not self._scheduler.is_over:
                if shard := self._scheduler.next_to_do():
                    await self._have_done(worker, shard)
                elif shard := await self._scheduler.next_to_scan():
                    await self._have_scanned(worker, shard)
                else:
                    await self._scheduler.change()
        except WorkerLostError as exc:
            self.say(f"a worker was lost, others do what it left: {exc}")

    async def _expect_workers(self, patience: float) -> None:
        """End the run when nobody is there to do anything for so many seconds."""
        since = self.clock.now()
        while self.clock.now() - since < patience:
            if self._workers:
                since = self.clock.now()
            await anyio.sleep(_LOOK_SECONDS)
        self._end(
            TryLaterError(
                f"no worker could be had within {patience:,.0f} s",
                hint="the cluster has no room: wait, or add machines to it",
            )
        )

    async def _monitor(self, worker: WorkerHandle) -> None:
        """Ask a worker now and then how it is getting on, and give it the money that it needs."""
        try:
            while True:
                await anyio.sleep(_LOOK_SECONDS)
                for snapshot in await worker.progress():
                    if snapshot.number in self._granted:
                        self._parts[snapshot.output] = snapshot
                        if snapshot.wanted and self.budget:
                            await worker.grant(snapshot.number, self._grant(snapshot.number, snapshot.wanted))
        except WorkerLostError:
            return  # who has parts done by it will hear of it, too

    def _grant(self, number: int, wanted: int) -> int | None:
        """Set money aside for a part: a fraction of what is left, or all that it wants; None where that is not there.

        Without a budget it is nothing, and not asked for.
        """
        if self.budget is None:
            self._granted[number] = 0
            return None
        share = max(0, self.budget.room) // (_PARTS_OF_MONEY * PARTS_AT_ONCE * self._places)
        amount = max(wanted, share)
        if not self.budget.try_reserve(amount):
            return None
        self._granted[number] = self._granted.get(number, 0) + amount
        return amount

    def _settle(self, number: int, spent: int | None) -> None:
        """Take what a part spent, and back what it did not; None: all that it held may be spent."""
        granted = self._granted.pop(number)
        if self.budget:
            self.budget.settle(granted, granted if spent is None else spent)

    # ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _have_scanned(self, worker: WorkerHandle, shard: Shard) -> None:
        try:
            scan = await worker.scan(shard.span, shard.before)
        except PipelineError as exc:
            self._scheduler.unscanned(shard)
            self._end(exc)
        except BaseException:
            self._scheduler.unscanned(shard)
            raise
        else:
            self._scheduler.scanned(shard, scan)

    async def _have_done(self, worker: WorkerHandle, shard: Shard) -> None:
        output = self._staging.new_part(shard.number)
        task = Task(
            number=shard.number,
            span=shard.span,
            output=output,
            limit=shard.limit,
            known=shard.known,
            before=shard.before,
            grant=self._grant(shard.number, 0),
        )
        spent = None
        try:
            outcome = await worker.work(task)
            spent = outcome.spent
        except WorkerLostError:
            self._scheduler.undone(shard, await self._collect(output, is_lost=True))
            raise
        finally:
            self._settle(shard.number, spent)
            self._parts.pop(output, None)
        self._heed(outcome)
        await self._collect(output)
        self._scheduler.done()

    def _heed(self, outcome: Outcome) -> None:
        """Take what a part tells beside its results."""
        if sender := outcome.sender:
            self._counts.update(merging.counts(sender))
        self.failures += outcome.failures[: max(0, SHOWN_FAILURES - len(self.failures))]
        for each in outcome.reasons:
            self._reasons.setdefault(each.message, each)
        if (reason := outcome.error or outcome.stopped) is not None:
            self._end(reason)

    async def _collect(self, name: Name, *, is_lost: bool = False) -> list[int]:
        """Take the results of a part into ours, then remove it; return their keys.

        Of a part whose worker was lost, what lies there is what is known of its calls; where that is not all, what it
        was seen to do.
        """
        keys: list[int] = []
        counts: Counter[str] = Counter()
        part = await taken_over(self._staging, name, assemble.patience(self.settings))
        try:
            groups = part.groups()
            while group := await to_thread.run_sync(next, groups, None):
                lines, records = group
                await self.recorder.append_lines(lines)
                for each in records:
                    keys.append(record.key(each.custom_id, each.digest))
                    self.run_totals.add(each)
                    self.books.accounts.add(each, each.completed_at[:10])
                    counts.update(merging.counts_of(each))
            if unknown := part.unknown():
                await self.recorder.adopt(unknown)
            await to_thread.run_sync(part.remove)
        finally:
            part.release()
        if is_lost:
            untold = len(unknown)
            if not part.tells_calls and (seen := self._parts.get(name)):
                untold = max(0, seen.sender.attempts - counts["attempts"])
            self._counts.update(counts)
            self._counts.update(attempts=untold, unknown=untold)
        return keys

    async def _collect_rest(self) -> None:
        """Collect what workers have done that were sent away."""
        await self._pool.kill_all()
        for name in await to_thread.run_sync(self._staging.parts):
            await self._collect(name, is_lost=True)
        await to_thread.run_sync(self._staging.close)

    # ── what it is asked ──────────────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> str:
        count = self.statistics().in_flight
        self._end(None)
        return f"finishing about {count:,} request(s) in flight"

    def _end(self, reason: PipelineError | None) -> None:
        """Send nothing new; what is in flight is finished."""
        if reason:
            self._stopped = self._stopped or reason
        self._scheduler.stop()
        for worker in self._workers:
            self._tasks.start_soon(self._stop_one, worker)

    async def _stop_one(self, worker: WorkerHandle) -> None:
        try:
            await worker.stop()
        except WorkerLostError:
            return

    def statistics(self) -> Statistics:
        return merging.statistics(self._counts, [part.sender for part in self._parts.values()])

    def progress(self) -> Progress:
        run = Totals()
        run.add_state(self.run_totals.as_state())
        for part in self._parts.values():
            run.add_state(part.totals)
        return replace(super().progress(), run=run)

    def reasons(self, *, is_unfinished: bool) -> list[PipelineError]:
        stopped = [self._stopped] if self._stopped else []
        return stopped + [each for each in self._reasons.values() if each not in stopped]

    @property
    def stopped(self) -> PipelineError | None:
        return self._stopped

    @property
    def is_draining(self) -> bool:
        return self._stopped is not None or self.signal is not None


def _size_of(sources: Sequence[str]) -> int:
    return sum(map(size_of, sources))


def _require_same_version(greeting: Greeting) -> None:
    if greeting.version != own_version():
        raise UsageError(
            f"{greeting.host} has pipeline {greeting.version}, and this machine {own_version()}",
            hint="install the same version on all machines of the cluster",
        )
