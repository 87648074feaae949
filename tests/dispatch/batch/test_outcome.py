"""From the results of a batch to a verdict on each of its requests: none is lost, none counted twice, all priced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from pipeline import providers
from pipeline.accounting.pricing import BATCH, LIVE, LanePricing, Prices
from pipeline.core.clock import Clock
from pipeline.core.config import Config, Sending
from pipeline.core.errors import ErrorScope, ProviderError
from pipeline.core.types import Attempt, Cost, HttpRequest, HttpResponse, Protocol, Request
from pipeline.dispatch.batch.client import BatchClient, BatchConnection
from pipeline.dispatch.batch.collector import CollectedItem, ResultCollector, WrongBatchError
from pipeline.dispatch.batch.outcome import ItemOutcome, OutcomeClassifier
from pipeline.dispatch.batch.store import BatchItem, BatchRecord, BatchStore
from pipeline.dispatch.retry import Policy
from pipeline.providers.batch import Batch, Ending, Problem

ANTHROPIC, OPENAI = Protocol.ANTHROPIC, Protocol.OPENAI
both = pytest.mark.parametrize("protocol", [ANTHROPIC, OPENAI])
MODELS = {ANTHROPIC: "claude-haiku-5-5", OPENAI: "gpt-6-luna"}
NOW = "2026-11-22T02:40:07Z"
PRICES = Prices(Config())
COST = 1_000 * 50 + 100 * 250
"""Nano-dollars of 1,000 tokens in and 100 out at half of $0.10 and $0.50 a million: what both models cost."""


def item(custom_id: str = "r1", protocol: Protocol = OPENAI, **fields: Any) -> BatchItem:
    request = Request(
        custom_id=custom_id,
        digest=f"digest of {custom_id}",
        source="in.jsonl",
        line=7,
        provider=protocol.value,
        model=MODELS[protocol],
        body=b'{"a":1}',
        estimated_input_tokens=10,
        metadata={"n": 2**70},
    )
    return BatchItem(request=request, **{"name": custom_id} | fields)


def chunk_of(protocol: Protocol, **fields: Any) -> BatchRecord:
    basis: dict[str, Any] = {"requests": 1, "content": 1, "sha256": "", "input_tokens": 1, "at": NOW}
    basis |= {"local_id": "0a1b2c3d4e5f", "run": "run-1", "provider": protocol.value, "model": "", "batch_id": "b1"}
    return BatchRecord(**basis | fields)


def classifier(
    protocol: Protocol, record: BatchRecord | None = None, *, lane: str = BATCH, max_attempts: int = 3
) -> OutcomeClassifier:
    clock = Clock()
    pricing = LanePricing(PRICES, clock, lane)
    return OutcomeClassifier(record or chunk_of(protocol), providers.codec(protocol), pricing, clock, max_attempts)


def reply(protocol: Protocol, **changes: Any) -> dict[str, Any]:
    """Return the body of a reply that used 1,000 tokens in and 100 out."""
    if protocol is OPENAI:
        return {
            "id": "chatcmpl-1",
            "model": "gpt-6-luna-2026-10-01",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "fine"}}],
            "usage": {"prompt_tokens": 1_000, "completion_tokens": 100, "total_tokens": 1_100},
            "service_tier": "default",
        } | changes
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-5-5",
        "content": [{"type": "text", "text": "fine"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 1_000, "output_tokens": 100, "service_tier": "batch"},
    } | changes


def line(protocol: Protocol, name: str, status: int = 200, body: Any = None) -> dict[str, Any]:
    """Return a line of results: a reply, or with another status an error whose type is `body`."""
    if protocol is OPENAI:
        told = {"error": {"type": body, "message": "no"}} if status != 200 else body or reply(protocol)
        return {"custom_id": name, "response": {"status_code": status, "request_id": "req_1", "body": told}}
    if status != 200:
        error = {"type": "error", "error": {"type": body, "message": "no"}, "request_id": "req_1"}
        return {"custom_id": name, "result": {"type": "errored", "error": error}}
    return {"custom_id": name, "result": {"type": "succeeded", "message": body or reply(protocol)}}


def unanswered(protocol: Protocol, name: str, ending: Ending) -> dict[str, Any]:
    if protocol is OPENAI:
        return {"custom_id": name, "response": None, "error": {"code": f"batch_{ending}", "message": "no"}}
    return {"custom_id": name, "result": {"type": ending.replace("cancelled", "canceled")}}


def collected(protocol: Protocol, told: dict[str, Any], asked: BatchItem | None = None, **how: Any) -> ItemOutcome:
    """Return the verdict on a request of which a line tells."""
    outcome = providers.batch_codec(protocol).outcome(orjson.dumps(told))
    return classifier(protocol, **how).classify(asked or item(protocol=protocol), outcome)


def failed(type: str, **fields: Any) -> Attempt:
    return Attempt(at=NOW, type=type, message="m", latency_s=0.0, **fields)


# ── replies ───────────────────────────────────────────────────────────────────────────────────────────────────────


@both
async def test_a_reply_is_a_result(protocol: Protocol) -> None:
    """It is the result that a live call would have brought, but for lane, batch and half the price."""
    asked = item(protocol=protocol)

    outcome = collected(protocol, line(protocol, "r1"), asked)

    result = outcome.result
    assert result is not None
    assert (result.custom_id, result.digest, result.source, result.line) == ("r1", "digest of r1", "in.jsonl", 7)
    assert (result.success, result.content, result.attempts, result.failed_attempts) == (True, "fine", 1, ())
    assert (result.lane, result.batch_id, result.latency_s) == ("batch", "b1", None)
    assert (result.metadata, result.request) == ({"n": 2**70}, asked.request)
    assert (result.cost, outcome.nanos) == (Cost(nanos=COST), COST)
    assert (outcome.again, outcome.error, outcome.attempt, outcome.is_cancelled) == (None, None, None, False)


@both
async def test_a_batch_costs_half(protocol: Protocol) -> None:
    """The same answer costs twice as much in the live lane."""
    live = line(protocol, "r1", body=reply(OPENAI) if protocol is OPENAI else _standard())

    in_batch = collected(protocol, line(protocol, "r1")).nanos
    alive = collected(protocol, live, lane=LIVE).nanos

    assert (in_batch, alive) == (COST, 2 * COST)


def _standard() -> dict[str, Any]:
    return reply(ANTHROPIC, usage={"input_tokens": 1_000, "output_tokens": 100, "service_tier": "standard"})


@pytest.mark.parametrize(
    ("protocol", "usage", "nanos"),
    [
        pytest.param(
            OPENAI,
            {
                "prompt_tokens": 1_000,
                "completion_tokens": 100,
                "prompt_tokens_details": {"cached_tokens": 400},
            },
            600 * 50 + 400 * 5 + 100 * 250,
            id="cache of OpenAI's",
        ),
        pytest.param(
            ANTHROPIC,
            {"input_tokens": 600, "output_tokens": 100, "cache_read_input_tokens": 400},
            600 * 50 + 400 * 5 + 100 * 250,
            id="cache of Anthropic's",
        ),
        pytest.param(OPENAI, None, None, id="not told"),
        pytest.param(ANTHROPIC, {"input_tokens": None, "output_tokens": 100}, None, id="told in part"),
        pytest.param(OPENAI, {"prompt_tokens": -5, "completion_tokens": 1}, None, id="cannot be"),
    ],
)
async def test_what_a_reply_costs(protocol: Protocol, usage: Any, nanos: int | None) -> None:
    """Discounts multiply; where no usage is told nobody knows, and that is not 0."""
    outcome = collected(protocol, line(protocol, "r1", body=reply(protocol, usage=usage)))

    assert outcome.result is not None
    assert outcome.result.success
    assert (outcome.nanos, outcome.result.cost.nanos) == (nanos, nanos)


async def test_the_model_that_answered_is_paid() -> None:
    """A router may have another model answer than the one asked for: its price counts."""
    outcome = collected(OPENAI, line(OPENAI, "r1", body=reply(OPENAI, model="gpt-6-astra")))

    assert outcome.nanos == 1_000 * 5_000 + 100 * 25_000


async def test_a_model_without_a_price_has_no_cost() -> None:
    """A model that nobody knows has its result, and no cost."""
    asked = item()
    asked = replace(asked, request=replace(asked.request, model="nobodys-model"))

    outcome = collected(OPENAI, line(OPENAI, "r1", body=reply(OPENAI, model="nobodys-model")), asked)

    assert outcome.result is not None
    assert (outcome.result.success, outcome.nanos) == (True, None)


@both
async def test_a_reply_after_failures_counts_them(protocol: Protocol) -> None:
    """Attempts of earlier batches stay with the result, and what they cost stays theirs."""
    earlier = (failed("batch_expired"), failed("api_error"))

    outcome = collected(protocol, line(protocol, "r1"), item(protocol=protocol, attempts=earlier, counted=2))

    assert outcome.result is not None
    assert (outcome.result.attempts, outcome.result.failed_attempts) == (3, earlier)
    assert (outcome.result.failure, outcome.nanos) == (None, COST)


# ── failures ──────────────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize(
    ("status", "kind"),
    [pytest.param(400, "invalid_request_error", id="400"), pytest.param(413, "request_too_large", id="413")],
)
async def test_a_request_that_is_refused_fails(protocol: Protocol, status: int, kind: str) -> None:
    """What no other attempt would pass is a failed result at once, and costs nothing."""
    outcome = collected(protocol, line(protocol, "r1", status, kind))

    assert outcome.result is not None
    failure = outcome.result.failure
    assert failure is not None
    assert (failure.type, failure.message, failure.status, failure.request_id) == (kind, "no", status, "req_1")
    assert (outcome.result.attempts, outcome.result.failed_attempts) == (1, (outcome.attempt,))
    assert failure.attempts == (outcome.attempt,)
    assert (outcome.nanos, outcome.again, outcome.error) == (0, None, None)
    assert outcome.attempt is not None
    assert not outcome.attempt.may_be_billed


@both
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        pytest.param(500, "api_error", id="500"),
        pytest.param(529, "overloaded_error", id="529"),
        pytest.param(504, "timeout_error", id="504"),
        pytest.param(429, "rate_limit_error", id="429"),
    ],
)
async def test_a_request_that_failed_goes_again(protocol: Protocol, status: int, kind: str) -> None:
    """What may pass goes again, unbilled, as a batch bills answers only; the last attempt ends it."""
    first = collected(protocol, line(protocol, "r1", status, kind))

    assert (first.result, first.error, first.nanos) == (None, None, 0)
    assert first.attempt is not None
    assert (first.attempt.type, first.attempt.status, first.attempt.may_be_billed) == (kind, status, False)
    assert first.again == item(protocol=protocol, attempts=(first.attempt,), counted=1)

    second = collected(protocol, line(protocol, "r1", status, kind), first.again)
    assert second.again is not None
    third = collected(protocol, line(protocol, "r1", status, kind), second.again)
    assert third.again is None
    assert third.result is not None
    assert third.result.failure is not None
    assert (third.result.attempts, len(third.result.failure.attempts)) == (3, 3)
    assert third.result.failure.type == kind


@pytest.mark.parametrize(
    ("protocol", "told", "scope"),
    [
        pytest.param(OPENAI, line(OPENAI, "r1", 401, "x"), ErrorScope.RUN, id="401"),
        pytest.param(OPENAI, line(OPENAI, "r1", 404, "x"), ErrorScope.MODEL, id="404"),
        pytest.param(OPENAI, line(OPENAI, "r1", 429, "insufficient_quota"), ErrorScope.RUN, id="no quota"),
        pytest.param(ANTHROPIC, line(ANTHROPIC, "r1", 401, "authentication_error"), ErrorScope.RUN, id="anthropic 401"),
        pytest.param(ANTHROPIC, line(ANTHROPIC, "r1", 402, "billing_error"), ErrorScope.RUN, id="anthropic 402"),
        pytest.param(ANTHROPIC, line(ANTHROPIC, "r1", 404, "not_found_error"), ErrorScope.MODEL, id="anthropic 404"),
    ],
)
async def test_an_error_that_reaches_further_ends_more(
    protocol: Protocol, told: dict[str, Any], scope: ErrorScope
) -> None:
    """It is no result of the request, which stays pending, and ends its model or the run."""
    outcome = collected(protocol, told)

    assert outcome.error is not None
    assert (outcome.error.scope, outcome.result, outcome.again, outcome.nanos) == (scope, None, None, 0)
    assert outcome.attempt is not None


@pytest.mark.parametrize(
    ("protocol", "body", "nanos"),
    [
        pytest.param(OPENAI, reply(OPENAI, choices=[]), COST, id="no choice"),
        pytest.param(ANTHROPIC, reply(ANTHROPIC, content=None), COST, id="no content"),
        pytest.param(OPENAI, {"a": 1}, None, id="something else"),
        pytest.param(ANTHROPIC, {"a": 1}, None, id="anthropic something else"),
    ],
)
async def test_an_unusable_answer_is_paid_and_goes_again(protocol: Protocol, body: Any, nanos: int | None) -> None:
    """A 200 that holds no reply was billed: for what it tells, else for nobody knows what."""
    outcome = collected(protocol, line(protocol, "r1", body=body))

    assert outcome.attempt is not None
    assert (outcome.attempt.type, outcome.attempt.may_be_billed) == ("invalid_response", True)
    assert (outcome.nanos, outcome.attempt.cost_nano, outcome.attempt.is_unknown) == (nanos, nanos, nanos is None)
    assert outcome.again == item(protocol=protocol, attempts=(outcome.attempt,), counted=1)


@pytest.mark.parametrize(
    ("protocol", "told"),
    [
        pytest.param(OPENAI, {"custom_id": "r1", "response": None, "error": None}, id="neither response nor error"),
        pytest.param(ANTHROPIC, {"custom_id": "r1", "result": {"type": "new"}}, id="unknown type"),
        pytest.param(ANTHROPIC, {"custom_id": "r1", "result": {"type": "succeeded"}}, id="no message"),
    ],
)
async def test_a_line_that_tells_nothing_may_be_billed(protocol: Protocol, told: dict[str, Any]) -> None:
    """Nobody knows what it cost; the request goes again."""
    outcome = collected(protocol, told)

    assert outcome.attempt is not None
    assert (outcome.nanos, outcome.attempt.is_unknown) == (None, True)
    assert outcome.again is not None
    assert outcome.again.counted == 1


# ── requests without an answer ────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize(
    ("ending", "counted", "nanos", "is_cancelled"),
    [
        pytest.param("expired", 1, 0, False, id="expired"),
        pytest.param("cancelled", 0, 0, True, id="cancelled"),
        pytest.param("failed", 1, 0, False, id="failed"),
        pytest.param("missing", 1, None, False, id="missing"),
        pytest.param("abandoned", 0, None, False, id="abandoned"),
    ],
)
async def test_a_request_without_an_answer_goes_again(
    protocol: Protocol, ending: str, counted: int, nanos: int | None, is_cancelled: bool
) -> None:
    """What was not done is not billed; what we did not wait for may be; only some of it counts against the request."""
    outcome = classifier(protocol).unfinished(item(protocol=protocol), ending)

    assert outcome.attempt is not None
    assert (outcome.attempt.type, outcome.attempt.status) == (f"batch_{ending}", None)
    assert "(b1)" in outcome.attempt.message
    assert (outcome.nanos, outcome.attempt.is_unknown) == (nanos, nanos is None)
    assert outcome.again == item(protocol=protocol, attempts=(outcome.attempt,), counted=counted)
    assert (outcome.result, outcome.error, outcome.is_cancelled) == (None, None, is_cancelled)


@both
@pytest.mark.parametrize("ending", ["expired", "cancelled"])
async def test_what_a_line_says_of_it_is_the_same(protocol: Protocol, ending: Ending) -> None:
    """Told by a line of its own or by the end of the batch, it is the same verdict."""
    told = collected(protocol, unanswered(protocol, "r1", ending))

    assert told == classifier(protocol).unfinished(item(protocol=protocol), ending)


@pytest.mark.parametrize(
    ("ending", "ends"),
    [("expired", True), ("failed", True), ("missing", True), ("cancelled", False), ("abandoned", False)],
)
async def test_the_last_attempt(ending: str, ends: bool) -> None:
    """A request that expires or is left out again and again fails; others' cancelling never fails it."""
    earlier = (failed("a"), failed("b"))

    outcome = classifier(OPENAI).unfinished(item(attempts=earlier, counted=2), ending)

    assert (outcome.result is not None, outcome.again is None) == (ends, ends)
    attempts = outcome.result.failed_attempts if outcome.result else outcome.again and outcome.again.attempts
    assert attempts == (*earlier, outcome.attempt)
    if outcome.result:
        assert outcome.result.attempts == 3
        assert outcome.result.failure is not None
        assert outcome.result.failure.type == f"batch_{ending}"


