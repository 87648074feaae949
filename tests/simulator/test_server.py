"""The simulator on real sockets, judged by raw clients and by the providers' own SDKs."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from pipeline.simulator import Options, answer_token, serving

from .conftest import Wire

ROOT = Path(__file__).parents[2]
FOREVER = (
    "from pipeline.simulator import Options, serve_forever\n"
    "serve_forever(Options(), '127.0.0.1', 0, lambda url: print(url, flush=True))\n"
    "print('ended')"
)


def test_first_request_at_once(wire: Wire) -> None:
    """A request sent in the first moment is answered, as the socket listens already."""
    with serving(Options()) as server:
        response = httpx.post(server.url + wire.path, json=wire.body(), headers=wire.headers)
        assert response.status_code == 200
        assert response.headers["content-length"] == str(len(response.content))


def test_statistics_from_another_thread(wire: Wire) -> None:
    """The server's statistics are those of its endpoint."""
    with serving(Options()) as server:
        httpx.post(server.url + wire.path, json=wire.body(), headers=wire.headers)
        assert server.statistics() == httpx.get(server.url + "/simulator/statistics").json()


def test_many_connections_at_once(wire: Wire) -> None:
    """Clients that all connect in the same moment are all answered."""
    with serving(Options()) as server:
        address = ("127.0.0.1", int(server.url.rsplit(":")[-1]))
        connections = [socket.create_connection(address) for _ in range(300)]
        for connection in connections:
            connection.sendall(_raw(wire))
        answers = [connection.recv(15) for connection in connections]
        for connection in connections:
            connection.close()
    assert set(answers) == {b"HTTP/1.1 200 OK"}


def test_ends_with_connections_open(wire: Wire) -> None:
    """The end does not wait for idle connections, nor for requests that will never be answered."""
    with httpx.Client() as client, socket.socket() as silent:
        with serving(Options(faults={"timeout": 1.0})) as server:
            client.get(server.url + "/simulator/statistics")
            silent.connect(("127.0.0.1", int(server.url.rsplit(":")[-1])))
            silent.sendall(_raw(wire))
        assert not [thread for thread in threading.enumerate() if thread.name == "simulator"]


def _raw(wire: Wire) -> bytes:
    request = httpx.Request("POST", "http://127.0.0.1" + wire.path, json=wire.body(), headers=wire.headers)
    lines = [f"POST {wire.path} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + request.content


def test_reset_on_the_wire(wire: Wire) -> None:
    """A reset connection is closed without a single byte of an answer."""
    with (
        serving(Options(faults={"reset": 1.0})) as server,
        pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)),
    ):
        httpx.post(server.url + wire.path, json=wire.body(), headers=wire.headers)


def test_incomplete_on_the_wire(wire: Wire) -> None:
    """An incomplete answer ends before its content-length."""
    with (
        serving(Options(faults={"incomplete": 1.0})) as server,
        pytest.raises(httpx.RemoteProtocolError, match="without sending complete"),
    ):
        httpx.post(server.url + wire.path, json=wire.body(), headers=wire.headers)


def test_timeout_on_the_wire(wire: Wire) -> None:
    """A client with a timeout gives up on a request that is never answered."""
    with serving(Options(faults={"timeout": 1.0})) as server, pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + wire.path, json=wire.body(), headers=wire.headers, timeout=0.1)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "example.com", ""])
def test_loopback_only(host: str) -> None:
    """The simulator serves no other machine."""
    with pytest.raises(ValueError, match=r"give 127\.0\.0\.1"), serving(Options(), host):
        pass


