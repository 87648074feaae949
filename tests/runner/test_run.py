"""How a run is made, checked and stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.accounting.pricing import Prices
from pipeline.accounting.run_ledger import NullRunLedger
from pipeline.core.config import Config
from pipeline.core.errors import UsageError
from pipeline.runner.context import RunContext
from pipeline.runner.executor import WorkPhase
from pipeline.runner.local import LocalExecutor
from pipeline.runner.options import Options
from pipeline.runner.run import Run, check


async def test_making_a_run_touches_no_file(tmp_path: Path) -> None:
    """The output is looked at only by `check`: until then a missing directory raises nothing, and nothing is made."""
    settings = Config()
    output = tmp_path / "missing" / "out.jsonl"

    context = RunContext(
        [str(tmp_path / "in.jsonl")], output, settings, Options(), Prices(settings), NullRunLedger(), print
    )
    Run(context, LocalExecutor(context))

    assert not (tmp_path / "missing").exists()
    with pytest.raises(UsageError, match="does not exist"):
        check(context)


async def test_draining_stops_only_what_has_begun() -> None:
    """Before the work begins and after it ended there is nothing to stop."""
    stops: list[str] = []

    def stop() -> str:
        stops.append("stop")
        return "waiting"

    phase = WorkPhase(stop, print, drain_timeout=5.0)
    phase.drain()
    assert stops == []
    async with phase.begin():
        assert phase.drain() == "waiting"
    phase.drain()
    assert stops == ["stop"]
