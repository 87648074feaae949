"""Equal requests, paid once (`--dedupe`): the first is sent, and its result is copied for the others.

Requests are equal when their digests are: the same body to the same provider. What is copied is the line itself, with
the id and place of the other line in it, no tokens and no cost, as nothing was used for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedReader

from pipeline.core.hashing import FingerprintMap, FingerprintSet, fingerprint
from pipeline.core.types import Request
from pipeline.inputs.planner import Planner
from pipeline.inputs.reader import Line
from pipeline.results import codec


class Deduper:
    """Which requests are sent, or were answered before, so that their equals need not be; 20 bytes each."""

    def __init__(self) -> None:
        self._digests = FingerprintSet()

    def read(self, file: BufferedReader, *, answered_only: bool) -> None:
        """Add what a results file holds."""
        for _, _, record in codec.read(file):
            if record and (record.success or not answered_only):
                self.add(record.digest)

    def add(self, digest: str) -> bool:
        """Add a request; return whether it is the first of its kind."""
        return self._digests.add(fingerprint(digest))


def copies(
    file: BufferedReader, lines: Iterator[Line], planner: Planner, *, run_id: str, at: str, retry_failed: bool
) -> Iterator[bytes]:
    """Yield a result line for each input line without one whose equal has one; `file` holds the results so far.

    With `retry_failed` a failure counts as none, but for those of this run: an older one only waits to be sent again.
    """
    done, originals = _look(file, run_id if retry_failed else None)
    for line in lines:
        request = planner.plan(line)
        if not isinstance(request, Request) or fingerprint(request.custom_id, request.digest) in done:
            continue
        offset = originals.get(fingerprint(request.digest))
        if offset is not None:
            file.seek(offset)
            yield codec.copy(file.readline(), request, run_id=run_id, at=at)


def _look(file: BufferedReader, failed_in: str | None) -> tuple[FingerprintSet, FingerprintMap]:
    """Return which requests have a result, and where the result of each digest stands; of several the last.

    With `failed_in` only failures of this run count.
    """
    done, originals = FingerprintSet(), FingerprintMap()
    for here, _, record in codec.read(file):
        if record and (record.success or failed_in in (None, record.run)):
            done.add(fingerprint(record.custom_id, record.digest))
            originals.put(fingerprint(record.digest), here)
    return done, originals
