"""Faults of the operations on batches: what is done, what is answered, and that they end."""

import asyncio
import contextlib
import time
from typing import Any

import httpx
import pytest

from pipeline.simulator import Options, serving
from pipeline.simulator.faults import BATCH_KINDS, OPERATIONS

from .batching import ENDPOINT, Batching, jsonl, line, statistics
from .conftest import Connect


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("kind", "status", "is_done"),
    [
        pytest.param("ok", 200, True, id="ok"),
        pytest.param("lost", None, True, id="lost"),
        pytest.param("reset", None, False, id="reset"),
        pytest.param("500", 500, False, id="500"),
        pytest.param("500-done", 500, True, id="500-done"),
        pytest.param("429", 429, False, id="429"),
        pytest.param("hang", None, True, id="hang"),
    ],
)
async def test_create(
    connect: Connect, batching: Batching, kind: str, status: int | None, is_done: bool, creeping_clock: None
) -> None:
    """Each kind answers as it says, and has begun a batch or not; the next call is well."""
    async with connect(batch_faults={"create": [kind]}) as client:
        if status is None:
            with pytest.raises(ConnectionResetError):
                await batching.create(client, batching.requests("one"))
        else:
            response = await batching.create(client, batching.requests("one"))
            assert response.status_code == status
            assert response.headers.get("retry-after") == ("1" if status == 429 else None)
        listed = (await batching.get(client, batching.path)).json()["data"]
        second = await batching.create(client, batching.requests("two"))
        found = await statistics(client)
    assert len(listed) == int(is_done)
    assert second.status_code == 200
    assert (found["batches"]["created"], found["batches"]["calls"]["create"]) == (int(is_done) + 1, 2)


@pytest.mark.looptime
async def test_hang(connect: Connect, batching: Batching, creeping_clock: None) -> None:
    """A call that hangs has done its work and waits until its client goes away."""
    loop = asyncio.get_running_loop()
    async with connect(batch_faults={"cancel": ["hang"]}, batch_seconds=1_000) as client:
        batch = await batching.made(client, batching.requests("one"))
        start = loop.time()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await batching.cancel(client, batch)
        outcomes = await batching.outcomes(client, batch)
    assert loop.time() - start == pytest.approx(30, abs=0.1)
    assert outcomes == {"r0": "canceled"}


@pytest.mark.looptime
async def test_in_order(connect: Connect, batching: Batching, creeping_clock: None) -> None:
    """The calls of an operation meet its faults in order, then none; other operations do not."""
    async with connect(batch_faults={"poll": ["500", "ok", "429"], "list": ["500-done"]}) as client:
        batch = await batching.made(client, batching.requests("one"))
        path = f"{batching.path}/{batch['id']}"
        polls = [(await batching.get(client, path)).status_code for _ in range(5)]
        lists = [(await batching.get(client, batching.path)).status_code for _ in range(2)]
    assert polls == [500, 200, 429, 200, 200]
    assert lists == [500, 200]


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("kind", "uploads"), [("lost", 1), ("500-done", 1), ("hang", 1), ("reset", 0), ("500", 0), ("429", 0)]
)
async def test_upload(
    connect: Connect, openai_batching: Batching, kind: str, uploads: int, creeping_clock: None
) -> None:
    """A file whose upload failed may be there nevertheless, and then is listed."""
    async with connect(batch_faults={"upload": [kind]}) as client:
        try:
            response = await openai_batching.upload(client, b"x")
        except ConnectionResetError:
            response = None
        listed = (await openai_batching.get(client, "/v1/files")).json()["data"]
        found = await statistics(client)
    assert response is None or response.status_code in (429, 500)
    assert len(listed) == found["batches"]["uploads"] == uploads


@pytest.mark.looptime
@pytest.mark.parametrize("kind", ["lost", "500-done", "reset", "500", "429"])
async def test_cancel(connect: Connect, batching: Batching, kind: str, creeping_clock: None) -> None:
    """A cancellation whose answer was lost is going on."""
    async with connect(batch_faults={"cancel": [kind]}, batch_seconds=100) as client:
        batch = await batching.made(client, batching.requests("one"))
        with contextlib.suppress(ConnectionResetError):
            await batching.cancel(client, batch)
        await asyncio.sleep(0)
        status = batching.status(await batching.poll(client, batch))
    over = "cancelled" if batching.is_openai else "ended"
    waiting = "validating" if batching.is_openai else "in_progress"
    assert status == (over if kind in ("lost", "500-done") else waiting)


@pytest.mark.looptime
async def test_refused_before_faults(connect: Connect, batching: Batching, creeping_clock: None) -> None:
    """A call without a key meets no fault and uses none up."""
    async with connect(batch_faults={"list": ["500"]}) as client:
        found = [
            (await client.get(batching.path, headers=headers)).status_code
            for headers in ({"anthropic-version": "2023-06-01"}, batching.wire.headers)
        ]
    assert found == [401, 500]


