"""One run on this machine, from inputs to summary: the place where its parts are made and joined.

    read ─▶ plan ─▶ send ─▶ record ─▶ totals
    └── intake ──┘  sender  recorder  books (the ledger)

`run_batch` is what `pipeline run` does for one results file. What frames the work, from opening to summary, is `run`;
the parts themselves are made in `assemble`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anyio
from anyio import to_thread

from pipeline.accounting.pricing import BATCH, LIVE, LanePricing, Prices
from pipeline.accounting.run_ledger import NullRunLedger, RunLedger
from pipeline.core import config, config_file, environment, http, process
from pipeline.core.config import Config
from pipeline.core.errors import PipelineError, StorageError, UsageError
from pipeline.core.types import Request
from pipeline.dispatch.batch.coordinator import BatchCoordinator
from pipeline.dispatch.batch.store import BatchItem, BatchRecord, BatchStore, Step
from pipeline.dispatch.live import shared_limits
from pipeline.dispatch.live.rate_limiter import RateLimiter
from pipeline.dispatch.live.sender import Sender, Statistics
from pipeline.dispatch.live.shared_limits import QuotaSync
from pipeline.inputs import reader
from pipeline.inputs.sources import ByteRange
from pipeline.results import codec
from pipeline.runner import options, rehearsal, wiring
from pipeline.runner.base import RunBase, Watch, place_of
from pipeline.runner.options import Options
from pipeline.runner.summary import Attempts, Summary

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

    An output at an object store is a folder (`parts`). Repeating a call finishes what is missing. `watch` runs beside
    the work and may ask for the progress at any time; `say` gets sentences for people. Raises `UsageError` before
    anything is sent, `TryLaterError` when another run holds the output, `StorageError` when results or ledger cannot
    be stored. What providers answer raises nothing: it is in the results and the summary. So is what keeps results
    from an object store, as they are safe on this machine.
    """
    options = options or Options()
    config = config or config_file.load()
    with rehearsal.settings_for(config, options) as settings:
        place = place_of(output)
        sources = reader.sources([os.fspath(item) for item in inputs], but=place)
        books = RunLedger(environment.ledger_path(config))
        job = LocalRun(sources, place, settings, options, Prices(config), books, say)
        return await job.execute(watch, handle_signals=handle_signals)


