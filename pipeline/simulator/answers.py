"""Deterministic answers: what the model says and what it costs follow from seed and request alone."""

import hashlib
import math
import re
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import orjson

from pipeline.simulator.types import Answer, Body, Completion, Finish, Prompt, Usage

_CHARACTERS_PER_TOKEN = 4
_UNLIMITED = 16_384  # the longest answer when the request sets no limit; gpt-4o's own
_CACHEABLE = 1_024  # tokens; the shortest prompt that OpenAI and most Claude models cache
_CACHE_BLOCK = 128  # tokens; OpenAI counts cached tokens in such steps
_SCHEMA_DEPTH = 16  # deeper or recursive schemas end in a string
_LATENCY_SPREAD = 0.5  # sigma of the lognormal: p99 is about three times the mean
_LATENCY_SHAPE = NormalDist(-(_LATENCY_SPREAD**2) / 2, _LATENCY_SPREAD)
_REFUSAL = "I'm sorry, but I can't help with that."
_VOCABULARY = (
    "amber anchor apple arrow autumn basin beacon birch bridge bronze cabin candle canyon cedar cliff cloud "
    "copper coral cotton creek dawn delta desert drift ember falcon fern field flint forest garden glacier "
    "grain granite harbor hazel hollow island ivory jasper juniper lagoon lantern laurel linen maple marble "
    "meadow mirror moss north ocean orchard pebble pine prairie quartz rain reed ridge river sage silver "
    "stone"
)
_WORDS = tuple(_VOCABULARY.split())


def _canonical(body: Mapping[str, Any]) -> bytes:
    return orjson.dumps(dict(body), option=orjson.OPT_SORT_KEYS)


