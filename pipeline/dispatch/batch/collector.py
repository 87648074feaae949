"""The results of a batch that has ended -> a verdict on each of its requests, whatever the files hold.

Results come in any order, in up to two files, and may tell of a request twice, of none at all, or of one that nobody
sent: the first word on a request counts, and what nothing tells of is judged by how the batch ended.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from anyio import to_thread

from pipeline.core import jsonl
from pipeline.core.errors import ErrorScope, LineError, ProviderError
from pipeline.core.hashing import FingerprintMap, FingerprintSet, fingerprint
from pipeline.dispatch.batch.client import BatchClient
from pipeline.dispatch.batch.outcome import ItemOutcome, OutcomeClassifier
from pipeline.dispatch.batch.store import BatchItem, BatchRecord, BatchStore, item_at
from pipeline.providers.batch import Batch, Outcome, of_whole_batch
from pipeline.results.codec import MAX_LINE_BYTES

_GROUP = 256


class WrongBatchError(Exception):
    """The results are those of another batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedItem:
    """A request and the verdict on it; `is_known` when its result was recorded before."""

    member: BatchItem
    verdict: ItemOutcome
    is_known: bool


class ResultCollector:
    """What one chunk brings in; `strangers` counts results of requests that are not in it."""

    def __init__(
        self,
        chunks: BatchStore,
        chunk: BatchRecord,
        courier: BatchClient,
        judge: OutcomeClassifier,
        is_known: Callable[[BatchItem], bool],
    ) -> None:
        self._chunks = chunks
        self._chunk = chunk
        self._courier = courier
        self._judge = judge
        self._is_known = is_known
        self._places = FingerprintMap()
        self._seen = FingerprintSet()
        self.strangers = 0

    async def gather(self, batch: Batch) -> AsyncIterator[Sequence[CollectedItem]]:
        """Fetch the results and yield verdicts in groups. Raises `NotOursError`, before the first of them."""
        await to_thread.run_sync(self._note_places)
        path = self._chunks.download_path(self._chunk)
        is_confirmed = self._chunk.is_confirmed
        for file in batch.files:
            await self._courier.fetch(file, path)
            with path.open("rb") as results:
                lines = jsonl.lines(results, MAX_LINE_BYTES)
                while group := await to_thread.run_sync(self._next_lines, lines):
                    if not is_confirmed and not self._courier.batches.belongs(self._chunk.nonce, group[0]):
                        raise WrongBatchError
                    is_confirmed = True
                    yield await to_thread.run_sync(self._judge_lines, group)
        if not is_confirmed:
            raise WrongBatchError
        async for judged in self.rest("failed" if batch.problems else batch.ending or "missing"):
            yield judged

    async def rest(self, ending: str) -> AsyncIterator[Sequence[CollectedItem]]:
        """Yield verdicts on the requests that nothing told of so far."""
        unseen = (
            member for _, member in self._chunks.members(self._chunk) if fingerprint(member.name) not in self._seen
        )
        while group := await to_thread.run_sync(lambda: list(islice(unseen, _GROUP))):
            yield [self._judged(member, self._judge.unfinished(member, ending)) for member in group]

    async def refused(
        self, named: Mapping[int, ProviderError], whole: ProviderError | None
    ) -> AsyncIterator[Sequence[CollectedItem]]:
        """Yield verdicts on the requests of a batch that was not taken: errors by line, and what was said of it all.

        Lines without an error go again, unless the whole batch met one that no other attempt would pass.
        """
        is_final = whole is not None and whole.reach is not ErrorScope.ATTEMPT
        numbered = enumerate(self._chunks.members(self._chunk), start=1)
        while group := await to_thread.run_sync(lambda: list(islice(numbered, _GROUP))):
            judged = []
            for number, (_, member) in group:
                if error := named.get(number):
                    verdict = self._judge.refused(member, error)
                elif whole is not None and is_final:
                    verdict = ItemOutcome(error=of_whole_batch(whole))
                else:
                    verdict = ItemOutcome(again=member)
                judged.append(self._judged(member, verdict))
            yield judged

    def _note_places(self) -> None:
        for place, member in self._chunks.members(self._chunk):
            self._places.put(fingerprint(member.name), place)

    @staticmethod
    def _next_lines(lines: Iterator[tuple[bytes, int]]) -> list[bytes]:
        return [line for line, _ in islice(lines, _GROUP)]

    def _judge_lines(self, lines: Iterable[bytes]) -> list[CollectedItem]:
        judged: list[CollectedItem] = []
        with self._chunks.reader(self._chunk) as file:
            for line in lines:
                outcome = self._outcome(line)
                place = self._places.get(fingerprint(outcome.name)) if outcome else None
                if outcome is None or place is None:
                    self.strangers += 1
                elif self._seen.add(fingerprint(outcome.name)):
                    member = item_at(file, place)
                    judged.append(self._judged(member, self._judge.judge(member, outcome)))
        return judged

    def _judged(self, member: BatchItem, verdict: ItemOutcome) -> CollectedItem:
        return CollectedItem(member=member, verdict=verdict, is_known=self._is_known(member))

    def _outcome(self, line: bytes) -> Outcome | None:
        try:
            return self._courier.batches.outcome(line)
        except LineError:
            return None
