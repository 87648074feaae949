"""Price tables: what one model costs at one time, in one lane and service tier.

A model's rates come from the user's table in config.yaml or from the data of genai-prices (offline). Its own
`calc_price` takes 100 µs a call and falls back to the standard price without a word where it has no rate. So the data
are read here into integers once, and applied in 1 µs. A test compares the results with the library's, to the
nano-dollar. Where there is no rate there is no price: None, never 0 and never the nearest one.

Neither usage nor data cover OpenAI's 12-hour cache writes (priced as shorter ones), its fee for web searches in chat
completions, Anthropic's surcharge for `inference_geo`, taxes, and private agreements. Those can be entered under
`prices` in config.yaml, which comes first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from functools import cache
from importlib.metadata import version
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

from pipeline.core.config import Price
from pipeline.core.protocols import PROTOCOLS
from pipeline.core.types import Protocol, Usage

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import ModelInfo, Provider, Tier, TieredPrices

BATCH = "batch"

# Prices are quoted in USD per million tokens, and per thousand requests or searches.
_NANOS_PER_TOKEN = 1_000
_NANOS_PER_PIECE = 1_000_000

STANDARD_TIERS = (None, "", "auto", "default", "standard", "standard_only", "on_demand")
"""Names that responses and requests use for the standard-price service tier. `on_demand` is Groq's."""

_OPEN_WEIGHTS = "gpt-oss-"
"""OpenAI does not sell these models. The data list them under OpenAI with OpenRouter's prices."""

_KNOWN_UNITS = {
    "input_mtok",
    "output_mtok",
    "cache_read_mtok",
    "cache_write_mtok",
    "cache_write_5m_mtok",
    "cache_write_1h_mtok",
    "requests_kcount",
    "web_searches_kcount",
    "storage_searches_kcount",  # of an API that this program does not call
}
"""Units the data may charge for. `Usage` does not count any other (audio or image tokens), so those have no price."""


