"""The index beside a results file: what is known of results and inputs, so that a start need not learn it by the line.

Two kinds of entries stand in it, in the order in which they came true:

- a range of the results file: how long it is, its checksum, what its lines add up to, whom they answer;
- a range of an input: some lines, identified by their checksum, that all have results in the ranges before it.

So a start checks the results at the speed of a checksum, and passes over a range of finished lines without planning
them. A range is looked for by its first line, so it is known again wherever it stands: after an edit only the lines
around it are planned. Checksums of ranges begin with all that plans depend on (`Planner.basis`).

The index is derived and may be deleted at any time. It is never synced, and what it says is not believed but where the
results file bears it out: entries are chained by checksums, from one of the program itself, so an index that is cut,
damaged, mixed up or of another version ends there; and at the first range that is not in the results file as it was,
this and all after it is dropped. Lines that no range covers are parsed. What cannot be written is gone without, and
a file of somebody else that stands in its place is left alone: the first line tells whose it is.
"""

from __future__ import annotations

import os
import stat
import sys
from array import array
from base64 import b64decode, b64encode
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from pipeline.core import files as disk
from pipeline.core.hashing import checksum
from pipeline.core.types import IdRange, Result
from pipeline.results.codec import StoredResult
from pipeline.results.totals import Totals

