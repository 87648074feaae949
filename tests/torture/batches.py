"""The batch lane killed, cut off and lied to: is a request lost, a batch made twice, or an answer paid for twice?

    python -m tests.torture.batches --trials 100 --seed 1        every step, then jobs at random: some 15 minutes

Every trial is a job of its own against a simulator of its own, which keeps the books of all batches and outlives the
runs. What befalls a run is a fault of one operation (`hang`: it is done, and nobody hears of it), SIGKILL when the
books show that the operation was carried out, or both, or SIGKILL at any time. Then the same command is repeated until
it ends by itself. Some trials go on at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from pipeline import Config, TryLaterError
from pipeline.accounting.verify import verify
from pipeline.simulator import Options, serving
from tests.torture import jobs
from tests.torture.jobs import MODELS, Job, Provider, beside, whole_lines
from tests.torture.syscalls import trace

Counts = Mapping[str, Any]
Subprocess = subprocess.Popen[bytes]

HANG_SECONDS = 200  # nothing here takes a quarter of it; who needs it hangs
AT_ONCE = 12  # they wait more than they work
OPERATIONS = {
    "openai": ("upload", "create", "poll", "results", "cancel"),
    "anthropic": ("create", "poll", "results", "cancel"),
}
TROUBLES = ("lost", "500-done", "reset", "500", "429")
CUTS = tuple(f"cut:0.{tenth}" for tenth in range(1, 10))
CUTS_AND_KILLS = (*CUTS[::2], "hang", *CUTS[1::2], "hang", "cut:0.5")
CUTS_AND_ERRORS = ("cut:0.5", "500", "cut:0.5", "lost", "429", "cut:0.5", "reset", "cut:0")
RESULTS, JOURNAL, ANY = "out.jsonl", "out.batches/journal.jsonl", ""
SYSTEM_CALLS = {  # on which file, and the most that a thread makes in a run
    ("write", JOURNAL): 8,
    ("fdatasync", JOURNAL): 8,
    ("fdatasync", RESULTS): 2,
    ("fdatasync", ANY): 30,
    ("fsync", ANY): 8,
    ("rename", ANY): 3,
    ("unlink", ANY): 6,
    ("write", ANY): 50,
}
_FOREVER = 100_000.0
_KILLS_OF_A_JOB = 6


# ── the job ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def providing(*, batch_seconds: float = 0.5, faults: Mapping[str, Sequence[str]] | None = None) -> Iterator[Provider]:
    """Run a simulator with empty books and these faults of operations on batches."""
    with serving(Options(batch_seconds=batch_seconds, batch_faults=faults or {}, journal=True)) as server:
        yield Provider(server.url)


@dataclass(kw_only=True)
class BatchJob(Job):
    """A job that is sent in batches of `size` requests; its lines go to each of `protocols` by turns.

    A run is a process of its own, in a session of its own. `durable` are the lines that were whole in the results when
    runs were killed.
    """

    output: Path = field(init=False)
    protocols: Sequence[str]
    size: int = 10
    subject: str = "question"
    lane: str = "batch"
    key: str = "any"
    timeout: float = 1.0  # short: it tells how long a batch is looked for before it is made again
    count: int = 20
    durable: dict[bytes, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output = self.folder / "out.jsonl"
        settings = {
            "sending": {"timeout": self.timeout, "backoff_initial": 0.01, "backoff_max": 0.05, "max_attempts": 30},
            "batches": {"max_requests": self.size, "poll_interval": 1},
        }
        (self.folder / "config.yaml").write_text(json.dumps(settings))
        protocols = {f"q-{n}": self.protocols[n % len(self.protocols)] for n in range(self.count)}
        self.bodies = {name: _body(protocol, f"{self.subject} {name}") for name, protocol in protocols.items()}
        self.write_input()

    @property
    def command(self) -> list[str]:
        return [*super().command, "--lane", self.lane]

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.sqlite"

    @property
    def environ(self) -> dict[str, str]:
        keys = {"ANTHROPIC_API_KEY": self.key, "OPENAI_API_KEY": self.key}
        return super().environ | keys | {"PIPELINE_LEDGER": str(self.ledger)}

    @property
    def needed(self) -> int:
        """How many batches the input makes."""
        requests = Counter(body["model"] for body in self.bodies.values())
        return sum(-(-each // self.size) for each in requests.values())

    def counts(self) -> Counts:
        """Return what the provider counted of batches."""
        counts: Counts = self.provider.statistics()["batches"]
        return counts

    def unproven(self) -> int:
        """Return how many problems `pipeline verify` finds in the files."""
        return verify(self.output, [str(self.source)], Config(), ledger=self.ledger).problems.total()

    def begin(self) -> Subprocess:
        """Start a run."""
        with (self.folder / "stderr").open("ab") as errors:
            return subprocess.Popen(
                self.cold, cwd=self.folder, env=self.environ, stdout=errors, stderr=errors, start_new_session=True
            )

    def end(self, process: Subprocess) -> int:
        """Wait until a run has ended; return its exit code, a signal as a negative number."""
        try:
            return process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            kill(process)
            raise AssertionError(f"the run hangs:\n{self.errors()}") from None

    def finish(self) -> int:
        exit_code = self.end(self.begin())
        self.note()
        return exit_code

    def kill(self, process: Subprocess) -> bool:
        """Kill a run, and keep in mind what it left; tell whether it had not ended by itself before."""
        was_killed = kill(process)
        self.note()
        self.durable.update(dict.fromkeys(line for line in whole_lines(self.output) if line.startswith(b"{")))
        return was_killed

    def wait(self, process: Subprocess, is_so: Callable[[Counts], bool]) -> bool:
        """Wait until the provider's counts show something; tell whether that was before the end of the run."""
        for _ in range(int(HANG_SECONDS / 0.01)):
            if is_so(self.counts()):
                return True
            if process.poll() is not None:
                return False
            time.sleep(0.01)
        kill(process)
        raise AssertionError(f"the run does not come so far:\n{self.counts()}\n{self.errors()}")


