"""A portable line -> the body of an Anthropic message.

Fields in Anthropic's own shape, and fields that neither provider knows, pass unchanged. Fields in OpenAI's shape are
translated. A field that cannot be translated is a `LineError` that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.core import jsonl
from pipeline.core.errors import LineError
from pipeline.providers.validation import LEADING_ROLES, items, mapping, no_counterpart, put, shown, text, without

_NAME = "Anthropic"
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_CHOICES = {"auto": "auto", "none": "none", "required": "any", "any": "any"}
_TIERS = {"auto": "auto", "standard_only": "standard_only", "default": "standard_only"}
_NO_PARAMETERS = {"type": "object", "properties": {}}

# Fields without a counterpart. The listed values ask for nothing, so they can be dropped.
_FOREIGN_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": (),
    "functions": (),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "seed": (),
    "store": (False,),
    "stream_options": (),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
_FOREIGN_PARTS = ("input_audio", "file", "refusal")
# In a message copied from an earlier response these are null or empty, and can be dropped.
_FOREIGN_MESSAGE_FIELDS = ("name", "refusal", "audio", "function_call", "annotations")


def translate(line: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return the body of a checked line."""
    body: dict[str, Any] = {"model": model}
    for name, value in line.items():
        if name in _FIELDS:
            for target, part in _FIELDS[name](value).items():
                put(body, target, part)
        elif name in _FOREIGN_FIELDS:
            if value not in _FOREIGN_FIELDS[name]:
                raise no_counterpart(name, _NAME)
        elif name != "model":
            put(body, name, value)
    systems = _leading_systems(line["messages"])
    if systems:
        if "system" in line:
            systems.insert(0, line["system"])
        body["system"] = _joined(systems)
    if "tool_choice" in body:
        body["tool_choice"] = _completed_choice(body["tool_choice"])
    return body


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────


def _count_leading(messages: list[dict[str, Any]]) -> int:
    """Return how many system messages come before all others."""
    for index, message in enumerate(messages):
        if message["role"] not in LEADING_ROLES:
            return index
    return len(messages)


def _leading_systems(messages: list[dict[str, Any]]) -> list[Any]:
    """Return the contents of the leading system messages."""
    leading = messages[: _count_leading(messages)]
    for index, message in enumerate(leading):
        for name, value in message.items():
            if value and name not in ("role", "content"):
                raise no_counterpart(f"messages[{index}].{name}", _NAME)
    return [message["content"] for message in leading]


def _joined(systems: list[Any]) -> Any:
    """Join system texts with blank lines. If one is a list of blocks, all become blocks."""
    if all(isinstance(system, str) for system in systems):
        return "\n\n".join(systems)
    blocks: list[dict[str, Any]] = []
    for system in systems:
        if isinstance(system, str):
            blocks.append({"type": "text", "text": system})
        else:
            blocks += system
    for block in blocks:
        if block.get("type") != "text":
            raise LineError(f"a system message can only hold text for Anthropic, not {shown(block.get('type'))}")
    return blocks


