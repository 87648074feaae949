"""What OpenAI finds wrong with the lines of a batch's file before any request is processed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from anyio.lowlevel import checkpoint

from pipeline.simulator.batches import Item
from pipeline.simulator.openai.requests import is_gone

ENDPOINTS = (
    *("/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/completions", "/v1/moderations"),
    *("/v1/images/generations", "/v1/images/edits", "/v1/videos"),
)

_AT_ONCE = 1_000
_MOST_ERRORS = 100

Error = Mapping[str, Any]


def error(code: str, message: str, *, line: int | None = None, param: str | None = None) -> Error:
    """Make one of a batch's `errors.data`."""
    return {"code": code, "line": line, "message": message, "param": param}


@dataclass(slots=True, kw_only=True)
class Validated:
    """What was read of a file: its requests and their model, or what is wrong with it."""

    model: str | None = None
    items: list[Item] = field(default_factory=list)
    errors: list[Error] = field(default_factory=list)


async def validate(raw: bytes, endpoint: str, most: int) -> Validated:
    """Read a file of at most `most` lines; report its first hundred errors."""
    if not raw.strip():
        return Validated(errors=[error("empty_file", "The batch input file is empty.")])
    if raw.rstrip(b"\n").count(b"\n") >= most:
        message = f"The batch input file contains too many requests. The maximum is {most:,} requests per file."
        return Validated(errors=[error("too_many_tasks", message)])
    validated, seen = Validated(), set[str]()
    for number, line in enumerate(_lines(raw), 1):
        wrong = _check_line(line, number, endpoint, seen, validated)
        if wrong:
            validated.errors.append(wrong)
        if len(validated.errors) == _MOST_ERRORS:
            break
        if number % _AT_ONCE == 0:
            await checkpoint()
    return validated


def _lines(raw: bytes) -> Iterator[bytes]:
    start, end = 0, len(raw.rstrip(b"\r\n"))
    while start < end:
        stop = raw.find(b"\n", start, end)
        if stop < 0:
            stop = end
        yield raw[start:stop]
        start = stop + 1


def _check_line(line: bytes, number: int, endpoint: str, seen: set[str], validated: Validated) -> Error | None:
    """Find the first thing wrong with a line; take its request if there is nothing."""
    try:
        decoded = orjson.loads(line)
    except orjson.JSONDecodeError:
        decoded = None
    if not isinstance(decoded, dict):
        return error("invalid_json_line", "This line is not parseable as valid JSON.", line=number)
    wrong = _check_envelope(decoded, number, endpoint) or _check_custom_id(decoded, number, seen)
    if wrong:
        return wrong
    body = decoded["body"]
    wrong = _check_model(body.get("model"), number, validated)
    if wrong:
        return wrong
    validated.items.append(Item(number=number - 1, custom_id=decoded["custom_id"], raw=orjson.dumps(body)))
    return None


def _check_envelope(line: Mapping[str, Any], number: int, endpoint: str) -> Error | None:
    for name in ("custom_id", "method", "url", "body"):
        if line.get(name) is None:
            message = f"Missing required parameter: '{name}'."
            return error("missing_required_parameter", message, line=number, param=name)
    if line["method"] != "POST":
        return error("invalid_method", "The 'method' of a request must be 'POST'.", line=number, param="method")
    if line["url"] not in ENDPOINTS:
        message = f"The URL provided for this request does not match any supported endpoint: {line['url']!r}."
        return error("invalid_url", message, line=number, param="url")
    if line["url"] != endpoint:
        message = f"The URL of this request is not the batch's endpoint {endpoint!r}."
        return error("mismatched_endpoint", message, line=number, param="url")
    if not isinstance(line["body"], dict):
        return error("invalid_type", "Invalid type for 'body': expected an object.", line=number, param="body")
    return None


def _check_custom_id(line: Mapping[str, Any], number: int, seen: set[str]) -> Error | None:
    custom_id = line["custom_id"]
    if not isinstance(custom_id, str):
        message = "Invalid type for 'custom_id': expected a string."
        return error("invalid_type", message, line=number, param="custom_id")
    if custom_id in seen:
        message = f"The custom_id {custom_id!r} is used more than once in this file."
        return error("duplicate_custom_id", message, line=number, param="custom_id")
    seen.add(custom_id)
    return None


def _check_model(model: object, number: int, validated: Validated) -> Error | None:
    """Compare with the models before; a request without one is refused when it is processed."""
    if not isinstance(model, str) or not model:
        return None
    if is_gone(model):
        message = f"The provided model '{model}' does not exist or is not supported by the Batch API."
        return error("model_not_found", message, line=number, param="body.model")
    if validated.model not in (None, model):
        message = f"The model '{model}' is not that of the lines before, '{validated.model}': use one in each file."
        return error("mismatched_model", message, line=number, param="body.model")
    validated.model = model
    return None
