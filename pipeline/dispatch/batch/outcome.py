"""Classifies the outcome of each request in a batch: a result, another attempt, or the end of its model.

Pure but for the clock. Responses go through the same codec as those of live calls. What a batch API reports as not
done was not billed; only a response that could not be used was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.accounting.pricing import BATCH, Pricing
from pipeline.core.clock import Clock
from pipeline.core.errors import ErrorScope, ProviderError
from pipeline.core.types import Attempt, Completion, Cost, Failure, HttpResponse, Result
from pipeline.dispatch.batch.store import BatchItem, BatchRecord
from pipeline.providers import Codec
from pipeline.providers.batch import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemOutcome:
    """What to do with a request: store a `result`, send it `again`, or neither if an `error` ends the model or the run.

    `nanos` is its cost in nano-dollars, None if unknown; `attempt` is the failed one. `is_cancelled`: the batch was
    cancelled before this request was processed.
    """

    result: Result | None = None
    again: BatchItem | None = None
    error: ProviderError | None = None
    attempt: Attempt | None = None
    nanos: int | None = 0
    is_cancelled: bool = False


class OutcomeClassifier:
    """Classifies the outcomes of one batch. `max_attempts` limits the attempts that count against a request."""

    def __init__(self, record: BatchRecord, codec: Codec, pricing: Pricing, clock: Clock, max_attempts: int) -> None:
        self._record = record
        self._codec = codec
        self._pricing = pricing
        self._clock = clock
        self._max_attempts = max_attempts

    def classify(self, item: BatchItem, answer: Outcome) -> ItemOutcome:
        """Classify a result line of a request."""
        if answer.answer is None:
            return self.unfinished(item, answer.ending or "missing")
        try:
            reply = self._codec.decode(answer.answer)
        except ProviderError as error:
            return self._failed(item, error, answer.answer)
        usage = reply.usage
        cost = self._pricing.cost(item.request, reply.model or item.request.model, usage) if usage else Cost()
        return ItemOutcome(result=self._result(item, reply=reply, cost=cost), nanos=cost.nanos)

    def unfinished(self, item: BatchItem, ending: str) -> ItemOutcome:
        """Classify a request without a response: `expired`, `cancelled`, `failed`, `missing`, or `abandoned` by us."""
        message, may_be_billed = {
            "expired": ("the batch expired before it came to this request", False),
            "cancelled": ("the batch was cancelled before it came to this request", False),
            "failed": ("the batch failed", False),
            "missing": ("the results of the batch do not tell of this request", True),
            "abandoned": ("the batch did not end in time, nor when it was cancelled", True),
        }[ending]
        attempt = Attempt(
            at=self._clock.utc(),
            type=f"batch_{ending}",
            message=f"{message} ({self._record.batch_id})",
            latency_s=0.0,
            may_be_billed=may_be_billed,
        )
        is_own_fault = ending in ("expired", "failed", "missing")
        outcome = self._again_or_failed(item, attempt, nanos=None if may_be_billed else 0, counts=is_own_fault)
        return replace(outcome, is_cancelled=ending == "cancelled")

    def refused(self, item: BatchItem, error: ProviderError) -> ItemOutcome:
        """Fail a request that the provider named when it refused the whole batch."""
        attempt = Attempt.of_error(error, at=self._clock.utc(), latency_s=0.0)
        return ItemOutcome(result=self._result(item, failed=attempt), attempt=attempt)

    def _failed(self, item: BatchItem, error: ProviderError, answer: HttpResponse) -> ItemOutcome:
        usage = self._codec.usage(answer) if answer.status == 200 else None
        error = error.replace(may_be_billed=answer.status == 200)
        cost = self._pricing.cost(item.request, item.request.model, usage) if usage else Cost()
        attempt = Attempt.of_error(error, at=self._clock.utc(), latency_s=0.0, usage=usage, cost_nano=cost.nanos)
        nanos = cost.nanos if error.may_be_billed else 0
        if error.scope in (ErrorScope.RUN, ErrorScope.MODEL):
            return ItemOutcome(error=error, attempt=attempt, nanos=nanos)
        if error.scope is ErrorScope.REQUEST:
            return ItemOutcome(result=self._result(item, failed=attempt), attempt=attempt, nanos=nanos)
        return self._again_or_failed(item, attempt, nanos=nanos, counts=True)

    def _again_or_failed(self, item: BatchItem, attempt: Attempt, *, nanos: int | None, counts: bool) -> ItemOutcome:
        counted = item.counted + counts
        if counted >= self._max_attempts:
            return ItemOutcome(result=self._result(item, failed=attempt), attempt=attempt, nanos=nanos)
        again = replace(item, attempts=(*item.attempts, attempt), counted=counted)
        return ItemOutcome(again=again, attempt=attempt, nanos=nanos)

    def _result(
        self,
        item: BatchItem,
        *,
        reply: Completion | None = None,
        failed: Attempt | None = None,
        cost: Cost | None = None,
    ) -> Result:
        attempts = (*item.attempts, failed) if failed else tuple(item.attempts)
        return Result.of_request(
            item.request,
            completed_at=self._clock.utc(),
            failed_attempts=attempts,
            reply=reply,
            failure=Failure.of_attempts(attempts) if failed else None,
            cost=cost,
            lane=BATCH,
            batch_id=self._record.batch_id,
        )