async def test_a_request_of_a_refused_batch_fails_by_what_was_said() -> None:
    """The provider's words on its line are its failure, unbilled."""
    error = providers.batch_codec(OPENAI).failure(Problem(code="invalid_url", message="no such url", line=3))

    outcome = classifier(OPENAI).refused(item(attempts=(failed("a"),), counted=1), error)

    assert outcome.result is not None
    failure = outcome.result.failure
    assert failure is not None
    assert (failure.type, failure.code, failure.message) == ("invalid_url", "invalid_url", "no such url")
    assert (outcome.result.attempts, outcome.nanos, outcome.again) == (2, 0, None)
    assert outcome.attempt is not None
    assert not outcome.attempt.may_be_billed


# ── harvest ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Field:
    """A chunk on the disk, and the files of results that its provider has."""

    store: BatchStore
    protocol: Protocol
    names: Sequence[str]
    is_confirmed: bool = True
    known: frozenset[str] = frozenset()
    files: dict[str, bytes] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        codec = providers.batch_codec(self.protocol)
        open_batch = self.store.begin()
        for name in self.names:
            named = codec.name(open_batch.local_id, name, "0" * 32)
            open_batch.add_entry(replace(item(name, self.protocol), name=named), 1)
        record = open_batch.finish(
            open_batch.take(), BatchRecord(run="r", provider=self.protocol.value, model="", at=NOW)
        )
        self.record = replace(record, batch_id="b1", is_confirmed=self.is_confirmed)

    def name(self, custom_id: str) -> str:
        """Return the name of a request in the batch."""
        return providers.batch_codec(self.protocol).name(self.record.local_id, custom_id, "0" * 32)

    def answers(self, *custom_ids: str) -> list[dict[str, Any]]:
        return [line(self.protocol, self.name(custom_id)) for custom_id in custom_ids]

    async def download(self, call: HttpRequest, write: Callable[[int, bytes], Any], start: int) -> HttpResponse:
        name = call.url.rpartition("/v1/")[2]
        self.fetched.append(name)
        await write(0, self.files[name])
        return HttpResponse(status=200)

    def collector(self) -> ResultCollector:
        async def ask(*_: Any) -> HttpResponse:
            raise AssertionError("nobody asks for anything but files")

        client = BatchClient(
            codec=providers.codec(self.protocol),
            batches=providers.batch_codec(self.protocol),
            connection=BatchConnection(
                endpoint=Config().providers[self.protocol],
                headers=(),
                ask=ask,
                download=self.download,
                mask=lambda data: data,
            ),
            policy=Policy(Sending(max_attempts=1)),
            max_outage=1.0,
            max_line_bytes=10**6,
        )
        return ResultCollector(
            self.store,
            self.record,
            client,
            classifier(self.protocol, self.record),
            lambda item: item.request.custom_id in self.known,
        )

    async def gather(
        self, *files: Iterable[Any], ending: Ending | None = None, problems: Sequence[Problem] = ()
    ) -> dict[str, list[CollectedItem]]:
        """Bring in files, given as lists of lines; return what was judged of each request."""
        paths = [f"files/f{number}/content" for number in range(len(files))]
        if self.protocol is ANTHROPIC:
            paths = [f"messages/batches/b{number}/results" for number in range(len(files))]
        raw = [b"".join(_raw(each) + b"\n" for each in file) for file in files]
        self.files = dict(zip(paths, raw, strict=True))
        under = [path.removeprefix("messages/batches/") for path in paths]
        self.gathered = self.collector()
        batch = Batch(id="b1", status="x", is_ended=True, files=under, ending=ending, problems=problems)
        return _by_id([each async for each in self.gathered.gather(batch)])


