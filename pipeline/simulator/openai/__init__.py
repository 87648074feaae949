"""OpenAI's Chat Completions API."""

from pipeline.simulator.openai.errors import FAULTS, REQUEST_ID, UNREADABLE, error_body, problem, unauthorized
from pipeline.simulator.openai.limits import OpenAILimits
from pipeline.simulator.openai.requests import check, key, prompt
from pipeline.simulator.openai.responses import answer_body, models_body

__all__ = [
    "FAULTS",
    "REQUEST_ID",
    "UNREADABLE",
    "OpenAILimits",
    "answer_body",
    "check",
    "error_body",
    "key",
    "models_body",
    "problem",
    "prompt",
    "unauthorized",
]
