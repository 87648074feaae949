"""Mutated bytes into everything that reads what others wrote: only typed errors may come out.

    python -m tests.torture.fuzz --inputs 1000000 --seed 1

Half of the mutations harm bytes, half put a value where another belongs in well-formed JSON: the first find what a
parser cannot take, the second what a reader of parsed values took for granted. What is accepted must have been read,
and be sent, as what an exact parser reads in it. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from pipeline import providers
from pipeline.core import config_file, jsonl
from pipeline.core.config import Config
from pipeline.core.errors import ConfigError, LineError, ProviderError
from pipeline.core.types import Attempt, Failure, HttpResponse, OutputFormat, Protocol, Request, Result
from pipeline.inputs import planner, reader
from pipeline.inputs.planner import Invalid, Planner
from pipeline.inputs.reader import Line
from pipeline.providers import rate_limit_headers
from pipeline.results import codec
from tests.torture.lines import exactly

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ROOT = Path(__file__).resolve().parents[2]

_TOKENS = (
    b"\0 \xff \xed\xa0\x80 \xef\xbb\xbf \xe2\x80\xa8 \r \n \t \x1b \\ \\ud800 \\u0000 \\u0022 \\ud83d\\ude42 { } [ ] "
    b'" : , "": null true false NaN Infinity -Infinity -0 -0.0 1e400 1e-400 1E5 0.1 1180591620717411303424 &a *a !!x '
    b"- % ' | > # {{ [[[[[[[[ :: ---"
).split(b" ")
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1.5, -0.0, 1e308, 5e-324, 2**53 + 1, 2**63, 2**64, -(2**70), 10**300),
    *("", " ", "a", "user", "assistant", "tool", "{", "[]", '{"a":1}', "\0", "\u2028", "\ud800", "é", "x" * 600),
    *([], {}, [None], [{}], [[]], {"": {}}, {"type": "text"}, {"role": "user", "content": "x"}, [{"type": []}]),
    *({"type": "tool_use"}, {"function": None}, {"from": [], "value": {}}, {"__proto__": {}}, {"error": {}}),
)
_NAMES = (
    *("custom_id", "provider", "model", "messages", "system", "metadata", "body", "params", "conversations", "id"),
    *("method", "url", "tools", "role", "content", "from", "value", "type", "name", "max_tokens", "n", "stop", "user"),
    *("temperature", "tool_calls", "tool_choice", "response_format", "function_call", "usage", "error", "choices"),
    *("weight", "input_schema", "source", "image_url", "stream", "base_url", "output_config", "reasoning_effort", ""),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that reads outside bytes. `take` tells whether it accepted them; any error that leaves it is a find."""

    name: str
    corpus: Sequence[bytes]
    take: Callable[[bytes], bool]
    weight: int
    is_json: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Find:
    """An input that something could not take."""

    target: str
    data: bytes
    error: BaseException


def fuzz(inputs: int, seed: int, folder: Path) -> tuple[Counter[tuple[str, bool]], list[Find]]:
    """Feed so many mutated inputs to the targets; return how many each accepted and refused, and what was found.

    `folder` is for files that a target reads.
    """
    dice = random.Random(seed)
    targets = list(_targets(folder))
    weights = [target.weight for target in targets]
    counts: Counter[tuple[str, bool]] = Counter()
    finds: list[Find] = []
    for target in dice.choices(targets, weights, k=inputs):
        data = _mutated(target, dice)
        try:
            counts[target.name, target.take(data)] += 1
        except Exception as exc:
            finds.append(Find(target=target.name, data=data, error=exc))
    return counts, finds


# ── mutations ───────────────────────────────────────────────────────────────────────────────────────────


def _mutated(target: Target, dice: random.Random) -> bytes:
    data = dice.choice(target.corpus)
    if target.is_json and dice.random() < 0.5:
        value = orjson.loads(data)
        for _ in range(dice.choice((1, 1, 2))):
            value = _with_another_value(value, dice)
        return _sloppy(value)
    for _ in range(dice.choice((1, 1, 2, 3))):
        data = _harmed(data, dice.choice(target.corpus), dice)
    return data


