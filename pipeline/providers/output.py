"""Write a completion as the response object of a protocol, whichever protocol it came from."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import orjson

from pipeline.core import jsonl
from pipeline.core.types import Completion, Result

_ANTHROPIC_STOP = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
_OPENAI_STOP = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


def own_or_rewritten(
    result: Result, completion: Completion, mark: str, rewrite: Callable[[Result, Completion], dict[str, Any]]
) -> Any:
    """Return the provider's own object if it has the key `mark`, which only one protocol has; else rewrite it."""
    # Parsing every response costs more than this search.
    if f'"{mark}"'.encode() in completion.raw and mark in orjson.loads(completion.raw):
        return orjson.Fragment(jsonl.one_line(completion.raw))
    return rewrite(result, completion)


def as_chat_completion(result: Result, completion: Completion) -> dict[str, Any]:
    """Return an OpenAI chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": completion.content, "refusal": completion.refusal}
    if completion.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": jsonl.dumps(call.arguments).decode()},
            }
            for call in completion.tool_calls
        ]
    finish = _OPENAI_STOP.get(completion.finish_reason or "", completion.finish_reason)
    body: dict[str, Any] = {
        "id": _response_id(completion),
        "object": "chat.completion",
        "created": int(datetime.fromisoformat(result.completed_at).timestamp()),
        "model": result.model,
        "choices": [{"index": 0, "finish_reason": finish, "logprobs": None, "message": message}],
    }
    usage = completion.usage
    if usage:
        body["usage"] = {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cache_read_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        }
    return body


def as_message(result: Result, completion: Completion) -> dict[str, Any]:
    """Return an Anthropic message."""
    content: list[dict[str, Any]] = [{"type": "text", "text": completion.content}] if completion.content else []
    content += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments}
        for call in completion.tool_calls
    ]
    message: dict[str, Any] = {
        "id": _response_id(completion),
        "type": "message",
        "role": "assistant",
        "model": result.model,
        "content": content,
        "stop_reason": _ANTHROPIC_STOP.get(completion.finish_reason or "", completion.finish_reason),
        "stop_sequence": None,
    }
    if completion.refusal is not None:
        message["stop_reason"] = "refusal"
        message["stop_details"] = {"type": "refusal", "category": None, "explanation": completion.refusal}
    usage = completion.usage
    if usage:
        message["usage"] = {
            "input_tokens": usage.input_tokens - usage.cache_read_tokens - usage.cache_write_tokens,
            "output_tokens": usage.output_tokens,
            "cache_creation_input_tokens": usage.cache_write_tokens,
            "cache_read_input_tokens": usage.cache_read_tokens,
        }
    return message


def _response_id(completion: Completion) -> Any:
    return orjson.loads(completion.raw).get("id")
