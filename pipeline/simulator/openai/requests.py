"""OpenAI's requests: who sends them, what is wrong with them, what they ask for.

The wording of the errors follows the provider's; programs should only read their types and codes.
"""

import re

from pipeline.simulator.answers import count_tokens, text_of
from pipeline.simulator.openai.errors import invalid
from pipeline.simulator.types import Body, HeaderMap, Problem, Prompt, Tool

_ROLES = ("system", "assistant", "user", "function", "tool", "developer")
_PARTS = ("text", "image_url", "input_audio", "refusal", "audio", "file")
# Shut on 2026-10-23 or before; their dated snapshots too.
_GONE = re.compile(r"unknown|missing|(gpt-3\.5-turbo|gpt-4|gpt-4-.*|gpt-4\.1-nano|o1|o1-.*|o[34]-mini)(-\d.*)?$")
_REASONING = re.compile(r"o\d|gpt-([5-9]|\d\d)")
_FIXED_SAMPLING = re.compile(r"o\d|gpt-5(-mini|-nano)?(-\d{4}.*)?$|gpt-5\.[6-9]|gpt-([6-9]|\d\d)")
_CACHE_WRITES = re.compile(r"gpt-5\.[6-9]|gpt-([6-9]|\d\d)")


_MAX_TOKENS = 128_000  # of the current models; older ones allow less


def key(headers: HeaderMap) -> str | None:
    """Read the key from `authorization`, or from `api-key` as Azure's clients send it."""
    bearer = headers.get(b"authorization", b"")
    raw = bearer[7:] if bearer[:7].lower() == b"bearer " else headers.get(b"api-key", b"")
    return raw.decode("latin-1").strip() or None


def check(headers: HeaderMap, body: object) -> Problem | None:
    """Find the first thing wrong with a request for a completion."""
    if not isinstance(body, dict):
        return invalid("Invalid type: expected an object as the request body.", code="invalid_type")
    return (
        _check_model(body)
        or _check_messages(body)
        or _check_limits(body)
        or _check_number(body, "temperature", 0, 2)
        or _check_number(body, "top_p", 0, 1)
        or _check_sampling(body)
        or _check_integer(body, "n", 1, 128)
        or _check_tools(body)
        or _check_stream(body)
    )


def _check_model(body: Body) -> Problem | None:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        return invalid("you must provide a model parameter")
    if is_gone(model):
        message = f"The model `{model}` does not exist or you do not have access to it."
        return invalid(message, code="model_not_found", status=404)
    return None


def is_gone(model: str) -> bool:
    """Say whether there is no such model, or no longer."""
    return _GONE.match(model) is not None


def _check_messages(body: Body) -> Problem | None:
    messages = body.get("messages")
    if messages is None:
        message = "Missing required parameter: 'messages'."
        return invalid(message, param="messages", code="missing_required_parameter")
    if not isinstance(messages, list):
        return _wrong_type("messages", "an array of objects")
    if not messages:
        message = "Invalid 'messages': empty array. Expected an array with minimum length 1."
        return invalid(message, param="messages", code="empty_array")
    return next((wrong for at, each in enumerate(messages) if (wrong := _check_message(at, each))), None)


def _check_message(at: int, message: object) -> Problem | None:
    place = f"messages[{at}]"
    if not isinstance(message, dict):
        return _wrong_type(place, "an object")
    role = message.get("role")
    if role not in _ROLES:
        return _wrong_value(f"{place}.role", role, _ROLES)
    content = message.get("content")
    if isinstance(content, list) and content:
        wrong = (_check_part(f"{place}.content[{index}]", part) for index, part in enumerate(content))
        return next((each for each in wrong if each), None)
    # An assistant's message may have no content beside its tool calls or refusal.
    if isinstance(content, str) or (content is None and role == "assistant"):
        return None
    return _wrong_type(f"{place}.content", "one of a string or array of objects")


def _check_part(place: str, part: object) -> Problem | None:
    if not isinstance(part, dict):
        return _wrong_type(place, "an object")
    if part.get("type") not in _PARTS:
        return _wrong_value(f"{place}.type", part.get("type"), _PARTS)
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        return _wrong_type(f"{place}.text", "a string")
    return None


