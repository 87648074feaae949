"""The courier before a scripted batch API: what may be repeated is, a batch is never made blindly, files come whole."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import anyio
import httpx
import orjson
import pytest

from pipeline import providers
from pipeline.core.config import Config, Sending
from pipeline.core.errors import ErrorScope, ProviderError, StorageError, TransportError, TryLaterError
from pipeline.core.http import Client, Content
from pipeline.core.text import redact, redactor
from pipeline.core.types import HttpRequest, HttpResponse, Protocol
from pipeline.dispatch.batch.client import BatchClient, BatchConnection, UncertainError, batch_client
from pipeline.dispatch.batch.store import BatchItem, BatchRecord, BatchStore
from pipeline.dispatch.retry import Policy
from tests.scripted import refusal, request
from tests.virtual import virtual_time

pytestmark = [*virtual_time, pytest.mark.usefixtures("no_threads")]

ANTHROPIC, OPENAI = Protocol.ANTHROPIC, Protocol.OPENAI
both = pytest.mark.parametrize("protocol", [ANTHROPIC, OPENAI])
CREATING = "2026-11-22T02:40:00Z"
KEY = "9f3c7A1e5b8D2c6f4a0E7d1B3c5f8a2e"
PATIENCE = 300.0
SLIP = 1.0  # of the virtual clock, on a busy machine
SETTINGS = Sending(max_attempts=4, max_retry_after=120.0)

Step = HttpResponse | TransportError


def ok(value: Any) -> HttpResponse:
    return HttpResponse(status=200, body=orjson.dumps(value))


def lost(type: str = "timeout", *, is_sent: bool = True, scope: ErrorScope = ErrorScope.ATTEMPT) -> TransportError:
    return TransportError(f"scripted {type}", type=type, is_sent=is_sent, scope=scope)


REFUSED = lost("connection_error", is_sent=False)


def batch(protocol: Protocol, id: str = "b1", **fields: Any) -> dict[str, Any]:
    """Return a batch as the provider writes it."""
    word = {OPENAI: "status", ANTHROPIC: "processing_status"}[protocol]
    return {"id": id, word: "in_progress"} | fields


@dataclass
class Api:
    """A batch API that answers the calls to it in order, the last answer for ever, and a courier before it."""

    protocol: Protocol
    answers: Sequence[Step]
    latency: float = 0.0
    calls: list[HttpRequest] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    bodies: list[bytes | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    def __post_init__(self) -> None:
        self.start = anyio.current_time()
        self.client = client(self.protocol, ask=self.ask)

    async def ask(self, call: HttpRequest, content: Content | None) -> HttpResponse:
        self.calls.append(call)
        self.times.append(round(anyio.current_time() - self.start, 3))
        self.bodies.append(None if content is None else b"".join([block async for block in content.blocks()]))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        step = self.answers[min(len(self.calls), len(self.answers)) - 1]
        await anyio.sleep(self.latency)
        self.in_flight -= 1
        if isinstance(step, TransportError):
            raise step
        return step

    def elapsed(self) -> float:
        return anyio.current_time() - self.start

    def asked(self) -> list[str]:
        return [f"{call.method} {call.url.partition('/v1/')[2]}" for call in self.calls]


async def _nobody(*_: Any) -> HttpResponse:
    raise AssertionError("nobody asked for that")


def client(
    protocol: Protocol,
    ask: Any = _nobody,
    download: Any = _nobody,
    mask: Callable[[bytes], bytes] = lambda data: data,
    max_line_bytes: int = 1_000,
    notify: Callable[[str], None] = lambda message: None,
) -> BatchClient:
    return BatchClient(
        codec=providers.codec(protocol),
        batches=providers.batch_codec(protocol),
        connection=BatchConnection(
            endpoint=Config().providers[protocol], headers=(("x", "y"),), ask=ask, download=download, mask=mask
        ),
        policy=Policy(SETTINGS),
        max_outage=PATIENCE,
        max_line_bytes=max_line_bytes,
        notify=notify,
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BatchStore]:
    opened = BatchStore(tmp_path / "answers.jsonl")
    yield opened
    opened.release()


def written(store: BatchStore, protocol: Protocol, number: int = 3) -> BatchRecord:
    """Write a chunk of some requests."""
    codec = providers.batch_codec(protocol)
    open_batch = store.begin()
    for n in range(number):
        asked = request(f"r{n}")
        size = len(codec.entry(f"r{n}", asked.body)) + (len(codec.separator) if n else 0)
        open_batch.add_entry(BatchItem(request=asked, name=f"r{n}"), size)
    record = open_batch.finish(
        open_batch.take(), BatchRecord(run="run-1", provider=protocol.value, model="m", at=CREATING)
    )
    return replace(record, creating_at=CREATING, file_id="file-1" if protocol is OPENAI else None)


async def begin() -> None:
    """Note nothing."""


def content(store: BatchStore, record: BatchRecord, protocol: Protocol) -> bytes:
    codec = providers.batch_codec(protocol)
    return b"".join(store.content(record, separator=codec.separator, entry=codec.entry))


MAY_BE_DONE = [
    pytest.param(lost("timeout"), id="timeout"),
    pytest.param(lost("connection_error"), id="broken connection"),
    pytest.param(lost("invalid_http"), id="no HTTP"),
    pytest.param(lost("response_too_large"), id="answer too large"),
    *[pytest.param(refusal(status), id=str(status)) for status in (500, 502, 503, 504, 520, 524, 529)],
    pytest.param(HttpResponse(status=200, body=b""), id="empty 200"),
    pytest.param(HttpResponse(status=200, body=b"<html>"), id="200 of a gateway"),
    pytest.param(ok({"object": "batch"}), id="200 without an id"),
    pytest.param(ok([]), id="200 with a list"),
    pytest.param(HttpResponse(status=204), id="204"),
]
NO_REFUSAL = [pytest.param(refusal(status), id=f"{status} of a gateway") for status in (408, 409, 425)]
"""What is said of waiting, not of the call: behind it the batch may have been made."""
NOT_DONE = [
    pytest.param(refusal(429, retry_after="1"), id="429"),
    pytest.param(REFUSED, id="connection refused"),
    pytest.param(lost("timeout", is_sent=False), id="no connection in time"),
]
FINAL = [
    *[pytest.param(refusal(status), id=str(status)) for status in (400, 401, 402, 403, 404, 405, 410, 413, 422)],
    pytest.param(refusal(429, type="insufficient_quota", code="insufficient_quota"), id="no quota"),
    pytest.param(lost("tls_error", is_sent=False, scope=ErrorScope.RUN), id="no trust"),
]


# ── upload ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", [*MAY_BE_DONE, *NOT_DONE])
async def test_an_upload_is_repeated(store: BatchStore, first: Step) -> None:
    """A file too many costs nothing, so whatever kept the answer away, it is sent again, whole."""
    record = written(store, OPENAI)
    api = Api(OPENAI, [first, first, ok({"id": "file-7"})])

    assert await api.client.upload(store, record) == "file-7"
    assert api.bodies == [content(store, record, OPENAI)] * 3
    assert api.asked() == ["POST files"] * 3


@pytest.mark.parametrize("first", FINAL)
async def test_an_upload_that_is_refused_is_not_repeated(store: BatchStore, first: Step) -> None:
    """What no other attempt would pass is the provider's error, at once."""
    api = Api(OPENAI, [first])

    with pytest.raises(ProviderError):
        await api.client.upload(store, written(store, OPENAI))
    assert len(api.calls) == 1


