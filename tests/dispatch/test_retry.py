"""The retry table: which failures are tried again, how often, and how long to wait."""

from __future__ import annotations

import pytest

from pipeline.core.config import Sending
from pipeline.core.errors import ErrorScope, OpenAIAPIError, ProviderError
from pipeline.dispatch.retry import Policy, is_capacity


def _error(
    status: int | None = 500,
    *,
    scope: ErrorScope = ErrorScope.ATTEMPT,
    retry_after: float | None = None,
    may_be_billed: bool = True,
) -> ProviderError:
    return OpenAIAPIError(
        "as scripted", type="t", scope=scope, status=status, retry_after=retry_after, may_be_billed=may_be_billed
    )


@pytest.mark.parametrize("scope", [ErrorScope.REQUEST, ErrorScope.MODEL, ErrorScope.RUN])
def test_what_reaches_beyond_the_attempt_is_never_tried_again(scope: ErrorScope) -> None:
    """Only an error of the attempt itself is tried again."""
    assert Policy(Sending()).wait_before_retry(_error(scope=scope), attempts=1, counted=1) is None


@pytest.mark.parametrize(
    ("status", "may_be_billed", "capacity"),
    [
        pytest.param(429, False, True, id="rate limit"),
        pytest.param(503, False, True, id="unavailable"),
        pytest.param(529, False, True, id="overloaded"),
        pytest.param(None, False, True, id="no connection"),
        pytest.param(None, True, False, id="timeout after sending"),
        pytest.param(500, False, False, id="server error"),
        pytest.param(200, True, False, id="broken answer"),
    ],
)
def test_capacity_is_told_from_the_requests_own_fault(status: int | None, may_be_billed: bool, capacity: bool) -> None:
    """A refusal for want of capacity says nothing about the request."""
    assert is_capacity(_error(status, may_be_billed=may_be_billed)) is capacity


def test_a_poisoned_request_ends_after_max_attempts() -> None:
    """A request that fails by its own fault is tried `max_attempts` times and no more."""
    policy = Policy(Sending(max_attempts=4))
    waits = [policy.wait_before_retry(_error(500), attempts=n, counted=n) for n in (1, 2, 3, 4)]

    assert None not in waits[:3]
    assert waits[3] is None


def test_want_of_capacity_never_fails_a_request() -> None:
    """The thousandth 429 is waited for like the first: rows are not lost to rate limits."""
    assert Policy(Sending(max_attempts=2)).wait_before_retry(_error(429), attempts=1_000, counted=0) is not None


def test_the_providers_hint_is_obeyed_exactly() -> None:
    """A hint replaces the backoff: not earlier, not later."""
    assert Policy(Sending()).wait_before_retry(_error(429, retry_after=7.25), attempts=9, counted=0) == 7.25


def test_backoff_has_full_jitter_and_a_ceiling() -> None:
    """Without a hint the wait is anywhere from 0 to the doubled initial one, and never above the ceiling."""
    policy = Policy(Sending(backoff_initial=1.0, backoff_max=8.0, max_attempts=50))

    def waits(attempt: int) -> list[float]:
        return [policy.wait_before_retry(_error(500), attempts=attempt, counted=attempt) or 0.0 for _ in range(300)]

    first, late = waits(1), waits(40)

    assert max(first) <= 1.0
    assert min(first) < 0.2
    assert max(first) > 0.8
    assert 6.0 < max(late) <= 8.0
