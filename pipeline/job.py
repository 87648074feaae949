"""One run, from inputs to summary: the one place where the parts are made and joined.

    read ─▶ plan ─▶ send ─▶ record ─▶ totals

`run_batch` is what `pipeline run` does for one results file. The parts themselves are made in `assemble`.
"""

from __future__ import annotations

import os
import secrets
import signal
from array import array
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import anyio
import orjson
from anyio import to_thread

from pipeline import assemble, disk, errors, files, providers, read, rebuilding, record, results, transport
from pipeline import config as configuration
from pipeline import ledger as ledgers
from pipeline.accounts import Accounts
from pipeline.assemble import Options
from pipeline.clock import Clock
from pipeline.config import Config
from pipeline.copies import Originals, copies
from pipeline.errors import BudgetReachedError, PipelineError, TryLaterError, UsageError
from pipeline.fingerprints import FingerprintMap, checksum
from pipeline.index import Awaited, Stretch
from pipeline.journal import Sent
from pipeline.ledger import Entry, Ledger
from pipeline.plan import Invalid
from pipeline.pricing import Prices
from pipeline.read import Batch
from pipeline.record import Done, Recorder
from pipeline.send import Sender, Statistics
from pipeline.totals import Attempts, Summary, Totals
from pipeline.types import Request, Result