async def test_anthropic_is_uploaded_nothing(store: BatchStore) -> None:
    """There is no such call."""
    api = Api(ANTHROPIC, [])

    assert await api.client.upload(store, written(store, ANTHROPIC)) is None
    assert api.calls == []


async def test_two_uploads_at_a_time(store: BatchStore) -> None:
    """They share one line: more at a time would only be slower each."""
    api = Api(OPENAI, [ok({"id": "file-7"})], latency=10.0)

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(api.client.upload, store, written(store, OPENAI))

    assert (api.most_in_flight, api.times) == (2, [0.0, 0.0, 10.0, 10.0, 20.0])


# ── create ────────────────────────────────────────────────────────────────────────────────────────────────────────


@both
async def test_a_batch_is_made(store: BatchStore, protocol: Protocol) -> None:
    """Anthropic's call carries the requests, OpenAI's names their file; the answer is the batch."""
    record = written(store, protocol)
    api = Api(protocol, [ok(batch(protocol, "b7"))])

    made = await api.client.create(store, record, begin)

    assert (made.id, made.is_ended) == ("b7", False)
    assert api.bodies == [content(store, record, protocol) if protocol is ANTHROPIC else None]
    assert api.calls[0].headers == (("x", "y"),)


@both
@pytest.mark.parametrize("answer", [*MAY_BE_DONE, *NO_REFUSAL])
async def test_a_batch_that_may_have_been_made_is_not_made_again(
    store: BatchStore, protocol: Protocol, answer: Step
) -> None:
    """However the answer was lost or broken, the call is not repeated: nobody knows what was done."""
    api = Api(protocol, [answer])

    with pytest.raises(UncertainError):
        await api.client.create(store, written(store, protocol), begin)
    assert len(api.calls) == 1


@both
@pytest.mark.parametrize("answer", NOT_DONE)
async def test_a_batch_that_cannot_have_been_made_is_made_again(
    store: BatchStore, protocol: Protocol, answer: Step
) -> None:
    """Where nothing arrived or nothing was taken, the same call is made again, as often as it takes."""
    record = written(store, protocol)
    api = Api(protocol, [*[answer] * 7, ok(batch(protocol, "b7"))])

    assert (await api.client.create(store, record, begin)).id == "b7"
    assert api.bodies == [content(store, record, protocol) if protocol is ANTHROPIC else None] * 8


@both
@pytest.mark.parametrize("answer", [*FINAL, pytest.param(refusal(501), id="501")])
async def test_a_batch_that_is_refused_is_an_error(store: BatchStore, protocol: Protocol, answer: Step) -> None:
    """A refusal is the provider's word that there is no batch."""
    api = Api(protocol, [answer if protocol is OPENAI or isinstance(answer, TransportError) else _claude(answer)])

    with pytest.raises(ProviderError):
        await api.client.create(store, written(store, protocol), begin)
    assert len(api.calls) == 1


def _claude(answer: HttpResponse) -> HttpResponse:
    """Return Anthropic's refusal instead of OpenAI's, of a quota where it is about one."""
    error: dict[str, Any] = {"type": "error", "error": {"type": "x", "message": "no"}}
    if answer.status == 429:
        error["error"]["details"] = {"error_code": "enforced_spend_limit_reached"}
    return HttpResponse(status=answer.status, body=orjson.dumps(error))


@both
async def test_a_batch_whose_making_is_redirected_is_an_error(store: BatchStore, protocol: Protocol) -> None:
    """Who sends us elsewhere has made nothing, and nobody goes there with the key."""
    api = Api(protocol, [HttpResponse(status=307, headers={"location": "https://elsewhere.example/"})])

    with pytest.raises(ProviderError) as caught:
        await api.client.create(store, written(store, protocol), begin)
    assert (caught.value.type, caught.value.scope, len(api.calls)) == ("redirect", ErrorScope.RUN, 1)


