"""Anthropic's batches: what only they have."""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.virtual import virtual_time

from .batching import Batching, statistics
from .conftest import Connect

pytestmark = virtual_time


async def test_the_way_of_a_batch(connect: Connect, anthropic_batching: Batching) -> None:
    """All counts but `processing` stay 0 until the whole batch has ended; then there are results."""
    texts = ("one", "two", "[[status:500]]", "[[expire]]")
    async with connect(batch_seconds=100) as client:
        batch = await anthropic_batching.made(client, anthropic_batching.requests(*texts))
        await asyncio.sleep(99)
        before = await anthropic_batching.poll(client, batch)
        early = await anthropic_batching.get(client, f"/v1/messages/batches/{batch['id']}/results")
        await asyncio.sleep(1)
        after = await anthropic_batching.poll(client, batch)
    nothing = {"succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    assert before == batch
    assert (batch["processing_status"], batch["request_counts"]) == ("in_progress", {"processing": 4, **nothing})
    assert (batch["ended_at"], batch["results_url"], early.status_code) == (None, None, 400)
    assert after["processing_status"] == "ended"
    assert after["request_counts"] == {"processing": 0, "succeeded": 2, "errored": 1, "canceled": 0, "expired": 1}
    assert after["results_url"] == f"http://simulator/v1/messages/batches/{batch['id']}/results"
    created, expires, ended = (datetime.fromisoformat(after[name]) for name in ("created_at", "expires_at", "ended_at"))
    assert (expires - created, ended - created) == (timedelta(days=1), timedelta(seconds=100))


async def test_canceled(connect: Connect, anthropic_batching: Batching) -> None:
    """A batch tells when it was canceled, and counts what was."""
    async with connect(batch_seconds=100, batch_cancel_seconds=5) as client:
        batch = await anthropic_batching.made(client, anthropic_batching.requests("one", "two"))
        await asyncio.sleep(60)
        canceling = (await anthropic_batching.cancel(client, batch)).json()
        await asyncio.sleep(5)
        after = await anthropic_batching.poll(client, batch)
    assert canceling["request_counts"]["processing"] == 2
    assert canceling["cancel_initiated_at"] == after["cancel_initiated_at"]
    assert (after["request_counts"]["succeeded"], after["request_counts"]["canceled"]) == (1, 1)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        pytest.param({"stream": True}, "invalid_request_error", id="stream"),
        pytest.param({"speed": "fast"}, "invalid_request_error", id="speed"),
        pytest.param({"max_tokens": 0}, "invalid_request_error", id="no tokens"),
        pytest.param({"model": "claude-2.1"}, "not_found_error", id="model gone"),
        pytest.param({"messages": []}, "invalid_request_error", id="no messages"),
    ],
)
async def test_errored_params(connect: Connect, anthropic_batching: Batching, fields: Any, kind: str) -> None:
    """Params that are wrong, or only for live requests, show as an error within an error."""
    async with connect() as client:
        batch = await anthropic_batching.made(client, anthropic_batching.requests("one", **fields))
        await asyncio.sleep(1)
        (result,) = await anthropic_batching.results(client, batch)
    outer = result["result"]["error"]
    assert (result["result"]["type"], outer["type"], outer["request_id"]) == ("errored", "error", None)
    assert outer["error"]["type"] == kind