class Band(NamedTuple):
    """Price of one token of each kind, for prompts of some length, in units of `Rates.unit`."""

    input: int
    cache_read: int
    cache_write: int
    cache_write_1h: int
    output: int

    def dearest_input(self, *, may_write: bool, may_write_1h: bool) -> int:
        """Return the highest price that an input token can have in a request that may write to a cache."""
        prices = [self.input, self.cache_read]
        if may_write:
            prices.append(self.cache_write)
        if may_write_1h:
            prices.append(self.cache_write_1h)
        return max(prices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates of one model. All are integers, in nano-dollars divided by `unit`, so sums are exact.

    `source` says where the rates come from. `model` is the entry's name there, often a pattern or a family of models.
    A request belongs to band `n` if its whole prompt is longer than `n` of `starts`. A longer prompt reprices the whole
    request, so only single requests can be priced, not totals. `search` is None if the price of a web search is
    unknown.
    """

    source: str
    model: str
    unit: int
    starts: tuple[int, ...]
    bands: tuple[Band, ...]
    request: int
    search: int | None

    def cost(self, usage: Usage) -> int | None:
        """Return what a response costs, in nano-dollars. None if the usage is inconsistent or has no price."""
        input_tokens, read, written = usage.input_tokens, usage.cache_read_tokens, usage.cache_write_tokens
        written_1h = usage.cache_write_1h_tokens
        uncached = input_tokens - read - written
        if uncached < 0 or written < written_1h:
            return None
        band = self.bands[bisect_left(self.starts, input_tokens)]
        cost = (
            self.request
            + uncached * band.input
            + read * band.cache_read
            + (written - written_1h) * band.cache_write
            + written_1h * band.cache_write_1h
            + usage.output_tokens * band.output
        )
        if usage.web_searches:
            if self.search is None:
                return None
            cost += usage.web_searches * self.search
        return _rounded(cost, self.unit)

    def saved(self, usage: Usage) -> int | None:
        """Return how much the cache saved, in nano-dollars. Negative if writing cost more than reading saved."""
        cost = self.cost(usage)
        uncached = self.cost(
            Usage(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, web_searches=usage.web_searches)
        )
        if cost is None or uncached is None:
            return None
        return uncached - cost

    def most(self, input_tokens: int, output_tokens: int, *, may_write: bool, may_write_1h: bool) -> int:
        """Return the most that a request with up to these tokens can cost, in nano-dollars, without web searches."""
        reachable = self.bands[: bisect_left(self.starts, input_tokens) + 1]
        tokens = max(
            input_tokens * band.dearest_input(may_write=may_write, may_write_1h=may_write_1h)
            + output_tokens * band.output
            for band in reachable
        )
        return _rounded(self.request + tokens, self.unit)


def _rounded(amount: int, unit: int) -> int:
    """Divide, rounding half to even."""
    whole, rest = divmod(amount, unit)
    is_half = 2 * rest == unit
    is_more = 2 * rest > unit
    if is_more or (is_half and whole % 2 == 1):
        return whole + 1
    return whole


def own_rates(pattern: str, price: Price, *, is_batch: bool) -> Rates:
    """Return the rates of an entry of the user's table."""
    cache_read = price.input if price.cache_read is None else price.cache_read
    write = price.input if price.cache_write_5m is None else price.cache_write_5m
    write_1h = write if price.cache_write_1h is None else price.cache_write_1h
    kinds = (price.input, cache_read, write, write_1h, price.output)
    factor = Fraction(price.batch_multiplier if is_batch else 1)
    return _rates("config.yaml", pattern, [], [[factor * Fraction(kind) for kind in kinds]])


# ── the data of genai-prices ──────────────────────────────────────────────────────────────────────────────────────


@cache
def library() -> str:
    """Return the name and version of the price data."""
    return f"genai-prices {version('genai-prices')}"


def load_data() -> DataSnapshot:
    """Import the price data. This takes 60 ms or more."""
    from genai_prices.data_snapshot import get_snapshot

    return get_snapshot()


def published_rates(
    seller: Provider, model: ModelInfo, tier: str | None, *, is_batch: bool, at: datetime
) -> Rates | None:
    """Return the rates of a model at a time (with its zone). None if the data have none for the tier or the lane."""
    if seller.id == "openai" and model.id.startswith(_OPEN_WEIGHTS):
        return None
    context = {"processing": BATCH} if is_batch else _context(tier)
    factor = Fraction(1)
    if context and not _has_rates_for(seller, model, context, at):
        if not is_batch or not _is_half_price_in_batch(seller.id):
            return None
        context = {}
        factor = Fraction(1, 2)
    prices = {unit: price for unit, price in vars(model.get_prices(at, context)).items() if price is not None}
    if not {"input_mtok", "output_mtok"} <= prices.keys() <= _KNOWN_UNITS:
        return None
    write = prices.get("cache_write_mtok", prices["input_mtok"])
    kinds = (
        prices["input_mtok"],
        prices.get("cache_read_mtok", prices["input_mtok"]),
        prices.get("cache_write_5m_mtok", write),
        prices.get("cache_write_1h_mtok", write),
        prices["output_mtok"],
    )
    starts = _starts(kinds)
    bands = []
    for start in (-1, *starts):
        bands.append([factor * _beyond(start, kind) for kind in kinds])
    return _rates(
        library(),
        f"{seller.id}/{model.id}",
        starts,
        bands,
        request=prices.get("requests_kcount", Decimal(0)),
        search=prices.get("web_searches_kcount"),
    )


def _is_half_price_in_batch(seller: str) -> bool:
    """Return True if a seller documents 50 % off for every model, also for those without batch rates in the data."""
    return seller in set(Protocol) and PROTOCOLS[Protocol(seller)].half_price_in_batch


def _context(tier: str | None) -> dict[str, str]:
    """Return a service tier in the words of both providers' data; nothing for the standard tier."""
    if tier is None or tier in STANDARD_TIERS:
        return {}
    return {"service_tier": tier, "speed": tier}


def _has_rates_for(seller: Provider, model: ModelInfo, context: Mapping[str, str], at: datetime) -> bool:
    """Return True if the data have rates for a context at a time.

    `find_model` may return another seller's model, and then the context is not this seller's.
    """
    if not any(model is each for each in seller.models):
        return False
    for variant in model.price_variants or ():
        is_active = variant.constraint is None or variant.constraint.active(at)
        if is_active and variant.when.items() <= context.items():
            return True
    return False


def _starts(prices: Iterable[Decimal | TieredPrices]) -> list[int]:
    """Return the prompt lengths beyond which any of the prices changes, in order."""
    starts: set[int] = set()
    for price in prices:
        starts.update(tier.start for tier in _tiers(price))
    return sorted(starts)


def _tiers(price: Decimal | TieredPrices) -> list[Tier]:
    if isinstance(price, Decimal):
        return []
    return price.tiers


def _beyond(start: int, price: Decimal | TieredPrices) -> Fraction:
    """Return the price of a token in a request whose prompt is one token longer than `start`."""
    if isinstance(price, Decimal):
        return Fraction(price)
    reached = [tier.price for tier in price.tiers if start >= tier.start]
    return Fraction(reached[-1] if reached else price.base)


def _rates(
    source: str,
    model: str,
    starts: Sequence[int],
    bands: Sequence[Sequence[Fraction]],
    *,
    request: Decimal = Decimal(0),
    search: Decimal | None = None,
) -> Rates:
    """Scale prices in dollars (per million tokens, per thousand requests or searches) to integers of one unit."""
    token_prices = [[price * _NANOS_PER_TOKEN for price in band] for band in bands]
    request_price = Fraction(request) * _NANOS_PER_PIECE
    search_price = Fraction(search or 0) * _NANOS_PER_PIECE

    denominators = {request_price.denominator, search_price.denominator}
    for band in token_prices:
        denominators.update(price.denominator for price in band)
    unit = lcm(*denominators)
    return Rates(
        source=source,
        model=model,
        unit=unit,
        starts=tuple(starts),
        bands=tuple(_band(band, unit) for band in token_prices),
        request=int(request_price * unit),
        search=None if search is None else int(search_price * unit),
    )


def _band(prices: Sequence[Fraction], unit: int) -> Band:
    return Band(*(int(price * unit) for price in prices))
