"""The transport over real sockets, before servers that misbehave: every ending is one of ours, and bounded."""

from __future__ import annotations

import gzip
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import anyio
import httpx
import pytest
import respx
from anyio.abc import SocketStream

from pipeline.core.config import Sending
from pipeline.core.errors import ErrorScope, TransportError
from pipeline.core.http import Client, Content, ping
from pipeline.core.types import HttpRequest, HttpResponse

QUICK = Sending(timeout=0.5, connect_timeout=0.4, max_response_bytes=1_000_000)
HEADERS = [("authorization", "Bearer sk-canary"), ("content-type", "application/json")]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


@asynccontextmanager
async def _server(
    *writes: bytes, pause: float = 0.0, hang: bool = False, keep: bool = False
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Serve the same bytes to every connection, then close it, hang, or keep answering.

    Yields the address and what was received.
    """
    received: list[bytes] = []

    async def handle(stream: SocketStream) -> None:
        async with stream:
            try:
                while keep or not hang:
                    received.append(await stream.receive())
                    for data in writes:
                        await stream.send(data)
                        await anyio.sleep(pause)
                    if not keep:
                        return
                if hang:
                    await anyio.sleep_forever()
            except (anyio.BrokenResourceError, anyio.EndOfStream):
                return

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        yield f"http://127.0.0.1:{port}/v1/x", received
        tasks.cancel_scope.cancel()


async def _post(url: str, settings: Sending = QUICK) -> HttpResponse:
    async with Client(settings) as client:
        return await client.post_to(url, HEADERS)(b'{"a":1}')


async def test_a_post_is_one_plain_request() -> None:
    """Method, path, host, our headers and the body go out once, and nothing of reqwest's own identity."""
    async with _server(OK) as (url, received):
        answer = await _post(url)

    head, _, body = received[0].partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert lines[0] == b"post /v1/x http/1.1"
    assert b"authorization: bearer sk-canary" in lines
    assert b"content-length: 7" in lines
    assert sum(line.startswith(b"host:") for line in lines) == 1
    assert body == b'{"a":1}'
    assert (answer.status, answer.body) == (200, b"{}")


@pytest.mark.parametrize(
    ("writes", "type", "is_sent"),
    [
        pytest.param([], "connection_error", True, id="closed before the answer"),
        pytest.param([b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nabc"], "invalid_http", True, id="cut body"),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"],
            "connection_error",
            True,
            id="cut chunks",
        ),
        pytest.param([b"SSH-2.0 hello\r\n\r\n"], "invalid_http", True, id="not HTTP"),
        pytest.param([b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000 + b"\r\n"], "invalid_http", True, id="huge head"),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\ncontent-length: 2000000\r\n\r\n" + b"x" * 2_000_000],
            "response_too_large",
            True,
            id="body over the cap",
        ),
    ],
)
async def test_a_broken_answer_is_a_transport_error(writes: list[bytes], type: str, is_sent: bool) -> None:
    """However an answer breaks off, the error is ours, an attempt's, and says whether the request was sent."""
    async with _server(*writes) as (url, _):
        with pytest.raises(TransportError) as caught:
            await _post(url)

    assert (caught.value.type, caught.value.is_sent, caught.value.scope) == (type, is_sent, ErrorScope.ATTEMPT)
    assert "canary" not in repr(caught.value)


async def test_a_body_sent_a_byte_at_a_time_ends_at_the_deadline() -> None:
    """The deadline is for the whole attempt: a server that keeps sending cannot hold it open."""
    drops = [b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n"] + [b"x"] * 500

    async with _server(*drops, pause=0.05) as (url, _):
        with pytest.raises(TransportError) as caught, anyio.fail_after(5):
            await _post(url)

    assert (caught.value.type, caught.value.is_sent) == ("timeout", True)


async def test_an_answer_that_never_comes_ends_at_the_deadline() -> None:
    """A silent server costs the timeout and is told as sent."""
    async with _server(hang=True) as (url, _):
        with pytest.raises(TransportError) as caught, anyio.fail_after(5):
            await _post(url)

    assert (caught.value.type, caught.value.is_sent) == ("timeout", True)


async def test_a_bomb_is_not_inflated() -> None:
    """A compressed body is capped after decompression: 50 kB that would become 50 MB are refused."""
    bomb = gzip.compress(b"0" * 50_000_000)
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb)

    async with _server(head + bomb) as (url, _):
        with pytest.raises(TransportError) as caught:
            await _post(url, Sending(timeout=5, max_response_bytes=1_000_000))

    assert caught.value.type == "response_too_large"


