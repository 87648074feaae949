"""Inputs -> lines: files, objects in stores, globs, directories, stdin; plain, .gz or .zst; split on `\\n` only.

Memory does not grow with the size of a file: a block and one line are held at a time, and only the beginning of a
line beyond the limit; a line that never ends (a device, a bomb) ends its input. The first bytes of a file, not its
name, decide its compression. Objects are named and read like files.
"""

from __future__ import annotations

import glob
import gzip
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from pipeline.core import jsonl, object_store
from pipeline.core.errors import LineError, UsageError
from pipeline.core.hashing import checksum
from pipeline.inputs.sources import GZIP, STDIN, ZSTD, ByteRange, opened

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# Files that this program writes: x.results.jsonl and those beside it, also if the user compressed them.
_OURS = re.compile(
    r"(\.(results(\.old-[0-9]+|\.tmp)?|superseded|attempts)|\.parts/part-[0-9]+-[0-9]+)\.jsonl(\.gz|\.zst)?$"
)
_BESIDE = re.compile(r"(\.old-[0-9]+\.jsonl|\.(superseded|attempts)\.jsonl|\.(usage\.json|torn|index)|\.jsonl)(\.tmp)?")
# The same for results in an object store, which are a folder.
_PART_OF = re.compile(r"(part-[0-9]{5,}|superseded-[0-9a-f]+)\.jsonl|usage\.json|(old-[0-9]+|work)/.*")
_BOM = b"\xef\xbb\xbf"
_ENDLESS_BYTES = 2**30  # longer than any real line, and read within seconds
_BATCH_LINES = 256
_BATCH_BYTES = 1024 * 1024
_BLOCK_BYTES = 256 * 1024
_LINE_END = ord("\n")
_DAMAGED = (OSError, EOFError, zlib.error, zstd.ZstdError)
_SizeOf = Callable[[bytes], int | None] | None
_File = BufferedReader | gzip.GzipFile | zstd.ZstdFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One non-blank line of an input; `problem` says why its bytes cannot be used."""

    source: str
    number: int
    data: bytes
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Consecutive lines of an input, unchanged and with their line ends; `number` is that of the first.

    `count` includes blank lines. With a `problem` the batch is one line that cannot be used, or the rest of it.
    """

    source: str
    number: int
    count: int
    content: bytes
    problem: str | None = None

    def lines(self) -> list[Line]:
        """Return the lines that are not blank."""
        if self.problem:
            return [Line(source=self.source, number=self.number, data=self.content, problem=self.problem)]
        return [
            Line(source=self.source, number=number, data=data)
            for number, data in enumerate(self.content.split(b"\n"), start=self.number)
            if data and not data.isspace()
        ]

    def first_line(self) -> bytes:
        return self.content.partition(b"\n")[0]


def sources(inputs: Sequence[str], *, may_be_empty: bool = False, but: str | Path | None = None) -> list[str]:
    """Expand files, globs and directories into a list of readable inputs, each once, in order.

    A directory means its `*.jsonl`, `*.jsonl.gz` and `*.jsonl.zst`. Directories and globs leave out files that this
    program writes; `but` is the results file, so that the command can be repeated if it is among the inputs. URLs of
    stores are expanded in the same way, a prefix like a directory; there `but` is the folder of the results.
    Raises `UsageError` for an input that does not exist or cannot be read, and for a directory without inputs, unless
    `may_be_empty` (an empty drop folder).
    """
    found: dict[str, str] = {}
    for item in inputs:
        for path in _expand(item, may_be_empty, but):
            # The same file under two names is one input.
            is_file = path != STDIN and not object_store.is_url(path)
            identity = os.path.realpath(path) if is_file else path
            found.setdefault(identity, path)
    for path in found.values():
        _require_readable(path)
    return list(found.values())


def lines(source: str | ByteRange, max_line_bytes: int) -> Iterator[Line]:
    """Yield the non-blank lines of one input, numbered from 1 as in an editor.

    An input that turns out damaged (a cut archive, a disk error) or endless ends with a line that says so.
    """
    for batch in batches([source], max_line_bytes):
        yield from batch.lines()


def batches(inputs: Iterable[str | ByteRange], max_line_bytes: int, size_of: _SizeOf = None) -> Iterator[Batch]:
    """Yield the lines of all inputs in batches of bounded length and size: a thread hop pays only for many lines.

    `size_of` returns the size in bytes of an earlier run's batch, given the checksum of its first line. A batch that
    begins with the same line is cut at the same size, so the same lines are mostly in the same batch.
    """
    for each in inputs:
        yield from _batches_of(each if isinstance(each, ByteRange) else ByteRange(source=each), max_line_bytes, size_of)


