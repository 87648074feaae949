"""Read rate-limit headers: how long to wait, the limits, and what remains of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime

from pipeline.core.types import Limit

_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[0-9]{1,15}")
_HTTP_DATE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait: `retry-after-ms`, else `retry-after` in seconds, else as an HTTP date.

    The result is finite and positive, but has no upper bound. Other values are ignored. A date counts from the
    response's own `date` header, because the provider's clock and ours may differ.
    """
    text = headers.get("retry-after", "").strip()
    return (
        _positive(_number(headers.get("retry-after-ms", "").strip()) / 1000)
        or _positive(_number(text))
        or _positive(_date(text) - _date(headers.get("date", "").strip()))
    )


def limits(headers: Mapping[str, str], names: Mapping[str, tuple[str, str]]) -> list[Limit]:
    """Return the rate limits in the headers. `names` maps a kind to the headers of its limit and its remainder.

    Limits that are absent, not whole numbers, or not positive (Azure sends -1 and 0 for unknown) are left out.
    """
    found = []
    for kind, (limit_name, remaining_name) in names.items():
        limit = headers.get(limit_name)
        if limit is None:
            continue
        remaining = headers.get(remaining_name, "")
        if _WHOLE.fullmatch(limit) and _WHOLE.fullmatch(remaining) and int(limit) > 0:
            found.append(Limit(kind=kind, per_minute=int(limit), remaining=min(int(remaining), int(limit))))
    return found


def _positive(seconds: float) -> float | None:
    return seconds if 0 < seconds < math.inf else None


def _number(text: str) -> float:
    return float(text) if _NUMBER.fullmatch(text) else math.nan


def _date(text: str) -> float:
    """Return the seconds since 1970 of an HTTP date (RFC 9110, its preferred form), NaN for anything else."""
    if not _HTTP_DATE.fullmatch(text):
        return math.nan
    try:
        moment: datetime = parsedate_to_datetime(text)
    except ValueError:
        return math.nan
    return moment.timestamp()
