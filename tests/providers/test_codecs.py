"""The codecs: portable lines to bodies, answers to replies or errors. No network, no clock."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import providers
from pipeline.core.config import Config, Endpoint, RequestDefaults
from pipeline.core.errors import AnthropicAPIError, ErrorScope, LineError, OpenAIAPIError, ProviderError, TransportError
from pipeline.core.types import Completion, HttpResponse, Protocol, ToolCall, Usage
from pipeline.providers.rate_limit_headers import retry_after

CONFIG = Config()
ANTHROPIC, OPENAI = Protocol.ANTHROPIC, Protocol.OPENAI
CLAUDE, GPT = "claude-haiku-5-5", "gpt-6-luna"
USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "brief"}
PNG = {"type": "base64", "media_type": "image/png", "data": "aGk="}
FUNCTION = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TOOL = {"name": "add", "input_schema": {"type": "object"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
TOOL_USE = {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}}
SCHEMA = {"type": "object"}
ERRORS = {ANTHROPIC: AnthropicAPIError, OPENAI: OpenAIAPIError}


def endpoint(protocol: Protocol = OPENAI, **changes: Any) -> Endpoint:
    """A user's own endpoint."""
    path = {ANTHROPIC: "/v1/messages", OPENAI: "/chat/completions"}[protocol]
    return Endpoint(**{"protocol": protocol.value, "base_url": "https://llm.example", "path": path, **changes})


