"""Usage, model, lane and time -> what a call costs, in whole nano-dollars (1e-9 USD); None where no price is known.

Problem: genai-prices knows the prices of 2,300 models, with their history, tiers of prompt length, service tiers and
batch rates, but its `calc_price` takes 100 µs, its import 60 ms or more, and where it has no rate for what was asked it
gives the standard price in silence.
Choice: a model's rates are taken from its data once a minute at most (some models cost less at night) and applied here
in integers, in 1 µs, rounded once for each request, half to even. A test holds the result against the library's own, to
the nano-dollar. Where there is no rate, there is no price: None, never 0 and never the next best one.
Reasons: sums of integers are exact, and a price tier is a cliff that reprices the whole request, so only single
requests can be priced, never totals.
Left out, as neither usage nor data tell it: OpenAI's cache writes for 12 hours (priced as shorter ones) and fee for
each web search in chat completions, Anthropic's surcharge for `inference_geo`, taxes, and agreements of your own: these
can stand in `prices` of config.yaml, which is asked first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cache
from importlib.metadata import version
from math import lcm
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import urlsplit

from pipeline.core import jsonl
from pipeline.core.clock import Clock
from pipeline.core.config import Config, Price
from pipeline.core.errors import UsageError
from pipeline.core.types import Cost, Request, Usage

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import ModelInfo, Provider, Tier, TieredPrices

# What an answer without a limit of its own is held for when money is set aside. It may be longer: then the cap is
# passed by that much, at most once for each call in flight.
_ASSUMED_OUTPUT_TOKENS = 8_192


LIVE = "live"
BATCH = "batch"
_REMEMBERED = 1_000
_NANOS_PER_TOKEN = 1_000  # of one USD per million tokens
_NANOS_PER_PIECE = 1_000_000  # of one USD per thousand requests or searches

_STANDARD_TIERS = (None, "", "auto", "default", "standard", "standard_only", "on_demand")
"""What answers and requests call the service that costs the standard price; on_demand is Groq's word."""

_HALF_IN_BATCH = ("anthropic", "openai")
"""Who documents 50 % off everything in a batch, also for models whose batch rates the data do not list."""

_REGIONAL_HOSTS = ".api.openai.com"
"""They cost a tenth more than the prices in the data."""

_OPEN_WEIGHTS = "gpt-oss-"
"""Nobody buys these of OpenAI; the data list them there with OpenRouter's prices."""

_KNOWN_UNITS = {
    "input_mtok",
    "output_mtok",
    "cache_read_mtok",
    "cache_write_mtok",
    "cache_write_5m_mtok",
    "cache_write_1h_mtok",
    "requests_kcount",
    "web_searches_kcount",
    "storage_searches_kcount",  # of an API that we do not call
}
"""What the data may charge for; other units (tokens of sound, of pictures) are not told apart in `Usage`."""


