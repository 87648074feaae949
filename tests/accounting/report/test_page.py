"""The page in a real browser: what it draws, what it lets through, what a user can do with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.accounting.report import html
from tests.accounting.report.browser import Page, browsing
from tests.accounting.report.examples import HOSTILE, entry, report, run, two_months
from tests.tools import needs

pytestmark = needs("chromium")
CHARTS = ["cost", "tokens", "cached", "trouble", "per1000"]
ROW_KEYS = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent)"
ROW_COSTS = "[...document.querySelectorAll('tbody tr')].map(row => Number(row.cells[1].dataset.value))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    browser.messages.clear()
    browser.requests.clear()
    browser.refused.clear()
    browser.show(width=1280, height=900)
    return browser


def opened(page: Page, content: bytes, folder: Path) -> str:
    """Open a report and return its address."""
    file = folder / "report.html"
    file.write_bytes(content)
    page.open(file.as_uri())
    return file.as_uri()


COLORS_DRAWN = """(id => {
    const canvas = document.getElementById(id);
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer;
    return new Set(new Uint32Array(pixels)).size;
})"""


def test_it_works_alone(page: Page, tmp_path: Path) -> None:
    """60 days of six models: every chart is drawn, nothing else is asked for, and the console stays silent."""
    address = opened(page, html.render(two_months()), tmp_path)

    drawn = page.evaluate(f"{CHARTS}.map({COLORS_DRAWN})")
    series = page.evaluate(f"{CHARTS}.map(id => Chart.getChart(id).data.datasets.length)")
    assert min(drawn) > 5, drawn
    assert series == [6, 5, 1, 5, 6]
    assert page.evaluate("Chart.getChart('cost').data.labels.length") == 60
    assert [url for url in page.requests if url not in (address, "data:,")] == []
    assert page.messages == []


def test_columns_sort(page: Page, tmp_path: Path) -> None:
    """A click on a heading sorts by its figures, the next one turns the order round, and the keyboard does the same."""
    opened(page, html.render(two_months()), tmp_path)
    costs = page.evaluate(ROW_COSTS)
    assert costs == sorted(costs, reverse=True)

    page.click("thead th:nth-child(2) button")
    assert page.evaluate(ROW_COSTS) == sorted(costs)
    assert page.evaluate("document.querySelector('th:nth-child(2)').ariaSort") == "ascending"

    page.evaluate("document.querySelector('thead th:first-child button').focus()")
    page.press("Enter", "Enter", "\r")
    keys = page.evaluate(ROW_KEYS)
    assert keys == sorted(keys)
    page.press(" ", "Space", " ")
    assert page.evaluate(ROW_KEYS) == sorted(keys, reverse=True)
    assert page.evaluate("document.querySelectorAll('[aria-sort]').length") == 1


@pytest.mark.parametrize("by", ["model", "tag:team"])
def test_hostile_names_stay_text(page: Page, tmp_path: Path, by: str) -> None:
    """Names of models and tags that are markup, script or handlers are shown as they are, and nothing of them acts."""
    entries = {f"run-{n}": [entry(model=name, cost_nano=n, requests=1, succeeded=1)] for n, name in enumerate(HOSTILE)}
    runs = [run(f"run-{n}", tags={"team": name}) for n, name in enumerate(HOSTILE)]
    address = opened(page, html.render(report(entries, runs, by=by)), tmp_path)

    shown = page.evaluate(ROW_KEYS)
    assert len(shown) == len(HOSTILE)
    assert all(any(name in key for key in shown) for name in HOSTILE[:7])
    page.click("thead th:first-child button")
    page.evaluate("document.querySelectorAll('*').forEach(e => e.dispatchEvent(new MouseEvent('mouseover')))")
    assert page.evaluate("document.title") == "Cost report, 2026-11-26 to 2026-11-26"
    assert page.evaluate("document.scripts.length") == 3
    assert page.evaluate("document.images.length") == 0
    assert [url for url in page.requests if url not in (address, "data:,")] == []
    assert page.messages == []


def test_the_policy_lets_nothing_else_act(page: Page, tmp_path: Path) -> None:
    """Even markup that had slipped into the page could run no script, load no picture and contact no server."""
    slipped = b"<script>document.title='owned'</script><img src='https://127.0.0.1:9/x'><body onload='x()'>"
    content = html.render(two_months()).replace(b"<footer>", slipped + b"<footer>")
    address = opened(page, content, tmp_path)

    assert page.evaluate("fetch('https://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert page.evaluate("document.title").startswith("Cost report")
    assert [url for url in page.requests if url not in (address, "data:,")] == []
    assert page.refused == ["https://127.0.0.1:9/x"]
    assert any("Content Security Policy" in message for message in page.messages)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_system_and_the_button(page: Page, tmp_path: Path, scheme: str) -> None:
    """The page takes the system's colour scheme, and the button the other one; charts go along."""
    page.show(width=1280, height=900, scheme=scheme)
    opened(page, html.render(two_months()), tmp_path)
    paper, ink = _colors(page)
    assert (sum(paper) < sum(ink)) == (scheme == "dark")
    assert page.evaluate("Chart.getChart('cost').options.plugins.legend.labels.color") == _css(ink)

    page.click("#theme")

    paper, ink = _colors(page)
    assert (sum(paper) < sum(ink)) == (scheme == "light")
    assert page.evaluate("Chart.getChart('cost').options.plugins.legend.labels.color") == _css(ink)


def _colors(page: Page) -> tuple[list[int], list[int]]:
    """Return background and text colour of the page as red, green and blue."""
    style = "getComputedStyle(document.body)"
    read = ".match(/\\d+/g).slice(0, 3).map(Number)"
    found: Any = page.evaluate(f"[{style}.backgroundColor{read}, {style}.color{read}]")
    return found[0], found[1]


def _css(color: list[int]) -> str:
    return f"rgb({', '.join(map(str, color))})"


def test_it_fits_a_phone(page: Page, tmp_path: Path) -> None:
    """On a phone the page does not scroll sideways (the table does, in itself), and charts stand below each other."""
    page.show(width=360, height=740, is_phone=True)
    opened(page, html.render(two_months(models=[f"model-with-a-very-long-name-{n}" for n in range(6)])), tmp_path)

    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("Math.max(...[...document.querySelectorAll('canvas')].map(c => c.offsetWidth))") < 360
    assert page.evaluate("new Set([...document.querySelectorAll('figure')].map(f => f.offsetLeft)).size") == 1
    assert page.evaluate("(e => e.scrollWidth > e.clientWidth)(document.querySelector('.scroll'))")


def test_without_scripts_the_table_holds_all(page: Page, tmp_path: Path) -> None:
    """With scripts turned off there are figures and table, a word about the charts, and no empty frames."""
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        opened(page, html.render(two_months()), tmp_path)

        assert len(page.evaluate(ROW_KEYS)) == 6
        assert page.evaluate("document.getElementById('charts').offsetHeight") == 0
        assert "scripts" in page.evaluate("document.querySelector('noscript').innerText")
        assert page.evaluate("document.getElementById('theme').offsetHeight") == 0
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)


def test_an_empty_report_is_a_page_too(page: Page, tmp_path: Path) -> None:
    """A period without runs says so, and nothing breaks."""
    opened(page, html.render(report({})), tmp_path)

    assert "nothing is recorded" in page.evaluate("document.body.innerText")
    assert page.messages == []