def ended(batching: Batching, url: str) -> str:
    """Make a batch of a hundred requests that is over at once, and return where its results are."""
    requests = batching.requests(*map(str, range(100)))
    headers = batching.wire.headers
    if batching.is_openai:
        files = {"file": jsonl(line(*request) for request in requests)}
        sent = httpx.post(url + "/v1/files", files=files, data={"purpose": "batch"}, headers=headers).json()
        body: dict[str, Any] = {"input_file_id": sent["id"], "endpoint": ENDPOINT, "completion_window": "24h"}
    else:
        body = {"requests": [{"custom_id": custom_id, "params": params} for custom_id, params in requests]}
    batch = httpx.post(url + batching.path, json=body, headers=headers).json()
    while batching.status(batch) not in ("completed", "ended"):
        time.sleep(0.01)
        batch = httpx.get(f"{url}{batching.path}/{batch['id']}", headers=headers).json()
    return batching.result_paths(batch)[0].removeprefix(url)


def receive(response: httpx.Response, received: bytearray) -> None:
    """Take all that comes, up to an error."""
    for part in response.iter_raw():
        received += part


@pytest.mark.parametrize(("kind", "share"), [("cut:0", 0.0), ("cut:0.3", 0.3), ("cut:0.99", 0.99)])
def test_cut_on_the_wire(batching: Batching, kind: str, share: float) -> None:
    """Results that are cut promise all their bytes, bring the share asked for, and then the connection closes."""
    received = bytearray()
    with serving(Options(batch_faults={"results": [kind]}, batch_seconds=0)) as server:
        path = ended(batching, server.url)
        with httpx.stream("GET", server.url + path, headers=batching.wire.headers) as response:
            size = int(response.headers["content-length"])
            with pytest.raises(httpx.RemoteProtocolError, match="without sending complete"):
                receive(response, received)
        whole = httpx.get(server.url + path, headers=batching.wire.headers).content
    assert len(whole) == size
    assert received == whole[: int(size * share)]


def test_cut_then_the_rest(openai_batching: Batching) -> None:
    """What is missing of a file that was cut can be had with a range, which may be cut, too."""
    received = bytearray()
    with serving(Options(batch_faults={"results": ["cut:0.5", "cut:0.5"]}, batch_seconds=0)) as server:
        path = ended(openai_batching, server.url)
        for _ in range(3):
            headers = {**openai_batching.wire.headers, "range": f"bytes={len(received)}-"}
            try:
                with httpx.stream("GET", server.url + path, headers=headers) as response:
                    receive(response, received)
            except httpx.RemoteProtocolError:
                continue
        whole = httpx.get(server.url + path, headers=openai_batching.wire.headers).content
    assert received == whole


@pytest.mark.parametrize("kind", ["lost", "reset"])
def test_reset_on_the_wire(batching: Batching, kind: str) -> None:
    """A connection that is reset brings no byte of an answer."""
    with (
        serving(Options(batch_faults={"list": [kind]})) as server,
        pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)),
    ):
        httpx.get(server.url + batching.path, headers=batching.wire.headers)


def test_hang_on_the_wire(batching: Batching) -> None:
    """A client with a timeout gives up on a call that hangs."""
    with serving(Options(batch_faults={"list": ["hang"]})) as server, pytest.raises(httpx.ReadTimeout):
        httpx.get(server.url + batching.path, headers=batching.wire.headers, timeout=0.1)


def test_statistics_from_another_thread(batching: Batching) -> None:
    """The server's own statistics are up to date even if the batch was not polled since, even after its end."""
    with serving(Options(batch_seconds=0)) as server:
        before = server.statistics()["batches"]["answered"]
        ended(batching, server.url)
        after = server.statistics()
    assert (before, after["batches"]["answered"]) == (0, 100)
    assert server.statistics() == after


def test_large_body_refused_on_the_wire(batching: Batching) -> None:
    """A client that sends far too much gets its 413 and not a broken connection."""
    with serving(Options(batch_max_bytes=1_000)) as server:
        path = "/v1/files" if batching.is_openai else batching.path
        found = [
            httpx.post(server.url + path, content=b"x" * size, headers=batching.wire.headers).status_code
            for size in (100_000, 20_000_000)
        ]
    assert found == [413, 413]


def test_known() -> None:
    """Every operation can meet every kind of fault; only results can be cut."""
    for operation in OPERATIONS:
        Options(batch_faults={operation: [kind for kind in BATCH_KINDS if kind != "cut"]})
    Options(batch_faults={"results": ["cut:0.3"]})
