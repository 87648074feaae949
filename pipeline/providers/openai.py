"""The OpenAI Chat Completions protocol (`POST /v1/chat/completions`), which many servers speak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from pipeline.core.config import Endpoint, RequestDefaults
from pipeline.core.errors import ErrorScope, OpenAIAPIError, ProviderError, TransportError
from pipeline.core.types import CHAT, Completion, HttpResponse, Limit, Protocol, ToolCall, Usage
from pipeline.providers import (
    base,
    openai_convert,
    rate_limit_headers,
    responses,
    validation,
)
from pipeline.providers.error_mapping import Rule
from pipeline.providers.responses import Malformed

MAX_TEMPERATURE = 2.0
ROLES = ("user", "assistant", "system", "developer", "tool", "function")
_HOST = "api.openai.com"

RULES = (
    # Quotas and spending limits come as 429, but a retry does not help.
    Rule(types=("insufficient_quota",), scope=ErrorScope.RUN),
    Rule(
        codes=("insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached"),
        scope=ErrorScope.RUN,
    ),
    Rule(codes=("organization_spend_limit_exceeded", "project_spend_limit_exceeded"), scope=ErrorScope.RUN),
    Rule(codes=("organization_usage_limit_exceeded", "invalid_api_key"), scope=ErrorScope.RUN),
    Rule(codes=("model_not_found", "model_not_available", "DeploymentNotFound"), scope=ErrorScope.MODEL),
    # A request that alone is larger than the limit per minute never fits.
    Rule(statuses=(429,), says=r"^Request too large .*tokens per min", scope=ErrorScope.REQUEST),
    # OpenRouter refuses a conversation, not the key.
    Rule(statuses=(403,), says=r"(?i)moderation|flagged", scope=ErrorScope.REQUEST),
)


# The headers of each kind of limit: the limit, and what remains of it.
_LIMITS = {
    "requests": ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests"),
    "tokens": ("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens"),
    "project_tokens": ("x-ratelimit-limit-project-tokens", "x-ratelimit-remaining-project-tokens"),
}


class OpenAICodec:
    """`Codec` for the Chat Completions API of every server that speaks OpenAI's protocol."""

    protocol = Protocol.OPENAI
    endpoint: str = CHAT
    line_url: str | None = "/v1/chat/completions"
    caches_unasked = True

    def url(self, endpoint: Endpoint) -> str:
        return endpoint.url

    def headers(self, endpoint: Endpoint, key: str | None) -> base.Headers:
        own = {"openai-organization": endpoint.organization, "openai-project": endpoint.project}
        return base.headers(endpoint, key, "authorization", own)

    def body(
        self, fields: Mapping[str, Any], endpoint: Endpoint, defaults: RequestDefaults, model: str
    ) -> dict[str, Any]:
        validation.check_model(model)
        line = validation.completed(fields, defaults)
        validation.check_line(line, ROLES, MAX_TEMPERATURE)
        is_own = _is_own_host(endpoint.base_url)
        is_reasoning = openai_convert.is_reasoning(model)
        limit_field = endpoint.max_tokens_field
        if limit_field in (None, "auto"):
            # Reasoning models refuse `max_tokens`, and older compatible servers know nothing else.
            limit_field = "max_completion_tokens" if is_reasoning else None
        # Compatible servers may refuse the role `developer`.
        system_role = "developer" if is_own and is_reasoning else "system"
        body = openai_convert.translate(line, model, limit_field=limit_field, system_role=system_role)
        if is_own and endpoint.store is not None:
            body.setdefault("store", endpoint.store)
        return body

    def check_body(self, body: Mapping[str, Any]) -> None:
        validation.check_own_body(body)

    def max_output_tokens(self, body: Mapping[str, Any]) -> int | None:
        """Return the limit of one choice times the number of choices."""
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        choices = body.get("n")
        if type(limit) is not int:
            return None
        if type(choices) is int and choices > 1:
            return limit * choices
        return limit

    def decode(self, response: HttpResponse) -> Completion:
        completion, raw = responses.accepted(response, OpenAIAPIError, RULES)
        try:
            choice = _first_choice(completion)
            if choice.get("error"):
                # OpenRouter sends this if the model's server failed halfway.
                raise responses.refused(response, choice, OpenAIAPIError, RULES)
            return _completion(completion, choice, raw, responses.request_id(response.headers))
        except Malformed as exc:
            raise responses.invalid_response(response, OpenAIAPIError, str(exc)) from exc

    def usage(self, response: HttpResponse) -> Usage | None:
        return responses.usage_of(response, _usage)

    def lost(self, error: TransportError) -> ProviderError:
        return responses.lost(error, OpenAIAPIError)

    def limits(self, headers: Mapping[str, str]) -> Sequence[Limit]:
        return rate_limit_headers.limits(headers, _LIMITS)

    def charge(self, input_tokens: float, output_tokens: float, max_output_tokens: int | None) -> dict[str, float]:
        """Charge `tokens` with the larger of the output limit and the prompt. OpenAI never corrects this."""
        tokens = max(float(max_output_tokens or 0), input_tokens)
        return {
            "requests": 1.0,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "tokens": tokens,
            "project_tokens": tokens,
        }

    def used(self, usage: Usage) -> dict[str, float]:
        return {"input_tokens": float(usage.input_tokens), "output_tokens": float(usage.output_tokens)}


