"""`pipeline estimate`: tokens, cost and duration of a run before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from pipeline.cli import console
from pipeline.cli.options import (
    Command,
    Heading,
    RequestOptions,
    config_option,
    input_tpm_option,
    inputs_argument,
    max_tokens_option,
    model_option,
    option,
    output_tpm_option,
    pass_options,
    provider_option,
    rpm_option,
    system_option,
    temperature_option,
)
from pipeline.core.errors import UsageError

if TYPE_CHECKING:
    from pipeline.core.config import Config
    from pipeline.core.types import Allowance
    from pipeline.runner.run import Progress
    from pipeline.runner.summary import Summary

    Limits = dict[tuple[str, str], Sequence[Allowance]]  # rate limits by provider and model


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateOptions(RequestOptions):
    """The options of `pipeline estimate`."""

    output: str | None
    sample: int | None
    as_json: bool

    def settings(self) -> Config:
        """Return the settings of the file with those of the options in their place."""
        from pipeline.core import config_file

        # The table shows live and batch prices in any case, and a sample must have its responses now.
        return config_file.load(self.config_path).override({**self.overrides(), "lane": "live"})


@click.command(cls=Command, epilog="Example: pipeline estimate questions.jsonl --sample 20")
@inputs_argument
@config_option
@provider_option
@model_option
@max_tokens_option
@temperature_option
@system_option
@option(
    "--sample",
    heading=Heading.SENDING,
    type=click.IntRange(min=1),
    metavar="N",
    help="Send and pay for the first N lines to learn from their responses; they stay in RESULTS.",
)
@rpm_option
@input_tpm_option
@output_tpm_option
@option(
    "-o",
    "output",
    heading=Heading.RESULTS,
    metavar="RESULTS",
    help="Results of the run [default for one file: NAME.results.jsonl].",
)
@option("--json", "as_json", heading=Heading.OUTPUT, is_flag=True, help="Print the estimate as JSON on stdout.")
@pass_options(EstimateOptions)
def estimate(options: EstimateOptions) -> None:
    """Estimate tokens, cost and duration of a run before it starts.

    Use the same options as for the run. Lines that already have a result in RESULTS are not counted, but they improve
    the estimate. Nothing is sent, except with --sample; the run reuses those results and does not pay for them again.

    Exit codes: 0 estimated · 1 some lines are invalid · 2 usage error; those of `pipeline run` if the sample stopped.
    """
    console.exit_with_errors(lambda: _estimate(options))


def _estimate(options: EstimateOptions) -> int:
    from pipeline.accounting import estimate
    from pipeline.cli import estimate_table, outputs
    from pipeline.core import clock, environment
    from pipeline.inputs import reader

    settings = options.settings()
    sources = reader.sources(options.inputs, but=outputs.results_path(options.output))
    results = _results_of(options, sources)
    limits: Limits = {}
    if options.sample and results:
        summary, limits = _send_sample(options, settings, sources, results)
        # Failed lines (1) or damage found in older results (6) still leave responses to learn from.
        if summary.exit_code not in (0, 1, 6):
            return summary.exit_code
    with outputs.local_results(results) if results else nullcontext() as path:
        estimated = estimate.estimate(
            sources,
            settings,
            provider=options.provider,
            model=options.model,
            path=path,
            called=results,
            ledger=environment.ledger_path(settings),
            learned=limits,
            at=clock.utc_now(),
        )
    if options.as_json:
        console.print_json([estimated.as_dict()])
    else:
        estimate_table.show(console.stdout_console(), estimated)
    return estimated.exit_code


def _results_of(options: EstimateOptions, sources: Sequence[str]) -> str | None:
    """Return the results of the run; None if none are named and no sample needs them.

    `UsageError` if a sample needs them and it is not clear where they are.
    """
    from pipeline.cli import outputs
    from pipeline.inputs.sources import STDIN

    has_default = len(sources) == 1 and STDIN not in sources
    if not options.output and not options.sample and not has_default:
        return None
    [target] = outputs.output_targets(sources, options.output, None)
    if options.sample and STDIN in sources:
        raise UsageError("--sample requires files: stdin can be read only once")
    return target.output


def _send_sample(
    options: EstimateOptions, settings: Config, sources: Sequence[str], results: str
) -> tuple[Summary, Limits]:
    """Run the first lines; return also the rate limits of each model that the responses reported."""
    import anyio

    from pipeline.cli.summary import show_summary
    from pipeline.core import process
    from pipeline.runner import local
    from pipeline.runner.options import Options

    stderr = console.stderr_console()
    limits: Limits = {}

    async def keep_limits(get_progress: Callable[[], Progress]) -> None:
        """Wait for the end of the run, and keep the limits that it knows then."""
        try:
            await anyio.sleep_forever()
        finally:
            for queue in get_progress().sender.queues:
                limits[queue.provider, queue.model] = queue.allowances

    def notify(message: str) -> None:
        stderr.emit("message", message)

    async def work() -> Summary:
        return await local.run_batch(
            sources,
            output=results,
            config=settings,
            options=Options(provider=options.provider, model=options.model, limit=options.sample),
            watch=keep_limits,
            say=notify,
            handle_signals=True,
        )

    summary = process.run(work)
    show_summary(stderr, summary, None)
    if summary.run.succeeded:
        notify("these results are kept: a run with the same input and options does not send them again")
    return summary, limits
