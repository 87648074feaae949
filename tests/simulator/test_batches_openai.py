"""OpenAI's batches and files: what only they have."""

import asyncio
from typing import Any

import orjson
import pytest

from tests.virtual import virtual_time

from .batching import Batching, jsonl, line, statistics
from .conftest import Connect

pytestmark = virtual_time

TIMES = (
    *("created_at", "in_progress_at", "finalizing_at", "completed_at", "expires_at", "expired_at"),
    *("cancelling_at", "cancelled_at", "failed_at"),
)


def times(batch: dict[str, Any]) -> dict[str, int]:
    """Return when a batch came where it is, in seconds from its creation."""
    start = batch["created_at"]
    return {name: batch[name] - start for name in TIMES if batch[name] is not None and name != "created_at"}


async def test_the_way_of_a_batch(connect: Connect, openai_batching: Batching) -> None:
    """A batch is validated, in progress, finalized and completed, and tells when."""
    async with connect(batch_seconds=1_000) as client:
        seen = [await openai_batching.made(client, openai_batching.requests(*map(str, range(10))))]
        for wait in (99, 1, 849, 1, 50):
            await asyncio.sleep(wait)
            seen.append(await openai_batching.poll(client, seen[0]))
    statuses = ["validating", "validating", "in_progress", "in_progress", "finalizing", "completed"]
    counts = [(batch["request_counts"]["total"], batch["request_counts"]["completed"]) for batch in seen]
    assert [batch["status"] for batch in seen] == statuses
    assert counts == [(0, 0), (0, 0), (10, 0), (10, 9), (10, 10), (10, 10)]
    expected = {"in_progress_at": 100, "finalizing_at": 950, "completed_at": 1_000, "expires_at": 86_400}
    assert times(seen[-1]) == pytest.approx(expected, abs=1)
    assert times(seen[0]) == {"expires_at": 86_400}


async def test_usage(connect: Connect, openai_batching: Batching) -> None:
    """A batch tells the tokens of all its answers, and its one model."""
    requests = [
        (custom_id, {**body, "model": "gpt-5"}) for custom_id, body in openai_batching.requests("one", "x" * 9_000)
    ]
    for _, body in requests:
        del body["max_tokens"]
    async with connect(cache_ratio=1.0) as client:
        batch = await openai_batching.made(client, requests)
        await asyncio.sleep(1)
        batch = await openai_batching.poll(client, batch)
        usages = [openai_batching.message(each)["usage"] for each in await openai_batching.results(client, batch)]
    taken, given = (sum(usage[name] for usage in usages) for name in ("prompt_tokens", "completion_tokens"))
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    reasoning = sum(usage["completion_tokens_details"]["reasoning_tokens"] for usage in usages)
    assert batch["model"] == "gpt-5"
    assert cached > 0 < reasoning
    assert batch["usage"] == {
        "input_tokens": taken,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": given,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": taken + given,
    }


async def test_two_files(connect: Connect, openai_batching: Batching) -> None:
    """Answers are in the output file, all else in the error file; a file with no lines is null."""
    cases = {"one": (True, False), "[[status:400]]": (False, True), "[[missing]]": (False, False)}
    found = {}
    async with connect() as client:
        for text in cases:
            batch = await openai_batching.made(client, openai_batching.requests(text))
            await asyncio.sleep(1)
            batch = await openai_batching.poll(client, batch)
            found[text] = (batch["output_file_id"] is not None, batch["error_file_id"] is not None)
            assert batch["status"] == "completed"
    assert found == cases


async def test_empty_file_ids(connect: Connect, openai_batching: Batching) -> None:
    """With `batch_empty_file_ids` a file that is not there has the id ""."""
    async with connect(batch_empty_file_ids=True) as client:
        batch = await openai_batching.made(client, openai_batching.requests("one"))
        await asyncio.sleep(1)
        after = await openai_batching.poll(client, batch)
    assert (batch["output_file_id"], batch["error_file_id"]) == ("", "")
    assert after["output_file_id"] != after["error_file_id"] == ""