def _messages(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Translate the messages after the leading system messages. Consecutive tool results share a user message."""
    first = _count_leading(messages)
    if first == len(messages):
        raise LineError("messages holds only system messages; add a message with the role user")
    turns: list[dict[str, Any]] = []
    is_after_tool = False
    for index, message in enumerate(messages[first:], start=first):
        where = f"messages[{index}]"
        is_tool = message["role"] == "tool"
        if is_tool and is_after_tool:
            turns[-1]["content"].append(_tool_result(message, where))
        elif is_tool:
            turns.append({"role": "user", "content": [_tool_result(message, where)]})
        else:
            turns.append(_turn(message, where))
        is_after_tool = is_tool
    return {"messages": turns}


def _turn(message: dict[str, Any], where: str) -> dict[str, Any]:
    content = message.get("content")
    # The usual message, a role and a text, needs no copy.
    if isinstance(content, str) and len(message) == 2 and message["role"] != "developer":
        return message
    if message["role"] == "developer":
        raise no_counterpart(f"{where}.role 'developer' in mid-conversation", _NAME, "put it first, or use system")
    for name in _FOREIGN_MESSAGE_FIELDS:
        if message.get(name):
            raise no_counterpart(f"{where}.{name}", _NAME)
    turn = without(message, *_FOREIGN_MESSAGE_FIELDS, "tool_calls")
    given = message.get("tool_calls")
    if not given:
        turn["content"] = _parts(content, where)
        return turn
    calls = items(given, f"{where}.tool_calls")
    blocks: list[dict[str, Any]] = []
    # Anthropic refuses an empty text block, so empty content adds none.
    if isinstance(content, str) and content:
        blocks.append({"type": "text", "text": content})
    elif content:
        blocks += _parts(content, where)
    for index, call in enumerate(calls):
        blocks.append(_tool_use(call, f"{where}.tool_calls[{index}]"))
    turn["content"] = blocks
    return turn


def _parts(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    return [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]


def _part(part: dict[str, Any], where: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind in _FOREIGN_PARTS:
        raise no_counterpart(f"{where}, a part of type {kind!r},", _NAME)
    if "prompt_cache_breakpoint" in part:
        raise no_counterpart(f"{where}.prompt_cache_breakpoint", _NAME, "use cache_control")
    if kind == "image_url":
        return _image(part, where)
    return part


def _image(part: dict[str, Any], where: str) -> dict[str, Any]:
    image = mapping(part.get("image_url"), f"{where}.image_url")
    if image.get("detail") not in (None, "auto"):
        raise no_counterpart(f"{where}.image_url.detail", _NAME, "remove it, or say 'auto'")
    for name in image:
        if name not in ("url", "detail"):
            raise no_counterpart(f"{where}.image_url.{name}", _NAME)
    source = _image_source(text(image.get("url"), f"{where}.image_url.url"), where)
    return {"type": "image", "source": source, **without(part, "type", "image_url")}


def _image_source(url: str, where: str) -> dict[str, Any]:
    if url.startswith(("https://", "http://")):
        return {"type": "url", "url": url}
    header, _, data = url.partition(",")
    media_type = header.removeprefix("data:").removesuffix(";base64")
    if header != f"data:{media_type};base64" or not media_type or ";" in media_type or not data:
        raise LineError(f"{where}.image_url.url must be http(s)://… or data:image/…;base64,…, not {shown(url)}")
    return {"type": "base64", "media_type": media_type, "data": data}


def _tool_use(call: dict[str, Any], where: str) -> dict[str, Any]:
    if call.get("type", "function") != "function":
        raise no_counterpart(f"{where}, a call of type {shown(call.get('type'))},", _NAME)
    function = mapping(call.get("function"), f"{where}.function")
    return {
        "type": "tool_use",
        "id": text(call.get("id"), f"{where}.id"),
        "name": text(function.get("name"), f"{where}.function.name"),
        "input": _arguments(function.get("arguments"), f"{where}.function.arguments"),
        **without(call, "type", "id", "function"),
    }


def _arguments(value: Any, where: str) -> dict[str, Any]:
    """Return the arguments of a call. For a tool without parameters they may be an empty string."""
    if not isinstance(value, str):
        return mapping(value, where)
    try:
        return mapping(jsonl.loads(value.encode("utf-8", "surrogatepass") or b"{}"), where)
    except LineError as exc:
        raise LineError(f"{where} is not a JSON object: {exc.message}") from exc


def _tool_result(message: dict[str, Any], where: str) -> dict[str, Any]:
    if message.get("name"):
        raise no_counterpart(f"{where}.name", _NAME)
    return {
        "type": "tool_result",
        "tool_use_id": text(message.get("tool_call_id"), f"{where}.tool_call_id"),
        "content": _parts(message["content"], where),
        **without(message, "role", "tool_call_id", "content", "name"),
    }


# ── other fields ────────────────────────────────────────────────────────────────────────────────────────


def _tools(tools: Any) -> dict[str, Any]:
    if not isinstance(tools, list):
        raise LineError(f"tools must be a list, not {shown(tools)}")
    translated: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        translated.append(_tool(mapping(tool, where), where))
    return {"tools": translated}


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if "custom" in tool:
        raise no_counterpart(f"{where}, a tool with free-form input,", _NAME)
    if "function" not in tool:
        return tool
    function = mapping(tool["function"], f"{where}.function")
    strict: dict[str, Any] = {}
    if function.get("strict") is not None:
        strict["strict"] = function["strict"]
    return {
        "name": text(function.get("name"), f"{where}.function.name"),
        **without(function, "name", "parameters", "strict"),
        "input_schema": function.get("parameters") or _NO_PARAMETERS,
        **strict,
        **without(tool, "type", "function"),
    }


def _tool_choice(value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and value.get("type") == "function":
        function = mapping(value.get("function"), "tool_choice.function")
        return {"tool_choice": {"type": "tool", "name": text(function.get("name"), "tool_choice.function.name")}}
    if isinstance(value, dict) and value.get("type") in ("auto", "any", "tool", "none"):
        return {"tool_choice": value}
    if isinstance(value, str) and value in _CHOICES:
        return {"tool_choice": {"type": _CHOICES[value]}}
    raise no_counterpart(f"tool_choice {shown(value)}", _NAME)


def _parallel_tool_calls(value: Any) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise LineError(f"parallel_tool_calls must be true or false, not {shown(value)}")
    # Parallel calls are Anthropic's default, too.
    if value:
        return {}
    return {"tool_choice": {"disable_parallel_tool_use": True}}


def _completed_choice(choice: dict[str, Any]) -> dict[str, Any]:
    """Add the type that `parallel_tool_calls` leaves open. Without tools, drop the choice about parallel calls."""
    choice = {"type": "auto", **choice}
    if choice["type"] == "none":
        return without(choice, "disable_parallel_tool_use")
    return choice


def _response_format(value: Any) -> dict[str, Any]:
    kind = mapping(value, "response_format").get("type")
    if kind == "text":
        return {}
    if kind != "json_schema":
        raise no_counterpart(f"response_format of type {shown(kind)}", _NAME, "use json_schema")
    given = mapping(value.get("json_schema"), "response_format.json_schema")
    if given.get("description"):
        raise no_counterpart("response_format.json_schema.description", _NAME, "put it into the schema")
    schema = mapping(given.get("schema"), "response_format.json_schema.schema")
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


def _reasoning_effort(value: Any) -> dict[str, Any]:
    if value not in _EFFORTS:
        raise no_counterpart(f"reasoning_effort {shown(value)}", _NAME, f"use one of {', '.join(_EFFORTS)}")
    return {"output_config": {"effort": value}}


def _stop(value: Any) -> dict[str, Any]:
    # OpenAI takes one sequence as a string, too.
    if isinstance(value, str):
        value = [value]
    return {"stop_sequences": value}


def _service_tier(value: Any) -> dict[str, Any]:
    if not isinstance(value, str) or value not in _TIERS:
        raise no_counterpart(f"service_tier {shown(value)}", _NAME, f"use one of {', '.join(_TIERS)}")
    return {"service_tier": _TIERS[value]}


_FIELDS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "messages": _messages,
    "max_completion_tokens": lambda value: {"max_tokens": value},
    "parallel_tool_calls": _parallel_tool_calls,
    "reasoning_effort": _reasoning_effort,
    "response_format": _response_format,
    "safety_identifier": lambda value: {"metadata": {"user_id": value}},
    "service_tier": _service_tier,
    "stop": _stop,
    "tool_choice": _tool_choice,
    "tools": _tools,
    "user": lambda value: {"metadata": {"user_id": value}},
}
