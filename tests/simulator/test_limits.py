"""Rate limits under a virtual clock: exact counts, exact waits, true headers."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import httpx
import pytest

from pipeline.simulator.openai.limits import go_duration

from .conftest import Connect, Wire

pytestmark = pytest.mark.looptime


async def flood(client: httpx.AsyncClient, wire: Wire, count: int, **fields: Any) -> list[httpx.Response]:
    """Send so many different requests at once."""
    bodies = (wire.body(f"{index:04}", **fields) for index in range(count))
    return await asyncio.gather(*(wire.post(client, body) for body in bodies))


def statuses(responses: Iterable[httpx.Response]) -> dict[int, int]:
    """Count the responses by status."""
    return dict(Counter(response.status_code for response in responses))


async def test_burst_then_rate(connect: Connect, wire: Wire) -> None:
    """With 300 requests a minute and a burst of 20, 20 pass at once and 5 in each second after."""
    async with connect(rpm=300, burst=20) as client:
        found = [statuses(await flood(client, wire, 30))]
        for _ in range(3):
            await asyncio.sleep(1)
            found.append(statuses(await flood(client, wire, 30)))
    assert found == [{200: 20, 429: 10}] + [{200: 5, 429: 25}] * 3


async def test_whole_minute_at_once(connect: Connect, wire: Wire) -> None:
    """Without a burst the bucket holds a whole minute's worth."""
    async with connect(rpm=60) as client:
        assert statuses(await flood(client, wire, 70)) == {200: 60, 429: 10}


async def test_waiting_as_told(connect: Connect, wire: Wire) -> None:
    """A request sent again after `retry-after` passes, and one second earlier does not."""
    async with connect(rpm=6) as client:
        refused = (await flood(client, wire, 7))[-1]
        wait = int(refused.headers["retry-after"])
        await asyncio.sleep(wait - 1)
        early = await wire.post(client, wire.body())
        await asyncio.sleep(1)
        in_time = await wire.post(client, wire.body())
    assert (wait, early.status_code, in_time.status_code) == (10, 429, 200)


async def test_limits_are_per_key_and_model(connect: Connect, wire: Wire) -> None:
    """Another key and another model have full buckets of their own."""
    header = "x-api-key" if wire.name == "anthropic" else "authorization"
    async with connect(rpm=1) as client:
        found = [
            (await wire.post(client, wire.body())).status_code,
            (await wire.post(client, wire.body())).status_code,
            (await wire.post(client, wire.body(model="another"))).status_code,
            (await wire.post(client, wire.body(), **{header: "Bearer other"})).status_code,
        ]
    assert found == [200, 429, 200, 200]


async def test_retry_storm_still_gets_through(connect: Connect, wire: Wire) -> None:
    """Clients that ignore `retry-after` and knock all the time get the configured rate, not nothing."""
    async with connect(rpm=60, burst=1) as client:
        found: Counter[int] = Counter()
        for _ in range(100):
            found[(await wire.post(client, wire.body())).status_code] += 1
            await asyncio.sleep(0.1)
    assert found[200] == 10


async def test_anthropic_input_is_estimated_then_corrected(connect: Connect, anthropic_wire: Wire) -> None:
    """What is read from the cache is charged at the start and given back with the answer."""
    prompt = "word " * 4_000  # 5,007 tokens, of which 4,480 are read from the cache
    async with connect(input_tpm=10_100, cache_ratio=1.0, latency=1.0) as client:
        at_once = [anthropic_wire.post(client, anthropic_wire.body(prompt, seed=index)) for index in range(3)]
        together = statuses(await asyncio.gather(*at_once))
        one_by_one = [
            (await anthropic_wire.post(client, anthropic_wire.body(prompt, seed=index))).status_code
            for index in range(3)
        ]
    assert together == {200: 2, 429: 1}
    assert one_by_one == [200, 200, 200]


async def test_anthropic_does_not_reserve_max_tokens(connect: Connect, anthropic_wire: Wire) -> None:
    """A huge `max_tokens` costs nothing as long as the answers are short."""
    async with connect(output_tpm=100_000) as client:
        assert statuses(await flood(client, anthropic_wire, 50, max_tokens=64_000)) == {200: 50}


async def test_anthropic_output_is_charged_as_produced(connect: Connect, anthropic_wire: Wire) -> None:
    """One answer may overdraw the output bucket; then all wait until the debt is paid."""
    async with connect(output_tpm=600) as client:
        first = await anthropic_wire.post(client, anthropic_wire.body("[[long]]", max_tokens=900))
        refused = await anthropic_wire.post(client, anthropic_wire.body())
        wait = int(refused.headers["retry-after"])
        await asyncio.sleep(wait)
        after = await anthropic_wire.post(client, anthropic_wire.body())
    assert (first.status_code, refused.status_code, after.status_code) == (200, 429, 200)
    assert wait == 31  # 300 tokens of debt at 10 a second, and one token to begin with
    assert "output tokens per minute" in refused.json()["error"]["message"]


async def test_anthropic_refused_requests_are_free(connect: Connect, anthropic_wire: Wire) -> None:
    """A request refused for its tokens takes nothing from the bucket of requests."""
    async with connect(rpm=3, input_tpm=100) as client:
        for _ in range(5):
            refused = await anthropic_wire.post(client, anthropic_wire.body("x" * 1_000))
            assert refused.status_code == 429
        assert statuses(await flood(client, anthropic_wire, 4)) == {200: 3, 429: 1}


