"""Parse an input line into a `Draft`. The keys of the line show its dialect.

A body in a provider's own dialect is sent as written. The other dialects become one portable form (`messages` and a
provider's fields) that each provider's codec translates. Nothing in a line is ignored: an unknown key is an error,
except in the portable form, where the provider judges unknown fields.
"""

from __future__ import annotations

import re
import reprlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.core import jsonl
from pipeline.core.errors import LineError
from pipeline.core.types import CHAT, Protocol
from pipeline.providers.base import LineDialect
from pipeline.providers.registry import LINE_DIALECTS

MAX_CUSTOM_ID = 512

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_OWN_KEYS = ("custom_id", "provider", "metadata")
_FINE_TUNING_KEYS = {"messages", "tools", "parallel_tool_calls", "functions", "function_call", "weight"}
_SHAREGPT_KEYS = {"conversations", "id", "system", "tools", "model", *_OWN_KEYS}
_SHAREGPT_ROLES: Mapping[str, str] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}
_LABEL_ROLES = ("assistant", "function_call")
_SHAPES = (
    'a line is one of: {"messages": […]} (native, fine-tuning), '
    '{"custom_id", "method", "url", "body": {…}} (OpenAI Batch), '
    '{"custom_id", "params": {…}} (Anthropic Batch), {"conversations": […]} (ShareGPT)'
)
# Similar dialects that are not supported: a key that identifies each, its name, and what to write instead.
_OTHERS: tuple[tuple[str, str, str], ...] = (
    ("preferred_output", "a preference (DPO) example", 'write its input.messages as {"messages": […]}'),
    (
        "instruction",
        "an Alpaca example",
        'write instruction and input as {"messages": [{"role": "user", "content": …}]}',
    ),
    ("prompt", "a line with a plain prompt", 'write {"messages": [{"role": "user", "content": …}]}'),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One input line in parts. Its provider and its defaults are not chosen yet.

    `protocol` is set for a provider's own dialect. Then `fields` is the body as written. Else the draft is portable,
    and `fields` is the line in portable form: with `model`, without our own keys. `endpoint` is the
    provider's endpoint that the line is for.
    """

    custom_id: str | None
    provider: str | None
    model: str | None
    protocol: Protocol | None
    fields: Mapping[str, Any]
    metadata: Any = None
    endpoint: str = CHAT

    @property
    def is_portable(self) -> bool:
        return self.protocol is None


def parse(value: Any) -> Draft:
    """Return the draft of one parsed line. A `LineError` says what is missing, or lists the dialects."""
    if not isinstance(value, dict):
        advice = ""
        if isinstance(value, list):
            advice = "; write each element on a line of its own: jq -c '.[]' FILE"
        raise LineError(f"a line must be a JSON object, not {_kind(value)}{advice}")
    for key, read in _READERS.items():
        if key in value:
            return read(value)
    for key, name, advice in _OTHERS:
        if key in value:
            raise LineError(f"this is {name} (it has {key!r}), which is not supported; {advice}")
    raise LineError(f"the line has no messages: {_SHAPES}")


def _native(line: dict[str, Any]) -> Draft:
    """Read a line with `messages`. It is a fine-tuning example if it has no other keys and ends with its label."""
    messages = _turns(line["messages"], "messages")
    if line.keys() <= _FINE_TUNING_KEYS and _is_example(messages):
        return _draft(line, _example_fields(line, messages))
    return _draft(line, {name: item for name, item in line.items() if name not in _OWN_KEYS})


def _sharegpt(line: dict[str, Any]) -> Draft:
    """Read turns of `from` and `value`. A last turn of the assistant is the label and is not sent."""
    _refuse_unknown(line, *_SHAREGPT_KEYS)
    turns = _turns(line["conversations"], "conversations")
    roles = [_sharegpt_role(turn, f"conversations[{index}]") for index, turn in enumerate(turns)]
    if roles[-1] in _LABEL_ROLES:
        roles.pop()
    if not roles:
        raise LineError("conversations has only the answer, which is not sent; a user turn is missing")
    fields: dict[str, Any] = {}
    if "model" in line:
        fields["model"] = line["model"]
    system = line.get("system")
    if system:
        fields["system"] = system
    fields["messages"] = _sharegpt_messages(turns, roles)
    tools = _sharegpt_tools(line.get("tools"))
    if tools:
        fields["tools"] = tools
    return _draft({"custom_id": line.get("id"), **line}, fields)


def _provider_line(dialect: LineDialect, line: dict[str, Any]) -> Draft:
    """Read a line of a provider's batch API. Its body is sent as written."""
    _refuse_unknown(line, *dialect.known_keys)
    endpoint = dialect.endpoint(line)
    body = line[dialect.body_key]
    if not isinstance(body, dict):
        raise LineError(f"{dialect.body_key} must be an object, not {_kind(body)}")
    return Draft(
        custom_id=_custom_id(line.get("custom_id")),
        provider=None,
        model=_name(body, "model"),
        protocol=dialect.protocol,
        endpoint=endpoint,
        fields=body,
        metadata=line.get("metadata"),
    )


# By the key that identifies the dialect. The first match wins.
_READERS: Mapping[str, Callable[[dict[str, Any]], Draft]] = {
    **{dialect.body_key: partial(_provider_line, dialect) for dialect in LINE_DIALECTS},
    "conversations": _sharegpt,
    "messages": _native,
}


def _draft(line: Mapping[str, Any], fields: Mapping[str, Any]) -> Draft:
    """Return the draft of a portable line."""
    return Draft(
        custom_id=_custom_id(line.get("custom_id")),
        provider=_name(line, "provider"),
        model=_name(line, "model"),
        protocol=None,
        fields=fields,
        metadata=line.get("metadata"),
    )


# ── parts that dialects share ───────────────────────────────────────────────────────────────────────────


def _custom_id(value: Any) -> str | None:
    """Return a line's id as text, None if it has none."""
    if value is None:
        return None
    name = str(value) if type(value) is int else value
    if not isinstance(name, str):
        raise LineError(f"custom_id must be a string or an integer, not {_kind(value)}")
    if not name or len(name) > MAX_CUSTOM_ID:
        raise LineError(f"custom_id must have 1 to {MAX_CUSTOM_ID} characters, not {len(name):,}")
    if _CONTROL.search(name):
        raise LineError(f"custom_id must not have control characters: {reprlib.repr(name)}")
    return name


def _name(line: Mapping[str, Any], key: str) -> str | None:
    value = line.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise LineError(f"{key} must be a non-empty string, not {reprlib.repr(value)}")
    return value


def _turns(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise LineError(f"{key} must be a non-empty list of objects, not {reprlib.repr(value)}")
    return value


def _refuse_unknown(line: Mapping[str, Any], *known: str) -> None:
    """Refuse keys that a dialect does not know. A misspelt key would otherwise be dropped silently."""
    unknown = [key for key in line if key not in known]
    if unknown:
        raise LineError(f"{reprlib.repr(unknown)}: no keys of this dialect; put your own data into metadata")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# ── fine-tuning ─────────────────────────────────────────────────────────────────────────────────────────


def _is_example(messages: list[dict[str, Any]]) -> bool:
    return messages[-1].get("role") == "assistant" or any("weight" in message for message in messages)


def _example_fields(line: Mapping[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an example without its label (the last answer) and without training weights."""
    if messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise LineError("messages has only the answer, which is not sent; a user message is missing")
    unweighted = [_without_weight(message) for message in messages]
    return {**_without_weight(line), "messages": unweighted}


def _without_weight(value: Mapping[str, Any]) -> dict[str, Any]:
    copy = dict(value)
    copy.pop("weight", None)
    return copy


# ── ShareGPT ────────────────────────────────────────────────────────────────────────────────────────────


def _sharegpt_role(turn: Mapping[str, Any], where: str) -> str:
    speaker = turn.get("from")
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise LineError(f"{where}.from must be one of {', '.join(_SHAREGPT_ROLES)}, not {reprlib.repr(speaker)}")
    return role


def _sharegpt_messages(turns: list[dict[str, Any]], roles: list[str]) -> list[dict[str, Any]]:
    """Return messages for the turns with a role. Calls get ids, and observations answer them in order."""
    messages: list[dict[str, Any]] = []
    open_calls: deque[str] = deque()
    count = 0
    for index, role in enumerate(roles):
        where = f"conversations[{index}]"
        value = _sharegpt_value(turns[index], where)
        if role == "function_call":
            calls = _function_calls(value, where, count)
            count += len(calls)
            open_calls.extend(call["id"] for call in calls)
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
        elif role == "tool":
            if not open_calls:
                raise LineError(f"{where} is an observation without a function_call before it")
            messages.append({"role": "tool", "tool_call_id": open_calls.popleft(), "content": value})
        else:
            messages.append({"role": role, "content": value})
    return messages


def _sharegpt_value(turn: Mapping[str, Any], where: str) -> str:
    value = turn.get("value", turn.get("text"))
    if not isinstance(value, str):
        raise LineError(f"{where}.value must be a string, not {reprlib.repr(value)}")
    return value


def _function_calls(value: str, where: str, count: int) -> list[dict[str, Any]]:
    """Return calls in OpenAI's form, from `{"name", "arguments"}` or a list of these."""
    given = _json(value, f"{where}.value")
    calls = given if isinstance(given, list) else [given]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise LineError(f'{where}.value must be {{"name": …, "arguments": {{…}}}} as JSON, not {reprlib.repr(value)}')
    return [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": call["name"], "arguments": _arguments(call)},
        }
        for number, call in enumerate(calls, start=count + 1)
    ]


def _arguments(call: Mapping[str, Any]) -> str:
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        return arguments
    return jsonl.dumps(arguments).decode()


def _sharegpt_tools(value: Any) -> list[Any]:
    """Return tools in OpenAI's form. Datasets have them as JSON in a string, bare or already wrapped."""
    if isinstance(value, str) and value.strip():
        value = _json(value, "tools")
    if not value:
        return []
    tools: list[Any] = []
    for tool in _turns(value, "tools"):
        # A name at the top, without Anthropic's `input_schema`, is a bare function.
        if "name" in tool and "input_schema" not in tool:
            tool = {"type": "function", "function": tool}
        tools.append(tool)
    return tools


def _json(text: str, where: str) -> Any:
    try:
        return jsonl.loads(text.encode("utf-8", "surrogatepass"))
    except LineError as exc:
        raise LineError(f"{where} must be JSON: {exc.message}") from exc
