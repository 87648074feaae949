"""A provider that goes wrong on purpose, in chosen ways, and keeps its own books.

    python -m tests.torture.chaos --port 0 --journal FILE --script FILE

prints its port on the first line. It speaks enough of both protocols (`POST …/messages`, `POST …/chat/completions`),
on loopback only, over raw sockets, because much of what it says is not HTTP. What a call meets is a function of the
record and of how often that record was asked for, never of time: the script says so (`{"id": ["silence", …]}`, one
fault for each attempt, null for none), else `rate` and `seed` draw it from the faults that a retry passes. Its journal
is the ground truth of what was paid: one line for each call before a byte is sent, and one when it has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.torture import truth
from tests.torture.faults import DOORS, FAULTS, PROTOCOLS, End, Fault, honest
from tests.torture.replies import Call
from tests.torture.wire import Incoming, Wire

HOST = "127.0.0.1"
_READ_LIMIT = 1 << 20
DRAWN = sorted(f.name for f in FAULTS.values() if f.end in (End.RETRIED, End.EITHER) and not f.is_refusal)
"""What is drawn from: what a retry passes; not refusals for the rate, which slow a client down as they are meant to."""

Script = Mapping[str, Sequence[str | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What goes wrong: `script` first, else a share `rate` of the calls, by `seed`; all after `latency` seconds.

    `echo`: repeat the key that came with a call in everything that is not an answer.
    """

    script: Script = field(default_factory=dict)
    rate: float = 0.0
    seed: int = 0
    latency: float = 0.0
    echo: bool = False

    def fault(self, record_id: str, attempt: int) -> Fault | None:
        """Return what the n-th call for a record meets."""
        if record_id in self.script:
            names = self.script[record_id]
            name = names[attempt - 1] if attempt <= len(names) else None
            return FAULTS[name] if name else None
        if truth.share(self.seed, record_id, attempt) >= self.rate:
            return None
        return FAULTS[DRAWN[int(truth.share("kind", self.seed, record_id, attempt) * len(DRAWN))]]


