"""Starting the event loop: asyncio (aiolimiter knows no other), on uvloop where it is installed."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import TypeVar

import anyio

T = TypeVar("T")

# The values of a run hold no cycles, and a thousand in flight are many young objects: with Python's own threshold of
# 700 its collector looked at them all the time and took a tenth of the processor.
_YOUNG_OBJECTS = 50_000


def tune() -> None:
    """Set the process up for the work of a run."""
    gc.set_threshold(_YOUNG_OBJECTS)


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run an async function to its end and return its value."""
    tune()
    return anyio.run(work, backend_options={"use_uvloop": find_spec("uvloop") is not None})
