"""The table of batches on wide and narrow terminals."""

from __future__ import annotations

import io
from pathlib import Path

import rich.console

from pipeline.cli import batches_table
from pipeline.dispatch.batch.manage import Listed
from pipeline.dispatch.batch.store import BatchRecord, Step

BATCH_ID = "msgbatch_01HkcTjaV5uDC8jWR4ZsDV8d"
LISTED = Listed(
    record=BatchRecord(
        run="run_1",
        provider="anthropic",
        model="",
        at="2026-11-27T10:00:00Z",
        batch_id=BATCH_ID,
        requests=50_000,
        succeeded=1_200,
        failed=3,
        status="in_progress",
        step=Step.CREATED,
    ),
    results_file=Path("/data/answers.jsonl"),
)


def _printed(width: int) -> list[str]:
    output = io.StringIO()
    batches_table.show(rich.console.Console(file=output, width=width), [LISTED])
    return output.getvalue().splitlines()


def test_a_wide_terminal_gets_a_table() -> None:
    """Where it fits, there is one row per batch."""
    head, row = _printed(150)

    assert head.split() == ["batch", "model", "status", "created", "requests", "answered", "failed", "cost", "results"]
    assert row.split() == [
        BATCH_ID,
        "anthropic",
        "in_progress",
        "2026-11-27T10:00:00Z",
        "50,000",
        "1,200",
        "3",
        "–",
        "/data/answers.jsonl",
    ]


def test_a_narrow_terminal_gets_lines() -> None:
    """Where the table does not fit, there are a few lines per batch, and its id is whole, to be copied."""
    assert _printed(80) == [
        f"{BATCH_ID}: in_progress",
        "  anthropic, created 2026-11-27T10:00:00Z",
        "  50,000 requests, 1,200 answered, 3 failed, cost –",
        "  /data/answers.jsonl",
    ]
