"""`pipeline estimate`: what a run would send now, what that costs in either lane, and how long it takes.

Input is estimated from its size. Answers to the same input, where RESULTS holds some, put that right and tell how long
answers are; so a sample needs nothing of its own here: it is a run of the first lines. Without them the ledger tells
how long a model's answers were so far, and without that only `max_tokens` is known: no expectation is made up.
Left out, as nothing tells it beforehand: what caches save, web searches, calls that fail.
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
_LEARNED_FROM = 10_000  # answers to the same input: more would tell nothing new and fill the memory

Model = tuple[str, str]
"""A provider and the name of a model, as lines ask for it."""


@dataclass(slots=True)
class Sum:
    """A sum over requests: what is known of it, and for how many of them nothing is."""

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
        """The sum; None where nothing is known of any request, as unknown is not zero."""
        return self.known if self.counted or not self.missing else None

    @property
    def usd(self) -> float | None:
        """The sum of nano-dollars in dollars."""
        return None if self.amount is None else money.dollars(self.amount)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """What one request costs in one lane, in nano-dollars; None where its price or its length is not known."""

    expected: int | None
    at_most: int | None
    is_priced: bool


@dataclass(slots=True)
class Costs:
    """What requests cost in one lane, in nano-dollars."""

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
    """What some requests use and cost.

    `output_expected` misses the requests of which nothing tells how long their answers are, `output_at_most` those
    that name no `max_tokens`: one of them, and there is no bound, as a part of it would bound nothing.
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
    """How many minutes a model's requests take at least in the live lane, and the limit that says so."""

    minutes: float
    limit: Allowance

    def as_dict(self) -> dict[str, Any]:
        limit = {"kind": self.limit.kind, "per_minute": self.limit.per_minute, "source": self.limit.source}
        return {"minutes": self.minutes, "limit": limit}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The requests of one model. `basis` says in words where the expected output comes from.

    `input_ratio` is by what the estimate of input was multiplied, None where nothing told it. `pace` is None where no
    limit is known.
    """

    provider: str
    model: str
    figures: Figures
    basis: str
    input_ratio: float | None
    pace: Pace | None

    def as_dict(self) -> dict[str, Any]:
        pace = self.pace.as_dict() if self.pace else {"minutes": None, "limit": None}
        told = {"basis": self.basis, "input_ratio": self.input_ratio}
        return {"provider": self.provider, "model": self.model} | self.figures.as_dict() | told | pace


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run would send now. Of the `lines`, `invalid` are no requests and `done` have a result already."""

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
        """What the slowest model takes, as they run beside each other; None where no limit is known."""
        return max((row.pace.minutes for row in self.rows if row.pace), default=None)

    @property
    def notes(self) -> list[str]:
        """How it was reckoned and what is missing, in words."""
        if not self.rows:
            return []
        total = self.total
        notes = [
            *self.retired_models,
            "input is estimated from its size (text: within some 25 %); caches, searches and retries are left out",
        ]
        if any(row.figures.is_bounded for row in self.rows):
            notes.append("at most: every answer as long as its max_tokens allows, input of the dearest kind it may be")
        if count := total.output_expected.missing:
            notes.append(
                f"nothing tells how long {count:,} answer(s) will be: --sample 20 sends the first 20 lines to find out"
            )
        if count := total.output_at_most.missing:
            notes.append(f"{count:,} request(s) name no max_tokens, so nothing bounds their answers: --max-tokens does")
        if count := total.live.unpriced:
            notes.append(f"{count:,} request(s) have no known price: costs are higher than shown")
        if count := total.batch.unpriced - total.live.unpriced:
            notes.append(f"{count:,} request(s) have no known price in a batch")
        if not all(row.pace for row in self.rows):
            notes.append("minutes are told where limits are known: from --rpm and the like, or from a sample's answers")
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
    """Reckon what a run of the inputs would send now, at the prices of a moment (with its zone).

    What the results at `path` hold is left out, and learned from; `called` is their name, where that is another.
    `learned` are the allowances that a sample met.
    """
    sources = reader.sources(inputs)
    earlier = _Earlier.read(path) if path and path.is_file() else _Earlier()

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

    answers = earlier.answers(items()) if earlier.usages and STDIN not in sources else {}
    prices = Prices(settings)
    tallies: dict[Model, _Tally] = {}
    total = Figures()
    lines = invalid = done = 0
    for item in items():
        lines += 1
        if isinstance(item, Invalid):
            invalid += 1
        elif earlier.done.outcome(writer.key(item.custom_id, item.digest)) is not None:
            done += 1
        else:
            name = item.provider, item.model
            if name not in tallies:
                tallies[name] = _Tally(name, settings, answers.get(name) or _history(ledger, *name), prices, at)
            tallies[name].add(item, total)
    rows = [tally.row((learned or {}).get(name, ())) for name, tally in tallies.items()]
    return Estimate(
        lines=lines,
        invalid=invalid,
        done=done,
        results_file=called or (str(path) if path else None),
        total=total,
        rows=sorted(rows, key=lambda row: (-row.figures.live.expected.known, -row.figures.requests, row.model)),
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
        self._figures = Figures()
        self._needs: dict[str, float] = defaultdict(float)
        self._output = 0.5  # so that cutting it off rounds

    def add(self, request: Request, total: Figures) -> None:
        ratio = (self._past and self._past.input_ratio) or 1.0
        input_tokens = max(1, round(request.estimated_input_tokens * ratio))
        at_most = request.max_output_tokens
        expected = self._expected(at_most)
        quotes = [self._quote(request, input_tokens, expected, lane) for lane in (LIVE, BATCH)]
        for figures in (self._figures, total):
            figures.add(input_tokens, expected, at_most, *quotes)
        likely = at_most if expected is None else expected
        for kind, amount in self._codec.charge(input_tokens, likely or 0, at_most).items():
            self._needs[kind] += amount

    def row(self, learned: Sequence[Allowance]) -> Row:
        if self._past:
            basis = str(self._past)
        else:
            basis = "max_tokens only" if self._figures.output_at_most.counted else "nothing tells the output"
            if self._figures.output_at_most.missing:
                self._needs.pop("output_tokens", None)
        paces = [
            Pace(minutes=self._needs[limit.kind] / limit.per_minute, limit=limit)
            for limit in (*self._caps, *(limit for limit in learned if limit.source != "cap"))
            if limit.kind in self._needs
        ]
        return Row(
            provider=self._name[0],
            model=self._name[1],
            figures=self._figures,
            basis=basis,
            input_ratio=self._past.input_ratio if self._past else None,
            pace=max(paces, key=lambda pace: pace.minutes, default=None),
        )

    def _expected(self, at_most: int | None) -> int | None:
        """Return whole tokens for one answer, such that over many they add up to the mean."""
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
        usage = None if expected is None else Usage(input_tokens=input_tokens, output_tokens=expected)
        at_most = request.max_output_tokens
        return Quote(
            expected=rates.cost(usage) if rates and usage else None,
            at_most=None
            if at_most is None
            else self._prices.worst_case(
                request, input_tokens=input_tokens, max_output_tokens=at_most, lane=lane, at=self._at
            ),
            is_priced=rates is not None,
        )


def _caps(caps: Limits) -> list[Allowance]:
    """Return the user's caps on a model."""
    per_minute = {"requests": caps.rpm, "input_tokens": caps.input_tpm, "output_tokens": caps.output_tpm}
    return [
        Allowance(kind=kind, per_minute=limit, used=0.0, source="cap") for kind, limit in per_minute.items() if limit
    ]


# ── what is known of earlier answers ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _Past:
    """What a model's answers were like: how many, output tokens of each, input tokens against their estimate."""

    origin: str
    answers: int
    output_tokens: float
    input_ratio: float | None = None

    def __str__(self) -> str:
        answers = "answer" if self.answers == 1 else "answers"
        return f"{self.origin}: {self.answers:,} {answers}, {self.output_tokens:,.0f} tokens each"


def _history(ledger: Path, provider: str, model: str) -> _Past | None:
    """Return what the ledger tells of a model; none is made where there is none."""
    if not ledger.exists():
        return None
    with Ledger.open(ledger) as book:
        history = book.history(provider, model)
    if history is None:
        return None
    origin = "history" if history.model == model else f"history of {history.model}"
    return _Past(origin=origin, answers=history.answers, output_tokens=history.mean_output_tokens)


class _Earlier:
    """What a results file holds: what is done, and what the first answers used."""

    def __init__(self) -> None:
        self.done = Done()
        self.usages: dict[int, Usage] = {}

    @classmethod
    def read(cls, path: Path) -> _Earlier:
        """Read a results file as far as it can be understood; a run may be writing it."""
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
        """Return what the answers were like, by model as their lines ask for it; reads no further than it must."""
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
        return _Past(
            origin="this input",
            answers=self.count,
            output_tokens=self.output_tokens / self.count,
            input_ratio=self.input_tokens / self.estimated if self.input_tokens and self.estimated else None,
        )
