"""Anthropic's Messages API, versions 2023-06-01 and 2026-10-21."""

from pipeline.simulator.anthropic.errors import FAULTS, REQUEST_ID, UNREADABLE, error_body, problem, unauthorized
from pipeline.simulator.anthropic.limits import AnthropicLimits
from pipeline.simulator.anthropic.requests import check, check_count, key, prompt
from pipeline.simulator.anthropic.responses import answer_body, count_body, models_body

__all__ = [
    "FAULTS",
    "REQUEST_ID",
    "UNREADABLE",
    "AnthropicLimits",
    "answer_body",
    "check",
    "check_count",
    "count_body",
    "error_body",
    "key",
    "models_body",
    "problem",
    "prompt",
    "unauthorized",
]