async def test_what_was_refused_before_it_may_have_been_made(store: BatchStore) -> None:
    """Each attempt is judged by itself: a refusal is repeated, a lost answer after it is not."""
    api = Api(OPENAI, [refusal(429, retry_after="5"), REFUSED, lost("timeout"), ok(batch(OPENAI))])

    with pytest.raises(UncertainError, match="timeout"):
        await api.client.create(store, written(store, OPENAI), begin)
    assert len(api.calls) == 3


@both
@pytest.mark.parametrize("last", [ok({"id": "b7"}), lost("timeout"), refusal(400)])
async def test_each_call_that_may_make_a_batch_is_told_before(
    store: BatchStore, protocol: Protocol, last: Step
) -> None:
    """`begin` is awaited before every attempt, so a crash at any moment finds it noted; and never after the last."""
    api = Api(protocol, [REFUSED, refusal(429, retry_after="1"), last])
    told: list[int] = []

    async def begin() -> None:
        told.append(len(api.calls))

    with suppress(ProviderError, UncertainError):
        await api.client.create(store, written(store, protocol), begin)

    assert told == [0, 1, 2]


async def test_what_cannot_be_noted_is_not_made(store: BatchStore) -> None:
    """Where `begin` fails nothing is sent."""
    api = Api(OPENAI, [ok(batch(OPENAI))])

    async def begin() -> None:
        raise StorageError("the disk is full")

    with pytest.raises(StorageError):
        await api.client.create(store, written(store, OPENAI), begin)
    assert api.calls == []


async def test_uploads_and_batches_with_requests_share_one_line(store: BatchStore) -> None:
    """Anthropic's batches carry their requests: two of them are made at a time, too."""
    api = Api(ANTHROPIC, [ok(batch(ANTHROPIC))], latency=10.0)

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(api.client.create, store, written(store, ANTHROPIC), begin)

    assert (api.most_in_flight, api.times) == (2, [0.0, 0.0, 10.0])


# ── patience ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_provider_says_how_long_to_wait(store: BatchStore) -> None:
    """A hint is kept to the millisecond."""
    api = Api(OPENAI, [refusal(429, retry_after="7"), refusal(429, retry_after="0.5"), ok(batch(OPENAI))])

    await api.client.create(store, written(store, OPENAI), begin)

    assert api.times == [0.0, 7.0, 7.5]


@both
@pytest.mark.parametrize("kind", ["create", "poll", "list"])
async def test_patience_ends(store: BatchStore, protocol: Protocol, kind: str) -> None:
    """A provider that is out of reach for longer than allowed ends the attempt; a later command goes on."""
    api = Api(protocol, [REFUSED])
    record = written(store, protocol)
    calls: dict[str, Callable[[], Any]] = {
        "create": lambda: api.client.create(store, record, begin),
        "poll": lambda: api.client.poll("b1"),
        "list": lambda: api.client.find(record, set()),
    }

    with pytest.raises(TryLaterError, match="out of reach"):
        await calls[kind]()
    assert PATIENCE - SETTINGS.backoff_max <= api.elapsed() <= PATIENCE + SLIP


async def test_a_wait_that_is_too_long_is_for_a_later_command(store: BatchStore) -> None:
    """A hint beyond the longest wait ends the attempt at once, with the number of seconds."""
    api = Api(OPENAI, [refusal(429, retry_after="3600")])

    with pytest.raises(TryLaterError, match="3,600 s"):
        await api.client.create(store, written(store, OPENAI), begin)
    assert (len(api.calls), api.elapsed() < 1) == (1, True)


@both
@pytest.mark.parametrize("answer", [*MAY_BE_DONE, *NOT_DONE])
async def test_failures_of_any_kind_are_waited_out(protocol: Protocol, answer: Step) -> None:
    """Calls of a batch API are few: none is given up before patience ends, whatever kept its answer away."""
    api = Api(protocol, [*[answer] * 2 * SETTINGS.max_attempts, ok(batch(protocol, "b7"))])

    assert (await api.client.poll("b7")).id == "b7"
    assert PATIENCE > api.elapsed() > 0


async def test_patience_begins_anew_with_each_call() -> None:
    """What was waited for before an answer is forgotten with it."""
    slow = refusal(429, retry_after="100")
    api = Api(OPENAI, [slow, slow, ok(batch(OPENAI))] * 3)

    for _ in range(3):
        await api.client.poll("b1")
    assert round(api.elapsed()) == 600 > PATIENCE


async def test_trouble_is_told_once() -> None:
    """The second failure in a row is told, what follows is not; after an answer trouble is news again."""
    told: list[str] = []
    steps: list[Step] = [*[REFUSED] * 5, ok(batch(OPENAI))]
    api = Api(OPENAI, [REFUSED, ok(batch(OPENAI)), *steps, *steps])
    api.client = client(OPENAI, ask=api.ask, notify=told.append)

    numbers = []
    for _ in range(3):
        await api.client.poll("b1")
        numbers.append(len(told))

    assert numbers == [0, 1, 2]
    assert {text.partition(": ")[2] for text in told} == {"scripted connection_error"}


# ── poll and cancel ───────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("first", [*MAY_BE_DONE, *NOT_DONE])
async def test_a_poll_is_repeated(protocol: Protocol, first: Step) -> None:
    """Asking costs nothing."""
    api = Api(protocol, [first, first, ok(batch(protocol, "b7"))])

    assert (await api.client.poll("b7")).id == "b7"
    assert len(api.calls) == 3