async def test_a_compressed_answer_is_decoded() -> None:
    """An honest gzip body arrives decoded."""
    packed = gzip.compress(b'{"b":2}')
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)

    async with _server(head + packed) as (url, _):
        assert (await _post(url)).body == b'{"b":2}'


async def test_a_redirect_is_not_followed() -> None:
    """Key and prompt never go to another address because a server says so."""
    async with _server(OK) as (elsewhere, received):
        redirect = f"HTTP/1.1 307 Temporary Redirect\r\nlocation: {elsewhere}\r\ncontent-length: 0\r\n\r\n"
        async with _server(redirect.encode()) as (url, _):
            answer = await _post(url)

    assert answer.status == 307
    assert received == []


async def test_the_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY gets to see nothing unless the configuration says so."""
    async with _server(OK) as (proxy, at_proxy), _server(OK) as (url, received):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("http_proxy", proxy)
        await _post(url)

    assert at_proxy == []
    assert len(received) == 1


@pytest.mark.parametrize(
    "url",
    [pytest.param("http://127.0.0.1:{port}/", id="refused"), pytest.param("http://nowhere.invalid/", id="no name")],
)
async def test_no_connection_means_not_sent(url: str) -> None:
    """Where no connection was made, nothing can have been billed."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = url.format(port=unused.getsockname()[1])
        with pytest.raises(TransportError) as caught:
            await _post(address)

    assert (caught.value.type, caught.value.is_sent) == ("connection_error", False)


async def test_a_thousand_cancelled_requests_leave_a_working_client() -> None:
    """Cancelling requests, even while they connect, takes nothing from those that follow."""
    async with _server(OK, keep=True) as (url, _), Client(Sending(timeout=2, connect_timeout=1)) as client:
        post = client.post_to(url, HEADERS)
        for _ in range(1_000):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await post(b"{}")
        answers = [(await post(b"{}")).status for _ in range(20)]

    assert answers == [200] * 20


async def test_the_exchange_with_openai_is_exact() -> None:
    """A request goes out as the documentation shows it, and the answer comes back as it was."""
    with respx.mock(base_url="https://api.openai.com", assert_all_called=True) as router:
        route = router.post("/v1/chat/completions").mock(
            return_value=httpx.Response(200, json={"id": "chatcmpl-1"}, headers={"x-request-id": "req_9"})
        )
        transport = httpx.MockTransport(router.async_handler)
        async with Client(Sending(), transport) as client:
            answer = await client.post_to("https://api.openai.com/v1/chat/completions", HEADERS)(b'{"model":"m"}')

    sent = route.calls.last.request
    assert sent.content == b'{"model":"m"}'
    assert sent.headers["authorization"] == "Bearer sk-canary"
    assert answer.headers["x-request-id"] == "req_9"
    assert answer.body == b'{"id":"chatcmpl-1"}'


async def test_a_header_that_is_not_text_does_not_cost_the_answer() -> None:
    """A gateway's Latin-1 header is left out; the answer and the other headers are there."""
    answer = "HTTP/1.1 200 OK\r\nx-city: Z\u00fcrich\r\nrequest-id: r1\r\ncontent-length: 2\r\n\r\n{}".encode("latin-1")

    async with _server(answer) as (url, _):
        received = await _post(url)

    assert (received.body, received.headers["request-id"]) == (b"{}", "r1")


async def test_a_ping_is_a_plain_get() -> None:
    """A ping brings back the status, sends neither key nor cookie, and goes only where it was told to."""
    async with _server(OK) as (elsewhere, at_elsewhere):
        redirect = f"HTTP/1.1 302 Found\r\nlocation: {elsewhere}\r\ncontent-length: 0\r\n\r\n"
        async with _server(redirect.encode()) as (url, received):
            status = await ping(url, QUICK)

    assert status == 302
    assert received[0].startswith(b"GET /v1/x HTTP/1.1\r\n")
    assert b"authorization" not in received[0].lower()
    assert at_elsewhere == []


