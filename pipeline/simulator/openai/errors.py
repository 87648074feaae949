"""OpenAI's errors: https://platform.openai.com/docs/guides/error-codes (July 2026)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import orjson

from pipeline.simulator.types import Problem

REQUEST_ID: Final = b"x-request-id"

_SERVER_ERROR = (
    "The server had an error while processing your request. Sorry about that! Please contact us through our "
    "help center at help.openai.com if the error persists."
)
_OVERLOADED = "Our servers are currently overloaded. Please try again later."
_LIMIT = "Rate limit reached. Please try again later."

_USUAL = {
    401: Problem(
        status=401,
        type="invalid_request_error",
        message="Incorrect API key provided.",
        code="invalid_api_key",
    ),
    403: Problem(
        status=403,
        type="invalid_request_error",
        message="Country, region, or territory not supported",
        code="unsupported_country_region_territory",
    ),
    404: Problem(status=404, type="invalid_request_error", message="Invalid URL"),
    429: Problem(status=429, type="requests", message=_LIMIT, code="rate_limit_exceeded", retry_after=1),
    503: Problem(status=503, type="service_unavailable_error", message=_OVERLOADED, code="server_is_overloaded"),
}


def problem(status: int) -> Problem:
    """Make the usual error of an HTTP status."""
    if status in _USUAL:
        return _USUAL[status]
    if status >= 500:
        return Problem(status=status, type="server_error", message=_SERVER_ERROR)
    return invalid(f"The request failed with status {status}.", status=status)


def invalid(message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> Problem:
    """Refuse a request that is not well formed; `param` names the field."""
    return Problem(status=status, type="invalid_request_error", message=message, param=param, code=code)


def unauthorized(key: str | None) -> Problem:
    """Refuse a missing or unknown key; like the provider, quote its ends."""
    if key is None:
        message = (
            "You didn't provide an API key. You need to provide your API key in an Authorization header "
            "using Bearer auth (i.e. Authorization: Bearer YOUR_KEY). You can obtain an API key from "
            "https://platform.openai.com/account/api-keys."
        )
        return invalid(message, status=401)
    shown = f"{key[:3]}{'*' * 8}{key[-4:]}" if len(key) > 8 else "*" * len(key)
    message = (
        f"Incorrect API key provided: {shown}. You can find your API key at "
        "https://platform.openai.com/account/api-keys."
    )
    return invalid(message, code="invalid_api_key", status=401)


def rate_limited(message: str, *, kind: str, retry_after: int | None) -> Problem:
    """Refuse a request for now; `kind` is what ran out: `requests` or `tokens`."""
    return Problem(status=429, type=kind, message=message, code="rate_limit_exceeded", retry_after=retry_after)


UNREADABLE: Final = invalid(
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP "
    "library correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON.)"
)

FAULTS: Final[Mapping[str, Problem]] = {
    "429": problem(429),
    "429-no-hint": replace(problem(429), retry_after=None),
    "500": problem(500),
    "503": problem(503),
    "529": problem(503),
    "quota": Problem(
        status=429,
        type="insufficient_quota",
        message="You exceeded your current quota, please check your plan and billing details.",
        code="credit_balance_exhausted",
    ),
}


def error_body(problem: Problem, request_id: str) -> bytes:
    """Encode an error; the request id goes only into the headers."""
    error = {
        "message": problem.message,
        "type": problem.type,
        "param": problem.param,
        "code": problem.code,
    }
    return orjson.dumps({"error": error})