@both
async def test_a_batch_that_is_not_known_is_an_error(protocol: Protocol) -> None:
    """A batch of another key, or none: 404 is told at once."""
    api = Api(protocol, [refusal(404)])

    with pytest.raises(ProviderError) as caught:
        await api.client.poll("b1")
    assert (caught.value.status, len(api.calls)) == (404, 1)


@both
@pytest.mark.parametrize("first", [*MAY_BE_DONE, *NOT_DONE])
async def test_a_cancellation_is_repeated(protocol: Protocol, first: Step) -> None:
    """A second one changes nothing."""
    api = Api(protocol, [first, ok(batch(protocol, "b7"))])

    assert (await api.client.cancel("b7")).id == "b7"
    assert all(line.startswith("POST") and line.endswith("/cancel") for line in api.asked())
    assert len(api.calls) == 2


@both
@pytest.mark.parametrize("status", [400, 409])
async def test_a_batch_that_ended_meanwhile_is_told_as_it_is(protocol: Protocol, status: int) -> None:
    """That it cannot be cancelled any more is no error."""
    refused = refusal(status, x_should_retry="false")
    api = Api(protocol, [refused, ok(batch(protocol, "b7"))])

    assert (await api.client.cancel("b7")).id == "b7"
    assert [line.split()[0] for line in api.asked()] == ["POST", "GET"]


@both
async def test_a_cancelled_batch_that_nobody_knows_is_an_error(protocol: Protocol) -> None:
    """404 is told, so that the batch can be given up."""
    with pytest.raises(ProviderError) as caught:
        await Api(protocol, [refusal(404)]).client.cancel("b1")
    assert caught.value.status == 404


# ── find ──────────────────────────────────────────────────────────────────────────────────────────────────────────

NOW_UNIX = 1_795_315_200  # CREATING


def gpt(id: str, tag: str | None = None, seconds: float | None = 0) -> dict[str, Any]:
    """Return a batch of OpenAI's, made so many seconds after we tried."""
    metadata = {"pipeline_chunk": tag} if tag else None
    return batch(OPENAI, id, metadata=metadata, created_at=None if seconds is None else NOW_UNIX + seconds)


def claude(id: str, requests: int = 3, minutes: float | None = 0) -> dict[str, Any]:
    """Return a batch of Anthropic's, made so many minutes after we tried."""
    hour, minute = divmod(2 * 60 + 40 + int(minutes or 0), 60)
    created = None if minutes is None else f"2026-11-22T{hour:02}:{minute:02}:00Z"
    return batch(ANTHROPIC, id, created_at=created, request_counts={"processing": requests, "succeeded": 0})


def pages(*lists: list[dict[str, Any]]) -> list[Step]:
    return [ok({"data": data, "has_more": number < len(lists)}) for number, data in enumerate(lists, start=1)]


async def found(
    store: BatchStore, protocol: Protocol, *lists: list[dict[str, Any]], taken: Sequence[str] = ()
) -> tuple[str | None, int]:
    """Return the id of what is found in pages, and how many were read; `{nonce}` is that of the chunk."""
    record = written(store, protocol)
    marked = orjson.loads(orjson.dumps(lists).replace(b"{nonce}", record.local_id.encode()))
    api = Api(protocol, pages(*marked))
    batch = await api.client.find(record, set(taken))
    return (batch.id if batch else None), len(api.calls)


@pytest.mark.parametrize(
    ("lists", "taken", "expected"),
    [
        pytest.param([[gpt("a"), gpt("b", "{nonce}"), gpt("c")]], [], ("b", 1), id="on the first page"),
        pytest.param([[gpt("a")], [gpt("b")], [gpt("c", "{nonce}")]], [], ("c", 3), id="on the third page"),
        pytest.param([[gpt("a", "other")], [gpt("b")]], [], (None, 2), id="not there"),
        pytest.param([[gpt("a", "{nonce}")]], ["a"], (None, 1), id="left before"),
        pytest.param([[gpt("a", "{nonce}"), gpt("b", "{nonce}")]], ["a"], ("b", 1), id="another of ours"),
        pytest.param([[gpt("a", seconds=-600)], [gpt("b", "{nonce}")]], [], ("b", 2), id="ten minutes of skew"),
        pytest.param([[gpt("a", seconds=-601)], [gpt("b", "{nonce}")]], [], (None, 1), id="older ones are not ours"),
        pytest.param([[gpt("a", "{nonce}", -9_999)], []], [], ("a", 1), id="a mark counts more than a time"),
        pytest.param([[gpt("a", seconds=None)], [gpt("b", "{nonce}")]], [], ("b", 2), id="times that are not told"),
        pytest.param([[], [gpt("b", "{nonce}")]], [], (None, 1), id="an empty page is the last"),
    ],
)
async def test_openais_batches_are_found_by_their_mark(
    store: BatchStore, lists: list[list[dict[str, Any]]], taken: list[str], expected: tuple[str | None, int]
) -> None:
    """Pages are read, the newest first, until the mark is found or all that follow are too old."""
    assert await found(store, OPENAI, *lists, taken=taken) == expected


@pytest.mark.parametrize(
    ("lists", "taken", "expected"),
    [
        pytest.param([[claude("a", 2), claude("b", 3), claude("c", 4)]], [], ("b", 1), id="of our size"),
        pytest.param([[claude("a", 2)], [claude("b", 2)], [claude("c", 3)]], [], ("c", 3), id="on the third page"),
        pytest.param([[claude("a", 3), claude("b", 3)]], ["a"], ("b", 1), id="known ones are others'"),
        pytest.param([[claude("a", 3, minutes=-10)]], [], ("a", 1), id="ten minutes of skew"),
        pytest.param([[claude("a", 3, minutes=-11)], [claude("b", 3)]], [], (None, 1), id="too old"),
        pytest.param([[claude("a", 3, minutes=20)]], [], ("a", 1), id="later"),
        pytest.param([[claude("a", 3, minutes=None)]], [], (None, 1), id="time is not told"),
        pytest.param([[claude("a", 4)], []], [], (None, 2), id="not there"),
    ],
)
async def test_anthropics_batches_are_found_by_size_and_time(
    store: BatchStore, lists: list[list[dict[str, Any]]], taken: list[str], expected: tuple[str | None, int]
) -> None:
    """They keep no mark: the newest that has as many requests, was made then, and is no other's."""
    assert await found(store, ANTHROPIC, *lists, taken=taken) == expected


