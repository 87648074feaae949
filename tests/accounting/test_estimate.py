"""`estimate`: what would be sent and cost, reckoned by hand, and what is not known never told as a number."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

import pipeline
from pipeline.accounting.estimate import Estimate, Model, Row, estimate
from pipeline.accounting.ledger import Entry, Ledger, RunRow
from pipeline.cli import estimate_table
from pipeline.core import config
from pipeline.core.config import Config
from pipeline.core.types import Allowance
from pipeline.simulator import Options, serving

NOW = datetime(2026, 11, 22, 12, 30, 15, tzinfo=UTC)
# Dollars per million tokens: gpt-6-luna 0.10 in (written to the cache: 0.125), 0.50 out; above 272,000 tokens of
# prompt 0.20 (0.25) and 0.75. claude-haiku-4-5: 1 and 5; its cache is written only where that is asked for. A batch
# costs half.
LUNA = ("openai", "gpt-6-luna")
HAIKU = ("anthropic", "claude-haiku-4-5")


def line(content: str = "x" * 372, model: str = LUNA[1], **more: Any) -> dict[str, Any]:
    """Return a line; as it stands it is 100 input tokens for OpenAI: 93 of text, 4 for a message, 3 for a request."""
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in lines))
    return path


def look(
    folder: Path,
    lines: Sequence[Mapping[str, Any]] = (),
    settings: Config | None = None,
    learned: Mapping[Model, Sequence[Allowance]] | None = None,
) -> Estimate:
    """Estimate some lines, else those that are there already."""
    source = write(folder / "in.jsonl", lines) if lines else folder / "in.jsonl"
    return estimate(
        [str(source)],
        settings or Config(),
        path=folder / "out.jsonl",
        ledger=folder / "ledger.sqlite",
        learned=learned,
        at=NOW,
    )


def remember(folder: Path, answers: int, output_tokens: int, model: str = LUNA[1], provider: str = LUNA[0]) -> None:
    """Put a run into the ledger that had so many answers with so many output tokens in all."""
    entry = Entry(
        day="2026-11-01",
        provider=provider,
        model=model,
        requests=answers,
        succeeded=answers,
        input_tokens=7 * answers,
        output_tokens=output_tokens,
    )
    with Ledger.open(folder / "ledger.sqlite") as book:
        book.record(RunRow(run_id=model, started_at="2026-11-01T00:00:00Z", status="completed"), [entry])


def only(told: Estimate) -> Row:
    (row,) = told.rows
    return row


def dollars(row: Row) -> list[float | None]:
    """Return what a row costs: live expected and at most, in a batch expected and at most."""
    figures = row.as_dict()
    return [figures[lane][kind] for lane in ("live", "batch") for kind in ("expected", "at_most")]


# ── tokens and dollars ────────────────────────────────────────────────────────────────────────────────────────────


def test_both_lanes_are_priced_by_hand(tmp_path: Path) -> None:
    """Expected: input by size and the mean output of before. At most: `max_tokens`, input written to the cache."""
    remember(tmp_path, answers=10, output_tokens=500)

    row = only(look(tmp_path, [line(max_tokens=200), line("y" * 372, max_tokens=400)]))

    assert (row.figures.requests, row.figures.input_tokens) == (2, 200)
    assert (row.figures.output_expected.amount, row.figures.output_at_most.amount) == (100, 600)
    # 200 × 0.10 + 100 × 0.50; 200 × 0.125 + 600 × 0.50; half of each.
    assert dollars(row) == [0.000070, 0.000325, 0.000035, 0.0001625]
    assert row.basis == "history: 10 answers, 50 tokens each"


def test_a_long_prompt_is_priced_in_its_own_band(tmp_path: Path) -> None:
    """A prompt beyond 272,000 tokens costs more, whole; a short one beside it does not."""
    remember(tmp_path, answers=1, output_tokens=100)
    long = "x" * (4 * 299_993)

    row = only(look(tmp_path, [line(long, max_tokens=100), line(max_tokens=100)]))

    assert row.figures.input_tokens == 300_000 + 100
    # 300,000 × 0.20 + 100 × 0.75, and 100 × 0.10 + 100 × 0.50
    assert dollars(row)[0] == pytest.approx(0.060075 + 0.00006, abs=1e-12)
    assert dollars(row)[2] == pytest.approx((0.060075 + 0.00006) / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("tier", "expected", "at_most"),
    [
        pytest.param({}, 0.00006, 0.0000625, id="standard"),
        pytest.param({"service_tier": "auto"}, 0.00006, 0.0000625, id="auto is standard"),
        pytest.param({"service_tier": "priority"}, 0.00012, 0.000125, id="priority costs double"),
        pytest.param({"service_tier": "flex"}, 0.00003, 0.0000625, id="flex costs half and may be denied"),
    ],
)
def test_the_tier_that_a_line_asks_for_counts(
    tier: dict[str, str], expected: float, at_most: float, tmp_path: Path
) -> None:
    """The expectation is at the tier that is asked for, the bound at the dearer of that and the standard one."""
    remember(tmp_path, answers=1, output_tokens=100)

    assert dollars(only(look(tmp_path, [line(max_tokens=100, **tier)])))[:2] == [expected, at_most]


def test_no_answer_is_longer_than_it_may_be(tmp_path: Path) -> None:
    """The mean of before is cut at a line's own `max_tokens`; fractions add up over many lines."""
    remember(tmp_path, answers=2, output_tokens=3)

    short = look(tmp_path, [line(max_tokens=1)])
    many = look(tmp_path, [line(max_tokens=9) for _ in range(1_001)])

    assert short.total.output_expected.amount == 1
    assert many.total.output_expected.amount == 1_502  # 1,001 × 1.5


