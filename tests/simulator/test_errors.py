"""Which requests are refused, and with what bodies."""

from typing import Any

import httpx
import pytest

from .conftest import Connect, Wire


async def problem(client: httpx.AsyncClient, wire: Wire, body: Any, **headers: str | None) -> tuple[Any, ...]:
    """Return status, type and (OpenAI) param and code of the answer."""
    response = await wire.post(client, body, **headers)
    error = response.json()["error"]
    if wire.name == "anthropic":
        return response.status_code, error["type"]
    return response.status_code, error["type"], error["param"], error["code"]


@pytest.mark.parametrize(
    ("header", "value"),
    [("x-api-key", None), ("x-api-key", "wrong"), ("authorization", None), ("authorization", "Bearer wrong")],
)
async def test_key(connect: Connect, wire: Wire, header: str, value: str | None) -> None:
    """A missing or unknown key is answered with 401 and the provider's own body."""
    without = {"x_api_key": None, "authorization": None}
    async with connect(keys=frozenset({"right"})) as client:
        found = await problem(client, wire, wire.body(), **{**without, header: value})
    if wire.name == "anthropic":
        assert found == (401, "authentication_error")
    else:
        known = value is not None and header == "authorization"
        assert found == (401, "invalid_request_error", None, "invalid_api_key" if known else None)


@pytest.mark.parametrize(
    ("name", "header", "value"),
    [
        ("anthropic", "x-api-key", "right"),
        ("anthropic", "authorization", "Bearer right"),
        ("openai", "authorization", "Bearer right"),
        ("openai", "api-key", "right"),
    ],
)
async def test_places_of_the_key(
    connect: Connect, anthropic_wire: Wire, openai_wire: Wire, name: str, header: str, value: str
) -> None:
    """A key is accepted wherever the provider's clients put it."""
    wire = {"anthropic": anthropic_wire, "openai": openai_wire}[name]
    without = {"x_api_key": None, "authorization": None}
    async with connect(keys=frozenset({"right"})) as client:
        response = await wire.post(client, wire.body(), **{**without, header: value})
    assert response.status_code == 200


async def test_openai_masks_the_key(connect: Connect, openai_wire: Wire) -> None:
    """OpenAI quotes only the ends of a wrong key."""
    async with connect(keys=frozenset()) as client:
        response = await openai_wire.post(client, openai_wire.body(), authorization="Bearer sk-abcdefgh1234")
    assert "sk-********1234" in response.text
    assert "abcdefgh" not in response.text


async def test_request_id(connect: Connect, anthropic_wire: Wire) -> None:
    """Anthropic's error bodies carry the request id of the header."""
    async with connect() as client:
        response = await anthropic_wire.post(client, {})
    assert response.json()["request_id"] == response.headers["request-id"]


@pytest.mark.parametrize("raw", [b"", b"{", b'{"model": NaN}', b"\xff"])
async def test_not_json(connect: Connect, wire: Wire, raw: bytes) -> None:
    """A body that is not JSON is a 400."""
    async with connect() as client:
        response = await client.post(wire.path, content=raw, headers=wire.headers)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_too_large(connect: Connect, wire: Wire) -> None:
    """A body above 32 MB is a 413."""
    async with connect() as client:
        response = await client.post(wire.path, content=b" " * (32 * 1024**2 + 1), headers=wire.headers)
    assert response.status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        pytest.param([], id="no object"),
        pytest.param({"model": None}, id="no model"),
        pytest.param({"model": ""}, id="empty model"),
        pytest.param({"messages": None}, id="no messages"),
        pytest.param({"messages": []}, id="empty messages"),
        pytest.param({"messages": "hello"}, id="messages as text"),
        pytest.param({"messages": ["hello"]}, id="message as text"),
        pytest.param({"messages": [{"role": "robot", "content": "x"}]}, id="unknown role"),
        pytest.param({"messages": [{"role": ["user"], "content": "x"}]}, id="role as list"),
        pytest.param({"messages": [{"role": "user"}]}, id="no content"),
        pytest.param({"messages": [{"role": "user", "content": 1}]}, id="content as number"),
        pytest.param({"messages": [{"role": "user", "content": ["x"]}]}, id="block as text"),
        pytest.param({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, id="unknown block"),
        pytest.param({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, id="block without text"),
        pytest.param({"max_tokens": 0}, id="max_tokens 0"),
        pytest.param({"max_tokens": "9"}, id="max_tokens as text"),
        pytest.param({"max_tokens": True}, id="max_tokens as boolean"),
        pytest.param({"temperature": -0.1}, id="temperature below 0"),
        pytest.param({"temperature": 2.1}, id="temperature above 2"),
        pytest.param({"temperature": "hot"}, id="temperature as text"),
        pytest.param({"stream": True}, id="stream"),
        pytest.param({"tool_choice": {"type": "any"}}, id="tool_choice without tools"),
        pytest.param({"tools": "hammer"}, id="tools as text"),
        pytest.param({"tools": ["hammer"]}, id="tool as text"),
        pytest.param({"max_tokens": 128_001}, id="more tokens than any model gives"),
    ],
)
async def test_invalid(connect: Connect, wire: Wire, body: Any) -> None:
    """What either provider refuses as malformed is a 400 of type invalid_request_error."""
    changed = wire.body() | body if isinstance(body, dict) else body
    if isinstance(body, dict):
        changed = {name: value for name, value in changed.items() if value is not None}
    async with connect() as client:
        assert (await problem(client, wire, changed))[:2] == (400, "invalid_request_error")


