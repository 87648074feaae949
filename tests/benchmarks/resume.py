"""How soon a run over finished lines makes its first new call, and what it remembers of them.

    pip install -e '.[dev]' && python -m tests.benchmarks.resume build/benchmark        1,000,000 lines; 2.5 GB of disk
    python -m tests.benchmarks.resume build/benchmark --short                           20,000 lines

Writes an input and its results (not through a provider: only their form counts), then starts the program again and
again, each time with one line more, before a server that notes when the call arrives and how much memory the program
has then. First without the index, which this start writes, then with it: as it is, after an edit near the beginning of
the input, and shuffled. As machines differ and are shared, `wc -l` over both files stands beside it. Memory of a line
is the difference to the same starts over a tenth of the lines.

What was learned on the way (a million lines, 2 cores): planning a line costs 40 µs and parsing a result 12 µs, so
neither may happen; even splitting the input into lines and hashing each costs more than hashing it in stretches of 256
lines; SHA-256 is three times as fast as BLAKE2b where the processor knows it; a hash table that doubles takes 10 to 20
bytes an entry and, while it grows, half as much again: short sorted arrays take 10.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import orjson

from pipeline.core import config_file
from pipeline.core.config import Config
from pipeline.core.types import Completion, OutputFormat, Request, Result, Usage
from pipeline.inputs.planner import Planner
from pipeline.inputs.reader import Line
from pipeline.results import codec

LINES = 1_000_000
SHORT_LINES = 20_000
MODEL = "gpt-4o"
MARK = b"1234567890"  # stands for the number of a line in what all lines have in common
QUESTION = "question %s " + "lorem ipsum " * 29
ANSWER = "x" * 470


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of the program: seconds until its call arrived, CPU seconds of all of it, peak memory at the call."""

    seconds: float
    cpu: float
    memory: int


class _Server(HTTPServer):
    """Answers every call, and notes when the first one came and how much memory the caller had."""

    caller = 0
    arrival: float | None = None
    memory = 0

    def note(self) -> None:
        if self.arrival is None:
            self.arrival = time.perf_counter()
            self.memory = _memory(self.caller)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Any = self.server
        server.note()
        self.rfile.read(int(self.headers["content-length"]))
        answer = orjson.dumps(_completion(0))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main(folder: Path, count: int) -> None:
    """Write the files, start the program in each way, print the table."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    with _serving() as server:
        settings = config_file.load(environ=_environ(server))
        _write(source, output, count // 10, settings)
        few = [_start(server, source, output) for _ in WAYS]
        output.with_suffix(".index").unlink()
        _write(source, output, count, settings)
        wc = _seconds("wc", "-l", str(source), str(output))
        many = []
        for change in WAYS.values():
            change(source)
            many.append(_start(server, source, output))
    print(_table(few, many, wc, count, output))


def _start(server: _Server, source: Path, output: Path) -> Start:
    """Add a line to the input and run the program on it."""
    with source.open("ab") as file:
        file.write(orjson.dumps(_line(f"new-{source.stat().st_size}")) + b"\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    server.arrival = None
    begin = time.perf_counter()
    words = [sys.executable, "-m", "pipeline", "run", str(source), "-o", str(output), "-q"]
    with subprocess.Popen(words, env=_environ(server)) as process:
        server.caller = process.pid
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    sent = orjson.loads(output.with_suffix(".usage.json").read_bytes())["requests"]["succeeded"]
    if sent != 1:
        raise SystemExit(f"{sent:,} requests were sent, not the new one alone")
    if process.returncode or server.arrival is None:
        raise SystemExit(f"{' '.join(words)} failed")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Start(seconds=server.arrival - begin, cpu=cpu, memory=server.memory)


def _environ(server: _Server) -> dict[str, str]:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return os.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "any"}


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _line(custom_id: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": QUESTION % custom_id}]
    return {"custom_id": custom_id, "model": MODEL, "max_tokens": 200, "messages": messages}


def _write(source: Path, output: Path, count: int, settings: Config) -> None:
    """Write an input and its results; every line is the same but for its number, so only one has to be planned."""
    line = orjson.dumps(_line(MARK.decode()))
    request = Planner(settings).plan(Line(source=str(source), number=1, data=line))
    assert isinstance(request, Request)
    result = _result(request)
    with source.open("wb") as lines, output.open("wb") as answers:
        output.chmod(0o600)
        for number in range(10**9, 10**9 + count):
            mark = b"%d" % number
            data, body = line.replace(MARK, mark), request.body.replace(MARK, mark)
            digest = blake2b(request.provider.encode() + b"\n" + body, digest_size=16).hexdigest().encode()
            lines.write(data + b"\n")
            answers.write(result.replace(MARK, mark).replace(request.digest.encode(), digest))


def _result(request: Request) -> bytes:
    reply = Completion(
        model="gpt-4o-2024-08-06",
        content=ANSWER,
        finish_reason="stop",
        truncated=False,
        usage=Usage(input_tokens=25, output_tokens=50),
        raw=orjson.dumps(_completion(1)),
        request_id="req_0123456789",
    )
    result = Result(
        custom_id=request.custom_id,
        line=1,
        source="in.jsonl",
        digest=request.digest,
        attempts=1,
        completed_at="2026-11-22T02:40:07Z",
        request=request,
        reply=reply,
        latency_s=1.24,
    )
    return codec.encode(result, OutputFormat.NATIVE, run_id="run-2026-11-22T024007Z-abcdef")


def _completion(number: int) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o-2024-08-06",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ANSWER}}],
        "usage": {"prompt_tokens": 25, "completion_tokens": 50, "total_tokens": 75},
    }


def _leave(source: Path) -> None:
    """Change nothing."""


def _edit(source: Path) -> None:
    """Move a line to the front, and add a blank to one near the end."""
    lines = source.read_bytes().splitlines(keepends=True)
    moved = lines.pop(len(lines) // 2)
    lines[-10] = b" " + lines[-10]
    source.write_bytes(b"".join([moved, *lines]))


def _shuffle(source: Path) -> None:
    lines = source.read_bytes().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    source.write_bytes(b"".join(lines))


WAYS: Mapping[str, Callable[[Path], None]] = {
    "without an index": _leave,
    "with it": _leave,
    "with it, two lines edited": _edit,
    "with it, input shuffled": _shuffle,
}


# ── measuring ─────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _serving() -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _memory(pid: int) -> int:
    """Return the most memory that a process had so far, in bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words and words[0] == "VmHWM:")


def _seconds(*command: str) -> float:
    begin = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def _table(few: list[Start], many: list[Start], wc: float, count: int, output: Path) -> str:
    sizes = [output.with_name(name).stat().st_size / 1e6 for name in ("in.jsonl", "out.jsonl", "out.index")]
    lines = [
        "{:,} finished lines: {:,.0f} MB of input, {:,.0f} MB of results, {:,.0f} MB of index; ".format(count, *sizes)
        + f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; wc -l over both files: {wc:.2f} s",
        "",
        "| start | s to the first call | CPU s in all | peak memory | bytes a finished line |",
        "|---|---|---|---|---|",
    ]
    for name, less, more in zip(WAYS, few, many, strict=True):
        grown = (more.memory - less.memory) / (count - count // 10)
        lines.append(f"| {name} | {more.seconds:.2f} | {more.cpu:.1f} | {more.memory / 1e6:.0f} MB | {grown:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--short"]
    main(Path(words[0] if words else "build/benchmark"), SHORT_LINES if "--short" in sys.argv else LINES)
