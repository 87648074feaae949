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
    courier: BatchClient
    spool: OpenBatch | None = None
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
        chunks: BatchStore,
        settings: Batches,
        reserves: BatchReservations,
        *,
        open_courier: Callable[[str], BatchClient],
        blank: Callable[[BatchGroup], BatchRecord],
        ship: Callable[[BatchRecord], None],
        may_wait: bool,
        disk: anyio.CapacityLimiter,
    ) -> None:
        self._chunks = chunks
        self._settings = settings
        self._reserves = reserves
        self._open_courier = open_courier
        self._blank = blank
        self._ship = ship
        self._may_wait = may_wait
        self._disk = disk
        self._couriers: dict[str, BatchClient] = {}
        self._sealing = 0
        self.groups: dict[tuple[str, str], BatchGroup] = {}
        self.refused: PipelineError | None = None

    @property
    def is_empty(self) -> bool:
        return not self._sealing and not any(group.spool for group in self.groups.values())

    def group(self, provider: str, model: str) -> BatchGroup:
        """Return the group of a model. Raises `UsageError` where its provider cannot be called (no key)."""
        if provider not in self._couriers:
            self._couriers[provider] = self._open_courier(provider)
        courier = self._couriers[provider]
        model = model if courier.batches.is_for_one_model else ""
        if (provider, model) not in self.groups:
            self.groups[provider, model] = BatchGroup(provider=provider, model=model, courier=courier)
        return self.groups[provider, model]

    async def load(self, members: Iterable[BatchItem]) -> list[BatchItem]:
        """Put requests into chunks; return those whose provider takes no batch of them."""
        turned_away = [member for member in members if not await self._add(member)]
        for group in list(self.groups.values()):
            if group.spool:
                await to_thread.run_sync(group.spool.write, group.spool.take(), limiter=self._disk)
        if self._reserves.waiting:  # somebody waits for money: only what is on its way can give it back
            await self.seal_all()
        return turned_away

    async def seal_all(self) -> None:
        """Ship whatever is loaded."""
        for group in list(self.groups.values()):
            await self._seal(group)

    def unload(self) -> int:
        """Forget what is not shipped; return how many requests that were."""
        spools = [group.spool for group in self.groups.values() if group.spool]
        for group in self.groups.values():
            group.spool = None
        for spool in spools:
            spool.delete()
            self._reserves.close(spool.nonce)
        return sum(spool.requests for spool in spools)

    async def _add(self, member: BatchItem) -> bool:
        """Load a request; False where no batch is to be had for it, or nothing more is loaded."""
        request = member.request
        try:
            if self.refused:
                return False
            group = self.group(request.provider, request.model)
            if group.refusal:
                return False
            reserved = self._reserves.try_reserve(request)
            if reserved is None:
                if not self._may_wait:
                    await self.seal_all()
                    raise TryLaterError("the budget does not cover the rest before results are back")
                reserved = await self._reserves.reserve(request, self.seal_all)
        except (UsageError, BudgetReachedError, TryLaterError) as error:
            self.refused = error
            return False
        while True:
            spool = group.spool = group.spool or self._chunks.spool()
            codec = group.courier.batches
            mark = checksum(request.custom_id.encode(), b"\0", request.digest.encode()).hex()
            named = replace(member, name=codec.name(spool.nonce, request.custom_id, mark))
            size = len(codec.separator) + len(codec.entry(named.name, request.body))
            if not spool.requests or not self._is_full(group, spool, named, size):
                spool.add_entry(named, size if spool.requests else size - len(codec.separator))
                self._reserves.assign(spool.nonce, reserved)
                return True
            await self._seal(group)

    def _is_full(self, group: BatchGroup, spool: OpenBatch, member: BatchItem, size: int) -> bool:
        codec, settings = group.courier.batches, self._settings
        tokens = spool.input_tokens + member.request.estimated_input_tokens
        return (
            spool.requests >= min(codec.max_requests, settings.max_requests or codec.max_requests)
            or spool.content + size > min(codec.max_bytes, settings.max_bytes or codec.max_bytes)
            or (group.max_tokens is not None and tokens > group.max_tokens)
        )

    async def _seal(self, group: BatchGroup) -> None:
        spool, group.spool = group.spool, None
        if spool is None:
            return
        lines, blank = spool.take(), self._blank(group)

        def seal() -> BatchRecord:
            chunk = spool.seal(lines, blank)
            self._chunks.note(chunk)
            return chunk

        self._sealing += 1
        try:
            chunk = await to_thread.run_sync(seal, limiter=self._disk)
        finally:
            self._sealing -= 1
        self._ship(chunk)


def deadline_text(deadline: datetime | None) -> str | None:
    """Return a deadline as chunks hold it."""
    return f"{deadline:%Y-%m-%dT%H:%M:%SZ}" if deadline else None
