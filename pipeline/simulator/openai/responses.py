"""OpenAI's successes: chat completions, the list of models."""

import orjson

from pipeline.simulator.types import Answer, Body, Completion, Identity, Prompt, Usage

_FINISH_REASONS = {"end": "stop", "length": "length", "tool": "tool_calls", "refusal": "stop"}
_SNAPSHOTS = {
    "gpt-4o": "gpt-4o-2024-08-06",
    "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
    "gpt-4.1": "gpt-4.1-2025-04-14",
    "gpt-4.1-mini": "gpt-4.1-mini-2025-04-14",
    "gpt-5": "gpt-5-2025-08-07",
    "gpt-5-mini": "gpt-5-mini-2025-08-07",
}
_MODELS = ("gpt-6-luna", "gpt-6-sol", "gpt-5.4-mini", "gpt-4o", "gpt-4o-mini")
_TIERS = ("flex", "priority", "scale")


def answer_body(body: Body, prompt: Prompt, completion: Completion, identity: Identity) -> bytes:
    """Encode a completion."""
    tier = body.get("service_tier")
    return orjson.dumps(chat_completion(prompt, completion, identity, tier if tier in _TIERS else "default"))


def chat_completion(prompt: Prompt, completion: Completion, identity: Identity, tier: str) -> dict[str, object]:
    """Return a completion; the model named is the snapshot that a bare name stands for."""
    return {
        "id": f"chatcmpl-{identity.id}",
        "object": "chat.completion",
        "created": identity.created,
        "model": _SNAPSHOTS.get(prompt.model, prompt.model),
        "choices": [_choice(index, answer, identity) for index, answer in enumerate(completion.answers)],
        "usage": _usage(completion.usage),
        "service_tier": tier,
        "system_fingerprint": "fp_simulator",
    }


def _choice(index: int, answer: Answer, identity: Identity) -> dict[str, object]:
    message: dict[str, object] = {"role": "assistant", "content": None, "refusal": None, "annotations": []}
    if answer.finish == "refusal":
        message["refusal"] = answer.text
    elif answer.tool:
        function = {"name": answer.tool.name, "arguments": answer.text}
        call_id = f"call_{identity.id}{index}"
        message["tool_calls"] = [{"id": call_id, "type": "function", "function": function}]
    else:
        message["content"] = answer.text
    finish = _FINISH_REASONS[answer.finish]
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cache_read_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def models_body() -> bytes:
    """Encode a list of a few current models."""
    models = [{"id": name, "object": "model", "created": 1_767_225_600, "owned_by": "openai"} for name in _MODELS]
    return orjson.dumps({"object": "list", "data": models})
