"""Runs on this machine: `run_batch` is what `pipeline run` does for one results file.

    reader ─▶ planner ─▶ sender ─▶ writer ─▶ totals, ledger
    └──── feed ─────┘

`Run` opens and concludes; `LocalExecutor` sends the requests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType

import anyio
from anyio import to_thread

from pipeline.accounting.pricing import BATCH, LIVE, LanePricing, Prices
from pipeline.accounting.run_ledger import RunLedger
from pipeline.core import config, config_file, environment, http, process
from pipeline.core.config import Config
from pipeline.core.errors import StorageError, UsageError
from pipeline.core.types import Request
from pipeline.dispatch.batch.coordinator import BatchCoordinator
from pipeline.dispatch.batch.store import BatchItem, BatchRecord, BatchStore, Step
from pipeline.dispatch.live import shared_limits
from pipeline.dispatch.live.rate_limiter import RateLimiter
from pipeline.dispatch.live.sender import Sender
from pipeline.dispatch.live.shared_limits import QuotaSync
from pipeline.inputs import reader
from pipeline.results import codec
from pipeline.results.object_store_writer import output_place
from pipeline.runner import factory, rehearsal
from pipeline.runner.context import RunContext
from pipeline.runner.executor import ExecutorStatistics, Task, WorkPhase
from pipeline.runner.options import Ended, Options
from pipeline.runner.run import Run, Watch, check
from pipeline.runner.summary import Summary

_COUNT_REST_SECONDS = 5.0


async def run_batch(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str],
    config: Config | None = None,
    options: Options | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] = lambda message: None,
    handle_signals: bool = False,
) -> Summary:
    """Answer every line of the inputs into one results file and return the summary.

    An output at an object store is a folder. Repeating a call finishes what is missing. `watch` runs beside the work
    and may ask for the progress at any time; `say` is called with messages for people.

    Raises `UsageError` before anything is sent, `TryLaterError` if another run holds the output, and `StorageError` if
    results or ledger cannot be stored. Errors of providers are in the results and the summary. So are errors of an
    object store: the results are safe on this machine.
    """
    options = options or Options()
    config = config or config_file.load()
    with rehearsal.settings_for(config, options) as settings:
        place = output_place(output)
        sources = reader.sources([os.fspath(item) for item in inputs], but=place)
        ledger = RunLedger(environment.ledger_path(config))
        possible = with_possible_concurrency(settings)
        context = RunContext(sources, place, possible, options, Prices(config), ledger, say)
        warnings = check(context)
        granted, requested = possible.sending.concurrency, settings.sending.concurrency
        if granted < requested:
            warnings.append(
                f"{granted:,} requests in flight instead of {requested:,}: no more files may be open (ulimit -n)"
            )
        run = Run(context, LocalExecutor(context), watch=watch, warnings=warnings)
        return await run.execute(handle_signals=handle_signals)


def with_possible_concurrency(settings: Config) -> Config:
    """Return the settings with as many requests in flight as this process may have files open."""
    possible = process.raise_fd_limit(settings.sending.concurrency)
    return settings.with_("sending", concurrency=possible)


class LocalExecutor:
    """Sends requests from this machine, live and through batch APIs.

    `rate_limiter_of` returns the rate limiter of a model. `keep_share` keeps the run to its share of limits that
    others use too. `ended` holds the models that were given up before. `sender` and `batches` exist once `execute` has
    begun.
    """

    def __init__(
        self,
        context: RunContext,
        *,
        rate_limiter_of: Callable[[str, str], RateLimiter] | None = None,
        keep_share: Task | None = None,
        ended: Ended = MappingProxyType({}),
    ) -> None:
        self._context = context
        self._rate_limiter_of = rate_limiter_of or partial(factory.rate_limiter, context.settings)
        self._keep_share = keep_share
        self._ended = ended
        self.sender: Sender
        self.batch_store = BatchStore(context.writer.path)
        self.batches: BatchCoordinator | None = None
        self._batches_done = anyio.Event()

    async def execute(self, phase: WorkPhase) -> None:
        context, settings = self._context, self._context.settings
        async with http.Client(settings.sending) as client:
            self.sender = factory.sender(
                settings,
                client,
                context.clock,
                context.writer,
                LanePricing(context.prices, context.clock),
                context.budget,
                rate_limiter_of=self._rate_limiter_of,
                ended=self._ended,
            )
            if settings.lane != LIVE or self.batch_store.still_open:
                self.batches = self._batch_lane(client)
            async with phase.begin(*self._beside()) as scope:
                await self._send(phase, scope)
            if phase.signal is None:
                await self._copy_results()

    # ── before ────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self, resources: ExitStack) -> Iterator[Request]:
        """Read which batches earlier runs left; those of a simulator are gone with it."""
        resources.callback(self.batch_store.release)
        self.batch_store.open()
        for record in self.batch_store.still_open:
            if record.simulated or self._is_lost(record):
                self.batch_store.close_record(record, Step.DROPPED)
        left = self.batch_store.still_open
        if left and self._context.options.fresh:
            raise UsageError(
                f"{len(left):,} batch(es) of {self._context.writer.name!r} are not collected yet, and --fresh would "
                "pay for their requests again",
                hint="run without --fresh to collect them, or cancel them first: pipeline batches cancel ID",
            )
        if left:
            self._context.notify(
                f"{sum(record.requests for record in left):,} requests are in {len(left):,} batch(es) of earlier runs"
            )
        return self._requests_in_batches()

    def _is_lost(self, record: BatchRecord) -> bool:
        """Return True if nothing is lost by forgetting a record: no batch was made of it, and live it goes another way.

        Raises `StorageError` where a batch was made of requests that are damaged now.
        """
        if self._context.settings.lane == LIVE and not record.may_have_batch:
            return True
        if not self.batch_store.is_damaged(record):
            return False
        path = str(self.batch_store.path(record))
        if record.may_have_batch:
            raise StorageError(
                f"{path!r} is damaged or gone, and batch {record.name} was made of it",
                hint=f"restore the file, or give up on the batch: pipeline batches cancel --forget {record.name}",
            )
        self._context.notify(f"{path!r} is damaged, but no batch was made of it; its requests are sent again")
        return True

    def _requests_in_batches(self) -> Iterator[Request]:
        """Yield the requests in open batches, without those that have results (unless their batch retries failures)."""
        feed = self._context.feed
        for record in self.batch_store.still_open:
            for _, item in self.batch_store.items(record):
                request = item.request
                if record.retries_failed or feed.outcome(request.custom_id, request.digest) is None:
                    yield request

    def _batch_lane(self, client: http.Client) -> BatchCoordinator:
        return factory.batch_lane(
            self._context.settings,
            client,
            self._context.clock,
            self.batch_store,
            self._context.writer,
            LanePricing(self._context.prices, self._context.clock, BATCH),
            self._context.budget,
            self._context.options,
            run_id=self._context.run_id,
            input=self._context.feed,
            say=self._context.notify,
            send_live=None if self._context.settings.lane == BATCH else self._send_live,
        )

    # ── the work ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _beside(self) -> list[Task]:
        """Return what goes on beside the work."""
        context = self._context
        tasks: list[Task] = [
            partial(to_thread.run_sync, context.prices.load),
            partial(self.sender.stop_when_stalled, config.poll_policy(context.settings)),
        ]
        if self._keep_share:
            tasks.append(self._keep_share)
        elif context.settings.sending.share_limits and not context.options.simulate:
            broker = shared_limits.lease_broker(context.settings, context.run_id)
            sync = QuotaSync(broker, context.clock, rate_limiters=self.sender.rate_limiters, notify=context.notify)
            tasks.append(sync.keep)
        return tasks

    async def _send(self, phase: WorkPhase, scope: anyio.CancelScope) -> None:
        async with anyio.create_task_group() as work:
            work.start_soon(self._feed)
            if self.batches:
                work.start_soon(self._run_batches, self.batches)
            await self.sender.run()
            if self.batches:
                if self.sender.stopped:
                    self.batches.stop()
                await self._batches_done.wait()
            # After a stop the reader may still be counting the lines that are left: a number not worth a long wait.
            scope.deadline = anyio.current_time() + (0 if phase.signal else _COUNT_REST_SECONDS)

    async def _feed(self) -> None:
        is_live = self.batches is None or self._context.settings.lane == LIVE
        await self._context.feed.feed(self.sender.submit if is_live else self._submit_to_batches)
        if self.batches:
            await self.batches.close()
        else:
            self.sender.close()

    async def _submit_to_batches(self, requests: Sequence[Request]) -> None:
        assert self.batches is not None
        await self.batches.submit(requests)

    async def _run_batches(self, batches: BatchCoordinator) -> None:
        """See batches through; only then is it known that nothing more comes to be sent live."""
        try:
            await batches.run()
        finally:
            self._batches_done.set()
            self.sender.close()

    async def _send_live(self, items: Sequence[BatchItem]) -> None:
        """Send live what batches did not answer."""
        await self.sender.submit([each.request for each in items], [(each.attempts, each.counted) for each in items])

    async def _copy_results(self) -> None:
        """Give each request that was not sent because an equal one was the result of that one."""
        groups = self._context.feed.copies(self._context.run_id)
        while lines := await to_thread.run_sync(next, groups, None):
            await self._context.writer.append_lines(lines)
            day = self._context.clock.utc()[:10]
            for line in lines:
                self._context.count(codec.decode(line), day=day)

    # ── what it is asked ──────────────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> str:
        self.sender.stop()
        text = f"finishing {self.sender.statistics().in_flight} request(s) in flight"
        if self.batches:
            self.batches.stop()
            text += ", leaving batches to run at their providers"
        return text

    def statistics(self) -> ExecutorStatistics:
        live = self.sender.statistics()
        reasons = factory.stop_reasons(self.sender, self.batches)
        if not self.batches:
            return ExecutorStatistics(
                live=live,
                stopped=self.sender.stopped,
                reasons=reasons,
                end_reasons=reasons,
                is_draining=self.sender.is_draining,
                is_partial=live.dropped > 0,
            )
        batch = self.batches.statistics()
        return ExecutorStatistics(
            live=live,
            batch_attempts=batch.attempts,
            batch_billed=batch.billed,
            batch_failed=batch.failed,
            batch_unknown=batch.unknown,
            batches=batch.records,
            stopped=self.sender.stopped or self.batches.stopped,
            reasons=reasons,  # no end reasons: what one lane could not answer the other one has answered
            is_draining=self.sender.is_draining,
            is_partial=live.dropped > 0 or self.batches.is_partial,
        )
