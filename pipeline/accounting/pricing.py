"""Price calls: usage, model, lane and time -> whole nano-dollars (1e-9 USD). None if no price is known.

The user's own table in config.yaml comes first, then the data that come with genai-prices (see `rates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from pipeline import providers
from pipeline.accounting.rates import BATCH, STANDARD_TIERS, Rates, library, load_data, own_rates, published_rates
from pipeline.core import config, jsonl
from pipeline.core.clock import Clock
from pipeline.core.config import Config
from pipeline.core.errors import UsageError
from pipeline.core.types import Cost, Request, Usage

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import Provider

__all__ = ["BATCH", "LIVE", "LanePricing", "Prices", "Pricing", "asked_tier"]

LIVE = "live"

# Output tokens to reserve for a request without a limit. A longer answer passes the cap, but by no more than its own
# excess, and only for calls that are in flight at that moment.
_ASSUMED_OUTPUT_TOKENS = 8_192

# Model names come from servers and must not fill the memory.
_REMEMBERED = 1_000

_REGIONAL_HOSTS = ".api.openai.com"
"""OpenAI's regional endpoints cost 10 % more than the prices in the data."""


class Pricing(Protocol):
    """Prices calls of one lane, in nano-dollars."""

    def cost(self, request: Request, model: str, usage: Usage) -> Cost:
        """Return what a model's response to a request costs."""
        ...

    def worst_case(self, request: Request) -> int:
        """Return the most that one call for a request can cost."""
        ...


class Prices:
    """Prices of all providers in the settings.

    A provider is recognized by its address. One of the built-in names (`anthropic`, `openai`) at an address that the
    data do not know is priced by its name: there it stands for a proxy, a gateway or the simulator. Any other endpoint
    at an unknown address has only the prices in config.yaml, because a model's name alone does not say who sells it.

    The data load with the first price that needs them, or by `load`: not every process needs prices.
    """

    def __init__(self, settings: Config) -> None:
        self._own = settings.prices
        self._endpoints = settings.providers
        self._data: DataSnapshot | None = None
        # (provider, model, asked, tier, lane) -> rates, and the minute in which they hold: some models cost less at
        # night.
        self._known: dict[tuple[str, str, str, str | None, str], tuple[datetime, datetime, Rates | None]] = {}

    def __repr__(self) -> str:
        state = "loaded" if self._data else "not loaded yet"
        return f"<Prices of {self.source}, {state}, {len(self._known)} rates remembered>"

    @property
    def source(self) -> str:
        """Where prices come from, in order of precedence, as totals and ledger record it."""
        if self._own:
            return f"config.yaml, {library()}"
        return library()

    def load(self) -> None:
        """Load the data now (60 ms or more, in any thread), so that the first price does not wait for them."""
        self._loaded()

    def rates(
        self, *, provider: str, model: str, asked: str = "", tier: str | None = None, lane: str, at: datetime
    ) -> Rates | None:
        """Return the rates of a provider's model at a time (with its zone). None if they are unknown.

        `model` is the name in the response and `asked` the name in the request, which is tried second: the response may
        name a deployment, or a date that is too new for the data. `tier` is the service tier in the response.
        """
        key = (provider, model, asked, tier, lane)
        known = self._known.get(key)
        if known:
            since, until, rates = known
            if since <= at < until:
                return rates
        elif len(self._known) >= _REMEMBERED:
            self._known.clear()
        since = at.replace(second=0, microsecond=0)
        names = [name for name in (model, asked) if name]
        rates = self._find(provider, names, tier, lane, since)
        self._known[key] = since, since + timedelta(minutes=1), rates
        return rates

    def cost(self, usage: Usage, *, provider: str, model: str, asked: str = "", lane: str, at: datetime) -> int | None:
        """Return what a response costs, in nano-dollars. None if its price is unknown; see `rates`."""
        rates = self.rates(provider=provider, model=model, asked=asked, tier=usage.service_tier, lane=lane, at=at)
        if rates is None:
            return None
        return rates.cost(usage)

    def worst_case(
        self, request: Request, *, input_tokens: int, max_output_tokens: int, lane: str, at: datetime
    ) -> int | None:
        """Return the most that one attempt can cost, in nano-dollars. None if its price is unknown.

        Web searches are extra. The caller bounds both numbers of tokens. All input counts as the dearest kind that this
        request can have, in the dearest band it can reach. If the request asks for a better service tier, which the
        provider may deny, the dearer of both tiers counts.
        """
        endpoint = self._endpoints.get(request.provider)
        if endpoint is None:
            return None
        # OpenAI caches without being asked. Anthropic caches what is marked. The marks are searched for in the raw
        # text: a false match only makes the bound a little higher.
        codec = providers.codec(config.protocol(endpoint), request.endpoint)
        may_write = codec.caches_unasked or b'"cache_control"' in request.body
        may_write_1h = may_write and b'"1h"' in request.body
        costs = []
        for tier in {None, asked_tier(request.body)}:
            rates = self.rates(provider=request.provider, model=request.model, tier=tier, lane=lane, at=at)
            if rates is None:
                return None
            most = rates.most(input_tokens, max_output_tokens, may_write=may_write, may_write_1h=may_write_1h)
            costs.append(most)
        return max(costs)

    def _loaded(self) -> DataSnapshot:
        if self._data is None:
            self._data = load_data()
        return self._data

    def _find(self, provider: str, models: Sequence[str], tier: str | None, lane: str, at: datetime) -> Rates | None:
        """Return the rates of the first of the models that has any. The user's table comes first for all of them."""
        is_batch = BATCH in (lane, tier)
        for model in models:
            for pattern, price in self._own.items():
                if fnmatchcase(f"{provider}/{model}", pattern) or fnmatchcase(model, pattern):
                    return own_rates(pattern, price, is_batch=is_batch)
        seller = self._seller(provider)
        if seller is None:
            return None
        for model in models:
            found = seller.find_model(model, all_providers=self._loaded().providers)
            if found:
                return published_rates(seller, found, tier, is_batch=is_batch, at=at)
        return None

    def _seller(self, name: str) -> Provider | None:
        """Return the library's entry for the company behind an endpoint."""
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


def asked_tier(body: bytes) -> str | None:
    """Return the service tier that a request asks for. None for the standard tier."""
    # Parsing the body costs more than this search, and hardly any request names a tier.
    if b'"service_tier"' not in body and b'"speed"' not in body:
        return None
    fields = jsonl.loads(body)
    if fields.get("speed") == "fast":
        return "fast"
    tier = fields.get("service_tier")
    if tier in STANDARD_TIERS:
        return None
    return str(tier)


class LanePricing:
    """`Pricing` of one lane over the price tables, at the current time."""

    def __init__(self, prices: Prices, clock: Clock, lane: str = LIVE) -> None:
        self._lane = lane
        self._prices = prices
        self._clock = clock

    def cost(self, request: Request, model: str, usage: Usage) -> Cost:
        """Price a response, at the service tier that the response names."""
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
        saved = 0
        if usage.cache_read_tokens or usage.cache_write_tokens:
            saved = rates.saved(usage) or 0
        return Cost(nanos=rates.cost(usage), saved=saved)

    def worst_case(self, request: Request) -> int:
        """Price a call before it is sent. Raise `UsageError` if its price is unknown.

        A token is at least one byte of the body, except in images and documents, where the estimate counts twice.
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
                f"no price is known for {request.provider}/{request.model}, so a run with a budget cannot send to it",
                hint="add its price under prices in config.yaml, or run without --max-cost and budget",
            )
        return most
