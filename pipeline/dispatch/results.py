"""Where dispatch hands its results: the result writer implements this, and the stream of the Python API."""

from __future__ import annotations

from typing import Protocol

from pipeline.core.types import Request, Result


class ResultSink(Protocol):
    """Takes results, and keeps a log of calls in flight."""

    async def log_attempt(self, request: Request, attempt: int, at: str) -> None:
        """Log that a call is about to be made; returns when a crash cannot lose the entry."""
        ...

    def log_not_billed(self, request: Request, attempt: int) -> None:
        """Log that the last call for a request came back and was not billed."""
        ...

    async def append(self, *results: Result) -> None:
        """Take results; returns when a crash cannot lose them."""
        ...
