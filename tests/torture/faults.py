"""The faults: what the chaos server does instead of answering, and what a run must make of it.

A row is a name, a small function that writes to the wire, and the expected end. The groups are those of the plan of
torture: C1 connections, C2 time, C3 framing, C4 pages, C5 errors inside a 200, C6 statuses, C7 hints to wait, C8
accounts and models, C11 sizes, C12 contents, C15 connections that are used again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tests.torture import replies
from tests.torture.replies import Call
from tests.torture.wire import LONGEST_WAIT, Wire

Act = Callable[[Wire, Call], Awaitable[None]]
Body = Callable[[Call], bytes]

DRIP_SECONDS = 0.1
HUGE_BYTES = 50_000_000
PROTOCOLS = ("anthropic", "openai")


class End(StrEnum):
    """How a record ends that met a fault."""

    ANSWERED = "answered"
    RETRIED = "answered after retry"
    EITHER = "answered, at once or after retry"
    LINE_ERROR = "line error"
    MODEL_STOPS = "model stops"
    RUN_STOPS = "run stops"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A row of the table.

    `types` are the errors that a call which met it may be told as. `is_billed`: the provider has done the work.
    `is_capacity`: it says nothing about the request, so it never uses up `max_attempts`. An answer (`ANSWERED`) may
    end in a `suffix`, and may tell no usable usage (`tells_usage`).
    """

    name: str
    group: str
    act: Act
    end: End
    types: frozenset[str] = frozenset()
    is_billed: bool = True
    is_capacity: bool = False
    suffix: str = ""
    tells_usage: bool = True

    @property
    def is_answer(self) -> bool:
        """Whether its reply is a valid answer, which a client is right to take."""
        return self.end in (End.ANSWERED, End.EITHER)

    @property
    def outlasts(self) -> bool:
        """Whether it keeps a call open until the client's deadline."""
        return "timeout" in self.types and self.group in ("C1", "C2", "C3")

    @property
    def is_refusal(self) -> bool:
        """Whether it refuses for the rate, so that the client finds out a pace."""
        return self.group == "C7" or self.name == "rate_limit_in_200"

    @property
    def may_poison(self) -> bool:
        """Whether a record that meets it for ever ends as a line error."""
        return self.end is End.RETRIED and not self.is_capacity


# ── acts: connections ─────────────────────────────────────────────────────────────────────────────────────────────────


async def honest(wire: Wire, call: Call) -> None:
    await wire.send(replies.honest(call))


async def rst_before_headers(wire: Wire, call: Call) -> None:
    wire.reset()


async def fin_before_headers(wire: Wire, call: Call) -> None:
    wire.close()


async def rst_mid_headers(wire: Wire, call: Call) -> None:
    await wire.send(replies.honest(call)[:25])
    wire.reset()


async def rst_mid_body(wire: Wire, call: Call) -> None:
    await wire.send(replies.honest(call)[:-20])
    wire.reset()


async def fin_mid_body(wire: Wire, call: Call) -> None:
    await wire.send(replies.honest(call)[:-20])
    wire.close()


async def silence(wire: Wire, call: Call) -> None:
    await wire.wait_left()


async def half_open(wire: Wire, call: Call) -> None:
    """Half of the headers, then nothing: the peer is gone without a word."""
    await wire.send(replies.honest(call)[:25])
    await wire.wait_left()


async def closed_at_reuse(wire: Wire, call: Call) -> None:
    """Answer the first call on a connection, and close it in the face of the second."""
    if call.use == 1:
        await honest(wire, call)
    else:
        wire.close()


async def fin_after_answer(wire: Wire, call: Call) -> None:
    await honest(wire, call)
    wire.close()


async def rst_after_answer(wire: Wire, call: Call) -> None:
    await honest(wire, call)
    wire.reset()


# ── acts: time ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def slow_body(wire: Wire, call: Call) -> None:
    head, _, body = replies.honest(call).partition(b"\r\n\r\n")
    await wire.send(head + b"\r\n\r\n")
    await wire.drip(body, DRIP_SECONDS)


