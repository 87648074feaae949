"""Kills and errors at the n-th system call on the output's files, by strace.

    python -m tests.torture.syscalls [--json FILE]        every point: some 15 minutes

Every point is struck in a job that has everything to do: it goes on from results with a torn tail and changed lines,
sends, and puts the results in order. strace counts each kind of call and each thread by itself, so the main thread,
which writes the totals, is struck in a second series in which only it is traced.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count, product
from pathlib import Path

from tests.torture.jobs import HANG_SECONDS, Job, Verdict, beside, judge, providing, whole_lines
from tests.torture.kill import table

CALLS = ("write", "fdatasync", "fsync", "rename", "openat", "ftruncate", "unlink")
SYNCS = ("fdatasync", "fsync")
_SUFFIXES = (".jsonl", ".attempts.jsonl", ".usage.json", ".superseded.jsonl", ".torn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """How a traced run ended (a signal is a negative number), and what strace wrote, line by line."""

    exit_code: int
    log: Sequence[str]

    def calls(self, *names: str) -> list[str]:
        """Return the lines of some system calls."""
        return [line for line in self.log if re.match(rf"\d*\s*({'|'.join(names)})\(", line)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An error of some system calls on one of the output's files, from the n-th on."""

    suffix: str
    calls: Sequence[str]
    error: str
    at: int

    def __str__(self) -> str:
        return f"{self.suffix} {'/'.join(self.calls)} {self.error} from {self.at}"


def trace(job: Job, *words: str) -> Traced:
    """Run a job under strace with some of its options."""
    log = job.folder / "strace"
    done = subprocess.run(
        ["strace", "-qq", "-o", str(log), *words, *job.cold],
        cwd=job.folder,
        env=job.environ,
        capture_output=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    with (job.folder / "stderr").open("ab") as errors:
        errors.write(done.stderr)
    job.note()
    return Traced(exit_code=done.returncode, log=log.read_text(errors="replace").splitlines())


def strike(job: Job, inject: str, *suffixes: str, follows: bool = True) -> Traced:
    """Run a job with an injection into calls on files beside its results, under their first names too; all if none."""
    named = [beside(job.output, suffix) for suffix in suffixes or _SUFFIXES]
    paths = [*named, *(path.with_name(path.name + ".tmp") for path in named)]
    paths += [] if suffixes else [job.output.parent]
    expressions = [f"trace={','.join(CALLS)}", f"inject={inject}"]
    return trace(
        job,
        *(["-f"] if follows else []),
        *(word for expression in expressions for word in ("-e", expression)),
        *(word for path in paths for word in ("-P", str(path))),
    )


@contextmanager
def half_done(folder: Path) -> Iterator[Job]:
    """Make a job whose next run has everything to do: to repair, to send, to set aside and to put in order."""
    folder.mkdir()
    (folder / "out").mkdir()
    with providing(latency=0.001) as provider:
        job = Job(folder=folder, output=folder / "out" / "out.jsonl", provider=provider, count=24, concurrency=4)
        job.words = ["--limit", "12"]
        assert job.finish() == 0, job.errors()
        job.change_some(random.Random(1))
        with job.output.open("ab") as results:
            results.write(b'{"custom_id":"q-torn","li')
        job.words = ["--ordered"]
        yield job


def kill_at(folder: Path, call: str, n: int, *, follows: bool = True) -> Verdict:
    """Kill a run as it enters its n-th call of a kind, finish the job and judge; no stop if it did not come so far.

    Unless it `follows`, only the main thread's calls count.
    """
    with half_done(folder) as job:
        before = [line for line in whole_lines(job.output) if line]
        struck = strike(job, f"{call}:signal=KILL:when={n}", follows=follows)
        durable = [*before, *(line for line in whole_lines(job.output) if line.startswith(b"{"))]
        exit_code = job.finish()
        return judge(job, stops=int(struck.exit_code != 0), durable=durable, exit_code=exit_code)


def fail_at(folder: Path, fault: Fault) -> tuple[Traced, list[str], Verdict]:
    """Let calls on one file fail, then finish the job without faults; say what was wrong, and judge."""
    with half_done(folder) as job:
        before = job.output.read_bytes()
        traced = strike(job, f"{','.join(fault.calls)}:error={fault.error}:when={fault.at}+", fault.suffix)
        was_struck = any("INJECTED" in line for line in traced.log)
        wrong = list(_wrong_after(job, traced, before)) if was_struck else []
        durable = [line for line in whole_lines(job.output) if line.startswith(b"{")]
        exit_code = job.finish()
        return traced, wrong, judge(job, stops=int(was_struck), durable=durable, exit_code=exit_code)


def _wrong_after(job: Job, traced: Traced, before: bytes) -> Iterator[str]:
    """Yield what an error of the storage must not lead to; a file that could not be repaired is as it was `before`."""
    if traced.exit_code != 5:
        yield f"exit {traced.exit_code} instead of 5"
    after = job.output.read_bytes()
    if after != before and not after.endswith(b"\n"):
        yield "the results do not end with a whole line"
    syncs = traced.calls(*SYNCS)
    first = next((n for n, line in enumerate(syncs) if "INJECTED" in line), len(syncs))
    if syncs[first + 1 :]:
        yield f"synced again after a failure: {syncs[first + 1]}"


# ── the long form ─────────────────────────────────────────────────────────────────────────────────────────────────


def _all_kills(scratch: Path) -> Verdict:
    total = Verdict()
    for call, follows in product(CALLS, (True, False)):
        for n in count(1):
            verdict = kill_at(scratch / f"kill-{call}-{follows}-{n}", call, n, follows=follows)
            if not verdict.stops:
                break
            total += verdict
            if not verdict.is_good:
                print(f"kill at {call} {n} ({'all threads' if follows else 'main thread'}): {verdict}", flush=True)
    return total


def _all_errors(scratch: Path) -> tuple[int, Verdict]:
    """Return how many runs ended wrongly, and the verdict on the jobs."""
    total, wrong = Verdict(), 0
    kinds = [(("write",), error) for error in ("ENOSPC", "EIO", "EDQUOT")] + [(SYNCS, "EIO"), (("openat",), "ENOSPC")]
    for suffix, (calls, error) in product((".jsonl", ".attempts.jsonl", ".usage.json"), kinds):
        for n in count(1):
            fault = Fault(suffix=suffix, calls=calls, error=error, at=n)
            traced, faults, verdict = fail_at(scratch / f"fail-{suffix}-{calls[0]}-{error}-{n}", fault)
            if not verdict.stops:
                break
            wrong += bool(faults)
            total += verdict
            if faults or not verdict.is_good:
                print(f"{fault}: exit {traced.exit_code}; {faults}; {verdict}", flush=True)
    return wrong, total


def _main() -> int:
    parser = argparse.ArgumentParser(description="Kill runs, or let calls fail, at every system call on their files.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        killed = _all_kills(Path(scratch))
        print(f"kills, each at another point:\n{table(killed)}", flush=True)
        wrong, failed = _all_errors(Path(scratch))
        print(f"errors, each at another point; {wrong:,} ended wrongly:\n{table(failed)}")
    is_good = killed.is_good and failed.is_good and not wrong
    if options.json:
        numbers = {
            "name": "syscalls",
            "is_good": is_good,
            "killed": asdict(killed),
            "wrong_after_errors": wrong,
            "failed": asdict(failed),
        }
        options.json.write_text(json.dumps(numbers) + "\n")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(_main())