async def test_a_ping_does_not_use_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY sees no ping, unless the configuration says that it is used."""
    async with _server(OK) as (proxy, at_proxy), _server(OK, keep=True) as (url, received):
        monkeypatch.setenv("http_proxy", proxy)
        await ping(url, QUICK)
        before = len(at_proxy)
        await ping(url, QUICK.model_copy(update={"use_env_proxy": True}))

    assert (before, len(at_proxy), len(received)) == (0, 1, 1)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/", "https://a..b/", "https://a|b/", "https://xn--a.invalid/", "https://256.1.1.1/"]
)
async def test_a_ping_that_cannot_be_sent_is_a_transport_error(url: str) -> None:
    """Whatever is wrong with an address, there is one kind of error."""
    with pytest.raises(TransportError):
        await ping(url, QUICK)


async def test_a_ping_does_not_wait_for_long() -> None:
    """A switch that is silent costs ten seconds, or the timeout of requests where that is shorter."""
    async with _server(hang=True) as (url, _):
        with pytest.raises(TransportError) as caught, anyio.fail_after(5):
            await ping(url, QUICK)

    assert caught.value.type == "timeout"


# ── calls of a batch API ──────────────────────────────────────────────────────────────────────────────────────────

BLOCK = bytes(range(256)) * 4_096
"""One MiB."""


@asynccontextmanager
async def _reader(answer: bytes, *, end: bytes, pause: float = 0.0) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Serve an answer to every request that ends so, once all of it has come; yields the address and the requests."""
    received: list[bytes] = []

    async def handle(stream: SocketStream) -> None:
        async with stream:
            with suppress(anyio.BrokenResourceError, anyio.EndOfStream):
                while True:
                    data = bytearray()
                    while not data.endswith(end):
                        data += await stream.receive()
                    received.append(bytes(data))
                    await anyio.sleep(pause)
                    await stream.send(answer)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        yield f"http://127.0.0.1:{port}/v1/x", received
        tasks.cancel_scope.cancel()


def _content(block: bytes, number: int) -> Content:
    async def blocks() -> AsyncIterator[bytes]:
        for _ in range(number):
            yield block

    return Content(size=len(block) * number, blocks=blocks)


def _get(url: str) -> HttpRequest:
    return HttpRequest(method="GET", url=url, headers=HEADERS)