def _raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else orjson.dumps(value)


def _by_id(groups: list[Sequence[CollectedItem]]) -> dict[str, list[CollectedItem]]:
    found: dict[str, list[CollectedItem]] = {}
    for each in (each for group in groups for each in group):
        found.setdefault(each.item.request.custom_id, []).append(each)
    return found


def kinds(collected: dict[str, list[CollectedItem]]) -> dict[str, list[str]]:
    """Return in a word what became of each request, as often as it was judged."""
    return {custom_id: [_kind(each.outcome) for each in found] for custom_id, found in collected.items()}


def _kind(outcome: ItemOutcome) -> str:
    if outcome.result:
        return "reply" if outcome.result.success else "failure"
    return "error" if outcome.error else f"again: {outcome.attempt.type}" if outcome.attempt else "again"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BatchStore]:
    opened = BatchStore(tmp_path / "answers.jsonl")
    yield opened
    opened.release()


@both
async def test_every_request_is_judged_once(store: BatchStore, protocol: Protocol) -> None:
    """In whatever order results come, over more than one group, each has its own request and no other."""
    names = [f"r{n}" for n in range(700)]
    collector = Field(store, protocol, names)

    found = await collector.gather(collector.answers(*names[::-1]))

    assert kinds(found) == {name: ["reply"] for name in names}
    assert [each.outcome.result and each.outcome.result.custom_id for (each,) in found.values()] == names[::-1]
    assert collector.gathered.unmatched == 0