def _harmed(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return bytes with one harm done: flipped, cut out, doubled, a token put in, or spliced with other ones."""
    start = dice.randrange(len(data) + 1)
    end = min(len(data), start + dice.choice((1, 1, 2, 8, 40)))
    kind = dice.randrange(6)
    if kind == 0:
        return data[:start] + bytes([dice.randrange(256)]) + data[start + 1 :]
    if kind == 1:
        return data[:start] + data[end:]
    if kind == 2:
        return data[:end] + data[start:end] * dice.choice((1, 2, 300)) + data[end:]
    if kind == 3:
        return data[:start] + other[dice.randrange(len(other) + 1) :]
    return data[:start] + dice.choice(_TOKENS) + data[start if kind == 4 else end :]


def _with_another_value(value: Any, dice: random.Random) -> Any:
    """Return a JSON value in which a part, somewhere, is another, is gone, or has a neighbour."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        name = dice.choice(list(value))
        kind = dice.randrange(8)
        if kind == 0:
            return {key: item for key, item in value.items() if key != name}
        if kind == 1:
            return {**value, dice.choice(_NAMES): dice.choice(_VALUES)}
        return {**value, name: _with_another_value(value[name], dice)}
    if isinstance(value, list) and value and dice.random() < 0.8:
        index = dice.randrange(len(value))
        return [*value[:index], _with_another_value(value[index], dice), *value[index + dice.randrange(2) :]]
    return dice.choice(_VALUES)


def _sloppy(value: Any) -> bytes:
    """Encode a value as somebody's sloppy program might: with lone surrogates in it, if there are any."""
    try:
        return jsonl.dumps(value)
    except UnicodeEncodeError:
        return json.dumps(value).encode()


# ── targets ─────────────────────────────────────────────────────────────────────────────────────────────


def _targets(folder: Path) -> Iterator[Target]:
    samples = [
        line for name in ("conversations", "with-bad-lines") for line in _lines_of(ROOT / "samples" / f"{name}.jsonl")
    ]
    valid = [line for line in samples if _is_json(line)]
    answers = [orjson.dumps(body) for body in _ANSWERS]
    archives = [pack(b"\n".join(samples[:4]) + b"\n") for pack in (bytes, gzip.compress, zstd.compress)]
    texts = [(ROOT / "samples" / "providers.yaml").read_bytes(), *_CONFIGS]
    yield Target(name="plan.plan", corpus=valid, take=_Plan().take, weight=300)
    yield Target(name="jsonl.loads", corpus=valid, take=_loads, weight=150)
    yield Target(name="jsonl.lines", corpus=samples, take=_split, weight=100, is_json=False)
    yield Target(name="results.decode", corpus=list(_result_lines()), take=_decode, weight=200)
    yield Target(name="providers.decode", corpus=answers, take=_answer, weight=150)
    yield Target(name="providers.limits", corpus=_HEADERS, take=_hints, weight=100, is_json=False)
    yield Target(name="read.lines", corpus=archives, take=partial(_read, folder / "q"), weight=20, is_json=False)
    yield Target(name="config_file.load", corpus=texts, take=partial(_configure, folder / "c"), weight=5, is_json=False)


def _lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def _is_json(data: bytes) -> bool:
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True


class _Plan:
    """A planner for each line, of both default providers in turn; what it refuses is written as a run writes it."""

    def __init__(self) -> None:
        self._count = 0
        self._settings = [Config(provider=name) for name in ("anthropic", "openai")]

    def take(self, data: bytes) -> bool:
        self._count += 1
        planner = Planner(self._settings[self._count % 2])
        item = planner.plan(Line(source="q.jsonl", number=self._count, data=data))
        if isinstance(item, Invalid):
            assert item.failure.message.startswith(f"q.jsonl:{self._count}: ")
            codec.decode(codec.encode(_failed(item), OutputFormat.NATIVE))
            return False
        written = dict(exactly(data))
        for own in ("body", "params"):
            assert own not in written or exactly(item.body) == written[own], "sent as something else"
        protocol = Protocol(item.provider)
        charge = providers.codec(protocol).charge(item.estimated_input_tokens, 0.0, item.max_output_tokens)
        assert all(0 <= amount < 1e12 for amount in charge.values())
        return True


def _failed(item: Request | Invalid) -> Result:
    if isinstance(item, Invalid):
        return planner.invalid_result(item, _CLOCK)
    failure = Failure(type="invalid_request_error", message="no", status=400, attempts=[_ATTEMPT])
    return Result(
        custom_id=item.custom_id,
        line=item.line,
        source=item.source,
        digest=item.digest,
        attempts=1,
        completed_at=_CLOCK.utc(),
        request=item,
        failure=failure,
        metadata=item.metadata,
    )


def _loads(data: bytes) -> bool:
    try:
        value = jsonl.loads(data)
    except LineError:
        return False
    assert exactly(jsonl.dumps(value)) == exactly(data), "read as something else"
    return True


class _Blocks:
    """A file that hands out its bytes in blocks of a few."""

    def __init__(self, data: bytes, size: int) -> None:
        self._blocks = [data[start : start + size] for start in range(0, len(data), size)][::-1]

    def read1(self, size: int = -1, /) -> bytes:
        return self._blocks.pop() if self._blocks else b""


def _split(data: bytes) -> bool:
    lines = list(jsonl.lines(_Blocks(data, 1 + len(data) % 50), 100))
    assert sum(length for _, length in lines) + data.count(b"\n") == len(data)
    return True


def _decode(data: bytes) -> bool:
    try:
        record = codec.decode(data)
    except LineError:
        return False
    assert isinstance(record.custom_id, str)
    return True


def _answer(data: bytes) -> bool:
    is_any = False
    for protocol in Protocol:
        for status in (200, 400, 429):
            answer = HttpResponse(status=status, headers={"retry-after": "1"}, body=data)
            try:
                reply = providers.codec(protocol).decode(answer)
            except ProviderError:
                continue
            is_any = True
            assert orjson.loads(reply.raw) is not None
    return is_any


def _hints(data: bytes) -> bool:
    lines = [line.partition(b":") for line in data.split(b"\n")]
    headers = {name.decode("latin-1").lower(): value.strip().decode("latin-1") for name, _, value in lines}
    seconds = rate_limit_headers.retry_after(headers)
    assert seconds is None or 0 < seconds < float("inf")
    found = [limit for protocol in Protocol for limit in providers.codec(protocol).limits(headers)]
    assert all(0 <= limit.remaining <= limit.per_minute for limit in found)
    return bool(found or seconds)


def _read(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    return not any(line.problem for line in reader.lines(str(path), 2_000))


def _configure(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    try:
        settings = config_file.load(path, {})
    except ConfigError:
        return False
    return settings.provider in settings.providers


# ── what is mutated ─────────────────────────────────────────────────────────────────────────────────────


class _StoppedClock:
    """A clock for results that nobody reads."""

    def utc(self) -> str:
        return "2026-11-22T02:40:07Z"


_CLOCK: Any = _StoppedClock()
_ATTEMPT = Attempt(at=_CLOCK.utc(), type="timeout", message="slow", latency_s=1.5)
_CHAT_USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
_ANSWERS: tuple[dict[str, Any], ...] = (
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "gpt-6-luna",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "a", "tool_calls": [_CALL]},
            }
        ],
        "usage": _CHAT_USAGE,
    },
    {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-5-5",
        "content": [{"type": "text", "text": "a"}, {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 2},
    },
    {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}, "request_id": "req_1"},
    {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": "model_not_found"}},
)
_HEADERS = (
    b"retry-after: 12\nretry-after-ms: 1500.5\nx-ratelimit-limit-requests: 100\nx-ratelimit-remaining-requests: 99",
    b"retry-after: Sun, 22 Nov 2026 02:40:07 GMT\ndate: Sun, 22 Nov 2026 02:40:00 GMT",
    b"anthropic-ratelimit-requests-limit: 100\nanthropic-ratelimit-requests-remaining: 1\n"
    b"anthropic-ratelimit-input-tokens-limit: 40000\nanthropic-ratelimit-input-tokens-remaining: 39000",
)
_CONFIGS = (
    b"provider: openai\nsending:\n  timeout: 1.5\n  concurrency: 5\ntags: {a: b}\n",
    b"limits:\n  rpm: 5\n  models: {openai/gpt: {rpm: 1}}\nsimulator: {faults: {'529': 0.5}}\n",
    b"providers:\n  x: {protocol: openai, base_url: 'http://localhost:1/v1', models: [a-*]}\n",
)


