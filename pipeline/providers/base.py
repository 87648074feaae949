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
        """Return every header of a request, names in lower case, but for host and content-length."""
        ...

    def body(
        self, fields: Mapping[str, Any], endpoint: Endpoint, defaults: RequestDefaults, model: str
    ) -> dict[str, Any]:
        """Translate a portable line, without our own keys, to the provider's dialect.

        Leaves `fields` as it is, but shares parts with it. Raises `LineError` for what is wrong, and for what
        has no counterpart in this dialect: nothing is dropped in silence. A null field counts as absent.
        """
        ...

    def check_body(self, body: Mapping[str, Any]) -> None:
        """Check the shape of a body in the provider's own dialect, no more; raises `LineError`."""
        ...

    def max_output_tokens(self, body: Mapping[str, Any]) -> int | None:
        """Return how many tokens the answer to a body can have at most, where the body says so."""
        ...

    def decode(self, answer: HttpResponse) -> Completion:
        """Return the reply in a valid 200; everything else raises the provider's `ProviderError`.

        `Reply.model` is "" where the answer names none.
        """
        ...

    def usage(self, answer: HttpResponse) -> Usage | None:
        """Return what an answer that is no reply says that it used: it is billed all the same; None if nothing."""
        ...

    def lost(self, error: TransportError) -> ProviderError:
        """Return the provider's error for an answer that never came."""
        ...

    def limits(self, headers: Mapping[str, str]) -> Sequence[Limit]:
        """Return what an answer says of the provider's allowances; nothing where it says nothing usable."""
        ...

    def charge(self, input_tokens: float, output_tokens: float, max_output_tokens: int | None) -> dict[str, float]:
        """Return what a call takes out of each kind of allowance when it is sent."""
        ...

    def used(self, usage: Usage) -> dict[str, float]:
        """Return what a call took in the end, for the kinds that the provider puts right afterwards."""
        ...


def headers(endpoint: Endpoint, key: str | None, key_header: str, own: Mapping[str, str | None]) -> Headers:
    """Return the headers of an endpoint: the common ones, the protocol's `own` that have a value, the user's.

    The key goes into the endpoint's `api_key_header`, else into `key_header`: as it is, but `authorization`
    wants `Bearer KEY`.
    """
    name = (endpoint.api_key_header or key_header).lower()
    result = {"content-type": "application/json", "accept": "application/json", "user-agent": USER_AGENT}
    if key is not None:
        result[name] = f"Bearer {key}" if name == "authorization" else key
    result.update((name, value) for name, value in own.items() if value is not None)
    result.update((name.lower(), value) for name, value in endpoint.headers.items())
    return tuple(result.items())