@cache
def _is_own_host(base_url: str) -> bool:
    """Return True for OpenAI's own servers, regional ones too. Compatible servers may refuse unknown fields."""
    host = urlsplit(base_url).hostname or ""
    return host == _HOST or host.endswith("." + _HOST)


def _first_choice(completion: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = completion.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Malformed("its choices are not a non-empty list of objects")
    choice: Mapping[str, Any] = choices[0]
    return choice


def _completion(
    completion: Mapping[str, Any], choice: Mapping[str, Any], raw: bytes, request_id: str | None
) -> Completion:
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Malformed("its first choice has no message")
    finish_reason = responses.string(choice, "finish_reason")
    return Completion(
        model=responses.string(completion, "model") or "",
        content=_content(message.get("content")),
        finish_reason=finish_reason,
        truncated=finish_reason == "length",
        usage=responses.usage_or_none(_usage, completion),
        raw=raw,
        refusal=_refusal(message, finish_reason),
        tool_calls=_tool_calls(message),
        request_id=request_id,
    )


def _content(content: Any) -> str | None:
    """Return the text of a message. Some compatible servers send a list of parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Malformed("the content of its message is neither text nor a list of parts")
    texts = [part["text"] for part in content if isinstance(part.get("text"), str)]
    # Without a text part, the content is null, as OpenAI sends it.
    if not texts:
        return None
    return "".join(texts)


def _refusal(message: Mapping[str, Any], finish_reason: str | None) -> str | None:
    refusal = responses.string(message, "refusal")
    if refusal:
        return refusal
    if finish_reason == "content_filter":
        return finish_reason
    return None


def _tool_calls(message: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Malformed("the tool_calls of its message are not a list of objects")
    # The form before tools, which some compatible servers still send.
    legacy = message.get("function_call")
    if legacy:
        calls = [*calls, {"function": legacy}]
    return tuple(_tool_call(call) for call in calls)


def _tool_call(call: Mapping[str, Any]) -> ToolCall:
    """Read a function call, whose arguments are JSON, or a custom tool call, whose input is free text."""
    function = responses.optional_object(call, "function")
    custom = responses.optional_object(call, "custom")
    name = function.get("name") or custom.get("name")
    if not isinstance(name, str):
        raise Malformed("a tool call without a name")
    arguments = responses.arguments(function.get("arguments")) if function else custom.get("input")
    return ToolCall(id=responses.string(call, "id"), name=name, arguments=arguments)


def _usage(completion: Mapping[str, Any]) -> Usage | None:
    """Return the reported usage, None if there is none. Details that are not reported count as 0."""
    usage = responses.optional_object(completion, "usage")
    prompt = responses.count(usage, "prompt_tokens")
    output = responses.count(usage, "completion_tokens")
    if prompt is None or output is None:
        return None
    prompt_details = responses.optional_object(usage, "prompt_tokens_details")
    read = responses.count(prompt_details, "cached_tokens") or 0
    written = responses.count(prompt_details, "cache_write_tokens") or 0
    # The cached tokens are part of the prompt. Otherwise the uncached rest would be negative, and the cost wrong.
    if read + written > prompt:
        raise Malformed("usage has more cached tokens than prompt tokens")
    output_details = responses.optional_object(usage, "completion_tokens_details")
    reasoning = responses.count(output_details, "reasoning_tokens") or 0
    return Usage(
        input_tokens=prompt,
        output_tokens=output,
        cache_read_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=reasoning,
        service_tier=responses.string(completion, "service_tier"),
    )
