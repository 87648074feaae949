"""`pipeline estimate`: what a run would send now, its cost in both lanes, and how long it takes.

Input tokens are estimated from the size of the input. If the results file has answers to the same input, they correct
that estimate and show how long answers are. So a sample needs no code of its own here: it is a run of the first lines.
Without such answers, the ledger has the mean length of a model's earlier answers. Without either, only `max_tokens` is
known, and no expected cost is made up. Cache savings, web searches and failed calls cannot be known and are left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import providers
from pipeline.accounting.ledger import Ledger
from pipeline.accounting.pricing import BATCH, Prices, asked_tier
from pipeline.core import config, money
from pipeline.core.config import Config, Limits
from pipeline.core.errors import UsageError
from pipeline.core.types import Allowance, Request, Usage
from pipeline.inputs import reader
from pipeline.inputs.planner import Invalid, Planner
from pipeline.inputs.retired_models import RetiredModels
from pipeline.inputs.sources import STDIN
from pipeline.results import codec, writer
from pipeline.results.writer import Done

LIVE = "live"

# Answers to the same input to learn from. More would add nothing and fill the memory.
_LEARNED_FROM = 10_000

Model = tuple[str, str]
"""A provider and the name of a model, as lines ask for it."""


@dataclass(slots=True)
class Sum:
    """A sum over requests, with the number of requests whose amount is unknown."""

    known: int = 0
    counted: int = 0
    missing: int = 0

    def add(self, amount: int | None) -> None:
        if amount is None:
            self.missing += 1
        else:
            self.known += amount
            self.counted += 1

    @property
    def amount(self) -> int | None:
        """The sum. None if it is unknown for every request, because unknown is not zero."""
        if self.missing and not self.counted:
            return None
        return self.known

    @property
    def usd(self) -> float | None:
        """A sum of nano-dollars, in dollars."""
        if self.amount is None:
            return None
        return money.dollars(self.amount)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """The cost of one request in one lane, in nano-dollars. None if its price or its length is unknown."""

    expected: int | None
    at_most: int | None
    is_priced: bool


@dataclass(slots=True)
class Costs:
    """The cost of requests in one lane, in nano-dollars."""

    expected: Sum = field(default_factory=Sum)
    at_most: Sum = field(default_factory=Sum)
    unpriced: int = 0

    def add(self, quote: Quote) -> None:
        self.expected.add(quote.expected)
        self.at_most.add(quote.at_most)
        self.unpriced += not quote.is_priced

    def as_dict(self, *, is_bounded: bool) -> dict[str, Any]:
        at_most = self.at_most.usd if is_bounded else None
        return {"expected": self.expected.usd, "at_most": at_most, "unpriced_requests": self.unpriced}


@dataclass(slots=True)
class Figures:
    """Token use and cost of requests.

    `output_expected` misses requests whose answer length is unknown; `output_at_most` misses requests without
    `max_tokens`. A single such request leaves the total without an upper bound.
    """

    requests: int = 0
    input_tokens: int = 0
    output_expected: Sum = field(default_factory=Sum)
    output_at_most: Sum = field(default_factory=Sum)
    live: Costs = field(default_factory=Costs)
    batch: Costs = field(default_factory=Costs)

    def add(self, input_tokens: int, expected: int | None, at_most: int | None, live: Quote, batch: Quote) -> None:
        self.requests += 1
        self.input_tokens += input_tokens
        self.output_expected.add(expected)
        self.output_at_most.add(at_most)
        self.live.add(live)
        self.batch.add(batch)

    @property
    def is_bounded(self) -> bool:
        return not self.output_at_most.missing

    def as_dict(self) -> dict[str, Any]:
        at_most = self.output_at_most.known if self.is_bounded else None
        return {
            "requests": self.requests,
            "input_tokens": self.input_tokens,
            "output_tokens": {"expected": self.output_expected.amount, "at_most": at_most},
            "requests_of_unknown_length": self.output_expected.missing,
            "requests_without_max_tokens": self.output_at_most.missing,
            "live": self.live.as_dict(is_bounded=self.is_bounded),
            "batch": self.batch.as_dict(is_bounded=self.is_bounded),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The minimum minutes that a model's requests take in the live lane, and the limit that decides it."""

    minutes: float
    limit: Allowance

    def as_dict(self) -> dict[str, Any]:
        limit = {"kind": self.limit.kind, "per_minute": self.limit.per_minute, "source": self.limit.source}
        return {"minutes": self.minutes, "limit": limit}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The requests of one model. `basis` says in words where the expected output comes from.

    `input_ratio` is the factor that corrects the estimate of input tokens, None without answers to learn from. `pace`
    is None if no limit is known.
    """

    provider: str
    model: str
    figures: Figures
    basis: str
    input_ratio: float | None
    pace: Pace | None

    def as_dict(self) -> dict[str, Any]:
        pace: dict[str, Any] = {"minutes": None, "limit": None}
        if self.pace:
            pace = self.pace.as_dict()
        return {
            "provider": self.provider,
            "model": self.model,
            **self.figures.as_dict(),
            "basis": self.basis,
            "input_ratio": self.input_ratio,
            **pace,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run would send now. Of the `lines`, `invalid` are not valid requests and `done` already have a result."""

    lines: int
    invalid: int
    done: int
    results_file: str | None
    total: Figures
    rows: Sequence[Row]
    price_source: str
    retired_models: Sequence[str] = ()

    @property
    def exit_code(self) -> int:
        return int(self.invalid > 0)

    @property
    def minutes(self) -> float | None:
        """Minutes of the slowest model, because models run side by side. None if no limit is known."""
        return max((row.pace.minutes for row in self.rows if row.pace), default=None)

    @property
    def notes(self) -> list[str]:
        """Notes for the reader: how the estimate was made, and what it cannot know."""
        if not self.rows:
            return []
        notes = [
            *self.retired_models,
            "input is estimated from its size (text: within about 25 %); caches, searches and retries are left out",
        ]
        if any(row.figures.is_bounded for row in self.rows):
            notes.append(
                "at most: every answer as long as its max_tokens allows, input at the highest price it can have"
            )
        unknown_length = self.total.output_expected.missing
        if unknown_length:
            notes.append(
                f"the length of {unknown_length:,} answer(s) is unknown: --sample 20 sends 20 lines to learn it"
            )
        unbounded = self.total.output_at_most.missing
        if unbounded:
            notes.append(f"{unbounded:,} request(s) have no max_tokens, so their cost has no bound: set --max-tokens")
        unpriced = self.total.live.unpriced
        if unpriced:
            notes.append(f"{unpriced:,} request(s) have no known price: costs are higher than shown")
        unpriced_in_batch = self.total.batch.unpriced - unpriced
        if unpriced_in_batch:
            notes.append(f"{unpriced_in_batch:,} request(s) have no known price in a batch")
        if not all(row.pace for row in self.rows):
            notes.append("minutes are shown where limits are known: from --rpm and similar options, or from a sample")
        return notes

    def as_dict(self) -> dict[str, Any]:
        """Return the documented JSON object."""
        return {
            "lines": self.lines,
            "invalid": self.invalid,
            "done": self.done,
            "results_file": self.results_file,
            "currency": "USD",
            "price_source": self.price_source,
            **self.total.as_dict(),
            "minutes": self.minutes,
            "by_model": [row.as_dict() for row in self.rows],
            "notes": self.notes,
        }


