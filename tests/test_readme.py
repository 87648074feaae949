"""What CI runs first are the README's own commands."""

from __future__ import annotations

import re

import pytest

from tests import readme

CI = readme.README.parent / ".ci" / "run"
SAMPLE = "# title\n\n## Try it\n\n```text\nno\n```\n\n```bash\none\n```\n\n```bash\ntwo\n```\n\n## Tests\n\nnone\n"


def test_the_readme_has_a_command_to_try_and_one_to_test() -> None:
    """A stranger types one line for each, and both start from nothing."""
    for section in (readme.TRY, readme.TEST):
        assert "\n" not in readme.command(section)
        assert readme.command(section).startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert " --simulate" in readme.command(readme.TRY)
    assert readme.command(readme.TEST).endswith(" && .venv/bin/python -m pytest")


def test_ci_runs_these_two_and_writes_neither_itself() -> None:
    """CI takes both from the README, in this order, so the two cannot differ."""
    script = CI.read_text(encoding="utf-8")

    assert re.findall(r'python3 -m tests\.readme "([^"]+)"', script) == [readme.TRY, readme.TEST]
    assert "samples/conversations.jsonl" not in script


def test_the_first_block_of_the_section_counts() -> None:
    """Other blocks of the section, and those of other sections, are not the command."""
    assert readme.command("Try it", SAMPLE) == "one"


@pytest.mark.parametrize("section", ["Tests", "Try"])
def test_a_missing_section_or_block_is_an_error(section: str) -> None:
    """CI stops instead of running nothing."""
    with pytest.raises(LookupError, match=section):
        readme.command(section, SAMPLE)
