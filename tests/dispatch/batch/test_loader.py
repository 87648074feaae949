"""Loading: which requests share a batch, under which names, when it is full, and what happens when money runs out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from pipeline import providers
from pipeline.accounting.budget import Budget
from pipeline.core.config import Batches, Config, Sending
from pipeline.core.errors import BudgetReachedError, ErrorScope, PipelineError, TryLaterError, UsageError
from pipeline.core.types import Cost, HttpResponse, Protocol, Request, Usage
from pipeline.dispatch.batch.builder import BatchBuilder, BatchGroup, deadline_text
from pipeline.dispatch.batch.client import BatchClient, BatchConnection
from pipeline.dispatch.batch.loader import BatchLoader
from pipeline.dispatch.batch.reservations import BatchReservations
from pipeline.dispatch.batch.store import BatchItem, BatchRecord, BatchStore, Step, read_records
from pipeline.dispatch.retry import Policy
from pipeline.providers import BatchCodec
from pipeline.providers.anthropic_batch import AnthropicBatches
from pipeline.providers.openai_batch import OpenAIBatches

ANTHROPIC, OPENAI = Protocol.ANTHROPIC, Protocol.OPENAI
both = pytest.mark.parametrize("protocol", [ANTHROPIC, OPENAI])
NOW = "2026-11-22T02:40:07Z"


class SmallOpenAI(OpenAIBatches):
    """OpenAI's batch API with limits that are soon reached."""

    max_requests = 5
    max_bytes = 600


class SmallAnthropic(AnthropicBatches):
    """Anthropic's batch API with limits that are soon reached."""

    max_requests = 5
    max_bytes = 600


SMALL: Mapping[Protocol, BatchCodec] = {OPENAI: SmallOpenAI(), ANTHROPIC: SmallAnthropic()}


class Bounds:
    """Prices: the worst case of a request is its bound on output tokens; without one nobody knows."""

    def cost(self, request: Request, model: str, usage: Usage) -> Cost:
        raise AssertionError("nothing is priced while it is loaded")

    def worst_case(self, request: Request) -> int:
        if request.max_output_tokens is None:
            raise UsageError(f"no price is known for {request.model}")
        return request.max_output_tokens


def item(
    custom_id: str,
    protocol: Protocol = OPENAI,
    model: str = "m",
    *,
    body: bytes = b'{"a":1}',
    digest: str = "d",
    tokens: int = 10,
    worst: int | None = 10,
) -> BatchItem:
    return BatchItem(
        request=Request(
            custom_id=custom_id,
            digest=digest,
            source="in.jsonl",
            line=1,
            provider=protocol.value,
            model=model,
            body=body,
            max_output_tokens=worst,
            estimated_input_tokens=tokens,
        )
    )


def items(number: int, protocol: Protocol = OPENAI, **fields: Any) -> list[BatchItem]:
    return [item(f"r{n}", protocol, **fields) for n in range(number)]


async def _nobody(*_: Any) -> HttpResponse:
    raise AssertionError("nothing is sent while it is loaded")


