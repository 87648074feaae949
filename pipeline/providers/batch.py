"""The interface of a codec for a provider's batch API: calls and responses, without I/O or clock.

A batch consists of requests. Each has a name that the provider accepts and that no other batch uses. The differences
between the APIs are in `anthropic_batch` and `openai_batch`. `dispatch.batch` decides what to do with a batch.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import orjson

from pipeline.core import jsonl
from pipeline.core.config import Endpoint
from pipeline.core.errors import ErrorScope, LineError, ProviderError
from pipeline.core.types import HttpRequest, HttpResponse
from pipeline.providers import responses
from pipeline.providers.base import Headers
from pipeline.providers.error_mapping import Rule
from pipeline.providers.responses import Malformed

T = TypeVar("T")

Ending = Literal["expired", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a batch failed its provider's validation. `line` is the line of the upload, from 1, if one is named."""

    code: str | None
    message: str
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch as its provider reports it.

    `status` is the provider's own word. Counts are None if they are not reported (yet). `files` are the paths of the
    result files below the API's address, most important first. `ending` says why requests without a result have none
    (expired, cancelled). It is None if every request should have a result. `problems` are set for a batch that was
    refused as a whole. `tag` is the tag that we gave it, if the API stores one. Times are UTC, ISO 8601.
    """

    id: str
    status: str
    is_ended: bool
    total: int | None = None
    succeeded: int | None = None
    failed: int | None = None
    created_at: str | None = None
    expires_at: str | None = None
    files: Sequence[str] = ()
    ending: Ending | None = None
    problems: Sequence[Problem] = ()
    tag: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of one request in a batch: the response that a live call would have got, else how it ended."""

    name: str
    answer: HttpResponse | None = None
    ending: Ending | None = None


class BatchCodec(typing.Protocol):
    """One batch API."""

    max_requests: int
    max_bytes: int
    """The provider's limits of one batch: requests, and bytes of the upload."""

    is_for_one_model: bool
    has_tags: bool
    """Whether all requests of a batch must name one model; whether a batch keeps the mark that it is given."""

    separator: bytes
    """What stands between two requests of an upload."""

    def name(self, local_id: str, custom_id: str, digest: str) -> str:
        """Return the name of a request in a batch: its own id where the provider takes it."""
        ...

    def entry(self, name: str, body: bytes) -> bytes:
        """Return a request as it stands in the upload."""
        ...

    def upload(self, endpoint: Endpoint, headers: Headers, local_id: str) -> HttpRequest | None:
        """Return the call that uploads a chunk ahead of its batch; None where it goes into the batch's own call."""
        ...

    def uploaded(self, answer: HttpResponse) -> str:
        """Return the id of the file that was uploaded. This and all that read answers raise `ProviderError`."""
        ...

    def create(self, endpoint: Endpoint, headers: Headers, local_id: str, file_id: str | None) -> HttpRequest:
        """Return the call that makes a batch."""
        ...

    def poll(self, endpoint: Endpoint, headers: Headers, id: str) -> HttpRequest: ...

    def cancel(self, endpoint: Endpoint, headers: Headers, id: str) -> HttpRequest: ...

    def batch(self, answer: HttpResponse) -> Batch:
        """Read the answer of `create`, `poll` and `cancel`."""
        ...

    def list(self, endpoint: Endpoint, headers: Headers, after: str | None) -> HttpRequest:
        """Return the call that lists batches, newest first, from behind the one called `after`."""
        ...

    def listed(self, answer: HttpResponse) -> tuple[Sequence[Batch], bool]:
        """Return the batches of a page, and True if there are older ones."""
        ...

    def download(self, endpoint: Endpoint, headers: Headers, file: str) -> HttpRequest: ...

    def refusal(self, answer: HttpResponse) -> ProviderError:
        """Return the error in the response to a failed download."""
        ...

    def outcome(self, line: bytes) -> Outcome:
        """Read a line of a results file. Raises `LineError` if it is not one."""
        ...

    def belongs(self, local_id: str, line: bytes) -> bool:
        """Return True if a result line shows that a batch is ours. For APIs without tags."""
        ...

    def failure(self, problem: Problem) -> ProviderError:
        """Return the error of a batch that failed validation."""
        ...

    def queue_limit(self, problem: Problem) -> int | None:
        """Return the provider's limit of queued input tokens for a model, if a failure names it."""
        ...


