"""`pipeline check`: validate the input and send nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from pipeline.cli import console
from pipeline.cli.options import (
    Command,
    Heading,
    InputOptions,
    config_option,
    inputs_argument,
    model_option,
    option,
    pass_options,
    provider_option,
)

if TYPE_CHECKING:
    from pipeline.inputs.check import CheckReport


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions(InputOptions):
    """The options of `pipeline check`."""

    as_json: bool


@click.command(cls=Command, epilog="Example: pipeline check questions.jsonl")
@inputs_argument
@config_option
@provider_option
@model_option
@option("--json", "as_json", heading=Heading.OUTPUT, is_flag=True, help="Print the counts as JSON on stdout.")
@pass_options(CheckOptions)
def check(options: CheckOptions) -> None:
    """Validate every line of INPUT without sending anything.

    Exit codes: 0 all lines are valid · 1 some are not · 2 usage error.
    """
    console.exit_with_errors(lambda: _check(options))


def _check(options: CheckOptions) -> int:
    from pipeline.core import config_file, text
    from pipeline.inputs import check

    settings = config_file.load(options.config_path).replace(provider=options.provider)
    stderr = console.stderr_console()

    def print_problem(problem: str) -> None:
        # Invalid lines are what the command was asked for: they go to stdout, unless JSON does.
        if options.as_json:
            stderr.emit("failure", problem)
        else:
            print(text.escape(problem))

    report = check.check(
        options.inputs, settings, provider=options.provider, model=options.model, on_problem=print_problem
    )
    for warning in report.warnings:
        stderr.emit("warning", warning)
    if options.as_json:
        console.print_json([report.as_dict()])
    else:
        _print_counts(stderr, report)
    return 1 if report.invalid else 0


def _print_counts(stderr: console.Console, report: CheckReport) -> None:
    for name, count in report.by_model.items():
        stderr.emit("message", f"{count:,} × {name}")
    counts = f"{report.lines:,} lines, {report.invalid:,} invalid"
    if report.warnings:
        counts += f", {len(report.warnings):,} warning(s)"
    stderr.emit("message", counts)
