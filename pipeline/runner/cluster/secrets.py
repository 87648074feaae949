"""Secrets on their way to workers: unreadable in what Ray logs, and in what it shows.

Ray pool environment variables to workers, but writes them to a log on every machine; arguments it keeps in its tables.
So what travels as a variable is sealed with a pad of random bytes, used once, which travels as an argument: each of the
two alone says nothing but how long the secrets are.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import orjson

VARIABLE = "PIPELINE_SEALED"


def seal(values: Mapping[str, str]) -> tuple[str, bytes]:
    """Return the sealed text of some values, and the pad that opens it."""
    content = orjson.dumps(values)
    pad = secrets.token_bytes(len(content))
    return _mixed(content, pad).hex(), pad


def unseal(text: str, pad: bytes) -> dict[str, str]:
    """Return the values again."""
    values: Any = orjson.loads(_mixed(bytes.fromhex(text), pad))
    return dict(values)


def _mixed(content: bytes, pad: bytes) -> bytes:
    return bytes(one ^ other for one, other in zip(content, pad, strict=True))
