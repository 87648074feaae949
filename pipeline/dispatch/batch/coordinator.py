"""Batch sending: requests go to the providers' batch APIs, at half the price, and become the same results.

Requests are written into batch files (`loader`, `builder`, `store`), and a task of its own takes each through its life:

    written ─▶ uploaded ─▶ creating ─▶ created ─▶ (polled until it has ended) ─▶ collected

Each step is on the disk before the next is taken (`lifecycle`), so a later run continues where this one was killed and
never creates a batch twice. Whatever a provider does with a batch (`collector`, `outcome`), every request ends as a
result or is sent again: in another batch or, with `send_live`, live.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from typing import Protocol

import anyio
from anyio import to_thread

from pipeline.accounting.budget import Budget
from pipeline.accounting.pricing import Pricing
from pipeline.core.clock import Clock
from pipeline.core.config import Batches
from pipeline.core.errors import ErrorScope, PipelineError, ProviderError, TryLaterError, UsageError
from pipeline.core.types import Request, Result
from pipeline.dispatch.batch.builder import BatchBuilder, BatchGroup, deadline_text
from pipeline.dispatch.batch.client import BatchClient, is_no_api
from pipeline.dispatch.batch.collector import CollectedItem, ResultCollector, WrongBatchError
from pipeline.dispatch.batch.lifecycle import BatchLifecycle, PollPolicy, Wait
from pipeline.dispatch.batch.loader import BatchLoader
from pipeline.dispatch.batch.outcome import ItemOutcome, OutcomeClassifier
from pipeline.dispatch.batch.reservations import BatchReservations
from pipeline.dispatch.batch.store import BatchItem, BatchItems, BatchRecord, BatchStore, Step
from pipeline.dispatch.cancel import StopSignal
from pipeline.dispatch.results import ResultSink
from pipeline.providers.batch import Batch

_GROUP = 256
_SHOWN = 3
_ROOM_PAUSE = 30.0  # seconds; doubles while a provider's queue stays full
_LONGEST_ROOM_PAUSE = 600.0
_LONELY_REFUSALS = 3  # after so many a batch counts as too large, even if the provider names no limit


class Input(Protocol):
    """What is known of requests that an earlier run sent, by custom_id and digest."""

    def outcome(self, custom_id: str, digest: str) -> bool | None:
        """Return True when the results hold an answer, False when they hold a failure, None for neither."""
        ...

    def is_wanted(self, custom_id: str, digest: str) -> bool:
        """Return True if the input still holds a request; known only when all of it was read."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """A snapshot: calls for requests, counted as the live sender's statistics, and the batches of this run.

    `unknown` includes the requests of batches that were created again although a first one may exist.
    """

    attempts: int
    billed: int
    failed: int
    unknown: int
    dropped: int
    records: Sequence[BatchRecord]


@dataclass(slots=True, kw_only=True)
class _Rest:
    """What a batch leaves over: requests to send again, errors that end a model or the run.

    `failures` is the highest count of failed attempts among those requests. `cancelled` counts requests whose batch
    was cancelled by someone else.
    """

    items: BatchItems
    failures: int = 0
    cancelled: int = 0
    errors: list[ProviderError] = field(default_factory=list)


class BatchCoordinator:
    """Sends requests in batches and gives each result to `results`.

    `run` finishes the batches of earlier runs and those of the requests that come through `submit` until `close`.
    `open_client` returns the client of a provider. If there is `send_live`, it takes the requests that a batch did not
    answer before the `deadline`; otherwise they go into another batch. With `waits` False each batch is polled once.
    """

    def __init__(
        self,
        *,
        store: BatchStore,
        run_id: str,
        is_simulated: bool,
        retries_failed: bool,
        settings: Batches,
        max_attempts: int,
        poll_policy: PollPolicy,
        open_client: Callable[[str], BatchClient],
        results: ResultSink,
        pricing: Pricing,
        budget: Budget | None,
        clock: Clock,
        notify: Callable[[str], None],
        input: Input,
        waits: bool = True,
        deadline: datetime | None = None,
        send_live: Callable[[Sequence[BatchItem]], Awaitable[None]] | None = None,
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._is_simulated = is_simulated
        self._retries_failed = retries_failed
        self._max_attempts = max_attempts
        self._results = results
        self._pricing = pricing
        self._clock = clock
        self._notify = notify
        self._input = input
        self._waits = waits
        self._deadline = deadline
        self._send_live = send_live
        self._stop = StopSignal()
        self._reservations = BatchReservations(budget, pricing)
        self._lifecycle = BatchLifecycle(store, clock, self._stop, poll_policy, notify)
        self._builder = BatchBuilder(store, settings, open_client=open_client, disk=self._lifecycle.disk)
        self._loader = BatchLoader(
            self._builder, self._reservations, new_record=self._new_record, submit=self._follow, may_wait=waits
        )
        self._tasks: anyio.abc.TaskGroup | None = None
        self._following = 0
        self._closed = anyio.Event()
        self._finished = anyio.Event()
        self._refusals = Counter[str]()
        self._counts = {"attempts": 0, "billed": 0, "failed": 0, "unknown": 0, "dropped": 0}
        self._waiting: list[TryLaterError] = []
        self.stopped: PipelineError | None = None

    # ── what goes in ──────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Work until `close` was called and every batch is done, or until `stop`."""
        async with anyio.create_task_group() as self._tasks:
            for record in self._open_records():
                self._follow(record)
            await self._finished.wait()

    async def submit(self, requests: Iterable[Request]) -> None:
        """Take requests of the input."""
        await self._load([BatchItem(request=request) for request in requests])

    async def close(self) -> None:
        """Declare that no more requests come, and submit what is loaded."""
        await self._loader.submit_all()
        self._closed.set()
        self._check_finished()

    def stop(self, reason: PipelineError | None = None) -> None:
        """Start nothing new. Batches go on at their providers; a later run collects them."""
        self.stopped = self.stopped or reason
        self._stop.call()
        self._counts["dropped"] += self._loader.discard()
        self._closed.set()
        self._check_finished()

    @property
    def reasons(self) -> list[PipelineError]:
        """Why requests have no result, the reason with the widest scope first."""
        groups = self._builder.groups.values()
        refusals = [] if self._send_live else [group.refusal for group in groups]
        found = [self.stopped, self._loader.refused, *refusals, *self._waiting]
        if going_on := [record for record in self._open_records() if record.batch_id]:
            requests = sum(record.requests for record in going_on)
            names = ", ".join(str(record.batch_id) for record in going_on[:_SHOWN])
            more = f" and {len(going_on) - _SHOWN:,} more" if len(going_on) > _SHOWN else ""
            text = (
                f"{requests:,} requests are in batches that are still running: {names}{more}; "
                "repeat the command to collect them"
            )
            found.append(TryLaterError(text))
        return list(dict.fromkeys(error for error in found if error))

    @property
    def is_partial(self) -> bool:
        """Return True if requests are left without a result."""
        return bool(self._counts["dropped"] or self._open_records() or self._waiting)

    def statistics(self) -> Statistics:
        """Return a snapshot."""
        shown = [record for record in self._store.all if record.is_open or record.run == self._run_id]
        counts = self._counts | {"unknown": self._counts["unknown"] + self._lifecycle.maybe_duplicated}
        return Statistics(records=shown, **counts)

    def _open_records(self) -> list[BatchRecord]:
        return [record for record in self._store.still_open if record.simulated == self._is_simulated]

    async def _load(self, items: Sequence[BatchItem]) -> None:
        """Put requests into batches. If a provider takes no batches, send them live where that is allowed."""
        turned_away = items if self._stop.is_called else await self._loader.load(items)
        if turned_away and self._send_live and not self._loader.refused and not self._stop.is_called:
            await self._send_live(turned_away)
        else:
            self._counts["dropped"] += len(turned_away)

    def _new_record(self, group: BatchGroup) -> BatchRecord:
        return BatchRecord(
            run=self._run_id,
            provider=group.provider,
            model=group.model,
            at=self._clock.utc(),
            deadline=deadline_text(self._deadline),
            simulated=self._is_simulated,
            retries_failed=self._retries_failed,
        )

    # ── the life of a batch ───────────────────────────────────────────────────────────────────────────────────────

    def _follow(self, record: BatchRecord) -> None:
        assert self._tasks is not None, "run() comes first"
        self._following += 1
        self._tasks.start_soon(self._see_through, record)

    async def _see_through(self, record: BatchRecord) -> None:
        """Take a batch as far as it gets now; hold the budget of one that goes on after this run."""
        if record.run != self._run_id:
            self._reservations.take_over(record.local_id, (each.request for _, each in self._store.items(record)))
        try:
            group = self._builder.group(record.provider, record.model)
        except UsageError as error:
            self.stopped = self.stopped or error
        else:
            try:
                await self._advance(group, record)
            except (ProviderError, TryLaterError) as error:
                await self._broke_off(group, self._store.reread(record), error)
            group.make_room()
        if self._store.reread(record).is_open:
            self._reservations.hold(record.local_id)
        self._following -= 1
        self._check_finished()

    async def _advance(self, group: BatchGroup, record: BatchRecord) -> None:
        client, lifecycle = group.client, self._lifecycle
        while True:
            if self._send_live and not record.may_have_batch and lifecycle.is_late(record):
                await self._go_live(group, record)
                return
            if record.step is Step.WRITTEN:
                record = await lifecycle.upload(client, record)
            if self._stop.is_called and not record.may_have_batch:
                await self._drop(record)
                return
            is_new = record.step is not Step.CREATED
            record = await lifecycle.create(client, record)
            if is_new and not self._waits:
                return
            group.underway += 1
            try:
                record, batch, how = await lifecycle.wait(client, record, is_patient=self._waits)
            finally:
                group.underway -= 1
            if how is Wait.GOES_ON:
                return
            if how is Wait.IGNORES_CANCEL:
                await self._abandon(group, record)
                return
            assert batch is not None
            is_refused = batch.problems and not batch.files
            if is_refused and self._has_no_room(group, record, batch):
                record = await self._leave(record, Step.UPLOADED)
                await self._wait_for_room(group, record)
                continue
            group.make_room()
            if is_refused:
                await self._refused(group, record, batch)
                return
            try:
                await self._collect(group, record, batch)
                return
            except WrongBatchError:
                record = await self._leave(record, Step.CREATING)

    async def _leave(self, record: BatchRecord, step: Step) -> BatchRecord:
        """Go back to a step, because the batch failed or is not ours."""
        assert record.batch_id is not None
        nothing = dict.fromkeys(("batch_id", "status", "succeeded", "failed", "created_at", "expires_at"))
        return await self._lifecycle.save(record, **nothing, step=step, not_ours=(*record.not_ours, record.batch_id))

    def _has_no_room(self, group: BatchGroup, record: BatchRecord, batch: Batch) -> bool:
        """Return True if a batch failed only because the provider's queue is full, so it can be created again later.

        A batch that is too large even for an empty queue cannot: its requests go into smaller ones.
        """
        codec = group.client.batches
        if codec.failure(batch.problems[0]).scope is not ErrorScope.ATTEMPT:
            return False
        self._refusals[record.local_id] += 1
        limit = codec.queue_limit(batch.problems[0])
        is_lonely = not group.underway and self._refusals[record.local_id] > _LONELY_REFUSALS
        if is_lonely or (limit is not None and record.input_tokens > limit):
            group.max_tokens = max(1, min(limit or record.input_tokens, record.input_tokens) // 2)
            return False
        return True

    async def _wait_for_room(self, group: BatchGroup, record: BatchRecord) -> None:
        """Wait until another batch of ours ends, at most for a pause: other programs may use the queue too."""
        if not self._waits:
            raise TryLaterError("the provider's queue is full")
        pause = min(_LONGEST_ROOM_PAUSE, _ROOM_PAUSE * 2 ** (self._refusals[record.local_id] - 1))
        with self._stop.cuts_short(), anyio.move_on_after(pause):
            await group.room.acquire()

    async def _broke_off(self, group: BatchGroup, record: BatchRecord, error: ProviderError | TryLaterError) -> None:
        """Handle an error of a batch API by its scope. If no batch can have been created, the requests may go live."""
        if isinstance(error, ProviderError) and error.scope is ErrorScope.RUN:
            self._end(group, error)
        elif self._send_live and not record.may_have_batch and not self._stop.is_called:
            if group.refusal is None:
                self._notify(f"{group.name}: no batch can be made, the requests go live: {error.message}")
            group.refusal = error
            await self._go_live(group, record)
            return
        elif isinstance(error, TryLaterError) or (error.scope is ErrorScope.ATTEMPT and not is_no_api(error)):
            self._waiting.append(TryLaterError(f"{group.name}: {error.message}"))
            return
        else:
            advice = f" ({_advice(record)})" if is_no_api(error) else ""
            self._end(group, error.replace(message=error.message + advice, scope=ErrorScope.MODEL))
        if not record.may_have_batch:
            await self._drop(record)

    def _end(self, group: BatchGroup, error: ProviderError) -> None:
        """Give up the run or the group, by the error's scope."""
        if not error.message.startswith(group.name):
            error = error.replace(message=f"{group.name}: {error.message}")
        if error.scope is ErrorScope.RUN:
            self.stop(error)
        else:
            group.refusal = group.refusal or error

    async def _drop(self, record: BatchRecord) -> None:
        """Drop a record without a batch. Its requests stay pending; a later run sends them."""
        self._counts["dropped"] += record.requests
        await self._close_record(record, Step.DROPPED)

    # ── the end of a batch ────────────────────────────────────────────────────────────────────────────────────────

    async def _collect(self, group: BatchGroup, record: BatchRecord, batch: Batch) -> None:
        """Turn a batch that has ended into results, and send again what it did not answer.

        Raises `WrongBatchError` if another batch was taken for ours.
        """
        collector = self._collector(group, record)
        await self._bring_in(group, record, collector.gather(batch))
        if collector.unmatched:
            text = f"{collector.unmatched:,} result(s) for requests that were not sent"
            self._notify(f"{group.name}: batch {batch.id} has {text}")

    async def _refused(self, group: BatchGroup, record: BatchRecord, batch: Batch) -> None:
        """Handle a batch that failed validation: lines that the provider names fail, the others are sent again."""
        errors = [(problem.line, group.client.batches.failure(problem)) for problem in batch.problems]
        named = {line: error for line, error in errors if line and error.scope is ErrorScope.REQUEST}
        whole = next((error for line, error in errors if line not in named), None)
        if whole and whole.scope is ErrorScope.ATTEMPT and record.requests == 1:
            named, whole = {1: whole}, None  # a single request that is still too large
        if whole and self._send_live:
            self._notify(f"{group.name}: batch {batch.id} was refused, its requests go live: {whole.message}")
            whole = None
        await self._bring_in(group, record, self._collector(group, record).refused(named, whole))

    async def _abandon(self, group: BatchGroup, record: BatchRecord) -> None:
        """Send the requests of a batch that ignores its cancellation live, and say so: they may be paid twice."""
        self._notify(
            f"{group.name}: batch {record.batch_id} does not end though it was cancelled; its requests go live"
        )
        await self._bring_in(group, record, self._collector(group, record).rest("abandoned"), step=Step.DROPPED)

    async def _go_live(self, group: BatchGroup, record: BatchRecord) -> None:
        """Send the requests of a record without a batch live."""
        await self._bring_in(group, record, self._collector(group, record).refused({}, None))

    async def _bring_in(
        self,
        group: BatchGroup,
        record: BatchRecord,
        groups: AsyncIterator[Sequence[CollectedItem]],
        step: Step = Step.COLLECTED,
    ) -> None:
        """Apply outcomes: store the results, then close the record, then send again what is left over.

        In this order a crash sends nothing twice: what is left over is pending until it is sent again. If the run is
        stopped, the record stays as it is for a later run.
        """
        rest = _Rest(items=self._store.leftovers(record))
        is_whole = False
        with self._stop.cuts_short():
            async for collected in groups:
                record = await self._carry_out(record, collected, rest)
                await to_thread.run_sync(rest.items.write, rest.items.take(), limiter=self._lifecycle.disk)
            is_whole = True
        if not is_whole:
            return
        await self._close_record(record, step if record.batch_id else Step.DROPPED)
        if rest.cancelled:
            text = f"batch {record.batch_id} was cancelled; {rest.cancelled:,} of its requests have no answer"
            self._waiting.append(TryLaterError(f"{group.name}: {text}"))
        for error in rest.errors:
            self._end(group, error)
        if rest.failures and not self._send_live:
            with self._stop.cuts_short():
                await anyio.sleep(min(_LONGEST_ROOM_PAUSE, 2.0 ** (rest.failures - 1)))
        await self._send_on(record, rest.items)

    async def _carry_out(self, record: BatchRecord, collected: Sequence[CollectedItem], rest: _Rest) -> BatchRecord:
        """Store results and collect what is sent again; return the record with their cost added.

        Requests of a batch that someone else cancelled meanwhile are not sent again until the command is repeated.
        """
        done: list[Result] = []
        cost = unpriced = 0
        is_ours_to_resend = record.is_given_up or record.run != self._run_id
        for each in collected:
            outcome = each.outcome
            cost += outcome.nanos or 0
            unpriced += outcome.nanos is None
            self._reservations.settle(record.local_id, each.item.request, 0 if each.is_known else outcome.nanos)
            if each.is_known:
                continue
            self._count(outcome)
            if outcome.result:
                done.append(outcome.result)
            elif outcome.again and (is_ours_to_resend or not outcome.is_cancelled):
                rest.items.add(outcome.again)
                rest.failures = max(rest.failures, outcome.again.counted)
            else:
                self._counts["dropped"] += 1
                rest.cancelled += outcome.is_cancelled
                if outcome.error and not rest.errors:
                    rest.errors.append(outcome.error)
        if done:
            await self._results.append(*done)
        return replace(record, cost_nano=record.cost_nano + cost, unpriced=record.unpriced + unpriced)

    def _count(self, outcome: ItemOutcome) -> None:
        is_success = outcome.result is not None and outcome.result.success
        self._counts["attempts"] += is_success or outcome.attempt is not None
        self._counts["billed"] += is_success
        self._counts["failed"] += outcome.attempt is not None
        self._counts["unknown"] += outcome.attempt is not None and outcome.attempt.is_unknown

    async def _send_on(self, record: BatchRecord, rest: BatchItems) -> None:
        """Send the requests that a batch left over: live, or in another batch.

        Those of another run go only if the input still holds them, which is known when all of it was read.
        """
        is_of_other_run = record.run != self._run_id
        if rest.requests and is_of_other_run:
            await self._closed.wait()
        if rest.requests and record.batch_id:
            connection = "live" if self._send_live else "in another batch"
            self._notify(
                f"{record.group}: batch {record.batch_id} left {rest.requests:,} request(s) over; they go {connection}"
            )
        items = rest.read()
        while group := await to_thread.run_sync(lambda: list(islice(items, _GROUP))):
            wanted = [each for each in group if not is_of_other_run or self._is_wanted(each)]
            if self._send_live and not self._stop.is_called:
                await self._send_live(wanted)
            else:
                await self._load(wanted)
        rest.delete()
        if self._closed.is_set():
            await self._loader.submit_all()

    # ── helpers ──────────────────────────────────────────────────────────────────────────────────────────────

    def _collector(self, group: BatchGroup, record: BatchRecord) -> ResultCollector:
        classifier = OutcomeClassifier(record, group.client.codec, self._pricing, self._clock, self._max_attempts)

        def is_known(item: BatchItem) -> bool:
            """Return True if a result was stored before. A failure may be older than the batch that retries it."""
            answered = self._input.outcome(item.request.custom_id, item.request.digest)
            return answered is True or (answered is False and not record.retries_failed)

        return ResultCollector(self._store, record, group.client, classifier, is_known)

    def _is_wanted(self, item: BatchItem) -> bool:
        return self._input.is_wanted(item.request.custom_id, item.request.digest)

    async def _close_record(self, record: BatchRecord, step: Step) -> None:
        await to_thread.run_sync(self._store.close_record, record, step, limiter=self._lifecycle.disk)
        self._reservations.close(record.local_id)

    def _check_finished(self) -> None:
        if self._closed.is_set() and not self._following and self._builder.is_empty:
            self._finished.set()


def _advice(record: BatchRecord) -> str:
    """Return what the user can do about a missing API or batch."""
    if record.batch_id:
        return f"if it is gone for good: pipeline batches cancel --forget {record.batch_id}"
    return "has this endpoint a batch API? --lane live and --lane auto do without"
