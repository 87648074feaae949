from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import Message
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from pipeline.core import jsonl
from pipeline.core.errors import LineError
from pipeline.core.types import Attempt, Completion, Failure, OutputFormat, Request, Result, ToolCall, Usage
from pipeline.results import codec

FORMATS = list(OutputFormat)
USAGE = Usage(
    input_tokens=30,
    output_tokens=50,
    cache_read_tokens=4,
    cache_write_tokens=6,
    cache_write_1h_tokens=2,
    reasoning_tokens=7,
)
MESSAGE = b'{"id":"msg_1","type":"message","stop_reason":"end_turn","content":[]}'
COMPLETION = b'{"id":"chatcmpl_1","object":"chat.completion","model":"gpt-x-1","choices":[]}'
ATTEMPT = Attempt(at="2026-11-22T02:40:00Z", type="overloaded_error", message="busy", latency_s=0.12345, status=529)


def request(**changes: Any) -> Request:
    known: dict[str, Any] = {
        "custom_id": "q-17",
        "digest": "0" * 32,
        "source": "q.jsonl",
        "line": 17,
        "provider": "anthropic",
        "model": "claude-x",
        "body": b'{"model":"claude-x","messages":[]}',
    }
    return Request(**known | changes)


def reply(**changes: Any) -> Completion:
    known: dict[str, Any] = {
        "model": "claude-x-1",
        "content": "hello",
        "finish_reason": "end_turn",
        "truncated": False,
        "usage": USAGE,
        "raw": MESSAGE,
        "request_id": "req_1",
    }
    return Completion(**known | changes)


def result(**changes: Any) -> Result:
    known: dict[str, Any] = {
        "custom_id": "q-17",
        "line": 17,
        "source": "q.jsonl",
        "digest": "0" * 32,
        "attempts": 1,
        "completed_at": "2026-11-22T02:40:07Z",
        "latency_s": 1.23456,
    }
    return Result(**known | changes)


def success(reply_: Completion | None = None, **changes: Any) -> Result:
    return result(request=request(), reply=reply_ or reply(), **changes)


REFUSED = Failure(
    type="invalid_request_error", message="no", status=400, code="c", request_id="req_2", attempts=(ATTEMPT,)
)
FAILED = result(request=request(), failure=REFUSED, metadata={"k": 1})
TIMED_OUT = result(request=request(), failure=Failure(type="timeout", message="too slow"), attempts=6)
INVALID = result(failure=Failure(type="invalid_line", message="q.jsonl:17: no"), attempts=0, latency_s=None)


def encoded(result: Result, form: OutputFormat = OutputFormat.NATIVE, *, echo_request: bool = False) -> Any:
    """Return the value of a result's line, which must be one."""
    line = codec.encode(result, form, run_id="run-1", echo_request=echo_request)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return jsonl.loads(line)


# ── native ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_native_success_has_the_documented_fields() -> None:
    """A native line of an answer has the fields of the contract with the values of the answer."""
    assert encoded(success(metadata={"team": "search"})) == {
        "custom_id": "q-17",
        "line": 17,
        "success": True,
        "provider": "anthropic",
        "model": "claude-x-1",
        "content": "hello",
        "finish_reason": "end_turn",
        "truncated": False,
        "usage": {
            "input_tokens": 30,
            "output_tokens": 50,
            "total_tokens": 80,
            "cache_read_tokens": 4,
            "cache_write_tokens": 6,
            "cache_write_1h_tokens": 2,
            "reasoning_tokens": 7,
        },
        "cost_usd": None,
        "lane": "live",
        "attempts": 1,
        "latency_s": 1.235,
        "request_id": "req_1",
        "completed_at": "2026-11-22T02:40:07Z",
        "metadata": {"team": "search"},
        "source": "q.jsonl",
        "digest": "0" * 32,
        "response": json.loads(MESSAGE),
        "run": "run-1",
    }


