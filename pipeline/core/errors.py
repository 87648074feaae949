"""Every error that the program raises on purpose, in one tree. Each error says how much it invalidates.

    PipelineError
    ├── UsageError            wrong command line, configuration or environment variable; nothing was sent
    │   └── ConfigError       config.yaml: all problems at once, each with its key and line
    ├── BudgetReachedError    the spending cap does not cover the next call
    ├── StorageError          results, attempt log or totals cannot be written
    ├── TryLaterError         not now: another run holds the output, or a provider is down
    ├── LineError             an input line cannot become a request
    ├── TransportError        no usable response: connection, timeout, size
    └── ProviderError         the provider refused, failed, or sent a response that cannot be used
        ├── AnthropicAPIError
        └── OpenAIAPIError

Code that retries or gives up reads an error's `scope` and keeps no lists of classes.

Errors are immutable: several tasks may hold the same one. `replace` returns a changed copy.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Self, TypeVar

E = TypeVar("E", bound="PipelineError")


class ErrorScope(StrEnum):
    """How much an error invalidates."""

    ATTEMPT = "attempt"
    """This call only: another attempt may succeed."""
    REQUEST = "request"
    """The request: its line fails."""
    MODEL = "model"
    """Every request to the model: its lines stay pending."""
    RUN = "run"
    """The whole run: it stops."""


class PipelineError(Exception):
    """Base class of the package's errors.

    `message` says what happened, `hint` what to do next.
    """

    scope: ErrorScope = ErrorScope.RUN
    exit_code = 1
    message: str
    hint: str | None

    def __init__(self, message: str, *, hint: str | None = None, **fields: Any) -> None:
        """Set the fields; subclasses pass theirs as `fields`, since assignment is refused."""
        super().__init__(message)
        self.__dict__.update(message=message, hint=hint, **fields)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed. Raises `TypeError` for a field that the error does not have."""
        for name in changes:
            if name != "scope" and name not in self.__dict__:
                raise TypeError(f"{type(self).__name__} has no field {name!r}")
        fields = self.__dict__ | changes
        copy = _rebuild(type(self), (fields["message"],), fields)
        copy.__cause__ = self.__cause__
        return copy.with_traceback(self.__traceback__)

    def __setattr__(self, name: str, value: object) -> None:
        # Python itself sets __traceback__, __context__, __notes__ and the like.
        if not name.startswith("__"):
            raise AttributeError(f"errors are immutable: use replace({name}=…)")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if not name.startswith("__"):
            raise AttributeError("errors are immutable")
        super().__delattr__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[E], args: tuple[Any, ...], fields: dict[str, Any]) -> E:
    """Make an error without calling `__init__`, whose arguments differ from class to class."""
    error = cls.__new__(cls, *args)  # sets `args`
    error.__dict__.update(fields)
    return error


class UsageError(PipelineError):
    """The command, its options or its environment are wrong; nothing was sent."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration is wrong; the message lists every problem with its key and line."""


class BudgetReachedError(PipelineError):
    """The spending cap does not cover the next call, whose worst case is `amount` nano-dollars.

    Everything paid for so far is recorded.
    """

    exit_code = 4
    amount: int

    def __init__(self, message: str, *, hint: str | None = None, amount: int = 0) -> None:
        super().__init__(message, hint=hint, amount=amount)


class StorageError(PipelineError):
    """Results cannot be stored; what was stored before stays valid."""

    exit_code = 5


class TryLaterError(PipelineError):
    """The job cannot continue now: repeat the same command later."""

    exit_code = 75


class LineError(PipelineError):
    """An input line cannot become a request. The message gives the reason, without file and line."""

    scope = ErrorScope.REQUEST
    type: str

    def __init__(self, message: str, *, type: str = "invalid_line") -> None:
        super().__init__(message, type=type)


class TransportError(PipelineError):
    """No usable response arrived.

    `type` is one of `connection_error`, `timeout`, `response_too_large`, `tls_error`, `invalid_http`.
    `is_sent`: the request may have reached the provider, so it may be billed although no response came.
    """

    type: str
    is_sent: bool

    def __init__(self, message: str, *, type: str, is_sent: bool, scope: ErrorScope = ErrorScope.ATTEMPT) -> None:
        super().__init__(message, type=type, is_sent=is_sent, scope=scope)


class ProviderError(PipelineError):
    """A call that brought no completion: the provider refused or failed, or its response was lost or unusable.

    `type` and `code` are the provider's own words (`rate_limit_error`, `context_length_exceeded`, …). Without an error
    body from the provider `type` is ours (`timeout`, `connection_error`, `invalid_response`, …). `status` is the HTTP
    status, None without a response. `retry_after` is how long the provider asks to wait: seconds, finite and positive.
    `may_be_billed`: the provider may have done the work although there is no valid response.
    `attempts` counts the calls that the error stands for.
    """

    type: str
    code: str | None
    status: int | None
    request_id: str | None
    retry_after: float | None
    may_be_billed: bool
    attempts: int

    def __init__(
        self,
        message: str,
        *,
        type: str,
        scope: ErrorScope,
        code: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        may_be_billed: bool = False,
        attempts: int = 1,
    ) -> None:
        super().__init__(
            message,
            type=type,
            scope=scope,
            code=code,
            status=status,
            request_id=request_id,
            retry_after=retry_after,
            may_be_billed=may_be_billed,
            attempts=attempts,
        )


class AnthropicAPIError(ProviderError):
    """An error from an endpoint that speaks the Anthropic protocol."""


class OpenAIAPIError(ProviderError):
    """An error from an endpoint that speaks the OpenAI protocol."""


def only_one(group: BaseExceptionGroup[BaseException]) -> PipelineError | None:
    """Return our error in a group; None if the group also holds other exceptions, which must be seen whole."""
    ours, others = group.split(PipelineError)
    if ours is None or others is not None:
        return None
    error: BaseException = ours
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, PipelineError) else None
