"""Virtual time for tests: the event loop jumps when nothing is ready, and its clock creeps.

looptime makes it jump. A clock that stands still while tasks run would live-lock aiolimiter, which waits for the rest
of a rounding error; so each look at the clock moves it by a nanosecond.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

import anyio.lowlevel
import pytest
from anyio import to_thread

T = TypeVar("T")

virtual_time = [pytest.mark.looptime, pytest.mark.usefixtures("creeping_clock")]


@pytest.fixture
async def creeping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the running loop's clock creep by a nanosecond at every look."""
    loop = asyncio.get_running_loop()
    jumping, looks = loop.time, count()
    monkeypatch.setattr(loop, "time", lambda: jumping() + next(looks) * 1e-9)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do the work of threads in the loop: a virtual clock would run away while a real thread works."""

    async def run_sync(work: Callable[..., T], *args: Any, **_: Any) -> T:
        await anyio.lowlevel.checkpoint()
        return work(*args)

    monkeypatch.setattr(to_thread, "run_sync", run_sync)
