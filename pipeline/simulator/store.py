"""All batches of one provider, and what becomes of them as time passes.

No task runs in the background. Whoever looks at a batch first brings it up to date: `Store.advance` answers what is
due by now, a few requests at a time, and `Batch.phase` follows from the clock. So tests may use any clock, and what
was seen once stays true.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import orjson
from anyio.lowlevel import checkpoint

from pipeline.simulator.answers import compose, digest_of, forced_status
from pipeline.simulator.batches import Batch, Dialect, Item, Outcome, Phase, Sorted
from pipeline.simulator.state import State
from pipeline.simulator.types import HeaderMap, Identity, Prompt, Usage

AT_ONCE = 128
"""How many requests are dealt with before others have their turn on the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the model makes of one request; `usage` and `prompt` are there when it is answered."""

    line: bytes
    outcome: Outcome
    prompt: Prompt | None = None
    digest: bytes = b""
    usage: Usage | None = None


class Store:
    """All batches of one provider."""

    def __init__(self, dialect: Dialect, state: State) -> None:
        self._dialect = dialect
        self._state = state
        self._batches: dict[str, Batch] = {}
        self._open: dict[str, Batch] = {}
        state.watch(self.advance_all)

    def __repr__(self) -> str:
        return f"<Store of {self._dialect.PROVIDER}: {len(self._batches)} batches, {len(self._open)} not settled>"

    def find(self, id: str, key: str) -> Batch | None:
        """Return a batch of this key."""
        batch = self._batches.get(id)
        return batch if batch and batch.key == key else None

    def newest(self, key: str) -> list[Batch]:
        """Return the batches of this key, newest first."""
        return [batch for batch in reversed(self._batches.values()) if batch.key == key]

    def enqueued_tokens(self, key: str, model: str) -> int:
        """Return the input tokens of the batches of a key and model that are not over."""
        now = anyio.current_time()
        return sum(
            batch.tokens
            for batch in self._open.values()
            if (batch.key, batch.details.get("model")) == (key, model) and not batch.phase(now).is_last
        )

    async def sort(self, items: Sequence[Item], headers: HeaderMap) -> Sorted:
        """Put requests into the order of their results and read what their texts demand."""
        order = list(items)
        random.Random(f"{self._state.options.seed} {len(order)}").shuffle(order)
        found = Sorted()
        fates = {"": found.queue, "[[expire]]": found.expiring, "[[stuck]]": found.stuck}
        for count, item in enumerate(order, 1):
            fates[self._fate(item, headers)].append(item)
            if count % AT_ONCE == 0:
                await checkpoint()
        for position, item in enumerate(found.queue):
            item.position = position
        return found

    def create(
        self,
        *,
        key: str,
        headers: HeaderMap,
        requests: Sorted,
        details: Mapping[str, Any],
        failure: Sequence[Mapping[str, Any]] = (),
        tokens: int = 0,
    ) -> Batch:
        """Begin a batch; with a `failure` it has no requests."""
        options, number = self._state.options, self._state.serial()
        batch = Batch(
            id=f"{self._dialect.PREFIX}{options.seed & 0xFFFFFFFF:08x}{number:016x}",
            number=number,
            key=key,
            created=anyio.current_time(),
            seconds=options.batch_seconds,
            window=options.batch_window,
            cancel_seconds=options.batch_cancel_seconds,
            dialect=self._dialect,
            headers=headers,
            details=details,
            failure=failure,
            requests=Sorted() if failure else requests,
            tokens=tokens,
        )
        self._batches[batch.id] = self._open[batch.id] = batch
        self._state.statistics.batches.count_created(self._dialect.PROVIDER, batch.total)
        return batch

    def _fate(self, item: Item, headers: HeaderMap) -> str:
        """Read the marks in the user's text: how often the result comes, and whether the request is answered."""
        # Batches may have 100,000 requests and few have marks, so only those are parsed.
        if b"[[" not in item.raw:
            return ""
        prompt = self.read(item.raw, headers)
        if prompt is None:
            return ""
        if "[[missing]]" in prompt.text:
            item.copies = 0
        elif "[[twice]]" in prompt.text:
            item.copies = 2
        else:
            item.copies = 1
        for mark in ("[[expire]]", "[[stuck]]"):
            if mark in prompt.text:
                return mark
        return ""

    def read(self, raw: bytes, headers: HeaderMap) -> Prompt | None:
        """Read a request's body; return None if it is invalid."""
        body = orjson.loads(raw)
        if self._dialect.check(headers, body):
            return None
        return self._dialect.prompt(body)

    async def cancel(self, batch: Batch) -> Phase:
        """Begin to cancel a batch and return where it stood; what is not answered by now will not be.

        Nothing happens to one that is over, or was over by the time that it had been brought up to date.
        """
        await self.advance(batch)
        now = anyio.current_time()
        phase = batch.phase(now)
        if not phase.is_last and batch.cancelled is None:
            batch.cancelled = now
        return phase

    def delete(self, batch: Batch) -> None:
        """Forget a batch that is over."""
        self._batches.pop(batch.id, None)

    async def advance_all(self) -> None:
        """Bring all batches up to date."""
        for batch in list(self._open.values()):
            await self.advance(batch)

    async def advance(self, batch: Batch) -> float:
        """Answer what is due by now and return now; any number of callers may do so at once."""
        now = anyio.current_time()
        while not batch.is_settled and self._step(batch, now):
            await checkpoint()
        return now

    def _step(self, batch: Batch, now: float) -> bool:
        """Deal with some requests; say whether there may be more of them."""
        stop = batch.cursor + AT_ONCE
        while batch.cursor < min(stop, len(batch.queue)) and self._is_due(batch, now):
            batch.cursor += 1
            self._answer(batch, batch.queue[batch.cursor - 1])
        if batch.cursor == stop:
            return True
        return batch.phase(now).is_last and self._settle(batch)

    def _is_due(self, batch: Batch, now: float) -> bool:
        last = batch.expires if batch.cancelled is None else min(batch.cancelled, batch.expires)
        return now > batch.created and batch.due(batch.cursor) <= min(now, last)

    def _answer(self, batch: Batch, item: Item) -> None:
        verdict = self.resolve(batch, item)
        item.outcome, item.size = verdict.outcome, len(verdict.line)
        batch.counts[verdict.outcome] += 1
        statistics = self._state.statistics
        if verdict.prompt is None or verdict.usage is None:
            statistics.batches.errored += 1
            return
        usage = verdict.usage
        parts = (usage.input_tokens, usage.cache_read_tokens, usage.output_tokens, usage.reasoning_tokens)
        batch.usages = [total + part for total, part in zip(batch.usages, parts, strict=True)]
        statistics.count_answer(key=batch.key, prompt=verdict.prompt, digest=verdict.digest, usage=usage)
        statistics.batches.count_answer(verdict.prompt.model, usage)

    def _settle(self, batch: Batch) -> bool:
        """Decide what becomes of some requests that were not answered; say whether there are more of them."""
        if batch.left is None:
            batch.left = [*batch.queue[batch.cursor :], *batch.requests.expiring, *batch.requests.stuck]
        outcome = Outcome.EXPIRED if batch.cancelled is None else Outcome.CANCELLED
        some, batch.left = batch.left[: 8 * AT_ONCE], batch.left[8 * AT_ONCE :]
        for item in some:
            item.outcome = outcome
            item.size = len(self.resolve(batch, item).line)
        batch.counts[outcome] += len(some)
        self._state.statistics.batches.count_left(outcome.value, len(some))
        if not batch.left:
            self._add_unknown(batch)
            batch.is_settled = True
            self._open.pop(batch.id, None)
        return not batch.is_settled

    def _add_unknown(self, batch: Batch) -> None:
        if self._state.options.batch_unknown_results and batch.queue:
            batch.extra = Item(number=batch.total, custom_id="nobody-sent-this", raw=batch.queue[0].raw)
            verdict = self.resolve(batch, batch.extra)
            batch.extra.outcome, batch.extra.size = verdict.outcome, len(verdict.line)

    def resolve(self, batch: Batch, item: Item) -> Verdict:
        """Make the result of a request; the same request always gets the same result."""
        options, dialect = self._state.options, batch.dialect
        line_id = f"{batch.number:08x}{item.number:08x}"
        if item.outcome in (Outcome.EXPIRED, Outcome.CANCELLED):
            return Verdict(line=dialect.left(item, line_id, item.outcome), outcome=item.outcome)
        body = orjson.loads(item.raw)
        problem = dialect.check(batch.headers, body)
        prompt = None
        if not problem:
            prompt = dialect.prompt(body)
            status = forced_status(prompt)
            if status:
                problem = dialect.problem(status)
        if prompt is None or problem:
            assert problem is not None
            return Verdict(line=dialect.errored(item, line_id, problem), outcome=Outcome.ERRORED)
        digest = digest_of(body)
        completion = compose(prompt, options.seed, digest, options.cache_ratio)
        created = int(self._state.wall(batch.due(item.position)))
        identity = Identity(id=f"{digest[:8].hex()}{line_id}", created=created)
        return Verdict(
            line=dialect.answered(item, line_id, prompt, completion, identity),
            outcome=Outcome.ANSWERED,
            prompt=prompt,
            digest=digest,
            usage=completion.usage,
        )
