"""Options of one run, beside the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.core.errors import PipelineError

Ended = Mapping[tuple[str, str], PipelineError]
"""Why nothing more is sent to a model, by provider and model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a command adds to the configuration for one run.

    `provider` and `model` are for lines that do not say. `limit` takes the first lines only. `retry_failed` sends
    again what failed before; `fresh` sets earlier results aside. `dedupe` sends equal requests once and copies the
    result. `simulate` puts a simulator in the providers' place. `no_wait` leaves batches that go on to a later run.
    """

    provider: str | None = None
    model: str | None = None
    limit: int | None = None
    retry_failed: bool = False
    fresh: bool = False
    dedupe: bool = False
    simulate: bool = False
    no_wait: bool = False