def estimate(
    inputs: Sequence[str],
    settings: Config,
    *,
    provider: str | None = None,
    model: str | None = None,
    path: Path | None = None,
    called: str | None = None,
    ledger: Path,
    learned: Mapping[Model, Sequence[Allowance]] | None = None,
    at: datetime,
) -> Estimate:
    """Estimate what a run of the inputs would send now, at the prices of the moment `at` (with its zone).

    Requests with a result at `path` are left out, and their answers are learned from. `called` is the name of the
    results if that differs from the path. `learned` are the rate limits that a sample met.

    Raises `UsageError` if the inputs or the results cannot be read.
    """
    sources = reader.sources(inputs)
    earlier = _Earlier()
    if path and path.is_file():
        earlier = _Earlier.read(path)

    retired = RetiredModels(settings, model=model, today=at.astimezone(UTC).date())
    notices: list[str] = []

    def items() -> Iterator[Request | Invalid]:
        planner = Planner(settings, provider=provider, model=model)
        for source in sources:
            for line in reader.lines(source, settings.input.max_line_bytes):
                item = planner.plan(line)
                notice = None if isinstance(item, Invalid) else retired.notice(line, item)
                if notice:
                    notices.append(notice)
                yield item

    # Learning reads the input once more, so stdin cannot be learned from.
    past: Mapping[Model, _Past] = {}
    if earlier.usages and STDIN not in sources:
        past = earlier.answers(items())

    prices = Prices(settings)
    tallies: dict[Model, _Tally] = {}
    total = Figures()
    lines = invalid = done = 0
    for item in items():
        lines += 1
        if isinstance(item, Invalid):
            invalid += 1
            continue
        if earlier.done.outcome(writer.key(item.custom_id, item.digest)) is not None:
            done += 1
            continue
        name = item.provider, item.model
        if name not in tallies:
            tallies[name] = _Tally(name, settings, past.get(name) or _history(ledger, *name), prices, at)
        tallies[name].add(item, total)

    learned = learned or {}
    rows = [tally.row(learned.get(name, ())) for name, tally in tallies.items()]
    rows.sort(key=lambda row: (-row.figures.live.expected.known, -row.figures.requests, row.model))
    results_file = str(path) if path else None
    return Estimate(
        lines=lines,
        invalid=invalid,
        done=done,
        results_file=called or results_file,
        total=total,
        rows=rows,
        price_source=prices.source,
        retired_models=notices,
    )


