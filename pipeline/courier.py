"""One provider's batch API, called with patience: what may be repeated is repeated, making a batch never blindly.

Every call goes through `_ask`, which waits as the retry policy says. A batch may have been made although no answer
came; `create` says so by `UncertainError`, and `find` looks for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, TypeVar

import anyio
import orjson
from anyio import to_thread

from pipeline.chunks import Chunk, Chunks
from pipeline.config import Endpoint
from pipeline.errors import ProviderError, Reach, TransportError, TryLaterError
from pipeline.providers import BatchCodec, Provider
from pipeline.providers.base import Headers
from pipeline.providers.batches import Batch
from pipeline.retry import Policy
from pipeline.transport import Content
from pipeline.types import Answer, Call

T = TypeVar("T")

_SKEW = timedelta(minutes=10)  # by which the provider's clock and ours may differ
_UPLOADS = 2  # at the same time: they share one line


class UncertainError(Exception):
    """A batch may have been made, and nobody knows its id."""


Ask = Callable[[Call, Content | None], Awaitable[Answer]]
Download = Callable[[Call, Callable[[int, bytes], Awaitable[None]], int], Awaitable[Answer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How an endpoint is reached: its address, its headers with the key, and what makes calls."""

    endpoint: Endpoint
    headers: Headers
    ask: Ask
    download: Download
    mask: Callable[[bytes], bytes]


class Courier:
    """Carries the chunks of one provider to its batch API, and the results back.

    `patience` is for how many seconds a provider may be out of reach.
    """

    def __init__(
        self,
        *,
        codec: Provider,
        batches: BatchCodec,
        way: Way,
        policy: Policy,
        patience: float,
        max_line_bytes: int,
    ) -> None:
        self.codec = codec
        self.batches = batches
        self._way = way
        self._policy = policy
        self._patience = patience
        self._max_line_bytes = max_line_bytes
        self._uploads = anyio.Semaphore(_UPLOADS)

    async def upload(self, chunks: Chunks, chunk: Chunk) -> str | None:
        """Upload a chunk and return the id of the file; None where that is not a call of its own."""
        call = self.batches.upload(self._way.endpoint, self._way.headers, chunk.nonce)
        if call is None:
            return None
        async with self._uploads:
            return await self._ask(call, self.batches.uploaded, self._content(chunks, chunk))

    async def create(self, chunks: Chunks, chunk: Chunk) -> Batch:
        """Make the batch of a chunk. Raises `UncertainError`, or the provider's error when none can have been made."""
        call = self.batches.create(self._way.endpoint, self._way.headers, chunk.nonce, chunk.file_id)
        content = None if call.tail is None else self._content(chunks, chunk)
        async with self._uploads:
            try:
                return await self._ask(call, self.batches.batch, content, may_repeat=_was_refused)
            except ProviderError as error:
                if _was_refused(error) or (error.status is not None and 400 <= error.status < 500):
                    raise
                raise UncertainError(error.message) from error

    async def find(self, chunk: Chunk, taken: set[str]) -> Batch | None:
        """Look for the batch that was made of a chunk without our learning its id; `taken` are ids of others.

        Where batches keep marks it is the one with ours; else one of its size that was made then.
        """
        assert chunk.creating_at is not None
        earliest = _time(chunk.creating_at) - _SKEW
        after: str | None = None
        while True:
            call = self.batches.list(self._way.endpoint, self._way.headers, after)
            page, has_more = await self._ask(call, self.batches.listed)
            for batch in page:
                if batch.id in taken:
                    continue
                if self.batches.has_tags:
                    if batch.tag == chunk.nonce:
                        return batch
                elif batch.total == chunk.requests and batch.created_at and _time(batch.created_at) >= earliest:
                    return batch
            oldest = page[-1].created_at if page else None
            if not has_more or not page or (oldest and _time(oldest) < earliest):
                return None
            after = page[-1].id

    async def poll(self, id: str) -> Batch:
        """Return what the provider tells of a batch."""
        return await self._ask(self.batches.poll(self._way.endpoint, self._way.headers, id), self.batches.batch)

    async def cancel(self, id: str) -> Batch:
        """Ask the provider to cancel a batch; one that has ended meanwhile is told as it is."""
        call = self.batches.cancel(self._way.endpoint, self._way.headers, id)
        try:
            return await self._ask(call, self.batches.batch)
        except ProviderError as error:
            if error.status in (400, 409):
                return await self.poll(id)
            raise

    async def fetch(self, file: str, path: Path) -> None:
        """Download a file of results. What was cut is gone on with, and the file holds whole lines only."""
        call = self.batches.download(self._way.endpoint, self._way.headers, file)
        with path.open("wb") as target:
            lines = _Lines(target, self._way.mask, self._max_line_bytes)

            async def download() -> Answer:
                lines.begin()
                return await self._way.download(call, lines.write, lines.taken)

            attempts, taken = 0, -1
            while True:
                attempts = attempts + 1 if lines.taken <= taken else 1  # what gets on is not given up
                taken = lines.taken
                try:
                    answer = await download()
                    if answer.status in (200, 206):
                        lines.end()
                        return
                    if answer.status == 416:
                        lines.restart()
                        continue
                    error = self.batches.refusal(answer)
                except TransportError as exc:
                    error = self.codec.lost(exc)
                await self._pause(error, attempts)

    def _content(self, chunks: Chunks, chunk: Chunk) -> Content:
        """Return what reads a chunk anew for every call, in a thread."""

        async def blocks() -> AsyncIterator[bytes]:
            found = chunks.content(chunk, separator=self.batches.separator, entry=self.batches.entry)
            while (block := await to_thread.run_sync(next, found, None)) is not None:
                yield block

        return Content(size=chunk.content, blocks=blocks)

    async def _ask(
        self,
        call: Call,
        read: Callable[[Answer], T],
        content: Content | None = None,
        *,
        may_repeat: Callable[[ProviderError], bool] = lambda error: True,
    ) -> T:
        """Make a call and read its answer. Raises `ProviderError`, or `TryLaterError` when patience is at its end."""
        attempts = 0
        since = anyio.current_time()
        while True:
            attempts += 1
            try:
                return read(await self._way.ask(call, content))
            except TransportError as exc:
                error = self.codec.lost(exc)
            except ProviderError as exc:
                error = exc
            if not may_repeat(error):
                raise error
            if error.reach is Reach.ATTEMPT and anyio.current_time() - since > self._patience:
                raise TryLaterError(f"the batch API is out of reach: {error.message}")
            await self._pause(error, attempts)

    async def _pause(self, error: ProviderError, attempts: int) -> None:
        """Wait before a call is made again; raises the error where it should not be."""
        seconds = self._policy.wait_before_retry(error, attempts, attempts)
        if seconds is None:
            raise error
        if seconds > self._policy.max_retry_after:
            raise TryLaterError(f"the provider asks to wait {seconds:,.0f} s: {error.message}")
        await anyio.sleep(seconds)