def test_port_taken() -> None:
    """A port in use is an OSError, not a server that never answers."""
    with (
        serving(Options()) as server,
        pytest.raises(OSError, match="in use"),
        serving(Options(), port=int(server.url.rsplit(":")[-1])),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_forever(number: signal.Signals) -> None:
    """It announces its URL, serves, and ends cleanly with either signal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FOREVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert httpx.get(url + "/simulator/statistics").status_code == 200
        process.send_signal(number)
        output, _ = process.communicate(timeout=10)
    assert (process.returncode, output) == (0, "ended\n")


def claude(url: str, key: str = "key") -> anthropic.Anthropic:
    """Make Anthropic's own client."""
    return anthropic.Anthropic(api_key=key, base_url=url, max_retries=0)


def gpt(url: str, key: str = "key") -> openai.OpenAI:
    """Make OpenAI's own client."""
    return openai.OpenAI(api_key=key, base_url=url + "/v1", max_retries=0)


def test_anthropic_sdk() -> None:
    """Anthropic's SDK understands a message, counted tokens and the list of models."""
    messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": "Hello"}]
    with serving(Options()) as server, claude(server.url) as client:
        message = client.messages.create(model="claude-haiku-5-5", max_tokens=500, messages=messages)
        counted = client.messages.count_tokens(model="claude-haiku-5-5", messages=messages)
        models = client.models.list()
    block = message.content[0]
    token = answer_token({"model": "claude-haiku-5-5", "max_tokens": 500, "messages": messages})
    assert isinstance(block, anthropic.types.TextBlock)
    assert block.text.startswith(token)
    assert message.stop_reason == "end_turn"
    assert str(message._request_id).startswith("req_")
    assert counted.input_tokens == message.usage.input_tokens
    assert models.data[0].id.startswith("claude-")


def test_openai_sdk() -> None:
    """OpenAI's SDK understands a completion and the list of models."""
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
    with serving(Options()) as server, gpt(server.url) as client:
        completion = client.chat.completions.create(model="gpt-6-luna", messages=messages)
        models = client.models.list()
    token = answer_token({"model": "gpt-6-luna", "messages": messages})
    assert str(completion.choices[0].message.content).startswith(token)
    assert completion.usage is not None
    assert completion.usage.completion_tokens_details is not None
    assert completion.usage.completion_tokens_details.reasoning_tokens
    assert str(completion._request_id).startswith("req_")
    assert models.data[0].id.startswith("gpt-")


@pytest.mark.parametrize(
    ("model", "text", "key", "error"),
    [
        ("claude-haiku-5-5", "x", "wrong", anthropic.AuthenticationError),
        ("unknown-model", "x", "key", anthropic.NotFoundError),
        ("claude-haiku-5-5", "", "key", anthropic.BadRequestError),
        ("claude-haiku-5-5", "[[status:429]]", "key", anthropic.RateLimitError),
        ("claude-haiku-5-5", "[[status:529]]", "key", anthropic.InternalServerError),
        ("claude-haiku-5-5", "[[status:413]]", "key", anthropic.APIStatusError),
    ],
)
def test_anthropic_sdk_errors(model: str, text: str, key: str, error: type[anthropic.APIStatusError]) -> None:
    """Anthropic's SDK raises its own error for each status."""
    options = Options(keys=frozenset({"key"}))
    with serving(options) as server, claude(server.url, key) as client, pytest.raises(error) as caught:
        client.messages.create(model=model, max_tokens=9, messages=[{"role": "user", "content": text}])
    assert str(caught.value.request_id).startswith("req_")
    assert caught.value.response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("model", "text", "key", "error", "code"),
    [
        ("gpt-4o", "x", "wrong", openai.AuthenticationError, "invalid_api_key"),
        ("gpt-4", "x", "key", openai.NotFoundError, "model_not_found"),
        ("gpt-6-sol", "x", "key", openai.BadRequestError, "unsupported_parameter"),
        ("gpt-4o", "[[status:429]]", "key", openai.RateLimitError, "rate_limit_exceeded"),
        ("gpt-4o", "[[status:503]]", "key", openai.InternalServerError, "server_is_overloaded"),
        ("gpt-4o", "[[status:529]]", "key", openai.InternalServerError, None),
    ],
)
def test_openai_sdk_errors(
    model: str, text: str, key: str, error: type[openai.APIStatusError], code: str | None
) -> None:
    """OpenAI's SDK raises its own error for each status, with the code."""
    options = Options(keys=frozenset({"key"}))
    with serving(options) as server, gpt(server.url, key) as client, pytest.raises(error) as caught:
        client.chat.completions.create(model=model, max_tokens=9, messages=[{"role": "user", "content": text}])
    assert (caught.value.code, str(caught.value.request_id)[:4]) == (code, "req_")
