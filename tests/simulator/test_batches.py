"""The rules that hold for both providers' batches, under a virtual clock."""

import asyncio
from collections import Counter
from typing import Any

import orjson
import pytest

from pipeline.simulator import answer_token
from tests.virtual import virtual_time

from .batching import Batching, statistics
from .conftest import Connect

pytestmark = virtual_time

OVER = {"completed", "ended"}


async def test_every_request_is_answered(connect: Connect, batching: Batching) -> None:
    """Each request gets, under its `custom_id`, the answer that it would get live."""
    requests = batching.requests(*(f"text {number}" for number in range(300)))
    async with connect(batch_seconds=10) as client:
        batch = await batching.made(client, requests)
        await asyncio.sleep(10)
        results = await batching.results(client, batch)
        live = (await batching.wire.post(client, requests[7][1])).json()
    texts = {result["custom_id"]: orjson.dumps(batching.message(result)).decode() for result in results}
    assert all(answer_token(body) in texts[custom_id] for custom_id, body in requests)
    assert len(results) == len(texts) == 300
    (seven,) = [batching.message(result) for result in results if result["custom_id"] == "r7"]
    content = "choices" if batching.is_openai else "content"
    assert seven[content] == live[content]
    assert seven["id"] != live["id"]


async def test_what_a_batch_is_billed_as(connect: Connect, batching: Batching) -> None:
    """Anthropic's answers say that they came in a batch, OpenAI's do not, whatever tier was asked for."""
    fields = {"service_tier": "flex"} if batching.is_openai else {}
    async with connect() as client:
        batch = await batching.made(client, batching.requests("one", **fields))
        await asyncio.sleep(1)
        (result,) = await batching.results(client, batch)
    message = batching.message(result)
    tier = message["service_tier"] if batching.is_openai else message["usage"]["service_tier"]
    assert tier == ("default" if batching.is_openai else "batch")


async def test_results_are_shuffled(connect: Connect, batching: Batching) -> None:
    """Results come in an order of their own, which follows from the seed."""
    requests = batching.requests(*map(str, range(50)))
    orders = []
    for seed in (1, 1, 2):
        async with connect(seed=seed) as client:
            batch = await batching.made(client, requests)
            await asyncio.sleep(1)
            orders.append([result["custom_id"] for result in await batching.results(client, batch)])
    assert orders[0] == orders[1] != orders[2] != sorted(orders[2])
    assert orders[0] != [custom_id for custom_id, _ in requests]


async def test_results_are_the_same_each_time(connect: Connect, batching: Batching) -> None:
    """Results may be read again and are equal to the byte, with a true `content-length`."""
    async with connect() as client:
        batch = await batching.made(client, batching.requests(*map(str, range(500))))
        await asyncio.sleep(1)
        (path,) = batching.result_paths(await batching.poll(client, batch))
        first, second = [await batching.get(client, path) for _ in range(2)]
    assert first.content == second.content
    assert int(first.headers["content-length"]) == len(first.content)
    expected = "application/octet-stream" if batching.is_openai else "application/x-jsonl"
    assert first.headers["content-type"] == expected


async def test_a_batch_takes_its_time(connect: Connect, batching: Batching) -> None:
    """A batch is over `batch_seconds` after its creation and not a moment before."""
    async with connect(batch_seconds=100) as client:
        batch = await batching.made(client, batching.requests("one", "two"))
        await asyncio.sleep(99.9)
        before = batching.status(await batching.poll(client, batch))
        await asyncio.sleep(0.1)
        after = batching.status(await batching.poll(client, batch))
    assert before not in OVER
    assert after in OVER


async def test_requests_are_answered_evenly(connect: Connect, batching: Batching) -> None:
    """Half of the time after validation has answered half of the requests, and only these are billed so far."""
    async with connect(batch_seconds=100) as client:
        await batching.made(client, batching.requests(*map(str, range(100))))
        await asyncio.sleep(10 + 85 / 2 if batching.is_openai else 50)
        half = await statistics(client)
        await asyncio.sleep(50)
        whole = await statistics(client)
    assert (half["answered"], half["batches"]["answered"]) == (50, 50)
    assert (whole["answered"], whole["batches"]["answered"]) == (100, 100)


async def test_in_no_time(connect: Connect, batching: Batching) -> None:
    """With `batch_seconds` 0 the answer to its creation still shows a new batch, and the next one an ended batch."""
    async with connect(batch_seconds=0) as client:
        batch = await batching.made(client, batching.requests("one"))
        await asyncio.sleep(0)
        outcomes = await batching.outcomes(client, batch)
    assert batching.status(batch) not in OVER
    assert outcomes == {"r0": "succeeded"}


