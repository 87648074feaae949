"""Anthropic's successes: messages, counted tokens, the list of models."""

import orjson

from pipeline.simulator.types import Answer, Body, Completion, Identity, Prompt, Usage

_STOP_REASONS = {"end": "end_turn", "length": "max_tokens", "tool": "tool_use", "refusal": "refusal"}
_MODELS = ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "claude-haiku-4-5")


def answer_body(body: Body, prompt: Prompt, completion: Completion, identity: Identity) -> bytes:
    """Encode a message."""
    return orjson.dumps(message(prompt, completion, identity, "standard"))


def message(prompt: Prompt, completion: Completion, identity: Identity, tier: str) -> dict[str, object]:
    """Return a message, with the one answer that this API gives; `tier` is how it is billed."""
    answer = completion.answers[0]
    return {
        "id": f"msg_{identity.id}",
        "type": "message",
        "role": "assistant",
        "model": prompt.model,
        "content": _content(answer, identity),
        "stop_reason": _STOP_REASONS[answer.finish],
        "stop_sequence": None,
        "stop_details": _stop_details(answer),
        "container": None,
        "diagnostics": None,
        "usage": {**_usage(completion.usage), "service_tier": tier},
    }


def _content(answer: Answer, identity: Identity) -> list[dict[str, object]]:
    if answer.finish == "refusal":
        return []
    blocks: list[dict[str, object]] = []
    if answer.reasoning_tokens:
        blocks.append({"type": "thinking", "thinking": "", "signature": identity.id})
    if answer.tool:
        # Arguments that were cut short are no object any more, and `input` must be one.
        arguments = orjson.loads(answer.text) if answer.finish == "tool" else {}
        tool_id = f"toolu_{identity.id}"
        blocks.append({"type": "tool_use", "id": tool_id, "name": answer.tool.name, "input": arguments})
    elif answer.text:
        blocks.append({"type": "text", "text": answer.text, "citations": None})
    return blocks


def _stop_details(answer: Answer) -> dict[str, object] | None:
    if answer.finish != "refusal":
        return None
    return {"type": "refusal", "category": "general_harms", "explanation": answer.text}


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.input_tokens - usage.cache_read_tokens - usage.cache_write_tokens,
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cache_read_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": usage.cache_write_tokens,
            "ephemeral_1h_input_tokens": 0,
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "server_tool_use": None,
    }


def count_body(prompt: Prompt) -> bytes:
    """Encode the answer of `count_tokens`."""
    return orjson.dumps({"input_tokens": prompt.input_tokens})


def models_body() -> bytes:
    """Encode a list of a few current models."""
    models = [
        {"type": "model", "id": name, "display_name": name, "created_at": "2026-01-01T00:00:00Z"} for name in _MODELS
    ]
    page = {"data": models, "has_more": False, "first_id": _MODELS[0], "last_id": _MODELS[-1]}
    return orjson.dumps(page)
