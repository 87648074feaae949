"""The contenders, each a program of its own: `python -m tests.benchmarks.contenders NAME URL INPUT REQUESTS IN_FLIGHT`.

All send the same bodies to the same server and hold as many calls in flight. Only ours plans, paces, retries and
accounts; only ours and `floor` note each call on the disk before it is made and write results that survive a power
cut.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import orjson
import uvloop
from anyio import to_thread

Call = Callable[[bytes], Awaitable[object]]
GROUP_SECONDS = 0.005  # as in `record`


def ours(url: str, source: str, requests: int, in_flight: int) -> None:
    """The whole program: read, plan, gate, send, record durably."""
    from pipeline.__main__ import start

    os.environ |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "k"}
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", source, "-o", f"{folder}/out.jsonl", "--concurrency", str(in_flight), "-q"]
        sys.argv = ["pipeline", *words, "--limit", str(requests)]
        start()


def floor(url: str, source: str, requests: int, in_flight: int) -> None:
    """The least that the promises need, over our transport: what is above it is what the rest of the program costs.

    Each line is decoded and its body encoded, the call is on the disk before it is made, the answer is decoded, and its
    line is on the disk before the next call. No check, gate, retry, identity, price, sum or index.
    """
    from pipeline.core.config import Sending
    from pipeline.core.http import Client

    async def work(folder: str) -> None:
        async with Client(Sending(concurrency=in_flight)) as client:
            post = client.post_to(f"{url}/chat/completions", [("content-type", "application/json")])
            journal, results = _Durable(f"{folder}/journal"), _Durable(f"{folder}/results")

            async def call(line: bytes) -> None:
                body = orjson.dumps(orjson.loads(line))
                await journal.append({"sent": "q", "at": "2026-11-26T00:00:00Z", "model": "gpt-4o"})
                answer = await post(body)
                reply = orjson.loads(answer.body)
                content = reply["choices"][0]["message"]["content"]
                response = orjson.Fragment(answer.body)
                await results.append({"content": content, "usage": reply["usage"], "response": response})

            async with anyio.create_task_group() as writing:
                writing.start_soon(journal.run)
                writing.start_soon(results.run)
                await _drive(call, _bodies(source, requests), in_flight)
                writing.cancel_scope.cancel()

    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(work(folder))


class _Durable:
    """A file whose lines are written and synced in groups, by a thread."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._lines: list[bytes] = []
        self._arrival, self._written = anyio.Event(), anyio.Event()

    async def append(self, value: object) -> None:
        """Take a line; returns when it is on the disk."""
        self._lines.append(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
        self._arrival.set()
        await self._written.wait()

    async def run(self) -> None:
        while True:
            await self._arrival.wait()
            await anyio.sleep(GROUP_SECONDS)
            lines, self._lines = self._lines, []
            written, self._written = self._written, anyio.Event()
            self._arrival = anyio.Event()
            await to_thread.run_sync(self._write, b"".join(lines))
            written.set()

    def _write(self, data: bytes) -> None:
        os.write(self._fd, data)
        os.fdatasync(self._fd)


def transport(url: str, source: str, requests: int, in_flight: int) -> None:
    """Our transport alone."""
    from pipeline.core.config import Sending
    from pipeline.core.http import Client

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
        # Its own 5 seconds for a connection are too few for it where it opens thousands at once.
        async with AsyncOpenAI(base_url=url, api_key="k", max_retries=0, timeout=600) as client:

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


CONTENDERS = {each.__name__: each for each in (ours, floor, transport, aiohttp, openai)}

if __name__ == "__main__":
    name, url, source, requests, in_flight = sys.argv[1:]
    CONTENDERS[name](url, source, int(requests), int(in_flight))
