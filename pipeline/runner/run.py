"""One run, from opening the output to the summary. An `Executor` sends the requests in between."""

from __future__ import annotations

import signal
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import orjson
from anyio import to_thread

from pipeline.accounting import ledger
from pipeline.accounting.budget import Budget, budget_of
from pipeline.accounting.pricing import LanePricing
from pipeline.accounting.run_ledger import RUNNING
from pipeline.core import environment, errors, files
from pipeline.core.config import Config
from pipeline.core.errors import (
    BudgetReachedError,
    PipelineError,
    ProviderError,
    StorageError,
    TryLaterError,
    UsageError,
)
from pipeline.dispatch.batch.store import BatchRecord
from pipeline.dispatch.live.sender import Statistics
from pipeline.inputs import reader
from pipeline.results import staging, writer
from pipeline.results.attempt_log import LoggedCall
from pipeline.results.totals import Totals
from pipeline.runner.context import RunContext
from pipeline.runner.executor import Executor, Task, WorkPhase
from pipeline.runner.summary import Attempts, Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run at a moment. `total` is None until the whole input was read; `run` counts what is safe on the disk."""

    elapsed_s: float
    read: int
    total: int | None
    reused: int
    run: Totals
    sender: Statistics
    batches: Sequence[BatchRecord]
    is_draining: bool


Watch = Callable[[Callable[[], Progress]], Coroutine[Any, Any, None]]


def check(context: RunContext) -> list[str]:
    """Refuse what cannot work before anything is locked or sent: a bad output, a missing key or price.

    Reads the first lines of the inputs. Returns a warning for each retired model among them. Raises `UsageError`.
    """
    if isinstance(context.output, Path):
        _refuse_overwriting_input(context.output, context.sources)
    else:
        _refuse_parts(context.output, context.sources, context.settings)
    found = context.feed.preview()
    for name in dict.fromkeys(name for name, _ in found):
        environment.api_key(name, context.settings.providers[name])
    if budget_of(context.settings):
        pricing = LanePricing(context.prices, context.clock)
        for request in found.values():
            pricing.worst_case(request)
    return context.feed.retired


class Run:
    """One run, from inputs to summary: it opens the output, has the executor send what is missing, and concludes.

    Mutable: `warnings`, `damaged`, `all_totals` and `earlier_unknown` are set while the run is opened.
    """

    def __init__(
        self, context: RunContext, executor: Executor, *, watch: Watch | None = None, warnings: Sequence[str] = ()
    ) -> None:
        self.context = context
        self.executor = executor
        self.warnings = tuple(warnings)
        self.damaged = 0
        self.all_totals = Totals()
        self.earlier_unknown: Sequence[LoggedCall] = ()
        beside: list[Task] = [partial(context.ledger.keep, self._describe, context.notify)]
        if watch:
            beside.append(partial(watch, self.progress))
        drain_timeout = context.settings.sending.drain_timeout
        self.phase = WorkPhase(executor.stop, context.notify, drain_timeout=drain_timeout, beside=beside)
        context.on_storage_error = self._on_storage_error

    async def execute(self, *, handle_signals: bool) -> Summary:
        """Do all of it, and give files and locks back in the end."""
        with ExitStack() as resources:
            resources.callback(self.context.writer.close)
            try:
                async with anyio.create_task_group() as beside:
                    if handle_signals:
                        beside.start_soon(self.phase.listen)
                    await self._send(resources)
                    summary = await self._conclude()
                    beside.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                if error := errors.only_one(group):
                    raise error from group
                raise
            return summary

    async def _send(self, resources: ExitStack) -> None:
        await to_thread.run_sync(self._open, resources)
        async with anyio.create_task_group() as writing:
            writing.start_soon(self.context.writer.run)
            try:
                await self.executor.execute(self.phase)
            finally:
                self.context.writer.stop()

    # ── before ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self, resources: ExitStack) -> None:
        """Lock the output and read what it holds; record in the ledger that this run has begun."""
        context, writer = self.context, self.context.writer
        writer.open()
        in_batches = self.executor.open(resources)
        # A run on a cluster that was killed left results of workers, which belong into the results file.
        with staging.taken_in(writer, staging.staging_of(context.output)) as remove:
            if context.options.fresh:
                aside = writer.set_aside()
                if aside:
                    context.notify(f"earlier results were moved to {aside}")
            done = writer.done(self.all_totals)
            self.damaged = done.damaged
            if done.damaged:
                self.warnings += (f"{done.damaged} damaged line(s) in {writer.name}; they are sent again",)
            context.feed.learn(done)
            context.feed.skip_in_batch(in_batches)
            if notice := context.feed.notice():
                context.notify(notice)
            writer.begin()
            remove()
        self.earlier_unknown = writer.unknown()
        context.ledger.open(self._describe())
        context.budget = self._budget()
        for warning in self.warnings:
            context.notify(warning)

    def _budget(self) -> Budget | None:
        """Return what may be spent: the ledger says what is left of the caps of a day and a month."""
        context = self.context
        budget = budget_of(context.settings)
        if budget is None or context.options.simulate:
            return budget
        today, month = context.ledger.spent(context.clock.moment())
        return budget_of(context.settings, spent_today=today, spent_this_month=month)

    # ── while requests are sent ───────────────────────────────────────────────────────────────────────────────────

    def _on_storage_error(self, error: PipelineError) -> None:
        """Report why results do not get to their store; if another run writes there, pay for nothing more."""
        self.context.notify(error.message)
        if isinstance(error, TryLaterError):
            self.phase.drain()

    def progress(self) -> Progress:
        """Return a snapshot of the run."""
        context, feed, done = self.context, self.context.feed, self.executor.statistics()
        totals = context.totals
        if done.uncollected:
            totals = Totals()
            totals.add_state(context.totals.as_state())
            totals.add_state(done.uncollected.as_state())
        return Progress(
            elapsed_s=context.clock.elapsed(),
            read=feed.lines,
            total=feed.lines if feed.is_all_read else None,
            reused=feed.reused,
            run=totals,
            sender=done.live,
            batches=done.batches,
            is_draining=done.is_draining or self.phase.signal is not None,
        )

    # ── after ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _conclude(self) -> Summary:
        """Bring the results into their final form; write the totals and close the books."""
        self.all_totals.add_state(self.context.totals.as_state())
        superseded = await to_thread.run_sync(self._tidy)
        summary = self._summary(superseded)
        self._write_totals(summary)
        if trouble := await to_thread.run_sync(self.context.writer.publish, _as_json(summary)):
            summary = _stopped(summary, trouble)
            self._write_totals(summary)
        await to_thread.run_sync(self._close_books, summary)
        self.context.writer.finish()
        return summary

    def _tidy(self) -> int:
        """Bring the results file into its final form, if the whole input is known."""
        if not self.context.feed.wants_tidying() or self.executor.statistics().is_partial:
            return 0
        superseded = self.context.writer.tidy(*self.context.feed.places(), ordered=self.context.settings.output.ordered)
        if superseded:
            self.all_totals = Totals()
            self.context.writer.done(self.all_totals)
        return superseded

    def _write_totals(self, summary: Summary) -> None:
        files.write_file(self.context.writer.beside(".usage.json"), _as_json(summary))

    def _summary(self, superseded: int) -> Summary:
        feed = self.context.feed
        pending = feed.lines - feed.reused - self.context.totals.finished + feed.extra
        is_unfinished = pending > 0 or not feed.is_all_read
        status, reason = "completed", None
        if is_unfinished:
            reason = self._reason()
            status = "stopped" if reason else "partial"
        unknown = self.context.writer.unknown()
        done = self.executor.statistics()
        return Summary(
            run_id=self.context.run_id,
            status=status,
            stop_reason=reason,
            exit_code=self._exit_code(is_unfinished=is_unfinished),
            started_at=self.context.clock.started_at,
            finished_at=self.context.clock.utc(),
            wall_seconds=self.context.clock.elapsed(),
            simulated=self.context.options.simulate,
            tags=self.context.settings.tags,
            inputs=self.context.sources,
            results_file=self.context.writer.name,
            total=self.context.feed.lines,
            reused=self.context.feed.reused,
            pending=pending,
            extra=self.context.feed.extra,
            attempts=self._attempts(),
            price_source=self.context.prices.source,
            cap=self.context.budget.cap if self.context.budget else None,
            cap_used=self.context.budget.used if self.context.budget else 0,
            possibly_billed=unknown,
            run=self.context.totals,
            results=self.all_totals,
            superseded=superseded,
            warnings=self.warnings,
            batches=[chunk.as_dict() for chunk in done.batches],
            ends_all=isinstance(done.stopped, ProviderError),
            failures=tuple(self.context.failures),
        )

    def _attempts(self) -> Attempts:
        """Count the calls of this run, and those that earlier runs left without an answer."""
        done, earlier = self.executor.statistics(), len(self.earlier_unknown)
        return Attempts(
            total=done.live.attempts + done.batch_attempts + earlier,
            billed=done.live.billed + done.batch_billed,
            rate_limited=done.live.rate_limited,
            failed=done.live.failed + done.batch_failed,
            unknown=done.live.unknown + done.batch_unknown + earlier,
        )

    def _describe(self) -> ledger.RunRow:
        """Return what the ledger holds of this run while it goes on."""
        return ledger.RunRow(
            run_id=self.context.run_id,
            started_at=self.context.clock.started_at,
            status=RUNNING,
            simulated=self.context.options.simulate,
            results_file=self.context.writer.address,
            inputs=tuple(self.context.sources),
            tags=self.context.settings.tags,
            price_source=self.context.prices.source,
            total=self.context.feed.lines,
            succeeded=self.context.totals.succeeded,
            failed=self.context.totals.failed,
            invalid=self.context.totals.invalid,
            reused=self.context.feed.reused,
            wall_seconds=self.context.clock.elapsed(),
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
        self.context.ledger.close(run, summary.possibly_billed, self.context.writer.path)

    def _reason(self) -> str | None:
        if self.phase.signal:
            return f"interrupted by {self.phase.signal.name}"
        return "; ".join(map(_explain, self.executor.statistics().reasons)) or None

    def _exit_code(self, *, is_unfinished: bool) -> int:
        if self.phase.signal and is_unfinished:
            return 130 if self.phase.signal is signal.SIGINT else 143
        done = self.executor.statistics()
        reasons = done.reasons if is_unfinished else done.end_reasons
        if reasons:
            return _exit_code(reasons[0], has_sent=self._attempts().total > 0)
        if self.damaged:
            return 6
        return int(bool(self.context.totals.failed or self.context.totals.invalid or self.context.feed.reused_failed))


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _refuse_overwriting_input(output: Path, sources: Sequence[str]) -> None:
    """Refuse an output that is an input under any name (path, symlink, hard link, stdin), or that has one beside it."""
    try:
        str(output).encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"the name of the output {str(output)!a} is not UTF-8; choose another name") from exc
    if output.is_dir():
        raise UsageError(f"the output {str(output)!r} is a directory; name a file, or use -d for one file per input")
    if not output.parent.is_dir():
        raise UsageError(
            f"the output's directory {str(output.parent)!r} does not exist", hint="create it, or choose another -o"
        )
    for name in (output, *(files.beside(output, suffix) for suffix in writer.SIDE_FILES)):
        if name.exists() and any(reader.is_file_of(source, name) for source in sources):
            raise UsageError(
                f"the output {str(name)!r} is also an input; results would overwrite requests", hint="choose another -o"
            )


def _refuse_parts(folder: str, sources: Sequence[str], settings: Config) -> None:
    """Refuse an object store output that contains an input, or that should be sorted into input order."""
    for source in sources:
        if reader.is_part_of(source, folder):
            raise UsageError(f"the output {folder!r} contains the input {source!r}", hint="choose another -o")
    if settings.output.ordered:
        raise UsageError(
            "--ordered requires a file: results are stored as they arrive and cannot be reordered later",
            hint="leave it out, or write to a file (-o answers.jsonl --ordered) and copy it to the store",
        )


def _stopped(summary: Summary, trouble: PipelineError) -> Summary:
    """Return the summary of a run whose results did not get to their store, whatever else it did."""
    return replace(summary, status="stopped", stop_reason=_explain(trouble), exit_code=trouble.exit_code)


def _as_json(summary: Summary) -> bytes:
    return orjson.dumps(summary.as_dict(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _explain(reason: PipelineError) -> str:
    status = getattr(reason, "status", None)
    request_id = getattr(reason, "request_id", None)
    details = [f"HTTP {status}" if status else "", f"request id {request_id}" if request_id else "", reason.hint or ""]
    known = ", ".join(detail for detail in details if detail)
    return f"{reason.message} ({known})" if known else reason.message


def _exit_code(reason: PipelineError, *, has_sent: bool) -> int:
    """Return the exit code of what stopped a run; a key that was missing later on is the provider's stop."""
    if isinstance(reason, TryLaterError | BudgetReachedError | StorageError):
        return reason.exit_code
    return 2 if isinstance(reason, UsageError) and not has_sent else 3