USER = {"role": "user", "content": "x"}
ASSISTANT = {"role": "assistant", "content": "y"}
SYSTEM = {"role": "system", "content": "z"}


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        pytest.param({"max_tokens": None}, 400, id="no max_tokens"),
        pytest.param({"temperature": 1.5}, 400, id="temperature above 1"),
        pytest.param({"temperature": 0.5}, 200, id="temperature on an older model"),
        pytest.param({"temperature": 0.5, "model": "claude-opus-4-7"}, 400, id="temperature from 4.7 on"),
        pytest.param({"temperature": 1, "model": "claude-opus-4-7"}, 200, id="default temperature"),
        pytest.param({"messages": [USER, ASSISTANT]}, 200, id="prefill on an older model"),
        pytest.param({"messages": [USER, ASSISTANT], "model": "claude-sonnet-5"}, 400, id="prefill from 4.6 on"),
        pytest.param({"messages": [USER, SYSTEM]}, 400, id="system message on an older model"),
        pytest.param({"messages": [USER, SYSTEM], "model": "claude-opus-5"}, 200, id="system after user"),
        pytest.param({"messages": [SYSTEM, USER], "model": "claude-opus-5"}, 400, id="system first"),
        pytest.param({"messages": [{"role": "user", "content": ""}]}, 400, id="empty content"),
        pytest.param({"messages": [USER, USER]}, 200, id="same role twice"),
        pytest.param({"thinking": {"type": "adaptive"}}, 400, id="adaptive thinking up to 4.5"),
        pytest.param({"thinking": {"type": "enabled", "budget_tokens": 500}}, 400, id="small thinking budget"),
        pytest.param({"tools": [{"name": "a"}], "tool_choice": {"type": "tool", "name": "b"}}, 400, id="tool"),
        pytest.param({"thinking": {"type": "enabled", "budget_tokens": "x"}}, 400, id="budget as text"),
        pytest.param({"model": "any-other-name", "temperature": 0.5}, 200, id="other maker's model"),
    ],
)
async def test_anthropic_rules(connect: Connect, anthropic_wire: Wire, fields: dict[str, Any], status: int) -> None:
    """Anthropic's own rules hold, each for the models that have it."""
    async with connect() as client:
        response = await anthropic_wire.post(client, anthropic_wire.body(**fields))
    assert response.status_code == status


