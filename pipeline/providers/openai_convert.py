"""A portable line -> the body of an OpenAI chat completion.

Fields in OpenAI's own shape, and fields that neither provider knows, pass unchanged. Fields in Anthropic's shape are
translated. A field that cannot be translated is a `LineError` that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from pipeline.core import jsonl
from pipeline.core.errors import LineError
from pipeline.providers.validation import LIMIT_FIELDS, items, mapping, no_counterpart, put, shown, text, without

_NAME = "OpenAI"
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# Fields without a counterpart. The listed values ask for nothing, so they can be dropped.
_FOREIGN_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "cache_control": (),
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": (),
    "speed": ("standard",),
    "thinking": (),
}
_FOREIGN_PARTS = frozenset(
    {
        "bash_code_execution_tool_result",
        "code_execution_tool_result",
        "container_upload",
        "document",
        "mcp_tool_result",
        "mcp_tool_use",
        "redacted_thinking",
        "search_result",
        "server_tool_use",
        "text_editor_code_execution_tool_result",
        "thinking",
        "web_fetch_tool_result",
        "web_search_tool_result",
    }
)
_FOREIGN_PART_FIELDS = ("cache_control", "citations")
_TRANSLATED_PARTS = frozenset({"image", "tool_use", "tool_result"})
# o1, o3-mini, gpt-5, gpt-5.6-sol, gpt-6-luna, ft:o4-mini-2025-04-16:acme::x; not gpt-4o, Azure's gpt-35-turbo
_REASONING = re.compile(r"(?:ft:)?(?:o[0-9]|gpt-(?:[5-9]|[12][0-9]))(?![0-9a-z])")


@lru_cache(maxsize=1024)
def is_reasoning(model: str) -> bool:
    """Return True for reasoning models (o-series, GPT-5 on), which need `max_completion_tokens` and `developer`."""
    return _REASONING.match(model) is not None


def translate(line: Mapping[str, Any], model: str, *, limit_field: str | None, system_role: str) -> dict[str, Any]:
    """Return the body of a checked line. `limit_field` None keeps the name of the token limit."""
    body: dict[str, Any] = {"model": model}
    for name, value in line.items():
        if name in LIMIT_FIELDS:
            put(body, limit_field or _given_limit_field(line), value)
        elif name in _FIELDS:
            for target, part in _FIELDS[name](value).items():
                put(body, target, part)
        elif name in _FOREIGN_FIELDS:
            if value not in _FOREIGN_FIELDS[name]:
                raise no_counterpart(name, _NAME)
        elif name not in ("model", "system"):
            put(body, name, value)
    system = line.get("system")
    if system:
        content = system if isinstance(system, str) else _parts(system, "system")
        # OpenAI has no field for the system text. It is the first message.
        body["messages"] = [{"role": system_role, "content": content}, *body["messages"]]
    return body


def _given_limit_field(line: Mapping[str, Any]) -> str:
    """Return the name of the token limit in a line. The newer name wins if a line has both."""
    older, newer = LIMIT_FIELDS
    if newer in line:
        return newer
    return older


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────


def _messages(messages: list[dict[str, Any]]) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if "cache_control" in message:
            raise no_counterpart(f"messages[{index}].cache_control", _NAME)
        if isinstance(content, list) and not all(map(_is_own, content)):
            turns += _translated(message, f"messages[{index}]")
        else:
            turns.append(message)
    return {"messages": turns}


def _is_own(part: dict[str, Any]) -> bool:
    """Return True for a part that passes unchanged. Others must be translated or refused."""
    kind = part.get("type")
    return (
        isinstance(kind, str)
        and kind not in _TRANSLATED_PARTS
        and kind not in _FOREIGN_PARTS
        and not any(name in part for name in _FOREIGN_PART_FIELDS)
    )


def _translated(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Translate a message with Anthropic's blocks. Tool calls move to `tool_calls`, tool results to own messages."""
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    given = message.get("tool_calls")
    if given:
        calls += items(given, f"{where}.tool_calls")
    turns: list[dict[str, Any]] = []
    for index, part in enumerate(message["content"]):
        at = f"{where}.content[{index}]"
        kind = part.get("type")
        if kind == "tool_result" and message["role"] == "user":
            # OpenAI has no tool results inside a user message. The parts before one become a message of their own.
            turns += _turn(message, parts, calls)
            turns.append(_tool_message(part, at))
            parts = []
        elif kind == "tool_use" and message["role"] == "assistant":
            calls.append(_tool_call(part, at))
        else:
            parts.append(_part(part, at))
    return [*turns, *_turn(message, parts, calls)]


