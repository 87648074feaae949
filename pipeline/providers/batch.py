"""What a provider's batch API is to the rest of the program: a codec of calls and answers, without I/O or clock.

A batch is made of a chunk of requests, each under a name that the provider takes and that no other batch has. What the
two APIs differ in stands in `anthropic_batches` and `openai_batches`; what to do with a batch, in `batch`.
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
    """Why a batch failed its provider's validation; `line` counts the lines of the upload from 1, if one is named."""

    code: str | None
    message: str
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch as its provider tells of it.

    `status` is the provider's own word. Counts are None where it tells none (yet). `files` are the paths of the results
    beneath the API's address, in the order in which they count. `ending` is what befell the requests that have no
    result; None where every request should have one. `problems` are those of a batch that was refused as a whole.
    `tag` is the mark that we gave it, where the API keeps one. Times are UTC, ISO 8601.
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
    """What became of one request of a batch: the answer that a live call would have got, else how it ended."""

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

    def name(self, nonce: str, custom_id: str, digest: str) -> str:
        """Return the name of a request in a batch: its own id where the provider takes it."""
        ...

    def entry(self, name: str, body: bytes) -> bytes:
        """Return a request as it stands in the upload."""
        ...

    def upload(self, endpoint: Endpoint, headers: Headers, nonce: str) -> HttpRequest | None:
        """Return the call that uploads a chunk ahead of its batch; None where it goes into the batch's own call."""
        ...

    def uploaded(self, answer: HttpResponse) -> str:
        """Return the id of the file that was uploaded. This and all that read answers raise `ProviderError`."""
        ...

    def create(self, endpoint: Endpoint, headers: Headers, nonce: str, file_id: str | None) -> HttpRequest:
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
        """Return the batches of a page, and whether there are older ones."""
        ...

    def download(self, endpoint: Endpoint, headers: Headers, file: str) -> HttpRequest: ...

    def refusal(self, answer: HttpResponse) -> ProviderError:
        """Return the error in the answer to a download that is no file."""
        ...

    def outcome(self, line: bytes) -> Outcome:
        """Read a line of a results file; raises `LineError` for what is none."""
        ...

    def belongs(self, nonce: str, line: bytes) -> bool:
        """Tell by a line of its results whether a batch is ours, where it has no mark that says so."""
        ...

    def failure(self, problem: Problem) -> ProviderError:
        """Return the error of a batch that failed validation."""
        ...

    def queue_limit(self, problem: Problem) -> int | None:
        """Return how many input tokens the provider queues of a model, where a failure says that they are too many."""
        ...


# ── what both have in common ──────────────────────────────────────────────────────────────────────────────────────


def address(endpoint: Endpoint, path: str) -> str:
    """Return an address beneath that of the endpoint."""
    return f"{endpoint.base_url.rstrip('/')}/{path.lstrip('/')}"


def read(
    answer: HttpResponse, reader: Callable[[Mapping[str, Any]], T], error: type[ProviderError], rules: Sequence[Rule]
) -> T:
    """Read the object of a 200; everything else raises `error`."""
    value, _ = responses.accepted(answer, error, rules)
    try:
        return reader(value)
    except Malformed as exc:
        raise responses.invalid_response(answer, error, str(exc)) from exc


def page(reader: Callable[[Any], Batch], value: Mapping[str, Any]) -> tuple[Sequence[Batch], bool]:
    """Read a page of a list of batches, and whether more follow."""
    listed = value.get("data") or []
    if not isinstance(listed, list):
        raise Malformed("its data is not a list")
    return [reader(each) for each in listed], value.get("has_more") is True


def with_header(headers: Headers, name: str, value: str) -> Headers:
    """Return headers with one of them replaced."""
    return (*((each, old) for each, old in headers if each != name), (name, value))


def text(value: Mapping[str, Any], name: str) -> str | None:
    """Return a text of an object, None where it is null, absent, empty or something else."""
    found = value.get(name)
    return found if isinstance(found, str) and found else None


def named(value: Mapping[str, Any], name: str) -> str:
    """Return the text that an object must have; `Malformed` where it has none."""
    if (found := text(value, name)) is None:
        raise Malformed(f"it has no {name}")
    return found


def counted(value: Any, name: str) -> int | None:
    """Return a count, None where there is none that can be."""
    count = value.get(name) if isinstance(value, dict) else None
    return count if type(count) is int and count >= 0 else None


def from_unix(value: Any) -> str | None:
    """Return Unix seconds as UTC, ISO 8601; None for what is no time."""
    if type(value) not in (int, float) or not 0 <= value < 2**35:
        return None
    return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%dT%H:%M:%SZ}"


def from_rfc3339(value: Any) -> str | None:
    """Return a time of RFC 3339 as UTC, ISO 8601 in whole seconds; None for what is no time."""
    try:
        moment = datetime.fromisoformat(value).astimezone(UTC) if value else None
    except (TypeError, ValueError, OverflowError):
        return None
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}" if moment and moment.year >= 1970 else None


def result_line(line: bytes) -> tuple[str, Mapping[str, Any]]:
    """Return the name in a line of results, and the line's object; `LineError` where there is none.

    Numbers stay exact. What is not strict JSON is mended, as it is paid for.
    """
    try:
        value = jsonl.loads(line)
    except LineError:
        value, _ = responses.parsed(line)
    if not isinstance(value, dict) or not isinstance(value.get("custom_id"), str):
        raise LineError("not a line of results: it has no custom_id")
    return value["custom_id"], value


def encoded(value: Any) -> bytes:
    """Return a part of a line of results as JSON; what is nested too deep to be written is no reply to anything."""
    try:
        return jsonl.dumps(value)
    except RecursionError:
        return b'"nested too deep"'


def unusable(reason: str) -> HttpResponse:
    """Return an answer that no reply can be read from, for a result that tells neither reply nor error."""
    return HttpResponse(status=200, body=orjson.dumps(reason))


def of_whole_batch(error: ProviderError) -> ProviderError:
    """Return an error about a whole batch: what would fail one request there stops its model."""
    return error.replace(scope=ErrorScope.MODEL) if error.scope is ErrorScope.REQUEST else error
