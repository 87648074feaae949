"""The official SDKs as judges: what we send fits their request types, what we read they read the same.

The SDKs' `TypedDict`s are looser than the providers (`Iterable` is checked lazily, unknown keys pass), so
`_exact` makes them exact first: lists for iterables, no unknown keys.
"""

from __future__ import annotations

import collections.abc
import types
import typing
from itertools import product
from typing import Any, NotRequired, Required, Union, get_args, get_origin

import anthropic.types
import openai.types.chat
import orjson
import pydantic
import pytest
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from typing_extensions import TypedDict, get_type_hints, is_typeddict

from pipeline import providers
from pipeline.core.config import Config
from pipeline.core.types import HttpResponse, Protocol

CONFIG = Config()
MODELS = {Protocol.ANTHROPIC: "claude-haiku-5-5", Protocol.OPENAI: "gpt-6-luna"}
_MADE: dict[Any, Any] = {}
_NEW_DICT: Any = TypedDict  # pydantic wants that of typing_extensions; mypy knows no dynamic ones


def _exact(kind: Any) -> Any:
    """Return a type that means the same and is checked to the bottom."""
    if is_typeddict(kind):
        return _exact_dict(kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin is collections.abc.Iterable:
        return list[_exact(args[0])]  # type: ignore[misc]
    if origin in (Required, NotRequired):
        return origin[_exact(args[0])]
    if origin is typing.Annotated:
        return _exact(args[0])
    if origin in (Union, types.UnionType):
        kept = tuple(_exact(arg) for arg in args if not _is_model(arg))
        return Union[kept] if kept else typing.Literal["nothing"]  # noqa: UP007
    if origin in (list, collections.abc.Sequence):
        return list[_exact(args[0])]  # type: ignore[misc]
    return str if origin is typing.IO or kind is typing.IO[bytes] else kind  # a file to upload: not JSON


def _exact_dict(kind: Any) -> Any:
    if kind not in _MADE:
        hints = get_type_hints(kind, include_extras=True)
        required = kind.__required_keys__
        fields = {
            name: (Required if name in required else NotRequired)[_exact(_bare(hint))] for name, hint in hints.items()
        }
        made = _NEW_DICT(kind.__name__, fields)
        made.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)
        _MADE[kind] = made
    return _MADE[kind]


def _is_model(kind: Any) -> bool:
    """Tell the models of answers, which the SDK takes in requests too and which let every key pass."""
    return isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) in (Required, NotRequired) else hint


REQUESTS = {
    Protocol.ANTHROPIC: pydantic.TypeAdapter(_exact(MessageCreateParamsNonStreaming)),
    Protocol.OPENAI: pydantic.TypeAdapter(_exact(CompletionCreateParamsNonStreaming)),
}
PNG = "iVBORw0KGgo="
CHAT = [{"role": "user", "content": "hi"}]
FUNCTION = {
    "type": "function",
    "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}},
}
TOOL = {"name": "add", "description": "adds", "input_schema": {"type": "object", "properties": {}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
IMAGE_URL = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}
BLOCKS_OF_A_CALL = [
    {"type": "text", "text": "let me add"},
    {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}},
]
RESULT_BLOCK = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "1"}]}
OPENAI_TOOL_TURNS = [
    *CHAT,
    {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "1"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "2"}]},
]
ANTHROPIC_TOOL_TURNS = [
    *CHAT,
    {"role": "assistant", "content": BLOCKS_OF_A_CALL},
    {"role": "user", "content": [RESULT_BLOCK, {"type": "text", "text": "go on"}]},
]

