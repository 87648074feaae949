"""Files that survive: appended by whole lines, replaced whole or not at all, locked, readable by their owner only.

The first failed write or sync of a file is final: after a failed sync the kernel may have thrown the pages away and
would report success the second time (https://wiki.postgresql.org/wiki/Fsync_Errors).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipeline.core.errors import StorageError, TryLaterError, UsageError

MODE = 0o600
_BLOCK_BYTES = 64 * 1024
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has only the one that syncs times, too
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})


def beside(path: Path, suffix: str) -> Path:
    """Return the name of a file that belongs to a results file: `a.jsonl`, `.usage.json` -> `a.usage.json`.

    It lies beside the file itself, so it is found under whatever name the results are opened.
    """
    path = target_of(path)
    return path.with_name(path.name.removesuffix(".jsonl") + suffix)


def target_of(path: Path) -> Path:
    """Return the file itself where a name is a symbolic link: a rename must not put a file in the link's place."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


class Appender:
    """Appends whole lines to an open file; with `sync`, `append` returns once they are on the disk.

    Owns the descriptor. What could not be written whole is taken back, so the file ends with a whole line.
    """

    def __init__(self, fd: int, path: Path, *, sync: bool) -> None:
        self.fd = fd
        self._path = path
        self._sync = sync
        self.has_failed = False

    def append(self, data: bytes) -> None:
        """Write some lines; raises `StorageError`, the first time and from then on."""
        if self.has_failed:
            raise StorageError(f"{str(self._path)!r} could not be written before")
        size = os.fstat(self.fd).st_size
        try:
            write_all(self.fd, data)
            if self._sync:
                _sync_data(self.fd)
        except OSError as exc:
            self.has_failed = True
            with suppress(OSError):
                os.ftruncate(self.fd, size)
            raise StorageError(
                f"cannot write {str(self._path)!r}: {exc.strerror}",
                hint="what was reported done is safe; make room and repeat the command to go on",
            ) from exc

    def close(self) -> None:
        """Close the file, and with it give its lock back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_locked(path: Path) -> int:
    """Open a regular file for appending, made if need be, and lock the file itself, not a name beside it.

    Raises `TryLaterError` when another process holds the lock, `StorageError` when the disk is full or broken,
    `UsageError` when it cannot be opened for another reason or is another user's, who could read it.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, MODE)
        except OSError as exc:
            kind = StorageError if exc.errno in _DISK_ERRORS else UsageError
            raise kind(f"the output {str(path)!r} cannot be written: {exc.strerror}") from exc
        mode, owner = os.fstat(fd).st_mode, os.fstat(fd).st_uid
        if not stat.S_ISREG(mode):
            os.close(fd)
            raise UsageError(f"the output {str(path)!r} is not a regular file; results must stay readable to go on")
        if os.geteuid() not in (0, owner) and owner != 0:  # root reads everything anyway
            os.close(fd)
            raise UsageError(f"the output {str(path)!r} belongs to another user; choose another -o")
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


@contextmanager
def open_private(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing from its beginning, made if need be; its owner's only. OSErrors are `StorageError`."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path, flags, MODE), "wb") as file:
            yield file
    except OSError as exc:
        raise StorageError(f"cannot write {str(path)!r}: {exc.strerror}") from exc


def close(fd: int) -> None:
    """Close a file, and with it give its lock back."""
    os.close(fd)


def make_private(fd: int) -> None:
    """Let a file that was there before be its owner's only, as one that is made here is."""
    with suppress(PermissionError):  # root's file, or a file system that knows no modes
        os.fchmod(fd, MODE)


def replace(path: Path, lines: Iterable[bytes], *, mode: int = MODE) -> int:
    """Put a new file in the place of an old one, or of none, and return its descriptor, open for appending and locked.

    The new one is locked before it can be seen. Raises OSError; then the old one is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    fd = -1
    try:
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND | os.O_CLOEXEC, MODE)
        os.fchmod(fd, mode)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for line in lines:
            write_all(fd, line)
        os.fsync(fd)
        os.rename(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            os.close(fd)
            temporary.unlink()
        raise
    return fd


def write_file(path: Path, content: bytes, *, mode: int = MODE) -> None:
    """Write a small file so that it is there whole or not at all."""
    try:
        os.close(replace(path, [content], mode=mode))
    except OSError as exc:
        raise StorageError(f"cannot write {str(path)!r}: {exc.strerror}") from exc


def append_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Add lines to a file that nobody else writes, after a line end if a crash cut its last line; raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, MODE)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            write_all(fd, b"\n")
        for line in lines:
            write_all(fd, line)
        os.fsync(fd)
        sync_directory(path.parent)
    finally:
        os.close(fd)


def last_line_start(fd: int, size: int) -> int:
    """Return where the last line of a file begins, looking backwards."""
    end = size
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def write_all(fd: int, data: bytes) -> None:
    """Write all bytes, continuing after short writes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_directory(path: Path) -> None:
    """Make a name that was made or changed in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
