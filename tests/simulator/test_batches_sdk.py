"""The providers' own SDKs read simulated batches on a real socket."""

import time
from collections.abc import Sequence
from typing import Any

import anthropic
import openai
import orjson
import pytest
from anthropic.types.messages import MessageBatch
from anthropic.types.messages.batch_create_params import Request
from openai.types import Batch

from pipeline.simulator import Options, answer_token, serving

from .batching import ENDPOINT, jsonl, line


def claude(url: str, key: str = "key", retries: int = 0) -> anthropic.Anthropic:
    """Make Anthropic's own client."""
    return anthropic.Anthropic(api_key=key, base_url=url, max_retries=retries)


def gpt(url: str, key: str = "key", retries: int = 0) -> openai.OpenAI:
    """Make OpenAI's own client."""
    return openai.OpenAI(api_key=key, base_url=url + "/v1", max_retries=retries)


def body(text: str, model: str = "gpt-4o") -> dict[str, Any]:
    """Return a request for a completion, or a message."""
    return {"model": model, "max_tokens": 500, "messages": [{"role": "user", "content": text}]}


def sent(client: openai.OpenAI, *texts: str) -> Batch:
    """Upload a file with a request for each text, and begin a batch of it."""
    raw = jsonl(line(f"r{number}", body(text)) for number, text in enumerate(texts))
    file = client.files.create(file=("in.jsonl", raw), purpose="batch")
    assert (file.bytes, file.purpose, file.filename) == (len(raw), "batch", "in.jsonl")
    return client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={"a": "b"})


def finished(client: openai.OpenAI, batch: Batch) -> Batch:
    """Poll a batch until it is over."""
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        time.sleep(0.01)
        batch = client.batches.retrieve(batch.id)
    return batch


def requests(texts: Sequence[str]) -> list[Request]:
    """Return a request for each text."""
    return [
        {"custom_id": f"r{number}", "params": body(text, "claude-haiku-5-5")}  # type: ignore[typeddict-item]
        for number, text in enumerate(texts)
    ]


def over(client: anthropic.Anthropic, batch: MessageBatch) -> MessageBatch:
    """Poll a batch until it has ended."""
    while batch.processing_status != "ended":
        time.sleep(0.01)
        batch = client.messages.batches.retrieve(batch.id)
    return batch


def test_openai() -> None:
    """OpenAI's SDK uploads, creates, polls and reads the output, whose lines hold completions as its types say."""
    with serving(Options(batch_seconds=0.05)) as server, gpt(server.url) as client:
        batch = sent(client, "one", "two", "[[status:400]]", "[[expire]]")
        assert (batch.status, batch.metadata) == ("validating", {"a": "b"})
        batch = finished(client, batch)
        assert batch.status == "expired"
        assert batch.output_file_id
        assert batch.error_file_id
        output = client.files.content(batch.output_file_id).content
        errors = client.files.content(batch.error_file_id).content
        assert client.files.retrieve(batch.output_file_id).bytes == len(output)
        assert client.files.delete(batch.input_file_id).deleted
    results = {each["custom_id"]: each for each in map(orjson.loads, output.splitlines())}
    completion = openai.types.chat.ChatCompletion.model_validate(results["r0"]["response"]["body"], strict=True)
    assert str(completion.choices[0].message.content).startswith(answer_token(body("one")))
    assert completion.service_tier == "default"
    assert set(results) == {"r0", "r1"}
    assert {orjson.loads(each)["custom_id"] for each in errors.splitlines()} == {"r2", "r3"}
    assert batch.request_counts is not None
    assert batch.usage is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (4, 2, 1)
    assert batch.usage.total_tokens == batch.usage.input_tokens + batch.usage.output_tokens > 0


def test_openai_failed() -> None:
    """OpenAI's SDK reads why a batch failed."""
    with serving(Options(batch_seconds=0.05)) as server, gpt(server.url) as client:
        file = client.files.create(file=b"{", purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
        batch = finished(client, made)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.code, error.line) for error in batch.errors.data] == [("invalid_json_line", 1)]