class Band(NamedTuple):
    """What one token costs in requests of some length of prompt, in units of `Rates.unit`."""

    input: int
    cache_read: int
    cache_write: int
    cache_write_1h: int
    output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one model costs at one time, in one lane and service tier.

    `source` names who says so and `model` the name there, which may be a wider one than that of the answer.
    All rates are integers, in nano-dollars divided by `unit`. A request belongs to the band `n` when its whole prompt
    is longer than `n` of `starts`. `search` is None where a web search costs nobody knows what.
    """

    source: str
    model: str
    unit: int
    starts: tuple[int, ...]
    bands: tuple[Band, ...]
    request: int
    search: int | None

    def cost(self, usage: Usage) -> int | None:
        """Return what an answer costs, in nano-dollars; None for a usage that cannot be or that has no price."""
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
        """Return what the same tokens cost more without a cache, in nano-dollars; below 0 where writing cost more."""
        cost = self.cost(usage)
        uncached = self.cost(
            Usage(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, web_searches=usage.web_searches)
        )
        return None if cost is None or uncached is None else uncached - cost

    def most(self, input_tokens: int, output_tokens: int, *, may_write: bool, may_write_1h: bool) -> int:
        """Return the most that a request can cost with up to so many tokens, web searches aside."""
        reachable = self.bands[: bisect_left(self.starts, input_tokens) + 1]
        return _rounded(
            self.request
            + max(
                input_tokens
                * max(
                    band.input,
                    band.cache_read,
                    band.cache_write if may_write else 0,
                    band.cache_write_1h if may_write_1h else 0,
                )
                + output_tokens * band.output
                for band in reachable
            ),
            self.unit,
        )


class Pricing(Protocol):
    """What calls of one lane cost, in nano-dollars."""

    def cost(self, request: Request, model: str, usage: Usage) -> Cost:
        """Return what an answer of a model to a request cost."""
        ...

    def worst_case(self, request: Request) -> int:
        """Return the most that one call for a request can cost."""
        ...


class Prices:
    """What calls cost: the user's own table first, then the data that come with genai-prices, offline.

    A provider is told by its address. One of the built-in names (`anthropic`, `openai`) at an address that the data do
    not know is priced as what its name says: a proxy, a gateway or the simulator stands there for it. Any other
    endpoint at an unknown address has no price but the user's: a model's name alone does not tell who sells it.

    Not every process needs prices, so the data are loaded with the first one, or by `load`.
    """

    def __init__(self, settings: Config) -> None:
        self._own = settings.prices
        self._endpoints = settings.providers
        self._data: DataSnapshot | None = None
        self._known: dict[tuple[str, str, str, str | None, str], tuple[datetime, datetime, Rates | None]] = {}

    def __repr__(self) -> str:
        state = "loaded" if self._data else "not loaded yet"
        return f"<Prices of {self.source}, {state}, {len(self._known)} rates remembered>"

    @property
    def source(self) -> str:
        """Who is asked for prices, in this order; for totals and ledger."""
        return ", ".join((*(["config.yaml"] if self._own else []), _library()))

    def load(self) -> None:
        """Import the data now (60 ms or more, in any thread), so that the first price need not wait for them."""
        self._loaded()

    def rates(
        self, *, provider: str, model: str, asked: str = "", tier: str | None = None, lane: str, at: datetime
    ) -> Rates | None:
        """Return what a model of a provider costs at a time (with its zone), None where nobody knows.

        `model` is the name in the answer and `asked` the one in the request: where the first has no price (a
        deployment, a date too new for the data), the second tells what was bought. `tier` is the one of the answer.
        """
        key = (provider, model, asked, tier, lane)
        if known := self._known.get(key):
            since, until, rates = known
            if since <= at < until:
                return rates
        elif len(self._known) >= _REMEMBERED:  # names come from servers: they must not fill the memory
            self._known.clear()
        since = at.replace(second=0, microsecond=0)
        rates = self._find(provider, [name for name in (model, asked) if name], tier, lane, since)
        self._known[key] = since, since + timedelta(minutes=1), rates
        return rates

    def cost(self, usage: Usage, *, provider: str, model: str, asked: str = "", lane: str, at: datetime) -> int | None:
        """Return what an answer costs in nano-dollars, None where nobody knows; see `rates`."""
        rates = self.rates(provider=provider, model=model, asked=asked, tier=usage.service_tier, lane=lane, at=at)
        return rates.cost(usage) if rates else None

    def worst_case(
        self, request: Request, *, input_tokens: int, max_output_tokens: int, lane: str, at: datetime
    ) -> int | None:
        """Return the most that one attempt can cost in nano-dollars, None where nobody knows.

        The caller answers for the numbers of tokens; web searches come on top. All input may be of the dearest kind
        that this request can have, in the dearest band that it can reach. A better service tier that the request asks
        for may be denied: the dearer of both counts.
        """
        endpoint = self._endpoints.get(request.provider)
        if endpoint is None:
            return None
        tiers = {None, asked_tier(request.body)}
        found = [
            self.rates(provider=request.provider, model=request.model, tier=tier, lane=lane, at=at) for tier in tiers
        ]
        # OpenAI caches unasked. Anthropic caches what is marked; the marks are looked for in the text, as one too many
        # only makes the bound a little higher.
        may_write = endpoint.protocol == "openai" or b'"cache_control"' in request.body
        may_write_1h = may_write and b'"1h"' in request.body
        costs = [
            rates.most(input_tokens, max_output_tokens, may_write=may_write, may_write_1h=may_write_1h)
            for rates in found
            if rates
        ]
        return max(costs) if len(costs) == len(found) else None

    def _loaded(self) -> DataSnapshot:
        if self._data is None:
            from genai_prices.data_snapshot import get_snapshot

            self._data = get_snapshot()
        return self._data

    def _find(self, provider: str, models: Sequence[str], tier: str | None, lane: str, at: datetime) -> Rates | None:
        is_batch = BATCH in (lane, tier)
        for model in models:
            for pattern, price in self._own.items():
                if fnmatchcase(f"{provider}/{model}", pattern) or fnmatchcase(model, pattern):
                    return _own_rates(pattern, price, is_batch=is_batch)
        seller = self._seller(provider)
        for model in models:
            if seller and (found := seller.find_model(model, all_providers=self._loaded().providers)):
                return _published_rates(seller, found, tier, is_batch=is_batch, at=at)
        return None

    def _seller(self, name: str) -> Provider | None:
        """Return who sells what an endpoint serves, in the library's terms."""
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            return None
        try:
            return self._loaded().find_provider(None, None, endpoint.base_url)
        except LookupError:
            host = urlsplit(endpoint.base_url).hostname or ""
        if name != endpoint.protocol or host.endswith(_REGIONAL_HOSTS):
            return None
        return self._loaded().find_provider(None, name, None)


def _rounded(amount: int, unit: int) -> int:
    """Divide, and round half to even."""
    whole, rest = divmod(amount, unit)
    return whole + (2 * rest > unit or (2 * rest == unit and whole & 1))


@cache
def _library() -> str:
    return f"genai-prices {version('genai-prices')}"


