"""What is answered to a good request, and what it costs."""

import json
from typing import Any

import pytest

from pipeline.simulator import answer_token

from .conftest import Connect, Wire

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["km", "miles"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 3}},
        "exact": {"type": ["boolean", "null"]},
    },
}
FITTING = {"unit": "km", "days": [3], "exact": True}
LONG = "word " * 2_000  # 2,500 tokens


async def test_token_tells_the_request(connect: Connect, wire: Wire) -> None:
    """An answer begins with a token that only its own request has."""
    bodies = [wire.body("one"), wire.body("two")]
    async with connect() as client:
        texts = [wire.text(await wire.post(client, body)) for body in bodies]
    assert [text.split()[0] for text in texts] == [answer_token(body) for body in bodies]
    assert answer_token(bodies[0]) != answer_token(bodies[1])


async def test_same_seed_same_answer(connect: Connect, wire: Wire) -> None:
    """Two simulators with one seed give the same answer, another seed gives another one."""
    texts = []
    for seed in (1, 1, 2):
        async with connect(seed=seed) as client:
            texts.append(wire.text(await wire.post(client, wire.body())))
    assert texts[0] == texts[1] != texts[2]


def test_token_ignores_the_order_of_keys() -> None:
    """The token belongs to the JSON value: order of keys and spaces do not matter."""
    assert answer_token({"a": 1, "b": [2]}) == answer_token(json.loads('{ "b": [2], "a": 1 }'))


async def test_ids_are_unique(connect: Connect, wire: Wire) -> None:
    """Each response has an id and a request id of its own, also when the request is repeated."""
    async with connect() as client:
        responses = [await wire.post(client, wire.body()) for _ in range(3)]
    header = "request-id" if wire.name == "anthropic" else "x-request-id"
    assert len({response.json()["id"] for response in responses}) == 3
    assert len({response.headers[header] for response in responses}) == 3


async def test_anthropic_message(connect: Connect, anthropic_wire: Wire) -> None:
    """A message has all fields that Anthropic documents."""
    async with connect() as client:
        message = (await anthropic_wire.post(client, anthropic_wire.body("four"))).json()
    assert message["id"].startswith("msg_")
    assert (message["type"], message["role"], message["model"]) == (
        "message",
        "assistant",
        "claude-haiku-4-5",
    )
    assert (message["stop_reason"], message["stop_details"]) == ("end_turn", None)
    assert message["usage"] == {
        "input_tokens": 1 + 4 + 3,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": -(-len(message["content"][0]["text"]) // 4),
        "output_tokens_details": {"thinking_tokens": 0},
        "server_tool_use": None,
        "service_tier": "standard",
    }


async def test_openai_completion(connect: Connect, openai_wire: Wire) -> None:
    """A completion has all fields that OpenAI documents, and names the snapshot of the model."""
    async with connect() as client:
        completion = (await openai_wire.post(client, openai_wire.body("four"))).json()
    choice = completion["choices"][0]
    assert completion["id"].startswith("chatcmpl-")
    assert completion["model"] == "gpt-4o-2024-08-06"
    assert completion["service_tier"] == "default"
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert choice["message"]["refusal"] is None
    assert completion["usage"]["prompt_tokens"] == 1 + 4 + 3
    assert completion["usage"]["total_tokens"] == 8 + completion["usage"]["completion_tokens"]


async def test_text_of_blocks_counts(connect: Connect, wire: Wire) -> None:
    """Text in content blocks counts as much as the same text in a string."""
    blocks = [{"type": "text", "text": "four"}]
    async with connect() as client:
        responses = [await wire.post(client, wire.body(content)) for content in ("four", blocks)]
    assert responses[0].json()["usage"] != {}
    first, second = (response.json()["usage"] for response in responses)
    name = "input_tokens" if wire.name == "anthropic" else "prompt_tokens"
    assert first[name] == second[name]


@pytest.mark.parametrize(
    ("cache_ratio", "read", "written"),
    [pytest.param(1.0, 2_176, 0, id="read"), pytest.param(0.0, 0, 2_176, id="written")],
)
async def test_anthropic_cache(
    connect: Connect, anthropic_wire: Wire, cache_ratio: float, read: int, written: int
) -> None:
    """Anthropic's `input_tokens` leave out what is read from or written to the cache."""
    async with connect(cache_ratio=cache_ratio) as client:
        usage = (await anthropic_wire.post(client, anthropic_wire.body(LONG))).json()["usage"]
    assert usage["cache_read_input_tokens"] == read
    assert usage["cache_creation_input_tokens"] == written
    assert usage["cache_creation"]["ephemeral_5m_input_tokens"] == written
    assert usage["input_tokens"] == 2_507 - 2_176