@dataclass
class Dock:
    """A loader before a directory of chunks: `shipped` are the chunks that it gave away, in their order."""

    store: BatchStore
    settings: Batches = field(default_factory=Batches)
    codecs: Mapping[Protocol, BatchCodec] = field(default_factory=lambda: {each: _codec(each) for each in Protocol})
    budget: Budget | None = None
    may_wait: bool = True
    no_key: frozenset[str] = frozenset()
    shipped: list[BatchRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reservations = BatchReservations(self.budget, Bounds())
        self.builder = BatchBuilder(self.store, self.settings, open_client=self._client, disk=anyio.CapacityLimiter(1))
        self.loader = BatchLoader(
            self.builder,
            self.reservations,
            new_record=lambda group: BatchRecord(run="run-1", provider=group.provider, model=group.model, at=NOW),
            submit=self._submit,
            may_wait=self.may_wait,
        )

    def _client(self, name: str) -> BatchClient:
        if name in self.no_key:
            raise UsageError(f"no key for {name}")
        protocol = Protocol(name)
        endpoint = Config().providers[protocol]
        return BatchClient(
            codec=providers.codec(protocol),
            batches=self.codecs[protocol],
            connection=BatchConnection(
                endpoint=endpoint, headers=(), ask=_nobody, download=_nobody, mask=lambda data: data
            ),
            policy=Policy(Sending()),
            max_outage=1.0,
            max_line_bytes=1_000,
        )

    def _submit(self, record: BatchRecord) -> None:
        """Take a chunk; whoever ships it relies on the journal knowing it."""
        assert record in read_records(self.store.directory)
        self.shipped.append(record)

    def items(self, record: BatchRecord) -> list[BatchItem]:
        return [each for _, each in self.store.items(record)]

    def ids(self) -> list[list[str]]:
        """Return the ids of the requests of each chunk that was shipped."""
        return [[each.request.custom_id for each in self.items(record)] for record in self.shipped]

    def all_ids(self) -> list[str]:
        """Return the ids of all requests that were shipped, in their order."""
        return list(chain.from_iterable(self.ids()))

    def upload(self, record: BatchRecord) -> bytes:
        codec = self.codecs[Protocol(record.provider)]
        return b"".join(self.store.content(record, separator=codec.separator, entry=codec.entry))

    def bring_back(self, record: BatchRecord, spent: int | None = 0) -> None:
        """Settle every request of a chunk, as its batch has ended."""
        for each in self.items(record):
            self.reservations.settle(record.local_id, each.request, spent)
        self.reservations.close(record.local_id)


def _codec(protocol: Protocol) -> BatchCodec:
    return providers.batch_codec(protocol)


def is_settled(budget: Budget) -> bool:
    """Tell whether nothing is reserved: what is neither spent nor held can be reserved to the last nano-dollar."""
    rest = budget.cap - budget.used
    fits = budget.try_reserve(rest)
    if fits:
        budget.settle(rest, 0)
    return fits


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BatchStore]:
    opened = BatchStore(tmp_path / "answers.jsonl")
    opened.open()
    yield opened
    opened.release()


async def loaded(dock: Dock, wanted: Iterable[BatchItem], *, by: int = 1_000) -> list[BatchItem]:
    """Load requests, so many at a time, and seal what is left; return those that were turned away."""
    rest, away = list(wanted), []
    while rest:
        away += await dock.loader.load(rest[:by])
        rest = rest[by:]
    await dock.loader.submit_all()
    return away


# ── when a chunk is full ──────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("by", [1, 3, 100])
@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        pytest.param({}, [5, 5, 2], id="the provider's"),
        pytest.param({"max_requests": 4}, [4, 4, 4], id="fewer"),
        pytest.param({"max_requests": 1}, [1] * 12, id="one"),
        pytest.param({"max_requests": 50}, [5, 5, 2], id="more than the provider takes"),
    ],
)
async def test_a_chunk_is_full_by_its_number(
    store: BatchStore, protocol: Protocol, by: int, settings: dict[str, Any], sizes: list[int]
) -> None:
    """No chunk has more requests than the settings and the provider allow; none is closed before, and order stays."""
    dock = Dock(store, Batches(**settings), SMALL)

    assert await loaded(dock, items(12, protocol, body=b"{}"), by=by) == []

    assert [record.requests for record in dock.shipped] == sizes
    assert dock.all_ids() == [f"r{n}" for n in range(12)]


@both
@pytest.mark.parametrize("settings", [{}, {"max_bytes": 300}, {"max_bytes": 10_000}], ids=str)
async def test_a_chunk_is_full_by_its_bytes(store: BatchStore, protocol: Protocol, settings: dict[str, Any]) -> None:
    """What is uploaded measures what was said of it and no more than the limit; one request more would be too much."""
    dock = Dock(store, Batches(**settings), SMALL)
    limit = min(600, settings.get("max_bytes", 600))
    asked = [item(f"r{n}", protocol, body=b'{"a":"%b"}' % (b"x" * (37 * n % 101))) for n in range(60)]

    await loaded(dock, asked, by=7)

    assert dock.all_ids() == [each.request.custom_id for each in asked]
    uploads = [dock.upload(record) for record in dock.shipped]
    assert [len(upload) for upload in uploads] == [record.content for record in dock.shipped]
    assert max(map(len, uploads)) <= limit
    codec = SMALL[protocol]
    firsts = [dock.items(record)[0] for record in dock.shipped[1:]]
    for record, upload, first in zip(dock.shipped, uploads, firsts, strict=False):
        entry = codec.separator + codec.entry(first.name, first.request.body)
        assert record.requests == codec.max_requests or len(upload) + len(entry) > limit


