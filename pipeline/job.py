"""One run, from inputs to summary: the one place where the parts are made and joined.

    read ─▶ plan ─▶ send ─▶ record ─▶ totals
    └── intake ──┘  sender  recorder  books (the ledger)

`run_batch` is what `pipeline run` does for one results file. The parts themselves are made in `assemble`.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import orjson
from anyio import to_thread

from pipeline import assemble, disk, errors, files, ledger, parts, providers, read, record, results, stores, transport
from pipeline import config as configuration
from pipeline.assemble import Options
from pipeline.batch import BatchLane
from pipeline.books import RUNNING, Books
from pipeline.chunks import Chunk, Chunks, Member, Step
from pipeline.clock import Clock
from pipeline.config import Config
from pipeline.errors import BudgetReachedError, PipelineError, ProviderError, StorageError, TryLaterError, UsageError
from pipeline.intake import Intake
from pipeline.journal import Sent
from pipeline.pricing import BATCH, LIVE, Prices
from pipeline.record import Recorder
from pipeline.send import Sender, Statistics
from pipeline.totals import Attempts, Summary, Totals
from pipeline.types import Request, Result

SHOWN_FAILURES = 10
_COUNT_REST_SECONDS = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run at a moment. `total` is None until the whole input was read; `run` counts what is safe on the disk."""

    elapsed_s: float
    read: int
    total: int | None
    reused: int
    run: Totals
    sender: Statistics
    batches: Sequence[Chunk]
    is_draining: bool


Watch = Callable[[Callable[[], Progress]], Coroutine[Any, Any, None]]


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
    config = config or configuration.load()
    prices = Prices(config)
    with assemble.settings_for(config, options) as settings:
        books = Books(configuration.ledger_path(config))
        run = _Run([os.fspath(item) for item in inputs], os.fspath(output), settings, options, prices, books, say)
        try:
            return await run.execute(watch, handle_signals=handle_signals)
        except BaseExceptionGroup as group:
            if error := errors.only_one(group):
                raise error from group
            raise
        finally:
            run.chunks.release()
            run.recorder.release()


