"""What becomes of a test whose tool is missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import tools
from tests.tools import Tool

ABSENT = {
    "hammer": Tool(is_here=lambda: False, how_to_get="apt-get install hammer"),
    "wings": Tool(is_here=lambda: False, how_to_get="being a bird", is_right=True),
    "paper": Tool(is_here=lambda: True, how_to_get="apt-get install paper"),
}


@pytest.fixture(autouse=True)
def _absent_tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tools, "_TOOLS", ABSENT)
    tools._is_here.cache_clear()
    yield
    tools._is_here.cache_clear()


def test_a_test_without_its_tool_is_skipped_and_names_it() -> None:
    """The reason for the skip names the missing tool and how to get it."""
    with pytest.raises(pytest.skip.Exception, match=r"^needs hammer: apt-get install hammer$"):
        tools.require("paper", "hammer", is_strict=False)


def test_a_test_that_has_its_tools_runs() -> None:
    """Nothing is skipped where every tool is here."""
    tools.require("paper", is_strict=True)


def test_where_tools_are_required_a_missing_one_fails_the_test() -> None:
    """CI cannot lose tests because a tool was not installed."""
    with pytest.raises(pytest.fail.Exception, match="needs hammer"):
        tools.require("hammer", is_strict=True)


def test_a_right_that_is_missing_is_a_skip_everywhere() -> None:
    """A right, such as mounting, cannot be installed, so its absence fails no test even in CI."""
    with pytest.raises(pytest.skip.Exception, match="needs wings"):
        tools.require("wings", is_strict=True)