def test_without_a_past_nothing_is_expected(tmp_path: Path) -> None:
    """Where only `max_tokens` is known there is a bound and no expectation, and it is said."""
    told = look(tmp_path, [line(max_tokens=200)])

    assert only(told).basis == "max_tokens only"
    assert dollars(only(told)) == [None, 0.0001125, None, 0.00005625]
    assert only(told).figures.output_expected.amount is None
    assert any("--sample" in note for note in told.notes)


def test_one_line_without_max_tokens_leaves_no_bound(tmp_path: Path) -> None:
    """A part of a bound bounds nothing: the lines without one are counted, and it is said."""
    remember(tmp_path, answers=1, output_tokens=50)

    told = look(tmp_path, [line(max_tokens=200), line()])

    assert dollars(only(told)) == [0.00007, None, 0.000035, None]
    assert told.as_dict()["output_tokens"] == {"expected": 100, "at_most": None}
    assert told.as_dict()["requests_without_max_tokens"] == 1
    assert any("1 request(s) have no max_tokens" in note for note in told.notes)


def test_what_has_no_price_costs_nobody_knows_what(tmp_path: Path) -> None:
    """A model without a price costs None, never 0, and the total says how many requests it leaves out."""
    settings = Config().replace(providers={"vllm": {"protocol": "openai", "base_url": "http://localhost:8000/v1"}})
    remember(tmp_path, answers=1, output_tokens=50)
    remember(tmp_path, answers=1, output_tokens=50, model="qwen", provider="vllm")

    told = look(tmp_path, [line(max_tokens=100), line(model="qwen", provider="vllm", max_tokens=100)], settings)

    priced, unpriced = told.rows
    assert dollars(unpriced) == [None, None, None, None]
    assert told.as_dict()["live"] == {"expected": dollars(priced)[0], "at_most": 0.0000625, "unpriced_requests": 1}
    assert told.as_dict()["batch"]["unpriced_requests"] == 1
    assert any("1 request(s) have no known price" in note for note in told.notes)


