"""One run of the program against the chaos server: records in, results and both sides' books out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import anyio
import orjson
import pytest

import pipeline
from pipeline import Config
from pipeline.runner.run import Watch
from pipeline.runner.summary import Summary
from tests.torture import check, truth
from tests.torture.chaos import Server
from tests.torture.faults import FAULTS, PROTOCOLS, End, Fault

ROOT = Path(__file__).parents[2]
KEY = "sk-CANARY-7Qm2xVt9LrWc4ZbNhK8sYpJd3Gf6"
KEY_VARIABLE = "CHAOS_API_KEY"
TIMEOUT = 20.0
SHORT_TIMEOUT = 1.0  # where it is meant to be met
MAX_ATTEMPTS = 3
HANG_SECONDS = 100.0
_LOOKS, _LOOK_SECONDS = 50, 0.1  # at books that are not up to date yet
SENDING: Mapping[str, Any] = {
    "concurrency": 400,
    "timeout": TIMEOUT,
    "connect_timeout": TIMEOUT,
    "max_attempts": MAX_ATTEMPTS,
    "backoff_initial": 0.01,
    "backoff_max": 0.05,
    "max_retry_after": 20.0,
    "stall_timeout": 30.0,
    "max_response_bytes": 1_000_000,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A line of input, and what the server does to it: one fault for each attempt, then none.

    Each `lane` is a provider with an address of its own, so one lane's broken connections are no other's.
    """

    id: str
    lane: str
    protocol: str
    faults: Sequence[str] = ()
    model: str = "model"

    def line(self) -> dict[str, Any]:
        messages = [{"role": "user", "content": truth.prompt(self.id)}]
        limit = {"max_tokens": 100} if self.protocol == "anthropic" else {}
        return {"custom_id": self.id, "provider": self.lane, "model": self.model, "messages": messages, **limit}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a run left behind. `summary` is None where it was a process."""

    records: Sequence[Record]
    input: Path
    output: Path
    journal: Path
    summary: Summary | None = None
    verdict: check.Verdict = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verdict", self._judge())

    @classmethod
    def of_files(cls, folder: Path, journal: Path, records: Sequence[Record]) -> Trial:
        """Return what a process left behind."""
        return cls(records=records, input=folder / "in.jsonl", output=folder / "out.jsonl", journal=journal)

    @cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        lines = map(orjson.loads, self.output.read_bytes().splitlines())
        return {line["custom_id"]: line for line in lines}

    @cached_property
    def calls(self) -> list[check.Object]:
        return check.calls(self.journal)

    def calls_for(self, record: Record) -> int:
        return sum(call["id"] == record.id for call in self.calls)

    def _judge(self) -> check.Verdict:
        """Judge by the server's books; it notes the end of an answer a moment after the last byte has left."""
        verdict = self._check()
        for _ in range(_LOOKS):
            if not verdict.false_successes:
                break
            time.sleep(_LOOK_SECONDS)
            verdict = self._check()
        return verdict

    def _check(self) -> check.Verdict:
        usage = self.output.with_name(self.output.stem + ".usage.json")
        is_partial = bool(self.summary and self.summary.pending)
        return check.check_files(self.input, self.output, [self.journal], usage, is_partial=is_partial)


def records(fault: Fault, protocol: str) -> list[Record]:
    """Return the records that try a fault: met once, met twice, never, and, where that ends, for ever."""
    once, twice, never, for_ever = [fault.name], [fault.name] * 2, list[str](), [fault.name] * (2 * MAX_ATTEMPTS)
    # After a refusal a lane creeps, as it should: two are enough to see that it goes on.
    scripts = [once, never] if fault.is_refusal else [once, once, once, twice, never]
    if fault.may_poison:
        scripts.append(for_ever)
    lane = f"{fault.name}.{protocol}"
    return [
        Record(id=f"{lane}.{number}", lane=lane, protocol=protocol, faults=faults)
        for number, faults in enumerate(scripts, 1)
    ]


def matrix(*ends: End) -> list[tuple[Fault, str]]:
    """Return every fault that ends so, with every protocol."""
    return [(fault, protocol) for fault in FAULTS.values() if fault.end in ends for protocol in PROTOCOLS]


def ids(cases: Iterable[tuple[Fault, str]]) -> list[str]:
    """Return the names of cases for pytest."""
    return [f"{fault.name}-{protocol}" for fault, protocol in cases]


def script(records: Iterable[Record]) -> dict[str, Sequence[str]]:
    """Return what the server does to each record."""
    return {record.id: record.faults for record in records}


def write_input(path: Path, records: Iterable[Record]) -> Path:
    path.write_text("".join(json.dumps(record.line()) + "\n" for record in records))
    return path


def settings(server: Server, records: Iterable[Record], **sending: Any) -> dict[str, Any]:
    """Return a configuration in which every lane is a provider with an address of its own at the server."""
    lanes = {record.lane: record.protocol for record in records}
    providers = {lane: endpoint(server.open(), protocol) for lane, protocol in lanes.items()}
    return {"providers": providers, "sending": {**SENDING, **sending}}


def endpoint(url: str, protocol: str) -> dict[str, str]:
    """Return the entry of a provider."""
    base = url if protocol == "anthropic" else f"{url}/v1"
    return {"protocol": protocol, "base_url": base, "api_key_env": KEY_VARIABLE}


def process(
    folder: Path,
    records: Iterable[Record],
    settings: dict[str, Any],
    *,
    module: str = "pipeline",
    prefix: Sequence[str] = (),
    key: str = KEY,
) -> subprocess.CompletedProcess[bytes]:
    """Run the command as a process, with its files in `folder`."""
    write_input(folder / "in.jsonl", records)
    (folder / "config.yaml").write_text(json.dumps(settings))
    files = ["in.jsonl", "-o", "out.jsonl", "-c", "config.yaml"]
    return subprocess.run(
        [*prefix, sys.executable, "-m", module, "run", *files],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), KEY_VARIABLE: key},
        capture_output=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def run(
    folder: Path, journal: Path, records: Sequence[Record], settings: dict[str, Any], watch: Watch | None = None
) -> Trial:
    """Run the program in this process to its end, which must come; the results are those in `folder`."""
    input, output = write_input(folder / "in.jsonl", records), folder / "out.jsonl"
    config = Config.model_validate(settings)

    async def work() -> Summary:
        with anyio.fail_after(HANG_SECONDS):
            return await pipeline.run_batch([input], output=output, config=config, watch=watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, KEY)
        summary = anyio.run(work)
    return Trial(records=records, input=input, output=output, journal=journal, summary=summary)