class Taken:
    """What a download gave, piece by piece."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.start: int | None = None

    async def write(self, place: int, piece: bytes) -> None:
        self.start = place if self.start is None else self.start
        assert place == self.start + len(self.data), "pieces follow one another"
        self.data += piece


async def test_what_is_large_goes_out_in_blocks() -> None:
    """Head, blocks and tail arrive as one body whose length is told ahead; a second call sends all of it anew."""
    content = _content(BLOCK, 5)
    async with _reader(OK, end=b"TAIL") as (url, received), Client(Sending(timeout=20)) as client:
        call = HttpRequest(method="POST", url=url, headers=HEADERS, body=b"HEAD", tail=b"TAIL")
        answers = [await client.call(call, content) for _ in range(2)]

    assert [(answer.status, answer.body) for answer in answers] == [(200, b"{}")] * 2
    for request in received:
        head, _, body = request.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        assert lines[0] == b"post /v1/x http/1.1"
        assert b"content-length: %d" % (5 * len(BLOCK) + 8) in lines
        assert b"authorization: bearer sk-canary" in lines
        assert not any(line.startswith(b"transfer-encoding") for line in lines)
        assert body == b"HEAD" + BLOCK * 5 + b"TAIL"
    assert len(received) == 2


@pytest.mark.parametrize(("method", "body"), [("GET", b""), ("POST", b""), ("POST", b'{"a":1}')])
async def test_a_call_is_one_plain_request(method: str, body: bytes) -> None:
    """A call without content is its method, address, headers and body."""
    made = b"HTTP/1.1 201 Created\r\nx-a: b\r\ncontent-length: 3\r\n\r\nabc"
    async with _server(made) as (url, received), Client(QUICK) as client:
        answer = await client.call(HttpRequest(method=method, url=f"{url}?a=b%2Fc", headers=HEADERS, body=body))

    head, _, sent = received[0].partition(b"\r\n\r\n")
    assert head.startswith(f"{method} /v1/x?a=b%2Fc HTTP/1.1\r\n".encode())
    assert b"authorization: bearer sk-canary" in head.lower()
    assert sent == body
    assert (answer.status, answer.headers["x-a"], answer.body) == (201, "b", b"abc")


async def test_what_is_large_has_longer() -> None:
    """An upload may take the timeout and its size at 100 kB/s; a call of the same server without one may not."""
    async with _reader(OK, end=b"TAIL", pause=1.0) as (url, _), Client(QUICK) as client:
        call = HttpRequest(method="POST", url=url, headers=HEADERS, body=b"HEAD", tail=b"TAIL")

        assert (await client.call(call, _content(b"x" * 300_000, 1))).status == 200
        with pytest.raises(TransportError) as caught:
            await client.call(call, _content(b"x", 1))

    assert (caught.value.type, caught.value.is_sent) == ("timeout", True)


async def test_an_upload_that_nobody_reads_ends() -> None:
    """A server that takes nothing costs no more than the time for so many bytes."""
    async with _server(hang=True) as (url, _), Client(QUICK) as client:
        call = HttpRequest(method="POST", url=url, headers=HEADERS, tail=b"")
        with pytest.raises(TransportError) as caught, anyio.fail_after(10):
            await client.call(call, Content(size=50_000, blocks=_content(BLOCK, 50).blocks))

    assert caught.value.is_sent


async def test_what_cannot_be_read_is_not_sent_as_something_else() -> None:
    """Where the chunk cannot be read, that error comes out as it is, and the server gets no whole request."""

    async def blocks() -> AsyncIterator[bytes]:
        yield b"x"
        raise FileNotFoundError("gone")

    async with _server(hang=True) as (url, received), Client(QUICK) as client:
        call = HttpRequest(method="POST", url=url, headers=HEADERS, body=b"HEAD", tail=b"TAIL")
        with pytest.raises(FileNotFoundError, match="gone"):
            await client.call(call, Content(size=10, blocks=blocks))

    assert b"TAIL" not in b"".join(received)


@pytest.mark.parametrize(
    ("writes", "type"),
    [
        pytest.param([], "connection_error", id="closed before the answer"),
        pytest.param([b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nabc"], "connection_error", id="cut body"),
        pytest.param([b"SSH-2.0 hello\r\n\r\n"], "invalid_http", id="not HTTP"),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\ncontent-length: 2000000\r\n\r\n" + b"x" * 2_000_000],
            "response_too_large",
            id="body over the cap",
        ),
    ],
)
async def test_a_broken_answer_to_a_call_is_a_transport_error(writes: list[bytes], type: str) -> None:
    """A call ends as a post does: with our error, that says it was sent, and does not hold the key."""
    async with _server(*writes) as (url, _), Client(QUICK) as client:
        with pytest.raises(TransportError) as caught:
            await client.call(_get(url))

    assert (caught.value.type, caught.value.is_sent) == (type, True)
    assert "canary" not in repr(caught.value)


async def test_a_call_without_an_answer_ends_at_the_deadline() -> None:
    """A silent server, and one that sends a byte at a time, cost the timeout."""
    drops = [b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n"] + [b"x"] * 500
    async with _server(hang=True) as (silent, _), _server(*drops, pause=0.05) as (slow, _), Client(QUICK) as client:
        for url in (silent, slow):
            with pytest.raises(TransportError) as caught, anyio.fail_after(5):
                await client.call(_get(url))
            assert (caught.value.type, caught.value.is_sent) == ("timeout", True)


async def test_a_call_that_cannot_connect_was_not_sent() -> None:
    """Where no connection was made, no batch can have been made."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        async with Client(QUICK) as client:
            for ask in (client.call(_get(url)), client.download(_get(url), Taken().write)):
                with pytest.raises(TransportError) as caught:
                    await ask
                assert (caught.value.type, caught.value.is_sent) == ("connection_error", False)