# ── what both have in common ──────────────────────────────────────────────────────────────────────────────────────


def address(endpoint: Endpoint, path: str) -> str:
    """Return an address below the endpoint's base URL."""
    return f"{endpoint.base_url.rstrip('/')}/{path.lstrip('/')}"


def read(
    answer: HttpResponse, reader: Callable[[Mapping[str, Any]], T], error: type[ProviderError], rules: Sequence[Rule]
) -> T:
    """Read the object of a 200. Raises `error` for everything else."""
    value, _ = responses.accepted(answer, error, rules)
    try:
        return reader(value)
    except Malformed as exc:
        raise responses.invalid_response(answer, error, str(exc)) from exc


def page(reader: Callable[[Any], Batch], value: Mapping[str, Any]) -> tuple[Sequence[Batch], bool]:
    """Return the batches of a page, and True if more follow."""
    listed = value.get("data") or []
    if not isinstance(listed, list):
        raise Malformed("its data is not a list")
    return [reader(each) for each in listed], value.get("has_more") is True


def with_header(headers: Headers, name: str, value: str) -> Headers:
    """Return headers with one of them replaced."""
    return (*((each, old) for each, old in headers if each != name), (name, value))


def text(value: Mapping[str, Any], name: str) -> str | None:
    """Return a text field of an object. None if it is not a non-empty text."""
    found = value.get(name)
    return found if isinstance(found, str) and found else None


def named(value: Mapping[str, Any], name: str) -> str:
    """Return a text field that an object must have. Raises `Malformed` if it is missing."""
    found = text(value, name)
    if found is None:
        raise Malformed(f"it has no {name}")
    return found


def counted(value: Any, name: str) -> int | None:
    """Return a count. None if it is absent or invalid."""
    count = value.get(name) if isinstance(value, dict) else None
    return count if type(count) is int and count >= 0 else None


def from_unix(value: Any) -> str | None:
    """Return Unix seconds as UTC, ISO 8601. None if they are not a valid time."""
    if type(value) not in (int, float) or not 0 <= value < 2**35:
        return None
    return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%dT%H:%M:%SZ}"


def from_rfc3339(value: Any) -> str | None:
    """Return an RFC 3339 time as UTC, ISO 8601 in whole seconds. None if it is not a valid time."""
    try:
        moment = datetime.fromisoformat(value).astimezone(UTC) if value else None
    except (TypeError, ValueError, OverflowError):
        return None
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}" if moment and moment.year >= 1970 else None


def result_line(line: bytes) -> tuple[str, Mapping[str, Any]]:
    """Return the name in a result line, and the line's object. Raises `LineError` if it has no name.

    Numbers stay exact. JSON that is not strict is repaired, because the result is paid for.
    """
    try:
        value = jsonl.loads(line)
    except LineError:
        value, _ = responses.parsed(line)
    if not isinstance(value, dict) or not isinstance(value.get("custom_id"), str):
        raise LineError("not a line of results: it has no custom_id")
    return value["custom_id"], value


def encoded(value: Any) -> bytes:
    """Return a part of a result line as JSON. A part nested too deep becomes a text, which decodes to an error."""
    try:
        return jsonl.dumps(value)
    except RecursionError:
        return b'"nested too deep"'


def unusable(reason: str) -> HttpResponse:
    """Return a response that cannot be decoded, for a result with neither a response nor an error."""
    return HttpResponse(status=200, body=orjson.dumps(reason))


def of_whole_batch(error: ProviderError) -> ProviderError:
    """Return an error about a whole batch: what would fail one request there stops its model."""
    return error.replace(scope=ErrorScope.MODEL) if error.scope is ErrorScope.REQUEST else error
