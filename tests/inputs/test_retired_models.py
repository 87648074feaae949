"""Warnings about retired models: once for each model, with the line, option or setting that names it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import orjson
import pytest

from pipeline.core.config import Config
from pipeline.inputs.check import CheckReport, check

TODAY = date(2026, 12, 1)
USER = {"role": "user", "content": "hi"}
OLD = "claude-3-5-sonnet-20241022"
NATIVE: dict[str, Any] = {"messages": [USER]}
CURRENT = {**NATIVE, "model": "claude-haiku-5-5"}
OPENAI_BATCH = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "gpt-4o-2024-08-06", "messages": [USER]},
}
ANTHROPIC_BATCH = {"custom_id": "b", "params": {"model": OLD, "max_tokens": 9, "messages": [USER]}}


def checked(
    folder: Path, *lines: Mapping[str, Any], settings: Config | None = None, **options: Any
) -> tuple[str, CheckReport]:
    source = folder / "in.jsonl"
    source.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    report = check([str(source)], settings or Config(), today=TODAY, on_problem=pytest.fail, **options)
    return str(source), report


@pytest.mark.parametrize(
    ("line", "words"),
    [
        pytest.param({**NATIVE, "model": OLD}, [OLD, "was retired on 2025-10-28", "claude-sonnet-5-5"], id="native"),
        pytest.param(OPENAI_BATCH, ["gpt-4o-2024-08-06", "will be retired on 2027-01-14", "gpt-6-luna"], id="OpenAI"),
        pytest.param(ANTHROPIC_BATCH, [OLD, "was retired on 2025-10-28"], id="Anthropic"),
    ],
)
def test_a_line_that_names_a_retired_model(line: Mapping[str, Any], words: list[str], tmp_path: Path) -> None:
    """In every dialect the first line that names the model is given, once, and the line stays valid."""
    source, report = checked(tmp_path, CURRENT, line, {**line, "custom_id": "again"})

    (warning,) = report.warnings
    assert warning.startswith(f"{source}:2: model ")
    assert all(word in warning for word in words)
    assert (report.lines, report.invalid, report.as_dict()["warnings"]) == (3, 0, [warning])


@pytest.mark.parametrize(
    ("settings", "model", "place"),
    [
        pytest.param({}, OLD, "option --model", id="option"),
        pytest.param({"request": {"model": OLD}}, None, "setting request.model", id="request.model"),
        pytest.param({"providers": {"anthropic": {"model": OLD}}}, None, "setting providers.anthropic.model", id="own"),
    ],
)
def test_a_setting_that_names_a_retired_model(
    settings: dict[str, Any], model: str | None, place: str, tmp_path: Path
) -> None:
    """Where no line names the model, the option or setting that does is given, and the first line that uses it."""
    source, report = checked(tmp_path, CURRENT, NATIVE, NATIVE, settings=Config.model_validate(settings), model=model)

    (warning,) = report.warnings
    assert warning.startswith(f"{place}: model '{OLD}'")
    assert f"first used by {source}:2" in warning


def test_a_line_wins_over_the_option(tmp_path: Path) -> None:
    """A line that names the same model as --model is itself the place to change."""
    source, report = checked(tmp_path, {**NATIVE, "model": OLD}, model=OLD)

    assert [warning.split(": ")[0] for warning in report.warnings] == [f"{source}:1"]


def test_each_model_is_reported_once(tmp_path: Path) -> None:
    """Two retired models are two warnings, however many lines use them."""
    lines = [{**NATIVE, "model": name} for name in (OLD, "gpt-4", OLD, "gpt-4", "claude-haiku-5-5")]
    _, report = checked(tmp_path, *lines)

    assert len(report.warnings) == 2
