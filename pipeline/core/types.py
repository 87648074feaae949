"""The values that travel through the program: frozen, keyword-only, picklable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self

from pipeline.core.errors import ProviderError


class Protocol(StrEnum):
    """The wire protocol that an endpoint speaks."""

    ANTHROPIC = "anthropic"
    OPENAI = "openai"


CHAT = "chat"
"""The endpoint for conversations, which every protocol has. Others are in `providers.registry`."""


class OutputFormat(StrEnum):
    """The dialect of result lines."""

    NATIVE = "native"
    OPENAI_BATCH = "openai-batch"
    ANTHROPIC_BATCH = "anthropic-batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One conversation, ready to send.

    `body` is the JSON that goes on the wire. `digest` (32 hex digits) identifies what is sent and to whom, so that a
    changed line, model or parameter is a different request. `max_output_tokens` is the answer's upper bound where
    the body names one. `estimated_input_tokens` is a guess from the size of the text. `endpoint` is the provider's
    endpoint that `body` is for.
    """

    custom_id: str
    digest: str
    source: str
    line: int
    provider: str
    model: str
    body: bytes
    max_output_tokens: int | None = None
    estimated_input_tokens: int = 0
    metadata: Any = None
    endpoint: str = CHAT


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """Every kind of token that is counted. This is the only list of them; results, ledger and reports derive theirs.

    `input_tokens` is the whole prompt including cache reads and writes; `output_tokens` includes reasoning.
    `cache_write_1h_tokens` is the part of `cache_write_tokens` written for one hour, which has its own price.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Input and output; the other kinds are parts of these."""
        return self.input_tokens + self.output_tokens


