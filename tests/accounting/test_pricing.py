from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

import genai_prices
import pytest
from genai_prices.data import providers as sellers
from genai_prices.types import ModelInfo
from hypothesis import given
from hypothesis import strategies as st

from pipeline.accounting.pricing import Prices
from pipeline.core import jsonl
from pipeline.core.config import Config
from pipeline.core.types import Request, Usage

NOW = datetime(2026, 11, 22, 12, 30, 15, tzinfo=UTC)
ADDRESSES = {
    "vllm": "http://localhost:8000/v1",
    "openrouter": "https://openrouter.ai/api/v1",
    "deepseek": "https://api.deepseek.com",
    "groq": "https://api.groq.com/openai/v1",
    "mistral": "https://api.mistral.ai/v1",
    "perplexity": "https://api.perplexity.ai",
    "azure": "https://mine.openai.azure.com/openai/v1/",
}


def usd(nanos: int) -> str:
    """Return an amount in dollars, exactly."""
    return format(Decimal(nanos).scaleb(-9).normalize(), "f")


def settings(prices: dict[str, Any] | None = None, addresses: dict[str, str] | None = None) -> Config:
    """Return the default settings with a table of prices and further endpoints of OpenAI's protocol."""
    endpoints = {
        name: {"protocol": "anthropic" if name == "anthropic" else "openai", "base_url": url}
        for name, url in (ADDRESSES | (addresses or {})).items()
    }
    return Config.model_validate({"prices": prices or {}, "providers": endpoints})


PRICES = Prices(settings())


def cost(usage: Usage, provider: str, model: str, prices: Prices = PRICES, **more: Any) -> int | None:
    known: dict[str, Any] = {"provider": provider, "model": model, "lane": "live", "at": NOW}
    return prices.cost(usage, **known | more)


def tokens(input: int, output: int = 0, *, read: int = 0, written: int = 0, hour: int = 0, **more: Any) -> Usage:
    """Return a usage; `written` are tokens written to a cache, `hour` the part of them written for an hour."""
    return Usage(
        input_tokens=input,
        output_tokens=output,
        cache_read_tokens=read,
        cache_write_tokens=written,
        cache_write_1h_tokens=hour,
        **more,
    )


