"""Posting that keeps the key to itself: a server may repeat it, and what it answers goes into files and messages.

The key itself is looked for, because no pattern knows them all: `sk-…` is one provider's habit, Azure's are bare hex.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.transport import Post
from pipeline.types import Answer

MASK = "[key]"
_SHORTEST_KEY = 16  # what is shorter is no secret but a word for a server that wants none: `any`, `EMPTY`


def discreet(post: Post, key: str | None) -> Post:
    """Return a function that posts as `post` does; where its answers repeat the key, they say `[key]` instead."""
    if key is None or len(key) < _SHORTEST_KEY:
        return post
    secret = key.encode()

    async def post_discreetly(body: bytes) -> Answer:
        answer = await post(body)
        if secret in answer.body or any(key in value for value in answer.headers.values()):
            return _without(answer, key)
        return answer

    return post_discreetly


def _without(answer: Answer, key: str) -> Answer:
    return replace(
        answer,
        headers={name: value.replace(key, MASK) for name, value in answer.headers.items()},
        body=answer.body.replace(key.encode(), MASK.encode()),
    )
