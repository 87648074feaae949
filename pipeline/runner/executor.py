"""What a run needs from whatever sends its requests, and the phase in which they are sent.

`Run` opens and concludes. Between the two, an `Executor` does the work: `LocalExecutor` on this machine, `Driver` on
a cluster.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import anyio

from pipeline.core.errors import PipelineError
from pipeline.core.types import Request
from pipeline.dispatch.batch.store import BatchRecord
from pipeline.dispatch.live.sender import Statistics
from pipeline.results.totals import Totals

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Task = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorStatistics:
    """What an executor has done so far, and why it ended early.

    `live` counts live calls, `batch_attempts` and the three fields after it the requests in batches. `uncollected` are
    totals of results that are durable elsewhere and not in the results file yet. `stopped` is what ended the whole
    run; `reasons` adds what ended single models or batches, the most far-reaching reason first, and `end_reasons` are
    those of them that count although every request has a result. `is_partial` is true when requests were left pending.
    """

    live: Statistics
    batch_attempts: int = 0
    batch_billed: int = 0
    batch_failed: int = 0
    batch_unknown: int = 0
    batches: Sequence[BatchRecord] = ()
    uncollected: Totals | None = None
    stopped: PipelineError | None = None
    reasons: Sequence[PipelineError] = ()
    end_reasons: Sequence[PipelineError] = ()
    is_draining: bool = False
    is_partial: bool = False


class Executor(Protocol):
    """Sends the requests of a run, in one place or another."""

    def open(self, resources: ExitStack) -> Iterable[Request]:
        """Read what earlier runs left elsewhere; files and locks are added to `resources`.

        Returns the requests that this run must not send, because they are in batches. The run iterates over them after
        its feed has read the results.
        """
        ...

    async def execute(self, phase: WorkPhase) -> None:
        """Send every request that has no result; on return all results are durable."""
        ...

    def stop(self) -> str:
        """Send nothing new; return what the run still waits for, in words."""
        ...

    def statistics(self) -> ExecutorStatistics:
        """Return what was done so far."""
        ...


class WorkPhase:
    """The phase of a run in which requests are sent. A signal ends it early, a second one cancels it.

    `signal` is the first signal received. `beside` are tasks that run as long as the phase does.
    """

    def __init__(
        self,
        stop: Callable[[], str],
        notify: Callable[[str], None],
        *,
        drain_timeout: float,
        beside: Sequence[Task] = (),
    ) -> None:
        self.signal: signal.Signals | None = None
        self._stop = stop
        self._notify = notify
        self._drain_timeout = drain_timeout
        self._beside = beside
        self._scope = anyio.CancelScope()
        self._is_working = False

    @asynccontextmanager
    async def begin(self, *beside: Task) -> AsyncIterator[anyio.CancelScope]:
        """Enter the phase; yield the scope that a second signal cancels. More tasks may run beside the work."""
        async with anyio.create_task_group() as tasks:
            with self._scope as scope:
                self._is_working = True
                self._drain()  # the signal may have come while the run was opened
                for task in (*self._beside, *beside):
                    tasks.start_soon(task)
                yield scope
            self._is_working = False
            tasks.cancel_scope.cancel()

    async def listen(self) -> None:
        """Handle signals: the first one drains, the second stops at once. Signals that are ignored stay ignored."""
        handled = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
        with anyio.open_signal_receiver(*handled) as signals:
            async for received in signals:
                if self.signal is None:
                    self.signal = received
                    self._drain()
                    continue
                self._notify("stopping now")
                if self._is_working:
                    self._scope.cancel()
                else:  # only file work in threads is left, and that survives a kill
                    signal.signal(received, signal.SIG_DFL)
                    signal.raise_signal(received)

    def drain(self) -> str:
        """Send nothing new and bound the time that requests in flight may take; return what is waited for."""
        if not self._is_working:
            return "nothing is being sent"
        self._scope.deadline = min(self._scope.deadline, anyio.current_time() + self._drain_timeout)
        return self._stop()

    def _drain(self) -> None:
        if self._is_working and self.signal:
            self._notify(f"{self.signal.name}: {self.drain()}; repeat it to stop now")