def body(protocol: Protocol, line: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """The body that the built-in endpoint of a protocol gets for a line."""
    model = {ANTHROPIC: CLAUDE, OPENAI: GPT}[protocol]
    settings = CONFIG.providers[protocol]
    return providers.codec(protocol).body(line, settings, RequestDefaults(**defaults), model)


def fails(protocol: Protocol, answer: HttpResponse) -> ProviderError:
    """The error that an answer decodes to."""
    with pytest.raises(ERRORS[protocol]) as caught:
        providers.codec(protocol).decode(answer)
    return caught.value


def asks(*content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    """A line of a greeting and one message with a list as its content."""
    return {"messages": [USER, {"role": role, "content": list(content), **more}]}


# ── lines to bodies ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param({"messages": [USER]}, {"messages": [USER]}, id="as it is"),
        pytest.param({"messages": [USER], "top_k": 5, "new": {}}, {"top_k": 5, "new": {}}, id="unknown passes"),
        pytest.param({"messages": [USER], "stream": False, "stop": None}, {"messages": [USER]}, id="nulls go"),
        pytest.param({"messages": [SYSTEM, USER]}, {"system": "brief", "messages": [USER]}, id="system moves"),
        pytest.param(
            {"messages": [SYSTEM, {"role": "developer", "content": "b"}, USER], "system": "a"},
            {"system": "a\n\nbrief\n\nb", "messages": [USER]},
            id="system texts join by blank lines",
        ),
        pytest.param(
            {"messages": [SYSTEM, USER], "system": [{"type": "text", "text": "a", "cache_control": {}}]},
            {
                "system": [
                    {"type": "text", "text": "a", "cache_control": {}},
                    {"type": "text", "text": "brief"},
                ]
            },
            id="a system of blocks stays one",
        ),
        pytest.param({"messages": [USER, SYSTEM]}, {"messages": [USER, SYSTEM]}, id="a later system stays"),
        pytest.param({"messages": [USER], "max_completion_tokens": 9}, {"max_tokens": 9}, id="token limit"),
        pytest.param(
            {"messages": [USER], "max_completion_tokens": 9, "max_tokens": 9},
            {"max_tokens": 9},
            id="both limits",
        ),
        pytest.param({"messages": [USER], "stop": "X"}, {"stop_sequences": ["X"]}, id="stop"),
        pytest.param({"messages": [USER], "stop": ["X", "Y"]}, {"stop_sequences": ["X", "Y"]}, id="stops"),
        pytest.param({"messages": [USER], "n": 1, "logprobs": False, "seed": None}, {}, id="no-ops go"),
        pytest.param({"messages": [USER], "user": "u"}, {"metadata": {"user_id": "u"}}, id="user"),
        pytest.param({"messages": [USER], "service_tier": "default"}, {"service_tier": "standard_only"}, id="tier"),
        pytest.param(
            {"messages": [USER], "tools": [{**FUNCTION, "cache_control": {}}], "tool_choice": "required"},
            {"tools": [{**TOOL, "cache_control": {}}], "tool_choice": {"type": "any"}},
            id="tools",
        ),
        pytest.param({"messages": [USER], "tools": [TOOL]}, {"tools": [TOOL]}, id="own tools"),
        pytest.param(
            {"messages": [USER], "parallel_tool_calls": False},
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            id="no parallel calls",
        ),
        pytest.param(
            {"messages": [USER], "parallel_tool_calls": False, "tool_choice": "none"},
            {"tool_choice": {"type": "none"}},
            id="no calls at all",
        ),
        pytest.param(
            {"messages": [USER], "tool_choice": {"type": "function", "function": {"name": "add"}}},
            {"tool_choice": {"type": "tool", "name": "add"}},
            id="one tool",
        ),
        pytest.param(
            {
                "messages": [USER],
                "reasoning_effort": "high",
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
            },
            {"output_config": {"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}}},
            id="effort and schema share a field",
        ),
        pytest.param({"messages": [USER], "response_format": {"type": "text"}}, {}, id="format text"),
        pytest.param(
            asks({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk=", "detail": "auto"}}),
            asks({"type": "image", "source": PNG}),
            id="image in a data URL",
        ),
        pytest.param(
            asks({"type": "image_url", "image_url": {"url": "https://a.example/b"}, "cache_control": {}}),
            asks(
                {
                    "type": "image",
                    "source": {"type": "url", "url": "https://a.example/b"},
                    "cache_control": {},
                }
            ),
            id="image behind a link",
        ),
        pytest.param(
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": "well", "refusal": None, "tool_calls": [CALL, CALL]},
                    {"role": "tool", "tool_call_id": "c1", "content": "1"},
                    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]},
                    USER,
                ]
            },
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": [{"type": "text", "text": "well"}, TOOL_USE, TOOL_USE]},
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "c1", "content": "1"},
                            {
                                "type": "tool_result",
                                "tool_use_id": "c1",
                                "content": [{"type": "text", "text": "2"}],
                            },
                        ],
                    },
                    USER,
                ]
            },
            id="calls and results, those in a row in one message",
        ),
        pytest.param(
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            {"messages": [USER, {"role": "assistant", "content": [TOOL_USE]}]},
            id="a call without text",
        ),
        pytest.param(asks(TOOL_USE, role="assistant"), asks(TOOL_USE, role="assistant"), id="own blocks"),
    ],
)
def test_portable_line_to_anthropic(line: dict[str, Any], expected: dict[str, Any]) -> None:
    """What is in OpenAI's shape becomes Anthropic's; Anthropic's own, and nobody's, passes untouched."""
    result = body(ANTHROPIC, line)

    base = {"model": CLAUDE, "messages": [USER], "max_tokens": 4096}
    if "system" in expected:
        assert result["messages"] == [USER]
    assert result == {**base, **expected}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param({"messages": [SYSTEM, USER]}, {"messages": [SYSTEM, USER]}, id="as it is"),
        pytest.param(
            {"messages": [USER], "system": "brief"},
            {"messages": [{"role": "developer", "content": "brief"}, USER]},
            id="system moves",
        ),
        pytest.param(
            {"messages": [USER], "system": [{"type": "text", "text": "a"}]},
            {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}, USER]},
            id="system of blocks",
        ),
        pytest.param({"messages": [USER], "system": ""}, {}, id="an empty system says nothing"),
        pytest.param({"messages": [USER], "max_tokens": 9}, {"max_completion_tokens": 9}, id="token limit"),
        pytest.param({"messages": [USER], "stop_sequences": ["X"]}, {"stop": ["X"]}, id="stop"),
        pytest.param({"messages": [USER], "top_k": 5, "n": 2}, {"top_k": 5, "n": 2}, id="unknown passes"),
        pytest.param({"messages": [USER], "store": True}, {"store": True}, id="the line's own store"),
        pytest.param({"messages": [USER], "speed": "standard"}, {}, id="no-ops go"),
        pytest.param(
            {
                "messages": [USER],
                "tools": [TOOL],
                "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            },
            {"tools": [FUNCTION], "tool_choice": "required", "parallel_tool_calls": False},
            id="tools",
        ),
        pytest.param(
            {"messages": [USER], "tool_choice": {"type": "tool", "name": "add"}},
            {"tool_choice": {"type": "function", "function": {"name": "add"}}},
            id="one tool",
        ),
        pytest.param({"messages": [USER], "tools": [FUNCTION]}, {"tools": [FUNCTION]}, id="own tools"),
        pytest.param(
            {
                "messages": [USER],
                "output_config": {"effort": "max", "format": {"type": "x", "schema": SCHEMA}},
            },
            {
                "reasoning_effort": "max",
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
                },
            },
            id="effort and schema",
        ),
        pytest.param(
            asks({"type": "image", "source": PNG}, {"type": "text", "text": "?"}),
            asks(
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
                {"type": "text", "text": "?"},
            ),
            id="image",
        ),
        pytest.param(
            asks({"type": "text", "text": "well"}, TOOL_USE, role="assistant"),
            asks({"type": "text", "text": "well"}, role="assistant", tool_calls=[CALL]),
            id="calls",
        ),
        pytest.param(
            asks(
                {"type": "tool_result", "tool_use_id": "c1", "is_error": False},
                {
                    "type": "tool_result",
                    "tool_use_id": "c2",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
                {"type": "text", "text": "go on"},
            ),
            {
                "messages": [
                    USER,
                    {"role": "tool", "tool_call_id": "c1", "content": ""},
                    {"role": "tool", "tool_call_id": "c2", "content": "a\n\nb"},
                    {"role": "user", "content": [{"type": "text", "text": "go on"}]},
                ]
            },
            id="results become messages",
        ),
    ],
)
def test_portable_line_to_openai(line: dict[str, Any], expected: dict[str, Any]) -> None:
    """What is in Anthropic's shape becomes OpenAI's; what is in OpenAI's, or nobody's, passes untouched."""
    assert body(OPENAI, line) == {"model": GPT, "messages": [USER], "store": False, **expected}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        pytest.param({}, "messages must be", id="no messages"),
        pytest.param({"messages": []}, "messages must be", id="empty messages"),
        pytest.param({"messages": ["hi"]}, "messages[0] must be an object", id="message is text"),
        pytest.param({"messages": [{"role": "alien", "content": ""}]}, "'alien'", id="unknown role"),
        pytest.param({"messages": [{"role": "user"}]}, "messages[0] has no content", id="no content"),
        pytest.param({"messages": [{"role": "assistant"}]}, "no tool_calls", id="neither content nor calls"),
        pytest.param({"messages": [{"role": "user", "content": 3}]}, "content must be", id="content is a number"),
        pytest.param(asks("hi"), "messages[1].content[0] must be an object", id="part is text"),
        pytest.param({"messages": [USER], "temperature": 2.1}, "temperature", id="too hot"),
        pytest.param({"messages": [USER], "temperature": True}, "temperature", id="temperature is true"),
        pytest.param({"messages": [USER], "temperature": "0"}, "temperature", id="temperature is text"),
        pytest.param({"messages": [USER], "temperature": float("nan")}, "temperature", id="temperature is NaN"),
        pytest.param({"messages": [USER], "max_tokens": 0}, "max_tokens", id="no tokens"),
        pytest.param({"messages": [USER], "max_tokens": True}, "max_tokens", id="tokens is true"),
        pytest.param({"messages": [USER], "max_tokens": 1.0}, "max_tokens", id="tokens is a float"),
        pytest.param(
            {"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2}, "max_", id="limits that differ"
        ),
        pytest.param({"messages": [USER], "system": 3}, "system must be", id="system is a number"),
        pytest.param({"messages": [USER], "system": [{"type": "image"}]}, "'image'", id="system is an image"),
        pytest.param({"messages": [USER], "stream": True}, "stream", id="stream"),
        pytest.param({"messages": [USER], "base_url": "http://evil"}, "base_url", id="base_url"),
        pytest.param({"messages": [USER], "api_key": "sk-1", "headers": {}}, "api_key, headers", id="api_key"),
        pytest.param({"messages": [USER], "tools": {}}, "tools must be a list", id="tools is an object"),
    ],
)
@pytest.mark.parametrize("protocol", list(Protocol), ids=str)
def test_line_is_checked_before_it_is_sent(protocol: Protocol, line: dict[str, Any], says: str) -> None:
    """A line that no provider takes is an error that names the field and what it holds."""
    with pytest.raises(LineError) as caught:
        body(protocol, line)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        pytest.param({"messages": [USER], "temperature": 1.5}, "0 to 1", id="temperature"),
        pytest.param({"messages": [SYSTEM]}, "only system messages", id="nothing but system"),
        pytest.param({"messages": [{**SYSTEM, "name": "x"}, USER]}, "messages[0].name", id="system name"),
        pytest.param(
            {"messages": [{"role": "system", "content": [{"type": "image"}]}, USER]},
            "'image'",
            id="system image",
        ),
        pytest.param({"messages": [USER, {"role": "developer", "content": "x"}]}, "developer", id="developer"),
        pytest.param({"messages": [{"role": "function", "content": "x"}]}, "'function'", id="function"),
        pytest.param({"messages": [{**USER, "name": "x"}]}, "messages[0].name", id="name"),
        pytest.param({"messages": [USER], "n": 2}, "n has no counterpart", id="n"),
        pytest.param({"messages": [USER], "seed": 1}, "seed", id="seed"),
        pytest.param({"messages": [USER], "logprobs": True}, "logprobs", id="logprobs"),
        pytest.param({"messages": [USER], "frequency_penalty": 0.1}, "frequency_penalty", id="penalty"),
        pytest.param({"messages": [USER], "store": True}, "store", id="store"),
        pytest.param({"messages": [USER], "verbosity": "low"}, "verbosity", id="verbosity"),
        pytest.param({"messages": [USER], "functions": []}, "functions", id="functions"),
        pytest.param({"messages": [USER], "service_tier": "flex"}, "'flex'", id="tier"),
        pytest.param({"messages": [USER], "reasoning_effort": "minimal"}, "'minimal'", id="effort"),
        pytest.param({"messages": [USER], "response_format": {"type": "json_object"}}, "json_object", id="json"),
        pytest.param({"messages": [USER], "user": "a", "safety_identifier": "b"}, "user_id", id="two users"),
        pytest.param({"messages": [USER], "stop": "a", "stop_sequences": ["b"]}, "stop_sequences", id="two stops"),
        pytest.param({"messages": [USER], "tools": [{"type": "custom", "custom": {}}]}, "tools[0]", id="custom"),
        pytest.param({"messages": [USER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", id="choice"),
        pytest.param(asks({"type": "input_audio"}), "'input_audio'", id="audio"),
        pytest.param(asks({"type": "text", "prompt_cache_breakpoint": {}}), "cache_control", id="breakpoint"),
        pytest.param({"messages": [USER], "parallel_tool_calls": "no"}, "true or false", id="parallel"),
        pytest.param(
            {"messages": [{"role": "tool", "content": "1", "tool_call_id": "c", "name": "f"}]},
            "messages[0].name",
            id="name of a tool",
        ),
        pytest.param(
            {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]},
            "'custom'",
            id="custom call",
        ),
        pytest.param(
            asks({"type": "image_url", "image_url": {"url": "https://x", "size": 1}}),
            "image_url.size",
            id="size",
        ),
        pytest.param(
            {
                "messages": [USER],
                "response_format": {"type": "json_schema", "json_schema": {"schema": {}, "description": "d"}},
            },
            "description",
            id="description of a schema",
        ),
        pytest.param(asks({"type": "file"}), "'file'", id="file"),
        pytest.param(asks({"type": "image_url", "image_url": {"url": "ftp://x"}}), "ftp://x", id="ftp"),
        pytest.param(
            asks({"type": "image_url", "image_url": {"url": "https://x", "detail": "low"}}),
            "detail",
            id="detail",
        ),
        pytest.param(
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            id="arguments",
        ),
    ],
)
def test_what_anthropic_cannot_say_is_an_error(line: dict[str, Any], says: str) -> None:
    """Nothing of a line is dropped in silence on its way to Anthropic."""
    with pytest.raises(LineError) as caught:
        body(ANTHROPIC, line)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        *(
            pytest.param({"messages": [USER], name: value}, name, id=name)
            for name, value in {
                "thinking": {"type": "adaptive"},
                "cache_control": {"type": "ephemeral"},
                "container": "c",
                "mcp_servers": [],
                "inference_geo": "us",
                "speed": "fast",
                "context_management": {},
                "output_config": {"task_budget": 1},
            }.items()
        ),
        pytest.param(asks({"type": "document"}), "'document'", id="document"),
        pytest.param({"messages": [{**USER, "cache_control": {}}]}, "messages[0].cache_control", id="message cache"),
        pytest.param(asks({"type": 3}), "type must be a string", id="type is a number"),
        pytest.param(asks({"type": "thinking"}, role="assistant"), "'thinking'", id="thinking block"),
        pytest.param(asks({"type": "text", "text": "", "cache_control": {"type": "e"}}), "cache_control", id="cache"),
        pytest.param(
            {"messages": [USER], "system": [{"type": "text", "text": "", "cache_control": {"type": "e"}}]},
            "system[0].cache_control",
            id="system cache",
        ),
        pytest.param(
            asks({"type": "tool_result", "tool_use_id": "c", "content": "", "is_error": True}),
            "is_error",
            id="is_error",
        ),
        pytest.param(
            asks({"type": "tool_result", "tool_use_id": "c", "content": [{"type": "image"}]}),
            "'image'",
            id="result",
        ),
        pytest.param(asks({"type": "image", "source": {"type": "file"}}), "'file'", id="image file"),
        pytest.param({"messages": [USER], "tools": [{"type": "bash_1", "name": "b"}]}, "'bash_1'", id="server tool"),
        pytest.param({"messages": [USER], "tools": [{**TOOL, "cache_control": {"a": 1}}]}, "cache_control", id="tool"),
        pytest.param(asks(TOOL_USE), "'tool_use'", id="a call of the user"),
    ],
)
def test_what_openai_cannot_say_is_an_error(line: dict[str, Any], says: str) -> None:
    """Nothing of a line is dropped in silence on its way to OpenAI."""
    with pytest.raises(LineError) as caught:
        body(OPENAI, line)
    assert says in caught.value.message


