from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import jsonl
from pipeline.core.config import Config
from pipeline.core.errors import UsageError
from pipeline.core.hashing import fingerprint
from pipeline.core.types import Request
from pipeline.inputs import reader
from pipeline.inputs.planner import Invalid, Planner
from pipeline.inputs.reader import Line
from pipeline.results import writer
from pipeline.results.writer import Done

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
USER = {"role": "user", "content": "hi"}
CHAT = {"messages": [USER]}
CLAUDE_BODY = {"model": "claude-x", "max_tokens": 5, "messages": [USER]}
GPT_BODY = {"model": "gpt-x", "messages": [USER]}
VLLM = {"vllm": {"protocol": "openai", "base_url": "http://localhost:8000/v1", "model": "m", "models": ["meta/*"]}}
WITH_VLLM = Config.model_validate({"providers": VLLM})


def line(value: Any, number: int = 1) -> Line:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Line(source="q.jsonl", number=number, data=data)


def openai_batch(body: dict[str, Any], custom_id: str = "a") -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def anthropic_batch(params: dict[str, Any], custom_id: str = "a") -> dict[str, Any]:
    return {"custom_id": custom_id, "params": params}


def planned(planner: Planner, value: Any, number: int = 1) -> Request:
    item = planner.plan(line(value, number))
    assert isinstance(item, Request), item.failure.message
    return item


def refused(planner: Planner, value: Any, number: int = 1) -> Invalid:
    item = planner.plan(line(value, number))
    assert isinstance(item, Invalid)
    return item


def ids(values: list[Any]) -> list[str]:
    planner = Planner(Config())
    return [planner.plan(line(value, number)).custom_id for number, value in enumerate(values, 1)]


# ── identity ──────────────────────────────────────────────────────────────────────────────────────────


