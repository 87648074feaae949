"""One batch of either provider: what is in it, and where it stands at any moment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from pipeline.simulator.types import Body, Completion, HeaderMap, Identity, Problem, Prompt


class Phase(Enum):
    """Where a batch stands; the last four are for ever."""

    VALIDATING = "validating"
    WORKING = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    FAILED = "failed"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def is_last(self) -> bool:
        """Whether nothing will change any more."""
        return self in (Phase.FAILED, Phase.COMPLETED, Phase.EXPIRED, Phase.CANCELLED)


class Outcome(Enum):
    """What became of one request."""

    ANSWERED = "answered"
    ERRORED = "errored"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


@dataclass(slots=True, kw_only=True)
class Item:
    """One request of a batch: `raw` is its body; its result is written `copies` times, `size` bytes each."""

    number: int
    custom_id: str
    raw: bytes
    copies: int = 1
    position: int = 0
    outcome: Outcome | None = None
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """The requests of a batch.

    `queue` is what will be answered, in that order, if there is time; `stuck` is what will not before the window
    is over, `expiring` what never will.
    """

    queue: list[Item] = field(default_factory=list)
    expiring: list[Item] = field(default_factory=list)
    stuck: list[Item] = field(default_factory=list)


class Dialect(Protocol):
    """How one provider's batches differ; its module `lines` is it."""

    @property
    def PROVIDER(self) -> str:
        """The provider's name."""

    @property
    def PREFIX(self) -> str:
        """What the ids of its batches begin with."""

    @property
    def VALIDATING(self) -> float:
        """The share of its time that a batch is validated."""

    @property
    def FINALIZING(self) -> float:
        """The share of its time that the results are put together."""

    def check(self, headers: HeaderMap, body: object) -> Problem | None:
        """Find the first thing wrong with one request."""

    def prompt(self, body: Body) -> Prompt:
        """Read a request that `check` found nothing wrong with."""

    def problem(self, status: int) -> Problem:
        """Make the provider's usual error of this HTTP status."""

    def answered(self, item: Item, line_id: str, prompt: Prompt, completion: Completion, identity: Identity) -> bytes:
        """Encode the result of a request that was answered."""

    def errored(self, item: Item, line_id: str, problem: Problem) -> bytes:
        """Encode the result of a request that was refused."""

    def left(self, item: Item, line_id: str, outcome: Outcome) -> bytes:
        """Encode the result of a request that expired or was cancelled."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """A batch, with all times by the event loop's clock.

    `details` and `headers` are the protocol's own. `failure` is why validation fails. `extra` is a result for
    a request that was never sent. `usages` are the tokens of input, read from the cache, of output and of reasoning.
    """

    id: str
    number: int
    key: str
    created: float
    seconds: float
    window: float
    cancel_seconds: float
    dialect: Dialect
    headers: HeaderMap
    details: Mapping[str, Any]
    failure: Sequence[Mapping[str, Any]] = ()
    requests: Sorted = field(default_factory=Sorted)
    extra: Item | None = None
    tokens: int = 0
    cancelled: float | None = None
    cursor: int = 0
    left: list[Item] | None = None
    is_settled: bool = False
    counts: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    usages: list[int] = field(default_factory=lambda: [0, 0, 0, 0])

    @property
    def queue(self) -> list[Item]:
        """What will be answered if there is time."""
        return self.requests.queue

    @property
    def total(self) -> int:
        """The number of requests."""
        return len(self.queue) + len(self.requests.expiring) + len(self.requests.stuck)

    @property
    def validated(self) -> float:
        """When validation ends."""
        return self.created + self.seconds * self.dialect.VALIDATING

    @property
    def worked(self) -> float:
        """When the last request of the queue is answered, if nothing intervenes."""
        return self.validated + self.seconds * (1 - self.dialect.VALIDATING - self.dialect.FINALIZING)

    @property
    def expires(self) -> float:
        """When the window is over."""
        return self.created + self.window

    @property
    def is_late(self) -> bool:
        """Whether the window is over before the queue is empty."""
        return bool(self.queue) and self.due(len(self.queue) - 1) > self.expires

    @property
    def will_expire(self) -> bool:
        """Whether some requests will never be answered."""
        return bool(self.requests.stuck or self.requests.expiring) or self.is_late

    @property
    def end(self) -> float:
        """When the batch is over, as things stand."""
        if self.cancelled is not None:
            return self.cancelled + self.cancel_seconds
        if self.failure:
            return self.validated
        if self.requests.stuck or self.is_late:
            return self.expires
        whole = self.created + self.seconds
        return min(whole, self.expires) if self.requests.expiring else whole

    def due(self, position: int) -> float:
        """Return when the request at this position of the queue is answered."""
        share = (position + 1) / len(self.queue)
        return min(self.worked, self.validated + (self.worked - self.validated) * share)

    def phase(self, now: float) -> Phase:
        """Return where the batch stands; in the moment of its creation or cancellation it is never over."""
        if self.cancelled is not None:
            return Phase.CANCELLING if now <= self.cancelled or now < self.end else Phase.CANCELLED
        if now <= self.created or now < min(self.validated, self.end):
            return Phase.VALIDATING
        if self.failure:
            return Phase.FAILED
        if now >= self.end:
            return Phase.EXPIRED if self.will_expire else Phase.COMPLETED
        return Phase.FINALIZING if now >= self.worked and not self.will_expire else Phase.WORKING

    def results(self, *outcomes: Outcome) -> list[Item]:
        """Return the requests that have a result of such an outcome, in the order of the results."""
        found = self.requests
        items = [*found.queue, *found.expiring, *found.stuck, *([self.extra] if self.extra else [])]
        return [item for item in items if item.outcome in outcomes and item.copies]
