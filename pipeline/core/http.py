"""Call -> Answer over HTTP: the only module that imports httpx and its transport.

httpx is the interface: its types, its errors, its way to put a fake transport in a test. Its own connection pool is
not used. Measured with 1,000 requests in flight it does 108 requests/s where its interface over reqwest does
thousands, its cost grows with every open connection, and after some 2,000 cancelled connects it answers nothing but
PoolTimeout (encode/httpcore#1093). Under the interface lies reqwest (Rust, by way of pyreqwest), and this adapter
instead of pyreqwest's own, for four reasons: one total deadline per attempt that also ends a body sent a byte at a
time; a cap on the decoded body, so a bomb of 200 kB cannot become 200 MB; a body that is read whole without the
ceremony of streams; errors that say whether the request may have reached the provider. aiohttp under httpx was the
other choice: cleaner when a request is cancelled, half as fast, and its exceptions show the key in their repr.
What a cancelled request costs here: it goes on inside until its own deadline. Nothing cancels one but a second Ctrl-C.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import anyio
import anyio.lowlevel
import httpx
from pyreqwest import exceptions as reqwest
from pyreqwest.client import Client as ReqwestClient
from pyreqwest.client import ClientBuilder
from pyreqwest.http import HeaderMap, Url
from pyreqwest.request import StreamRequest
from pyreqwest.response import Response as ReqwestResponse

from pipeline.core.config import Sending
from pipeline.core.errors import ErrorScope, TransportError, UsageError
from pipeline.core.types import HttpRequest, HttpResponse

_PING_SECONDS = 10.0
SLOWEST_BYTES_PER_SECOND = 100_000
_LONGEST_DOWNLOAD = 6 * 3600.0  # seconds; a stalled download ends much earlier
_DEADLINE = "pipeline.deadline"
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-")

Headers = Sequence[tuple[str, str]]
Exchange = Callable[[bytes], Awaitable[HttpResponse]]
"""Sends a body and returns the whole answer, or raises an error of httpx."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A body too large for memory: `size` bytes; each call of `blocks` yields them from the start."""

    size: int
    blocks: Callable[[], AsyncIterator[bytes]]


Write = Callable[[int, bytes], Awaitable[None]]
"""Takes a piece of a body and its offset in the body."""


class Post(Protocol):
    """Posts bodies to one address with one set of headers."""

    async def __call__(self, body: bytes) -> HttpResponse: ...


