"""How a line of Anthropic's results looks: https://docs.claude.com/en/api/messages-batches (August 2026)."""

from typing import Final

import orjson

from pipeline.simulator.anthropic import requests
from pipeline.simulator.anthropic.errors import invalid, problem
from pipeline.simulator.anthropic.requests import prompt
from pipeline.simulator.anthropic.responses import message
from pipeline.simulator.batches import Item, Outcome
from pipeline.simulator.types import Completion, HeaderMap, Identity, Problem, Prompt

__all__ = [
    "FINALIZING",
    "PREFIX",
    "PROVIDER",
    "VALIDATING",
    "answered",
    "check",
    "errored",
    "left",
    "problem",
    "prompt",
]

PROVIDER: Final = "anthropic"
PREFIX: Final = "msgbatch_"
VALIDATING: Final = 0.0
FINALIZING: Final = 0.0

_NOT_IN_BATCHES = ("speed", "thread", "store")
_LEFT = {Outcome.EXPIRED: "expired", Outcome.CANCELLED: "canceled"}


def check(headers: HeaderMap, body: object) -> Problem | None:
    """Find the first thing wrong with one request's params; some may only be sent live."""
    if isinstance(body, dict):
        if body.get("stream"):
            return invalid("stream: streaming is not supported in batches")
        for name in _NOT_IN_BATCHES:
            if name in body:
                return invalid(f"{name}: not supported in batches")
    return requests.check(headers, body)


def answered(item: Item, line_id: str, prompt: Prompt, completion: Completion, identity: Identity) -> bytes:
    """Encode the result of a request that was answered."""
    return _line(item, {"type": "succeeded", "message": message(prompt, completion, identity, "batch")})


def errored(item: Item, line_id: str, problem: Problem) -> bytes:
    """Encode the result of a request that was refused."""
    inner = {"type": problem.type, "message": problem.message}
    return _line(item, {"type": "errored", "error": {"type": "error", "error": inner, "request_id": None}})


def left(item: Item, line_id: str, outcome: Outcome) -> bytes:
    """Encode the result of a request that was not answered."""
    return _line(item, {"type": _LEFT[outcome]})


def _line(item: Item, result: object) -> bytes:
    return orjson.dumps({"custom_id": item.custom_id, "result": result}, option=orjson.OPT_APPEND_NEWLINE)
