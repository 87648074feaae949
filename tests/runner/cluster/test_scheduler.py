"""The table of parts: what is begun, and when all of the input counts as read."""

from __future__ import annotations

from pathlib import Path

import anyio

from pipeline.core.clock import Clock
from pipeline.core.config import Config
from pipeline.core.errors import TryLaterError
from pipeline.results.writer import ResultWriter
from pipeline.runner.cluster.scheduler import Scheduler, Shard
from pipeline.runner.feed import InputFeed
from pipeline.runner.options import Options


async def test_an_input_that_changes_while_it_is_cut_is_not_read_to_its_end(tmp_path: Path) -> None:
    """Of two who ask for the next part at once one is told; for the other there is nothing, and it is not the end."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"a": 1}\n' * 20)
    recorder = ResultWriter(tmp_path / "out.jsonl", run_id="run-x", on_done=lambda results: None)
    intake = InputFeed([str(source)], Config(), Options(), recorder, Clock(), lambda message: None)
    scheduler = Scheduler([str(source)], intake, limit=None)
    scheduler.begin(20, ahead=10)
    told: list[TryLaterError] = []
    begun: list[Shard | None] = []

    async def ask() -> None:
        try:
            begun.append(await scheduler.next_to_scan())
        except TryLaterError as exc:
            told.append(exc)

    await ask()
    source.write_bytes(b'{"b": 22}\n' * 20)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(ask)

    assert (len(told), begun[1:]) == (1, [None, None])
    assert "was changed" in told[0].message
    assert not intake.is_all_read
    assert scheduler.is_over