# ── by hand ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "usage", "lane", "dollars"),
    [
        # Plain: tokens × dollars per million.
        pytest.param("gpt-4o", tokens(25, 50), "live", "0.0005625", id="25×2.50 + 50×10"),
        pytest.param("claude-haiku-4-5", tokens(1_000, 200), "live", "0.002", id="1,000×1 + 200×5"),
        # Cached: reads and writes are a part of the input.
        pytest.param("gpt-4o-mini", tokens(20, 5, read=10), "live", "0.00000525", id="10×0.15 + 10×0.075 + 5×0.60"),
        pytest.param(
            "gpt-6-luna",
            tokens(1_000, 200, read=400, written=300),
            "live",
            "0.0001715",
            id="OpenAI's writes: 300×0.10 + 400×0.01 + 300×0.125 + 200×0.50",
        ),
        pytest.param(
            "claude-sonnet-5",
            tokens(4_050, read=1_000, written=3_000, hour=2_000),
            "live",
            "0.0108",
            id="5m and 1h writes: 50×2 + 1,000×2.50 + 2,000×4 + 1,000×0.20",
        ),
        # Long prompts: at the edge the whole request still costs the lower price, one token beyond the higher.
        pytest.param("gpt-6-sol", tokens(271_999, 1_000), "live", "0.553998", id="below 272k: 271,999×2 + 1,000×10"),
        pytest.param("gpt-6-sol", tokens(272_000, 1_000), "live", "0.554", id="at 272k: 272,000×2 + 1,000×10"),
        pytest.param("gpt-6-sol", tokens(272_001, 1_000), "live", "1.103004", id="over 272k: 272,001×4 + 1,000×15"),
        pytest.param("claude-haiku-5-5", tokens(99_999, 1_000), "live", "0.0104999", id="below 100k: 99,999×0.1 + 500"),
        pytest.param("claude-haiku-5-5", tokens(100_000, 1_000), "live", "0.0105", id="at 100k: 100,000×0.1 + 500"),
        pytest.param("claude-haiku-5-5", tokens(100_001, 1_000), "live", "0.0525005", id="over 100k: ×0.5 + 1,000×2.5"),
        pytest.param("claude-sonnet-4-5", tokens(199_999), "live", "0.599997", id="below 200k: 199,999×3"),
        pytest.param("claude-sonnet-4-5", tokens(200_000), "live", "0.6", id="at 200k: 200,000×3"),
        pytest.param("claude-sonnet-4-5", tokens(200_001), "live", "1.200006", id="over 200k: 200,001×6"),
        pytest.param(
            "claude-haiku-5-5", tokens(100_001, read=100_001), "live", "0.00500005", id="reads count: 100,001×0.05"
        ),
        pytest.param(
            "gpt-6-luna", tokens(272_001, 10), "batch", "0.02720385", id="over 272k in a batch: 272,001×0.1 + 10×0.375"
        ),
        # Batches: the rate that is published, whatever tier the answer tells, else half.
        pytest.param(
            "gpt-6-luna",
            tokens(1_000, 100, service_tier="default"),
            "batch",
            "0.000075",
            id="OpenAI's batch: 1,000×0.05 + 100×0.25",
        ),
        pytest.param(
            "claude-sonnet-5-5",
            tokens(1_000, 100, service_tier="batch"),
            "batch",
            "0.0015",
            id="Anthropic's batch: 1,000×1 + 100×5",
        ),
        pytest.param(
            "claude-sonnet-5-5",
            tokens(1_000, 100, service_tier="batch"),
            "live",
            "0.0015",
            id="an answer that says it was a batch",
        ),
        pytest.param(
            "claude-sonnet-5-5",
            tokens(3_000, read=1_000, written=2_000, hour=1_000, service_tier="batch"),
            "batch",
            "0.0033",
            id="cache in a batch: 1,000×0.05 + 1,000×1.25 + 1,000×2",
        ),
        pytest.param(
            "gpt-4o", tokens(1_000, 100, read=400), "batch", "0.00175", id="gpt-4o's reads keep their price in a batch"
        ),
        pytest.param(
            "claude-3-haiku-20240307",
            tokens(1_000, 100),
            "batch",
            "0.0001875",
            id="no published batch rate: half of 1,000×0.25 + 100×1.25",
        ),
        # Tiers of service: the one that the answer tells.
        pytest.param(
            "gpt-6-luna",
            tokens(1_000, 100, service_tier="flex"),
            "live",
            "0.000075",
            id="flex: 1,000×0.05 + 100×0.25",
        ),
        pytest.param(
            "gpt-4o",
            tokens(1_000, 100, read=400, service_tier="priority"),
            "live",
            "0.0051",
            id="priority: 600×4.25 + 400×2.125 + 100×17",
        ),
        pytest.param(
            "claude-opus-5", tokens(1_000, 100, service_tier="fast"), "live", "0.015", id="fast: 1,000×10 + 100×50"
        ),
        pytest.param(
            "claude-opus-5", tokens(1_000, 100, service_tier="standard"), "live", "0.0075", id="standard: half of fast"
        ),
        # What is not tokens.
        pytest.param(
            "claude-haiku-4-5", tokens(1_000, 200, web_searches=3), "live", "0.032", id="3 searches at 10 a thousand"
        ),
        pytest.param(
            "claude-haiku-4-5", tokens(1_000, 200, web_searches=3), "batch", "0.031", id="searches stay dear in a batch"
        ),
        # Names: the data know the short ones and the dated ones.
        pytest.param("gpt-5.6", tokens(1_000), "live", "0.004", id="alias of gpt-5.6-sol: 1,000×4"),
        pytest.param("gpt-4o-2024-08-06", tokens(1_000), "live", "0.0025", id="dated: 1,000×2.50"),
        pytest.param("gpt-6-luna", tokens(0), "live", "0", id="no tokens at a known price"),
    ],
)
def test_costs_are_those_of_the_price_lists(model: str, usage: Usage, lane: str, dollars: str) -> None:
    """A call costs what paper and pencil say, to the nano-dollar."""
    provider = "anthropic" if model.startswith("claude") else "openai"

    nanos = cost(usage, provider, model, lane=lane)

    assert nanos is not None
    assert usd(nanos) == dollars


