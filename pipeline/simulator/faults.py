"""Faults: which one strikes a request, and what then goes over the wire."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pipeline.simulator.answers import Draw
from pipeline.simulator.types import Ending, Provider, Reply

KINDS: Mapping[str, str] = {
    "429": "rate limit, with retry-after: 1",
    "429-no-hint": "rate limit without retry-after",
    "500": "the provider's internal error",
    "502-html": "a gateway's HTML page",
    "503": "service unavailable",
    "529": "overloaded (OpenAI: 503 server_is_overloaded)",
    "quota": "429 that never ends: spend limit or credit exhausted",
    "error-200": "status 200 with an error as the body",
    "html": "status 200 with an HTML page",
    "empty": "status 200 with an empty body",
    "truncated": "status 200, all of content-length arrives, but the JSON is cut",
    "incomplete": "status 200, but the connection closes before all of content-length arrived",
    "timeout": "no answer until the client gives up, at most 600 s",
    "reset": "the connection is reset without an answer",
    "slow": "the true answer after ten times the latency",
}
"""Every kind of fault and what it looks like from outside."""

Operation = Literal["upload", "create", "poll", "list", "results", "cancel"]
"""What a client does with batches; `results` also reads OpenAI's files."""

OPERATIONS: tuple[Operation, ...] = get_args(Operation)

BATCH_KINDS: Mapping[str, str] = {
    "ok": "nothing: the call does what it should",
    "lost": "it is done, then the connection is reset without an answer",
    "reset": "it is not done, and the connection is reset",
    "500": "it is not done: the provider's internal error",
    "500-done": "it is done, and answered with the provider's internal error",
    "429": "it is not done: rate limit, with retry-after: 1",
    "hang": "it is done, but no answer comes until the client gives up, at most 600 s",
    "cut": "of results this share of the bytes arrives, then the connection closes: cut:0.3",
}
"""Every kind of fault of an operation on batches and what it looks like from outside."""

SLOWNESS = 10
"""How many times longer the fault `slow` takes."""

_HTML = b"<html>\r\n<head><title>%b</title></head>\r\n<body><center><h1>%b</h1></center></body>\r\n</html>\r\n"


def choose(rates: Mapping[str, float], seed: int, digest: bytes, attempt: int) -> str | None:
    """Draw the fault that strikes the `attempt`-th time that a body is admitted; None for a good answer.

    It depends on nothing else, so a run with the same seed meets the same faults however it is timed.
    """
    drawn = Draw(seed, digest, f"fault {attempt}").uniform(0)
    for kind, rate in rates.items():
        drawn -= rate
        if drawn < 0:
            return kind
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFault:
    """What happens to one call of an operation on batches; `kept` is the share of the bytes that `cut` sends."""

    kind: str
    kept: float = 1.0

    @property
    def is_done(self) -> bool:
        """Whether the operation is carried out."""
        return self.kind not in ("reset", "500", "429")


def parse_batch_fault(operation: str, text: str) -> BatchFault:
    """Read one of the kinds, `cut` with a share such as `cut:0.3`; ValueError says what is wrong."""
    if operation not in OPERATIONS:
        raise ValueError(f"unknown operation {operation!r} in batch_faults: use one of {', '.join(OPERATIONS)}")
    kind, separator, share = text.partition(":")
    if kind not in BATCH_KINDS or (kind != "cut" and separator):
        raise ValueError(f"unknown kind of fault {text!r} for {operation!r}: use one of {', '.join(BATCH_KINDS)}")
    if kind != "cut":
        return BatchFault(kind=kind)
    if operation != "results":
        raise ValueError(f"fault {text!r} for {operation!r}: only 'results' can be cut")
    try:
        kept = float(share)
    except ValueError:
        kept = -1.0
    if not 0 <= kept < 1:
        raise ValueError(f"fault {text!r}: write cut:SHARE with a share from 0 to below 1, such as cut:0.3")
    return BatchFault(kind=kind, kept=kept)


def strike(fault: BatchFault, reply: Reply) -> Reply:
    """Turn the answer of an operation that was done into what a fault makes of it."""
    match fault.kind:
        case "lost":
            return replace(reply, ending=Ending.RESET)
        case "hang":
            return replace(reply, ending=Ending.SILENT)
        case "cut":
            return replace(reply, ending=Ending.CUT, kept=fault.kept)
    return reply


def spoil(kind: str, answer: Reply, provider: Provider, request_id: str) -> Reply:
    """Turn a good answer into what a fault makes of it; kinds in `provider.FAULTS` are errors instead."""
    match kind:
        case "502-html":
            return _html(502, b"502 Bad Gateway")
        case "html":
            return _html(200, b"Sign in to the network")
        case "error-200":
            return replace(answer, body=provider.error_body(provider.problem(503), request_id))
        case "empty":
            return replace(answer, body=b"")
        case "truncated":
            return replace(answer, body=answer.body[: len(answer.body) // 2])
        case "incomplete":
            return replace(answer, ending=Ending.CUT)
        case "timeout":
            return replace(answer, ending=Ending.SILENT)
        case "reset":
            return replace(answer, ending=Ending.RESET)
    return answer


def _html(status: int, title: bytes) -> Reply:
    return Reply(status=status, body=_HTML % (title, title), content_type=b"text/html")