class _Tally:
    """Adds up the requests of one model."""

    def __init__(self, name: Model, settings: Config, past: _Past | None, prices: Prices, at: datetime) -> None:
        self._name = name
        self._past = past
        self._prices = prices
        self._at = at
        self._caps = _caps(settings.limits.of(*name))
        self._codec = providers.codec(config.protocol(settings.providers[name[0]]))
        # The sums that `add` changes. `_needs` is the use of each kind of limit; `_output` starts at one half so that
        # truncating it rounds.
        self._figures = Figures()
        self._needs: dict[str, float] = defaultdict(float)
        self._output = 0.5

    def add(self, request: Request, total: Figures) -> None:
        """Count a request, here and in the total."""
        ratio = 1.0
        if self._past and self._past.input_ratio:
            ratio = self._past.input_ratio
        input_tokens = max(1, round(request.estimated_input_tokens * ratio))
        at_most = request.max_output_tokens
        expected = self._expected(at_most)
        live = self._quote(request, input_tokens, expected, LIVE)
        batch = self._quote(request, input_tokens, expected, BATCH)
        for figures in (self._figures, total):
            figures.add(input_tokens, expected, at_most, live, batch)

        likely = at_most if expected is None else expected
        for kind, amount in self._codec.charge(input_tokens, likely or 0, at_most).items():
            self._needs[kind] += amount

    def row(self, learned: Sequence[Allowance]) -> Row:
        """Return the sums. `learned` are the rate limits that a sample met."""
        return Row(
            provider=self._name[0],
            model=self._name[1],
            figures=self._figures,
            basis=self._basis(),
            input_ratio=self._past.input_ratio if self._past else None,
            pace=self._pace(learned),
        )

    def _basis(self) -> str:
        if self._past:
            return str(self._past)
        if self._figures.output_at_most.counted:
            return "max_tokens only"
        return "output length unknown"

    def _pace(self, learned: Sequence[Allowance]) -> Pace | None:
        """Return the slowest pace that any known limit allows."""
        needs = dict(self._needs)
        if self._past is None and self._figures.output_at_most.missing:
            # Some answers have neither an expected nor a largest length, so the sum is too small.
            needs.pop("output_tokens", None)
        reported = [limit for limit in learned if limit.source != "cap"]
        paces = [
            Pace(minutes=needs[limit.kind] / limit.per_minute, limit=limit)
            for limit in (*self._caps, *reported)
            if limit.kind in needs
        ]
        return max(paces, key=lambda pace: pace.minutes, default=None)

    def _expected(self, at_most: int | None) -> int | None:
        """Return whole tokens for one answer, such that many of them add up to the mean."""
        if self._past is None:
            return None
        before = int(self._output)
        self._output += min(self._past.output_tokens, at_most or math.inf)
        return int(self._output) - before

    def _quote(self, request: Request, input_tokens: int, expected: int | None, lane: str) -> Quote:
        rates = self._prices.rates(
            provider=request.provider,
            model=request.model,
            tier=asked_tier(request.body),
            lane=lane,
            at=self._at,
        )
        expected_cost = None
        if rates and expected is not None:
            expected_cost = rates.cost(Usage(input_tokens=input_tokens, output_tokens=expected))
        at_most_cost = None
        if request.max_output_tokens is not None:
            at_most_cost = self._prices.worst_case(
                request,
                input_tokens=input_tokens,
                max_output_tokens=request.max_output_tokens,
                lane=lane,
                at=self._at,
            )
        return Quote(expected=expected_cost, at_most=at_most_cost, is_priced=rates is not None)