class Client:
    """One pool of connections for a run: `client.post_to(url, headers)` makes the function that posts.

    `transport` replaces the real one in tests (`httpx.MockTransport`, `httpx.ASGITransport`).
    """

    def __init__(self, settings: Sending, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._settings = settings
        self._transport = transport or ReqwestTransport(settings)

    def post_to(self, url: str, headers: Headers) -> Post:
        """Return a function that posts one body and returns the answer, whatever its status.

        It raises `TransportError` if no complete answer came back within the deadline.
        """
        address = httpx.URL(url)
        ready = [*headers, ("host", address.netloc.decode()), ("accept-encoding", "gzip, zstd, br")]
        exchange = self._exchange(url, ready)

        async def post(body: bytes) -> HttpResponse:
            try:
                return await exchange(body)
            except httpx.HTTPError as exc:
                raise _translate(exc) from exc

        return post

    async def call(self, call: HttpRequest, content: Content | None = None) -> HttpResponse:
        """Make a call of a batch API; `content` is the chunk that it carries. Raises `TransportError`.

        What is large has longer than one attempt of a request: 100 kB/s are enough.
        """
        seconds = self._settings.timeout + (content.size / SLOWEST_BYTES_PER_SECOND if content else 0)
        try:
            async with self._opened(call, content, seconds) as response:
                return HttpResponse(
                    status=response.status_code,
                    headers=dict(response.headers.items()),
                    body=await self._whole(response),
                )
        except httpx.HTTPError as exc:
            raise _translate(exc) from exc

    async def download(self, call: HttpRequest, write: Write, start: int = 0) -> HttpResponse:
        """Pass the body of a 200 or 206 to `write` in pieces, each with its offset; return the answer without it.

        `start` asks for what comes from there on. Whatever else is answered is returned with its body.
        """
        headers = [*call.headers, *([("range", f"bytes={start}-")] if start else [])]
        try:
            async with self._opened(replace(call, headers=headers), None, _LONGEST_DOWNLOAD) as response:
                answer = HttpResponse(status=response.status_code, headers=dict(response.headers.items()))
                if response.status_code not in (200, 206):
                    return replace(answer, body=await self._whole(response))
                place = _place(answer, start) if response.status_code == 206 else 0
                pieces = response.aiter_bytes()
                while (piece := await self._next(pieces)) is not None:
                    await write(place, piece)
                    place += len(piece)
                return answer
        except httpx.HTTPError as exc:
            raise _translate(exc) from exc

    @asynccontextmanager
    async def _opened(
        self, call: HttpRequest, content: Content | None, seconds: float
    ) -> AsyncIterator[httpx.Response]:
        """Send a call with this timeout; yield the response before its body is read."""
        tail = call.tail or b""
        size = len(call.body) + (content.size if content else 0) + len(tail)
        headers = [*call.headers, ("accept-encoding", "identity"), ("content-length", str(size))]
        body = _joined(call.body, content, tail) if content else call.body
        request = httpx.Request(call.method, call.url, headers=headers, content=body)
        request.extensions[_DEADLINE] = seconds
        response: httpx.Response | None = None
        with anyio.move_on_after(seconds if content else min(seconds, self._settings.timeout)):
            response = await self._transport.handle_async_request(request)
        if response is None:
            raise httpx.ReadTimeout("no answer within the timeout")
        try:
            yield response
        finally:
            await response.aclose()

    async def _next(self, pieces: AsyncIterator[bytes]) -> bytes | None:
        """Return the next piece of a body, None at its end. A stalled body raises `ReadTimeout`."""
        with anyio.move_on_after(self._settings.timeout):
            return await anext(pieces, None)
        raise httpx.ReadTimeout("no more of the body arrived within the timeout")

    async def _whole(self, response: httpx.Response) -> bytes:
        body = bytearray()
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > self._settings.max_response_bytes:
                raise httpx.DecodingError(f"answer larger than {self._settings.max_response_bytes:,} bytes")
        return bytes(body)

    def _exchange(self, url: str, headers: Headers) -> Exchange:
        """Return the function that sends a body: our transport's own, else one that goes through httpx's objects."""
        transport = self._transport
        if isinstance(transport, ReqwestTransport):
            return transport.exchange(url, headers)

        async def exchange(body: bytes) -> HttpResponse:
            request = httpx.Request("POST", url, headers=list(headers), content=body)
            response = await transport.handle_async_request(request)
            content = await response.aread()
            return HttpResponse(status=response.status_code, headers=dict(response.headers.items()), body=content)

        return exchange

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._transport.aclose()


def _place(answer: HttpResponse, start: int) -> int:
    """Return the offset of a part: from its header, else the one that was requested."""
    match = _CONTENT_RANGE.match(answer.headers.get("content-range", ""))
    return int(match[1]) if match else start


async def _joined(head: bytes, content: Content, tail: bytes) -> AsyncIterator[bytes]:
    yield head
    async for block in content.blocks():
        yield block
    yield tail


async def ping(url: str, settings: Sending) -> int:
    """GET an address and return only the status of the answer.

    Raises `TransportError` when there is none within 10 seconds, or within the timeout of requests if that is shorter.
    """
    quick = settings.model_copy(update={"timeout": min(_PING_SECONDS, settings.timeout)})
    try:
        async with (
            httpx.AsyncClient(transport=ReqwestTransport(quick), trust_env=False) as client,
            client.stream("GET", url) as response,
        ):
            return response.status_code
    except httpx.HTTPError as exc:
        raise _translate(exc) from exc
    except (httpx.InvalidURL, ValueError) as exc:  # httpx and reqwest raise these for invalid host names
        raise TransportError(f"not a valid address: {exc}", type="connection_error", is_sent=False) from exc


class ReqwestTransport(httpx.AsyncBaseTransport):
    """httpx's transport interface over reqwest. Follows no redirect, keeps no cookie, adds no retry.

    `exchange` is the same without httpx's request and response, which cost more than the call itself (80 of 140 µs).
    """

    def __init__(self, settings: Sending) -> None:
        self._client = _build(settings)
        self._max_bytes = settings.max_response_bytes

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        builder = self._client.request(request.method, str(request.url)).headers(request.headers.multi_items())
        if isinstance(request.stream, httpx.ByteStream):
            builder = builder.body_bytes(await request.aread())
        else:
            assert isinstance(request.stream, httpx.AsyncByteStream)
            builder = builder.body_stream(request.stream)
        if seconds := request.extensions.get(_DEADLINE):
            builder = builder.timeout(timedelta(seconds=seconds))
        stream = _Body(builder.streamed_read_buffer_limit(0).build_streamed())
        response = await stream.open()
        # The body is already decoded. With the headers that say how it was encoded, httpx would decode it again.
        headers = [
            pair for pair in _headers_of(response).items() if pair[0] not in ("content-encoding", "content-length")
        ]
        return httpx.Response(response.status, headers=headers, stream=stream)

    def exchange(self, url: str, headers: Headers) -> Exchange:
        """Return a function that posts a body and returns the whole answer; it raises httpx's errors."""
        address, fields = Url(url), HeaderMap(headers)  # once: parsing them costs more than building a request

        async def exchange(body: bytes) -> HttpResponse:
            builder = self._client.post(address).headers(fields).body_bytes(body)
            try:
                async with builder.build_streamed() as response:
                    content = await response.body_reader.read(self._max_bytes + 1)
                    if content is not None and len(content) > self._max_bytes:
                        raise httpx.DecodingError(f"answer larger than {self._max_bytes:,} bytes")
                    return HttpResponse(
                        status=response.status,
                        headers=_headers_of(response),
                        body=b"" if content is None else content.to_bytes(),
                    )
            except reqwest.PyreqwestError as exc:
                raise _as_httpx(exc) from exc
            except anyio.get_cancelled_exc_class():
                await anyio.lowlevel.checkpoint_if_cancelled()  # see _errors_as_httpx, which costs too much here
                raise

        return exchange

    async def aclose(self) -> None:
        await self._client.close()


class _Body(httpx.AsyncByteStream):
    """A response's body, read as it comes."""

    def __init__(self, request: StreamRequest) -> None:
        self._request = request
        self._response: ReqwestResponse | None = None

    async def open(self) -> ReqwestResponse:
        """Send the request and return the response with its headers."""
        async with _errors_as_httpx():
            self._response = await self._request.__aenter__()
        return self._response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert self._response is not None
        while True:
            async with _errors_as_httpx():
                piece = await self._response.body_reader.read_chunk()
            if piece is None:
                return
            yield piece.to_bytes()

    async def aclose(self) -> None:
        if self._response is not None:
            await self._request.__aexit__(None, None, None)


@asynccontextmanager
async def _errors_as_httpx() -> AsyncIterator[None]:
    """Translate reqwest's errors into httpx's, and its own cancellation into anyio's."""
    try:
        yield
    except reqwest.PyreqwestError as exc:
        raise _as_httpx(exc) from exc
    except anyio.get_cancelled_exc_class():
        # pyreqwest raises its own cancellation, which anyio's scopes do not recognize.
        await anyio.lowlevel.checkpoint_if_cancelled()
        raise


def _headers_of(response: ReqwestResponse) -> dict[str, str]:
    """Return the headers that are text; one that is not (a gateway's city in Latin-1) must not cost the answer.

    Of a header that is given twice the last counts.
    """
    try:
        return dict(response.headers.items())
    except ValueError:
        pairs = ((name, _text_header(response, name)) for name in set(response.headers))
        return {name: value for name, value in pairs if value is not None}


def _text_header(response: ReqwestResponse, name: str) -> str | None:
    try:
        return response.get_header(name)
    except ValueError:
        return None


def _build(settings: Sending) -> ReqwestClient:
    builder = (
        ClientBuilder()
        .follow_redirects(False)
        .referer(False)
        .timeout(timedelta(seconds=settings.timeout))
        .connect_timeout(timedelta(seconds=min(settings.connect_timeout, settings.timeout)))
        .pool_max_idle_per_host(settings.concurrency)
        .tcp_keepalive(timedelta(seconds=30))
        .http2(settings.http2)
    )
    if not settings.use_env_proxy:
        builder = builder.no_proxy()
    if settings.ca_file:
        try:
            builder = builder.add_root_certificate_pem(Path(settings.ca_file).read_bytes())
        except OSError as exc:
            raise UsageError(f"sending.ca_file: cannot read {settings.ca_file!r}: {exc.strerror}") from exc
    return builder.build()


def _as_httpx(error: reqwest.PyreqwestError) -> httpx.TransportError | httpx.DecodingError:
    """Return httpx's error for reqwest's, chosen by its causes.

    pyreqwest's own classes do not tell what matters here: it calls a connection that was reset after the request was
    sent a ConnectError, and an answer that never came a ConnectTimeoutError.
    """
    causes = [cause["message"] for cause in getattr(error, "details", {}).get("causes") or ()]
    reason = causes[-1] if causes else error.message
    is_connecting = "client error (Connect)" in causes
    is_late = isinstance(error, reqwest.RequestTimeoutError) or "operation timed out" in causes
    kind: type[httpx.TransportError | httpx.DecodingError]
    if is_connecting:
        kind = httpx.ConnectTimeout if is_late else httpx.ConnectError
    elif is_late:
        kind = httpx.ReadTimeout
    elif isinstance(error, reqwest.DecodeError):
        kind = httpx.RemoteProtocolError
    else:
        kind = httpx.ReadError
    return kind(reason)


def _translate(error: httpx.HTTPError) -> TransportError:
    """Translate httpx's error into ours, from its class and reason only: no header, no body, so no key.

    A request counts as sent unless the connection was never made.
    """
    reason = str(error)
    if isinstance(error, httpx.ConnectError) and _is_about_trust(reason):
        return TransportError(f"no trusted connection: {reason}", type="tls_error", is_sent=False, scope=ErrorScope.RUN)
    if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        return TransportError("no connection within the connect timeout", type="timeout", is_sent=False)
    if isinstance(error, httpx.TimeoutException):
        return TransportError("no complete answer within the timeout", type="timeout", is_sent=True)
    if isinstance(error, httpx.ConnectError):
        return TransportError(f"cannot connect: {reason}", type="connection_error", is_sent=False)
    if isinstance(error, httpx.DecodingError):
        return TransportError(reason, type="response_too_large", is_sent=True)
    if isinstance(error, httpx.ProtocolError):
        return TransportError(f"the answer is not valid HTTP: {reason}", type="invalid_http", is_sent=True)
    return TransportError(f"the connection broke: {reason}", type="connection_error", is_sent=True)


def _is_about_trust(reason: str) -> bool:
    """Return True for an untrusted certificate, which no retry fixes, and False for a broken connection."""
    return "certificate" in reason.lower()
