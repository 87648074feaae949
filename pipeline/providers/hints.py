"""How long a provider asks to wait, read from the headers of an answer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime

_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_HTTP_DATE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait: `retry-after-ms`, else `retry-after` in seconds, else as an HTTP date.

    The result is finite and positive, but has no ceiling; a hint that is not is no hint. A date counts from
    the answer's own `date` header: the provider's clock and ours need not agree.
    """
    text = headers.get("retry-after", "").strip()
    return (
        _positive(_number(headers.get("retry-after-ms", "").strip()) / 1000)
        or _positive(_number(text))
        or _positive(_date(text) - _date(headers.get("date", "").strip()))
    )


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
