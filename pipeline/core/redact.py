"""Posting that keeps the key to itself: a server may repeat it, and what it answers goes into files and messages.

The key itself is looked for, because no pattern knows them all: `sk-…` is one provider's habit, Azure's are bare hex.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipeline.core.http import Post
from pipeline.core.types import Answer

MASK = "[key]"
_SHORTEST_KEY = 16  # what is shorter is no secret but a word for a server that wants none: `any`, `EMPTY`


def masking(key: str | None) -> Callable[[bytes], bytes]:
    """Return a function that puts `[key]` where bytes repeat the key."""
    if key is None or len(key) < _SHORTEST_KEY:
        return lambda data: data
    secret = key.encode()
    return lambda data: data.replace(secret, MASK.encode())


def discreet(post: Post, key: str | None) -> Post:
    """Return a function that posts as `post` does; where its answers repeat the key, they say `[key]` instead."""
    if key is None or len(key) < _SHORTEST_KEY:
        return post

    async def post_discreetly(body: bytes) -> Answer:
        return without(await post(body), key)

    return post_discreetly


def without(answer: Answer, key: str | None) -> Answer:
    """Return an answer in which `[key]` stands where it repeats the key."""
    if key is None or len(key) < _SHORTEST_KEY:
        return answer
    if key.encode() not in answer.body and not any(key in value for value in answer.headers.values()):
        return answer
    return replace(
        answer,
        headers={name: value.replace(key, MASK) for name, value in answer.headers.items()},
        body=answer.body.replace(key.encode(), MASK.encode()),
    )