@pytest.mark.parametrize(
    ("version", "fields", "status"),
    [
        pytest.param(None, {}, 400, id="none"),
        pytest.param("2024-01-01", {}, 400, id="unknown"),
        pytest.param("2026-10-21", {}, 200, id="newest"),
        pytest.param("2026-10-21", {"temperature": 1.0}, 400, id="temperature, even the default"),
        pytest.param("2026-10-21", {"top_p": 1}, 400, id="top_p"),
        pytest.param("2026-10-21", {"top_k": 5}, 400, id="top_k"),
    ],
)
async def test_anthropic_version(
    connect: Connect, anthropic_wire: Wire, version: str | None, fields: dict[str, Any], status: int
) -> None:
    """The version header is required, and 2026-10-21 refuses all sampling parameters."""
    async with connect() as client:
        response = await anthropic_wire.post(client, anthropic_wire.body(**fields), anthropic_version=version)
    assert response.status_code == status


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        pytest.param({"model": "gpt-6-luna"}, "max_tokens", "unsupported_parameter", id="max_tokens gpt-6"),
        pytest.param({"model": "o3"}, "max_tokens", "unsupported_parameter", id="max_tokens o3"),
        pytest.param(
            {"model": "gpt-5.6", "max_tokens": None, "temperature": 0.2},
            "temperature",
            "unsupported_value",
            id="temperature gpt-5.6",
        ),
        pytest.param({"max_tokens": 0}, "max_tokens", "integer_below_min_value", id="too few tokens"),
        pytest.param({"temperature": 3}, "temperature", "decimal_above_max_value", id="too hot"),
        pytest.param({"n": 129}, "n", "integer_above_max_value", id="too many choices"),
        pytest.param({"messages": None}, "messages", "missing_required_parameter", id="no messages"),
    ],
)
async def test_openai_rules(connect: Connect, openai_wire: Wire, fields: dict[str, Any], param: str, code: str) -> None:
    """OpenAI names the parameter and gives the reason as a code."""
    async with connect() as client:
        found = await problem(client, openai_wire, openai_wire.body(**fields))
    assert found == (400, "invalid_request_error", param, code)


async def test_openai_max_completion_tokens(connect: Connect, openai_wire: Wire) -> None:
    """Reasoning models take `max_completion_tokens`, and gpt-5.4 a temperature too."""
    body = openai_wire.body(model="gpt-5.4-mini", max_tokens=None, max_completion_tokens=900, temperature=0.2)
    async with connect() as client:
        assert (await openai_wire.post(client, body)).status_code == 200


@pytest.mark.parametrize("model", ["unknown-model", "missing", "claude-3-5-sonnet-20241022", "claude-3-opus"])
async def test_anthropic_model_gone(connect: Connect, anthropic_wire: Wire, model: str) -> None:
    """Unknown and retired Claude models are a 404."""
    async with connect() as client:
        found = await problem(client, anthropic_wire, anthropic_wire.body(model=model))
    assert found == (404, "not_found_error")


@pytest.mark.parametrize("model", ["unknown-model", "gpt-4", "gpt-4-0613", "gpt-3.5-turbo", "o1", "o4-mini"])
async def test_openai_model_gone(connect: Connect, openai_wire: Wire, model: str) -> None:
    """Unknown and retired OpenAI models are a 404 with the code model_not_found."""
    async with connect() as client:
        found = await problem(client, openai_wire, openai_wire.body(model=model))
    assert found == (404, "invalid_request_error", None, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/v1/nothing", 404), ("POST", "/v1/models/", 404), ("PUT", None, 405)],
)
async def test_paths(connect: Connect, wire: Wire, method: str, path: str | None, status: int) -> None:
    """Unknown paths and methods are answered in the body of the provider that was meant."""
    async with connect() as client:
        response = await client.request(method, path or wire.path, headers=wire.headers)
    assert response.status_code == status
    assert ("request_id" in response.json()) is (wire.name == "anthropic")
    assert response.json()["error"]["message"]


async def test_count_tokens_refuses(connect: Connect, anthropic_wire: Wire) -> None:
    """Counting tokens has the same errors as sending, also without the version header."""
    async with connect() as client:
        response = await client.post("/v1/messages/count_tokens", json={}, headers={"x-api-key": "key"})
    assert (response.status_code, response.json()["type"]) == (400, "error")


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 413, 429, 500, 503, 529])
async def test_forced_status(connect: Connect, wire: Wire, status: int) -> None:
    """`[[status:NNN]]` in the user's text gives that status every time."""
    async with connect() as client:
        found = [(await wire.post(client, wire.body(f"x [[status:{status}]]"))).status_code for _ in range(2)]
    assert found == [status, status]
