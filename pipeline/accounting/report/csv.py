"""The report as CSV for spreadsheets, in which no text becomes a formula."""

from __future__ import annotations

import csv
import io
from typing import Any

from pipeline.accounting.report.costs import CostReport, Row

# What makes a spreadsheet compute (https://owasp.org/www-community/attacks/CSV_Injection), full-width forms included.
_ACTIVE = ("=", "+", "-", "@", "\t", "\r", "\n", "\0", "＝", "＋", "－", "＠")


def render(report: CostReport) -> bytes:
    """Return a line of names and one line for each row; numbers stay numbers, and an unknown value is empty."""
    file = io.StringIO()
    writer = csv.writer(file)  # ends lines as RFC 4180 says, and so quotes a lone return in a text
    writer.writerow(Row(key="").as_dict())
    for row in report.rows:
        writer.writerow([_cell(value) for value in row.as_dict().values()])
    return file.getvalue().encode()


def _cell(value: Any) -> Any:
    """Return a value for a cell; dollars without an exponent, which some programs read as text."""
    if isinstance(value, str):
        if value.startswith(_ACTIVE):
            return f"'{value}"
        return value
    if isinstance(value, float):
        return f"{value:.9f}".rstrip("0").rstrip(".")
    return value