def _result_lines() -> Iterator[bytes]:
    """Yield a failed and an answered result in every dialect."""
    planner = Planner(Config())
    for body, line in zip(_ANSWERS, _lines_of(ROOT / "samples" / "conversations.jsonl")[1::-1], strict=False):
        item = planner.plan(Line(source="q.jsonl", number=1, data=line))
        assert isinstance(item, Request)
        failed = _failed(item)
        reply = providers.codec(Protocol(item.provider)).decode(HttpResponse(status=200, body=orjson.dumps(body)))
        answered = Result(
            custom_id=item.custom_id,
            line=1,
            source="q.jsonl",
            digest=item.digest,
            attempts=1,
            completed_at=_CLOCK.utc(),
            request=item,
            reply=reply,
        )
        for form in OutputFormat:
            yield codec.encode(failed, form).rstrip()
            yield codec.encode(answered, form).rstrip()


def main() -> None:
    """Print what each target accepted and refused, and what was found; exit 1 if anything was."""
    parser = argparse.ArgumentParser(description="Mutated bytes into everything that reads what others wrote.")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    words = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts, finds = fuzz(words.inputs, words.seed, Path(folder))
    seconds = time.perf_counter() - began
    print(f"{'':18} {'accepted':>10} {'refused':>10}")
    for name in dict.fromkeys(name for name, _ in sorted(counts)):
        print(f"{name:18} {counts[name, True]:10,} {counts[name, False]:10,}")
    for find in finds[:20]:
        print(f"FOUND {find.target}: {find.error!r}\n  {find.data!r}")
    print(
        f"{words.inputs:,} inputs of seed {words.seed} in {seconds:.0f} s ({words.inputs / seconds:,.0f}/s), "
        f"{len(finds)} of them raised something else than a typed error"
    )
    sys.exit(bool(finds))


if __name__ == "__main__":
    main()