@both
async def test_a_chunk_may_be_full_to_the_last_byte(store: BatchStore, protocol: Protocol) -> None:
    """A request that fits exactly goes in; with a byte less it begins the next."""
    codec = _codec(protocol)
    names = [codec.name("0a1b2c3d4e5f", name, "0" * 32) for name in ("r0", "r1")]
    exact = len(codec.separator.join(codec.entry(name, b'{"a":1}') for name in names))

    for limit, sizes in ((exact, [2]), (exact - 1, [1, 1])):
        dock = Dock(store, Batches(max_bytes=limit))
        await loaded(dock, items(2, protocol))
        assert [record.requests for record in dock.shipped] == sizes


@both
async def test_a_request_that_is_larger_than_a_chunk_goes_alone(store: BatchStore, protocol: Protocol) -> None:
    """It is for the provider to refuse; the requests around it are not refused with it."""
    dock = Dock(store, codecs=SMALL)
    huge = item("huge", protocol, body=b'"%b"' % (b"x" * 5_000))

    await loaded(dock, [item("a", protocol), huge, item("b", protocol)])

    assert dock.ids() == [["a"], ["huge"], ["b"]]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        pytest.param(None, [["a", "b", "c", "d"]], id="no bound"),
        pytest.param(61, [["a", "b", "c", "d"]], id="just enough"),
        pytest.param(60, [["a", "b", "c"], ["d"]], id="one too few"),
        pytest.param(30, [["a", "b"], ["c"], ["d"]], id="some"),
        pytest.param(1, [["a"], ["b"], ["c"], ["d"]], id="each is too large"),
    ],
)
async def test_a_chunk_is_full_by_its_tokens(store: BatchStore, most: int | None, expected: list[list[str]]) -> None:
    """Where the provider's queue takes no more of a model, chunks of it stay below; one request alone always goes."""
    dock = Dock(store)
    dock.builder.group("openai", "m").max_tokens = most
    tokens = {"a": 10, "b": 20, "c": 25, "d": 6}

    await loaded(dock, [item(name, tokens=number) for name, number in tokens.items()])

    assert dock.ids() == expected
    assert [record.input_tokens for record in dock.shipped] == [sum(tokens[name] for name in ids) for ids in expected]


async def test_a_bound_on_tokens_is_its_models_only(store: BatchStore) -> None:
    """The queue of one model is no other's."""
    dock = Dock(store)
    dock.builder.group("openai", "small").max_tokens = 10

    await loaded(dock, [*items(3, model="small"), *items(3, model="large")])

    assert sorted((record.model, record.requests) for record in dock.shipped) == [("large", 3), *[("small", 1)] * 3]


# ── who shares a batch ────────────────────────────────────────────────────────────────────────────────────────────


async def test_who_shares_a_batch(store: BatchStore) -> None:
    """OpenAI's batches are of one model each, Anthropic's of any."""
    dock = Dock(store)
    asked = [item(f"{p}{m}{n}", p, m) for n in range(3) for p in (OPENAI, ANTHROPIC) for m in ("x", "y")]

    await loaded(dock, asked)

    assert sorted((record.provider, record.model, record.requests) for record in dock.shipped) == [
        ("anthropic", "", 6),
        ("openai", "x", 3),
        ("openai", "y", 3),
    ]
    for record in dock.shipped:
        requests = [each.request for each in dock.items(record)]
        assert {request.provider for request in requests} == {record.provider}
        assert record.model in ("", *{request.model for request in requests})
        assert (record.run, record.at, record.step) == ("run-1", NOW, Step.WRITTEN)
    assert sorted(group.name for group in dock.builder.groups.values()) == ["anthropic", "openai/x", "openai/y"]