def _check_limits(body: Body) -> Problem | None:
    if "max_tokens" in body and _REASONING.match(body["model"]):
        message = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return invalid(message, param="max_tokens", code="unsupported_parameter")
    names = ("max_tokens", "max_completion_tokens")
    return next((wrong for name in names if (wrong := _check_integer(body, name, 1, _MAX_TOKENS))), None)


def _check_sampling(body: Body) -> Problem | None:
    for name in ("temperature", "top_p"):
        value = body.get(name, 1)
        if value in (1, None):
            continue
        effort = body.get("reasoning_effort") or "none"
        if _FIXED_SAMPLING.match(body["model"]) or (effort != "none" and _REASONING.match(body["model"])):
            message = (
                f"Unsupported value: '{name}' does not support {value} with this model. "
                "Only the default (1) value is supported."
            )
            return invalid(message, param=name, code="unsupported_value")
    return None


def _check_integer(body: Body, name: str, low: int, high: int) -> Problem | None:
    value = body.get(name)
    if value is not None and type(value) is not int:
        return _wrong_type(name, "an integer")
    return _check_range(name, value, "integer", low, high)


def _check_number(body: Body, name: str, low: float, high: float) -> Problem | None:
    value = body.get(name)
    if value is not None and type(value) not in (int, float):
        return _wrong_type(name, "a decimal")
    return _check_range(name, value, "decimal", low, high)


def _check_range(name: str, value: float | None, kind: str, low: float, high: float) -> Problem | None:
    if value is None or low <= value <= high:
        return None
    side, sign, bound = ("below", ">=", low) if value < low else ("above", "<=", high)
    extreme = "minimum" if side == "below" else "maximum"
    message = (
        f"Invalid '{name}': {kind} {side} {extreme} value. Expected a value {sign} {bound}, but got {value} instead."
    )
    return invalid(message, param=name, code=f"{kind}_{side}_{extreme[:3]}_value")


def _check_tools(body: Body) -> Problem | None:
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return _wrong_type("tools", "an array of objects")
    choice = body.get("tool_choice")
    if choice in (None, "none", "auto"):
        return None
    if not tools:
        message = "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified."
        return invalid(message, param="tool_choice")
    if _forced_tool(body) is None:
        return _wrong_value("tool_choice", choice, ("none", "auto", "required"))
    return None


def _check_stream(body: Body) -> Problem | None:
    message = "Unsupported value: 'stream' is true, but this simulator does not stream; leave it out."
    return invalid(message, param="stream", code="unsupported_value") if body.get("stream") else None


def _wrong_type(place: str, expected: str) -> Problem:
    message = f"Invalid type for '{place}': expected {expected}."
    return invalid(message, param=place, code="invalid_type")


def _wrong_value(place: str, value: object, allowed: tuple[str, ...]) -> Problem:
    names = ", ".join(f"'{name}'" for name in allowed)
    message = f"Invalid value: {value!r}. Supported values are: {names}."
    return invalid(message, param=place, code="invalid_value")


def prompt(body: Body) -> Prompt:
    """Read a request that `check` found nothing wrong with."""
    messages = body["messages"]
    model = body["model"]
    texts = [text_of(message.get("content")) for message in messages]
    said = [text for text, message in zip(texts, messages, strict=True) if message["role"] == "user"]
    return Prompt(
        model=model,
        text="\n".join(said),
        input_tokens=count_tokens(texts, body.get("tools"), len(messages)),
        max_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
        tool=_forced_tool(body),
        schema=_json_schema(body),
        choices=body.get("n") or 1,
        reasons=bool(_REASONING.match(model)) and body.get("reasoning_effort") != "none",
        cache_writes=bool(_CACHE_WRITES.match(model)),
    )


def _forced_tool(body: Body) -> Tool | None:
    match body.get("tool_choice"):
        case "required":
            wanted = None
        case {"type": "function", "function": {"name": str(wanted)}}:
            pass
        case _:
            return None
    for tool in body["tools"]:
        match tool:
            case {"function": {"name": str(name)} as function} if wanted in (None, name):
                return Tool(name=name, schema=function.get("parameters") or {})
    return None


def _json_schema(body: Body) -> Body | None:
    match body.get("response_format"):
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return schema
        case {"type": "json_object" | "json_schema"}:
            return {}
    return None
