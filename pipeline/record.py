"""The one writer of results, and the one reader of what is already done.

A result counts as done when its line is on the disk: lines are written whole, in groups, and synced before anybody is
told. The first failed sync is final: the kernel may have thrown the pages away and would report success the second
time (https://wiki.postgresql.org/wiki/Fsync_Errors). The file itself is locked, not a name beside it, so a dead
holder blocks nobody and no second name leads around it.

Nothing that was paid for is deleted: lines that a newer answer replaced go to `NAME.superseded.jsonl`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

import anyio
from anyio import to_thread

from pipeline import jsonl, results
from pipeline.errors import LineError, StorageError, TryLaterError, UsageError
from pipeline.fingerprints import FingerprintMap, FingerprintSet, fingerprint
from pipeline.results import Record
from pipeline.types import OutputFormat, Result

MODE = 0o600
MAX_BUFFERED_BYTES = 16 * 1024 * 1024
# A write and its sync are shared by the lines of a moment: one for every line would cost more than all the rest.
_GROUP_LINES = 64
_GROUP_SECONDS = 0.01
_FIRST_LOOK_BYTES = 1024 * 1024
_MAX_RESULT_BYTES = 1024 * 1024 * 1024


def beside(path: Path, suffix: str) -> Path:
    """Return the name of a file that belongs to a results file: `a.jsonl`, `.usage.json` -> `a.usage.json`."""
    return path.with_name(path.name.removesuffix(".jsonl") + suffix)


def key(custom_id: str, digest: str) -> int:
    """Return the fingerprint under which a request is known to be done."""
    return fingerprint(custom_id, digest)


class Done:
    """What a results file already holds: which requests are answered, which failed.

    20 bytes at most for each line. `damaged` counts lines that are not results.
    """

    def __init__(self) -> None:
        self._answered = FingerprintSet()
        self._failed = FingerprintSet()
        self.lines = 0
        self.damaged = 0

    def add(self, record: Record) -> None:
        (self._answered if record.success else self._failed).add(key(record.custom_id, record.digest))
        self.lines += 1

    def outcome(self, custom_id: str, digest: str) -> bool | None:
        """Return True when answered, False when failed, None when not there."""
        mark = key(custom_id, digest)
        if mark in self._answered:
            return True
        return False if mark in self._failed else None


class Recorder:
    """Appends results to one file; `on_done` hears of each record once it is safe on the disk.

    `open` locks and repairs the file, `run` writes until `close`. One thread writes; it is never the one that slow
    name look-ups may fill.
    """

    def __init__(
        self,
        path: Path,
        *,
        form: OutputFormat = OutputFormat.NATIVE,
        echo_request: bool = False,
        sync: bool = True,
        on_done: Callable[[Record], None],
    ) -> None:
        self.path = path
        self._form = form
        self._echo_request = echo_request
        self._sync = sync
        self._on_done = on_done
        self._fd = -1
        self._lines: list[bytes] = []
        self._records: list[Record] = []
        self._bytes = 0
        self._arrival = anyio.Event()
        self._room = anyio.Event()
        self._is_closed = False
        self._closing = anyio.Event()
        self._has_failed = False
        self._thread = anyio.CapacityLimiter(1)

    # ── opening ───────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self) -> None:
        """Lock the file and repair its tail.

        Raises `TryLaterError` when another run holds it, `StorageError` or `UsageError` when it cannot be used.
        """
        self._fd = _open_locked(self.path)
        try:
            _refuse_foreign(self._fd, self.path)
            _repair_tail(self._fd, self.path)
            _sync_directory(self.path.parent)
        except OSError as exc:
            raise StorageError(f"cannot repair {str(self.path)!r} or a file beside it: {exc.strerror}") from exc

    def done(self, on_record: Callable[[Record], None]) -> Done:
        """Read what the file holds; every readable record is also given to `on_record`."""
        done = Done()
        with self.path.open("rb") as file:
            for line, length in jsonl.lines(file, _MAX_RESULT_BYTES):
                if not length:
                    continue
                try:
                    record = results.decode(line)
                except LineError:
                    done.damaged += 1
                    continue
                done.add(record)
                on_record(record)
        return done

    def set_aside(self) -> Path | None:
        """Move the file's content to a free name beside it and start empty; None when there is none."""
        if os.fstat(self._fd).st_size == 0:
            return None
        target = _target(self.path)
        aside = next(name for n in count(1) if not (name := beside(target, f".old-{n}.jsonl")).exists())
        try:
            os.rename(target, aside)
        except OSError as exc:
            raise StorageError(f"cannot set {str(target)!r} aside: {exc.strerror}") from exc
        self.release()
        self.open()
        return aside

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def append(self, result: Result) -> None:
        """Take a result for writing; waits while too much is unwritten."""
        line = results.encode(result, self._form, echo_request=self._echo_request)
        self._lines.append(line)
        self._records.append(results.record(result))
        self._bytes += len(line)
        self._arrival.set()
        while self._bytes > MAX_BUFFERED_BYTES:
            await self._room.wait()

    async def run(self) -> None:
        """Write what comes until `close` was called and all is on the disk; cancelled, it still writes what came."""
        try:
            await self._write_groups()
        finally:
            with anyio.CancelScope(shield=True):
                while self._lines and self._fd >= 0 and not self._has_failed:
                    await self._write_group()

    async def _write_groups(self) -> None:
        while self._lines or not self._is_closed:
            if not self._lines:
                self._arrival = anyio.Event()
                await self._arrival.wait()
                continue
            if not self._is_closed and len(self._lines) < _GROUP_LINES:
                with anyio.move_on_after(_GROUP_SECONDS):
                    await self._closing.wait()
            await self._write_group()

    async def _write_group(self) -> None:
        lines, self._lines = self._lines, []
        records, self._records = self._records, []
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(self._write, lines, limiter=self._thread)
        self._bytes -= sum(map(len, lines))
        self._room.set()
        self._room = anyio.Event()
        for record in records:
            self._on_done(record)

    def close(self) -> None:
        """Say that no more results come."""
        self._is_closed = True
        self._arrival.set()
        self._closing.set()

    def release(self) -> None:
        """Give the file and its lock back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, lines: list[bytes]) -> None:
        size = os.fstat(self._fd).st_size
        try:
            _write_all(self._fd, b"".join(lines))
            if self._sync:
                os.fdatasync(self._fd)
        except OSError as exc:
            self._has_failed = True
            with suppress(OSError):
                os.ftruncate(self._fd, size)
            raise StorageError(
                f"cannot write results to {str(self.path)!r}: {exc.strerror}",
                hint="what was reported done is safe; make room and repeat the command to go on",
            ) from exc

    # ── tidying ───────────────────────────────────────────────────────────────────────────────────────────────────

    def tidy(self, positions: FingerprintMap, ids: FingerprintSet, *, ordered: bool) -> int:
        """Rewrite the file without superseded lines, in input order if asked; return how many lines went aside.

        `positions` maps `key(custom_id, digest)` of the input's lines to their place in it, `ids` holds the
        fingerprints of its ids. Of equal keys the last line stays. A line whose id the input holds with another
        digest was replaced; a failure whose id is gone from the input is not worth keeping; an answer whose id is
        gone is kept, as it was paid for.
        """
        staying, leaving = self._sort_out(positions, ids, ordered=ordered)
        if not leaving and not ordered:
            return 0
        with self.path.open("rb") as old:
            if leaving:
                superseded = beside(self.path, ".superseded.jsonl")
                try:
                    _append_file(superseded, (_line_at(old, offset) for offset in leaving))
                except OSError as exc:
                    raise StorageError(f"cannot write {str(superseded)!r}: {exc.strerror}") from exc
            self._replace(_line_at(old, offset) for offset in staying)
        return len(leaving)

    def _sort_out(
        self, positions: FingerprintMap, ids: FingerprintSet, *, ordered: bool
    ) -> tuple[list[int], list[int]]:
        """Return the offsets of the lines that stay, in their new order, and of those that leave."""
        newest = array("q", [-1]) * len(positions)
        extra: list[int] = []
        leaving: list[int] = []
        offset = 0
        with self.path.open("rb") as file:
            for line, length in jsonl.lines(file, _MAX_RESULT_BYTES):
                here, offset = offset, offset + length + 1
                record = _decode_or_none(line)
                place = positions.get(key(record.custom_id, record.digest)) if record else None
                if place is not None:
                    if newest[place] >= 0:
                        leaving.append(newest[place])
                    newest[place] = here
                elif record and record.success and fingerprint(record.custom_id) not in ids:
                    extra.append(here)
                elif length:
                    leaving.append(here)
        kept = [offset for offset in newest if offset >= 0]
        return (kept + extra if ordered else sorted(kept + extra)), sorted(leaving)

    def _replace(self, lines: Iterator[bytes]) -> None:
        """Put a new file in the place of the old one, locked before it can be seen."""
        target = _target(self.path)
        temporary = beside(target, ".tmp.jsonl")
        fd = -1
        try:
            temporary.unlink(missing_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND, MODE)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for line in lines:
                _write_all(fd, line)
            os.fsync(fd)
            os.rename(temporary, target)
            _sync_directory(target.parent)
        except OSError as exc:
            with suppress(OSError):
                os.close(fd)
                temporary.unlink()
            raise StorageError(f"cannot rewrite {str(self.path)!r}: {exc.strerror}; it is as it was") from exc
        os.close(self._fd)
        self._fd = fd


def write_file(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all (0600, atomic)."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, MODE)
        try:
            _write_all(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        _sync_directory(path.parent)
    except OSError as exc:
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(f"cannot write {str(path)!r}: {exc.strerror}") from exc


def _target(path: Path) -> Path:
    """Return the file itself where a name is a symbolic link: a rename must not put a file in the link's place."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _open_locked(path: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, MODE)
        except OSError as exc:
            raise UsageError(f"the output {str(path)!r} cannot be written: {exc.strerror}") from exc
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise UsageError(f"the output {str(path)!r} is not a regular file; results must stay readable to go on")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(fd)
            if exc.errno not in (errno.EAGAIN, errno.EACCES):
                raise StorageError(f"cannot lock {str(path)!r}: {exc.strerror}") from exc
            raise TryLaterError(
                f"another run is writing {str(path)!r}", hint="wait until it has ended, or choose another -o"
            ) from exc
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)  # the holder put a new file in its place meanwhile


