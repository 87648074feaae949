"""Writes requests into batch files: which requests share a file, under which names, and when a file is full.

A batch file is open while requests are added to it, and finished when it is full or should go out. `loader` decides
when; this module knows nothing of budgets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime

import anyio
from anyio import to_thread

from pipeline.core.config import Batches
from pipeline.core.errors import PipelineError
from pipeline.core.hashing import checksum
from pipeline.dispatch.batch.client import BatchClient
from pipeline.dispatch.batch.store import BatchItem, BatchRecord, BatchStore, OpenBatch


@dataclass(slots=True, kw_only=True)
class BatchGroup:
    """The requests that may share batches: those of one provider or, if its API requires that, of one model.

    Mutable state: `open_batch` is the builder's; the coordinator changes the rest.
    `underway` counts batches that were created and have not ended. `room` is where records wait that found the
    provider's queue full. `max_tokens` limits a batch after one alone was too large for that queue. `refusal` is why
    the provider takes no more batches of the group.
    """

    provider: str
    model: str
    client: BatchClient
    open_batch: OpenBatch | None = None
    underway: int = 0
    room: anyio.Semaphore = field(default_factory=lambda: anyio.Semaphore(0))
    max_tokens: int | None = None
    refusal: PipelineError | None = None

    @property
    def name(self) -> str:
        return f"{self.provider}/{self.model}" if self.model else self.provider

    def make_room(self) -> None:
        """Let one of the waiting records try again."""
        if self.room.statistics().tasks_waiting:
            self.room.release()


class BatchBuilder:
    """Holds one open batch file per group. File writes run in threads, one at a time (`disk`)."""

    def __init__(
        self,
        store: BatchStore,
        settings: Batches,
        *,
        open_client: Callable[[str], BatchClient],
        disk: anyio.CapacityLimiter,
    ) -> None:
        self._store = store
        self._settings = settings
        self._open_client = open_client
        self._disk = disk
        self._clients: dict[str, BatchClient] = {}
        self._finishing = 0
        self.groups: dict[tuple[str, str], BatchGroup] = {}

    @property
    def is_empty(self) -> bool:
        """Return True if no file is open or being finished."""
        return not self._finishing and not any(group.open_batch for group in self.groups.values())

    def group(self, provider: str, model: str) -> BatchGroup:
        """Return the group of a model. Raises `UsageError` if its provider cannot be called (no key)."""
        if provider not in self._clients:
            self._clients[provider] = self._open_client(provider)
        client = self._clients[provider]
        model = model if client.batches.is_for_one_model else ""
        if (provider, model) not in self.groups:
            self.groups[provider, model] = BatchGroup(provider=provider, model=model, client=client)
        return self.groups[provider, model]

    def try_add(self, group: BatchGroup, item: BatchItem) -> str | None:
        """Add a request to the group's open file and return the file's local id; None if the file is full."""
        if group.open_batch is None:
            group.open_batch = self._store.begin()
        open_batch = group.open_batch
        codec = group.client.batches
        request = item.request
        # The name identifies the request and this batch, so that results of another batch are not taken for ours.
        mark = checksum(request.custom_id.encode(), b"\0", request.digest.encode()).hex()
        named = replace(item, name=codec.name(open_batch.local_id, request.custom_id, mark))
        size = len(codec.entry(named.name, request.body))
        if open_batch.requests:
            size += len(codec.separator)
            if self._is_full(group, open_batch, named, size):
                return None
        open_batch.add_entry(named, size)
        return open_batch.local_id

    async def flush(self) -> None:
        """Write what was added to the open files."""
        for group in list(self.groups.values()):
            if group.open_batch:
                await to_thread.run_sync(group.open_batch.write, group.open_batch.take(), limiter=self._disk)

    async def finish(self, group: BatchGroup, blank: BatchRecord) -> BatchRecord | None:
        """Finish the group's open file and save its record, on the disk. None if no file is open.

        `blank` is the record without what the file determines.
        """
        open_batch, group.open_batch = group.open_batch, None
        if open_batch is None:
            return None
        lines = open_batch.take()

        def write() -> BatchRecord:
            record = open_batch.finish(lines, blank)
            self._store.save(record)
            return record

        self._finishing += 1
        try:
            return await to_thread.run_sync(write, limiter=self._disk)
        finally:
            self._finishing -= 1

    def discard(self) -> list[OpenBatch]:
        """Delete the open files and return them."""
        discarded = []
        for group in self.groups.values():
            if group.open_batch:
                discarded.append(group.open_batch)
                group.open_batch = None
        for open_batch in discarded:
            open_batch.delete()
        return discarded

    def _is_full(self, group: BatchGroup, open_batch: OpenBatch, item: BatchItem, size: int) -> bool:
        codec = group.client.batches
        max_requests = min(codec.max_requests, self._settings.max_requests or codec.max_requests)
        max_bytes = min(codec.max_bytes, self._settings.max_bytes or codec.max_bytes)
        if open_batch.requests >= max_requests or open_batch.content + size > max_bytes:
            return True
        tokens = open_batch.input_tokens + item.request.estimated_input_tokens
        return group.max_tokens is not None and tokens > group.max_tokens


def deadline_text(deadline: datetime | None) -> str | None:
    """Return a deadline in the form that batch records hold."""
    return f"{deadline:%Y-%m-%dT%H:%M:%SZ}" if deadline else None