PREVIEW_LINES = 2_000
SHOWN_FAILURES = 10
_COUNT_REST_SECONDS = 5.0
_BOOK_SECONDS = 30.0
_COPIED_AT_ONCE = 256
# What is read in one go: a thread hop pays only for many lines.
_READ_LINES = 256
_READ_BYTES = 512 * 1024
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

    Repeating a call finishes what is missing. `watch` runs beside the work and may ask for the progress at any time;
    `say` gets sentences for people. Raises `UsageError` before anything is sent, `TryLaterError` when another run
    holds the output, `StorageError` when results or ledger cannot be stored. What providers answer raises nothing: it
    is in the results and the summary.
    """
    options = options or Options()
    config = config or configuration.load()
    prices = Prices(config)
    with assemble.settings_for(config, options) as settings:
        ledger = configuration.ledger_path(config)
        run = _Run([os.fspath(item) for item in inputs], Path(output), settings, options, prices, ledger, say)
        try:
            return await run.execute(watch, handle_signals=handle_signals)
        except BaseExceptionGroup as group:
            if error := errors.only_one(group):
                raise error from group
            raise
        finally:
            run.recorder.release()


class _Run:
    """The state of one run of `run_batch`."""

    def __init__(
        self,
        inputs: Sequence[str],
        output: Path,
        settings: Config,
        options: Options,
        prices: Prices,
        ledger: Path,
        say: Callable[[str], None],
    ) -> None:
        room = files.room_for(settings.sending.concurrency)
        wanted = settings.sending.concurrency
        self.settings = settings.with_("sending", concurrency=room)
        self.options = options
        self.prices = prices
        self.ledger = ledger
        self.accounts = Accounts()
        self.say = say
        self.clock = Clock()
        self.pricing = assemble.Pricing(prices, self.clock)
        self.budget = assemble.budget(settings)
        self.sources = read.sources(inputs)
        _refuse_overwriting_input(output, self.sources)
        if options.dedupe and read.STDIN in self.sources:
            raise UsageError("--dedupe wants files: stdin can be read only once")
        self.originals = Originals() if options.dedupe else None
        self.previewed = array("Q")
        self.warnings = self._preview()
        if room < wanted:
            self.warnings += (
                f"{room:,} requests in flight instead of {wanted:,}: no more files may be open (ulimit -n)",
            )
        self.run_id = f"run-{self.clock.started_at.translate({45: None, 58: None})}-{secrets.token_hex(3)}"
        self.run_totals = Totals()
        self.all_totals = Totals()
        self.recorder = Recorder(
            output,
            run_id=self.run_id,
            form=configuration.output_format(settings),
            echo_request=settings.output.echo_request,
            is_simulated=options.simulate,
            sync=settings.output.durability == "full",
            on_done=self._count,
        )
        self.planner = assemble.planner(settings, options)
        self.basis = self.planner.basis()
        self.awaited = Awaited()
        self.done = Done()
        self.earlier_unknown: Sequence[Sent] = ()
        self.positions: FingerprintMap | None = None
        self.failures: list[str] = []
        self.read_lines = 0
        self.reused = 0
        self.reused_failed = 0
        self.is_all_read = False
        self.signal: signal.Signals | None = None
        self.sender: Sender

    async def execute(self, watch: Watch | None, *, handle_signals: bool) -> Summary:
        await to_thread.run_sync(self._open)
        async with transport.Client(self.settings.sending) as client:
            self.sender = assemble.sender(self.settings, client, self.clock, self.recorder, self.pricing, self.budget)
            async with anyio.create_task_group() as writing:
                writing.start_soon(self.recorder.run)
                try:
                    await self._work(watch, handle_signals=handle_signals)
                    if self.originals:
                        await self._copy_results()
                finally:
                    self.recorder.close()
        self.all_totals.add_state(self.run_totals.as_state())
        superseded = await to_thread.run_sync(self._tidy)
        summary = self._summary(superseded)
        totals = orjson.dumps(summary.as_dict(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        disk.write_file(disk.beside(self.recorder.path, ".usage.json"), totals)
        await to_thread.run_sync(self._close_books, summary)
        self.recorder.end()
        return summary

    # ── before ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _preview(self) -> tuple[str, ...]:
        """Look at the first lines before anything is sent: keys must be there, retired models are told."""
        planner = assemble.planner(self.settings, self.options)
        wanted: dict[tuple[str, str], Request] = {}
        files = [source for source in self.sources if Path(source).is_file()]
        lines = (line for source in files for line in read.lines(source, self.settings.input.max_line_bytes))
        for line in islice(lines, min(PREVIEW_LINES, self.options.limit or PREVIEW_LINES)):
            item = planner.plan(line)
            if isinstance(item, Request):
                wanted.setdefault((item.provider, item.model), item)
                self.previewed.append(record.key(item.custom_id, item.digest))
        for name in dict.fromkeys(name for name, _ in wanted):
            configuration.api_key(name, self.settings.providers[name])
        if self.budget:
            for request in wanted.values():
                self.pricing.worst_case(request)
        notices = (_retirement(self.settings, name, model) for name, model in wanted)
        return tuple(notice for notice in notices if notice)

    def _open(self) -> None:
        """Take the output and learn what it holds."""
        self.recorder.open()
        if self.options.fresh and (aside := self.recorder.set_aside()):
            self.say(f"earlier results are set aside as {aside}")
        self.done = self.recorder.done(self.all_totals)
        if self.originals:
            with self.recorder.path.open("rb") as file:
                self.originals.read(file, answered_only=self.options.retry_failed)
        self._tell_changes()
        self.recorder.begin()
        self.earlier_unknown = self.recorder.unknown()
        self._open_books()
        if self.done.damaged:
            self.warnings += (f"{self.done.damaged} damaged line(s) in {self.recorder.path}; they are done again",)
        may_tidy = self.done.lines or self.done.damaged or self.settings.output.ordered
        if may_tidy and not all(Path(source).is_file() for source in self.sources):
            self.positions = FingerprintMap()

    def _tell_changes(self) -> None:
        """Say, before anything is spent, when lines are not as they were answered: perhaps that was not meant."""
        done = sum(self.done.outcome(request) is not None for request in self.previewed)
        if self.done.lines and done < len(self.previewed):
            self.say(
                f"{done:,} of the first {len(self.previewed):,} requests have results; the others are sent: "
                "they are new, or a changed line, model or setting made them new"
            )

    def _open_books(self) -> None:
        """Note in the ledger that this run goes on, and learn from it what the caps of day and month leave."""
        self._account(self._books("running"))
        if self.budget and not self.options.simulate:
            now = self.clock.moment()
            today = now.replace(hour=0, minute=0, second=0, microsecond=0)
            with Ledger.open(self.ledger) as ledger:
                self.budget = assemble.budget(
                    self.settings,
                    spent_today=ledger.spent(today),
                    spent_this_month=ledger.spent(today.replace(day=1)),
                )

    # ── the work ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _work(self, watch: Watch | None, *, handle_signals: bool) -> None:
        async with anyio.create_task_group() as beside:
            with anyio.CancelScope() as scope:
                if handle_signals:
                    beside.start_soon(self._heed_signals, scope)
                if watch:
                    beside.start_soon(watch, self.progress)
                beside.start_soon(to_thread.run_sync, self.prices.load)
                beside.start_soon(self._keep_books)
                beside.start_soon(self.sender.stop_when_stalled, assemble.patience(self.settings))
                async with anyio.create_task_group() as work:
                    work.start_soon(self._read_and_submit)
                    await self.sender.run()
                    # After a stop the reader may still count what is left, but nobody waits long for a number.
                    scope.deadline = anyio.current_time() + (0 if self.signal else _COUNT_REST_SECONDS)
            beside.cancel_scope.cancel()

    async def _read_and_submit(self) -> None:
        """Plan every line; submit what is not done yet. After a stop the rest is only counted."""
        self.done.sort()  # here and now: beside other tables, and in their thread, it takes a third less memory
        batches = read.batches(self.sources, self.settings.input.max_line_bytes, self.recorder.stretch_sizes())
        while not self._is_limit_reached():
            known = await to_thread.run_sync(self._read_on, batches, abandon_on_cancel=True)
            if not known:
                break
            for batch, mark, stretch in known:
                if not (stretch and self._pass_over(stretch)):
                    await self.sender.submit(await self._plan(batch, mark))
        self.is_all_read = True
        self.sender.close()

    def _read_on(self, batches: Iterator[Batch]) -> list[tuple[Batch, bytes, Stretch | None]]:
        """Return some batches, each with its checksum and what is known of it."""
        known: list[tuple[Batch, bytes, Stretch | None]] = []
        lines = size = 0
        while lines < _READ_LINES and size < _READ_BYTES and (batch := next(batches, None)):
            mark = checksum(self.basis, batch.content)
            stretch = self.recorder.stretch(mark, checksum(batch.first_line()))
            known.append((batch, mark, stretch))
            size += len(batch.content)
            lines += 0 if stretch else len(batch)
        return known

    def _is_limit_reached(self) -> bool:
        return self.options.limit is not None and self.read_lines >= self.options.limit

    def _pass_over(self, stretch: Stretch) -> bool:
        """Count the lines of a stretch as done without planning them, if planning would find just that."""
        limit = self.options.limit
        outcomes = [self.done.outcome(request) for request in stretch.failed]
        if (
            self.positions is not None
            or (limit is not None and self.read_lines + stretch.lines > limit)
            or None in outcomes
            or (self.options.retry_failed and False in outcomes)
            or not self.planner.claim(stretch.claims)
        ):
            return False
        self.read_lines += stretch.lines
        self.reused += stretch.lines
        self.reused_failed += outcomes.count(False)
        return True

    async def _plan(self, batch: Batch, mark: bytes) -> list[Request]:
        """Return the requests of a batch that are to be sent; record the lines that cannot be."""
        wanted: list[Request] = []
        invalid: list[Result] = []
        failed = array("Q")
        copied = 0
        lines = batch.lines()
        for line in lines:
            if self._is_limit_reached():
                break
            self.read_lines += 1
            item = self.planner.plan(line)
            request = record.key(item.custom_id, item.digest)
            outcome = self._earlier_outcome(request)
            if outcome is not None:
                if not outcome:
                    failed.append(request)
            elif isinstance(item, Invalid):
                invalid.append(assemble.invalid_result(item, self.clock))
            elif self.originals is None or self.originals.add(item.digest):
                wanted.append(item)
            else:
                copied += 1
        else:
            self._follow(batch, mark, len(lines), failed, waiting=len(wanted) + len(invalid) + copied)
        if invalid:
            await self.recorder.append(*invalid)
        return wanted

    def _earlier_outcome(self, request: int) -> bool | None:
        """Return whether a line was answered by an earlier run, and count it as reused; None where it is to be done."""
        if self.positions is not None:
            self.positions.put(request, len(self.positions))
        outcome = self.done.outcome(request)
        if outcome is None or (outcome is False and self.options.retry_failed):
            return None
        self.reused += 1
        self.reused_failed += not outcome
        return outcome

    def _follow(self, batch: Batch, mark: bytes, lines: int, failed: array[int], *, waiting: int) -> None:
        """Let the index know of the batch as a stretch, once all its lines have results."""
        claims = self.planner.take_claims()
        if batch.problem or not claims.is_alone:
            return
        start = checksum(batch.first_line())
        stretch = Stretch(mark=mark, start=start, size=len(batch.content), lines=lines, claims=claims, failed=failed)
        if waiting:
            self.awaited.add(stretch, batch.source, range(batch.number, batch.number + len(batch)), waiting)
        else:
            self.recorder.keep(stretch)

    async def _keep_books(self) -> None:
        """Bring the ledger up to date now and then, so a run that is killed is in it, and other runs' caps hold."""
        while True:
            await anyio.sleep(_BOOK_SECONDS)
            await to_thread.run_sync(self._account, self._books("running"), self.accounts.entries())

    async def _copy_results(self) -> None:
        """Give each request that was not sent because an equal one was the result of that one, if it has one."""
        lines = chain.from_iterable(read.lines(each, self.settings.input.max_line_bytes) for each in self.sources)
        planner = assemble.planner(self.settings, self.options)
        with self.recorder.path.open("rb") as file:
            copied = copies(
                file,
                islice(lines, self.options.limit),
                planner,
                run_id=self.run_id,
                at=self.clock.utc(),
                retry_failed=self.options.retry_failed,
            )
            while batch := await to_thread.run_sync(lambda: list(islice(copied, _COPIED_AT_ONCE))):
                await self.recorder.append_lines(batch)
                for line in batch:
                    record = results.decode(line)
                    self.run_totals.add(record)
                    self.accounts.add(record, self.clock.utc()[:10])

    async def _heed_signals(self, work: anyio.CancelScope) -> None:
        """First signal: send nothing new and finish what is in flight. Second: stop now."""
        with anyio.open_signal_receiver(*_SIGNALS) as signals:
            async for received in signals:
                if self.signal:
                    self.say("stopping now")
                    work.cancel()
                    return
                self.signal = received
                work.deadline = anyio.current_time() + self.settings.sending.drain_timeout
                self.sender.stop()
                in_flight = self.sender.statistics().in_flight
                self.say(f"{received.name}: finishing {in_flight} request(s) in flight; once more to stop now")

    def _count(self, result: Result) -> None:
        self.run_totals.add(result)
        self.accounts.add(result, result.completed_at[:10])
        failed = record.key(result.custom_id, result.digest) if result.failure else None
        if stretch := self.awaited.finished(result.source, result.line, failed):
            self.recorder.keep(stretch)
        if result.failure and len(self.failures) < SHOWN_FAILURES:
            self.failures.append(_describe_failure(result))

    def progress(self) -> Progress:
        """Return a snapshot of the run."""
        return Progress(
            elapsed_s=self.clock.elapsed(),
            read=self.read_lines,
            total=self.read_lines if self.is_all_read else None,
            reused=self.reused,
            run=self.run_totals,
            sender=self.sender.statistics(),
            is_draining=self.sender.is_draining,
        )

    # ── after ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tidy(self) -> int:
        """Bring the results file into its final form, if the whole input is known."""
        is_whole = self.is_all_read and self.options.limit is None and not self.sender.statistics().dropped
        has_leftovers = self.done.lines != self.reused or self.done.damaged > 0
        ordered = self.settings.output.ordered
        if not is_whole or not (has_leftovers or ordered):
            return 0
        positions = self._positions() if self.positions is None else self.positions
        superseded = self.recorder.tidy(positions, self.planner.ids, ordered=ordered)
        if superseded:
            self.all_totals = Totals()
            self.recorder.done(self.all_totals)
        return superseded

    def _positions(self) -> FingerprintMap:
        """Read the inputs once more, as they are now: places are seldom wanted, and take 20 bytes a line."""
        positions = FingerprintMap()
        self.planner = assemble.planner(self.settings, self.options)
        for batch in read.batches(self.sources, self.settings.input.max_line_bytes):
            for line in batch.lines():
                item = self.planner.plan(line)
                positions.put(record.key(item.custom_id, item.digest), len(positions))
            self.planner.take_claims()
        return positions

    def _summary(self, superseded: int) -> Summary:
        counts = self.sender.statistics()
        pending = self.read_lines - self.reused - self.run_totals.finished
        reason = self._reason() if pending else None
        unknown = self.recorder.unknown()
        return Summary(
            run_id=self.run_id,
            status="completed" if not pending and self.is_all_read else "stopped" if reason else "partial",
            stop_reason=reason,
            exit_code=self._exit_code(pending),
            started_at=self.clock.started_at,
            finished_at=self.clock.utc(),
            wall_seconds=self.clock.elapsed(),
            simulated=self.options.simulate,
            tags=self.settings.tags,
            inputs=self.sources,
            results_file=str(self.recorder.path),
            total=self.read_lines,
            reused=self.reused,
            pending=pending,
            attempts=Attempts(
                total=counts.attempts + len(self.earlier_unknown),
                billed=counts.billed,
                rate_limited=counts.rate_limited,
                failed=counts.failed,
                unknown=counts.unknown + len(self.earlier_unknown),
            ),
            price_source=self.prices.source,
            cap=self.budget.cap if self.budget else None,
            cap_used=self.budget.spent if self.budget else 0,
            possibly_billed=unknown,
            run=self.run_totals,
            results=self.all_totals,
            superseded=superseded,
            warnings=(*self.warnings, *_possibly_billed(unknown)),
            failures=tuple(self.failures),
        )

    def _books(self, status: str) -> ledgers.Run:
        """Return what the ledger holds of this run, as far as it has come."""
        return ledgers.Run(
            run_id=self.run_id,
            started_at=self.clock.started_at,
            status=status,
            simulated=self.options.simulate,
            results_file=str(self.recorder.path.absolute()),
            inputs=tuple(self.sources),
            tags=self.settings.tags,
            price_source=self.prices.source,
            total=self.read_lines,
            succeeded=self.run_totals.succeeded,
            failed=self.run_totals.failed,
            invalid=self.run_totals.invalid,
            reused=self.reused,
            wall_seconds=self.clock.elapsed(),
        )

    def _account(self, run: ledgers.Run, entries: Sequence[Entry] = ()) -> None:
        with Ledger.open(self.ledger) as ledger:
            ledger.record(run, entries)

    def _close_books(self, summary: Summary) -> None:
        """Record the run as it ended, and what is in the results of earlier ones that were killed."""
        run = replace(
            self._books(summary.status),
            finished_at=summary.finished_at,
            exit_code=summary.exit_code,
            stop_reason=summary.stop_reason,
            pending=summary.pending,
            wall_seconds=summary.wall_seconds,
        )
        self._account(run, self.accounts.entries(summary.possibly_billed))
        with Ledger.open(self.ledger) as ledger:
            killed = [
                each
                for each in ledger.runs(include_simulated=True)
                if each.status == "running" and each.results_file == run.results_file
            ]
            for each in killed:
                ledger.record(replace(each, status="killed"), ())
            if killed:
                rebuilding.rebuild(ledger, [self.recorder.path], only={each.run_id for each in killed})

    def _reason(self) -> str | None:
        if self.signal:
            return f"interrupted by {self.signal.name}"
        reasons = [_explain(reason) for reason in assemble.stop_reasons(self.sender)]
        return "; ".join(reasons) or None

    def _exit_code(self, pending: int) -> int:
        if self.signal and pending:
            return 130 if self.signal is signal.SIGINT else 143
        if reasons := assemble.stop_reasons(self.sender):
            return _exit_code(reasons[0], has_sent=self.sender.statistics().attempts > 0)
        if self.done.damaged:
            return 6
        return int(bool(self.run_totals.failed or self.run_totals.invalid or self.reused_failed))


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


def _possibly_billed(calls: Sequence[Sent]) -> Iterator[str]:
    """Say what calls without an answer may cost; nothing where there are none."""
    if calls:
        tokens = sum(call.input_tokens for call in calls)
        yield (
            f"{len(calls):,} call(s) were in flight when a run was stopped and may be billed without an answer, about "
            f"{tokens:,} tokens in; they are sent again and listed in *.usage.json as possibly_billed"
        )


def _describe_failure(result: Result) -> str:
    """Say in one line what failed and where; an invalid line's message names its place already."""
    assert result.failure is not None
    if result.request is None:
        return result.failure.message
    status = f"HTTP {result.failure.status}, " if result.failure.status else ""
    return (
        f"{result.source}:{result.line}: {result.custom_id}: {result.failure.message} ({status}{result.failure.type})"
    )