SUFFIX = ".index"
_FIRST_LINE = b"pipeline: the index of the results beside it; may be deleted\n"
_RANGE_LINES = 4_096
_RANGE_BYTES = 16 * 1024 * 1024
_WAITING_RANGES = 64
_MOST_AWAITED = 1_024
_BLOCK_BYTES = 256 * 1024
_THREADS = 2  # that check the results file: more would wait for its disk
_MOST_BYTES = 16 * 1024 * 1024  # of an entry; whatever has longer lines is no index. Less is no large index
_CHAIN = 32  # hex digits before each entry


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRange:
    """Some whole lines of a results file that follow on each other.

    `answered` and `failed` hold the fingerprints of requests, `totals` is a state of `Totals`. `run` is the run that
    wrote the lines, None where it was more than one.
    """

    size: int
    checksum: bytes
    lines: int
    damaged: int
    run: str | None
    totals: Mapping[str, Any]
    answered: array[int]
    failed: array[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRange:
    """Some whole lines of an input that follow on each other and all have results.

    `mark` is the checksum of their bytes, `start` that of the first line, `lines` how many are not blank. `failed` are
    the fingerprints of the requests without an answer.
    """

    mark: bytes
    start: bytes
    size: int
    lines: int
    claims: IdRange
    failed: array[int]


class ResumeIndex:
    """The index of one results file; whoever holds the lock of that owns it.

    First `read`; then one thread adds results as they come to the disk, and ranges when all their results did.
    Nothing here raises: an index that cannot be used is none.
    """

    def __init__(self, results: Path) -> None:
        self._path = disk.beside(results, SUFFIX)
        self._fd = -1
        self._has_failed = False
        self._forget()

    def __len__(self) -> int:
        """How many ranges it knows."""
        return len(self._input_ranges)

    def _forget(self) -> None:
        self._chain = _program()
        self._result_range = _NewResultRange()
        self._waiting: list[InputRange] = []
        self._offsets = array("Q", [len(_FIRST_LINE)])  # of all entries, and of the end
        self._sizes = array("Q")  # of what the entries tell of
        self._input_ranges: dict[bytes, int] = {}  # the first line's checksum -> the number of the entry

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, results: BinaryIO, *, of_one_run: bool) -> Iterator[ResultRange]:
        """Yield the ranges that the results file still holds, and leave it at the end of the last.

        With `of_one_run` the first range that several runs wrote ends the index, too.
        """
        if not self._open(os.O_RDWR):
            return
        if os.fstat(self._fd).st_size > max(_MOST_BYTES, os.fstat(results.fileno()).st_size // 4):
            self.drop()  # a long history of edits and settings: what still counts is soon learned
            return
        end = 0
        checks: list[tuple[int, Future[bool]]] = []
        with ThreadPoolExecutor(_THREADS) as threads:
            for number, value in enumerate(self._entries()):
                self._sizes.append(value["size"])
                if "mark" in value:
                    self._input_ranges[b64decode(value["start"])] = number
                else:
                    part = (value["size"], b64decode(value["checksum"]), end)
                    checks.append((number, threads.submit(_is_there, results.fileno(), *part)))
                    end += value["size"]
            end = 0
            for number, is_there in checks:
                found = self._entry(number) if is_there.result() else None
                if found is None or (of_one_run and found["run"] is None):
                    threads.shutdown(cancel_futures=True)
                    self._cut(number)
                    break
                end += found["size"]
                yield _result_range(found)
        results.seek(end)
        self._truncate()

    def size_of(self, start: bytes) -> int | None:
        """Return how many bytes the range has that begins with a line of this checksum."""
        number = self._input_ranges.get(start)
        return None if number is None else self._sizes[number]

    def find(self, mark: bytes, start: bytes) -> InputRange | None:
        """Return the range with these checksums: of all its bytes, and of the first line."""
        number = self._input_ranges.get(start)
        value = None if number is None else self._entry(number)
        found = _input_range(value) if value else None
        return found if found and found.mark == mark else None

    def _entries(self) -> Iterator[dict[str, Any]]:
        """Yield what the index says, up to where it is not one."""
        with suppress(OSError), os.fdopen(self._fd, "rb", closefd=False) as file:
            file.seek(self._offsets[0])
            while True:
                line = file.readline(_MOST_BYTES)
                value = _value(line, self._chain)
                if value is None:
                    return
                self._chain = _chain_of(line)
                self._offsets.append(self._offsets[-1] + len(line))
                yield value

    def _entry(self, number: int) -> dict[str, Any] | None:
        """Read an entry again; None where the disk does not give it back as it was."""
        begin, end = self._offsets[number : number + 2]
        try:
            return _value(os.pread(self._fd, end - begin, begin), self._chain_before(number))
        except (OSError, ValueError):
            return None

    def _chain_before(self, number: int) -> bytes:
        """Return the checksum that that of an entry goes on from."""
        return _chain_of(os.pread(self._fd, _CHAIN, self._offsets[number - 1])) if number else _program()

    def _cut(self, number: int) -> None:
        """Forget an entry and all after it."""
        del self._offsets[number + 1 :]
        self._input_ranges = {start: each for start, each in self._input_ranges.items() if each < number}

    def _truncate(self) -> None:
        """Let the file end where the index does."""
        try:
            self._chain = self._chain_before(len(self._offsets) - 1)
            os.ftruncate(self._fd, self._offsets[-1])
        except (OSError, ValueError):
            self._has_failed = True

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, line: bytes, request: int, result: StoredResult | Result | None, run: str | None) -> None:
        """Take the next line of the results file, with its end, and what it says: None where it is no result."""
        self.add_lines(line, [(request, result)], run)

    def add_lines(
        self, lines: bytes, told: Sequence[tuple[int, StoredResult | Result | None]], run: str | None
    ) -> None:
        """Take the next lines of the results file, which are hashed as one: each hash lets other threads run first."""
        self._result_range.digest.update(lines)
        self._result_range.size += len(lines)
        for request, result in told:
            self._result_range.add(request, result, run or "", is_blank=lines == b"\n")
        if self._result_range.lines >= _RANGE_LINES or self._result_range.size >= _RANGE_BYTES:
            self.flush()

    def add_input_ranges(self, ranges: Sequence[InputRange]) -> None:
        """Take ranges of an input whose results were all added before."""
        self._waiting += ranges
        if len(self._waiting) >= _WAITING_RANGES:
            self.flush()

    def flush(self) -> None:
        """Write what was added."""
        entries: list[ResultRange | InputRange] = [self._result_range.done()] if self._result_range.size else []
        entries += self._waiting
        self._result_range = _NewResultRange()
        self._waiting = []
        if not entries or not self._open(os.O_RDWR | os.O_CREAT):
            return
        try:
            for entry in entries:
                line = _line(_encode(entry), self._chain)
                disk.write_all(self._fd, line)
                self._chain = _chain_of(line)
        except (OSError, orjson.JSONEncodeError):  # no room, or a server that reports numbers beyond 64 bits
            self._has_failed = True

    def drop(self) -> None:
        """Delete the index: the results file is another one now."""
        self.close()
        self._has_failed = False
        self._forget()
        if self._open(os.O_RDWR):
            with suppress(OSError):
                self._path.unlink()
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self, flags: int) -> bool:
        """Open the file if it is not open yet; return whether it can be used: it is ours, or empty."""
        if self._fd < 0 and not self._has_failed:
            try:
                self._fd = os.open(self._path, flags | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, disk.MODE)
                self._has_failed = not (stat.S_ISREG(os.fstat(self._fd).st_mode) and _begin(self._fd))
            except FileNotFoundError:
                return False
            except OSError:
                self._has_failed = True
        return not self._has_failed