@both
@pytest.mark.parametrize(
    ("ending", "kind"),
    [(None, "batch_missing"), ("expired", "batch_expired"), ("cancelled", "batch_cancelled")],
)
async def test_what_nothing_tells_of_is_judged_by_the_end_of_the_batch(
    store: BatchStore, protocol: Protocol, ending: Ending | None, kind: str
) -> None:
    """Requests without a result are not forgotten."""
    collector = Field(store, protocol, ["r1", "r2", "r3"])

    found = await collector.gather(collector.answers("r2"), ending=ending)

    assert kinds(found) == {"r2": ["reply"], "r1": [f"again: {kind}"], "r3": [f"again: {kind}"]}


@both
async def test_what_a_failed_batch_does_not_tell_of_has_failed(store: BatchStore, protocol: Protocol) -> None:
    """A batch that failed after it had answered some keeps these; the others go again, and were not billed."""
    collector = Field(store, protocol, ["r1", "r2"])

    found = await collector.gather(collector.answers("r2"), problems=[Problem(code="internal_error", message="no")])

    assert kinds(found) == {"r2": ["reply"], "r1": ["again: batch_failed"]}
    assert found["r1"][0].outcome.nanos == 0


@both
async def test_the_first_word_on_a_request_counts(store: BatchStore, protocol: Protocol) -> None:
    """A result that is there twice, in one file or in two, is one: it is neither counted nor paid twice."""
    collector = Field(store, protocol, ["r1", "r2"])
    twice = line(protocol, collector.name("r1"), 400, "invalid_request_error")

    found = await collector.gather([*collector.answers("r1"), twice, *collector.answers("r1", "r2")], [twice])

    assert kinds(found) == {"r1": ["reply"], "r2": ["reply"]}
    assert collector.gathered.unmatched == 0