def _refuse_foreign(fd: int, path: Path) -> None:
    """Refuse a file whose beginning holds whole lines and not one result: it is somebody's, and not to be repaired."""
    *whole, _ = os.pread(fd, _FIRST_LOOK_BYTES, 0).split(b"\n")
    if whole and all(_decode_or_none(line) is None for line in whole):
        raise UsageError(f"{str(path)!r} exists and holds no results; choose another -o, or move it away")


def _repair_tail(fd: int, path: Path) -> None:
    """Make the file end with a whole line: after a crash its tail may be cut or full of NULs."""
    size = os.fstat(fd).st_size
    if not size or os.pread(fd, 1, size - 1) == b"\n":
        return
    start = _last_line_start(fd, size)
    tail = os.pread(fd, size - start, start)
    if _decode_or_none(tail) is not None:
        _write_all(fd, b"\n")
    else:
        _append_file(beside(path, ".torn"), iter([tail.rstrip(b"\0") + b"\n"]))
        os.ftruncate(fd, start)
    os.fsync(fd)


def _last_line_start(fd: int, size: int) -> int:
    """Return where the last line begins, looking backwards."""
    block = 64 * 1024
    end = size
    while end > 0:
        start = max(0, end - block)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _decode_or_none(line: bytes) -> Record | None:
    try:
        return results.decode(line)
    except LineError:
        return None


def _line_at(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.readline()


def _append_file(path: Path, lines: Iterator[bytes]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, MODE)
    try:
        for line in lines:
            _write_all(fd, line)
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    """Write every byte; a short write is gone on with."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
