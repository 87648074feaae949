"""The contenders, each a program of its own: `python -m tests.benchmarks.contenders NAME URL INPUT REQUESTS IN_FLIGHT`.

All send the same bodies to the same server and hold as many calls in flight; only ours reads a file, plans, paces,
retries, journals and writes.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import orjson
import uvloop

Call = Callable[[bytes], Awaitable[object]]


def ours(url: str, source: str, requests: int, in_flight: int) -> None:
    """The whole program: read, plan, gate, send, record durably."""
    import os

    from pipeline.cli import main

    os.environ |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "k"}
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", source, "-o", f"{folder}/out.jsonl", "--concurrency", str(in_flight), "-q"]
        main([*words, "--limit", str(requests)], standalone_mode=False)


def transport(url: str, source: str, requests: int, in_flight: int) -> None:
    """Our transport alone."""
    from pipeline.config import Sending
    from pipeline.transport import Client

    async def work() -> None:
        async with Client(Sending(concurrency=in_flight)) as client:
            post = client.post_to(f"{url}/chat/completions", [("content-type", "application/json")])
            await _drive(post, _bodies(source, requests), in_flight)

    uvloop.run(work())


def aiohttp(url: str, source: str, requests: int, in_flight: int) -> None:
    """A bare aiohttp loop that reads the answers and throws them away."""
    import aiohttp as library

    async def work() -> None:
        connector = library.TCPConnector(limit=0)
        async with library.ClientSession(connector=connector) as session:

            async def post(body: bytes) -> bytes:
                async with session.post(f"{url}/chat/completions", data=body) as response:
                    return await response.read()

            await _drive(post, _bodies(source, requests), in_flight)

    uvloop.run(work())


def openai(url: str, source: str, requests: int, in_flight: int) -> None:
    """The official SDK with a pool of workers."""
    from openai import AsyncOpenAI

    async def work() -> None:
        async with AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as client:

            async def post(body: bytes) -> object:
                return await client.chat.completions.create(**orjson.loads(body))

            await _drive(post, _bodies(source, requests), in_flight)

    uvloop.run(work())


def _bodies(source: str, requests: int) -> Iterator[bytes]:
    return iter(Path(source).read_bytes().splitlines()[:requests])


async def _drive(call: Call, bodies: Iterator[bytes], in_flight: int) -> None:
    """Make a call with each body, so many at a time."""

    async def work() -> None:
        for body in bodies:
            await call(body)

    await asyncio.gather(*(work() for _ in range(in_flight)))


CONTENDERS = {each.__name__: each for each in (ours, transport, aiohttp, openai)}

if __name__ == "__main__":
    name, url, source, requests, in_flight = sys.argv[1:]
    CONTENDERS[name](url, source, int(requests), int(in_flight))
