from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import jsonl
from pipeline.core.errors import LineError

LIMIT = 1_000


class Blocks:
    """A source that hands out its content in the given blocks."""

    def __init__(self, *blocks: bytes) -> None:
        self._blocks = [block for block in blocks if block]

    def read1(self, size: int = -1, /) -> bytes:
        return self._blocks.pop(0) if self._blocks else b""


def split(data: bytes, limit: int = LIMIT) -> list[tuple[bytes, int]]:
    return list(jsonl.lines(BytesIO(data), limit))


# ── lines ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b"", [], id="empty file"),
        pytest.param(b"a\nb\n", [b"a", b"b"], id="two lines"),
        pytest.param(b"a\nb", [b"a", b"b"], id="no final newline"),
        pytest.param(b"\n\na\n\n", [b"", b"", b"a", b""], id="empty lines"),
        pytest.param(b"\n", [b""], id="one empty line"),
        pytest.param(b"a\r\nb\r\n", [b"a\r", b"b\r"], id="CRLF"),
        pytest.param(b"a\rb\n", [b"a\rb"], id="lone CR"),
        pytest.param(b"a\x0bb\x0cc\x1cd\x1ee\n", [b"a\x0bb\x0cc\x1cd\x1ee"], id="VT, FF, FS, RS"),
        pytest.param(
            "a\u2028b\u2029c\u0085d\n".encode(), ["a\u2028b\u2029c\u0085d".encode()], id="U+2028, U+2029, U+0085"
        ),
        pytest.param(b"a\0b\n", [b"a\0b"], id="NUL"),
    ],
)
def test_lines_split_on_newline_only(data: bytes, expected: list[bytes]) -> None:
    """A line ends at a newline and at nothing else."""
    assert split(data) == [(line, len(line)) for line in expected]


@given(st.lists(st.binary(max_size=12) | st.sampled_from([b"\n", b"\r\n", b"\n\n", "\u2028".encode()])))
def test_lines_do_not_depend_on_blocks(blocks: list[bytes]) -> None:
    """However the bytes arrive, the lines are those of `bytes.split`."""
    found = list(jsonl.lines(Blocks(*blocks), LIMIT))

    expected = b"".join(blocks).split(b"\n")
    assert found == [(line, len(line)) for line in (expected if expected[-1] else expected[:-1])]


@given(st.lists(st.binary(max_size=12) | st.just(b"\n")), st.integers(0, 10))
def test_long_lines_are_cut_and_their_length_is_told(blocks: list[bytes], limit: int) -> None:
    """Of a line beyond the limit the beginning is kept and the full length told; the lines after it are whole."""
    found = list(jsonl.lines(Blocks(*blocks), limit))

    expected = b"".join(blocks).split(b"\n")
    assert found == [(line[:limit], len(line)) for line in (expected if expected[-1] else expected[:-1])]


def test_the_line_after_an_overlong_one_is_intact() -> None:
    """A line over many blocks is cut once, and the next one begins where it should."""
    data = b"x" * 1_000_000 + b"\n" + b'{"a":1}\n'

    assert split(data, 10) == [(b"x" * 10, 1_000_000), (b'{"a":1}', 7)]


def test_a_line_that_never_ends_is_given_up() -> None:
    """Where no line ends within the bytes that are given, reading stops with a line error; before that it does not."""
    data = b"a\n" + b"x" * 1_000_000 + b"\nb\n"

    assert len(list(jsonl.lines(BytesIO(data), 10, 1_000_000))) == 3
    with pytest.raises(LineError, match="no line ends within 300,000 bytes"):
        list(jsonl.lines(BytesIO(data), 10, 300_000))


