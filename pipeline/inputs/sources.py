"""Inputs as bytes: a file, standard input or an object in a store, whole or one byte range of it."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core import object_store
from pipeline.core.errors import StorageError, TryLaterError, UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

STDIN = "-"
GZIP = b"\x1f\x8b"
ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or a skippable one: pzstd begins with it
_BLOCK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """A part of an input: the bytes from `start` to `end` (None: to its end); `number` is that of the first line.

    It is cut at line ends. `stamp` is the version of the input when it was cut (`version_of`).
    """

    source: str
    start: int = 0
    end: int | None = None
    number: int = 1
    stamp: str = ""

    def __str__(self) -> str:
        return self.source

    @property
    def is_whole(self) -> bool:
        return not self.start and self.end is None


def can_be_read_again(source: str) -> bool:
    """Return True if an input can be read again, also on another machine; stdin and pipes cannot."""
    return object_store.is_url(source) or (source != STDIN and Path(source).is_file())


def version_of(source: str) -> str:
    """Return a text that changes when an input changes: size and modification time of a file, etag of an object."""
    return _seen(source)[1]


def size_of(source: str) -> int:
    """Return the size of an input in bytes."""
    return _seen(source)[0]


def cut(source: str, size: int) -> Iterator[ByteRange]:
    """Cut an input into ranges of about `size` bytes, at line ends, reading only around the cuts; numbers are 1.

    A compressed input is one range. Raises `UsageError` if it cannot be read, `TryLaterError` if it changes.
    """
    total, stamp = _seen(source)
    whole = ByteRange(source=source, stamp=stamp)
    try:
        if _is_compressed(whole):
            yield whole
            return
        start = 0
        while start < total:
            end = _line_end(whole, min(start + size, total), total)
            yield ByteRange(source=source, start=start, end=end, stamp=stamp)
            start = end
    except OSError as exc:
        require_unchanged(whole)
        raise UsageError(f"the input {source!r} cannot be read: {exc.strerror or exc}") from exc


def require_unchanged(span: ByteRange) -> None:
    """Raise `TryLaterError` if an input has changed since a range was cut out of it."""
    if version_of(span.source) != span.stamp:
        raise TryLaterError(f"the input {span.source!r} was changed while it was being read", hint="repeat the command")


def opened(span: ByteRange) -> BufferedReader:
    """Open an input, or a part of it, for reading in one pass.

    Raises `OSError`, on opening or reading, also if the input has changed since the range was cut.
    """
    if object_store.is_url(span.source):
        try:
            return object_store.open_reader(span.source, span.start, span.end, etag=span.stamp or None)
        except StorageError as exc:
            raise OSError(exc.message) from exc
    if span.is_whole and not span.stamp:
        is_stdin = span.source == STDIN
        return open(sys.stdin.fileno() if is_stdin else span.source, "rb", closefd=not is_stdin)
    return BufferedReader(_Slice(span))


class _Slice(io.RawIOBase):
    """A byte range of a file as a raw stream."""

    def __init__(self, span: ByteRange) -> None:
        self._file = io.FileIO(span.source)
        self._file.seek(span.start)
        self._span = span
        self._left = sys.maxsize if span.end is None else span.end - span.start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        count = self._file.readinto(memoryview(buffer)[: self._left]) or 0
        if self._span.stamp not in ("", _stamp(os.fstat(self._file.fileno()))):
            raise OSError(f"{self._span.source!r} was changed while it was being read")
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _seen(source: str) -> tuple[int, str]:
    """Return size and stamp of an input."""
    if object_store.is_url(source):
        with object_store.before_sending():
            found = object_store.head(source)
        if found is None:
            raise UsageError(f"the input {source!r} does not exist")
        return found.size, found.etag
    try:
        status = os.stat(source)
    except OSError as exc:
        raise UsageError(f"the input {source!r} cannot be read: {exc.strerror}") from exc
    return status.st_size, _stamp(status)


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _is_compressed(whole: ByteRange) -> bool:
    with opened(whole) as file:
        magic = file.peek(4)[:4]
    return magic.startswith(GZIP) or ZSTD.match(magic) is not None


def _line_end(whole: ByteRange, at: int, total: int) -> int:
    """Return the end of the line that holds the byte before `at`."""
    end = at - 1
    with opened(ByteRange(source=whole.source, start=end, end=total, stamp=whole.stamp)) as file:
        while block := file.readline(_BLOCK_BYTES):
            end += len(block)
            if block.endswith(b"\n"):
                break
    return end
