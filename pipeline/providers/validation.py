"""Checks on a line before it is sent, and helpers to read JSON of unknown shape."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from pipeline.core.config import RequestDefaults
from pipeline.core.errors import LineError
from pipeline.core.text import MAX_WORD, sanitize

LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")
LEADING_ROLES = ("system", "developer")
_FORBIDDEN = frozenset({"base_url", "api_base", "url", "headers", "api_key", "extra_headers"})


def shown(value: Any) -> str:
    """Return a value for an error message: its repr, shortened if it is long."""
    return reprlib.repr(value)


def completed(fields: Mapping[str, Any], defaults: RequestDefaults) -> dict[str, Any]:
    """Return a line without null fields and `stream: false`, and with defaults for absent fields."""
    line = {name: value for name, value in fields.items() if value is not None}
    check_route(line)
    if line.pop("stream", False) is not False:
        raise LineError("stream must be false or absent: a batch waits for whole answers")
    if defaults.temperature is not None:
        line.setdefault("temperature", defaults.temperature)
    if defaults.max_tokens is not None and not any(name in line for name in LIMIT_FIELDS):
        line["max_tokens"] = defaults.max_tokens
    if defaults.system is not None and not _has_system(line):
        line["system"] = defaults.system
    return line


def check_line(line: Mapping[str, Any], roles: Collection[str], max_temperature: float) -> None:
    """Check the rules for all portable lines. Raises a `LineError` that names the field."""
    _check_messages(line.get("messages"), roles)
    if "system" in line:
        _check_system(line["system"])
    if "temperature" in line:
        _check_temperature(line["temperature"], max_temperature)
    for name in LIMIT_FIELDS:
        # The exact type, because `true` is an int to Python.
        if name in line and (type(line[name]) is not int or line[name] < 1):
            raise LineError(f"{name} must be a whole number of at least 1, not {shown(line[name])}")


def check_model(model: Any) -> None:
    """Check that the line names a model."""
    if not isinstance(model, str) or not model.strip():
        raise LineError(f"model must be a non-empty string, not {shown(model)}")


def check_route(fields: Mapping[str, Any]) -> None:
    """Refuse a line that sets its own address: input must not choose who gets keys and conversations."""
    if not _FORBIDDEN.isdisjoint(fields):
        names = ", ".join(sorted(_FORBIDDEN.intersection(fields)))
        raise LineError(f'a line cannot set {names}; set them in config.yaml, and name the provider as "provider" here')


def check_own_body(body: Mapping[str, Any]) -> None:
    """Check only the shape of a body in a provider's own dialect. The provider judges the rest."""
    check_route(body)
    check_model(body.get("model"))
    items(body.get("messages"), "messages")
    if body.get("stream"):
        raise LineError("stream must be false or absent: a batch waits for whole answers")


def no_counterpart(
    where: str, provider: str, advice: str = "remove it, or send the line to another provider"
) -> LineError:
    """Return the error for a field without a counterpart in the other provider's dialect."""
    return LineError(f"{sanitize(where, MAX_WORD)} has no counterpart in {provider}'s dialect; {advice}")


def text(value: Any, where: str) -> str:
    """Return a value that must be a string."""
    if not isinstance(value, str):
        raise LineError(f"{where} must be a string, not {shown(value)}")
    return value


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Return a value that must be an object."""
    if not isinstance(value, dict):
        raise LineError(f"{where} must be an object, not {shown(value)}")
    return value


def items(value: Any, where: str) -> list[dict[str, Any]]:
    """Return a value that must be a non-empty list of objects."""
    if not isinstance(value, list) or not value:
        raise LineError(f"{where} must be a non-empty list of objects, not {shown(value)}")
    for index, item in enumerate(value):
        mapping(item, f"{where}[{index}]")
    return value


def without(value: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return a copy of an object without some of its fields."""
    return {name: item for name, item in value.items() if name not in names}


def put(body: dict[str, Any], name: str, value: Any) -> None:
    """Set a field that several source fields map to. Objects are merged. A contradiction is a `LineError`."""
    present = body.get(name)
    if isinstance(present, dict) and isinstance(value, dict):
        joined = dict(present)
        for key, item in value.items():
            put(joined, key, item)
        body[name] = joined
    elif name in body and present != value:
        raise LineError(f"two fields of this line set {name}: to {shown(present)} and to {shown(value)}")
    else:
        body[name] = value


def _has_system(line: Mapping[str, Any]) -> bool:
    messages = line.get("messages")
    if "system" in line:
        return True
    # The messages are not checked yet, so they may be anything.
    if not isinstance(messages, list) or not messages:
        return False
    first = messages[0]
    return isinstance(first, dict) and first.get("role") in LEADING_ROLES


def _check_messages(messages: Any, roles: Collection[str]) -> None:
    for index, message in enumerate(items(messages, "messages")):
        role = message.get("role")
        if not isinstance(role, str) or role not in roles:
            raise LineError(f"messages[{index}].role must be one of {', '.join(roles)}, not {shown(role)}")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if content is not None:
            items(content, f"messages[{index}].content")
        # Only a message of the assistant that calls tools needs no content.
        elif role != "assistant" or not (message.get("tool_calls") or message.get("function_call")):
            missing = "content and no tool_calls" if role == "assistant" else "content"
            raise LineError(f"messages[{index}] has no {missing}")


def _check_system(system: Any) -> None:
    if isinstance(system, str):
        return
    for index, block in enumerate(items(system, "system")):
        if block.get("type") != "text":
            raise LineError(f"system[{index}].type must be 'text', not {shown(block.get('type'))}")
        text(block.get("text"), f"system[{index}].text")


def _check_temperature(value: Any, maximum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= maximum:
        raise LineError(f"temperature must be a number from 0 to {maximum:g}, not {shown(value)}")
