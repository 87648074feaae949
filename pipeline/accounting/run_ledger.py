"""The ledger as one run sees it: opened before the first call, brought up to date now and then, closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import anyio
from anyio import to_thread

from pipeline.accounting import rebuild
from pipeline.accounting.ledger import Entry, Ledger, RunRow
from pipeline.accounting.usage import UsageAggregator
from pipeline.core.errors import StorageError
from pipeline.results.attempt_log import LoggedCall

RUNNING = "running"
KILLED = "killed"
_SECONDS = 30.0


class RunLedger:
    """Keeps a run's account in the ledger; `accounts` is what the run adds up to so far."""

    def __init__(self, path: Path, *, seconds: float = _SECONDS) -> None:
        self.accounts = UsageAggregator()
        self._path = path
        self._seconds = seconds

    def open(self, run: RunRow) -> None:
        """Note that a run goes on, so that it is known even if it is killed. Raises `StorageError`."""
        self._record(run, ())

    def spent(self, now: datetime) -> tuple[int, int]:
        """Return what real runs cost today and this month (UTC), in nano-dollars."""
        today = now.replace(hour=0, minute=0, second=0, microsecond=0)
        with Ledger.open(self._path) as ledger:
            return ledger.spent(today), ledger.spent(today.replace(day=1))

    async def keep(self, describe: Callable[[], RunRow], say: Callable[[str], None]) -> None:
        """Bring the account up to date every half minute: a kill costs no more of it, and runs that begin later know.

        What cannot be written now is said and no reason to stop: the end of the run tells it all again.
        """
        while True:
            await anyio.sleep(self._seconds)
            try:
                await to_thread.run_sync(self._record, describe(), self.accounts.entries())
            except StorageError as exc:
                say(exc.message)

    def close(self, run: RunRow, unknown: Sequence[LoggedCall], results: Path) -> None:
        """Record a run as it ended, and what its results file holds of earlier runs that were killed."""
        self._record(run, self.accounts.entries(unknown))
        name = run.results_file or str(results)
        with Ledger.open(self._path) as ledger:
            killed = ledger.runs(include_simulated=True, status=RUNNING, results_file=name)
            killed = [replace(each, status=KILLED) for each in killed]
            for each in killed:
                ledger.record(each, ())
            if killed:
                rebuild.rebuild(ledger, [results], only={each.run_id: each for each in killed})

    def _record(self, run: RunRow, entries: Sequence[Entry]) -> None:
        with Ledger.open(self._path) as ledger:
            ledger.record(run, entries)


class NullRunLedger:
    """For a part of a run: whoever joins the parts keeps the books."""

    def __init__(self) -> None:
        self.accounts = UsageAggregator()

    def open(self, run: RunRow) -> None:
        """Note nothing."""

    def spent(self, now: datetime) -> tuple[int, int]:
        """Return nothing: who deals out the money knows."""
        return 0, 0

    async def keep(self, describe: Callable[[], RunRow], say: Callable[[str], None]) -> None:
        """Note nothing."""

    def close(self, run: RunRow, unknown: Sequence[LoggedCall], results: Path) -> None:
        """Note nothing."""
