"""The codecs of both batch APIs: what is sent, and what every answer and every line of results means."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import anthropic.types.messages
import httpx
import openai.types
import orjson
import pydantic
import pytest
import python_multipart
from anthropic.types.messages import batch_create_params as anthropic_params
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types import batch_create_params as openai_params

from pipeline import providers
from pipeline.core.config import Config, Endpoint
from pipeline.core.errors import AnthropicAPIError, ErrorScope, LineError, OpenAIAPIError, ProviderError
from pipeline.core.hashing import checksum
from pipeline.core.http import Client, Content
from pipeline.core.types import HttpRequest, HttpResponse, Protocol
from pipeline.providers import batch as batches
from pipeline.providers.batch import Batch, Outcome, Problem
from pipeline.simulator import Options, build_app
from tests.providers.test_sdk_types import _exact

ANTHROPIC, OPENAI = Protocol.ANTHROPIC, Protocol.OPENAI
CONFIG = Config()
NONCE = "0a1b2c3d4e5f"
KEYED = (("content-type", "application/json"), ("x-key", "k"))
ERRORS = {ANTHROPIC: AnthropicAPIError, OPENAI: OpenAIAPIError}
STATUS = {ANTHROPIC: "processing_status", OPENAI: "status"}
BODIES = {
    ANTHROPIC: b'{"model":"claude-haiku-5-5","max_tokens":9,"messages":[{"role":"user","content":"\xc3\xa9 \\n"}]}',
    OPENAI: b'{"model":"gpt-6-luna","messages":[{"role":"user","content":"\xc3\xa9\\n--x"}],"n":18446744073709551617}',
}
JUNK: tuple[Any, ...] = (None, "", "x", 0, 1, -1, 1.5, 10**30, True, [], [1], {}, {"a": 1})
both = pytest.mark.parametrize("protocol", [ANTHROPIC, OPENAI])

MESSAGE_BATCH = {
    "id": "msgbatch_01",
    "type": "message_batch",
    "processing_status": "ended",
    "request_counts": {"processing": 0, "succeeded": 5, "errored": 4, "canceled": 3, "expired": 2},
    "created_at": "2026-11-22T02:40:07.123456+00:00",
    "expires_at": "2026-11-23T02:40:07.5+02:00",
    "ended_at": "2026-11-22T03:00:00Z",
    "archived_at": None,
    "cancel_initiated_at": None,
    "results_url": "https://elsewhere.example/v1/messages/batches/msgbatch_01/results",
}
OPENAI_BATCH = {
    "id": "batch_01",
    "object": "batch",
    "status": "completed",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
    "input_file_id": "file-in",
    "output_file_id": "file-out",
    "error_file_id": "file-err",
    "request_counts": {"total": 9, "completed": 7, "failed": 2},
    "created_at": 1_795_315_207,
    "expires_at": 1_795_401_607,
    "metadata": {"pipeline_chunk": NONCE},
    "errors": None,
}
WHOLE: dict[Protocol, dict[str, Any]] = {ANTHROPIC: MESSAGE_BATCH, OPENAI: OPENAI_BATCH}


def endpoint(protocol: Protocol, **changes: Any) -> Endpoint:
    return CONFIG.providers[protocol].model_copy(update=changes)


def answer(value: Any, status: int = 200) -> HttpResponse:
    return HttpResponse(status=status, body=value if isinstance(value, bytes) else orjson.dumps(value))


def batch(protocol: Protocol, **changes: Any) -> Batch:
    """Read a whole batch with some fields changed; `...` takes a field out."""
    fields = WHOLE[protocol] | changes
    body = json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()
    return providers.batch_codec(protocol).batch(answer(body))


def fails(protocol: Protocol, value: Any, status: int = 200) -> ProviderError:
    """Return the error that the answer to `create` or `poll` is read as."""
    with pytest.raises(ERRORS[protocol]) as caught:
        providers.batch_codec(protocol).batch(answer(value, status))
    return caught.value


def outcome(protocol: Protocol, line: Any) -> Outcome:
    return providers.batch_codec(protocol).outcome(line if isinstance(line, bytes) else orjson.dumps(line))


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("protocol", "custom_id", "is_kept"),
    [
        pytest.param(OPENAI, "r1", True, id="plain"),
        pytest.param(OPENAI, 'a "b"\n/é', True, id="any character"),
        pytest.param(OPENAI, "x" * 64, True, id="64"),
        pytest.param(OPENAI, "x" * 65, False, id="65"),
        pytest.param(OPENAI, "x" * 512, False, id="512"),
        pytest.param(ANTHROPIC, "r1_A-9", True, id="anthropic plain"),
        pytest.param(ANTHROPIC, "x" * 51, True, id="anthropic 51 and the nonce are 64"),
        pytest.param(ANTHROPIC, "x" * 52, False, id="anthropic 52"),
        pytest.param(ANTHROPIC, "x" * 512, False, id="anthropic 512"),
        pytest.param(ANTHROPIC, "a b", False, id="anthropic space"),
        pytest.param(ANTHROPIC, "a.b", False, id="anthropic dot"),
        pytest.param(ANTHROPIC, "é", False, id="anthropic letter beyond ASCII"),
        pytest.param(ANTHROPIC, "٣", False, id="anthropic digit beyond ASCII"),
        pytest.param(ANTHROPIC, "a\n", False, id="anthropic line end"),
    ],
)
def test_an_id_that_the_provider_takes_is_the_name(protocol: Protocol, custom_id: str, is_kept: bool) -> None:
    """Who looks at a batch at the provider finds his ids; the mark stands only for those that it would refuse."""
    codec = providers.batch_codec(protocol)

    name = codec.name(NONCE, custom_id, "f" * 32)

    prefix = "" if codec.has_tags else f"{NONCE}-"
    assert name == prefix + (custom_id if is_kept else "f" * 32)


@both
@given(st.sets(st.text(max_size=70) | st.text("ab_-", max_size=70) | st.text("aé", min_size=500, max_size=512)))
@example(custom_ids={"a" * 60 + str(n) for n in range(30)})
def test_names_of_a_chunk_fit_and_differ(protocol: Protocol, custom_ids: set[str]) -> None:
    """Whatever ids the input has, the provider takes the names, and each tells one request."""
    codec = providers.batch_codec(protocol)
    marks = {custom_id: checksum(custom_id.encode(), b"\0d").hex() for custom_id in custom_ids}

    names = [codec.name(NONCE, custom_id, mark) for custom_id, mark in marks.items()]

    form = r"[a-zA-Z0-9_-]{1,64}" if protocol is ANTHROPIC else r"(?s).{0,64}"
    assert all(re.fullmatch(form, name) for name in names)
    assert len(set(names)) == len(custom_ids)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param(b'{"custom_id":"0a1b2c3d4e5f-r1"}', True, id="ours"),
        pytest.param(b'{"custom_id":"0a1b2c3d4e5f"}', False, id="no name behind it"),
        pytest.param(b'{"custom_id":"0a1b2c3d4e5e-r1"}', False, id="another nonce"),
        pytest.param(b'{"custom_id":"r1-0a1b2c3d4e5f-"}', False, id="elsewhere"),
        pytest.param(b'{"custom_id":5}', False, id="no text"),
        pytest.param(b"", False, id="nothing"),
        pytest.param(b"\xff", False, id="no JSON"),
    ],
)
def test_a_batch_is_told_by_the_names_in_its_results(line: bytes, expected: bool) -> None:
    """Anthropic's batches keep no mark; their names begin with one. OpenAI's are told by their metadata."""
    assert providers.batch_codec(ANTHROPIC).belongs(NONCE, line) is expected
    assert providers.batch_codec(OPENAI).belongs(NONCE, line)


# ── what is sent ──────────────────────────────────────────────────────────────────────────────────────────────────


def content(protocol: Protocol, *requests: tuple[str, bytes]) -> bytes:
    """Return requests as they stand in an upload."""
    codec = providers.batch_codec(protocol)
    return codec.separator.join(codec.entry(name, body) for name, body in requests)


NAMES = ("r1", 'a "quoted"\n\\name', "é\u2028", "")


def test_anthropic_is_sent_one_object_of_requests() -> None:
    """Head, entries and tail are the documented JSON, the bodies in it byte for byte."""
    call = providers.batch_codec(ANTHROPIC).create(endpoint(ANTHROPIC), KEYED, NONCE, None)

    assert call.tail is not None
    sent = call.body + content(ANTHROPIC, *[(name, BODIES[ANTHROPIC]) for name in NAMES]) + call.tail
    assert json.loads(sent) == {
        "requests": [{"custom_id": name, "params": json.loads(BODIES[ANTHROPIC])} for name in NAMES]
    }
    assert sent.count(BODIES[ANTHROPIC]) == len(NAMES)
    assert (call.method, call.url, call.headers) == ("POST", "https://api.anthropic.com/v1/messages/batches", KEYED)


def parts(
    call: HttpRequest, middle: bytes
) -> tuple[dict[bytes, bytes | None], dict[bytes, tuple[bytes | None, bytes]]]:
    """Return fields and files of a form, as python-multipart reads them."""
    fields: dict[bytes, bytes | None] = {}
    files: dict[bytes, tuple[bytes | None, bytes]] = {}

    def on_field(field: Any) -> None:
        fields[field.field_name] = field.value

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        files[file.field_name] = file.file_name, file.file_object.read()

    whole = call.body + middle + (call.tail or b"")
    headers = {name.title(): value.encode() for name, value in call.headers}
    python_multipart.parse_form(
        {**headers, "Content-Length": str(len(whole)).encode()}, io.BytesIO(whole), on_field, on_file
    )
    return fields, files


def test_openai_is_sent_a_form_with_a_file_of_lines() -> None:
    """The form has the purpose and one file, whose lines are the documented ones, the bodies byte for byte."""
    call = providers.batch_codec(OPENAI).upload(endpoint(OPENAI), KEYED, NONCE)
    assert call is not None

    fields, files = parts(call, content(OPENAI, *[(name, BODIES[OPENAI]) for name in NAMES]))

    assert fields == {b"purpose": b"batch"}
    assert list(files) == [b"file"]
    file_name, raw = files[b"file"]
    assert file_name == f"{NONCE}.jsonl".encode()
    assert raw.endswith(b"}\n")
    assert raw.count(b"}\n{") == len(NAMES) - 1
    assert [json.loads(line) for line in raw.splitlines()] == [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": json.loads(BODIES[OPENAI])}
        for name in NAMES
    ]
    assert raw.count(BODIES[OPENAI]) == len(NAMES)
    assert [value for name, value in call.headers if name == "content-type"] == [
        f"multipart/form-data; boundary=pipeline-{NONCE}"
    ]
    assert ("x-key", "k") in call.headers


def test_openai_makes_a_batch_of_the_file_with_our_mark() -> None:
    """The batch names file, endpoint and window, and keeps the nonce by which it is found again."""
    call = providers.batch_codec(OPENAI).create(endpoint(OPENAI), KEYED, NONCE, "file-1")

    assert orjson.loads(call.body) == {
        "input_file_id": "file-1",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "metadata": {"pipeline_chunk": NONCE},
    }
    assert (call.url, call.tail) == ("https://api.openai.com/v1/batches", None)


def test_anthropic_has_no_upload() -> None:
    """Anthropic's requests go into the call that makes the batch."""
    assert providers.batch_codec(ANTHROPIC).upload(endpoint(ANTHROPIC), KEYED, NONCE) is None


