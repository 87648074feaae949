"""The results of a batch as they go over the wire, made while they are sent."""

from collections.abc import AsyncGenerator, Sequence

from anyio.lowlevel import checkpoint

from pipeline.simulator.batches import Batch, Item
from pipeline.simulator.store import AT_ONCE, Store

_PIECE_BYTES = 65_536


class Results:
    """The result lines of some requests of a batch that is over, from a byte on."""

    def __init__(self, store: Store, batch: Batch, items: Sequence[Item], start: int = 0) -> None:
        self._store = store
        self._batch = batch
        self._items = items
        self._start = start
        self.whole = sum(item.size * item.copies for item in items)

    @property
    def size(self) -> int:
        """The bytes from the start on."""
        return self.whole - self._start

    def since(self, start: int) -> "Results":
        """Return the same lines from this byte on."""
        return Results(self._store, self._batch, self._items, start)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the lines in pieces; what was skipped is not made."""
        skipped, held = self._start, b""
        for count, item in enumerate(self._items, 1):
            if skipped >= item.size * item.copies:
                skipped -= item.size * item.copies
                continue
            held += (self._store.resolve(self._batch, item).line * item.copies)[skipped:]
            skipped = 0
            if len(held) >= _PIECE_BYTES:
                yield held
                held = b""
            if count % AT_ONCE == 0:
                await checkpoint()
        if held:
            yield held