def test_two_thousand_rows_cost_what_one_does_two_thousand_times() -> None:
    """2,000 rows with half the input cached, at 0.15, 0.075 and 0.60 a million, cost exactly $0.0105.

    A row: 10 tokens at 0.15, 10 cached ones at 0.075 and 5 of output at 0.60 are 1.5 + 0.75 + 3 = 5.25 millionths.
    """
    rows = [cost(tokens(20, 5, read=10), "openai", "gpt-4o-mini") for _ in range(2_000)]

    assert usd(sum(row or 0 for row in rows)) == "0.0105"


def test_a_total_has_no_price() -> None:
    """Ten requests of 100,000 tokens cost a fifth of one with a million: only requests are priced."""
    one, total = (cost(tokens(count), "anthropic", "claude-haiku-5-5") for count in (100_000, 1_000_000))

    assert (one, total) == (10_000_000, 500_000_000)


@pytest.mark.parametrize(
    ("at", "dollars"),
    [
        pytest.param(datetime(2026, 7, 29, 23, 59, 59, tzinfo=UTC), "0.0016", id="before: 1,000×1 + 100×6"),
        pytest.param(datetime(2026, 7, 30, tzinfo=UTC), "0.00032", id="since: 1,000×0.20 + 100×1.20"),
        pytest.param(datetime(2026, 7, 30, 1, tzinfo=timezone(timedelta(hours=2))), "0.0016", id="before, in UTC"),
    ],
)
def test_the_price_is_that_of_the_time_of_the_call(at: datetime, dollars: str) -> None:
    """A call costs what the model cost when it was made."""
    assert usd(cost(tokens(1_000, 100), "openai", "gpt-5.6-luna", at=at) or 0) == dollars


def test_prices_change_within_a_run() -> None:
    """What is remembered of a price is not older than a minute: DeepSeek costs twice as much from 00:30 UTC on."""
    edge = datetime(2026, 11, 22, 0, 30, tzinfo=UTC)
    moments = [edge - timedelta(microseconds=1), edge, edge - timedelta(microseconds=1)]

    costs = [cost(tokens(1_000), "deepseek", "deepseek-chat", at=at) for at in moments]

    assert costs == [135_000, 270_000, 135_000]


@pytest.mark.parametrize("model", ["gpt-6-luna", "claude-sonnet-5-5"])
def test_a_batch_before_the_published_rates_costs_half(model: str) -> None:
    """Both providers took half for batches long before the data listed it."""
    provider = "anthropic" if model.startswith("claude") else "openai"
    at = datetime(2026, 10, 13, tzinfo=UTC)

    live, batch = (cost(tokens(1_000, 100), provider, model, lane=lane, at=at) for lane in ("live", "batch"))

    assert live is not None
    assert batch == live // 2


# ── as the library says ───────────────────────────────────────────────────────────────────────────────

CONTEXTS: dict[tuple[str, str | None], dict[str, str]] = {
    ("live", None): {},
    ("live", "default"): {"service_tier": "default"},
    ("live", "flex"): {"service_tier": "flex"},
    ("live", "priority"): {"service_tier": "priority"},
    ("live", "fast"): {"service_tier": "fast", "speed": "fast"},
    ("batch", "default"): {"processing": "batch"},
}


def usages(dice: random.Random) -> Iterator[Usage]:
    """Yield some random usages, around the edges too."""
    for _ in range(4):
        written, read, rest = (dice.choice([0, dice.randrange(2_000), dice.randrange(150_000)]) for _ in range(3))
        yield tokens(
            written + read + rest,
            dice.randrange(10_000),
            read=read,
            written=written,
            hour=dice.choice([0, written, dice.randint(0, written)]),
        )


