"""JSON Lines, exactly: bytes to lines and values and back, with nothing changed silently.

orjson is fast and strict (it refuses NaN, lone surrogates, invalid UTF-8), but without a word it turns integers beyond
64 bits into floats and tiny numbers into 0, and keeps the last of two equal keys. All that is rare, so a cheap look at
the bytes decides whether the exact, slow parser of the standard library has to be asked.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator
from typing import Any, Protocol

import orjson

from pipeline.core.errors import LineError

MAX_DEPTH = 200
_BEYOND_INTEGERS = 2.0**63  # orjson turns larger integers into floats, so a float from here up may be one
_KEY = re.compile(rb'"\s*:')
_TINY = re.compile(rb"[eE]-[0-9]{3}|0{200}")  # one of these is in every number that is not 0 but becomes 0
_BLOCK_BYTES = 256 * 1024
_NO_LINE_ENDS = bytes.maketrans(b"\r\n", b"  ")


def loads(data: bytes) -> Any:
    """Parse one JSON text. Raises `LineError` if it is not valid, or if parsing would change a value."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        raise LineError(f"not valid JSON: {exc}") from exc
    shape = _Shape()
    _measure(value, 1, shape)
    if shape.depth > MAX_DEPTH:
        raise LineError(f"nested more than {MAX_DEPTH} deep")
    is_lossy = shape.has_huge_number or (shape.has_zero and _TINY.search(data))
    if is_lossy or len(_KEY.findall(data)) != shape.keys:
        return _loads_exactly(data)
    return value


def is_too_deep(value: Any) -> bool:
    """Return True if a value is nested deeper than a line may be."""
    shape = _Shape()
    _measure(value, 1, shape)
    return shape.depth > MAX_DEPTH


def dumps(value: Any) -> bytes:
    """Encode as compact JSON; integers of any size stay exact."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def one_line(raw: bytes) -> bytes:
    """Remove the line ends of a valid JSON text: they can only be between tokens.

    A lone carriage return ends a line for whoever reads a file as text, so it goes too.
    """
    return raw.translate(_NO_LINE_ENDS) if b"\n" in raw or b"\r" in raw else raw


class _Shape:
    """The shape of a parsed value: number of object keys, depth, and whether numbers may differ from the text."""

    __slots__ = ("depth", "has_huge_number", "has_zero", "keys")

    def __init__(self) -> None:
        self.keys = 0
        self.depth = 0
        self.has_huge_number = False
        self.has_zero = False


def _measure(value: Any, depth: int, shape: _Shape) -> None:
    """Record the shape of a value at this depth; goes at most one level beyond `MAX_DEPTH`."""
    kind = type(value)
    if kind is float:
        shape.has_huge_number |= abs(value) >= _BEYOND_INTEGERS
        shape.has_zero |= not value
        return
    if kind is not dict and kind is not list:
        return
    shape.depth = max(shape.depth, depth)
    if depth > MAX_DEPTH:
        return
    if kind is dict:
        shape.keys += len(value)
        value = value.values()
    for child in value:
        if type(child) is not str:
            _measure(child, depth + 1, shape)


def _loads_exactly(data: bytes) -> Any:
    return json.loads(data, object_pairs_hook=_unique, parse_float=_float, parse_constant=_refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise LineError(f"the key {twice!r} is given twice in one object")
    return result


def _float(text: str) -> float:
    value = float(text)
    if not value and text.lower().partition("e")[0].strip("-0."):
        raise LineError(f"the number {reprlib.repr(text)} is too small: it would become 0")
    return value


def _refuse_constant(name: str) -> Any:
    raise LineError(f"{name} is not JSON")


class Source(Protocol):
    """A source of lines: `read1` returns the bytes available now, at most `size`, and b"" at the end."""

    def read1(self, size: int = -1, /) -> bytes: ...


def lines(file: Source, max_bytes: int, endless: float = math.inf) -> Iterator[tuple[bytes, int]]:
    """Yield each line without its `\\n`, split on `\\n` only, with its full length in bytes.

    Never holds more than `max_bytes` and a block: of a longer line only the first `max_bytes` are kept, and the length
    tells. A last line without `\\n` is a line; an empty one after the last `\\n` is not. Raises `LineError` where no
    line ends within `endless` bytes.
    """
    kept = bytearray()
    length = 0
    while block := file.read1(_BLOCK_BYTES):
        start = 0
        while (end := block.find(b"\n", start)) >= 0:
            if length:
                kept += block[start : min(end, start + max(0, max_bytes - len(kept)))]
                yield bytes(kept), length + end - start
                kept.clear()
                length = 0
            else:
                yield block[start : min(end, start + max_bytes)], end - start
            start = end + 1
        kept += block[start : start + max(0, max_bytes - len(kept))]
        length += len(block) - start
        if length > endless:
            raise LineError(f"no line ends within {endless:,} bytes")
    if length:
        yield bytes(kept), length