async def test_no_redirect_of_a_call_or_a_download_is_followed() -> None:
    """Key, requests and results go to no other address because a server says so."""
    taken = Taken()
    async with _server(OK) as (elsewhere, received):
        redirect = f"HTTP/1.1 307 Temporary Redirect\r\nlocation: {elsewhere}\r\ncontent-length: 2\r\n\r\nno"
        async with _server(redirect.encode(), keep=True) as (url, _), Client(QUICK) as client:
            called = await client.call(HttpRequest(method="POST", url=url, headers=HEADERS, body=b"x"))
            downloaded = await client.download(_get(url), taken.write)

    assert [(each.status, each.headers["location"], each.body) for each in (called, downloaded)] == [
        (307, elsewhere, b"no")
    ] * 2
    assert (received, bytes(taken.data)) == ([], b"")


async def test_a_large_download_comes_whole() -> None:
    """Some MB are given on piece by piece, in order, and are not capped as answers are."""
    taken = Taken()
    head = b"HTTP/1.1 200 OK\r\nx-a: b\r\ncontent-length: %d\r\n\r\n" % (5 * len(BLOCK))
    async with _server(head, *[BLOCK] * 5) as (url, received), Client(QUICK) as client:
        answer = await client.download(_get(url), taken.write)

    assert (answer.status, answer.headers["x-a"], answer.body) == (200, "b", b"")
    assert (taken.start, taken.data == BLOCK * 5) == (0, True)
    assert b"range:" not in received[0].lower()
    assert b"accept-encoding: identity" in received[0].lower()


@pytest.mark.parametrize(("status", "place"), [("206 Partial Content", 7), ("200 OK", 0)])
async def test_a_download_goes_on_from_a_place(status: str, place: int) -> None:
    """The rest is asked for; whether it or all of it comes, pieces are told with where they begin."""
    taken = Taken()
    rest = f"HTTP/1.1 {status}\r\ncontent-length: 3\r\n\r\nabc".encode()
    async with _server(rest) as (url, received), Client(QUICK) as client:
        answer = await client.download(_get(url), taken.write, 7)

    assert b"range: bytes=7-\r\n" in received[0].lower()
    assert (answer.status, taken.start, bytes(taken.data)) == (int(status[:3]), place, b"abc")


@pytest.mark.parametrize("status", [204, 302, 400, 404, 416, 429, 500])
async def test_a_download_that_is_refused_is_an_answer(status: int) -> None:
    """What is no file is given back with its body, and nothing is written."""
    taken = Taken()
    body = b"" if status == 204 else b'{"error":{}}'
    answer = b"HTTP/1.1 %d X\r\nretry-after: 5\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)
    async with _server(answer) as (url, _), Client(QUICK) as client:
        found = await client.download(_get(url), taken.write)

    assert (found.status, found.headers["retry-after"], found.body, bytes(taken.data)) == (status, "5", body, b"")


async def test_a_refusal_without_an_end_is_capped() -> None:
    """An error page must not fill the memory either."""
    answer = b"HTTP/1.1 500 X\r\ncontent-length: 2000000\r\n\r\n" + b"x" * 2_000_000
    async with _server(answer) as (url, _), Client(QUICK) as client:
        with pytest.raises(TransportError) as caught:
            await client.download(_get(url), Taken().write)

    assert caught.value.type == "response_too_large"


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_download_that_is_cut_keeps_what_came(is_chunked: bool) -> None:
    """A broken connection is told, never taken for the end; what came before it was given on."""
    taken = Taken()
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 9000000\r\n\r\n"
    if is_chunked:
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n" % (3 * len(BLOCK))
    async with _server(head, BLOCK, BLOCK) as (url, _), Client(QUICK) as client:
        with pytest.raises(TransportError) as caught:
            await client.download(_get(url), taken.write)

    assert caught.value.is_sent
    assert len(taken.data) > 0
    assert (BLOCK * 2).startswith(taken.data)


async def test_a_download_that_gets_on_may_take_longer_than_a_call() -> None:
    """As long as something comes, the timeout of a call does not end a download."""
    taken = Taken()
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (10 * 100_000)
    async with _server(head, *[b"x" * 100_000] * 10, pause=0.1) as (url, _), Client(QUICK) as client:
        begun = anyio.current_time()
        answer = await client.download(_get(url), taken.write)

    assert (answer.status, len(taken.data)) == (200, 1_000_000)
    assert anyio.current_time() - begun > QUICK.timeout


