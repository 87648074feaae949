"""`pipeline check`: plan every line, send nothing."""

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
    """Counts of the lines of some inputs: all, invalid, and by model."""

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
    """Plan every line of the inputs; `on_problem` gets `file:line: reason` for each invalid one.

    `today` (UTC; None: the current date) decides which models are retired; the report's `warnings` name them.
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
