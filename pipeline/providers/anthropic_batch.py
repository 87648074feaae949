"""Anthropic's Message Batches API: https://docs.claude.com/en/docs/build-with-claude/batch-processing (August 2026).

The requests go into the call that creates the batch. A batch stores no tag, so the names of its requests begin with
our local id. A batch whose creation was not confirmed is recognized by its results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import orjson

from pipeline.core.config import Endpoint
from pipeline.core.errors import AnthropicAPIError, LineError, ProviderError
from pipeline.core.types import CHAT, HttpRequest, HttpResponse, OutputFormat, Protocol, Result
from pipeline.providers import batch as batches
from pipeline.providers import output
from pipeline.providers.anthropic import RULES
from pipeline.providers.base import Headers
from pipeline.providers.batch import Batch, Ending, Outcome, Problem, RestCalls
from pipeline.providers.error_mapping import member, status_of
from pipeline.providers.responses import Malformed

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_PAGE = 1_000
_ENTRY = b'{"custom_id":%b,"params":%b}'
_ENDINGS: Mapping[str, Ending] = {"canceled": "cancelled", "expired": "expired"}
_COUNTS = ("processing", "succeeded", "errored", "canceled", "expired")


class AnthropicBatches(RestCalls):
    """`BatchCodec` for endpoints that speak Anthropic's protocol."""

    # The guide allows 100,000 requests and 256 MB per batch. We stay below, because the text around them counts too.
    max_requests = 100_000
    max_bytes = 255_999_000
    is_for_one_model = False
    has_tags = False
    error = AnthropicAPIError
    rules = RULES
    separator = b","

    def name(self, local_id: str, custom_id: str, digest: str) -> str:
        own = f"{local_id}-{custom_id}"
        if _NAME.fullmatch(own):
            return own
        return f"{local_id}-{digest}"

    def entry(self, name: str, body: bytes) -> bytes:
        return _ENTRY % (orjson.dumps(name), body)

    def upload(self, endpoint: Endpoint, headers: Headers, local_id: str) -> None:
        return None

    def uploaded(self, response: HttpResponse) -> str:
        raise NotImplementedError("Anthropic batches have no separate upload")

    def collection_url(self, endpoint: Endpoint) -> str:
        return f"{endpoint.url}/batches"

    def to_batch(self, value: Any) -> Batch:
        return _batch(value)

    def create(self, endpoint: Endpoint, headers: Headers, local_id: str, file_id: str | None) -> HttpRequest:
        return HttpRequest(
            method="POST", url=self.collection_url(endpoint), headers=headers, body=b'{"requests":[', tail=b"]}"
        )

    def list(self, endpoint: Endpoint, headers: Headers, after: str | None) -> HttpRequest:
        url = f"{self.collection_url(endpoint)}?limit={_PAGE}"
        if after:
            url += f"&after_id={quote(after, safe='')}"
        return HttpRequest(method="GET", url=url, headers=headers)

    def download(self, endpoint: Endpoint, headers: Headers, file: str) -> HttpRequest:
        """Ask for results at the endpoint's own address: `results_url` could send the key to any host."""
        return HttpRequest(method="GET", url=f"{self.collection_url(endpoint)}/{file}", headers=headers)

    def outcome(self, line: bytes) -> Outcome:
        """Read `{"custom_id", "result": {"type", "message"?, "error"?}}`."""
        name, value = batches.result_line(line)
        result = value.get("result")
        kind = member(result, "type")
        ending = _ENDINGS.get(str(kind))
        if ending:
            return Outcome(name=name, ending=ending)
        if kind == "succeeded":
            body = batches.encoded(member(result, "message"))
            return Outcome(name=name, answer=HttpResponse(status=200, body=body))
        if kind == "errored":
            return Outcome(name=name, answer=_error_response(member(result, "error")))
        return Outcome(name=name, answer=batches.unusable("a result of no known type"))

    def belongs(self, local_id: str, line: bytes) -> bool:
        try:
            return batches.result_line(line)[0].startswith(f"{local_id}-")
        except LineError:
            return False

    def queue_limit(self, problem: Problem) -> int | None:
        return None

    def failure(self, problem: Problem) -> ProviderError:
        raise NotImplementedError("Anthropic refuses a bad batch when it is created, so none fails later")


class AnthropicLines:
    """`LineDialect` of Anthropic's Message Batches API."""

    format = OutputFormat.ANTHROPIC_BATCH
    name = "Anthropic Batch"
    body_key = "params"
    known_keys: tuple[str, ...] = ("custom_id", "params", "metadata")
    protocol = Protocol.ANTHROPIC

    def endpoint(self, line: Mapping[str, Any]) -> str:
        return CHAT

    def result(self, result: Result) -> dict[str, Any]:
        outcome: dict[str, Any]
        if result.reply:
            message = output.own_or_rewritten(result, result.reply, "stop_reason", output.as_message)
            outcome = {"type": "succeeded", "message": message}
        else:
            assert result.failure is not None
            error = {"type": result.failure.type, "message": result.failure.message}
            outcome = {
                "type": "errored",
                "error": {"type": "error", "error": error, "request_id": result.failure.request_id},
            }
        return {"custom_id": result.custom_id, "result": outcome}

    def is_result(self, line: Mapping[str, Any]) -> bool:
        return "result" in line

    def outcome(self, line: Mapping[str, Any]) -> tuple[bool, str | None]:
        outcome = line["result"]
        if outcome["type"] != "succeeded":
            return False, None
        return True, outcome["message"].get("model")


def _error_response(error: Any) -> HttpResponse:
    """Return the error response that a live call would have got. `error` is the `error` of a result."""
    # The documented form has an error in the error. An error without the outer one is read too.
    inner = member(error, "error") or error
    # A result has no HTTP status. The type of the error implies it.
    status = status_of(None, str(member(inner, "type")))
    body = batches.encoded({"type": "error", "error": inner, "request_id": member(error, "request_id")})
    return HttpResponse(status=status, body=body)


def _batch(value: Any) -> Batch:
    """Read a batch. Until it has ended, all counts but `processing` stay 0, so none is returned."""
    if not isinstance(value, dict):
        raise Malformed("a batch that is not an object")
    id = batches.named(value, "id")
    status = batches.named(value, "processing_status")
    is_ended = status == "ended"
    counts = value.get("request_counts")
    succeeded: int | None = None
    failed: int | None = None
    files: tuple[str, ...] = ()
    if is_ended:
        succeeded = batches.counted(counts, "succeeded")
        failed = batches.counted(counts, "errored")
        files = (f"{quote(id, safe='')}/results",)
    return Batch(
        id=id,
        status=status,
        is_ended=is_ended,
        total=_total(counts),
        succeeded=succeeded,
        failed=failed,
        created_at=batches.from_rfc3339(value.get("created_at")),
        expires_at=batches.from_rfc3339(value.get("expires_at")),
        files=files,
    )


def _total(counts: Any) -> int | None:
    """Return the number of requests, which the API reports only as a count per state. None if it reports none."""
    total: int | None = None
    for name in _COUNTS:
        count = batches.counted(counts, name)
        if count is not None:
            total = (total or 0) + count
    return total
