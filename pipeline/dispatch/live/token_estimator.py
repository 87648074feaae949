"""Estimates how many tokens a call will use: from its size, corrected by the usage reported so far."""

from __future__ import annotations

import math

from pipeline.core.types import Request, Usage

_SMOOTHING = 0.1
_GUESSED_OUTPUT_TOKENS = 300.0
_LARGEST_RATIO = 5.0  # an image may use far more than estimated; the next text will not


class TokenEstimator:
    """A moving average over a model's calls."""

    def __init__(self) -> None:
        self._ratio = 1.0
        self._output: float | None = None

    def input_tokens(self, request: Request) -> float:
        return request.estimated_input_tokens * self._ratio

    def output_tokens(self, request: Request) -> float:
        expected = _GUESSED_OUTPUT_TOKENS if self._output is None else self._output
        return min(expected, request.max_output_tokens or math.inf)

    def update(self, request: Request, usage: Usage) -> None:
        """Move the averages towards what a call used."""
        if request.estimated_input_tokens:
            ratio = usage.input_tokens / request.estimated_input_tokens
            self._ratio += _SMOOTHING * (min(_LARGEST_RATIO, ratio) - self._ratio)
        before = usage.output_tokens if self._output is None else self._output
        self._output = before + _SMOOTHING * (usage.output_tokens - before)
