"""Requests -> chunks: who shares a batch with whom, under which name, and when a chunk is full.

Chunks are filled on the disk; a full one is sealed and shipped. With a budget a request is set aside for before it goes
in; what does not fit waits until results come back, which they do only if everything that is loaded is shipped first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime

import anyio
from anyio import to_thread

from pipeline.core.config import Batches
from pipeline.core.errors import BudgetReachedError, PipelineError, TryLaterError, UsageError
from pipeline.core.hashing import checksum
from pipeline.dispatch.batch.client import BatchClient
from pipeline.dispatch.batch.reservations import BatchReservations
from pipeline.dispatch.batch.store import BatchItem, BatchRecord, BatchStore, OpenBatch


@dataclass(slots=True, kw_only=True)
class BatchGroup:
    """The requests that may share batches: of one provider and, where it wants that, of one model.

    `underway` counts batches that have been made and have not ended. `room` is where chunks wait that the provider's
    queue had no room for. `max_tokens` bounds chunks once one alone was too large for that queue. `refusal` is why the
    provider takes no batch of these any more.
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
        """Let one of the chunks go on that wait for room."""
        if self.room.statistics().tasks_waiting:
            self.room.release()


class BatchBuilder:
    """Fills chunks, and gives each to `ship` when it is full or `seal_all` is called.

    `blank` makes the chunk of a group before anything is in it. `refused` is why nothing more is loaded: a spent
    budget, a price that nobody knows, a key that is not there.
    """

    def __init__(
        self,
        store: BatchStore,
        settings: Batches,
        reservations: BatchReservations,
        *,
        open_client: Callable[[str], BatchClient],
        new_record: Callable[[BatchGroup], BatchRecord],
        submit: Callable[[BatchRecord], None],
        may_wait: bool,
        disk: anyio.CapacityLimiter,
    ) -> None:
        self._store = store
        self._settings = settings
        self._reservations = reservations
        self._open_client = open_client
        self._new_record = new_record
        self._submit = submit
        self._may_wait = may_wait
        self._disk = disk
        self._clients: dict[str, BatchClient] = {}
        self._finishing = 0
        self.groups: dict[tuple[str, str], BatchGroup] = {}
        self.refused: PipelineError | None = None

    @property
    def is_empty(self) -> bool:
        return not self._finishing and not any(group.open_batch for group in self.groups.values())

    def group(self, provider: str, model: str) -> BatchGroup:
        """Return the group of a model. Raises `UsageError` where its provider cannot be called (no key)."""
        if provider not in self._clients:
            self._clients[provider] = self._open_client(provider)
        client = self._clients[provider]
        model = model if client.batches.is_for_one_model else ""
        if (provider, model) not in self.groups:
            self.groups[provider, model] = BatchGroup(provider=provider, model=model, client=client)
        return self.groups[provider, model]

    async def load(self, items: Iterable[BatchItem]) -> list[BatchItem]:
        """Put requests into chunks; return those whose provider takes no batch of them."""
        turned_away = [item for item in items if not await self._add(item)]
        for group in list(self.groups.values()):
            if group.open_batch:
                await to_thread.run_sync(group.open_batch.write, group.open_batch.take(), limiter=self._disk)
        if self._reservations.waiting:  # somebody waits for money: only what is on its way can give it back
            await self.finish_all()
        return turned_away

    async def finish_all(self) -> None:
        """Ship whatever is loaded."""
        for group in list(self.groups.values()):
            await self._finish(group)

    def discard(self) -> int:
        """Forget what is not shipped; return how many requests that were."""
        open_batches = [group.open_batch for group in self.groups.values() if group.open_batch]
        for group in self.groups.values():
            group.open_batch = None
        for open_batch in open_batches:
            open_batch.delete()
            self._reservations.close(open_batch.local_id)
        return sum(open_batch.requests for open_batch in open_batches)

    async def _add(self, item: BatchItem) -> bool:
        """Load a request; False where no batch is to be had for it, or nothing more is loaded."""
        request = item.request
        try:
            if self.refused:
                return False
            group = self.group(request.provider, request.model)
            if group.refusal:
                return False
            reserved = self._reservations.try_reserve(request)
            if reserved is None:
                if not self._may_wait:
                    await self.finish_all()
                    raise TryLaterError("the budget does not cover the rest before results are back")
                reserved = await self._reservations.reserve(request, self.finish_all)
        except (UsageError, BudgetReachedError, TryLaterError) as error:
            self.refused = error
            return False
        while True:
            open_batch = group.open_batch = group.open_batch or self._store.open_batch()
            codec = group.client.batches
            mark = checksum(request.custom_id.encode(), b"\0", request.digest.encode()).hex()
            named = replace(item, name=codec.name(open_batch.local_id, request.custom_id, mark))
            size = len(codec.separator) + len(codec.entry(named.name, request.body))
            if not open_batch.requests or not self._is_full(group, open_batch, named, size):
                open_batch.add_entry(named, size if open_batch.requests else size - len(codec.separator))
                self._reservations.assign(open_batch.local_id, reserved)
                return True
            await self._finish(group)

    def _is_full(self, group: BatchGroup, open_batch: OpenBatch, item: BatchItem, size: int) -> bool:
        codec, settings = group.client.batches, self._settings
        tokens = open_batch.input_tokens + item.request.estimated_input_tokens
        return (
            open_batch.requests >= min(codec.max_requests, settings.max_requests or codec.max_requests)
            or open_batch.content + size > min(codec.max_bytes, settings.max_bytes or codec.max_bytes)
            or (group.max_tokens is not None and tokens > group.max_tokens)
        )

    async def _finish(self, group: BatchGroup) -> None:
        open_batch, group.open_batch = group.open_batch, None
        if open_batch is None:
            return
        lines, new_record = open_batch.take(), self._new_record(group)

        def finish() -> BatchRecord:
            record = open_batch.finish(lines, new_record)
            self._store.save(record)
            return record

        self._finishing += 1
        try:
            record = await to_thread.run_sync(finish, limiter=self._disk)
        finally:
            self._finishing -= 1
        self._submit(record)


def deadline_text(deadline: datetime | None) -> str | None:
    """Return a deadline as chunks hold it."""
    return f"{deadline:%Y-%m-%dT%H:%M:%SZ}" if deadline else None
