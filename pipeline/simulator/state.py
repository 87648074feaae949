"""What one running simulator remembers."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from itertools import count

import anyio

from pipeline.simulator.faults import BatchFault, Operation, parse_batch_fault
from pipeline.simulator.options import Options
from pipeline.simulator.statistics import Statistics
from pipeline.simulator.types import Limits

_ADVANCE_SECONDS = 60  # longer than the largest batches take; a loop that ends meanwhile might never answer


class State:
    """Options, statistics, clock and counters, shared by all endpoints of an application."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.statistics = Statistics(journal=options.journal)
        self._limits: dict[tuple[Callable[[Options], Limits], str, str], Limits] = {}
        self._attempts: Counter[int] = Counter()
        self._serials = count(1)
        self._wall_offset: float | None = None
        self._batch_faults = {
            operation: deque(parse_batch_fault(operation, kind) for kind in kinds)
            for operation, kinds in options.batch_faults.items()
        }
        self._advances: list[Callable[[], Awaitable[None]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def serial(self) -> int:
        """Return a number that no other response has."""
        return next(self._serials)

    def request_id(self) -> str:
        """Return the id of one more response."""
        return f"req_{self.options.seed & 0xFFFFFFFF:08x}{self.serial():016x}"

    def limits(self, key: str, model: str, make: Callable[[Options], Limits]) -> Limits:
        """Return the rate limits of a key and model, full on first use; each protocol has its own."""
        name = (make, key, model)
        if name not in self._limits:
            self._limits[name] = make(self.options)
        return self._limits[name]

    def change_limits(self, factor: float) -> None:
        """Multiply the limits of every key and model seen so far."""
        for limits in self._limits.values():
            limits.change(factor, anyio.current_time())

    def attempt(self, digest: bytes) -> int:
        """Count how often a body has come this far, from 1."""
        short = int.from_bytes(digest[:8])
        self._attempts[short] += 1
        return self._attempts[short]

    def wall(self, now: float) -> float:
        """Return the Unix time of a moment of the event loop's clock, which in tests may be virtual."""
        if self._wall_offset is None:
            self._wall_offset = time.time() - anyio.current_time()
        return now + self._wall_offset

    def batch_fault(self, operation: Operation) -> BatchFault:
        """Count a call of an operation on batches, and return what happens to it."""
        self._loop = asyncio.get_running_loop()
        self.statistics.batches.calls[operation] += 1
        faults = self._batch_faults.get(operation)
        return faults.popleft() if faults else BatchFault(kind="ok")

    def watch(self, advance: Callable[[], Awaitable[None]]) -> None:
        """Have `advance` called, on the event loop, before the statistics are read."""
        self._advances.append(advance)

    async def advance(self) -> None:
        """Bring all batches up to date, as a batch only moves on when it is looked at."""
        for advance in self._advances:
            await advance()

    def advance_from_thread(self) -> None:
        """Do so from a thread other than the event loop's; nothing happens after the loop's end."""
        if self._loop is None or self._loop.is_closed():
            return
        with suppress(CancelledError):  # the server ended meanwhile
            asyncio.run_coroutine_threadsafe(self.advance(), self._loop).result(_ADVANCE_SECONDS)
