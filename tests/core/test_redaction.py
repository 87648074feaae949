from __future__ import annotations

import pytest

from pipeline.core.http import Post
from pipeline.core.text import discreet
from pipeline.core.types import Answer

KEY = "9f3c7A1e5b8D2c6f4a0E7d1B3c5f8a2e"


def posting(answer: Answer) -> Post:
    async def post(body: bytes) -> Answer:
        return answer

    return post


async def test_an_answer_does_not_hold_the_key() -> None:
    """Body and headers that repeat the key say `[key]` in its place, and nothing else changes."""
    careless = Answer(status=401, headers={"x-key": f"Bearer {KEY}", "x": "y"}, body=f'"{KEY}", {KEY}'.encode())

    answer = await discreet(posting(careless), KEY)(b"")

    assert answer == Answer(status=401, headers={"x-key": "Bearer [key]", "x": "y"}, body=b'"[key]", [key]')


async def test_other_answers_pass_as_they_are() -> None:
    """An answer without the key is the same object."""
    honest = Answer(status=200, headers={"x": "y"}, body=b"{}")

    assert await discreet(posting(honest), KEY)(b"") is honest


@pytest.mark.parametrize("key", [None, "any", "EMPTY", "simulated"])
async def test_a_word_is_no_secret(key: str | None) -> None:
    """The placeholders that servers without keys are given must not be cut out of answers."""
    answer = Answer(status=200, body=b"any EMPTY simulated None")

    assert await discreet(posting(answer), key)(b"") is answer