def test_a_native_failure_has_the_documented_fields() -> None:
    """A native line of a failure says what came back, how often it was tried, and no tokens."""
    assert encoded(FAILED) == {
        "custom_id": "q-17",
        "line": 17,
        "success": False,
        "provider": "anthropic",
        "model": "claude-x",
        "error": {
            "type": "invalid_request_error",
            "code": "c",
            "status": 400,
            "message": "no",
            "request_id": "req_2",
            "attempts": [
                {
                    "at": "2026-11-22T02:40:00Z",
                    "type": "overloaded_error",
                    "message": "busy",
                    "latency_s": 0.123,
                    "status": 529,
                    "may_be_billed": False,
                }
            ],
        },
        "attempts": 1,
        "latency_s": 1.235,
        "completed_at": "2026-11-22T02:40:07Z",
        "metadata": {"k": 1},
        "source": "q.jsonl",
        "digest": "0" * 32,
        "run": "run-1",
    }


def test_a_native_invalid_line_names_nobody() -> None:
    """The result of an invalid line has no provider, no model and no latency."""
    line = encoded(INVALID)

    assert (line["provider"], line["model"], line["attempts"], line["success"]) == (None, None, 0, False)
    assert (line["error"]["type"], line["error"]["message"]) == ("invalid_line", "q.jsonl:17: no")
    assert "latency_s" not in line


def test_optional_fields_stand_only_where_they_say_something() -> None:
    """Tool calls, a refusal and failed attempts stand in a line that has them."""
    calls = (ToolCall(id="t1", name="f", arguments={"a": 1}), ToolCall(id=None, name="g", arguments="free text"))

    full = encoded(success(reply(tool_calls=calls, refusal="no"), failed_attempts=(ATTEMPT,), attempts=2))
    bare = encoded(success())

    assert full["tool_calls"] == [
        {"id": "t1", "name": "f", "arguments": {"a": 1}},
        {"id": None, "name": "g", "arguments": "free text"},
    ]
    assert (full["refusal"], full["attempts"]) == ("no", 2)
    assert [attempt["type"] for attempt in full["failed_attempts"]] == ["overloaded_error"]
    assert full.keys() - bare.keys() == {"tool_calls", "refusal", "failed_attempts"}


def test_what_changes_the_price_stands_in_the_usage() -> None:
    """The tier of the answer and the searches that are billed stand beside the tokens, where there are any."""
    usage = encoded(success(reply(usage=dataclasses.replace(USAGE, web_searches=3, service_tier="flex"))))["usage"]

    assert (usage["web_searches"], usage["service_tier"]) == (3, "flex")
    assert usage.keys() - encoded(success())["usage"].keys() == {"web_searches", "service_tier"}


def test_unknown_usage_is_null() -> None:
    """An answer whose server told no tokens has null, never zero."""
    assert encoded(success(reply(usage=None)))["usage"] is None


def test_a_server_that_tells_no_model_answers_as_the_one_asked() -> None:
    """Where an answer names no model, the line names the one that was asked."""
    assert encoded(success(reply(model="")))["model"] == "claude-x"


@pytest.mark.parametrize("form", FORMATS)
def test_the_request_is_echoed_on_demand(form: OutputFormat) -> None:
    """The request as sent goes into its line when asked for, in every dialect, and never else."""
    assert encoded(success(), form, echo_request=True)["request"] == {"model": "claude-x", "messages": []}
    assert "request" not in encoded(success(), form)
    assert "request" not in encoded(INVALID, form, echo_request=True)


# ── exactness ─────────────────────────────────────────────────────────────────────────────────────────

PRETTY = b"""{\r
  "id": "msg_1",
  "stop_reason": "end_turn",
  "text": "a\\nb\xe2\x80\xa8", "n": 1180591620717411303424,
\t"f": 1.10
}
"""


def test_a_pretty_printed_answer_becomes_one_line() -> None:
    """An answer over several lines becomes one, with the same value, escapes and large numbers included."""
    assert encoded(success(reply(raw=PRETTY)))["response"] == json.loads(PRETTY)
    assert encoded(success(reply(raw=PRETTY)), OutputFormat.ANTHROPIC_BATCH)["result"]["message"] == json.loads(PRETTY)


