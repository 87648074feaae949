"""Result -> its line in the results file, in three dialects, and back to what a later run must know. Pure.

Every dialect carries `digest`, the identity of the request that was answered: with `custom_id` it is the key of
resuming. The provider's own answer goes in untouched, spliced as bytes; in the dialect of the other provider's batch
API it is rewritten in that provider's terms, so that tools which read such files need no second reader.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BufferedReader
from typing import Any

import orjson

from pipeline.core import jsonl, money
from pipeline.core.errors import LineError
from pipeline.core.types import TOKEN_FIELDS, Attempt, Cost, Failure, OutputFormat, Request, Result, Usage, wasted
from pipeline.providers import registry

# Fields of `usage` that a line has only if they are not 0.
_RARE_FIELDS = {"cache_write_1h_tokens"}

MAX_LINE_BYTES = 1024 * 1024 * 1024
BEGINNINGS = (b'{"custom_id":', b'{"id":"batch_req_')
"""How the lines of all dialects begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResult:
    """What a result line says about identity, outcome and tokens: all that resuming and totals need."""

    custom_id: str
    digest: str
    success: bool
    is_invalid: bool = False
    provider: str | None = None
    model: str | None = None
    lane: str = "live"
    usage: Usage | None = None
    cost: Cost = field(default_factory=Cost)
    attempts: int = 0
    failed_attempts: Sequence[Attempt] = ()
    run: str | None = None
    completed_at: str = ""

    @property
    def wasted(self) -> Sequence[tuple[Usage, int | None]]:
        """Tokens and cost (nano-dollars) of failed attempts, as far as their answers reported them."""
        return wasted(self.failed_attempts)


def encode(
    result: Result, form: OutputFormat, *, run_id: str = "", echo_request: bool = False, is_simulated: bool = False
) -> bytes:
    """Return the line of a result, with its line end; `run_id` names the run that it belongs to."""
    dialect = registry.line_dialect(form)
    line = _native(result) if dialect is None else dialect.result(result) | _tail(result)
    line["run"] = run_id
    if is_simulated:
        line["simulated"] = True
    if echo_request and result.request:
        line["request"] = orjson.Fragment(result.request.body)
    try:
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    except (
        TypeError,
        RecursionError,
    ):  # an integer beyond 64 bits, or very deep nesting, in somebody's metadata or tool arguments
        return orjson.dumps({name: _spelled(value) for name, value in line.items()}, option=orjson.OPT_APPEND_NEWLINE)


def copy(line: bytes, request: Request, *, run_id: str, at: str) -> bytes:
    """Return the result line of a request whose equal has one: the same outcome, for nothing; `copy_of` names that."""
    value = json.loads(line)
    own = {"custom_id": request.custom_id, "line": request.line, "source": request.source, "metadata": request.metadata}
    free = {"attempts": 0, "cost_usd": 0, "run": run_id, "completed_at": at}
    copied = (
        value | {name: new for name, new in (own | free).items() if name in value} | {"copy_of": value["custom_id"]}
    )
    for name in ("failed_attempts", "latency_s", "saved_usd"):
        copied.pop(name, None)
    if copied.get("usage"):
        copied["usage"] = dict.fromkeys((*_USAGE_FIELDS, "total_tokens"), 0)
    if copied.get("error"):
        copied["error"] = copied["error"] | {"attempts": []}
    return jsonl.dumps(copied) + b"\n"


def decode(line: bytes) -> StoredResult:
    """Read a result line of any dialect back; `LineError` when it is not one."""
    try:
        value = orjson.loads(line)
        return _checked(_stored(value))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, OverflowError) as exc:
        raise LineError(f"not a result line: {exc}") from exc


def decode_or_none(line: bytes) -> StoredResult | None:
    """Read a result line back; None when it is not one."""
    try:
        return decode(line)
    except LineError:
        return None


