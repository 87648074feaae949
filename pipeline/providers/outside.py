"""Text from outside: it stands in an error without control characters, without keys, and cut to a length."""

from __future__ import annotations

import re
from typing import Any

MAX_MESSAGE = 2000
MAX_WORD = 200

_EXCERPT = 80
_PLAIN_WORD = re.compile(r"(?:req|chatcmpl|msg|cmpl)[_-][A-Za-z0-9_-]{1,100}")  # ids as they come with every answer
_KEYS = re.compile(r"(?<![A-Za-z0-9])(sk-|gsk_|xai-|hf_|AIza|[Bb]earer +)[\w.*~+/=-]{4,}")


def printable(text: str, limit: int) -> str:
    """Return text from outside on one line: without control characters and keys, cut at `limit`."""
    text = text[: 2 * limit]
    if not text.isprintable():
        text = "".join(character if character.isprintable() else " " for character in text)
    text = _KEYS.sub(r"\1…", " ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def excerpt(body: bytes, limit: int = _EXCERPT) -> str:
    """Return the beginning of a body as printable text."""
    return printable(body[: 8 * limit].decode("utf-8", "replace"), limit)


def word(value: Any) -> str | None:
    """Return a word of the provider's, None for what is none (a numeric code says the status once more)."""
    if isinstance(value, str) and _PLAIN_WORD.fullmatch(value):
        return value
    return printable(value, MAX_WORD) or None if isinstance(value, str) else None
