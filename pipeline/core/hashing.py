"""Sets and maps of 64-bit fingerprints, which keep the memory for a million lines small.

A Python set of a million strings takes over 100 MB; a set of fingerprints takes 9 bytes for each entry, a map twice
that. Fingerprints are spread evenly, so their first bits tell which of many short sorted arrays holds one: bisecting
that costs half a microsecond, nothing is kept free for hashing, and growing never holds two tables at once. The price
is a chance of 3e-8 that two of a million different entries share a fingerprint.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b, sha256

_BITS = 64
_BUCKET = 512  # entries of a bucket on average, at most


def fingerprint(*parts: str) -> int:
    """Return the fingerprint of some texts: 64 bits, never 0; the same in every process."""
    digest = blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1


def checksum(*parts: bytes | bytearray) -> bytes:
    """Return a 16-byte checksum of the content. Processors have SHA-256 built in: a gigabyte takes half a second."""
    digest = sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()[:16]


class FingerprintSet:
    """A growing set of fingerprints."""

    def __init__(self) -> None:
        self._buckets = [array("Q")]
        self._shift = _BITS
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, item: int) -> bool:
        bucket = self._buckets[item >> self._shift]
        place = bisect_left(bucket, item)
        return place < len(bucket) and bucket[place] == item

    def add(self, item: int) -> bool:
        """Add a fingerprint; return whether it is new."""
        bucket = self._buckets[item >> self._shift]
        place = bisect_left(bucket, item)
        if place < len(bucket) and bucket[place] == item:
            return False
        bucket.insert(place, item)
        self._count += 1
        if self._count > _BUCKET * len(self._buckets):
            self._grow()
        return True

    def add_all(self, items: Sequence[int]) -> bool:
        """Add some fingerprints if every one of them is new, else none; return whether they were."""
        while self._count + len(items) > _BUCKET * len(self._buckets):
            self._grow()
        buckets, shift = self._buckets, self._shift
        for number, item in enumerate(items):
            bucket = buckets[item >> shift]
            place = bisect_left(bucket, item)
            if place < len(bucket) and bucket[place] == item:
                for added in items[:number]:
                    self._remove(added)
                return False
            bucket.insert(place, item)
            self._count += 1
        return True

    def update(self, items: Sequence[int]) -> None:
        """Add very many fingerprints: sorting all is three times as fast as adding one by one."""
        while self._count + len(items) > _BUCKET * len(self._buckets):
            self._grow()
        buckets, shift = self._buckets, self._shift
        ends = [len(bucket) for bucket in buckets]
        for number, more in Counter(item >> shift for item in items).items():
            buckets[number].frombytes(bytes(8 * more))  # room for all at once: growing bit by bit tears memory up
        for item in items:
            number = item >> shift
            buckets[number][ends[number]] = item
            ends[number] += 1
        for bucket in buckets:
            ordered = sorted(set(bucket))
            bucket[: len(ordered)] = array("Q", ordered)
            del bucket[len(ordered) :]
        self._count = sum(map(len, buckets))

    def _remove(self, item: int) -> None:
        bucket = self._buckets[item >> self._shift]
        del bucket[bisect_left(bucket, item)]
        self._count -= 1

    def _grow(self) -> None:
        """Split every bucket in two."""
        self._shift -= 1
        self._buckets = self._split(self._buckets, self._buckets)

    def _split(self, buckets: list[array[int]], by: list[array[int]]) -> list[array[int]]:
        """Return the halves of some buckets, split at the same places as the buckets of `by`."""
        halves: list[array[int]] = []
        for number, (bucket, keys) in enumerate(zip(buckets, by, strict=True)):
            middle = bisect_left(keys, (2 * number + 1) << self._shift)
            halves += (bucket[:middle], bucket[middle:])
        return halves


class FingerprintMap(FingerprintSet):
    """A growing map from fingerprints to unsigned 64-bit numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._values = [array("Q")]

    def get(self, item: int) -> int | None:
        number = item >> self._shift
        bucket = self._buckets[number]
        place = bisect_left(bucket, item)
        return self._values[number][place] if place < len(bucket) and bucket[place] == item else None

    def put(self, item: int, value: int) -> None:
        number = item >> self._shift
        place = bisect_left(self._buckets[number], item)
        if item in self:
            self._values[number][place] = value
        else:
            self._values[number].insert(place, value)
            self.add(item)

    def _grow(self) -> None:
        self._shift -= 1
        self._values = self._split(self._values, self._buckets)
        self._buckets = self._split(self._buckets, self._buckets)
