"""Everything that can go wrong, in one tree; each error says how far it reaches.

    PipelineError
    ├── UsageError            the command line, the configuration or an environment variable; nothing was sent
    │   └── ConfigError       config.yaml: all problems at once, each with its key and line
    ├── BudgetReachedError    the cap on what a run may spend does not cover the next call
    ├── StorageError          results, journal or totals cannot be written
    ├── TryLaterError         somebody else's turn: another run holds the output, an outage
    ├── LineError             one input line cannot become a request
    ├── TransportError        no usable answer came back: connection, timeout, size
    └── ProviderError         the provider refused, failed or answered nonsense
        ├── AnthropicAPIError
        └── OpenAIAPIError

Retrying and sending read `reach` and keep no lists of classes: an `ATTEMPT` error may be tried again, a `REQUEST`
error ends that line, a `MODEL` error ends everything for that model, a `RUN` error ends the run.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class ErrorScope(StrEnum):
    """How far an error reaches."""

    ATTEMPT = "attempt"
    REQUEST = "request"
    MODEL = "model"
    RUN = "run"


class PipelineError(Exception):
    """Base of every error that this package raises on purpose."""

    reach = ErrorScope.RUN
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[PipelineError], args: tuple[Any, ...], state: dict[str, Any]) -> PipelineError:
    """Unpickle without calling `__init__`, so keyword-only arguments survive the trip."""
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class UsageError(PipelineError):
    """The command, its options or its environment are wrong; nothing was sent."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration is wrong; the message lists every problem with its key and line."""


class BudgetReachedError(PipelineError):
    """The cap on spending does not cover the next call, of `amount` nano-dollars; what was paid for is recorded."""

    exit_code = 4

    def __init__(self, message: str, *, hint: str | None = None, amount: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.amount = amount


class StorageError(PipelineError):
    """Results cannot be stored; what was stored before stays valid."""

    exit_code = 5


class TryLaterError(PipelineError):
    """Nothing is wrong with the job, but not now: try the same command later."""

    exit_code = 75


class LineError(PipelineError):
    """One input line cannot become a request. The message is the reason, without file and line."""

    reach = ErrorScope.REQUEST

    def __init__(self, message: str, *, type: str = "invalid_line") -> None:
        super().__init__(message)
        self.type = type


class TransportError(PipelineError):
    """No usable answer came back.

    `type` is one of `connection_error`, `timeout`, `response_too_large`, `tls_error`, `invalid_http`.
    `is_sent` tells whether the request may have reached the provider, and so may be billed without an answer.
    """

    def __init__(self, message: str, *, type: str, is_sent: bool, reach: ErrorScope = ErrorScope.ATTEMPT) -> None:
        super().__init__(message)
        self.type = type
        self.is_sent = is_sent
        self.reach = reach


class ProviderError(PipelineError):
    """What a provider answered instead of a reply, or what kept its answer from us.

    `type` and `code` are the provider's own words (`rate_limit_error`, `context_length_exceeded`, …) or, where there
    was no such body, ours (`timeout`, `connection_error`, `invalid_response`, …). `status` is the HTTP status or None.
    `retry_after` is the provider's hint in seconds, already checked to be finite and positive. `may_be_billed` is true
    when the provider may have done the work although we hold no valid answer. `attempts` counts the calls made.
    """

    def __init__(
        self,
        message: str,
        *,
        type: str,
        reach: ErrorScope,
        code: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        may_be_billed: bool = False,
        attempts: int = 1,
    ) -> None:
        super().__init__(message)
        self.type = type
        self.reach = reach
        self.code = code
        self.status = status
        self.request_id = request_id
        self.retry_after = retry_after
        self.may_be_billed = may_be_billed
        self.attempts = attempts


class AnthropicAPIError(ProviderError):
    """An error of an endpoint that speaks the Anthropic protocol."""


class OpenAIAPIError(ProviderError):
    """An error of an endpoint that speaks the OpenAI protocol."""


def only_one(group: BaseExceptionGroup[BaseException]) -> PipelineError | None:
    """Return the error of ours in a group, unless there are bugs in it too: those must be seen whole."""
    ours, others = group.split(PipelineError)
    if ours is None or others is not None:
        return None
    error: BaseException = ours
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, PipelineError) else None
