"""The page as text; what it does in a browser is in test_page."""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import date
from html.parser import HTMLParser
from importlib import resources

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.accounting.report import html
from pipeline.accounting.report.costs import CostReport
from tests.accounting.report.examples import HOSTILE, entry, report, two_months

# Of chart.js 4.6.1, dist/chart.umd.min.js, as the npm registry serves it.
CHART_JS = "87364cc2b2a76a6684929e7d6b80b18a897794db38400caff1fcf1791c6925d2"


class Reader(HTMLParser):
    """Collects elements, their attributes and their text."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[str] = [""]
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.tags[-1], []).append(data)


def data(page: bytes) -> dict[str, list[dict[str, list[float]]]]:
    found: dict[str, list[dict[str, list[float]]]] = orjson.loads(Reader(page).texts["script"][0])
    return found


def test_it_is_small() -> None:
    """60 days of six models make a page of less than 300 kB, library included."""
    assert len(html.render(two_months())) < 300_000


def test_the_chart_library_is_the_published_one() -> None:
    """The vendored library is byte for byte what its makers published, with their licence beside it."""
    assets = resources.files("pipeline.accounting.report") / "assets"

    assert hashlib.sha256((assets / "chart.umd.min.js").read_bytes()).hexdigest() == CHART_JS
    assert b"Chart.js v4.6.1" in (assets / "chart.umd.min.js").read_bytes()[:100]
    assert "The MIT License" in (assets / "chart.LICENSE.md").read_text()


def test_the_policy_names_the_scripts_by_hash() -> None:
    """Nothing is allowed but the page's own style and two scripts, each by the hash of what stands there."""
    page = html.render(two_months()).decode()

    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    blocks = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
    style, library, script = (f"&#x27;sha256-{each}&#x27;" for each in hashes)
    assert policy[1] == (
        f"default-src &#x27;none&#x27;; script-src {library} {script}; style-src {style}; img-src data:; "
        "base-uri &#x27;none&#x27;; form-action &#x27;none&#x27;"
    )


def test_it_names_no_address() -> None:
    """No attribute of the page leads anywhere, and there is no map of sources to ask for."""
    page = html.render(two_months())

    links = [value for name, value in Reader(page).attributes if name in ("src", "href", "action", "srcset")]
    assert links == ["data:,"]
    assert b"sourceMappingURL" not in page


@given(st.lists(st.one_of(st.text(), st.sampled_from(HOSTILE)), min_size=1, max_size=5))
def test_names_make_no_markup(names: list[str]) -> None:
    """Whatever models are called, the page has the same elements and attributes, and data that can be read."""
    harmless = html.render(report({"run-1": [entry(model=str(n)) for n in range(len(set(names)))]}))
    hostile = html.render(report({"run-1": [entry(model=name) for name in sorted(set(names))]}))

    assert Reader(hostile).tags == Reader(harmless).tags
    assert [name for name, _ in Reader(hostile).attributes] == [name for name, _ in Reader(harmless).attributes]
    assert len(data(hostile)["labels"]) == 1
    assert not set("<>&\u2028\u2029") & set(Reader(hostile).texts["script"][0])


@pytest.mark.parametrize(
    ("since", "first", "count"),
    [
        pytest.param(date(2026, 8, 19), "2026-08-19", 100, id="100 days by day"),
        pytest.param(date(2026, 8, 18), "2026-W34", 15, id="101 days by week"),
        pytest.param(date(2024, 11, 1), "2024-11", 25, id="more than two years by month"),
    ],
)
def test_long_periods_are_drawn_coarser(since: date, first: str, count: int) -> None:
    """Charts have at most about a hundred places along the time, without gaps."""
    labels: list[object] = list(data(html.render(report({"run-1": [entry()]}, since=since)))["labels"])

    assert (labels[0], len(labels)) == (first, count)


def many_models(count: int) -> CostReport:
    return report({"run-1": [entry(model=f"m{n:02}", cost_nano=n * 10**9, succeeded=1) for n in range(1, count + 1)]})


def test_the_many_share_a_color() -> None:
    """Of many models the eight that cost most have their own series and the rest one; nothing is left out."""
    series = data(html.render(many_models(20)))["cost"]

    assert [str(each["label"]) for each in series] == [*(f"openai/m{n}" for n in range(13, 21)), "others"]
    assert sum(each["data"][0] for each in series) == sum(range(1, 21))
    assert len(data(html.render(many_models(9)))["cost"]) == 9


def test_the_table_holds_every_row() -> None:
    """The rows of the grouping that was asked for are in the page itself, the total at the end."""
    made = two_months(by="week")
    keys = Reader(html.render(made)).texts["th"]

    assert [key for key in keys if key.startswith("2026-W") or key == "total"] == [
        *(row.key for row in made.rows),
        "total",
    ]
