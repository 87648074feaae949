"""`pipeline batches`: the providers' batches of past runs, told from what lies beside their results; asked, cancelled.

Which results there are the ledger knows. Nothing is changed there but by `cancel`: what the provider no more knows is
given up, so that the next run sends its requests anew. All else is for the next run to find.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import assemble, chunks, disk, transport
from pipeline.chunks import Chunk, Chunks, Step
from pipeline.config import Config
from pipeline.errors import ProviderError, UsageError
from pipeline.ledger import Ledger
from pipeline.providers.batches import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A batch, or a chunk that is still to become one, and whose results it brings."""

    chunk: Chunk
    results_file: Path

    def as_dict(self) -> dict[str, Any]:
        return self.chunk.as_dict() | {"results_file": str(self.results_file)}


def listed(ledger: Path, files: Iterable[Path] = ()) -> list[Listed]:
    """Return the batches of these results files, else of all that the ledger knows; the oldest first."""
    known = dict.fromkeys(files) or dict.fromkeys(_results_files(ledger))
    found = [
        Listed(chunk=chunk, results_file=file)
        for file in known
        for chunk in chunks.read(disk.beside(file, chunks.SUFFIX))
        if not chunk.simulated
    ]
    return sorted(found, key=lambda each: each.chunk.at)


def chosen(found: Sequence[Listed], ids: Sequence[str]) -> list[Listed]:
    """Return the batches with these ids; `UsageError` where there is none."""
    by_id = {each.chunk.batch_id or each.chunk.nonce: each for each in found}
    if unknown := [id for id in ids if id not in by_id]:
        raise UsageError(
            f"no run recorded a batch {unknown[0]!r}",
            hint="pipeline batches lists them; of results that the ledger does not know: pipeline batches list RESULTS",
        )
    return [by_id[id] for id in ids]


async def status(settings: Config, wanted: Sequence[Listed]) -> list[Listed]:
    """Ask the providers how batches are getting on. Raises `ProviderError` for what they do not know."""
    async with transport.Client(settings.sending) as client:
        told: list[Listed] = []
        for each in wanted:
            if each.chunk.batch_id is None:
                told.append(each)
                continue
            batch = await assemble.courier(settings, client, each.chunk.provider).poll(each.chunk.batch_id)
            told.append(_with(each, batch))
        return told


async def cancel(settings: Config, wanted: Sequence[Listed]) -> list[Listed]:
    """Cancel batches; what they have answered is kept for the next run to collect."""
    async with transport.Client(settings.sending) as client:
        told: list[Listed] = []
        for each in wanted:
            if not each.chunk.is_open:
                raise UsageError(f"batch {each.chunk.batch_id} is {each.chunk.step.value} already")
            if each.chunk.batch_id is None:
                told.append(_give_up(each))
                continue
            try:
                batch = await assemble.courier(settings, client, each.chunk.provider).cancel(each.chunk.batch_id)
            except ProviderError as error:
                if error.status != 404:
                    raise
                told.append(_give_up(each))
            else:
                told.append(_with(each, batch))
        return told


def _results_files(ledger: Path) -> list[Path]:
    if not ledger.exists():
        return []
    with Ledger.open(ledger) as book:
        return [Path(run.results_file) for run in book.runs() if run.results_file]


def _with(each: Listed, batch: Batch) -> Listed:
    changes = {"status": batch.status, "succeeded": batch.succeeded, "failed": batch.failed}
    return replace(each, chunk=replace(each.chunk, **changes))  # type: ignore[arg-type]


def _give_up(each: Listed) -> Listed:
    """Note that nothing more comes of a chunk. Raises `TryLaterError` while a run is at it."""
    target = disk.target_of(each.results_file)
    fd = disk.open_locked(target)
    store = Chunks(target)
    try:
        store.open()
        store.close_chunk(each.chunk, Step.DROPPED)
    finally:
        store.release()
        disk.close(fd)
    return replace(each, chunk=replace(each.chunk, step=Step.DROPPED, status="given up"))
