"""OpenAI's Batch API: https://platform.openai.com/docs/guides/batch (July 2026).

Requests are uploaded as a file, and a batch is created from the file. The results are two files, one of responses and
one of errors. Either may be missing. A batch stores metadata, which finds a batch whose creation was not confirmed.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import orjson

from pipeline.core.config import Endpoint
from pipeline.core.errors import ErrorScope, LineError, OpenAIAPIError, ProviderError
from pipeline.core.text import MAX_MESSAGE, sanitize, word
from pipeline.core.types import HttpRequest, HttpResponse, OutputFormat, Protocol, Result
from pipeline.providers import batch as batches
from pipeline.providers import output, responses
from pipeline.providers.base import Headers
from pipeline.providers.batch import Batch, Ending, Outcome, Problem, RestCalls
from pipeline.providers.error_mapping import member
from pipeline.providers.openai import RULES
from pipeline.providers.responses import Malformed

TAG = "pipeline_chunk"
_ENDPOINT = "/v1/chat/completions"
_PAGE = 100
# OpenAI's pages name no limit for a custom_id that we know of. Anthropic's limit is 64.
_LONGEST_NAME = 64
_ENTRY = b'{"custom_id":%b,"method":"POST","url":"/v1/chat/completions","body":%b}'
_ENDED = ("completed", "failed", "expired", "cancelled")
_ENDINGS: Mapping[str, Ending] = {
    "expired": "expired",
    "batch_expired": "expired",
    "cancelled": "cancelled",
    "batch_cancelled": "cancelled",
}
_QUEUE_LIMIT = re.compile(r"Limit: ([0-9,]{1,20}) enqueued tokens")
# The queue is full until other batches of the account end.
_WAITS = ("token_limit_exceeded", "too_many_batches", "rate_limit_exceeded")


class OpenAIBatches(RestCalls):
    """`BatchCodec` for endpoints that speak OpenAI's protocol."""

    # The guide allows 50,000 requests and 200 MB per file. We stay below, because the form around the file counts too.
    max_requests = 50_000
    max_bytes = 199_999_000
    is_for_one_model = True
    has_tags = True
    error = OpenAIAPIError
    rules = RULES
    separator = b"\n"

    def name(self, local_id: str, custom_id: str, digest: str) -> str:
        if len(custom_id) <= _LONGEST_NAME:
            return custom_id
        return digest

    def entry(self, name: str, body: bytes) -> bytes:
        return _ENTRY % (orjson.dumps(name), body)

    def upload(self, endpoint: Endpoint, headers: Headers, local_id: str) -> HttpRequest:
        boundary = f"pipeline-{local_id}"
        head = (
            f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{local_id}.jsonl"\r\n'
            "content-type: application/jsonl\r\n\r\n"
        )
        return HttpRequest(
            method="POST",
            url=batches.address(endpoint, "files"),
            headers=batches.with_header(headers, "content-type", f"multipart/form-data; boundary={boundary}"),
            body=head.encode(),
            tail=f"\n\r\n--{boundary}--\r\n".encode(),
        )

    def uploaded(self, response: HttpResponse) -> str:
        return self.read(response, lambda file: batches.named(file, "id"))

    def collection_url(self, endpoint: Endpoint) -> str:
        return batches.address(endpoint, "batches")

    def to_batch(self, value: Any) -> Batch:
        return _batch(value)

    def create(self, endpoint: Endpoint, headers: Headers, local_id: str, file_id: str | None) -> HttpRequest:
        wanted = {
            "input_file_id": file_id,
            "endpoint": _ENDPOINT,
            "completion_window": "24h",
            "metadata": {TAG: local_id},
        }
        return HttpRequest(method="POST", url=self.collection_url(endpoint), headers=headers, body=orjson.dumps(wanted))

    def list(self, endpoint: Endpoint, headers: Headers, after: str | None) -> HttpRequest:
        url = f"{self.collection_url(endpoint)}?limit={_PAGE}"
        if after:
            url += f"&after={quote(after, safe='')}"
        return HttpRequest(method="GET", url=url, headers=headers)

    def download(self, endpoint: Endpoint, headers: Headers, file: str) -> HttpRequest:
        return HttpRequest(method="GET", url=batches.address(endpoint, file), headers=headers)

    def outcome(self, line: bytes) -> Outcome:
        """Read `{"custom_id", "response": {"status_code", "request_id", "body"} | null, "error": {"code"…} | null}`."""
        name, value = batches.result_line(line)
        response, error = value.get("response"), value.get("error")
        if isinstance(response, dict):
            return Outcome(name=name, answer=_live_response(response))
        ending = _ENDINGS.get(str(member(error, "code")))
        if ending:
            return Outcome(name=name, ending=ending)
        if isinstance(error, dict):
            failed = HttpResponse(status=_status(error), body=batches.encoded({"error": error}))
            return Outcome(name=name, answer=failed)
        return Outcome(name=name, answer=batches.unusable("neither a response nor an error"))

    def belongs(self, local_id: str, line: bytes) -> bool:
        # A batch is recognized by the tag in its metadata, so its lines need no check.
        return True

    def queue_limit(self, problem: Problem) -> int | None:
        match = _QUEUE_LIMIT.search(problem.message)
        if match is None:
            return None
        return int(match[1].replace(",", ""))

    def failure(self, problem: Problem) -> ProviderError:
        """Return the error of a failed batch. If the provider's queue was only full, the error allows a retry."""
        body = orjson.dumps({"error": {"message": problem.message, "type": problem.code, "code": problem.code}})
        response = HttpResponse(status=400, body=body)
        error = responses.refused(response, orjson.loads(body), OpenAIAPIError, RULES)
        if problem.code in _WAITS:
            return error.replace(scope=ErrorScope.ATTEMPT)
        return error