def _batches_of(span: ByteRange, max_line_bytes: int, size_of: _SizeOf) -> Iterator[Batch]:
    source, number = span.source, span.number
    try:
        with opened(span) as raw, _decompressed(raw) if span.is_whole else raw as file:
            ahead = _Ahead(file)
            if not span.start:
                ahead.skip(_BOM)
            while not ahead.is_at_end():
                if size := _cut(ahead, max_line_bytes, size_of):
                    content = ahead.take(size)
                    batch = Batch(source=source, number=number, count=content.count(b"\n"), content=content)
                else:
                    endless = max(_ENDLESS_BYTES, max_line_bytes)
                    data, length = next(jsonl.lines(ahead, max_line_bytes, endless), (b"", 0))  # damaged: nothing left
                    if ahead.damage:
                        break
                    problem = (
                        f"longer than {max_line_bytes:,} bytes ({length:,}); raise input.max_line_bytes to allow it"
                    )
                    batch = Batch(source=source, number=number, count=1, content=data[:4096], problem=problem)
                yield batch
                number += batch.count
            if ahead.damage:
                raise ahead.damage
    except (*_DAMAGED, LineError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        problem = f"the input cannot be read beyond this line: {reason}"
        content = f"{source}:{problem}".encode()
        yield Batch(source=source, number=number, count=1, content=content, problem=problem)


def _cut(ahead: _Ahead, max_line_bytes: int, size_of: _SizeOf) -> int:
    """Return the size in bytes of the next batch, which is whole lines; 0 if the next line is too long."""
    end, count = 0, 0
    while count < _BATCH_LINES and end < _BATCH_BYTES:
        next_end = ahead.end_of_line(end, max_line_bytes)
        if next_end - end - 1 > max_line_bytes or next_end == end:
            break
        size = size_of(checksum(ahead.data[end : next_end - 1])) if size_of else 0
        if size:
            # A known range may begin here: end the batch before it, or take it whole.
            if end:
                break
            if ahead.has_line_end_at(size):
                return size
        end = next_end
        count += 1
    return end


class _Ahead:
    """The read-ahead buffer of a file; the last line gets a line end if it has none.

    `damage` is the error that ended the file early; an incomplete last line is dropped then.
    """

    def __init__(self, file: jsonl.Source) -> None:
        self._file = file
        self._has_ended = False
        self.data = bytearray()
        self.damage: Exception | None = None

    def is_at_end(self) -> bool:
        return not self._has(1)

    def skip(self, beginning: bytes) -> None:
        if self._has(len(beginning)) and self.data.startswith(beginning):
            del self.data[: len(beginning)]

    def end_of_line(self, start: int, max_bytes: int) -> int:
        """Return the end of the line that begins at `start`, after its `\\n`; for a longer line, the end of the buffer.

        At the end of the file, return `start`.
        """
        looked = start
        while (end := self.data.find(b"\n", looked)) < 0:
            looked = len(self.data)
            if looked - start > max_bytes + 1 or not self._has(looked + 1):
                return len(self.data)
        return end + 1

    def has_line_end_at(self, size: int) -> bool:
        """Return True if the first `size` bytes are whole lines."""
        return self._has(size) and self.data[size - 1] == _LINE_END

    def take(self, size: int) -> bytes:
        taken = bytes(memoryview(self.data)[:size])
        del self.data[:size]
        return taken

    def read1(self, size: int = -1, /) -> bytes:
        """Return the available part of the next line, so that `jsonl.lines` can read a single line."""
        if not self._has(1):
            return b""
        return self.take(self.data.find(b"\n") + 1 or len(self.data))

    def _has(self, size: int) -> bool:
        """Read until the buffer has `size` bytes; return False if the file ends first."""
        while len(self.data) < size and not self._has_ended:
            try:
                block = self._file.read1(_BLOCK_BYTES)
            except _DAMAGED as exc:
                self._has_ended, self.damage = True, exc
                del self.data[self.data.rfind(b"\n") + 1 :]
                break
            self.data += block
            if not block:
                self._has_ended = True
                if self.data and self.data[-1] != _LINE_END:
                    self.data += b"\n"
        return len(self.data) >= size


def is_file_of(source: str, path: Path) -> bool:
    """Return True if an input is this existing file, even under another name."""
    if object_store.is_url(source):
        return False
    if source == STDIN:
        return sys.stdin is not None and os.path.samestat(os.fstat(sys.stdin.fileno()), path.stat())
    return os.path.samefile(source, path)


def is_part_of(source: str, folder: str) -> bool:
    """Return True if an input is an object that this program writes into a folder of results."""
    return source.startswith(folder) and _PART_OF.fullmatch(source, len(folder)) is not None


def stem(source: str) -> str:
    """Return the name of an input without its suffixes: `data/q.jsonl.gz` -> `q`."""
    name = "stdin" if source == STDIN else Path(source).name
    for suffix in (".zst", ".gz", ".jsonl"):
        name = name.removesuffix(suffix)
    return name


def _expand(item: str, may_be_empty: bool, output: str | Path | None) -> list[str]:
    if object_store.is_url(item):
        with object_store.before_sending():
            return _expand_url(item, may_be_empty, output if isinstance(output, str) else None)
    path = Path(item)
    if item == STDIN or (os.path.exists(item) and not os.path.isdir(item)):
        return [item]
    if os.path.isdir(item):
        found = (str(path / name) for name in os.listdir(path) if name.endswith(SUFFIXES))
        names = sorted(name for name in found if not _is_ours(name, output))
        if not names and not may_be_empty:
            raise UsageError(f"the directory {item!r} contains no *.jsonl, *.jsonl.gz or *.jsonl.zst")
        return names
    if glob.has_magic(item):
        found = (name for name in glob.glob(item, recursive=True) if Path(name).is_file())
        names = sorted(name for name in found if not _is_ours(name, output))
        if not names:
            raise UsageError(f"no file matches {item!r}")
        return names
    raise UsageError(
        f"the input {item!r} does not exist", hint="give a JSONL file, a glob, a directory, or - for stdin"
    )


def _expand_url(url: str, may_be_empty: bool, folder: str | None) -> list[str]:
    """Return the objects that a URL means: one object, those under a prefix, or those that match a glob."""
    if not url.endswith("/") and object_store.head(url):
        return [url]
    is_glob = not url.endswith("/") and object_store.has_magic(url)
    prefix = url if url.endswith("/") else f"{url}/"
    found = (
        object_store.matching(url)
        if is_glob
        else [each for each in object_store.listed(prefix) if each.name.endswith(SUFFIXES)]
    )
    names = [each.url for each in found if not _is_part(each.url, folder)]
    if names or (may_be_empty and url.endswith("/")):
        return names
    if is_glob:
        raise UsageError(f"no object matches {url!r}")
    if url.endswith("/"):
        raise UsageError(f"there is no *.jsonl, *.jsonl.gz or *.jsonl.zst under {url!r}")
    raise UsageError(f"the input {url!r} does not exist", hint="check the bucket and the object name in the URL")


def _is_part(url: str, folder: str | None) -> bool:
    """Return True if an object belongs to results: those in this folder, or any in a folder `*.results/`."""
    default = url.rfind(".results/")
    of_default = default >= 0 and is_part_of(url, url[: default + len(".results/")])
    return of_default or (folder is not None and is_part_of(url, folder))


def _is_ours(name: str, output: str | Path | None) -> bool:
    """Return True if this program writes the file: by its name, or because it belongs to the output."""
    if _OURS.search(name) or output is None or object_store.is_url(output):
        return _OURS.search(name) is not None
    own, real = os.path.realpath(output), os.path.realpath(name)
    begin = own.removesuffix(".jsonl")
    return real == own or (real.startswith(begin) and _BESIDE.fullmatch(real, len(begin)) is not None)


def _require_readable(path: str) -> None:
    if path == STDIN:
        if sys.stdin is None:
            raise UsageError("the input '-' cannot be read: standard input is closed")
        return
    if object_store.is_url(path):
        return  # it was looked at when it was found
    if not path.isascii() and path != os.fsencode(path).decode("utf-8", "replace"):
        raise UsageError(f"the name of the input {path!r} is not UTF-8, so results cannot name it; rename the file")
    if not os.path.exists(path):
        raise UsageError(f"the input {path!r} is a link to a file that does not exist")
    if os.path.isdir(path) or not os.access(path, os.R_OK):
        reason = "it is a directory" if os.path.isdir(path) else "permission denied"
        raise UsageError(f"the input {path!r} cannot be read: {reason}")


def _decompressed(raw: BufferedReader) -> _File:
    """Return a file to read lines from; closing it does not close `raw`."""
    magic = raw.peek(4)[:4]
    if magic.startswith(GZIP):
        return gzip.GzipFile(fileobj=raw)
    if ZSTD.match(magic):
        return zstd.ZstdFile(raw)
    return raw