@pytest.mark.parametrize(
    ("protocol", "kind", "what", "expected"),
    [
        pytest.param(OPENAI, "poll", "batch_1", "GET /v1/batches/batch_1", id="poll"),
        pytest.param(OPENAI, "poll", "a/b?c é", "GET /v1/batches/a%2Fb%3Fc%20%C3%A9", id="strange id"),
        pytest.param(OPENAI, "cancel", "batch_1", "POST /v1/batches/batch_1/cancel", id="cancel"),
        pytest.param(OPENAI, "list", None, "GET /v1/batches?limit=100", id="list"),
        pytest.param(OPENAI, "list", "a&b", "GET /v1/batches?limit=100&after=a%26b", id="list on"),
        pytest.param(OPENAI, "download", "files/f/content", "GET /v1/files/f/content", id="download"),
        pytest.param(ANTHROPIC, "poll", "m_1", "GET /v1/messages/batches/m_1", id="anthropic poll"),
        pytest.param(ANTHROPIC, "cancel", "m/1", "POST /v1/messages/batches/m%2F1/cancel", id="anthropic cancel"),
        pytest.param(ANTHROPIC, "list", None, "GET /v1/messages/batches?limit=1000", id="anthropic list"),
        pytest.param(
            ANTHROPIC, "list", "a&b", "GET /v1/messages/batches?limit=1000&after_id=a%26b", id="anthropic list on"
        ),
        pytest.param(ANTHROPIC, "download", "m/results", "GET /v1/messages/batches/m/results", id="anthropic download"),
    ],
)
@pytest.mark.parametrize("slash", ["", "/"])
def test_every_call_goes_beneath_the_endpoint(
    protocol: Protocol, kind: str, what: str | None, expected: str, slash: str
) -> None:
    """Paths are the documented ones beneath base_url, ids cannot break out of them, headers go as they are."""
    prefix = {OPENAI: "https://gateway.example/a/v1", ANTHROPIC: "https://gateway.example/a"}[protocol]
    codec = providers.batch_codec(protocol)

    call: HttpRequest = getattr(codec, kind)(endpoint(protocol, base_url=prefix + slash), KEYED, what)

    method, path = expected.split(" ", 1)
    assert (call.method, call.url) == (method, "https://gateway.example/a" + path)
    assert (call.headers, call.body, call.tail) == (KEYED, b"", None)