class OpenAILines:
    """`LineDialect` of OpenAI's Batch API. `endpoints` are the endpoints by the `url` of a line."""

    format = OutputFormat.OPENAI_BATCH
    name = "OpenAI Batch"
    body_key = "body"
    known_keys: tuple[str, ...] = ("custom_id", "method", "url", "body", "metadata")
    protocol = Protocol.OPENAI

    def __init__(self, endpoints: Mapping[str, str]) -> None:
        self._endpoints = endpoints

    def endpoint(self, line: Mapping[str, Any]) -> str:
        url = line.get("url")
        # The check of the type comes first: a list or an object cannot be looked up.
        if not isinstance(url, str) or url not in self._endpoints:
            known = " or ".join(map(repr, self._endpoints))
            raise LineError(f"url must be {known} in an OpenAI Batch line, not {reprlib.repr(url)}")
        method = line.get("method", "POST")
        if method != "POST":
            raise LineError(f"method must be 'POST' in an OpenAI Batch line, not {reprlib.repr(method)}")
        return self._endpoints[url]

    def result(self, result: Result) -> dict[str, Any]:
        response: dict[str, Any] | None = None
        error: dict[str, Any] | None = None
        failure = result.failure
        if result.reply:
            body = output.own_or_rewritten(result, result.reply, "choices", output.as_chat_completion)
            response = {"status_code": 200, "request_id": result.reply.request_id, "body": body}
        elif failure and failure.status and failure.status >= 400:
            details = {"message": failure.message, "type": failure.type, "param": None, "code": failure.code}
            response = {
                "status_code": failure.status,
                "request_id": failure.request_id,
                "body": {"error": details},
            }
        elif failure:
            # This includes a 200 that could not be used. Under `response`, a reader would take it for a success.
            error = {"code": failure.type, "message": failure.message}
        return {
            "id": f"batch_req_{result.digest}",
            "custom_id": result.custom_id,
            "response": response,
            "error": error,
        }

    def is_result(self, line: Mapping[str, Any]) -> bool:
        return "response" in line

    def outcome(self, line: Mapping[str, Any]) -> tuple[bool, str | None]:
        response = line["response"] or {}
        body = response.get("body", {})
        if line["error"] is not None or response.get("status_code") != 200 or "error" in body:
            return False, None
        return True, body.get("model")


def _batch(value: Any) -> Batch:
    """Read a batch. An empty file id counts as no file."""
    if not isinstance(value, dict):
        raise Malformed("a batch that is not an object")
    status = batches.named(value, "status")
    counts = value.get("request_counts")
    # Either file may be missing: the first without a success, the second without a failure.
    file_ids = (batches.text(value, "output_file_id"), batches.text(value, "error_file_id"))
    metadata = value.get("metadata")
    tag = batches.text(metadata, TAG) if isinstance(metadata, dict) else None
    problems = _problems(value) if status == "failed" else ()
    return Batch(
        id=batches.named(value, "id"),
        status=status,
        is_ended=status in _ENDED,
        total=batches.counted(counts, "total"),
        succeeded=batches.counted(counts, "completed"),
        failed=batches.counted(counts, "failed"),
        created_at=batches.from_unix(value.get("created_at")),
        expires_at=batches.from_unix(value.get("expires_at")),
        files=tuple(f"files/{quote(id, safe='')}/content" for id in file_ids if id),
        ending=_ENDINGS.get(status),
        problems=problems,
        tag=tag,
    )


def _problems(value: Mapping[str, Any]) -> Sequence[Problem]:
    """Return why validation failed, with at least one reason."""
    listed = member(value.get("errors"), "data")
    problems: list[Problem] = []
    if isinstance(listed, list):
        problems += (_problem(each) for each in listed if isinstance(each, dict))
    if not problems:
        problems.append(Problem(code=None, message="the batch failed, and the provider does not say why"))
    return tuple(problems)


def _problem(value: Mapping[str, Any]) -> Problem:
    message = value.get("message") or "the provider gives no reason"
    line = value.get("line")
    # A problem of the whole file has no line.
    if type(line) is not int or line < 1:
        line = None
    return Problem(code=word(value.get("code")), message=sanitize(str(message), MAX_MESSAGE), line=line)


def _live_response(response: Mapping[str, Any]) -> HttpResponse:
    """Return the response that a live call would have got. A missing status becomes 0, which decodes to an error."""
    status = response.get("status_code")
    if type(status) is not int:
        status = 0
    headers: dict[str, str] = {}
    request_id = batches.text(response, "request_id")
    if request_id:
        headers["x-request-id"] = request_id
    return HttpResponse(status=status, headers=headers, body=_body(response))


def _body(response: Mapping[str, Any]) -> bytes:
    """Return the body of a response. Some compatible servers write it as a string of JSON."""
    body = response.get("body")
    if isinstance(body, str):
        return body.encode("utf-8", "replace")
    return batches.encoded(body)


def _status(error: Mapping[str, Any]) -> int:
    """Return the HTTP status in the code of an error, else 500, which allows a retry."""
    code = error.get("code")
    if type(code) is int and 400 <= code < 600:
        return code
    return 500
