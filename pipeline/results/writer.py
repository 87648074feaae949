"""The one writer of results, and the one reader of what is already done.

A result counts as done once its line is on the disk: lines are written whole, in groups, and synced before `append`
returns. The same groups carry the entries of the attempt log (`attempt_log`), so one thread and one sync serve both.
The lock is on the file itself, not on a lock file: the kernel drops it when the holder dies, and a second name for the
same file cannot get around it.

Nothing that was paid for is deleted: lines replaced by a newer response go to `NAME.superseded.jsonl`. The resume
index beside the file (`resume_index`) saves a start from parsing every line.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import BinaryIO

import anyio
import orjson
from anyio import to_thread

from pipeline.core import files
from pipeline.core.errors import PipelineError, StorageError, UsageError
from pipeline.core.hashing import FingerprintMap, FingerprintSet, fingerprint
from pipeline.core.types import OutputFormat, Request, Result
from pipeline.results import attempt_log, codec, resume_index
from pipeline.results.attempt_log import AttemptLog, LoggedCall
from pipeline.results.codec import StoredResult
from pipeline.results.resume_index import InputRange, ResultRange, ResumeIndex
from pipeline.results.totals import Totals

# One write and one sync serve a whole group of lines: a sync for each line would cost more than everything else.
_GROUP_LINES = 64
_GROUP_SECONDS = 0.005
SIDE_FILES = (".usage.json", attempt_log.SUFFIX, ".superseded.jsonl", ".torn", resume_index.SUFFIX)
_FIRST_LOOK_BYTES = 1024 * 1024


def key(custom_id: str, digest: str) -> int:
    """Return the fingerprint under which a request is known to be done."""
    return fingerprint(custom_id, digest)


class Done:
    """What a results file already holds: which requests are answered, which failed.

    10 bytes for each line. `damaged` counts lines that are not results.
    """

    def __init__(self) -> None:
        self._answered = FingerprintSet()
        self._failed = FingerprintSet()
        self._unsorted = {True: array("Q"), False: array("Q")}
        self.lines = 0
        self.damaged = 0

    def add(self, request: int, *, success: bool) -> None:
        """Note the result of a request, which is given by its `key`."""
        self._unsorted[success].append(request)
        self.lines += 1

    def add_range(self, known: ResultRange) -> None:
        self._unsorted[True].extend(known.answered)
        self._unsorted[False].extend(known.failed)
        self.lines += known.lines
        self.damaged += known.damaged

    def outcome(self, request: int) -> bool | None:
        """Return True when a request was answered, False when it failed, None when it is not there."""
        if self._unsorted[True] or self._unsorted[False]:
            self.sort()
        if request in self._answered:
            return True
        return False if request in self._failed else None

    def sort(self) -> None:
        """Make ready for questions, once what is known is noted."""
        for items, known in ((self._unsorted[True], self._answered), (self._unsorted[False], self._failed)):
            if items:
                known.update(items)
                del items[:]


class ResultWriter:
    """Appends results to one file; calls `on_done` with each result once it is on the disk.

    `name` is the output as messages show it, `safe_bytes` how much of the file is on the disk.
    `open` locks and repairs the file, `done` reads it, `begin` starts the attempt log, `run` writes until `stop`.
    One thread of its own writes, so slow name look-ups in the shared thread pool cannot delay results.
    """

    def __init__(
        self,
        path: Path,
        *,
        run_id: str,
        form: OutputFormat = OutputFormat.NATIVE,
        echo_request: bool = False,
        is_simulated: bool = False,
        sync: bool = True,
        on_done: Callable[[Result], None],
    ) -> None:
        self.path = path
        self.name = str(path)
        self.safe_bytes = 0
        self._run_id = run_id
        self._form = form
        self._echo_request = echo_request
        self._is_simulated = is_simulated
        self._sync = sync
        self._on_done = on_done
        self._file: files.Appender | None = None
        # Resolved once: if a symbolic link changes during the run, results and side files must stay together.
        self._target = files.target_of(path)
        self._attempt_log = AttemptLog(self._target, run_id, sync=sync)
        self._index = ResumeIndex(self._target)
        self._done_ranges: list[InputRange] = []
        self._lines: list[bytes] = []
        self._results: list[Result | StoredResult] = []
        self._waiting = 0
        self._arrival = anyio.Event()
        self._full = anyio.Event()
        self._written = anyio.Event()
        self._is_closed = False
        self._has_failed = False
        self._thread = anyio.CapacityLimiter(1)

    # ── opening ───────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self) -> None:
        """Lock the file and repair its tail.

        Raises `TryLaterError` when another run holds it, `StorageError` or `UsageError` when it cannot be used.
        """
        self._file = files.Appender(files.open_locked(self._target), self.path, sync=self._sync)
        try:
            _refuse_foreign(self._file.fd, self.path)
            files.make_private(self._file.fd)
            _repair_tail(self._file.fd, self.beside(".torn"))
            files.sync_directory(self._target.parent)
            self.safe_bytes = os.fstat(self._file.fd).st_size
        except OSError as exc:
            raise StorageError(f"cannot repair {str(self.path)!r} or a file beside it: {exc.strerror}") from exc
        self._attempt_log.read()

    @property
    def address(self) -> str:
        """The absolute path of the results."""
        return str(self.path.absolute())

    def beside(self, suffix: str) -> Path:
        """Return the name of a file that belongs to the results and lies beside them."""
        return files.beside(self._target, suffix)

    def done(self, totals: Totals) -> Done:
        """Read what the file holds, as far as the index does not know it; every result is also counted in `totals`."""
        done = Done()
        run, calls = self._attempt_log.unsettled()
        requests = {key(*call): call for call in calls}
        with self._reading() as file:
            for known in self._index.read(file, of_one_run=bool(calls)):
                done.add_range(known)
                totals.add_state(known.totals)
                if requests and known.run == run:
                    for request in requests.keys() & {*known.answered, *known.failed}:
                        self._attempt_log.settle(run, *requests[request])
            for _, line, record in codec.read(file):
                request = 0
                if record:
                    request = key(record.custom_id, record.digest)
                    done.add(request, success=record.success)
                    self._attempt_log.settle(record.run, record.custom_id, record.digest)
                    totals.add(record)
                elif line:
                    done.damaged += 1
                self._index.add(line + b"\n", request, record, record.run if record else None)
        self._index.flush()
        return done

    @contextmanager
    def _reading(self) -> Iterator[BufferedReader]:
        """Open the file for reading; an error of the disk meanwhile is a `StorageError`."""
        try:
            with self._target.open("rb") as file:
                yield file
        except OSError as exc:
            raise StorageError(f"cannot read {str(self.path)!r}: {exc.strerror}") from exc

    def range_sizes(self) -> Callable[[bytes], int | None] | None:
        """Return what tells how many bytes the range has that begins with a line of a checksum; None if none does."""
        return self._index.size_of if len(self._index) else None

    def find_range(self, mark: bytes, start: bytes) -> InputRange | None:
        """Return what is known of a range of an input: by its checksum, and by that of its first line."""
        return self._index.find(mark, start)

    def set_aside(self) -> str | None:
        """Move the file's content to a free name beside it and start empty; return the name, None if there is none.

        The attempt log stays, because calls that may be billed without a response must still be reported. It is
        rewritten before the results move: without them it would list calls that they answer.
        """
        if os.fstat(self._open_file().fd).st_size == 0:
            return None
        aside = next(name for n in count(1) if not (name := self.beside(f".old-{n}.jsonl")).exists())
        if self._attempt_log.unsettled()[1]:
            self.done(Totals())
        self._attempt_log.begin()
        try:
            os.rename(self._target, aside)
        except OSError as exc:
            raise StorageError(f"cannot set {str(self._target)!r} aside: {exc.strerror}") from exc
        self._index.drop()
        self.close()
        self.open()
        return str(aside)

    def begin(self) -> None:
        """Start the attempt log of this run, after `done`."""
        self._attempt_log.begin()

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def append(self, *results: Result) -> None:
        """Write results; returns when they are on the disk."""
        for result in results:
            line = codec.encode(
                result,
                self._form,
                run_id=self._run_id,
                echo_request=self._echo_request,
                is_simulated=self._is_simulated,
            )
            self._lines.append(line)
        self._results += results
        await self._wait_written(len(results))

    async def append_lines(self, lines: Sequence[bytes]) -> None:
        """Write encoded result lines; returns when they are on the disk. `on_done` is not called for them."""
        self._lines += lines
        self._results += map(codec.decode, lines)
        await self._wait_written(len(lines))

    def import_lines(self, lines: Sequence[bytes], calls: Sequence[LoggedCall] = ()) -> None:
        """Take what was written and left in flight elsewhere before this run; to be called before `done`."""
        data = b"".join(lines)
        if data:
            self._open_file().append(data)
            self.safe_bytes += len(data)
        self._attempt_log.import_attempts(calls)

    async def import_attempts(self, calls: Sequence[LoggedCall]) -> None:
        """Note calls of unknown outcome that were made elsewhere; returns when that is on the disk."""
        self._attempt_log.import_attempts(calls)
        await self._wait_written(1)

    async def log_attempt(self, request: Request, attempt: int, at: str) -> None:
        """Note that a call is about to be made; returns when that is on the disk."""
        self._attempt_log.log_attempt(request, attempt, at)
        try:
            await self._wait_written(1)
        except BaseException:
            self._attempt_log.log_not_billed(request, attempt)  # cancelled before it was made
            raise

    def log_not_billed(self, request: Request, attempt: int) -> None:
        """Note that a call came back and was not billed."""
        self._attempt_log.log_not_billed(request, attempt)

    def mark_range_done(self, input_range: InputRange) -> None:
        """Note that all lines of a range have results on the disk; the index learns it some time later."""
        self._done_ranges.append(input_range)
        if len(self._done_ranges) >= _GROUP_LINES:
            self._arrival.set()

    def unknown(self) -> tuple[LoggedCall, ...]:
        """Return the calls that may be billed without an answer, of this run and of earlier ones that crashed."""
        return self._attempt_log.unknown()

    async def run(self) -> None:
        """Write what comes until `close` was called and all is on the disk; cancelled, it still writes what came."""
        try:
            while not self._is_closed:
                await self._arrival.wait()
                if not self._is_closed and self._waiting < _GROUP_LINES:
                    with anyio.move_on_after(_GROUP_SECONDS):
                        await self._full.wait()
                await self._write_group()
        finally:
            with anyio.CancelScope(shield=True):
                if not self._has_failed:
                    await self._write_group()
                await to_thread.run_sync(self._finish_index, self._take_ranges(), limiter=self._thread)

    async def _wait_written(self, count: int) -> None:
        self._waiting += count
        self._arrival.set()
        if self._waiting >= _GROUP_LINES:
            self._full.set()
        await self._written.wait()

    async def _write_group(self) -> None:
        lines, self._lines = self._lines, []
        done, self._results = self._results, []
        written, self._written = self._written, anyio.Event()
        self._waiting = 0
        if not self._is_closed:
            self._arrival, self._full = anyio.Event(), anyio.Event()
        with anyio.CancelScope(shield=True):
            group = (lines, done, self._attempt_log.take(), self._take_ranges())
            await to_thread.run_sync(self._write, *group, limiter=self._thread)
        for result in done:
            self._attempt_log.finished(result.custom_id, result.digest)
            if isinstance(result, Result):
                self._on_done(result)
        written.set()

    def stop(self) -> None:
        """Let `run` write what is left and return."""
        self._is_closed = True
        self._arrival.set()
        self._full.set()

    def publish(self, totals: bytes) -> PipelineError | None:
        """Upload results and totals; return the error that prevented it. A local file needs no upload."""
        return None

    def finish(self) -> None:
        """Close the attempt log; call this once the totals that list the `unknown` calls are on the disk."""
        self._attempt_log.finish()

    def close(self) -> None:
        """Close the files, which releases the lock."""
        self._attempt_log.close()
        self._index.close()
        if self._file is not None:
            self._file.close()

    def _write(
        self,
        lines: list[bytes],
        written: Sequence[Result | StoredResult],
        calls: list[bytes],
        ranges: list[InputRange],
    ) -> None:
        """Write results before the attempt log: they are paid for, and a full disk must not lose them to the log."""
        data = b"".join(lines)
        try:
            if data:
                self._open_file().append(data)
                self.safe_bytes += len(data)
            self._attempt_log.write(calls)
        except StorageError:
            self._has_failed = True
            raise
        if data:
            keyed = [(key(result.custom_id, result.digest), result) for result in written]
            self._index.add_lines(data, keyed, self._run_id)
        self._index.add_input_ranges(ranges)

    def _finish_index(self, ranges: list[InputRange]) -> None:
        self._index.add_input_ranges(ranges)
        self._index.flush()

    def _take_ranges(self) -> list[InputRange]:
        taken, self._done_ranges = self._done_ranges, []
        return taken

    def _open_file(self) -> files.Appender:
        assert self._file is not None, "open() comes first"
        return self._file

    # ── tidying ───────────────────────────────────────────────────────────────────────────────────────────────────

    def tidy(self, positions: FingerprintMap, ids: FingerprintSet, *, ordered: bool) -> int:
        """Rewrite the file without superseded lines, in input order if asked; return how many lines went aside.

        `positions` maps `key(custom_id, digest)` of the input's lines to their place in it, `ids` holds the
        fingerprints of its ids. Of equal keys the last answer stays, without any the last failure. A line whose id the
        input holds with another digest was replaced; a failure whose id is gone from the input is not worth keeping;
        an answer whose id is gone is kept, as it was paid for.
        """
        staying, leaving = self._sort_out(positions, ids, ordered=ordered)
        if leaving or ordered:
            self._rewrite(staying, leaving)
        return len(leaving)

    def _rewrite(self, staying: Sequence[int], leaving: Sequence[int]) -> None:
        """Make the file anew of the lines that begin at some offsets, once those that leave are kept elsewhere."""
        with self._reading() as old:
            if leaving:
                superseded = self.beside(".superseded.jsonl")
                try:
                    files.append_lines(superseded, (line_at(old, offset) for offset in leaving))
                except OSError as exc:
                    raise StorageError(f"cannot write {str(superseded)!r}: {exc.strerror}") from exc
            self._replace(line_at(old, offset) for offset in staying)

    def _sort_out(
        self, positions: FingerprintMap, ids: FingerprintSet, *, ordered: bool
    ) -> tuple[list[int], list[int]]:
        """Return the offsets of the lines that stay, in their new order, and of those that leave."""
        newest = array("q", [-1]) * len(positions)
        is_answered = bytearray(len(positions))
        extra: list[int] = []
        leaving: list[int] = []
        with self._reading() as file:
            for here, line, record in codec.read(file):
                place = positions.get(key(record.custom_id, record.digest)) if record else None
                if record and place is not None:
                    left = here
                    if record.success or not is_answered[place]:
                        left, newest[place], is_answered[place] = newest[place], here, record.success
                    if left >= 0:
                        leaving.append(left)
                elif record and record.success and fingerprint(record.custom_id) not in ids:
                    extra.append(here)
                elif line:
                    leaving.append(here)
        kept = [offset for offset in newest if offset >= 0]
        return (kept + extra if ordered else sorted(kept + extra)), sorted(leaving)

    def _replace(self, lines: Iterator[bytes]) -> None:
        """Put a new file in the place of the old one."""
        try:
            fd = files.replace(self._target, lines)
        except OSError as exc:
            raise StorageError(f"cannot rewrite {str(self.path)!r}: {exc.strerror}; it is as it was") from exc
        self._open_file().close()
        self._file = files.Appender(fd, self.path, sync=self._sync)
        self.safe_bytes = os.fstat(fd).st_size
        self._index.drop()


def _refuse_foreign(fd: int, path: Path) -> None:
    """Raise `UsageError` for a file that this program did not write; it must not be repaired.

    Ours holds a result among its whole lines or, where a crash left less than one, what begins like one.
    """
    *whole, rest = os.pread(fd, _FIRST_LOOK_BYTES, 0).split(b"\n")
    if not (any(codec.decode_or_none(line) for line in whole) if whole else _is_begun_result(rest.rstrip(b"\0"))):
        raise UsageError(f"{str(path)!r} exists and holds no results; choose another -o, or move it away")


def _is_begun_result(fragment: bytes) -> bool:
    """Return True if a crash may have left this of a first line: a whole result, or the beginning of one."""
    if codec.decode_or_none(fragment) is not None:
        return True
    try:
        orjson.loads(fragment)
    except orjson.JSONDecodeError:
        return any(fragment.startswith(begin[: len(fragment)]) for begin in codec.BEGINNINGS)
    return False


def _repair_tail(fd: int, torn: Path) -> None:
    """Make the file end with a whole line: after a crash its tail may be cut or full of NULs. That goes to `torn`."""
    size = os.fstat(fd).st_size
    if not size or os.pread(fd, 1, size - 1) == b"\n":
        return
    start = files.last_line_start(fd, size)
    tail = os.pread(fd, size - start, start)
    if codec.decode_or_none(tail) is not None:
        files.write_all(fd, b"\n")
    else:
        files.append_lines(torn, [tail.rstrip(b"\0") + b"\n"])
        os.ftruncate(fd, start)
    os.fsync(fd)


def line_at(file: BinaryIO, offset: int) -> bytes:
    """Return the line of a file that begins at an offset, with its end."""
    file.seek(offset)
    return file.readline()