async def slow_headers(wire: Wire, call: Call) -> None:
    await wire.drip(replies.honest(call), DRIP_SECONDS)


async def informational_flood(wire: Wire, call: Call) -> None:
    for _ in range(int(LONGEST_WAIT / DRIP_SECONDS)):
        await wire.send(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 20)
        await asyncio.sleep(DRIP_SECONDS)


async def stall_after_headers(wire: Wire, call: Call) -> None:
    head, _, _ = replies.honest(call).partition(b"\r\n\r\n")
    await wire.send(head + b"\r\n\r\n")
    await wire.wait_left()


async def stall_before_last_byte(wire: Wire, call: Call) -> None:
    await wire.send(replies.honest(call)[:-1])
    await wire.wait_left()


async def length_too_long_and_stall(wire: Wire, call: Call) -> None:
    await wire.send(_with_length(call, +100))
    await wire.wait_left()


# ── acts: bytes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def sends(data: Body) -> Act:
    """Send bytes; the connection stays."""

    async def act(wire: Wire, call: Call) -> None:
        await wire.send(data(call))

    return act


def sends_and_closes(data: Body) -> Act:
    """Send bytes, then FIN."""

    async def act(wire: Wire, call: Call) -> None:
        await wire.send(data(call))
        wire.close()

    return act


