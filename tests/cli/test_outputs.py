"""Which results file belongs to which inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli.outputs import OutputTarget, output_targets
from pipeline.core.errors import UsageError


@pytest.fixture(autouse=True)
def _inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two inputs, and a third with the name of the first, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    for name in ("data/a.jsonl", "data/b.jsonl", "more/a.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}\n")


def _names(targets: list[OutputTarget]) -> dict[str, list[str]]:
    return {target.output: list(target.inputs) for target in targets}


def test_one_output_holds_the_results_of_all_inputs() -> None:
    """-o: one results file for all inputs, which is itself never an input."""
    Path("data/answers.jsonl").write_text("{}\n")

    targets = output_targets(["data"], "data/answers.jsonl", None)

    assert _names(targets) == {"data/answers.jsonl": ["data/a.jsonl", "data/b.jsonl"]}


def test_a_directory_holds_one_results_file_per_input() -> None:
    """-d: the directory is created, for its owner only."""
    targets = output_targets(["data"], None, "out/today")

    assert _names(targets) == {
        "out/today/a.results.jsonl": ["data/a.jsonl"],
        "out/today/b.results.jsonl": ["data/b.jsonl"],
    }
    assert Path("out/today").stat().st_mode & 0o777 == 0o700


def test_without_an_option_results_are_beside_a_single_input() -> None:
    """The default is NAME.results.jsonl in the directory of the input."""
    assert _names(output_targets(["data/a.jsonl"], None, None)) == {"data/a.results.jsonl": ["data/a.jsonl"]}


def test_an_empty_directory_of_inputs_has_no_targets() -> None:
    """A drop folder without files is not an error."""
    Path("empty").mkdir()

    assert output_targets(["empty"], None, "out") == []


def test_results_of_an_object_store_are_in_a_folder_per_input() -> None:
    """-d with a URL names folders in the object store and creates nothing on this machine."""
    targets = output_targets(["data"], None, "s3://bucket/out/")

    assert list(_names(targets)) == ["s3://bucket/out/a.results/", "s3://bucket/out/b.results/"]
    assert sorted(path.name for path in Path().iterdir()) == ["data", "more"]


@pytest.mark.parametrize(
    ("inputs", "output", "directory", "message"),
    [
        pytest.param(["data"], "o.jsonl", "out", "not both", id="-o and -d"),
        pytest.param(["data"], None, None, "say where results go", id="several inputs"),
        pytest.param(["-"], None, None, "say where results go", id="stdin"),
        pytest.param(["data", "more"], None, "out", "two inputs would write 'out/a.results.jsonl'", id="same name"),
        pytest.param(["data"], None, "data/a.jsonl", "cannot create the directory 'data/a.jsonl'", id="a file"),
    ],
)
def test_unclear_outputs_are_usage_errors(
    inputs: list[str], output: str | None, directory: str | None, message: str
) -> None:
    """If it is not clear where results go, the error says so, and nothing is created."""
    with pytest.raises(UsageError, match=message):
        output_targets(inputs, output, directory)

    assert sorted(path.name for path in Path().iterdir()) == ["data", "more"]
