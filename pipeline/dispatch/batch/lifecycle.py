"""The passage of a chunk: uploaded, its batch made or found, waited for until it has ended.

Each step is on the disk before the next is taken. What a crash, a signal or a lost answer leaves is gone on with:
before a batch is made a second time it is looked for, until the first call must be over.
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
from pipeline.dispatch.batch.store import BatchRecord, BatchStore, Step
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
    """How long is waited, in seconds: between two looks at a batch, and for the answer of one small call.

    `rounds` is how often a batch is tried to be made. `live_seconds` tells how long the requests of a chunk take live;
    None where nothing goes live. All is to be there before the `deadline`, also what an earlier run sent.
    """

    poll_interval: float
    call: float
    rounds: int
    live_seconds: Callable[[BatchRecord], float] | None
    deadline: datetime | None = None


class Wait(StrEnum):
    """How waiting for a batch ended: with its end, while it goes on, or with one that does not heed its cancelling."""

    ENDED = "ended"
    GOES_ON = "goes on"
    IGNORES_CANCEL = "ignores cancel"


class BatchLifecycle:
    """Takes chunks from one step to the next, and notes each."""

    def __init__(
        self, chunks: BatchStore, clock: Clock, stop: StopSignal, patience: PollPolicy, say: Callable[[str], None]
    ) -> None:
        self._chunks = chunks
        self._clock = clock
        self._stop = stop
        self._patience = patience
        self._say = say
        self._begun = clock.moment()
        self.doubted = 0  # requests of batches that were made again, though a first one may be there
        self.disk = anyio.CapacityLimiter(1)

    async def note(self, chunk: BatchRecord, **changes: Any) -> BatchRecord:
        """Note a step on the disk and return the chunk as it is now."""
        chunk = replace(chunk, **changes)
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(self._chunks.note, chunk, limiter=self.disk)
        return chunk

    async def upload(self, courier: BatchClient, chunk: BatchRecord) -> BatchRecord:
        """Upload a chunk; as it was where that was cut short."""
        with self._stop.cuts_short():
            file_id = await courier.upload(self._chunks, chunk)
            return await self.note(chunk, step=Step.UPLOADED, file_id=file_id)
        return chunk

    async def create(self, courier: BatchClient, chunk: BatchRecord) -> BatchRecord:
        """Make the batch of a chunk or, if one may have been made, find it. Raises `ProviderError`, `TryLaterError`."""
        rounds = 0
        while chunk.step is not Step.CREATED:
            if chunk.step is Step.CREATING:
                if batch := await self._find(courier, chunk):
                    self._say(f"{chunk.group}: found batch {batch.id}, whose making was not confirmed")
                    is_certain = courier.batches.has_tags
                    return await self.note(chunk, **_told(batch), step=Step.CREATED, is_confirmed=is_certain)
                self.doubted += chunk.requests
            if (rounds := rounds + 1) > self._patience.rounds:
                raise TryLaterError("the provider does not say whether it made a batch, and none is found")

            async def begin() -> None:
                nonlocal chunk
                at = f"{self._clock.moment():%Y-%m-%dT%H:%M:%SZ}"
                chunk = await self.note(chunk, step=Step.CREATING, creating_at=at, is_confirmed=True)

            try:
                batch = await courier.create(self._chunks, chunk, begin)
            except UncertainError as error:
                self._say(f"{chunk.group}: it is not known whether a batch was made, it is looked for: {error}")
                continue
            except (ProviderError, TryLaterError):
                await self.note(chunk, step=Step.UPLOADED)
                raise
            self._say(f"{chunk.group}: batch {batch.id} of {chunk.requests:,} requests is on its way")
            chunk = await self.note(chunk, **_told(batch), step=Step.CREATED)
        return chunk

    async def _find(self, courier: BatchClient, chunk: BatchRecord) -> Batch | None:
        """Look for a batch that may have been made, until the call that may have made it must be over, and longer.

        A provider may go on with a call that we gave up, and tell of the batch somewhat later.
        """
        assert chunk.creating_at is not None
        longest = self._patience.call + chunk.content / SLOWEST_BYTES_PER_SECOND
        over = _time(chunk.creating_at) + timedelta(seconds=longest + _LATENESS * self._patience.call)
        pause = _FIRST_PAUSE
        while True:
            for taken in self._taken(chunk):
                if batch := await courier.find(chunk, taken):
                    return batch
            left = (over - self._clock.moment()).total_seconds()
            if left <= 0:
                return None
            with self._stop.cuts_short():
                await anyio.sleep(min(left, pause))
            if self._stop.is_called:
                raise TryLaterError("stopped before it was known whether a batch was made; a later run finds out")
            pause *= _PAUSE_GROWTH

    def _taken(self, chunk: BatchRecord) -> Iterator[set[str]]:
        """Yield what a chunk's batch is not: first all that our other chunks claim, then what is theirs for certain.

        Two chunks of one size may have claimed each other's batch; each must find its own again.
        """
        others = [each for each in self._chunks.all if each.batch_id and each.nonce != chunk.nonce]
        sure = {each.name for each in others if each.is_confirmed or not each.is_open} | set(chunk.not_ours)
        claimed = sure | {each.name for each in others}
        yield claimed
        if claimed != sure:
            yield sure

    async def wait(
        self, courier: BatchClient, chunk: BatchRecord, *, is_patient: bool
    ) -> tuple[BatchRecord, Batch | None, Wait]:
        """Wait for the end of a batch; return its last state where it has ended, and how the waiting did.

        A batch that is late is cancelled, so that the rest of it can go live before the deadline.
        """
        id = _id_of(chunk)
        pause, is_cancelled = _FIRST_PAUSE, False
        while True:
            batch = None
            with self._stop.cuts_short():
                batch = await courier.poll(id)
            if batch:
                chunk = await self._note_told(chunk, batch)
            if batch and batch.is_ended:
                return chunk, batch, Wait.ENDED
            if batch and chunk.is_confirmed and self.is_late(chunk):
                if not is_cancelled:
                    chunk = await self._give_up(courier, chunk)
                    pause, is_cancelled = _FIRST_PAUSE, True
                    continue
                if self._is_too_late(chunk):
                    return chunk, None, Wait.IGNORES_CANCEL
            if self._stop.is_called or not is_patient:
                return chunk, None, Wait.GOES_ON
            self._refuse_overdue(chunk)
            turns = (self._seconds_to_switch(chunk), self._seconds_until(chunk, timedelta(0), share=4))
            with self._stop.cuts_short():
                await anyio.sleep(min([pause, *(seconds for seconds in turns if seconds and seconds > 0)]))
            pause = min(pause * _PAUSE_GROWTH, self._patience.poll_interval)

    async def _note_told(self, chunk: BatchRecord, batch: Batch) -> BatchRecord:
        """Note what a provider tells of a batch, if that is news."""
        told = _told(batch)
        return await self.note(chunk, **told) if replace(chunk, **told) != chunk else chunk

    async def _give_up(self, courier: BatchClient, chunk: BatchRecord) -> BatchRecord:
        """Cancel a batch that is late; that it is ours to cancel is noted first."""
        id = _id_of(chunk)
        self._say(f"{chunk.group}: batch {id} is cancelled; what it did not answer goes live")
        chunk = await self.note(chunk, is_given_up=True)
        await courier.cancel(id)
        return chunk

    def is_late(self, chunk: BatchRecord) -> bool:
        """Tell whether what is not answered of a chunk must go live now."""
        seconds = self._seconds_to_switch(chunk)
        return seconds is not None and seconds <= 0

    def _is_too_late(self, chunk: BatchRecord) -> bool:
        """Tell whether the rest of a batch must go live although it has not ended: else it were not back in time."""
        seconds = self._seconds_until(chunk, timedelta(0), share=4)
        return seconds is not None and seconds <= 0

    def _seconds_to_switch(self, chunk: BatchRecord) -> float | None:
        """Return when a batch must be cancelled; None where there is no deadline."""
        return self._seconds_until(chunk, _LONGEST_CANCELLING, share=2)

    def _seconds_until(self, chunk: BatchRecord, cancelling: timedelta, share: int) -> float | None:
        """Return the seconds until only the time is left that cancelling and going live need, or a share of it all."""
        deadlines = [_time(chunk.deadline)] if chunk.deadline else []
        deadlines += [self._patience.deadline] if self._patience.deadline else []
        if self._patience.live_seconds is None or not deadlines:
            return None
        deadline, begun = min(deadlines), max(_time(chunk.at), self._begun)
        needed = timedelta(seconds=self._patience.live_seconds(chunk)) + cancelling
        return (deadline - min(needed, (deadline - begun) / share) - self._clock.moment()).total_seconds()

    def _refuse_overdue(self, chunk: BatchRecord) -> None:
        """Wait for no batch that should have ended long ago. Raises `TryLaterError`."""
        begun = _time(chunk.created_at or chunk.creating_at or chunk.at)
        expires = _time(chunk.expires_at) if chunk.expires_at else begun + _WINDOW
        if self._clock.moment() > expires + _OVERDUE:
            text = f"batch {chunk.batch_id} should have expired at {expires:%Y-%m-%dT%H:%M:%SZ} and has not ended"
            raise TryLaterError(text)


def _id_of(chunk: BatchRecord) -> str:
    assert chunk.batch_id is not None, "a batch is made first"
    return chunk.batch_id


def _told(batch: Batch) -> dict[str, Any]:
    """Return what a chunk keeps of what a provider tells."""
    return {
        "batch_id": batch.id,
        "status": batch.status,
        "succeeded": batch.succeeded,
        "failed": batch.failed,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
    }


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
