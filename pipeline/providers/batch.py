"""The interface of a codec for a provider's batch API: calls and responses, without I/O or clock.

A batch consists of requests. Each has a name that the provider accepts and that no other batch uses. The differences
between the APIs are in `anthropic_batch` and `openai_batch`. `dispatch.batch` decides what to do with a batch.
"""

from __future__ import annotations

import abc
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import orjson

from pipeline.core import jsonl
from pipeline.core.config import Endpoint
from pipeline.core.errors import ErrorScope, LineError, ProviderError
from pipeline.core.types import HttpRequest, HttpResponse
from pipeline.providers import responses
from pipeline.providers.base import Headers
from pipeline.providers.error_mapping import Rule, member
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
    """Whether all requests of a batch must name one model, and whether the API stores our tag with a batch."""

    separator: bytes
    """The bytes between two requests of an upload."""

    def name(self, local_id: str, custom_id: str, digest: str) -> str:
        """Return the name of a request in a batch: its own id if the provider accepts it, else its digest."""
        ...

    def entry(self, name: str, body: bytes) -> bytes:
        """Return a request as the upload contains it."""
        ...

    def upload(self, endpoint: Endpoint, headers: Headers, local_id: str) -> HttpRequest | None:
        """Return the call that uploads the requests. None if they go into the call that creates the batch."""
        ...

    def uploaded(self, response: HttpResponse) -> str:
        """Return the id of the uploaded file. All methods that read a response raise `ProviderError`."""
        ...

    def create(self, endpoint: Endpoint, headers: Headers, local_id: str, file_id: str | None) -> HttpRequest:
        """Return the call that creates a batch."""
        ...

    def poll(self, endpoint: Endpoint, headers: Headers, id: str) -> HttpRequest: ...

    def cancel(self, endpoint: Endpoint, headers: Headers, id: str) -> HttpRequest: ...

    def batch(self, response: HttpResponse) -> Batch:
        """Read the response to `create`, `poll` or `cancel`."""
        ...

    def list(self, endpoint: Endpoint, headers: Headers, after: str | None) -> HttpRequest:
        """Return the call that lists batches, newest first, starting after the batch with the id `after`."""
        ...

    def listed(self, response: HttpResponse) -> tuple[Sequence[Batch], bool]:
        """Return the batches of a page, and True if there are older ones."""
        ...

    def download(self, endpoint: Endpoint, headers: Headers, file: str) -> HttpRequest: ...

    def refusal(self, response: HttpResponse) -> ProviderError:
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


class RestCalls(abc.ABC):
    """The calls that are the same in both batch APIs: a collection of batches, each with an address of its own.

    `error` and `rules` make errors of responses that are not a 200.
    """

    error: type[ProviderError]
    rules: Sequence[Rule]

    @abc.abstractmethod
    def collection_url(self, endpoint: Endpoint) -> str:
        """Return the address of the collection."""

    @abc.abstractmethod
    def to_batch(self, value: Any) -> Batch:
        """Read a batch object. Raises `Malformed`."""

    def poll(self, endpoint: Endpoint, headers: Headers, id: str) -> HttpRequest:
        return HttpRequest(method="GET", url=self._url(endpoint, id), headers=headers)

    def cancel(self, endpoint: Endpoint, headers: Headers, id: str) -> HttpRequest:
        return HttpRequest(method="POST", url=f"{self._url(endpoint, id)}/cancel", headers=headers)

    def batch(self, response: HttpResponse) -> Batch:
        return self.read(response, self.to_batch)

    def listed(self, response: HttpResponse) -> tuple[Sequence[Batch], bool]:
        return self.read(response, partial(page, self.to_batch))

    def refusal(self, response: HttpResponse) -> ProviderError:
        return responses.refusal(response, self.error, self.rules)

    def read(self, response: HttpResponse, reader: Callable[[Mapping[str, Any]], T]) -> T:
        """Read the object of a 200. Raises `error` for everything else."""
        value, _ = responses.accepted(response, self.error, self.rules)
        try:
            return reader(value)
        except Malformed as exc:
            raise responses.invalid_response(response, self.error, str(exc)) from exc

    def _url(self, endpoint: Endpoint, id: str) -> str:
        return f"{self.collection_url(endpoint)}/{quote(id, safe='')}"


# ── shared by the codecs ──────────────────────────────────────────────────────────────────────────────────────


def address(endpoint: Endpoint, path: str) -> str:
    """Return an address below the endpoint's base URL."""
    return f"{endpoint.base_url.rstrip('/')}/{path.lstrip('/')}"


def page(reader: Callable[[Any], Batch], value: Mapping[str, Any]) -> tuple[Sequence[Batch], bool]:
    """Return the batches of a page, and True if more follow."""
    listed = value.get("data") or []
    if not isinstance(listed, list):
        raise Malformed("its data is not a list")
    return [reader(each) for each in listed], value.get("has_more") is True


def with_header(headers: Headers, name: str, value: str) -> Headers:
    """Return headers with one of them replaced."""
    kept = [header for header in headers if header[0] != name]
    return (*kept, (name, value))


def text(value: Mapping[str, Any], name: str) -> str | None:
    """Return a text field of an object. None if it is not a non-empty text."""
    found = value.get(name)
    if isinstance(found, str) and found:
        return found
    return None


def named(value: Mapping[str, Any], name: str) -> str:
    """Return a text field that an object must have. Raises `Malformed` if it is missing."""
    found = text(value, name)
    if found is None:
        raise Malformed(f"it has no {name}")
    return found


def counted(value: Any, name: str) -> int | None:
    """Return a count. None if it is absent or invalid."""
    count = member(value, name)
    # The exact type, because `true` is an int to Python.
    if type(count) is int and count >= 0:
        return count
    return None


def from_unix(value: Any) -> str | None:
    """Return Unix seconds as UTC, ISO 8601. None if they are not a valid time."""
    # Later times, after the year 3058, are no times of a batch, and `fromtimestamp` fails for the largest.
    if type(value) not in (int, float) or not 0 <= value < 2**35:
        return None
    return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%dT%H:%M:%SZ}"


def from_rfc3339(value: Any) -> str | None:
    """Return an RFC 3339 time as UTC, ISO 8601 in whole seconds. None if it is not a valid time."""
    if not value:
        return None
    try:
        moment = datetime.fromisoformat(value).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        return None
    # Go servers write the year 1 for a time that is not set.
    if moment.year < 1970:
        return None
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def result_line(line: bytes) -> tuple[str, Mapping[str, Any]]:
    """Return the name in a result line, and the line's object. Raises `LineError` if it has no name.

    Numbers stay exact. JSON that is not strict is repaired, because the result is paid for.
    """
    try:
        value = jsonl.loads(line)
    except LineError:
        value, _ = responses.parsed(line)
    if not isinstance(value, dict) or not isinstance(value.get("custom_id"), str):
        raise LineError("not a result line: it has no custom_id")
    return value["custom_id"], value


def encoded(value: Any) -> bytes:
    """Return a part of a result line as JSON. A part nested too deep becomes a string, which decodes to an error."""
    try:
        return jsonl.dumps(value)
    except RecursionError:
        return b'"nested too deep"'


def unusable(reason: str) -> HttpResponse:
    """Return a response that cannot be decoded, for a result with neither a response nor an error."""
    return HttpResponse(status=200, body=orjson.dumps(reason))


def of_whole_batch(error: ProviderError) -> ProviderError:
    """Return an error of a whole batch. If its scope is one request, the scope becomes the model."""
    if error.scope is ErrorScope.REQUEST:
        return error.replace(scope=ErrorScope.MODEL)
    return error
