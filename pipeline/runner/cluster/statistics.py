"""What several senders did, as one: for the screen and for the totals. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.core.types import Allowance
from pipeline.dispatch.live import model_queue
from pipeline.dispatch.live.sender import Statistics
from pipeline.results.codec import StoredResult

_COUNTS = ("attempts", "billed", "rate_limited", "failed", "unknown", "dropped")


def counts(sender: Statistics) -> dict[str, int]:
    """Return what a sender counted."""
    return {name: getattr(sender, name) for name in _COUNTS}


def counts_of(record: StoredResult) -> dict[str, int]:
    """Return what a sender had counted of the calls that a result tells of."""
    rate_limited = sum(attempt.status == 429 for attempt in record.failed_attempts)
    return {
        "attempts": record.attempts,
        "billed": int(record.success),
        "rate_limited": rate_limited,
        "failed": len(record.failed_attempts) - rate_limited,
        "unknown": sum(attempt.is_unknown for attempt in record.failed_attempts),
    }


def statistics(counted: Mapping[str, int], senders: Sequence[Statistics]) -> Statistics:
    """Return what was counted before, and what these senders do now."""
    total = Counter(counted)
    lanes: dict[tuple[str, str], list[model_queue.Statistics]] = defaultdict(list)
    for sender in senders:
        total.update(counts(sender))
        for each in sender.queues:
            lanes[each.provider, each.model].append(each)
    return Statistics(
        in_flight=sum(sender.in_flight for sender in senders),
        queues=[_lane(each) for each in lanes.values()],
        **{name: total[name] for name in _COUNTS},
    )


def _lane(parts: Sequence[model_queue.Statistics]) -> model_queue.Statistics:
    """Return the lanes of one model as one."""
    longest = max(parts, key=lambda part: part.cooldown_s)
    return replace(
        longest,
        waiting=sum(part.waiting for part in parts),
        retrying=sum(part.retrying for part in parts),
        in_flight=sum(part.in_flight for part in parts),
        window=sum(part.window for part in parts),
        rate_limited=sum(part.rate_limited for part in parts),
        waiting_for=next((part.waiting_for for part in parts if part.waiting_for), None),
        trouble=next((part.trouble for part in parts if part.trouble), None),
        ended=next((part.ended for part in parts if part.ended), None),
        allowances=_allowances([each for part in parts for each in part.allowances]),
    )


def _allowances(parts: Sequence[Allowance]) -> tuple[Allowance, ...]:
    """Return shares of allowances as the whole of each."""
    shares: dict[tuple[str, str], list[Allowance]] = defaultdict(list)
    for part in parts:
        shares[part.kind, part.source].append(part)
    return tuple(
        Allowance(
            kind=kind,
            source=source,
            per_minute=(whole := sum(each.per_minute for each in held)),
            used=sum(each.used * each.per_minute for each in held) / whole if whole else 0.0,
        )
        for (kind, source), held in shares.items()
    )
