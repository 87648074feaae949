"""Inputs -> lines: files, globs, directories, stdin; plain, .gz or .zst; streaming, split on `\\n` only.

Memory does not follow the size of a file: a block and one line are held at a time, and of a line beyond the limit
only the beginning; a line that never ends (a device, a bomb) ends its input. What kind of compression a file has is
told by its first bytes, not by its name.
"""

from __future__ import annotations

import glob
import gzip
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain
from pathlib import Path

from pipeline import jsonl
from pipeline.errors import LineError, UsageError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STDIN = "-"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# What this program writes: x.results.jsonl and what comes to lie beside it, compressed by somebody or not.
_OURS = re.compile(r"\.(results(\.old-[0-9]+|\.tmp)?|superseded|attempts)\.jsonl(\.gz|\.zst)?$")
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or one to skip: pzstd begins with that
_ENDLESS_BYTES = 2**30  # nobody's line, and soon read
_BATCH_LINES = 256
_BATCH_BYTES = 1024 * 1024
_UNREADABLE = (OSError, EOFError, zlib.error, zstd.ZstdError, LineError)
_File = BufferedReader | gzip.GzipFile | zstd.ZstdFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of an input that is not blank; `problem` says why its bytes cannot be used."""

    source: str
    number: int
    data: bytes
    problem: str | None = None


def sources(inputs: Sequence[str], *, may_be_empty: bool = False) -> list[str]:
    """Expand files, globs and directories into a list of readable inputs, each once, in order.

    A directory stands for its `*.jsonl`, `*.jsonl.gz` and `*.jsonl.zst`, without files that this program writes.
    Raises `UsageError` for what does not exist or cannot be read, and for a directory without any input, unless that
    may be (a drop folder in which nothing was dropped).
    """
    found: dict[str, str] = {}
    for path in (path for item in inputs for path in _expand(item, may_be_empty)):
        found.setdefault(path if path == STDIN else os.path.realpath(path), path)
    for path in found.values():
        _require_readable(path)
    return list(found.values())


def lines(source: str, max_line_bytes: int) -> Iterator[Line]:
    """Yield the lines of one input that are not blank, numbered from 1 as an editor numbers them.

    An input that turns out damaged (a cut archive, a disk error) or endless ends with a line that says so.
    """
    number = 0
    endless = max(_ENDLESS_BYTES, max_line_bytes)
    try:
        with _open(source) as raw, _decompressed(raw) as file:
            for number, (data, length) in enumerate(jsonl.lines(file, max_line_bytes, endless), start=1):
                if number == 1:
                    data = data.removeprefix(_BOM)
                if length > max_line_bytes:
                    problem = (
                        f"longer than {max_line_bytes:,} bytes ({length:,}); raise input.max_line_bytes to allow it"
                    )
                    yield Line(source=source, number=number, data=data[:4096], problem=problem)
                elif data and not data.isspace():
                    yield Line(source=source, number=number, data=data)
    except _UNREADABLE as exc:
        reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        problem = f"the input cannot be read beyond this line: {reason}"
        yield Line(source=source, number=number + 1, data=f"{source}:{problem}".encode(), problem=problem)


def batches(inputs: Iterable[str], max_line_bytes: int) -> Iterator[list[Line]]:
    """Yield the lines of all inputs in lists of bounded length and size: a thread hop pays only for many lines."""
    batch: list[Line] = []
    size = 0
    for line in chain.from_iterable(lines(source, max_line_bytes) for source in inputs):
        batch.append(line)
        size += len(line.data)
        if len(batch) >= _BATCH_LINES or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def is_file_of(source: str, path: Path) -> bool:
    """Tell whether an input is a file that exists, under whatever name."""
    if source == STDIN:
        return sys.stdin is not None and os.path.samestat(os.fstat(sys.stdin.fileno()), path.stat())
    return os.path.samefile(source, path)


def stem(source: str) -> str:
    """Return the name of an input without its suffixes: `data/q.jsonl.gz` -> `q`."""
    name = "stdin" if source == STDIN else Path(source).name
    for suffix in (".zst", ".gz", ".jsonl"):
        name = name.removesuffix(suffix)
    return name


def _expand(item: str, may_be_empty: bool) -> list[str]:
    path = Path(item)
    if item == STDIN or (os.path.exists(item) and not os.path.isdir(item)):
        return [item]
    if os.path.isdir(item):
        names = sorted(name for name in os.listdir(path) if name.endswith(SUFFIXES) and not _OURS.search(name))
        if not names and not may_be_empty:
            raise UsageError(f"the directory {item!r} holds no *.jsonl, *.jsonl.gz or *.jsonl.zst")
        return [str(path / name) for name in names]
    if glob.has_magic(item):
        names = sorted(
            name for name in glob.glob(item, recursive=True) if Path(name).is_file() and not _OURS.search(name)
        )
        if not names:
            raise UsageError(f"no file matches {item!r}")
        return names
    raise UsageError(
        f"the input {item!r} does not exist", hint="give a JSONL file, a glob, a directory, or - for stdin"
    )


def _require_readable(path: str) -> None:
    if path == STDIN:
        if sys.stdin is None:
            raise UsageError("the input '-' cannot be read: standard input is closed")
        return
    if not path.isascii() and path != os.fsencode(path).decode("utf-8", "replace"):
        raise UsageError(f"the name of the input {path!r} is not UTF-8, so no result could name it; rename the file")
    if not os.path.exists(path):
        raise UsageError(f"the input {path!r} is a link to a file that does not exist")
    if os.path.isdir(path) or not os.access(path, os.R_OK):
        reason = "it is a directory" if os.path.isdir(path) else "permission denied"
        raise UsageError(f"the input {path!r} cannot be read: {reason}")


def _open(source: str) -> BufferedReader:
    return open(sys.stdin.fileno() if source == STDIN else source, "rb", closefd=source != STDIN)


def _decompressed(raw: BufferedReader) -> _File:
    """Return a file to read lines from; closing it does not close `raw`."""
    magic = raw.peek(4)[:4]
    if magic.startswith(_GZIP):
        return gzip.GzipFile(fileobj=raw)
    if _ZSTD.match(magic):
        return zstd.ZstdFile(raw)
    return raw
