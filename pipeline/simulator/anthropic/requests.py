"""Anthropic's requests: who sends them, what is wrong with them, what they ask for.

The wording of the errors follows the provider's; programs should only read their types.
"""

import re
from functools import lru_cache

from pipeline.simulator.answers import count_tokens, text_of
from pipeline.simulator.anthropic.errors import invalid
from pipeline.simulator.types import Body, HeaderMap, Problem, Prompt, Tool

_NO_SAMPLING_VERSION = b"2026-10-21"
_VERSIONS = (b"2023-06-01", _NO_SAMPLING_VERSION)
_SAMPLING = {"temperature": 1, "top_p": 1, "top_k": None}  # with their defaults
_ROLES = ("user", "assistant", "system")
_BLOCKS = (
    *("text", "image", "document", "search_result", "thinking", "redacted_thinking", "tool_use"),
    *("tool_result", "server_tool_use", "web_search_tool_result", "web_fetch_tool_result"),
    "container_upload",
)
_GONE = ("unknown", "missing", "claude-1", "claude-2", "claude-3", "claude-instant")
_NEWEST = (99, 0)
_MAX_TOKENS = 128_000  # of the current models; older ones allow less
_CLAUDE = re.compile(r"claude-[a-z]+-(\d{1,2})(?:-(\d{1,2}))?(?!\d)")


def key(headers: HeaderMap) -> str | None:
    """Read the key from `x-api-key`, or from `authorization` as SDK 2.0 and later send it."""
    bearer = headers.get(b"authorization", b"")
    raw = headers.get(b"x-api-key") or (bearer[7:] if bearer[:7].lower() == b"bearer " else b"")
    return raw.decode("latin-1").strip() or None


def check(headers: HeaderMap, body: object) -> Problem | None:
    """Find the first thing wrong with a request for a message."""
    if not isinstance(body, dict):
        return invalid("Input should be a valid dictionary or object to extract fields from")
    return (
        check_version(headers)
        or _check_model(body)
        or _check_max_tokens(body)
        or _check_sampling(headers, body)
        or _check_thinking(body)
        or _check_messages(body)
        or _check_tools(body)
        or _check_stream(body)
    )


def check_count(headers: HeaderMap, body: object) -> Problem | None:
    """Find the first thing wrong with a request to count tokens, which has no `max_tokens`."""
    if not isinstance(body, dict):
        return invalid("Input should be a valid dictionary or object to extract fields from")
    return check_version(headers) or _check_model(body) or _check_messages(body) or _check_tools(body)


def check_version(headers: HeaderMap) -> Problem | None:
    """Find what is wrong with the version header, which every request must have."""
    version = headers.get(b"anthropic-version")
    if version is None:
        return invalid("anthropic-version: header is required")
    if version not in _VERSIONS:
        return invalid(f'anthropic-version: "{version.decode("latin-1")}" is not a valid version')
    return None


def _check_model(body: Body) -> Problem | None:
    model = body.get("model")
    if model is None:
        return invalid("model: Field required")
    if not isinstance(model, str) or not model:
        return invalid("model: String should have at least 1 character")
    if model.startswith(_GONE):
        return Problem(status=404, type="not_found_error", message=f"model: {model}")
    return None


def _check_max_tokens(body: Body) -> Problem | None:
    limit = body.get("max_tokens")
    if limit is None:
        return invalid("max_tokens: Field required")
    if type(limit) is not int:
        return invalid("max_tokens: Input should be a valid integer")
    if limit < 1:
        return invalid("max_tokens: Input should be greater than or equal to 1")
    if limit > _MAX_TOKENS:
        return invalid(f"max_tokens: {limit} > {_MAX_TOKENS}, the maximum allowed number of output tokens")
    return None


def _check_sampling(headers: HeaderMap, body: Body) -> Problem | None:
    given = [name for name in _SAMPLING if name in body]
    if not given:
        return None
    name = given[0]
    if headers[b"anthropic-version"] == _NO_SAMPLING_VERSION:
        return invalid(f"{name}: not supported in anthropic-version 2026-10-21")
    temperature = body.get("temperature", 1)
    if type(temperature) not in (int, float):
        return invalid("temperature: Input should be a valid number")
    if not 0 <= temperature <= 1:
        bound = "less than or equal to 1" if temperature > 1 else "greater than or equal to 0"
        return invalid(f"temperature: Input should be {bound}")
    version = _claude_version(body["model"])
    if (4, 7) <= version < _NEWEST and any(body[name] != _SAMPLING[name] for name in given):
        return invalid(f"{name}: only the default value is supported by this model")
    return None


def _check_thinking(body: Body) -> Problem | None:
    thinking = body.get("thinking")
    if thinking is None:
        return None
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    version = _claude_version(body["model"])
    if kind not in ("enabled", "adaptive", "disabled", "between_tools"):
        return invalid("thinking.type: Input should be 'enabled', 'adaptive', 'disabled' or 'between_tools'")
    if kind == "enabled" and (4, 7) <= version < _NEWEST:
        return invalid("thinking.type: 'enabled' is not supported by this model. Use 'adaptive'.")
    if kind == "adaptive" and version <= (4, 5):
        return invalid("thinking.type: 'adaptive' is not supported by this model")
    budget = thinking.get("budget_tokens")
    if kind == "enabled" and not (type(budget) is int and 1_024 <= budget < body["max_tokens"]):
        return invalid("thinking.budget_tokens: must be at least 1024 and less than `max_tokens`")
    return None