async def test_lines_of_errors(connect: Connect, openai_batching: Batching) -> None:
    """The lines of the error file tell a status and body, or a code when there was no response."""
    async with connect() as client:
        batch = await openai_batching.made(client, openai_batching.requests("[[status:404]]", "[[expire]]"))
        await asyncio.sleep(1)
        results = {each["custom_id"]: each for each in await openai_batching.results(client, batch)}
    response = results["r0"]["response"]
    assert (response["status_code"], results["r0"]["error"]) == (404, None)
    assert response["body"]["error"]["type"] == "invalid_request_error"
    assert results["r1"]["response"] is None
    assert results["r1"]["error"]["code"] == "batch_expired"
    assert results["r0"]["id"] != results["r1"]["id"]


async def test_times_of_other_ends(connect: Connect, openai_batching: Batching) -> None:
    """A batch that expired, was cancelled or failed tells when, and not when it was completed."""
    async with connect(batch_seconds=1_000, batch_window=500, batch_cancel_seconds=100) as client:
        expired = await openai_batching.made(client, openai_batching.requests(*map(str, range(9))))
        cancelled = await openai_batching.made(client, openai_batching.requests("one"))
        file = (await openai_batching.upload(client, b"{")).json()
        failed = (await openai_batching.begin(client, file["id"])).json()
        await asyncio.sleep(200)
        await openai_batching.cancel(client, cancelled)
        await asyncio.sleep(300)
        found = [times(await openai_batching.poll(client, batch)) for batch in (expired, cancelled, failed)]
    assert found[0] == pytest.approx({"in_progress_at": 100, "expires_at": 500, "expired_at": 500}, abs=1)
    assert found[1] == pytest.approx(
        {"in_progress_at": 100, "expires_at": 500, "cancelling_at": 200, "cancelled_at": 300}, abs=1
    )
    assert found[2] == pytest.approx({"expires_at": 500, "failed_at": 100}, abs=1)


BODY: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("raw", "code", "at"),
    [
        pytest.param(b"", "empty_file", None, id="empty"),
        pytest.param(b"\n\n", "empty_file", None, id="blank"),
        pytest.param(jsonl([line("a", BODY)]) + b"{", "invalid_json_line", 2, id="not JSON"),
        pytest.param(b"[]\n", "invalid_json_line", 1, id="not an object"),
        pytest.param(jsonl([line(None, BODY)]), "missing_required_parameter", 1, id="no custom_id"),
        pytest.param(jsonl([line(7, BODY)]), "invalid_type", 1, id="custom_id not a string"),
        pytest.param(jsonl([line("a", BODY)] * 2), "duplicate_custom_id", 2, id="custom_id twice"),
        pytest.param(jsonl([line("a", BODY, method="GET")]), "invalid_method", 1, id="method"),
        pytest.param(jsonl([line("a", BODY, url="/v2/chat")]), "invalid_url", 1, id="unknown url"),
        pytest.param(jsonl([line("a", BODY, url="/v1/responses")]), "mismatched_endpoint", 1, id="another url"),
        pytest.param(jsonl([line("a", None)]), "missing_required_parameter", 1, id="no body"),
        pytest.param(jsonl([line("a", [])]), "invalid_type", 1, id="body not an object"),
        pytest.param(
            jsonl([line("a", BODY), line("b", {**BODY, "model": "gpt-5"})]), "mismatched_model", 2, id="two models"
        ),
        pytest.param(jsonl([line("a", {**BODY, "model": "gpt-4"})]), "model_not_found", 1, id="model gone"),
    ],
)
async def test_failed_validation(
    connect: Connect, openai_batching: Batching, raw: bytes, code: str, at: int | None
) -> None:
    """A file that is wrong makes the batch fail when it has been validated, with the first thing wrong of each line."""
    async with connect() as client:
        file = (await openai_batching.upload(client, raw)).json()
        batch = (await openai_batching.begin(client, file["id"])).json()
        await asyncio.sleep(0.2)
        after = await openai_batching.poll(client, batch)
        found = await statistics(client)
    (error,) = after["errors"]["data"]
    assert (batch["status"], batch["errors"], after["status"]) == ("validating", None, "failed")
    assert (error["code"], error["line"]) == (code, at)
    assert set(error) == {"code", "line", "message", "param"}
    assert (after["output_file_id"], after["error_file_id"], after["request_counts"]["total"]) == (None, None, 0)
    assert (found["batches"]["created"], found["batches"]["requests"]) == (1, 0)