async def test_statistics(connect: Connect, batching: Batching) -> None:
    """Requests in batches count once in the totals, and batches and calls have counters of their own."""
    requests = batching.requests("one", "two", "[[status:500]]", "[[expire]]")
    async with connect() as client:
        batch = await batching.made(client, requests)
        await batching.wire.post(client, requests[0][1])
        await asyncio.sleep(1)
        await batching.results(client, batch)
        found = await statistics(client)
    totals = found["by_model"][batching.wire.fields["model"]]
    files = 2 if batching.is_openai else 1
    assert (found["received"], found["by_status"]) == (1, {"200": 1})
    assert (found["answered"], found["unique_paid"], found["duplicates_paid"]) == (3, 2, 1)
    assert found["batches"]["by_model"][batching.wire.fields["model"]]["requests"] == 2
    assert totals["requests"] == 3
    calls = {"upload": int(batching.is_openai), "create": 1, "poll": 1, "list": 0, "results": files, "cancel": 0}
    del found["batches"]["by_model"]
    assert found["batches"] == {
        "created": 1,
        "created_by_provider": {batching.wire.name: 1},
        "uploads": int(batching.is_openai),
        "requests": 4,
        "answered": 2,
        "errored": 1,
        "expired": 1,
        "cancelled": 0,
        "calls": calls,
    }


async def test_journal(connect: Connect, batching: Batching) -> None:
    """What was answered in a batch by now is in the journal without anybody having looked at the batch."""
    requests = batching.requests("one", "two")
    async with connect(journal=True) as client:
        await batching.made(client, requests)
        await asyncio.sleep(1)
        text = (await client.get("/simulator/journal")).content
    tokens = {orjson.loads(entry)["answer_token"] for entry in text.splitlines()}
    assert tokens == {answer_token(body) for _, body in requests}


async def test_errored(connect: Connect, batching: Batching) -> None:
    """An invalid request or one marked to fail has an error of its own; the others are answered, and billed alone."""
    bad = batching.wire.body("three", max_tokens="many")
    requests = [*batching.requests("one", "[[status:429]]"), ("bad", bad)]
    async with connect() as client:
        batch = await batching.made(client, requests)
        await asyncio.sleep(1)
        results = await batching.results(client, batch)
        found = await statistics(client)
    outcomes = {result["custom_id"]: batching.outcome(result) for result in results}
    errors = {
        result["custom_id"]: batching.error(result) for result in results if batching.outcome(result) == "errored"
    }
    errors = {name: error.get("error", error) for name, error in errors.items()}
    assert outcomes == {"r0": "succeeded", "r1": "errored", "bad": "errored"}
    assert errors["bad"]["type"] == "invalid_request_error"
    assert errors["r1"]["type"] == ("requests" if batching.is_openai else "rate_limit_error")
    assert (found["answered"], found["batches"]["errored"]) == (1, 2)


async def test_one_request_expires(connect: Connect, batching: Batching) -> None:
    """`[[expire]]` is never answered: the batch ends when it would, as one that expired in part."""
    async with connect(batch_seconds=10) as client:
        batch = await batching.made(client, batching.requests("one", "[[expire]]", "three"))
        await asyncio.sleep(9)
        before = batching.status(await batching.poll(client, batch))
        await asyncio.sleep(1)
        after = batching.status(await batching.poll(client, batch))
        outcomes = await batching.outcomes(client, batch)
    assert (before, after) == ("in_progress", "expired" if batching.is_openai else "ended")
    assert outcomes == {"r0": "succeeded", "r1": "expired", "r2": "succeeded"}


async def test_one_request_is_stuck(connect: Connect, batching: Batching) -> None:
    """`[[stuck]]` holds the batch up until its window is over."""
    async with connect(batch_seconds=10, batch_window=100) as client:
        batch = await batching.made(client, batching.requests("one", "[[stuck]]"))
        await asyncio.sleep(99)
        before = batching.status(await batching.poll(client, batch))
        await asyncio.sleep(1)
        after = batching.status(await batching.poll(client, batch))
        outcomes = await batching.outcomes(client, batch)
    assert (before, after) == ("in_progress", "expired" if batching.is_openai else "ended")
    assert outcomes == {"r0": "succeeded", "r1": "expired"}