LINES: dict[str, dict[str, Any]] = {
    "text": {"messages": CHAT},
    "turns": {"messages": [*CHAT, {"role": "assistant", "content": "hello"}, *CHAT]},
    "system field": {"messages": CHAT, "system": "be brief"},
    "system blocks": {
        "messages": CHAT,
        "system": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    },
    "system message": {"messages": [{"role": "system", "content": "be brief"}, *CHAT]},
    "developer message": {"messages": [{"role": "developer", "content": "be brief"}, *CHAT]},
    "system parts": {"messages": [{"role": "system", "content": [{"type": "text", "text": "a"}]}, *CHAT]},
    "system twice": {"messages": [{"role": "system", "content": "b"}, *CHAT], "system": "a"},
    "later system": {"messages": [*CHAT, {"role": "system", "content": "now in French"}]},
    "max_tokens": {"messages": CHAT, "max_tokens": 10},
    "max_completion_tokens": {"messages": CHAT, "max_completion_tokens": 10},
    "sampling": {"messages": CHAT, "temperature": 0.5, "top_p": 0.9},
    "integer temperature": {"messages": CHAT, "temperature": 1},
    "stop text": {"messages": CHAT, "stop": "END"},
    "stop list": {"messages": CHAT, "stop": ["END", "STOP"]},
    "stop_sequences": {"messages": CHAT, "stop_sequences": ["END"]},
    "text parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    "image block": {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "what?"}]}]},
    "image_url part": {"messages": [{"role": "user", "content": [IMAGE_URL]}]},
    "image link": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}],
            }
        ]
    },
    "image block link": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "source": {"type": "url", "url": "https://a.example/b"}}],
            }
        ]
    },
    "openai tools": {"messages": CHAT, "tools": [FUNCTION], "tool_choice": "required"},
    "openai one tool": {
        "messages": CHAT,
        "tools": [FUNCTION],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "parallel_tool_calls": False,
    },
    "openai no tool": {
        "messages": CHAT,
        "tools": [FUNCTION],
        "tool_choice": "none",
        "parallel_tool_calls": False,
    },
    "bare function": {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "now"}}]},
    "anthropic tools": {"messages": CHAT, "tools": [TOOL], "tool_choice": {"type": "any"}},
    "anthropic one tool": {
        "messages": CHAT,
        "tools": [{**TOOL, "strict": True}],
        "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": True},
    },
    "openai tool turns": {"messages": OPENAI_TOOL_TURNS, "tools": [FUNCTION]},
    "anthropic tool turns": {"messages": ANTHROPIC_TOOL_TURNS, "tools": [TOOL]},
    "answer copied": {
        "messages": [
            *CHAT,
            {"role": "assistant", "content": "hello", "refusal": None, "annotations": []},
            *CHAT,
        ]
    },
    "response_format": {
        "messages": CHAT,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
        },
    },
    "plain response_format": {"messages": CHAT, "response_format": {"type": "text"}},
    "output_config": {
        "messages": CHAT,
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    },
    "reasoning_effort": {"messages": CHAT, "reasoning_effort": "high"},
    "service_tier": {"messages": CHAT, "service_tier": "auto"},
    "no-ops and nulls": {"messages": CHAT, "n": None, "stop": None, "stream": False, "tools": None},
}
NOT_TYPED = {
    # Left as written: the SDK's type of a message to send has no `annotations`.
    (Protocol.OPENAI, "answer copied"),
    # Gone from the SDK's types with API version 2026-10-21; we send 2023-06-01, which has them.
    (Protocol.ANTHROPIC, "sampling"),
    (Protocol.ANTHROPIC, "integer temperature"),
}


TYPED = [(name, protocol) for name, protocol in product(LINES, Protocol) if (protocol, name) not in NOT_TYPED]


@pytest.mark.parametrize(("name", "protocol"), TYPED)
def test_body_fits_the_type_of_the_official_sdk(name: str, protocol: Protocol) -> None:
    """What a codec makes of a portable line is a request of the official SDK, to the last key."""
    body = providers.codec(protocol).body(LINES[name], CONFIG.providers[protocol], CONFIG.request, MODELS[protocol])
    REQUESTS[protocol].validate_python(body)