async def test_openai_reserves_max_tokens(connect: Connect, openai_wire: Wire) -> None:
    """OpenAI charges the larger of `max_tokens` and the prompt, whatever is used in the end."""
    async with connect(input_tpm=10_000) as client:
        responses = await flood(client, openai_wire, 12, max_tokens=1_000)
    refused = next(response for response in responses if response.status_code == 429)
    assert statuses(responses) == {200: 10, 429: 2}
    assert refused.headers["retry-after"] == "6"
    assert refused.json()["error"]["type"] == "tokens"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"


async def test_openai_cached_tokens_count(connect: Connect, openai_wire: Wire) -> None:
    """Cached prompt tokens count as much as others."""
    body = openai_wire.body("word " * 4_000, max_tokens=None)
    async with connect(input_tpm=10_100, cache_ratio=1.0) as client:
        found = [(await openai_wire.post(client, body)).status_code for _ in range(3)]
    assert found == [200, 200, 429]


async def test_openai_refused_requests_count(connect: Connect, openai_wire: Wire) -> None:
    """A request refused for its tokens still counts as a request."""
    async with connect(rpm=3, input_tpm=2_000) as client:
        found = [
            (await openai_wire.post(client, openai_wire.body(max_tokens=limit))).json()
            for limit in (1_500, 1_500, 1_500, 10)
        ]
    kinds = [answer["error"]["type"] if "error" in answer else "answer" for answer in found]
    assert kinds == ["answer", "tokens", "tokens", "requests"]


async def test_openai_request_too_large(connect: Connect, openai_wire: Wire) -> None:
    """The refusal of a request above a whole minute's limit says that it can never fit, and not to retry."""
    async with connect(input_tpm=500) as client:
        response = await openai_wire.post(client, openai_wire.body(max_tokens=501))
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (429, "tokens", "rate_limit_exceeded")
    assert error["message"].startswith("Request too large for gpt-4o")
    assert "retry-after" not in response.headers


async def test_anthropic_headers(connect: Connect, anthropic_wire: Wire) -> None:
    """Anthropic tells limit, remaining (tokens in thousands) and when the bucket is full, in RFC 3339."""
    async with connect(rpm=60, input_tpm=50_000, output_tpm=20_000, cache_ratio=0.0) as client:
        response = await anthropic_wire.post(client, anthropic_wire.body("x" * 100_000))
    headers = {
        name.removeprefix("anthropic-ratelimit-"): value
        for name, value in response.headers.items()
        if name.startswith("anthropic-ratelimit-") and not name.endswith("reset")
    }
    assert headers == {
        "requests-limit": "60",
        "requests-remaining": "59",
        "input-tokens-limit": "50000",
        "input-tokens-remaining": "25000",
        "output-tokens-limit": "20000",
        "output-tokens-remaining": "20000",
        "tokens-limit": "70000",
        "tokens-remaining": "45000",
    }
    reset = response.headers["anthropic-ratelimit-requests-reset"]
    full = response.headers["anthropic-ratelimit-input-tokens-reset"]
    assert reset.endswith("Z")
    seconds = (datetime.fromisoformat(full) - datetime.fromisoformat(reset)).total_seconds()
    assert seconds == pytest.approx(29, abs=1)  # half of the input is gone, one of 60 requests


async def test_openai_headers(connect: Connect, openai_wire: Wire) -> None:
    """OpenAI tells limit, remaining and the time until full as a Go duration, on refusals too."""
    async with connect(rpm=600, burst=2, input_tpm=60_000) as client:
        responses = await flood(client, openai_wire, 3)
    headers = [
        {
            name.removeprefix("x-ratelimit-"): value
            for name, value in response.headers.items()
            if name.startswith("x-ratelimit-")
        }
        for response in responses
    ]
    assert (
        headers[1:]
        == [
            {
                "limit-requests": "600",
                "remaining-requests": "0",
                "reset-requests": "200ms",
                "limit-tokens": "60000",
                "remaining-tokens": "58000",
                "reset-tokens": "2s",
            }
        ]
        * 2
    )


async def test_only_configured_limits_are_told(connect: Connect, wire: Wire) -> None:
    """Without limits no header speaks of them."""
    async with connect() as client:
        response = await wire.post(client, wire.body())
    assert not [name for name in response.headers if "ratelimit" in name]


async def test_silent_server(connect: Connect, wire: Wire) -> None:
    """A server may limit without telling: no rate headers and no `retry-after`."""
    async with connect(rpm=1, rate_headers=False, retry_after=False) as client:
        responses = await flood(client, wire, 2)
    assert statuses(responses) == {200: 1, 429: 1}
    names = {name for response in responses for name in response.headers}
    assert not [name for name in names if "ratelimit" in name or name == "retry-after"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (0.02, "20ms"),
        (0.0121, "13ms"),
        (1.0, "1s"),
        (8.64, "8.64s"),
        (33.023, "33.023s"),
        (60.0, "1m0s"),
        (360.0, "6m0s"),
        (5_011.0, "1h23m31s"),
    ],
)
def test_go_duration(seconds: float, text: str) -> None:
    """Durations are written as Go writes them, rounded up to milliseconds."""
    assert go_duration(seconds) == text


async def test_latency(connect: Connect, wire: Wire) -> None:
    """Latency has the mean asked for, varies, and is the same each time for the same request."""
    loop = asyncio.get_running_loop()
    waits: dict[int, list[float]] = {}
    async with connect(latency=2.0) as client:
        for _ in range(2):
            for index in range(300):
                start = loop.time()
                await wire.post(client, wire.body(str(index)))
                waits.setdefault(index, []).append(loop.time() - start)
    firsts = [first for first, _ in waits.values()]
    assert all(first == pytest.approx(second) for first, second in waits.values())
    assert sum(firsts) / len(firsts) == pytest.approx(2.0, rel=0.1)
    assert max(firsts) > 2 * min(firsts)