# ── loads ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("1", 1, id="number"),
        pytest.param('"a"', "a", id="string"),
        pytest.param("null", None, id="null"),
        pytest.param("[]", [], id="empty array"),
        pytest.param(' {"a" : [true, 1.5]} \r', {"a": [True, 1.5]}, id="whitespace"),
        pytest.param('"a\u2028b\u0085c\x7f"', "a\u2028b\u0085c\x7f", id="separators in a string"),
        pytest.param('"\\ud83d\\ude42"', "🙂", id="surrogate pair"),
        pytest.param('{"a":{"x":1},"b":{"x":1}}', {"a": {"x": 1}, "b": {"x": 1}}, id="same key in two objects"),
        pytest.param('{"a":"\\"b\\":1"}', {"a": '"b":1'}, id="what looks like a key in a string"),
        pytest.param('{"":1}', {"": 1}, id="empty key"),
        pytest.param("18446744073709551615", 2**64 - 1, id="2^64-1"),
        pytest.param("18446744073709551616", 2**64, id="2^64"),
        pytest.param("-9223372036854775809", -(2**63) - 1, id="-2^63-1"),
        pytest.param('{"a":[1180591620717411303424]}', {"a": [2**70]}, id="2^70"),
        pytest.param("9" * 300, 10**300 - 1, id="300 digits"),
        pytest.param("[0.0, -0.0e-999, 5e-324]", [0.0, -0.0, 5e-324], id="zeros and the smallest double"),
    ],
)
def test_values_are_read_exactly(text: str, expected: Any) -> None:
    """What is valid JSON is read without any change, integers of every size included."""
    value = jsonl.loads(text.encode())

    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b'{"a":1,"a":2}', "'a' is given twice", id="key twice"),
        pytest.param(b'{"a":1, "a"\t: 1}', "'a' is given twice", id="key twice, same value"),
        pytest.param(b'{"a":1,"\\u0061":1}', "'a' is given twice", id="key twice, once escaped"),
        pytest.param(b'[[{"b":{"a":1,"a":2}}]]', "'a' is given twice", id="key twice deep inside"),
        pytest.param(b"1e400", "not valid JSON", id="1e400"),
        pytest.param(b"1e-400", "'1e-400' is too small", id="1e-400"),
        pytest.param(b'{"a":0.0,"b":[-2E-324]}', "'-2E-324' is too small", id="half the smallest double"),
        pytest.param(b"0." + b"0" * 400 + b"1", "is too small", id="400 zeros and a one"),
        pytest.param(b'{"n":NaN}', "not valid JSON", id="NaN"),
        pytest.param(b"[Infinity]", "not valid JSON", id="Infinity"),
        pytest.param(b"[-Infinity]", "not valid JSON", id="-Infinity"),
        pytest.param(b'{"a":1,"a":2,"n":NaN}', "not valid JSON", id="key twice and NaN"),
        pytest.param(b'"\\ud800"', "not valid JSON", id="lone surrogate"),
        pytest.param(b'"\xff"', "not valid JSON", id="invalid UTF-8"),
        pytest.param(b'"\xed\xa0\x80"', "not valid JSON", id="surrogate in UTF-8"),
        pytest.param(b"\xef\xbb\xbf1", "not valid JSON", id="BOM"),
        pytest.param('{"a":1}'.encode("utf-16"), "not valid JSON", id="UTF-16"),
        pytest.param(b'{"a":1}{"b":2}', "not valid JSON", id="two documents"),
        pytest.param(b'{"a":1} 2', "not valid JSON", id="document and scalar"),
        pytest.param(b'{"a":1,}', "not valid JSON", id="trailing comma"),
        pytest.param(b"{'a':1}", "not valid JSON", id="single quotes"),
        pytest.param(b'"a\x0bb"', "not valid JSON", id="control character in a string"),
        pytest.param(b"", "not valid JSON", id="nothing"),
        pytest.param(b"9" * 5_000, "not valid JSON", id="5,000 digits"),
    ],
)
def test_what_would_be_altered_is_refused(data: bytes, reason: str) -> None:
    """What is not valid JSON, or cannot be read without a loss, is a line error that says why."""
    with pytest.raises(LineError, match=reason):
        jsonl.loads(data)


@pytest.mark.parametrize(
    ("opening", "closing"), [pytest.param("[", "]", id="arrays"), pytest.param('{"a":', "}", id="objects")]
)
def test_depth_200_is_read(opening: str, closing: str) -> None:
    """A value nested 200 deep is read."""
    text = opening * 200 + "1" + closing * 200

    assert jsonl.dumps(jsonl.loads(text.encode())).decode() == text


@pytest.mark.parametrize("depth", [201, 1_000, 1_025, 100_000])
@pytest.mark.parametrize(
    ("opening", "closing"), [pytest.param("[", "]", id="arrays"), pytest.param('{"a":', "}", id="objects")]
)
def test_deeper_is_refused(opening: str, closing: str, depth: int) -> None:
    """A value nested more than 200 deep is a line error and never a RecursionError."""
    text = opening * depth + "1" + closing * depth

    with pytest.raises(LineError, match=r"nested more than 200 deep|not valid JSON"):
        jsonl.loads(text.encode())


@given(st.binary(max_size=40) | st.text('{}[]",:0123456789.-+eE\\u tfn', max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """No bytes raise anything but a line error, and what is read is what the standard library reads."""
    try:
        value = jsonl.loads(data)
    except LineError:
        return
    assert value == json.loads(data)


# ── dumps ─────────────────────────────────────────────────────────────────────────────────────────────

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_values_survive_writing_and_reading(value: Any) -> None:
    """Every JSON value comes back as it was, on one line, integers of any size included."""
    data = jsonl.dumps(value)

    assert b"\n" not in data
    assert jsonl.loads(data) == value


def test_dumps_is_compact_and_keeps_order() -> None:
    """Encoding keeps the order of keys and adds no space, on the exact way as well."""
    value = {"b": 1, "a": ["é", 2**70]}

    assert jsonl.dumps(value) == '{"b":1,"a":["é",1180591620717411303424]}'.encode()


def test_one_line_keeps_the_value() -> None:
    """A pretty-printed text becomes one line with the same value, escaped newlines included."""
    value = {"a": ["x\ny", {"b": 2**70}]}
    pretty = json.dumps(value, indent=2).replace("\n", "\r\n").encode() + b"\n"

    line = jsonl.one_line(pretty)

    assert not {*b"\r\n"} & {*line}
    assert jsonl.loads(line) == value
