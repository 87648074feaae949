"""Power cuts: an ext4 file system that forgets, at random times, all that was not synced.

    sudo python -m tests.torture.powercut --cuts 200 --seed 1

The kernel has a call for such tests (EXT4_IOC_SHUTDOWN, without flushing its log): after it a mount shows only what a
disk would hold after the power failed. What a run reported as done is written down on another disk, so it is known
what must be there. Needs root and loop devices.

Power fails for program and disk at once. The call alone does not do that: a sync on its way may still come back with
success although nothing is on the disk (it seems: twice in 300 cuts on Linux 6.18), and a program that lives on acts on
it. So the run is frozen first; then nobody acts on what the kernel answers after the cut.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.torture.jobs import Job, Verdict, kill, providing
from tests.torture.kill import table, torture

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_WITHOUT_LOG = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH
_DISK_BYTES = 32 * 1024 * 1024
_CUTS_OF_A_JOB = 8
_FROZEN = set("TDZX")  # stopped, uninterruptible inside the kernel, dead


class Disk:
    """An ext4 file system on a loop device, mounted at `folder`."""

    def __init__(self, image: Path, folder: Path) -> None:
        self._image = image
        self.folder = folder

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self._image), str(self.folder)], check=True, capture_output=True)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True, capture_output=True)

    def cut(self) -> None:
        """Lose all that is not on the disk; from now on every write fails."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
        finally:
            os.close(fd)


@contextmanager
def disk(scratch: Path) -> Iterator[Disk]:
    """Make and mount a small disk; OSError or CalledProcessError where that is impossible."""
    image, folder = scratch / "disk.img", scratch / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(_DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
    made = Disk(image, folder)
    made.mount()
    try:
        yield made
    finally:
        made.unmount()


def _freeze(process: BaseProcess) -> None:
    """Stop every thread of a run, or see it inside the kernel, from where it comes back no more."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    while not set(_states(process.pid)) <= _FROZEN:
        time.sleep(0.001)


def _states(pid: int) -> Iterator[str]:
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # a thread that has ended
            yield path.read_text().rpartition(")")[2].split()[0]


def torture_one(scratch: Path, seed: str, cuts: int = _CUTS_OF_A_JOB) -> Verdict:
    """Run a job on a disk whose power fails again and again."""
    rng = random.Random(seed)
    scratch.mkdir(exist_ok=True)

    def cut(process: BaseProcess) -> bool:
        if process.is_alive():
            _freeze(process)
        made.cut()
        was_running = kill(process)
        made.unmount()
        made.mount()
        return was_running

    with providing(latency=rng.choice([0.001, 0.01])) as provider, disk(scratch) as made:
        job = Job(
            folder=scratch,
            output=made.folder / "out.jsonl",
            provider=provider,
            count=rng.choice([100, 300]),
            concurrency=rng.choice([4, 16]),
            words=["--ordered"] if rng.random() < 0.5 else [],
        )
        return torture(job, rng, cuts, cut, changes=rng.random() < 0.5)


def torture_all(cuts: int, seed: int) -> Verdict:
    """Run jobs until there were so many cuts."""
    total = Verdict()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        for number in count():
            if total.stops >= cuts:
                break
            scratch = Path(folder) / str(number)
            verdict = torture_one(scratch, f"{seed}-{number}")
            total += verdict
            if not verdict.is_good:
                print(f"job {seed}-{number}: {verdict}", flush=True)
            shutil.rmtree(scratch)
    return total


def _main() -> int:
    parser = argparse.ArgumentParser(description="Cut the power of runs at random times and judge what is left.")
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    verdict = torture_all(options.cuts, options.seed)
    print(table(verdict))
    if options.json:
        numbers = {"name": "powercut", "seed": options.seed, "is_good": verdict.is_good, **asdict(verdict)}
        options.json.write_text(json.dumps(numbers) + "\n")
    return 0 if verdict.is_good else 1


if __name__ == "__main__":
    sys.exit(_main())
