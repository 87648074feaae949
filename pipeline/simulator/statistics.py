"""The ground truth of a run: what the simulator received, and what it would bill."""

import hashlib
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from pipeline.simulator.answers import token_of
from pipeline.simulator.faults import OPERATIONS
from pipeline.simulator.types import Ending, Prompt, Reply, Usage

_JOURNAL_LENGTH = 1_000_000


@dataclass(slots=True, kw_only=True)
class _Totals:
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, usage: Usage) -> None:
        """Add one request."""
        self.requests += 1
        self.input_tokens += usage.input_tokens
        self.output_tokens += usage.output_tokens
        self.cache_read_tokens += usage.cache_read_tokens
        self.cache_write_tokens += usage.cache_write_tokens
        self.reasoning_tokens += usage.reasoning_tokens


class BatchCounts:
    """Counters of batches; the requests answered in them are among the totals of all requests, too.

    A batch that failed validation is created but has no requests. `expired` and `cancelled` are requests.
    """

    def __init__(self) -> None:
        self.uploads = 0
        self.requests = 0
        self.answered = 0
        self.errored = 0
        self.calls: Counter[str] = Counter()
        self._created: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._by_model: dict[str, _Totals] = {}

    def count_created(self, provider: str, requests: int) -> None:
        """Count a batch with so many requests."""
        self._created[provider] += 1
        self.requests += requests

    def count_answer(self, model: str, usage: Usage) -> None:
        """Count a request that was answered in a batch."""
        self.answered += 1
        self._by_model.setdefault(model, _Totals()).add(usage)

    def count_left(self, outcome: str, requests: int) -> None:
        """Count requests that were never answered: `expired` or `cancelled`."""
        self._left[outcome] += requests

    def snapshot(self) -> dict[str, Any]:
        """Return all counters as JSON-ready values."""
        created = dict(self._created)
        return {
            "created": sum(created.values()),
            "created_by_provider": created,
            "uploads": self.uploads,
            "requests": self.requests,
            "answered": self.answered,
            "errored": self.errored,
            "expired": self._left["expired"],
            "cancelled": self._left["cancelled"],
            "by_model": {model: asdict(totals) for model, totals in list(self._by_model.items())},
            "calls": {operation: self.calls[operation] for operation in OPERATIONS},
        }


class Statistics:
    """Counters that grow with the requests; only a digest of 8 bytes is kept of each answered body."""

    def __init__(self, *, journal: bool) -> None:
        self.batches = BatchCounts()
        self._received = 0
        self._rejected = 0
        self._answered = 0
        self._in_flight = 0
        self._max_in_flight = 0
        self._by_status: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._by_model: dict[str, _Totals] = {}
        self._paid: set[int] = set()
        self._journal: deque[bytes] | None = deque(maxlen=_JOURNAL_LENGTH) if journal else None

    def __repr__(self) -> str:
        return f"<Statistics {self._received} received, {self._answered} answered, {self._in_flight} in flight>"

    def enter(self) -> None:
        """Count a request that came in."""
        self._received += 1
        self._in_flight += 1
        self._max_in_flight = max(self._max_in_flight, self._in_flight)

    def leave(self) -> None:
        """Count that a request is over, however it ended."""
        self._in_flight -= 1

    def count_reply(self, reply: Reply) -> None:
        """Count a response by its HTTP status, if it is one."""
        if reply.ending in (Ending.COMPLETE, Ending.CUT):
            self._by_status[str(reply.status)] += 1

    def count_rejected(self) -> None:
        """Count a request that the rate limits refused."""
        self._rejected += 1

    def count_fault(self, kind: str) -> None:
        """Count a request that a fault struck."""
        self._faults[kind] += 1

    def count_answer(self, *, key: str, prompt: Prompt, digest: bytes, usage: Usage) -> None:
        """Count a request that got its whole answer, and so is paid for."""
        self._answered += 1
        self._paid.add(int.from_bytes(digest[:8]))
        self._by_model.setdefault(prompt.model, _Totals()).add(usage)
        if self._journal is not None:
            self._journal.append(_entry(key, prompt, digest, usage))

    def snapshot(self) -> dict[str, Any]:
        """Return all counters as JSON-ready values; safe to call from another thread.

        `rejected` are those the rate limits refused, `faults` those a fault struck; `answered` got their
        whole answer. Of these, `unique_paid` had different bodies and `duplicates_paid` repeated one already
        answered. Calls for batches are counted only in `batches`.
        """
        return {
            "received": self._received,
            "answered": self._answered,
            "rejected": self._rejected,
            "by_status": dict(self._by_status),
            "faults": dict(self._faults),
            "by_model": {model: asdict(totals) for model, totals in list(self._by_model.items())},
            "in_flight": self._in_flight,
            "max_in_flight": self._max_in_flight,
            "unique_paid": len(self._paid),
            "duplicates_paid": self._answered - len(self._paid),
            "batches": self.batches.snapshot(),
        }

    def journal(self) -> bytes:
        """Return the answered requests as JSON lines, oldest first; empty when no journal is kept."""
        return b"".join(self._journal or ())


def _entry(key: str, prompt: Prompt, digest: bytes, usage: Usage) -> bytes:
    entry = {
        "key_sha256": hashlib.sha256(key.encode()).hexdigest()[:16],
        "model": prompt.model,
        "answer_token": token_of(digest),
        "usage": asdict(usage),
    }
    return orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)