class _Run:
    """The state of one run of `run_batch`."""

    def __init__(
        self,
        inputs: Sequence[str],
        output: str,
        settings: Config,
        options: Options,
        prices: Prices,
        books: Books,
        say: Callable[[str], None],
    ) -> None:
        room = files.room_for(settings.sending.concurrency)
        wanted = settings.sending.concurrency
        self.settings = settings.with_("sending", concurrency=room)
        self.options = options
        self.prices = prices
        self.books = books
        self.say = say
        self.clock = Clock()
        self.run_id = f"run-{self.clock.started_at.translate({45: None, 58: None})}-{secrets.token_hex(3)}"
        self.pricing = assemble.Pricing(prices, self.clock)
        self.budget = assemble.budget(settings)
        self.recorder = self._recorder(inputs, output)
        self.intake = Intake(self.sources, self.settings, options, self.recorder, self.clock)
        self.warnings = self._preview()
        if room < wanted:
            self.warnings += (
                f"{room:,} requests in flight instead of {wanted:,}: no more files may be open (ulimit -n)",
            )
        self.run_totals = Totals()
        self.all_totals = Totals()
        self.damaged = 0
        self.earlier_unknown: Sequence[Sent] = ()
        self.failures: list[str] = []
        self.signal: signal.Signals | None = None
        self.work: anyio.CancelScope | None = None
        self.is_working = False
        self.sender: Sender
        self.chunks = Chunks(self.recorder.path)
        self.batches: BatchLane | None = None
        self.batches_done = anyio.Event()

    def _recorder(self, inputs: Sequence[str], output: str) -> Recorder:
        """Make the recorder of the output; refuse one that is an input."""
        options: dict[str, Any] = {
            "run_id": self.run_id,
            "form": configuration.output_format(self.settings),
            "echo_request": self.settings.output.echo_request,
            "is_simulated": self.options.simulate,
            "sync": self.settings.output.durability == "full",
            "on_done": self._count,
        }
        if not stores.is_url(output):
            self.sources = read.sources(inputs, but=Path(output))
            _refuse_overwriting_input(Path(output), self.sources)
            return Recorder(Path(output), **options)
        folder = parts.folder_of(output)
        self.sources = read.sources(inputs, but=folder)
        _refuse_parts(folder, self.sources, self.settings)
        spool = configuration.spool_path(self.settings, folder)
        return parts.RemoteRecorder(folder, spool, on_trouble=self._heed_trouble, **options)

    async def execute(self, watch: Watch | None, *, handle_signals: bool) -> Summary:
        async with anyio.create_task_group() as beside:
            if handle_signals:
                beside.start_soon(self._heed_signals)
            summary = await self._run(watch)
            beside.cancel_scope.cancel()
        return summary

    async def _run(self, watch: Watch | None) -> Summary:
        await to_thread.run_sync(self._open)
        async with transport.Client(self.settings.sending) as client:
            self.sender = assemble.sender(self.settings, client, self.clock, self.recorder, self.pricing, self.budget)
            if self.settings.lane != LIVE or self.chunks.still_open:
                self.batches = self._batch_lane(client)
            async with anyio.create_task_group() as writing:
                writing.start_soon(self.recorder.run)
                try:
                    await self._work(watch)
                    if self.signal is None:
                        await self._copy_results()
                finally:
                    self.recorder.close()
        self.all_totals.add_state(self.run_totals.as_state())
        superseded = await to_thread.run_sync(self._tidy)
        summary = self._summary(superseded)
        self._write_totals(summary)
        if trouble := await to_thread.run_sync(self.recorder.publish, _as_json(summary)):
            summary = _stopped(summary, trouble)
            self._write_totals(summary)
        await to_thread.run_sync(self._close_books, summary)
        self.recorder.end()
        return summary

    # ── before ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _preview(self) -> tuple[str, ...]:
        """Look at the first lines before anything is sent: keys and prices must be there, retired models are told."""
        found = self.intake.preview()
        for name in dict.fromkeys(name for name, _ in found):
            configuration.api_key(name, self.settings.providers[name])
        if self.budget:
            for request in found.values():
                self.pricing.worst_case(request)
        notices = (_retirement(self.settings, name, model) for name, model in found)
        return tuple(notice for notice in notices if notice)

    def _open(self) -> None:
        """Take the output and learn what it holds; note in the ledger that this run goes on."""
        self.recorder.open()
        self._open_chunks()
        if self.options.fresh and (aside := self.recorder.set_aside()):
            self.say(f"earlier results are set aside as {aside}")
        done = self.recorder.done(self.all_totals)
        self.damaged = done.damaged
        if done.damaged:
            self.warnings += (f"{done.damaged} damaged line(s) in {self.recorder.name}; they are done again",)
        self.intake.learn(done)
        self._hold_what_is_in_batches()
        if notice := self.intake.notice():
            self.say(notice)
        self.recorder.begin()
        self.earlier_unknown = self.recorder.unknown()
        self.books.open(self._describe())
        if self.budget and not self.options.simulate:
            today, month = self.books.spent(self.clock.moment())
            self.budget = assemble.budget(self.settings, spent_today=today, spent_this_month=month)
        for warning in self.warnings:
            self.say(warning)

    def _open_chunks(self) -> None:
        """Learn what earlier runs left with batch APIs; batches of a simulator are gone with it."""
        self.chunks.open()
        for chunk in self.chunks.still_open:
            if chunk.simulated or self._is_lost(chunk):
                self.chunks.close_chunk(chunk, Step.DROPPED)
        left = self.chunks.still_open
        if left and self.options.fresh:
            raise UsageError(
                f"{len(left):,} batch(es) of {self.recorder.name!r} are not collected, and --fresh would pay for "
                "their requests again",
                hint="run without --fresh to collect them, or cancel them first: pipeline batches cancel ID",
            )
        if left:
            self.say(
                f"{sum(chunk.requests for chunk in left):,} requests are in {len(left):,} batch(es) of earlier runs"
            )

    def _is_lost(self, chunk: Chunk) -> bool:
        """Tell whether nothing is lost by forgetting a chunk: no batch was made of it, and live it goes another way.

        Raises `StorageError` where a batch was made of requests that are damaged now.
        """
        if self.settings.lane == LIVE and not chunk.may_have_batch:
            return True
        if not self.chunks.is_damaged(chunk):
            return False
        path = str(self.chunks.path(chunk))
        if chunk.may_have_batch:
            raise StorageError(
                f"{path!r} is damaged or gone, and batch {chunk.name} was made of it",
                hint=f"bring it back, or give the batch up: pipeline batches cancel --forget {chunk.name}",
            )
        self.say(f"{path!r} is damaged; no batch was made of it, its requests are sent anew")
        return True

    def _hold_what_is_in_batches(self) -> None:
        for chunk in self.chunks.still_open:
            requests = (member.request for _, member in self.chunks.members(chunk))
            self.intake.hold(
                request
                for request in requests
                if chunk.retries_failed or self.intake.outcome(request.custom_id, request.digest) is None
            )

    def _batch_lane(self, client: transport.Client) -> BatchLane:
        return assemble.batch_lane(
            self.settings,
            client,
            self.clock,
            self.chunks,
            self.recorder,
            assemble.Pricing(self.prices, self.clock, BATCH),
            self.budget,
            self.options,
            run_id=self.run_id,
            input=self.intake,
            say=self.say,
            resend=None if self.settings.lane == BATCH else self._resend,
        )

    # ── the work ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _work(self, watch: Watch | None) -> None:
        async with anyio.create_task_group() as beside:
            with anyio.CancelScope() as self.work:
                self.is_working = True
                if self.signal:
                    self._drain()
                if watch:
                    beside.start_soon(watch, self.progress)
                beside.start_soon(to_thread.run_sync, self.prices.load)
                beside.start_soon(self.books.keep, self._describe, self.say)
                if self.settings.sending.share_limits and not self.options.simulate:
                    sharing = assemble.sharing(self.settings, self.sender, self.clock, self.run_id, self.say)
                    beside.start_soon(sharing.keep)
                beside.start_soon(self.sender.stop_when_stalled, assemble.patience(self.settings))
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
                    self.work.deadline = anyio.current_time() + (0 if self.signal else _COUNT_REST_SECONDS)
            self.is_working = False
            beside.cancel_scope.cancel()

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

    async def _run_batches(self, batches: BatchLane) -> None:
        """See batches through; only then is it known that nothing more comes to be sent live."""
        try:
            await batches.run()
        finally:
            self.batches_done.set()
            self.sender.close()

    async def _resend(self, members: Sequence[Member]) -> None:
        """Send live what batches did not answer."""
        await self.sender.submit(
            [each.request for each in members], [(each.attempts, each.counted) for each in members]
        )

    async def _copy_results(self) -> None:
        """Give each request that was not sent because an equal one was the result of that one."""
        groups = self.intake.copies(self.run_id)
        while lines := await to_thread.run_sync(next, groups, None):
            await self.recorder.append_lines(lines)
            for copy in map(results.decode, lines):
                self.run_totals.add(copy)
                self.books.accounts.add(copy, self.clock.utc()[:10])

    async def _heed_signals(self) -> None:
        """First signal: send nothing new and finish what is in flight. Second: stop now. What is ignored stays so."""
        heeded = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
        with anyio.open_signal_receiver(*heeded) as signals:
            async for received in signals:
                if self.signal is None:
                    self.signal = received
                    self._drain()
                    continue
                self.say("stopping now")
                if self.is_working and self.work:
                    self.work.cancel()
                else:  # threads are at work on files, which bear a kill
                    signal.signal(received, signal.SIG_DFL)
                    signal.raise_signal(received)

    def _drain(self) -> None:
        """Send nothing new; before the work begins there is nothing to stop yet, after it nothing any more."""
        if self.is_working and self.signal:
            text = f"finishing {self.sender.statistics().in_flight} request(s) in flight"
            text += ", leaving batches to go on at their providers" if self.batches else ""
            self._stop_sending()
            self.say(f"{self.signal.name}: {text}; once more to stop now")

    def _stop_sending(self) -> None:
        if self.is_working and self.work:
            self.work.deadline = anyio.current_time() + self.settings.sending.drain_timeout
            self.sender.stop()
            if self.batches:
                self.batches.stop()

    def _heed_trouble(self, trouble: PipelineError) -> None:
        """Tell what keeps results from their store; where somebody else writes there, pay for nothing more."""
        self.say(trouble.message)
        if isinstance(trouble, TryLaterError):
            self._stop_sending()

    def _count(self, result: Result) -> None:
        self.run_totals.add(result)
        self.books.accounts.add(result, result.completed_at[:10])
        self.intake.finished(result)
        if result.failure and len(self.failures) < SHOWN_FAILURES:
            self.failures.append(_describe_failure(result))

    def progress(self) -> Progress:
        """Return a snapshot of the run."""
        return Progress(
            elapsed_s=self.clock.elapsed(),
            read=self.intake.lines,
            total=self.intake.lines if self.intake.is_all_read else None,
            reused=self.intake.reused,
            run=self.run_totals,
            sender=self.sender.statistics(),
            batches=self.batches.statistics().chunks if self.batches else (),
            is_draining=self.sender.is_draining,
        )

    # ── after ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tidy(self) -> int:
        """Bring the results file into its final form, if the whole input is known."""
        is_partial = self.sender.statistics().dropped or (self.batches and self.batches.is_partial)
        if not self.intake.wants_tidying() or is_partial:
            return 0
        superseded = self.recorder.tidy(*self.intake.places(), ordered=self.settings.output.ordered)
        if superseded:
            self.all_totals = Totals()
            self.recorder.done(self.all_totals)
        return superseded

    def _write_totals(self, summary: Summary) -> None:
        disk.write_file(self.recorder.beside(".usage.json"), _as_json(summary))

    def _summary(self, superseded: int) -> Summary:
        pending = self.intake.lines - self.intake.reused - self.run_totals.finished + self.intake.extra
        is_unfinished = pending > 0 or not self.intake.is_all_read
        reason = self._reason() if is_unfinished else None
        unknown = self.recorder.unknown()
        return Summary(
            run_id=self.run_id,
            status="stopped" if reason else "partial" if is_unfinished else "completed",
            stop_reason=reason,
            exit_code=self._exit_code(is_unfinished=is_unfinished),
            started_at=self.clock.started_at,
            finished_at=self.clock.utc(),
            wall_seconds=self.clock.elapsed(),
            simulated=self.options.simulate,
            tags=self.settings.tags,
            inputs=self.sources,
            results_file=self.recorder.name,
            total=self.intake.lines,
            reused=self.intake.reused,
            pending=pending,
            extra=self.intake.extra,
            attempts=self._attempts(),
            price_source=self.prices.source,
            cap=self.budget.cap if self.budget else None,
            cap_used=self.budget.used if self.budget else 0,
            possibly_billed=unknown,
            run=self.run_totals,
            results=self.all_totals,
            superseded=superseded,
            warnings=self.warnings,
            batches=[chunk.as_dict() for chunk in self.batches.statistics().chunks] if self.batches else (),
            ends_all=isinstance(self.sender.stopped or (self.batches and self.batches.stopped), ProviderError),
            failures=tuple(self.failures),
        )

    def _attempts(self) -> Attempts:
        """Count the calls of this run, in both lanes, and those that earlier runs left without an answer."""
        live, earlier = self.sender.statistics(), len(self.earlier_unknown)
        batch = self.batches.statistics() if self.batches else None
        return Attempts(
            total=live.attempts + earlier + (batch.attempts if batch else 0),
            billed=live.billed + (batch.billed if batch else 0),
            rate_limited=live.rate_limited,
            failed=live.failed + (batch.failed if batch else 0),
            unknown=live.unknown + earlier + (batch.unknown if batch else 0),
        )

    def _describe(self) -> ledger.Run:
        """Return what the ledger holds of this run while it goes on."""
        return ledger.Run(
            run_id=self.run_id,
            started_at=self.clock.started_at,
            status=RUNNING,
            simulated=self.options.simulate,
            results_file=self.recorder.address,
            inputs=tuple(self.sources),
            tags=self.settings.tags,
            price_source=self.prices.source,
            total=self.intake.lines,
            succeeded=self.run_totals.succeeded,
            failed=self.run_totals.failed,
            invalid=self.run_totals.invalid,
            reused=self.intake.reused,
            wall_seconds=self.clock.elapsed(),
        )

    def _close_books(self, summary: Summary) -> None:
        run = replace(
            self._describe(),
            status=summary.status,
            finished_at=summary.finished_at,
            exit_code=summary.exit_code,
            stop_reason=summary.stop_reason,
            pending=summary.pending,
            wall_seconds=summary.wall_seconds,
        )
        self.books.close(run, summary.possibly_billed, self.recorder.path)

    def _reason(self) -> str | None:
        if self.signal:
            return f"interrupted by {self.signal.name}"
        return "; ".join(map(_explain, assemble.stop_reasons(self.sender, self.batches))) or None

    def _exit_code(self, *, is_unfinished: bool) -> int:
        if self.signal and is_unfinished:
            return 130 if self.signal is signal.SIGINT else 143
        reasons = assemble.stop_reasons(self.sender, self.batches)
        if reasons and (is_unfinished or not self.batches):
            return _exit_code(reasons[0], has_sent=self._attempts().total > 0)
        if self.damaged:
            return 6
        return int(bool(self.run_totals.failed or self.run_totals.invalid or self.intake.reused_failed))


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _refuse_overwriting_input(output: Path, sources: Sequence[str]) -> None:
    """Refuse an output that is an input under any name (path, symlink, hard link, stdin), or whose side files are."""
    try:
        str(output).encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"the name of the output {str(output)!a} is not UTF-8; choose another") from exc
    if output.is_dir():
        raise UsageError(f"the output {str(output)!r} is a directory; name a file, or use -d for one file per input")
    if not output.parent.is_dir():
        raise UsageError(f"the output's directory {str(output.parent)!r} does not exist")
    for name in (output, *(disk.beside(output, suffix) for suffix in record.SIDE_FILES)):
        if name.exists() and any(read.is_file_of(source, name) for source in sources):
            raise UsageError(f"the output {str(name)!r} is also an input; results would overwrite requests")


