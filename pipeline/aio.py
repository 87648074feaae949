"""Starting the event loop: asyncio (aiolimiter knows no other), on uvloop where it is installed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import TypeVar

import anyio

T = TypeVar("T")


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run an async function to its end and return its value."""
    return anyio.run(work, backend_options={"use_uvloop": find_spec("uvloop") is not None})
