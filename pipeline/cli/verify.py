"""`pipeline verify`: prove from the files that results are complete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from pipeline.cli import console
from pipeline.cli.options import Command, Heading, config_option, option, pass_options

if TYPE_CHECKING:
    from pipeline.accounting.verify import VerifyReport


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """The options of `pipeline verify`."""

    results: str
    inputs: tuple[str, ...]
    config_path: str | None
    as_json: bool


@click.command(cls=Command, epilog="Example: pipeline verify answers.jsonl --input questions.jsonl")
@click.argument("results", metavar="RESULTS", help="A results file, or s3://BUCKET/FOLDER/ (gs://, az://).")
@option(
    "--input",
    "inputs",
    heading=Heading.INPUT,
    multiple=True,
    metavar="INPUT",
    help="Input of the run that wrote RESULTS; repeatable.",
)
@config_option
@option("--json", "as_json", heading=Heading.OUTPUT, is_flag=True, help="Print the findings as JSON on stdout.")
@pass_options(VerifyOptions)
def verify(options: VerifyOptions) -> None:
    """Check, using only the files, that RESULTS are complete.

    It proves that no line is torn or appears twice, and that totals and ledger are the sum of the lines. With --input,
    it also proves that every line of the input has exactly one result.

    Exit codes: 0 proven · 1 another problem · 2 usage error · 6 results are damaged.
    """
    console.exit_with_errors(lambda: _verify(options))


def _verify(options: VerifyOptions) -> int:
    from pipeline.accounting import verify
    from pipeline.cli import outputs
    from pipeline.core import config_file, environment

    settings = config_file.load(options.config_path)
    with outputs.local_results(options.results) as path:
        report = verify.verify(
            path,
            options.inputs,
            settings,
            ledger=environment.ledger_path(settings),
            name=outputs.results_path(options.results),
        )
    if options.as_json:
        console.print_json([report.as_dict()])
    else:
        _print_report(report, has_inputs=bool(options.inputs))
    return report.exit_code


def _print_report(report: VerifyReport, *, has_inputs: bool) -> None:
    from pipeline.core.text import escape

    for problem in report.shown:
        print(f"✗ {escape(problem)}")
    hidden = report.problems.total() - len(report.shown)
    if hidden:
        print(f"✗ … and {hidden:,} more")
    for note in report.notes:
        print(f"! {escape(note)}")
    verdict = "NOT PROVEN" if report.exit_code else "proven"
    if has_inputs:
        print(f"{verdict}: {report.results:,} results, {report.inputs:,} input lines")
    else:
        print(f"{verdict}: {report.results:,} results; give --input to check that no line is missing")