def by_library(usage: Usage, model: str, address: str, at: datetime, context: dict[str, str]) -> int:
    theirs = genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=usage.cache_read_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            cache_write_5m_tokens=usage.cache_write_tokens - usage.cache_write_1h_tokens,
            cache_write_1h_tokens=usage.cache_write_1h_tokens,
        ),
        model,
        provider_api_url=address,
        genai_request_timestamp=at,
        price_context=context,
    )
    return int(theirs.total_price.scaleb(9).quantize(Decimal(1), ROUND_HALF_EVEN))


def is_listed(model: ModelInfo, context: dict[str, str], at: datetime) -> bool:
    """Tell whether the data list rates for a context, or need none."""
    return not context or any(
        variant.when.items() <= context.items() and (variant.constraint is None or variant.constraint.active(at))
        for variant in model.price_variants or []
    )


@pytest.mark.parametrize("name", ["anthropic", "openai", "deepseek", "groq", "mistral", "openrouter", "perplexity"])
@pytest.mark.parametrize("at", [NOW, datetime(2025, 3, 1, 3, tzinfo=UTC)], ids=["now", "long ago"])
def test_costs_are_those_of_the_library(name: str, at: datetime) -> None:
    """Every model costs what `genai_prices.calc_price` says, in every lane and tier that the data have rates for."""
    dice = random.Random(1)
    address = settings().providers[name].base_url
    (seller,) = (each for each in sellers if each.id == name)
    models = [each for each in seller.models if seller.find_model(each.id) is each and not is_odd(each, at)]
    compared = 0
    for model in dice.sample(models, min(150, len(models))):
        for (lane, tier), context in CONTEXTS.items():
            rates = PRICES.rates(provider=name, model=model.id, tier=tier, lane=lane, at=at)
            if is_listed(model, context, at):
                assert rates is not None, (model.id, tier)
                for usage in usages(dice):
                    assert rates.cost(usage) == by_library(usage, model.id, address, at, context), (model.id, usage)
                    compared += 1

    assert compared >= 4 * len(models[:150])


def is_odd(model: ModelInfo, at: datetime) -> bool:
    """Tell a model that has no price for texts, or prices for what a usage does not tell apart (sound, pictures, …)."""
    prices = vars(model.get_prices(at)).keys()
    told = {"input_mtok", "output_mtok", "requests_kcount"} | {key for key in prices if "search" in key}
    told |= {"cache_read_mtok", "cache_write_mtok", "cache_write_1h_mtok"}
    return not {"input_mtok", "output_mtok"} <= prices <= told or model.id.startswith("gpt-oss-")


# ── who sells it ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("provider", "address", "model", "dollars"),
    [
        pytest.param("openrouter", ADDRESSES["openrouter"], "openai/gpt-6-luna", "0.0001", id="OpenRouter's own list"),
        pytest.param("mine", "https://api.openai.com/v1", "gpt-6-luna", "0.0001", id="OpenAI by another name"),
        pytest.param("openai", "http://127.0.0.1:9/v1", "gpt-6-luna", "0.0001", id="a proxy called openai"),
        pytest.param("anthropic", "http://127.0.0.1:9", "claude-opus-5", "0.005", id="a simulator called anthropic"),
        pytest.param("azure", ADDRESSES["azure"], "gpt-4o-2024-08-06", "0.0025", id="OpenAI's model at Azure"),
        pytest.param("openai", ADDRESSES["openrouter"], "gpt-6-luna", None, id="the address is no OpenAI's"),
        pytest.param("mine", "http://127.0.0.1:9/v1", "gpt-6-luna", None, id="a name alone is no price"),
        pytest.param("vllm", ADDRESSES["vllm"], "gpt-oss-20b", None, id="open weights on a server of one's own"),
        pytest.param("openai", "http://127.0.0.1:9/v1", "gpt-oss-20b", None, id="open weights in OpenAI's place"),
        pytest.param("openai", "https://eu.api.openai.com/v1", "gpt-6-luna", None, id="regions cost more"),
        pytest.param("openai", "http://127.0.0.1:9/v1", "llama-4", None, id="a model that OpenAI does not have"),
    ],
)
def test_a_price_needs_a_seller(provider: str, address: str, model: str, dollars: str | None) -> None:
    """A model has the price of who answers at the address, or of the built-in provider whose name the endpoint has."""
    prices = Prices(settings(addresses={provider: address}))

    nanos = cost(tokens(1_000), provider, model, prices)

    assert (None if nanos is None else usd(nanos)) == dollars


