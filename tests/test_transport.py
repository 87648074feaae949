"""The transport over real sockets, before servers that misbehave: every ending is one of ours, and bounded."""

from __future__ import annotations

import gzip
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import httpx
import pytest
import respx
from anyio.abc import SocketStream

from pipeline.config import Sending
from pipeline.errors import Reach, TransportError
from pipeline.transport import Client, ping
from pipeline.types import Answer

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


async def _post(url: str, settings: Sending = QUICK) -> Answer:
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

    assert (caught.value.type, caught.value.is_sent, caught.value.reach) == (type, is_sent, Reach.ATTEMPT)
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
