"""The frame of a run: results and books are opened, signals heeded, and in the end all is told in one summary.

What happens in between is not said here: `job` answers the requests on this machine, `cluster` has others do it.
"""

from __future__ import annotations

import os
import secrets
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import orjson
from anyio import to_thread

from pipeline.accounting import ledger
from pipeline.accounting.budget import Budget, budget_of
from pipeline.accounting.pricing import LanePricing, Prices
from pipeline.accounting.run_ledger import RUNNING, NullRunLedger, RunLedger
from pipeline.core import config, environment, errors, files, object_store
from pipeline.core.clock import Clock
from pipeline.core.config import Config
from pipeline.core.errors import (
    BudgetReachedError,
    PipelineError,
    ProviderError,
    StorageError,
    TryLaterError,
    UsageError,
)
from pipeline.core.types import Result
from pipeline.dispatch.batch.store import BatchRecord
from pipeline.dispatch.live.sender import Statistics
from pipeline.inputs import reader
from pipeline.inputs.sources import ByteRange
from pipeline.results import object_store_writer, staging, writer
from pipeline.results.attempt_log import LoggedCall
from pipeline.results.totals import Totals
from pipeline.results.writer import ResultWriter
from pipeline.runner.feed import InputFeed
from pipeline.runner.options import Options
from pipeline.runner.summary import Attempts, Summary

SHOWN_FAILURES = 10
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
    batches: Sequence[BatchRecord]
    is_draining: bool


Watch = Callable[[Callable[[], Progress]], Coroutine[Any, Any, None]]


def place_of(output: str | os.PathLike[str]) -> str | Path:
    """Return where results go: a file, or the folder at an object store that a URL means."""
    text = os.fspath(output)
    return object_store_writer.folder_of(text) if object_store.is_url(text) else Path(text)