def kill(process: Subprocess) -> bool:
    """Kill a run and all that it started; tell whether it had not ended by itself before."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait(HANG_SECONDS) == -signal.SIGKILL


def _body(protocol: str, text: str) -> dict[str, Any]:
    limit = "max_tokens" if protocol == "anthropic" else "max_completion_tokens"
    return {"model": MODELS[protocol], limit: 40, "messages": [{"role": "user", "content": text}]}


# ── the judge ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What tortured jobs show when they are finished. All from `double` on must be 0."""

    trials: int = 0
    kills: int = 0
    requests: int = 0
    batches: int = 0
    double: int = 0  # batches made beyond those that the input wants, or too few
    paid_again: int = 0  # answers that the provider gave a second time
    miscounted: int = 0  # sums in the totals that are not the provider's
    unproven: int = 0  # results that `pipeline verify` does not prove
    untidy: int = 0  # what is left of chunks, tracebacks, and calls that are listed as possibly billed
    strangers: int = 0  # runs that read a result of a request that nobody sent
    lost: int = 0  # the rest as in `jobs.Verdict`
    duplicates: int = 0
    torn: int = 0
    swapped: int = 0
    undone: int = 0
    untold: int = 0
    wrong_tokens: int = 0
    wrong_exits: int = 0

    @property
    def is_good(self) -> bool:
        return not any(getattr(self, each.name) for each in fields(self)[4:])

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})


def judge(job: BatchJob, *, kills: int, exit_code: int) -> Verdict:
    """Compare input, files and the provider's books after a job was finished."""
    has_totals = beside(job.output, ".usage.json").exists()
    assert has_totals, f"the last run left no totals and ended with {exit_code}:\n{job.errors()}"
    files = jobs.judge(job, stops=kills, durable=list(job.durable), exit_code=exit_code)
    counts = job.provider.statistics()
    created = counts["batches"]["created"]
    # What was cancelled may go into another batch; that it is not answered twice is counted too.
    wanted = max(created, job.needed) if counts["batches"]["cancelled"] else job.needed
    left = {path.name for path in beside(job.output, ".batches").iterdir()} - {"journal.jsonl"}
    errors = job.errors()
    return Verdict(
        trials=1,
        kills=kills,
        requests=job.count,
        batches=created,
        double=abs(created - wanted),
        paid_again=counts["duplicates_paid"],
        miscounted=_miscounted(job, counts),
        unproven=job.unproven(),
        untidy=len(left) + errors.count("Traceback") + len(job.told),
        strangers=errors.count("requests that were not sent"),
        **{each.name: getattr(files, each.name) for each in fields(Verdict)[-8:]},
    )