@both
async def test_pages_follow_one_another(store: BatchStore, protocol: Protocol) -> None:
    """Each page is asked for from behind the last batch of the page before; failed calls are repeated."""
    make = gpt if protocol is OPENAI else claude
    first, second = pages([make("a"), make("b/1")], [make("c")])
    api = Api(protocol, [refusal(500), first, lost("timeout"), second])

    assert await api.client.find(replace(written(store, protocol), requests=9), set()) is None
    after = {OPENAI: "&after=b%2F1", ANTHROPIC: "&after_id=b%2F1"}[protocol]
    assert [after in line for line in api.asked()] == [False, False, True, True]


@both
async def test_a_list_that_does_not_get_on_ends(store: BatchStore, protocol: Protocol) -> None:
    """A server that gives the same page again and again, and says that more follow, is not asked for ever."""
    make = gpt if protocol is OPENAI else claude
    same = ok({"data": [make("a"), make("b")], "has_more": True})
    api = Api(protocol, [same])

    assert await api.client.find(replace(written(store, protocol), requests=9), set()) is None
    assert len(api.calls) == 2


async def test_a_time_that_is_none_is_passed_over(store: BatchStore) -> None:
    """Go's zero time, as gateways write it for what they do not know, is no time."""
    unknown = batch(ANTHROPIC, "a", created_at="0001-01-01T00:00:00Z", request_counts={"processing": 3})
    api = Api(ANTHROPIC, pages([unknown], [claude("b")]))

    found = await api.client.find(written(store, ANTHROPIC), set())

    assert found is not None
    assert found.id == "b"


@both
@pytest.mark.parametrize(
    "status",
    [404, 405, 501],
)
async def test_who_has_no_list_has_no_batch(store: BatchStore, protocol: Protocol, status: int) -> None:
    """A server without the call that lists batches has made none."""
    api = Api(protocol, [refusal(status)])

    assert await api.client.find(written(store, protocol), set()) is None
    assert len(api.calls) == 1


@both
@pytest.mark.parametrize("status", [400, 401, 403])
async def test_a_list_that_is_refused_tells_nothing(store: BatchStore, protocol: Protocol, status: int) -> None:
    """That we may not look is no word on whether there is a batch."""
    with pytest.raises(ProviderError):
        await Api(protocol, [refusal(status)]).client.find(written(store, protocol), set())


# ── fetch ─────────────────────────────────────────────────────────────────────────────────────────────────────────

RESULTS = '{"custom_id":"r1","x":"é"}\n{"custom_id":"r2"}\n\n{"custom_id":"r3","y":[1]}\n'.encode()


@dataclass
class Files:
    """A server that has one file: it breaks off after `cuts` bytes of the file, once each, then sends all.

    Without `has_ranges` it sends the file from the start, whatever is asked for.
    """

    data: bytes
    cuts: Sequence[int] = ()
    has_ranges: bool = True
    piece: int = 1_000
    starts: list[int] = field(default_factory=list)

    async def download(self, call: HttpRequest, write: Any, start: int) -> HttpResponse:
        self.starts.append(start)
        begin = start if self.has_ranges else 0
        if begin and begin >= len(self.data):
            return HttpResponse(status=416)
        end = self.cuts[len(self.starts) - 1] if len(self.starts) <= len(self.cuts) else len(self.data)
        for place in range(begin, end, self.piece):
            await write(place, self.data[place : min(place + self.piece, end)])
        if len(self.starts) <= len(self.cuts):
            raise lost("connection_error")
        return HttpResponse(status=206 if begin else 200)


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("piece", [1, 7, 1_000])
async def test_a_download_cut_anywhere_is_gone_on_with(tmp_path: Path, piece: int, has_ranges: bool) -> None:
    """At whatever byte it breaks off, the next call asks from the first line that is not whole; nothing is doubled."""
    for cut in range(len(RESULTS)):
        server = Files(RESULTS, [cut], has_ranges, piece)

        await client(OPENAI, download=server.download).fetch("f", tmp_path / "r")

        assert (tmp_path / "r").read_bytes() == RESULTS
        assert server.starts == [0, RESULTS[:cut].rfind(b"\n") + 1], cut