def test_the_sdks_accept_what_is_sent() -> None:
    """What makes a batch fits the request types of the official SDKs, to the bottom."""
    call = providers.batch_codec(OPENAI).create(endpoint(OPENAI), KEYED, NONCE, "file-1")
    pydantic.TypeAdapter(_exact(openai_params.BatchCreateParams)).validate_json(call.body)

    call = providers.batch_codec(ANTHROPIC).create(endpoint(ANTHROPIC), KEYED, NONCE, None)
    sent = call.body + content(ANTHROPIC, ("r1", BODIES[ANTHROPIC]), ("r2", BODIES[ANTHROPIC])) + (call.tail or b"")
    pydantic.TypeAdapter(_exact(anthropic_params.BatchCreateParams)).validate_json(sent)


# ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_of_anthropics_is_read() -> None:
    """Counts, times in UTC, and the results where the API has them, whatever host `results_url` names."""
    assert batch(ANTHROPIC) == Batch(
        id="msgbatch_01",
        status="ended",
        is_ended=True,
        total=14,
        succeeded=5,
        failed=4,
        created_at="2026-11-22T02:40:07Z",
        expires_at="2026-11-23T00:40:07Z",
        files=("msgbatch_01/results",),
    )


def test_a_batch_of_openais_is_read() -> None:
    """Counts, times, our mark, and both files, answers first."""
    assert batch(OPENAI) == Batch(
        id="batch_01",
        status="completed",
        is_ended=True,
        total=9,
        succeeded=7,
        failed=2,
        created_at="2026-11-22T02:40:07Z",
        expires_at="2026-11-23T02:40:07Z",
        files=("files/file-out/content", "files/file-err/content"),
        tag=NONCE,
    )


@pytest.mark.parametrize(
    ("protocol", "status", "is_ended", "ending"),
    [
        pytest.param(OPENAI, "validating", False, None, id="validating"),
        pytest.param(OPENAI, "in_progress", False, None, id="in_progress"),
        pytest.param(OPENAI, "finalizing", False, None, id="finalizing"),
        pytest.param(OPENAI, "completed", True, None, id="completed"),
        pytest.param(OPENAI, "failed", True, None, id="failed"),
        pytest.param(OPENAI, "expired", True, "expired", id="expired"),
        pytest.param(OPENAI, "cancelling", False, None, id="cancelling"),
        pytest.param(OPENAI, "cancelled", True, "cancelled", id="cancelled"),
        pytest.param(OPENAI, "new_word", False, None, id="unknown"),
        pytest.param(ANTHROPIC, "in_progress", False, None, id="anthropic in_progress"),
        pytest.param(ANTHROPIC, "canceling", False, None, id="anthropic canceling"),
        pytest.param(ANTHROPIC, "ended", True, None, id="anthropic ended"),
        pytest.param(ANTHROPIC, "new_word", False, None, id="anthropic unknown"),
    ],
)
def test_a_status_says_whether_a_batch_has_ended(
    protocol: Protocol, status: str, is_ended: bool, ending: str | None
) -> None:
    """Only the documented last words end a batch; those of an early end say what befell the rest."""
    found = batch(protocol, **{STATUS[protocol]: status})

    assert (found.status, found.is_ended, found.ending) == (status, is_ended, ending)


def test_anthropic_tells_no_counts_before_the_end() -> None:
    """Counts stay 0 until all has ended, so they are not told; how many requests there are is."""
    counts = {"processing": 14, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}

    found = batch(ANTHROPIC, processing_status="in_progress", request_counts=counts)

    assert (found.total, found.succeeded, found.failed, found.files) == (14, None, None, ())


@pytest.mark.parametrize(
    ("output", "errors", "files"),
    [
        pytest.param("file-a", None, ["a"], id="no errors"),
        pytest.param(None, "file-b", ["b"], id="errors only"),
        pytest.param("", "file-b", ["b"], id="empty text"),
        pytest.param(..., "file-b", ["b"], id="absent"),
        pytest.param(5, {"id": "file-b"}, [], id="wrong types"),
        pytest.param(None, None, [], id="none"),
        pytest.param("file-a", "file-b", ["a", "b"], id="both"),
    ],
)
@pytest.mark.parametrize("status", ["completed", "expired", "cancelled"])
def test_files_that_are_there(output: Any, errors: Any, files: list[str], status: str) -> None:
    """Either file may be missing, in every way of saying so, however the batch ended."""
    found = batch(OPENAI, status=status, output_file_id=output, error_file_id=errors)

    assert list(found.files) == [f"files/file-{name}/content" for name in files]


def test_ids_of_files_cannot_break_out_of_their_path() -> None:
    """An id is quoted."""
    assert batch(OPENAI, output_file_id="../a?b", error_file_id=None).files == ("files/..%2Fa%3Fb/content",)
    assert batch(ANTHROPIC, id="../a?b").files == ("..%2Fa%3Fb/results",)


@both
@pytest.mark.parametrize("junk", [..., *JUNK], ids=repr)
@pytest.mark.parametrize(
    "name",
    [
        *("request_counts", "created_at", "expires_at", "output_file_id", "error_file_id", "errors", "results_url"),
        *("completion_window", "type", "usage"),
    ],
)
def test_nothing_but_id_and_status_is_needed(protocol: Protocol, name: str, junk: Any) -> None:
    """Null, absent, empty, or of a wrong type: a batch is read all the same, and what was told well stays."""
    found = batch(protocol, **{name: junk})

    whole = batch(protocol)
    assert (found.id, found.status, found.is_ended, found.tag) == (whole.id, whole.status, True, whole.tag)
    if name != "request_counts":
        assert (found.total, found.succeeded, found.failed) == (whole.total, whole.succeeded, whole.failed)
    else:
        assert (found.total, found.succeeded, found.failed) == (None, None, None)


