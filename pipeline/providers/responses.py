"""Parse provider responses: the JSON object of a completion, or an error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import orjson

from pipeline.core import jsonl
from pipeline.core.errors import ErrorScope, LineError, ProviderError, TransportError
from pipeline.core.text import MAX_WORD, sanitize, word
from pipeline.core.types import HttpResponse, Usage
from pipeline.providers.error_mapping import Rule, description, error_body_of, member, scope_of
from pipeline.providers.rate_limit_headers import retry_after

MAX_TOKENS = 10**9
"""More tokens than any response can have. A larger number is a server's mistake."""

# The largest float, about 1.8e308, has 309 digits.
_MOST_DIGITS = 309
_SURROGATES = re.compile("[\ud800-\udfff]")
# Anthropic, OpenAI, and Azure API Management, in this order.
_REQUEST_IDS = ("request-id", "x-request-id", "apim-request-id")
# A gateway stopped waiting. The provider behind it may have finished the work and may bill it.
_GAVE_UP = (504, 524)


class Malformed(Exception):
    """A 200 whose body breaks the protocol. The message says where."""


def accepted(response: HttpResponse, error: type[ProviderError], rules: Sequence[Rule]) -> tuple[dict[str, Any], bytes]:
    """Return the JSON object of a 200 and its text. Raises `error` for everything else.

    The text is the body byte for byte, unless the body is not strict JSON (see `_mended`).
    """
    value, raw = parsed(response.body)
    if 300 <= response.status < 400:
        raise _redirect(response, error)
    if response.status >= 400 or member(value, "error") or member(value, "type") == "error":
        # OpenRouter and others report an error inside a 200.
        raise refused(response, value, error, rules)
    if response.status != 200 or not isinstance(value, dict):
        raise invalid_response(response, error, "not a JSON object")
    # Counting brackets is quick, and rules out almost every response before the exact check.
    if raw.count(b"[") + raw.count(b"{") > jsonl.MAX_DEPTH and jsonl.is_too_deep(value):
        # The result line would be nested too deep to be read again.
        raise invalid_response(response, error, f"nested more than {jsonl.MAX_DEPTH} deep")
    return value, raw


def refusal(response: HttpResponse, error: type[ProviderError], rules: Sequence[Rule]) -> ProviderError:
    """Return the error for a failed download."""
    if 300 <= response.status < 400:
        return _redirect(response, error)
    return refused(response, parsed(response.body)[0], error, rules)


def refused(response: HttpResponse, value: Any, error: type[ProviderError], rules: Sequence[Rule]) -> ProviderError:
    """Return the error in a response. `value` is its parsed JSON, None if it is not JSON."""
    error_body = error_body_of(response, value)
    return error(
        error_body.message,
        type=error_body.type,
        code=error_body.code,
        scope=scope_of(error_body, rules, response.headers.get("x-should-retry")),
        status=response.status,
        request_id=request_id(response.headers) or word(member(value, "request_id")),
        retry_after=retry_after(response.headers),
        may_be_billed=response.status < 300 or response.status in _GAVE_UP,
    )


def invalid_response(response: HttpResponse, error: type[ProviderError], reason: str) -> ProviderError:
    """Return the error for a response that is neither a completion nor an error. The work may be billed."""
    return error(
        f"unusable response, {reason}: {description(response)}",
        type="invalid_response",
        scope=ErrorScope.ATTEMPT,
        status=response.status,
        request_id=request_id(response.headers),
        retry_after=retry_after(response.headers),
        may_be_billed=True,
    )


def usage_of(response: HttpResponse, read: Callable[[Mapping[str, Any]], Usage | None]) -> Usage | None:
    """Return the usage in a response that could not be used. None if it has no valid usage."""
    value, _ = parsed(response.body)
    if not isinstance(value, dict):
        return None
    return usage_or_none(read, value)


def lost(error: TransportError, kind: type[ProviderError]) -> ProviderError:
    """Return the provider's error for a response that never came. A request that was sent may be billed."""
    return kind(error.message, type=error.type, scope=error.scope, may_be_billed=error.is_sent)


def request_id(headers: Mapping[str, str]) -> str | None:
    """Return the provider's id of a request, from the response headers."""
    for name in _REQUEST_IDS:
        found = word(headers.get(name))
        if found:
            return found
    return None


def string(owner: Mapping[str, Any], name: str) -> str | None:
    """Return a string in a response. None if the field is absent or anything else."""
    value = owner.get(name)
    if isinstance(value, str):
        return value
    return None


def count(usage: Mapping[str, Any], name: str) -> int | None:
    """Return a number of tokens. None if it is absent. Raises `Malformed` for anything but a valid count."""
    value = usage.get(name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        raise Malformed(f"usage.{name} is {sanitize(repr(value), MAX_WORD)}")
    return value


def usage_or_none(usage: Callable[[Mapping[str, Any]], Usage | None], message: Mapping[str, Any]) -> Usage | None:
    """Return the usage that a function reads from a message. None if its numbers are invalid.

    Wrong numbers are no reason to discard a response and pay for another.
    """
    try:
        return usage(message)
    except Malformed:
        return None


def optional_object(owner: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an object in a response. Empty if it is null or absent. Raises `Malformed` for anything else."""
    value = owner.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Malformed(f"{name} is not an object")
    return value


def arguments(value: Any) -> Any:
    """Return the arguments of a tool call. JSON text is parsed if that loses nothing."""
    if not isinstance(value, str):
        return value
    try:
        return jsonl.loads(value.encode())
    except (LineError, ValueError):
        return value


def _redirect(response: HttpResponse, error: type[ProviderError]) -> ProviderError:
    """Return the error for a redirect. Following it would send the key and the conversation to another address."""
    location = response.headers.get("location", "")
    # The message names the host only, because the rest of an address may hold secrets.
    try:
        target = urlsplit(location).hostname or location
    except ValueError:
        target = location
    return error(
        f"the server redirects to {sanitize(target, MAX_WORD)!r}, and no redirect is followed: "
        "set base_url of this provider to the right address",
        type="redirect",
        scope=ErrorScope.RUN,
        status=response.status,
        request_id=request_id(response.headers),
    )


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────


def parsed(body: bytes) -> tuple[Any, bytes]:
    """Return the JSON value of a body and its text. The value is None if the body is not JSON."""
    try:
        return orjson.loads(body), body
    except orjson.JSONDecodeError:
        try:
            return _mended(body)
        except (ValueError, RecursionError):
            return None, body


def _integer(digits: str) -> int | None:
    """Return an integer. None if it is larger than any float, because strict readers refuse it."""
    if len(digits) < _MOST_DIGITS:
        return int(digits)
    return None


def _mended(body: bytes) -> tuple[Any, bytes]:
    """Read JSON that orjson refuses: lone surrogates, broken UTF-8, NaN. The response is paid for and must be kept.

    Characters that strict JSON cannot hold become U+FFFD, and such numbers become null.
    """
    # "utf-8-sig" also drops a byte order mark, which orjson refuses.
    value = json.loads(body.decode("utf-8-sig", "replace"), parse_int=_integer)
    text = _SURROGATES.sub("\ufffd", json.dumps(value, ensure_ascii=False))
    mended = json.loads(text, parse_constant=lambda name: None)
    return mended, jsonl.dumps(mended)
