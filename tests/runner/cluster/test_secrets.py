"""Keys on their way to workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.runner.cluster.secrets import seal, unseal

KEYS = {"OPENAI_API_KEY": "sk-canary-0123456789abcdef"}


@given(st.dictionaries(st.text(max_size=9), st.text(max_size=20)))
def test_what_was_sealed_is_opened_with_its_pad(values: dict[str, str]) -> None:
    """Nothing is changed on the way."""
    assert unseal(*seal(values)) == values


def test_neither_half_tells_the_secret() -> None:
    """The text is another each time, and neither it nor the pad holds the key in any form."""
    (text, pad), (other, _) = seal(KEYS), seal(KEYS)

    assert text != other
    for half in (bytes.fromhex(text), pad):
        assert b"canary" not in half
        assert b"API_KEY" not in half