def test_text_from_a_line_cannot_act_in_an_error() -> None:
    """A field's name comes from outside: control characters do not reach an error message."""
    with pytest.raises(LineError) as caught:
        body(OPENAI, asks({"type": "image", "source": PNG, "a\x1b[2Jb": 1}))
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("protocol", list(Protocol), ids=str)
def test_defaults_fill_only_gaps(protocol: Protocol) -> None:
    """Defaults are for what a line does not say; without them no temperature and no system is injected."""
    defaults = {"temperature": 0.3, "max_tokens": 7, "system": "default"}
    own = {"messages": [SYSTEM, USER], "temperature": 0, "max_completion_tokens": 9}

    assert "temperature" not in body(protocol, {"messages": [USER]})
    assert body(protocol, own, **defaults) == body(protocol, own)
    filled = body(protocol, {"messages": [USER]}, **defaults)
    assert filled["temperature"] == 0.3
    assert providers.codec(protocol).max_output_tokens(filled) == 7
    assert b"default" in orjson.dumps(filled)


def test_max_tokens_of_anthropic() -> None:
    """Anthropic wants a limit: the line's own, else the default, else the endpoint's, else 4,096."""
    codec, plain = providers.codec(ANTHROPIC), endpoint(ANTHROPIC)
    line = {"messages": [USER]}

    assert codec.body(line, plain, RequestDefaults(), "m")["max_tokens"] == 4096
    assert codec.body(line, endpoint(ANTHROPIC, max_tokens=5), RequestDefaults(), "m")["max_tokens"] == 5
    assert codec.body(line, plain, RequestDefaults(max_tokens=6), "m")["max_tokens"] == 6
    assert codec.body({**line, "max_tokens": 7}, plain, RequestDefaults(max_tokens=6), "m")["max_tokens"] == 7


@pytest.mark.parametrize(
    ("model", "setting", "given", "sent"),
    [
        pytest.param("gpt-4o", "auto", "max_tokens", "max_tokens", id="gpt-4o"),
        pytest.param("gpt-4o", "auto", "max_completion_tokens", "max_completion_tokens", id="gpt-4o, newer name"),
        pytest.param("gpt-5", "auto", "max_tokens", "max_completion_tokens", id="gpt-5"),
        pytest.param("gpt-6.1-sol", None, "max_tokens", "max_completion_tokens", id="unset is auto"),
        pytest.param("o3-mini-2025-01-31", "auto", "max_tokens", "max_completion_tokens", id="dated o3-mini"),
        pytest.param("ft:o4-mini-2025-04-16:a::b", "auto", "max_tokens", "max_completion_tokens", id="fine-tuned"),
        pytest.param("gpt-35-turbo", "auto", "max_tokens", "max_tokens", id="Azure's name of gpt-3.5"),
        pytest.param("gpt-oss-120b", "auto", "max_tokens", "max_tokens", id="gpt-oss"),
        pytest.param("olmo-3", "auto", "max_tokens", "max_tokens", id="olmo"),
        pytest.param("m", "max_completion_tokens", "max_tokens", "max_completion_tokens", id="set by hand"),
        pytest.param("gpt-5", "max_tokens", "max_completion_tokens", "max_tokens", id="set to the older name"),
    ],
)
def test_name_of_the_token_limit(model: str, setting: str | None, given: str, sent: str) -> None:
    """The endpoint's setting names the field; `auto` goes by the model's name."""
    settings = endpoint(max_tokens_field=setting)
    result = providers.codec(OPENAI).body({"messages": [USER], given: 9}, settings, RequestDefaults(), model)

    assert result == {"model": model, "messages": [USER], sent: 9}


@pytest.mark.parametrize(
    ("base_url", "model", "role", "has_store"),
    [
        pytest.param("https://api.openai.com/v1", "gpt-6-luna", "developer", True, id="openai"),
        pytest.param("https://eu.api.openai.com/v1", "o3", "developer", True, id="regional"),
        pytest.param("https://api.openai.com/v1", "gpt-4o", "system", True, id="older model"),
        pytest.param("https://llm.example/v1", "gpt-6-luna", "system", False, id="compatible server"),
        pytest.param("https://api.openai.com.evil.example/v1", "gpt-5", "system", False, id="lookalike"),
    ],
)
def test_what_only_openai_itself_gets(base_url: str, model: str, role: str, has_store: bool) -> None:
    """The role `developer` and `store: false` go to OpenAI's own hosts only: others may refuse them."""
    settings = endpoint(base_url=base_url, store=False)
    line = {"messages": [USER], "system": "s"}
    result = providers.codec(OPENAI).body(line, settings, RequestDefaults(), model)

    assert result["messages"][0]["role"] == role
    assert ("store" in result) is has_store


