"""The driver of a run on a cluster: has parts of the input done by workers and collects their results.

The driver is the one writer of the results file, of the journal beside it and of the ledger. So a run on a cluster is
resumed like any other, with --ray or without, and a line that has a result is sent by nobody. A worker that dies costs
what it had in flight: its part is taken over as it lies there, and another does what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import anyio
import anyio.abc
from anyio import to_thread

from pipeline.core import config
from pipeline.core.config import Config
from pipeline.core.errors import BudgetReachedError, PipelineError, StorageError, TryLaterError, UsageError
from pipeline.core.hashing import FingerprintSet
from pipeline.core.types import IdRange, Request
from pipeline.dispatch.batch.store import BatchStore
from pipeline.inputs.sources import ByteRange, size_of
from pipeline.results import staging, writer
from pipeline.results.codec import StoredResult
from pipeline.results.staging import Name, staging_of, taken_over
from pipeline.results.totals import Totals
from pipeline.runner.cluster.id_registry import Scan
from pipeline.runner.cluster.scheduler import Scheduler, Shard
from pipeline.runner.cluster.statistics import combined, counts, counts_of
from pipeline.runner.cluster.worker import Greeting, ShardOutcome, Snapshot, Task, own_version
from pipeline.runner.context import SHOWN_FAILURES, RunContext
from pipeline.runner.executor import ExecutorStatistics, WorkPhase
from pipeline.runner.options import Options

PARTS_AT_ONCE = 2  # of one worker: while one waits for its last answers the other goes on
_PARTS_PER_WORKER = 8  # so that all workers end at about the same time
_SMALLEST_PART = 64 * 1024
_LARGEST_PART = 64 * 1024 * 1024
_LOOK_SECONDS = 0.5
_SILENT_SECONDS = 60.0  # a worker that does not say how it is getting on for so long is as good as dead
_LONGEST_PAUSE = 10.0  # before a worker is started in the place of one that did nothing
_MOST_LOSSES = 3  # in a row: of one part with its worker, of workers that did nothing
_LAST_SECONDS = 20.0  # in which what is in flight is finished when the cluster is lost: Ray ends a program after 60
_LOCK_SECONDS = 5.0  # for which parts are waited for then
_PARTS_OF_MONEY = 4  # so much smaller is what a part may hold than its share of what is left


class WorkerLostError(Exception):
    """A worker died, or its machine cannot be reached any more."""


class WorkerHandle(Protocol):
    """A worker as the driver sees it. Every call raises `WorkerLostError` where it is not there any more."""

    async def greet(self, place: Name, token: str) -> Greeting: ...

    async def scan(self, spans: Sequence[ByteRange], before: IdRange) -> Scan: ...

    async def work(self, task: Task) -> ShardOutcome: ...

    async def progress(self) -> list[Snapshot]: ...

    async def grant(self, number: int, amount: int | None) -> None: ...

    async def stop(self) -> None: ...

    async def kill(self) -> None: ...


class WorkerPool(Protocol):
    """Where workers come from, `size` at a time."""

    size: int

    async def start_worker(self, settings: Config, options: Options, *, first_share: float) -> WorkerHandle:
        """Return a new worker, once there is room for it; `first_share` is its share of limits in the beginning."""
        ...

    async def kill_all(self) -> None:
        """Let all workers go at once, whatever they do."""
        ...

    async def until_lost(self) -> PipelineError:
        """Return why nothing can go on, once that is so."""
        ...


class Driver:
    """Sends the requests of a run through the workers of a pool, and collects their results.

    Mutable while it works: the workers, what each part holds of the money (`_granted`) and was last seen to do
    (`_parts`), what was counted and collected, and why it ended.
    """

    def __init__(self, context: RunContext, pool: WorkerPool) -> None:
        settings = context.settings
        self._context = context
        self._pool = pool
        self._staging = staging_of(context.output)
        self._token = ""
        self._places = 1  # of workers: as many as there is work for
        self._at_once = min(PARTS_AT_ONCE, settings.sending.concurrency)
        self._workers: list[WorkerHandle] = []
        self._scheduler = Scheduler(context.sources, context.feed, limit=context.options.limit)
        self._tasks: anyio.abc.TaskGroup | None = None
        self._parts: dict[Name, Snapshot] = {}
        self._granted: dict[int, int] = {}
        self._collected = FingerprintSet()
        self._counts: Counter[str] = Counter()
        self._ended: dict[tuple[str, str], PipelineError] = {}
        self._stopped: PipelineError | None = None
        self._is_lost = False  # the cluster is
        self._phase: WorkPhase | None = None

    def open(self, resources: ExitStack) -> Iterable[Request]:
        """Refuse an output with open batches: only a run on one machine collects them."""
        store = BatchStore(self._context.writer.path)
        try:
            store.open()
            if store.still_open:
                raise UsageError(
                    f"{len(store.still_open):,} batch(es) of {str(self._context.writer.path)!r} are not collected",
                    hint="collect them first: run the command once without --ray",
                )
        finally:
            store.release()
        return ()

    async def execute(self, phase: WorkPhase) -> None:
        self._phase = phase
        async with phase.begin() as scope:
            await self._work(scope)
        with anyio.CancelScope(shield=True):
            await self._collect_rest()

    # ── workers ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _work(self, scope: anyio.CancelScope) -> None:
        self._token = await to_thread.run_sync(self._staging.open)
        size = await to_thread.run_sync(_size_of, self._context.sources)
        self._places = min(self._pool.size, -(-size // _SMALLEST_PART) or 1)
        part_bytes = min(max(size // (self._places * _PARTS_PER_WORKER), _SMALLEST_PART), _LARGEST_PART)
        self._scheduler.begin(part_bytes, ahead=self._at_once * self._places)
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._expect_workers, config.poll_policy(self._context.settings))
            self._tasks.start_soon(self._expect_loss, scope)
            self._tasks.start_soon(self._beat)
            for _ in range(self._places):
                self._tasks.start_soon(self._keep_worker)
            while not self._scheduler.is_over:
                await self._scheduler.change.wait()
            self._tasks.cancel_scope.cancel()

    async def _keep_worker(self) -> None:
        """Keep one place manned while there is work."""
        settings = self._context.settings.with_(
            "sending", concurrency=self._context.settings.sending.concurrency // self._at_once
        )
        losses = 0
        while not (self._scheduler.is_over or self._scheduler.is_stopped):
            try:
                worker = await self._pool.start_worker(settings, self._context.options, first_share=1 / self._places)
                _require_same_version(await worker.greet(self._staging.place, self._token))
                is_new = not await self._employ(worker)
            except PipelineError as exc:
                self._end(exc)
                return
            except WorkerLostError as exc:
                is_new = True
                self._context.notify(f"a worker could not be started: {exc}")
                if losses + 1 >= _MOST_LOSSES:
                    hint = "check that all machines of the cluster have the same version of pipeline installed"
                    self._end(UsageError(f"no worker can be started: {exc}", hint=hint))
                    return
            losses = losses + 1 if is_new else 0
            await anyio.sleep(min(_LONGEST_PAUSE, _LOOK_SECONDS * (2**losses - 1)))

    async def _employ(self, worker: WorkerHandle) -> bool:
        """Have a worker do parts until nothing is left, or it is lost; return whether it did any."""
        done = 0

        async def feed() -> None:
            nonlocal done
            try:
                while not self._scheduler.is_over:
                    change = self._scheduler.change
                    if shard := self._scheduler.next_to_do():
                        await self._have_done(worker, shard)
                        done += 1
                    elif shard := await self._scheduler.next_to_scan():
                        await self._have_scanned(worker, shard)
                    else:
                        await change.wait()
            except PipelineError as exc:
                self._end(exc)
            except WorkerLostError as exc:
                if worker in self._workers:
                    self._workers.remove(worker)
                    self._context.notify(f"a worker was lost, others take over its lines: {exc}")

        self._workers.append(worker)
        async with anyio.create_task_group() as beside:
            beside.start_soon(self._monitor, worker)
            async with anyio.create_task_group() as group:
                for _ in range(self._at_once):
                    group.start_soon(feed)
            beside.cancel_scope.cancel()
        return done > 0

    async def _expect_workers(self, patience: float) -> None:
        """End the run when nobody is there to do anything for so many seconds."""
        since = self._context.clock.now()
        while self._context.clock.now() - since < patience:
            if self._workers:
                since = self._context.clock.now()
            await anyio.sleep(_LOOK_SECONDS)
        self._end(
            TryLaterError(
                f"no worker could be started within {patience:,.0f} s",
                hint="the cluster has no free capacity: wait, or add machines",
            )
        )

    async def _expect_loss(self, scope: anyio.CancelScope) -> None:
        """When the cluster is lost, finish what is in flight while the workers are there, and conclude the run."""
        self._end(await self._pool.until_lost())
        self._is_lost = True
        scope.deadline = min(scope.deadline, anyio.current_time() + _LAST_SECONDS)

    async def _beat(self) -> None:
        while True:
            await anyio.sleep(staging.BEAT_SECONDS)
            await to_thread.run_sync(self._staging.beat)

    async def _monitor(self, worker: WorkerHandle) -> None:
        """Ask a worker for its progress now and then, and grant it the budget that it needs."""
        try:
            while True:
                await anyio.sleep(_LOOK_SECONDS)
                with anyio.fail_after(_SILENT_SECONDS):
                    snapshots = await worker.progress()
                for snapshot in snapshots:
                    if snapshot.number in self._granted:
                        self._parts[snapshot.output] = snapshot
                        if snapshot.wanted:
                            await self._give_more(worker, snapshot)
        except TimeoutError:
            await worker.kill()
        except WorkerLostError:
            return  # the tasks that wait for its parts get the same error and handle it

    # ── money ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _first_grant(self, number: int) -> int | None:
        """Set money aside for a part that begins: a fraction of what is left; None without a budget."""
        self._granted[number] = 0
        return self._set_aside(number, self._share_of_money()) if self._context.budget else None

    async def _give_more(self, worker: WorkerHandle, snapshot: Snapshot) -> None:
        """Grant a part more of the budget, or tell it that nothing is left. 0 means: not now."""
        amount = self._grant(snapshot)
        if amount != 0:
            await worker.grant(snapshot.number, amount)

    def _grant(self, snapshot: Snapshot) -> int | None:
        """Set more money aside for a part; 0: not now, None: there is no more.

        While others hold some that they may give back, who waits for it goes on waiting.
        """
        assert self._context.budget is not None
        share = self._share_of_money()
        if not snapshot.is_waiting:
            return self._set_aside(snapshot.number, share)
        if amount := self._set_aside(snapshot.number, max(snapshot.wanted, share)):
            return amount
        if amount := self._set_aside(snapshot.number, snapshot.wanted):
            return amount
        all_wait = len(self._parts) == len(self._granted) and all(part.is_waiting for part in self._parts.values())
        return None if all_wait else 0

    def _set_aside(self, number: int, amount: int) -> int:
        assert self._context.budget is not None
        if not self._context.budget.try_reserve(amount):
            return 0
        self._granted[number] += amount
        return amount

    def _share_of_money(self) -> int:
        assert self._context.budget is not None
        return max(0, self._context.budget.room) // (_PARTS_OF_MONEY * self._at_once * self._places)

    def _settle(self, number: int, spent: int | None) -> None:
        """Take what a part spent, and back what it did not; None: all that it held may be spent."""
        granted = self._granted.pop(number)
        if self._context.budget:
            self._context.budget.settle(granted, granted if spent is None else spent)

    # ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _have_scanned(self, worker: WorkerHandle, shard: Shard) -> None:
        try:
            scan = await worker.scan(shard.spans, shard.before)
        except BaseException as exc:
            self._scheduler.unscanned(shard, is_lost=isinstance(exc, WorkerLostError))
            self._look_at_losses(shard)
            raise
        self._scheduler.scanned(shard, scan)

    async def _have_done(self, worker: WorkerHandle, shard: Shard) -> None:
        output = self._staging.new_part(shard.number)
        task = Task(
            number=shard.number,
            spans=shard.spans,
            output=output,
            limit=shard.limit,
            known=shard.known,
            before=shard.before,
            grant=self._first_grant(shard.number),
            ended=dict(self._ended),
        )
        spent: int | None = None
        try:
            outcome = await worker.work(task)
            spent = outcome.spent
        except WorkerLostError:
            with anyio.CancelScope(shield=True):
                try:
                    lost = await self._collect(output, is_lost=True)
                except PipelineError:
                    self._scheduler.done()  # nobody can do it as long as it lies there
                    raise
                spent = lost.spent
                self._scheduler.undone(shard, lost.keys)
                self._look_at_losses(shard)
            raise
        finally:
            self._settle(shard.number, spent)
        self._heed(outcome)
        with anyio.CancelScope(shield=True):
            try:
                collected = await self._collect(output)
            finally:
                self._scheduler.done()
        is_whole = outcome.sender is not None and not (outcome.stopped or outcome.ended or outcome.sender.dropped)
        if is_whole and not self._is_draining and len(collected.keys) < shard.wanted:
            missing = shard.wanted - len(collected.keys)
            problem = f"{missing:,} results that were reported as done are not in {str(output)!r}"
            self._end(StorageError(problem, hint="repeat the command: it sends them again"))

    def _look_at_losses(self, shard: Shard) -> None:
        """End the run when a part kills whoever does it: it may be paid for each time."""
        if shard.losses >= _MOST_LOSSES:
            span = shard.spans[0]
            place = f"{span.source}:{span.number}" if span.number > 1 or not span.start else span.source
            reason = f"the lines from {place} on were lost with their worker {shard.losses} times in a row"
            self._end(
                TryLaterError(reason, hint="look for the cause in Ray's logs (out of memory?), then repeat the command")
            )

    def _heed(self, outcome: ShardOutcome) -> None:
        """Take what a part tells beside its results."""
        if outcome.sender:
            self._counts.update(counts(outcome.sender))
        self._context.failures += outcome.failures[: max(0, SHOWN_FAILURES - len(self._context.failures))]
        self._ended.update(outcome.ended)
        if isinstance(outcome.stopped, BudgetReachedError) and self._context.budget:
            # What others were granted they may spend.
            self._end(self._context.budget.reached(outcome.stopped.amount), is_for_all=False)
        elif outcome.stopped is not None:
            self._end(outcome.stopped)

    async def _collect(self, name: Name, *, is_lost: bool = False) -> _Collected:
        """Take the results of a part into ours, then remove it.

        Of a part whose worker was lost, what lies there and what it was seen to do is what is known of its calls.
        """
        keys: list[int] = []
        totals, calls = Totals(), Counter[str]()
        part = await taken_over(self._staging, name, self._patience)
        try:
            groups = part.groups()
            while group := await to_thread.run_sync(next, groups, None):
                new = [pair for pair in zip(*group, strict=True) if self._collected.add(_key(pair[1]))]
                await self._context.writer.append_lines([line for line, _ in new])
                for _, each in new:
                    keys.append(_key(each))
                    totals.add(each)
                    calls.update(counts_of(each))
                    self._context.ledger.accounts.add(each, each.completed_at[:10])
            unknown = part.unknown()
            if unknown:
                await self._context.writer.import_attempts(unknown)
            await to_thread.run_sync(part.remove)
        finally:
            part.close()
        self._context.totals.add_state(totals.as_state())
        seen = self._parts.pop(name, None)
        if is_lost:
            untold = len(unknown)
            if seen and not part.tells_calls:
                untold = max(0, seen.sender.attempts - calls["attempts"])
            calls.update(attempts=untold, unknown=untold)
            if seen:  # also of requests that have no result yet
                calls |= Counter({name: getattr(seen.sender, name) for name in ("attempts", "rate_limited", "failed")})
            self._counts.update(calls)
        return _Collected(keys=keys, spent=None if unknown else totals.spending.nanos)

    def _patience(self) -> float:
        return _LOCK_SECONDS if self._is_lost else config.poll_policy(self._context.settings)

    async def _collect_rest(self) -> None:
        """Collect what workers have done that were sent away; what cannot be collected is left to the next run."""
        await self._pool.kill_all()
        with self._saying_what_is_left():
            for name in await to_thread.run_sync(self._staging.parts):
                with self._saying_what_is_left():
                    await self._collect(name, is_lost=True)
            await to_thread.run_sync(self._staging.close)

    @contextmanager
    def _saying_what_is_left(self) -> Iterator[None]:
        try:
            yield
        except PipelineError as exc:
            self._stopped = self._stopped or exc
            self._context.notify(exc.message)

    # ── what it is asked ──────────────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> str:
        count = self.statistics().live.in_flight
        self._end(None)
        return f"finishing about {count:,} request(s) in flight"

    def _end(self, reason: PipelineError | None, *, is_for_all: bool = True) -> None:
        """Begin nothing new; unless it is not `is_for_all`, send nothing new either, and finish what is in flight."""
        self._stopped = self._stopped or reason
        self._scheduler.stop()
        if is_for_all and self._tasks:
            for worker in self._workers:
                self._tasks.start_soon(self._stop_one, worker)

    async def _stop_one(self, worker: WorkerHandle) -> None:
        try:
            await worker.stop()
        except WorkerLostError:
            return

    def statistics(self) -> ExecutorStatistics:
        live = combined(self._counts, [part.sender for part in self._parts.values()])
        uncollected = Totals()
        for part in self._parts.values():
            uncollected.add_state(part.totals)
        by_message = {}
        for reason in (self._stopped, *self._ended.values()):
            if reason:
                by_message[reason.message] = reason
        reasons = tuple(by_message.values())
        return ExecutorStatistics(
            live=live,
            uncollected=uncollected,
            stopped=self._stopped,
            reasons=reasons,
            end_reasons=reasons,
            is_draining=self._is_draining,
            is_partial=live.dropped > 0 or self._scheduler.is_stopped,
        )

    @property
    def _is_draining(self) -> bool:
        has_signal = self._phase is not None and self._phase.signal is not None
        return self._stopped is not None or has_signal


@dataclass(frozen=True, slots=True, kw_only=True)
class _Collected:
    """What was collected of a part: the keys of its results, and its money; None where calls are of unknown outcome."""

    keys: list[int]
    spent: int | None


def _key(each: StoredResult) -> int:
    return writer.key(each.custom_id, each.digest)


def _size_of(sources: Sequence[str]) -> int:
    return sum(map(size_of, sources))


def _require_same_version(greeting: Greeting) -> None:
    if greeting.version != own_version():
        raise UsageError(
            f"{greeting.host} has pipeline {greeting.version}, and this machine {own_version()}",
            hint="install the same version on all machines of the cluster",
        )