@both
async def test_files_count_in_their_order(store: BatchStore, protocol: Protocol) -> None:
    """Answers come before errors: who has both was answered."""
    collector = Field(store, protocol, ["r1", "r2"])
    errors = [line(protocol, collector.name(name), 400, "invalid_request_error") for name in ("r1", "r2")]

    found = await collector.gather(collector.answers("r1"), errors)

    assert kinds(found) == {"r1": ["reply"], "r2": ["failure"]}
    assert collector.fetched == list(collector.files)


@both
async def test_results_that_nobody_asked_for_are_counted(store: BatchStore, protocol: Protocol) -> None:
    """Strangers and what is no line of results harm nothing, and are told."""
    collector = Field(store, protocol, ["r1"])
    unmatched = [line(protocol, "r9"), line(protocol, collector.name("r9")), b"no JSON", b"{}", b"\xff\x00", b"[]"]

    found = await collector.gather([*unmatched, *collector.answers("r1")])

    assert kinds(found) == {"r1": ["reply"]}
    assert collector.gathered.unmatched == len(unmatched)


@both
async def test_a_batch_without_files(store: BatchStore, protocol: Protocol) -> None:
    """Where nothing was answered there is no file, and every request is judged all the same."""
    collector = Field(store, protocol, ["r1", "r2"])

    found = await collector.gather(ending="expired")

    assert kinds(found) == {name: ["again: batch_expired"] for name in ("r1", "r2")}