def _caps(caps: Limits) -> list[Allowance]:
    """Return the user's caps on a model."""
    per_minute = {"requests": caps.rpm, "input_tokens": caps.input_tpm, "output_tokens": caps.output_tpm}
    return [
        Allowance(kind=kind, per_minute=limit, used=0.0, source="cap") for kind, limit in per_minute.items() if limit
    ]


# ── earlier answers ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _Past:
    """A model's earlier answers: their number, mean output tokens, and real input tokens over estimated ones."""

    origin: str
    answers: int
    output_tokens: float
    input_ratio: float | None = None

    def __str__(self) -> str:
        answers = "answer" if self.answers == 1 else "answers"
        return f"{self.origin}: {self.answers:,} {answers}, {self.output_tokens:,.0f} tokens each"


def _history(ledger: Path, provider: str, model: str) -> _Past | None:
    """Return what the ledger knows of a model. A missing ledger is not created."""
    if not ledger.exists():
        return None
    with Ledger.open(ledger) as book:
        history = book.history(provider, model)
    if history is None:
        return None
    origin = "history" if history.model == model else f"history of {history.model}"
    return _Past(origin=origin, answers=history.answers, output_tokens=history.mean_output_tokens)


class _Earlier:
    """The content of a results file: which requests are done, and the usage of the first answers."""

    def __init__(self) -> None:
        self.done = Done()
        self.usages: dict[int, Usage] = {}

    @classmethod
    def read(cls, path: Path) -> _Earlier:
        """Read a results file. Skip lines that cannot be read, because a run may be writing it."""
        earlier = cls()
        try:
            with path.open("rb") as file:
                for _, _, found in codec.read(file):
                    if found is None:
                        continue
                    request = writer.key(found.custom_id, found.digest)
                    earlier.done.add(request, success=found.success)
                    if found.success and found.usage and len(earlier.usages) < _LEARNED_FROM:
                        earlier.usages[request] = found.usage
        except OSError as exc:
            raise UsageError(f"cannot read {str(path)!r}: {exc.strerror}") from exc
        return earlier

    def answers(self, items: Iterator[Request | Invalid]) -> dict[Model, _Past]:
        """Return the earlier answers by model, as their input lines name it. Stops once all are matched."""
        met: dict[Model, _Answers] = defaultdict(_Answers)
        left = dict(self.usages)
        for item in items:
            usage = left.pop(writer.key(item.custom_id, item.digest), None)
            if usage and isinstance(item, Request):
                met[item.provider, item.model].add(item, usage)
            if not left:
                break
        return {name: answers.past() for name, answers in met.items()}


@dataclass(slots=True)
class _Answers:
    """Sums over the answers of one model."""

    count: int = 0
    estimated: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def add(self, request: Request, usage: Usage) -> None:
        self.count += 1
        self.estimated += request.estimated_input_tokens
        self.input_tokens += usage.input_tokens
        self.output_tokens += usage.output_tokens

    def past(self) -> _Past:
        ratio = None
        if self.input_tokens and self.estimated:
            ratio = self.input_tokens / self.estimated
        return _Past(
            origin="this input",
            answers=self.count,
            output_tokens=self.output_tokens / self.count,
            input_ratio=ratio,
        )
