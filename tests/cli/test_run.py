"""The options of `pipeline run` as settings, and what it makes of several inputs."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.cli import main, run
from pipeline.cli.run import RunOptions
from pipeline.core import config


def _parsed(*words: str) -> RunOptions:
    """Return the options that the command gets for these words."""
    context = run.run.make_context("run", ["in.jsonl", *words])
    return RunOptions(**context.params)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("tags: {team: search}\noutput: {ordered: true}\nsending: {timeout: 7.0}\n")
    Path("in.jsonl").write_text("{}\n")


def test_options_become_settings() -> None:
    """Options replace what the file says, tags are added to it, and what is not given stays."""
    settings = _parsed(
        *("--provider", "openai", "--lane", "auto", "--deadline", "6h", "--tag", "user=me"),
        *("--max-tokens", "9", "--temperature", "0.5", "--system", "s"),
        *("--concurrency", "3", "--rpm", "4", "--input-tpm", "5", "--output-tpm", "6"),
        *("--format", "openai-batch", "--durability", "fast", "--echo-request", "--max-cost", "0.25"),
    ).settings()

    assert (settings.provider, settings.lane, settings.batches.deadline) == ("openai", "auto", 21_600.0)
    assert settings.tags == {"team": "search", "user": "me"}
    assert (settings.request.max_tokens, settings.request.temperature, settings.request.system) == (9, 0.5, "s")
    assert (settings.sending.concurrency, settings.sending.timeout) == (3, 7.0)
    assert (settings.limits.rpm, settings.limits.input_tpm, settings.limits.output_tpm) == (4, 5, 6)
    assert (settings.output.format, settings.output.durability) == ("openai-batch", "fast")
    assert (settings.output.ordered, settings.output.echo_request) == (True, True)
    assert settings.budget.per_run == Decimal("0.25")


def test_settings_are_validated_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is validated when it is loaded, and all options together once more; not once per option."""
    validated = []
    validate = config.Config.model_validate

    def count(*args: Any, **how: Any) -> config.Config:
        validated.append(args)
        return validate(*args, **how)

    monkeypatch.setattr(config.Config, "model_validate", count)

    _parsed("--lane", "auto", "--rpm", "4", "--timeout", "5", "--max-cost", "1", "--max-tokens", "9").settings()

    assert len(validated) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--deadline", "6h"], "--deadline requires --lane auto", id="deadline without auto"),
        pytest.param(["--no-wait", "--simulate"], "--no-wait does not work with --simulate", id="no-wait, simulated"),
        pytest.param(["--timeout", "-1", "--rpm", "0"], "sending.timeout", id="a wrong value"),
        pytest.param(["--timeout", "-1", "--rpm", "0"], "limits.rpm", id="another wrong value"),
    ],
)
def test_contradicting_options_are_usage_errors(words: list[str], message: str) -> None:
    """Options that do not fit together, and each wrong value, are named: exit 2, nothing is written."""
    done = CliRunner().invoke(main.main, ["run", "in.jsonl", *words])

    assert done.exit_code == 2
    assert message in done.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["config.yaml", "in.jsonl"]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        pytest.param([], 0, id="no inputs"),
        pytest.param([0, 1, 0], 1, id="failed lines"),
        pytest.param([1, 75, 0], 75, id="try again later"),
        pytest.param([75, 4, 6], 4, id="budget"),
        pytest.param([5, 2, 3], 2, id="usage"),
        pytest.param([2, 130], 130, id="interrupted"),
    ],
)
def test_the_most_urgent_exit_code_wins(codes: list[int], expected: int) -> None:
    """Of several inputs, the command exits with the code that needs attention most."""
    assert run._most_urgent(codes) == expected
