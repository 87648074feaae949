"""What an honest answer is: a function of the record alone, which server and checker know without each other.

A record's id travels in the text of its last user message, so the server can answer it without any state, and an
answer that reached the wrong record is seen.
"""

from __future__ import annotations

import hashlib
import re

_PROMPT = re.compile(r"record (\S+)")


def prompt(record_id: str) -> str:
    """Return the text that asks for a record."""
    return f"record {record_id}"


def record_in(text: str) -> str | None:
    """Return the id of the record that a text asks for."""
    match = _PROMPT.match(text)
    return match[1] if match else None


def content(record_id: str) -> str:
    """Return the text that answers a record."""
    return f"answer to {record_id}: {_digest(record_id)[:24]}"


def tokens(record_id: str) -> tuple[int, int]:
    """Return the tokens of input and output that answering a record costs."""
    digest = _digest(record_id)
    return 10 + int(digest[:2], 16), 1 + int(digest[2:4], 16)


def share(*parts: object) -> float:
    """Return a number from 0 to below 1 that is a function of some values."""
    return int(_digest("\0".join(map(str, parts)))[:12], 16) / 16**12


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