def _check_messages(body: Body) -> Problem | None:
    messages = body.get("messages")
    if messages is None:
        return invalid("messages: Field required")
    if not isinstance(messages, list):
        return invalid("messages: Input should be a valid list")
    if not messages:
        return invalid("messages: at least one message is required")
    for index, message in enumerate(messages):
        if wrong := _check_message(index, message) or _check_place(index, messages, body["model"]):
            return wrong
    if messages[-1]["role"] == "assistant" and (4, 6) <= _claude_version(body["model"]) < _NEWEST:
        return invalid(
            "This model does not support assistant message prefill. The conversation must end with a user message."
        )
    return None


def _check_message(index: int, message: object) -> Problem | None:
    if not isinstance(message, dict):
        return invalid(f"messages.{index}: Input should be a valid dictionary or object to extract fields from")
    if message.get("role") not in _ROLES:
        return invalid(f"messages.{index}.role: Input should be 'user', 'assistant' or 'system'")
    content = message.get("content")
    if content is None:
        return invalid(f"messages.{index}.content: Field required")
    if isinstance(content, str):
        blocks = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        blocks = content
    else:
        return invalid(f"messages.{index}.content: Input should be a valid string or list")
    if not blocks or content == "":
        return invalid(f"messages.{index}: all messages must have non-empty content")
    return next((wrong for at, block in enumerate(blocks) if (wrong := _check_block(index, at, block))), None)


def _check_block(index: int, at: int, block: object) -> Problem | None:
    place = f"messages.{index}.content.{at}"
    if not isinstance(block, dict):
        return invalid(f"{place}: Input should be a valid dictionary or object to extract fields from")
    kind = block.get("type")
    if kind not in _BLOCKS:
        return invalid(f"{place}: Input tag {kind!r} found using 'type' does not match any of the expected tags")
    if kind != "text":
        return None
    if not isinstance(block.get("text"), str):
        return invalid(f"{place}.text.text: Field required")
    if not block["text"]:
        return invalid("messages: text content blocks must be non-empty")
    return None


def _check_place(index: int, messages: list[Body], model: str) -> Problem | None:
    """Refuse a `system` message to an older model, or elsewhere than between a user and an assistant."""
    if messages[index]["role"] != "system":
        return None
    if _claude_version(model) < (4, 8):
        return invalid(
            f'messages.{index}.role: Unexpected role "system". The Messages API accepts '
            'a top-level `system` parameter, not "system" as an input message role.'
        )
    follows_user = index > 0 and messages[index - 1]["role"] == "user"
    after = messages[index + 1] if index + 1 < len(messages) else None
    if follows_user and (after is None or (isinstance(after, dict) and after.get("role") == "assistant")):
        return None
    return invalid(
        f"messages.{index}: a system message must follow a user message, and be last or before an assistant message"
    )


def _check_tools(body: Body) -> Problem | None:
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return invalid("tools: Input should be a valid list of dictionaries")
    choice = body.get("tool_choice")
    if choice is None:
        return None
    if not isinstance(choice, dict) or choice.get("type") not in ("auto", "any", "tool", "none"):
        return invalid("tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'")
    if not tools:
        return invalid("tool_choice may only be specified while providing tools")
    if choice["type"] in ("any", "tool") and _forced_tool(body) is None:
        return invalid(f"Tool {choice.get('name')!r} not found in provided tools")
    return None


def _check_stream(body: Body) -> Problem | None:
    return invalid("stream: this simulator does not stream; leave it out") if body.get("stream") else None


@lru_cache(maxsize=256)
def _claude_version(model: str) -> tuple[int, int]:
    """Read (4, 5) from `claude-sonnet-4-5-20250929`; names of other makers count as newest."""
    found = _CLAUDE.match(model)
    return (int(found[1]), int(found[2] or 0)) if found else _NEWEST


def prompt(body: Body) -> Prompt:
    """Read a request that `check` found nothing wrong with; also one to count tokens."""
    messages = body["messages"]
    texts = [text_of(message["content"]) for message in messages]
    said = [text for text, message in zip(texts, messages, strict=True) if message["role"] == "user"]
    thinking = body.get("thinking")
    return Prompt(
        model=body["model"],
        text="\n".join(said),
        input_tokens=count_tokens([text_of(body.get("system")), *texts], body.get("tools"), len(messages)),
        max_tokens=body.get("max_tokens"),
        tool=_forced_tool(body),
        schema=_json_schema(body),
        reasons=isinstance(thinking, dict) and thinking.get("type") in ("enabled", "adaptive"),
        cache_writes=True,
    )


def _forced_tool(body: Body) -> Tool | None:
    choice = body.get("tool_choice") or {}
    if choice.get("type") not in ("any", "tool"):
        return None
    for tool in body["tools"]:
        if choice["type"] == "any" or tool.get("name") == choice.get("name"):
            return Tool(name=tool.get("name", ""), schema=tool.get("input_schema") or {})
    return None


def _json_schema(body: Body) -> Body | None:
    match body.get("output_config"):
        case {"format": {"type": "json_schema", "schema": dict(schema)}}:
            return schema
    return None