async def test_the_window_is_over(connect: Connect, batching: Batching) -> None:
    """What is not answered when the window is over has expired and is not billed."""
    async with connect(batch_seconds=100, batch_window=50) as client:
        batch = await batching.made(client, batching.requests(*map(str, range(100))))
        await asyncio.sleep(50)
        counted = Counter((await batching.outcomes(client, batch)).values())
        found = await statistics(client)
    answered = 47 if batching.is_openai else 50
    assert counted == {"succeeded": answered, "expired": 100 - answered}
    assert (found["answered"], found["batches"]["expired"]) == (answered, 100 - answered)


async def test_cancel(connect: Connect, batching: Batching) -> None:
    """A cancelled batch keeps what was answered, is billed for that alone, and ends after `batch_cancel_seconds`."""
    async with connect(batch_seconds=100, batch_cancel_seconds=30) as client:
        batch = await batching.made(client, batching.requests(*map(str, range(100)), "[[stuck]]", "[[expire]]"))
        await asyncio.sleep(10 + 85 / 2 if batching.is_openai else 50)
        answer = (await batching.cancel(client, batch)).json()
        await asyncio.sleep(29)
        again = await batching.cancel(client, batch)
        before = batching.status(await batching.poll(client, batch))
        await asyncio.sleep(1)
        after = batching.status(await batching.poll(client, batch))
        late = await batching.cancel(client, batch)
        counted = Counter((await batching.outcomes(client, batch)).values())
        found = await statistics(client)
    words = ("cancelling", "cancelled") if batching.is_openai else ("canceling", "ended")
    assert (batching.status(answer), before, after) == (words[0], words[0], words[1])
    assert (again.status_code, late.status_code) == (200, 409 if batching.is_openai else 400)
    assert counted == {"succeeded": 50, "canceled": 52}
    assert (found["answered"], found["batches"]["cancelled"], found["batches"]["expired"]) == (50, 52, 0)


async def test_looking_together(connect: Connect, batching: Batching) -> None:
    """However many look at a batch at once, and cancel it meanwhile, each request has one end and is paid once."""
    async with connect(batch_seconds=100) as client:
        batch = await batching.made(client, batching.requests(*map(str, range(3_000)), "[[status:400]]", "[[stuck]]"))
        await asyncio.sleep(60)
        polls = [batching.poll(client, batch) for _ in range(5)]
        await asyncio.gather(*polls, batching.cancel(client, batch), statistics(client), statistics(client))
        await asyncio.sleep(1)
        await asyncio.gather(batching.poll(client, batch), statistics(client))
        found = await statistics(client)
        outcomes = Counter((await batching.outcomes(client, batch)).values())
    counts = found["batches"]
    assert sum(counts[name] for name in ("answered", "errored", "expired", "cancelled")) == counts["requests"] == 3_002
    assert (outcomes["succeeded"], outcomes["canceled"]) == (counts["answered"], counts["cancelled"])
    assert (found["answered"], found["duplicates_paid"]) == (counts["answered"], 0)


async def test_a_window_shorter_than_validation(connect: Connect, batching: Batching) -> None:
    """A batch may expire before any of its requests is answered."""
    async with connect(batch_seconds=100, batch_window=0.5) as client:
        batch = await batching.made(client, batching.requests("one", "two"))
        await asyncio.sleep(0.5)
        status = batching.status(await batching.poll(client, batch))
        outcomes = await batching.outcomes(client, batch)
    assert status == ("expired" if batching.is_openai else "ended")
    assert outcomes == {"r0": "expired", "r1": "expired"}


async def test_cancel_at_once(connect: Connect, batching: Batching) -> None:
    """A batch that is cancelled at once was being cancelled in the answer, and has nothing but cancelled requests."""
    async with connect() as client:
        batch = await batching.made(client, batching.requests("one", "two"))
        answer = (await batching.cancel(client, batch)).json()
        await asyncio.sleep(0)
        outcomes = await batching.outcomes(client, batch)
    assert batching.status(answer) in ("cancelling", "canceling")
    assert outcomes == {"r0": "canceled", "r1": "canceled"}


async def test_results_missing_and_twice(connect: Connect, batching: Batching) -> None:
    """`[[missing]]` is answered and billed but has no result; `[[twice]]` has its result twice."""
    async with connect() as client:
        batch = await batching.made(client, batching.requests("one", "[[missing]]", "[[twice]]"))
        await asyncio.sleep(1)
        results = await batching.results(client, batch)
        found = await statistics(client)
    assert Counter(result["custom_id"] for result in results) == {"r0": 1, "r2": 2}
    first, second = [result for result in results if result["custom_id"] == "r2"]
    assert first == second
    assert found["answered"] == 3


