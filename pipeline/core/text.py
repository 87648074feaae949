"""Text from outside, made harmless for a terminal or a log: the one place where that is done."""

from __future__ import annotations

import re

# C0 and C1 controls with DEL, line and paragraph separators, and the characters that reorder or hide text
# (the last range are the tags, an invisible ASCII).
_ACTIVE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u180e\u2028\u2029\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def text(value: object, limit: int = 2_000) -> str:
    """Return a text in which no character acts: controls and direction marks become visible escapes.

    Longer texts are cut at `limit` characters.
    """
    escaped = _ACTIVE.sub(lambda match: match.group().encode("unicode_escape", "backslashreplace").decode(), str(value))
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"