async def test_bodies_are_not_validated(connect: Connect, openai_batching: Batching) -> None:
    """What is wrong in a body is found when it is processed: in the error file with status 400."""
    requests = [("a", BODY), ("b", {**BODY, "messages": []}), ("c", {"messages": []}), ("d", {**BODY, "stream": True})]
    async with connect() as client:
        batch = await openai_batching.made(client, requests)
        await asyncio.sleep(1)
        results = await openai_batching.results(client, batch)
    statuses = {each["custom_id"]: each["response"]["status_code"] for each in results}
    assert statuses == {"a": 200, "b": 400, "c": 400, "d": 400}


async def test_too_many_requests(connect: Connect, openai_batching: Batching) -> None:
    """A file of more lines than allowed fails as a whole."""
    async with connect(batch_max_requests=2) as client:
        fits = await openai_batching.made(client, openai_batching.requests("one", "two"))
        does_not = await openai_batching.made(client, openai_batching.requests("one", "two", "three"))
        await asyncio.sleep(1)
        after = [await openai_batching.poll(client, batch) for batch in (fits, does_not)]
    assert [batch["status"] for batch in after] == ["completed", "failed"]
    assert after[1]["errors"]["data"][0]["code"] == "too_many_tasks"


async def test_too_many_bytes(connect: Connect, openai_batching: Batching) -> None:
    """A file larger than allowed is refused with 413, whether its size was known before or not."""
    async with connect(batch_max_bytes=1_000) as client:
        sizes = (1_000, 1_001, 200_000)
        found = [(await openai_batching.upload(client, b"x" * size)).status_code for size in sizes]
    assert found == [200, 413, 413]


async def test_enqueued_tokens(connect: Connect, openai_batching: Batching) -> None:
    """Unfinished batches of a key and model share a limit of input tokens; one that goes beyond it fails."""
    requests = openai_batching.requests("x" * 400)  # 107 tokens
    other = openai_batching.requests("x" * 400, model="gpt-4.1")
    async with connect(batch_enqueued_tokens=214, batch_seconds=10) as client:
        batches = [await openai_batching.made(client, requests) for _ in range(3)]
        batches.append(await openai_batching.made(client, other))
        await asyncio.sleep(10)
        batches.append(await openai_batching.made(client, requests))
        await asyncio.sleep(10)
        after = [await openai_batching.poll(client, batch) for batch in batches]
    assert [batch["status"] for batch in after] == ["completed", "completed", "failed", "completed", "completed"]
    (error,) = after[2]["errors"]["data"]
    assert (error["code"], error["line"]) == ("token_limit_exceeded", None)
    assert error["message"] == (
        "Enqueued token limit reached for gpt-4o in organization org-simulator. Limit: 214 enqueued tokens. "
        "Please try again once some in_progress batches have been completed."
    )