async def test_marks_of_the_user_only(connect: Connect, batching: Batching) -> None:
    """Marks count in the user's text only."""
    text = "Say [[missing]] or [[stuck]]"
    body = batching.wire.body("one", system=None if batching.is_openai else text)
    if batching.is_openai:
        body["messages"].insert(0, {"role": "system", "content": text})
    async with connect() as client:
        batch = await batching.made(client, [("r0", body)])
        await asyncio.sleep(1)
        assert await batching.outcomes(client, batch) == {"r0": "succeeded"}


async def test_unknown_results(connect: Connect, batching: Batching) -> None:
    """With `batch_unknown_results` there is one result that was not requested and is not billed."""
    async with connect(batch_unknown_results=True) as client:
        batch = await batching.made(client, batching.requests("one", "two"))
        await asyncio.sleep(1)
        outcomes = await batching.outcomes(client, batch)
        found = await statistics(client)
    assert outcomes == {"r0": "succeeded", "r1": "succeeded", "nobody-sent-this": "succeeded"}
    assert found["answered"] == 2


async def test_another_key_sees_nothing(connect: Connect, batching: Batching) -> None:
    """To another key a batch and its results do not exist."""
    other: dict[str, Any] = {"authorization": "Bearer other"} if batching.is_openai else {"x-api-key": "other"}
    async with connect() as client:
        batch = await batching.made(client, batching.requests("one"))
        await asyncio.sleep(1)
        (path,) = batching.result_paths(await batching.poll(client, batch))
        paths = [f"{batching.path}/{batch['id']}", path.removeprefix("http://simulator")]
        found = [(await batching.get(client, each, **other)).status_code for each in paths]
        headers = {**batching.wire.headers, **other}
        cancelled = await client.post(f"{paths[0]}/cancel", headers=headers)
        listed = (await batching.get(client, batching.path, **other)).json()
    assert (found, cancelled.status_code, listed["data"]) == ([404, 404], 404, [])


async def test_unknown_key(connect: Connect, batching: Batching) -> None:
    """A wrong key is refused as elsewhere."""
    async with connect(keys=frozenset({"right"})) as client:
        response = await batching.get(client, batching.path)
        found = await statistics(client)
    assert (response.status_code, found["batches"]["calls"]["list"]) == (401, 0)


async def test_with_prefix(connect: Connect, batching: Batching) -> None:
    """Batches are also found under the provider's prefix, and Anthropic's results then are too."""
    async with connect() as client:
        batch = await batching.made(client, batching.requests("one"))
        await asyncio.sleep(1)
        response = await batching.get(client, f"/{batching.wire.name}{batching.path}/{batch['id']}")
    polled = response.json()
    assert polled["id"] == batch["id"]
    if not batching.is_openai:
        assert polled["results_url"] == f"http://simulator/anthropic{batching.path}/{batch['id']}/results"


async def test_pages(connect: Connect, batching: Batching) -> None:
    """Batches are listed newest first, page by page."""
    after = "after" if batching.is_openai else "after_id"
    async with connect() as client:
        ids = [(await batching.made(client, batching.requests("one")))["id"] for _ in range(5)][::-1]
        first = (await batching.get(client, f"{batching.path}?limit=2")).json()
        second = (await batching.get(client, f"{batching.path}?limit=2&{after}={first['last_id']}")).json()
        third = (await batching.get(client, f"{batching.path}?limit=2&{after}={second['last_id']}")).json()
        whole = (await batching.get(client, batching.path)).json()
    pages = [[batch["id"] for batch in page["data"]] for page in (first, second, third, whole)]
    assert pages == [ids[:2], ids[2:4], ids[4:], ids]
    assert [page["has_more"] for page in (first, second, third, whole)] == [True, True, False, False]
    assert (first["first_id"], first["last_id"]) == (ids[0], ids[1])


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x"])
async def test_pages_out_of_bounds(connect: Connect, batching: Batching, query: str) -> None:
    """A limit that the provider does not allow is refused."""
    async with connect() as client:
        response = await batching.get(client, f"{batching.path}?{query}")
    assert response.status_code == 400


async def test_many_requests(connect: Connect, batching: Batching) -> None:
    """Large batches work, and while one is brought up to date the event loop is free for others."""
    requests = batching.requests(*map(str, range(10_000)))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with connect() as client:
        batches = [await batching.made(client, requests) for _ in range(3)]
        await asyncio.sleep(1)
        beside = asyncio.create_task(others())
        found = await statistics(client)
        beside.cancel()
        results = await batching.results(client, batches[0])
    assert (found["answered"], found["unique_paid"]) == (30_000, 10_000)
    assert turns > 30_000 / 256
    assert len({result["custom_id"] for result in results}) == 10_000