async def test_a_group_is_one_object(store: BatchStore) -> None:
    """What is learned of a model counts for all that comes later; a provider is asked for once."""
    dock = Dock(store)

    group = dock.builder.group("openai", "m")
    await dock.loader.load([item("a")])

    assert dock.builder.group("openai", "m") is group is next(iter(dock.builder.groups.values()))
    assert dock.builder.group("openai", "n").client is group.client
    assert dock.builder.group("anthropic", "x") is dock.builder.group("anthropic", "y")


@both
async def test_names_fit_and_differ(store: BatchStore, protocol: Protocol) -> None:
    """Whatever the ids are, the provider takes the names, no two in a batch are the same, and none is lost."""
    ids = [
        "a",
        "a b",
        "ä",
        "x" * 63,
        "x" * 64,
        "x" * 65,
        "y" * 512,
        "y" * 511 + "z",
        "z" * 9_000,
        '"\n',
        "\u2028",
        "a/b",
    ]
    dock = Dock(store)

    await loaded(dock, [item(id, protocol) for id in ids])

    (record,) = dock.shipped
    names = [each.name for each in dock.items(record)]
    assert len(set(names)) == len(ids)
    assert max(map(len, names)) <= (64 if protocol is ANTHROPIC else 512)
    assert dock.ids() == [ids]


@pytest.mark.parametrize("custom_id", ["a b", "x" * 600], ids=["no name", "too long"])
async def test_names_tell_apart_what_has_one_id(store: BatchStore, custom_id: str) -> None:
    """Where an id is no name, one is made of it and of what is asked."""
    dock = Dock(store)
    asked = [item(custom_id, ANTHROPIC, digest=digest) for digest in ("d1", "d2")]

    await loaded(dock, asked)

    first, second = dock.items(dock.shipped[0])
    assert first.name != second.name


async def test_a_request_that_goes_again_has_another_name(store: BatchStore) -> None:
    """A late result of an earlier batch of Anthropic's cannot be taken for one of this; attempts come along."""
    dock = Dock(store)
    await loaded(dock, [item("a", ANTHROPIC)])
    (first,) = dock.items(dock.shipped[0])

    await loaded(dock, [replace(first, counted=2)])

    (again,) = dock.items(dock.shipped[1])
    assert (again.request, again.counted) == (first.request, 2)
    assert again.name != first.name
    assert again.name == f"{dock.shipped[1].local_id}-a"


# ── on the disk ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_loaded_is_on_the_disk_and_not_yet_known(store: BatchStore) -> None:
    """Memory does not hold requests until a chunk is full; the journal knows a chunk once it is whole."""
    dock = Dock(store)

    await dock.loader.load(items(3))

    assert (dock.shipped, dock.builder.is_empty, store.all) == ([], False, ())
    (path,) = store.directory.iterdir()
    assert path.read_bytes().count(b"\n") == 6

    await dock.loader.submit_all()
    await dock.loader.submit_all()

    (record,) = dock.shipped
    assert (record.requests, dock.builder.is_empty, store.all) == (3, True, (record,))
    assert not store.is_damaged(record)


async def test_what_is_being_sealed_is_not_forgotten(store: BatchStore) -> None:
    """Until a chunk is shipped the loader is not empty, so nobody ends before it."""
    dock = Dock(store)
    await dock.loader.load(items(3))
    seen: list[bool] = []

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(dock.loader.submit_all)
        await checkpoint()
        while not dock.shipped:
            seen.append(dock.builder.is_empty)
            await checkpoint()

    assert seen
    assert not any(seen)
    assert dock.builder.is_empty