class RunBase(ABC):
    """One run, from inputs to summary. `answer` is the work; the rest is the same wherever that is done.

    An output that is a text is the URL of a folder at an object store.
    """

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
        self.settings = settings
        self.options = options
        self.prices = prices
        self.books = books
        self.say = say
        self.clock = Clock()
        self.run_id = run_id or f"run-{self.clock.started_at.translate({45: None, 58: None})}-{secrets.token_hex(3)}"
        self.pricing = LanePricing(prices, self.clock)
        self.budget = budget_of(settings)
        self.sources = [str(source) for source in sources]
        self.place = output
        self.recorder = self._recorder(output)
        self.intake = InputFeed(sources, self.settings, options, self.recorder, self.clock, say)
        self.warnings = self._preview()
        self.run_totals = Totals()
        self.all_totals = Totals()
        self.damaged = 0
        self.earlier_unknown: Sequence[LoggedCall] = ()
        self.failures: list[str] = []
        self.signal: signal.Signals | None = None
        self.scope: anyio.CancelScope | None = None
        self.is_working = False

    def _recorder(self, output: str | Path) -> ResultWriter:
        """Make the recorder of the output; refuse one that is an input."""
        options: dict[str, Any] = {
            "run_id": self.run_id,
            "form": config.output_format(self.settings),
            "echo_request": self.settings.output.echo_request,
            "is_simulated": self.options.simulate,
            "sync": self.settings.output.durability == "full",
            "on_done": self._count,
        }
        if isinstance(output, Path):
            _refuse_overwriting_input(output, self.sources)
            return ResultWriter(output, **options)
        _refuse_parts(output, self.sources, self.settings)
        spool = environment.spool_path(self.settings, output)
        return object_store_writer.ObjectStoreWriter(output, spool, on_trouble=self._heed_trouble, **options)

    async def execute(self, watch: Watch | None, *, handle_signals: bool) -> Summary:
        """Do all of it, and give files and locks back in the end."""
        try:
            async with anyio.create_task_group() as beside:
                if handle_signals:
                    beside.start_soon(self._heed_signals)
                await self.answer(watch)
                summary = await self._conclude()
                beside.cancel_scope.cancel()
            return summary
        except BaseExceptionGroup as group:
            if error := errors.only_one(group):
                raise error from group
            raise
        finally:
            self.release()

    def release(self) -> None:
        """Give files and locks back."""
        self.recorder.release()

    # ── what is done differently in different places ──────────────────────────────────────────────────────────────

    @abstractmethod
    async def answer(self, watch: Watch | None) -> None:
        """Answer what has no result yet; in the end all results are on the disk."""

    @abstractmethod
    async def _work(self, scope: anyio.CancelScope) -> None:
        """Have all requests answered; what is done after a stop may give `scope` a deadline."""

    @abstractmethod
    def stop(self) -> str:
        """Send nothing new; return what is still waited for, in words."""

    @abstractmethod
    def statistics(self) -> Statistics:
        """Return what is being sent, and was."""

    @abstractmethod
    def reasons(self, *, is_unfinished: bool) -> list[PipelineError]:
        """Return why the run or some of its models ended early, the most far-reaching reason first."""

    @property
    @abstractmethod
    def stopped(self) -> PipelineError | None:
        """Why all of the run ended early; None if it did not."""

    @property
    @abstractmethod
    def is_draining(self) -> bool:
        """Tell whether nothing new is sent."""

    def is_partial(self) -> bool:
        """Tell whether requests were left pending."""
        return self.statistics().dropped > 0

    def chunks_in_sight(self) -> Sequence[BatchRecord]:
        """Return what is with batch APIs."""
        return ()

    # ── before ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _preview(self) -> tuple[str, ...]:
        """Look at the first lines before anything is sent: keys and prices must be there, retired models are told."""
        found = self.intake.preview()
        for name in dict.fromkeys(name for name, _ in found):
            environment.api_key(name, self.settings.providers[name])
        if self.budget:
            for request in found.values():
                self.pricing.worst_case(request)
        return tuple(self.intake.retired)

    def _open(self) -> None:
        """Take the output and learn what it holds; note in the ledger that this run goes on."""
        self.recorder.open()
        self._open_lanes()
        with self._left_over() as remove:
            if self.options.fresh and (aside := self.recorder.set_aside()):
                self.say(f"earlier results are set aside as {aside}")
            done = self.recorder.done(self.all_totals)
            self.damaged = done.damaged
            if done.damaged:
                self.warnings += (f"{done.damaged} damaged line(s) in {self.recorder.name}; they are done again",)
            self.intake.learn(done)
            self._hold()
            if notice := self.intake.notice():
                self.say(notice)
            self.recorder.begin()
            remove()
        self.earlier_unknown = self.recorder.unknown()
        self.books.open(self._describe())
        if self.budget:
            self.budget = self._money()
        for warning in self.warnings:
            self.say(warning)

    def _left_over(self) -> AbstractContextManager[Callable[[], None]]:
        """Take in what a run on a cluster left that was killed."""
        return staging.taken_in(self.recorder, staging.staging_of(self.place))

    def _money(self) -> Budget | None:
        """Return what may be spent: the books tell what is left of the caps."""
        if self.options.simulate:
            return self.budget
        today, month = self.books.spent(self.clock.moment())
        return budget_of(self.settings, spent_today=today, spent_this_month=month)

    @abstractmethod
    def _open_lanes(self) -> None:
        """Learn what earlier runs left elsewhere; the output is ours by now."""

    @abstractmethod
    def _hold(self) -> None:
        """Leave alone what is elsewhere; what the results hold is known by now."""

    # ── the work ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _attend(self, watch: Watch | None, *beside: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do the work, with what goes on beside it; a second signal cancels it."""
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as self.scope:
                self.is_working = True
                if self.signal:
                    self._drain()
                if watch:
                    tasks.start_soon(watch, self.progress)
                tasks.start_soon(self.books.keep, self._describe, self.say)
                for each in beside:
                    tasks.start_soon(each)
                await self._work(self.scope)
            self.is_working = False
            tasks.cancel_scope.cancel()

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
                if self.is_working and self.scope:
                    self.scope.cancel()
                else:  # threads are at work on files, which bear a kill
                    signal.signal(received, signal.SIG_DFL)
                    signal.raise_signal(received)

    def _drain(self) -> None:
        """Send nothing new; before the work begins there is nothing to stop yet, after it nothing any more."""
        if self.is_working and self.signal:
            self.say(f"{self.signal.name}: {self._stop_sending()}; once more to stop now")

    def _stop_sending(self) -> str:
        assert self.scope is not None
        self.scope.deadline = min(self.scope.deadline, anyio.current_time() + self.settings.sending.drain_timeout)
        return self.stop()

    def _heed_trouble(self, trouble: PipelineError) -> None:
        """Tell what keeps results from their store; where somebody else writes there, pay for nothing more."""
        self.say(trouble.message)
        if isinstance(trouble, TryLaterError) and self.is_working:
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
            sender=self.statistics(),
            batches=self.chunks_in_sight(),
            is_draining=self.is_draining,
        )

    # ── after ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _conclude(self) -> Summary:
        """Bring the results into their final form; write the totals and close the books."""
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

    def _tidy(self) -> int:
        """Bring the results file into its final form, if the whole input is known."""
        if not self.intake.wants_tidying() or self.is_partial():
            return 0
        superseded = self.recorder.tidy(*self.intake.places(), ordered=self.settings.output.ordered)
        if superseded:
            self.all_totals = Totals()
            self.recorder.done(self.all_totals)
        return superseded

    def _write_totals(self, summary: Summary) -> None:
        files.write_file(self.recorder.beside(".usage.json"), _as_json(summary))

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
            batches=[chunk.as_dict() for chunk in self.chunks_in_sight()],
            ends_all=isinstance(self.stopped, ProviderError),
            failures=tuple(self.failures),
        )

    def _attempts(self) -> Attempts:
        """Count the calls of this run, and those that earlier runs left without an answer."""
        live, earlier = self.statistics(), len(self.earlier_unknown)
        return Attempts(
            total=live.attempts + earlier,
            billed=live.billed,
            rate_limited=live.rate_limited,
            failed=live.failed,
            unknown=live.unknown + earlier,
        )

    def _describe(self) -> ledger.RunRow:
        """Return what the ledger holds of this run while it goes on."""
        return ledger.RunRow(
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
        return "; ".join(map(_explain, self.reasons(is_unfinished=True))) or None

    def _exit_code(self, *, is_unfinished: bool) -> int:
        if self.signal and is_unfinished:
            return 130 if self.signal is signal.SIGINT else 143
        if reasons := self.reasons(is_unfinished=is_unfinished):
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
    for name in (output, *(files.beside(output, suffix) for suffix in writer.SIDE_FILES)):
        if name.exists() and any(reader.is_file_of(source, name) for source in sources):
            raise UsageError(f"the output {str(name)!r} is also an input; results would overwrite requests")


def _refuse_parts(folder: str, sources: Sequence[str], settings: Config) -> None:
    """Refuse an output at a store that cannot be: one that is an input, or that is to be in the order of the input."""
    if part := next((source for source in sources if reader.is_part_of(source, folder)), None):
        raise UsageError(f"the output {folder!r} holds the input {part!r}; choose another -o")
    if settings.output.ordered:
        raise UsageError(
            "--ordered wants a file: an object store gets results while they come, and cannot put them in order later",
            hint="leave it out, or write to a file, -o answers.jsonl --ordered, and copy that to the store",
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


def _describe_failure(result: Result) -> str:
    """Say in one line what failed and where; an invalid line's message names its place already."""
    assert result.failure is not None
    if result.request is None:
        return result.failure.message
    status = f"HTTP {result.failure.status}, " if result.failure.status else ""
    return (
        f"{result.source}:{result.line}: {result.custom_id}: {result.failure.message} ({status}{result.failure.type})"
    )
