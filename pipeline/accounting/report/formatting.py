"""How figures are written for people: the table on the terminal and the page say the same."""

from __future__ import annotations

from pipeline.accounting.report.costs import UNTAGGED, CostReport, Row
from pipeline.core import money

UNKNOWN = "–"


def cost(row: Row) -> str:
    return money.text(row.cost_nano) if row.is_priced else UNKNOWN


def cost_per_1000(row: Row) -> str:
    dollars = row.cost_per_1000_usd
    return UNKNOWN if dollars is None else money.text(round(dollars * money.NANO))


def change(row: Row) -> str:
    """Return e.g. +12%, against the previous period."""
    if row.change is None:
        return UNKNOWN
    return f"{row.change:+.0%}" if row.change < 10 else f"×{row.change + 1:,.0f}"


def share(part: float | None) -> str:
    return UNKNOWN if part is None else f"{part:.0%}"


def short(count: int) -> str:
    """Return a number in at most five characters: 999, 1.2k, 35M."""
    number = float(count)
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.1f}{unit}" if unit and number < 9.95 else f"{number:.0f}{unit}"
        number /= 1_000
    return f"{number:.0f}P"


def heading(by: str) -> str:
    """Return what the first column holds."""
    return by.removeprefix("tag:")


def period(report: CostReport) -> str:
    """Return the period, and the one that it is compared with."""
    previous = report.period.previous()
    compared = f", compared with {previous.since} to {previous.until}" if previous else ""
    return f"{report.first_day} to {report.period.until} (UTC){compared}"


def comparison(row: Row) -> str:
    """Say what was spent in the previous period; empty where there is nothing to compare with."""
    if row.previous_cost_nano is None:
        return ""
    return f"{money.text(row.previous_cost_nano)} before" + (f" ({change(row)})" if row.change is not None else "")


def caveats(report: CostReport) -> list[str]:
    """Say what the figures do not hold, and what they hold that is not real."""
    row = report.total
    said = []
    if not row.requests:
        said.append("nothing is recorded in this period")
    if row.unpriced:
        said.append(f"{row.unpriced:,} answers have no known price: costs are higher than shown")
    if row.unknown:
        said.append(
            f"{row.unknown:,} calls brought no answer but may be billed; their cost is unknown and not included"
        )
    if report.has_simulated:
        said.append("simulated runs are included; they cost nothing")
    if report.by.startswith("tag:") and any(each.key == UNTAGGED for each in report.rows):
        said.append(f"{UNTAGGED}: runs without this tag")
    return said