@both
async def test_what_was_recorded_before_is_known(store: BatchStore, protocol: Protocol) -> None:
    """After a crash amid the collecting, results that are there already are told apart; their cost is counted anew."""
    collector = Field(store, protocol, ["r1", "r2", "r3"], known=frozenset({"r2", "r3"}))

    found = await collector.gather(collector.answers("r1", "r2"))

    assert {custom_id: each.is_known for custom_id, (each,) in found.items()} == {"r1": False, "r2": True, "r3": True}
    assert found["r2"][0].outcome.nanos == COST


async def test_another_batch_was_taken_for_ours(store: BatchStore) -> None:
    """A batch found by size and time is told by its first result, before any verdict."""
    collector = Field(store, ANTHROPIC, ["r1", "r2"], is_confirmed=False)
    others = [line(ANTHROPIC, "ffffffffffff-r1"), line(ANTHROPIC, "ffffffffffff-r2")]

    with pytest.raises(WrongBatchError):
        await collector.gather(others)
    with pytest.raises(WrongBatchError):
        await collector.gather([])
    assert kinds(await collector.gather(collector.answers("r2", "r1"))) == {"r1": ["reply"], "r2": ["reply"]}


async def test_results_of_a_batch_that_is_ours_for_sure(store: BatchStore) -> None:
    """Where the making was confirmed, strange results are strangers, and nothing is looked for again."""
    collector = Field(store, ANTHROPIC, ["r1"])

    found = await collector.gather([line(ANTHROPIC, "ffffffffffff-r1")])

    assert (kinds(found), collector.gathered.unmatched) == ({"r1": ["again: batch_missing"]}, 1)


