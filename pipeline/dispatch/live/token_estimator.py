"""How many tokens a call will use: an estimate by size, corrected by reported usage."""

from __future__ import annotations

import math

from pipeline.core.types import Request, Usage

_SMOOTHING = 0.1
_GUESSED_OUTPUT_TOKENS = 300.0
_LARGEST_RATIO = 5.0  # a picture or a document may be far larger than its guess; the next text is not


class TokenEstimator:
    """What a call is likely to use: an estimate by size, put right by what was reported so far."""

    def __init__(self) -> None:
        self._ratio = 1.0
        self._output: float | None = None

    def input_tokens(self, request: Request) -> float:
        return request.estimated_input_tokens * self._ratio

    def output_tokens(self, request: Request) -> float:
        expected = _GUESSED_OUTPUT_TOKENS if self._output is None else self._output
        return min(expected, request.max_output_tokens or math.inf)

    def update(self, request: Request, usage: Usage) -> None:
        """Move towards what one call really used."""
        if request.estimated_input_tokens:
            ratio = usage.input_tokens / request.estimated_input_tokens
            self._ratio += _SMOOTHING * (min(_LARGEST_RATIO, ratio) - self._ratio)
        before = usage.output_tokens if self._output is None else self._output
        self._output = before + _SMOOTHING * (usage.output_tokens - before)
