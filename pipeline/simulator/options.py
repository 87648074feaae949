"""What a simulated provider should be like."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.simulator.faults import KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The settings of one simulator.

    All limits are per minute and hold for each pair of key and model; None is no limit. For OpenAI
    `input_tpm` is its one limit of tokens and `output_tpm` is not used. A bucket holds one minute's worth;
    `burst` sets that of requests. `latency` is the mean in seconds. `faults` maps a kind to the share of
    requests that it strikes. `keys` None accepts any key. `cache_ratio` is the share of the prompts of 1,024
    tokens and more that are read from the cache. `rate_headers=False` is a server that does not tell its
    limits, as vLLM. `journal` keeps the last million answered requests for `GET /simulator/journal`.
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

    def __post_init__(self) -> None:
        for name in ("rpm", "input_tpm", "output_tpm", "burst"):
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