async def test_two_tasks_lose_nothing(store: BatchStore) -> None:
    """Several load at the same time, over real threads, each in its order: every request is in one chunk, once."""
    dock = Dock(store, Batches(max_requests=37))
    tasks = {
        f"t{n}": [item(f"t{n} {i}", p, body=b"{}" * 50) for i in range(1_500)] for n, p in enumerate([*Protocol] * 2)
    }

    async def load(asked: Sequence[BatchItem]) -> None:
        for begin in range(0, len(asked), 64):
            assert await dock.loader.load(asked[begin : begin + 64]) == []

    async with anyio.create_task_group() as group:
        for asked in tasks.values():
            group.start_soon(load, asked)
    await dock.loader.submit_all()

    found = [each.request.custom_id for record in dock.shipped for each in dock.items(record)]
    assert Counter(found) == Counter(each.request.custom_id for asked in tasks.values() for each in asked)
    for name, asked in tasks.items():
        assert [id for id in found if id.startswith(f"{name} ")] == [each.request.custom_id for each in asked]
    assert max(record.requests for record in dock.shipped) == 37
    assert not any(store.is_damaged(record) for record in dock.shipped)
    assert store.all == tuple(dock.shipped)
    assert [len(dock.upload(record)) for record in dock.shipped] == [record.content for record in dock.shipped]


async def test_loading_and_sealing_at_the_same_time_lose_nothing(store: BatchStore) -> None:
    """Who seals amid another's loading cuts chunks, not requests."""
    dock = Dock(store)
    asked = items(2_000)
    is_done = anyio.Event()

    async def load() -> None:
        for begin in range(0, len(asked), 50):
            await dock.loader.load(asked[begin : begin + 50])
        is_done.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(load)
        while not is_done.is_set():
            await dock.loader.submit_all()
            await checkpoint()
    await dock.loader.submit_all()

    assert dock.all_ids() == [each.request.custom_id for each in asked]
    assert len(dock.shipped) > 1
    assert not any(store.is_damaged(record) for record in dock.shipped)


# ── what is not loaded ────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_unloaded_leaves_nothing(store: BatchStore) -> None:
    """A stop forgets what is not shipped: files, counts and the money that was set aside; what is shipped stays."""
    budget = Budget(1_000)
    dock = Dock(store, Batches(max_requests=4), budget=budget)
    await dock.loader.load([*items(6), *items(3, ANTHROPIC)])

    assert dock.loader.discard() == 2 + 3
    assert (dock.loader.discard(), dock.builder.is_empty) == (0, True)

    (record,) = dock.shipped
    assert {path.name for path in store.directory.iterdir()} == {"journal.jsonl", f"{record.local_id}.jsonl"}
    assert budget.try_reserve(1_000 - 4 * 10)
    budget.settle(1_000 - 4 * 10, 0)
    dock.bring_back(record)
    assert is_settled(budget)
    await dock.loader.submit_all()
    assert len(dock.shipped) == 1


async def test_a_missing_key_ends_the_loading(store: BatchStore) -> None:
    """Nothing is loaded of a provider that cannot be called, nor anything after it; what was loaded before goes out."""
    dock = Dock(store, no_key=frozenset({"anthropic"}))

    asked = [item("a"), item("b", ANTHROPIC), item("c")]
    away = await loaded(dock, asked)

    assert away == asked[1:]
    assert isinstance(dock.loader.refused, UsageError)
    assert "no key for anthropic" in dock.loader.refused.message
    assert dock.ids() == [["a"]]
    assert await dock.loader.load(asked) == asked
    with pytest.raises(UsageError, match="no key"):
        dock.builder.group("anthropic", "m")


async def test_a_price_that_nobody_knows_ends_the_loading(store: BatchStore) -> None:
    """With a budget nothing is loaded whose price is unknown; without one nobody asks."""
    asked = [item("a"), item("b", worst=None), item("c")]
    dock, free = Dock(store, budget=Budget(1_000)), Dock(store)

    assert await loaded(dock, asked) == asked[1:]
    assert await loaded(free, asked) == []

    assert isinstance(dock.loader.refused, UsageError)
    assert (dock.ids(), free.ids(), free.loader.refused) == ([["a"]], [["a", "b", "c"]], None)


async def test_a_refused_model_is_turned_away(store: BatchStore) -> None:
    """Of a model whose batches the provider refuses nothing is loaded, and no money set aside; others go on."""
    budget = Budget(1_000)
    dock = Dock(store, budget=budget)
    dock.builder.group("openai", "gone").refusal = _error()
    asked = [item("a", model="gone"), item("b"), item("c", model="gone"), item("d", ANTHROPIC)]

    assert await loaded(dock, asked) == [asked[0], asked[2]]

    assert dock.ids() == [["b"], ["d"]]
    assert dock.loader.refused is None
    for record in dock.shipped:
        dock.bring_back(record)
    assert is_settled(budget)