@both
@pytest.mark.parametrize("junk", [..., None, "", "5", -1, 1.5, 10**30, True, [], {}], ids=repr)
def test_a_count_that_cannot_be_is_none(protocol: Protocol, junk: Any) -> None:
    """A count is a whole number from 0 on; anything else is not told."""
    name = {ANTHROPIC: "succeeded", OPENAI: "completed"}[protocol]
    counts: dict[str, Any] = {**WHOLE[protocol]["request_counts"], name: junk}

    found = batch(protocol, request_counts={key: value for key, value in counts.items() if value is not ...})

    assert found.succeeded is None
    assert found.failed == batch(protocol).failed


@both
@pytest.mark.parametrize("junk", [..., None, "", 5, True, [], {}], ids=repr)
@pytest.mark.parametrize("name", ["id", "status"])
def test_a_batch_without_id_or_status_is_none(protocol: Protocol, name: str, junk: Any) -> None:
    """A 200 that does not tell which batch, or how it stands, is an unusable answer; another may be better."""
    field = STATUS[protocol] if name == "status" else name

    with pytest.raises(ERRORS[protocol]) as caught:
        batch(protocol, **{field: junk})

    assert (caught.value.type, caught.value.scope, caught.value.status) == ("invalid_response", ErrorScope.ATTEMPT, 200)


@both
@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'"x"', b"5", b"<html>", b'{"id":', b"\xff\xfe"])
def test_a_200_that_is_no_object_is_unusable(protocol: Protocol, body: bytes) -> None:
    """Whatever a 200 holds that is not a JSON object, it is one kind of error, which says that it may have worked."""
    error = fails(protocol, body)

    assert (error.type, error.scope, error.may_be_billed) == ("invalid_response", ErrorScope.ATTEMPT, True)


@both
@pytest.mark.parametrize(
    ("status", "kind", "scope"),
    [
        pytest.param(400, "invalid_request_error", ErrorScope.REQUEST, id="400"),
        pytest.param(401, "authentication_error", ErrorScope.RUN, id="401"),
        pytest.param(403, "permission_error", ErrorScope.RUN, id="403"),
        pytest.param(404, "not_found_error", ErrorScope.MODEL, id="404"),
        pytest.param(413, "request_too_large", ErrorScope.REQUEST, id="413"),
        pytest.param(429, "rate_limit_error", ErrorScope.ATTEMPT, id="429"),
        pytest.param(500, "api_error", ErrorScope.ATTEMPT, id="500"),
        pytest.param(529, "overloaded_error", ErrorScope.ATTEMPT, id="529"),
        pytest.param(200, "overloaded_error", ErrorScope.ATTEMPT, id="200"),
    ],
)
def test_a_refusal_is_read_as_one_of_a_live_call(protocol: Protocol, status: int, kind: str, scope: ErrorScope) -> None:
    """Batch APIs refuse in the same form; errors reach as far as there."""
    value = {"type": "error", "error": {"type": kind, "message": "no"}}

    error = fails(protocol, value, status)
    refusal = providers.batch_codec(protocol).refusal(answer(value, status))

    assert (error.type, error.message, error.status, error.scope) == (kind, "no", status, scope)
    assert (refusal.type, refusal.message, refusal.status, refusal.scope) == (kind, "no", status, scope)


@both
def test_a_redirect_is_told(protocol: Protocol) -> None:
    """An address that moved is for the user to put right."""
    error = fails(protocol, b"", 307)

    assert (error.type, error.scope) == ("redirect", ErrorScope.RUN)


@pytest.mark.parametrize("value", [{}, {"id": ""}, {"id": None}, {"id": 5}, {"object": "file"}])
def test_an_upload_without_an_id_is_unusable(value: Any) -> None:
    """Without the id of the file no batch can be made."""
    codec = providers.batch_codec(OPENAI)
    with pytest.raises(OpenAIAPIError) as caught:
        codec.uploaded(answer(value))

    assert caught.value.type == "invalid_response"
    assert codec.uploaded(answer({"id": "file-1", "bytes": 5})) == "file-1"


# ── times ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("2026-11-22T02:40:07Z", "2026-11-22T02:40:07Z", id="Z"),
        pytest.param("2026-11-22T02:40:07+00:00", "2026-11-22T02:40:07Z", id="+00:00"),
        pytest.param("2026-11-22T02:40:07-05:30", "2026-11-22T08:10:07Z", id="another zone"),
        pytest.param("2026-11-22T02:40:07.999999999Z", "2026-11-22T02:40:07Z", id="nanoseconds"),
        pytest.param("0001-01-01T00:00:00Z", None, id="Go's zero time"),
        pytest.param("1969-12-31T23:59:59Z", None, id="before computers"),
        pytest.param("9999-12-31T23:59:59-01:00", None, id="beyond all times"),
        pytest.param("2026-11-22T02:40:61Z", None, id="no such second"),
        pytest.param("soon", None, id="a word"),
        *[pytest.param(junk, None, id=repr(junk)) for junk in JUNK if junk != "x"],
    ],
)
def test_times_of_anthropics(value: Any, expected: str | None) -> None:
    """RFC 3339 in any zone is UTC in whole seconds; what is no time is none."""
    assert batches.from_rfc3339(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(1_795_315_207, "2026-11-22T02:40:07Z", id="seconds"),
        pytest.param(1_795_315_207.9, "2026-11-22T02:40:07Z", id="with a fraction"),
        pytest.param(0, "1970-01-01T00:00:00Z", id="0"),
        pytest.param(1_795_315_207_000, None, id="milliseconds"),
        pytest.param(-1, None, id="negative"),
        pytest.param(math.nan, None, id="NaN"),
        pytest.param(math.inf, None, id="inf"),
        *[pytest.param(junk, None, id=repr(junk)) for junk in (None, "", "5", -1, 10**30, True, list[int](), {"a": 1})],
    ],
)
def test_times_of_openais(value: Any, expected: str | None) -> None:
    """Unix seconds are UTC in whole seconds; what is no time is none."""
    assert batches.from_unix(value) == expected


