"""Sets and maps of 64-bit fingerprints: what a million lines may cost in memory.

A Python set of a million strings takes over 100 MB; these tables take 10 to 20 bytes for each entry of a set, twice
that for a map. The price is a chance of 3e-8 that two of a million different entries share a fingerprint.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b


def fingerprint(*parts: str) -> int:
    """Return the fingerprint of some texts: 64 bits, never 0; the same in every process."""
    digest = blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1


class FingerprintSet:
    """A growing set of fingerprints: open addressing over one array, at most 80 % full."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._mask = 1023
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, item: int) -> bool:
        return self._slots[self._slot(item)] == item

    def add(self, item: int) -> bool:
        """Add a fingerprint; return whether it is new."""
        slot = self._slot(item)
        if self._slots[slot] == item:
            return False
        self._slots[slot] = item
        self._count += 1
        if self._count * 5 > len(self._slots) * 4:
            self._grow()
        return True

    def _slot(self, item: int) -> int:
        """Return the slot of an item, or the free one where it belongs."""
        slots, mask = self._slots, self._mask
        slot = item & mask
        while (found := slots[slot]) and found != item:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(16 * len(old)))
        self._mask = len(self._slots) - 1
        for item in old:
            if item:
                self._slots[self._slot(item)] = item


class FingerprintMap(FingerprintSet):
    """A growing map from fingerprints to unsigned 64-bit numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._values = array("Q", bytes(8 * len(self._slots)))

    def get(self, item: int) -> int | None:
        slot = self._slot(item)
        return self._values[slot] if self._slots[slot] == item else None

    def put(self, item: int, value: int) -> None:
        self.add(item)
        self._values[self._slot(item)] = value

    def _grow(self) -> None:
        old, old_values = self._slots, self._values
        self._slots = array("Q", bytes(16 * len(old)))
        self._values = array("Q", bytes(16 * len(old)))
        self._mask = len(self._slots) - 1
        for item, value in zip(old, old_values, strict=True):
            if item:
                slot = self._slot(item)
                self._slots[slot] = item
                self._values[slot] = value