TOKEN_FIELDS = tuple(each.name for each in fields(TokenCounts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage(TokenCounts):
    """Tokens of one answer as the provider reported them, in the same terms for all providers.

    `web_searches` are those that the provider made and bills. `service_tier` is the tier of the response, if it names
    one (it changes the price).
    """

    web_searches: int = 0
    service_tier: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A tool call in an answer; `arguments` is the parsed object, or the text as it came where it is not JSON."""

    id: str | None
    name: str
    arguments: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A valid answer of a provider, decoded; `raw` is its body, byte for byte.

    Only where that is not strict JSON (a lone surrogate, NaN) is `raw` encoded anew. `model` is "" where none is told.
    `content` is the text of the answer (None when there is none: a tool call, a refusal). `usage` is None when the
    server reported none (some compatible servers); `refusal` is the provider's explanation or category.
    """

    model: str
    content: str | None
    finish_reason: str | None
    truncated: bool
    usage: Usage | None
    raw: bytes
    refusal: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    request_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of an answer in nano-dollars (1e-9 USD): None, never 0, if no price is known.

    `saved` is what the same tokens would have cost more without a cache (below 0 where writing it cost more).
    """

    nanos: int | None = None
    saved: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One failed call for a request: when (UTC, ISO 8601), what came back, how long it took.

    `usage` and `cost_nano` are there when an answer that could not be used told what it used: it is billed.
    """

    at: str
    type: str
    message: str
    latency_s: float
    status: int | None = None
    code: str | None = None
    request_id: str | None = None
    may_be_billed: bool = False
    usage: Usage | None = None
    cost_nano: int | None = None

    @classmethod
    def of_error(
        cls,
        error: ProviderError,
        *,
        at: str,
        latency_s: float,
        usage: Usage | None = None,
        cost_nano: int | None = None,
    ) -> Self:
        """Return the attempt that ended with an error."""
        return cls(
            at=at,
            type=error.type,
            message=error.message,
            latency_s=latency_s,
            status=error.status,
            code=error.code,
            request_id=error.request_id,
            may_be_billed=error.may_be_billed,
            usage=usage,
            cost_nano=cost_nano,
        )

    @property
    def is_unknown(self) -> bool:
        """Return True if the call may be billed and its cost is unknown."""
        return self.may_be_billed and self.usage is None


def wasted(attempts: Sequence[Attempt]) -> Sequence[tuple[Usage, int | None]]:
    """Return the tokens and cost (nano-dollars) of failed attempts, as far as their answers report them."""
    return [(attempt.usage, attempt.cost_nano) for attempt in attempts if attempt.usage] if attempts else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a line has no answer. `attempts` lists the calls that failed (empty for an invalid line)."""

    type: str
    message: str
    status: int | None = None
    code: str | None = None
    request_id: str | None = None
    attempts: Sequence[Attempt] = ()

    @classmethod
    def of_attempts(cls, attempts: Sequence[Attempt]) -> Self:
        """Return the failure of a request whose last attempt was the final one."""
        last = attempts[-1]
        return cls(
            type=last.type,
            message=last.message,
            status=last.status,
            code=last.code,
            request_id=last.request_id,
            attempts=tuple(attempts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of one input line: exactly one of `reply` and `failure` is set.

    `failed_attempts` are the calls that failed before the one that ended it. `request` is None for a line that could
    not become a request. `completed_at` is UTC, ISO 8601; `latency_s` is that of the last attempt, in seconds.
    """

    custom_id: str
    line: int
    source: str
    digest: str
    attempts: int
    completed_at: str
    request: Request | None = None
    reply: Completion | None = None
    failure: Failure | None = None
    failed_attempts: Sequence[Attempt] = ()
    latency_s: float | None = None
    lane: str = "live"
    batch_id: str | None = None
    cost: Cost = field(default_factory=Cost)
    metadata: Any = None

    @classmethod
    def of_request(
        cls,
        request: Request,
        *,
        completed_at: str,
        failed_attempts: Sequence[Attempt],
        reply: Completion | None = None,
        failure: Failure | None = None,
        latency_s: float | None = None,
        cost: Cost | None = None,
        lane: str = "live",
        batch_id: str | None = None,
    ) -> Self:
        """Return the result of a request: its reply, or its failure after the last attempt."""
        return cls(
            custom_id=request.custom_id,
            line=request.line,
            source=request.source,
            digest=request.digest,
            attempts=len(failed_attempts) + (reply is not None),
            completed_at=completed_at,
            request=request,
            reply=reply,
            failure=failure,
            failed_attempts=tuple(failed_attempts),
            latency_s=latency_s,
            lane=lane,
            batch_id=batch_id,
            cost=cost or Cost(),
            metadata=request.metadata,
        )

    @classmethod
    def of_invalid_line(
        cls, *, custom_id: str, digest: str, source: str, line: int, failure: Failure, completed_at: str
    ) -> Self:
        """Return the result of a line that could not become a request, so no call was made for it."""
        return cls(
            custom_id=custom_id,
            line=line,
            source=source,
            digest=digest,
            attempts=0,
            completed_at=completed_at,
            failure=failure,
        )

    @property
    def success(self) -> bool:
        return self.reply is not None

    @property
    def is_invalid(self) -> bool:
        """Return True if the line could not become a request."""
        return self.request is None

    @property
    def provider(self) -> str | None:
        return self.request.provider if self.request else None

    @property
    def model(self) -> str | None:
        """The model that answered; for a failure, or a server that does not name it, the requested model."""
        if self.reply and self.reply.model:
            return self.reply.model
        return self.request.model if self.request else None

    @property
    def content(self) -> str | None:
        return self.reply.content if self.reply else None

    @property
    def usage(self) -> Usage | None:
        return self.reply.usage if self.reply else None

    @property
    def wasted(self) -> Sequence[tuple[Usage, int | None]]:
        """The tokens and cost (nano-dollars) of failed attempts, as far as their answers report them."""
        return wasted(self.failed_attempts)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpResponse:
    """An HTTP answer: status, headers with lower-case names, and the decoded body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """One HTTP request of a batch API; `headers` has all but host and content-length, with lower-case names.

    Where `tail` is not None the content of a chunk goes between `body` and `tail`.
    """

    method: str
    url: str
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""
    tail: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One rate limit as a provider reports it: its kind, the amount per minute, and how much is left now.

    Kinds are `requests`, `input_tokens`, `output_tokens` and `tokens` (OpenAI's sum of both).
    """

    kind: str
    per_minute: int
    remaining: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """A rate limit at one moment: its kind, the amount per minute, the share that is used up, and who set it.

    `source` is `cap` (the user), `told` (the provider's headers) or `found` (by refusals).
    """

    kind: str
    per_minute: float
    used: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IdRange:
    """The ids that planning some lines took: their fingerprints, and a count for each repeated one.

    `is_alone` tells that no line before them took any of these, so that they mean the same wherever none did.
    """

    marks: Sequence[int]
    repeats: Mapping[int, int]
    is_alone: bool
