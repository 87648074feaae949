"""Anthropic's errors: https://docs.claude.com/en/api/errors (August 2026)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import orjson

from pipeline.simulator.types import Problem

REQUEST_ID: Final = b"request-id"

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}

_MESSAGES = {
    402: "Your account has a billing problem. Please check your payment details.",
    403: "Your API key does not have permission to use the specified resource.",
    404: "Not found",
    405: "Method Not Allowed",
    413: "Request exceeds the maximum size",
    429: "This request would exceed your account's rate limit. Please try again later.",
    500: "Internal server error",
    503: "Service unavailable",
    504: "Request timed out",
    529: "Overloaded",
}


def problem(status: int) -> Problem:
    """Make the usual error of an HTTP status; statuses without a type of their own share the general ones."""
    general = "api_error" if status >= 500 else "invalid_request_error"
    message = _MESSAGES.get(status, f"The request failed with status {status}.")
    hint = 1 if status == 429 else None
    return Problem(status=status, type=_TYPES.get(status, general), message=message, retry_after=hint)


def invalid(message: str) -> Problem:
    """Refuse a request that is not well formed."""
    return Problem(status=400, type="invalid_request_error", message=message)


def unauthorized(key: str | None) -> Problem:
    """Refuse a missing or unknown key."""
    message = "x-api-key header is required" if key is None else "invalid x-api-key"
    return Problem(status=401, type="authentication_error", message=message)


def rate_limited(message: str, *, retry_after: int | None, code: str | None = None) -> Problem:
    """Refuse a request for now; a `code` says that it is not the ordinary rate limit."""
    return Problem(status=429, type="rate_limit_error", message=message, code=code, retry_after=retry_after)


UNREADABLE: Final = invalid("The request body is not valid JSON.")

FAULTS: Final[Mapping[str, Problem]] = {
    "429": problem(429),
    "429-no-hint": replace(problem(429), retry_after=None),
    "500": problem(500),
    "503": problem(503),
    "529": problem(529),
    "quota": rate_limited(
        "You have reached your monthly spend limit. Access returns on the 1st of next month at 00:00 UTC.",
        retry_after=None,
        code="enforced_spend_limit_reached",
    ),
}


def error_body(problem: Problem, request_id: str) -> bytes:
    """Encode an error; a code goes to `details.error_code`."""
    error: dict[str, object] = {"type": problem.type, "message": problem.message}
    if problem.code is not None:
        error["details"] = {"error_code": problem.code}
    return orjson.dumps({"type": "error", "error": error, "request_id": request_id})