async def test_metadata(connect: Connect, openai_batching: Batching) -> None:
    """Metadata come back as they were given."""
    metadata = {"run": "42", "x" * 64: "y" * 512}
    async with connect() as client:
        batch = (await openai_batching.create(client, openai_batching.requests("one"), metadata=metadata)).json()
        (listed,) = (await openai_batching.get(client, "/v1/batches")).json()["data"]
    assert batch["metadata"] == listed["metadata"] == metadata


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        pytest.param({"input_file_id": "file-0"}, 404, id="unknown file"),
        pytest.param({"input_file_id": None}, 400, id="no file"),
        pytest.param({"endpoint": "/v1/embeddings"}, 400, id="endpoint of another kind"),
        pytest.param({"endpoint": "/v1/nonsense"}, 400, id="unknown endpoint"),
        pytest.param({"completion_window": "1h"}, 400, id="window"),
        pytest.param({"metadata": {str(number): "" for number in range(17)}}, 400, id="17 pairs of metadata"),
        pytest.param({"metadata": {"x" * 65: ""}}, 400, id="long key of metadata"),
        pytest.param({"metadata": {"x": "y" * 513}}, 400, id="long value of metadata"),
        pytest.param({"metadata": {"x": 1}}, 400, id="number in metadata"),
        pytest.param({"metadata": []}, 400, id="metadata a list"),
    ],
)
async def test_batch_refused(connect: Connect, openai_batching: Batching, fields: Any, status: int) -> None:
    """A batch that cannot be begun is refused at once."""
    async with connect() as client:
        response = await openai_batching.create(client, openai_batching.requests("one"), **fields)
        found = await statistics(client)
    assert (response.status_code, found["batches"]["created"]) == (status, 0)
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_files(connect: Connect, openai_batching: Batching) -> None:
    """A file can be described, read, listed and deleted; outputs too, and no file of another key."""
    async with connect() as client:
        batch = await openai_batching.made(client, openai_batching.requests("one"))
        await asyncio.sleep(1)
        output = (await openai_batching.poll(client, batch))["output_file_id"]
        listed = (await openai_batching.get(client, "/v1/files")).json()["data"]
        purposes = (await openai_batching.get(client, "/v1/files?purpose=batch")).json()["data"]
        content = await openai_batching.get(client, f"/v1/files/{batch['input_file_id']}/content")
        described = (await openai_batching.get(client, f"/v1/files/{output}")).json()
        size = len((await openai_batching.get(client, f"/v1/files/{output}/content")).content)
        others = {"authorization": "Bearer other"}
        foreign = (await openai_batching.get(client, f"/v1/files/{batch['input_file_id']}", **others)).status_code
        for file in (output, batch["input_file_id"]):
            deleted = await client.delete(f"/v1/files/{file}", headers=openai_batching.wire.headers)
            assert deleted.json() == {"id": file, "object": "file", "deleted": True}
        gone = [(await openai_batching.get(client, f"/v1/files/{file['id']}")).status_code for file in listed]
        none = (await openai_batching.get(client, "/v1/files")).json()["data"]
    assert [file["id"] for file in listed] == [output, batch["input_file_id"]]
    assert [file["id"] for file in purposes] == [batch["input_file_id"]]
    assert content.content == jsonl([line(*request) for request in openai_batching.requests("one")])
    assert (described["bytes"], described["purpose"]) == (size, "batch_output")
    assert (foreign, gone, none) == (404, [404, 404], [])


async def test_upload_refused(connect: Connect, openai_batching: Batching) -> None:
    """An upload for another purpose, without a file, or not as a form is refused."""
    headers = openai_batching.wire.headers
    async with connect() as client:
        responses = [
            await openai_batching.upload(client, b"x", purpose="assistants"),
            await client.post("/v1/files", data={"purpose": "batch"}, headers=headers),
            await client.post("/v1/files", files={"other": b"x"}, data={"purpose": "batch"}, headers=headers),
            await client.post("/v1/files", content=b"x", headers=headers),
            await client.post("/v1/files", content=b"x", headers={**headers, "content-type": "multipart/form-data"}),
        ]
    assert [response.status_code for response in responses] == [400] * 5


@pytest.mark.parametrize("name", ["input_file_id", "output_file_id"])
async def test_range(connect: Connect, openai_batching: Batching, name: str) -> None:
    """`Range: bytes=N-` gives the rest of a file, wherever N is."""
    async with connect() as client:
        batch = await openai_batching.made(client, openai_batching.requests(*map(str, range(400))))
        await asyncio.sleep(1)
        batch = await openai_batching.poll(client, batch)
        path = f"/v1/files/{batch[name]}/content"
        whole = (await openai_batching.get(client, path)).content
        starts = (0, 1, 700, len(whole) // 2, len(whole) - 1)
        rests = [await openai_batching.get(client, path, range=f"bytes={start}-") for start in starts]
        beyond = await openai_batching.get(client, path, range=f"bytes={len(whole)}-")
        odd = await openai_batching.get(client, path, range="lines=1-")
    assert [rest.content for rest in rests] == [whole[start:] for start in starts]
    assert {rest.status_code for rest in rests} == {206}
    assert rests[2].headers["content-range"] == f"bytes 700-{len(whole) - 1}/{len(whole)}"
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(whole)}")
    assert (odd.status_code, odd.content) == (200, whole)


async def test_pages_after_unknown(connect: Connect, openai_batching: Batching) -> None:
    """A page after a batch that does not exist is refused."""
    async with connect() as client:
        response = await openai_batching.get(client, "/v1/batches?after=batch_0")
    assert response.status_code == 404
    assert orjson.loads(response.content)["error"]["param"] == "after"