def _miscounted(job: BatchJob, counts: Counts) -> int:
    """Count the sums of requests and tokens of a model and lane in which totals and provider differ."""
    totals = json.loads(beside(job.output, ".usage.json").read_bytes())["results"]
    told: Counter[tuple[str, ...]] = Counter()
    for row in totals["by_model"]:
        told[row["model"], row["lane"], "requests"] = row["requests"]
        told.update({(row["model"], row["lane"], name): row["tokens"][name] for name in ("input", "output")})
    true: Counter[tuple[str, ...]] = Counter()
    for model, sums in counts["by_model"].items():
        in_batches = counts["batches"]["by_model"].get(model, dict.fromkeys(sums, 0))
        for name, key in (("requests", "requests"), ("input", "input_tokens"), ("output", "output_tokens")):
            true[model, "batch", name] = in_batches[key]
            true[model, "live", name] = sums[key] - in_batches[key]
    return sum(told[name] != true[name] for name in told | true)


# ── the trials ────────────────────────────────────────────────────────────────────────────────────────────────────

Trial = Callable[[Path], Verdict]


def kill_at(protocol: str, operation: str, faults: Sequence[str], folder: Path) -> Verdict:
    """Kill a run when calls of an operation were carried out, of which some `hang`, and finish the job.

    A batch is cancelled since it will not have ended by its deadline; the rest of it goes live. It is made by a run
    before, so that it is there by the deadline however slow the machine is.
    """
    is_late = operation == "cancel"
    with providing(batch_seconds=_FOREVER if is_late else 0.5, faults={operation: faults}) as provider:
        job = BatchJob(folder=folder, provider=provider, protocols=[protocol])
        if is_late:
            job = BatchJob(folder=folder, provider=provider, protocols=[protocol], lane="auto", timeout=20)
            job.words = ["--no-wait"]
            assert job.finish() == TryLaterError.exit_code, job.errors()
            job.words = ["--deadline", "3s"]
        process = job.begin()
        assert job.wait(process, partial(_was_done, operation, len(faults))), f"the run ended early:\n{job.errors()}"
        kills = int(job.kill(process))
        return judge(job, kills=kills, exit_code=job.finish())


def kill_at_call(protocol: str, call: str, file: str, n: int, folder: Path) -> Verdict:
    """Kill a run as a thread enters its n-th system call of a kind on a file; no kill if none has so many."""
    with providing(batch_seconds=0.2) as provider:
        job = BatchJob(folder=folder, provider=provider, protocols=[protocol])
        words = ["-f", "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={n}"]
        struck = trace(job, *words, *(["-P", str(folder / file)] if file else []))
        return judge(job, kills=int(struck.exit_code == -signal.SIGKILL), exit_code=job.finish())


def endure(protocol: str, faults: Mapping[str, Sequence[str]], batch_seconds: float, folder: Path) -> Verdict:
    """Let calls fail, some of them after they were carried out; a run copes with that alone."""
    with providing(batch_seconds=batch_seconds, faults=faults) as provider:
        job = BatchJob(folder=folder, provider=provider, protocols=[protocol])
        verdict = judge(job, kills=0, exit_code=job.finish())
        assert all(job.counts()["calls"][name] >= len(each) for name, each in faults.items()), "faults were not met"
    return verdict


def cut(protocol: str, cuts: Sequence[str], folder: Path) -> Verdict:
    """Cut downloads of results, each at a share of its bytes; where one hangs instead the run is killed."""
    with providing(faults={"results": cuts}) as provider:
        job = BatchJob(folder=folder, provider=provider, protocols=[protocol], count=300, size=300)
        kills = 0
        for number, each in enumerate(cuts, start=1):
            if each == "hang":
                process = job.begin()
                job.wait(process, partial(_was_done, "results", number))
                kills += job.kill(process)
        verdict = judge(job, kills=kills, exit_code=job.finish())
        assert job.counts()["calls"]["results"] > len(cuts), "not all cuts were met"
    return verdict