class PendingRanges:
    """Ranges of inputs that still wait for results; beyond a bound the oldest is dropped."""

    def __init__(self) -> None:
        self._open: dict[str, list[_Open]] = {}
        self._count = 0

    def add(self, input_range: InputRange, source: str, numbers: range, waiting: int) -> None:
        """Wait for so many results of lines with these numbers."""
        if self._count >= _MOST_AWAITED:
            self._pop(next(iter(self._open)), 0)
        self._open.setdefault(source, []).append(_Open(input_range=input_range, numbers=numbers, waiting=waiting))
        self._count += 1

    def finished(self, source: str, number: int, failed: int | None) -> InputRange | None:
        """Note that a line has its result on the disk; return the range of which it was the last.

        `failed` is the fingerprint of a request without an answer.
        """
        opened = self._open.get(source, [])
        place = bisect_right(opened, number, key=lambda each: each.numbers.start) - 1
        if place < 0 or number not in opened[place].numbers:
            return None
        if failed is not None:
            opened[place].input_range.failed.append(failed)
        opened[place].waiting -= 1
        return None if opened[place].waiting else self._pop(source, place)

    def _pop(self, source: str, place: int) -> InputRange:
        found = self._open[source].pop(place)
        self._count -= 1
        if not self._open[source]:
            del self._open[source]
        return found.input_range


@dataclass(slots=True)
class _Open:
    input_range: InputRange
    numbers: range
    waiting: int


@dataclass(slots=True)
class _NewResultRange:
    """A range that still grows."""

    size: int = 0
    lines: int = 0
    damaged: int = 0
    run: str | None = None
    totals: Totals = field(default_factory=Totals)
    answered: array[int] = field(default_factory=lambda: array("Q"))
    failed: array[int] = field(default_factory=lambda: array("Q"))
    digest: Any = field(default_factory=sha256)

    def add(self, request: int, result: StoredResult | Result | None, run: str, *, is_blank: bool) -> None:
        if result is None:
            self.damaged += not is_blank
            return
        self.run = run if not self.lines or self.run == run else None
        self.lines += 1
        self.totals.add(result)
        (self.answered if result.success else self.failed).append(request)

    def done(self) -> ResultRange:
        return ResultRange(
            size=self.size,
            checksum=self.digest.digest(),
            lines=self.lines,
            damaged=self.damaged,
            run=self.run,
            totals=self.totals.as_state(),
            answered=self.answered,
            failed=self.failed,
        )


@cache
def _program() -> bytes:
    """Return the checksum of this program: another version may read lines otherwise."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return checksum(sys.byteorder.encode(), *(path.read_bytes() for path in files))


def _begin(fd: int) -> bool:
    """Let a file begin as an index does if it is empty, or was cut in its first line; return whether it is an index."""
    begin = os.pread(fd, len(_FIRST_LINE), 0)
    if begin != _FIRST_LINE and _FIRST_LINE.startswith(begin):
        os.ftruncate(fd, 0)
        disk.write_all(fd, _FIRST_LINE)
        return True
    return begin == _FIRST_LINE


def _is_there(fd: int, size: int, expected: bytes, start: int) -> bool:
    """Return True if the results file has the range at `start`. Hashing and reading let other threads run."""
    end = start + size
    digest = sha256()
    while start < end:
        block = os.pread(fd, min(end - start, _BLOCK_BYTES), start)
        if not block:
            break
        digest.update(block)
        start += len(block)
    return start == end and digest.digest() == expected


# ── entries ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _line(content: bytes, chain: bytes) -> bytes:
    return checksum(chain, content).hex().encode() + b" " + content + b"\n"


def _chain_of(line: bytes) -> bytes:
    return bytes.fromhex(line[:_CHAIN].decode())


def _value(line: bytes, chain: bytes) -> dict[str, Any] | None:
    """Return what a line of the index says, as `_encode` wrote it; None where it is not the next one."""
    content = line[_CHAIN + 1 : -1]
    if line != _line(content, chain):
        return None
    value: dict[str, Any] = orjson.loads(content)
    return value


def _encode(entry: ResultRange | InputRange) -> bytes:
    return orjson.dumps(entry, default=_as_text, option=orjson.OPT_NON_STR_KEYS)


def _as_text(value: bytes | array[int]) -> str:
    return b64encode(value).decode()


def _result_range(value: dict[str, Any]) -> ResultRange:
    value |= {"checksum": b64decode(value["checksum"]), "answered": _array(value["answered"])}
    return ResultRange(**value | {"failed": _array(value["failed"])})


def _input_range(value: dict[str, Any]) -> InputRange:
    claims = value["claims"]
    return InputRange(
        mark=b64decode(value["mark"]),
        start=b64decode(value["start"]),
        size=value["size"],
        lines=value["lines"],
        claims=IdRange(
            marks=_array(claims["marks"]),
            repeats={int(mark): count for mark, count in claims["repeats"].items()},
            is_alone=claims["is_alone"],
        ),
        failed=_array(value["failed"]),
    )


def _array(text: str) -> array[int]:
    return array("Q", b64decode(text))
