"""The Anthropic Messages protocol (`POST /v1/messages`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.config import Endpoint, RequestDefaults
from pipeline.core.errors import AnthropicAPIError, ErrorScope, ProviderError, TransportError
from pipeline.core.types import CHAT, Completion, HttpResponse, Limit, Protocol, ToolCall, Usage
from pipeline.providers import (
    anthropic_convert,
    base,
    rate_limit_headers,
    responses,
    validation,
)
from pipeline.providers.error_mapping import Rule
from pipeline.providers.responses import Malformed

DEFAULT_VERSION = "2023-06-01"
DEFAULT_MAX_TOKENS = 4096
MAX_TEMPERATURE = 1.0
ROLES = ("user", "assistant", "system", "developer", "tool")
# Stop reasons of an incomplete output.
_TRUNCATED = ("max_tokens", "model_context_window_exceeded")

RULES = (
    # Spending limits and accounts on hold: nothing will succeed until the user acts.
    Rule(codes=("enforced_spend_limit_reached", "contract_spend_limit_reached"), scope=ErrorScope.RUN),
    Rule(
        codes=("linked_organization_billing_unavailable", "linked_organization_spend_limit_reached"),
        scope=ErrorScope.RUN,
    ),
    Rule(codes=("organization_on_hold", "cmek_key_disabled"), scope=ErrorScope.RUN),
    Rule(statuses=(400,), says=r"^You have reached your specified", scope=ErrorScope.RUN),
    Rule(statuses=(400,), says=r"^Your credit balance is too low", scope=ErrorScope.RUN),
    Rule(types=("authentication_error", "billing_error", "permission_error"), scope=ErrorScope.RUN),
    # A file that is gone concerns one line. Any other 404 is about the model.
    Rule(types=("not_found_error",), says=r"\b[Ff]ile", scope=ErrorScope.REQUEST),
    Rule(types=("not_found_error",), scope=ErrorScope.MODEL),
)


# The headers of each kind of limit: the limit, and what remains of it.
_LIMITS = {
    "requests": ("anthropic-ratelimit-requests-limit", "anthropic-ratelimit-requests-remaining"),
    "input_tokens": ("anthropic-ratelimit-input-tokens-limit", "anthropic-ratelimit-input-tokens-remaining"),
    "output_tokens": ("anthropic-ratelimit-output-tokens-limit", "anthropic-ratelimit-output-tokens-remaining"),
}


class AnthropicCodec:
    """`Codec` for the Messages API of every server that speaks Anthropic's protocol."""

    protocol = Protocol.ANTHROPIC
    endpoint: str = CHAT
    line_url: str | None = None
    caches_unasked = False

    def url(self, endpoint: Endpoint) -> str:
        return endpoint.url

    def headers(self, endpoint: Endpoint, key: str | None) -> base.Headers:
        own = {"anthropic-version": endpoint.version or DEFAULT_VERSION}
        return base.headers(endpoint, key, "x-api-key", own)

    def body(
        self, fields: Mapping[str, Any], endpoint: Endpoint, defaults: RequestDefaults, model: str
    ) -> dict[str, Any]:
        validation.check_model(model)
        line = validation.completed(fields, defaults)
        validation.check_line(line, ROLES, MAX_TEMPERATURE)
        body = anthropic_convert.translate(line, model)
        # Anthropic requires a limit. Other providers do not, so a portable line may lack it.
        body.setdefault("max_tokens", endpoint.max_tokens or DEFAULT_MAX_TOKENS)
        return body

    def check_body(self, body: Mapping[str, Any]) -> None:
        validation.check_own_body(body)

    def max_output_tokens(self, body: Mapping[str, Any]) -> int | None:
        limit = body.get("max_tokens")
        if type(limit) is int:
            return limit
        return None

    def decode(self, response: HttpResponse) -> Completion:
        message, raw = responses.accepted(response, AnthropicAPIError, RULES)
        try:
            return _completion(message, raw, responses.request_id(response.headers))
        except Malformed as exc:
            raise responses.invalid_response(response, AnthropicAPIError, str(exc)) from exc

    def usage(self, response: HttpResponse) -> Usage | None:
        return responses.usage_of(response, _usage)

    def lost(self, error: TransportError) -> ProviderError:
        return responses.lost(error, AnthropicAPIError)

    def limits(self, headers: Mapping[str, str]) -> Sequence[Limit]:
        return rate_limit_headers.limits(headers, _LIMITS)

    def charge(self, input_tokens: float, output_tokens: float, max_output_tokens: int | None) -> dict[str, float]:
        """Charge the expected tokens. Anthropic does not reserve `max_tokens`."""
        return {"requests": 1.0, "input_tokens": input_tokens, "output_tokens": output_tokens}

    def used(self, usage: Usage) -> dict[str, float]:
        """Return the real usage. Cache reads do not count as input."""
        counted = usage.input_tokens - usage.cache_read_tokens
        return {"input_tokens": float(counted), "output_tokens": float(usage.output_tokens)}