def side_by_side(protocol: str, faults: Sequence[str], folder: Path) -> Verdict:
    """Let two jobs with one key make batches of the same size at the same time, and lose sight of some of them."""
    with providing(batch_seconds=2.0, faults={"create": faults}) as provider:
        some = []
        for subject in ("question", "riddle"):
            (folder / subject).mkdir()
            job = BatchJob(folder=folder / subject, provider=provider, protocols=[protocol], subject=subject)
            some.append((job, job.begin()))
        exit_codes = [job.end(process) for job, process in some]
        counts = provider.statistics()
    return Verdict(
        trials=1,
        requests=sum(job.count for job, _ in some),
        batches=counts["batches"]["created"],
        double=abs(counts["batches"]["created"] - sum(job.needed for job, _ in some)),
        paid_again=counts["duplicates_paid"],
        unproven=sum(job.unproven() for job, _ in some),
        strangers=sum(job.errors().count("requests that were not sent") for job, _ in some),
        wrong_exits=sum(code != 0 for code in exit_codes),
    )


def kill_often(protocols: Sequence[str], seed: str, kills: int, folder: Path) -> Verdict:
    """Kill runs of a job of 600 lines, so many of them, while they work or go on with what was killed."""
    rng = random.Random(seed)
    with providing(batch_seconds=rng.choice([0.2, 0.5, 1.5])) as provider:
        size = rng.choice([50, 75, 110])
        job = BatchJob(folder=folder, provider=provider, protocols=protocols, count=600, size=size)
        done = sum(_kill_at_some_time(job, rng) for _ in range(kills))
        return judge(job, kills=done, exit_code=job.finish())


def storm(protocols: Sequence[str], seed: str, kills: int, folder: Path) -> Verdict:
    """Kill runs whose calls fail in every way, and whose batches may last longer than the wait for a lost answer."""
    rng = random.Random(seed)
    names = [*OPERATIONS["openai"], "list"]
    faults = {name: [rng.choice(["ok", "ok", "hang", *TROUBLES]) for _ in range(12)] for name in names}
    faults["results"] += rng.choices(CUTS, k=6)
    rng.shuffle(faults["results"])
    with providing(batch_seconds=rng.choice([0.5, 2.5, 8.0]), faults=faults) as provider:
        size = rng.choice([5, 7, 10, 20])
        job = BatchJob(folder=folder, provider=provider, protocols=protocols, count=40, size=size)
        done = sum(_kill_at_some_time(job, rng) for _ in range(kills))
        return judge(job, kills=done, exit_code=job.finish())


def _kill_at_some_time(job: BatchJob, rng: random.Random) -> bool:
    """Kill a run at a random time, or after a random number of calls; tell whether it had not ended before."""
    process = job.begin()
    if rng.random() < 0.5:
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.3, 1.5))
    else:
        job.wait(process, partial(_has_calls, _calls(job.counts()) + rng.randint(1, job.needed)))
    return job.kill(process)


def _was_done(operation: str, times: int, counts: Counts) -> bool:
    """Tell whether an operation was carried out so many times, as far as its effect is counted."""
    effect = {"upload": "uploads", "create": "created"}.get(operation)
    done: int = counts[effect] if effect else counts["calls"][operation]
    return done >= times


def _has_calls(calls: int, counts: Counts) -> bool:
    return _calls(counts) >= calls


def _calls(counts: Counts) -> int:
    return sum(counts["calls"].values())


def together(trials: Mapping[str, Trial], folder: Path) -> dict[str, Verdict]:
    """Try all, some at the same time; return the verdicts by the names of the trials."""

    def attempt(number: int, name: str, trial: Trial) -> Verdict:
        own = folder / f"job-{number}"
        own.mkdir()
        try:
            return trial(own)
        except BaseException as exc:
            exc.add_note(f"in the trial {name!r}, in {own}")
            raise

    with ThreadPoolExecutor(max_workers=AT_ONCE) as threads:
        futures = {
            name: threads.submit(attempt, number, name, trial) for number, (name, trial) in enumerate(trials.items())
        }
    return {name: future.result() for name, future in futures.items()}


# ── what is tried ─────────────────────────────────────────────────────────────────────────────────────────────────


def steps(*orders: Sequence[str]) -> dict[str, Trial]:
    """Return a kill at every operation, whose calls for two chunks are answered or hang in each of these orders.

    Only when both are being cancelled no request is on its way live, where a kill may cost a call.
    """
    return {
        f"{protocol}: killed at {operation}, {' '.join(faults)}": partial(kill_at, protocol, operation, faults)
        for protocol, operations in OPERATIONS.items()
        for operation, faults in product(operations, orders)
        if operation != "cancel" or list(faults) == ["hang", "hang"]
    }


