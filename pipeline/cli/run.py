"""`pipeline run`: send every line of the input and write the results."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import console
from pipeline.cli.options import (
    Command,
    Heading,
    KeyValue,
    LazyChoice,
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
from pipeline.core.errors import PipelineError, UsageError

if TYPE_CHECKING:
    from pipeline.cli.console import Console
    from pipeline.cli.outputs import OutputTarget
    from pipeline.core.config import Config
    from pipeline.runner import options as runner_options
    from pipeline.runner.summary import Summary

    RunBatch = Callable[..., Coroutine[Any, Any, Summary]]

_END_ALL = (5, 130, 143)  # exit codes of one input after which the others are not started
_BY_URGENCY = (0, 1, 75, 6, 4, 3, 5, 2, 143, 130)  # exit codes, the most urgent last


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(RequestOptions):
    """The options of `pipeline run`."""

    output: str | None
    directory: str | None
    limit: int | None
    timeout: float | None
    concurrency: int | None
    retry_failed: bool
    dedupe: bool
    simulate: bool
    ray: str | None
    lane: str | None
    deadline: str | None
    no_wait: bool
    form: str | None
    ordered: bool
    durability: str | None
    echo_request: bool
    fresh: bool
    tags: tuple[tuple[str, str], ...]
    max_cost: float | None
    progress: str | None
    log_format: str
    quiet: bool
    as_json: bool

    def settings(self) -> Config:
        """Return the settings of the file with those of the options in their place, validated once."""
        from pipeline.core import config_file

        loaded = config_file.load(self.config_path)
        changes = self.overrides() | {
            "lane": self.lane,
            "sending": {"timeout": self.timeout, "concurrency": self.concurrency},
            "output": {
                "format": self.form,
                "durability": self.durability,
                # A flag that is not given leaves the setting as it is.
                "ordered": self.ordered or None,
                "echo_request": self.echo_request or None,
            },
            "budget": {"per_run": self.max_cost},
            "batches": {"deadline": self.deadline},
        }
        # Tags are added to those of the file; anything else replaces what the file says.
        if self.tags:
            changes["tags"] = {**loaded.tags, **dict(self.tags)}
        return loaded.override(changes)

    def for_runner(self) -> runner_options.Options:
        """Return the options that are not settings."""
        from pipeline.runner.options import Options

        return Options(
            provider=self.provider,
            model=self.model,
            limit=self.limit,
            retry_failed=self.retry_failed,
            fresh=self.fresh,
            dedupe=self.dedupe,
            simulate=self.simulate,
            no_wait=self.no_wait,
        )


def _output_formats() -> list[str]:
    from pipeline.core.types import OutputFormat

    return [form.value for form in OutputFormat]


@click.command(cls=Command, epilog="Example: pipeline run questions.jsonl -o answers.jsonl --max-tokens 500")
@inputs_argument
@option("--limit", heading=Heading.INPUT, type=click.IntRange(min=1), metavar="N", help="Use only the first N lines.")
@config_option
@provider_option
@model_option
@max_tokens_option
@temperature_option
@system_option
@option(
    "--timeout", heading=Heading.SENDING, type=float, metavar="S", help="Seconds that one attempt may take in total."
)
@option("--concurrency", heading=Heading.SENDING, type=int, metavar="N", help="Maximum number of requests in flight.")
@option("--retry-failed", heading=Heading.SENDING, is_flag=True, help="Send lines that failed in earlier runs again.")
@option("--dedupe", heading=Heading.SENDING, is_flag=True, help="Send identical requests once and copy the response.")
@option(
    "--simulate",
    heading=Heading.SENDING,
    is_flag=True,
    help="Send to a built-in simulator: no key, no network, no cost.",
)
@option(
    "--ray",
    heading=Heading.SENDING,
    metavar="ADDRESS",
    help="Send from a Ray cluster: auto, HOST:PORT, ray://HOST:10001, or local.",
)
@rpm_option
@input_tpm_option
@output_tpm_option
@option(
    "--lane",
    heading=Heading.BATCH,
    type=click.Choice(["live", "batch", "auto"]),
    metavar="LANE",
    help="live: one call per request; batch: batch APIs, at half the price; auto: batches first, then live calls "
    "for what they leave open.",
)
@option(
    "--deadline",
    heading=Heading.BATCH,
    metavar="TIME",
    help="With --lane auto: finish within this time: 90m, 6h, 1d.",
)
@option(
    "--no-wait",
    heading=Heading.BATCH,
    is_flag=True,
    help="Do not wait for batches (exit 75); the same command collects them later.",
)
@option(
    "-o",
    "output",
    heading=Heading.RESULTS,
    metavar="RESULTS",
    help="Results file, or s3://BUCKET/FOLDER/ [default for one file: NAME.results.jsonl].",
)
@option("-d", "directory", heading=Heading.RESULTS, metavar="DIR", help="Directory for one results file per input.")
@option(
    "--format",
    "form",
    heading=Heading.RESULTS,
    type=LazyChoice(_output_formats),
    help="Format of result lines.",
)
@option("--ordered", heading=Heading.RESULTS, is_flag=True, help="Sort results into input order when the run ends.")
@option(
    "--durability",
    heading=Heading.RESULTS,
    type=click.Choice(["full", "fast"]),
    help="full: sync results to disk; fast: leave that to the kernel.",
)
@option("--fresh", heading=Heading.RESULTS, is_flag=True, help="Move earlier results aside and start over.")
@option("--echo-request", heading=Heading.RESULTS, is_flag=True, help="Include the request as sent in its result line.")
@option(
    "--tag",
    "tags",
    heading=Heading.RESULTS,
    multiple=True,
    type=KeyValue(),
    help="Label for totals and reports; repeatable.",
)
@option(
    "--max-cost", heading=Heading.MONEY, type=float, metavar="USD", help="Stop before more than this is spent (exit 4)."
)
@option(
    "--progress",
    heading=Heading.OUTPUT,
    type=click.Choice(["auto", "bar", "log", "none"]),
    help="How to show progress; auto: a bar on a terminal, else a line per minute.",
)
@option(
    "--log-format",
    heading=Heading.OUTPUT,
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Format of stderr; json: one object per line.",
)
@option("-q", "--quiet", heading=Heading.OUTPUT, is_flag=True, help="Print only errors.")
@option("--json", "as_json", heading=Heading.OUTPUT, is_flag=True, help="Print the summary as JSON on stdout.")
@pass_options(RunOptions)
def run(options: RunOptions) -> None:
    """Send every line of INPUT and write one result per line.

    Running the same command again sends only what is missing; what is done costs nothing.

    \b
    Exit codes:
      0        every line has a response
      1        some lines failed
      2        usage error, nothing was sent
      3        stopped by the provider
      4        budget reached
      5        storage error
      6        damaged results found
      75       try again later
      130/143  interrupted; repeat the command to continue
    """
    stderr = console.stderr_console(is_json=options.log_format == "json", is_quiet=options.quiet)
    console.exit_with_errors(lambda: _run(options, stderr), stderr)


def _run(options: RunOptions, stderr: Console) -> int:
    settings = options.settings()
    if options.deadline and settings.lane != "auto":
        raise UsageError("--deadline requires --lane auto, which sends requests of late batches live")
    if options.no_wait and options.simulate:
        raise UsageError(
            "--no-wait does not work with --simulate: that simulator ends with the command",
            hint="start `pipeline simulate` in another terminal and set ANTHROPIC_BASE_URL and OPENAI_BASE_URL to it",
        )

    def work() -> int:
        return _run_all(options, settings, stderr)

    # A simulated run must not look like a sign of life of the real job that the ping URL watches.
    code = work() if options.simulate else _with_pings(work, settings, stderr)
    # A thread that waits for a pipe cannot be stopped, and Python would wait for it.
    if any(_may_block(name) for name in options.inputs):
        console.exit_now(code)
    return code


def _may_block(name: str) -> bool:
    """Return True for an input whose reader may still wait for more when the run ends."""
    return name == "-" or Path(name).is_fifo()


def _run_all(options: RunOptions, settings: Config, stderr: Console) -> int:
    """Write all results files, print the summaries, and return the most urgent exit code."""
    from pipeline.cli import outputs
    from pipeline.core import process

    targets = outputs.output_targets(options.inputs, options.output, options.directory)
    if not targets:
        # A drop folder (-d) may be empty; that is no error.
        stderr.emit("message", "nothing to do: there are no inputs")
    runs = _Runs(options, settings, stderr)
    with _run_batch(options.ray) as run_batch:
        process.run(lambda: runs.run(targets, run_batch))
    not_started = len(targets) - len(runs.codes)
    if not_started:
        stderr.emit("warning", f"{not_started:,} more input(s) were not started", not_begun=not_started)
    if options.as_json:
        console.print_json([summary.as_dict() for summary in runs.summaries])
    return _most_urgent(runs.codes)


def _most_urgent(codes: Sequence[int]) -> int:
    return max(codes, key=_BY_URGENCY.index, default=0)


@contextmanager
def _run_batch(ray: str | None) -> Iterator[RunBatch]:
    """Yield the function that runs one input: on this machine, or on a Ray cluster."""
    if ray is None:
        from pipeline.runner import local

        yield local.run_batch
        return
    from pipeline.runner import cluster

    session = cluster.Session(ray)
    try:
        yield partial(cluster.run_batch, ray=session)
    finally:
        session.close()


class _Runs:
    """Runs one results file after the other; collects their exit codes and summaries."""

    def __init__(self, options: RunOptions, settings: Config, stderr: Console) -> None:
        self._options = options
        self._settings = settings
        self._stderr = stderr
        self.codes: list[int] = []
        self.summaries: list[Summary] = []

    async def run(self, targets: Iterable[OutputTarget], run_batch: RunBatch) -> None:
        """Run all of them; a failure ends only its own run, unless it would end the others too."""
        for target in targets:
            ends_all = await self._run_one(target, run_batch)
            if ends_all:
                return

    async def _run_one(self, target: OutputTarget, run_batch: RunBatch) -> bool:
        """Run one of them; return True if the others should not be started."""
        from pipeline.cli import progress
        from pipeline.cli.summary import show_summary

        mode = self._options.progress or self._settings.progress
        try:
            summary = await run_batch(
                target.inputs,
                output=target.output,
                config=_with_rest_of_cap(self._settings, self.summaries),
                options=self._options.for_runner(),
                watch=progress.watcher(self._stderr, mode),
                say=partial(self._stderr.emit, "message"),
                handle_signals=True,
            )
        except PipelineError as exc:
            console.emit_error(self._stderr, exc)
            self.codes.append(exc.exit_code)
            return exc.exit_code in _END_ALL
        self.summaries.append(summary)
        self.codes.append(summary.exit_code)
        show_summary(self._stderr, summary, _resume_command(summary))
        return summary.ends_all or summary.exit_code in _END_ALL


def _with_rest_of_cap(settings: Config, summaries: Sequence[Summary]) -> Config:
    """Return settings in which the cap of a run is what earlier inputs of this command left of it."""
    cap = settings.budget.per_run
    if cap is None:
        return settings
    used_nano_dollars = sum(summary.cap_used for summary in summaries)
    # Money is counted in whole nano-dollars.
    left = cap - Decimal(used_nano_dollars).scaleb(-9)
    return settings.override({"budget": {"per_run": max(Decimal(0), left)}})


def _resume_command(summary: Summary) -> str | None:
    """Return the command that continues a run; None if there is nothing to continue."""
    if not summary.pending and summary.status == "completed":
        return None
    # With --fresh it would start over.
    words = [word for word in sys.argv[1:] if word != "--fresh"]
    return shlex.join(["pipeline", *words])


# ── the ping URL ──────────────────────────────────────────────────────────────────────────────────────────────────


def _with_pings(work: Callable[[], int], settings: Config, stderr: Console) -> int:
    """Do the work; with a `ping_url`, send a ping when it starts, and one with the exit code when it ends."""
    if settings.ping_url is None:
        return work()
    url = settings.ping_url.rstrip("/")
    _ping(f"{url}/start", settings, stderr)
    code = 1  # Python's own, when a bug ends the work
    try:
        code = work()
    except PipelineError as exc:
        code = exc.exit_code
        raise
    finally:
        _ping(f"{url}/{code}" if code else url, settings, stderr)
    return code


def _ping(url: str, settings: Config, stderr: Console) -> None:
    """Send a ping; a failure is only a warning.

    The warning does not name the URL: it is a secret, as anyone who knows it can send pings.
    """
    from pipeline.core import http, process

    try:
        status = process.run(lambda: http.ping(url, settings.sending))
    except PipelineError as exc:
        stderr.emit("warning", f"ping failed (ping_url): {exc.message}")
        return
    if not 200 <= status < 300:
        stderr.emit("warning", f"ping failed (ping_url): HTTP {status}")
