"""What the parts of one run share: its settings, the results writer, the feed of requests, and the counts."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.accounting.budget import Budget
from pipeline.accounting.pricing import Prices
from pipeline.accounting.run_ledger import NullRunLedger, RunLedger
from pipeline.core import config, environment
from pipeline.core.clock import Clock
from pipeline.core.config import Config
from pipeline.core.errors import PipelineError
from pipeline.core.types import Result
from pipeline.inputs.sources import ByteRange
from pipeline.results import object_store_writer
from pipeline.results.codec import StoredResult
from pipeline.results.totals import Totals
from pipeline.results.writer import ResultWriter
from pipeline.runner.feed import InputFeed
from pipeline.runner.options import Options

SHOWN_FAILURES = 10


class RunContext:
    """The shared parts of one run. Making it touches no file.

    `output` is a file, or as a text the URL of a folder at an object store. `totals` and `failures` grow while results
    become durable; whoever opens the run sets `budget`, and `on_storage_error` may be replaced before results are
    written. All else stays as it was made.
    """

    def __init__(
        self,
        sources: Sequence[str | ByteRange],
        output: str | Path,
        settings: Config,
        options: Options,
        prices: Prices,
        ledger: RunLedger | NullRunLedger,
        notify: Callable[[str], None],
        *,
        run_id: str | None = None,
    ) -> None:
        self.settings = settings
        self.options = options
        self.prices = prices
        self.ledger = ledger
        self.notify = notify
        self.clock = Clock()
        self.run_id = run_id or f"run-{self.clock.started_at.translate({45: None, 58: None})}-{secrets.token_hex(3)}"
        self.sources = [str(source) for source in sources]
        self.output = output
        self.writer = self._writer(output)
        self.feed = InputFeed(sources, settings, options, self.writer, self.clock, notify)
        self.budget: Budget | None = None
        self.totals = Totals()
        self.failures: list[str] = []
        self.on_storage_error: Callable[[PipelineError], None] = lambda error: notify(error.message)

    def on_result(self, result: Result) -> None:
        """Count a result. The writer calls this once the result is durable."""
        self.count(result, day=result.completed_at[:10])
        self.feed.finished(result)
        if result.failure and len(self.failures) < SHOWN_FAILURES:
            self.failures.append(_describe_failure(result))

    def count(self, result: Result | StoredResult, *, day: str) -> None:
        """Add a durable result to the totals of the run and to the ledger's sums of a day."""
        self.totals.add(result)
        self.ledger.accounts.add(result, day)

    def _writer(self, output: str | Path) -> ResultWriter:
        options: dict[str, Any] = {
            "run_id": self.run_id,
            "form": config.output_format(self.settings),
            "echo_request": self.settings.output.echo_request,
            "is_simulated": self.options.simulate,
            "sync": self.settings.output.durability == "full",
            "on_done": self.on_result,
        }
        if isinstance(output, Path):
            return ResultWriter(output, **options)
        local_copy = environment.spool_path(self.settings, output)
        return object_store_writer.ObjectStoreWriter(
            output, local_copy, on_trouble=lambda error: self.on_storage_error(error), **options
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
