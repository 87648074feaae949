"""A job for the torture: its input, the provider that keeps the books, its runs as processes, and what must hold.

A run is a process that can be killed at any time. It is forked from a server that has the program's modules loaded
already, so that a run costs 50 ms instead of 500 and kills hit the work and not the start; `Job.cold` is the command
for a whole interpreter. The judge goes by the input, the files and the provider's journal, and reads them without our
code.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pipeline.core.types import Result
from pipeline.results.writer import ResultWriter
from pipeline.runner import context
from pipeline.simulator import Options, serving

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "pipeline"]
MODELS = {"anthropic": "claude-haiku-5-5", "openai": "gpt-6-luna"}
HANG_SECONDS = 60  # nothing here takes a tenth of it; who needs it hangs
_SETTINGS = "sending: {backoff_initial: 0.01, backoff_max: 0.05, max_attempts: 30}\n"
_PRELOADED = [
    "pipeline.cli.main",
    "pipeline.cli.progress",
    "pipeline.cli.summary",
    "pipeline.simulator",
    "rich.console",
    "uvloop",
    __name__,
]


# ── the provider ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Paid:
    """What the provider's journal says of one answer: how often it was given, and the tokens of each."""

    times: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Provider:
    """A simulator that outlives the runs and keeps a journal of all that it was paid for."""

    url: str

    def statistics(self) -> dict[str, Any]:
        """Return what the simulator counted."""
        counts: dict[str, Any] = json.loads(self._get("statistics"))
        return counts

    def paid(self) -> dict[str, Paid]:
        """Return what was answered, by the token that each answer begins with."""
        entries = [json.loads(line) for line in self._get("journal").splitlines()]
        times = Counter(entry["answer_token"] for entry in entries)
        return {
            entry["answer_token"]: Paid(
                times=times[entry["answer_token"]],
                input_tokens=entry["usage"]["input_tokens"],
                output_tokens=entry["usage"]["output_tokens"],
            )
            for entry in entries
        }

    def environment(self) -> dict[str, str]:
        """Return the variables that send a run here."""
        return {
            "ANTHROPIC_BASE_URL": self.url,
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "ANTHROPIC_API_KEY": "any",
            "OPENAI_API_KEY": "any",
        }

    def _get(self, name: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}/simulator/{name}", timeout=HANG_SECONDS) as answer:
            content: bytes = answer.read()
            return content


@contextmanager
def providing(
    *, latency: float = 0.004, faults: Mapping[str, float] | None = None, seed: int = 0
) -> Iterator[Provider]:
    """Run a simulator with empty books, in this process: it is the runs that are killed."""
    with serving(Options(latency=latency, faults=faults or {}, seed=seed, journal=True)) as server:
        yield Provider(server.url)


