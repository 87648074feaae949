"""Memory and speed of reading and checking lines, in a process of its own.

python -m tests.torture.memory --lines 1000000
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# VmHWM and not ru_maxrss, which begins with the size of the process that started this one.
_CHECK = """
from pipeline.inputs import check as checking
from pipeline.core.config import Config

report = checking.check(["-"], Config(), on_problem=lambda problem: None)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(report.lines, report.invalid, status["VmHWM"].split()[0])
"""
_MANY = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What came of checking some lines: counts, the largest resident size in kB, and the seconds it took."""

    lines: int
    invalid: int
    peak_kb: int
    seconds: float


def checked(blocks: Iterable[bytes]) -> Checked:
    """Check what comes through a pipe, as `pipeline check -` does."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", _CHECK], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        for block in blocks:
            process.stdin.write(block)
        process.stdin.close()
        lines, invalid, peak_kb = map(int, process.stdout.read().split())
    return Checked(lines=lines, invalid=invalid, peak_kb=peak_kb, seconds=time.perf_counter() - began)


def conversations(count: int) -> Iterator[bytes]:
    """Yield lines of all kinds with ids, some 300 bytes each, a block of many at a time."""
    text = "Explain in one sentence what a token bucket is, and why it is used. " * 2
    native = f'{{"custom_id":"q-%d","model":"gpt-6-luna","messages":[{{"role":"user","content":"{text}"}}]}}\n'
    nameless = f'{{"model":"claude-haiku-5-5","messages":[{{"role":"user","content":"%d: {text}"}}]}}\n'
    shapes = (native, nameless, native.replace("luna", "sol"))
    for start in range(0, count, _MANY):
        numbers = range(start, min(count, start + _MANY))
        yield "".join(shapes[number % len(shapes)] % number for number in numbers).encode()


def main() -> None:
    """Print peak memory and lines a second for a tenth of the lines and for all of them."""
    parser = argparse.ArgumentParser(description="Memory and speed of checking lines.")
    parser.add_argument("--lines", type=int, default=1_000_000)
    count = parser.parse_args().lines
    few, many = checked(conversations(count // 10)), checked(conversations(count))
    for found in (few, many):
        rate = found.lines / found.seconds
        print(f"{found.lines:10,} lines: {found.peak_kb / 1024:6.1f} MB at most, {rate:8,.0f} lines/s")
    slope = (many.peak_kb - few.peak_kb) / 1024 / (many.lines - few.lines) * 100_000
    print(f"{slope:.2f} MB for each 100,000 lines")


if __name__ == "__main__":
    main()