# ── lists ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize(
    ("page", "ids", "has_more"),
    [
        pytest.param({"data": ["a", "b"], "has_more": True}, ["a", "b"], True, id="more"),
        pytest.param({"data": ["a"], "has_more": False}, ["a"], False, id="last"),
        pytest.param({"data": ["a"]}, ["a"], False, id="not told"),
        pytest.param({"data": ["a"], "has_more": None}, ["a"], False, id="null"),
        pytest.param({"data": ["a"], "has_more": "true"}, ["a"], False, id="a text"),
        pytest.param({"data": [], "has_more": True}, [], True, id="empty"),
        pytest.param({"data": None}, [], False, id="data null"),
        pytest.param({}, [], False, id="no data"),
    ],
)
def test_a_page_is_read(protocol: Protocol, page: dict[str, Any], ids: list[str], has_more: bool) -> None:
    """The batches of a page come in its order, and whether there are older ones."""
    if page.get("data"):
        page = page | {"data": [WHOLE[protocol] | {"id": id} for id in page["data"]]}

    found, more = providers.batch_codec(protocol).listed(answer(page))

    assert ([each.id for each in found], more) == (ids, has_more)


@both
@pytest.mark.parametrize("data", ["x", {"a": 1}, [1], [None], [[]], [{}], [{"id": "a"}], 5, 1.5, True], ids=repr)
def test_a_page_with_something_else_is_unusable(protocol: Protocol, data: Any) -> None:
    """A list that holds what is no batch is not trusted: the one looked for might be there."""
    with pytest.raises(ERRORS[protocol]) as caught:
        providers.batch_codec(protocol).listed(answer({"data": data}))

    assert caught.value.type == "invalid_response"


@pytest.mark.parametrize("metadata", [None, "x", "", [1], [], 5, True, {}, {"a": "b"}, {"pipeline_chunk": 5}], ids=repr)
def test_a_batch_without_our_mark_has_none(metadata: Any) -> None:
    """Whatever stands in the metadata of others' batches, reading it fails at nothing."""
    assert batch(OPENAI, metadata=metadata).tag is None


# ── failed validation ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("errors", "problems"),
    [
        pytest.param(
            [{"code": "invalid_json_line", "message": "not JSON", "line": 3, "param": None}],
            [("invalid_json_line", "not JSON", 3)],
            id="a line",
        ),
        pytest.param(
            [{"code": "a", "message": "m", "line": 1}, {"code": "b", "message": "n", "line": 9}],
            [("a", "m", 1), ("b", "n", 9)],
            id="two lines",
        ),
        pytest.param(
            [{"code": "token_limit_exceeded", "message": "full", "line": None}],
            [("token_limit_exceeded", "full", None)],
            id="all of it",
        ),
        pytest.param([{"message": "m"}], [(None, "m", None)], id="no code"),
        pytest.param([{"code": 5, "message": "m", "line": "3"}], [(None, "m", None)], id="wrong types"),
        pytest.param([{"code": "a", "message": "m", "line": 0}], [("a", "m", None)], id="line 0"),
        pytest.param([{"code": "a", "message": "m", "line": True}], [("a", "m", None)], id="line true"),
        pytest.param([{"code": "a", "message": "m\x1b[2J\nx"}], [("a", "m [2J x", None)], id="controls"),
        pytest.param(["x", None, {"code": "a", "message": "m"}], [("a", "m", None)], id="some are no objects"),
        pytest.param([{}], [(None, "the provider gives no reason", None)], id="nothing said"),
        pytest.param([{"code": "a", "message": None}], [("a", "the provider gives no reason", None)], id="no message"),
    ],
)
def test_why_a_batch_failed(errors: Any, problems: list[tuple[str | None, str, int | None]]) -> None:
    """Every reason is told with its code and, where the provider names one, its line."""
    found = batch(OPENAI, status="failed", errors={"object": "list", "data": errors})

    assert [(each.code, each.message, each.line) for each in found.problems] == problems
    assert batch(OPENAI, status="completed", errors={"data": errors}).problems == ()


@pytest.mark.parametrize(
    "errors", [..., None, "", "boom", [], {}, {"data": None}, {"data": []}, {"data": "x"}], ids=repr
)
def test_a_failed_batch_has_a_reason(errors: Any) -> None:
    """Where the provider gives none, that is the reason."""
    (problem,) = batch(OPENAI, status="failed", errors=errors).problems

    assert problem == Problem(code=None, message="the batch failed, and the provider does not say why")


@pytest.mark.parametrize(
    ("code", "scope"),
    [
        pytest.param("token_limit_exceeded", ErrorScope.ATTEMPT, id="queue full"),
        pytest.param("too_many_batches", ErrorScope.ATTEMPT, id="too many batches"),
        pytest.param("rate_limit_exceeded", ErrorScope.ATTEMPT, id="too fast"),
        pytest.param("invalid_json_line", ErrorScope.REQUEST, id="bad line"),
        pytest.param(None, ErrorScope.REQUEST, id="not told"),
        pytest.param("model_not_found", ErrorScope.MODEL, id="no such model"),
        pytest.param("billing_hard_limit_reached", ErrorScope.RUN, id="no money"),
        pytest.param("insufficient_quota", ErrorScope.RUN, id="no quota"),
    ],
)
def test_how_far_a_failure_reaches(code: str | None, scope: ErrorScope) -> None:
    """What only came too early may be made again; the rest reaches as far as the same words do in a live call."""
    error = providers.batch_codec(OPENAI).failure(Problem(code=code, message="said so", line=3))

    assert (error.scope, error.code, error.message, error.may_be_billed) == (scope, code, "said so", False)


# ── results ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("message", "limit"),
    [
        pytest.param(
            "Enqueued token limit reached for gpt-6-luna in organization org-1. Limit: 2,000,000 enqueued tokens. "
            "Please try again once some in_progress batches have been completed.",
            2_000_000,
            id="as OpenAI writes it",
        ),
        pytest.param("Limit: 90000 enqueued tokens", 90_000, id="without commas"),
        pytest.param("Limit: many enqueued tokens", None, id="no number"),
        pytest.param("too many batches", None, id="not told"),
    ],
)
def test_how_many_tokens_are_queued(message: str, limit: int | None) -> None:
    """A failure says how much the queue holds; Anthropic's batches have no such limit."""
    problem = Problem(code="token_limit_exceeded", message=message)

    assert providers.batch_codec(OPENAI).queue_limit(problem) == limit
    assert providers.batch_codec(ANTHROPIC).queue_limit(problem) is None


@both
def test_a_download_that_is_sent_elsewhere_ends_the_run(protocol: Protocol) -> None:
    """A redirect is no file, and no refusal that another attempt would pass."""
    error = providers.batch_codec(protocol).refusal(
        HttpResponse(status=302, headers={"location": "https://elsewhere.example/"})
    )

    assert (error.type, error.scope, error.status) == ("redirect", ErrorScope.RUN, 302)


