"""The interfaces of codecs, which have no I/O, no clock and no retries."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.config import Endpoint, RequestDefaults
from pipeline.core.errors import ProviderError, TransportError
from pipeline.core.types import Completion, HttpResponse, Limit, OutputFormat, Protocol, Result, Usage

USER_AGENT = "pipeline-batch"
Headers = tuple[tuple[str, str], ...]


class LineDialect(typing.Protocol):
    """The JSONL lines of a provider's batch API: requests that it reads, and results that it writes."""

    format: OutputFormat
    name: str
    """What messages call these lines, as `OpenAI Batch`."""

    body_key: str
    """The key of an input line that has the request's body. No other dialect has it."""

    known_keys: tuple[str, ...]
    """All keys that an input line may have."""

    protocol: Protocol

    def endpoint(self, line: Mapping[str, Any]) -> str:
        """Return the endpoint that an input line is for. Raise `LineError` if it is unknown."""
        ...

    def result(self, result: Result) -> dict[str, Any]:
        """Return a result as the batch API would write it."""
        ...

    def is_result(self, line: Mapping[str, Any]) -> bool:
        """Return True if a result line that is not native is in this dialect."""
        ...

    def outcome(self, line: Mapping[str, Any]) -> tuple[bool, str | None]:
        """Return if a result line is a success, and the model that answered.

        Raises `KeyError`, `TypeError` or `AttributeError` for a damaged line.
        """
        ...


class Codec(typing.Protocol):
    """One endpoint of a wire protocol: requests to bodies, responses to completions or errors.

    `line_url` is the `url` of this endpoint in a batch line, None if such lines have none. `caches_unasked` is True if
    the provider caches prompts that no mark asks it to cache.
    """

    protocol: Protocol
    endpoint: str
    line_url: str | None
    caches_unasked: bool

    def url(self, endpoint: Endpoint) -> str:
        """Return the address that requests are posted to."""
        ...

    def headers(self, endpoint: Endpoint, key: str | None) -> Headers:
        """Return all headers of a request except host and content-length. Names are in lower case."""
        ...

    def body(
        self, fields: Mapping[str, Any], endpoint: Endpoint, defaults: RequestDefaults, model: str
    ) -> dict[str, Any]:
        """Translate a portable line, without our own keys, to the provider's dialect.

        Does not change `fields`, but the body shares parts with it. Raises `LineError` for invalid fields and for
        fields without a counterpart in this dialect: nothing is dropped silently. A null field counts as absent.
        """
        ...

    def check_body(self, body: Mapping[str, Any]) -> None:
        """Check only the shape of a body in the provider's own dialect. Raises `LineError`."""
        ...

    def max_output_tokens(self, body: Mapping[str, Any]) -> int | None:
        """Return the most output tokens that a body allows. None if it sets no limit."""
        ...

    def decode(self, response: HttpResponse) -> Completion:
        """Return the completion in a valid 200. Raises the provider's `ProviderError` for everything else.

        `Completion.model` is "" if the response names no model.
        """
        ...

    def usage(self, response: HttpResponse) -> Usage | None:
        """Return the usage in a response that could not be decoded: it is billed anyway. None if it reports none."""
        ...

    def lost(self, error: TransportError) -> ProviderError:
        """Return the provider's error for a response that never came."""
        ...

    def limits(self, headers: Mapping[str, str]) -> Sequence[Limit]:
        """Return the rate limits that response headers report. Empty if they report none."""
        ...

    def charge(self, input_tokens: float, output_tokens: float, max_output_tokens: int | None) -> dict[str, float]:
        """Return what a call takes from each kind of rate limit when it is sent."""
        ...

    def used(self, usage: Usage) -> dict[str, float]:
        """Return what a call really used, for the kinds that the provider corrects after the response."""
        ...


def headers(endpoint: Endpoint, key: str | None, key_header: str, own: Mapping[str, str | None]) -> Headers:
    """Return the headers of an endpoint: the common ones, those in `own` that have a value, then the user's.

    The key goes into the endpoint's `api_key_header`, else into `key_header`. `authorization` gets `Bearer KEY`, every
    other header the key alone.
    """
    name = (endpoint.api_key_header or key_header).lower()
    result = {"content-type": "application/json", "accept": "application/json", "user-agent": USER_AGENT}
    if key is not None:
        is_bearer = name == "authorization"
        result[name] = f"Bearer {key}" if is_bearer else key
    for own_name, value in own.items():
        if value is not None:
            result[own_name] = value
    # The user's headers come last, so that they can override ours.
    for user_name, value in endpoint.headers.items():
        result[user_name.lower()] = value
    return tuple(result.items())
