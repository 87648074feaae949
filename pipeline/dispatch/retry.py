"""Which failures are retried, how often, and how long to wait. tenacity decides, the sender acts.

The decision is pure: `Policy.wait_before_retry` returns seconds or None. tenacity's own loop is not used, because it
would keep a task asleep for every waiting request; here a waiting request is an entry in a heap.

There are two budgets. A failure of the request itself (500, a timeout, a broken answer) counts against `max_attempts`,
so a poisoned request ends. A failure for lack of capacity (429, 503, 529, no connection) says nothing about the
request and does not count; a run that makes no progress ends those.
"""

from __future__ import annotations

from tenacity import DoSleep, RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_base, wait_random_exponential

from pipeline.core.config import Sending
from pipeline.core.errors import ErrorScope, ProviderError

CAPACITY_STATUSES = frozenset({429, 503, 529})


def is_capacity(error: ProviderError) -> bool:
    """Return True if the failure means that the provider is full or down, and says nothing about the request."""
    return error.status in CAPACITY_STATUSES or (error.status is None and not error.may_be_billed)


def is_overload(error: ProviderError) -> bool:
    """Return True if fewer calls at once would help: the provider is full, down or slow, or the load grew too fast."""
    if error.status == 429:
        return error.code in ("slow_down", "ramp_limit_exceeded")
    return error.status in CAPACITY_STATUSES or error.type in ("timeout", "connection_error")


def is_retryable(error: BaseException) -> bool:
    """Return True if another attempt may succeed."""
    return isinstance(error, ProviderError) and error.scope is ErrorScope.ATTEMPT


class _HintOrBackoff(wait_base):
    """Wait as long as the provider asks; if it does not, exponential backoff with full jitter."""

    def __init__(self, settings: Sending) -> None:
        self._backoff = wait_random_exponential(multiplier=settings.backoff_initial, max=settings.backoff_max)

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        hint = error.retry_after if isinstance(error, ProviderError) else None
        return self._backoff(retry_state) if hint is None else hint


class Policy:
    """Decides when a failed call is retried."""

    def __init__(self, settings: Sending) -> None:
        self._wait = _HintOrBackoff(settings)
        self._counted = self._retrying(settings.max_attempts)
        self._uncounted = self._retrying(1_000_000_000)
        self.max_retry_after = settings.max_retry_after

    def wait_before_retry(self, error: ProviderError, attempts: int, counted: int) -> float | None:
        """Return the seconds to wait before a retry, or None to give up the request.

        `attempts` is the number of calls so far, `counted` how many of them count against the request.
        """
        if is_capacity(error):
            return self.wait_patiently(error, attempts)
        return _decide(self._counted, error, counted)

    def wait_patiently(self, error: ProviderError, attempts: int) -> float | None:
        """Return the seconds to wait before a retry without a limit on attempts; None for a final error."""
        return _decide(self._uncounted, error, attempts)

    def _retrying(self, attempts: int) -> Retrying:
        return Retrying(
            retry=retry_if_exception(is_retryable), stop=stop_after_attempt(attempts), wait=self._wait, reraise=True
        )


def _decide(policy: Retrying, error: ProviderError, attempts: int) -> float | None:
    """Return the seconds that a policy waits after so many attempts, None if it gives up."""
    policy.begin()
    state = RetryCallState(policy, None, (), {})
    state.attempt_number = attempts
    state.set_exception((type(error), error, error.__traceback__))
    try:
        action = policy.iter(state)
    except ProviderError:
        return None
    assert isinstance(action, DoSleep), action
    return float(action)