def _refuse_parts(folder: str, sources: Sequence[str], settings: Config) -> None:
    """Refuse an output at a store that cannot be: one that is an input, or that is to be in the order of the input."""
    if part := next((source for source in sources if read.is_part_of(source, folder)), None):
        raise UsageError(f"the output {folder!r} holds the input {part!r}; choose another -o")
    if settings.output.ordered:
        raise UsageError(
            "--ordered wants a file: an object store gets results while they come, and cannot put them in order later",
            hint="leave it out, or write to a file, -o answers.jsonl --ordered, and copy that to the store",
        )


def _stopped(summary: Summary, trouble: PipelineError) -> Summary:
    """Return the summary of a run whose results did not get to their store, whatever else it did."""
    reason = f"{trouble.message} ({trouble.hint})" if trouble.hint else trouble.message
    return replace(summary, status="stopped", stop_reason=reason, exit_code=trouble.exit_code)


def _as_json(summary: Summary) -> bytes:
    return orjson.dumps(summary.as_dict(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _retirement(settings: Config, provider: str, model: str) -> str | None:
    notice = providers.retirement(configuration.protocol(settings.providers[provider]), model)
    return f"{provider}/{model}: {notice}" if notice else None


def _explain(reason: PipelineError) -> str:
    status = getattr(reason, "status", None)
    request_id = getattr(reason, "request_id", None)
    details = [f"HTTP {status}" if status else "", f"request id {request_id}" if request_id else ""]
    known = ", ".join(detail for detail in details if detail)
    return f"{reason.message} ({known})" if known else reason.message


def _exit_code(reason: PipelineError, *, has_sent: bool) -> int:
    """Return the exit code of what stopped a run; a key that was missing later on is the provider's stop."""
    if isinstance(reason, TryLaterError | BudgetReachedError):
        return reason.exit_code
    return 2 if isinstance(reason, UsageError) and not has_sent else 3


def _describe_failure(result: Result) -> str:
    """Say in one line what failed and where; an invalid line's message names its place already."""
    assert result.failure is not None
    if result.request is None:
        return result.failure.message
    status = f"HTTP {result.failure.status}, " if result.failure.status else ""
    return (
        f"{result.source}:{result.line}: {result.custom_id}: {result.failure.message} ({status}{result.failure.type})"
    )