COMPLETION = {"id": "chatcmpl-1", "choices": [{"message": {"role": "assistant", "content": "é"}}]}
MESSAGE = {"id": "msg_1", "type": "message", "content": [{"type": "text", "text": "é"}]}


def ok(protocol: Protocol, body: bytes) -> bytes:
    """Return a line of results with a body as it stands there."""
    if protocol is OPENAI:
        return (
            b'{"id":"x","custom_id":"r1","response":{"status_code":200,"request_id":"req_1","body":%b},"error":null}'
            % body
        )
    return b'{"custom_id":"r1","result":{"type":"succeeded","message":%b}}' % body


@both
def test_a_reply_in_a_batch_is_that_of_a_live_call(protocol: Protocol) -> None:
    """The codec of live calls reads it: status 200 and the body."""
    found = outcome(protocol, ok(protocol, orjson.dumps(COMPLETION if protocol is OPENAI else MESSAGE)))

    assert (found.name, found.ending) == ("r1", None)
    assert found.answer is not None
    reply = providers.codec(protocol).decode(found.answer)
    assert (reply.content, reply.request_id) == ("é", "req_1" if protocol is OPENAI else None)


def response(**changes: Any) -> dict[str, Any]:
    return {"custom_id": "r1", "response": {"status_code": 200, "request_id": "q", "body": {}} | changes, "error": None}


@pytest.mark.parametrize(
    ("line", "status", "body"),
    [
        pytest.param(response(), 200, {}, id="200"),
        pytest.param(response(status_code=400, body={"error": {"a": 1}}), 400, {"error": {"a": 1}}, id="400"),
        pytest.param(response(body='{"a":1}'), 200, {"a": 1}, id="a text of JSON"),
        pytest.param(response(body=None), 200, None, id="null"),
        pytest.param(response(body=[1]), 200, [1], id="a list"),
        pytest.param(response(status_code="200"), 0, {}, id="status is a text"),
        pytest.param(response(status_code=None), 0, {}, id="status is null"),
        pytest.param(response(status_code=True), 0, {}, id="status is true"),
        pytest.param(
            {"custom_id": "r1", "response": None, "error": {"code": "x", "message": "m"}},
            500,
            {"error": {"code": "x", "message": "m"}},
            id="an error of unknown code",
        ),
        pytest.param(
            {"custom_id": "r1", "error": {"code": 429}}, 429, {"error": {"code": 429}}, id="a status as the code"
        ),
        pytest.param({"custom_id": "r1", "error": {"code": 700}}, 500, {"error": {"code": 700}}, id="no such status"),
        pytest.param({"custom_id": "r1", "error": {}}, 500, {"error": {}}, id="an empty error"),
        pytest.param({"custom_id": "r1"}, 200, "neither a response nor an error", id="neither"),
        pytest.param(
            {"custom_id": "r1", "response": None, "error": None}, 200, "neither a response nor an error", id="nulls"
        ),
        pytest.param(
            {"custom_id": "r1", "response": "x", "error": "y"}, 200, "neither a response nor an error", id="texts"
        ),
    ],
)
def test_answers_in_lines_of_openais(line: Any, status: int, body: Any) -> None:
    """Every shape of a line becomes an answer that the codec of live calls can judge."""
    found = outcome(OPENAI, line)

    assert found.answer is not None
    assert (found.answer.status, orjson.loads(found.answer.body), found.ending) == (status, body, None)


@pytest.mark.parametrize(
    ("protocol", "line", "ending"),
    [
        pytest.param(OPENAI, {"response": None, "error": {"code": "batch_expired"}}, "expired", id="batch_expired"),
        pytest.param(OPENAI, {"error": {"code": "batch_cancelled"}}, "cancelled", id="batch_cancelled"),
        pytest.param(OPENAI, {"error": {"code": "expired"}}, "expired", id="code expired"),
        pytest.param(ANTHROPIC, {"result": {"type": "expired"}}, "expired", id="anthropic expired"),
        pytest.param(ANTHROPIC, {"result": {"type": "canceled"}}, "cancelled", id="anthropic canceled"),
    ],
)
def test_requests_that_the_batch_did_not_come_to(protocol: Protocol, line: dict[str, Any], ending: str) -> None:
    """They have no answer but an ending."""
    assert outcome(protocol, {"custom_id": "r1", **line}) == Outcome(name="r1", ending=ending)  # type: ignore[arg-type]


def test_a_response_counts_before_an_error() -> None:
    """What was answered was paid for, whatever else the line says."""
    found = outcome(OPENAI, response() | {"error": {"code": "batch_expired"}})

    assert found.answer is not None
    assert found.answer.headers == {"x-request-id": "q"}


INVALID = {"type": "invalid_request_error", "message": "no"}


@pytest.mark.parametrize(
    ("error", "status", "kind", "message", "request_id"),
    [
        pytest.param(
            {"type": "error", "error": INVALID, "request_id": "req_7"},
            400,
            "invalid_request_error",
            "no",
            "req_7",
            id="double nested",
        ),
        pytest.param(
            {"type": "error", "error": INVALID, "request_id": None},
            400,
            "invalid_request_error",
            "no",
            None,
            id="no request id",
        ),
        pytest.param(INVALID, 400, "invalid_request_error", "no", None, id="single nested"),
        pytest.param(
            {"error": {"type": "overloaded_error", "message": "full"}}, 529, "overloaded_error", "full", None, id="529"
        ),
        pytest.param(
            {"error": {"type": "not_found_error", "message": "gone"}}, 404, "not_found_error", "gone", None, id="404"
        ),
        pytest.param({"error": {"type": "new_error", "message": "m"}}, 500, "new_error", "m", None, id="unknown type"),
        pytest.param({"error": {"message": "m"}}, 500, "http_500", "m", None, id="no type"),
        pytest.param("boom", 500, "error", "boom", None, id="a text"),
        pytest.param({"type": "error", "error": "boom"}, 500, "error", "boom", None, id="a text inside"),
    ],
)
def test_errors_in_lines_of_anthropics(
    error: Any, status: int, kind: str, message: str, request_id: str | None
) -> None:
    """Nested once or twice, an error is the one that a live call would have got, with the status that belongs to it."""
    found = outcome(ANTHROPIC, {"custom_id": "r1", "result": {"type": "errored", "error": error}})

    assert found.answer is not None
    with pytest.raises(AnthropicAPIError) as caught:
        providers.codec(ANTHROPIC).decode(found.answer)
    assert (caught.value.status, caught.value.type, caught.value.message) == (status, kind, message)
    assert caught.value.request_id == request_id


