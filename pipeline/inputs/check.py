"""`pipeline check`: every line planned, nothing sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from pipeline.core.clock import utc_now
from pipeline.core.config import Config
from pipeline.inputs import reader
from pipeline.inputs.planner import Invalid, Planner
from pipeline.inputs.retired_models import RetiredModels


@dataclass(slots=True)
class CheckReport:
    """What the lines of some inputs are: how many, how many invalid, and whom they go to."""

    lines: int = 0
    invalid: int = 0
    by_model: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "lines": self.lines,
            "invalid": self.invalid,
            "by_model": dict(self.by_model),
            "warnings": self.warnings,
        }


def check(
    inputs: Sequence[str],
    settings: Config,
    *,
    provider: str | None = None,
    model: str | None = None,
    today: date | None = None,
    on_problem: Callable[[str], None],
) -> CheckReport:
    """Plan every line of the inputs; `on_problem` hears `file:line: reason` of each that is not valid.

    `today` (UTC; None: the date of now) decides which models are retired; the report's `warnings` name them.
    """
    report = CheckReport()
    planner = Planner(settings, provider=provider, model=model)
    retired = RetiredModels(settings, model=model, today=today or utc_now().date())
    for source in reader.sources(inputs):
        for line in reader.lines(source, settings.input.max_line_bytes):
            item = planner.plan(line)
            report.lines += 1
            if isinstance(item, Invalid):
                report.invalid += 1
                on_problem(item.failure.message)
            else:
                report.by_model[f"{item.provider}/{item.model}"] += 1
                notice = retired.notice(line, item)
                if notice:
                    report.warnings.append(notice)
    return report
