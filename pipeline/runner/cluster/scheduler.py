"""Which part of the input is whose turn: cut, planned, settled in the order of the input, done, or to be done again.

Only a table: what happens to a part is decided here, and done elsewhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import anyio
from anyio import to_thread

from pipeline.core.errors import PipelineError
from pipeline.core.types import IdRange
from pipeline.inputs.sources import ByteRange, cut
from pipeline.runner.cluster.id_registry import NONE, IdRegistry, Scan
from pipeline.runner.feed import InputFeed


@dataclass(slots=True, kw_only=True)
class Shard:
    """A part of the inputs on its way; `number` is its place there.

    `before` is what must be known of the ids of those before it, `known` are the lines with results (`record.key`),
    `wanted` counts the others, `limit` bounds its lines. `losses` is how often it was lost with a worker in a row.
    """

    number: int
    spans: tuple[ByteRange, ...]
    before: IdRange = NONE
    known: list[int] = field(default_factory=list)
    limit: int | None = None
    wanted: int = 0
    losses: int = 0


class Scheduler:
    """The parts of one run; `limit` bounds the lines."""

    def __init__(self, sources: Sequence[str], feed: InputFeed, *, limit: int | None) -> None:
        self._sources = sources
        self._feed = feed
        self._limit = limit
        self._ahead = 1
        self._shards: Iterator[tuple[ByteRange, ...]] = iter(())
        self._id_registry = IdRegistry()
        self._is_cut = False
        self._cutting = anyio.Lock()
        self._count = 0
        self._to_scan: list[tuple[int, Shard]] = []
        self._in_scan = 0
        self._scanned: dict[int, tuple[Shard, Scan]] = {}
        self._next_settled = 0
        self._next_line = 1
        self._to_do: list[tuple[int, Shard]] = []
        self._in_work = 0
        self._changed = anyio.Event()
        self.is_stopped = False

    @property
    def is_over(self) -> bool:
        """Return True if nothing is left to be done, or will be done."""
        if self._in_work:
            return False
        return self.is_stopped or (
            self._is_cut and not (self._to_scan or self._in_scan or self._scanned or self._to_do)
        )

    def begin(self, size: int, *, ahead: int) -> None:
        """Cut the inputs into parts of about so many bytes; so many are planned ahead at most."""
        self._shards = shards(self._sources, size)
        self._ahead = ahead

    @property
    def change(self) -> anyio.Event:
        """What is set when it is worth while to look again; to be asked for before looking."""
        return self._changed

    def stop(self) -> None:
        """Begin nothing more; what is in work is finished."""
        self.is_stopped = True
        self._tell()

    # ── planning ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def next_to_scan(self) -> Shard | None:
        """Return a part to be planned, to be followed by `scanned` or `unscanned`; None if there is none now.

        Raises `UsageError` or `TryLaterError` where an input cannot be read, or changes; nothing is begun after that.
        """
        shard = await self._next_to_scan()
        if shard is not None:
            self._in_scan += 1
        return shard

    async def _next_to_scan(self) -> Shard | None:
        if self.is_stopped:
            return None
        if self._to_scan:
            return heapq.heappop(self._to_scan)[1]
        async with self._cutting:
            is_ahead = len(self._scanned) + len(self._to_do) + self._in_scan >= self._ahead
            if self._is_cut or is_ahead or self.is_stopped:
                return None
            try:
                spans = None if self._is_limit_reached() else await to_thread.run_sync(next, self._shards, None)
            except PipelineError:
                self.stop()  # before another looks: cutting has come to its end, the input has not
                raise
            if spans is None:
                self._is_cut = True
                self._settle()
                self._tell()
                return None
            self._count += 1
            return Shard(number=self._count - 1, spans=spans)

    def scanned(self, shard: Shard, scan: Scan) -> None:
        """Take what planning a part found."""
        self._in_scan -= 1
        self._scanned[shard.number] = (shard, scan)
        self._settle()
        self._tell()

    def unscanned(self, shard: Shard, *, is_lost: bool) -> None:
        """Take a part back that was not planned."""
        self._in_scan -= 1
        shard.losses += is_lost
        heapq.heappush(self._to_scan, (shard.number, shard))
        self._tell()

    def _settle(self) -> None:
        """Settle what is planned in the order of the input: ids, line numbers, what has results already."""
        while self._next_settled in self._scanned:
            shard, scan = self._scanned.pop(self._next_settled)
            if before := self._id_registry.settle(scan):
                heapq.heappush(self._to_scan, (shard.number, replace(shard, before=before)))
                return
            self._next_settled += 1
            self._admit(shard, scan)
        if self._is_cut and self._next_settled == self._count:
            self._feed.end()

    def _admit(self, shard: Shard, scan: Scan) -> None:
        """Let a part be done, as far as it is wanted."""
        keys: Sequence[int] = scan.keys
        if self._limit is not None:
            shard.limit = self._limit - self._feed.lines
            keys = keys[: shard.limit]
        shard.spans = tuple(replace(span, number=self._next_line if span.start else 1) for span in shard.spans)
        self._next_line = shard.spans[-1].number + scan.lines
        shard.known = self._feed.count_planned(keys)
        shard.wanted = len(keys) - len(shard.known)
        if shard.wanted:
            heapq.heappush(self._to_do, (shard.number, shard))

    def _is_limit_reached(self) -> bool:
        return self._limit is not None and self._feed.lines >= self._limit

    # ── doing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def next_to_do(self) -> Shard | None:
        """Return a part to be done, to be followed by `done` or `undone`; None if there is none now."""
        if self.is_stopped or not self._to_do:
            return None
        self._in_work += 1
        return heapq.heappop(self._to_do)[1]

    def done(self) -> None:
        """Note that a part was done, as far as it could be."""
        self._in_work -= 1
        self._tell()

    def undone(self, shard: Shard, collected: Sequence[int]) -> None:
        """Take a part back that was not done; but for some of its lines, given by their keys."""
        shard.known += collected
        shard.wanted -= len(collected)
        shard.losses = 0 if collected else shard.losses + 1
        self._in_work -= 1
        heapq.heappush(self._to_do, (shard.number, shard))
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def shards(sources: Iterable[str], size: int) -> Iterator[tuple[ByteRange, ...]]:
    """Cut inputs into parts of about `size` bytes. Consecutive small inputs share a part."""
    pack: list[ByteRange] = []
    packed = 0
    for span in chain.from_iterable(cut(source, size) for source in sources):
        length = size if span.end is None else span.end - span.start
        if pack and packed + length > size:
            yield tuple(pack)
            pack, packed = [], 0
        pack.append(span)
        packed += length
    if pack:
        yield tuple(pack)