@pytest.mark.parametrize("protocol", list(Protocol), ids=str)
def test_the_judge_is_awake(protocol: Protocol) -> None:
    """A field that the provider does not know, deep in a message, is refused by the exact types."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "a", "nonsense": 1}]}]
    with pytest.raises(pydantic.ValidationError):
        REQUESTS[protocol].validate_python({"model": "m", "max_tokens": 1, "messages": messages})


MESSAGE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-haiku-5-5",
    "content": [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "one "},
        {"type": "text", "text": "two"},
        {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 10,
        "output_tokens": 20,
        "cache_creation_input_tokens": 30,
        "cache_read_input_tokens": 40,
        "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
        "output_tokens_details": {"thinking_tokens": 5},
        "service_tier": "standard",
    },
}
COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-6-luna",
    "service_tier": "default",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "logprobs": None,
            "message": {"role": "assistant", "content": "one two", "refusal": None, "tool_calls": [CALL]},
        }
    ],
    "usage": {
        "prompt_tokens": 80,
        "completion_tokens": 20,
        "total_tokens": 100,
        "prompt_tokens_details": {"cached_tokens": 40, "cache_write_tokens": 30},
        "completion_tokens_details": {"reasoning_tokens": 5},
    },
}


def test_anthropic_sdk_reads_the_same_message() -> None:
    """Texts, calls and token counts of a message are those that the SDK's own model holds."""
    theirs = anthropic.types.Message.model_validate(MESSAGE)
    ours = providers.codec(Protocol.ANTHROPIC).decode(HttpResponse(status=200, body=orjson.dumps(MESSAGE)))

    assert ours.content == "".join(block.text for block in theirs.content if block.type == "text")
    assert [(call.id, call.name, call.arguments) for call in ours.tool_calls] == [
        (block.id, block.name, block.input) for block in theirs.content if block.type == "tool_use"
    ]
    assert (ours.model, ours.finish_reason) == (theirs.model, theirs.stop_reason)
    assert ours.usage is not None
    written, read = theirs.usage.cache_creation_input_tokens, theirs.usage.cache_read_input_tokens
    assert ours.usage.input_tokens == theirs.usage.input_tokens + (written or 0) + (read or 0) == 80
    assert (ours.usage.cache_write_tokens, ours.usage.cache_read_tokens) == (written, read)
    assert ours.usage.output_tokens == theirs.usage.output_tokens
    assert theirs.usage.cache_creation is not None
    assert ours.usage.cache_write_1h_tokens == theirs.usage.cache_creation.ephemeral_1h_input_tokens
    assert theirs.usage.output_tokens_details is not None
    assert ours.usage.reasoning_tokens == theirs.usage.output_tokens_details.thinking_tokens


def test_openai_sdk_reads_the_same_completion() -> None:
    """Text, calls and token counts of a completion are those that the SDK's own model holds."""
    theirs = openai.types.chat.ChatCompletion.model_validate(COMPLETION)
    ours = providers.codec(Protocol.OPENAI).decode(HttpResponse(status=200, body=orjson.dumps(COMPLETION)))

    choice = theirs.choices[0]
    assert (ours.content, ours.finish_reason) == (choice.message.content, choice.finish_reason)
    call = (choice.message.tool_calls or [])[0]
    assert call.type == "function"
    assert ours.tool_calls[0].id == call.id
    assert ours.tool_calls[0].arguments == orjson.loads(call.function.arguments)
    assert theirs.usage is not None
    assert ours.usage is not None
    assert (ours.usage.input_tokens, ours.usage.output_tokens, ours.usage.total_tokens) == (
        theirs.usage.prompt_tokens,
        theirs.usage.completion_tokens,
        theirs.usage.total_tokens,
    )
    details = theirs.usage.prompt_tokens_details
    assert details is not None
    assert ours.usage.cache_read_tokens == details.cached_tokens
    assert ours.usage.cache_write_tokens == details.cache_write_tokens
    assert theirs.usage.completion_tokens_details is not None
    assert ours.usage.reasoning_tokens == theirs.usage.completion_tokens_details.reasoning_tokens
    assert ours.usage.service_tier == theirs.service_tier
