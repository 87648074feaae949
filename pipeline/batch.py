"""The batch lane: requests go to the providers' own batch APIs, at half the price, and become the same results.

Requests are written into chunks (`chunks`), and each chunk is seen through by a task of its own:

    written ─▶ uploaded ─▶ creating ─▶ created ─▶ (polled until it has ended) ─▶ collected

Each step is on the disk before the next is taken (`passage`), so a later run goes on where this one was killed and
never makes a batch twice. Whatever a provider does with a batch, every request ends as a result, or goes again: with
the next chunk or, where `resend` is given, live.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from typing import Protocol

import anyio
from anyio import to_thread

from pipeline.budget import Budget
from pipeline.chunks import Chunk, Chunks, Member, Spool, Step
from pipeline.clock import Clock
from pipeline.config import Batches
from pipeline.courier import Courier
from pipeline.errors import (
    BudgetReachedError,
    PipelineError,
    ProviderError,
    Reach,
    TryLaterError,
    UsageError,
)
from pipeline.fingerprints import checksum
from pipeline.harvest import Harvest, Judged, NotOursError
from pipeline.passage import Passage, Patience, Stop
from pipeline.pricing import Pricing
from pipeline.providers.batches import Batch, of_whole_batch
from pipeline.types import Request, Result
from pipeline.verdict import Judge, Verdict

_GROUP = 256
_SHOWN = 3


class Recording(Protocol):
    """Where results are written down."""

    async def append(self, *wanted: Result) -> None:
        """Take results; returns when a crash cannot undo them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The lane at a moment: calls for requests as `send.Statistics` has them, and the chunks of this run."""

    attempts: int
    billed: int
    failed: int
    unknown: int
    dropped: int
    chunks: Sequence[Chunk]


@dataclass(slots=True, kw_only=True)
class _Group:
    """The requests that may share batches: of one provider and, where it wants that, of one model.

    `room` is for chunks that the provider's queue had no room for: one goes on when another has come to its end.
    `max_tokens` bounds chunks once one alone was too large for the queue.
    """

    provider: str
    model: str
    courier: Courier
    spool: Spool | None = None
    underway: int = 0
    room: anyio.Semaphore = field(default_factory=lambda: anyio.Semaphore(0))
    max_tokens: int | None = None
    ended: PipelineError | None = None

    @property
    def name(self) -> str:
        return f"{self.provider}/{self.model}" if self.model else self.provider

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Count a batch while it is underway."""
        self.underway += 1
        try:
            yield
        finally:
            self.underway -= 1

    def make_room(self) -> None:
        """Let one of the chunks go on that wait for room."""
        if self.room.statistics().tasks_waiting:
            self.room.release()


@dataclass(slots=True, kw_only=True)
class _Leftovers:
    """What a batch did not answer: requests that go again, and how many somebody else cancelled."""

    spool: Spool
    cancelled: int = 0


