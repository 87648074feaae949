"""The two protocols as a client sees them, and a client without sockets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from pipeline.simulator import Options, build_app

from .batching import Batching


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How to send a prompt in one protocol."""

    name: str
    path: str
    headers: dict[str, str]
    fields: dict[str, Any]

    def body(self, content: Any = "How far is the Moon?", **fields: Any) -> dict[str, Any]:
        """Return a valid request; a field given as None is left out."""
        body = {**self.fields, "messages": [{"role": "user", "content": content}], **fields}
        return {name: value for name, value in body.items() if value is not None}

    async def post(self, client: httpx.AsyncClient, body: Any, **headers: str | None) -> httpx.Response:
        """Send a body; headers given as None are left out, `_` in their names stands for `-`."""
        changed = {name.replace("_", "-"): value for name, value in headers.items()}
        kept = {name: value for name, value in {**self.headers, **changed}.items() if value is not None}
        return await client.post(self.path, json=body, headers=kept)

    def text(self, response: httpx.Response) -> str:
        """Return the text of the answer."""
        if self.name == "anthropic":
            return str(response.json()["content"][0]["text"])
        return str(response.json()["choices"][0]["message"]["content"])


Connect = Callable[..., httpx.AsyncClient]
"""Make a client of a fresh simulator with the given options, in the same event loop."""


_ANTHROPIC = Wire(
    name="anthropic",
    path="/v1/messages",
    headers={"x-api-key": "key", "anthropic-version": "2023-06-01"},
    fields={"model": "claude-haiku-4-5", "max_tokens": 1_000},
)
_OPENAI = Wire(
    name="openai",
    path="/v1/chat/completions",
    headers={"authorization": "Bearer key"},
    fields={"model": "gpt-4o", "max_tokens": 1_000},
)


@pytest.fixture
def anthropic_wire() -> Wire:
    """Anthropic's protocol."""
    return _ANTHROPIC


@pytest.fixture
def openai_wire() -> Wire:
    """OpenAI's protocol."""
    return _OPENAI


@pytest.fixture(params=[_ANTHROPIC, _OPENAI], ids=["anthropic", "openai"])
def wire(request: pytest.FixtureRequest) -> Wire:
    """Each protocol in turn."""
    chosen: Wire = request.param
    return chosen


@pytest.fixture
def connect() -> Connect:
    """Make a client of a fresh simulator with the given options, in the same event loop."""

    def client(**options: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=build_app(Options(**options)))
        return httpx.AsyncClient(transport=transport, base_url="http://simulator")

    return client


@pytest.fixture
def batching(wire: Wire) -> Batching:
    """Each provider's batches in turn."""
    return Batching(wire=wire)


@pytest.fixture
def openai_batching() -> Batching:
    """OpenAI's batches."""
    return Batching(wire=_OPENAI)


@pytest.fixture
def anthropic_batching() -> Batching:
    """Anthropic's batches."""
    return Batching(wire=_ANTHROPIC)
