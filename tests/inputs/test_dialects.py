"""Input dialects: told by their keys, taken apart, and refused in words that help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import providers
from pipeline.core.config import Config
from pipeline.core.errors import LineError
from pipeline.core.types import Protocol
from pipeline.inputs import dialects

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
BODY = {"model": "gpt-4o", "messages": [USER]}
PARAMS = {"model": "claude-haiku-5-5", "max_tokens": 5, "messages": [USER]}
OPENAI_LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}
HUMAN = {"from": "human", "value": "hi"}
GPT = {"from": "gpt", "value": "hello"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A line, and what its draft must hold; `fields` is what is sent on."""

    id: str
    line: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=lambda: {"messages": [USER]})
    custom_id: str | None = None
    provider: str | None = None
    model: str | None = None
    metadata: Any = None
    protocol: Protocol | None = None


CASES = [
    Case(id="bare messages", line={"messages": [USER]}),
    Case(
        id="native with everything",
        line={
            "custom_id": "q-1",
            "provider": "vllm",
            "model": "m",
            "messages": [USER],
            "top_k": 5,
            "metadata": {"a": 1},
        },
        fields={"model": "m", "messages": [USER], "top_k": 5},
        custom_id="q-1",
        provider="vllm",
        model="m",
        metadata={"a": 1},
    ),
    Case(
        id="native with the beginning of an answer",
        line={"custom_id": 7, "messages": [USER, ANSWER]},
        fields={"messages": [USER, ANSWER]},
        custom_id="7",
    ),
    Case(
        id="nulls are absent",
        line={"custom_id": None, "provider": None, "model": None, "metadata": None, "messages": [USER]},
        fields={"model": None, "messages": [USER]},
    ),
    Case(
        id="openai batch",
        line={**OPENAI_LINE, "metadata": "mine"},
        fields=BODY,
        custom_id="a",
        model="gpt-4o",
        metadata="mine",
        protocol=Protocol.OPENAI,
    ),
    Case(
        id="anthropic batch",
        line={"custom_id": "b", "params": PARAMS},
        fields=PARAMS,
        custom_id="b",
        model="claude-haiku-5-5",
        protocol=Protocol.ANTHROPIC,
    ),
    Case(
        id="fine-tuning example: the closing answer is the label",
        line={"messages": [USER, {**ANSWER, "weight": 1}]},
    ),
    Case(
        id="fine-tuning example: weights are no part of a message",
        line={"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "tools": []},
        fields={"messages": [USER, ANSWER, USER], "tools": []},
    ),
    Case(
        id="sharegpt: the closing answer is the label",
        line={"id": "x_0", "conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]},
        fields={"messages": [{"role": "system", "content": "s"}, USER]},
        custom_id="x_0",
    ),
    Case(
        id="sharegpt: other names of the speakers, text for value",
        line={
            "conversations": [
                {"from": "user", "text": "hi"},
                {"from": "bing", "value": "hello"},
                {"from": "user", "value": "hi"},
                {"from": "chatgpt", "value": "bye"},
            ],
            "system": "s",
            "model": "m",
            "custom_id": "c",
        },
        fields={"model": "m", "system": "s", "messages": [USER, ANSWER, USER]},
        custom_id="c",
        model="m",
    ),
    Case(
        id="sharegpt: calls, observations and tools",
        line={
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '[{"name":"f","arguments":{"a":1}},{"name":"g"}]'},
                {"from": "observation", "value": "1"},
                {"from": "observation", "value": "2"},
                GPT,
            ],
            "system": "",
            "tools": '[{"name":"f","parameters":{"type":"object"}}]',
        },
        fields={
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "f", "arguments": '{"a":1}'},
                        },
                        {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
                    ],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": "1"},
                {"role": "tool", "tool_call_id": "call_2", "content": "2"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        },
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_dialect_is_told_and_taken_apart(case: Case) -> None:
    """A line's keys tell its dialect; its parts get names, and what is sent on holds none of our own keys."""
    assert dialects.parse(case.line) == dialects.Draft(
        custom_id=case.custom_id,
        provider=case.provider,
        model=case.model,
        protocol=case.protocol,
        fields=case.fields,
        metadata=case.metadata,
    )


def test_body_of_a_batch_line_is_the_one_written() -> None:
    """A provider's own dialect is not portable: its body goes on as the very object that was read."""
    draft = dialects.parse(OPENAI_LINE)

    assert draft.fields is BODY
    assert not draft.is_portable
    assert dialects.parse({"messages": [USER]}).is_portable


@pytest.mark.parametrize("protocol", list(Protocol), ids=str)
def test_sharegpt_tool_turns_can_be_sent(protocol: Protocol) -> None:
    """What ShareGPT's calls and observations become, both codecs take."""
    line = next(case.line for case in CASES if "calls, observations" in case.id)
    config = Config()

    body = providers.codec(protocol).body(dialects.parse(line).fields, config.providers[protocol], config.request, "m")

    assert [message["role"] for message in body["messages"]][:2] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        pytest.param(3, "must be a JSON object, not a number", id="number"),
        pytest.param(None, "not null", id="null"),
        pytest.param("x", "not a string", id="string"),
        pytest.param([{"messages": [USER]}], "jq -c", id="array of lines"),
        pytest.param({}, "OpenAI Batch", id="empty object names the dialects"),
        pytest.param({"input": {}, "preferred_output": []}, "preference", id="DPO"),
        pytest.param({"instruction": "do", "input": "", "output": ""}, "Alpaca", id="Alpaca"),
        pytest.param({"prompt": "hi"}, "plain prompt", id="prompt"),
        pytest.param({"messages": []}, "non-empty list", id="no messages"),
        pytest.param({"messages": "hi"}, "messages must be", id="messages is text"),
        pytest.param({"messages": [ANSWER]}, "only the answer", id="only a label"),
        pytest.param({"messages": [USER], "custom_id": ""}, "custom_id", id="empty custom_id"),
        pytest.param({"messages": [USER], "custom_id": "x" * 513}, "1 to 512", id="long custom_id"),
        pytest.param({"messages": [USER], "custom_id": "a\x1b[2J"}, "control", id="escape in custom_id"),
        pytest.param({"messages": [USER], "custom_id": True}, "a boolean", id="boolean custom_id"),
        pytest.param({"messages": [USER], "custom_id": 1.5}, "a number", id="float custom_id"),
        pytest.param({"messages": [USER], "provider": 3}, "provider must be", id="provider is a number"),
        pytest.param({"messages": [USER], "model": " "}, "model must be", id="blank model"),
        pytest.param({**OPENAI_LINE, "url": "/v1/embeddings"}, "'/v1/embeddings'", id="other url"),
        pytest.param({"custom_id": "a", "body": BODY}, "url must be", id="no url"),
        pytest.param({**OPENAI_LINE, "method": "GET"}, "'GET'", id="other method"),
        pytest.param({**OPENAI_LINE, "body": "x"}, "body must be an object", id="body is text"),
        pytest.param({**OPENAI_LINE, "costum_id": "x"}, "costum_id", id="misspelt key in a batch line"),
        pytest.param({"params": PARAMS, "messages": []}, "messages", id="two dialects at once"),
        pytest.param({"conversations": [HUMAN], "category": "x"}, "category", id="unknown key of ShareGPT"),
        pytest.param({"conversations": [GPT]}, "only the answer", id="ShareGPT with only a label"),
        pytest.param({"conversations": [{"from": "alien", "value": ""}]}, "'alien'", id="unknown speaker"),
        pytest.param({"conversations": [{"from": "human"}]}, "value must be a string", id="no value"),
        pytest.param(
            {"conversations": [HUMAN, {"from": "observation", "value": "1"}]},
            "without a function_call",
            id="observation of nothing",
        ),
        pytest.param(
            {"conversations": [HUMAN, {"from": "function_call", "value": "f(1)"}, HUMAN]},
            "conversations[1].value must be JSON",
            id="call that is not JSON",
        ),
        pytest.param({"conversations": [HUMAN], "tools": "{"}, "tools must be JSON", id="tools not JSON"),
    ],
)
def test_line_that_cannot_be_read_says_why(line: Any, says: str) -> None:
    """What is no line of any dialect is refused, with the value and what to write instead."""
    with pytest.raises(LineError) as caught:
        dialects.parse(line)
    assert says in caught.value.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "from": st.sampled_from(["human", "gpt", "function_call", "observation", "system"]) | JSON,
            "value": st.sampled_from(["", "x", '{"name":"f"}', "[]", "[{}]"]) | JSON,
            "role": st.sampled_from(["user", "assistant"]) | JSON,
            "content": JSON,
            "weight": JSON,
        },
    ),
    max_size=4,
)
KEYS = (
    "messages",
    "conversations",
    "body",
    "params",
    "custom_id",
    "provider",
    "model",
    "tools",
    "system",
    "url",
)


@given(JSON | st.dictionaries(st.sampled_from(KEYS), JSON | TURNS, max_size=5))
def test_any_json_value_is_a_draft_or_a_line_error(value: Any) -> None:
    """Whatever JSON a line holds, reading it ends in a draft or in a `LineError`, in nothing else."""
    try:
        draft = dialects.parse(value)
    except LineError:
        return
    assert isinstance(draft.fields, dict)