def test_an_answer_is_spliced_byte_for_byte() -> None:
    """The provider's answer keeps its spelling: numbers, escapes, order and keys given twice."""
    raw = b'{"z":1.10,"a":"\\u00e9","a":1E2,"stop_reason":null}'

    assert raw in codec.encode(success(reply(raw=raw)), OutputFormat.NATIVE)
    assert raw in codec.encode(success(reply(raw=raw)), OutputFormat.ANTHROPIC_BATCH)


@pytest.mark.parametrize(
    "value",
    [pytest.param(2**70, id="2^70"), pytest.param(-(2**70), id="-2^70"), pytest.param([{"a": 2**64}], id="nested")],
)
def test_large_integers_stay_exact(value: Any) -> None:
    """An integer beyond 64 bits in metadata or tool arguments is written as it is, beside an untouched answer."""
    calls = (ToolCall(id="t", name="f", arguments={"n": value}),)

    line = encoded(success(reply(tool_calls=calls, raw=PRETTY), metadata={"n": value}))

    assert line["metadata"] == {"n": value}
    assert line["tool_calls"][0]["arguments"] == {"n": value}
    assert line["response"] == json.loads(PRETTY)


def test_deep_metadata_is_written() -> None:
    """Metadata as deep as an input line may have it comes back."""
    deep: Any = 1
    for _ in range(198):
        deep = [deep]

    assert json.loads(codec.encode(success(metadata=deep), OutputFormat.NATIVE))["metadata"] == deep


# ── batch dialects ────────────────────────────────────────────────────────────────────────────────────


def test_an_openai_batch_success_is_that_of_openai() -> None:
    """An OpenAI answer stands untouched in a line of OpenAI's batch output."""
    line = encoded(success(reply(raw=COMPLETION, model="gpt-x-1")), OutputFormat.OPENAI_BATCH)

    assert line["response"] == {"status_code": 200, "request_id": "req_1", "body": json.loads(COMPLETION)}
    assert (line["custom_id"], line["error"], line["id"]) == ("q-17", None, f"batch_req_{'0' * 32}")


def test_an_openai_batch_failure_is_that_of_openai() -> None:
    """A refused request has a response with the status and an error body; one without an answer has an error only."""
    refused, lost = (encoded(each, OutputFormat.OPENAI_BATCH) for each in (FAILED, TIMED_OUT))

    error = {"message": "no", "type": "invalid_request_error", "param": None, "code": "c"}
    assert refused["response"] == {"status_code": 400, "request_id": "req_2", "body": {"error": error}}
    assert refused["error"] is None
    assert (lost["response"], lost["error"]) == (None, {"code": "timeout", "message": "too slow"})


def test_an_anthropic_batch_line_is_that_of_anthropic() -> None:
    """An Anthropic answer stands untouched in a line of Anthropic's batch output; a failure has its error object."""
    answered, failed = (encoded(each, OutputFormat.ANTHROPIC_BATCH) for each in (success(), FAILED))

    assert (answered["custom_id"], answered["result"]) == (
        "q-17",
        {"type": "succeeded", "message": json.loads(MESSAGE)},
    )
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}, "request_id": "req_2"}
    assert failed["result"] == {"type": "errored", "error": error}


@pytest.mark.parametrize(
    ("finish_reason", "expected"),
    [
        pytest.param("end_turn", "stop", id="end_turn"),
        pytest.param("stop_sequence", "stop", id="stop_sequence"),
        pytest.param("max_tokens", "length", id="max_tokens"),
        pytest.param("model_context_window_exceeded", "length", id="context window"),
        pytest.param("tool_use", "tool_calls", id="tool_use"),
        pytest.param("refusal", "content_filter", id="refusal"),
        pytest.param("pause_turn", "stop", id="pause_turn"),
    ],
)
def test_an_anthropic_answer_reads_as_openais(finish_reason: str, expected: str) -> None:
    """In OpenAI's batch dialect an Anthropic answer is a chat completion that the openai SDK accepts."""
    calls = (ToolCall(id="t1", name="f", arguments={"n": 2**70}),)
    answer = success(reply(finish_reason=finish_reason, tool_calls=calls))

    body = encoded(answer, OutputFormat.OPENAI_BATCH)["response"]["body"]

    completion = ChatCompletion.model_validate(body)
    (choice,) = completion.choices
    assert (completion.id, completion.model, completion.created) == ("msg_1", "claude-x-1", 1795315207)
    assert (choice.message.content, choice.finish_reason) == ("hello", expected)
    assert [call.to_dict() for call in choice.message.tool_calls or []] == [
        {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"n":1180591620717411303424}'}}
    ]
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens, completion.usage.total_tokens) == (
        30,
        50,
        80,
    )


