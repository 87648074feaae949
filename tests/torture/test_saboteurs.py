"""The tests of the tests: defects that are planted are caught."""

from __future__ import annotations

import pytest

from tests.tools import needs
from tests.torture.jobs import ROOT
from tests.torture.saboteurs import SABOTEURS, Saboteur, is_caught

pytestmark = pytest.mark.timeout(300)
BY_NAME = {each.name: each for each in SABOTEURS}


@pytest.mark.parametrize("saboteur", SABOTEURS, ids=lambda each: each.name)
def test_every_defect_can_still_be_planted(saboteur: Saboteur) -> None:
    """The code that a defect changes is there, and so is the test that catches it."""
    file, *name = saboteur.test.split("::")

    assert (ROOT / "pipeline" / saboteur.file).read_text().count(saboteur.old) == 1
    assert not name or f"def {name[0]}(" in (ROOT / file).read_text()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("results are not synced", marks=[pytest.mark.slow, needs("strace", "tracing")]),
        pytest.param("intents are not synced", marks=[pytest.mark.slow, needs("strace", "tracing")]),
        pytest.param("a torn tail is not repaired", marks=pytest.mark.slow),
        "retry-after is ignored",
    ],
)
def test_a_planted_defect_is_caught(name: str) -> None:
    """The test that is named for a defect fails with it. All of them: `python -m tests.torture.saboteurs`."""
    assert is_caught(BY_NAME[name])


@pytest.mark.slow
@needs("mkfs.ext4", "loop devices")
def test_the_power_cut_can_fail() -> None:
    """Without syncing, cutting the power undoes what was reported: the test above it has teeth.

    Not at every moment: on a busy machine the kernel may have written all by itself before the cut.
    """
    assert any(is_caught(BY_NAME["results are not synced, and the power fails"]) for _ in range(3))