@pytest.mark.parametrize(
    ("provider", "model", "usage", "changes"),
    [
        pytest.param("openai", "gpt-99", tokens(1), {}, id="unknown model"),
        pytest.param("anthropic", "", tokens(1), {}, id="no model"),
        pytest.param("nobody", "gpt-4o", tokens(1), {}, id="unknown provider"),
        pytest.param("openai", "gpt-audio", tokens(1), {}, id="sound has its own price"),
        pytest.param("openai", "text-embedding-3-small", tokens(1), {}, id="no price for output"),
        pytest.param("openai", "gpt-4o", tokens(1, service_tier="flex"), {}, id="no flex rate"),
        pytest.param("openai", "gpt-4o", tokens(1, service_tier="scale"), {}, id="a tier by contract"),
        pytest.param("anthropic", "claude-opus-5", tokens(1, service_tier="priority"), {}, id="paid ahead"),
        pytest.param("anthropic", "claude-haiku-5-5", tokens(1, service_tier="fast"), {}, id="no fast rate"),
        pytest.param(
            "openai",
            "gpt-6-sol",
            tokens(1, service_tier="flex"),
            {"at": datetime(2026, 10, 11, tzinfo=UTC)},
            id="flex before its rates begin",
        ),
        pytest.param("openrouter", "openai/gpt-6-luna", tokens(1), {"lane": "batch"}, id="nobody promises half there"),
        pytest.param("azure", "gpt-4o", tokens(1, service_tier="priority"), {}, id="OpenAI's tiers are not Azure's"),
        pytest.param("openai", "gpt-4o", tokens(1, read=2), {}, id="more cached than there is"),
        pytest.param("anthropic", "claude-opus-5", tokens(9, written=1, hour=2), {}, id="more for an hour than at all"),
        pytest.param("anthropic", "claude-3-haiku-20240307", tokens(1, web_searches=1), {}, id="no price of searches"),
    ],
)
def test_unknown_is_none(provider: str, model: str, usage: Usage, changes: dict[str, Any]) -> None:
    """What has no known price costs None: neither 0, nor the standard price, nor an error."""
    assert cost(usage, provider, model, **changes) is None


def test_the_name_that_was_asked_for_counts_where_the_answers_is_unknown() -> None:
    """A deployment's own name is priced as the model that was asked for; a known answer goes first."""
    assert cost(tokens(1_000), "openai", "my-deployment", asked="gpt-4o") == 2_500_000
    assert cost(tokens(1_000), "openai", "gpt-4o-mini", asked="gpt-4o") == 150_000
    assert cost(tokens(1_000), "openai", "my-deployment", asked="mine") is None


# ── the user's own table ──────────────────────────────────────────────────────────────────────────────

ROW = {"input": 3, "output": 7, "cache_read": 0.5, "cache_write_5m": 4, "cache_write_1h": 5, "batch_multiplier": 0.25}
BARE = {"input": 3, "output": 7}