class _Lines:
    """Takes the pieces of a download and writes the lines that are whole; `taken` counts their bytes as they came."""

    def __init__(self, file: IO[bytes], mask: Callable[[bytes], bytes], max_bytes: int) -> None:
        self._file = file
        self._mask = mask
        self._max_bytes = max_bytes
        self._rest = bytearray()
        self.taken = 0

    def begin(self) -> None:
        """Make ready for what comes from `taken` on."""
        self._rest.clear()

    def restart(self) -> None:
        """Begin from nothing."""
        self._rest.clear()
        self._file.truncate(0)
        self._file.seek(0)
        self.taken = 0

    async def write(self, place: int, piece: bytes) -> None:
        if place == 0 and self.taken:
            self.restart()  # the server sends all of it once more
        self._rest += piece
        end = self._rest.rfind(b"\n") + 1
        if end:
            self._put(bytes(self._rest[:end]))
            del self._rest[:end]
        if len(self._rest) > self._max_bytes:
            message = f"a line of the results is larger than {self._max_bytes:,} bytes"
            raise TransportError(message, type="response_too_large", is_sent=True, reach=Reach.MODEL)

    def end(self) -> None:
        """Take a last line without its end, if it is whole."""
        if self._rest.strip():
            try:
                orjson.loads(self._rest)
            except orjson.JSONDecodeError as exc:
                raise TransportError("the results end amid a line", type="connection_error", is_sent=True) from exc
            self._put(bytes(self._rest) + b"\n")
        self._file.flush()

    def _put(self, lines: bytes) -> None:
        self._file.write(self._mask(lines))
        self.taken += len(lines)


def _was_refused(error: ProviderError) -> bool:
    """Tell whether nothing can have been made: too many calls, or no connection."""
    return error.status == 429 or (error.status is None and not error.may_be_billed)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