def chat(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@given(st.lists(st.text(max_size=3), unique=True, max_size=8), st.randoms(use_true_random=False))
def test_derived_ids_survive_reordering(contents: list[str], random: Any) -> None:
    """A line without an id has the same one wherever it stands."""
    before = dict(zip(contents, ids([chat(content) for content in contents]), strict=True))

    random.shuffle(contents)

    assert dict(zip(contents, ids([chat(content) for content in contents]), strict=True)) == before


def test_derived_ids_survive_inserting_and_deleting() -> None:
    """Lines that come or go change no other line's id."""
    first, second = ids([chat("a"), chat("b")])

    assert ids([chat("new"), chat("a"), chat("newer"), chat("b")])[1::2] == [first, second]
    assert ids([chat("b")]) == [second]


def test_derived_ids_depend_on_content_not_on_spelling() -> None:
    """White space and escapes of a line do not change its id; every value in it does."""
    one, two, three = ids(
        [
            b'{"messages":[{"role":"user","content":"\xc3\xa9"}]}',
            b'{ "messages": [{"role": "user", "content": "\\u00e9"}] }',
            {**chat("é"), "metadata": 1},
        ]
    )

    assert two == f"{one}-2"
    assert not three.startswith(one)


def test_equal_lines_without_an_id_are_counted() -> None:
    """Equal lines are wanted repeats: each has an id of its own, however often they stand there."""
    one, two, three = ids([CHAT, CHAT, CHAT])

    assert (two, three) == (f"{one}-2", f"{one}-3")


@pytest.mark.parametrize(
    ("value", "custom_id"),
    [
        pytest.param({"custom_id": "q-1", **CHAT}, "q-1", id="native"),
        pytest.param({"custom_id": 7, **CHAT}, "7", id="number"),
        pytest.param(openai_batch(GPT_BODY), "a", id="OpenAI Batch"),
        pytest.param(anthropic_batch(CLAUDE_BODY), "a", id="Anthropic Batch"),
        pytest.param({"custom_id": "../../x", **CHAT}, "../../x", id="path"),
        pytest.param({"custom_id": "__proto__", **CHAT}, "__proto__", id="__proto__"),
    ],
)
def test_own_ids_are_kept(value: Any, custom_id: str) -> None:
    """A line's own id is its id, as written."""
    assert planned(Planner(Config()), value).custom_id == custom_id


def test_an_id_may_stand_once() -> None:
    """A second line with an id is invalid and says so, number and text alike; the first is sent."""
    planner = Planner(Config())
    planned(planner, {"custom_id": 1, **chat("a")}, 1)

    second = refused(planner, {"custom_id": "1", **chat("b")}, 2)

    assert (second.custom_id, second.failure.type) == ("1", "duplicate_custom_id")
    assert second.failure.message.startswith("q.jsonl:2: custom_id '1' was used before")


def test_derived_ids_never_meet_given_ones() -> None:
    """A line that calls itself like another's derived id does not share it."""
    (derived,) = ids([CHAT])
    planner = Planner(Config())
    planned(planner, {"custom_id": derived, **chat("other")})

    assert planned(planner, CHAT).custom_id == f"{derived}-2"


def test_the_planner_tells_which_ids_it_has_seen() -> None:
    """The ids of all lines, invalid ones included, are known afterwards: tidying asks for them."""
    planner = Planner(Config())
    planned(planner, {"custom_id": "a", **CHAT})
    refused(planner, {"custom_id": "b", "messages": []})
    derived = planned(planner, chat("c")).custom_id

    assert [fingerprint(name) in planner.ids for name in ("a", "b", derived, "d")] == [True, True, True, False]


def digest(value: Any, settings: Config | None = None, *, number: int = 1, salt: str = "") -> str:
    return planned(Planner(settings or WITH_VLLM, salt=salt), value, number).digest


def test_a_digest_does_not_depend_on_the_place() -> None:
    """The digest of a request is that of what is sent: not of line number, id or metadata."""
    assert digest({"custom_id": "a", **CHAT}) == digest({"custom_id": "b", **CHAT, "metadata": {"x": 1}}, number=9)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({**CHAT, "model": "claude-y"}, id="model"),
        pytest.param({**CHAT, "temperature": 0.5}, id="parameter"),
        pytest.param({**CHAT, "max_tokens": 6}, id="limit"),
        pytest.param(chat("hello"), id="text"),
        pytest.param({**CHAT, "system": "s"}, id="system"),
    ],
)
def test_a_digest_changes_with_what_is_sent(value: dict[str, Any]) -> None:
    """Another model, parameter or text is another request, so it is asked again."""
    assert digest({"model": "claude-x", **value}) != digest({**CHAT, "model": "claude-x"})


def test_a_digest_changes_with_the_provider() -> None:
    """The same body to another endpoint is another request."""
    twins = Config.model_validate({"providers": {"one": VLLM["vllm"], "two": VLLM["vllm"]}})
    one, two = (planned(Planner(twins), {**CHAT, "provider": name}) for name in ("one", "two"))

    assert one.body == two.body
    assert one.digest != two.digest


def test_a_digest_changes_with_a_default() -> None:
    """A changed default of the configuration is a changed request for the lines that get it."""
    warm = WITH_VLLM.with_("request", temperature=0.5)

    assert digest(CHAT) != digest(CHAT, warm)
    assert digest({**CHAT, "temperature": 0.5}) == digest({**CHAT, "temperature": 0.5}, warm)


def test_a_digest_changes_with_the_salt() -> None:
    """A rehearsed answer never passes for a real one."""
    assert digest(CHAT) != digest(CHAT, salt="simulated:")


