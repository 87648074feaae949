"""All long forms in one command, and one table of what they found.

    python -m tests.torture.scoreboard build/scoreboard            everything: an hour or two
    python -m tests.torture.scoreboard build/scoreboard --short    a few minutes; proves that it works, not the program

Each form runs as a process of its own and prints its numbers; what it printed is kept in the folder, one file for each,
and `scoreboard.md` sums it up. A form that found anything wrong ends with another exit code than 0 and is BROKEN here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

_COUNTS = {
    "stops": "stops",
    "repeated": "calls repeated",
    "listed": "listed",
    "lost": "lost",
    "duplicates": "doubled",
    "torn": "torn",
    "untold": "not listed",
    "too_many": "more than in flight",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A long form: what it tries, and the words of its command, short and long.

    `tells` is the beginning of the line of its output that says the result, "" for the last; a form that writes its
    counts as JSON is asked for them instead.
    """

    name: str
    what: str
    words: Sequence[str]
    long: Sequence[str] = ()
    short: Sequence[str] = ()
    writes_json: bool = False


_PYTEST = ("pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not long", "-n", "0")
FORMS = (
    Form(
        name="kill",
        what="kill -9 at random times, recovering and tidying included",
        words=["tests.torture.kill", "--seed", "1", "--kills"],
        long=["1000"],
        short=["16"],
        writes_json=True,
    ),
    Form(
        name="powercut",
        what="power cuts: an ext4 file system that forgets what was not synced (root)",
        words=["tests.torture.powercut", "--seed", "1", "--cuts"],
        long=["200"],
        short=["3"],
        writes_json=True,
    ),
    Form(
        name="syscalls",
        what="every system call on the output's files killed, and failed with ENOSPC, EIO, EDQUOT",
        words=["tests.torture.syscalls"],
        writes_json=True,
    ),
    Form(
        name="faults",
        what="160 faults of servers, both protocols, drawn by lot; an independent checker against the server's journal",
        words=["tests.torture.histories", "--records"],
        long=["2000", "--rounds", "5"],
        short=["200"],
    ),
    Form(
        name="matrix",
        what="each fault for each protocol; trust, names, open files, memory; the key in no artefact",
        words=[
            *_PYTEST,
            "tests/torture/test_faults.py",
            "tests/torture/test_machine.py",
            "tests/torture/test_canary.py",
        ],
    ),
    Form(
        name="batches",
        what="batches: kill -9 at every step and at random, lost answers, cut downloads; made and paid once",
        words=["tests.torture.batches", "--seed", "1", "--trials"],
        long=["100"],
        short=["2"],
    ),
    Form(
        name="fuzz",
        what="mutated lines, results, settings, headers: only typed errors, nothing altered in silence",
        words=["tests.torture.fuzz", "--inputs"],
        long=["1000000"],
        short=["10000"],
    ),
    Form(
        name="signals",
        what="signals at any time, clock jumps, closed and full streams, cron's bare environment",
        words=[
            *_PYTEST,
            "tests/torture/test_signals.py",
            "tests/torture/test_surroundings.py",
            "tests/cli/test_cron.py",
        ],
    ),
    Form(
        name="pace",
        what="ten minutes at the account's limits, storms and outages, on a virtual clock",
        words=[*_PYTEST, "tests/dispatch/live/test_pace.py", "tests/dispatch/live/test_sender.py"],
    ),
    Form(
        name="money",
        what="ledger, totals, result lines and the provider's count to the nano-dollar; caps with 500 in flight",
        words=[
            *_PYTEST,
            "tests/accounting/test_pricing.py",
            "tests/accounting/test_ledger.py",
            "tests/runner/test_local.py",
        ],
    ),
    Form(
        name="memory",
        what="peak memory over a million lines",
        words=["tests.torture.memory", "--lines"],
        long=["1000000"],
        short=["20000"],
    ),
    Form(
        name="saboteurs",
        what="planted defects, each to be caught by the test that is named for it",
        words=["tests.torture.saboteurs"],
        short=["tokens are counted twice"],
    ),
)


def main() -> int:
    """Run the forms and write the table; 1 if any is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.scoreboard", description="Everything, in one table.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", action="append", metavar="NAME", help="these forms only; repeatable")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = [
        _run(form, given.folder, is_short=given.short) for form in FORMS if not given.only or form.name in given.only
    ]
    table = "\n".join([_heading(), "", "| tried | found | |", "|---|---|---|", *(row for row, _ in rows)]) + "\n"
    (given.folder / "scoreboard.md").write_text(table)
    print(table)
    return int(not all(is_good for _, is_good in rows))


def _run(form: Form, folder: Path, *, is_short: bool) -> tuple[str, bool]:
    """Run one form; return its row and whether it found nothing wrong."""
    counts = folder / f"{form.name}.json"
    command = [sys.executable, "-m", *form.words, *(form.short if is_short else form.long)]
    command += ["--json", str(counts)] if form.writes_json else []
    print(f"{form.name}: {' '.join(command[1:])}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    (folder / f"{form.name}.txt").write_text(done.stdout)
    found = _counted(json.loads(counts.read_bytes())) if form.writes_json and counts.exists() else _last(done.stdout)
    return f"| {form.what} | {found} | {'held' if done.returncode == 0 else '**BROKEN**'} |", done.returncode == 0


def _counted(value: dict[str, object]) -> str:
    """Return the counts of one series, or of several."""
    parts = [f"{name}: {_counted(each)}" for name, each in value.items() if isinstance(each, dict)]
    return "; ".join(parts) or ", ".join(f"{value[name]:,} {word}" for name, word in _COUNTS.items())


def _last(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1].strip("= ") if lines else "nothing was printed"


def _heading() -> str:
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}"
    )


if __name__ == "__main__":
    sys.exit(main())