@pytest.mark.parametrize(("has_ranges", "starts"), [(True, [0, len(RESULTS), 0]), (False, [0, len(RESULTS)])])
async def test_a_download_whose_end_was_lost_is_made_again(tmp_path: Path, has_ranges: bool, starts: list[int]) -> None:
    """All was taken, but its end was not told: there is nothing to go on with (416), so all of it comes again."""
    server = Files(RESULTS, [len(RESULTS)], has_ranges)

    await client(OPENAI, download=server.download).fetch("f", tmp_path / "r")

    assert (tmp_path / "r").read_bytes() == RESULTS
    assert server.starts == starts


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("has_end", [True, False])
async def test_a_download_cut_twice_is_whole_in_the_end(tmp_path: Path, has_ranges: bool, has_end: bool) -> None:
    """Wherever two breaks are, with or without the end of the last line: every line is there, once."""
    data = RESULTS if has_end else RESULTS[:-1]
    for cuts in product(range(0, len(data) + 1, 2), range(1, len(data) + 1, 3)):
        server = Files(data, cuts, has_ranges, piece=5)

        await client(OPENAI, download=server.download).fetch("f", tmp_path / "r")

        assert (tmp_path / "r").read_bytes() == RESULTS, cuts


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b'{"a":1}\n{"b":2}', b'{"a":1}\n{"b":2}\n', id="no end"),
        pytest.param(b'{"a":1}\n{"b":2} ', b'{"a":1}\n{"b":2} \n', id="a space for it"),
        pytest.param(b'{"a":1}\n', b'{"a":1}\n', id="end"),
        pytest.param(b'{"a":1}\r\n', b'{"a":1}\r\n', id="CRLF"),
        pytest.param(b'{"a":1}\n \t', b'{"a":1}\n', id="blanks"),
        pytest.param(b"", b"", id="empty"),
        pytest.param(b"no JSON\n", b"no JSON\n", id="whole lines are judged later"),
        pytest.param(b'{"a":"\\ud800"}', b'{"a":"\\ud800"}\n', id="a lone surrogate"),
        pytest.param(b'{"a":NaN}', b'{"a":NaN}\n', id="no number"),
        pytest.param(b'{"a":18446744073709551617}', b'{"a":18446744073709551617}\n', id="a large number"),
    ],
)
async def test_the_last_line(tmp_path: Path, data: bytes, expected: bytes) -> None:
    """A last line without its end is taken when it is whole, mended or not, as any other; the file always ends with
    the end of a line."""
    await client(OPENAI, download=Files(data).download).fetch("f", tmp_path / "r")

    assert (tmp_path / "r").read_bytes() == expected


async def test_a_file_that_became_shorter_leaves_nothing_of_the_longer(tmp_path: Path) -> None:
    """Where all is sent once more, what was taken before goes."""
    server = Files(RESULTS, [60], has_ranges=False)

    async def download(call: HttpRequest, write: Any, start: int) -> HttpResponse:
        server.data = RESULTS if not server.starts else RESULTS[:28]
        return await server.download(call, write, start)

    await client(OPENAI, download=download).fetch("f", tmp_path / "r")

    assert (tmp_path / "r").read_bytes() == RESULTS[:28]


@pytest.mark.parametrize("rest", [b'{"b":', b'{"b":"x', b'{"b":1}}', b'{"a":1}{"b":2}', b"x", b"\xc3"])
async def test_half_a_line_is_not_accepted(tmp_path: Path, rest: bytes) -> None:
    """A file that ends amid a line, though the server says that it was all, is asked for again until patience ends."""
    server = Files(b'{"a":1}\n' + rest)
    begun = anyio.current_time()

    with pytest.raises(TryLaterError, match="in the middle of a line"):
        await client(OPENAI, download=server.download).fetch("f", tmp_path / "r")

    assert (tmp_path / "r").read_bytes() == b'{"a":1}\n'
    assert server.starts == [0] + [8] * (len(server.starts) - 1)
    assert PATIENCE - SETTINGS.backoff_max <= anyio.current_time() - begun <= PATIENCE + SLIP


@pytest.mark.parametrize("rest", [b'{"b":', b'{"b":"x', b"\xc3"])
async def test_half_a_line_is_completed(tmp_path: Path, rest: bytes) -> None:
    """Where the end comes later, the file is whole."""
    server = Files(b'{"a":1}\n' + rest)

    async def download(call: HttpRequest, write: Any, start: int) -> HttpResponse:
        if len(server.starts) == 3:
            server.data = RESULTS[:28] + b'{"b":"x\xc3\xa9"}\n'
        return await server.download(call, write, start)

    server.data = RESULTS[:28] + rest
    await client(OPENAI, download=download).fetch("f", tmp_path / "r")

    assert (tmp_path / "r").read_bytes() == RESULTS[:28] + b'{"b":"x\xc3\xa9"}\n'
    assert server.starts == [0, 28, 28, 28]


async def test_an_older_download_is_replaced(tmp_path: Path) -> None:
    """What a crash left of an earlier one does not stay."""
    (tmp_path / "r").write_bytes(b"x" * 1_000)

    await client(OPENAI, download=Files(RESULTS).download).fetch("f", tmp_path / "r")

    assert (tmp_path / "r").read_bytes() == RESULTS


async def test_the_key_is_masked(tmp_path: Path) -> None:
    """A file that repeats the key says `[key]`, also where pieces part it; places count the bytes as they came."""
    data = f'{{"a":"{KEY}"}}\n{{"b":"{KEY}{KEY}"}}\n{{"c":1}}'.encode()
    second, third = data.index(b'{"b"'), data.index(b'{"c"')
    server = Files(data, [second + 20, third + 3], piece=10)

    await client(OPENAI, download=server.download, mask=redactor(KEY)).fetch("f", tmp_path / "r")

    assert (tmp_path / "r").read_bytes() == b'{"a":"[key]"}\n{"b":"[key][key]"}\n{"c":1}\n'
    assert server.starts == [0, second, third]


TOO_LONG = b"x" * 5_000
AMID = b'{"a":1}\n%b\n{"b":2}\n'


