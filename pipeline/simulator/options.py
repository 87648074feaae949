"""What a simulated provider should be like."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.simulator.faults import KINDS, parse_batch_fault

_LIMITS = (
    *("rpm", "input_tpm", "output_tpm", "burst"),
    *("batch_enqueued_tokens", "batch_max_requests", "batch_max_bytes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The settings of one simulator.

    All limits are per minute and hold for each pair of key and model; None is no limit. For OpenAI
    `input_tpm` is its one limit of tokens and `output_tpm` is not used. A bucket holds one minute's worth;
    `burst` sets the size of the request bucket. `latency` is the mean in seconds. `faults` maps a kind to the share of
    requests that it strikes. `keys` None accepts any key. `cache_ratio` is the share of the prompts of 1,024
    tokens and more that are read from the cache. `rate_headers=False` is a server that does not send its
    limits, such as vLLM. `journal` keeps the last million answered requests for `GET /simulator/journal`.

    A batch takes `batch_seconds` from its creation to its end; its requests are answered evenly over that time,
    of which OpenAI spends the first tenth with validating. `batch_window` is when it expires: the seconds that
    stand for the providers' 24 hours. `batch_cancel_seconds` is how long one is being cancelled.
    `batch_enqueued_tokens` limits the input tokens of all unfinished batches of a key and model (OpenAI);
    `batch_max_requests` and `batch_max_bytes` lower the providers' limits of one batch. `batch_faults` maps an
    operation (`upload`, `create`, `poll`, `list`, `results`, `cancel`) to what happens to its first calls, in
    order, such as `("ok", "lost", "500-done")`; see `faults.BATCH_KINDS`. `batch_unknown_results` adds a result
    for a request that was never sent. `batch_empty_file_ids` has OpenAI write "", not null, for a missing file.
    """

    seed: int = 0
    rpm: int | None = None
    input_tpm: int | None = None
    output_tpm: int | None = None
    burst: int | None = None
    latency: float = 0.0
    faults: Mapping[str, float] = field(default_factory=dict)
    keys: frozenset[str] | None = field(default=None, repr=False)
    cache_ratio: float = 0.5
    rate_headers: bool = True
    retry_after: bool = True
    journal: bool = False
    batch_seconds: float = 1.0
    batch_window: float = 86_400.0
    batch_cancel_seconds: float = 0.0
    batch_enqueued_tokens: int | None = None
    batch_max_requests: int | None = None
    batch_max_bytes: int | None = None
    batch_faults: Mapping[str, Sequence[str]] = field(default_factory=dict)
    batch_unknown_results: bool = False
    batch_empty_file_ids: bool = False

    def __post_init__(self) -> None:
        for name in _LIMITS:
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name} is {limit!r}: give 1 or more, or None for no limit")
        if self.burst is not None and self.rpm is None:
            raise ValueError(f"burst is {self.burst!r} without rpm: give rpm too")
        if self.latency < 0:
            raise ValueError(f"latency is {self.latency!r}: give its mean in seconds, 0 or more")
        if not 0 <= self.cache_ratio <= 1:
            raise ValueError(f"cache_ratio is {self.cache_ratio!r}: give a share from 0 to 1")
        for kind, rate in self.faults.items():
            _check_fault(kind, rate)
        if sum(self.faults.values()) > 1 + 1e-9:
            raise ValueError(f"faults add up to {sum(self.faults.values()):g}: lower their rates to 1 in all")
        self._check_batches()

    def _check_batches(self) -> None:
        for name in ("batch_seconds", "batch_cancel_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give seconds, 0 or more")
        if not 0 < self.batch_window < math.inf:
            raise ValueError(f"batch_window is {self.batch_window!r}: give seconds, more than 0")
        for operation, kinds in self.batch_faults.items():
            if isinstance(kinds, str):
                raise ValueError(f"batch_faults of {operation!r} are {kinds!r}: give a list of kinds")
            for kind in kinds:
                parse_batch_fault(operation, kind)


def parse_fault(text: str) -> tuple[str, float]:
    """Read `KIND=RATE`, such as `429=0.05`; ValueError says what is wrong."""
    kind, separator, rate_text = text.partition("=")
    try:
        rate = float(rate_text)
    except ValueError:
        rate = None
    if not separator or rate is None:
        raise ValueError(f"fault {text!r}: write KIND=RATE, such as 429=0.05")
    _check_fault(kind, rate)
    return kind, rate


def _check_fault(kind: str, rate: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of fault {kind!r}: use one of {', '.join(KINDS)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"fault {kind!r} has the rate {rate!r}: give a share from 0 to 1")
