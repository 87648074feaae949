"""`pipeline batches`: list, query and cancel the batches of past runs.

The ledger names the results files, and the records beside them name the batches. Only `cancel` changes records: a batch
that its provider no longer knows is given up, so that the next run sends its requests again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.accounting.ledger import Ledger
from pipeline.core import environment, http, object_store
from pipeline.core import files as disk
from pipeline.core.config import Config
from pipeline.core.errors import UsageError
from pipeline.dispatch.batch.client import BatchClient, batch_client
from pipeline.dispatch.batch.store import SUFFIX, BatchRecord, BatchStore, Step, read_records
from pipeline.providers.batch import Batch
from pipeline.results import object_store_writer


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A batch, or the record of one not created yet, and the results file that it belongs to."""

    record: BatchRecord
    results_file: Path

    def as_dict(self) -> dict[str, Any]:
        return self.record.as_dict() | {"results_file": str(self.results_file)}


def listed(ledger: Path, settings: Config, files: Iterable[str] = ()) -> list[Listed]:
    """Return the batches of these results, or of all results in the ledger, oldest first.

    For results at an object store, the records are beside the local copy on this machine.
    """
    known = dict.fromkeys(files) or dict.fromkeys(_results_files(ledger))
    found: list[Listed] = []
    for name in known:
        results_file = _file_of(name, settings)
        for record in read_records(disk.beside(results_file, SUFFIX)):
            if not record.simulated and (record.batch_id or record.is_open):
                found.append(Listed(record=record, results_file=results_file))
    return sorted(found, key=lambda each: each.record.at)


def chosen(found: Sequence[Listed], ids: Sequence[str]) -> list[Listed]:
    """Return the batches with these ids. Raises `UsageError` if one is unknown."""
    by_id = {each.record.batch_id or each.record.local_id: each for each in found}
    if unknown := [id for id in ids if id not in by_id]:
        raise UsageError(
            f"no run recorded a batch {unknown[0]!r}",
            hint="list all recorded ones: pipeline batches list, or those of one file: pipeline batches list RESULTS",
        )
    return [by_id[id] for id in ids]


async def status(settings: Config, wanted: Sequence[Listed]) -> list[Listed]:
    """Ask the providers for the state of batches. Raises `ProviderError` for a batch they do not know."""
    async with http.Client(settings.sending) as client:
        told: list[Listed] = []
        for each in wanted:
            if each.record.batch_id is None:
                told.append(each)
                continue
            batch = await _client(settings, client, each.record).poll(each.record.batch_id)
            told.append(_with(each, batch))
        return told


async def cancel(settings: Config, wanted: Sequence[Listed]) -> list[Listed]:
    """Cancel batches. The next run collects the answers they have."""
    async with http.Client(settings.sending) as client:
        told: list[Listed] = []
        for each in wanted:
            record = each.record
            if not record.is_open:
                raise UsageError(f"batch {record.name} is {record.step.value} already")
            if not record.may_have_batch:
                told.append(give_up(each))
            elif record.batch_id is None or not record.is_confirmed:
                raise UsageError(
                    f"it is not certain yet which batch belongs to {record.name}",
                    hint="repeat the run: it finds out; or give it up: pipeline batches cancel --forget ID",
                )
            else:
                batch = await _client(settings, client, record).cancel(record.batch_id)
                told.append(_with(each, batch))
        return told


def give_up(each: Listed) -> Listed:
    """Give up a batch: nothing more is expected of it. Raises `TryLaterError` while a run uses it."""
    target = disk.target_of(each.results_file)
    fd = disk.open_locked(target)
    store = BatchStore(target)
    try:
        store.open()
        record = store.reread(each.record)
        if not record.is_open:
            raise UsageError(f"batch {record.name} is {record.step.value} already")
        if (record.step, record.batch_id) != (each.record.step, each.record.batch_id):
            raise UsageError(f"a run is working on {each.record.name}; list the batches again")
        store.close_record(record, Step.DROPPED)
    finally:
        store.release()
        disk.close(fd)
    return replace(each, record=replace(record, step=Step.DROPPED))


def _client(settings: Config, client: http.Client, record: BatchRecord) -> BatchClient:
    return batch_client(settings, client, lambda message: None, record.provider)


def _file_of(results: str, settings: Config) -> Path:
    if not object_store.is_url(results):
        return Path(results)
    return environment.spool_path(settings, object_store_writer.folder_of(results)) / object_store_writer.SPOOL


def _results_files(ledger: Path) -> list[str]:
    if not ledger.exists():
        return []
    with Ledger.open(ledger) as book:
        return [run.results_file for run in book.runs() if run.results_file]


def _with(each: Listed, batch: Batch) -> Listed:
    changes = {"status": batch.status, "succeeded": batch.succeeded, "failed": batch.failed}
    return replace(each, record=replace(each.record, **changes))  # type: ignore[arg-type]
