"""Make text from outside harmless for a terminal or a log. No other module does this."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.core.http import Post
from pipeline.core.types import HttpResponse

MASK = "[key]"
_SHORTEST_KEY = 16  # a shorter key is a placeholder for a server without keys, such as `any` or `EMPTY`


MAX_MESSAGE = 2000
MAX_WORD = 200
_EXCERPT = 80
_PLAIN_WORD = re.compile(r"(?:req|chatcmpl|msg|cmpl)[_-][A-Za-z0-9_-]{1,100}")  # the ids in every answer
_KEYS = re.compile(r"(?<![A-Za-z0-9])(sk-|gsk_|xai-|hf_|AIza|[Bb]earer +)[\w.*~+/=-]{4,}")


# C0 and C1 controls with DEL, line and paragraph separators, and the characters that reorder or hide text
# (the last range are the tags, an invisible ASCII).
_ACTIVE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u180e\u2028\u2029\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def escape(value: object, limit: int = 2_000) -> str:
    """Return a text without active characters: controls and direction marks become visible escapes.

    Longer texts are cut at `limit` characters.
    """
    escaped = _ACTIVE.sub(lambda match: match.group().encode("unicode_escape", "backslashreplace").decode(), str(value))
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def sanitize(text: str, limit: int) -> str:
    """Return text from outside on one line: without control characters and keys, cut at `limit`."""
    text = text[: 2 * limit]
    if not text.isprintable():
        text = "".join(character if character.isprintable() else " " for character in text)
    text = _KEYS.sub(r"\1…", " ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def excerpt(body: bytes, limit: int = _EXCERPT) -> str:
    """Return the beginning of a body as printable text."""
    return sanitize(body[: 8 * limit].decode("utf-8", "replace"), limit)


def word(value: Any) -> str | None:
    """Return a provider's word, None for anything else (a numeric code only repeats the status)."""
    if isinstance(value, str) and _PLAIN_WORD.fullmatch(value):
        return value
    return sanitize(value, MAX_WORD) or None if isinstance(value, str) else None


def redactor(key: str | None) -> Callable[[bytes], bytes]:
    """Return a function that replaces the key in bytes by `[key]`."""
    if key is None or len(key) < _SHORTEST_KEY:
        return lambda data: data
    secret = key.encode()
    return lambda data: data.replace(secret, MASK.encode())


def redacted_post(post: Post, key: str | None) -> Post:
    """Return a function that posts like `post`, but replaces the key in answers by `[key]`."""
    if key is None or len(key) < _SHORTEST_KEY:
        return post

    async def post_discreetly(body: bytes) -> HttpResponse:
        return redact(await post(body), key)

    return post_discreetly


def redact(answer: HttpResponse, key: str | None) -> HttpResponse:
    """Return an answer in which `[key]` replaces the key."""
    if key is None or len(key) < _SHORTEST_KEY:
        return answer
    if key.encode() not in answer.body and not any(key in value for value in answer.headers.values()):
        return answer
    return replace(
        answer,
        headers={name: value.replace(key, MASK) for name, value in answer.headers.items()},
        body=answer.body.replace(key.encode(), MASK.encode()),
    )
