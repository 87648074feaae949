"""Reads the results of a batch that has ended and classifies each request, whatever the files hold.

Results come in any order, in up to two files. They may name a request twice, not at all, or one that was never sent:
the first result of a request counts, and a request without one is classified by how the batch ended.
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
    """The results belong to another batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedItem:
    """A request and its outcome; `is_known` if its result was stored before."""

    item: BatchItem
    outcome: ItemOutcome
    is_known: bool


class ResultCollector:
    """Collects the results of one batch; `unmatched` counts results of requests that are not in it."""

    def __init__(
        self,
        store: BatchStore,
        record: BatchRecord,
        client: BatchClient,
        classifier: OutcomeClassifier,
        is_known: Callable[[BatchItem], bool],
    ) -> None:
        self._store = store
        self._record = record
        self._client = client
        self._classifier = classifier
        self._is_known = is_known
        self._places = FingerprintMap()
        self._seen = FingerprintSet()
        self.unmatched = 0

    async def gather(self, batch: Batch) -> AsyncIterator[Sequence[CollectedItem]]:
        """Fetch the results and yield outcomes in groups. Raises `WrongBatchError` before the first group."""
        await to_thread.run_sync(self._note_places)
        path = self._store.download_path(self._record)
        is_confirmed = self._record.is_confirmed
        for name in batch.files:
            await self._client.fetch(name, path)
            with path.open("rb") as file:
                lines = jsonl.lines(file, MAX_LINE_BYTES)
                while group := await to_thread.run_sync(self._next_lines, lines):
                    if not is_confirmed and not self._client.batches.belongs(self._record.local_id, group[0]):
                        raise WrongBatchError
                    is_confirmed = True
                    yield await to_thread.run_sync(self._judge_lines, group)
        if not is_confirmed:
            raise WrongBatchError
        async for collected in self.rest("failed" if batch.problems else batch.ending or "missing"):
            yield collected

    async def rest(self, ending: str) -> AsyncIterator[Sequence[CollectedItem]]:
        """Yield outcomes of the requests without a result so far."""
        unseen = (item for _, item in self._store.items(self._record) if fingerprint(item.name) not in self._seen)
        while group := await to_thread.run_sync(lambda: list(islice(unseen, _GROUP))):
            yield [self._collected(item, self._classifier.unfinished(item, ending)) for item in group]

    async def refused(
        self, named: Mapping[int, ProviderError], whole: ProviderError | None
    ) -> AsyncIterator[Sequence[CollectedItem]]:
        """Yield outcomes of a refused batch: `named` holds errors by line, `whole` is the batch's own error.

        Lines without an error are sent again, unless the batch's own error is final.
        """
        final = of_whole_batch(whole) if whole is not None and whole.scope is not ErrorScope.ATTEMPT else None
        numbered = enumerate(self._store.items(self._record), start=1)
        while group := await to_thread.run_sync(lambda: list(islice(numbered, _GROUP))):
            collected = []
            for number, (_, item) in group:
                if error := named.get(number):
                    outcome = self._classifier.refused(item, error)
                elif final is not None:
                    outcome = ItemOutcome(error=final)
                else:
                    outcome = ItemOutcome(again=item)
                collected.append(self._collected(item, outcome))
            yield collected

    def _note_places(self) -> None:
        for place, item in self._store.items(self._record):
            self._places.put(fingerprint(item.name), place)

    @staticmethod
    def _next_lines(lines: Iterator[tuple[bytes, int]]) -> list[bytes]:
        return [line for line, _ in islice(lines, _GROUP)]

    def _judge_lines(self, lines: Iterable[bytes]) -> list[CollectedItem]:
        collected: list[CollectedItem] = []
        with self._store.reader(self._record) as file:
            for line in lines:
                answer = self._outcome(line)
                place = self._places.get(fingerprint(answer.name)) if answer else None
                if answer is None or place is None:
                    self.unmatched += 1
                elif self._seen.add(fingerprint(answer.name)):
                    item = item_at(file, place)
                    collected.append(self._collected(item, self._classifier.classify(item, answer)))
        return collected

    def _collected(self, item: BatchItem, outcome: ItemOutcome) -> CollectedItem:
        return CollectedItem(item=item, outcome=outcome, is_known=self._is_known(item))

    def _outcome(self, line: bytes) -> Outcome | None:
        try:
            return self._client.batches.outcome(line)
        except LineError:
            return None