class BatchLane:
    """Sends requests by batches and gives each result to `recording`.

    `run` sees through what earlier runs left, and what `submit` brings until `close`. `open_courier` makes what talks
    to a provider. With `resend` that which a batch did not answer goes there instead of into another one. With `waits`
    false nobody waits for a batch: each is looked at once. `is_answered` and `is_wanted` tell, by the key of a request,
    whether there is an answer already and whether the input still has it; the latter is asked after `close` only.
    """

    def __init__(
        self,
        *,
        chunks: Chunks,
        run_id: str,
        is_simulated: bool,
        settings: Batches,
        max_attempts: int,
        patience: Patience,
        open_courier: Callable[[str], Courier],
        recording: Recording,
        pricing: Pricing,
        budget: Budget | None,
        clock: Clock,
        say: Callable[[str], None],
        key: Callable[[str, str], int],
        is_answered: Callable[[int], bool],
        is_wanted: Callable[[int], bool],
        waits: bool = True,
        deadline: datetime | None = None,
        resend: Callable[[Sequence[Member]], Awaitable[None]] | None = None,
    ) -> None:
        self._chunks = chunks
        self._run_id = run_id
        self._is_simulated = is_simulated
        self._settings = settings
        self._max_attempts = max_attempts
        self._open_courier = open_courier
        self._recording = recording
        self._pricing = pricing
        self._budget = budget
        self._clock = clock
        self._say = say
        self._key = key
        self._is_answered = is_answered
        self._is_wanted = is_wanted
        self._waits = waits
        self._deadline = deadline
        self._resend = resend
        self._couriers: dict[str, Courier] = {}
        self._groups: dict[tuple[str, str], _Group] = {}
        self._tasks: anyio.abc.TaskGroup | None = None
        self._following = 0
        self._is_closed = False
        self._closed = anyio.Event()
        self._stop = Stop()
        self._passage = Passage(chunks, clock, self._stop, patience, say)
        self._finished = anyio.Event()
        self._counts = {"attempts": 0, "billed": 0, "failed": 0, "unknown": 0, "dropped": 0}
        self.stopped: PipelineError | None = None
        self._waiting: list[TryLaterError] = []
        self._going_on: list[Chunk] = []

    # ── what goes in ──────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """See every chunk through, until `close` was called and nothing is left to be done, or until `stop`."""
        async with anyio.create_task_group() as self._tasks:
            for chunk in self._chunks.still_open:
                if chunk.simulated == self._is_simulated:
                    self._follow(chunk)
            self._check_finished()
            await self._finished.wait()

    async def submit(self, requests: Iterable[Request]) -> None:
        """Take requests of the input."""
        await self._take(Member(request=request) for request in requests)

    async def close(self) -> None:
        """Say that no more requests come: what is written goes out now."""
        await self._seal_all()
        self._is_closed = True
        self._closed.set()
        self._check_finished()

    def stop(self, reason: PipelineError | None = None) -> None:
        """Begin nothing new. Batches go on at their providers, and a later run collects them."""
        self.stopped = self.stopped or reason
        self._stop.call()
        for group in self._groups.values():
            if group.spool:
                self._counts["dropped"] += group.spool.requests
                group.spool = None
        self._is_closed = True
        self._closed.set()
        self._check_finished()

    @property
    def reasons(self) -> list[PipelineError]:
        """Why requests are left without a result, the most far-reaching first."""
        found = [self.stopped, *(group.ended for group in self._groups.values()), *self._waiting]
        if self._going_on:
            requests = sum(chunk.requests for chunk in self._going_on)
            names = ", ".join(str(chunk.batch_id) for chunk in self._going_on[:_SHOWN])
            more = f" and {len(self._going_on) - _SHOWN:,} more" if len(self._going_on) > _SHOWN else ""
            found.append(
                TryLaterError(
                    f"{requests:,} requests are in batches that go on: {names}{more}; this command collects them"
                )
            )
        return list(dict.fromkeys(error for error in found if error))

    @property
    def is_partial(self) -> bool:
        """Tell whether requests are left without a result."""
        return bool(self._counts["dropped"] or self._going_on or self._waiting)

    def statistics(self) -> Statistics:
        """Return a snapshot."""
        shown = [chunk for chunk in self._chunks.all if chunk.is_open or chunk.run == self._run_id]
        return Statistics(chunks=shown, **self._counts)

    async def _take(self, members: Iterable[Member]) -> None:
        for member in members:
            await self._add(member)
        for group in list(self._groups.values()):
            if group.spool:
                await to_thread.run_sync(group.spool.write, group.spool.take(), limiter=self._passage.disk)

    async def _add(self, member: Member) -> None:
        """Write a request into the chunk of its group, which goes out when it is full."""
        group = None if self._stop.is_called else self._group(member.request.provider, member.request.model)
        if group and group.ended and self._resend:
            await self._resend([member])
            return
        worst = await self._reserve(member.request) if group and not group.ended else None
        if group is None or worst is None:
            self._counts["dropped"] += 1
            return
        member = replace(member, worst_nano=worst)
        while True:
            spool = group.spool or self._begin(group)
            named = self._named(group, spool, member)
            if not spool.requests or not self._is_full(group, spool, named):
                spool.add(named)
                return
            await self._seal(group)

    def _begin(self, group: _Group) -> Spool:
        codec = group.courier.batches
        group.spool = self._chunks.spool(separator=codec.separator, entry=codec.entry)
        return group.spool

    def _named(self, group: _Group, spool: Spool, member: Member) -> Member:
        request = member.request
        mark = checksum(request.custom_id.encode(), b"\0", request.digest.encode()).hex()
        return replace(member, name=group.courier.batches.name(spool.nonce, request.custom_id, mark))

    def _is_full(self, group: _Group, spool: Spool, member: Member) -> bool:
        codec, settings = group.courier.batches, self._settings
        tokens = spool.input_tokens + member.request.estimated_input_tokens
        return (
            spool.requests >= min(codec.max_requests, settings.max_requests or codec.max_requests)
            or spool.size_with(member) > min(codec.max_bytes, settings.max_bytes or codec.max_bytes)
            or (group.max_tokens is not None and tokens > group.max_tokens)
        )

    async def _reserve(self, request: Request) -> int | None:
        """Set the worst case of a request aside; None, and nothing more is sent, where the budget does not cover it."""
        if self._budget is None:
            return 0
        try:
            worst = self._pricing.worst_case(request)
            if not self._budget.try_reserve(worst):
                await self._seal_all()  # only what is on its way can give something back
                if not self._waits:
                    raise TryLaterError("the budget does not cover the rest until results are back")
                await self._budget.reserve(worst)
        except (UsageError, BudgetReachedError, TryLaterError) as exc:
            self._stop_taking(exc)
            return None
        return worst

    def _stop_taking(self, reason: PipelineError) -> None:
        """Take nothing more in; what is on its way is waited for."""
        for group in self._groups.values():
            group.ended = group.ended or reason
        self.stopped = self.stopped or reason

    async def _seal_all(self) -> None:
        for group in list(self._groups.values()):
            await self._seal(group)

    async def _seal(self, group: _Group) -> None:
        """Put the chunk of a group on its way."""
        spool, group.spool = group.spool, None
        if spool is None:
            return
        lines = spool.take()

        def seal() -> Chunk:
            deadline = self._deadline
            chunk = spool.seal(
                lines,
                run=self._run_id,
                provider=group.provider,
                model=group.model,
                at=self._clock.utc(),
                deadline=f"{deadline:%Y-%m-%dT%H:%M:%SZ}" if deadline else None,
                simulated=self._is_simulated,
            )
            self._chunks.note(chunk)
            return chunk

        self._follow(await to_thread.run_sync(seal, limiter=self._passage.disk))

    def _group(self, provider: str, model: str) -> _Group | None:
        """Return the group of a model; None, and the run stops, where its provider cannot be called (no key)."""
        try:
            courier = self._courier(provider)
        except UsageError as exc:
            self.stop(exc)
            return None
        model = model if courier.batches.is_for_one_model else ""
        if (provider, model) not in self._groups:
            self._groups[provider, model] = _Group(provider=provider, model=model, courier=courier)
            self._groups[provider, model].ended = self.stopped
        return self._groups[provider, model]

    def _courier(self, provider: str) -> Courier:
        if provider not in self._couriers:
            self._couriers[provider] = self._open_courier(provider)
        return self._couriers[provider]

    # ── the life of a chunk ───────────────────────────────────────────────────────────────────────────────────────

    def _follow(self, chunk: Chunk) -> None:
        assert self._tasks is not None, "run() comes first"
        self._following += 1
        self._tasks.start_soon(self._see_through, chunk)

    async def _see_through(self, chunk: Chunk) -> None:
        """Take a chunk as far as it gets now."""
        group = self._group(chunk.provider, chunk.model)
        if group is not None:
            if self._budget and chunk.run != self._run_id:
                self._budget.take(chunk.worst_nano)
            try:
                await self._advance(group, chunk)
            except ProviderError as error:
                await self._broke_off(group, chunk, error)
            except TryLaterError as error:
                error.message = f"{group.name}: {error.message}"
                self._waiting.append(error)
            finally:
                group.make_room()
        self._following -= 1
        self._check_finished()

    async def _advance(self, group: _Group, chunk: Chunk) -> None:
        courier, passage = group.courier, self._passage
        while True:
            if chunk.step is Step.WRITTEN:
                chunk = await passage.upload(courier, chunk)
            if self._stop.is_called and chunk.step in (Step.WRITTEN, Step.UPLOADED):
                await self._drop(chunk)
                return
            is_new = chunk.step is not Step.CREATED
            chunk = await passage.create(courier, chunk)
            if is_new and not self._waits:
                self._going_on.append(chunk)
                return
            with group.occupied():
                chunk, batch = await passage.wait(courier, chunk, is_patient=self._waits)
            if batch is None and not chunk.is_given_up:
                self._going_on.append(chunk)
            elif batch is None:
                await self._abandon(group, chunk)
            elif not batch.problems:
                try:
                    with self._stop.cuts_short():
                        await self._collect(group, chunk, batch)
                except NotOursError:
                    chunk = await self._leave(chunk, Step.CREATING)
                    continue
            elif await self._may_try_again(group, chunk, batch):
                chunk = await self._leave(chunk, Step.UPLOADED)
                continue
            else:
                await self._refused(group, chunk, batch)
            return

    async def _leave(self, chunk: Chunk, step: Step) -> Chunk:
        """Go back to a step: the batch is none, or not ours."""
        assert chunk.batch_id is not None
        others = (*chunk.not_ours, chunk.batch_id)
        return await self._passage.note(chunk, step=step, batch_id=None, status=None, not_ours=others)

    async def _may_try_again(self, group: _Group, chunk: Chunk, batch: Batch) -> bool:
        """Tell whether a batch only failed as the provider's queue is full, after waiting for room in it.

        One that is too large for an empty queue is not made again: its requests go on in smaller ones.
        """
        error = group.courier.batches.failure(batch.problems[0])
        if error.reach is not Reach.ATTEMPT or chunk.requests == 1:
            return False
        if not group.underway:
            group.max_tokens = max(1, chunk.input_tokens // 2)
            return False
        with self._stop.cuts_short():
            await group.room.acquire()
        return True

    # ── the end of a batch ────────────────────────────────────────────────────────────────────────────────────────

    async def _collect(self, group: _Group, chunk: Chunk, batch: Batch) -> None:
        """Turn a batch that has ended into results, and send again what it did not answer.

        Raises `NotOursError` where another batch was taken for ours.
        """
        harvest = self._harvest(group, chunk)
        await self._bring_in(group, chunk, harvest.gather(batch))
        if harvest.strangers:
            text = f"{harvest.strangers:,} result(s) of requests that nobody sent"
            self._say(f"{group.name}: batch {batch.id} has {text}")

    async def _refused(self, group: _Group, chunk: Chunk, batch: Batch) -> None:
        """Deal with a batch that failed validation: lines that its provider names fail, the others go again."""
        errors = [(problem.line, group.courier.batches.failure(problem)) for problem in batch.problems]
        named = {line: error for line, error in errors if line and error.reach is Reach.REQUEST}
        whole = next((error for line, error in errors if line not in named), None)
        await self._bring_in(group, chunk, self._harvest(group, chunk).refused(named, whole))

    async def _abandon(self, group: _Group, chunk: Chunk) -> None:
        """Send all of a batch live that does not heed that it was cancelled: it may be paid twice, and is told."""
        self._say(f"{group.name}: batch {chunk.batch_id} does not end though it was cancelled; its requests go live")
        await self._bring_in(group, chunk, self._harvest(group, chunk).rest("abandoned"))

    async def _bring_in(self, group: _Group, chunk: Chunk, groups: AsyncIterator[Sequence[Judged]]) -> None:
        """Carry verdicts out: record results, then close the chunk, then send what goes again.

        In this order a crash makes nothing go twice: what the chunk left over is pending until it is on its next way.
        """
        left = _Leftovers(spool=self._chunks.spool(separator=b"", entry=lambda name, body: b""))
        async for judged in groups:
            chunk = await self._carry_out(group, chunk, judged, left)
            await to_thread.run_sync(left.spool.write, left.spool.take(), limiter=self._passage.disk)
        await to_thread.run_sync(self._chunks.close_chunk, chunk, Step.COLLECTED, limiter=self._passage.disk)
        if left.cancelled:
            text = f"batch {chunk.batch_id} was cancelled; {left.cancelled:,} of its requests have no answer"
            self._waiting.append(TryLaterError(f"{group.name}: {text}"))
        await self._send_on(chunk, left.spool)

    async def _carry_out(self, group: _Group, chunk: Chunk, judged: Sequence[Judged], left: _Leftovers) -> Chunk:
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
            if self._budget:
                worst = each.member.worst_nano
                spent = 0 if each.is_known else worst if verdict.nanos is None else verdict.nanos
                self._budget.settle(worst, spent)
            if each.is_known:
                continue
            self._count(verdict)
            if verdict.result:
                results.append(verdict.result)
            elif verdict.error:
                self._counts["dropped"] += 1
                self._end(group, verdict.error)
            elif verdict.again and verdict.is_cancelled and not is_ours_to_resend:
                self._counts["dropped"] += 1
                left.cancelled += 1
            elif verdict.again:
                left.spool.add(verdict.again)
        if results:
            await self._recording.append(*results)
        return replace(chunk, cost_nano=chunk.cost_nano + cost, unpriced=chunk.unpriced + unpriced)

    def _count(self, verdict: Verdict) -> None:
        is_success = verdict.result is not None and verdict.result.success
        self._counts["attempts"] += is_success or verdict.attempt is not None
        self._counts["billed"] += is_success
        self._counts["failed"] += verdict.attempt is not None
        self._counts["unknown"] += verdict.attempt is not None and verdict.attempt.is_unknown

    async def _send_on(self, chunk: Chunk, spool: Spool) -> None:
        """Put requests that a chunk left over on their next way: live, or in another chunk.

        What another run sent goes only if the input still holds it, which is known when all of it was read.
        """
        is_of_other_run = chunk.run != self._run_id
        if spool.requests and is_of_other_run:
            await self._closed.wait()
        members = spool.members()
        while group := await to_thread.run_sync(lambda: list(islice(members, _GROUP))):
            wanted = [each for each in group if not is_of_other_run or self._is_wanted(self._key_of(each))]
            if self._stop.is_called:
                self._counts["dropped"] += len(wanted)
            elif self._resend:
                await self._resend(wanted)
            else:
                await self._take(wanted)
        spool.delete()
        if self._is_closed:
            await self._seal_all()

    async def _broke_off(self, group: _Group, chunk: Chunk, error: ProviderError) -> None:
        """End what an error of a batch API ends. Where no batch was made, its requests may go live."""
        chunk = next(each for each in self._chunks.all if each.nonce == chunk.nonce)
        if error.reach is Reach.ATTEMPT:
            self._waiting.append(TryLaterError(f"{group.name}: {error.message}"))
            return
        is_begun = chunk.step in (Step.CREATING, Step.CREATED)
        if self._resend and not is_begun and error.reach is not Reach.RUN:
            self._say(f"{group.name}: no batch can be made, the requests go live: {error.message}")
            group.ended = error
            await self._bring_in(group, chunk, self._harvest(group, chunk).refused({}, None))
            return
        self._end(group, of_whole_batch(error))
        if not is_begun:
            await self._drop(chunk)

    def _end(self, group: _Group, error: ProviderError) -> None:
        """Give up what an error reaches."""
        if not error.message.startswith(group.name):
            error.message = f"{group.name}: {error.message}"
        if error.reach is Reach.RUN:
            self.stop(error)
        else:
            group.ended = group.ended or error

    async def _drop(self, chunk: Chunk) -> None:
        """Forget a chunk of which no batch was made; its requests are pending, a later run sends them."""
        self._counts["dropped"] += chunk.requests
        if self._budget:
            self._budget.settle(chunk.worst_nano, 0)
        await to_thread.run_sync(self._chunks.close_chunk, chunk, Step.DROPPED, limiter=self._passage.disk)

    # ── small things ──────────────────────────────────────────────────────────────────────────────────────────────

    def _harvest(self, group: _Group, chunk: Chunk) -> Harvest:
        judge = Judge(chunk, group.courier.codec, self._pricing, self._clock, self._max_attempts)
        return Harvest(self._chunks, chunk, group.courier, judge, self._is_known)

    def _key_of(self, member: Member) -> int:
        return self._key(member.request.custom_id, member.request.digest)

    def _is_known(self, member: Member) -> bool:
        return self._is_answered(self._key_of(member))

    def _check_finished(self) -> None:
        if self._is_closed and not self._following and not any(group.spool for group in self._groups.values()):
            self._finished.set()
