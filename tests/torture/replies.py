"""A call that reached the chaos server, and the bytes of honest and dishonest replies to it. Pure."""

from __future__ import annotations

import base64
import gzip
import json
import struct
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.torture import truth

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BOMB_BYTES = 200_000_000
_BLOCK = b" " * 1_000_000
# 200 MB of "0", made with `brotli.compress`: the standard library has no brotli.
_BROTLI_BOMB = (
    "y///P/glYOKxQCD3/o///3/wSwDEYRGA7v0f////4JcAiMMCAN37P/7//8EvARCHBQC693/8//+DXwIgDgsAdO//+P//B78EQBwWAOje//H//w9+"
    "CYA4LADQvf/j//8f/BIAcVgAoHv/x///P/glAOKwAED3/o///3/wSwDEYQGA7v0f////4JcAiMMCAN37P/7//8EvARCHBQC693/8//+DXwIgDgsA"
    "dO//+P//B78EQBwWAOje//H//w9+CYA4LADQvf/j//8f/BIAcVgAoHv/x///P/glAOKwAED3/o///3/wSwDEYQGA7v0f////4JcAiMMCAN37P/7/"
    "/8EvARCHBQC693/8//+DXwIgDgsAdO//+P//B78EQBwWAOje//H//w9+CYA4LADQvf/L/+A1/BIAcVgAoJu7Bg=="
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request that the server has read. `attempt` counts the calls for its record, `use` those on its connection.

    `echo` is what a careless server repeats of it in everything that is not an answer: the key, or nothing.
    """

    record_id: str
    attempt: int
    protocol: str
    model: str
    use: int = 1
    echo: str = ""

    @property
    def is_anthropic(self) -> bool:
        return self.protocol == "anthropic"


# ── bodies ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def usage(call: Call, **changes: Any) -> dict[str, Any]:
    """Return the usage of a call; `input` and `output` replace a number."""
    honest = dict(zip(("input", "output"), truth.tokens(call.record_id), strict=True))
    told = {**honest, **changes}
    names = ("input_tokens", "output_tokens") if call.is_anthropic else ("prompt_tokens", "completion_tokens")
    return dict(zip(names, (told["input"], told["output"]), strict=True))


def answer(call: Call, *, suffix: str = "", **changes: Any) -> dict[str, Any]:
    """Return the object that answers a call; `suffix` is added to the text, `changes` replace fields."""
    text = truth.content(call.record_id) + suffix
    if call.is_anthropic:
        honest: dict[str, Any] = {
            "id": f"msg_{call.record_id}",
            "type": "message",
            "role": "assistant",
            "model": call.model,
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": usage(call),
        }
    else:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        honest = {
            "id": f"chatcmpl-{call.record_id}",
            "object": "chat.completion",
            "created": 1,
            "model": call.model,
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": usage(call),
        }
    return {**honest, **changes}


def answer_body(call: Call, *, suffix: str = "", **changes: Any) -> bytes:
    """Return the JSON of an answer, letters beyond ASCII as they are."""
    return _json(answer(call, suffix=suffix, **changes))


def error_body(call: Call, kind: str, message: str, code: str | None = None) -> bytes:
    """Return the JSON of an error in the protocol's own form."""
    said = f"{message}{_aside(call)}"
    if call.is_anthropic:
        return _json({"type": "error", "error": {"type": kind, "message": said}, "request_id": f"req_{call.record_id}"})
    return _json({"error": {"message": said, "type": kind, "param": None, "code": code}})


def page_body(call: Call, title: str) -> bytes:
    """Return the page of a gateway."""
    return f"<html><head><title>{title}</title></head><body><h1>{title}</h1>{_aside(call)}</body></html>".encode()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _aside(call: Call) -> str:
    """Return what a careless server says of the key, in the ways that have been seen."""
    if not call.echo:
        return ""
    key = call.echo
    return f" (Incorrect API key provided: {key}. authorization: Bearer {key}; x-api-key={key}; url ?key%3D{key})"


# ── whole replies ─────────────────────────────────────────────────────────────────────────────────────────────────────


def head(call: Call, status: str, *lines: str) -> bytes:
    """Return a status line and headers, with the empty line after them."""
    named = [f"request-id: req_{call.record_id}", f"x-request-id: req_{call.record_id}"]
    if call.echo:
        named = [
            f"{name}: {call.echo}" for name in ("request-id", "x-request-id", "x-echo", "server", "www-authenticate")
        ]
    return "\r\n".join([f"HTTP/1.1 {status}", *named, *lines, "", ""]).encode("latin-1")


def reply(call: Call, body: bytes, status: str = "200 OK", *lines: str, kind: str = "application/json") -> bytes:
    """Return a reply that is framed well."""
    return head(call, status, f"content-type: {kind}", f"content-length: {len(body)}", *lines) + body


def honest(call: Call) -> bytes:
    """Return the reply that every call would get if nothing went wrong."""
    return reply(call, answer_body(call))


def chunked(parts: Iterable[bytes]) -> bytes:
    """Return a body in chunks, without the last, empty one."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


# ── packing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def packed(data: bytes, coding: str) -> bytes:
    """Compress a body."""
    return gzip.compress(data) if coding == "gzip" else zstd.compress(data)


@cache
def bomb(coding: str) -> bytes:
    """Return some kB that unfold to `BOMB_BYTES`."""
    if coding == "br":
        return base64.b64decode(_BROTLI_BOMB)
    if coding == "gzip":
        return _gzip_bomb()
    packer = zstd.ZstdCompressor()
    return b"".join([*(packer.compress(_BLOCK) for _ in range(BOMB_BYTES // len(_BLOCK))), packer.flush()])


def _gzip_bomb() -> bytes:
    """Pack one block, in a way that it may stand alone, and repeat it: packing them all would take a second."""
    packer, count, check = zlib.compressobj(9, wbits=-15), BOMB_BYTES // len(_BLOCK), 0
    block = packer.compress(_BLOCK) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(count):
        check = zlib.crc32(_BLOCK, check)
    return gzip.compress(b"")[:10] + block * count + packer.flush() + struct.pack("<II", check, BOMB_BYTES)