# ── the job ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True)
class Job:
    """Some lines, where their results go, and how they are run.

    `folder` holds input and settings, `output` may lie on another disk. `told` collects what the totals of every run
    listed as possibly billed.
    """

    folder: Path
    output: Path
    provider: Provider
    count: int = 100
    concurrency: int = 8
    words: Sequence[str] = ()
    bodies: dict[str, dict[str, Any]] = field(default_factory=dict)
    told: dict[tuple[str, str, str, int], None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "config.yaml").write_text(_SETTINGS)
        self.bodies = {f"q-{n}": _body(f"q-{n}", n, version=0) for n in range(self.count)}
        self.write_input()

    @property
    def source(self) -> Path:
        return self.folder / "in.jsonl"

    @property
    def acknowledged(self) -> Path:
        """The file, never on the tortured disk, in which a run names what it reported as done."""
        return self.folder / "acknowledged"

    @property
    def command(self) -> list[str]:
        return [
            *("run", str(self.source), "-o", str(self.output), "--concurrency", str(self.concurrency)),
            *("--progress", "none", *self.words),
        ]

    @property
    def cold(self) -> list[str]:
        """The command as a whole, for an interpreter of its own."""
        return [sys.executable, "-m", "tests.torture.jobs", str(self.folder), *self.command]

    @property
    def environ(self) -> dict[str, str]:
        ours = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        return ours | {"PIPELINE_CONFIG": str(self.folder / "config.yaml")} | self.provider.environment()

    def write_input(self) -> None:
        """Write the input anew; each body is in its provider's own batch dialect, and so is sent as it stands."""
        self.source.write_bytes(b"".join(_line(custom_id, body) for custom_id, body in self.bodies.items()))

    def change_some(self, rng: random.Random) -> None:
        """Change the text of a tenth of the lines, which makes requests of their own of them."""
        for custom_id in rng.sample(sorted(self.bodies), max(1, self.count // 10)):
            number = int(custom_id.removeprefix("q-"))
            self.bodies[custom_id] = _body(custom_id, number, version=rng.randrange(1, 1_000_000))
        self.write_input()

    def start(self) -> BaseProcess:
        """Start a run that is forked from a warm server."""
        words = (self.command, self.environ, self.folder, self.acknowledged)
        process = _forks().Process(target=_run, args=words, daemon=True)  # does not outlive a test that fails
        process.start()
        return process

    def finish(self) -> int:
        """Let a run go to its end; return its exit code."""
        process = self.start()
        process.join(HANG_SECONDS)
        assert process.exitcode is not None, "the run hangs"
        self.note()
        return process.exitcode

    def note(self) -> None:
        """Keep in mind what the totals beside the results list as possibly billed."""
        totals = beside(self.output, ".usage.json")
        if totals.exists():
            for call in json.loads(totals.read_bytes())["possibly_billed"]:
                self.told[call["run"], call["custom_id"], call["digest"], call["attempt"]] = None

    def errors(self) -> str:
        """Return what the runs wrote on stderr."""
        return (self.folder / "stderr").read_text(errors="replace")


def beside(output: Path, suffix: str) -> Path:
    """Return the name of a file that lies beside results."""
    return output.with_name(output.stem + suffix)


def whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a file that have an end; none where there is no file."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def token_of(body: Mapping[str, Any]) -> str:
    """Return how the answer to a body begins: reckoned here once more, as the judge must not believe the judged."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"sim:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _body(custom_id: str, number: int, *, version: int) -> dict[str, Any]:
    model = MODELS["openai" if number % 2 else "anthropic"]
    message = {"role": "user", "content": f"question {custom_id} version {version}"}
    return {"model": model, "max_tokens" if number % 2 == 0 else "max_completion_tokens": 40, "messages": [message]}


def _line(custom_id: str, body: Mapping[str, Any]) -> bytes:
    if body["model"] == MODELS["openai"]:
        value = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    else:
        value = {"custom_id": custom_id, "params": body}
    return json.dumps(value).encode() + b"\n"


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _forks() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _run(words: list[str], environ: dict[str, str], folder: Path, acknowledged: Path) -> None:
    """Be the command in a forked process."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    errors = os.open(folder / "stderr", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    _be_the_command(words, acknowledged)


def _be_the_command(words: list[str], acknowledged: Path) -> None:
    from pipeline.cli import main, progress

    progress.LOG_SECONDS = 0.02  # where progress is logged, to tell a test how far a run is
    _acknowledge_to(os.open(acknowledged, os.O_WRONLY | os.O_APPEND | os.O_CREAT))
    sys.argv = ["pipeline", *words]
    main.main(words)


def _acknowledge_to(fd: int) -> None:
    """Let runs of this process write the id of each result to a file when they are told that it is done."""

    class Telling(ResultWriter):
        def __init__(self, path: Path, *, on_done: Callable[[Result], None], **rest: Any) -> None:
            def tell(result: Result) -> None:
                os.write(fd, f"{result.custom_id} {result.digest}\n".encode())
                on_done(result)

            super().__init__(path, on_done=tell, **rest)

    context.ResultWriter = Telling  # type: ignore[attr-defined]


def kill(process: BaseProcess) -> bool:
    """Kill a run and wait until it is gone; tell whether it had not ended by itself before."""
    process.kill()
    process.join(HANG_SECONDS)
    assert process.exitcode is not None
    return process.exitcode == -signal.SIGKILL


# ── the judge ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What a tortured job shows when it is finished. All but the first three must be 0.

    `repeated` are answers that were paid for again, `listed` the calls that totals name as possibly billed.
    """

    stops: int = 0
    repeated: int = 0
    listed: int = 0
    lost: int = 0  # ids of the input without a result
    duplicates: int = 0  # ids with more than one
    torn: int = 0  # lines that are not whole JSON objects
    swapped: int = 0  # answers to somebody else's request
    undone: int = 0  # lines or acknowledged ids that were on the disk and are there no more
    untold: int = 0  # answers that were paid for and that neither lines nor totals tell of
    too_many: int = 0  # listed calls of a run beyond its concurrency
    wrong_tokens: int = 0  # lines whose tokens are not those of the provider, and totals that are not their sum
    wrong_exits: int = 0  # last runs that did not end with 0

    @property
    def is_good(self) -> bool:
        return not any(getattr(self, each.name) for each in fields(self)[3:])

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})


def judge(job: Job, *, stops: int, durable: Sequence[bytes], exit_code: int) -> Verdict:
    """Compare input, files and the provider's books after a job was finished.

    `durable` are the lines that were whole in the results when runs were stopped.
    """
    lines = whole_lines(job.output)
    aside = whole_lines(beside(job.output, ".superseded.jsonl"))
    values = [value for value in map(_value, lines) if value is not None]
    is_whole = not job.output.exists() or job.output.read_bytes()[-1:] in (b"", b"\n")
    counts = Counter(value["custom_id"] for value in values)
    paid = job.provider.paid()
    return Verdict(
        stops=stops,
        repeated=sum(each.times - 1 for each in paid.values()),
        listed=len(job.told),
        lost=len(job.bodies.keys() - counts.keys()),
        duplicates=sum(count - 1 for count in counts.values()) + len(counts.keys() - job.bodies.keys()),
        torn=len(lines) - len(values) + (not is_whole),
        swapped=sum(not _is_answer_to(value, job.bodies.get(value["custom_id"], {})) for value in values),
        undone=_undone(job, durable, [*lines, *aside]),
        untold=_untold(job, paid, [*values, *filter(None, map(_value, aside))]),
        too_many=sum(max(0, n - job.concurrency) for n in Counter(base for base, *_ in job.told).values()),
        wrong_tokens=_wrong_tokens(job, paid, values),
        wrong_exits=int(exit_code != 0),
    )


def _value(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _is_answer_to(value: Mapping[str, Any], body: Mapping[str, Any]) -> bool:
    return bool(value["success"]) and str(value["content"]).startswith(token_of(body))


def _token_in(value: Mapping[str, Any]) -> str:
    return str(value["content"]).split()[0]


def _undone(job: Job, durable: Sequence[bytes], kept: Sequence[bytes]) -> int:
    there = set(kept)
    known = {(value["custom_id"], value["digest"]) for value in map(_value, kept) if value}
    told = [tuple(line.decode().split()) for line in whole_lines(job.acknowledged)]
    return len(set(durable) - there) + sum(name not in known for name in told)


def _untold(job: Job, paid: Mapping[str, Paid], values: Sequence[Mapping[str, Any]]) -> int:
    """Count the answers that were given beyond those that lines tell of and that no totals list, id by id."""
    tokens = {value["digest"]: _token_in(value) for value in values}
    told = Counter(tokens.get(digest, custom_id) for _, custom_id, digest, _ in job.told)
    for value in values:
        told[_token_in(value)] += 1 + sum(each["may_be_billed"] for each in value.get("failed_attempts", ()))
    extra = Counter({token: each.times for token, each in paid.items()}) - told
    # What was changed before it had a line is known by its id alone.
    return max(0, extra.total() - sum(count for name, count in told.items() if name not in paid))


def _wrong_tokens(job: Job, paid: Mapping[str, Paid], values: Sequence[Mapping[str, Any]]) -> int:
    totals = json.loads(beside(job.output, ".usage.json").read_bytes())["results"]["tokens"]
    wrong = sum(
        (value["usage"]["input_tokens"], value["usage"]["output_tokens"]) != (each.input_tokens, each.output_tokens)
        for value in values
        if (each := paid.get(_token_in(value)))
    )
    sums = [sum(value["usage"][f"{name}_tokens"] for value in values) for name in ("input", "output")]
    return wrong + (sums != [totals["input"], totals["output"]])


if __name__ == "__main__":
    _be_the_command(sys.argv[2:], Path(sys.argv[1]) / "acknowledged")
