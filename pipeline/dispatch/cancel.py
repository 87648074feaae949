"""A stop that cuts short what may be left undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio


class StopSignal:
    """Called once; what waits under `cuts_short` ends then, and what comes to wait there later at once."""

    def __init__(self) -> None:
        self._scopes: set[anyio.CancelScope] = set()
        self.is_called = False

    def call(self) -> None:
        """Stop, now and from now on."""
        self.is_called = True
        for scope in self._scopes:
            scope.cancel()

    @contextmanager
    def cuts_short(self) -> Iterator[None]:
        """Leave the block when the stop is called, or at its first wait when it was."""
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            if self.is_called:
                scope.cancel()
            try:
                yield
            finally:
                self._scopes.discard(scope)