@pytest.mark.parametrize(
    ("finish_reason", "expected"),
    [
        pytest.param("stop", "end_turn", id="stop"),
        pytest.param("length", "max_tokens", id="length"),
        pytest.param("tool_calls", "tool_use", id="tool_calls"),
        pytest.param("function_call", "tool_use", id="function_call"),
        pytest.param("content_filter", "refusal", id="content_filter"),
    ],
)
def test_an_openai_answer_reads_as_anthropics(finish_reason: str, expected: str) -> None:
    """In Anthropic's batch dialect an OpenAI answer is a message that the anthropic SDK accepts."""
    calls = (ToolCall(id="t1", name="f", arguments={"n": 1}),)
    answer = success(reply(raw=COMPLETION, model="gpt-x-1", finish_reason=finish_reason, tool_calls=calls))

    message = Message.model_validate(encoded(answer, OutputFormat.ANTHROPIC_BATCH)["result"]["message"])

    assert (message.id, message.model, message.stop_reason) == ("chatcmpl_1", "gpt-x-1", expected)
    assert [block.to_dict() for block in message.content] == [
        {"type": "text", "text": "hello"},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"n": 1}},
    ]
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (20, 4, 6)
    assert usage.output_tokens == 50


def test_a_refusal_is_not_lost_in_translation() -> None:
    """The words of OpenAI's refusal stand in Anthropic's form of it, and the other way round."""
    openai = success(reply(raw=COMPLETION, content=None, finish_reason="stop", refusal="I will not."))
    anthropic = success(reply(content=None, finish_reason="refusal", refusal="bio: no"))

    message = Message.model_validate(encoded(openai, OutputFormat.ANTHROPIC_BATCH)["result"]["message"])
    completion = ChatCompletion.model_validate(encoded(anthropic, OutputFormat.OPENAI_BATCH)["response"]["body"])

    assert message.stop_reason == "refusal"
    assert message.stop_details is not None
    assert message.stop_details.explanation == "I will not."
    assert completion.choices[0].message.refusal == "bio: no"


# ── and back ──────────────────────────────────────────────────────────────────────────────────────────

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
TOKENS = st.integers(0, 10**9)
USAGES = st.builds(
    Usage,
    input_tokens=TOKENS,
    output_tokens=TOKENS,
    cache_read_tokens=TOKENS,
    cache_write_tokens=TOKENS,
    cache_write_1h_tokens=TOKENS,
    reasoning_tokens=TOKENS,
    web_searches=TOKENS,
    service_tier=st.none() | TEXTS,
)
REPLIES = st.builds(
    reply,
    model=TEXTS,
    content=st.none() | TEXTS,
    usage=st.none() | USAGES,
    raw=st.sampled_from([MESSAGE, COMPLETION, PRETTY]),
)
FAILURES = st.builds(
    Failure,
    type=TEXTS,
    message=TEXTS,
    status=st.none() | st.integers(400, 599),
    code=st.none() | TEXTS,
    attempts=st.just((ATTEMPT,)),
)
METADATA = st.none() | st.dictionaries(TEXTS, st.integers() | TEXTS | st.booleans(), max_size=3)
RESULTS = st.one_of(
    st.builds(result, custom_id=TEXTS, request=st.builds(request, provider=TEXTS), reply=REPLIES, metadata=METADATA),
    st.builds(result, custom_id=TEXTS, request=st.builds(request, provider=TEXTS), failure=FAILURES, metadata=METADATA),
    st.builds(result, custom_id=TEXTS, failure=FAILURES, metadata=METADATA),
)