@pytest.mark.parametrize("error", [..., None, {}, [], 5])
def test_an_error_that_says_nothing_is_one(error: Any) -> None:
    """A result that only says that it went wrong is an error, tried again."""
    result = {"type": "errored"} if error is ... else {"type": "errored", "error": error}
    found = outcome(ANTHROPIC, {"custom_id": "r1", "result": result})

    assert found.answer is not None
    with pytest.raises(AnthropicAPIError) as caught:
        providers.codec(ANTHROPIC).decode(found.answer)
    assert (caught.value.status, caught.value.scope) == (500, ErrorScope.ATTEMPT)


@pytest.mark.parametrize(
    "result", [..., None, "x", [], {}, {"type": None}, {"type": 5}, {"type": "new"}, {"type": "succeeded"}], ids=repr
)
def test_a_result_of_no_known_type_is_an_unusable_answer(result: Any) -> None:
    """It may have been billed, and no reply can be read from it."""
    found = outcome(ANTHROPIC, {"custom_id": "r1"} if result is ... else {"custom_id": "r1", "result": result})

    assert found.answer is not None
    with pytest.raises(AnthropicAPIError) as caught:
        providers.codec(ANTHROPIC).decode(found.answer)
    assert (caught.value.type, caught.value.may_be_billed) == ("invalid_response", True)


@both
@pytest.mark.parametrize(
    "line",
    [
        *(b"", b" ", b"{", b"[]", b"null", b"5", b'"r1"', b"{}", b"\x00", b"<html>"),
        *(b'{"custom_id":null}', b'{"custom_id":5}', b'{"custom_id":["r1"]}', b'{"Custom_id":"r1"}'),
        b"[" * 3_000,
    ],
)
def test_a_line_without_a_name_is_none(protocol: Protocol, line: bytes) -> None:
    """What names no request is no result."""
    with pytest.raises(LineError):
        outcome(protocol, line)


@both
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(b'{"a":18446744073709551617}', b'{"a":18446744073709551617}', id="beyond 64 bits"),
        pytest.param(b'{"a":-9223372036854775809}', b'{"a":-9223372036854775809}', id="below 64 bits"),
        pytest.param(b'{"a":1%b}' % (b"0" * 300), b'{"a":1%b}' % (b"0" * 300), id="300 digits"),
        pytest.param('{"a":"é\u2028😀"}'.encode(), '{"a":"é\u2028😀"}'.encode(), id="unicode"),
        pytest.param(b'{"a":NaN}', b'{"a":null}', id="NaN"),
        pytest.param(b'{"a":-Infinity}', b'{"a":null}', id="infinity"),
        pytest.param(b'{"a":1e400}', b'{"a":null}', id="too large a number"),
        pytest.param(b'{"a":"\\ud800"}', '{"a":"\ufffd"}'.encode(), id="lone surrogate"),
        pytest.param(b'{"a":"\xff"}', '{"a":"\ufffd"}'.encode(), id="broken UTF-8"),
        pytest.param(b'{"a":1,"a":2}', b'{"a":2}', id="a key twice"),
        pytest.param(
            b'{"a":NaN,"b":18446744073709551617}',
            b'{"a":null,"b":18446744073709551617}',
            id="NaN beside a large number",
        ),
        pytest.param(
            b'{"a":"\\ud800","b":18446744073709551617}',
            '{"a":"\ufffd","b":18446744073709551617}'.encode(),
            id="mended, and numbers stay",
        ),
    ],
)
def test_a_body_is_kept_exactly(protocol: Protocol, body: bytes, expected: bytes) -> None:
    """Numbers of any size stay what they were; what is not strict JSON is mended, as it was paid for."""
    found = outcome(protocol, ok(protocol, body))

    assert found.answer is not None
    assert found.answer.body == expected


@both
@pytest.mark.parametrize("depth", [250, 980, 1_000, 1_015, 3_000])
def test_a_body_of_any_depth_is_an_outcome_or_no_line(protocol: Protocol, depth: int) -> None:
    """What is nested too deep to be written again is no reply to anything, and never ends the run."""
    body = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    try:
        found = outcome(protocol, ok(protocol, body))
    except LineError:
        assert depth > 1_000
        return

    assert found.name == "r1"
    assert found.answer is not None
    assert found.answer.body in (body, b'"nested too deep"')
    with pytest.raises(ProviderError):
        providers.codec(protocol).decode(found.answer)


@pytest.mark.parametrize("depth", [250, 1_000])
@pytest.mark.parametrize(
    ("protocol", "line"),
    [
        pytest.param(OPENAI, b'{"custom_id":"r1","response":null,"error":{"code":"x","message":%b}}', id="openai"),
        pytest.param(
            ANTHROPIC,
            b'{"custom_id":"r1","result":{"type":"errored","error":{"type":"error","error":{"type":"x","a":%b}}}}',
            id="anthropic",
        ),
    ],
)
def test_an_error_of_any_depth_is_an_outcome(protocol: Protocol, line: bytes, depth: int) -> None:
    """An error that is nested too deep is an error all the same."""
    found = outcome(protocol, line % (b"[" * depth + b"]" * depth))

    assert found.answer is not None
    with pytest.raises(ProviderError):
        providers.codec(protocol).decode(found.answer)


numbers = st.integers(-(2**80), 2**80) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@both
@given(body=st.dictionaries(st.text(), values, max_size=4))
def test_any_body_comes_through(protocol: Protocol, body: dict[str, Any]) -> None:
    """A strict JSON body means the same afterwards, to the last digit."""
    found = outcome(protocol, ok(protocol, json.dumps(body).encode()))

    assert found.answer is not None
    assert json.loads(found.answer.body) == body


words = st.sampled_from(["succeeded", "errored", "expired", "error", "batch_expired", "r1", ""])
shapes = st.recursive(
    values | words,
    lambda inner: st.dictionaries(
        st.sampled_from(["type", "error", "message", "code", "status_code", "body", "request_id"]), inner, max_size=4
    ),
    max_leaves=8,
)


@both
@given(line=st.dictionaries(st.sampled_from(["custom_id", "response", "error", "result", "id"]), shapes | words))
def test_any_line_is_an_outcome_or_none(protocol: Protocol, line: dict[str, Any]) -> None:
    """Whatever a server writes, a line is read as an outcome that can be judged, or is told to be none."""
    raw = json.dumps(line).encode()
    try:
        found = outcome(protocol, raw)
    except LineError:
        assert not isinstance(line.get("custom_id"), str)
        return
    assert found.name == line["custom_id"]
    assert (found.answer is None) != (found.ending is None)


