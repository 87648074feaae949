"""The client of one provider's batch API. It repeats what may be repeated, but never creates a batch blindly.

Every call goes through `_ask`, which waits as the retry policy says. A batch may exist although no response came:
then `create` raises `UncertainError`, and `find` looks for the batch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, TypeVar

import anyio
import anyio.lowlevel
from anyio import to_thread

from pipeline import providers
from pipeline.core import config, environment, files, http
from pipeline.core.config import Config, Endpoint, poll_policy
from pipeline.core.errors import ErrorScope, ProviderError, TransportError, TryLaterError, UsageError
from pipeline.core.http import Content, Write
from pipeline.core.text import redact, redactor
from pipeline.core.types import HttpRequest, HttpResponse
from pipeline.dispatch import retry
from pipeline.dispatch.batch.store import BatchRecord, BatchStore, parse_time
from pipeline.dispatch.retry import Policy
from pipeline.providers import BatchCodec, Codec, responses
from pipeline.providers.base import Headers
from pipeline.providers.batch import Batch

T = TypeVar("T")

_SKEW = timedelta(minutes=10)  # by which the provider's clock and ours may differ
_UPLOADS = 2  # at the same time: they share one line


class UncertainError(Exception):
    """A batch may have been created, but its id is unknown."""


Ask = Callable[[HttpRequest, Content | None], Awaitable[HttpResponse]]
Download = Callable[[HttpRequest, Write, int], Awaitable[HttpResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConnection:
    """The connection to an endpoint: address, headers with the key, functions that make calls, and redaction."""

    endpoint: Endpoint
    headers: Headers
    ask: Ask
    download: Download
    mask: Callable[[bytes], bytes]


class BatchClient:
    """Uploads, creates, polls, cancels and downloads the batches of one provider.

    `max_outage` is how many seconds a provider may be unreachable.
    """

    def __init__(
        self,
        *,
        codec: Codec,
        batches: BatchCodec,
        connection: BatchConnection,
        policy: Policy,
        max_outage: float,
        max_line_bytes: int,
        notify: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.codec = codec
        self.batches = batches
        self._connection = connection
        self._policy = policy
        self._max_outage = max_outage
        self._max_line_bytes = max_line_bytes
        self._notify = notify
        self._is_in_trouble = False
        self._uploads = anyio.Semaphore(_UPLOADS)

    async def upload(self, store: BatchStore, record: BatchRecord) -> str | None:
        """Upload a batch file and return its id; None if the API has no separate upload."""
        call = self.batches.upload(self._connection.endpoint, self._connection.headers, record.local_id)
        if call is None:
            return None
        async with self._uploads:
            return await self._ask(call, self.batches.uploaded, self._content(store, record))

    async def create(self, store: BatchStore, record: BatchRecord, begin: Callable[[], Awaitable[None]]) -> Batch:
        """Create a batch; `begin` is awaited before every call that may create it.

        Raises `UncertainError`, or the provider's error if no batch can have been created.
        """
        call = self.batches.create(self._connection.endpoint, self._connection.headers, record.local_id, record.file_id)
        content = None if call.tail is None else self._content(store, record)
        async with self._uploads:
            try:
                return await self._ask(call, self.batches.batch, content, before=begin, may_repeat=_may_repeat_create)
            except ProviderError as error:
                if _may_repeat_create(error) or _is_refusal(error):
                    raise
                raise UncertainError(error.message) from error

    async def find(self, record: BatchRecord, taken: set[str]) -> Batch | None:
        """Look for a batch whose id we never learned; `taken` are ids of others.

        If the API stores tags, it is the batch with ours; otherwise one of the same size, created at that time.
        """
        assert record.creating_at is not None
        earliest = parse_time(record.creating_at) - _SKEW
        after: str | None = None
        while True:
            call = self.batches.list(self._connection.endpoint, self._connection.headers, after)
            try:
                page, has_more = await self._ask(call, self.batches.listed, may_repeat=lambda e: not is_no_api(e))
            except ProviderError as error:
                if is_no_api(error):
                    return None  # an API without a list of batches has created none
                raise
            for batch in page:
                if batch.id in taken:
                    continue
                if self.batches.has_tags:
                    if batch.tag == record.local_id:
                        return batch
                elif batch.total == record.requests and batch.created_at and parse_time(batch.created_at) >= earliest:
                    return batch
            if not has_more or not page or page[-1].id == after:
                return None
            after, oldest = page[-1].id, page[-1].created_at
            if oldest and parse_time(oldest) < earliest:
                return None

    async def poll(self, id: str) -> Batch:
        """Return the state of a batch."""
        return await self._ask(
            self.batches.poll(self._connection.endpoint, self._connection.headers, id), self.batches.batch
        )

    async def cancel(self, id: str) -> Batch:
        """Cancel a batch; return its state, also if it has ended meanwhile."""
        call = self.batches.cancel(self._connection.endpoint, self._connection.headers, id)
        try:
            return await self._ask(call, self.batches.batch)
        except ProviderError as error:
            if error.status in (400, 409):
                return await self.poll(id)
            raise

    async def fetch(self, file: str, path: Path) -> None:
        """Download a results file. Resume interrupted downloads; write complete lines only."""
        call = self.batches.download(self._connection.endpoint, self._connection.headers, file)
        with files.open_private(path) as target:
            lines = _Lines(target, self._connection.mask, self._max_line_bytes)
            attempts, most, since = 0, 0, anyio.current_time()
            while True:
                if lines.taken > most:  # a download that makes progress is not given up
                    attempts, most, since = 0, lines.taken, anyio.current_time()
                attempts += 1
                lines.begin()
                try:
                    answer = await self._connection.download(call, lines.write, lines.taken)
                    if answer.status in (200, 206):
                        lines.end()
                        return
                    error = self.batches.refusal(answer)
                    if answer.status == 416:  # the file is shorter than what we have: start over
                        lines.restart()
                        error = error.replace(scope=ErrorScope.ATTEMPT)
                except TransportError as exc:
                    error = self.codec.lost(exc)
                await self._pause(error, attempts, since)

    def _content(self, store: BatchStore, record: BatchRecord) -> Content:
        """Return content that reads the batch file anew for every call, in a thread."""

        async def blocks() -> AsyncIterator[bytes]:
            found = store.content(record, separator=self.batches.separator, entry=self.batches.entry)
            while (block := await to_thread.run_sync(next, found, None)) is not None:
                yield block

        return Content(size=record.content, blocks=blocks)

    async def _ask(
        self,
        call: HttpRequest,
        read: Callable[[HttpResponse], T],
        content: Content | None = None,
        *,
        before: Callable[[], Awaitable[None]] = anyio.lowlevel.checkpoint,
        may_repeat: Callable[[ProviderError], bool] = lambda error: True,
    ) -> T:
        """Make a call and decode its response. Raises `ProviderError`; `TryLaterError` after `max_outage` seconds."""
        attempts = 0
        since = anyio.current_time()
        while True:
            attempts += 1
            await before()
            try:
                value = read(await self._connection.ask(call, content))
                self._is_in_trouble = False
                return value
            except TransportError as exc:
                error = self.codec.lost(exc)
            except ProviderError as exc:
                error = exc
            if not may_repeat(error):
                raise error
            await self._pause(error, attempts, since)

    async def _pause(self, error: ProviderError, attempts: int, since: float) -> None:
        """Wait before a retry. Raises the error if a retry cannot help, `TryLaterError` after `max_outage` seconds."""
        seconds = self._policy.wait_patiently(error, attempts)
        if seconds is None:
            raise error
        if (error.retry_after or 0.0) > self._policy.max_retry_after:
            raise TryLaterError(f"the provider asks to wait {error.retry_after:,.0f} s: {error.message}")
        if anyio.current_time() + seconds - since > self._max_outage:
            raise TryLaterError(f"the batch API is out of reach: {error.message}")
        if attempts > 1 and not self._is_in_trouble:
            self._is_in_trouble = True
            self._notify(f"batch API error, retrying: {error.message}")
        await anyio.sleep(seconds)


class _Lines:
    """Writes the complete lines of a download; `taken` counts their bytes as they came.

    A line larger than `max_bytes` is left out; its request then counts as missing from the results.
    """

    def __init__(self, file: IO[bytes], mask: Callable[[bytes], bytes], max_bytes: int) -> None:
        self._file = file
        self._mask = mask
        self._max_bytes = max_bytes
        self._rest = bytearray()
        self._left_out = 0
        self._next = 0
        self.taken = 0

    def begin(self) -> None:
        """Prepare for a download that continues at `taken`."""
        self._rest.clear()
        self._left_out = 0
        self._next = self.taken

    def restart(self) -> None:
        """Start over with an empty file."""
        self._file.truncate(0)
        self._file.seek(0)
        self.taken = 0
        self.begin()

    async def write(self, place: int, piece: bytes) -> None:
        """Take a piece that begins at `place`. A server may start over at 0, but not continue elsewhere."""
        if place == 0 and self._next:
            self.restart()
        if place != self._next:
            raise TransportError("the server sent a part that was not requested", type="invalid_http", is_sent=True)
        self._next += len(piece)
        self._rest += piece
        if self._left_out:
            # The rest of a line that was too long: skip to its end.
            end = self._rest.find(b"\n") + 1
            if end:
                self.taken += self._left_out + end
                self._left_out = 0
                del self._rest[:end]
        if not self._left_out:
            end = self._rest.rfind(b"\n") + 1
            if end:
                self._put(bytes(self._rest[:end]))
                del self._rest[:end]
        if self._left_out or len(self._rest) > self._max_bytes:
            self._left_out += len(self._rest)
            self._rest.clear()

    def end(self) -> None:
        """Take a last line without its newline, if it is complete."""
        if self._rest.strip():
            if responses.parsed(bytes(self._rest))[0] is None:
                raise TransportError("the results end in the middle of a line", type="connection_error", is_sent=True)
            self._put(bytes(self._rest) + b"\n")

    def _put(self, lines: bytes) -> None:
        self._file.write(self._mask(lines))
        self.taken += len(lines)


def is_no_api(error: ProviderError) -> bool:
    """Return True if there is no API at the address."""
    return error.status in (404, 405, 501)


def _may_repeat_create(error: ProviderError) -> bool:
    """Return True if no batch can have been created and a retry may help: 429, or no connection."""
    return error.status == 429 or (error.status is None and not error.may_be_billed)


def _is_refusal(error: ProviderError) -> bool:
    """Return True if the provider refused to create a batch. A gateway's timeout (408 …) is no refusal."""
    status = error.status or 0
    return status == 501 or (300 <= status < 500 and status not in (408, 409, 425))


def batch_client(settings: Config, client: http.Client, notify: Callable[[str], None], name: str) -> BatchClient:
    """Return the client of a provider's batch API: address, headers with the key, codecs."""
    endpoint = settings.providers.get(name)
    if endpoint is None:
        raise UsageError(f"a batch was created with the provider {name!r}, which is not in the settings; add it again")
    protocol = config.protocol(endpoint)
    codec = providers.codec(protocol)
    key = environment.api_key(name, endpoint)

    async def ask(call: HttpRequest, content: http.Content | None) -> HttpResponse:
        return redact(await client.call(call, content), key)

    async def download(call: HttpRequest, write: http.Write, start: int) -> HttpResponse:
        return redact(await client.download(call, write, start), key)

    return BatchClient(
        codec=codec,
        batches=providers.batch_codec(protocol),
        connection=BatchConnection(
            endpoint=endpoint,
            headers=codec.headers(endpoint, key),
            ask=ask,
            download=download,
            mask=redactor(key),
        ),
        policy=retry.Policy(settings.sending),
        max_outage=poll_policy(settings),
        max_line_bytes=settings.sending.max_response_bytes,
        notify=lambda message: notify(f"{name}: {message}"),
    )
