"""Full, broken and read-only disks: the run stops at once with exit 5, and what was done is safe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools import needs
from tests.torture.syscalls import SYNCS, Fault, fail_at

pytestmark = [pytest.mark.timeout(300), needs("strace", "tracing")]
RESULTS, JOURNAL, TOTALS = ".jsonl", ".attempts.jsonl", ".usage.json"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(suffix=RESULTS, calls=["write"], error="ENOSPC", at=1),
        Fault(suffix=RESULTS, calls=["write"], error="EDQUOT", at=3),
        Fault(suffix=RESULTS, calls=["write"], error="EIO", at=9),
        Fault(suffix=RESULTS, calls=SYNCS, error="EIO", at=1),
        Fault(suffix=RESULTS, calls=SYNCS, error="EIO", at=2),
        Fault(suffix=RESULTS, calls=["openat"], error="ENOSPC", at=1),
        Fault(suffix=RESULTS, calls=["openat"], error="EIO", at=2),
        Fault(suffix=RESULTS, calls=["openat"], error="EIO", at=4),
        Fault(suffix=JOURNAL, calls=["write"], error="ENOSPC", at=1),
        Fault(suffix=JOURNAL, calls=["write"], error="EIO", at=3),
        Fault(suffix=JOURNAL, calls=SYNCS, error="EIO", at=2),
        Fault(suffix=TOTALS, calls=["write"], error="EDQUOT", at=1),
        Fault(suffix=TOTALS, calls=SYNCS, error="EIO", at=1),
    ],
    ids=str,
)
def test_a_failing_disk_ends_the_run_and_loses_nothing(fault: Fault, tmp_path: Path) -> None:
    """From the first error on nothing is reported or synced, the file ends with a whole line, exit 5 tells it, and a
    run on a sound disk finishes the job.
    """
    _, wrong, verdict = fail_at(tmp_path / "job", fault)

    assert verdict.stops == 1
    assert wrong == []
    assert verdict.is_good, verdict