def test_the_total_is_the_sum_of_the_models(tmp_path: Path) -> None:
    """Models are told apart, the dearest first, and add up to the total in every figure."""
    remember(tmp_path, answers=1, output_tokens=100)
    remember(tmp_path, answers=1, output_tokens=100, model=HAIKU[1] + "-20251001", provider=HAIKU[0])

    told = look(tmp_path, [line(max_tokens=100), line("x" * 20, model=HAIKU[1], max_tokens=100)])

    haiku, luna = told.rows
    assert [(row.provider, row.model) for row in told.rows] == [HAIKU, LUNA]
    assert haiku.basis == "history of claude-haiku-4-5-20251001: 1 answer, 100 tokens each"
    assert haiku.figures.input_tokens == 13  # 20 / 3.4 + 4 + 3, rounded up
    assert dollars(haiku) == [0.000513, 0.000513, 0.0002565, 0.0002565]
    assert told.total.live.expected.known == 513_000 + luna.figures.live.expected.known
    assert told.total.batch.at_most.known == 256_500 + luna.figures.batch.at_most.known
    assert told.total.requests == 2


# ── what a run would send ─────────────────────────────────────────────────────────────────────────────────────────


def test_invalid_lines_are_counted_and_cost_nothing(tmp_path: Path) -> None:
    """Lines that are no requests are left out and told, with exit code 1; an input of nothing else costs 0."""
    told = look(tmp_path, [line(max_tokens=1), {"messages": []}])
    nothing = look(tmp_path, [{"messages": []}])

    assert (told.lines, told.invalid, told.total.requests, told.exit_code) == (2, 1, 1, 1)
    assert (nothing.rows, nothing.as_dict()["live"]["expected"], nothing.notes) == ([], 0.0, [])


async def test_what_is_done_is_left_out_and_learned_from(tmp_path: Path) -> None:
    """Answers to the same input tell how long answers are and how far the estimate of input is off, before history."""
    remember(tmp_path, answers=1_000, output_tokens=1)
    lines = [line(f"question {n}", max_tokens=500) for n in range(10)]
    source = write(tmp_path / "in.jsonl", lines)
    with serving(Options()) as server:
        settings = config.simulated(Config(), server.url)
        summary = await pipeline.run_batch(
            [source], output=tmp_path / "out.jsonl", config=settings, options=pipeline.Options(limit=4)
        )

    told = look(tmp_path, settings=settings)

    row = only(told)
    tokens = summary.run.tokens
    estimated = 4 * 10  # "question 1" is 10 bytes: 2.5 tokens and 7 around it, rounded up
    assert (told.lines, told.done, row.figures.requests) == (10, 4, 6)
    assert row.basis == f"this input: 4 answers, {tokens.output / 4:,.0f} tokens each"
    assert row.input_ratio == tokens.input / estimated
    assert row.figures.input_tokens == 6 * round(10 * tokens.input / estimated)
    assert row.figures.output_expected.amount == pytest.approx(6 * tokens.output / 4, abs=1)


def test_results_that_are_none_are_passed_over(tmp_path: Path) -> None:
    """A results file with torn or foreign lines is read as far as it can be understood; nothing is written to it."""
    content = b'{"custom_id":"x","success":true}\nnot JSON\n\n{"custom_id":"torn'
    (tmp_path / "out.jsonl").write_bytes(content)

    told = look(tmp_path, [line(max_tokens=1)])

    assert (told.done, told.total.requests) == (0, 1)
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_estimating_leaves_nothing_behind(tmp_path: Path) -> None:
    """No results, no ledger, nothing is made by an estimate."""
    look(tmp_path, [line(max_tokens=1)])

    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


# ── minutes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def told_limit(kind: str, per_minute: float, source: str = "told") -> Allowance:
    return Allowance(kind=kind, per_minute=per_minute, used=0.0, source=source)