class Journal:
    """The server's books: lines of JSON, each in the kernel's hands before anything else happens."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, **entry: Any) -> None:
        os.write(self._fd, json.dumps({"at": round(time.monotonic(), 4), **entry}).encode() + b"\n")

    def close(self) -> None:
        os.close(self._fd)


class Chaos:
    """The server; `open` gives it an address, `run` serves until it is cancelled."""

    def __init__(self, plan: Plan, journal: Journal) -> None:
        self._plan = plan
        self._journal = journal
        self._attempts: Counter[str] = Counter()
        self._calls = 0
        self._connections = 0
        self._tasks: asyncio.TaskGroup

    async def run(self, ready: asyncio.Future[None]) -> None:
        """Serve what `listen` is given."""
        async with asyncio.TaskGroup() as self._tasks:
            ready.set_result(None)
            await asyncio.get_running_loop().create_future()

    async def listen(
        self, sock: socket.socket, door: str | None = None, times: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        """Accept connections; the first `times` of them are treated as the door says, before anything is read."""
        left = iter(range(times))

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            is_shut = door is not None and next(left, None) is not None
            self._tasks.create_task(self._slam(door or "", reader, writer) if is_shut else self._serve(reader, writer))

        server = await asyncio.start_server(connected, sock=sock, limit=_READ_LIMIT, ssl=tls)
        self._tasks.create_task(_serve_forever(server))

    async def _slam(self, door: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer)
        self._journal.write(event="connection", peer=wire.peer, fault=door)
        await DOORS[door].act(wire, Call(record_id="", attempt=0, protocol="", model=""))
        await wire.leave()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer)
        self._connections += 1
        connection = self._connections
        try:
            while wire.is_open and (incoming := await wire.read_request()):
                await self._reply(wire, incoming, connection)
        finally:
            await wire.leave()

    async def _reply(self, wire: Wire, incoming: Incoming, connection: int) -> None:
        call = self._call(wire, incoming)
        fault = self._plan.fault(call.record_id, call.attempt)
        self._calls += 1
        number = self._calls
        self._journal.write(
            event="call",
            call=number,
            connection=connection,
            peer=wire.peer,
            id=call.record_id,
            attempt=call.attempt,
            protocol=call.protocol,
            model=call.model,
            **_books(call, fault),
        )
        is_accepted = False
        try:
            if self._plan.latency:
                await asyncio.sleep(self._plan.latency)
            await (fault.act if fault else honest)(wire, call)
            is_accepted = wire.sent_bytes > 0
        except ConnectionError:
            wire.close()
        finally:
            self._journal.write(event="end", call=number, bytes=wire.sent_bytes, accepted=is_accepted)

    def _call(self, wire: Wire, incoming: Incoming) -> Call:
        body = json.loads(incoming.body)
        protocol = PROTOCOLS[0] if incoming.path.endswith("/messages") else PROTOCOLS[1]
        text = body["messages"][-1]["content"]
        record_id = truth.record_in(text if isinstance(text, str) else text[-1]["text"]) or "?"
        self._attempts[record_id] += 1
        key = incoming.headers.get("x-api-key") or incoming.headers.get("authorization", "").removeprefix("Bearer ")
        return Call(
            record_id=record_id,
            attempt=self._attempts[record_id],
            protocol=protocol,
            model=body["model"],
            use=wire.requests,
            echo=key if self._plan.echo else "",
        )


def _books(call: Call, fault: Fault | None) -> dict[str, Any]:
    """Return what a call costs, and what its reply tells if it is an answer."""
    used = dict(zip(("input", "output"), truth.tokens(call.record_id), strict=True))
    is_answer = fault is None or fault.is_answer
    return {
        "fault": fault.name if fault else None,
        "billed": used if fault is None or fault.is_billed else None,
        "is_answer": is_answer,
        "told": used if is_answer and (fault is None or fault.tells_usage) else None,
        "suffix": fault.suffix if fault else "",
    }


async def _serve_forever(server: asyncio.Server) -> None:
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        server.close()


# ── in a thread ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Server:
    """A running chaos server; its loop is its own, so a client that blocks cannot hold it up."""

    def __init__(self, chaos: Chaos, loop: asyncio.AbstractEventLoop, journal: Path) -> None:
        self._chaos = chaos
        self._loop = loop
        self.journal = journal
        self.url = self.open()

    def open(
        self,
        sock: socket.socket | None = None,
        *,
        door: str | None = None,
        times: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> str:
        """Listen on a socket, else on a free port, and return its address."""
        sock = sock or bound()
        asyncio.run_coroutine_threadsafe(self._chaos.listen(sock, door, times, tls), self._loop).result(10)
        return f"{'https' if tls else 'http'}://{HOST}:{sock.getsockname()[1]}"


@contextmanager
def serving(journal: Path, plan: Plan) -> Iterator[Server]:
    """Run a chaos server in a thread."""
    loop = asyncio.new_event_loop()
    books = Journal(journal)
    chaos = Chaos(plan, books)
    ready: asyncio.Future[None] = loop.create_future()
    running = loop.create_task(chaos.run(ready))
    thread = threading.Thread(target=_run, args=(loop, running), name="chaos")
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(_wait(ready), loop).result(10)
        yield Server(chaos, loop, journal)
    finally:
        loop.call_soon_threadsafe(running.cancel)
        thread.join(30)
        books.close()
        if not running.cancelled() and (error := running.exception()):
            raise error


async def _wait(ready: asyncio.Future[None]) -> None:
    await ready


def _run(loop: asyncio.AbstractEventLoop, running: asyncio.Task[None]) -> None:
    try:
        loop.run_until_complete(asyncio.gather(running, return_exceptions=True))
        loop.run_until_complete(_end_handshakes())
    finally:
        loop.close()


async def _end_handshakes() -> None:
    """End the connections that nobody serves yet: while TLS begins they belong to tasks of the loop.

    On a busy machine a client that does not trust us is gone before its refusal is read here.
    """
    await asyncio.sleep(0)  # what was accepted is begun
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await asyncio.sleep(0)  # what was aborted is closed in the next turn


def bound(port: int = 0) -> socket.socket:
    """Return a socket with a port on loopback that refuses until somebody listens."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((HOST, port))
    return sock


# ── as a process ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def main(plan: Plan, journal: Path, port: int) -> None:
    """Serve until the process is ended."""
    chaos = Chaos(plan, Journal(journal))
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(chaos.run(ready))
    await ready
    sock = bound(port)
    await chaos.listen(sock)
    print(sock.getsockname()[1], flush=True)
    await running


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--journal", type=Path, required=True, help="file that the books are appended to")
    parser.add_argument("--script", type=Path, help="file of JSON: record id -> faults by attempt")
    parser.add_argument("--rate", type=float, default=0.0, help="share of calls that meet a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each reply")
    parser.add_argument("--echo", action="store_true", help="repeat the key in everything that is no answer")
    return parser.parse_args()


if __name__ == "__main__":
    given = _parsed()
    asyncio.run(
        main(
            Plan(
                script=json.loads(given.script.read_bytes()) if given.script else {},
                rate=given.rate,
                seed=given.seed,
                latency=given.latency,
                echo=given.echo,
            ),
            given.journal,
            given.port,
        )
    )
