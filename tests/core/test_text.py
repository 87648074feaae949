from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import text as safe


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("plain text, Ärger, 日本語, 🙂", "plain text, Ärger, 日本語, 🙂", id="harmless"),
        pytest.param("[/x] [bold]a[/bold]", "[/x] [bold]a[/bold]", id="markup is only text"),
        pytest.param("a\nb\r\tc", "a\\nb\\r\\tc", id="newline, return, tab"),
        pytest.param("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m", id="CSI"),
        pytest.param("\x1b]0;title\x07", "\\x1b]0;title\\x07", id="OSC 0, title"),
        pytest.param("\x1b]8;;http://evil\x1b\\x", "\\x1b]8;;http://evil\\x1b\\x", id="OSC 8, link"),
        pytest.param("\x1b]52;c;ZXZpbA==\x07", "\\x1b]52;c;ZXZpbA==\\x07", id="OSC 52, clipboard"),
        pytest.param("\x1bPq#0\x1b\\", "\\x1bPq#0\\x1b\\", id="DCS"),
        pytest.param("\x9b31m\x85\x90", "\\x9b31m\\x85\\x90", id="C1"),
        pytest.param("\x7f\x00\x08", "\\x7f\\x00\\x08", id="DEL, NUL, backspace"),
        pytest.param("a\u202eb\u2066c\u2069", "a\\u202eb\\u2066c\\u2069", id="bidi overrides and isolates"),
        pytest.param("a\u061cb\u200e\u200f", "a\\u061cb\\u200e\\u200f", id="bidi marks"),
        pytest.param("a\u200bb\u2060\ufeff", "a\\u200bb\\u2060\\ufeff", id="zero width"),
        pytest.param("a\u2028b\u2029", "a\\u2028b\\u2029", id="separators"),
        pytest.param("a\U000e0041\U000e007f", "a\\U000e0041\\U000e007f", id="tags"),
        pytest.param("a\ud800", "a\\ud800", id="lone surrogate"),
    ],
)
def test_nothing_acts(text: str, shown: str) -> None:
    """Controls, escape sequences, direction marks and invisible characters become visible escapes."""
    assert safe.escape(text) == shown


@given(st.text(st.characters(), max_size=50))
def test_no_control_passes(text: str) -> None:
    """No text leaves anything but printable characters, which any stream can write."""
    shown = safe.escape(text)

    shown.encode()
    assert [char for char in shown if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")] == []
    assert [char for char in shown if unicodedata.bidirectional(char) in ("LRE", "RLE", "LRO", "RLO", "PDF")] == []
    assert [char for char in shown if unicodedata.bidirectional(char) in ("LRI", "RLI", "FSI", "PDI")] == []


@pytest.mark.parametrize(
    ("length", "limit", "shown"),
    [
        pytest.param(5, 5, "xxxxx", id="as long as allowed"),
        pytest.param(6, 5, "xxxx…", id="longer"),
        pytest.param(10**7, 3, "xx…", id="much longer"),
    ],
)
def test_long_texts_are_cut(length: int, limit: int, shown: str) -> None:
    """A text beyond the limit is cut, visibly, and never longer than the limit."""
    assert safe.escape("x" * length, limit) == shown


def test_escapes_count_towards_the_limit() -> None:
    """A text that grows by escaping is cut at the limit as well."""
    assert len(safe.escape("\0" * 1_000, 100)) == 100


def test_any_value_is_shown() -> None:
    """What is not a text is shown as its text."""
    assert safe.escape(ValueError("a\x1bb")) == "a\\x1bb"