def read(file: BufferedReader) -> Iterator[tuple[int, bytes, StoredResult | None]]:
    """Yield where each line begins, the line without its end, and what it says; None where it is no result."""
    offset = file.tell()
    for line, length in jsonl.lines(file, MAX_LINE_BYTES):
        yield offset, line, decode_or_none(line)
        offset += length + 1


# ── encoding ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _native(result: Result) -> dict[str, Any]:
    line: dict[str, Any] = {
        "custom_id": result.custom_id,
        "line": result.line,
        "success": result.success,
        "provider": result.provider,
        "model": result.model,
    }
    if reply := result.reply:
        line["content"] = reply.content
        line["finish_reason"] = reply.finish_reason
        line["truncated"] = reply.truncated
        if reply.refusal is not None:
            line["refusal"] = reply.refusal
        if reply.tool_calls:
            line["tool_calls"] = [{"id": t.id, "name": t.name, "arguments": t.arguments} for t in reply.tool_calls]
        line["usage"] = _usage(reply.usage)
        line["cost_usd"] = _usd(result.cost.nanos)
        if result.cost.saved:
            line["saved_usd"] = _usd(result.cost.saved)
        line["lane"] = result.lane
        if result.batch_id:
            line["batch_id"] = result.batch_id
    elif failure := result.failure:
        line["error"] = _error(failure)
    line["attempts"] = result.attempts
    if result.reply and result.failed_attempts:
        line["failed_attempts"] = [attempt_as_dict(attempt) for attempt in result.failed_attempts]
    if result.latency_s is not None:
        line["latency_s"] = round(result.latency_s, 3)
    if result.reply:
        line["request_id"] = result.reply.request_id
    line["completed_at"] = result.completed_at
    line["metadata"] = result.metadata
    line["source"] = result.source
    line["digest"] = result.digest
    if result.reply:
        line["response"] = orjson.Fragment(jsonl.one_line(result.reply.raw))
    return line


def _tail(result: Result) -> dict[str, Any]:
    """What a later run must know and the batch dialects have no place for."""
    tail = {
        "digest": result.digest,
        "line": result.line,
        "provider": result.provider,
        "model": result.model,
        "lane": result.lane,
        "usage": _usage(result.usage),
        "cost_usd": _usd(result.cost.nanos),
        "attempts": result.attempts,
        "completed_at": result.completed_at,
    }
    if result.batch_id:
        tail["batch_id"] = result.batch_id
    if result.cost.saved:
        tail["saved_usd"] = _usd(result.cost.saved)
    if result.failed_attempts:
        tail["failed_attempts"] = [attempt_as_dict(attempt) for attempt in result.failed_attempts]
    return tail


