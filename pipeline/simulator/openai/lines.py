"""How a line of OpenAI's output and error files looks: https://platform.openai.com/docs/guides/batch (July 2026)."""

from typing import Final

import orjson

from pipeline.simulator.batches import Item, Outcome
from pipeline.simulator.openai.errors import error_body, problem
from pipeline.simulator.openai.requests import check, prompt
from pipeline.simulator.openai.responses import chat_completion
from pipeline.simulator.types import Completion, Identity, Problem, Prompt

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

PROVIDER: Final = "openai"
PREFIX: Final = "batch_"
VALIDATING: Final = 0.1
FINALIZING: Final = 0.05

_LEFT = {
    Outcome.EXPIRED: ("batch_expired", "This request could not be executed before the completion window expired."),
    Outcome.CANCELLED: ("batch_cancelled", "This request could not be executed before the batch was cancelled."),
}


def answered(item: Item, line_id: str, prompt: Prompt, completion: Completion, identity: Identity) -> bytes:
    """Encode the line of a request that was answered."""
    return _responded(item, line_id, 200, chat_completion(prompt, completion, identity, "default"))


def errored(item: Item, line_id: str, problem: Problem) -> bytes:
    """Encode the line of a request that was refused."""
    return _responded(item, line_id, problem.status, orjson.loads(error_body(problem, "")))


def left(item: Item, line_id: str, outcome: Outcome) -> bytes:
    """Encode the line of a request that was not answered."""
    code, message = _LEFT[outcome]
    return _line(item, line_id, None, {"code": code, "message": message})


def _responded(item: Item, line_id: str, status: int, body: object) -> bytes:
    response = {"status_code": status, "request_id": f"req_{line_id}", "body": body}
    return _line(item, line_id, response, None)


def _line(item: Item, line_id: str, response: object, error: object) -> bytes:
    line = {"id": f"batch_req_{line_id}", "custom_id": item.custom_id, "response": response, "error": error}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