def test_openai_pages_and_cancel() -> None:
    """OpenAI's SDK walks through all pages, and cancels."""
    with serving(Options(batch_seconds=60)) as server, gpt(server.url) as client:
        ids = [sent(client, str(number)).id for number in range(5)]
        assert [batch.id for batch in client.batches.list(limit=2)] == ids[::-1]
        assert len(list(client.files.list())) == 5
        batch = client.batches.cancel(ids[0])
        assert (batch.status, batch.cancelling_at is None) == ("cancelling", False)
        assert finished(client, batch).status == "cancelled"
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(ids[0])


def test_openai_not_found() -> None:
    """OpenAI's SDK finds neither a batch nor a file of another key."""
    with serving(Options()) as server, gpt(server.url) as client, gpt(server.url, "other") as other:
        batch = sent(client, "one")
        for find, id in ((other.batches.retrieve, batch.id), (other.files.content, batch.input_file_id)):
            with pytest.raises(openai.NotFoundError):
                find(id)


def test_openai_retries() -> None:
    """OpenAI's SDK tries again what a fault struck; what was done all the same is there twice."""
    faults = {"create": ["500-done", "lost", "ok"], "poll": ["429"]}
    with serving(Options(batch_faults=faults)) as server, gpt(server.url, retries=3) as client:
        batch = sent(client, "one")
        assert client.batches.retrieve(batch.id).id == batch.id
        assert len(list(client.batches.list())) == 3
        calls = server.statistics()["batches"]["calls"]
    assert (calls["create"], calls["poll"]) == (3, 2)


def test_anthropic() -> None:
    """Anthropic's SDK creates, polls and reads results of every type."""
    texts = ("one", "[[status:400]]", "[[expire]]", "two")
    with serving(Options(batch_seconds=0.05)) as server, claude(server.url + "/anthropic") as client:
        batch = client.messages.batches.create(requests=requests(texts))
        assert (batch.processing_status, batch.request_counts.processing) == ("in_progress", 4)
        batch = over(client, batch)
        results = {each.custom_id: each.result for each in client.messages.batches.results(batch.id)}
        assert client.messages.batches.delete(batch.id).type == "message_batch_deleted"
    assert {custom_id: result.type for custom_id, result in results.items()} == {
        "r0": "succeeded",
        "r1": "errored",
        "r2": "expired",
        "r3": "succeeded",
    }
    first, second = results["r0"], results["r1"]
    assert first.type == "succeeded"
    assert first.message.content[0].type == "text"
    assert first.message.content[0].text.startswith(answer_token(body("one", "claude-haiku-5-5")))
    assert first.message.usage.service_tier == "batch"
    assert second.type == "errored"
    assert second.error.error.type == "invalid_request_error"
    assert batch.request_counts.succeeded == 2
    assert str(batch.results_url).startswith(server.url + "/anthropic/v1/messages/batches/msgbatch_")


def test_anthropic_pages_and_cancel() -> None:
    """Anthropic's SDK walks through all pages, and cancels."""
    with serving(Options(batch_seconds=60)) as server, claude(server.url) as client:
        ids = [client.messages.batches.create(requests=requests(["one"])).id for _ in range(5)]
        assert [batch.id for batch in client.messages.batches.list(limit=2)] == ids[::-1]
        batch = client.messages.batches.cancel(ids[0])
        assert (batch.processing_status, batch.cancel_initiated_at is None) == ("canceling", False)
        batch = over(client, batch)
        assert batch.request_counts.canceled == 1
        (result,) = client.messages.batches.results(ids[0])
        assert result.result.type == "canceled"


def test_anthropic_errors() -> None:
    """Anthropic's SDK raises its own errors: bad requests, another key's batches, faults."""
    options = Options(batch_faults={"list": ["429"]})
    with serving(options) as server, claude(server.url) as client, claude(server.url, "other") as other:
        batch = client.messages.batches.create(requests=requests(["one"]))
        with pytest.raises(anthropic.NotFoundError):
            other.messages.batches.retrieve(batch.id)
        with pytest.raises(anthropic.BadRequestError):
            client.messages.batches.create(requests=requests(["one"]) * 2)
        with pytest.raises(anthropic.RateLimitError):
            client.messages.batches.list()
