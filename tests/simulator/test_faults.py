"""Faults: what they look like from outside, and that they can be repeated."""

import asyncio
import json
from typing import Any

import pytest

from pipeline.simulator.faults import KINDS

from .conftest import Connect, Wire

pytestmark = pytest.mark.looptime


@pytest.mark.parametrize(
    ("kind", "anthropic", "openai"),
    [
        ("429", (429, "rate_limit_error", None, "1"), (429, "requests", "rate_limit_exceeded", "1")),
        (
            "429-no-hint",
            (429, "rate_limit_error", None, None),
            (429, "requests", "rate_limit_exceeded", None),
        ),
        ("500", (500, "api_error", None, None), (500, "server_error", None, None)),
        (
            "503",
            (503, "api_error", None, None),
            (503, "service_unavailable_error", "server_is_overloaded", None),
        ),
        (
            "529",
            (529, "overloaded_error", None, None),
            (503, "service_unavailable_error", "server_is_overloaded", None),
        ),
        (
            "quota",
            (429, "rate_limit_error", "enforced_spend_limit_reached", None),
            (429, "insufficient_quota", "credit_balance_exhausted", None),
        ),
        (
            "error-200",
            (200, "api_error", None, None),
            (200, "service_unavailable_error", "server_is_overloaded", None),
        ),
    ],
)
async def test_errors(connect: Connect, wire: Wire, kind: str, anthropic: Any, openai: Any) -> None:
    """A fault that is an error has the provider's own status, type, code and hint."""
    async with connect(faults={kind: 1.0}) as client:
        response = await wire.post(client, wire.body())
    error = response.json()["error"]
    code = error.get("details", {}).get("error_code") if wire.name == "anthropic" else error["code"]
    found = (response.status_code, error["type"], code, response.headers.get("retry-after"))
    assert found == (anthropic if wire.name == "anthropic" else openai)


@pytest.mark.parametrize(
    ("kind", "status", "content_type"), [("502-html", 502, "text/html"), ("html", 200, "text/html")]
)
async def test_html(connect: Connect, wire: Wire, kind: str, status: int, content_type: str) -> None:
    """Gateways answer with HTML pages."""
    async with connect(faults={kind: 1.0}) as client:
        response = await wire.post(client, wire.body())
    assert (response.status_code, response.headers["content-type"]) == (status, content_type)
    assert response.text.startswith("<html>")


async def test_empty(connect: Connect, wire: Wire) -> None:
    """An empty body comes with status 200 and a content-length of 0."""
    async with connect(faults={"empty": 1.0}) as client:
        response = await wire.post(client, wire.body())
    assert (response.status_code, response.content, response.headers["content-length"]) == (200, b"", "0")


async def test_truncated(connect: Connect, wire: Wire) -> None:
    """A truncated body is whole for HTTP but cut for JSON."""
    async with connect(faults={"truncated": 1.0}) as client:
        response = await wire.post(client, wire.body())
    assert int(response.headers["content-length"]) == len(response.content) > 0
    with pytest.raises(json.JSONDecodeError):
        response.json()


async def test_reset(connect: Connect, wire: Wire) -> None:
    """Without a socket, a reset connection is the error that a reset socket raises."""
    async with connect(faults={"reset": 1.0}) as client:
        with pytest.raises(ConnectionResetError):
            await wire.post(client, wire.body())


async def test_timeout(connect: Connect, wire: Wire) -> None:
    """No answer comes for 600 seconds, then the connection is reset."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    async with connect(faults={"timeout": 1.0}) as client:
        with pytest.raises(ConnectionResetError):
            await wire.post(client, wire.body())
    assert loop.time() - start == pytest.approx(600, abs=0.01)


async def test_slow(connect: Connect, wire: Wire) -> None:
    """A slow answer is the true one, ten times as late."""
    loop = asyncio.get_running_loop()
    waits = []
    for faults in ({}, {"slow": 1.0}):
        async with connect(latency=1.0, faults=faults) as client:
            start = loop.time()
            assert (await wire.post(client, wire.body())).status_code == 200
            waits.append(loop.time() - start)
    assert waits[1] == pytest.approx(10 * waits[0], rel=1e-3)


async def outcomes(client: Any, wire: Wire, order: list[int]) -> dict[int, list[int]]:
    """Send each body three times, in the given order, and return the statuses of each."""
    found: dict[int, list[int]] = {index: [] for index in order}
    for _ in range(3):
        for index in order:
            found[index].append((await wire.post(client, wire.body(str(index)))).status_code)
    return found


async def test_faults_follow_from_the_seed(connect: Connect, wire: Wire) -> None:
    """Which attempt of which request fails depends on the seed, not on the order of the requests."""
    faults = {"500": 0.2, "429": 0.2}
    found = []
    for seed, order in ((1, list(range(50))), (1, list(reversed(range(50)))), (2, list(range(50)))):
        async with connect(seed=seed, faults=faults) as client:
            found.append(await outcomes(client, wire, order))
    assert found[0] == found[1] != found[2]


async def test_rates(connect: Connect, wire: Wire) -> None:
    """Faults strike with the rates asked for, and a retry of a failed request may pass."""
    async with connect(faults={"500": 0.3, "529": 0.1}) as client:
        found = await outcomes(client, wire, list(range(300)))
        statistics = (await client.get("/simulator/statistics")).json()
    assert statistics["faults"]["500"] / 900 == pytest.approx(0.3, abs=0.05)
    assert statistics["faults"]["529"] / 900 == pytest.approx(0.1, abs=0.03)
    assert [500, 200, 200] in found.values()


async def test_faults_do_not_depend_on_rate_limits(connect: Connect, wire: Wire) -> None:
    """A request that the rate limits refused does not count as an attempt."""
    bodies = [wire.body(str(index)) for index in range(40)]
    found = []
    for limits in ({}, {"rpm": 60, "burst": 1}):
        async with connect(faults={"500": 0.5}, **limits) as client:
            statuses = []
            for body in bodies:
                response = await wire.post(client, body)
                if response.status_code == 429:
                    await asyncio.sleep(int(response.headers["retry-after"]))
                    response = await wire.post(client, body)
                statuses.append(response.status_code)
            found.append(statuses)
    assert found[0] == found[1]


async def test_failed_requests_use_no_tokens(connect: Connect, anthropic_wire: Wire) -> None:
    """A fault gives back the input that was charged at the start."""
    async with connect(input_tpm=1_000, faults={"529": 1.0}) as client:
        found = [(await anthropic_wire.post(client, anthropic_wire.body("x" * 3_900))).status_code for _ in range(5)]
    assert found == [529] * 5


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"timeout", "reset", "incomplete", "slow"}))
async def test_faults_are_not_paid(connect: Connect, wire: Wire, kind: str) -> None:
    """A request that a fault struck is counted as such and not as answered."""
    async with connect(faults={kind: 1.0}) as client:
        await wire.post(client, wire.body())
        statistics = (await client.get("/simulator/statistics")).json()
    assert (statistics["faults"], statistics["answered"]) == ({kind: 1}, 0)
