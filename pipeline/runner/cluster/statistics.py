"""Combine the statistics of several senders, for the screen and the totals. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from pipeline.core.types import Allowance
from pipeline.dispatch.live import model_queue
from pipeline.dispatch.live.sender import Statistics
from pipeline.results.codec import StoredResult

T = TypeVar("T")

_COUNTS = ("attempts", "billed", "rate_limited", "failed", "unknown", "dropped")


def counts(sender: Statistics) -> dict[str, int]:
    """Return the counts of a sender, by name."""
    return {name: getattr(sender, name) for name in _COUNTS}


def counts_of(record: StoredResult) -> dict[str, int]:
    """Return the counts of the calls that a result line reports."""
    rate_limited = sum(attempt.status == 429 for attempt in record.failed_attempts)
    return {
        "attempts": record.attempts,
        "billed": int(record.success),
        "rate_limited": rate_limited,
        "failed": len(record.failed_attempts) - rate_limited,
        "unknown": sum(attempt.is_unknown for attempt in record.failed_attempts),
    }


def combined(counted: Mapping[str, int], senders: Sequence[Statistics]) -> Statistics:
    """Return earlier counts and the current state of these senders as one."""
    total = Counter(counted)
    queues: dict[tuple[str, str], list[model_queue.Statistics]] = defaultdict(list)
    for sender in senders:
        total.update(counts(sender))
        for each in sender.queues:
            queues[each.provider, each.model].append(each)
    return Statistics(
        in_flight=sum(sender.in_flight for sender in senders),
        queues=[_queue(each) for each in queues.values()],
        **{name: total[name] for name in _COUNTS},
    )


def _queue(parts: Sequence[model_queue.Statistics]) -> model_queue.Statistics:
    """Return the queues of one model as one."""
    longest = max(parts, key=lambda part: part.cooldown_s)
    return replace(
        longest,
        waiting=sum(part.waiting for part in parts),
        retrying=sum(part.retrying for part in parts),
        in_flight=sum(part.in_flight for part in parts),
        window=sum(part.window for part in parts),
        rate_limited=sum(part.rate_limited for part in parts),
        waiting_for=_first(part.waiting_for for part in parts),
        trouble=_first(part.trouble for part in parts),
        ended=_first(part.ended for part in parts),
        allowances=_allowances(chain.from_iterable(part.allowances for part in parts)),
    )


def _first(values: Iterable[T | None]) -> T | None:
    """Return the first value that is not None or empty."""
    return next((value for value in values if value), None)


def _allowances(parts: Iterable[Allowance]) -> tuple[Allowance, ...]:
    """Return the workers' shares of each allowance as one allowance."""
    shares: dict[tuple[str, str], list[Allowance]] = defaultdict(list)
    for part in parts:
        shares[part.kind, part.source].append(part)
    return tuple(_allowance(kind, source, held) for (kind, source), held in shares.items())


def _allowance(kind: str, source: str, shares: Sequence[Allowance]) -> Allowance:
    per_minute = sum(each.per_minute for each in shares)
    used = 0.0
    if per_minute:
        # A large share counts more than a small one.
        used = sum(each.used * each.per_minute for each in shares) / per_minute
    return Allowance(kind=kind, source=source, per_minute=per_minute, used=used)
