"""Read provider errors in their many shapes, and map each to its scope by a table of rules."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import ErrorScope
from pipeline.core.text import MAX_MESSAGE, MAX_WORD, excerpt, sanitize, word
from pipeline.core.types import HttpResponse

# The HTTP status of an error type, for errors that came inside a 200.
_STATUSES: Mapping[str, int] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "insufficient_quota": 429,
    "requests": 429,
    "tokens": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """The contents of an error response, whatever its shape. `status` is the HTTP status of the error itself."""

    status: int
    type: str
    message: str
    code: str | None = None
    is_structured: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A row of a table of errors. If an error matches every condition that is set, `scope` is its scope.

    `says` is a regular expression that the message must contain. The first matching rule wins.
    """

    scope: ErrorScope
    statuses: Container[int] | None = None
    types: Container[str] | None = None
    codes: Container[str | None] | None = None
    says: str = ""
    is_structured: bool = False

    def fits(self, error_body: ErrorBody) -> bool:
        return (
            (self.statuses is None or error_body.status in self.statuses)
            and (self.types is None or error_body.type in self.types)
            and (self.codes is None or error_body.code in self.codes)
            and re.search(self.says, error_body.message) is not None
            and (error_body.is_structured or not self.is_structured)
        )


COMMON_RULES = (
    Rule(statuses=(401, 402), scope=ErrorScope.RUN),
    # A 403 with a provider's error body is about the key. A firewall's page may be about one conversation.
    Rule(statuses=(403,), is_structured=True, scope=ErrorScope.RUN),
    # 404 is about the model or the address, which every line of the model shares.
    Rule(statuses=(404,), scope=ErrorScope.MODEL),
    Rule(statuses=(408, 409, 425, 429, *range(500, 1000)), scope=ErrorScope.ATTEMPT),
    Rule(scope=ErrorScope.REQUEST),
)


def scope_of(error_body: ErrorBody, rules: Sequence[Rule], should_retry: str | None) -> ErrorScope:
    """Return the scope of an error: the first rule that fits, then the header `x-should-retry`.

    Both providers' own SDKs follow that header, too.
    """
    scope = next(rule.scope for rule in (*rules, *COMMON_RULES) if rule.fits(error_body))
    if scope in (ErrorScope.ATTEMPT, ErrorScope.REQUEST):
        if should_retry == "true":
            return ErrorScope.ATTEMPT
        if should_retry == "false":
            return ErrorScope.REQUEST
    return scope


def error_body_of(response: HttpResponse, value: Any) -> ErrorBody:
    """Return an error response in one form. `_error_object` lists the shapes that servers use."""
    error = _error_object(value)
    if error is None:
        # An error that came with a success status counts as the server's fault.
        status = response.status if response.status >= 400 else 500
        text = f"unreadable error response: {description(response)}"
        return ErrorBody(status=status, type=f"http_{status}", message=text, is_structured=False)
    # Anthropic puts the code of a spending limit into `details`. Gemini's `status` is what others call `type`.
    code = member(error.get("details"), "error_code") or error.get("code")
    kind = word(error.get("type")) or word(error.get("status"))
    status = response.status
    if status < 400:
        status = status_of(code, kind)
    message = error.get("message")
    text = sanitize(message, MAX_MESSAGE) if isinstance(message, str) else ""
    return ErrorBody(
        status=status,
        type=kind or f"http_{status}",
        code=word(code),
        message=text or description(response),
    )


def status_of(code: Any, kind: str | None) -> int:
    """Return the HTTP status of an error inside a 200: by its numeric code, else its type, else 500."""
    if isinstance(code, int) and 400 <= code < 600:
        return code
    return _STATUSES.get(kind or "", 500)


def _error_object(value: Any) -> Mapping[str, Any] | None:
    """Return the object that explains an error, None if there is none. The shapes:

    `{"error": {…}}` (Anthropic, OpenAI, Azure, OpenRouter), the same in a list (Gemini); `{"error": "text"}`
    (Ollama); `{"detail": "text" | {…} | [{"loc", "msg"}…]}` (FastAPI); `{"message": "text", …}` (older vLLM).
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        return None
    error = value.get("error") or value.get("detail")
    if isinstance(error, dict):
        return error
    if isinstance(error, str):
        return {**value, "message": error}
    if isinstance(error, list):
        return {**value, "message": "; ".join(map(_validation_problem, error))}
    if isinstance(value.get("message"), str):
        return value
    return None


def _validation_problem(problem: Any) -> str:
    """Return `body.messages: field required` for FastAPI's `{"loc": ["body", "messages"], "msg": …}`."""
    place = member(problem, "loc")
    message = member(problem, "msg")
    if not isinstance(place, list) or not isinstance(message, str):
        return str(problem)
    return f"{'.'.join(map(str, place))}: {message}"


def description(response: HttpResponse) -> str:
    """Return a response for an error message: its status, type, size, and the beginning of its body."""
    kind = sanitize(response.headers.get("content-type", "none"), MAX_WORD)
    return f"status {response.status}, content-type {kind}, {len(response.body):,} bytes: {excerpt(response.body)!r}"


def member(value: Any, name: str) -> Any:
    """Return a field of a value, None if the value is not an object."""
    return value.get(name) if isinstance(value, dict) else None
