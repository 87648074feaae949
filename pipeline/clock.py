"""The one clock of a run: the event loop's, with the wall clock read once, so that clock jumps change nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import anyio


class Clock:
    """Tells elapsed seconds and UTC times; must be made inside the event loop."""

    def __init__(self) -> None:
        self._start = anyio.current_time()
        self._started_at = datetime.now(UTC)
        self._second = -1
        self._text = ""

    def elapsed(self) -> float:
        """Return the seconds since the run began."""
        return anyio.current_time() - self._start

    def utc(self) -> str:
        """Return the time of day in UTC, ISO 8601, whole seconds."""
        second = int(anyio.current_time() - self._start)
        if second != self._second:
            self._second = second
            self._text = f"{self._started_at + timedelta(seconds=second):%Y-%m-%dT%H:%M:%SZ}"
        return self._text

    @property
    def started_at(self) -> str:
        """When the run began: UTC, ISO 8601."""
        return f"{self._started_at:%Y-%m-%dT%H:%M:%SZ}"