@both
async def test_a_batch_that_is_abandoned(store: BatchStore, protocol: Protocol) -> None:
    """All of it goes elsewhere, at the risk of being paid twice, which is told."""
    collector = Field(store, protocol, [f"r{n}" for n in range(300)])

    found = _by_id([each async for each in collector.collector().rest("abandoned")])

    assert len(found) == 300
    assert {each.outcome.attempt and each.outcome.attempt.is_unknown for (each,) in found.values()} == {True}


def _error(scope: ErrorScope, code: str) -> ProviderError:
    return providers.batch_codec(OPENAI).failure(Problem(code=code, message="no")).replace(scope=scope)


@pytest.mark.parametrize(
    ("named", "whole", "expected"),
    [
        pytest.param({2: ErrorScope.REQUEST}, None, ["again", "failure", "again"], id="a line"),
        pytest.param({}, ErrorScope.ATTEMPT, ["again", "again", "again"], id="came too early"),
        pytest.param({}, ErrorScope.REQUEST, ["error", "error", "error"], id="all of it"),
        pytest.param({}, ErrorScope.RUN, ["error", "error", "error"], id="the run"),
        pytest.param({3: ErrorScope.REQUEST}, ErrorScope.REQUEST, ["error", "error", "failure"], id="both"),
        pytest.param({9: ErrorScope.REQUEST}, None, ["again", "again", "again"], id="a line that is not there"),
        pytest.param({}, None, ["again", "again", "again"], id="nothing said"),
    ],
)
async def test_a_batch_that_was_refused(
    store: BatchStore, named: dict[int, ErrorScope], whole: ErrorScope | None, expected: list[str]
) -> None:
    """Lines that the provider names fail, counted from 1; the others go again as they were, unless nothing can pass."""
    collector = Field(store, OPENAI, ["r1", "r2", "r3"])
    errors = {number: _error(scope, "invalid_url") for number, scope in named.items()}
    refused = collector.collector().refused(errors, _error(whole, "x") if whole else None)

    found = _by_id([each async for each in refused])

    assert kinds(found) == {f"r{n}": [kind] for n, kind in enumerate(expected, start=1)}
    for (each,) in found.values():
        assert each.outcome.nanos == 0
        assert each.outcome.again in (None, each.item)
        assert each.outcome.error is None or each.outcome.error.scope in (ErrorScope.MODEL, ErrorScope.RUN)