@pytest.mark.parametrize(
    ("row", "usage", "lane", "dollars"),
    [
        pytest.param(ROW, tokens(100, 10), "live", "0.00037", id="100×3 + 10×7"),
        pytest.param(
            ROW, tokens(100, read=20, written=50, hour=30), "live", "0.00033", id="30×3 + 20×0.5 + 20×4 + 30×5"
        ),
        pytest.param(ROW, tokens(100, 10), "batch", "0.0000925", id="a quarter in a batch"),
        pytest.param(ROW, tokens(100, 10, service_tier="priority"), "live", "0.00037", id="in every tier"),
        pytest.param(BARE, tokens(100, read=20, written=50, hour=30), "live", "0.0003", id="cache as input: 100×3"),
        pytest.param(
            BARE | {"cache_write_5m": 4}, tokens(9, written=9, hour=9), "live", "0.000036", id="1h as 5m: 9×4"
        ),
        pytest.param(BARE, tokens(100, 10), "batch", "0.000185", id="half in a batch unless said"),
        pytest.param({"input": 0, "output": 0}, tokens(100, 10), "live", "0", id="nothing, as the user says"),
        pytest.param({"input": 0.1, "output": 0.7}, tokens(3_000_000), "live", "0.3", id="a tenth is a tenth"),
    ],
)
def test_own_prices_go_first(row: dict[str, Any], usage: Usage, lane: str, dollars: str) -> None:
    """What the user's table has is the price, in dollars per million tokens."""
    prices = Prices(settings({"gpt-6-luna": row}))

    assert usd(cost(usage, "openai", "gpt-6-luna", prices, lane=lane) or 0) == dollars
    assert cost(usage, "openai", "gpt-6-luna", prices, lane=lane) is not None


@pytest.mark.parametrize(
    ("provider", "model", "dollars"),
    [
        pytest.param("openai", "gpt-6-luna", "0.001", id="provider and model"),
        pytest.param("vllm", "gpt-6-luna", "0.002", id="the model anywhere else"),
        pytest.param("vllm", "other/thing", "0.003", id="a pattern"),
        pytest.param("openai", "gpt-4o", "0.0025", id="what the table has not"),
    ],
)
def test_the_first_row_that_fits_is_taken(provider: str, model: str, dollars: str) -> None:
    """Rows are tried from the top, against provider/model and against model; then the data are asked."""
    rows = {"openai/gpt-6-luna": 1, "gpt-6-luna": 2, "vllm/*": 3}
    prices = Prices(settings({key: {"input": dollar, "output": 0} for key, dollar in rows.items()}))

    assert usd(cost(tokens(1_000), provider, model, prices) or 0) == dollars


def test_own_prices_fit_the_name_that_was_asked_for() -> None:
    """A row for a model holds although its answers name a dated one that the data know."""
    prices = Prices(settings({"openai/gpt-4o": {"input": 1, "output": 1}}))

    assert cost(tokens(1_000), "openai", "gpt-4o-2024-08-06", prices, asked="gpt-4o") == 1_000_000


def test_rates_say_where_they_come_from() -> None:
    """Source, version and the resolved model stand in the rates, and all sources in the prices."""
    version = f"genai-prices {genai_prices.__version__}"
    prices = Prices(settings({"openai/*": {"input": 1, "output": 1}}))
    when: dict[str, Any] = {"lane": "live", "at": NOW}

    own = prices.rates(provider="openai", model="gpt-5.6", **when)
    published = PRICES.rates(provider="openai", model="gpt-5.6", **when)

    assert (PRICES.source, prices.source) == (version, f"config.yaml, {version}")
    assert own is not None
    assert (own.source, own.model) == ("config.yaml", "openai/*")
    assert published is not None
    assert (published.source, published.model) == (version, "openai/gpt-5.6-sol")
    assert pickle.loads(pickle.dumps(published)) == published


# ── whole nano-dollars ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("count", "nanos"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4)])
def test_halves_are_rounded_to_even(count: int, nanos: int) -> None:
    """Each request is rounded once, half to even: here a token costs half a nano-dollar."""
    prices = Prices(settings({"m": {"input": 0.0005, "output": 0}}))

    assert cost(tokens(count), "vllm", "m", prices) == nanos


