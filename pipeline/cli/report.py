"""`pipeline report`: what all recorded runs cost."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from pipeline.cli import console
from pipeline.cli.options import Command, Heading, config_option, ledger_option, option, pass_options
from pipeline.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """The options of `pipeline report`."""

    files: tuple[str, ...]
    by: str
    since: str | None
    until: str | None
    form: str
    output: str | None
    include_simulated: bool
    ledger_file: str | None
    rebuild: bool
    config_path: str | None


@click.command(cls=Command, epilog="Example: pipeline report --by model --since 30d --format html -o costs.html")
@click.argument("files", nargs=-1, metavar="[RESULTS]...", help="Results files, only with --rebuild.")
@option(
    "--since",
    heading=Heading.INPUT,
    metavar="DAY",
    help="First day: 2026-11-26, or 30d for the last 30 days [default: all].",
)
@option(
    "--until",
    heading=Heading.INPUT,
    metavar="DAY",
    help="Last day; 7d leaves out the last 7 days [default: today].",
)
@option("--include-simulated", heading=Heading.INPUT, is_flag=True, help="Include simulated runs.")
@ledger_option
@config_option
@option(
    "--rebuild",
    heading=Heading.INPUT,
    is_flag=True,
    help="Do not report: record the runs of these results files again, using only the files.",
)
@option(
    "--by",
    heading=Heading.OUTPUT,
    metavar="WHAT",
    default="day",
    show_default=True,
    help="One row per day, week, month, model, provider, lane, run or tag:NAME.",
)
@option(
    "--format",
    "form",
    heading=Heading.OUTPUT,
    type=click.Choice(["table", "json", "csv", "html", "prometheus"]),
    metavar="FORMAT",
    default="table",
    show_default=True,
    help="table, json, csv, html (one page that needs no network) or prometheus.",
)
@option(
    "-o",
    "output",
    heading=Heading.OUTPUT,
    metavar="FILE",
    help="File to write instead of stdout; replaced only once the report is complete.",
)
@pass_options(ReportOptions)
def report(options: ReportOptions) -> None:
    """Report what all recorded runs cost.

    The report compares the period with the one before it. Days are UTC.
    """
    console.exit_with_errors(lambda: _report(options))


def _report(options: ReportOptions) -> int:
    from pipeline.accounting import report
    from pipeline.core import clock, config_file, environment

    # A ledger that is named needs no settings, so a mistake in them does not matter.
    if options.ledger_file:
        ledger = Path(options.ledger_file)
    else:
        ledger = environment.ledger_path(config_file.load(options.config_path))
    if options.rebuild != bool(options.files):
        raise UsageError("give results files together with --rebuild: pipeline report --rebuild RESULTS...")
    if options.rebuild:
        return _rebuild(ledger, options.files)
    costs = report.load(
        ledger,
        form=options.form,
        by=options.by,
        since=options.since,
        until=options.until,
        include_simulated=options.include_simulated,
        now=clock.utc_now(),
    )
    content = report.render(
        costs,
        options.form,
        width=shutil.get_terminal_size((120, 24)).columns,
        # A file keeps no colours, even if the command runs on a terminal.
        is_colored=sys.stdout.isatty() and not options.output,
    )
    if options.output:
        report.write(Path(options.output), content, form=options.form, ledger=ledger)
    else:
        console.write_stdout(content)
    return 0


def _rebuild(ledger: Path, files: tuple[str, ...]) -> int:
    """Record the runs of results files again; return 6 if some lines are damaged."""
    from pipeline.accounting import report
    from pipeline.core import object_store

    for file in files:
        if object_store.is_url(file):
            raise UsageError(
                f"--rebuild reads files on this machine, and {file!r} is in an object store",
                hint="copy its parts into one file and give the name of that file",
            )
    rebuilt = report.rebuild(ledger, [Path(file) for file in files])
    console.stderr_console().emit("message", f"{rebuilt} recorded in {str(ledger)!r}")
    return 6 if rebuilt.damaged else 0