@pytest.mark.parametrize("piece", [1, 50, 999, 1_001, 10_000])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(AMID % TOO_LONG, b'{"a":1}\n{"b":2}\n', id="amid others"),
        pytest.param(TOO_LONG + b'\n{"b":2}', b'{"b":2}\n', id="the first"),
        pytest.param(b'{"a":1}\n' + TOO_LONG + b"\n", b'{"a":1}\n', id="the last"),
        pytest.param(AMID % (TOO_LONG + b"\n" + TOO_LONG), b'{"a":1}\n{"b":2}\n', id="two"),
        pytest.param(AMID % (b"y" * 900), AMID % (b"y" * 900), id="one that is just short enough"),
    ],
)
async def test_a_line_that_is_too_long_is_left_out(tmp_path: Path, piece: int, data: bytes, expected: bytes) -> None:
    """It must not fill the memory, nor cost the lines around it; the request that it tells of is judged as missing."""
    server = Files(data, piece=piece)

    await client(OPENAI, download=server.download).fetch("f", tmp_path / "r")

    fetched = (tmp_path / "r").read_bytes()
    assert b"".join(line for line in fetched.splitlines(True) if len(line) <= 1_001) == expected
    assert piece > 1_001 or fetched == expected  # what came whole in one piece was in the memory anyway
    assert server.starts == [0]


@pytest.mark.parametrize("piece", [1, 700])
async def test_a_download_cut_around_a_line_that_is_too_long(tmp_path: Path, piece: int) -> None:
    """Wherever it breaks off, the lines around the one that is left out are there once."""
    data = AMID % (b"x" * 3_000)
    for cut in range(0, len(data), 101):
        server = Files(data, [cut, min(cut + 500, len(data))], piece=piece)

        await client(OPENAI, download=server.download).fetch("f", tmp_path / "r")

        assert (tmp_path / "r").read_bytes() == b'{"a":1}\n{"b":2}\n', cut


@both
@pytest.mark.parametrize(
    ("status", "scope", "calls"),
    [
        pytest.param(404, ErrorScope.MODEL, 1, id="404"),
        pytest.param(401, ErrorScope.RUN, 1, id="401"),
        pytest.param(400, ErrorScope.REQUEST, 1, id="400"),
        pytest.param(302, ErrorScope.RUN, 1, id="redirect"),
    ],
)
async def test_a_download_that_is_refused(
    tmp_path: Path, protocol: Protocol, status: int, scope: ErrorScope, calls: int
) -> None:
    """What is no file, and will not be one, is the provider's error at once; nothing is followed elsewhere."""
    starts: list[int] = []

    async def download(call: HttpRequest, write: Any, start: int) -> HttpResponse:
        starts.append(start)
        return refusal(status)

    with pytest.raises(ProviderError) as caught:
        await client(protocol, download=download).fetch("f", tmp_path / "r")

    assert (caught.value.status, caught.value.scope, len(starts)) == (status, scope, calls)


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_download_waits_out_a_refusal(tmp_path: Path, status: int) -> None:
    """A refusal amid a download is waited out, and what was taken before stays."""
    server = Files(RESULTS, [30])
    calls: list[float] = []

    async def download(call: HttpRequest, write: Any, start: int) -> HttpResponse:
        calls.append(round(anyio.current_time() - begun, 3))
        return refusal(status, retry_after="9") if len(calls) == 2 else await server.download(call, write, start)

    begun = anyio.current_time()
    await client(OPENAI, download=download).fetch("f", tmp_path / "r")

    assert (tmp_path / "r").read_bytes() == RESULTS
    assert server.starts == [0, 28]
    assert calls[2] - calls[1] == 9.0


async def test_a_download_that_gets_on_is_not_given_up(tmp_path: Path) -> None:
    """Breaks and patience are counted from the last line that came: a file may break off at each, and take longer."""
    data = b'{"a":1}\n' * 50
    server = Files(data, [8 * n + 3 for n in range(1, 50)])

    async def download(call: HttpRequest, write: Any, start: int) -> HttpResponse:
        await anyio.sleep(10)
        return await server.download(call, write, start)

    begun = anyio.current_time()
    await client(OPENAI, download=download).fetch("f", tmp_path / "r")

    assert (tmp_path / "r").read_bytes() == data
    assert len(server.starts) == 50
    assert anyio.current_time() - begun > 500 > PATIENCE


@pytest.mark.parametrize(
    "step",
    [
        *[pytest.param(refusal(status), id=str(status)) for status in (429, 500, 503, 529)],
        pytest.param(HttpResponse(status=416), id="416"),
        pytest.param(HttpResponse(status=204), id="204"),
        *[
            pytest.param(each, id=each.type)
            for each in (lost("timeout"), lost("connection_error"), lost("invalid_http"))
        ],
        pytest.param(REFUSED, id="no connection"),
    ],
)
async def test_patience_ends_for_downloads(tmp_path: Path, step: Step) -> None:
    """A file that does not come, whatever keeps it away, is given up when patience ends; a later command goes on."""

    async def download(call: HttpRequest, write: Any, start: int) -> HttpResponse:
        if isinstance(step, TransportError):
            raise step
        return step

    begun = anyio.current_time()
    with pytest.raises(TryLaterError, match="out of reach"), anyio.fail_after(2 * PATIENCE):
        await client(OPENAI, download=download).fetch("f", tmp_path / "r")
    assert PATIENCE - SETTINGS.backoff_max <= anyio.current_time() - begun <= PATIENCE + SLIP


@pytest.mark.parametrize("cut", [10, len(RESULTS)], ids=["amid a line", "before its end is told"])
@pytest.mark.parametrize("has_ranges", [True, False])
async def test_a_download_that_does_not_get_on_is_given_up(tmp_path: Path, cut: int, has_ranges: bool) -> None:
    """The same break again and again ends with patience: also where all is taken (a length that is told too long)."""
    server = Files(RESULTS, [cut] * 10_000, has_ranges)
    begun = anyio.current_time()

    with pytest.raises(TryLaterError, match="out of reach"), anyio.fail_after(3 * PATIENCE):
        await client(OPENAI, download=server.download).fetch("f", tmp_path / "r")

    assert anyio.current_time() - begun > PATIENCE - SETTINGS.backoff_max