# ── before the simulator, with the SDKs as judges ─────────────────────────────────────────────────────────────────


class Told:
    """Makes the calls of a codec to a simulator in this event loop, and keeps the raw answers."""

    def __init__(self, protocol: Protocol, client: Client) -> None:
        self.codec = providers.batch_codec(protocol)
        self.endpoint = endpoint(protocol, base_url="http://simulator" + ("/v1" if protocol is OPENAI else ""))
        self.headers = providers.codec(protocol).headers(self.endpoint, "a-key")
        self._client = client

    async def ask(self, call: HttpRequest, middle: bytes | None = None) -> HttpResponse:
        if middle is None:
            return await self._client.call(call)

        async def blocks() -> Any:
            yield middle

        return await self._client.call(call, Content(size=len(middle), blocks=blocks))

    async def make(self, middle: bytes) -> HttpResponse:
        upload = self.codec.upload(self.endpoint, self.headers, NONCE)
        file_id = self.codec.uploaded(await self.ask(upload, middle)) if upload else None
        call = self.codec.create(self.endpoint, self.headers, NONCE, file_id)
        return await self.ask(call, middle if call.tail is not None else None)

    async def poll(self, id: str) -> HttpResponse:
        return await self.ask(self.codec.poll(self.endpoint, self.headers, id))

    async def lines(self, found: Batch) -> Sequence[bytes]:
        received = bytearray()

        async def write(place: int, piece: bytes) -> None:
            received.extend(piece)

        for file in found.files:
            told = await self._client.download(self.codec.download(self.endpoint, self.headers, file), write)
            assert told.status == 200
        return bytes(received).splitlines()


def prompts(protocol: Protocol, *texts: str) -> bytes:
    fields = {
        OPENAI: {"model": "gpt-6-luna", "max_completion_tokens": 50},
        ANTHROPIC: {"model": "claude-haiku-5-5", "max_tokens": 50},
    }[protocol]
    bodies = [{**fields, "messages": [{"role": "user", "content": text}]} for text in texts]
    return content(protocol, *[(f"{NONCE}-{n}", orjson.dumps(body)) for n, body in enumerate(bodies)])


def compare(protocol: Protocol, told: HttpResponse) -> Batch:
    """Read a batch with the SDK's strict model and with ours, and return ours when both found the same."""
    ours = providers.batch_codec(protocol).batch(told)
    if protocol is OPENAI:
        gpt = openai.types.Batch.model_validate_json(told.body, strict=True)
        assert (ours.id, ours.status) == (gpt.id, gpt.status)
        assert gpt.request_counts is not None
        counts = gpt.request_counts
        assert (ours.total, ours.succeeded, ours.failed) == (counts.total, counts.completed, counts.failed)
        assert ours.created_at == batches.from_unix(gpt.created_at)
        assert ours.tag == (gpt.metadata or {}).get("pipeline_chunk") == NONCE
    else:
        claude = anthropic.types.messages.MessageBatch.model_validate_json(told.body)
        assert (ours.id, ours.status) == (claude.id, claude.processing_status)
        assert ours.created_at == f"{claude.created_at:%Y-%m-%dT%H:%M:%SZ}"
        assert ours.expires_at == f"{claude.expires_at:%Y-%m-%dT%H:%M:%SZ}"
        if ours.is_ended:
            assert (ours.succeeded, ours.failed) == (claude.request_counts.succeeded, claude.request_counts.errored)
    return ours


@both
async def test_the_way_of_a_batch_before_the_simulator(protocol: Protocol) -> None:
    """What is sent is taken, what comes back the SDKs' models read as we do, and each request has its outcome."""
    texts = ("one", "[[status:400]]", "[[expire]]", "two")
    app = httpx.ASGITransport(build_app(Options(batch_seconds=0.0)))
    async with Client(CONFIG.sending, app) as client:
        told = Told(protocol, client)
        made = compare(protocol, await told.make(prompts(protocol, *texts)))
        found = made
        while not found.is_ended:
            found = compare(protocol, await told.poll(made.id))
        listed, has_more = told.codec.listed(await told.ask(told.codec.list(told.endpoint, told.headers, None)))
        lines = await told.lines(found)

    assert (found.total, has_more) == (4, False)
    assert [each.id for each in listed] == [made.id]
    assert (found.succeeded, found.failed) == (2, 1)
    outcomes = {each.name: each for each in map(told.codec.outcome, lines)}
    assert sorted(outcomes) == [f"{NONCE}-{n}" for n in range(4)]
    statuses = [each.answer.status if each.answer else each.ending for _, each in sorted(outcomes.items())]
    assert statuses == [200, 400, "expired", 200]
    assert all(told.codec.belongs(NONCE, line) for line in lines)


@both
async def test_a_cancelled_batch_before_the_simulator(protocol: Protocol) -> None:
    """The answer to a cancellation is a batch too; what it did not come to is told as cancelled."""
    app = httpx.ASGITransport(build_app(Options(batch_seconds=1_000.0)))
    async with Client(CONFIG.sending, app) as client:
        told = Told(protocol, client)
        made = compare(protocol, await told.make(prompts(protocol, "one", "two")))
        compare(protocol, await told.ask(told.codec.cancel(told.endpoint, told.headers, made.id)))
        found = compare(protocol, await told.poll(made.id))
        while not found.is_ended:
            found = compare(protocol, await told.poll(made.id))
        lines = await told.lines(found)

    assert found.ending == ("cancelled" if protocol is OPENAI else None)
    assert [told.codec.outcome(line).ending for line in lines] == ["cancelled"] * 2


async def test_failed_validation_before_the_simulator() -> None:
    """A file with a broken line fails as a whole: the SDK's model and ours name the same lines."""
    app = httpx.ASGITransport(build_app(Options(batch_seconds=0.0)))
    async with Client(CONFIG.sending, app) as client:
        told = Told(OPENAI, client)
        made = told.codec.batch(await told.make(prompts(OPENAI, "one") + b"\n{"))
        raw = await told.poll(made.id)
        while not (found := compare(OPENAI, raw)).is_ended:
            raw = await told.poll(made.id)

    theirs = openai.types.Batch.model_validate_json(raw.body).errors
    assert theirs is not None
    assert [(each.code, each.line) for each in found.problems] == [(each.code, each.line) for each in theirs.data or []]
    assert found.problems[0].line == 2
    assert (found.files, found.ending) == ((), None)