def _usage(usage: Usage | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    tokens: dict[str, Any] = {}
    for name in TOKEN_FIELDS:
        count = getattr(usage, name)
        if count or name not in _RARE_FIELDS:
            tokens[name] = count
        if name == "output_tokens":
            tokens["total_tokens"] = usage.total_tokens
    if usage.web_searches:
        tokens["web_searches"] = usage.web_searches
    if usage.service_tier is not None:
        tokens["service_tier"] = usage.service_tier
    return tokens


def _error(failure: Failure) -> dict[str, Any]:
    return {
        "type": failure.type,
        "code": failure.code,
        "status": failure.status,
        "message": failure.message,
        "request_id": failure.request_id,
        "attempts": [attempt_as_dict(attempt) for attempt in failure.attempts],
    }


def attempt_as_dict(attempt: Attempt) -> dict[str, Any]:
    """Return a failed attempt as it stands in result lines; `to_attempts` reads it back."""
    values = asdict(attempt)
    values["latency_s"] = round(attempt.latency_s, 3)
    values["usage"] = _usage(attempt.usage)
    values["cost_usd"] = _usd(values.pop("cost_nano"))
    return {name: value for name, value in values.items() if value is not None}


def _usd(nanos: int | None) -> float | None:
    """Return nano-dollars as a number of dollars."""
    return None if nanos is None else money.dollars(nanos)


def _spelled(value: Any) -> Any:
    """Return a value as the JSON text that the exact, slow encoder makes of it.

    What is nested deeper than Python can follow is named in its place; the answer itself stands untouched beside it.
    """
    if isinstance(value, orjson.Fragment):
        return value
    try:
        return orjson.Fragment(jsonl.dumps(value))
    except RecursionError:
        return "(nested too deep to be shown here; see response)"


# ── decoding ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _checked(found: StoredResult) -> StoredResult:
    """Refuse values of other types than we write: later they would break what reads them."""
    texts = (found.custom_id, found.digest, found.lane, found.provider or "", found.model or "")
    if not all(isinstance(text, str) for text in texts) or not isinstance(found.success, bool):
        raise TypeError("a value has a wrong type")
    return found


def _stored(value: Mapping[str, Any]) -> StoredResult:
    if "success" in value:
        return _from_native(value)
    for dialect in registry.LINE_DIALECTS:
        if dialect.is_result(value):
            success, model = dialect.outcome(value)
            return _from_batch(value, success, model)
    raise KeyError("it is in no known format")


def _from_native(value: Mapping[str, Any]) -> StoredResult:
    return StoredResult(
        custom_id=value["custom_id"],
        digest=value["digest"],
        success=value["success"],
        is_invalid=value["provider"] is None,
        provider=value["provider"],
        model=value["model"],
        lane=value.get("lane", "live"),
        usage=_to_usage(value.get("usage")),
        cost=_to_cost(value),
        attempts=value.get("attempts", 0),
        failed_attempts=to_attempts(value.get("failed_attempts") or value.get("error", {}).get("attempts")),
        run=value.get("run"),
        completed_at=value.get("completed_at", ""),
    )


def _from_batch(value: Mapping[str, Any], success: bool, model: str | None) -> StoredResult:
    return StoredResult(
        custom_id=value["custom_id"],
        digest=value["digest"],
        success=success,
        is_invalid=value["provider"] is None,
        provider=value["provider"],
        model=value.get("model") or model,
        lane=value["lane"],
        usage=_to_usage(value["usage"]),
        cost=_to_cost(value),
        attempts=value.get("attempts", 0),
        failed_attempts=to_attempts(value.get("failed_attempts")),
        run=value.get("run"),
        completed_at=value.get("completed_at", ""),
    )


_USAGE_FIELDS = (*TOKEN_FIELDS, "web_searches")


def _to_usage(value: Mapping[str, Any] | None) -> Usage | None:
    if value is None:
        return None
    counts: list[Any] = [value.get(name, 0) for name in _USAGE_FIELDS]
    if set(map(type, counts)) != {int} or min(counts) < 0:
        raise TypeError("a number of tokens is not a whole number")
    tier = value.get("service_tier")
    if not isinstance(tier, str | None):
        raise TypeError("a service tier is not a text")
    return Usage(**dict(zip(_USAGE_FIELDS, counts, strict=True)), service_tier=tier)


def _to_cost(value: Mapping[str, Any]) -> Cost:
    nanos = _to_nanos(value.get("cost_usd"))
    return Cost(nanos=None if nanos is None or nanos < 0 else nanos, saved=_to_nanos(value.get("saved_usd")) or 0)


def _to_nanos(dollars: Any) -> int | None:
    """Return dollars as whole nano-dollars; what is no amount is unknown, never 0."""
    return round(dollars * money.NANO) if type(dollars) in (int, float) else None


def to_attempts(values: Sequence[Mapping[str, Any]] | None) -> Sequence[Attempt]:
    """Read failed attempts back."""
    return [
        Attempt(
            at=value.get("at", ""),
            type=value.get("type", ""),
            message=value.get("message", ""),
            latency_s=value.get("latency_s", 0.0),
            status=value.get("status"),
            code=value.get("code"),
            request_id=value.get("request_id"),
            may_be_billed=value.get("may_be_billed") is True,
            usage=_to_usage(value.get("usage")),
            cost_nano=_to_nanos(value.get("cost_usd")),
        )
        for value in values or ()
    ]