@pytest.mark.parametrize(
    ("model", "cache_ratio", "cached", "written"),
    [
        pytest.param("gpt-4o", 1.0, 2_176, 0, id="read"),
        pytest.param("gpt-4o", 0.0, 0, 0, id="older models write for free"),
        pytest.param("gpt-6-luna", 0.0, 0, 2_176, id="newer models bill writes"),
    ],
)
async def test_openai_cache(
    connect: Connect, openai_wire: Wire, model: str, cache_ratio: float, cached: int, written: int
) -> None:
    """OpenAI's `prompt_tokens` include what is read from or written to the cache."""
    body = openai_wire.body(LONG, model=model, max_tokens=None)
    async with connect(cache_ratio=cache_ratio) as client:
        usage = (await openai_wire.post(client, body)).json()["usage"]
    assert usage["prompt_tokens"] == 2_507
    assert usage["prompt_tokens_details"]["cached_tokens"] == cached
    assert usage["prompt_tokens_details"]["cache_write_tokens"] == written


async def test_short_prompts_are_not_cached(connect: Connect, wire: Wire) -> None:
    """A prompt below 1,024 tokens is neither read from nor written to the cache."""
    async with connect(cache_ratio=1.0) as client:
        await wire.post(client, wire.body("short"))
        statistics = (await client.get("/simulator/statistics")).json()
    totals = statistics["by_model"][wire.fields["model"]]
    assert (totals["cache_read_tokens"], totals["cache_write_tokens"]) == (0, 0)


@pytest.mark.parametrize("limit", [5, 64, 1_000])
async def test_long_answers_meet_the_limit(connect: Connect, wire: Wire, limit: int) -> None:
    """`[[long]]` makes the model talk until its limit of tokens, and the reason to stop says so."""
    async with connect() as client:
        answer = (await wire.post(client, wire.body("[[long]]", max_tokens=limit))).json()
    if wire.name == "anthropic":
        found = answer["stop_reason"], answer["usage"]["output_tokens"]
    else:
        found = answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]
    assert found == ("max_tokens" if wire.name == "anthropic" else "length", limit)


async def test_anthropic_refusal(connect: Connect, anthropic_wire: Wire) -> None:
    """`[[refuse]]` gives a refusal: status 200, no content, the reason in `stop_details`."""
    async with connect() as client:
        response = await anthropic_wire.post(client, anthropic_wire.body("Please [[refuse]] this"))
    message = response.json()
    assert (response.status_code, message["stop_reason"], message["content"]) == (200, "refusal", [])
    assert message["stop_details"]["type"] == "refusal"