@pytest.mark.parametrize(
    ("nanos", "text"),
    [
        (0, "0"),
        (1, "0.000000001"),
        (10_500_000, "0.0105"),
        (-1_500_000_000, "-1.5"),
        (20_000_000_000, "20"),
        (1_234_567_890_123_456_789, "1234567890.123456789"),
    ],
)
def test_dollars_are_exact(nanos: int, text: str) -> None:
    """An amount is written as a plain number in JSON, with every digit and no more."""
    assert usd(nanos) == text
    assert jsonl.loads(text.encode()) is not None


# ── what a cache saves ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("usage", "nanos"),
    [
        pytest.param(tokens(1_000, 50), 0, id="no cache"),
        pytest.param(tokens(1_000, 50, read=900), 1_620_000, id="900 × (2 - 0.20)"),
        pytest.param(tokens(1_000, 50, written=900), -450_000, id="900 × (2 - 2.50)"),
        pytest.param(tokens(1_000, 50, written=900, hour=900), -1_800_000, id="900 × (2 - 4)"),
        pytest.param(tokens(1, read=2), None, id="impossible"),
    ],
)
def test_a_cache_saves_what_the_tokens_cost_without_it(usage: Usage, nanos: int | None) -> None:
    """Reads save, writes cost: the difference to the same tokens uncached."""
    rates = PRICES.rates(provider="anthropic", model="claude-sonnet-5", lane="live", at=NOW)

    assert rates is not None
    assert rates.saved(usage) == nanos


# ── the worst case ────────────────────────────────────────────────────────────────────────────────────


def request(provider: str, model: str, **fields: Any) -> Request:
    body = jsonl.dumps({"model": model, "messages": [], **fields})
    return Request(custom_id="a", digest="d", source="s", line=1, provider=provider, model=model, body=body)


def bound(request: Request, input_tokens: int = 1_000, output: int = 100, **changes: Any) -> int | None:
    prices = changes.pop("prices", PRICES)
    known: dict[str, Any] = {"max_output_tokens": output, "lane": "live", "at": NOW}
    found: int | None = prices.worst_case(request, input_tokens=input_tokens, **known | changes)
    return found


MARK = {"cache_control": {"type": "ephemeral"}}
HOUR = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


@pytest.mark.parametrize(
    ("asked", "input_tokens", "changes", "nanos"),
    [
        pytest.param(request("anthropic", "claude-sonnet-5"), 1_000, {}, 3_000_000, id="no cache: 1,000×2 + 100×10"),
        pytest.param(
            request("anthropic", "claude-sonnet-5", **MARK), 1_000, {}, 3_500_000, id="5 minutes: 1,000×2.5 + 100×10"
        ),
        pytest.param(
            request("anthropic", "claude-sonnet-5", **HOUR), 1_000, {}, 5_000_000, id="an hour: 1,000×4 + 100×10"
        ),
        pytest.param(
            request("openai", "gpt-6-luna"), 1_000, {}, 175_000, id="OpenAI writes unasked: 1,000×0.125 + 100×0.5"
        ),
        pytest.param(request("openai", "gpt-4o"), 1_000, {}, 3_500_000, id="no price of writes: 1,000×2.5 + 100×10"),
        pytest.param(
            request("anthropic", "claude-haiku-5-5"), 100_001, {}, 50_250_500, id="over 100k: 100,001×0.5 + 100×2.5"
        ),
        pytest.param(
            request("anthropic", "claude-sonnet-5"), 1_000, {"lane": "batch"}, 1_500_000, id="a batch costs half"
        ),
        pytest.param(
            request("openai", "gpt-4o", service_tier="priority"), 1_000, {}, 5_950_000, id="1,000×4.25 + 100×17"
        ),
        pytest.param(
            request("openai", "gpt-6-luna", service_tier="flex"), 1_000, {}, 175_000, id="flex may become standard"
        ),
        pytest.param(request("anthropic", "claude-opus-5", speed="fast"), 1_000, {}, 15_000_000, id="fast"),
        pytest.param(request("openai", "gpt-4o", service_tier="auto"), 1_000, {}, 3_500_000, id="auto"),
        pytest.param(request("openai", "gpt-4o", service_tier="flex"), 1_000, {}, None, id="a tier without rates"),
        pytest.param(request("openai", "gpt-4o", service_tier=["x"]), 1_000, {}, None, id="a tier that is none"),
        pytest.param(
            request("vllm", "m"),
            1_000,
            {"prices": Prices(settings({"m": {"input": 1, "output": 0, "cache_read": 5}}))},
            5_000_000,
            id="reads that are dearer: 1,000×5",
        ),
        pytest.param(request("openai", "gpt-99"), 1_000, {}, None, id="unknown model"),
        pytest.param(request("vllm", "gpt-oss-20b"), 1_000, {}, None, id="a server of one's own"),
        pytest.param(request("nobody", "gpt-4o"), 1_000, {}, None, id="unknown provider"),
    ],
)
def test_the_worst_case_is_the_dearest_that_can_be(
    asked: Request, input_tokens: int, changes: dict[str, Any], nanos: int | None
) -> None:
    """The bound takes the dearest kind of input that the request can have, and the dearer of two tiers."""
    assert bound(asked, input_tokens, **changes) == nanos