def test_order_of_keys_is_that_of_the_line() -> None:
    """The model comes first, then the line's fields in their order, so equal lines have equal digests."""
    line = {"top_p": 1, "messages": [USER], "model": "ignored", "max_tokens": 3, "stop": "x"}

    assert list(body(ANTHROPIC, line)) == ["model", "top_p", "messages", "max_tokens", "stop_sequences"]
    assert list(body(OPENAI, line)) == [
        "model",
        "top_p",
        "messages",
        "max_completion_tokens",
        "stop",
        "store",
    ]


@pytest.mark.parametrize("protocol", list(Protocol), ids=str)
def test_own_dialect_is_only_checked_for_shape(protocol: Protocol) -> None:
    """A body in the provider's own dialect needs a model and messages, no stream, no route, and no more."""
    check = providers.codec(protocol).check_body
    good = {"model": "m", "messages": [{"role": "alien"}], "temperature": 99}

    check(good)
    for bad in (
        {"messages": [USER]},
        {"model": ""},
        {**good, "messages": []},
        {**good, "stream": True},
        {**good, "url": "x"},
    ):
        with pytest.raises(LineError):
            check(bad)


def test_max_output_tokens() -> None:
    """The bound is the body's own word, times the number of answers; without one there is none."""
    openai, anthropic = providers.codec(OPENAI), providers.codec(ANTHROPIC)

    assert anthropic.max_output_tokens({"max_tokens": 5}) == 5
    assert openai.max_output_tokens({"max_completion_tokens": 5, "n": 3}) == 15
    assert openai.max_output_tokens({"max_tokens": 5}) == 5
    assert openai.max_output_tokens({}) is None
    assert openai.max_output_tokens({"max_tokens": "5"}) is None
    assert anthropic.max_output_tokens({"max_tokens": True}) is None


# ── headers ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "key", "expected"),
    [
        pytest.param(
            endpoint(ANTHROPIC, headers={"Anthropic-Beta": "b"}),
            "k",
            {"x-api-key": "k", "anthropic-version": "2023-06-01", "anthropic-beta": "b"},
            id="anthropic",
        ),
        pytest.param(
            endpoint(ANTHROPIC, api_key_header="Authorization", version="2026-10-21"),
            "k",
            {"authorization": "Bearer k", "anthropic-version": "2026-10-21"},
            id="anthropic bearer",
        ),
        pytest.param(
            endpoint(OPENAI, organization="o", project="p"),
            "k",
            {"authorization": "Bearer k", "openai-organization": "o", "openai-project": "p"},
            id="openai",
        ),
        pytest.param(endpoint(OPENAI, api_key_header="api-key"), "k", {"api-key": "k"}, id="azure"),
        pytest.param(endpoint(OPENAI), None, {}, id="no key"),
    ],
)
def test_headers(settings: Endpoint, key: str | None, expected: dict[str, str]) -> None:
    """A request carries its key where the endpoint wants it, the protocol's own headers and the user's."""
    common = {
        "content-type": "application/json",
        "accept": "application/json",
        "user-agent": providers.USER_AGENT,
    }
    codec = providers.codec(Protocol(settings.protocol))

    assert dict(codec.headers(settings, key)) == {**common, **expected}


# ── answers to replies ────────────────────────────────────────────────────────────────────────────────────


def message(**changes: Any) -> dict[str, Any]:
    """An answer of Anthropic's."""
    return {
        "type": "message",
        "model": CLAUDE,
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 3, "output_tokens": 5},
        **changes,
    }


def completion(finish_reason: str = "stop", changes: dict[str, Any] | None = None, **said: Any) -> dict[str, Any]:
    """An answer of OpenAI's; `said` is in its message."""
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": "ab", **said},
    }
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    return {"object": "chat.completion", "model": GPT, "choices": [choice], "usage": usage, **(changes or {})}


def reply(protocol: Protocol, value: Any, headers: dict[str, str] | None = None) -> Completion:
    """The reply that a 200 with this JSON decodes to."""
    return providers.codec(protocol).decode(HttpResponse(status=200, headers=headers or {}, body=orjson.dumps(value)))