@pytest.mark.parametrize("form", FORMATS)
@given(each=RESULTS)
def test_a_line_tells_what_resuming_needs(form: OutputFormat, each: Result) -> None:
    """What a later run must know of a result is read back from its line, in every dialect."""
    found = codec.decode(codec.encode(each, form, run_id="run-1"))

    same = ("custom_id", "digest", "success", "is_invalid", "provider", "lane", "usage")
    assert [getattr(found, name) for name in same] == [getattr(each, name) for name in same]
    assert found.run == "run-1"


@pytest.mark.parametrize("form", FORMATS)
def test_a_line_tells_the_model_that_answered(form: OutputFormat) -> None:
    """Totals by model come out the same when they are summed from the file."""
    anthropic = success(reply(model="m-1", raw=b'{"id":"x","model":"m-1","stop_reason":null}'))
    openai = success(reply(model="m-2", raw=b'{"id":"x","model":"m-2","choices":[]}'))

    assert codec.decode(codec.encode(anthropic, form)).model == "m-1"
    assert codec.decode(codec.encode(openai, form)).model == "m-2"


KNOWN = b'{"custom_id":"a","digest":"d","success":true,"provider":"p","model":"m"'


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\0\0\0", id="NULs"),
        pytest.param(KNOWN, id="torn"),
        pytest.param(b"null", id="null"),
        pytest.param(b"5", id="number"),
        pytest.param(b'"success"', id="text"),
        pytest.param(b'["success"]', id="array"),
        pytest.param(b"{}", id="empty object"),
        pytest.param(b'{"messages":[{"role":"user","content":"hi"}]}', id="input line"),
        pytest.param(b'{"id":"b","custom_id":"a","response":null,"error":{}}', id="line of a real batch"),
        pytest.param(KNOWN + b',"custom_id":5}', id="number as an id"),
        pytest.param(KNOWN + b',"digest":null}', id="no digest"),
        pytest.param(KNOWN + b',"success":1}', id="1 for true"),
        pytest.param(KNOWN + b',"provider":["p"]}', id="list as a provider"),
        pytest.param(KNOWN + b',"usage":5}', id="number as usage"),
        pytest.param(KNOWN + b',"usage":{"input_tokens":"5"}}', id="text as tokens"),
        pytest.param(KNOWN + b',"usage":{"input_tokens":-5}}', id="negative tokens"),
        pytest.param(KNOWN + b',"usage":{"service_tier":5}}', id="number as a tier"),
        pytest.param(b'{"custom_id":"a","result":{"type":"succeeded","message":[]}}', id="list as a message"),
        pytest.param(b"[" * 2_000, id="deep"),
    ],
)
def test_what_is_no_result_is_a_line_error(line: bytes) -> None:
    """A line of anything else is told from a result, whatever it is, and breaks nothing."""
    with pytest.raises(LineError, match="not a result line"):
        codec.decode(line)


def test_what_those_lines_vary_is_a_result() -> None:
    """The line that the wrong ones above are made of is itself a result."""
    assert codec.decode(KNOWN + b"}").custom_id == "a"


@given(st.integers(0, 400), st.sampled_from(FORMATS))
def test_a_cut_line_is_no_result(length: int, form: OutputFormat) -> None:
    """No beginning of a line passes for a line."""
    line = codec.encode(success(), form)[:-1]

    with pytest.raises(LineError):
        codec.decode(line[: min(length, len(line) - 1)])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("status", [None, 200, 400, 529])
def test_a_failure_is_never_read_back_as_a_success(form: OutputFormat, status: int | None) -> None:
    """Also not one that came with a 200, and the model that was asked is kept."""
    failed = dataclasses.replace(FAILED, failure=Failure(type="invalid_response", message="no", status=status))

    found = codec.decode(codec.encode(failed, form))

    assert (found.success, found.model) == (False, "claude-x")


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    """Each line comes with the place where it begins; what is no result says nothing and stops nobody."""
    line = codec.encode(success(), OutputFormat.NATIVE)
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + b"garbage\n" + line[:-1])

    with (tmp_path / "a.jsonl").open("rb") as file:
        found = list(codec.read(file))

    assert [(start, text) for start, text, _ in found] == [
        (0, line[:-1]),
        (len(line), b""),
        (len(line) + 1, b"garbage"),
        (len(line) + 9, line[:-1]),
    ]
    assert [record is not None for _, _, record in found] == [True, False, False, True]