def _error() -> PipelineError:
    return PipelineError("no batches of this model").replace(scope=ErrorScope.MODEL)


# ── money ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_does_not_fit_waits_until_results_are_back(store: BatchStore) -> None:
    """Everything that is loaded goes out first, of every group, so that it can come back; nothing is turned away."""
    budget = Budget(35)
    dock = Dock(store, budget=budget)
    asked = [item("a"), item("b", ANTHROPIC), item("c", model="n"), item("d"), item("e")]
    away: list[BatchItem] = []

    async def load() -> None:
        away.extend(await dock.loader.load(asked))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load)
            while dock.reservations.waiting == 0 or not dock.builder.is_empty:
                await checkpoint()
            assert sorted(dock.ids()) == [["a"], ["b"], ["c"]]
            assert dock.builder.is_empty
            dock.bring_back(dock.shipped[0], spent=4)
            while len(dock.shipped) < 4 or dock.reservations.waiting == 0:
                await checkpoint()
            assert dock.ids()[3] == ["d"]
            dock.bring_back(dock.shipped[1], spent=0)
    await dock.loader.submit_all()

    assert (away, dock.loader.refused, dock.reservations.waiting) == ([], None, 0)
    assert sorted(dock.all_ids()) == ["a", "b", "c", "d", "e"]
    for record in dock.shipped[2:]:
        dock.bring_back(record)
    assert (budget.spent, is_settled(budget)) == (4, True)


async def test_what_never_fits_is_turned_away(store: BatchStore) -> None:
    """Once nothing is on its way that could give money back, the budget is reached, and nothing more is loaded."""
    budget = Budget(25)
    dock = Dock(store, budget=budget)
    asked = [item("a"), item("b"), item("c"), item("small", worst=0)]
    away: list[BatchItem] = []

    async def load() -> None:
        away.extend(await dock.loader.load(asked))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load)
            while dock.reservations.waiting == 0 or not dock.builder.is_empty:
                await checkpoint()
            dock.bring_back(dock.shipped[0], spent=None)

    assert away == asked[2:]
    assert isinstance(dock.loader.refused, BudgetReachedError)
    assert await dock.loader.load(asked) == asked
    assert (dock.ids(), budget.spent, is_settled(budget)) == ([["a", "b"]], 20, True)


async def test_what_is_held_for_batches_that_go_on_ends_the_waiting(store: BatchStore) -> None:
    """A batch that nobody waits for any more gives nothing back in this run: who waits for its money is told."""
    dock = Dock(store, budget=Budget(10))
    away: list[BatchItem] = []

    async def load() -> None:
        away.extend(await dock.loader.load(items(2)))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load)
            while dock.reservations.waiting == 0 or not dock.builder.is_empty:
                await checkpoint()
            dock.reservations.hold(dock.shipped[0].local_id)

    assert [each.request.custom_id for each in away] == ["r1"]
    assert isinstance(dock.loader.refused, BudgetReachedError)


async def test_a_first_request_that_never_fits_is_turned_away(store: BatchStore) -> None:
    """Where nothing is reserved nobody waits, and no directory is made."""
    dock = Dock(store, budget=Budget(9))

    with anyio.fail_after(10):
        assert await loaded(dock, items(2)) == items(2)

    assert isinstance(dock.loader.refused, BudgetReachedError)
    assert not store.directory.exists()


async def test_without_waiting_the_rest_is_for_a_later_command(store: BatchStore) -> None:
    """A run that does not wait ships what fits and leaves the rest, at once."""
    budget = Budget(25)
    dock = Dock(store, budget=budget, may_wait=False)
    asked = items(4)

    with anyio.fail_after(10):
        away = await dock.loader.load(asked)

    assert away == asked[2:]
    assert isinstance(dock.loader.refused, TryLaterError)
    assert (dock.ids(), dock.builder.is_empty, dock.reservations.waiting) == ([["r0", "r1"]], True, 0)
    dock.bring_back(dock.shipped[0])
    assert is_settled(budget)


