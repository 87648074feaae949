"""`pipeline batches`: the providers' batches of past runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import console
from pipeline.cli.options import Command, Heading, config_option, ledger_option, option, pass_options

if TYPE_CHECKING:
    from pipeline.core.config import Config
    from pipeline.dispatch.batch.manage import Listed


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchesOptions:
    """The options that all commands of `pipeline batches` take."""

    config_path: str | None
    ledger_file: str | None
    as_json: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOptions(BatchesOptions):
    """The options of `pipeline batches list`."""

    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusOptions(BatchesOptions):
    """The options of `pipeline batches status`."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelOptions(BatchesOptions):
    """The options of `pipeline batches cancel`."""

    ids: tuple[str, ...]
    forget: bool


_ids_argument = click.argument(
    "ids", nargs=-1, required=True, metavar="ID...", help="Ids of batches, as `pipeline batches list` prints them."
)
_json_option = option(
    "--json", "as_json", heading=Heading.OUTPUT, is_flag=True, help="Print one JSON object per batch on stdout."
)


@click.group(invoke_without_command=True, epilog="Example: pipeline batches cancel msgbatch_01Hk")
@click.pass_context
def batches(context: click.Context) -> None:
    """List, query and cancel the batches of past runs."""
    if context.invoked_subcommand is None:
        context.invoke(list_batches)


@batches.command("list", cls=Command, epilog="Example: pipeline batches list answers.jsonl")
@click.argument("files", nargs=-1, metavar="[RESULTS]...", help="Results files or s3://BUCKET/FOLDER/ [default: all].")
@config_option
@ledger_option
@_json_option
@pass_options(ListOptions)
def list_batches(options: ListOptions) -> None:
    """List the batches of recorded runs, with their last known status.

    This does not ask the providers.
    """
    console.exit_with_errors(lambda: _list(options))


@batches.command("status", cls=Command, epilog="Example: pipeline batches status batch_67f7")
@_ids_argument
@config_option
@ledger_option
@_json_option
@pass_options(StatusOptions)
def batch_status(options: StatusOptions) -> None:
    """Ask the providers for the status of batches."""
    console.exit_with_errors(lambda: _status(options))


@batches.command("cancel", cls=Command, epilog="Example: pipeline batches cancel msgbatch_01Hk")
@_ids_argument
@option(
    "--forget",
    heading=Heading.BATCH,
    is_flag=True,
    help="Give up on batches: do not collect their answers; the next run sends all their requests again.",
)
@config_option
@ledger_option
@_json_option
@pass_options(CancelOptions)
def cancel_batches(options: CancelOptions) -> None:
    """Cancel batches.

    The next run collects the answers that they have and sends the rest again. Use --forget for a batch that its
    provider lost or never finishes.
    """
    console.exit_with_errors(lambda: _cancel(options))


def _list(options: ListOptions) -> int:
    _, found = _batches(options, options.files)
    if options.as_json:
        _show(found, options)
    elif found:
        # Open ones at the end, where a reader looks first.
        _show(sorted(found, key=lambda each: each.record.is_open), options)
    else:
        console.stderr_console().emit("message", "no recorded run has batches")
    return 0


def _status(options: StatusOptions) -> int:
    from pipeline.core import process
    from pipeline.dispatch.batch import manage

    settings, found = _batches(options)
    chosen = manage.chosen(found, options.ids)
    _show(process.run(lambda: manage.status(settings, chosen)), options)
    return 0


def _cancel(options: CancelOptions) -> int:
    from pipeline.core import process
    from pipeline.dispatch.batch import manage

    settings, found = _batches(options)
    chosen = manage.chosen(found, options.ids)
    if not options.forget:
        _show(process.run(lambda: manage.cancel(settings, chosen)), options)
        return 0
    forgotten = [manage.give_up(each) for each in chosen]
    # Without an id a batch never reached its provider.
    requests = sum(each.record.requests for each in forgotten if each.record.batch_id)
    if requests:
        warning = f"the provider may still charge for what it did of {requests:,} requests"
        console.stderr_console().emit("warning", warning)
    _show(forgotten, options)
    return 0


def _batches(options: BatchesOptions, files: Sequence[str] = ()) -> tuple[Config, list[Listed]]:
    """Return the settings, and the batches of these results or, without any, of all recorded runs."""
    from pipeline.core import config_file, environment
    from pipeline.dispatch.batch import manage

    settings = config_file.load(options.config_path)
    ledger = Path(options.ledger_file) if options.ledger_file else environment.ledger_path(settings)
    return settings, manage.listed(ledger, settings, files)


def _show(found: Sequence[Listed], options: BatchesOptions) -> None:
    from pipeline.cli import batches_table

    if options.as_json:
        console.print_json([each.as_dict() for each in found])
    else:
        batches_table.show(console.stdout_console(), found)
