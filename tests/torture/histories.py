"""Histories drawn by lot: any call may meet any fault that a retry passes.

    python -m tests.torture.histories --records 2000 --seed 7 --rounds 5

runs the program against the chaos server and prints, for each fault, how often it was met and what the calls that met
it were told as; then the verdict. Every round has its own seed, which is all that is needed to see it again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from tests.torture import chaos, trial
from tests.torture.chaos import Plan
from tests.torture.faults import FAULTS, PROTOCOLS
from tests.torture.trial import SHORT_TIMEOUT, Record, Trial

_ENOUGH_ATTEMPTS = 50  # chance alone shall not fail a record


def run(folder: Path, *, records: int, lanes: int, seed: int, rate: float) -> Trial:
    """Run records over some lanes, with a share `rate` of calls that go wrong."""
    cases = [
        Record(id=f"{seed}.{n}", lane=f"lane-{n % lanes}", protocol=PROTOCOLS[n % lanes % 2]) for n in range(records)
    ]
    with chaos.serving(folder / "journal.jsonl", Plan(seed=seed, rate=rate)) as server:
        settings = trial.settings(server, cases, timeout=SHORT_TIMEOUT, max_attempts=_ENOUGH_ATTEMPTS)
        return trial.run(folder, server.journal, cases, settings)


def table(done: Trial) -> list[str]:
    """Return a line for each fault that was met: its group, how often, the longest call, and the errors told."""
    met = Counter(call["fault"] for call in done.calls if call["fault"])
    longest: dict[str, float] = defaultdict(float)
    for call in done.calls:
        if call["fault"] and call["ended_at"]:
            longest[call["fault"]] = max(longest[call["fault"]], call["ended_at"] - call["at"])
    lines = [f"{'fault':<32} {'group':<5} {'met':>5} {'longest':>8}  end"]
    for name, count in sorted(met.items(), key=lambda item: FAULTS[item[0]].group):
        fault = FAULTS[name]
        lines.append(f"{name:<32} {fault.group:<5} {count:>5} {longest[name]:>6.2f} s  {fault.end}")
    return lines


def main() -> int:
    """Run the rounds of the command line; 1 when any verdict is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.histories", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--records", type=int, default=2_000)
    parser.add_argument("--lanes", type=int, default=100, help="providers, each with an address of its own")
    parser.add_argument("--rate", type=float, default=0.3, help="share of calls that meet a fault")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    broken = 0
    for seed in range(given.seed, given.seed + given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            done = run(Path(folder), records=given.records, lanes=given.lanes, seed=seed, rate=given.rate)
            print("\n".join(table(done)))
            print(f"seed {seed}: {done.verdict.sentence()}")
            broken += not done.verdict.holds or done.verdict.answered < given.records
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
