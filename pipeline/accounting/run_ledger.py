"""A run's row in the ledger: opened before the first call, updated every half minute, closed at the end."""

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
    """Keeps one run's row and entries in the ledger. `accounts` holds the sums so far."""

    def __init__(self, path: Path, *, seconds: float = _SECONDS) -> None:
        self.accounts = UsageAggregator()
        self._path = path
        self._seconds = seconds

    def open(self, run: RunRow) -> None:
        """Record that a run has begun, so that the ledger knows of it even if it is killed. Raises `StorageError`."""
        self._record(run, ())

    def spent(self, now: datetime) -> tuple[int, int]:
        """Return what real runs cost today and this month (UTC), in nano-dollars. Simulated runs do not count."""
        today = now.replace(hour=0, minute=0, second=0, microsecond=0)
        with Ledger.open(self._path) as ledger:
            return ledger.spent(today), ledger.spent(today.replace(day=1))

    async def keep(self, describe: Callable[[], RunRow], say: Callable[[str], None]) -> None:
        """Update the ledger every half minute, until cancelled.

        So a killed run loses at most half a minute of its account, and runs that start meanwhile see what this one has
        spent. An update that fails is reported and not fatal: the next one, or `close`, records everything again.
        """
        while True:
            await anyio.sleep(self._seconds)
            try:
                await to_thread.run_sync(self._record, describe(), self.accounts.entries())
            except StorageError as exc:
                say(exc.message)

    def close(self, run: RunRow, unknown: Sequence[LoggedCall], results: Path) -> None:
        """Record how a run ended.

        Runs of the same results file that still count as running were killed: their entries are rebuilt from it.
        """
        self._record(run, self.accounts.entries(unknown))
        name = run.results_file or str(results)
        with Ledger.open(self._path) as ledger:
            abandoned = ledger.runs(include_simulated=True, status=RUNNING, results_file=name)
            killed = [replace(each, status=KILLED) for each in abandoned]
            for each in killed:
                ledger.record(each, ())
            if killed:
                rebuild.rebuild(ledger, [results], only={each.run_id: each for each in killed})

    def _record(self, run: RunRow, entries: Sequence[Entry]) -> None:
        with Ledger.open(self._path) as ledger:
            ledger.record(run, entries)


class NullRunLedger:
    """Records nothing. Workers of a cluster use it: the driver records the whole run."""

    def __init__(self) -> None:
        self.accounts = UsageAggregator()

    def open(self, run: RunRow) -> None:
        """Record nothing."""

    def spent(self, now: datetime) -> tuple[int, int]:
        """Return zero: the driver, which grants the budget, knows what was spent."""
        return 0, 0

    async def keep(self, describe: Callable[[], RunRow], say: Callable[[str], None]) -> None:
        """Record nothing."""

    def close(self, run: RunRow, unknown: Sequence[LoggedCall], results: Path) -> None:
        """Record nothing."""