@given(
    data=st.data(),
    model=st.sampled_from(["claude-haiku-5-5", "claude-sonnet-4-5", "gpt-6-luna", "gpt-4o", "gpt-5.4"]),
    input_tokens=st.integers(0, 400_000),
    output=st.integers(0, 100_000),
    tier=st.sampled_from([None, "default", "priority"]),
    lane=st.sampled_from(["live", "batch"]),
)
def test_no_answer_costs_more_than_its_worst_case(
    data: st.DataObject, model: str, input_tokens: int, output: int, tier: str | None, lane: str
) -> None:
    """Whatever part of the promised tokens comes, cached or not, in the tier asked for or not: the bound holds."""
    provider, marks = ("anthropic", HOUR) if model.startswith("claude") else ("openai", {"service_tier": tier})
    written = data.draw(st.integers(0, input_tokens))
    usage = tokens(
        data.draw(st.integers(written, input_tokens)),
        data.draw(st.integers(0, output)),
        written=written,
        hour=data.draw(st.integers(0, written)) if provider == "anthropic" else 0,
        service_tier=data.draw(st.sampled_from([tier, None])) if provider == "openai" else None,
    )

    most = bound(request(provider, model, **marks), input_tokens, output, lane=lane)
    real = cost(usage, provider, model, lane=lane)

    assert most is not None
    assert real is not None
    assert real <= most


# ── what it takes ─────────────────────────────────────────────────────────────────────────────────────

LAZY = """
import sys
from datetime import UTC, datetime
from pipeline.core import config
from pipeline.accounting import pricing
from pipeline.core import types
loaded = lambda: "genai_prices" in sys.modules
prices = pricing.Prices(config.Config.model_validate({"prices": {"m": {"input": 1, "output": 1}}}))
ask = lambda model: prices.cost(
    types.Usage(input_tokens=1), provider="openai", model=model, lane="live", at=datetime.now(UTC)
)
print(prices.source.split()[0], loaded(), ask("m"), loaded(), ask("gpt-4o"), loaded())
"""


def test_the_data_are_loaded_with_the_first_price_that_needs_them() -> None:
    """Neither the import nor the user's own prices load the library; the first other price does, without being told."""
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, check=True, text=True)

    assert done.stdout == "config.yaml, False 1000 False 2500 True\n"


def test_loading_ahead_changes_no_price() -> None:
    """The data can be loaded ahead, more than once."""
    prices = Prices(settings())

    assert "not loaded yet" in repr(prices)
    prices.load()
    prices.load()
    assert "loaded, 0 rates remembered" in repr(prices)
    assert cost(tokens(1_000), "openai", "gpt-4o", prices) == 2_500_000


def test_names_from_servers_do_not_fill_the_memory() -> None:
    """However many models answers name, no more than a thousand are remembered."""
    prices = Prices(settings({"*": {"input": 1, "output": 1}}))

    assert {cost(tokens(1), "vllm", f"m-{number}", prices) for number in range(2_500)} == {1_000}
    assert ", 500 rates remembered" in repr(prices)