# ── who answers ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "provider", "model", "expected"),
    [
        pytest.param(CHAT, None, None, ("anthropic", "claude-haiku-5-5"), id="nothing said"),
        pytest.param({**CHAT, "model": "gpt-x"}, None, None, ("openai", "gpt-x"), id="told by the model"),
        pytest.param(
            {**CHAT, "model": "meta/llama"}, None, None, ("vllm", "meta/llama"), id="told by the user's pattern"
        ),
        pytest.param({**CHAT, "model": "unknown"}, None, None, ("anthropic", "unknown"), id="unknown model"),
        pytest.param({**CHAT, "provider": "openai"}, None, None, ("openai", "gpt-6-luna"), id="line's provider"),
        pytest.param(
            {**CHAT, "provider": "vllm", "model": "gpt-x"},
            None,
            None,
            ("vllm", "gpt-x"),
            id="line's provider and model",
        ),
        pytest.param(
            {**CHAT, "provider": "openai"},
            "anthropic",
            None,
            ("openai", "gpt-6-luna"),
            id="line's provider over --provider",
        ),
        pytest.param(CHAT, "openai", None, ("openai", "gpt-6-luna"), id="--provider"),
        pytest.param(CHAT, None, "gpt-x", ("openai", "gpt-x"), id="--model"),
        pytest.param(
            {**CHAT, "model": "claude-x"}, None, "gpt-x", ("anthropic", "claude-x"), id="line's model over --model"
        ),
        pytest.param(
            {**CHAT, "model": "claude-x"},
            "openai",
            None,
            ("anthropic", "claude-x"),
            id="model over --provider of the other protocol",
        ),
        pytest.param(
            {**CHAT, "model": "gpt-oss-20b"},
            "vllm",
            None,
            ("vllm", "gpt-oss-20b"),
            id="--provider over model of its protocol",
        ),
        pytest.param(
            {**CHAT, "model": "unknown"}, "vllm", None, ("vllm", "unknown"), id="--provider for an unknown model"
        ),
        pytest.param(CHAT, "vllm", "gpt-oss-20b", ("vllm", "gpt-oss-20b"), id="--provider and --model"),
        pytest.param(openai_batch(GPT_BODY), None, None, ("openai", "gpt-x"), id="OpenAI body"),
        pytest.param(
            openai_batch({**GPT_BODY, "model": "unknown"}),
            None,
            None,
            ("openai", "unknown"),
            id="OpenAI body, unknown model",
        ),
        pytest.param(
            openai_batch({**GPT_BODY, "model": "meta/llama"}),
            None,
            None,
            ("vllm", "meta/llama"),
            id="OpenAI body, user's pattern",
        ),
        pytest.param(
            openai_batch({**GPT_BODY, "model": "claude-x"}),
            None,
            None,
            ("openai", "claude-x"),
            id="OpenAI body, Claude's name",
        ),
        pytest.param(openai_batch(GPT_BODY), "vllm", None, ("vllm", "gpt-x"), id="OpenAI body, --provider"),
        pytest.param(
            openai_batch(GPT_BODY),
            "anthropic",
            None,
            ("openai", "gpt-x"),
            id="OpenAI body, --provider of the other protocol",
        ),
        pytest.param(openai_batch(GPT_BODY), None, "gpt-y", ("openai", "gpt-x"), id="OpenAI body, --model"),
        pytest.param(anthropic_batch(CLAUDE_BODY), None, None, ("anthropic", "claude-x"), id="Anthropic body"),
        pytest.param(
            anthropic_batch({**CLAUDE_BODY, "model": "gpt-x"}),
            "vllm",
            None,
            ("anthropic", "gpt-x"),
            id="Anthropic body, --provider of the other protocol",
        ),
    ],
)
def test_who_answers(value: Any, provider: str | None, model: str | None, expected: tuple[str, str]) -> None:
    """A line's own words come first, then the model's name, then the user's, then the configuration's; a body in a
    provider's own dialect never goes to an endpoint of the other protocol."""
    request = planned(Planner(WITH_VLLM, provider=provider, model=model), value)

    assert (request.provider, request.model) == expected
    assert jsonl.loads(request.body)["model"] == request.model


def test_the_configured_default_provider_answers() -> None:
    """`provider:` of the configuration answers lines that tell nothing, and bodies in its dialect."""
    planner = Planner(WITH_VLLM.replace(provider="vllm"))

    assert planned(planner, CHAT).provider == "vllm"
    assert planned(planner, openai_batch({**GPT_BODY, "model": "unknown"})).provider == "vllm"


def test_the_configured_default_model_is_used() -> None:
    """`request.model` is for lines that name none, and --model wins over it."""
    settings = Config().with_("request", model="gpt-y")

    assert planned(Planner(settings), CHAT).model == "gpt-y"
    assert planned(Planner(settings), {**CHAT, "model": "claude-x"}).model == "claude-x"
    assert planned(Planner(settings, model="claude-z"), CHAT).model == "claude-z"


