"""`pipeline check`: every line planned, nothing sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.config import Config
from pipeline.inputs import reader
from pipeline.inputs.planner import Invalid, Planner


@dataclass(slots=True)
class CheckReport:
    """What the lines of some inputs are: how many, how many invalid, and whom they go to."""

    lines: int = 0
    invalid: int = 0
    by_model: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        return {"lines": self.lines, "invalid": self.invalid, "by_model": dict(self.by_model)}


def check(
    inputs: Sequence[str],
    settings: Config,
    *,
    provider: str | None = None,
    model: str | None = None,
    on_problem: Callable[[str], None],
) -> CheckReport:
    """Plan every line of the inputs; `on_problem` hears `file:line: reason` of each that is not valid."""
    report = CheckReport()
    planner = Planner(settings, provider=provider, model=model)
    for source in reader.sources(inputs):
        for line in reader.lines(source, settings.input.max_line_bytes):
            item = planner.plan(line)
            report.lines += 1
            if isinstance(item, Invalid):
                report.invalid += 1
                on_problem(item.failure.message)
            else:
                report.by_model[f"{item.provider}/{item.model}"] += 1
    return report
