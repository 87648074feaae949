"""The clock of a run: the event loop's. It reads the wall clock only once, so clock jumps change nothing."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta


class Clock:
    """Elapsed seconds and UTC times of a run. Make it inside the event loop."""

    def __init__(self) -> None:
        self.now = asyncio.get_running_loop().time  # what anyio.current_time() looks up at every call
        self._start = self.now()
        self._started_at = datetime.now(UTC)
        self._second = -1
        self._text = ""

    def elapsed(self) -> float:
        """Return the seconds since the run began."""
        return self.now() - self._start

    def utc(self) -> str:
        """Return the time of day in UTC, ISO 8601, whole seconds."""
        second = int(self.now() - self._start)
        if second != self._second:
            self._second = second
            self._text = f"{self._started_at + timedelta(seconds=second):%Y-%m-%dT%H:%M:%SZ}"
        return self._text

    def moment(self) -> datetime:
        """Return the time of day in UTC."""
        return self._started_at + timedelta(seconds=self.elapsed())

    @property
    def started_at(self) -> str:
        """The start of the run: UTC, ISO 8601."""
        return f"{self._started_at:%Y-%m-%dT%H:%M:%SZ}"


def utc_now() -> datetime:
    """Return the time in UTC, for code without an event loop."""
    return datetime.now(UTC)
