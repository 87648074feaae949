"""Puts requests into batches within the budget, and submits a batch when it is full.

For each request, in this order:

    reserve its worst case ─▶ add it to the group's open batch ─▶ if that is full: submit it, begin another

If the budget does not cover the next request, everything loaded so far is submitted: only results release reserved
money, and only submitted batches bring results. Then the request waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pipeline.core.errors import BudgetReachedError, PipelineError, TryLaterError, UsageError
from pipeline.core.types import Request
from pipeline.dispatch.batch.builder import BatchBuilder, BatchGroup
from pipeline.dispatch.batch.reservations import BatchReservations
from pipeline.dispatch.batch.store import BatchItem, BatchRecord


class BatchLoader:
    """Fills batches and gives each to `submit`.

    `new_record` returns the record of a group's next batch, still without its requests. With `may_wait` False a
    request that the budget does not cover now ends the loading. `refused` is why nothing more is loaded: the budget is
    reached, a price is unknown, or a key is missing.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        reservations: BatchReservations,
        *,
        new_record: Callable[[BatchGroup], BatchRecord],
        submit: Callable[[BatchRecord], None],
        may_wait: bool,
    ) -> None:
        self._builder = builder
        self._reservations = reservations
        self._new_record = new_record
        self._submit = submit
        self._may_wait = may_wait
        self.refused: PipelineError | None = None

    async def load(self, items: Iterable[BatchItem]) -> list[BatchItem]:
        """Put requests into batches; return those that no batch takes."""
        turned_away = []
        for item in items:
            is_loaded = await self._load_one(item)
            if not is_loaded:
                turned_away.append(item)
        await self._builder.flush()
        if self._reservations.waiting:
            # Another task waits for money. Only what is submitted can release some.
            await self.submit_all()
        return turned_away

    async def submit_all(self) -> None:
        """Submit every open batch."""
        for group in list(self._builder.groups.values()):
            await self._submit_open(group)

    def discard(self) -> int:
        """Drop the requests that are not submitted yet; return how many there were."""
        dropped = 0
        for open_batch in self._builder.discard():
            self._reservations.close(open_batch.local_id)
            dropped += open_batch.requests
        return dropped

    async def _load_one(self, item: BatchItem) -> bool:
        """Load a request; return False if its provider takes no batches, or nothing more is loaded."""
        if self.refused:
            return False
        try:
            group = self._builder.group(item.request.provider, item.request.model)
            if group.refusal:
                return False
            reserved = await self._reserve(item.request)
        except (UsageError, BudgetReachedError, TryLaterError) as error:
            self.refused = error
            return False
        local_id = self._builder.try_add(group, item)
        while local_id is None:  # another task may fill the next batch while this one is finished
            await self._submit_open(group)
            local_id = self._builder.try_add(group, item)
        self._reservations.assign(local_id, reserved)
        return True

    async def _reserve(self, request: Request) -> int:
        """Reserve the worst case of a request; wait for results if it does not fit now.

        Raises `BudgetReachedError` if it never will, `TryLaterError` if it may not wait, `UsageError` if the price is
        unknown.
        """
        reserved = self._reservations.try_reserve(request)
        if reserved is not None:
            return reserved
        if not self._may_wait:
            await self.submit_all()
            raise TryLaterError("the budget does not cover the remaining requests until results are back")
        # Counted as waiting before anything is submitted, so that whatever other tasks load meanwhile goes out too.
        with self._reservations.counted_as_waiting():
            await self.submit_all()
            return await self._reservations.reserve(request)

    async def _submit_open(self, group: BatchGroup) -> None:
        record = await self._builder.finish(group, self._new_record(group))
        if record is not None:
            self._submit(record)