PARAMS = {"model": "claude-haiku-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(None, id="none"),
        pytest.param({}, id="not a list"),
        pytest.param([], id="empty"),
        pytest.param(["x"], id="not an object"),
        pytest.param([{"params": PARAMS}], id="no custom_id"),
        pytest.param([{"custom_id": "a.b", "params": PARAMS}], id="custom_id with a dot"),
        pytest.param([{"custom_id": "", "params": PARAMS}], id="custom_id empty"),
        pytest.param([{"custom_id": "a\n", "params": PARAMS}], id="custom_id with a line's end"),
        pytest.param([{"custom_id": "a" * 65, "params": PARAMS}], id="custom_id too long"),
        pytest.param([{"custom_id": "a", "params": PARAMS}] * 2, id="custom_id twice"),
        pytest.param([{"custom_id": "a"}], id="no params"),
        pytest.param([{"custom_id": str(number), "params": PARAMS} for number in range(4)], id="too many"),
    ],
)
async def test_batch_refused(connect: Connect, anthropic_batching: Batching, requests: Any) -> None:
    """A batch that is not well formed is refused at once."""
    async with connect(batch_max_requests=3) as client:
        response = await anthropic_batching.post(client, "", {"requests": requests})
        found = await statistics(client)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    assert found["batches"]["created"] == 0


async def test_too_many_bytes(connect: Connect, anthropic_batching: Batching) -> None:
    """A batch larger than allowed is refused with 413."""
    async with connect(batch_max_bytes=1_000) as client:
        response = await anthropic_batching.create(client, anthropic_batching.requests("x" * 1_000))
    assert (response.status_code, response.json()["error"]["type"]) == (413, "request_too_large")


async def test_not_json(connect: Connect, anthropic_batching: Batching) -> None:
    """A body that is not JSON, or a request without a version, is refused."""
    headers = anthropic_batching.wire.headers
    async with connect() as client:
        unreadable = await client.post("/v1/messages/batches", content=b"{", headers=headers)
        unversioned = await client.get("/v1/messages/batches", headers={"x-api-key": "key"})
    assert [unreadable.status_code, unversioned.status_code] == [400, 400]


async def test_delete(connect: Connect, anthropic_batching: Batching) -> None:
    """A batch can be deleted once it has ended, and was billed nevertheless."""
    async with connect() as client:
        batch = await anthropic_batching.made(client, anthropic_batching.requests("one"))
        path = f"/v1/messages/batches/{batch['id']}"
        early = await client.delete(path, headers=anthropic_batching.wire.headers)
        await asyncio.sleep(1)
        deleted = await client.delete(path, headers=anthropic_batching.wire.headers)
        gone = await anthropic_batching.get(client, f"{path}/results")
        found = await statistics(client)
    assert (early.status_code, gone.status_code) == (400, 404)
    assert deleted.json() == {"id": batch["id"], "type": "message_batch_deleted"}
    assert found["answered"] == 1


async def test_pages_before(connect: Connect, anthropic_batching: Batching) -> None:
    """A page before a batch has the next newer ones, newest first."""
    path = "/v1/messages/batches"
    async with connect() as client:
        requests = anthropic_batching.requests("one")
        ids = [(await anthropic_batching.made(client, requests))["id"] for _ in range(5)][::-1]
        page = (await anthropic_batching.get(client, f"{path}?limit=2&before_id={ids[3]}")).json()
        rest = (await anthropic_batching.get(client, f"{path}?limit=2&before_id={ids[1]}")).json()
        both = await anthropic_batching.get(client, f"{path}?before_id={ids[1]}&after_id={ids[1]}")
        unknown = await anthropic_batching.get(client, f"{path}?after_id=msgbatch_0")
    assert ([batch["id"] for batch in page["data"]], page["has_more"]) == (ids[1:3], True)
    assert ([batch["id"] for batch in rest["data"]], rest["has_more"]) == (ids[:1], False)
    assert (both.status_code, unknown.status_code) == (400, 400)


async def test_range_is_ignored(connect: Connect, anthropic_batching: Batching) -> None:
    """Results are always sent from their beginning."""
    async with connect() as client:
        batch = await anthropic_batching.made(client, anthropic_batching.requests("one"))
        await asyncio.sleep(1)
        path = f"/v1/messages/batches/{batch['id']}/results"
        whole = await anthropic_batching.get(client, path)
        asked = await anthropic_batching.get(client, path, range="bytes=10-")
    assert (asked.status_code, asked.content) == (200, whole.content)
