"""The command `pipeline`, which says at its end how much memory it had at its peak.

    python -m tests.torture.peak run …

The last line of stderr is the peak in bytes. Only the process itself can tell: what the kernel tells its parent
(`ru_maxrss`) begins with the parent's own size.
"""

from __future__ import annotations

import atexit
import re
import sys
from pathlib import Path

from pipeline.cli.main import main


def peak_bytes() -> int:
    """Return the most memory that this process has had in RAM."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    atexit.register(lambda: print(peak_bytes(), file=sys.stderr))
    main()
