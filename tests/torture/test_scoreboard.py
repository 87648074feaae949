"""The scoreboard: every form that it names is there, and a broken one is told."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.torture import scoreboard
from tests.torture.jobs import ROOT
from tests.torture.scoreboard import FORMS, Form


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_is_there(form: Form) -> None:
    """No row of the table can go on under a name that nothing bears any more."""
    module, *words = form.words
    assert find_spec(module)
    assert all((ROOT / word).exists() for word in words if word.endswith(".py"))


def test_a_broken_form_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ends with another exit code than 0 is broken, and so is the whole."""
    good = Form(name="good", what="nothing", words=["this"])
    monkeypatch.setattr(
        scoreboard, "FORMS", (good, Form(name="bad", what="a missing module", words=["no_such_module"]))
    )
    monkeypatch.setattr(sys, "argv", ["scoreboard", str(tmp_path)])

    assert scoreboard.main() == 1

    table = (tmp_path / "scoreboard.md").read_text()
    assert "| held |" in table
    assert "No module named no_such_module | **BROKEN** |" in table
    assert (tmp_path / "good.txt").read_text().startswith("The Zen of Python")
    assert table in capsys.readouterr().out
