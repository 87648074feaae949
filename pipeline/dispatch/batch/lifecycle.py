"""The life of a batch: upload it, create or find it, wait until it has ended.

Each step is on the disk before the next is taken, so that a later run continues after a crash, a signal or a lost
response. Before a batch is created a second time it is looked for, until the first call must be over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import anyio
from anyio import to_thread

from pipeline.core.clock import Clock
from pipeline.core.errors import ProviderError, TryLaterError
from pipeline.core.http import SLOWEST_BYTES_PER_SECOND
from pipeline.dispatch.batch.client import BatchClient, UncertainError
from pipeline.dispatch.batch.store import BatchRecord, BatchStore, Step, parse_time
from pipeline.dispatch.cancel import StopSignal
from pipeline.providers.batch import Batch

_FIRST_PAUSE = 1.0
_PAUSE_GROWTH = 1.5
_LATENESS = 4  # how many times longer than a call a provider may need to tell of a batch
_WINDOW = timedelta(days=1)  # of both providers, where a server tells none
_OVERDUE = timedelta(hours=1)  # after a batch should have expired
_LONGEST_CANCELLING = timedelta(minutes=15)  # OpenAI says up to 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PollPolicy:
    """How long to wait, in seconds: between two polls of a batch, and for the response of one small call.

    `rounds` limits the attempts to create a batch. `live_seconds` returns how long a batch's requests would take live;
    None if nothing may go live. All results are due before the `deadline`, including those of earlier runs.
    """

    poll_interval: float
    call: float
    rounds: int
    live_seconds: Callable[[BatchRecord], float] | None
    deadline: datetime | None = None


class Wait(StrEnum):
    """How waiting for a batch ended: it ended, it goes on, or it ignores that it was cancelled."""

    ENDED = "ended"
    GOES_ON = "goes on"
    IGNORES_CANCEL = "ignores cancel"


class BatchLifecycle:
    """Takes batches from one step to the next and saves each step."""

    def __init__(
        self, store: BatchStore, clock: Clock, stop: StopSignal, poll_policy: PollPolicy, notify: Callable[[str], None]
    ) -> None:
        self._store = store
        self._clock = clock
        self._stop = stop
        self._poll_policy = poll_policy
        self._notify = notify
        self._begun = clock.moment()
        self.maybe_duplicated = 0  # requests of batches created again although a first one may exist
        self.disk = anyio.CapacityLimiter(1)

    async def save(self, record: BatchRecord, **changes: Any) -> BatchRecord:
        """Save a step on the disk and return the changed record."""
        record = replace(record, **changes)
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(self._store.save, record, limiter=self.disk)
        return record

    async def upload(self, client: BatchClient, record: BatchRecord) -> BatchRecord:
        """Upload a batch file; return the record unchanged if the run stops meanwhile."""
        with self._stop.cuts_short():
            file_id = await client.upload(self._store, record)
            return await self.save(record, step=Step.UPLOADED, file_id=file_id)
        return record

    async def create(self, client: BatchClient, record: BatchRecord) -> BatchRecord:
        """Create the batch or, if it may exist already, find it. Raises `ProviderError`, `TryLaterError`."""
        rounds = 0
        while record.step is not Step.CREATED:
            if record.step is Step.CREATING:
                if batch := await self._find(client, record):
                    self._notify(f"{record.group}: found batch {batch.id}, whose creation was not confirmed")
                    is_certain = client.batches.has_tags
                    return await self.save(record, **_reported(batch), step=Step.CREATED, is_confirmed=is_certain)
                self.maybe_duplicated += record.requests
            rounds += 1
            if rounds > self._poll_policy.rounds:
                raise TryLaterError("the provider did not confirm that it created a batch, and none was found")

            async def begin() -> None:
                nonlocal record
                at = f"{self._clock.moment():%Y-%m-%dT%H:%M:%SZ}"
                record = await self.save(record, step=Step.CREATING, creating_at=at, is_confirmed=True)

            try:
                batch = await client.create(self._store, record, begin)
            except UncertainError as error:
                self._notify(f"{record.group}: a batch may have been created; looking for it: {error}")
                continue
            except (ProviderError, TryLaterError):
                await self.save(record, step=Step.UPLOADED)
                raise
            self._notify(f"{record.group}: submitted batch {batch.id} with {record.requests:,} requests")
            record = await self.save(record, **_reported(batch), step=Step.CREATED)
        return record

    async def _find(self, client: BatchClient, record: BatchRecord) -> Batch | None:
        """Look for a batch that may exist, until the call that may have created it must be over, and a while longer.

        A provider may finish a call that we gave up, and list the batch a little later.
        """
        assert record.creating_at is not None
        longest = self._poll_policy.call + record.content / SLOWEST_BYTES_PER_SECOND
        over = parse_time(record.creating_at) + timedelta(seconds=longest + _LATENESS * self._poll_policy.call)
        pause = _FIRST_PAUSE
        while True:
            for taken in self._taken(record):
                if batch := await client.find(record, taken):
                    return batch
            left = (over - self._clock.moment()).total_seconds()
            if left <= 0:
                return None
            with self._stop.cuts_short():
                await anyio.sleep(min(left, pause))
            if self._stop.is_called:
                raise TryLaterError("stopped before it was known whether a batch was made; a later run finds out")
            pause *= _PAUSE_GROWTH

    def _taken(self, record: BatchRecord) -> Iterator[set[str]]:
        """Yield ids to skip in the search: first all that our other records claim, then only those certainly theirs.

        Two records of the same size may have claimed each other's batch; each must find its own again.
        """
        others = [each for each in self._store.all if each.batch_id and each.local_id != record.local_id]
        sure = {each.name for each in others if each.is_confirmed or not each.is_open} | set(record.not_ours)
        claimed = sure | {each.name for each in others}
        yield claimed
        if claimed != sure:
            yield sure

    async def wait(
        self, client: BatchClient, record: BatchRecord, *, is_patient: bool
    ) -> tuple[BatchRecord, Batch | None, Wait]:
        """Wait for the end of a batch; return its last state if it has ended, and how the waiting ended.

        A late batch is cancelled, so that its unanswered requests can go live before the deadline.
        """
        id = _id_of(record)
        pause, is_cancelled = _FIRST_PAUSE, False
        while True:
            batch = None
            with self._stop.cuts_short():
                batch = await client.poll(id)
            if batch:
                record = await self._save_reported(record, batch)
            if batch and batch.is_ended:
                return record, batch, Wait.ENDED
            if batch and record.is_confirmed and self.is_late(record):
                if not is_cancelled:
                    record = await self._give_up(client, record)
                    pause, is_cancelled = _FIRST_PAUSE, True
                    continue
                if self._is_too_late(record):
                    return record, None, Wait.IGNORES_CANCEL
            if self._stop.is_called or not is_patient:
                return record, None, Wait.GOES_ON
            self._refuse_overdue(record)
            turns = (self._seconds_to_switch(record), self._seconds_until(record, timedelta(0), share=4))
            with self._stop.cuts_short():
                await anyio.sleep(min([pause, *(seconds for seconds in turns if seconds and seconds > 0)]))
            pause = min(pause * _PAUSE_GROWTH, self._poll_policy.poll_interval)

    async def _save_reported(self, record: BatchRecord, batch: Batch) -> BatchRecord:
        """Save what the provider reports of a batch, if it changed."""
        reported = _reported(batch)
        return await self.save(record, **reported) if replace(record, **reported) != record else record

    async def _give_up(self, client: BatchClient, record: BatchRecord) -> BatchRecord:
        """Cancel a late batch, after saving that the cancellation is ours."""
        id = _id_of(record)
        self._notify(f"{record.group}: batch {id} is cancelled; what it did not answer goes live")
        record = await self.save(record, is_given_up=True)
        await client.cancel(id)
        return record

    def is_late(self, record: BatchRecord) -> bool:
        """Return True if the unanswered requests of a batch must go live now."""
        seconds = self._seconds_to_switch(record)
        return seconds is not None and seconds <= 0

    def _is_too_late(self, record: BatchRecord) -> bool:
        """Return True if the rest of a batch must go live before it has ended, to be answered in time."""
        seconds = self._seconds_until(record, timedelta(0), share=4)
        return seconds is not None and seconds <= 0

    def _seconds_to_switch(self, record: BatchRecord) -> float | None:
        """Return when a batch must be cancelled; None where there is no deadline."""
        return self._seconds_until(record, _LONGEST_CANCELLING, share=2)

    def _seconds_until(self, record: BatchRecord, cancelling: timedelta, share: int) -> float | None:
        """Return the seconds until only the time is left that cancelling and going live need, or a share of it all."""
        deadlines = [parse_time(record.deadline)] if record.deadline else []
        deadlines += [self._poll_policy.deadline] if self._poll_policy.deadline else []
        if self._poll_policy.live_seconds is None or not deadlines:
            return None
        deadline, begun = min(deadlines), max(parse_time(record.at), self._begun)
        needed = timedelta(seconds=self._poll_policy.live_seconds(record)) + cancelling
        return (deadline - min(needed, (deadline - begun) / share) - self._clock.moment()).total_seconds()

    def _refuse_overdue(self, record: BatchRecord) -> None:
        """Wait for no batch that should have ended long ago. Raises `TryLaterError`."""
        begun = parse_time(record.created_at or record.creating_at or record.at)
        expires = parse_time(record.expires_at) if record.expires_at else begun + _WINDOW
        if self._clock.moment() > expires + _OVERDUE:
            text = f"batch {record.batch_id} should have expired at {expires:%Y-%m-%dT%H:%M:%SZ} and has not ended"
            raise TryLaterError(text)


def _id_of(record: BatchRecord) -> str:
    assert record.batch_id is not None, "a batch is made first"
    return record.batch_id


def _reported(batch: Batch) -> dict[str, Any]:
    """Return the fields of a record that a provider reports."""
    return {
        "batch_id": batch.id,
        "status": batch.status,
        "succeeded": batch.succeeded,
        "failed": batch.failed,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
    }