def _completion(message: Mapping[str, Any], raw: bytes, request_id: str | None) -> Completion:
    if message.get("type") != "message":
        raise Malformed("its type is not 'message'")
    blocks = _blocks(message.get("content"))
    finish_reason = responses.string(message, "stop_reason")
    texts: list[str] = []
    tool_calls: list[ToolCall] = []
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            texts.append(_text(block))
        elif kind == "tool_use":
            tool_calls.append(_tool_call(block))
    return Completion(
        model=responses.string(message, "model") or "",
        content="".join(texts) if texts else None,
        finish_reason=finish_reason,
        truncated=finish_reason in _TRUNCATED,
        usage=responses.usage_or_none(_usage, message),
        raw=raw,
        refusal=_refusal(message) if finish_reason == "refusal" else None,
        tool_calls=tuple(tool_calls),
        request_id=request_id,
    )


def _blocks(content: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise Malformed("its content is not a list of blocks")
    return content


def _text(block: Mapping[str, Any]) -> str:
    text = block.get("text")
    if not isinstance(text, str):
        raise Malformed("a text block without a text")
    return text


def _tool_call(block: Mapping[str, Any]) -> ToolCall:
    name = responses.string(block, "name")
    if name is None:
        raise Malformed("a tool_use block without a name")
    return ToolCall(id=responses.string(block, "id"), name=name, arguments=block.get("input"))


def _refusal(message: Mapping[str, Any]) -> str:
    """Return `category: explanation` as far as they are given, else `refusal`."""
    details = responses.optional_object(message, "stop_details")
    category = responses.string(details, "category")
    explanation = responses.string(details, "explanation")
    if category and explanation:
        return f"{category}: {explanation}"
    return category or explanation or "refusal"


def _usage(message: Mapping[str, Any]) -> Usage | None:
    """Return the usage of a message, None if it has none. Our input tokens include Anthropic's cached tokens."""
    usage = responses.optional_object(message, "usage")
    uncached = responses.count(usage, "input_tokens")
    output = responses.count(usage, "output_tokens")
    if uncached is None or output is None:
        return None
    read = responses.count(usage, "cache_read_input_tokens") or 0
    by_lifetime = responses.optional_object(usage, "cache_creation")
    written_1h = responses.count(by_lifetime, "ephemeral_1h_input_tokens") or 0
    written = responses.count(usage, "cache_creation_input_tokens")
    if written is None:
        written_5m = responses.count(by_lifetime, "ephemeral_5m_input_tokens") or 0
        written = written_1h + written_5m
    # Writes for 1h cost more than those for 5m. A wrong split would make the cost wrong.
    if written_1h > written:
        raise Malformed("usage has more tokens written for 1h than written at all")
    output_details = responses.optional_object(usage, "output_tokens_details")
    reasoning = responses.count(output_details, "thinking_tokens") or 0
    server_tools = responses.optional_object(usage, "server_tool_use")
    searches = responses.count(server_tools, "web_search_requests") or 0
    # Fast mode has its own prices, whatever the tier.
    is_fast = usage.get("speed") == "fast"
    tier = "fast" if is_fast else responses.string(usage, "service_tier")
    return Usage(
        input_tokens=uncached + written + read,
        output_tokens=output,
        cache_read_tokens=read,
        cache_write_tokens=written,
        cache_write_1h_tokens=written_1h,
        reasoning_tokens=reasoning,
        web_searches=searches,
        service_tier=tier,
    )