def huge(framing: str) -> Act:
    """Send far more than anybody wants, then FIN."""

    async def act(wire: Wire, call: Call) -> None:
        await wire.send(replies.head(call, "200 OK", framing))
        block = b" " * 500_000
        for _ in range(HUGE_BYTES // len(block)):
            await wire.send(block)
        wire.close()

    return act


def ok(body: Body, *lines: str, status: str = "200 OK", kind: str = "application/json") -> Act:
    """Send a body, framed well, by default as a 200."""
    return sends(lambda call: replies.reply(call, body(call), status, *lines, kind=kind))


def page(status: str, kind: str = "text/html; charset=utf-8") -> Act:
    """Send a gateway's page."""
    return ok(lambda call: replies.page_body(call, status), status=status, kind=kind)


def redirect(status: int) -> Act:
    """Send the client elsewhere, with the key in the address where the server is careless."""
    return sends(
        lambda call: replies.reply(
            call,
            replies.page_body(call, "moved"),
            f"{status} Moved",
            f"location: https://{call.echo or 'elsewhere'}.example/?key={call.echo}",
            kind="text/html",
        )
    )


def error(status: str, anthropic: str, openai: str, *lines: str, code: str | None = None, says: str = "broken") -> Act:
    """Send an error in the protocol's own form."""
    return ok(lambda call: _error(call, anthropic, openai, code, says), *lines, status=status)


def limited(*lines: str) -> Act:
    """Refuse for the rate, with some headers."""
    return error("429 Too Many Requests", "rate_limit_error", "tokens", *lines, code="rate_limit_exceeded")


def _error(call: Call, anthropic: str, openai: str, code: str | None, says: str) -> bytes:
    return replies.error_body(call, anthropic if call.is_anthropic else openai, says, code)


def changed(**changes: Any) -> Body:
    """Return an answer with other fields."""
    return lambda call: replies.answer_body(call, **changes)


def used(number: Any) -> Body:
    """Return an answer whose usage tells such a number of input tokens, as any JSON writer may print it."""
    return lambda call: json.dumps(replies.answer(call, usage=replies.usage(call, input=number))).encode()


def with_suffix(text: str) -> Body:
    """Return an answer whose text ends so."""
    return lambda call: replies.answer_body(call, suffix=text)


def _raw(body: bytes) -> Body:
    return lambda call: body


def _replaced(old: bytes, new: bytes) -> Body:
    return lambda call: replies.answer_body(call, suffix="§").replace(old, new)


def _with_length(call: Call, more: int) -> bytes:
    body = replies.answer_body(call)
    return replies.head(call, "200 OK", f"content-length: {len(body) + more}") + body


def _with_heads(*lines: str) -> Act:
    """Send an answer with these headers for its framing, then FIN."""
    return sends_and_closes(lambda call: replies.head(call, "200 OK", *lines) + replies.answer_body(call))


def _in_chunks(call: Call) -> bytes:
    body = replies.answer_body(call)
    return replies.head(call, "200 OK", "transfer-encoding: chunked") + replies.chunked([body[:50], body[50:]])


def _packed(coding: str, call: Call) -> bytes:
    return replies.packed(replies.answer_body(call), coding)


def _corrupt_gzip(call: Call) -> bytes:
    data = _packed("gzip", call)
    return data[:-8] + b"\0" * 8


def _bomb(coding: str) -> Act:
    return ok(lambda call: replies.bomb(coding), f"content-encoding: {coding}")


def _smuggled(call: Call) -> bytes:
    """An answer, and at once a second one that nobody asked for: whoever takes it has the wrong answer."""
    other = Call(record_id="smuggled", attempt=1, protocol=call.protocol, model=call.model)
    return replies.honest(call) + replies.honest(other)


def _too_short_and_smuggled(call: Call) -> bytes:
    """A length that ends in the middle of the answer; what is left over reads like the next reply."""
    other = Call(record_id="smuggled", attempt=1, protocol=call.protocol, model=call.model)
    return replies.reply(call, replies.answer_body(call)[:40]) + replies.honest(other)


def _nested(depth: int) -> Body:
    """Return an answer with a field nested so deep, the answer's own level included."""

    def body(call: Call) -> bytes:
        whole = replies.answer_body(call)
        return whole[:-1] + b',"extra":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    return body


def _no_message(call: Call) -> bytes:
    nothing = {"content": None} if call.is_anthropic else {"choices": [{"index": 0, "message": None}]}
    return replies.answer_body(call, **nothing)


def _pretty(call: Call) -> bytes:
    return json.dumps(replies.answer(call), indent=2).replace("\n", "\r\n").encode()


def _usage_twice(call: Call) -> bytes:
    return replies.answer_body(call).replace(b'"usage":{', b'"usage":{"input_tokens":7,"prompt_tokens":7,')


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _row(name: str, act: Act, end: End, *types: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "act": act, "end": end, "types": frozenset(types), **more}


def _refused(name: str, act: Act, end: End, *types: str, **more: Any) -> dict[str, Any]:
    """A row whose provider did no work."""
    return _row(name, act, end, *types, is_billed=False, **more)


def _rows(group: str, rows: Iterable[dict[str, Any]]) -> Iterator[Fault]:
    for row in rows:
        yield Fault(group=group, **row)


_RATE = ("rate_limit_error", "tokens")
_OVERLOAD = ("overloaded_error", "server_overloaded")
_REQUEST = ("invalid_request_error",)
_PAST = "Wed, 21 Oct 2015 07:28:00 GMT"
_DATE = "date: Sun, 22 Nov 2026 10:00:00 GMT"

_TABLE: dict[str, list[dict[str, Any]]] = {
    "C1": [
        _row("rst_before_headers", rst_before_headers, End.RETRIED, "connection_error"),
        _row("fin_before_headers", fin_before_headers, End.RETRIED, "connection_error"),
        _row("rst_mid_headers", rst_mid_headers, End.RETRIED, "connection_error", "invalid_http"),
        _row("rst_mid_body", rst_mid_body, End.RETRIED, "connection_error", "invalid_http"),
        _row("fin_mid_body", fin_mid_body, End.RETRIED, "connection_error", "invalid_http"),
        _row("silence", silence, End.RETRIED, "timeout"),
        _row("half_open", half_open, End.RETRIED, "timeout"),
    ],
    "C2": [
        _row("slow_body", slow_body, End.RETRIED, "timeout"),
        _row("slow_headers", slow_headers, End.RETRIED, "timeout"),
        _row("informational_flood", informational_flood, End.RETRIED, "timeout"),
        _row("stall_after_headers", stall_after_headers, End.RETRIED, "timeout"),
        _row("stall_before_last_byte", stall_before_last_byte, End.RETRIED, "timeout"),
        _row(
            "informational_first",
            sends(lambda call: b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + replies.honest(call)),
            End.ANSWERED,
        ),
    ],
    "C3": [
        _row("truncated_json", ok(lambda call: replies.answer_body(call)[:-20]), End.RETRIED, "invalid_response"),
        _row("trailing_garbage", ok(lambda call: replies.answer_body(call) + b"}]"), End.RETRIED, "invalid_response"),
        _row("length_too_long", sends_and_closes(lambda call: _with_length(call, 100)), End.RETRIED, "invalid_http"),
        _row("length_too_long_and_stall", length_too_long_and_stall, End.RETRIED, "timeout"),
        _row("length_too_short", sends(lambda call: _with_length(call, -20)), End.RETRIED, "invalid_response"),
        _row("length_too_short_and_smuggled", sends(_too_short_and_smuggled), End.RETRIED, "invalid_response"),
        _row("answered_twice", sends(_smuggled), End.EITHER, "connection_error", "invalid_http"),
        _row("length_absent", _with_heads("connection: close"), End.ANSWERED),
        _row(
            "length_absent_and_cut",
            sends_and_closes(lambda call: replies.head(call, "200 OK") + replies.answer_body(call)[:-20]),
            End.RETRIED,
            "invalid_response",
        ),
        _row("length_twice", _with_heads("content-length: 5", "content-length: 500"), End.RETRIED, "invalid_http"),
        _row("length_is_no_number", _with_heads("content-length: abc"), End.RETRIED, "invalid_http"),
        _row("length_is_negative", _with_heads("content-length: -5"), End.RETRIED, "invalid_http"),
        _row("length_is_astronomic", _with_heads("content-length: 9" + "9" * 30), End.RETRIED, "invalid_http"),
        _row(
            "length_is_zero",
            sends(lambda call: _with_length(call, -len(replies.answer_body(call)))),
            End.RETRIED,
            "invalid_response",
        ),
        _row("chunks", sends(lambda call: _in_chunks(call) + b"0\r\n\r\n"), End.ANSWERED),
        _row(
            "chunks_and_length",
            sends(
                lambda call: (
                    replies.head(call, "200 OK", "transfer-encoding: chunked", "content-length: 5")
                    + replies.chunked([replies.answer_body(call)])
                    + b"0\r\n\r\n"
                )
            ),
            End.ANSWERED,
        ),
        _row("chunks_cut", sends_and_closes(_in_chunks), End.RETRIED, "connection_error", "invalid_http"),
        _row(
            "chunk_size_garbage",
            sends_and_closes(lambda call: _in_chunks(call) + b"zz\r\n"),
            End.RETRIED,
            "invalid_http",
        ),
        _row("not_http", sends_and_closes(_raw(b"SSH-2.0-OpenSSH_9.2\r\n")), End.RETRIED, "invalid_http"),
        _row("garbled_status", sends_and_closes(_raw(b"HTTP/9.9 abc\r\n\r\n")), End.RETRIED, "invalid_http"),
        _row("status_000", sends_and_closes(_raw(b"HTTP/1.1 000 Nothing\r\n\r\n")), End.RETRIED, "invalid_http"),
        _row(
            "header_without_colon",
            sends(lambda call: replies.reply(call, b"{}", "200 OK", "oops")),
            End.RETRIED,
            "invalid_http",
        ),
        _row(
            "http_1_0",
            sends_and_closes(lambda call: replies.honest(call).replace(b"HTTP/1.1", b"HTTP/1.0", 1)),
            End.ANSWERED,
        ),
    ],
    "C4": [
        *(
            _refused(f"html_{status}", page(f"{status} Gateway"), End.RETRIED, f"http_{status}", **more)
            for status, more in (
                (500, {}),
                (502, {}),
                (503, {"is_capacity": True}),
                (520, {}),
                (521, {}),
                (522, {}),
                (523, {}),
                (529, {"is_capacity": True}),
            )
        ),
        _row("html_504", page("504 Gateway Time-out"), End.RETRIED, "http_504"),
        _row("html_524", page("524 A timeout occurred"), End.RETRIED, "http_524"),
        _refused("html_403", page("403 Forbidden"), End.LINE_ERROR, "http_403"),
        _row("html_200", page("200 OK"), End.RETRIED, "invalid_response"),
        _row("html_200_as_json", page("200 OK", kind="application/json"), End.RETRIED, "invalid_response"),
        _row(
            "no_content_204", sends(lambda call: replies.head(call, "204 No Content")), End.RETRIED, "invalid_response"
        ),
        _row("accepted_202", ok(changed(), status="202 Accepted"), End.RETRIED, "invalid_response"),
        _row("partial_206", ok(changed(), status="206 Partial Content"), End.RETRIED, "invalid_response"),
        _refused("status_999", page("999 Denied"), End.RETRIED, "http_999"),
        *(
            _row(f"{name}_200", ok(_raw(body)), End.RETRIED, "invalid_response")
            for name, body in (
                ("empty", b""),
                ("blank", b" \r\n"),
                ("null", b"null"),
                ("list", b"[]"),
                ("text", b'"str"'),
                ("number", b"7"),
                ("object", b"{}"),
                ("answers_in_list", b"[{}]"),
            )
        ),
    ],
    "C5": [
        _row("overloaded_in_200", error("200 OK", *_OVERLOAD), End.RETRIED, *_OVERLOAD, is_capacity=True),
        _row("rate_limit_in_200", error("200 OK", *_RATE), End.RETRIED, *_RATE, is_capacity=True),
        _row("error_in_200", error("200 OK", "api_error", "server_error"), End.RETRIED, "api_error", "server_error"),
        _row("invalid_in_200", error("200 OK", *_REQUEST * 2), End.LINE_ERROR, *_REQUEST),
        _row("error_text_in_200", ok(_raw(b'{"error":"CUDA out of memory"}')), End.RETRIED, "http_500"),
        _row("no_message", ok(_no_message), End.RETRIED, "invalid_response"),
        _row("other_type", ok(changed(type="error_report", choices=[])), End.RETRIED, "invalid_response"),
    ],
    "C6": [
        *(
            _refused(f"status_{status}", error(f"{status} X", *types), End.RETRIED, *types, **more)
            for status, types, more in (
                (408, ("timeout_error", "timeout"), {}),
                (409, ("conflict_error", "conflict"), {}),
                (425, ("too_early", "too_early"), {}),
                (500, ("api_error", "server_error"), {}),
                (503, ("api_error", "server_error"), {"is_capacity": True}),
                (529, _OVERLOAD, {"is_capacity": True}),
            )
        ),
        *(
            _refused(f"status_{status}", error(f"{status} X", *types), End.LINE_ERROR, *types)
            for status, types in (
                (400, _REQUEST * 2),
                (413, ("request_too_large", "invalid_request_error")),
                (422, _REQUEST * 2),
            )
        ),
        _refused("told_to_retry_400", error("400 X", *_REQUEST * 2, "x-should-retry: true"), End.RETRIED, *_REQUEST),
        _refused(
            "told_not_to_retry_500",
            error("500 X", "api_error", "server_error", "x-should-retry: false"),
            End.LINE_ERROR,
            "api_error",
            "server_error",
        ),
    ],
    "C7": [
        *(
            _refused(f"retry_after_{name}", limited(*lines), End.RETRIED, *_RATE, is_capacity=True)
            for name, lines in (
                ("absent", ()),
                ("zero", ("retry-after: 0",)),
                ("negative", ("retry-after: -5",)),
                ("one", ("retry-after: 1",)),
                ("tenth", ("retry-after: 0.1",)),
                ("1e400", ("retry-after: 1e400",)),
                ("inf", ("retry-after: inf",)),
                ("nan", ("retry-after: nan",)),
                ("empty", ("retry-after:",)),
                ("garbage", ("retry-after: soon",)),
                ("list", ("retry-after: 1, 2",)),
                ("twice", ("retry-after: 0.1", "retry-after: 0.2")),
                ("past_date", (f"retry-after: {_PAST}", _DATE)),
                ("near_date", ("retry-after: Sun, 22 Nov 2026 10:00:01 GMT", _DATE)),
                ("date_without_date", (f"retry-after: {_PAST}",)),
                ("year_99999", ("retry-after: Fri, 31 Dec 99999 23:59:59 GMT",)),
                ("other_digits", ("retry-after: \xb2",)),
                ("ms", ("retry-after-ms: 100",)),
                ("contradiction", ("retry-after-ms: 100", "retry-after: 3600")),
            )
        ),
        _refused("retry_after_hour", limited("retry-after: 3600"), End.MODEL_STOPS, *_RATE),
        _refused(
            "retry_after_far_date",
            limited("retry-after: Sun, 22 Nov 2026 11:00:00 GMT", _DATE),
            End.MODEL_STOPS,
            *_RATE,
        ),
    ],
    "C8": [
        *(
            _refused(name, act, End.RUN_STOPS)
            for name, act in (
                ("wrong_key_401", error("401 X", "authentication_error", "invalid_request_error")),
                (
                    "wrong_key_told_to_retry",
                    error("401 X", "authentication_error", "invalid_request_error", "x-should-retry: true"),
                ),
                ("html_401", page("401 Unauthorized")),
                ("no_permission_403", error("403 X", "permission_error", "invalid_request_error")),
                ("payment_402", error("402 X", "billing_error", "invalid_request_error")),
                (
                    "no_credit",
                    ok(
                        lambda call: (
                            replies.error_body(call, "invalid_request_error", "Your credit balance is too low")
                            if call.is_anthropic
                            else replies.error_body(call, "insufficient_quota", "You exceeded your quota", "x")
                        ),
                        "x-should-retry: true",
                        status="400 X",
                    ),
                ),
                ("wrong_key_in_200", error("200 OK", "authentication_error", "x", code="invalid_api_key")),
            )
        ),
        *(
            _refused(f"redirect_{status}", redirect(status), End.RUN_STOPS, "redirect")
            for status in (301, 302, 307, 308)
        ),
        _refused(
            "unknown_model",
            error("404 X", "not_found_error", "invalid_request_error", code="model_not_found"),
            End.MODEL_STOPS,
        ),
        _refused("html_404", page("404 Not Found"), End.MODEL_STOPS),
    ],
    "C11": [
        _row("huge_body", huge(f"content-length: {HUGE_BYTES}"), End.RETRIED, "response_too_large"),
        _row("huge_body_without_length", huge("connection: close"), End.RETRIED, "response_too_large"),
        *(
            _row(f"{coding}_bomb", _bomb(coding), End.RETRIED, "response_too_large")
            for coding in ("gzip", "br", "zstd")
        ),
        *(
            _row(
                f"{coding}_answer",
                ok(lambda call, coding=coding: _packed(coding, call), f"content-encoding: {coding}"),  # type: ignore[misc]
                End.ANSWERED,
            )
            for coding in ("gzip", "zstd")
        ),
        _row("gzip_corrupt", ok(_corrupt_gzip, "content-encoding: gzip"), End.RETRIED, "invalid_http"),
        _row(
            "gzip_cut",
            ok(lambda call: _packed("gzip", call)[:-30], "content-encoding: gzip"),
            End.RETRIED,
            "connection_error",
            "invalid_http",
        ),
        _row("gzip_is_none", ok(changed(), "content-encoding: gzip"), End.RETRIED, "invalid_http"),
        _row("unknown_coding", ok(changed(), "content-encoding: snappy"), End.ANSWERED),
        _row("header_200_kB", ok(changed(), "x-long: " + "y" * 200_000), End.ANSWERED),
        _row("header_2_MB", ok(changed(), "x-long: " + "y" * 2_000_000), End.RETRIED, "invalid_http"),
        _row("headers_10_000", ok(changed(), *(f"x-{n}: y" for n in range(10_000))), End.RETRIED, "invalid_http"),
        _row("long_text", ok(with_suffix("x" * 500_000)), End.ANSWERED, suffix="x" * 500_000),
    ],
    "C12": [
        _row("invalid_utf8", ok(_replaced("§".encode(), b"\xff\xfe")), End.ANSWERED, suffix="\ufffd\ufffd"),
        _row("lone_surrogate", ok(_replaced("§".encode(), rb"\ud800")), End.ANSWERED, suffix="\ufffd"),
        _row("nul_in_text", ok(with_suffix("a\0b")), End.ANSWERED, suffix="a\0b"),
        _row("raw_control_in_text", ok(_replaced("§".encode(), b"\x01")), End.RETRIED, "invalid_response"),
        _row("line_separators", ok(with_suffix("\u2028\u0085\x1c")), End.ANSWERED, suffix="\u2028\u0085\x1c"),
        _row("escape_codes", ok(with_suffix("\x1b[2J\x1b]0;x\x07")), End.ANSWERED, suffix="\x1b[2J\x1b]0;x\x07"),
        _row("pretty_printed", ok(_pretty), End.ANSWERED),
        _row("byte_order_mark", ok(lambda call: b"\xef\xbb\xbf" + replies.answer_body(call)), End.ANSWERED),
        _row(
            "utf16",
            ok(lambda call: replies.answer_body(call).decode().encode("utf-16")),
            End.RETRIED,
            "invalid_response",
        ),
        _row("unknown_charset", ok(changed(), kind="application/json; charset=klingon"), End.ANSWERED),
        _row("latin1_header", ok(changed(), "x-city: Z\xfcrich"), End.ANSWERED),
        _row("huge_number", ok(changed(extra=2**70)), End.ANSWERED),
        _row(
            "nan_beside", ok(lambda call: json.dumps(replies.answer(call, extra=float("nan"))).encode()), End.ANSWERED
        ),
        *(
            _row(f"usage_{name}", ok(used(number)), End.ANSWERED, tells_usage=False)
            for name, number in (
                ("nan", float("nan")),
                ("infinite", float("inf")),
                ("negative", -1),
                ("huge", 10**30),
                ("float", 1.5),
                ("text", "12"),
                ("true", True),
                ("half_null", None),
            )
        ),
        _row("usage_null", ok(changed(usage=None)), End.ANSWERED, tells_usage=False),
        _row("usage_list", ok(changed(usage=[])), End.ANSWERED, tells_usage=False),
        _row("usage_twice", ok(_usage_twice), End.ANSWERED),
        _row("nested_100", ok(_nested(100)), End.ANSWERED),
        _row("nested_1_000", ok(_nested(1_000)), End.RETRIED, "invalid_response"),
        _row("nested_1_024", ok(_nested(1_024)), End.RETRIED, "invalid_response"),
        _row("nested_100_000", ok(_nested(100_000)), End.RETRIED, "invalid_response"),
    ],
    "C15": [
        _row("closed_at_reuse", closed_at_reuse, End.EITHER, "connection_error"),
        _row("fin_after_answer", fin_after_answer, End.EITHER, "connection_error"),
        _row("rst_after_answer", rst_after_answer, End.EITHER, "connection_error", "invalid_http"),
    ],
}

FAULTS = {fault.name: fault for group, rows in _TABLE.items() for fault in _rows(group, rows)}
"""Every fault that the server chooses by record and attempt, by name."""
BOMBS = [name for name in FAULTS if name.startswith("huge_body") or name.endswith("_bomb")]
"""Faults that are larger than any memory should allow."""
DOORS = {
    name: Fault(
        name=name,
        group="C1",
        act=act,
        end=End.RETRIED,
        types=frozenset({"connection_error"}),
        is_billed=False,
        is_capacity=False,
    )
    for name, act in (("rst_on_accept", rst_before_headers), ("fin_on_accept", fin_before_headers))
}
"""Faults of connections on which no request was read: they belong to a port, not to a record."""
