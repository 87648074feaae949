"""The report as one page that works alone: styles, scripts and data inside, nothing from the network.

Chart.js draws: 210 kB, MIT, with stacked bars, tooltips and legends of its own. plotly.js is 1.2 to 4.9 MB, and uPlot
(50 kB) leaves stacking and tooltips to the page. It is vendored unmodified (`assets/`), so no package is needed.

Names of models and tags are text from outside. Elements are made by `_element`, which escapes; data go into the page as
JSON in which no character can end the script; and the policy allows the two scripts and the style by hash and nothing
else, so that even markup that slipped through could not act or call out. Without scripts the table holds all figures.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Callable
from importlib import resources
from typing import Any

import orjson

from pipeline.accounting.ledger import Entry, RunRow
from pipeline.accounting.report import formatting
from pipeline.accounting.report.costs import TIMES, CostReport, Row, buckets, grouped, key_of
from pipeline.core import money
from pipeline.core import text as safe

_SERIES = 8  # models with a colour of their own; the others are one
_OTHERS = "others"
_LABEL_CHARACTERS = 40
_KEY_CHARACTERS = 200
_DAYS_BY_DAY = 100  # longer periods are drawn by week, and then by month
_DAYS_BY_WEEK = 731
_SCRIPT_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_CHARTS = (
    ("cost", "Cost", "by model"),
    ("tokens", "Tokens", "as the providers counted them"),
    ("cached", "Cache", "part of the input tokens that came from the cache"),
    ("trouble", "Failures and retries", "calls, and what the wasted ones cost"),
    ("per1000", "Cost per 1,000 requests", "by model"),
)


class Markup(str):
    """A text that is HTML already."""

    __slots__ = ()


def render(report: CostReport) -> bytes:
    """Return the page."""
    library = _asset("chart.umd.min.js").partition("//# sourceMappingURL")[0]  # there is no map to ask for
    script, style = _asset("page.js"), _asset("page.css")
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    title = f"Cost report, {report.first_day} to {report.period.until}"
    head = _element(
        "head",
        _element("meta", charset="utf-8"),
        _element("meta", http_equiv="Content-Security-Policy", content=policy),
        _element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _element("meta", name="referrer", content="no-referrer"),
        _element("title", title),
        _element("link", rel="icon", href="data:,"),
        _element("style", Markup(style)),
    )
    body = _element(
        "body",
        _header(report),
        *(_element("p", text, class_="note") for text in formatting.caveats(report)),
        _tiles(report),
        _charts(),
        _table(report),
        _element("footer", f"Made {report.generated_at} by pipeline report. Days are UTC. Charts: Chart.js (MIT)."),
        _element("script", Markup(_json(_data(report))), type="application/json", id="data"),
        _element("script", Markup(library)),
        _element("script", Markup(script)),
    )
    page = f"<!doctype html>\n{_element('html', head, body, lang='en')}\n"
    return page.encode("utf-8", "backslashreplace")


# ── parts of the page ─────────────────────────────────────────────────────────────────────────────────────────────


def _header(report: CostReport) -> Markup:
    return _element(
        "header",
        _element("h1", "Cost report"),
        _element("p", formatting.period(report)),
        _element("button", "Dark", id="theme", type="button", hidden=""),
    )


def _tiles(report: CostReport) -> Markup:
    row = report.total
    tiles = (
        ("Cost", formatting.cost(row), formatting.comparison(row)),
        (
            "Tokens",
            formatting.short(row.total_tokens),
            f"{formatting.short(row.input_tokens)} in, {formatting.short(row.output_tokens)} out",
        ),
        ("Requests", formatting.short(row.requests), f"{formatting.cost_per_1000(row)} per 1,000"),
        (
            "Failures",
            formatting.short(row.failed),
            f"{formatting.short(row.rate_limited + row.failed_attempts)} calls failed or refused",
        ),
        ("Saved by cache", money.text(row.saved_nano), f"{formatting.share(row.cache_share)} of input from the cache"),
        ("Wasted", money.text(row.wasted_nano), f"{row.unknown:,} more calls may be billed"),
    )
    return _element(
        "dl",
        *(
            _element("div", _element("dt", name), _element("dd", _element("strong", value), _element("small", more)))
            for name, value, more in tiles
        ),
        class_="tiles",
    )


def _charts() -> Markup:
    figure_elements = (
        _element(
            "figure",
            _element("figcaption", _element("h2", title), _element("p", text)),
            _element("div", _element("canvas", id=name, role="img", aria_label=f"{title}, {text}"), class_="chart"),
        )
        for name, title, text in _CHARTS
    )
    without = _element("noscript", _element("p", "Charts need scripts; the table holds all figures.", class_="note"))
    return Markup(without + _element("section", *figure_elements, class_="charts", id="charts", hidden=""))


def _table(report: CostReport) -> Markup:
    first = formatting.heading(report.by)
    names = _cells(report.total, report)
    heading = "descending" if report.by not in (*TIMES, "run") else None
    head = _element(
        "tr",
        _element("th", safe.escape(first, _KEY_CHARACTERS), scope="col"),
        *(
            _element("th", name, scope="col", **({"aria_sort": heading} if heading and name == "cost" else {}))
            for name in names
        ),
    )
    table = _element(
        "table",
        _element("thead", head),
        _element("tbody", *(_row(row, report) for row in report.rows)),
        _element("tfoot", _row(report.total, report)),
    )
    title = f"By {safe.escape(report.by, _KEY_CHARACTERS)}"
    return _element(
        "section",
        _element("h2", title),
        _element("div", table, class_="scroll", role="region", aria_label=title, tabindex="0"),
        class_="table",
    )


def _row(row: Row, report: CostReport) -> Markup:
    key = safe.escape(row.key, _KEY_CHARACTERS)
    cells = [
        _element("td", text, data_value=f"{value:.12g}", **_direction(name, value))
        for name, (text, value) in _cells(row, report).items()
    ]
    return _element("tr", _element("th", key, scope="row", title=key), *cells)


def _direction(name: str, value: float) -> dict[str, str]:
    """Return the class of a change worth a colour."""
    if name != "change" or abs(value) < 0.01:
        return {}
    if value > 0:
        return {"class_": "more"}
    return {"class_": "less"}


def _cells(row: Row, report: CostReport) -> dict[str, tuple[str, float]]:
    """Return the figures of a row: what is shown, and the number to sort by."""
    cells: dict[str, tuple[str, float]] = {"cost": (formatting.cost(row), row.cost_nano if row.is_priced else -1)}
    if report.total.previous_cost_nano is not None or report.by in TIMES:
        before = row.previous_cost_nano
        if before is None:
            cells["before"] = (formatting.UNKNOWN, -1)
        else:
            cells["before"] = (money.text(before), before)
        cells["change"] = (formatting.change(row), row.change or 0)
    per_1000 = row.cost_per_1000_usd
    return cells | {
        "requests": (f"{row.requests:,}", row.requests),
        "failed": (f"{row.failed:,}", row.failed),
        "input tokens": (f"{row.input_tokens:,}", row.input_tokens),
        "cached": (formatting.share(row.cache_share), row.cache_share or 0),
        "output tokens": (f"{row.output_tokens:,}", row.output_tokens),
        "reasoning": (f"{row.reasoning_tokens:,}", row.reasoning_tokens),
        "per 1,000": (formatting.cost_per_1000(row), -1 if per_1000 is None else per_1000),
        "saved": (money.text(row.saved_nano), row.saved_nano),
        "wasted": (money.text(row.wasted_nano), row.wasted_nano),
        "calls": (f"{row.attempts:,}", row.attempts),
        "refused": (f"{row.rate_limited:,}", row.rate_limited),
        "failed calls": (f"{row.failed_attempts:,}", row.failed_attempts),
        "maybe billed": (f"{row.unknown:,}", row.unknown),
        "unpriced": (f"{row.unpriced:,}", row.unpriced),
        "runs": (f"{row.runs:,}", row.runs),
    }


# ── data of the charts ────────────────────────────────────────────────────────────────────────────────────────────


def _data(report: CostReport) -> dict[str, Any]:
    """Return what the charts show: labels along the time, and series of numbers as long."""
    days = (report.period.until - report.first_day).days + 1
    if days <= _DAYS_BY_DAY:
        by = "day"
    elif days <= _DAYS_BY_WEEK:
        by = "week"
    else:
        by = "month"
    labels = list(buckets(by, report.first_day, report.period.until))
    time = key_of(by)
    model = _few_models(report)
    by_time = grouped(report.entries, report.runs, time)
    cells = grouped(report.entries, report.runs, lambda run, entry: (time(run, entry), model(run, entry)))
    models = list(dict.fromkeys(name for _, name in sorted(cells, key=lambda cell: (cell[1] == _OTHERS, cell[1]))))
    priced = {name for (_, name), row in cells.items() if row.cost_nano}
    models = [name for name in models if name in priced] or models
    empty = Row(key="")

    def series(label: str, value: Callable[[Row], float | None]) -> dict[str, Any]:
        return {"label": label, "data": [value(by_time.get(name, empty)) for name in labels]}

    def of_model(label: str, value: Callable[[Row], float | None]) -> dict[str, Any]:
        return {"label": label, "data": [value(cells.get((name, label), empty)) for name in labels]}

    return {
        "labels": labels,
        "cost": [of_model(name, lambda row: money.dollars(row.cost_nano)) for name in models],
        "tokens": [
            series("input", lambda row: row.input_tokens - row.cache_read_tokens - row.cache_write_tokens),
            series("read from cache", lambda row: row.cache_read_tokens),
            series("written to cache", lambda row: row.cache_write_tokens),
            series("output", lambda row: row.output_tokens - row.reasoning_tokens),
            series("reasoning", lambda row: row.reasoning_tokens),
        ],
        "cached": [
            series("from cache", lambda row: None if row.cache_share is None else round(row.cache_share * 100, 1))
        ],
        "trouble": [
            series("failed requests", lambda row: row.failed),
            series("failed calls", lambda row: row.failed_attempts),
            series("refused (429)", lambda row: row.rate_limited),
            series("maybe billed", lambda row: row.unknown),
        ],
        "wasted": [series("wasted", lambda row: money.dollars(row.wasted_nano))],
        "per1000": [of_model(name, lambda row: row.cost_per_1000_usd) for name in models],
    }


def _few_models(report: CostReport) -> Callable[[RunRow, Entry], str]:
    """Return what tells the series of an entry: its model where that is among the most used, else the others."""
    name = key_of("model")
    used = grouped(report.entries, report.runs, name)
    first = sorted(used, key=lambda each: (-used[each].cost_nano, -used[each].total_tokens, each))
    if len(first) > _SERIES + 1:
        first = first[:_SERIES]
    labels = {each: safe.escape(each, _LABEL_CHARACTERS) for each in first}
    return lambda run, entry: labels.get(name(run, entry), _OTHERS)


# ── markup ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _element(name: str, /, *content: str, **attributes: str) -> Markup:
    """Return an element; a text in it is escaped unless it is markup that was made here.

    `class_` and `aria_label` stand for the attributes `class` and `aria-label`.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items()
    )
    inside = "".join(each if isinstance(each, Markup) else html.escape(each) for each in content)
    return Markup(f"<{name}{written}>{inside}" + ("" if name in ("meta", "link") else f"</{name}>"))


def _json(value: Any) -> str:
    """Return JSON that is inert inside a script element, whatever its texts hold."""
    text = orjson.dumps(value).decode()
    for character, escape in _SCRIPT_ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text("utf-8")
