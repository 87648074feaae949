"""The batch lane: requests go to the providers' own batch APIs, at half the price, and become the same results.

Requests are written into chunks (`loading`, `chunks`), and each chunk is seen through by a task of its own:

    written ─▶ uploaded ─▶ creating ─▶ created ─▶ (polled until it has ended) ─▶ collected

Each step is on the disk before the next is taken (`passage`), so a later run goes on where this one was killed and
never makes a batch twice. Whatever a provider does with a batch (`harvest`, `verdict`), every request ends as a result,
or goes again: with the next chunk or, where `resend` is given, live.
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
from pipeline.dispatch.batch.outcome import ItemOutcome, OutcomeClassifier
from pipeline.dispatch.batch.reservations import BatchReservations
from pipeline.dispatch.batch.store import BatchItem, BatchItems, BatchRecord, BatchStore, Step
from pipeline.dispatch.cancel import StopSignal
from pipeline.providers.batch import Batch

_GROUP = 256
_SHOWN = 3
_ROOM_PAUSE = 30.0  # seconds; doubles while a provider's queue stays full
_LONGEST_ROOM_PAUSE = 600.0
_LONELY_REFUSALS = 3  # after which a chunk is held for too large, though the provider names no limit


class ResultSink(Protocol):
    """Where results are written down."""

    async def append(self, *wanted: Result) -> None:
        """Take results; returns when a crash cannot undo them."""
        ...


class Input(Protocol):
    """What is known of requests that an earlier run sent, by their custom_id and digest."""

    def outcome(self, custom_id: str, digest: str) -> bool | None:
        """Return True when the results hold an answer, False when they hold a failure, None for neither."""
        ...

    def is_wanted(self, custom_id: str, digest: str) -> bool:
        """Tell whether the input still has a request; known once all of it was read."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The lane at a moment: calls for requests as `send.Statistics` has them, and the chunks of this run.

    `unknown` counts also the requests of batches that were made again though a first one may be there.
    """

    attempts: int
    billed: int
    failed: int
    unknown: int
    dropped: int
    chunks: Sequence[BatchRecord]


@dataclass(slots=True, kw_only=True)
class _Rest:
    """What a batch leaves over: requests that go again, how many somebody else cancelled, what ends a model or all.

    `failures` is how often one of those has failed that go again.
    """

    members: BatchItems
    failures: int = 0
    cancelled: int = 0
    errors: list[ProviderError] = field(default_factory=list)


class BatchCoordinator:
    """Sends requests by batches and gives each result to `recording`.

    `run` sees through what earlier runs left, and what `submit` brings until `close`. `open_courier` makes what talks
    to a provider. With `resend` that which a batch did not answer goes there instead of into another one, before the
    `deadline`. With `waits` false nobody waits for a batch: each is looked at once.
    """

    def __init__(
        self,
        *,
        chunks: BatchStore,
        run_id: str,
        is_simulated: bool,
        retries_failed: bool,
        settings: Batches,
        max_attempts: int,
        patience: PollPolicy,
        open_courier: Callable[[str], BatchClient],
        recording: ResultSink,
        pricing: Pricing,
        budget: Budget | None,
        clock: Clock,
        say: Callable[[str], None],
        input: Input,
        waits: bool = True,
        deadline: datetime | None = None,
        resend: Callable[[Sequence[BatchItem]], Awaitable[None]] | None = None,
    ) -> None:
        self._chunks = chunks
        self._run_id = run_id
        self._is_simulated = is_simulated
        self._retries_failed = retries_failed
        self._max_attempts = max_attempts
        self._recording = recording
        self._pricing = pricing
        self._clock = clock
        self._say = say
        self._input = input
        self._waits = waits
        self._deadline = deadline
        self._resend = resend
        self._stop = StopSignal()
        self._reserves = BatchReservations(budget, pricing)
        self._passage = BatchLifecycle(chunks, clock, self._stop, patience, say)
        self._loader = BatchBuilder(
            chunks,
            settings,
            self._reserves,
            open_courier=open_courier,
            blank=self._blank,
            ship=self._follow,
            may_wait=waits,
            disk=self._passage.disk,
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
        """See every chunk through, until `close` was called and nothing is left to be done, or until `stop`."""
        async with anyio.create_task_group() as self._tasks:
            for chunk in self._open_chunks():
                self._follow(chunk)
            await self._finished.wait()

    async def submit(self, requests: Iterable[Request]) -> None:
        """Take requests of the input."""
        await self._load([BatchItem(request=request) for request in requests])

    async def close(self) -> None:
        """Say that no more requests come: what is loaded goes out now."""
        await self._loader.seal_all()
        self._closed.set()
        self._check_finished()

    def stop(self, reason: PipelineError | None = None) -> None:
        """Begin nothing new. Batches go on at their providers, and a later run collects them."""
        self.stopped = self.stopped or reason
        self._stop.call()
        self._counts["dropped"] += self._loader.unload()
        self._closed.set()
        self._check_finished()

    @property
    def reasons(self) -> list[PipelineError]:
        """Why requests are left without a result, the most far-reaching first."""
        groups = self._loader.groups.values()
        refusals = [] if self._resend else [group.refusal for group in groups]
        found = [self.stopped, self._loader.refused, *refusals, *self._waiting]
        if going_on := [chunk for chunk in self._open_chunks() if chunk.batch_id]:
            requests = sum(chunk.requests for chunk in going_on)
            names = ", ".join(str(chunk.batch_id) for chunk in going_on[:_SHOWN])
            more = f" and {len(going_on) - _SHOWN:,} more" if len(going_on) > _SHOWN else ""
            text = f"{requests:,} requests are in batches that go on: {names}{more}; this command collects them"
            found.append(TryLaterError(text))
        return list(dict.fromkeys(error for error in found if error))

    @property
    def is_partial(self) -> bool:
        """Tell whether requests are left without a result."""
        return bool(self._counts["dropped"] or self._open_chunks() or self._waiting)

    def statistics(self) -> Statistics:
        """Return a snapshot."""
        shown = [chunk for chunk in self._chunks.all if chunk.is_open or chunk.run == self._run_id]
        counts = self._counts | {"unknown": self._counts["unknown"] + self._passage.doubted}
        return Statistics(chunks=shown, **counts)

    def _open_chunks(self) -> list[BatchRecord]:
        return [chunk for chunk in self._chunks.still_open if chunk.simulated == self._is_simulated]

    async def _load(self, members: Sequence[BatchItem]) -> None:
        """Put requests into chunks; where a provider takes no batches they go live, if anything does."""
        turned_away = members if self._stop.is_called else await self._loader.load(members)
        if turned_away and self._resend and not self._loader.refused and not self._stop.is_called:
            await self._resend(turned_away)
        else:
            self._counts["dropped"] += len(turned_away)

    def _blank(self, group: BatchGroup) -> BatchRecord:
        return BatchRecord(
            run=self._run_id,
            provider=group.provider,
            model=group.model,
            at=self._clock.utc(),
            deadline=deadline_text(self._deadline),
            simulated=self._is_simulated,
            retries_failed=self._retries_failed,
        )

    # ── the life of a chunk ───────────────────────────────────────────────────────────────────────────────────────

    def _follow(self, chunk: BatchRecord) -> None:
        assert self._tasks is not None, "run() comes first"
        self._following += 1
        self._tasks.start_soon(self._see_through, chunk)

    async def _see_through(self, chunk: BatchRecord) -> None:
        """Take a chunk as far as it gets now, and settle what is set aside for it."""
        if chunk.run != self._run_id:
            self._reserves.take_over(chunk.nonce, (each.request for _, each in self._chunks.members(chunk)))
        try:
            group = self._loader.group(chunk.provider, chunk.model)
        except UsageError as error:
            self.stopped = self.stopped or error
        else:
            try:
                await self._advance(group, chunk)
            except (ProviderError, TryLaterError) as error:
                await self._broke_off(group, self._chunks.reread(chunk), error)
            group.make_room()
        if self._chunks.reread(chunk).is_open:
            self._reserves.hold(chunk.nonce)
        self._following -= 1
        self._check_finished()

    async def _advance(self, group: BatchGroup, chunk: BatchRecord) -> None:
        courier, passage = group.courier, self._passage
        while True:
            if self._resend and not chunk.may_have_batch and passage.is_late(chunk):
                await self._go_live(group, chunk)
                return
            if chunk.step is Step.WRITTEN:
                chunk = await passage.upload(courier, chunk)
            if self._stop.is_called and not chunk.may_have_batch:
                await self._drop(chunk)
                return
            is_new = chunk.step is not Step.CREATED
            chunk = await passage.create(courier, chunk)
            if is_new and not self._waits:
                return
            group.underway += 1
            try:
                chunk, batch, how = await passage.wait(courier, chunk, is_patient=self._waits)
            finally:
                group.underway -= 1
            if how is Wait.GOES_ON:
                return
            if how is Wait.IGNORES_CANCEL:
                await self._abandon(group, chunk)
                return
            assert batch is not None
            is_refused = batch.problems and not batch.files
            if is_refused and self._has_no_room(group, chunk, batch):
                chunk = await self._leave(chunk, Step.UPLOADED)
                await self._wait_for_room(group, chunk)
                continue
            group.make_room()
            if is_refused:
                await self._refused(group, chunk, batch)
                return
            try:
                await self._collect(group, chunk, batch)
                return
            except WrongBatchError:
                chunk = await self._leave(chunk, Step.CREATING)

    async def _leave(self, chunk: BatchRecord, step: Step) -> BatchRecord:
        """Go back to a step: the batch is none, or not ours."""
        assert chunk.batch_id is not None
        nothing = dict.fromkeys(("batch_id", "status", "succeeded", "failed", "created_at", "expires_at"))
        return await self._passage.note(chunk, **nothing, step=step, not_ours=(*chunk.not_ours, chunk.batch_id))

    def _has_no_room(self, group: BatchGroup, chunk: BatchRecord, batch: Batch) -> bool:
        """Tell whether a batch only failed as the provider's queue is full: then it is made again later.

        One that is too large for an empty queue is not: its requests go on in smaller ones.
        """
        codec = group.courier.batches
        if codec.failure(batch.problems[0]).reach is not ErrorScope.ATTEMPT:
            return False
        self._refusals[chunk.nonce] += 1
        limit = codec.queue_limit(batch.problems[0])
        is_lonely = not group.underway and self._refusals[chunk.nonce] > _LONELY_REFUSALS
        if is_lonely or (limit is not None and chunk.input_tokens > limit):
            group.max_tokens = max(1, min(limit or chunk.input_tokens, chunk.input_tokens) // 2)
            return False
        return True

    async def _wait_for_room(self, group: BatchGroup, chunk: BatchRecord) -> None:
        """Wait until another batch of ours has ended, or for a while: the queue is the account's, not ours alone."""
        if not self._waits:
            raise TryLaterError("the provider's queue is full")
        pause = min(_LONGEST_ROOM_PAUSE, _ROOM_PAUSE * 2 ** (self._refusals[chunk.nonce] - 1))
        with self._stop.cuts_short(), anyio.move_on_after(pause):
            await group.room.acquire()

    async def _broke_off(self, group: BatchGroup, chunk: BatchRecord, error: ProviderError | TryLaterError) -> None:
        """End what an error of a batch API ends. Where no batch can have been made, requests may go live."""
        if isinstance(error, ProviderError) and error.reach is ErrorScope.RUN:
            self._end(group, error)
        elif self._resend and not chunk.may_have_batch and not self._stop.is_called:
            if group.refusal is None:
                self._say(f"{group.name}: no batch can be made, the requests go live: {error.message}")
            group.refusal = error
            await self._go_live(group, chunk)
            return
        elif isinstance(error, TryLaterError) or (error.reach is ErrorScope.ATTEMPT and not is_no_api(error)):
            self._waiting.append(TryLaterError(f"{group.name}: {error.message}"))
            return
        else:
            error.message += f" ({_advice(chunk)})" if is_no_api(error) else ""
            error.reach = ErrorScope.MODEL
            self._end(group, error)
        if not chunk.may_have_batch:
            await self._drop(chunk)

    def _end(self, group: BatchGroup, error: ProviderError) -> None:
        """Give up what an error reaches."""
        if not error.message.startswith(group.name):
            error.message = f"{group.name}: {error.message}"
        if error.reach is ErrorScope.RUN:
            self.stop(error)
        else:
            group.refusal = group.refusal or error

    async def _drop(self, chunk: BatchRecord) -> None:
        """Forget a chunk of which no batch was made; its requests are pending, a later run sends them."""
        self._counts["dropped"] += chunk.requests
        await self._close_chunk(chunk, Step.DROPPED)

    # ── the end of a batch ────────────────────────────────────────────────────────────────────────────────────────

    async def _collect(self, group: BatchGroup, chunk: BatchRecord, batch: Batch) -> None:
        """Turn a batch that has ended into results, and send again what it did not answer.

        Raises `NotOursError` where another batch was taken for ours.
        """
        harvest = self._harvest(group, chunk)
        await self._bring_in(group, chunk, harvest.gather(batch))
        if harvest.strangers:
            text = f"{harvest.strangers:,} result(s) of requests that nobody sent"
            self._say(f"{group.name}: batch {batch.id} has {text}")

    async def _refused(self, group: BatchGroup, chunk: BatchRecord, batch: Batch) -> None:
        """Deal with a batch that failed validation: lines that its provider names fail, the others go again."""
        errors = [(problem.line, group.courier.batches.failure(problem)) for problem in batch.problems]
        named = {line: error for line, error in errors if line and error.reach is ErrorScope.REQUEST}
        whole = next((error for line, error in errors if line not in named), None)
        if whole and whole.reach is ErrorScope.ATTEMPT and chunk.requests == 1:
            named, whole = {1: whole}, None  # alone and still too large
        if whole and self._resend:
            self._say(f"{group.name}: batch {batch.id} was refused, its requests go live: {whole.message}")
            whole = None
        await self._bring_in(group, chunk, self._harvest(group, chunk).refused(named, whole))

    async def _abandon(self, group: BatchGroup, chunk: BatchRecord) -> None:
        """Send all of a batch live that does not heed that it was cancelled: it may be paid twice, and is told."""
        self._say(f"{group.name}: batch {chunk.batch_id} does not end though it was cancelled; its requests go live")
        await self._bring_in(group, chunk, self._harvest(group, chunk).rest("abandoned"), step=Step.DROPPED)

    async def _go_live(self, group: BatchGroup, chunk: BatchRecord) -> None:
        """Send the requests of a chunk live of which no batch was made."""
        await self._bring_in(group, chunk, self._harvest(group, chunk).refused({}, None))

    async def _bring_in(
        self,
        group: BatchGroup,
        chunk: BatchRecord,
        groups: AsyncIterator[Sequence[CollectedItem]],
        step: Step = Step.COLLECTED,
    ) -> None:
        """Carry verdicts out: record results, then close the chunk, then send what goes again.

        In this order a crash makes nothing go twice: what the chunk left over is pending until it is on its next way.
        When the run is to stop, the chunk stays as it is until a later run.
        """
        rest = _Rest(members=self._chunks.leftovers(chunk))
        is_whole = False
        with self._stop.cuts_short():
            async for judged in groups:
                chunk = await self._carry_out(chunk, judged, rest)
                await to_thread.run_sync(rest.members.write, rest.members.take(), limiter=self._passage.disk)
            is_whole = True
        if not is_whole:
            return
        await self._close_chunk(chunk, step if chunk.batch_id else Step.DROPPED)
        if rest.cancelled:
            text = f"batch {chunk.batch_id} was cancelled; {rest.cancelled:,} of its requests have no answer"
            self._waiting.append(TryLaterError(f"{group.name}: {text}"))
        for error in rest.errors:
            self._end(group, error)
        if rest.failures and not self._resend:
            with self._stop.cuts_short():
                await anyio.sleep(min(_LONGEST_ROOM_PAUSE, 2.0 ** (rest.failures - 1)))
        await self._send_on(chunk, rest.members)

    async def _carry_out(self, chunk: BatchRecord, judged: Sequence[CollectedItem], rest: _Rest) -> BatchRecord:
        """Record results and note what goes again; return the chunk with what these cost.

        What somebody else cancelled while we waited is not sent again before somebody repeats the command.
        """
        results: list[Result] = []
        cost = unpriced = 0
        is_ours_to_resend = chunk.is_given_up or chunk.run != self._run_id
        for each in judged:
            verdict = each.verdict
            cost += verdict.nanos or 0
            unpriced += verdict.nanos is None
            self._reserves.settle(chunk.nonce, each.member.request, 0 if each.is_known else verdict.nanos)
            if each.is_known:
                continue
            self._count(verdict)
            if verdict.result:
                results.append(verdict.result)
            elif verdict.again and (is_ours_to_resend or not verdict.is_cancelled):
                rest.members.add(verdict.again)
                rest.failures = max(rest.failures, verdict.again.counted)
            else:
                self._counts["dropped"] += 1
                rest.cancelled += verdict.is_cancelled
                if verdict.error and not rest.errors:
                    rest.errors.append(verdict.error)
        if results:
            await self._recording.append(*results)
        return replace(chunk, cost_nano=chunk.cost_nano + cost, unpriced=chunk.unpriced + unpriced)

    def _count(self, verdict: ItemOutcome) -> None:
        is_success = verdict.result is not None and verdict.result.success
        self._counts["attempts"] += is_success or verdict.attempt is not None
        self._counts["billed"] += is_success
        self._counts["failed"] += verdict.attempt is not None
        self._counts["unknown"] += verdict.attempt is not None and verdict.attempt.is_unknown

    async def _send_on(self, chunk: BatchRecord, rest: BatchItems) -> None:
        """Put requests that a chunk left over on their next way: live, or in another chunk.

        What another run sent goes only if the input still holds it, which is known when all of it was read.
        """
        is_of_other_run = chunk.run != self._run_id
        if rest.requests and is_of_other_run:
            await self._closed.wait()
        if rest.requests and chunk.batch_id:
            way = "live" if self._resend else "in another batch"
            self._say(f"{chunk.group}: batch {chunk.batch_id} left {rest.requests:,} request(s) over; they go {way}")
        members = rest.read()
        while group := await to_thread.run_sync(lambda: list(islice(members, _GROUP))):
            wanted = [each for each in group if not is_of_other_run or self._is_wanted(each)]
            if self._resend and not self._stop.is_called:
                await self._resend(wanted)
            else:
                await self._load(wanted)
        rest.delete()
        if self._closed.is_set():
            await self._loader.seal_all()

    # ── small things ──────────────────────────────────────────────────────────────────────────────────────────────

    def _harvest(self, group: BatchGroup, chunk: BatchRecord) -> ResultCollector:
        judge = OutcomeClassifier(chunk, group.courier.codec, self._pricing, self._clock, self._max_attempts)

        def is_known(member: BatchItem) -> bool:
            """Tell whether a result was recorded before: a failure may be older than a chunk that tries it again."""
            outcome = self._input.outcome(member.request.custom_id, member.request.digest)
            return outcome is True or (outcome is False and not chunk.retries_failed)

        return ResultCollector(self._chunks, chunk, group.courier, judge, is_known)

    def _is_wanted(self, member: BatchItem) -> bool:
        return self._input.is_wanted(member.request.custom_id, member.request.digest)

    async def _close_chunk(self, chunk: BatchRecord, step: Step) -> None:
        await to_thread.run_sync(self._chunks.close_chunk, chunk, step, limiter=self._passage.disk)
        self._reserves.close(chunk.nonce)

    def _check_finished(self) -> None:
        if self._closed.is_set() and not self._following and self._loader.is_empty:
            self._finished.set()


def _advice(chunk: BatchRecord) -> str:
    """Say what may be done about an API or a batch that is not there."""
    if chunk.batch_id:
        return f"if it is gone for good: pipeline batches cancel --forget {chunk.batch_id}"
    return "has this endpoint a batch API? --lane live and --lane auto do without"
