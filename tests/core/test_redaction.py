from __future__ import annotations

import pytest

from pipeline.core.http import Post
from pipeline.core.text import redacted_post
from pipeline.core.types import HttpResponse

KEY = "9f3c7A1e5b8D2c6f4a0E7d1B3c5f8a2e"


def posting(answer: HttpResponse) -> Post:
    async def post(body: bytes) -> HttpResponse:
        return answer

    return post


async def test_an_answer_does_not_hold_the_key() -> None:
    """Body and headers that repeat the key say `[key]` in its place, and nothing else changes."""
    careless = HttpResponse(status=401, headers={"x-key": f"Bearer {KEY}", "x": "y"}, body=f'"{KEY}", {KEY}'.encode())

    answer = await redacted_post(posting(careless), KEY)(b"")

    assert answer == HttpResponse(status=401, headers={"x-key": "Bearer [key]", "x": "y"}, body=b'"[key]", [key]')


async def test_other_answers_pass_as_they_are() -> None:
    """An answer without the key is the same object."""
    honest = HttpResponse(status=200, headers={"x": "y"}, body=b"{}")

    assert await redacted_post(posting(honest), KEY)(b"") is honest


@pytest.mark.parametrize("key", [None, "any", "EMPTY", "simulated"])
async def test_a_word_is_no_secret(key: str | None) -> None:
    """The placeholders that servers without keys are given must not be cut out of answers."""
    answer = HttpResponse(status=200, body=b"any EMPTY simulated None")

    assert await redacted_post(posting(answer), key)(b"") is answer