def system_calls(most: Mapping[tuple[str, str], int], step: int = 1) -> dict[str, Trial]:
    """Return a kill at each system call that changes files, or at every so many-th."""
    return {
        f"{protocol}: killed at {call} {n} of {file or 'any file'}": partial(kill_at_call, protocol, call, file, n)
        for protocol, ((call, file), last) in product(OPERATIONS, most.items())
        for n in range(1, last + 1, step)
    }


def troubles(*operations: str, times: int, seconds: float) -> dict[str, Trial]:
    """Return each trouble with all these operations, so many times in a row, where batches last so long."""
    return {
        f"{protocol}: {times} × {trouble} at {' and '.join(met)}": partial(
            endure, protocol, dict.fromkeys(met, [trouble] * times), seconds
        )
        for protocol, known in OPERATIONS.items()
        for trouble in (*TROUBLES, "hang")
        if (met := [each for each in operations if each in known])
    }


def cuts(*orders: Sequence[str]) -> dict[str, Trial]:
    """Return downloads that are cut in each of these orders."""
    return {
        f"{protocol}: results {' '.join(order)}": partial(cut, protocol, order)
        for protocol, order in product(OPERATIONS, orders)
    }


def pairs(*orders: Sequence[str]) -> dict[str, Trial]:
    """Return jobs side by side whose batches nobody could tell from each other by their size."""
    return {
        f"{protocol}: two jobs, {' '.join(order)}": partial(side_by_side, protocol, order)
        for protocol, order in product(OPERATIONS, orders)
    }


def at_random(number: int, seed: int) -> dict[str, Trial]:
    """Return jobs that are killed at random, half of them in a storm, for one provider, the other, and both."""
    protocols = (["openai"], ["anthropic"], ["openai", "anthropic"])
    kinds = ((kill_often, "killed"), (storm, "storm"))
    return {
        f"{seed}-{n}: {'+'.join(protocols[n % 3])} {name}": partial(
            kind, protocols[n % 3], f"{seed}-{n}", _KILLS_OF_A_JOB
        )
        for n in range(number)
        for kind, name in [kinds[n // 3 % 2]]
    }


# ── the long form ─────────────────────────────────────────────────────────────────────────────────────────────────


def _row(name: str, verdict: Verdict) -> str:
    wrong = [f"{getattr(verdict, each.name):,} {each.name.replace('_', ' ')}" for each in fields(verdict)[4:]]
    found = ", ".join(text for text in wrong if not text.startswith("0 ")) or "nothing wrong"
    counts = (verdict.trials, verdict.kills, verdict.requests, verdict.batches)
    return f"{name:<42}" + "".join(f"{count:>9,}" for count in counts) + f"   {found}"


def _main() -> int:
    parser = argparse.ArgumentParser(description="Kill and cut off runs in the batch lane, and judge what is left.")
    parser.add_argument("--trials", type=int, default=100, help="jobs that are killed at random times")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    groups = {
        "kill -9 at every operation": steps(["hang"], ["ok", "hang"], ["hang", "hang"]),
        "kill -9 at every system call": system_calls(SYSTEM_CALLS),
        "an upload lost or failing": troubles("upload", times=1, seconds=0.5),
        "a create lost or failing": troubles("create", times=1, seconds=8.0),
        "several of any lost or failing": troubles("upload", "create", "poll", "results", times=2, seconds=0.5),
        "downloads cut at every tenth": cuts(CUTS, CUTS[::-1], CUTS_AND_KILLS, CUTS_AND_ERRORS),
        "two jobs with one key": pairs(["lost"] * 4, ["hang"] * 4, ["lost", "ok", "hang", "500-done"]),
        "kill -9 at random, half of them in storms": at_random(options.trials, options.seed),
    }
    print(f"seed {options.seed}\n{'':<42}" + "".join(f"{word:>9}" for word in ("jobs", "kills", "requests", "batches")))
    total = Verdict()
    for name, trials in groups.items():
        with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
            verdicts = together(trials, Path(scratch))
        summed = sum(verdicts.values(), Verdict())
        total += summed
        print(_row(name, summed), flush=True)
        for trial, verdict in verdicts.items():
            if not verdict.is_good:
                print(_row(f"  {trial}", verdict), flush=True)
    print(_row("all", total))
    return 0 if total.is_good else 1


if __name__ == "__main__":
    sys.exit(_main())