async def test_openai_refusal(connect: Connect, openai_wire: Wire) -> None:
    """`[[refuse]]` gives a refusal: content null, the words in `refusal`."""
    async with connect() as client:
        completion = (await openai_wire.post(client, openai_wire.body("[[refuse]]"))).json()
    choice = completion["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] is None
    assert choice["message"]["refusal"]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
async def test_anthropic_tool(connect: Connect, anthropic_wire: Wire, choice: dict[str, Any]) -> None:
    """A forced tool is called with arguments that fit its schema."""
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    body = anthropic_wire.body(tools=tools, tool_choice=choice)
    async with connect() as client:
        message = (await anthropic_wire.post(client, body)).json()
    block = message["content"][0]
    assert (message["stop_reason"], block["type"], block["name"]) == ("tool_use", "tool_use", "weather")
    assert block["input"] == {"city": answer_token(body), **FITTING}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_openai_tool(connect: Connect, openai_wire: Wire, choice: Any) -> None:
    """A forced function is called with arguments that fit its schema, as a JSON string."""
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    body = openai_wire.body(tools=tools, tool_choice=choice)
    async with connect() as client:
        completion = (await openai_wire.post(client, body)).json()
    choice = completion["choices"][0]
    call = choice["message"]["tool_calls"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": answer_token(body), **FITTING}


@pytest.mark.parametrize("limit", [1, 4])
async def test_tool_cut_short(connect: Connect, anthropic_wire: Wire, limit: int) -> None:
    """A tool call that does not fit the limit of tokens stops for that reason."""
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    body = anthropic_wire.body(tools=tools, tool_choice={"type": "any"}, max_tokens=limit)
    async with connect() as client:
        message = (await anthropic_wire.post(client, body)).json()
    assert (message["stop_reason"], message["usage"]["output_tokens"]) == ("max_tokens", limit)


async def test_anthropic_json(connect: Connect, anthropic_wire: Wire) -> None:
    """With `output_config` the text is JSON that fits the schema."""
    body = anthropic_wire.body(output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    async with connect() as client:
        value = json.loads(anthropic_wire.text(await anthropic_wire.post(client, body)))
    assert value.pop("city").startswith(answer_token(body))
    assert value == FITTING


@pytest.mark.parametrize(
    ("response_format", "name"),
    [
        pytest.param({"type": "json_object"}, "answer", id="any object"),
        pytest.param({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "city", id="schema"),
    ],
)
async def test_openai_json(connect: Connect, openai_wire: Wire, response_format: dict[str, Any], name: str) -> None:
    """With a JSON `response_format` the content is a JSON object."""
    body = openai_wire.body(response_format=response_format)
    async with connect() as client:
        value = json.loads(openai_wire.text(await openai_wire.post(client, body)))
    assert value[name].startswith(answer_token(body))


async def test_choices(connect: Connect, openai_wire: Wire) -> None:
    """`n` gives so many different choices, all paid for."""
    async with connect() as client:
        one = (await openai_wire.post(client, openai_wire.body())).json()
        three = (await openai_wire.post(client, openai_wire.body(n=3))).json()
    texts = [choice["message"]["content"] for choice in three["choices"]]
    assert ([choice["index"] for choice in three["choices"]], len(set(texts))) == ([0, 1, 2], 3)
    assert three["usage"]["completion_tokens"] == sum(-(-len(text) // 4) for text in texts)
    assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("model", "effort", "reasons"),
    [("gpt-6-luna", None, True), ("o3", None, True), ("gpt-6-luna", "none", False), ("gpt-4o", None, False)],
)
async def test_openai_reasoning(
    connect: Connect, openai_wire: Wire, model: str, effort: str | None, reasons: bool
) -> None:
    """Reasoning models bill reasoning tokens as part of the completion, unless reasoning is turned off."""
    body = openai_wire.body(model=model, reasoning_effort=effort, max_tokens=None, max_completion_tokens=2_000)
    async with connect() as client:
        usage = (await openai_wire.post(client, body)).json()["usage"]
    reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    assert (reasoning > 0) is reasons
    assert usage["completion_tokens"] > reasoning


async def test_anthropic_thinking(connect: Connect, anthropic_wire: Wire) -> None:
    """Thinking comes as a block of its own, and its tokens are part of the output."""
    body = anthropic_wire.body(model="claude-opus-5-5", max_tokens=4_000, thinking={"type": "adaptive"})
    async with connect() as client:
        message = (await anthropic_wire.post(client, body)).json()
    thinking = message["usage"]["output_tokens_details"]["thinking_tokens"]
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    assert 0 < thinking < message["usage"]["output_tokens"]


async def test_count_tokens(connect: Connect, anthropic_wire: Wire) -> None:
    """Counting tokens is free and tells what a message then costs."""
    counted = anthropic_wire.body("four", max_tokens=None)
    async with connect() as client:
        response = await client.post("/v1/messages/count_tokens", json=counted, headers=anthropic_wire.headers)
        statistics = (await client.get("/simulator/statistics")).json()
    assert (response.json(), statistics["received"]) == ({"input_tokens": 8}, 0)


async def test_models(connect: Connect, wire: Wire) -> None:
    """The list of models has the shape of the provider that the headers name."""
    async with connect() as client:
        page = (await client.get("/v1/models", headers=wire.headers)).json()
    assert page["data"][0]["id"].startswith("claude" if wire.name == "anthropic" else "gpt")


async def test_mounted_below_a_prefix(connect: Connect, wire: Wire) -> None:
    """Base URLs that end in the provider's name work too, as Azure and many gateways have them."""
    async with connect() as client:
        response = await client.post(f"/{wire.name}{wire.path}", json=wire.body(), headers=wire.headers)
    assert response.status_code == 200
