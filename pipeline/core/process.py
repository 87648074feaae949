"""The process: its event loop, its garbage collector, and how many files it may open.

The loop is asyncio (aiolimiter supports no other), on uvloop where that is installed.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import TypeVar

import anyio

_OTHER_FILES = 64  # results, inputs, the loop's own, resolver and TLS


T = TypeVar("T")

# The values of a run have no reference cycles, and a thousand requests in flight are many young objects: with Python's
# default threshold of 700, the collector scanned them all the time and took a tenth of the processor.
_YOUNG_OBJECTS = 50_000


def tune_gc() -> None:
    """Prepare the process for a run."""
    gc.set_threshold(_YOUNG_OBJECTS)


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run an async function to its end and return its value."""
    tune_gc()
    return anyio.run(work, backend_options={"use_uvloop": find_spec("uvloop") is not None})


def raise_fd_limit(connections: int) -> int:
    """Raise the soft limit of open files as far as needed and allowed; return how many connections fit, at least 1."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        return max(1, min(connections, allowed - _OTHER_FILES))
    return connections