def test_an_unknown_provider_of_the_user_is_a_usage_error() -> None:
    """A provider that the user names and nobody configured is refused before any line."""
    with pytest.raises(UsageError, match="provider 'nobody' is not one of anthropic, openai"):
        Planner(Config(), provider="nobody")


# ── what is sent ──────────────────────────────────────────────────────────────────────────────────────

BODY = {
    "model": "m",
    "zeta": [1, 2.5, None, True, {"b": 1, "a": 2}],
    "messages": [{"content": "é\u2028\x7f", "role": "user"}],
    "alpha": 2**70,
    "temperature": 9,
}


@pytest.mark.parametrize(
    "value", [pytest.param(openai_batch(BODY), id="OpenAI"), pytest.param(anthropic_batch(BODY), id="Anthropic")]
)
def test_a_body_in_a_providers_dialect_is_sent_as_written(value: dict[str, Any]) -> None:
    """Nothing is added to such a body, taken from it, changed or reordered, however odd it is."""
    settings = Config().with_("request", temperature=0.5, max_tokens=7, system="s")

    request = planned(Planner(settings, model="other"), value)

    sent = jsonl.loads(request.body)
    assert sent == BODY
    assert list(sent) == list(BODY)
    assert list(sent["zeta"][4]) == ["b", "a"]


def test_a_native_line_gets_the_defaults() -> None:
    """A native line gets what it does not say: Anthropic's limit, the configured temperature; our keys stay here."""
    settings = Config().with_("request", temperature=0.5)

    request = planned(Planner(settings), {"custom_id": "a", "provider": "anthropic", "metadata": {"k": 2**70}, **CHAT})

    assert jsonl.loads(request.body) == {
        "model": "claude-haiku-5-5",
        "messages": [USER],
        "temperature": 0.5,
        "max_tokens": 4096,
    }
    assert (request.max_output_tokens, request.metadata) == (4096, {"k": 2**70})
    assert (request.source, request.line) == ("q.jsonl", 1)
    assert 1 <= request.estimated_input_tokens <= 20


# ── invalid lines ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "custom_id", "reason"),
    [
        pytest.param(b"{", None, "not valid JSON", id="no JSON"),
        pytest.param(b'{"a":1,"a":2}', None, "given twice", id="key twice"),
        pytest.param(b"[1]", None, "must be a JSON object", id="array"),
        pytest.param(b"\xff\xfe", None, "not valid JSON", id="UTF-16"),
        pytest.param({"custom_id": "a"}, "a", "no messages", id="no messages"),
        pytest.param({"custom_id": "a", "messages": []}, "a", "messages", id="empty messages"),
        pytest.param({"custom_id": 5, "messages": [{"role": "robot"}]}, "5", "role", id="number as an id"),
        pytest.param({"custom_id": "a\0b", **CHAT}, "a\0b", "control characters", id="NUL in an id"),
        pytest.param({"custom_id": "x" * 10_000, **CHAT}, "x" * 10_000, "1 to 512 characters", id="long id"),
        pytest.param({"custom_id": True, **CHAT}, None, "must be a string or an integer", id="true as an id"),
        pytest.param({"custom_id": "", **CHAT}, None, "1 to 512 characters", id="empty id"),
        pytest.param(
            {"provider": "nobody", **CHAT}, None, "provider 'nobody' is not configured", id="unknown provider"
        ),
        pytest.param({"base_url": "https://x", **CHAT}, None, "base_url", id="address in a line"),
        pytest.param({"temperature": 1.5, **CHAT}, None, "temperature", id="too hot for Anthropic"),
    ],
)
def test_an_invalid_line_says_where_and_why(value: Any, custom_id: str | None, reason: str) -> None:
    """An invalid line is a result with file, line and reason; it keeps its id where it has one."""
    item = refused(Planner(Config()), value, 7)

    assert item.failure.type == "invalid_line"
    assert item.failure.message.startswith("q.jsonl:7: ")
    assert reason in item.failure.message
    assert item.custom_id == (custom_id or item.custom_id)
    assert custom_id or (item.custom_id.startswith("line-") and item.custom_id.count("-") == 1)