def asked_tier(body: bytes) -> str | None:
    """Return the service tier that a request asks for, None for the standard one."""
    if b'"service_tier"' not in body and b'"speed"' not in body:
        return None
    fields = jsonl.loads(body)
    tier = "fast" if fields.get("speed") == "fast" else fields.get("service_tier")
    return None if tier in _STANDARD_TIERS else str(tier)


# ── the user's table ──────────────────────────────────────────────────────────────────────────────────────────────


def _own_rates(pattern: str, price: Price, *, is_batch: bool) -> Rates:
    write = price.input if price.cache_write_5m is None else price.cache_write_5m
    kinds = (
        price.input,
        price.input if price.cache_read is None else price.cache_read,
        write,
        write if price.cache_write_1h is None else price.cache_write_1h,
        price.output,
    )
    factor = Fraction(price.batch_multiplier if is_batch else 1)
    return _rates("config.yaml", pattern, [], [[factor * Fraction(kind) for kind in kinds]])


# ── the data of genai-prices ──────────────────────────────────────────────────────────────────────────────────────


def _published_rates(
    seller: Provider, model: ModelInfo, tier: str | None, *, is_batch: bool, at: datetime
) -> Rates | None:
    if seller.id == "openai" and model.id.startswith(_OPEN_WEIGHTS):
        return None
    context = {"processing": BATCH} if is_batch else _context(tier)
    factor = Fraction(1)
    if context and not _has_rates_for(seller, model, context, at):
        if not is_batch or seller.id not in _HALF_IN_BATCH:
            return None
        context, factor = {}, Fraction(1, 2)
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
    starts = sorted({tier.start for kind in kinds for tier in _tiers(kind)})
    bands = [[factor * _beyond(start, kind) for kind in kinds] for start in (-1, *starts)]
    return _rates(
        _library(),
        f"{seller.id}/{model.id}",
        starts,
        bands,
        request=prices.get("requests_kcount", Decimal(0)),
        search=prices.get("web_searches_kcount"),
    )


def _context(tier: str | None) -> dict[str, str]:
    """Return a service tier in the words of both providers' data, nothing for the standard one."""
    return {} if tier is None or tier in _STANDARD_TIERS else {"service_tier": tier, "speed": tier}


def _has_rates_for(seller: Provider, model: ModelInfo, context: Mapping[str, str], at: datetime) -> bool:
    """Tell whether the data list rates for a context at a time, which they have for a seller's own models only."""
    return any(model is each for each in seller.models) and any(
        (variant.constraint is None or variant.constraint.active(at)) and variant.when.items() <= context.items()
        for variant in model.price_variants or ()
    )


def _tiers(price: Decimal | TieredPrices) -> list[Tier]:
    return [] if isinstance(price, Decimal) else price.tiers


def _beyond(start: int, price: Decimal | TieredPrices) -> Fraction:
    """Return the price of a kind of tokens in a request whose prompt is one token longer than `start`."""
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
    """Scale prices in dollars (for a million tokens, a thousand requests or searches) to integers of one unit."""
    tokens = [[price * _NANOS_PER_TOKEN for price in band] for band in bands]
    pieces = [Fraction(price or 0) * _NANOS_PER_PIECE for price in (request, search)]
    unit = lcm(*(amount.denominator for amounts in (pieces, *tokens) for amount in amounts))
    return Rates(
        source=source,
        model=model,
        unit=unit,
        starts=tuple(starts),
        bands=tuple(Band(*(int(price * unit) for price in band)) for band in tokens),
        request=int(pieces[0] * unit),
        search=None if search is None else int(pieces[1] * unit),
    )


class LanePricing:
    """What the calls of a run cost in one lane: `Pricing` over the price tables."""

    def __init__(self, prices: Prices, clock: Clock, lane: str = LIVE) -> None:
        self._lane = lane
        self._prices = prices
        self._clock = clock

    def cost(self, request: Request, model: str, usage: Usage) -> Cost:
        """Price an answer; the tier counts that the answer names."""
        rates = self._prices.rates(
            provider=request.provider,
            model=model,
            asked=request.model,
            tier=usage.service_tier,
            lane=self._lane,
            at=self._clock.moment(),
        )
        if rates is None:
            return Cost()
        is_cached = usage.cache_read_tokens or usage.cache_write_tokens
        return Cost(nanos=rates.cost(usage), saved=(rates.saved(usage) or 0) if is_cached else 0)

    def worst_case(self, request: Request) -> int:
        """Price a call before it is made: a token is a byte of the body at least, but for pictures and documents.

        Raises `UsageError` where no price is known.
        """
        most = self._prices.worst_case(
            request,
            input_tokens=max(len(request.body), 2 * request.estimated_input_tokens),
            max_output_tokens=request.max_output_tokens or _ASSUMED_OUTPUT_TOKENS,
            lane=self._lane,
            at=self._clock.moment(),
        )
        if most is None:
            raise UsageError(
                f"no price is known for {request.provider}/{request.model}, and with a budget nothing is sent whose "
                "price is unknown",
                hint="add a line for it under prices in config.yaml, or leave out --max-cost and budget",
            )
        return most
