"""The ground truth that a run is compared with."""

import asyncio

import orjson
import pytest

from pipeline.simulator import answer_token

from .conftest import Connect, Wire


async def test_counts(connect: Connect, anthropic_wire: Wire) -> None:
    """Statistics tell received, answered and refused requests, and the tokens of those answered."""
    wire = anthropic_wire
    async with connect(rpm=3, burst=3) as client:
        responses = [await wire.post(client, wire.body(text)) for text in ("one", "two", "two", "three")]
        await wire.post(client, wire.body(model="unknown"))
        found = (await client.get("/simulator/statistics")).json()
    usages = [response.json()["usage"] for response in responses[:3]]
    assert (found["received"], found["answered"], found["rejected"]) == (5, 3, 1)
    assert found["by_status"] == {"200": 3, "429": 1, "404": 1}
    assert (found["unique_paid"], found["duplicates_paid"]) == (2, 1)
    assert found["by_model"]["claude-haiku-4-5"] == {
        "requests": 3,
        "input_tokens": sum(usage["input_tokens"] for usage in usages),
        "output_tokens": sum(usage["output_tokens"] for usage in usages),
        "cache_read_tokens": 0,
        "cache_write_tokens": 0,
        "reasoning_tokens": 0,
    }


@pytest.mark.looptime
async def test_in_flight(connect: Connect, wire: Wire) -> None:
    """`max_in_flight` is the largest number of requests that were open at once."""
    async with connect(latency=1.0) as client:
        await asyncio.gather(*(wire.post(client, wire.body(str(index))) for index in range(7)))
        await wire.post(client, wire.body())
        found = (await client.get("/simulator/statistics")).json()
    assert (found["in_flight"], found["max_in_flight"]) == (0, 7)


@pytest.mark.looptime
async def test_abandoned_requests_are_not_in_flight(connect: Connect, wire: Wire) -> None:
    """A request whose client went away is over, and not answered."""
    async with connect(latency=60.0) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await wire.post(client, wire.body())
        found = (await client.get("/simulator/statistics")).json()
    assert (found["received"], found["in_flight"], found["answered"]) == (1, 0, 0)


async def test_journal(connect: Connect, wire: Wire) -> None:
    """The journal has one line for each answered request, without its key."""
    body = wire.body()
    async with connect(journal=True) as client:
        await wire.post(client, body)
        await wire.post(client, {})
        text = (await client.get("/simulator/journal")).content
    (entry,) = [orjson.loads(line) for line in text.splitlines()]
    assert (entry["model"], entry["answer_token"]) == (wire.fields["model"], answer_token(body))
    assert entry["usage"]["input_tokens"] > 0


async def test_no_journal(connect: Connect, wire: Wire) -> None:
    """Nothing is kept unless asked for."""
    async with connect() as client:
        await wire.post(client, wire.body())
        assert (await client.get("/simulator/journal")).content == b""