class LocalRun(RunBase):
    """A run whose requests are sent from here."""

    ended: options.Ended = MappingProxyType({})  # models that are given up before the run begins

    def __init__(
        self,
        sources: Sequence[str | ByteRange],
        output: str | Path,
        settings: Config,
        options: Options,
        prices: Prices,
        books: RunLedger | NullRunLedger,
        say: Callable[[str], None],
        *,
        run_id: str | None = None,
    ) -> None:
        wanted = settings.sending.concurrency
        room = process.raise_fd_limit(wanted)
        settings = settings.with_("sending", concurrency=room)
        super().__init__(sources, output, settings, options, prices, books, say, run_id=run_id)
        if room < wanted:
            self.warnings += (
                f"{room:,} requests in flight instead of {wanted:,}: no more files may be open (ulimit -n)",
            )
        self.sender: Sender
        self.batch_store = BatchStore(self.recorder.path)
        self.batches: BatchCoordinator | None = None
        self.batches_done = anyio.Event()

    async def answer(self, watch: Watch | None) -> None:
        await to_thread.run_sync(self._open)
        async with http.Client(self.settings.sending) as client:
            self.sender = wiring.sender(
                self.settings,
                client,
                self.clock,
                self.recorder,
                self.pricing,
                self.budget,
                rate_limiter_of=self._rate_limiter_of,
                ended=self.ended,
            )
            if self.settings.lane != LIVE or self.batch_store.still_open:
                self.batches = self._batch_lane(client)
            async with anyio.create_task_group() as writing:
                writing.start_soon(self.recorder.run)
                try:
                    await self._attend(watch, *self._beside())
                    if self.signal is None:
                        await self._copy_results()
                finally:
                    self.recorder.close()

    def release(self) -> None:
        self.batch_store.release()
        super().release()

    # ── before ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open_lanes(self) -> None:
        """Learn what earlier runs left with batch APIs; batches of a simulator are gone with it."""
        self.batch_store.open()
        for record in self.batch_store.still_open:
            if record.simulated or self._is_lost(record):
                self.batch_store.close_record(record, Step.DROPPED)
        left = self.batch_store.still_open
        if left and self.options.fresh:
            raise UsageError(
                f"{len(left):,} batch(es) of {self.recorder.name!r} are not collected, and --fresh would pay for "
                "their requests again",
                hint="run without --fresh to collect them, or cancel them first: pipeline batches cancel ID",
            )
        if left:
            self.say(
                f"{sum(record.requests for record in left):,} requests are in {len(left):,} batch(es) of earlier runs"
            )

    def _is_lost(self, record: BatchRecord) -> bool:
        """Tell whether nothing is lost by forgetting a record: no batch was made of it, and live it goes another way.

        Raises `StorageError` where a batch was made of requests that are damaged now.
        """
        if self.settings.lane == LIVE and not record.may_have_batch:
            return True
        if not self.batch_store.is_damaged(record):
            return False
        path = str(self.batch_store.path(record))
        if record.may_have_batch:
            raise StorageError(
                f"{path!r} is damaged or gone, and batch {record.name} was made of it",
                hint=f"bring it back, or give the batch up: pipeline batches cancel --forget {record.name}",
            )
        self.say(f"{path!r} is damaged; no batch was made of it, its requests are sent anew")
        return True

    def _hold(self) -> None:
        for record in self.batch_store.still_open:
            requests = (item.request for _, item in self.batch_store.items(record))
            self.intake.hold(
                request
                for request in requests
                if record.retries_failed or self.intake.outcome(request.custom_id, request.digest) is None
            )

    def _batch_lane(self, client: http.Client) -> BatchCoordinator:
        return wiring.batch_lane(
            self.settings,
            client,
            self.clock,
            self.batch_store,
            self.recorder,
            LanePricing(self.prices, self.clock, BATCH),
            self.budget,
            self.options,
            run_id=self.run_id,
            input=self.intake,
            say=self.say,
            send_live=None if self.settings.lane == BATCH else self._send_live,
        )

    # ── the work ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _beside(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        """Return what goes on beside the work."""
        tasks: list[Callable[[], Coroutine[Any, Any, None]]] = [
            partial(to_thread.run_sync, self.prices.load),
            partial(self.sender.stop_when_stalled, config.poll_policy(self.settings)),
        ]
        if sharing := self._sharing():
            tasks.append(sharing)
        return tasks

    def _rate_limiter_of(self, provider: str, model: str) -> RateLimiter:
        return wiring.rate_limiter(self.settings, provider, model)

    def _sharing(self) -> Callable[[], Coroutine[Any, Any, None]] | None:
        """Return what keeps this run to its share of limits; None where it has all of them."""
        if not self.settings.sending.share_limits or self.options.simulate:
            return None
        broker = shared_limits.lease_broker(self.settings, self.run_id)
        return QuotaSync(broker, self.clock, rate_limiters=self.sender.rate_limiters, notify=self.say).keep

    async def _work(self, scope: anyio.CancelScope) -> None:
        async with anyio.create_task_group() as work:
            work.start_soon(self._feed)
            if self.batches:
                work.start_soon(self._run_batches, self.batches)
            await self.sender.run()
            if self.batches:
                if self.sender.stopped:
                    self.batches.stop()
                await self.batches_done.wait()
            # After a stop the reader may still count what is left, but nobody waits long for a number.
            scope.deadline = anyio.current_time() + (0 if self.signal else _COUNT_REST_SECONDS)

    async def _feed(self) -> None:
        is_live = self.batches is None or self.settings.lane == LIVE
        await self.intake.feed(self.sender.submit if is_live else self._submit_to_batches)
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
            self.batches_done.set()
            self.sender.close()

    async def _send_live(self, items: Sequence[BatchItem]) -> None:
        """Send live what batches did not answer."""
        await self.sender.submit([each.request for each in items], [(each.attempts, each.counted) for each in items])

    async def _copy_results(self) -> None:
        """Give each request that was not sent because an equal one was the result of that one."""
        groups = self.intake.copies(self.run_id)
        while lines := await to_thread.run_sync(next, groups, None):
            await self.recorder.append_lines(lines)
            for copy in map(codec.decode, lines):
                self.run_totals.add(copy)
                self.books.accounts.add(copy, self.clock.utc()[:10])

    # ── what it is asked ──────────────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> str:
        self.sender.stop()
        text = f"finishing {self.sender.statistics().in_flight} request(s) in flight"
        if self.batches:
            self.batches.stop()
            text += ", leaving batches to go on at their providers"
        return text

    def statistics(self) -> Statistics:
        return self.sender.statistics()

    def reasons(self, *, is_unfinished: bool) -> list[PipelineError]:
        return wiring.stop_reasons(self.sender, self.batches) if is_unfinished or not self.batches else []

    @property
    def stopped(self) -> PipelineError | None:
        return self.sender.stopped or (self.batches.stopped if self.batches else None)

    @property
    def is_draining(self) -> bool:
        return self.sender.is_draining

    def is_partial(self) -> bool:
        return super().is_partial() or (self.batches is not None and self.batches.is_partial)

    def chunks_in_sight(self) -> Sequence[BatchRecord]:
        return self.batches.statistics().records if self.batches else ()

    def _attempts(self) -> Attempts:
        attempts = super()._attempts()
        if not self.batches:
            return attempts
        batch = self.batches.statistics()
        return replace(
            attempts,
            total=attempts.total + batch.attempts,
            billed=attempts.billed + batch.billed,
            failed=attempts.failed + batch.failed,
            unknown=attempts.unknown + batch.unknown,
        )
