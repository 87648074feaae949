"""The values that pass between the two protocols and what they share, and the shape both protocols have."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Protocol

Body = Mapping[str, Any]
"""A decoded JSON object."""

HeaderMap = Mapping[bytes, bytes]
"""Request headers as ASGI gives them: names in lower case."""

Headers = tuple[tuple[bytes, bytes], ...]
"""Response headers as ASGI takes them."""

Finish = Literal["end", "length", "tool", "refusal"]
"""Why an answer ends: it is whole, it met the limit of tokens, it calls a tool, or the model refuses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool that the request forces the model to call."""

    name: str
    schema: Body


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a valid request asks for, whatever its protocol.

    `text` comes from the user's messages only. `schema` is given when the answer must be JSON.
    `cache_writes` says that a long prompt which is not read from the cache is billed as written to it.
    """

    model: str
    text: str
    input_tokens: int
    max_tokens: int | None
    tool: Tool | None = None
    schema: Body | None = None
    choices: int = 1
    reasons: bool = False
    cache_writes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One choice of the model. `text` holds the words, the JSON, the tool's arguments or the refusal."""

    finish: Finish
    text: str
    tokens: int
    reasoning_tokens: int = 0
    tool: Tool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request: `input_tokens` includes the cache's, `output_tokens` the reasoning."""

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0


NOTHING_USED = Usage(input_tokens=0, output_tokens=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the model gives back for a prompt: one answer for each choice, and what they cost together."""

    answers: tuple[Answer, ...]
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a request is refused. `retry_after` is in whole seconds; None sends no such header."""

    status: int
    type: str
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None


class Ending(Enum):
    """What becomes of the connection after a reply."""

    COMPLETE = "complete"
    SILENT = "silent"
    RESET = "reset"
    CUT = "cut"


class Content(Protocol):
    """A body that is made while it is sent."""

    @property
    def size(self) -> int:
        """The bytes that all pieces have together."""

    def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the body piece by piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An HTTP response, and how its connection ends.

    `content`, if there is one, stands for `body`. `kept` is the share that is sent of a reply that is cut.
    """

    status: int
    body: bytes = b""
    content: Content | None = None
    headers: Headers = ()
    content_type: bytes = b"application/json"
    ending: Ending = Ending.COMPLETE
    kept: float = 0.5

    @property
    def size(self) -> int:
        """The `content-length`."""
        return len(self.body) if self.content is None else self.content.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What makes one response unlike every other: its id without prefix, and its Unix time in seconds."""

    id: str
    created: int


class Limits(Protocol):
    """The rate limits of one key and model. `now` is the event loop's time in seconds, `wall` Unix time."""

    def admit(self, prompt: Prompt, now: float) -> Problem | None:
        """Charge what the provider charges at the start, or say why the request must wait."""

    def settle(self, prompt: Prompt, usage: Usage, now: float) -> None:
        """Correct the charge to what the request really used."""

    def headers(self, now: float, wall: float) -> Headers:
        """Tell the limits, what is left and when they are full again, as the provider does."""

    def change(self, factor: float, now: float) -> None:
        """Multiply every limit."""


class Provider(Protocol):
    """One provider's protocol; the modules `anthropic` and `openai` are the two."""

    @property
    def REQUEST_ID(self) -> bytes:
        """The name of the response header that carries the request id."""

    @property
    def UNREADABLE(self) -> Problem:
        """The answer to a body that is not JSON."""

    @property
    def FAULTS(self) -> Mapping[str, Problem]:
        """The kinds of faults that are answered with an error of the provider's own."""

    def key(self, headers: HeaderMap) -> str | None:
        """Read the API key; None when there is none."""

    def unauthorized(self, key: str | None) -> Problem:
        """Refuse a missing or unknown key."""

    def check(self, headers: HeaderMap, body: object) -> Problem | None:
        """Find the first thing wrong with a request."""

    def prompt(self, body: Body) -> Prompt:
        """Read a request that `check` found nothing wrong with."""

    def problem(self, status: int) -> Problem:
        """Make the provider's usual error of this HTTP status."""

    def error_body(self, problem: Problem, request_id: str) -> bytes:
        """Encode an error."""

    def answer_body(self, body: Body, prompt: Prompt, completion: Completion, identity: Identity) -> bytes:
        """Encode a success."""

    def models_body(self) -> bytes:
        """Encode a list of models."""