async def test_who_loads_while_another_waits_for_money_ships_at_once(store: BatchStore) -> None:
    """What stays in a chunk that is not full could never give back the money that the other waits for."""
    dock = Dock(store, budget=Budget(100))
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            await dock.loader.load([item("a", worst=50)])
            tasks.start_soon(dock.loader.load, [item("large", worst=95)])
            while dock.reservations.waiting == 0 or not dock.builder.is_empty:
                await checkpoint()

            await dock.loader.load([item("small", worst=10)])

            assert dock.ids() == [["a"], ["small"]]
            for record in tuple(dock.shipped):
                dock.bring_back(record)
    await dock.loader.submit_all()
    assert dock.ids() == [["a"], ["small"], ["large"]]


@pytest.mark.usefixtures("no_threads")
async def test_what_is_loaded_while_another_seals_for_money_goes_out(store: BatchStore) -> None:
    """Between the sealing and the waiting, too: else he waits for ever for what lies in a chunk that nobody ships."""
    dock = Dock(store, budget=Budget(100))
    await dock.loader.load([item("a", model="x", worst=40), item("b", model="y", worst=40)])
    with anyio.fail_after(1):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dock.loader.load, [item("large", worst=95)])
            tasks.start_soon(dock.loader.load, [item("small", model="x", worst=10)])
            for number in range(3):
                while len(dock.shipped) == number:
                    await checkpoint()
                dock.bring_back(dock.shipped[number])
    await dock.loader.submit_all()

    assert sorted(dock.all_ids()) == ["a", "b", "large", "small"]


@pytest.mark.parametrize("cap", [100, 500, 10_000])
async def test_two_tasks_with_one_budget_lose_nothing(store: BatchStore, cap: int) -> None:
    """Every request is loaded once, whoever waits for whom; never is more out than the cap, and all comes back."""
    budget = Budget(cap)
    dock = Dock(store, Batches(max_requests=20), budget=budget)
    asked = [[item(f"t{n} {i}", worst=1 + i % 10) for i in range(400)] for n in range(3)]
    is_loaded = anyio.Event()

    async def load(wanted: Sequence[BatchItem]) -> None:
        for begin in range(0, len(wanted), 40):
            assert await dock.loader.load(wanted[begin : begin + 40]) == []

    async def bring_back() -> None:
        brought = 0
        while not (is_loaded.is_set() and brought == len(dock.shipped)):
            for record in dock.shipped[brought:]:
                brought += 1
                dock.bring_back(record)
            await anyio.sleep(0.001)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as back:
            back.start_soon(bring_back)
            async with anyio.create_task_group() as tasks:
                for wanted in asked:
                    tasks.start_soon(load, wanted)
            await dock.loader.submit_all()
            is_loaded.set()

    found = Counter(dock.all_ids())
    assert found == Counter(each.request.custom_id for wanted in asked for each in wanted)
    assert (
        max(sum(each.request.max_output_tokens or 0 for each in dock.items(record)) for record in dock.shipped) <= cap
    )
    assert (budget.spent, is_settled(budget), dock.loader.refused) == (0, True, None)


# ── small things ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_room_is_made_for_one_that_waits(store: BatchStore) -> None:
    """A batch that ends lets one chunk go on; where none waits the room is not kept for later."""
    group: BatchGroup = Dock(store).builder.group("openai", "m")
    went: list[int] = []

    async def wait(number: int) -> None:
        await group.room.acquire()
        went.append(number)

    group.make_room()
    async with anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(wait, number)
        await anyio.wait_all_tasks_blocked()
        assert went == []
        for expected in ([0], [0, 1], [0, 1, 2]):
            group.make_room()
            await anyio.wait_all_tasks_blocked()
            assert went == expected


def test_a_deadline_as_chunks_hold_it() -> None:
    """In UTC, to the second; none stays none."""
    assert deadline_text(datetime(2026, 11, 22, 2, 40, 7, 999_999, tzinfo=UTC)) == NOW
    assert deadline_text(None) is None