async def test_the_rest_of_a_file_is_asked_for_by_range(tmp_path: Path) -> None:
    """Over HTTP a download goes on with a Range header; the first call has none."""
    asked: list[str | None] = []

    async def broken() -> AsyncIterator[bytes]:
        yield RESULTS[:40]
        raise httpx.ReadError("scripted")

    async def rest() -> AsyncIterator[bytes]:
        yield RESULTS[28:]

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("range"))
        return httpx.Response(206, content=rest()) if len(asked) > 1 else httpx.Response(200, content=broken())

    async with Client(SETTINGS, httpx.MockTransport(handle)) as http_client:
        await client(OPENAI, download=http_client.download).fetch("f", tmp_path / "r")

    assert (tmp_path / "r").read_bytes() == RESULTS
    assert asked == [None, "bytes=28-"]


async def test_a_part_from_elsewhere_is_not_taken_for_the_rest(tmp_path: Path) -> None:
    """A 206 whose content-range is not what was asked for must not be glued on."""
    whole = f"bytes 0-{len(RESULTS) - 1}/{len(RESULTS)}"
    asked: list[str | None] = []

    async def blocks(data: bytes, *, is_cut: bool = False) -> AsyncIterator[bytes]:
        yield data
        if is_cut:
            raise httpx.ReadError("scripted")

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("range"))
        if len(asked) == 1:
            return httpx.Response(200, content=blocks(RESULTS[:40], is_cut=True))
        if len(asked) == 2:
            return httpx.Response(206, headers={"content-range": "bytes 30-60/77"}, content=blocks(RESULTS[30:]))
        return httpx.Response(206, headers={"content-range": whole}, content=blocks(RESULTS))

    async with Client(SETTINGS, httpx.MockTransport(handle)) as http_client:
        await client(OPENAI, download=http_client.download).fetch("f", tmp_path / "r")

    assert (tmp_path / "r").read_bytes() == RESULTS
    assert asked == [None, "bytes=28-", "bytes=28-"]


# ── the disk ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_disk_while_fetching() -> None:
    """It ends the run by our error, not by one of Python's."""
    with pytest.raises(StorageError, match="/dev/full"):
        await client(OPENAI, download=Files(RESULTS).download).fetch("f", Path("/dev/full"))


async def test_results_are_their_owners_only(tmp_path: Path) -> None:
    """What is fetched is nobody else's to read, whatever the umask."""
    old = os.umask(0)
    try:
        await client(OPENAI, download=Files(RESULTS).download).fetch("f", tmp_path / "r")
    finally:
        os.umask(old)

    assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == 0o600


async def test_a_link_in_the_place_of_a_download_is_not_followed(tmp_path: Path) -> None:
    """Results go into a file of our own, nowhere else."""
    (tmp_path / "r").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(StorageError):
        await client(OPENAI, download=Files(RESULTS).download).fetch("f", tmp_path / "r")
    assert not (tmp_path / "elsewhere").exists()


@both
async def test_a_chunk_whose_requests_are_gone_is_not_uploaded(store: BatchStore, protocol: Protocol) -> None:
    """Requests that cannot be read, or are damaged, end the run by our error; nothing else is sent for them."""
    for damage in (Path.unlink, lambda path: path.write_bytes(b"x\n{}\n")):
        record = written(store, protocol)
        damage(store.path(record))
        api = Api(protocol, [ok({"id": "f"})])

        carry: dict[Protocol, Callable[[], Any]] = {
            OPENAI: partial(api.client.upload, store, record),
            ANTHROPIC: partial(api.client.create, store, record, begin),
        }
        with pytest.raises(StorageError, match=record.local_id):
            await carry[protocol]()


# ── the key ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "data", "expected"),
    [
        pytest.param(KEY, f"a{KEY}{KEY}b".encode(), b"a[key][key]b", id="twice"),
        pytest.param(KEY, KEY[:-1].encode(), KEY[:-1].encode(), id="only a part"),
        pytest.param("any", b"any many", b"any many", id="a word is no secret"),
        pytest.param("x" * 15, b"x" * 15, b"x" * 15, id="too short"),
        pytest.param("x" * 16, b"x" * 16, b"[key]", id="long enough"),
        pytest.param(None, b"None", b"None", id="no key"),
    ],
)
async def test_the_key_goes_from_bytes_and_answers(key: str | None, data: bytes, expected: bytes) -> None:
    """Downloads and answers of batch APIs do not hold the key."""
    answer = HttpResponse(status=200, headers={"a": data.decode(), "b": "c"}, body=data)

    assert redactor(key)(data) == expected
    assert redact(answer, key) == HttpResponse(status=200, headers={"a": expected.decode(), "b": "c"}, body=expected)


@both
async def test_the_key_is_masked_in_what_is_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, protocol: Protocol
) -> None:
    """A refused download that repeats the key, piece by piece, does not show it."""
    monkeypatch.setenv(f"{protocol.value}_api_key".upper(), KEY)

    async def body() -> AsyncIterator[bytes]:
        said = orjson.dumps({"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}})
        yield said[:60]
        yield said[60:]

    transport = httpx.MockTransport(lambda request: httpx.Response(401, content=body()))
    async with Client(Sending(), transport) as client:
        made = batch_client(Config(), client, lambda message: None, protocol.value)
        with pytest.raises(ProviderError, match="Incorrect API key") as caught:
            await made.fetch("f", tmp_path / "r")

    assert KEY not in caught.value.message
    assert KEY.encode() not in (tmp_path / "r").read_bytes()