@pytest.mark.parametrize(
    ("caps", "learned", "minutes", "binding"),
    [
        pytest.param({"rpm": 5}, [], 4.0, "requests", id="20 requests at 5"),
        pytest.param({"rpm": 5, "input_tpm": 250}, [], 8.0, "input_tokens", id="2,000 tokens at 250"),
        pytest.param({"output_tpm": 100}, [], 10.0, "output_tokens", id="20 × 50 expected at 100"),
        pytest.param({}, [told_limit("tokens", 1_000)], 6.0, "tokens", id="OpenAI charges max_tokens: 20 × 300"),
        pytest.param({"rpm": 5}, [told_limit("requests", 2)], 10.0, "requests", id="the tightest"),
        pytest.param({"rpm": 5}, [told_limit("requests", 1, "cap")], 4.0, "requests", id="a cap of the sample"),
        pytest.param({}, [told_limit("requests", 40, "found")], 0.5, "requests", id="found out"),
    ],
)
def test_minutes_come_from_the_limit_that_binds(
    caps: dict[str, int], learned: list[Allowance], minutes: float, binding: str, tmp_path: Path
) -> None:
    """What all requests need of each known limit, divided by it: the longest counts, and is named."""
    remember(tmp_path, answers=1, output_tokens=50)
    lines = [line(max_tokens=300) for _ in range(20)]

    told = look(tmp_path, lines, Config().with_("limits", **caps), {LUNA: learned})

    pace = only(told).pace
    assert pace is not None
    assert (told.minutes, pace.minutes, pace.limit.kind) == (minutes, minutes, binding)


def test_models_run_beside_each_other(tmp_path: Path) -> None:
    """The minutes of a run are those of its slowest model, not their sum."""
    lines = [line(max_tokens=1) for _ in range(6)] + [line(model=HAIKU[1], max_tokens=1) for _ in range(2)]

    told = look(tmp_path, lines, Config().with_("limits", rpm=2))

    assert [row.pace.minutes for row in told.rows if row.pace] == [3.0, 1.0]
    assert told.minutes == 3.0


def test_without_limits_there_are_no_minutes(tmp_path: Path) -> None:
    """Where no limit is known no time is made up; nor one for outputs of which nothing is known."""
    unlimited = look(tmp_path, [line(max_tokens=1)])
    unknown = look(tmp_path, [line()], Config().with_("limits", output_tpm=10))

    assert (unlimited.minutes, unknown.minutes) == (None, None)
    assert any(note.startswith("minutes are shown where") for note in unlimited.notes)


# ── on the screen ─────────────────────────────────────────────────────────────────────────────────────────────────


def shown(told: Estimate, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    estimate_table.show(console, told)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_says_what_is_not_known(tmp_path: Path) -> None:
    """An unknown price, a missing bound and a sum with a part missing are told apart."""
    settings = Config().replace(providers={"vllm": {"protocol": "openai", "base_url": "http://localhost:8000/v1"}})
    remember(tmp_path, answers=2_000, output_tokens=100_000)
    remember(tmp_path, answers=1, output_tokens=50, model="qwen", provider="vllm")
    lines = [line(), line(model="qwen", provider="vllm", max_tokens=100)]

    told = look(tmp_path, lines, settings.with_("limits", rpm=4))

    text = [" ".join(each.split()) for each in shown(told).splitlines()]
    assert text[:8] == [
        "model requests input output live batch minutes",
        "openai/gpt-6-luna 1 100 50 $0.000035 $0.000017 0.2",
        "at most no bound",
        "vllm/qwen 1 100 50 no price known no price known 0.2",
        "at most 100 no price known no price known",
        "total 2 200 100 $0.000035 + ? $0.000017 + ? 0.2",
        "at most no bound",
        "openai/gpt-6-luna: history: 2,000 answers, 50 tokens each; 0.2 minutes at your 4 requests/min",
    ]
    assert text[-1] == "2 lines: 2 to send"


def test_names_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    """Control characters and markup in a model's name are shown, not obeyed."""
    text = shown(look(tmp_path, [line(model="gpt-\x1b[2J[red]", max_tokens=1)]), width=200)

    assert "\x1b" not in text
    assert "[red]" in text