@pytest.mark.parametrize("first", [b"", b"abc", b"x" * 1_000_000], ids=["nothing", "little", "much"])
async def test_a_body_that_stands_still_ends_the_download(first: bytes) -> None:
    """What stands still is broken after the timeout, whether much came before, little or nothing."""
    taken = Taken()
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 9000000\r\n\r\n"
    async with _reader(head + first, end=b"\r\n\r\n") as (url, _), Client(QUICK) as client:
        begun = anyio.current_time()
        with pytest.raises(TransportError) as caught, anyio.fail_after(5):
            await client.download(_get(url), taken.write)
        seconds = anyio.current_time() - begun

    assert (caught.value.type, caught.value.is_sent) == ("timeout", True)
    assert bytes(taken.data) == first
    assert QUICK.timeout * 0.9 <= seconds < 4


async def test_a_silent_server_ends_a_download() -> None:
    """Where no answer begins, a download has no longer than a call."""
    async with _server(hang=True) as (url, _), Client(QUICK) as client:
        with pytest.raises(TransportError) as caught, anyio.fail_after(5):
            await client.download(_get(url), Taken().write)

    assert (caught.value.type, caught.value.is_sent) == ("timeout", True)


@pytest.mark.parametrize("is_begun", [False, True], ids=["before the answer", "amid its body"])
@pytest.mark.parametrize("kind", ["call", "upload", "download"])
async def test_a_call_can_be_cut_short(kind: str, is_begun: bool) -> None:
    """Who cancels a call, before its answer or amid it, goes on at once, and the client works on."""
    begun = [b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\nabc"] * is_begun
    settings = Sending(timeout=20)
    async with _server(*begun, hang=True, keep=True) as (url, _), _server(OK) as (other, _), Client(settings) as client:
        content = _content(b"x", 5) if kind == "upload" else None
        work = client.download(_get(url), Taken().write) if kind == "download" else client.call(_get(url), content)
        with anyio.fail_after(5), anyio.move_on_after(0.2) as scope:
            await work

        assert scope.cancelled_caught
        assert (await client.call(_get(other))).status == 200


async def test_an_answer_that_is_there_at_once() -> None:
    """A transport may give answers whose body was never a stream, as other transports of httpx do."""
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"id": "b1"}))
    taken = Taken()
    async with Client(Sending(), transport) as client:
        called = await client.call(_get("http://127.0.0.1/"))
        downloaded = await client.download(_get("http://127.0.0.1/"), taken.write)

    assert (called.status, called.body) == (200, b'{"id":"b1"}')
    assert (downloaded.status, bytes(taken.data)) == (200, b'{"id":"b1"}')


@pytest.mark.parametrize(
    ("content_range", "place"),
    [
        pytest.param(b"bytes 7-9/10", 7, id="as asked"),
        pytest.param(b"bytes 0-9/10", 0, id="all of it"),
        pytest.param(b"bytes 3-5/10", 3, id="another part"),
        pytest.param(b"bytes 7-9/*", 7, id="length unknown"),
        pytest.param(b"items 3-5/10", 7, id="no bytes"),
        pytest.param(b"bytes */10", 7, id="none told"),
        pytest.param(b"bytes 99999999999999999999-9/9", 7, id="cannot be"),
    ],
)
async def test_where_a_part_begins(content_range: bytes, place: int) -> None:
    """The header of the answer tells it; where that tells nothing, it is the part that was asked for."""
    taken = Taken()
    part = b"HTTP/1.1 206 Partial Content\r\ncontent-range: %b\r\ncontent-length: 3\r\n\r\nabc" % content_range
    async with _server(part) as (url, _), Client(QUICK) as client:
        await client.download(_get(url), taken.write, 7)

    assert (taken.start, bytes(taken.data)) == (place, b"abc")


async def test_who_writes_may_end_a_download() -> None:
    """An error of the one who takes the pieces comes out as it is, and the client works on."""

    async def write(place: int, piece: bytes) -> None:
        raise TransportError("enough", type="response_too_large", is_sent=True, scope=ErrorScope.MODEL)

    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (5 * len(BLOCK))
    async with _server(head, *[BLOCK] * 5) as (url, _), _server(OK) as (other, _), Client(QUICK) as client:
        with pytest.raises(TransportError, match="enough"):
            await client.download(_get(url), write)
        assert (await client.call(_get(other))).status == 200
