"""Errors never change: several tasks may hold the same one."""

from __future__ import annotations

import pickle
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from pipeline.core.errors import ErrorScope, OpenAIAPIError, PipelineError, TransportError, TryLaterError

if TYPE_CHECKING:
    from collections.abc import Iterator

REFUSED = OpenAIAPIError("slow down", type="rate_limit_error", scope=ErrorScope.ATTEMPT, status=429, retry_after=2.0)


@pytest.mark.parametrize("name", ["message", "scope", "retry_after", "status", "args_seen"])
def test_a_field_cannot_be_assigned_or_deleted(name: str) -> None:
    """Neither a known field nor a new one can be set or removed; the error stays as it was."""
    before = dict(vars(REFUSED))

    with pytest.raises(AttributeError, match="immutable"):
        setattr(REFUSED, name, "other")
    with pytest.raises(AttributeError, match="immutable"):
        delattr(REFUSED, name)

    assert vars(REFUSED) == before


def test_a_changed_copy_leaves_the_original_alone() -> None:
    """`replace` keeps the class, the other fields and the cause, and its message is what `str` shows."""
    cause = ValueError("why")
    error = REFUSED.replace(retry_after=3.0)
    error.__cause__ = cause

    changed = error.replace(message="openai/m: slow down", scope=ErrorScope.MODEL)

    assert type(changed) is OpenAIAPIError
    assert (str(changed), changed.args) == ("openai/m: slow down", ("openai/m: slow down",))
    assert (changed.scope, changed.retry_after, changed.status, changed.hint) == (ErrorScope.MODEL, 3.0, 429, None)
    assert changed.__cause__ is cause
    assert (error.message, error.scope) == ("slow down", ErrorScope.ATTEMPT)


def test_a_scope_that_comes_from_the_class_can_be_replaced() -> None:
    """`scope` may stand on the class; a copy carries its own, also through pickle."""
    error = TryLaterError("later").replace(scope=ErrorScope.MODEL)

    assert pickle.loads(pickle.dumps(error)).scope is ErrorScope.MODEL
    assert TryLaterError("later").scope is ErrorScope.RUN


def test_an_unknown_field_is_refused() -> None:
    """A typing error in a field's name does not pass."""
    with pytest.raises(TypeError, match="no field 'retry_afetr'"):
        REFUSED.replace(retry_afetr=1.0)
    with pytest.raises(TypeError, match="no field 'status'"):
        PipelineError("no").replace(status=500)


def test_python_may_still_chain_annotate_and_reraise() -> None:
    """`raise … from`, notes, tracebacks and context managers, which set dunder attributes, work as ever."""

    @contextmanager
    def passing() -> Iterator[None]:
        try:
            yield
        finally:
            pass

    def fail() -> None:
        with ExitStack() as stack:
            stack.enter_context(passing())
            try:
                raise OSError("reset")
            except OSError as exc:
                error = TransportError("lost", type="connection_error", is_sent=True)
                error.add_note("seen")
                raise error from exc

    with pytest.raises(TransportError, match="lost") as caught:
        fail()

    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__notes__ == ["seen"]