def test_a_problem_of_reading_is_the_reason() -> None:
    """A line that could not be read is invalid with the reader's reason."""
    item = Planner(Config()).plan(Line(source="a", number=3, data=b"x", problem="longer than 1 byte"))

    assert isinstance(item, Invalid)
    assert item.failure.message == "a:3: longer than 1 byte"


def test_no_model_is_an_error() -> None:
    """A line without a model, to an endpoint without a default, is told so."""
    settings = Config.model_validate({"providers": {"openai": {"model": None}}})

    item = refused(Planner(settings), {**CHAT, "provider": "openai"})

    assert "no model: the line names none and provider 'openai' has no default" in item.failure.message


def test_a_body_nobody_can_answer_is_an_error() -> None:
    """A body in a dialect that no endpoint speaks is an invalid line."""
    settings = Config.model_validate(
        {"providers": {"openai": {"protocol": "anthropic", "base_url": "https://x.example"}}}
    )

    assert (
        "no provider for a body of the openai protocol"
        in refused(Planner(settings), openai_batch(GPT_BODY)).failure.message
    )


def test_equal_invalid_lines_are_each_a_line() -> None:
    """Invalid lines that are equal, with an id or without, are told apart, the same way in every run."""
    values = [b"{", b"{", {"custom_id": "a"}, {"custom_id": "a"}]

    first, second = (
        [(item.custom_id, item.digest) for item in map(Planner(Config()).plan, map(line, values))] for _ in range(2)
    )

    assert first == second
    assert len(set(first)) == 4


def test_an_invalid_line_has_the_id_that_it_has_when_mended() -> None:
    """A fault of the configuration that is mended later does not change a derived id."""
    value = {**CHAT, "provider": "vllm"}

    assert refused(Planner(Config()), value).custom_id == planned(Planner(WITH_VLLM), value).custom_id


# ── all lines ─────────────────────────────────────────────────────────────────────────────────────────

SOME_LINES = st.sampled_from(
    [
        CHAT,
        chat("b"),
        {"custom_id": "a", **CHAT},
        {"custom_id": "b", **CHAT},
        {"custom_id": "a"},
        b"{",
        b"[]",
        openai_batch(GPT_BODY, "c"),
    ]
)


@given(st.lists(SOME_LINES, max_size=20), st.integers(0, 20), st.randoms(use_true_random=False))
def test_planned_and_done_partition_the_input(values: list[Any], count: int, random: Any) -> None:
    """Every line has a key of its own; a later run, over the lines in any order of the distinct ones, finds done
    exactly what was recorded."""
    lines = [line(value, number) for number, value in enumerate(values, 1)]
    items = list(map(Planner(Config()).plan, lines))
    done = Done()
    for item in items[:count]:
        done.add(writer.key(item.custom_id, item.digest), success=isinstance(item, Request))

    again = list(map(Planner(Config()).plan, lines))

    keys = [writer.key(item.custom_id, item.digest) for item in again]
    assert len(set(keys)) == len(lines)
    assert [done.outcome(key) is not None for key in keys] == [index < count for index in range(len(lines))]
    assert [done.outcome(key) for key in keys[:count]] == [isinstance(item, Request) for item in items[:count]]


def test_the_samples_are_planned() -> None:
    """Every line of the sample conversations is a request, and of the bad lines only the good ones are."""
    conversations, bad_lines = Planner(Config()), Planner(Config())

    good = [conversations.plan(each) for each in reader.lines(str(SAMPLES / "conversations.jsonl"), 10**6)]
    bad = [bad_lines.plan(each) for each in reader.lines(str(SAMPLES / "with-bad-lines.jsonl"), 10**6)]

    assert [item for item in good if isinstance(item, Invalid)] == []
    assert {item.provider for item in good if isinstance(item, Request)} == {"anthropic", "openai"}
    assert [item.custom_id for item in bad if isinstance(item, Request)] == ["good-1", "refused-by-provider", "good-2"]
