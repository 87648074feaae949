"""Pin the program to one core while its threads would only pass Python's lock from core to core.

The event loop and the thread of the transport need the lock some three times a request. Where each has a core of its
own, every hand-over wakes a thread on another core: a third of all time, when nothing else limits the program (README,
Speed). On one core they take turns without that. A program that waits for its provider is left alone, as is one whose
threads work side by side: a look now and then tells. Linux only; other systems have no way to ask for it.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

_LOOK_SECONDS = 0.2  # over a shorter time, one group of lines makes the program look busier than it is
_PAUSE_SECONDS = 0.25  # between looks at a program that is left alone
_HOLD_SECONDS = 10.0
_BUSY = 0.8  # of one core
# Cores. With answers of 1 to 6 kB it is 1.07 to 1.13, and on one core a quarter less time is needed; of 13 kB, packed,
# 1.15, and it makes no difference; of 22 kB and more, 1.25, and one core needs a quarter more, as they are unpacked
# beside the loop.
_SIDE_BY_SIDE = 1.14
_HANDOVERS = 2_000.0  # a second; with the lock going back and forth at full speed it is more than ten thousand
_TASKS = Path("/proc/self/task")


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Usage of the program so far: wall seconds, processor seconds, and how often one of its threads waited."""

    wall: float
    processor: float
    waits: int


def pin() -> None:
    """Start managing the cores of this process. Only the command may do this, not a program that imports us."""
    if hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1:
        Thread(target=keep, name="cores", daemon=True).start()


def keep(wait: Callable[[float], None] = time.sleep, use: Callable[[], Use] | None = None) -> None:
    """Pin the program to one core for some seconds each time that measurements call for it; stop where it cannot."""
    use = use or _use

    def look() -> bool:
        before = use()
        wait(_LOOK_SECONDS)
        return is_contended(before, use())

    with suppress(OSError):  # without /proc, nothing is pinned
        while True:
            if not (look() and look()):  # a single look may have measured only the start of the work
                wait(_PAUSE_SECONDS)
                continue
            cores = os.sched_getaffinity(0)  # read again: the administrator may have changed them
            core = _busiest()
            try:
                hold({core})
                wait(_HOLD_SECONDS)
            finally:
                _let_go(cores, wait)


def is_contended(before: Use, now: Use) -> bool:
    """Return True if the program uses up a core and its threads keep waiting for each other."""
    seconds = now.wall - before.wall
    return (
        seconds > 0
        and _BUSY <= (now.processor - before.processor) / seconds <= _SIDE_BY_SIDE
        and (now.waits - before.waits) / seconds >= _HANDOVERS
    )


def hold(cores: Collection[int]) -> None:
    """Let all threads of this process run on these cores only, including threads that start meanwhile."""
    held: set[str] = set()
    while tasks := {task.name for task in _TASKS.iterdir()} - held:
        for task in tasks:
            with suppress(OSError):  # the thread has ended, or the machine lost that core
                os.sched_setaffinity(int(task), cores)
        held |= tasks


def _let_go(cores: Collection[int], wait: Callable[[float], None]) -> None:
    """Restore the cores in any case: if no file can be opened to list the threads, try again a little later."""
    while True:
        try:
            hold(cores)
        except OSError:
            wait(_PAUSE_SECONDS)
        else:
            return


def _use() -> Use:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Use(wall=time.monotonic(), processor=usage.ru_utime + usage.ru_stime, waits=usage.ru_nvcsw)


def _busiest() -> int:
    """Return the core that the busiest thread last ran on: `utime`, `stime` and `processor` of proc(5)."""
    used: list[tuple[int, int]] = []
    for task in _TASKS.iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            values = (task / "stat").read_text().rpartition(")")[2].split()
            used.append((int(values[11]) + int(values[12]), int(values[36])))
    return max(used)[1]