@pytest.mark.parametrize(
    ("protocol", "value", "expected"),
    [
        pytest.param(ANTHROPIC, message(), {"content": "ab", "finish_reason": "end_turn"}, id="texts join"),
        pytest.param(ANTHROPIC, message(content=[]), {"content": None}, id="an empty message"),
        pytest.param(ANTHROPIC, message(stop_reason="max_tokens"), {"truncated": True}, id="cut by max_tokens"),
        pytest.param(
            ANTHROPIC,
            message(stop_reason="model_context_window_exceeded"),
            {"truncated": True},
            id="cut by context",
        ),
        pytest.param(
            ANTHROPIC,
            message(stop_reason="refusal", stop_details={"category": "bio", "explanation": "no"}),
            {"refusal": "bio: no"},
            id="refusal with details",
        ),
        pytest.param(ANTHROPIC, message(stop_reason="refusal"), {"refusal": "refusal"}, id="refusal without"),
        pytest.param(
            ANTHROPIC,
            message(content=[{"type": "thinking"}, TOOL_USE, {"type": "server_tool_use", "id": "s", "name": "w"}]),
            {"content": None, "tool_calls": (ToolCall(id="c1", name="add", arguments={"a": 1}),)},
            id="calls of our tools only",
        ),
        pytest.param(ANTHROPIC, message(model=None), {"model": ""}, id="no model"),
        pytest.param(OPENAI, completion(), {"content": "ab", "finish_reason": "stop"}, id="text"),
        pytest.param(OPENAI, completion(content=[{"type": "text", "text": "x"}]), {"content": "x"}, id="parts"),
        pytest.param(OPENAI, completion("length", content=None), {"truncated": True, "content": None}, id="cut"),
        pytest.param(OPENAI, completion(refusal="no"), {"refusal": "no"}, id="refusal"),
        pytest.param(OPENAI, completion("content_filter"), {"refusal": "content_filter"}, id="filter"),
        pytest.param(
            OPENAI,
            completion(tool_calls=[CALL]),
            {"tool_calls": (ToolCall(id="c1", name="add", arguments={"a": 1}),)},
            id="call",
        ),
        pytest.param(
            OPENAI,
            completion(tool_calls=[{"id": "c", "function": {"name": "f", "arguments": '{"a":1,"a":2}'}}]),
            {"tool_calls": (ToolCall(id="c", name="f", arguments='{"a":1,"a":2}'),)},
            id="arguments that parsing would change stay text",
        ),
        pytest.param(
            OPENAI,
            completion(tool_calls=[{"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}]),
            {"tool_calls": (ToolCall(id="c", name="f", arguments="x"),)},
            id="custom tool",
        ),
        pytest.param(
            OPENAI,
            completion(function_call={"name": "f", "arguments": "{}"}),
            {"tool_calls": (ToolCall(id=None, name="f", arguments={}),)},
            id="legacy call",
        ),
        pytest.param(OPENAI, completion(changes={"error": None}), {"content": "ab"}, id="null error is none"),
    ],
)
def test_reply(protocol: Protocol, value: Any, expected: dict[str, Any]) -> None:
    """A valid 200 becomes a reply in the provider's own words, its body kept byte for byte."""
    result = reply(protocol, value)

    assert {name: getattr(result, name) for name in expected} == expected
    assert result.raw == orjson.dumps(value)


@pytest.mark.parametrize(
    ("protocol", "value", "expected"),
    [
        pytest.param(ANTHROPIC, message(), Usage(input_tokens=3, output_tokens=5), id="plain"),
        pytest.param(
            ANTHROPIC,
            message(
                usage={
                    "input_tokens": 10,
                    "output_tokens": 9,
                    "cache_creation_input_tokens": 30,
                    "cache_read_input_tokens": 40,
                    "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
                    "output_tokens_details": {"thinking_tokens": 4},
                    "server_tool_use": {"web_search_requests": 2, "web_fetch_requests": 3},
                    "service_tier": "standard",
                    "speed": "standard",
                }
            ),
            Usage(
                input_tokens=80,
                output_tokens=9,
                cache_read_tokens=40,
                cache_write_tokens=30,
                cache_write_1h_tokens=20,
                reasoning_tokens=4,
                web_searches=2,
                service_tier="standard",
            ),
            id="cached tokens are input too",
        ),
        pytest.param(
            ANTHROPIC,
            message(
                usage={
                    "input_tokens": 1,
                    "output_tokens": 1,
                    "cache_creation": {"ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": None},
                    "speed": "fast",
                    "service_tier": "standard",
                }
            ),
            Usage(input_tokens=3, output_tokens=1, cache_write_tokens=2, service_tier="fast"),
            id="the split alone; fast is a tier",
        ),
        pytest.param(ANTHROPIC, message(usage=None), None, id="null"),
        pytest.param(ANTHROPIC, message(usage={"output_tokens": 1}), None, id="half told"),
        pytest.param(
            OPENAI,
            completion(
                changes={
                    "service_tier": "flex",
                    "usage": {
                        "prompt_tokens": 80,
                        "completion_tokens": 9,
                        "prompt_tokens_details": {"cached_tokens": 40, "cache_write_tokens": 30},
                        "completion_tokens_details": {"reasoning_tokens": 4},
                    },
                }
            ),
            Usage(
                input_tokens=80,
                output_tokens=9,
                cache_read_tokens=40,
                cache_write_tokens=30,
                reasoning_tokens=4,
                service_tier="flex",
            ),
            id="prompt tokens have the cached ones inside",
        ),
        pytest.param(
            OPENAI,
            completion(changes={"usage": {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": None}}),
            Usage(input_tokens=1, output_tokens=2),
            id="null details",
        ),
        pytest.param(OPENAI, completion(changes={"usage": {}}), None, id="empty"),
    ],
)
def test_usage_is_normalised(protocol: Protocol, value: Any, expected: Usage | None) -> None:
    """Input counts cached tokens, output counts reasoning; what a server does not report is None, never 0."""
    assert reply(protocol, value).usage == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        pytest.param({"request-id": "req_1"}, "req_1", id="anthropic"),
        pytest.param({"x-request-id": "req_2"}, "req_2", id="openai"),
        pytest.param({"apim-request-id": "3"}, "3", id="azure"),
        pytest.param({}, None, id="none"),
    ],
)
def test_request_id_is_kept(headers: dict[str, str], expected: str | None) -> None:
    """The provider's name of a request is kept for its support."""
    assert reply(OPENAI, completion(), headers).request_id == expected


@pytest.mark.parametrize(
    ("written", "content"),
    [
        pytest.param(rb'"a\ud800b"', "a\ufffdb", id="lone surrogate"),
        pytest.param(b'"a\xffb"', "a\ufffdb", id="broken UTF-8"),
        pytest.param(b'"ab", "odd": [NaN, 1e999]', "ab", id="NaN and infinity beside the text"),
        pytest.param(rb'"a\u0000b"', "a\x00b", id="NUL"),
        pytest.param(b'"ab", "odd": 1' + b"0" * 400, "ab", id="an integer beyond every float"),
    ],
)
def test_paid_text_that_is_not_strict_json_is_kept(written: bytes, content: str) -> None:
    """What a strict parser refuses is still read; the raw body is then mended, to be stored as JSON."""
    body = b'{"choices":[{"message":{"content":' + written + b"}}]}"
    result = providers.codec(OPENAI).decode(HttpResponse(status=200, body=body))

    assert result.content == content
    orjson.loads(result.raw)


# ── answers to errors ─────────────────────────────────────────────────────────────────────────────────────

GARBAGE = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"3",
    "html": b"<html>Sign in</html>",
    "truncated": b'{"type":"message","content":[{"type":"te',
    "bytes": b"\x00\xff\x1b[2J",
    "empty object": b"{}",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("protocol", list(Protocol), ids=str)
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_in_a_200_is_tried_again(protocol: Protocol, garbage: bytes) -> None:
    """A 200 that holds no reply may be billed and may be tried again; the error shows what came."""
    error = fails(protocol, HttpResponse(status=200, headers={"content-type": "text/x"}, body=garbage))

    assert (error.type, error.scope, error.may_be_billed, error.status) == (
        "invalid_response",
        ErrorScope.ATTEMPT,
        True,
        200,
    )
    assert "text/x" in error.message
    assert error.message.isprintable()
    assert len(error.message) < 300


def usage_of(protocol: Protocol, **usage: Any) -> bytes:
    """The body of an answer with this usage, NaN and all."""
    return json.dumps(message(usage=usage) if protocol is ANTHROPIC else completion(changes={"usage": usage})).encode()


@pytest.mark.parametrize(
    ("protocol", "body"),
    [
        pytest.param(ANTHROPIC, usage_of(ANTHROPIC, input_tokens=-1, output_tokens=1), id="negative"),
        pytest.param(ANTHROPIC, usage_of(ANTHROPIC, input_tokens=1.0, output_tokens=1), id="float"),
        pytest.param(ANTHROPIC, usage_of(ANTHROPIC, input_tokens=True, output_tokens=1), id="true"),
        pytest.param(ANTHROPIC, usage_of(ANTHROPIC, input_tokens=float("nan"), output_tokens=1), id="NaN"),
        pytest.param(ANTHROPIC, usage_of(ANTHROPIC, input_tokens=10**10, output_tokens=1), id="huge"),
        pytest.param(
            ANTHROPIC,
            usage_of(
                ANTHROPIC,
                input_tokens=1,
                output_tokens=1,
                cache_creation_input_tokens=1,
                cache_creation={"ephemeral_1h_input_tokens": 2},
            ),
            id="more for 1h than written",
        ),
        pytest.param(ANTHROPIC, orjson.dumps(message(usage=[])), id="a list"),
        pytest.param(OPENAI, usage_of(OPENAI, prompt_tokens="3", completion_tokens=1), id="text"),
        pytest.param(
            OPENAI,
            usage_of(OPENAI, prompt_tokens=3, completion_tokens=1, prompt_tokens_details={"cached_tokens": 4}),
            id="more cached than input",
        ),
    ],
)
def test_usage_that_cannot_be_is_none(protocol: Protocol, body: bytes) -> None:
    """Numbers that no answer can have are not believed, and do not cost the answer, which is paid for."""
    reply = providers.codec(protocol).decode(HttpResponse(status=200, body=body))

    assert reply.usage is None
    assert reply.content


@pytest.mark.parametrize(
    ("protocol", "body"),
    [
        pytest.param(ANTHROPIC, orjson.dumps(message(content="ab")), id="content is text"),
        pytest.param(ANTHROPIC, orjson.dumps(message(content=[{"type": "text"}])), id="text without text"),
        pytest.param(ANTHROPIC, orjson.dumps(message(type="completion")), id="another type"),
        pytest.param(ANTHROPIC, orjson.dumps(completion()), id="openai's answer"),
        pytest.param(OPENAI, orjson.dumps({"choices": []}), id="no choices"),
        pytest.param(ANTHROPIC, orjson.dumps(message(content=[{"type": "tool_use"}])), id="call without name"),
        pytest.param(OPENAI, orjson.dumps(completion(tool_calls=[{"id": "c"}])), id="openai call without name"),
        pytest.param(OPENAI, orjson.dumps({"choices": [{"text": "x"}]}), id="no message"),
        pytest.param(OPENAI, orjson.dumps(completion(content={"a": 1})), id="content is an object"),
        pytest.param(OPENAI, orjson.dumps(completion(tool_calls="f")), id="calls are text"),
        pytest.param(
            OPENAI,
            json.dumps(completion()).encode()[:-1] + b',"extra":' + b"[" * 201 + b"]" * 201 + b"}",
            id="nested too deep to store",
        ),
    ],
)
def test_reply_that_breaks_its_protocol_is_no_success(protocol: Protocol, body: bytes) -> None:
    """A body that is not what the protocol promises is an invalid response."""
    error = fails(protocol, HttpResponse(status=200, body=body))

    assert (error.type, error.scope, error.may_be_billed) == ("invalid_response", ErrorScope.ATTEMPT, True)


@pytest.mark.parametrize("status", [201, 202, 204, 206, 299])
def test_other_success_is_none(status: int) -> None:
    """Only a 200 is an answer."""
    error = fails(OPENAI, HttpResponse(status=status, body=orjson.dumps(completion())))

    assert (error.type, error.status) == ("invalid_response", status)


@pytest.mark.parametrize(
    ("location", "says"),
    [
        pytest.param("https://evil.example/v1?key=1", "'evil.example'", id="other host"),
        pytest.param("/v2/messages", "'/v2/messages'", id="same host"),
        pytest.param("https://[bad", "[bad", id="no URL"),
    ],
)
def test_redirect_ends_the_run(location: str, says: str) -> None:
    """A redirect is not followed: it would carry key and text elsewhere. The error says to mend base_url."""
    error = fails(ANTHROPIC, HttpResponse(status=307, headers={"location": location}))

    assert (error.type, error.scope, error.status) == ("redirect", ErrorScope.RUN, 307)
    assert says in error.message
    assert "base_url" in error.message


def anthropic_error(type: str, text: str = "m", code: str | None = None) -> dict[str, Any]:
    """An error in Anthropic's form."""
    details = {"details": {"error_code": code}} if code else {}
    return {"type": "error", "error": {"type": type, "message": text, **details}, "request_id": "req_body"}


@pytest.mark.parametrize(
    ("status", "value", "scope"),
    [
        pytest.param(400, anthropic_error("invalid_request_error"), "request", id="bad request"),
        pytest.param(
            400,
            anthropic_error("invalid_request_error", "You have reached your specified API usage limits."),
            "run",
            id="own spend limit",
        ),
        pytest.param(
            400,
            anthropic_error("invalid_request_error", "Your credit balance is too low to access the API."),
            "run",
            id="no credit",
        ),
        pytest.param(401, anthropic_error("authentication_error"), "run", id="key"),
        pytest.param(402, anthropic_error("billing_error"), "run", id="billing"),
        pytest.param(403, anthropic_error("permission_error"), "run", id="permission"),
        pytest.param(403, "<html>blocked</html>", "request", id="a firewall's page"),
        pytest.param(404, anthropic_error("not_found_error", "model: claude-9"), "model", id="model"),
        pytest.param(404, anthropic_error("not_found_error", "File not found: file_1"), "request", id="file"),
        pytest.param(408, anthropic_error("timeout_error"), "attempt", id="408"),
        pytest.param(409, anthropic_error("conflict_error"), "attempt", id="409"),
        pytest.param(413, anthropic_error("request_too_large"), "request", id="too large"),
        pytest.param(422, anthropic_error("invalid_request_error"), "request", id="422"),
        pytest.param(425, {}, "attempt", id="425"),
        pytest.param(429, anthropic_error("rate_limit_error"), "attempt", id="rate limit"),
        pytest.param(429, anthropic_error("rate_limit_error", code="ramp_limit_exceeded"), "attempt", id="ramp"),
        pytest.param(
            429,
            anthropic_error("rate_limit_error", code="enforced_spend_limit_reached"),
            "run",
            id="monthly cap",
        ),
        pytest.param(
            429,
            anthropic_error("rate_limit_error", code="contract_spend_limit_reached"),
            "run",
            id="contract cap",
        ),
        pytest.param(500, anthropic_error("api_error"), "attempt", id="500"),
        pytest.param(502, "<html>Bad Gateway</html>", "attempt", id="gateway"),
        pytest.param(529, anthropic_error("overloaded_error"), "attempt", id="overloaded"),
        pytest.param(200, anthropic_error("overloaded_error"), "attempt", id="overloaded in a 200"),
        pytest.param(200, anthropic_error("authentication_error"), "run", id="key in a 200"),
        pytest.param(200, anthropic_error("invalid_request_error"), "request", id="bad request in a 200"),
        pytest.param(200, anthropic_error("brand_new_error"), "attempt", id="unknown in a 200"),
    ],
)
def test_reach_of_anthropic_errors(status: int, value: Any, scope: str) -> None:
    """How far an error of Anthropic's reaches: by its type and code, then by its status."""
    body = value.encode() if isinstance(value, str) else orjson.dumps(value)
    error = fails(ANTHROPIC, HttpResponse(status=status, body=body))

    assert (error.scope, error.status) == (ErrorScope(scope), status)
    assert pickle.loads(pickle.dumps(error)).scope is error.scope


def openai_error(type: str | None = None, code: Any = None, text: str = "m") -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": text, "type": type, "param": None, "code": code}}


TOO_LARGE = "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 45000."


@pytest.mark.parametrize(
    ("status", "value", "scope"),
    [
        pytest.param(400, openai_error("invalid_request_error", "context_length_exceeded"), "request", id="400"),
        pytest.param(400, openai_error("invalid_request_error", "model_not_found"), "model", id="model in a 400"),
        pytest.param(401, openai_error("invalid_request_error", "invalid_api_key"), "run", id="key"),
        pytest.param(402, openai_error(None, 402), "run", id="openrouter credits"),
        pytest.param(403, openai_error("request_forbidden", "unsupported_country"), "run", id="country"),
        pytest.param(403, openai_error("invalid_request_error", "model_not_found"), "model", id="model in a 403"),
        pytest.param(403, openai_error(None, 403, "Your input was flagged"), "request", id="openrouter moderation"),
        pytest.param(404, openai_error("invalid_request_error", "model_not_found"), "model", id="model"),
        pytest.param(404, openai_error(None, "DeploymentNotFound"), "model", id="azure deployment"),
        pytest.param(404, {"detail": "Not Found"}, "model", id="wrong path"),
        pytest.param(413, openai_error(), "request", id="413"),
        pytest.param(429, openai_error("requests", "rate_limit_exceeded"), "attempt", id="rate limit"),
        pytest.param(429, openai_error("rate_limit_error", "slow_down"), "attempt", id="slow down"),
        pytest.param(429, openai_error("tokens", "rate_limit_exceeded", TOO_LARGE), "request", id="never fits"),
        pytest.param(429, openai_error("insufficient_quota", "credit_balance_exhausted"), "run", id="credit"),
        pytest.param(429, openai_error("insufficient_quota", "insufficient_quota"), "run", id="quota"),
        pytest.param(429, openai_error(None, "organization_spend_limit_exceeded"), "run", id="spend limit"),
        pytest.param(429, openai_error("limit", None, "INSUFFICIENT QUOTA"), "attempt", id="words are no codes"),
        pytest.param(503, openai_error("service_unavailable_error", "server_is_overloaded"), "attempt", id="503"),
        pytest.param(520, "error code: 520", "attempt", id="cdn"),
        pytest.param(200, openai_error(None, 502), "attempt", id="openrouter 502 in a 200"),
        pytest.param(200, openai_error(None, 402), "run", id="openrouter 402 in a 200"),
        pytest.param(200, openai_error("invalid_request_error", None), "request", id="bad request in a 200"),
        pytest.param(
            200,
            {"choices": [{"error": {"code": 400, "message": "m"}}]},
            "request",
            id="openrouter error in a choice",
        ),
    ],
)
def test_reach_of_openai_errors(status: int, value: Any, scope: str) -> None:
    """How far an error of OpenAI's or a compatible server's reaches: by type and code, then by its status."""
    body = value.encode() if isinstance(value, str) else orjson.dumps(value)
    error = fails(OPENAI, HttpResponse(status=status, body=body))

    assert (error.scope, error.status) == (ErrorScope(scope), status)


@pytest.mark.parametrize(
    ("status", "wish", "scope"),
    [
        pytest.param(500, "false", "request", id="not again"),
        pytest.param(400, "true", "attempt", id="again"),
        pytest.param(401, "true", "run", id="a bad key stays bad"),
        pytest.param(404, "true", "model", id="a missing model stays missing"),
        pytest.param(429, "maybe", "attempt", id="no word"),
    ],
)
def test_server_says_whether_to_try_again(status: int, wish: str, scope: str) -> None:
    """`x-should-retry` decides between one more attempt and none, but never revives a run or a model."""
    error = fails(OPENAI, HttpResponse(status=status, headers={"x-should-retry": wish}, body=b"{}"))

    assert error.scope is ErrorScope(scope)


@pytest.mark.parametrize(
    ("value", "type", "code", "text"),
    [
        pytest.param(anthropic_error("x_error", "bad", "c"), "x_error", "c", "bad", id="anthropic"),
        pytest.param(openai_error("x", "c", "bad"), "x", "c", "bad", id="openai"),
        pytest.param(
            {"error": {"code": 400, "message": "bad", "metadata": {}}},
            "http_400",
            None,
            "bad",
            id="openrouter",
        ),
        pytest.param({"error": "bad"}, "http_400", None, "bad", id="ollama"),
        pytest.param({"object": "error", "message": "bad", "type": "T", "code": 400}, "T", None, "bad", id="vllm"),
        pytest.param({"detail": "bad"}, "http_400", None, "bad", id="fastapi"),
        pytest.param(
            {"detail": [{"loc": ["body", "messages"], "msg": "required", "type": "missing"}, 3]},
            "http_400",
            None,
            "body.messages: required; 3",
            id="fastapi validation",
        ),
        pytest.param(
            [{"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}}],
            "INVALID_ARGUMENT",
            None,
            "bad",
            id="gemini",
        ),
        pytest.param({"statusCode": 400, "message": "bad"}, "http_400", None, "bad", id="azure gateway"),
    ],
)
@pytest.mark.parametrize("protocol", list(Protocol), ids=str)
def test_errors_of_every_shape_are_understood(protocol: Protocol, value: Any, type: str, code: Any, text: str) -> None:
    """Whatever shape a server gives its errors, type, code and message are found."""
    error = fails(protocol, HttpResponse(status=400, body=orjson.dumps(value)))

    assert (error.type, error.code, error.message) == (type, code, text)


def test_error_without_json_shows_what_came() -> None:
    """A page instead of JSON is named by its status, with the beginning of it."""
    page = b"<html>\r\n<title>502</title>" + b"x" * 5000
    error = fails(OPENAI, HttpResponse(status=502, headers={"content-type": "text/html"}, body=page))

    assert error.type == "http_502"
    assert "text/html" in error.message
    assert "<html> <title>502" in error.message
    assert len(error.message) < 300


def test_error_says_which_request_and_when_to_come_back() -> None:
    """Request id (of the header, else of the body) and the hint to wait are part of the error."""
    body = orjson.dumps(anthropic_error("rate_limit_error"))
    error = fails(ANTHROPIC, HttpResponse(status=429, headers={"retry-after": "7", "request-id": "req_h"}, body=body))

    assert (error.request_id, error.retry_after) == ("req_h", 7)
    assert fails(ANTHROPIC, HttpResponse(status=429, body=body)).request_id == "req_body"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        pytest.param("Incorrect API key provided: sk-abcd****wxyz.", "provided: sk-…", id="masked key"),
        pytest.param("key sk-ant-api03-AbC_d-9 is bad", "key sk-… is bad", id="anthropic key"),
        pytest.param("Authorization: Bearer eyJh.eyJz.s-_c", "Bearer …", id="bearer token"),
        pytest.param("a\x1b[31mred\x07\r\nb", "a [31mred b", id="escapes"),
        pytest.param("a\u202eb\u200bc", "a b c", id="direction marks"),
        pytest.param("task-based risk-free", "task-based risk-free", id="no key"),
    ],
)
def test_text_from_outside_cannot_act_and_holds_no_key(said: str, kept: str) -> None:
    """Messages lose control characters and anything that looks like a key."""
    error = fails(OPENAI, HttpResponse(status=400, body=orjson.dumps(openai_error("x", None, said))))

    assert kept in error.message
    assert "AbC" not in error.message
    assert "abcd" not in error.message


def test_messages_are_capped() -> None:
    """No server can fill a disk with its messages."""
    error = fails(
        OPENAI, HttpResponse(status=400, body=orjson.dumps(openai_error("t" * 9999, "c" * 9999, "m" * 99999)))
    )

    assert len(error.message) == 2000
    assert len(error.type) == 200
    assert len(error.code or "") == 200


@pytest.mark.parametrize(("protocol", "is_sent"), [(ANTHROPIC, True), (OPENAI, False)], ids=["sent", "not sent"])
def test_lost_answer(protocol: Protocol, is_sent: bool) -> None:
    """An answer that never came is the provider's error; it may be billed only if the request went out."""
    lost = providers.codec(protocol).lost(TransportError("late", type="timeout", is_sent=is_sent))

    assert type(lost) is ERRORS[protocol]
    assert (lost.type, lost.scope, lost.may_be_billed) == ("timeout", ErrorScope.ATTEMPT, is_sent)


DATE = "Sun, 22 Nov 2026 02:40:00 GMT"
LATER = "Sun, 22 Nov 2026 02:41:30 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        pytest.param({}, None, id="none"),
        pytest.param({"retry-after": "7"}, 7, id="seconds"),
        pytest.param({"retry-after": " 0.5 "}, 0.5, id="fraction"),
        pytest.param({"retry-after": "86400"}, 86400, id="no ceiling"),
        pytest.param({"retry-after": "7", "retry-after-ms": "1500"}, 1.5, id="milliseconds first"),
        pytest.param({"retry-after": "7", "retry-after-ms": "x"}, 7, id="bad milliseconds"),
        pytest.param({"retry-after": LATER, "date": DATE}, 90, id="date"),
        pytest.param({"retry-after": LATER}, None, id="date without the server's clock"),
        pytest.param({"retry-after": DATE, "date": LATER}, None, id="date that is past"),
        pytest.param({"retry-after": "Sun, 22 Nov 99999 02:41:30 GMT", "date": DATE}, None, id="year 99999"),
        pytest.param({"retry-after": "Sun, 45 Nov 2026 02:41:30 GMT", "date": DATE}, None, id="45 November"),
        *(
            pytest.param({"retry-after": text}, None, id=text)
            for text in ("0", "-1", "nan", "inf", "1e400", "1, 2", "soon", "1_0", "٣", "0x10")
        ),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    """A hint to wait counts when it is finite and positive; anything else is no hint."""
    assert retry_after(headers) == seconds


# ── names of models ───────────────────────────────────────────────────────────────────────────────────────


def test_provider_of_a_model() -> None:
    """The model's name tells the provider; a user's own endpoint comes before the built-in ones."""
    own = {"vllm": {"protocol": "openai", "base_url": "https://llm.example/v1", "models": ["gpt-oss-*"]}}
    config = Config.model_validate({"providers": own})

    assert providers.provider_of("claude-haiku-5-5", config) == "anthropic"
    assert providers.provider_of("o4-mini", config) == "openai"
    assert providers.provider_of("gpt-oss-120b", config) == "vllm"
    assert providers.provider_of("llama-4", config) is None
    assert providers.provider_of("Claude-haiku", config) is None


@pytest.mark.parametrize(
    ("protocol", "model", "content", "expected"),
    [
        pytest.param(OPENAI, "gpt-6-luna", "a" * 400, 100, id="openai: 4 bytes"),
        pytest.param(OPENAI, "llama-4", "語" * 100, 75, id="chinese: 3 bytes each"),
        pytest.param(ANTHROPIC, "claude-sonnet-4-5-20250929", "a" * 340, 100, id="claude to 4.6: 3.4"),
        pytest.param(ANTHROPIC, "claude-3-5-sonnet-20241022", "a" * 340, 100, id="claude 3.5"),
        pytest.param(ANTHROPIC, "claude-opus-4-20250514", "a" * 340, 100, id="claude 4, dated"),
        pytest.param(ANTHROPIC, "claude-opus-4-7", "a" * 250, 100, id="claude from 4.7: 2.5"),
        pytest.param(ANTHROPIC, "our-claude", "a" * 250, 100, id="unknown behind anthropic"),
        pytest.param(OPENAI, "anthropic/claude-haiku-5-5", "a" * 250, 100, id="claude behind openai's protocol"),
        pytest.param(
            OPENAI, "m", [{"type": "image_url", "image_url": {"url": "data:" + "x" * 9999}}], 1500, id="image"
        ),
        pytest.param(ANTHROPIC, "m", [{"type": "document", "source": {**PNG, "data": "x" * 9999}}], 1500, id="pdf"),
        pytest.param(
            ANTHROPIC,
            "m",
            [{"type": "document", "source": {"type": "text", "data": "a" * 250}}],
            100,
            id="document of text",
        ),
        pytest.param(
            ANTHROPIC,
            "m",
            [{"type": "document", "source": {"type": "content", "content": "a" * 250}}],
            100,
            id="document of blocks",
        ),
        pytest.param(
            ANTHROPIC,
            "m",
            [{"type": "tool_use", "input": {"a": "x" * 192}}],
            100,
            id="arguments of a call",
        ),
        pytest.param(OPENAI, "m", [3, {"type": "text", "text": None}], 0, id="malformed parts count nothing"),
        pytest.param(
            ANTHROPIC,
            "m",
            [{"type": "tool_result", "content": [{"type": "text", "text": "a" * 250}]}],
            100,
            id="result",
        ),
    ],
)
def test_estimate_of_input_tokens(protocol: Protocol, model: str, content: Any, expected: int) -> None:
    """Text counts by bytes and family of the model, media flat; 4 for each message and 3 for the request."""
    body = {"messages": [{"role": "user", "content": content}]}

    assert providers.estimate_input_tokens(body, protocol, model) == expected + 7


def test_what_is_beside_the_text_counts() -> None:
    """System, tools and calls count too; JSON is denser than prose, and what is no message counts nothing."""
    plain = {"messages": [USER]}
    few = providers.estimate_input_tokens(plain, OPENAI, GPT)

    assert providers.estimate_input_tokens({**plain, "system": "a" * 400}, OPENAI, GPT) == few + 100
    tools = [{"name": "x" * 307}]
    assert providers.estimate_input_tokens({**plain, "tools": tools}, OPENAI, GPT) == few + 100
    calls = {"messages": [USER, {"role": "assistant", "tool_calls": tools}]}
    assert providers.estimate_input_tokens(calls, OPENAI, GPT) == few + 104
    assert providers.estimate_input_tokens({"messages": [USER, 3]}, OPENAI, GPT) == few


# ── properties ────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = st.text(max_size=20)
CONVERSATIONS = st.builds(
    lambda system, turns: {
        **({"system": system} if system else {}),
        "messages": [{"role": "user", "content": "q"}, *turns],
    },
    st.none() | TEXTS.filter(bool),
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS}), max_size=5),
)


@given(CONVERSATIONS)
def test_conversation_of_text_is_the_same_for_both(line: dict[str, Any]) -> None:
    """A conversation of plain text keeps roles, texts, system, whoever gets it; the line is not changed."""
    before = copy.deepcopy(line)
    anthropic, openai = body(ANTHROPIC, line), body(OPENAI, line)

    assert line == before
    assert anthropic["messages"] == line["messages"]
    assert anthropic.get("system") == line.get("system")
    system = [{"role": "developer", "content": line["system"]}] if "system" in line else []
    assert openai["messages"] == [*system, *line["messages"]]


@given(CONVERSATIONS)
def test_way_to_openai_and_back(line: dict[str, Any]) -> None:
    """A conversation that went to OpenAI's form comes back from it unchanged in Anthropic's."""
    there = body(OPENAI, line)
    there.pop("store")

    assert body(ANTHROPIC, there) == body(ANTHROPIC, line)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def some(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these fields, each as it should be or anything else."""
    return st.fixed_dictionaries({}, optional={name: known | JSON for name, known in fields.items()})


WORDS = st.sampled_from(["", "text", "image_url", "image", "tool_use", "tool_result", "function", "{}", "{", "auto"])
PARTS = some(
    type=WORDS,
    text=TEXTS,
    image_url=some(url=WORDS),
    source=some(type=WORDS, data=TEXTS),
    id=TEXTS,
    name=TEXTS,
    input=some(a=TEXTS),
    tool_use_id=TEXTS,
    content=st.lists(some(type=WORDS, text=TEXTS), max_size=2),
)
MESSAGES = st.lists(
    some(
        role=st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
        content=TEXTS | st.lists(PARTS, max_size=3),
        tool_calls=st.lists(some(id=TEXTS, function=some(name=TEXTS, arguments=WORDS)), max_size=2),
        tool_call_id=TEXTS,
    ),
    max_size=3,
)
LINES = some(
    messages=MESSAGES,
    system=TEXTS | st.lists(PARTS, max_size=2),
    tools=st.lists(some(type=WORDS, name=TEXTS, function=some(name=TEXTS), input_schema=some(a=TEXTS)), max_size=2),
    tool_choice=WORDS | some(type=WORDS, name=TEXTS, function=some(name=TEXTS)),
    parallel_tool_calls=st.booleans(),
    response_format=some(type=WORDS, json_schema=some(schema=some(a=TEXTS))),
    output_config=some(effort=WORDS, format=some(schema=some(a=TEXTS))),
    stop=WORDS,
    user=TEXTS,
    service_tier=WORDS,
    max_tokens=st.integers(0, 9),
)


@pytest.mark.parametrize("protocol", list(Protocol), ids=str)
@given(line=LINES)
def test_any_line_is_a_body_or_a_line_error(protocol: Protocol, line: dict[str, Any]) -> None:
    """Whatever a line holds, encoding ends in a body or in a `LineError`, and every body can be estimated."""
    try:
        result = body(protocol, line)
    except LineError:
        return
    assert providers.estimate_input_tokens(result, protocol, GPT) >= 3


COUNTS = st.integers(-1, 50)
ANSWERS = some(
    type=st.sampled_from(["message", "error"]),
    error=TEXTS | some(type=TEXTS, message=TEXTS, code=COUNTS),
    detail=TEXTS,
    model=TEXTS,
    content=st.lists(PARTS, max_size=3),
    stop_reason=st.sampled_from(["end_turn", "refusal"]),
    choices=st.lists(some(message=some(content=TEXTS, tool_calls=st.lists(PARTS, max_size=2))), max_size=2),
    usage=some(
        input_tokens=COUNTS,
        output_tokens=COUNTS,
        cache_read_input_tokens=COUNTS,
        prompt_tokens=COUNTS,
        completion_tokens=COUNTS,
        prompt_tokens_details=some(cached_tokens=COUNTS),
    ),
)


@pytest.mark.parametrize("protocol", list(Protocol), ids=str)
@given(
    status=st.sampled_from([200, 200, 200, 204, 302, 400, 401, 404, 429, 500, 529]),
    headers=st.dictionaries(
        st.sampled_from(["retry-after", "date", "location", "x-should-retry"]), st.text(max_size=9)
    ),
    body=st.binary(max_size=30) | ANSWERS.map(orjson.dumps),
)
def test_any_answer_is_a_reply_or_a_provider_error(
    protocol: Protocol, status: int, headers: dict[str, str], body: bytes
) -> None:
    """Whatever comes back, decoding ends in a reply or in the provider's error, its message on one line."""
    try:
        result = providers.codec(protocol).decode(HttpResponse(status=status, headers=headers, body=body))
    except ProviderError as exc:
        error = exc
    else:
        assert status == 200
        assert result.usage is None or result.usage.total_tokens >= 0
        return
    assert type(error) is ERRORS[protocol]
    assert error.type
    assert error.message.isprintable()