def digest_of(body: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of a request body as JSON with sorted keys and no spaces, in UTF-8."""
    return hashlib.sha256(_canonical(body)).digest()


def answer_token(body: Mapping[str, Any]) -> str:
    """Return the start of the answer to this request body: `sim:` and 16 hexadecimal digits.

    `body` is the JSON object as sent on the wire. No other request has the same token, so a test that finds
    it in a result knows whose answer that is.
    """
    return token_of(digest_of(body))


def token_of(digest: bytes) -> str:
    """Return the start of the answer to the request body with this digest."""
    return f"sim:{digest[:8].hex()}"


class Draw:
    """Random numbers that follow from a seed, a request and an optional salt.

    Each number has a place of its own (0 to 3), so asking for one never changes another.
    """

    __slots__ = ("_bytes",)

    def __init__(self, seed: int, digest: bytes, salt: str = "") -> None:
        self._bytes = hashlib.sha256(b"%d:%b:%b" % (seed, salt.encode(), digest)).digest()

    def uniform(self, place: int) -> float:
        """Return a number from 0 up to but not including 1."""
        return (int.from_bytes(self._bytes[place * 8 : place * 8 + 8]) >> 11) / (1 << 53)

    def words(self, count: int) -> str:
        """Return so many words."""
        return " ".join([_WORDS[byte & 63] for byte in hashlib.shake_256(self._bytes).digest(count)])


_LENGTH, _LATENCY, _CACHE, _REASONING = range(4)


def latency_seconds(draw: Draw, mean: float) -> float:
    """Return how long the answer takes: lognormal with this mean."""
    return mean * math.exp(_LATENCY_SHAPE.inv_cdf(max(draw.uniform(_LATENCY), 1e-9)))


def compose(prompt: Prompt, seed: int, digest: bytes, cache_ratio: float) -> Completion:
    """Answer a prompt, once for every choice it asks for, and count what that costs."""
    answers = tuple(_choice(prompt, digest, Draw(seed, digest, str(index))) for index in range(prompt.choices))
    is_read = Draw(seed, digest).uniform(_CACHE) < cache_ratio
    usage = Usage(
        input_tokens=prompt.input_tokens,
        output_tokens=sum(answer.tokens for answer in answers),
        cache_read_tokens=_cacheable_tokens(prompt) if is_read else 0,
        cache_write_tokens=_cacheable_tokens(prompt) if prompt.cache_writes and not is_read else 0,
        reasoning_tokens=sum(answer.reasoning_tokens for answer in answers),
    )
    return Completion(answers=answers, usage=usage)


def _cacheable_tokens(prompt: Prompt) -> int:
    """Return nine tenths of a prompt, in whole blocks; none when it is short."""
    if prompt.input_tokens < _CACHEABLE:
        return 0
    return int(prompt.input_tokens * 0.9) // _CACHE_BLOCK * _CACHE_BLOCK


def _choice(prompt: Prompt, digest: bytes, draw: Draw) -> Answer:
    budget = prompt.max_tokens or _UNLIMITED
    if "[[refuse]]" in prompt.text:
        return Answer(finish="refusal", text=_REFUSAL, tokens=min(_tokens(_REFUSAL), budget))
    reasoning = _reasoning_tokens(prompt, draw, budget)
    text = _content(prompt, digest, draw, budget)
    kept = text[: (budget - reasoning) * _CHARACTERS_PER_TOKEN]
    whole: Finish = "tool" if prompt.tool else "end"
    return Answer(
        finish=whole if kept == text else "length",
        text=kept,
        tokens=_tokens(kept) + reasoning,
        reasoning_tokens=reasoning,
        tool=prompt.tool,
    )


def _tokens(text: str) -> int:
    return -(-len(text) // _CHARACTERS_PER_TOKEN)


def _reasoning_tokens(prompt: Prompt, draw: Draw, budget: int) -> int:
    """Draw 64 to 512 tokens, but leave half of the budget to the answer."""
    if not prompt.reasons:
        return 0
    return min(64 * (1 + int(draw.uniform(_REASONING) * 8)), budget // 2)


def _content(prompt: Prompt, digest: bytes, draw: Draw, budget: int) -> str:
    token = token_of(digest)
    if prompt.tool:
        return _fitting_json(prompt.tool.schema, token)
    # Every word with its space is at least one token long, so `budget` of them never fit.
    count = budget if "[[long]]" in prompt.text else 8 + int(draw.uniform(_LENGTH) * 96)
    text = f"{token} {draw.words(count)}"
    return text if prompt.schema is None else _fitting_json(prompt.schema, text)


def _fitting_json(schema: Body, text: str) -> str:
    value = _instance(schema, text, 0)
    return orjson.dumps(value if isinstance(value, dict) and value else {"answer": text}).decode()


def _instance(schema: Any, text: str, depth: int) -> Any:
    """Return a value that fits the common part of JSON Schema, with `text` wherever a string may stand."""
    match schema:
        case _ if depth > _SCHEMA_DEPTH:
            return text
        case {"const": value} | {"enum": [value, *_]}:
            return value
        case {"anyOf": [first, *_]} | {"oneOf": [first, *_]}:
            return _instance(first, text, depth + 1)
        case {"type": [first, *_]}:
            return _instance({**schema, "type": first}, text, depth + 1)
        case {"properties": dict(properties)}:
            return {name: _instance(part, text, depth + 1) for name, part in properties.items()}
        case {"type": "object"}:
            return {}
        case {"type": "array"}:
            return [_instance(schema.get("items", {}), text, depth + 1)]
        case {"type": "integer" | "number"}:
            return schema.get("minimum", 0)
        case {"type": "boolean"}:
            return True
        case {"type": "null"}:
            return None
    return text


def count_tokens(texts: list[str], tools: object, messages: int) -> int:
    """Count a prompt: a quarter of its bytes in UTF-8, 4 for every message, and 3."""
    size = sum(len(text.encode()) for text in texts) + (len(orjson.dumps(tools)) if tools else 0)
    return -(-size // _CHARACTERS_PER_TOKEN) + 4 * messages + 3


def text_of(content: object) -> str:
    """Join all text of a message's content: a string, or blocks that may nest through `content`."""
    found: list[str] = []
    pending = [content]
    while pending:
        match pending.pop():
            case str() as text:
                found.append(text)
            case list() as blocks:
                pending.extend(reversed(blocks))
            case {"text": inner} | {"content": inner}:
                pending.append(inner)
    return "\n".join(found)


_FORCED_STATUS = re.compile(r"\[\[status:([45]\d\d)]]")


def forced_status(prompt: Prompt) -> int | None:
    """Return the HTTP status that the user's text demands with `[[status:NNN]]`."""
    found = _FORCED_STATUS.search(prompt.text)
    return int(found[1]) if found else None