def _turn(message: dict[str, Any], parts: list[dict[str, Any]], calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the message with its translated parts and calls. Empty if nothing is left of it."""
    if not parts and not calls:
        return []
    turn = {**message, "content": parts or None}
    if calls:
        turn["tool_calls"] = calls
    return [turn]


def _parts(content: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    return [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _part(part: dict[str, Any], where: str) -> dict[str, Any]:
    kind = part.get("type")
    if not isinstance(kind, str):
        raise LineError(f"{where}.type must be a string, not {shown(kind)}")
    if kind in _FOREIGN_PARTS or kind in ("tool_use", "tool_result"):
        raise no_counterpart(f"{where}, a block of type {kind!r} in this place,", _NAME)
    for name in _FOREIGN_PART_FIELDS:
        if part.get(name):
            raise no_counterpart(f"{where}.{name}", _NAME)
    part = without(part, *_FOREIGN_PART_FIELDS)
    if kind == "image":
        return _image(part, where)
    return part


def _image(part: dict[str, Any], where: str) -> dict[str, Any]:
    for name in part:
        if name not in ("type", "source"):
            raise no_counterpart(f"{where}.{name}", _NAME)
    source = mapping(part.get("source"), f"{where}.source")
    kind = source.get("type")
    if kind == "base64":
        media_type = text(source.get("media_type"), f"{where}.source.media_type")
        url = f"data:{media_type};base64,{text(source.get('data'), f'{where}.source.data')}"
    elif kind == "url":
        url = text(source.get("url"), f"{where}.source.url")
    else:
        raise no_counterpart(f"{where}.source of type {shown(kind)}", _NAME, "use base64 or url")
    return {"type": "image_url", "image_url": {"url": url}}


def _tool_call(block: dict[str, Any], where: str) -> dict[str, Any]:
    _refuse_extra(block, where, "type", "id", "name", "input")
    arguments = jsonl.dumps(mapping(block.get("input"), f"{where}.input")).decode()
    return {
        "id": text(block.get("id"), f"{where}.id"),
        "type": "function",
        "function": {"name": text(block.get("name"), f"{where}.name"), "arguments": arguments},
    }


def _tool_message(block: dict[str, Any], where: str) -> dict[str, Any]:
    _refuse_extra(block, where, "type", "tool_use_id", "content")
    call_id = text(block.get("tool_use_id"), f"{where}.tool_use_id")
    content = block.get("content") or ""
    if isinstance(content, list):
        content = _result_text(content, f"{where}.content")
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _result_text(content: list[Any], where: str) -> str:
    """Return the text of a tool result. A `tool` message of OpenAI takes text only."""
    texts: list[str] = []
    for index, block in enumerate(content):
        block = mapping(block, f"{where}[{index}]")
        if block.get("type") != "text":
            raise no_counterpart(f"{where}[{index}], {shown(block.get('type'))} in the result of a tool,", _NAME)
        _refuse_extra(block, f"{where}[{index}]", "type", "text")
        texts.append(text(block.get("text"), f"{where}[{index}].text"))
    return "\n\n".join(texts)


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
    if "name" not in tool:
        return tool
    if tool.get("type", "custom") != "custom":
        raise no_counterpart(f"{where}, a tool of type {shown(tool['type'])} that the server runs,", _NAME)
    _refuse_extra(tool, where, "type", "name", "description", "input_schema", "strict")
    function = {
        "name": text(tool["name"], f"{where}.name"),
        "description": tool.get("description"),
        "parameters": mapping(tool.get("input_schema"), f"{where}.input_schema"),
        "strict": tool.get("strict"),
    }
    return {
        "type": "function",
        "function": {name: value for name, value in function.items() if value is not None},
    }


def _tool_choice(value: Any) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("auto", "any", "none", "tool"):
        # It is in OpenAI's own shape, or unknown: OpenAI judges it.
        return {"tool_choice": value}
    _refuse_extra(value, "tool_choice", "type", "name", "disable_parallel_tool_use")
    choice: Any = _CHOICES.get(kind)
    if kind == "tool":
        choice = {"type": "function", "function": {"name": text(value.get("name"), "tool_choice.name")}}
    fields = {"tool_choice": choice}
    if value.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    return fields


def _service_tier(value: Any) -> dict[str, Any]:
    if value == "standard_only":
        value = "default"
    return {"service_tier": value}


def _output_config(value: Any) -> dict[str, Any]:
    config = mapping(value, "output_config")
    _refuse_extra(config, "output_config", "effort", "format")
    fields: dict[str, Any] = {}
    effort = config.get("effort")
    if effort is not None:
        fields["reasoning_effort"] = effort
    given = config.get("format")
    if given is not None:
        schema = mapping(mapping(given, "output_config.format").get("schema"), "output_config.format.schema")
        _refuse_extra(given, "output_config.format", "type", "schema")
        fields["response_format"] = {
            "type": "json_schema",
            # OpenAI requires a name. Anthropic's format has none.
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        }
    return fields


def _refuse_extra(value: Mapping[str, Any], where: str, *known: str) -> None:
    """Refuse unknown fields of an object. Null and false are dropped, because they ask for nothing."""
    for name, item in value.items():
        if name not in known and item is not None and item is not False:
            raise no_counterpart(f"{where}.{name}", _NAME)


_FIELDS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "messages": _messages,
    "output_config": _output_config,
    "service_tier": _service_tier,
    "stop_sequences": lambda value: {"stop": value},
    "tool_choice": _tool_choice,
    "tools": _tools,
}
